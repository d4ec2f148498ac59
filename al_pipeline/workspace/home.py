"""`al`'s home, with the files of this user and machine, and checks of folder permissions.

Some files there are executed (engines, Label Studio's environment) or unpickled (DVC's state), so a folder is used only
if nobody but this user and root can change its content or replace it.
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

SECRET_VARIABLES = ("AL_LABEL_STUDIO_TOKEN", "AL_NOTIFY_URLS", "AL_SERVE_TOKEN", "AL_VECTORS_KEY")
"""Environment variables that hold our secrets: no process gets them that runs the code of others."""
_OTHERS, _GROUP = 0o002, 0o020
_MOST_LINKS = 40
_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Environment variables in which Python looks up the user's name, before the passwd entry."""


def al_home() -> Path:
    """`AL_HOME`, else `~/.local/share/al`: an absolute path that need not exist.

    Raises UsageError if neither is defined, UnsafeFolder if others could change its content.
    """
    given = os.environ.get("AL_HOME")
    if given:
        home = Path(os.path.abspath(os.path.expanduser(given)))
    else:
        try:
            home = Path.home() / ".local/share/al"
        except RuntimeError:
            raise UsageError(
                f"there is no folder for credentials and servers: HOME is not set, and user {os.geteuid()} has no "
                "passwd entry; set AL_HOME to a folder of yours"
            ) from None
        if not home.is_absolute():
            raise UsageError(f"HOME is {os.environ.get('HOME')!r}, which is not an absolute path; set HOME or AL_HOME")
    check_unshared(home)
    return home


def private_folder(path: Path) -> Path:
    """Create `path` and its missing parents for this user alone (0700, whatever the umask), and return it.

    Raises UnsafeFolder if it belongs to somebody else, or others can write to it or replace it.
    """
    path = Path(os.path.abspath(path))
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    check_unshared(path)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # created by another process
            folder.mkdir(mode=0o700)
            folder.chmod(0o700)
    check_private(path)
    return path


