"""Exit codes of `al`: each error becomes one message and a code; lost output and interrupts have their own codes."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any

from al_pipeline.cli import streams
from al_pipeline.cli.options import Invocation
from al_pipeline.cli.output import echo, escape, print_json, warn
from al_pipeline.errors import AlError, ExternalServiceError, NothingToDo, UsageError
from al_pipeline.sanitize import printable

if TYPE_CHECKING:
    import typer

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "fix its permissions",
    errno.EPERM: "fix its permissions",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network file system again",
    errno.EFBIG: "raise the limit on the size of a file (`ulimit -f`)",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "close programs that keep many files open",
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "raise the limit on processes (`ulimit -u`), or end some processes",
    errno.EISDIR: "there is a folder where a file should be; move it away",
    errno.ENOTDIR: "there is a file where a folder should be; move it away",
    errno.ELOOP: "the symbolic links form a loop; fix them",
    errno.ENAMETOOLONG: "use a shorter name",
}
"""Errors of the operating system that are not our bugs, and how to fix them."""

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def run(app: typer.Typer) -> int:
    """Parse the command line, run one command, report its error if it fails, and return the exit code."""
    try:
        code = app(standalone_mode=False) or 0
    except AlError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        what = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
        return _report(
            ExternalServiceError(f"{what}; {_ADVICE[error.errno]}, then try again: unfinished work is completed")
        )
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _usage_error(error)
    if code == _INTERRUPTED:
        echo("Interrupted; the next `al round` continues where this one stopped.", err=True)
    return int(code)


def _report(error: AlError) -> int:
    if "--json" in sys.argv:
        name = next(cls.__name__ for cls in type(error).__mro__ if not cls.__name__.startswith("_"))
        print_json({"error": name, "message": str(error), "exit_code": error.exit_code})
    kind = "[yellow]Nothing done:[/]" if isinstance(error, NothingToDo) else "[red]Error:[/]"
    echo(f"{kind} {escape(error)}", err=True)
    return error.exit_code


def _usage_error(error: Any) -> int:
    """Report a command line that Typer cannot parse. If it names no command, Typer has printed the help already."""
    message = printable(error.format_message())
    if hasattr(error, "message"):
        error.message = printable(str(error.message))
    if "--json" in sys.argv:
        print_json({"error": UsageError.__name__, "message": message, "exit_code": UsageError.exit_code})
    if type(error).__name__ != "NoArgsIsHelpError":
        error.show()
    return UsageError.exit_code


def after_output(code: int) -> int:
    """The exit code of a command that ended with `code`; a read-only one fails if its output was lost."""
    problem = streams.lost(sys.stdout)
    if problem is not None:
        code = _after_lost_output(problem, code)
    streams.lost(sys.stderr)
    return code


def _after_lost_output(problem: OSError, code: int) -> int:
    if problem.errno == errno.EPIPE:
        return _BROKEN_PIPE if code == 0 and Invocation.read_only else code
    done = "" if code or Invocation.read_only else "; the command itself succeeded"
    warn(f"standard output could not be written ({problem.strerror}){done}")
    return ExternalServiceError.exit_code if code == 0 and Invocation.read_only else code
