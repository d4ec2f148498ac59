"""The package's log: it contains no secrets, and is not shown unless requested.

Every module that logs has its own logger (`get_logger(__name__)`). DEBUG has requests and commands with their duration,
INFO what was done, WARNING what is retried or left out. Users of the package add handlers to the logger `al_pipeline`;
the environment variable AL_LOG_LEVEL, which child processes inherit, shows the log on standard error.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from enum import StrEnum, auto

from al_pipeline.sanitize import one_line, redact, shortened

VARIABLE = "AL_LOG_LEVEL"
_LONGEST_COMMAND = 300


class Level(StrEnum):
    """The lowest level that is shown."""

    DEBUG = auto()
    INFO = auto()
    WARNING = auto()
    ERROR = auto()


_PACKAGE = logging.getLogger("al_pipeline")
_PACKAGE.addHandler(logging.NullHandler())

_HEADER = r"(?i)(authorization|cookie|x-api-key)(\W{1,4})[^'\"]+"
_VALUE = (
    r"(?i)([\w-]*(?:token|refresh|passw|secret|signature|api_?key|access_?key|credential)[\w-]*"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s&'\",;}]+"
)


class _ToStandardError(logging.Handler):
    """Writes to the `sys.stderr` of the moment, which may be replaced after import."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


_shown = _ToStandardError()
_shown.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))


def get_logger(name: str) -> logging.Logger:
    """The logger of a module. Its messages are one printable line without secrets, for every handler."""
    logger = logging.getLogger(name)
    logger.addFilter(_clean)
    return logger


def without_secrets(text: str) -> str:
    """`text` with `***` for users and passwords in URLs, credentials in headers, and values with secret-like names."""
    return re.sub(_VALUE, r"\1***", re.sub(_HEADER, r"\1\2***", redact(text)))


def shown(command: Sequence[str]) -> str:
    """A command line for the log; a long one is cut."""
    return shortened(" ".join(command), _LONGEST_COMMAND)


def show(level: Level) -> None:
    """Show the log from `level` on standard error, in this process."""
    _shown.setLevel(level.name)
    _PACKAGE.addHandler(_shown)
    _PACKAGE.propagate = False  # a handler of the root logger, such as Prefect's console, would show it twice
    record_from(_shown.level)


def record_from(level: int) -> None:
    """Make the package's logger pass records of `level` and above to handlers."""
    _PACKAGE.setLevel(min(level, _PACKAGE.level or level))


def _clean(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(without_secrets(record.getMessage())), ()
    return True


if (asked := os.environ.get(VARIABLE, "").lower()) in list(Level):
    show(Level(asked))
