"""What can a person type?  The commands of `dpocheck`; only click is imported here, the rest where it is needed.

Exit codes of `audit`: 0 right; 1 a finding, an unexpected pass, a stale or expired known failure; 2 bad input, said
before anything is run; 3 nothing can be said.  `replay`: 0 fixed, 1 failed, 3 error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

FINDING, USAGE, NOTHING, STOPPED = 1, 2, 3, 130


class Refused(click.ClickException):
    """Bad input: one line on stderr, exit code 2."""

    exit_code = USAGE

    def show(self, file: Any = None) -> None:
        click.echo(f"dpocheck: {self.format_message()}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="dpocheck", prog_name="dpocheck")
def cli() -> None:
    """Find out whether a DPO trainer computes DPO, and which token, sign, factor or row is wrong when it does not."""


@cli.command()
@click.argument("subject")
@click.option("--tier", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
@click.option("--only", metavar="ID", multiple=True, help="Run this check alone; may be given several times.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the drawn experiments.")
@click.option("--jobs", type=click.IntRange(min=0), default=0,
              help="Runs side by side; by default two where there are two cores.")  # fmt: skip
@click.option("--known", metavar="FILE", type=click.Path(path_type=Path), help="Known failures, TOML.")
@click.option("--fail-on", type=click.Choice(["must", "should"]), default="should", show_default=True,
              help="The lowest level whose failure counts for the exit code.")  # fmt: skip
@click.option("--objective", metavar="KIND[,name=value...]", help="The loss asked for, e.g. sigmoid,beta=0.2 or ipo.")
@click.option("--tokenizer", metavar="PATH", type=click.Path(exists=True), help="Run the rows on this tokenizer too.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True,
              help="Seconds for one answer of the subject.")  # fmt: skip
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), default=8.0, show_default=True,
              help="GB the subject may use.")  # fmt: skip
@click.option("--python", metavar="PATH", help="The interpreter that has the trainer; default: this one.")
@click.option("--shrink", type=click.IntRange(min=0), default=0, metavar="N", help="Runs to spend on smaller failures.")
@click.option("--unblocked", is_flag=True, help="Run what a failed check would block, too.")
@click.option("--list", "only_list", is_flag=True, help="Say what would run, and run nothing.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Replaced whole; default out/NAME-VERSION.")
def audit(subject: str, known: Path | None, fail_on: str, only_list: bool, out: Path | None, **chosen: Any) -> None:
    """Audit SUBJECT: a name (trl), pkg.mod:Adapter, file.py:name, file.py, or a command line's file.toml."""
    import datetime

    from dpocheck import asked, runner
    from dpocheck.known import apply, load

    with refusals():
        expected = load(known, _versions()) if known else ()
        options = _options(named(subject), out, chosen | {"known": tuple(entry.id for entry in expected)})
        if only_list:
            _planned(runner.planned(options))
            return
        if out is not None:
            from dpocheck.report.files import check_folder

            check_folder(out)
        with progress_bar() as progress, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that overflow in a prediction, which the verdict accounts for
            with runner.audited(options, progress) as (report, ask):
                if expected:
                    unasked = asked.left_out(options, catalogue(), questions())
                    report = apply(report, expected, datetime.date.today(), left_out=unasked)
                report, folder = _write(report, options, chosen, out, ask)
    _print(report, folder)
    sys.exit(report.exit_code(fail_on))


@cli.command("list")
def list_checks() -> None:
    """List the checks by chapter: id, level, tier, claim."""
    from dpocheck.explain import catalogue_text

    click.echo(catalogue_text(catalogue().values()), nl=False)


@cli.command()
@click.argument("id")
def explain(id: str) -> None:
    """Say what check ID claims, why it matters, which real bug it catches and how to fix it."""
    from dpocheck.explain import explain as text

    with refusals():
        click.echo(text(questions().get(id.upper()) or catalogue()[known_id(id)]), nl=False)


@cli.command()
@click.argument("stored", metavar="PATH|HANDLE|ID")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="The audit's folder. Default: any in out/.")
def replay(stored: str, out: Path | None) -> None:
    """Run a stored failing experiment again: fixed, failed or error."""
    from dpocheck import stored as store
    from dpocheck.replay import replay as again

    with refusals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = store.find(stored, [out] if out else [Path("out")])
        data = store.read(path)
        if data["check"]["id"] not in _versions():
            known_id(data["check"]["id"])
        result = again(data)
    _replayed(path, data, result)


@cli.command()
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True)
def selftest(jobs: int) -> None:
    """Audit the toolkit: the miniature and its variants must pass, every specimen must fail its check."""
    try:
        from dpocheck.selftest import selftest as run
    except ImportError as error:
        raise Refused(f"this installation has no self-test: {error}") from None
    with refusals(), progress_bar() as progress:
        text, right = run(jobs=jobs, progress=progress)
    click.echo(_plain(text), nl=False)
    sys.exit(0 if right else FINDING)


@cli.command("new-adapter")
@click.argument("name")
def new_adapter(name: str) -> None:
    """Write NAME.py, a commented adapter that already runs; three lines are to be replaced."""
    from dpocheck.scaffold import new_adapter as write

    with refusals():
        path = write(name, Path.cwd())
    click.echo(f"wrote {path.name}; it runs as it is, against the miniature trainer:\n")
    click.echo(f"  dpocheck audit {path.name}:Adapter\n")
    click.echo("Then replace the three lines marked REPLACE with your trainer's.")


