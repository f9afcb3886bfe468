"""The command `trailvec`: runs one stage or all of them, lists and maintains the tables, answers SQL.

trailvec run --conf conf/local.toml
trailvec sessionize --conf conf/local.toml --set sessionize.gap_minutes=45
trailvec evaluate --conf conf/local.toml --compare MODEL_A MODEL_B
trailvec sql --conf conf/local.toml "SELECT count(*) FROM events"
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.config import Config, load_config
from jobs.errors import TrailvecError, explain, first_line
from jobs.progress import meanwhile
from jobs.runtime import Report, Runtime, Stage
from jobs.tables import TABLES

_out = Console(stderr=True, highlight=False, emoji=False)
_STDOUT = 1  # its file descriptor
# Characters by which a value of the log could move a terminal's cursor, clear its screen or set its title.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; returns if all went well, else exits with the code of `guarded`."""
    arguments = _parser().parse_args(argv)
    # Databricks calls this function in its own process, where any exit, even with 0, can count as a failure.
    if code := guarded(lambda: _run(arguments), debug=arguments.debug):
        sys.exit(code)


def stage_main(name: str) -> None:
    """The entry point of one stage: `spark-submit jobs/NAME.py …`, `trailvec-NAME …`."""
    main([name, *sys.argv[1:]])


