"""Every error that a user can meet, as one tree. Each message says what is wrong and how to fix it.

AlError                     exit code 1
├── UsageError              2   what was typed, or a file that was given, is wrong
│   ├── BadParams               a value in params.yaml
│   ├── BadInput                a pool, label or model file
│   │   └── UnusableFile            a file that the user wants read
│   └── NotAWorkspace           the folder holds no workspace, or another kind of one
├── NothingToDo             3   asked for something that cannot be done now
├── Locked                  4   another tick works in this workspace
├── ExternalServiceError              5   something outside did not answer, or said no; try again later
│   ├── LabelStudioDown         no usable reply
│   ├── LabelStudioRefused      it answered: not allowed, or not valid
│   ├── ServerFailed            a server that we start ourselves did not start, or not soon enough
│   ├── RepositoryError         git or DVC failed
│   └── RemoteIncomplete        the DVC remote lacks objects of a round
└── ManualActionRequired              6   going on could destroy something: a person must look first
    ├── UnexpectedChange             somebody edited a file that the engine owns
    ├── UnsafeFolder            others could change what is believed in a folder
    ├── WrongProject          the Label Studio project is not the one we know
    ├── CopiedWorkspace         the folder is, or may be, a copy of the one that writes
    ├── VanishedAnswers         more answers vanished than people plausibly deleted
    ├── SchemaInUse             a class that answers use was renamed or removed
    ├── EngineChanged           a stage was started under another engine than the build's
    ├── StageFailed             a DVC stage ended with an error
    └── NotReproduced           a published round, made again, came out different
"""

from __future__ import annotations


class AlError(Exception):
    """Something that the person at the keyboard can fix; printed without a traceback."""

    exit_code = 1


class UsageError(AlError):
    """What was typed, or a file that was given, is wrong."""

    exit_code = 2


class BadParams(UsageError):
    """A value in `params.yaml` is wrong; names the key, what it got and what it takes."""


class BadInput(UsageError):
    """A pool, label or model file cannot be used."""


class UnusableFile(BadInput):
    """A file that the user wants read cannot be used as a whole; nothing of it was taken."""


class NotAWorkspace(UsageError):
    """The folder is no workspace."""


class NothingToDo(AlError):
    """Asked for something that cannot be done in the present state."""

    exit_code = 3


class Locked(AlError):
    """Another process works in this workspace."""

    exit_code = 4


class ExternalServiceError(AlError):
    """Something outside this process did not answer or said no."""

    exit_code = 5


class LabelStudioDown(ExternalServiceError):
    """Label Studio gave no usable reply: not running, too slow, or broken in the middle."""


class LabelStudioRefused(ExternalServiceError):
    """Label Studio answered that the request is not allowed or not valid."""


class ServerFailed(ExternalServiceError):
    """A server that we install or start ourselves failed; the message names its log."""


class RepositoryError(ExternalServiceError):
    """A git or DVC command failed."""


class RemoteIncomplete(ExternalServiceError):
    """The DVC remote lacks objects that a published round needs."""


class ManualActionRequired(AlError):
    """Going on could destroy something; a person must look first."""

    exit_code = 6


class UnexpectedChange(ManualActionRequired):
    """Somebody edited a file that the engine owns."""


class UnsafeFolder(ManualActionRequired):
    """A folder whose content is believed belongs to somebody else, or others can write to it."""


class WrongProject(ManualActionRequired):
    """The Label Studio project is not the one this workspace knows."""


class CopiedWorkspace(ManualActionRequired):
    """The folder is, or may be, a copy of the clone whose identity it brought along."""


class VanishedAnswers(ManualActionRequired):
    """More answers vanished in one pull than people plausibly deleted."""


class SchemaInUse(ManualActionRequired):
    """A class that answers use was renamed or removed."""


class EngineChanged(ManualActionRequired):
    """A stage was started under another engine than the one its build began with."""


class StageFailed(ManualActionRequired):
    """A DVC stage ended with an error; its log says why."""


class NotReproduced(ManualActionRequired):
    """A published round, made again from its own data, came out different from what is recorded."""
