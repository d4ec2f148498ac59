"""What of the recorded data the work tree, the cache or the remote lacks, or holds with other bytes."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class RemoteDefect(Struct, frozen=True):
    """An object that the DVC remote lacks or holds with other bytes."""

    name: str
    """The path in the workspace that it is the content of."""
    object: str
    """Its digest, which is its name in the remote."""
    at: str
    """Its address."""
    why: str
    """missing, empty, other bytes, or its size and the expected one."""
    have: bool
    """Whether this machine has the right bytes."""


class Different(Struct, frozen=True):
    """A file of the work tree that differs from what is recorded."""

    name: str
    object: str
    here: str
    """absent, other, extra (not recorded), or unknown (its folder's listing is unavailable)."""
    cache: str
    """What the cache holds under the recorded digest: good, other, absent or unknown."""
    remote: str
    """The same for the remote."""
    alike: bool
    """Whether the bytes here are those that the cache or the remote holds under the recorded digest."""


def describe_incomplete_remote(defects: Sequence[RemoteDefect]) -> str:
    """The message about objects that the remote lacks or has damaged, and how to repair it."""
    return (
        f"the DVC remote does not have what git's records name: {describe_defects(defects)}. `al remote repair` in a "
        "clone that has the data repairs the remote; nothing from it was used here"
    )


def describe_defects(defects: Sequence[RemoteDefect]) -> str:
    """The first three defects, each with its name and what is wrong, and the number of the others."""
    shown = [f"{one.name} ({one.why}, object {one.object})" for one in defects[:3]]
    return ", ".join([*shown, *([f"and {len(defects) - 3} more"] if len(defects) > 3 else [])])
