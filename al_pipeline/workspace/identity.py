"""The identity of a clone, and detection of copies.

A clone made by `git clone` gets an id of its own. A folder copied with `cp -r`, or restored from a backup, has the id
of its original, and both would write to one project. So the id is bound to its place: the machine, the path, and the
inodes of the workspace's folder and of its `.al`. The verdict depends on what has changed since then:

| inodes | path                         | machine | what happened                                            | verdict |
|--------|------------------------------|---------|----------------------------------------------------------|---------|
| same   | same                         | any     | a restart, another host name, a container started anew   | same    |
| same   | same inside its file system  | any     | mounted elsewhere: in a container and on its host        | same    |
| same   | other                        | same    | moved                                                    | same    |
| same   | other                        | other   | moved with its disk, or the disk was copied              | unsure  |
| other  | same                         | same    | restored in place; inodes that change at each mount      | same    |
| other  | same, but not inside         | any     | another folder is mounted where the first one was        | unsure  |
| other  | same                         | other   | restored on another machine, or copied to it             | unsure  |
| other  | other                        | any     | copied; moved to another file system; restored elsewhere | unsure  |
| any    | other; this clone still lies at the first   | any | copied, or moved away from a restored backup | copy   |
| any    | other; the first one cannot be read         | any | moved out of reach, or copied                | unsure |

A machine is the same if its machine id or its running kernel is. In a container the machine id is ignored, since images
contain one; by the kernel alone, a folder with other inodes is the same only on the same device. `same` is rebound
silently. `copy` and `unsure` neither write to Label Studio nor publish until `al adopt` gives the folder an id of its
own. A copy of an entire machine or disk at the same path cannot be distinguished from its original.
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import asdict

from al_pipeline.errors import BadInput, CopiedWorkspace
from al_pipeline.files import read_object, sha256_bytes, write_json
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout

Verdict = Literal["same", "copy", "unsure"]
Original = Literal["gone", "there", "unknown"]

_ID = re.compile(r"[0-9a-f]{12}\Z")
_MACHINE_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_IN_CONTAINERS = ("/.dockerenv", "/run/.containerenv")
_LAYERED = ("aufs", "fuse.fuse-overlayfs", "overlay")
"""Root file systems of containers."""


class Place(Struct, frozen=True):
    """The place of a clone."""

    machine: str
    """A digest of the machine's id; empty if there is none, or in a container."""
    boot: str
    """The boot id of the running kernel; empty if there is none."""
    path: str
    """The path, with links resolved."""
    inside: str
    """The path inside its file system, independent of the mount point."""
    device: int
    inodes: tuple[int, int]
    """The inodes of the workspace's folder and of its `.al`."""


class Identity(Struct, frozen=True):
    """The id of a clone, and whether it may write."""

    clone_id: str
    verdict: Verdict
    problem: str = ""
    """Why it may not write, and what to do; empty for `same`."""
    adopting: bool = False
    """Whether it is a copy whose adoption has begun: it has an id of its own, but not yet the project."""


def clone_id(layout: Layout) -> str:
    """This clone's id, twelve hex digits; created on first use, never in git."""
    found = read_object(layout.clone).get("clone_id")
    return found if isinstance(found, str) and _ID.match(found) else _give(layout)


def identify(layout: Layout) -> Identity:
    """The identity of this folder; writes nothing.

    A clone without an id, or never bound to a place (by an earlier version), is `same`.
    """
    known, then = _read(layout)
    name = str(known.get("clone_id", ""))
    if known.get("adopting"):
        problem = f"{layout.root} is a copy whose adoption is not complete; {_WAY_OUT}"
        return Identity(name, "unsure", problem, adopting=True)
    if then is None:
        return Identity(name, "same")
    now = here(layout)
    verdict = compare(then, now, _look_at(Path(then.path), layout, name))
    if verdict == "same":
        return Identity(name, verdict)
    what = (
        f"{now.path} is a copy of the workspace at {then.path}"
        if verdict == "copy"
        else f"{now.path} may be a copy of the workspace that was at {then.path}{_elsewhere(then, now)}"
    )
    return Identity(
        name, verdict, f"{what}, and two clones that write to the same Label Studio project corrupt it; {_WAY_OUT}"
    )


_WAY_OUT = "`al adopt` gives this folder its own identity and makes it the clone that writes"


def check_identity(layout: Layout) -> None:
    """Raise CopiedWorkspace if this folder is a copy, or may be one; else bind its id to its present place.

    Call only while holding the workspace's lock, before any action that others can see or that ends processes.
    """
    found = identify(layout)
    if found.verdict != "same":
        raise CopiedWorkspace(found.problem)
    bind(layout)


def refuse_copy(layout: Layout) -> None:
    """Raise CopiedWorkspace if a command could affect the servers of this folder's original.

    Servers' files lie outside the folder, and a copy finds those of its original. During adoption it may use them.
    """
    found = identify(layout)
    if found.verdict != "same" and not found.adopting:
        raise CopiedWorkspace(found.problem)


