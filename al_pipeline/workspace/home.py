"""Where `al` keeps what belongs to this machine and its user, and which folders it believes.

Some of what lies there is run (engines, Label Studio's environment) or unpickled (DVC's state), so a folder is used
only where nobody but this user and root can change what is in it, or put another in its place.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
from collections.abc import Mapping
from pathlib import Path

from al_pipeline.errors import UnsafeFolder, UsageError

_OTHERS, _GROUP = 0o002, 0o020
_MOST_LINKS = 40
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where Python looks for the name of the user before it asks for the passwd entry."""


def al_home() -> Path:
    """`AL_HOME`, else `~/.local/share/al`; an absolute path that need not exist yet.

    Raises UsageError where neither says a place, UnsafeFolder where others could change what lies there.
    """
    given = os.environ.get("AL_HOME")
    if given:
        home = Path(os.path.abspath(os.path.expanduser(given)))
    else:
        try:
            home = Path.home() / ".local/share/al"
        except RuntimeError:
            raise UsageError(
                f"no place for credentials and servers: HOME is not set, and user {os.geteuid()} has no passwd entry; "
                "set AL_HOME to a folder of yours"
            ) from None
        if not home.is_absolute():
            raise UsageError(f"HOME is {os.environ.get('HOME')!r}, which is no absolute path; set HOME or AL_HOME")
    check_unshared(home)
    return home


