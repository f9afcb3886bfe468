"""Renders a page in headless Chromium: python scripts/check_page.py PAGE [--out FOLDER]

The last line is one JSON object: console lines, network requests, and the page's width on a 360-pixel phone. The exit
code is 1 if there is any console line or request, or if the page is wider than the phone. Leaves the renderings in
FOLDER: phone.png, screen.png, print.pdf. The Debian package is `chromium`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PHONE, SCREEN = (360, 6000), (1280, 6000)
LONGEST = 120
_NO_ORIGIN = "not an origin"
_LOCAL = ("file:", "data:", "blob:", "chrome:", "about:")
# The page in a frame as wide as a phone: Chromium's own window is never that narrow.
_WIDTHS = """<!doctype html><iframe id="page" src="{page}" width="{width}" height="3000"></iframe>
<script>document.getElementById("page").onload = event => {{
  const root = event.target.contentDocument.documentElement;
  document.title = root.scrollWidth; document.body.dataset.width = root.scrollWidth;
}};</script>"""


def chromium(binary: str, arguments: list[str], profile: Path) -> tuple[str, str]:
    """Returns stdout and stderr of one headless run.

    Raises:
        SystemExit: it failed or timed out.
    """
    common = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    try:
        process = subprocess.run(
            [binary, *common, *quiet, "--enable-logging=stderr", *arguments],
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"{binary} took longer than {LONGEST} s over {arguments[-1]}: check the page by hand, or try again")
    if process.returncode:
        sys.exit(f"{binary} ended with exit code {process.returncode}: {process.stderr.strip().splitlines()[-1:]}")
    return process.stdout, process.stderr


def requests(net_log: Path) -> set[str]:
    """The non-local URLs that the page requested; Chromium's own requests (updates) have no origin."""
    events = json.loads(net_log.read_text())["events"]
    of_page = (
        event["params"] for event in events if event.get("params", {}).get("initiator", _NO_ORIGIN) != _NO_ORIGIN
    )
    return {of["url"] for of in of_page if "url" in of and not of["url"].startswith(_LOCAL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="an HTML file")
    parser.add_argument("--out", type=Path, default=Path("build/page"), help="folder for the pictures")
    parser.add_argument("--chromium", default="chromium", help="the Chromium executable")
    arguments = parser.parse_args()
    binary = shutil.which(arguments.chromium)
    if binary is None:
        sys.exit(
            f"{arguments.chromium} is not installed: install it (Debian: apt-get install chromium), or name its path "
            "with --chromium"
        )
    if not arguments.page.exists():
        sys.exit(f"{arguments.page} does not exist: `trailvec write_report` writes one into a model's folder")
    address = arguments.page.resolve().as_uri()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        profile, frame = Path(folder) / "profile", Path(folder) / "frame.html"
        renderings = {
            name: [f"--screenshot={arguments.out / name}.png", f"--window-size={width},{height}"]
            for name, (width, height) in (("phone", PHONE), ("screen", SCREEN))
        }
        renderings["print"] = [f"--print-to-pdf={arguments.out / 'print.pdf'}", "--no-pdf-header-footer"]
        stderr, urls = "", set[str]()
        for name, options in renderings.items():
            net_log = Path(folder) / f"{name}.json"
            stderr += chromium(binary, [*options, f"--log-net-log={net_log}", address], profile)[1]
            urls |= requests(net_log)
        frame.write_text(_WIDTHS.format(page=address, width=PHONE[0]))
        document = chromium(
            binary,
            ["--allow-file-access-from-files", "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()],
            profile,
        )[0]
    console = [line for line in stderr.splitlines() if "CONSOLE" in line]
    match = re.search(r'data-width="(\d+)"', document)
    if match is None:
        sys.exit(f"{arguments.page} was not loaded inside a frame: check it by hand")
    width = int(match.group(1))
    for line in console:
        print(line, file=sys.stderr)
    for line in sorted(urls):
        print(f"requested {line}", file=sys.stderr)
    print(json.dumps({"console_lines": len(console), "requests": len(urls), "width_on_a_phone": width}))
    sys.exit(bool(console or urls or width > PHONE[0]))


if __name__ == "__main__":
    main()
