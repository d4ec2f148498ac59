"""Which clone of a workspace a folder is, and whether it is still the folder that was given that identity.

A clone made by `git clone` gets an id of its own; a folder copied with `cp -r`, or restored from a backup, brings the
id of its original along, and both would write to one project. So the id is bound to its place: the machine, the path,
and the inodes of the workspace's folder and of its `.al`. What differs since then decides:

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
| any    | other; the first one cannot be looked at    | any | moved out of reach, or copied                | unsure |

A machine is the same by its machine id, or by its running kernel. In a container the id counts for nothing, since
images bring one; and by the kernel alone, a folder with other inodes is the same only on the same device. `same` is
bound anew without a word. `copy` and `unsure` neither write to Label Studio nor publish until `al adopt` gives the
folder an id of its own. A copy of a whole machine or disk, seen at the same path, cannot be told from its original.
"""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
"""File systems that containers have at their root."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a clone lies."""

    machine: str
    """A digest of the machine's id; empty where it has none that can be believed."""
    boot: str
    """The running kernel; empty where it has no name."""
    path: str
    """Without links."""
    inside: str
    """The path inside its file system, whatever it is mounted at."""
    device: int
    inodes: tuple[int, int]
    """Of the workspace's folder and of its `.al`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of a clone."""

    clone_id: str
    verdict: Verdict
    problem: str = ""
    """Why it may not write, and the way out; empty for `same`."""
    adopting: bool = False
    """Whether it is a copy whose adoption has begun: it has an id of its own, and not yet the project."""


def clone_id(layout: Layout) -> str:
    """Twelve hex digits, this clone's own; made on first use, never in git."""
    found = read_object(layout.clone).get("clone_id")
    return found if isinstance(found, str) and _ID.match(found) else _give(layout)


def identify(layout: Layout) -> Identity:
    """Which clone this folder is, and whether it is still the same; writes nothing.

    One that has no id yet, or was never bound to its place (by an earlier version), is `same`.
    """
    known, then = _read(layout)
    name = str(known.get("clone_id", ""))
    if known.get("adopting"):
        problem = f"{layout.root} is a copy that was not adopted to the end; {_WAY_OUT}"
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
    return Identity(name, verdict, f"{what}, and two that write to one Label Studio project spoil it; {_WAY_OUT}")


_WAY_OUT = "`al adopt` gives this folder an identity of its own and makes it the one that writes"


def check_identity(layout: Layout) -> None:
    """Raise CopiedWorkspace unless this folder is the clone that its id was given to; binds it to where it lies now.

    Call only while holding the workspace's lock, before anything is done that others see or that ends processes.
    """
    found = identify(layout)
    if found.verdict != "same":
        raise CopiedWorkspace(found.problem)
    bind(layout)


def refuse_copy(layout: Layout) -> None:
    """Raise CopiedWorkspace where the servers that a command would touch may be those of another folder's clone.

    They lie outside the folder, and a copy finds its original's. Once its adoption has begun it needs them itself.
    """
    found = identify(layout)
    if found.verdict != "same" and not found.adopting:
        raise CopiedWorkspace(found.problem)


def bind(layout: Layout) -> None:
    """Note that this clone lies where it is now; call only where `identify` says `same`."""
    known, then = _read(layout)
    if known.get("clone_id") and then != (now := here(layout)):
        write_json(layout.clone, {"clone_id": known["clone_id"], "place": asdict(now)})


def begin_adoption(layout: Layout) -> str:
    """Give a copy an id of its own, which may write only after `end_adoption`; the id.

    What the copy brought along about processes is forgotten: they are its original's. Call while holding the lock.
    """
    for record in (layout.dvc_process, layout.encoding):
        record.unlink(missing_ok=True)
    return _give(layout, adopting=True)


def end_adoption(layout: Layout) -> None:
    """The project is this clone's."""
    write_json(layout.clone, {"clone_id": clone_id(layout), "place": asdict(here(layout))})


def compare(then: Place, now: Place, original: Original) -> Verdict:
    """Whether the folder at `now` is the one that was bound at `then`; the table above.

    `original`: whether another folder of this id lies at the first path.
    """
    if original != "gone":
        return "copy" if original == "there" else "unsure"
    path, inside = then.path == now.path, then.inside == now.inside
    machine, kernel = then.machine == now.machine != "", then.boot == now.boot != ""
    if then.inodes == now.inodes:
        return "same" if path or inside or machine or kernel else "unsure"
    return "same" if path and inside and (machine or (kernel and then.device == now.device)) else "unsure"


def here(layout: Layout) -> Place:
    """Where the workspace lies now."""
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
    """Names the running kernel since its start, which containers share; empty where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _machine() -> str:
    """A digest of the machine's id, which is not for others' eyes; empty where it has none."""
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
    """Mount point, what of the file system is mounted there, and its kind, later ones over earlier; Linux alone."""
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
    """Whether another folder than ours lies at `place` and has this id."""
    try:
        if os.path.samestat(place.stat(), layout.root.stat()):
            return "gone"
        return "there" if read_object(Layout(place).clone).get("clone_id") == name else "gone"
    except (FileNotFoundError, NotADirectoryError):
        return "gone"
    except (OSError, BadInput):
        return "unknown"


def _read(layout: Layout) -> tuple[dict[str, Any], Place | None]:
    """What is written down, and the place in it; None where there is none. Raises BadInput where it is damaged."""
    known = read_object(layout.clone)
    if (found := known.get("place")) is None:
        return known, None
    try:
        machine, boot, path, inside = (str(found[name]) for name in ("machine", "boot", "path", "inside"))
        root, private = found["inodes"]
        return known, Place(machine, boot, path, inside, int(found["device"]), (int(root), int(private)))
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"{layout.clone} is damaged; delete it, then `al adopt` makes this folder the one that writes to the "
            "Label Studio project"
        ) from None


def _text(path: Path) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()


def _elsewhere(then: Place, now: Place) -> str:
    same = then.machine == now.machine != "" or then.boot == now.boot != ""
    return "" if same else ", maybe on another machine"