# --------------------------------------------------------------------------------------------------- what they share


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turn what is said to a person about bad input into one line and exit code 2."""
    from dpocheck import files, runner
    from dpocheck.functions.parameters import NotRecognised
    from dpocheck.known import KnownError
    from dpocheck.open import UsageError
    from dpocheck.scaffold import NameRefused
    from dpocheck.stored import StoredError

    try:
        yield
    except (
        runner.UsageError, UsageError, KnownError, StoredError, NameRefused, NotRecognised, files.CannotWrite,
    ) as error:  # fmt: skip
        raise Refused(str(error)) from None


def catalogue() -> dict[str, Any]:
    """The checks by id, in the order of the chapters."""
    import dpocheck.checks  # noqa: F401  (registers them)
    from dpocheck.check import CHAPTERS, CHECKS

    return dict(sorted(CHECKS.items(), key=lambda item: CHAPTERS.index(item[1].chapter)))


def questions() -> dict[str, Any]:
    """The choices that sources leave open, which an audit asks for before its checks, by id."""
    from dpocheck.conventions import QUESTIONS

    return {question.id: question for question in QUESTIONS}


def _versions() -> dict[str, int]:
    """Every id that a result can carry, with its version."""
    return dict.fromkeys(questions(), 1) | {id: check.version for id, check in catalogue().items()}


def known_id(id: str) -> str:
    """The id as it is declared, whatever its case.  Refuses an unknown one with near matches."""
    from dpocheck.asked import check_id

    with refusals():
        return check_id(id, catalogue())


def _options(subject: str, out: Path | None, chosen: dict[str, Any]) -> Any:
    from dpocheck import runner
    from dpocheck.asked import folder_of

    fields = dict(chosen)
    fields["only"] = tuple(known_id(id) for id in chosen["only"])
    fields["objective"] = parse_objective(chosen["objective"]) if chosen["objective"] else None
    fields["tokenizer"] = folder_of(chosen["tokenizer"])
    return runner.Options(subject=subject, out=out, **fields)


def named(subject: str) -> str:
    """A file without a name becomes all that is recognised in it, which is said; anything else stays as it is."""
    if not subject.endswith(".py") or not Path(subject).is_file():
        return subject
    from dpocheck.functions.find import candidates, passed_over, recognise

    chosen = {candidate.name for candidate in recognise(subject)}
    for candidate in candidates(subject):
        mark = "" if candidate.name in chosen else "   (not audited: give its name)"
        click.echo(_plain(f"{subject}:{candidate}{mark}"))
    for other in passed_over(subject):
        click.echo(_plain(f"{subject}: passed over {other}"))
    click.echo()
    return f"{subject}:{','.join(sorted(chosen))}"


def parse_objective(text: str) -> Any:
    """`ipo`, `sigmoid,beta=0.2,label_smoothing=0.1` as an `Objective`."""
    from dpocheck.asked import parse_objective as parse

    with refusals():
        return parse(text)


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """What the runner calls while it works: a bar on stderr where that is a terminal, gone at the end; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from dpocheck.report.progress import bar

    with bar() as update:
        yield update


def _write(
    report: Any, options: Any, chosen: dict[str, Any], out: Path | None, ask: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[Any, Path | None]:
    """Keep the audit's files; `ask`: the subject, of what a script needs."""
    from dpocheck import files
    from dpocheck.report.files import default_folder, write
    from dpocheck.report.script import writer

    folder = out if out is not None else default_folder(report)
    kept = {name: value for name, value in chosen.items() if value != () and name not in ("jobs", "only")}
    try:
        return write(report, folder, options=kept, script=writer(report, options, ask)), folder
    except files.CannotWrite as error:
        if out is not None:  # it could be written before the audit began
            click.echo(f"dpocheck: {error}", err=True)
            _print(report, None)
            sys.exit(USAGE)
        click.echo(f"dpocheck: nothing is kept: {error}", err=True)
        return report, None


def _style() -> dict[str, Any]:
    """Width, colour and character set of standard output."""
    import shutil

    stream = sys.stdout
    color = stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    with contextlib.suppress(LookupError, UnicodeEncodeError):
        "✔✘–▫πθβσΣ≤…".encode(stream.encoding or "ascii")
        return {"color": color, "unicode": True, "width": shutil.get_terminal_size((120, 40)).columns}
    return {"color": color, "unicode": False, "width": shutil.get_terminal_size((120, 40)).columns}


def _plain(text: str) -> str:
    from dpocheck.report.words import ASCII

    return text if _style()["unicode"] else text.translate(ASCII).encode("ascii", "replace").decode()


def _print(report: Any, folder: Path | None) -> None:
    from dpocheck.report.terminal import render

    # One check was asked for: then its long form is what the person wants to read.
    shown = report.results if len(report.results) <= 2 else ()
    detail = [result for result in shown if result.verdict not in ("pass", "not-applicable")]
    style = _style()
    click.echo(render(report, folder=folder, detail=detail, **style), nl=False, color=style["color"])


def _planned(rows: Any) -> None:
    from dpocheck.explain import planned_text

    click.echo(_plain(planned_text(rows)), nl=False)


def _replayed(path: Path, data: dict[str, Any], result: Any) -> None:
    """Say `fixed`, `failed` or `error` and why; exit 0, 1 or 3."""
    from dpocheck.report.failure import replayed

    word, text = replayed(path, data, result)
    click.echo(_plain(text), nl=False)
    sys.exit({"fixed": 0, "failed": FINDING}.get(word, NOTHING))


def main() -> None:
    """The entry point.  Neither a bug of ours nor an interruption is exit code 1: that would read as a finding."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("dpocheck: stopped; nothing was written", err=True)
        sys.exit(STOPPED)
    except BrokenPipeError:  # the reader of our output has gone: `dpocheck list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        import traceback

        traceback.print_exc()
        click.echo("dpocheck: this is a bug of dpocheck, not of the subject; nothing was said about it", err=True)
        sys.exit(NOTHING)


if __name__ == "__main__":
    main()
