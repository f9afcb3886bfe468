"""Conversions between local paths and URLs.

Databricks mounts its stores on every machine of a cluster: volumes under /Volumes, all of DBFS under /dbfs. Spark's
names for them, dbfs:/…, cannot be read by Python's open, pyarrow or Petastorm.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_SECRET_PARAMETER = re.compile("(?i)key|secret|password|passwd|pwd|token|credential|sig=")  # in a URL's query


def local_path(place: str) -> str | None:
    """The local path of a file: or dbfs: URL; a path is returned as it is. None: another store (s3://, abfss://,
    hdfs://, …)."""
    scheme, colon, rest = place.partition(":/")
    if not colon or not scheme.replace("+", "").isalnum():
        return place
    path = "/" + rest.lstrip("/")
    if scheme == "dbfs":
        return path if re.match(r"/Volumes(/|$)", path) else f"/dbfs{path}"
    return path if scheme == "file" else None


def is_mount(path: Path) -> bool:
    """Whether the path is on one of Databricks' mounts."""
    return path.parts[:2] in (("/", "Volumes"), ("/", "dbfs"))


def file_url(place: str) -> str:
    """The URL that Petastorm needs: file:// and an absolute path; a URL of another store is returned as it is."""
    path = local_path(place)
    return place if path is None else f"file://{Path(path).absolute()}"


def file_of_table(uri: str) -> str:
    """A data file's path or URL from the percent-encoded one of delta-rs or Spark (a space is %20), which Petastorm
    would not decode."""
    return unquote(uri)


def holds_secret(place: str) -> bool:
    """Whether a URL holds credentials, which belong in the environment: a user or password, a key."""
    parts = urlsplit(place)
    # abfss://container@account…: what parses as a user is the container.
    user = None if parts.scheme in ("abfs", "abfss") else parts.username
    # A secret may contain a slash, where urlsplit would end the host.
    credentials = parts.scheme and re.search(r"//[^@]*:[^@]*@", place)
    return bool(user or parts.password or credentials or _SECRET_PARAMETER.search(unquote(parts.query)))


def not_for_training(place: str) -> str | None:
    """The first part of a folder's name that Petastorm (# and ? end a URL's path) or delta-rs (reads %41 as A, and
    panics at | and ^) can't read; None if there is none."""
    match = re.search(r"[#?|^]|%[0-9A-Fa-f]{2}", place)
    return match[0] if match else None
