"""The DVC client: one process for many commands, in its own process group that a later tick can find and end."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import yaml

from al_pipeline.errors import AlError, BadInput, RemoteIncomplete, RepositoryError, StageFailed, UnexpectedChange
from al_pipeline.files import read_object, write_bytes
from al_pipeline.integrations import forks
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.digests import Digests, digest, listing_digest
from al_pipeline.integrations.dvc.remotes import explained
from al_pipeline.integrations.git import NOT_OURS, Git
from al_pipeline.logs import get_logger
from al_pipeline.sanitize import redact
from al_pipeline.workspace.home import dvc_state, fork_servers, own_environment, private_folder
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import check_dvc

_logger = get_logger(__name__)

_STAGE_TIMEOUT = 6 * 3600.0
_TRANSFER_TIMEOUT = 6 * 3600.0
_TIMEOUT = 600.0
_SECOND_LOOK = 0.5
_NEW_PARTS = 4
"""Up to this many new files in a folder are recognised without asking DVC; see `_added`."""
_ID = re.compile(r"[0-9a-f]{12}\Z")
_ADVERTISEMENT = "Having any troubles? "


_WORKER = "al_pipeline.integrations.dvc.worker"

_STAND_ALONE = """
import json, os, sys
from dvc.config import Config
theirs = Config(os.path.join(sys.argv[1], ".dvc"), validate=False)
print(json.dumps({"remote": theirs["remote"], "core": theirs["core"]}, default=str))
"""


@dataclass(frozen=True, slots=True)
class RemoteDefect:
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


@dataclass(frozen=True, slots=True)
class Different:
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


@dataclass
class Dvc:
    """The DVC repository at `root`. Use as a context manager; the process starts with the first command."""

    root: Path
    state: Path | None
    """The file that records the process (`pid`, `started`), so that a later tick can end it. None for callers that read
    without the workspace's lock: they must not overwrite what a tick recorded."""
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    check: Callable[[Path], None] = check_dvc
    """Checks the files that configure DVC before each command; raises if it must not run."""
    _process: subprocess.Popen[str] | forks.Fork | None = None
    _output: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            child.end_group(self._process.pid)
            with contextlib.suppress(BrokenPipeError):
                self._process.__exit__(None, None, None)
            self._process = None
            if self.state is not None:
                self.state.unlink(missing_ok=True)
        if self._output is not None:
            self._output.close()
            self._output = None

    def init(self, remote: str) -> None:
        """Make `root` a DVC repository with the default remote `remote`; idempotent."""
        config = self.root / ".dvc/config"
        if not config.exists():
            self._checked(["init", "--force"], "init")
        core = {"remote": "store", "analytics": "false", "autostage": "false", "check_update": "false"}
        if "://" not in remote and not remote.startswith("~") and not os.path.isabs(remote):
            remote = os.path.relpath(self.root / remote, config.parent)  # as DVC writes it, valid in every clone
        change_config(config, {"core": core, 'remote "store"': {"url": _utf8(remote), "verify": "true"}}, 0o644)
        self.keep_state_private()

    def keep_state_private(self) -> None:
        """Make every `dvc` in this repository, run by us or by hand, keep its state in a folder private to this user.

        The state holds pickles, and by default lies below /var/tmp, where anybody could plant one. Written to
        `config.local`, which git ignores; idempotent. Call only while holding the workspace's lock.
        """
        place = _utf8(str(private_folder(self._state_folder())))
        change_config(self.root / ".dvc/config.local", {"core": {"site_cache_dir": place}}, 0o600)

    def _state_folder(self) -> Path:
        """This workspace's folder for DVC's state; one shared folder for repositories that are no workspace (yet)."""
        return dvc_state(self._workspace_id() or "dvc-only")

    def _workspace_id(self) -> str | None:
        name = read_object(self.root / Layout().marker).get("workspace_id")
        return name if isinstance(name, str) and _ID.match(name) else None

    def stand_alone(self, source: Path) -> None:
        """Make a fresh clone fetch data from the remotes that the repository at `source` has now, never from its cache.

        Copies the remotes, with their credentials, from the settings of `source`; the cache is this clone's own,
        whatever the user's global settings say. Written to `config.local`, which git ignores. Raises RepositoryError if
        the settings cannot be read.
        """
        try:
            result = self._run_script(_STAND_ALONE, str(source))
        except subprocess.TimeoutExpired:
            raise RepositoryError(f"DVC's settings could not be read within {_TIMEOUT:.0f} s") from None
        if result.returncode:
            said = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise RepositoryError(f"DVC's settings in {source} cannot be used: {said[0]}")
        theirs = json.loads(result.stdout)
        core = {name: value for name, value in theirs["core"].items() if name == "remote"}
        core["site_cache_dir"] = _utf8(str(private_folder(self._state_folder())))
        remotes = {f'remote "{name}"': settings for name, settings in theirs["remote"].items()}
        cache = {"dir": _utf8(os.path.abspath(self.root / ".dvc/cache"))}
        change_config(self.root / ".dvc/config.local", {**remotes, "core": core, "cache": cache}, 0o600)

    def end_previous(self) -> None:
        """End a DVC process (and its stage) that a killed tick left, and repair git's index and DVC's locks.

        Call only while holding the workspace's lock.
        """
        if self.state is not None:
            child.end_remembered(self.state)
        Git(self.root).plain_index()
        self._clear_dead_lock()

    def _clear_dead_lock(self) -> None:
        """Remove DVC's lock file (`rwlock`) if no live process can hold a lock.

        DVC writes it in place, so a kill or a full disk truncates it, and then DVC cannot read it. DVC also considers
        a lock held while its pid exists: for a zombie that nothing reaps (in a container without an init process), or
        an unrelated process that got the pid after a reboot. Two checks, because a live process may be writing the file
        during the first.
        """
        path = self.root / ".dvc/tmp/rwlock"
        if _is_dead(path):
            time.sleep(_SECOND_LOOK)
            if _is_dead(path):
                _logger.warning("removing the entries of a process that has ended from DVC's lock file: %s", path)
                path.unlink(missing_ok=True)

    def expect_stages(self) -> None:
        """Start DVC's process and the stage server without waiting: each spends about a second on imports."""
        if self._process is not None:
            return
        with contextlib.suppress(AlError):  # raised again by the first command
            self.check(self.root)
            self._start("--stages")

    def repro(self, stage: str, *, force: bool = False, run_cache: bool = True) -> None:
        """Bring one stage up to date, and verify the content of its outputs.

        DVC takes known outputs from the work tree or its cache unverified: if their content is not what it recorded,
        the stage is run again. Raises StageFailed with the last lines of the stage's output.
        """
        self._repro(stage, force, run_cache)
        if self._unlike_of(stage):
            self.set_aside_damaged(*self._outputs_of(stage))
            self._repro(stage, True, False)
            if unlike := self._unlike_of(stage):
                raise StageFailed(
                    f"stage {stage} wrote {', '.join(unlike)}, but reading them back gave other content; check the disk"
                )

    def _repro(self, stage: str, force: bool, run_cache: bool) -> None:
        options = (["--force"] if force else []) + ([] if run_cache else ["--no-run-cache"])
        code, said = self._command(["repro", "--single-item", *options, stage], _STAGE_TIMEOUT)
        if code:
            raise StageFailed(f"stage {stage} failed; the end of its output (all of it: {self.log}):\n{said}")

    def _outputs_of(self, stage: str) -> dict[str, str]:
        return dict(self._outputs("dvc.lock", None, stage))

    def _unlike_of(self, stage: str) -> list[str]:
        outputs = self._outputs_of(stage)
        return self.unlike(*outputs) if outputs else []

    def add(self, *paths: Path) -> None:
        """Track source data as it is now."""
        self._checked(["add", *self._names(paths)], "add")

    def push(self) -> None:
        """Make the default remote hold, byte for byte, all that the work tree's `.dvc` files and `dvc.lock` name.

        Uploads what it lacks or holds with other bytes, from the work tree or the cache, after verifying the digest.
        Damaged cache objects are set aside, so that they are neither uploaded nor linked. Files verified here are on
        disk (fsync) on return. Raises RepositoryError; to find objects that could not be sent, call `verify_remote`.
        """
        self.set_aside_damaged()
        self._ask("push", "push", fix="; `al doctor` tries the remote")

    def repair_remote(self, revisions: Sequence[str]) -> tuple[int, list[RemoteDefect]]:
        """Like `push`, also for what `revisions` name; return the number of objects sent, and the defects left."""
        self.set_aside_damaged(revisions=revisions)
        reply = self._ask("push", "push", revisions=list(revisions), fix="; `al doctor` tries the remote")
        return reply["sent"], [RemoteDefect(**row) for row in reply["defects"]]

    def defects_in_remote(self, *targets: str) -> list[RemoteDefect]:
        """The objects that the work tree's records name and the default remote lacks or holds with other bytes.

        Compares the size of every object, and the digest of each that was not verified before, except large ones in a
        remote that is not a folder. `targets`: check only these (none: all).
        """
        return self.check_remote(*targets)[1]

    def check_remote(self, *targets: str) -> tuple[int, list[RemoteDefect]]:
        """The number of objects checked, and the defects among them."""
        reply = self._ask("check", "status --cloud", targets=targets)
        return reply["checked"], [RemoteDefect(**row) for row in reply["defects"]]

    def absent_folder(self) -> str:
        """The path of the default remote if it is a folder that does not exist; else empty."""
        return str(self._ask("where", "remote")["absent"])

    def verify_remote(self) -> None:
        """Raise RemoteIncomplete if `defects_in_remote` finds any."""
        if defects := self.defects_in_remote():
            raise RemoteIncomplete(
                f"the DVC remote lacks objects after a push: {describe_defects(defects)}; `al doctor` shows more"
            )

    def set_aside_damaged(self, *targets: str, revisions: Sequence[str] = ()) -> list[str]:
        """Move cache objects whose content does not match their name to `.al/damaged`; return their workspace paths."""
        place = str(self.root / ".al/damaged")
        reply = self._ask("set aside", "cache", targets=targets, revisions=list(revisions), place=place)
        aside: list[str] = reply["aside"]
        return aside

    def digest(self, path: Path) -> str | None:
        """The DVC digest of a file or folder, from its bytes; unchanged files are not read again."""
        with Digests(self._notes) as digests:
            return digests.of(path)

    def unlike(self, *targets: str) -> list[str]:
        """Those of `targets` (as for `recorded`) that are missing or hold other bytes than recorded.

        Does not ask DVC, which trusts its own state about what it fetched.
        """
        recorded = self.recorded(*targets)
        with Digests(self._notes) as digests:
            return [name for name, wanted in recorded.items() if digests.of(self.root / name) != wanted]

    def recorded(self, *targets: str, revision: str | None = None) -> dict[str, str]:
        """The digest of each of `targets` by its path, as recorded in the work tree, or in the commit `revision`.

        `targets`: `.dvc` files, and paths that `dvc.lock` records; none: all outputs in `dvc.lock`. Raises
        UnexpectedChange if a record is malformed.
        """
        return {
            name: digest
            for record in sorted({name if name.endswith(".dvc") else "dvc.lock" for name in targets or ("dvc.lock",)})
            for name, digest in self._outputs(record, revision)
            if record.endswith(".dvc") or not targets or name in targets
        }

    def _outputs(self, record: str, revision: str | None, stage: str | None = None) -> Iterator[tuple[str, str]]:
        path = self.root / record
        if revision is not None:
            text = Git(self.root).show(revision, record)
        else:
            text = path.read_text(encoding="utf-8") if path.exists() else None
        try:
            rows = _parse_outputs(text or "", record.endswith(".dvc"))
        except (yaml.YAMLError, AttributeError, KeyError, TypeError):
            raise UnexpectedChange(
                f"{record} is not a valid DVC file; `git checkout -- {record}` restores it"
            ) from None
        folder = Path(record).parent
        for of, name, wanted in rows:
            if stage in (None, of):
                yield (folder / name).as_posix(), wanted

    def differences(self, *targets: str) -> list[Different]:
        """The files that differ from the record, each with what the cache and the remote hold for it."""
        if (added := self._added(targets)) is not None:
            return added
        return [Different(**row) for row in self._ask("compare", "status", targets=targets)["differences"]]

    def _added(self, targets: Sequence[str]) -> list[Different] | None:
        """The unrecorded files of folders if they sort after all recorded ones, which are unchanged; else None.

        New parts of a folder sort last by name, so the recorded listing can be recognised without asking DVC.
        """
        found: list[Different] = []
        with Digests(self._notes) as digests:
            for name, wanted in self.recorded(*targets).items():
                listing = digests.listing(self.root / name)
                counts = range(len(listing), max(-1, len(listing) - 1 - _NEW_PARTS), -1)
                count = next((count for count in counts if listing_digest(listing[:count]) == wanted), None)
                if count is None:
                    return None
                names = (f"{name}/{entry['relpath']}" for entry in listing[count:])
                found += [Different(one, "", "extra", "absent", "absent", False) for one in names]
        return found

    @property
    def _notes(self) -> Path:
        return self.root / ".al/verified"

    def _ask(self, what: str, name: str, fix: str = "", **more: Any) -> dict[str, Any]:
        """Send the request `what` to `objects.serve` in DVC's process. Raises RepositoryError if it fails."""
        reply, said = self._exchange({"do": what, "notes": str(self._notes), **more}, _TRANSFER_TIMEOUT)
        if not isinstance(reply, dict) or "error" in reply:
            why = redact(str(reply["error"])) if isinstance(reply, dict) else said
            raise RepositoryError(explained(why) or f"dvc {name} failed: {why}{fix}")
        return reply

    def check_writable(self) -> str:
        """Write a small file to the default remote and delete it; return the remote's address, redacted.

        Raises RepositoryError if that fails.
        """
        script = (
            "import uuid; from dvc.repo import Repo; from al_pipeline.integrations.dvc.objects import FOLDERS_NEEDED; "
            "r = Repo(); o = r.cloud.get_remote(); p = o.fs.join(o.path, 'al-probe-' + uuid.uuid4().hex); "
            "o.fs.protocol not in FOLDERS_NEEDED or o.fs.makedirs(o.path, exist_ok=True); "
            "o.fs.pipe_file(p, b'al'); o.fs.rm_file(p); print(o.path)"
        )
        try:
            self.check(self.root)
            result = self._run_script(script)
        except subprocess.TimeoutExpired:
            raise RepositoryError(f"the DVC remote did not answer within {_TIMEOUT:.0f} s") from None
        if result.returncode:
            said = redact(result.stderr).strip().splitlines()[-1:] or ["no reason given"]
            why = re.sub(r"\A[\w.]+: ", "", said[0])  # the name of the error's class
            raise RepositoryError(
                explained(said[0])
                or (
                    f"the DVC remote cannot be written to: {why}; `dvc remote list` shows it; fix its address or "
                    "permissions"
                )
            )
        return redact(result.stdout.strip())

    def changed(self, *targets: str) -> dict[str, object]:
        """The output of `dvc status` for `targets` (none: everything); empty if all is as recorded."""
        return self._json(["status", "--json", *targets], "status", _TIMEOUT)

    def pull(self, *targets: str) -> None:
        """Fetch data that the work tree lacks, and verify their content.

        Raises RemoteIncomplete, naming the objects, if the remote lacks them or holds them with other bytes.
        """
        self.set_aside_damaged(*targets)
        self._ask("reach", "pull", targets=targets, fix="; `al doctor` tries the remote")
        try:
            self._checked(["pull", *targets], "pull", _TRANSFER_TIMEOUT, fix="; `al doctor` tries the remote")
        except RepositoryError as error:
            self._blame_remote(targets, error)
        if unlike := self.unlike(*targets):
            raise RepositoryError(
                f"after dvc pull, {', '.join(unlike[:3])} differ from what is recorded: somebody changed them "
                "meanwhile; `dvc diff` shows the changes"
            )

    def _blame_remote(self, targets: Sequence[str], error: RepositoryError) -> NoReturn:
        """Raise RemoteIncomplete if defects in the remote explain a failed transfer; else raise `error`."""
        try:
            defects = self.defects_in_remote(*targets)
        except RepositoryError:
            raise error from None
        if defects:
            raise RemoteIncomplete(describe_incomplete_remote(defects)) from None
        raise error

    def checkout(self, *targets: str) -> None:
        """Make the work tree's data match its records; refuses to delete data that exist nowhere else."""
        self._checked(["checkout", *targets], "checkout")

    def get(self, path: str, revision: str, target: Path) -> None:
        """Copy `path` as of `revision` to `target` without touching the work tree, and verify its content.

        Raises RemoteIncomplete, naming the objects, if neither the cache nor the remote has them.
        """
        record = next((name for name in (f"{path}.dvc",) if Git(self.root).show(revision, name)), path)
        wanted = self.recorded(record, revision=revision).get(path)
        command = ["get", "--force", ".", path, "--rev", revision, "--out", str(target)]
        try:
            self._checked(command, "get", _TRANSFER_TIMEOUT)
            if wanted is None or digest(target) == wanted:
                return
            found: RepositoryError | None = None
        except RepositoryError as error:
            found = error
        if self.set_aside_damaged(path, revisions=[revision]):
            _remove(target)
            with contextlib.suppress(RepositoryError):
                self._checked(command, "get", _TRANSFER_TIMEOUT)
                if digest(target) == wanted:
                    return
        _remove(target)
        reply = self._ask("check", "get", targets=[path], revisions=[revision])
        if defects := [RemoteDefect(**row) for row in reply["defects"]]:
            # Defects count even if the work tree has the content: `dvc get` reads only the cache and the remote.
            absent = [one for one in defects if not one.have]
            raise RemoteIncomplete(describe_incomplete_remote(absent or defects)) from None
        raise found or RepositoryError(
            f"{path} of {revision} does not match its recorded digest; `al doctor` shows more"
        )

    def _run_script(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a Python script that uses DVC's modules, in the repository."""
        words = [sys.executable, "-P", "-c", script, *arguments]
        return forks.run(words, "dvc", self._fork_servers(), cwd=self.root, env=self._environment(), timeout=_TIMEOUT)

    def _checked(self, arguments: list[str], name: str, timeout: float = _TIMEOUT, fix: str = "") -> None:
        code, said = self._command(arguments, timeout)
        if code:
            raise RepositoryError(explained(said) or f"dvc {name} failed ({code}): {said}{fix}")

    def _json(self, arguments: list[str], name: str, timeout: float) -> dict[str, object]:
        code, said = self._command(arguments, timeout)
        line = next((line for line in reversed(said.splitlines()) if line.startswith("{")), None)
        if code or line is None:
            raise RepositoryError(explained(said) or f"dvc {name} failed ({code}): {said}")
        found: dict[str, object] = json.loads(line)
        return found

    def _command(self, arguments: list[str], timeout: float) -> tuple[int, str]:
        """Run a DVC command; return its exit code and the last lines of its output."""
        code, said = self._exchange(arguments, timeout)
        return (code if isinstance(code, int) else 1), said

    def _exchange(self, request: list[str] | dict[str, Any], timeout: float) -> tuple[Any, str]:
        """Send a request to DVC's process; return the reply and the last lines of output.

        Raises RepositoryError if the process ends or times out.
        """
        self.check(self.root)
        process = self._start()
        begin, start = self.log.stat().st_size, time.perf_counter()
        command = " ".join(request[:4]) if isinstance(request, list) else str(request["do"])
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], timeout)
            reply = process.stdout.readline() if ready else None
        except BrokenPipeError:
            reply = ""
        with self.log.open("rb") as log:
            log.seek(begin)
            said = log.read().decode("utf-8", "replace").strip()
        said = "\n".join(line for line in said.splitlines() if line and not line.startswith(_ADVERTISEMENT))
        said = redact("\n".join(said.splitlines()[-15:]))
        _logger.debug("dvc %s took %.3f s", command, time.perf_counter() - start)
        if reply:
            return json.loads(reply), said
        self.close()
        why = "ended unexpectedly" if reply == "" else f"did not end within {timeout:.0f} s and was stopped"
        raise RepositoryError(
            f"the DVC process {why} at `dvc {command}` (its log is {self.log}); nothing is lost, the next `al round` "
            f"continues: {said}"
        )

    def _start(self, *options: str) -> subprocess.Popen[str] | forks.Fork:
        if self._process is not None:
            return self._process
        private_folder(self.log.parent)
        self._output = os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")
        self._process = forks.popen(
            [sys.executable, "-P", "-m", _WORKER, *options],  # -P: see STAGE_ENVIRONMENT
            "dvc",
            self._fork_servers(),
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            encoding="utf-8",
            start_new_session=True,
        )
        if self.state is not None:
            child.remember(self.state, self._process.pid)
        return self._process

    def _fork_servers(self) -> Path | None:
        """The folder of the workspace's fork servers; None for a repository that is no workspace."""
        name = self._workspace_id()
        return fork_servers(name) if name else None

    def _environment(self) -> dict[str, str]:
        """The environment of DVC's processes: our programs first on the PATH, state in a private folder."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        state = Path(self.environment.get("DVC_SITE_CACHE_DIR") or self._state_folder())
        ours = {
            "PATH": path,
            "DVC_NO_ANALYTICS": "1",
            "NO_COLOR": "1",
            **self.environment,
            "DVC_SITE_CACHE_DIR": str(private_folder(state)),
        }
        return {**_inherited(), **own_environment(), **ours}

    def _names(self, paths: Sequence[Path]) -> list[str]:
        return [str(path.relative_to(self.root) if path.is_absolute() else path) for path in paths]


@lru_cache(maxsize=32)
def _parse_outputs(text: str, single: bool) -> tuple[tuple[str | None, str, str], ...]:
    """Stage, path and digest of each output in the text of a `dvc.lock`, or of a `.dvc` file (`single`).

    Cached by text: a tick compares the same records before and after each of its steps.
    """
    found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if text else {}
    stages = {None: found} if single else found.get("stages", {})
    return tuple((name, out["path"], out["md5"]) for name, stage in stages.items() for out in stage.get("outs", ()))


def change_config(path: Path, changes: Mapping[str, Mapping[str, Any]], mode: int) -> None:
    """Set values in a DVC configuration file, by section; write nothing if all are set already.

    DVC's own writer supports only ASCII, and leaves an empty file behind for other paths. Raises BadInput for a value
    that DVC would not read back as given, RepositoryError if the file is not a valid DVC configuration.
    """
    from configobj import ConfigObj, ConfigObjError

    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        config = ConfigObj(text.splitlines(), interpolation=False, list_values=True, encoding="utf-8")
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} cannot be read as DVC's configuration ({error}); fix or delete it") from None
    before = config.dict()
    for section, values in changes.items():
        known = config.setdefault(section, {})
        if not isinstance(known, dict):
            raise RepositoryError(f"{path} has a value named {section}, where DVC expects a section; fix or delete it")
        known.update(values)
    if config.dict() == before:
        return
    written = io.BytesIO()
    config.write(written)
    try:
        found = ConfigObj(io.StringIO(written.getvalue().decode())).dict()
    except (ConfigObjError, UnicodeDecodeError):
        found = {}
    for section, values in changes.items():
        for name, value in values.items():
            if found.get(section, {}).get(name) != value:
                raise BadInput(
                    f"DVC cannot store {value!r} in its configuration; choose a path without such characters"
                )
    write_bytes(path, written.getvalue(), mode)


def _utf8(path: str) -> str:
    """`path` as DVC will read it, independent of the locale.

    Raises BadInput if its bytes are not UTF-8 or it holds a control character: values of several lines are refused.
    """
    if not path.isprintable() and any(unicodedata.category(sign) == "Cc" for sign in path):
        raise BadInput(
            f"DVC cannot store {path!r} in its configuration: it contains a control character; rename that folder"
        )
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(
            f"{os.fsencode(path)!r} is not UTF-8, but DVC stores paths as UTF-8; rename that folder"
        ) from None


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    """Whether DVC's lock file is truncated, or names holders none of which is alive."""
    try:
        written = path.stat().st_mtime
        held = json.loads(path.read_text(encoding="utf-8"))
        entries = [*held.get("write", {}).values(), *itertools.chain.from_iterable(held.get("read", {}).values())]
        holders = {int(entry["pid"]) for entry in entries if entry}
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError, TypeError, KeyError):
        return True
    return bool(holders) and not any(child.lives(pid, before=written) for pid in holders)


def _inherited() -> dict[str, str]:
    """Our environment without what DVC and its stages must not see: git's variables and Label Studio's token."""
    return {name: value for name, value in os.environ.items() if name not in (*NOT_OURS, "AL_LABEL_STUDIO_TOKEN")}