def private_folder(path: Path) -> Path:
    """Make `path`, and what is missing above it, for this user alone (0700, whatever the umask).

    Raises UnsafeFolder where it is somebody else's, or others can write in it or replace it.
    """
    path = Path(os.path.abspath(path))
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    check_unshared(path)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process of ours was quicker
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """Raise UnsafeFolder unless the folder at `path` is this user's own; withdraw others' right to read it.

    A folder that is not there is no danger.
    """
    check_unshared(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFolder(f"{path} is not a folder, where `al` keeps files of its own; move it away")
    if found.st_uid != os.geteuid():
        raise UnsafeFolder(
            f"{path} belongs to {_name(found.st_uid)}, and you are {_name(os.geteuid())}: `al` keeps there what only "
            f"its own user may change. Work as {_name(found.st_uid)}, or have it given to you (`chown -R`)"
        )
    if found.st_mode & 0o077:
        with contextlib.suppress(OSError):  # on a read-only file system it stays as it is
            path.chmod(0o700)


def check_unshared(path: Path) -> None:
    """Raise UnsafeFolder where others than this user and root can write to `path`, or replace it from a folder above.

    What is missing of the path is no danger. Links are followed, and what they lead through is looked at too.
    """
    place, todo, links = Path("/"), list(Path(os.path.abspath(path)).parts[1:]), 0
    trusted = _trusted_owners()
    while todo:
        name = todo.pop(0)
        if name == "..":
            place = place.parent
            continue
        step = place / name
        try:
            found = step.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError:
            raise UsageError(
                f"{_name(os.geteuid())} may not look into {place}, where `al` would keep {path}; set AL_HOME to a "
                "folder of yours"
            ) from None
        if found.st_uid not in trusted:
            raise UnsafeFolder(
                f"{step} belongs to {_name(found.st_uid)}, who could change what `al` keeps in {path}; choose a place "
                "of your own (AL_HOME for its home), or have it given to you (`chown`)"
            )
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise UnsafeFolder(f"{path} leads through links without an end; put a folder in its place")
            target = Path(os.readlink(step))
            todo = [*(target.parts[1:] if target.is_absolute() else target.parts), *todo]
            place = Path("/") if target.is_absolute() else place
            continue
        place = step
        # In a sticky folder (/tmp) only an owner can rename; the next step is looked at as well.
        sticky = bool(found.st_mode & stat.S_ISVTX) and bool(todo)
        if not sticky and writable_by_others(found):
            raise UnsafeFolder(
                f"others can write to {step} (mode {stat.S_IMODE(found.st_mode):04o}), and so change what `al` keeps "
                f"in {path}; see whether all in it is yours, then `chmod go-w {step}`"
            )


def writable_by_others(found: os.stat_result) -> bool:
    """Whether somebody besides the owner and root can write there. A group of the owner alone is nobody else."""
    return bool(found.st_mode & _OTHERS) or bool(found.st_mode & _GROUP and not _is_own_group(found))


def check_workspace(root: Path) -> None:
    """Raise UnsafeFolder where anybody on the machine could change what steers git and DVC in a workspace.

    What the owner shares with a group stays shared: pool, labels and repository have the rights of the umask.
    """
    for path in (root, *(root / name for name in (".git", ".git/config", ".dvc", ".dvc/config.local", "rounds"))):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = path.lstat()
            if not stat.S_ISLNK(found.st_mode) and found.st_mode & _OTHERS:
                raise UnsafeFolder(
                    f"everybody on this machine can write to {path}, and so choose what git and DVC run for you; see "
                    f"whether all in it is yours, then `chmod -R o-w {root}`"
                )
            if path.name == "config.local" and found.st_uid not in _trusted_owners():
                raise UnsafeFolder(
                    f"{path} belongs to {_name(found.st_uid)}, and steers DVC for you; see what it says, then take it "
                    "over (`chown`) or delete it"
                )
    for folder in root.parents:
        found = folder.stat()
        if found.st_mode & _OTHERS and not found.st_mode & stat.S_ISVTX:
            raise UnsafeFolder(
                f"everybody on this machine can write to {folder}, and so put another workspace in the place of "
                f"{root}; `chmod o-w {folder}` (or `chmod +t`), or move the workspace"
            )


def restrict_umask() -> int:
    """Let nothing that this process and its children make be writable by everybody; returns the umask before."""
    before = os.umask(0o077)
    os.umask(before if before & _OTHERS else before | 0o022)
    return before


def own_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is to be added to `environment` (default: this process's) for ourselves and whatever we start.

    A complete user, which libraries ask for as they are imported; UTF-8, since paths are; and folders of this user
    alone for the state that libraries would keep in, and trust, a folder that all users of the machine
    share. Raises UnsafeFolder where such a folder is somebody else's.
    """
    environment = os.environ if environment is None else environment
    added = {"PYTHONUTF8": "1"}
    if not any(environment.get(name) for name in _NAMES) and not _has_entry():
        added |= {name: user_name() for name in ("LOGNAME", "USER")}
    try:
        home = al_home()
    except (UsageError, UnsafeFolder):
        return added  # whatever needs it says so
    check_private(home / "cache")
    if not _is_own_home(environment.get("HOME")):
        check_private(home / "user")
        added["HOME"] = str(home / "user")
    elif "XDG_CACHE_HOME" not in environment and not _keeps_caches(environment.get("HOME")):
        added["XDG_CACHE_HOME"] = str(home / "cache")
        added |= {"HF_HOME": str(home / "cache/huggingface")} if "HF_HOME" not in environment else {}
        added |= {"MPLCONFIGDIR": str(home / "cache/matplotlib")} if "MPLCONFIGDIR" not in environment else {}
    if "TORCHINDUCTOR_CACHE_DIR" not in environment:  # else /tmp/torchinductor_USER, where compiled code is run from
        added["TORCHINDUCTOR_CACHE_DIR"] = str(home / "cache/torchinductor")
    return added


def user_name() -> str:
    """The name of this user; `uid1000` where the system knows none."""
    given = next((name for variable in _NAMES if (name := os.environ.get(variable))), None)
    return given or (pwd.getpwuid(os.geteuid()).pw_name if _has_entry() else f"uid{os.geteuid()}")


def dvc_state(workspace_id: str) -> Path:
    """The folder of DVC's state for a workspace: databases that hold pickles, else below /var/tmp for all to change."""
    return al_home() / workspace_id / "dvc"


def _is_own_home(home: str | None) -> bool:
    """Whether HOME (or, without one, the passwd entry's) is a folder where nobody else puts settings for us."""
    if home is None:
        if not _has_entry():
            return False
        home = pwd.getpwuid(os.geteuid()).pw_dir
    return os.path.isabs(home) and _is_own(home)


def _keeps_caches(home: str | None) -> bool:
    """Whether libraries find folders below this user's HOME that they can write to, and nobody else."""
    home = pwd.getpwuid(os.geteuid()).pw_dir if home is None else home
    return os.access(home, os.W_OK) and all(_is_own(os.path.join(home, name)) for name in (".cache", ".config"))


def _is_own(folder: str) -> bool:
    try:
        found = os.stat(folder)
    except OSError:
        return True  # not there: nobody's
    return found.st_uid in _trusted_owners() and not writable_by_others(found)


def _has_entry() -> bool:
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return True


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    except KeyError:
        return f"user {uid}"


def _is_own_group(found: os.stat_result) -> bool:
    """Whether the group of a file is its owner's private one (Debian, Red Hat: umask 002), or root's."""
    if found.st_gid == 0:
        return True
    try:
        owner = pwd.getpwuid(found.st_uid)
        group = grp.getgrgid(found.st_gid)
    except KeyError:
        return found.st_gid == found.st_uid
    return group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name, "root"}


def _trusted_owners() -> frozenset[int]:
    """Root and this user; in a user namespace also whoever owns what lies outside of it, which nobody inside can be."""
    owners = {0, os.geteuid()}
    with contextlib.suppress(OSError, ValueError):
        inside, outside, count = (int(word) for word in Path("/proc/self/uid_map").read_text("ascii").split()[:3])
        if (inside, outside, count) != (0, 0, 2**32 - 1):
            owners.add(int(Path("/proc/sys/kernel/overflowuid").read_text("ascii")))
    return frozenset(owners)
