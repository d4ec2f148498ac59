"""The DVC client: the repository's settings, its stages, and the transfer of its data."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from al_pipeline.errors import RemoteIncomplete, RepositoryError, StageFailed
from al_pipeline.integrations.dvc.defects import RemoteDefect, describe_defects, describe_incomplete_remote
from al_pipeline.integrations.dvc.digests import OBJECT, digest, parse_listing
from al_pipeline.integrations.dvc.pacing import NEXT
from al_pipeline.integrations.dvc.process import TIMEOUT, TRANSFER_TIMEOUT
from al_pipeline.integrations.dvc.records import Records
from al_pipeline.integrations.dvc.remotes import explained
from al_pipeline.integrations.dvc.settings import change_config, object_folders, utf8
from al_pipeline.integrations.git import Git
from al_pipeline.sanitize import redact
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import STAGES

_STAGE_TIMEOUT = 6 * 3600.0

_STAND_ALONE = """
import json, os, sys
from dvc.config import Config
theirs = Config(os.path.join(sys.argv[1], ".dvc"), validate=False)
print(json.dumps({"remote": theirs["remote"], "core": theirs["core"]}, default=str))
"""


class Dvc(Records):
    """The DVC repository at `root`. Use as a context manager; the process starts with the first command."""

    def init(self, remote: str) -> None:
        """Make `root` a DVC repository with the default remote `remote`; idempotent."""
        config = self.root / ".dvc/config"
        if not config.exists():
            self._checked(["init", "--force"], "init")
        core = {"remote": "store", "analytics": "false", "autostage": "false", "check_update": "false"}
        if "://" not in remote and not remote.startswith("~") and not os.path.isabs(remote):
            remote = os.path.relpath(self.root / remote, config.parent)  # as DVC writes it, valid in every clone
        change_config(config, {"core": core, 'remote "store"': {"url": utf8(remote), "verify": "true"}}, 0o644)
        self.keep_state_private()

    def keep_state_private(self) -> None:
        """Make every `dvc` in this repository, run by us or by hand, keep its state in a folder private to this user.

        The state holds pickles, and by default lies below /var/tmp, where anybody could plant one. Written to
        `config.local`, which git ignores; idempotent. Call only while holding the workspace's lock.
        """
        place = utf8(str(private_folder(self._state_folder())))
        change_config(self.root / ".dvc/config.local", {"core": {"site_cache_dir": place}}, 0o600)

    def stand_alone(self, source: Path) -> None:
        """Make a fresh clone fetch data from the remotes that the repository at `source` has now, never from its cache.

        Copies the remotes, with their credentials, from the settings of `source`; the cache is this clone's own,
        whatever the user's global settings say. Written to `config.local`, which git ignores. Raises RepositoryError if
        the settings cannot be read.
        """
        try:
            result = self._run_script(_STAND_ALONE, str(source))
        except subprocess.TimeoutExpired:
            raise RepositoryError(f"DVC's settings could not be read within {TIMEOUT:.0f} s") from None
        if result.returncode:
            said = result.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise RepositoryError(f"DVC's settings in {source} cannot be used: {said[0]}")
        theirs = json.loads(result.stdout)
        core = {name: value for name, value in theirs["core"].items() if name == "remote"}
        core["site_cache_dir"] = utf8(str(private_folder(self._state_folder())))
        remotes = {f'remote "{name}"': settings for name, settings in theirs["remote"].items()}
        cache = {"dir": utf8(os.path.abspath(self.root / ".dvc/cache"))}
        change_config(self.root / ".dvc/config.local", {**remotes, "core": core, "cache": cache}, 0o600)

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
        options = [*(["--force"] if force else []), *([] if run_cache else ["--no-run-cache"])]
        command = ["repro", "--single-item", *options]
        known = command == self._paced and stage in self._ahead
        code, said = self._exchange({NEXT: stage} if known else [*command, stage, *_after(stage)], _STAGE_TIMEOUT)
        self._paced, self._ahead = command, () if code else _after(stage)
        if code:
            raise StageFailed(f"stage {stage} failed; the end of its output (all of it: {self.log}):\n{said}")

    def _outputs_of(self, stage: str) -> dict[str, str]:
        return dict(self._outputs("dvc.lock", None, stage))

    def _unlike_of(self, stage: str) -> list[str]:
        outputs = self._outputs_of(stage)
        return self.unlike(*outputs) if outputs else []

    def add(self, *paths: Path) -> None:
        """Track source data as it is now; also puts it back into a cache that has lost it."""
        names = self._names(paths)
        recorded = self.recorded(*(f"{name}.dvc" for name in names if (self.root / f"{name}.dvc").exists()))
        unchanged = {name: digest for name, digest in recorded.items() if self.digest(self.root / name) == digest}
        self._ask("track", "add", targets=names, unchanged=unchanged)

    def changed(self, *targets: str) -> dict[str, object]:
        """The output of `dvc status` for `targets` (none: everything); empty if all is as recorded."""
        return self._json(["status", "--json", *targets], "status", TIMEOUT)

    def checkout(self, *targets: str) -> None:
        """Make the work tree's data match its records; refuses to delete data that exist nowhere else."""
        self._checked(["checkout", *targets], "checkout")

    def push(self) -> None:
        """Make the default remote hold, byte for byte, all that the work tree's `.dvc` files and `dvc.lock` name.

        Uploads what it lacks or holds with other bytes, from the work tree or the cache, after verifying the digest.
        Damaged cache objects are set aside, so that they are neither uploaded nor linked. Files verified here are on
        disk (fsync) on return. Raises RemoteIncomplete if objects could not be sent, RepositoryError if it fails.
        """
        _, defects = self.repair_remote(())
        _refuse(defects)

    def repair_remote(self, revisions: Sequence[str]) -> tuple[int, list[RemoteDefect]]:
        """Like `push`, also for what `revisions` name; return the number of objects sent, and the defects left."""
        place, fix = self._place_aside, "; `al doctor` tries the remote"
        reply = self._ask("push", "push", fix, revisions=list(revisions), place=place)
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

    def verify_remote(self) -> None:
        """Raise RemoteIncomplete if `defects_in_remote` finds any."""
        _refuse(self.defects_in_remote())

    def absent_folder(self) -> str:
        """The path of the default remote if it is a folder that does not exist; else empty."""
        return str(self._ask("where", "remote")["absent"])

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
            raise RepositoryError(f"the DVC remote did not answer within {TIMEOUT:.0f} s") from None
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

    def set_aside_damaged(self, *targets: str, revisions: Sequence[str] = ()) -> list[str]:
        """Move cache objects whose content does not match their name to `.al/damaged`; return their workspace paths."""
        place = self._place_aside
        reply = self._ask("set aside", "cache", targets=targets, revisions=list(revisions), place=place)
        aside: list[str] = reply["aside"]
        return aside

    @property
    def _place_aside(self) -> str:
        return str(self.root / ".al/damaged")

    def pull(self, *targets: str) -> None:
        """Fetch data that the work tree lacks, and verify their content.

        Raises RemoteIncomplete, naming the objects, if the remote lacks them or holds them with other bytes.
        """
        self.set_aside_damaged(*targets)
        self._ask("reach", "pull", targets=targets, fix="; `al doctor` tries the remote")
        try:
            self._checked(["pull", *targets], "pull", TRANSFER_TIMEOUT, fix="; `al doctor` tries the remote")
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

    def get(self, path: str, revision: str, target: Path) -> None:
        """Copy `path` as of `revision` to `target` without touching the work tree, and verify its content.

        Raises RemoteIncomplete, naming the objects, if neither the cache nor the remote has them.
        """
        record = next((name for name in (f"{path}.dvc",) if Git(self.root).show(revision, name)), path)
        wanted = self.recorded(record, revision=revision).get(path)
        if wanted is not None and self._copy_cached(wanted, target):
            return
        command = ["get", "--force", ".", path, "--rev", revision, "--out", str(target)]
        try:
            self._checked(command, "get", TRANSFER_TIMEOUT)
            if wanted is None or digest(target) == wanted:
                return
            found: RepositoryError | None = None
        except RepositoryError as error:
            found = error
        if self.set_aside_damaged(path, revisions=[revision]):
            _remove(target)
            with contextlib.suppress(RepositoryError):
                self._checked(command, "get", TRANSFER_TIMEOUT)
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

    def _copy_cached(self, wanted: str, target: Path) -> bool:
        """Copy an output from DVC's cache, by its digest, without starting DVC; whether it was there, undamaged.

        Nothing is left of a copy that is not whole.
        """
        cache = object_folders(self.root)[0] / "files/md5"

        def place_of(name: str) -> Path:
            if not OBJECT.match(name):
                raise ValueError(name)
            return cache / name[:2] / name[2:]

        try:
            if wanted.endswith(".dir"):
                data = place_of(wanted).read_bytes()
                files = {target / path: place_of(name) for path, name in parse_listing(data).items()}
            else:
                files = {target: place_of(wanted)}
            for path, source in files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, path)
            if digest(target) == wanted:
                return True
        except (OSError, ValueError):
            pass  # `dvc get` says what is wrong, or fetches it
        _remove(target)
        return False

    def shared_names(self, folder: str) -> list[str]:
        """The names of the shards in `folder` of the default remote, which DVC's records do not name."""
        names: list[str] = self._ask("names of shared", "remote", folder=folder)["names"]
        return names

    def fetch_shared(self, folder: str, names: Sequence[str], target: Path) -> None:
        """Copy shards from `folder` of the default remote to the folder `target`, unverified."""
        self._ask("fetch shared", "remote", folder=folder, names=list(names), place=os.path.abspath(target))

    def send_shared(self, folder: str, source: Path) -> None:
        """Copy the files in `source` to `folder` of the default remote."""
        self._ask("send shared", "remote", folder=folder, place=os.path.abspath(source))

    def _names(self, paths: Sequence[Path]) -> list[str]:
        return [str(path.relative_to(self.root) if path.is_absolute() else path) for path in paths]


def _refuse(defects: Sequence[RemoteDefect]) -> None:
    """Raise RemoteIncomplete if there are any."""
    if defects:
        raise RemoteIncomplete(
            f"the DVC remote lacks objects after a push: {describe_defects(defects)}; `al doctor` shows more"
        )


def _after(stage: str) -> tuple[str, ...]:
    """The stages of a round after `stage`."""
    return STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
