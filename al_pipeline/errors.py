"""All errors that are shown to users, as one tree. Each message says what is wrong and how to fix it.

AlError                     exit code 1
├── UsageError              2   an argument, or a file that was given, is invalid
│   ├── BadParams               a value in params.yaml
│   ├── BadInput                a pool, label or model file
│   │   └── UnusableFile            a file that the user gave
│   └── NotAWorkspace           the folder is in no workspace, or in one that this version cannot use
├── NothingToDo             3   the request cannot be carried out in the present state
├── Locked                  4   another process works in this workspace
├── ExternalServiceError    5   an external service did not answer or refused the request; try again later
│   ├── LabelStudioDown         no usable reply
│   ├── LabelStudioRefused      the request is not allowed or not valid
│   ├── ServerFailed            a server that we install or start ourselves failed
│   ├── RepositoryError         git or DVC failed
│   ├── RemoteIncomplete        the DVC remote lacks objects of a round
│   └── NoRoom                  a disk has no room for what would be written
└── ManualActionRequired    6   continuing could destroy data: a person must check first
    ├── UnexpectedChange        somebody edited a file that the engine owns
    ├── UnsafeFolder            others could change a folder whose content is trusted
    ├── WrongProject            the Label Studio project is not this workspace's
    ├── CopiedWorkspace         the folder is, or may be, a copy of another clone
    ├── VanishedAnswers         more answers vanished than people plausibly deleted
    ├── SchemaInUse             a class that answers use was renamed or removed
    ├── EngineChanged           a stage or a worker has another engine than its build
    ├── StageFailed             a DVC stage failed
    └── NotReproduced           a rebuilt round differs from its record
"""

from __future__ import annotations


class AlError(Exception):
    """An error that the user can fix; printed without a traceback."""

    exit_code = 1


class UsageError(AlError):
    """An argument, or a file that was given, is invalid."""

    exit_code = 2


class BadParams(UsageError):
    """A value in `params.yaml` is invalid; the message names the key, the value and what the key takes."""


class BadInput(UsageError):
    """A pool, label or model file cannot be used."""


class UnusableFile(BadInput):
    """A file that the user gave cannot be used; none of it was used."""


class NotAWorkspace(UsageError):
    """The folder is in no workspace, or in one that this version cannot use."""


class NothingToDo(AlError):
    """The request cannot be carried out in the present state."""

    exit_code = 3


class Locked(AlError):
    """Another process works in this workspace."""

    exit_code = 4


class ExternalServiceError(AlError):
    """An external service did not answer or refused the request."""

    exit_code = 5


class LabelStudioDown(ExternalServiceError):
    """Label Studio gave no usable reply: not running, too slow, or failing."""


class LabelStudioRefused(ExternalServiceError):
    """Label Studio answered that the request is not allowed or not valid."""


class ServerFailed(ExternalServiceError):
    """A server that we install or start ourselves failed; the message names its log."""


class RepositoryError(ExternalServiceError):
    """A git or DVC command failed."""


class RemoteIncomplete(ExternalServiceError):
    """The DVC remote lacks objects that a published round needs."""


class NoRoom(ExternalServiceError):
    """A disk has no room for what a command would write; nothing was written."""


class ManualActionRequired(AlError):
    """Continuing could destroy data; a person must check first."""

    exit_code = 6


class UnexpectedChange(ManualActionRequired):
    """Somebody edited a file that the engine owns."""


class UnsafeFolder(ManualActionRequired):
    """A folder whose content is trusted belongs to somebody else, or others can write to it."""


class WrongProject(ManualActionRequired):
    """The Label Studio project is not the one that belongs to this workspace."""


class CopiedWorkspace(ManualActionRequired):
    """The folder is, or may be, a copy of another clone and has that clone's identity."""


class VanishedAnswers(ManualActionRequired):
    """More answers vanished in one pull than people plausibly deleted."""


class SchemaInUse(ManualActionRequired):
    """A class that answers use was renamed or removed."""


class EngineChanged(ManualActionRequired):
    """A stage was started with another engine than its build, or a worker computes other vectors."""


class StageFailed(ManualActionRequired):
    """A DVC stage failed; its log says why."""


class NotReproduced(ManualActionRequired):
    """A published round, rebuilt from its own data, differs from its record."""