def check_private(path: Path) -> None:
    """Raise UnsafeFolder unless the folder at `path` belongs to this user; remove other users' permissions.

    A missing folder passes.
    """
    check_unshared(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFolder(f"{path} is not a folder, but `al` keeps files there; move it away")
    if found.st_uid != os.geteuid():
        raise UnsafeFolder(
            f"{path} belongs to {_name(found.st_uid)}, but you are {_name(os.geteuid())}: only its owner may change "
            f"what `al` keeps there. Work as {_name(found.st_uid)}, or change its owner (`chown -R`)"
        )
    if found.st_mode & 0o077:
        with contextlib.suppress(OSError):  # unchanged on a read-only file system
            path.chmod(0o700)


def check_unshared(path: Path) -> None:
    """Raise UnsafeFolder if others than this user and root can write to `path`, or replace it or a parent of it.

    Missing parts of the path pass. Links are followed, and all folders on their way are checked.
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
                f"{_name(os.geteuid())} has no permission to read {place}, where `al` would keep {path}; set AL_HOME "
                "to a folder of yours"
            ) from None
        if found.st_uid not in trusted:
            raise UnsafeFolder(
                f"{step} belongs to {_name(found.st_uid)}, who could change what `al` keeps in {path}; choose a "
                "folder of your own (set AL_HOME), or change its owner (`chown`)"
            )
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise UnsafeFolder(f"the path {path} has more than {_MOST_LINKS} links; replace them by a folder")
            target = Path(os.readlink(step))
            todo = [*(target.parts[1:] if target.is_absolute() else target.parts), *todo]
            place = Path("/") if target.is_absolute() else place
            continue
        place = step
        # In a sticky folder (/tmp) only an owner can rename, and the next step is checked as well.
        sticky = bool(found.st_mode & stat.S_ISVTX) and bool(todo)
        if not sticky and writable_by_others(found):
            raise UnsafeFolder(
                f"others can write to {step} (mode {stat.S_IMODE(found.st_mode):04o}), and could change what `al` "
                f"keeps in {path}; check that everything in it is yours, then `chmod go-w {step}`"
            )


def writable_by_others(found: os.stat_result) -> bool:
    """Whether anybody besides the owner and root can write there; the owner's private group does not count."""
    return bool(found.st_mode & _OTHERS) or bool(found.st_mode & _GROUP and not _is_own_group(found))


def check_workspace(root: Path) -> None:
    """Raise UnsafeFolder if every user of the machine could change the files that control git and DVC.

    Sharing with a group is allowed: pool, labels and repository have the permissions of the umask.
    """
    for path in (root, *(root / name for name in (".git", ".git/config", ".dvc", ".dvc/config.local", "rounds"))):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = path.lstat()
            if not stat.S_ISLNK(found.st_mode) and found.st_mode & _OTHERS:
                raise UnsafeFolder(
                    f"everybody on this machine can write to {path}, and could decide what git and DVC run for you; "
                    f"check that everything in it is yours, then `chmod -R o-w {root}`"
                )
            if path.name == "config.local" and found.st_uid not in _trusted_owners():
                raise UnsafeFolder(
                    f"{path} belongs to {_name(found.st_uid)}, but controls DVC for you; inspect it, then change its "
                    "owner (`chown`) or delete it"
                )
    for folder in root.parents:
        found = folder.stat()
        if found.st_mode & _OTHERS and not found.st_mode & stat.S_ISVTX:
            raise UnsafeFolder(
                f"everybody on this machine can write to {folder}, and could replace {root} by another workspace; "
                f"`chmod o-w {folder}` (or `chmod +t`), or move the workspace"
            )


def restrict_umask() -> int:
    """Keep this process and its children from creating files that everybody can write; returns the previous umask."""
    before = os.umask(0o077)
    os.umask(before if before & _OTHERS else before | 0o022)
    return before


def own_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables to add to `environment` (default: this process's) for this process and its children.

    They set a user name, which libraries need at import; UTF-8, the encoding of paths; and private folders for state
    that libraries would otherwise keep in folders shared by all users. Raises UnsafeFolder if such a folder belongs
    to somebody else.
    """
    environment = os.environ if environment is None else environment
    added = {"PYTHONUTF8": "1"}
    if not any(environment.get(name) for name in _NAMES) and not _has_entry():
        added |= {name: user_name() for name in ("LOGNAME", "USER")}
    try:
        home = al_home()
    except (UsageError, UnsafeFolder):
        return added  # what needs it reports the error
    check_private(home / "cache")
    if not _is_own_home(environment.get("HOME")):
        check_private(home / "user")
        added["HOME"] = str(home / "user")
    elif "XDG_CACHE_HOME" not in environment and not _keeps_caches(environment.get("HOME")):
        added["XDG_CACHE_HOME"] = str(home / "cache")
        added |= {"HF_HOME": str(home / "cache/huggingface")} if "HF_HOME" not in environment else {}
        added |= {"MPLCONFIGDIR": str(home / "cache/matplotlib")} if "MPLCONFIGDIR" not in environment else {}
    if "TORCHINDUCTOR_CACHE_DIR" not in environment:  # else compiled code is run from /tmp/torchinductor_USER
        added["TORCHINDUCTOR_CACHE_DIR"] = str(home / "cache/torchinductor")
    return added


def user_name() -> str:
    """The name of this user; if the system has none, such as `uid1000`."""
    given = next((name for variable in _NAMES if (name := os.environ.get(variable))), None)
    return given or (pwd.getpwuid(os.geteuid()).pw_name if _has_entry() else f"uid{os.geteuid()}")


def dvc_state(workspace_id: str) -> Path:
    """The folder of a workspace's DVC state: databases with pickles, which DVC's default puts below /var/tmp."""
    return al_home() / workspace_id / "dvc"


def fork_servers(workspace_id: str) -> Path:
    """The folder of the sockets of a workspace's fork servers."""
    return al_home() / workspace_id / "forks"


def _is_own_home(home: str | None) -> bool:
    """Whether HOME (or, without one, the passwd entry's) is a folder that nobody else can write."""
    if home is None:
        if not _has_entry():
            return False
        home = pwd.getpwuid(os.geteuid()).pw_dir
    return os.path.isabs(home) and _is_own(home)


def _keeps_caches(home: str | None) -> bool:
    """Whether HOME is writable, and its cache and configuration folders only by this user."""
    home = pwd.getpwuid(os.geteuid()).pw_dir if home is None else home
    return os.access(home, os.W_OK) and all(_is_own(os.path.join(home, name)) for name in (".cache", ".config"))


def _is_own(folder: str) -> bool:
    try:
        found = os.stat(folder)
    except OSError:
        return True  # does not exist
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
    """Whether the group of a file is its owner's private group (Debian, Red Hat: umask 002), or root's."""
    if found.st_gid == 0:
        return True
    try:
        owner = pwd.getpwuid(found.st_uid)
        group = grp.getgrgid(found.st_gid)
    except KeyError:
        return found.st_gid == found.st_uid
    return group.gr_name == owner.pw_name and set(group.gr_mem) <= {owner.pw_name, "root"}


def _trusted_owners() -> frozenset[int]:
    """Root and this user; in a user namespace also the overflow user, to whom files outside the namespace belong."""
    owners = {0, os.geteuid()}
    with contextlib.suppress(OSError, ValueError):
        inside, outside, count = (int(word) for word in Path("/proc/self/uid_map").read_text("ascii").split()[:3])
        if (inside, outside, count) != (0, 0, 2**32 - 1):
            owners.add(int(Path("/proc/sys/kernel/overflowuid").read_text("ascii")))
    return frozenset(owners)