def bind(layout: Layout) -> None:
    """Bind this clone to its present place; call only if the verdict of `identify` is `same`."""
    known, then = _read(layout)
    if known.get("clone_id") and then != (now := here(layout)):
        write_json(layout.clone, {"clone_id": known["clone_id"], "place": asdict(now)})


def begin_adoption(layout: Layout) -> str:
    """Give a copy an id of its own, and return it; the copy may write only after `end_adoption`.

    Deletes its records of processes, which are those of its original. Call while holding the lock.
    """
    for record in (layout.dvc_process, layout.encoding):
        record.unlink(missing_ok=True)
    return _give(layout, adopting=True)


def end_adoption(layout: Layout) -> None:
    """Complete an adoption: the project belongs to this clone."""
    write_json(layout.clone, {"clone_id": clone_id(layout), "place": asdict(here(layout))})


def compare(then: Place, now: Place, original: Original) -> Verdict:
    """Whether the folder at `now` is the one that was bound at `then`, by the table above.

    `original`: whether another folder with this id exists at the first path.
    """
    if original != "gone":
        return "copy" if original == "there" else "unsure"
    path, inside = then.path == now.path, then.inside == now.inside
    machine, kernel = then.machine == now.machine != "", then.boot == now.boot != ""
    if then.inodes == now.inodes:
        return "same" if path or inside or machine or kernel else "unsure"
    return "same" if path and inside and (machine or (kernel and then.device == now.device)) else "unsure"


def here(layout: Layout) -> Place:
    """The present place of the workspace."""
    root = layout.root.resolve()
    found = root.stat()
    mounts = _mounts()
    mount = max((m for m in mounts if root.is_relative_to(m[0])), key=lambda m: len(m[0].parts), default=None)
    inside = root if mount is None else Path(mount[1]) / root.relative_to(mount[0])
    return Place(
        machine="" if _in_container(mounts) else _machine(),
        boot=boot_id(),
        path=_text(root),
        inside=_text(inside),
        device=found.st_dev,
        inodes=(found.st_ino, layout.private.stat().st_ino),
    )


def boot_id() -> str:
    """The boot id of the running kernel, which containers share; empty if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _machine() -> str:
    """A digest of the machine's id, which is confidential; empty if there is none."""
    for name in _MACHINE_IDS:
        try:
            found = Path(name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if re.fullmatch(r"[0-9a-f]{32}", found):
            return sha256_bytes(f"al-pipeline {found}".encode())[:16]
    return ""


def _in_container(mounts: list[tuple[Path, str, str]]) -> bool:
    top = next((kind for point, _, kind in reversed(mounts) if point == Path("/")), "")
    return top in _LAYERED or any(Path(name).exists() for name in _IN_CONTAINERS)


def _mounts() -> list[tuple[Path, str, str]]:
    """Mount point, mounted root and type of each file system; later mounts override earlier ones. Linux only."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found: dict[Path, tuple[Path, str, str]] = {}
    for line in lines:
        words, _, rest = line.partition(" - ")
        fields = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word) for word in words.split(" ")]
        if len(fields) > 4:
            point = Path(fields[4])
            found.pop(point, None)
            found[point] = (point, fields[3], rest.split(" ")[0])
    return list(found.values())


def _give(layout: Layout, adopting: bool = False) -> str:
    private_folder(layout.private)
    name = uuid.uuid4().hex[:12]
    more = {"adopting": True} if adopting else {}
    write_json(layout.clone, {"clone_id": name, "place": asdict(here(layout)), **more})
    return name


def _look_at(place: Path, layout: Layout, name: str) -> Original:
    """Whether another folder with this id exists at `place`."""
    try:
        if os.path.samestat(place.stat(), layout.root.stat()):
            return "gone"
        return "there" if read_object(Layout(place).clone).get("clone_id") == name else "gone"
    except (FileNotFoundError, NotADirectoryError):
        return "gone"
    except (OSError, BadInput):
        return "unknown"


def _read(layout: Layout) -> tuple[dict[str, Any], Place | None]:
    """The recorded identity and place; None without a place. Raises BadInput if the record is damaged."""
    known = read_object(layout.clone)
    if (found := known.get("place")) is None:
        return known, None
    try:
        machine, boot, path, inside = (str(found[name]) for name in ("machine", "boot", "path", "inside"))
        root, private = found["inodes"]
        return known, Place(machine, boot, path, inside, int(found["device"]), (int(root), int(private)))
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"{layout.clone} is damaged; delete it, then `al adopt` makes this folder the clone that writes to the "
            "Label Studio project"
        ) from None


def _text(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _elsewhere(then: Place, now: Place) -> str:
    same = then.machine == now.machine != "" or then.boot == now.boot != ""
    return "" if same else ", possibly on another machine"