def _parser() -> argparse.ArgumentParser:
    from jobs.pipeline import ASIDE, STAGES  # noqa: PLC0415 - the stages import this module's stage_main

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--conf",
        metavar="FILE",
        default=os.environ.get("TRAILVEC_CONF"),
        help="configuration file, TOML (default: $TRAILVEC_CONF)",
    )
    common.add_argument(
        "--set", metavar="a.b=c", action="append", default=[], help="one setting; wins over the file; repeatable"
    )
    common.add_argument("--show-config", action="store_true", help="print the resolved configuration as JSON and stop")
    common.add_argument("--debug", action="store_true", help="show stack traces")
    parser = argparse.ArgumentParser(
        prog="trailvec",
        description="Event logs in, vectors of users and items out.",
        epilog="A stage whose tables are up to date is skipped; --force runs it anyway.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, **texts: Any) -> argparse.ArgumentParser:
        # What the list of commands says of one, its own --help says too.
        return commands.add_parser(name, parents=[common], **{"description": texts["help"], **texts})

    _add_run(add, STAGES)
    for stage in (*STAGES, *ASIDE):
        _add_stage(add, stage)
    for add_one in (_add_tables, _add_audit, _add_maintain, _add_tune, _add_retire, _add_erase, _add_sql, _add_serve):
        add_one(add)
    return parser


def _about(stage: Stage) -> str:
    """What the stage reads and writes, and which sections of the configuration change its result."""
    names = {"reads": stage.reads, "writes": stage.writes}
    about = [f"{what} {', '.join(table.name for table in tables)}" for what, tables in names.items() if tables]
    settings = ", ".join(f"[{section}]" for section in stage.settings)
    settings_note = f" Its result depends on the settings {settings} (--show-config prints them)." if settings else ""
    also = f" {stage.also}" if stage.also else ""
    return f"It {' and '.join(about)}.{also}{settings_note}"


def _count(text: str) -> int:
    """Parses an argument: a whole number of at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text}")
    return int(text)


def _port(text: str) -> int:
    """Parses an argument: a port that clients can connect to."""
    if not (text.isdecimal() and 0 < int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, found {text}")
    return int(text)


def _run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.conf, arguments.set)
    if arguments.show_config:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
    else:
        arguments.action(config, arguments)


# ---- the commands: the arguments and the action of each; an action imports what it alone needs ----------------------

_Add = Callable[..., argparse.ArgumentParser]  # (name, help, description (default: help), epilog) → the parser


def _add_run(add: _Add, stages: Sequence[Stage]) -> None:
    command = add("run", help="run all stages, or a range of them (--from, --to)")
    names = [stage.name for stage in stages]
    command.add_argument("--from", dest="first", choices=names, default=names[0], help="the first stage to run")
    command.add_argument("--to", dest="last", choices=names, default=names[-1], help="the last stage to run")
    command.add_argument("--force", action="store_true", help="also run stages that are up to date")
    command.set_defaults(action=partial(_run_range, stages))


def _run_range(stages: Sequence[Stage], config: Config, arguments: argparse.Namespace) -> None:
    names = [stage.name for stage in stages]
    first, last = names.index(arguments.first), names.index(arguments.last)
    if first > last:
        raise TrailvecError(f"--from {arguments.first} comes after --to {arguments.last}: swap them")
    run_stages(Runtime(config), stages[first : last + 1], arguments.force)


def _add_stage(add: _Add, stage: Stage) -> None:
    command = add(stage.name, help=stage.help, epilog=_about(stage))
    command.add_argument("--force", action="store_true", help="run it even if it is up to date")
    if stage.name == "evaluate":
        command.add_argument(
            "--compare",
            nargs=2,
            metavar=("MODEL_A", "MODEL_B"),
            help="only print how two models (folders under models/) differ on the same users",
        )
    command.set_defaults(action=partial(_run_stage, stage))


def _run_stage(stage: Stage, config: Config, arguments: argparse.Namespace) -> None:
    if stage.name == "evaluate" and arguments.compare:
        from jobs.compare_models import run_compare  # noqa: PLC0415

        run_compare(Runtime(config), tuple(arguments.compare))
    else:
        run_stages(Runtime(config), [stage], arguments.force)


def _add_tables(add: _Add) -> None:
    command = add("tables", help="list every table: location, rows, version, size, last writer")
    command.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    command.set_defaults(action=_tables)


def _tables(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.list_tables import print_tables  # noqa: PLC0415

    print_tables(Runtime(config), arguments.json)


def _add_audit(add: _Add) -> None:
    command = add("audit", help="show who ran what and when: the commits of all tables, newest first")
    command.add_argument(
        "--table", metavar="NAME", choices=[table.name for table in TABLES], help="only the commits of this table"
    )
    command.add_argument(
        "--since", metavar="TIME", help="only later commits; for example 2026-01-31 or 2026-01-31T12:00:00Z"
    )
    command.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    command.set_defaults(action=_audit)


def _audit(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.audit import print_audit  # noqa: PLC0415

    print_audit(Runtime(config), arguments.table, arguments.since, arguments.json)


def _add_maintain(add: _Add) -> None:
    command = add(
        "maintain_tables",
        help="compact and cluster tables, delete old files, and old rows if maintain.keep_days is set, report sizes",
        epilog="Its settings are [maintain] (--show-config prints them).",
    )
    command.add_argument(
        "--table",
        metavar="NAME",
        action="append",
        default=[],
        choices=[table.name for table in TABLES],
        help="only this table; repeatable",
    )
    command.add_argument("--dry-run", action="store_true", help="report only")
    command.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    command.set_defaults(action=_maintain)


def _maintain(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.maintain_tables import run_maintain  # noqa: PLC0415

    run_maintain(Runtime(config), arguments.table, arguments.dry_run, arguments.json)


def _add_tune(add: _Add) -> None:
    command = add("tune", help="search for better training settings; if stopped, the next run continues")
    command.add_argument(
        "--trials",
        type=_count,
        default=20,
        help="total number of trainings, including those of earlier runs; the first has the configured settings "
        "(default: 20)",
    )
    command.set_defaults(action=_tune)


def _tune(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.tune import run_tune  # noqa: PLC0415

    runtime = Runtime(config)
    with _progress(runtime, "tune"):
        found = run_tune(runtime, arguments.trials)
    print("\n".join(found))  # not before: on a terminal, the status line takes stdout to stderr


def _add_retire(add: _Add) -> None:
    command = add(
        "retire_model",
        help="remove an old model's vectors, profiles and neighbours from the tables; the current model is refused",
    )
    command.add_argument("version", help="the model's version, a folder under models/")
    command.set_defaults(action=_retire)


def _retire(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.retire_model import retire  # noqa: PLC0415

    _print_report(retire(Runtime(config), arguments.version))


def _add_erase(add: _Add) -> None:
    command = add(
        "erase_users",
        help="erase people from every table, permanently, with a receipt",
        description="Erases people from every table that holds them and keeps them out; the receipt is in `erasures`. "
        "From then on they are known only by hashes keyed with TRAILVEC_ERASE_KEY, which must never change.",
    )
    command.add_argument(
        "users",
        nargs="?",
        metavar="FILE",
        help="a text file with one user id per line, or Parquet or CSV with a column user_id; also a URI (hdfs://, "
        "s3a://)",
    )
    command.add_argument(
        "--sql",
        metavar="QUERY",
        help="instead of a file: a query over the tables with a column user_id; without ids in it, which the "
        "machine's process list would show",
    )
    command.add_argument("--requested-by", metavar="NAME", help="who asked for it; recorded in the receipt")
    command.add_argument(
        "--finish",
        action="store_true",
        help="after maintain_tables: complete killed erasures, and close the receipts whose users are no longer in "
        "any file on disk",
    )
    command.set_defaults(action=_erase)


def _erase(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.erase_users import erase, finish  # noqa: PLC0415

    who = (arguments.users, arguments.sql, arguments.requested_by)
    if arguments.finish and any(who):
        raise TrailvecError("--finish applies to all erasures: use it without FILE, --sql and --requested-by")
    runtime = Runtime(config)
    with _progress(runtime, "erase_users"):
        report = finish(runtime) if arguments.finish else erase(runtime, *who)
    _print_report(report)


def _add_sql(add: _Add) -> None:
    command = add("sql", help="run one SQL query over the tables")
    command.add_argument(
        "query",
        help="the query; it can use vector_cosine_similarity and the other vector functions, and the table functions "
        "nearest_items('USER', 10) and nearest_users('USER', 10)",
    )
    command.add_argument(
        "--json", action="store_true", help="one JSON object per row, for all rows instead of the first 100"
    )
    command.set_defaults(action=_sql)


def _sql(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.sql import run_sql  # noqa: PLC0415

    run_sql(Runtime(config), arguments.query, arguments.json)


def _add_serve(add: _Add) -> None:
    command = add(
        "serve_sql",
        help="serve SQL over JDBC until Ctrl-C",
        description="Serves SQL over JDBC until Ctrl-C. If TRAILVEC_SQL_USER and TRAILVEC_SQL_PASSWORD are set, every "
        "client must give them.",
    )
    command.add_argument("--host", default="127.0.0.1", help="the address to serve on (default: 127.0.0.1)")
    command.add_argument("--port", type=_port, default=10000, help="default: 10000")
    command.set_defaults(action=_serve)


def _serve(config: Config, arguments: argparse.Namespace) -> None:
    from jobs.serve_sql import run_serve  # noqa: PLC0415

    run_serve(config, arguments.host, arguments.port)


def table_console(piped_width: int = 160) -> Console:
    """A console on stdout for tables; cells are printed as they are, brackets too. A pipe has no width of its own, and
    the default of 80 columns would break the cells."""
    width = None if sys.stdout.isatty() else piped_width
    return Console(highlight=False, markup=False, emoji=False, width=width)


def printable(text: str) -> str:
    """The text with control characters, but for newlines and tabs, as \\xNN."""
    return text.translate(_CONTROLS)


def run_stages(runtime: Runtime, stages: Sequence[Stage], force: bool = False) -> None:
    """Runs the stages in order in one Spark session, and reports each as it ends."""
    for stage in stages:
        with _progress(runtime, stage.name):
            runtime.execute(stage, force)
            report = runtime.count_rows()
        _print_report(report)


def _print_report(report: Report) -> None:
    _out.print(_line(report), soft_wrap=True)
    for note in report.notes:
        _out.print(f"    {printable(note)}", style="dim", markup=False, soft_wrap=True)


def _line(report: Report) -> str:
    def rows(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "-"

    if report.skipped:
        return f"[dim]=[/] {report.stage:<17} {report.seconds:6.1f} s   up to date"
    counts = f"{rows(report.rows_in)} → {rows(report.rows_out)}"
    return f"[green]✓[/] {report.stage:<17} {report.seconds:6.1f} s   {counts}"


@contextmanager
def _progress(runtime: Runtime, name: str) -> Iterator[None]:
    """A status line while a stage runs: the stage's own messages, and Spark's running tasks."""
    if not _out.is_terminal:
        runtime.on_progress = lambda text: _out.print(f"    {text}", markup=False, soft_wrap=True)
        yield
        return
    with _out.status(name) as status:
        message = ""

        def show(text: str) -> None:
            nonlocal message
            message = text

        runtime.on_progress = show
        with meanwhile(lambda: status.update(Text(f"{name}  {message}  {runtime.running_tasks()}")), 0.5):
            yield


def guarded(action: Callable[[], None], debug: bool = False) -> int:
    """The exit code of `action`: 0; 1 after one sentence on stderr (with `debug` it raises instead); 130 for Ctrl-C."""
    try:
        action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("trailvec: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return 0
        if debug:
            raise
        sentence = str(error) if isinstance(error, TrailvecError) else explain(error)
        if sentence is None:
            sentence = f"unexpected {type(error).__name__}: {first_line(error)} (run with --debug for the stack trace)"
        print(f"trailvec: {printable(sentence)}", file=sys.stderr)
        return 1
    return 0


def _reader_has_left() -> bool:
    """Whether the reader of our stdout (`| head`) has closed the pipe; if so, drops what is still to be written."""
    poll = select.poll()
    poll.register(_STDOUT, 0)  # errors only
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


if __name__ == "__main__":
    main()
