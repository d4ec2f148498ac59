"""A fresh clone at a round's tag: check its files, fetch its data from the DVC remote, run its stages again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from al_pipeline.errors import RemoteIncomplete, RepositoryError, StageFailed, UnexpectedChange
from al_pipeline.features.device import device_like
from al_pipeline.files import read_json, sha256_file, write_json
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.digests import digest
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.environment import Engine
from al_pipeline.integrations.git import Git
from al_pipeline.operations.build import encode
from al_pipeline.operations.close import drawn_at_random
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plans
from al_pipeline.operations.plugins import trusted_plugins
from al_pipeline.operations.reproduction.result import Cause, Difference, FoundDifference
from al_pipeline.operations.upgrade import OLD_DVC_YAML, bring_up_to_date
from al_pipeline.params import load_params
from al_pipeline.records import round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.fingerprint import current_engine, difference, recorded_device, write_engine
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import STAGES, Layout
from al_pipeline.workspace.trust import doubtful
from al_pipeline.workspace.workspace import Workspace
from al_pipeline.yaml_text import read_yaml

_CAUSES: Mapping[str, Cause] = {
    "engine.json": "engine",
    "models/encoder": "features",
    "rounds/overrides.json": "parameters",
    "rounds/random.json": "data",
}
"""Cause of a difference by the stage input that differs from the recorded one; for all other inputs, it is `data`."""

_PATH = re.compile(r"(?!.*\.\.)\w[\w./-]*")
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


def remove_clones(home: Path) -> None:
    """Delete the clones, also those of a killed call, after ending the processes that work in them."""
    for folder in [path for path in home.iterdir() if path.is_dir()]:
        layout = Layout(folder)
        for process in (layout.private / "dvc.json", layout.encoding):
            child.end_remembered(process)
        shutil.rmtree(folder)


@dataclass
class Clone:
    """The clone in which one round is reproduced. `create` makes it and sets `git` and `lock`."""

    workspace: Workspace
    record: RoundRecord
    home: Path
    """The folder of this call, with the clones and what they share."""
    engine: Engine | None
    """The engine to run under; None: the running one."""
    on_progress: Callable[[str], None]
    layout: Layout = field(init=False)
    git: Git = field(init=False)
    lock: Mapping[str, Any] = field(init=False)
    """The stages of `dvc.lock`."""

    def __post_init__(self) -> None:
        self.layout = Layout(self.home / self.tag)
        recorded = self.record.engine.to_row()
        self.device = device_like(recorded_device(recorded))
        """The device here that is most like the one of the round."""
        self.engine_changes = "" if self.engine else difference(recorded, current_engine(self.device))
        """How the recorded engine differs from the one that runs here, in words."""

    @property
    def tag(self) -> str:
        """The round's tag."""
        return round_name(self.record.round)

    def report_progress(self, message: str) -> None:
        """Report progress, prefixed with the round's tag."""
        self.on_progress(f"{self.tag}: {message}")

    def create(self) -> None:
        """Clone at the tag, and check that the tag's files match the last commit's record of the round."""
        source = self.workspace.layout
        self.report_progress("cloning")
        then = read_history(source, Git(source.root), self.tag)  # checks the files before they are checked out
        self.git = Git(source.root).clone(self.layout.root, self.tag)
        private_folder(self.layout.private)
        for cache in (self.layout.features, self.layout.terms):
            cache.symlink_to(private_folder(self.home / cache.name))
        self._check_records(self.record in then.rounds)
        if not self.engine:
            recorded, plugins = self.record.engine.to_row(), self._plugins()
            self.engine_changes = difference(recorded, current_engine(self.device), plugins)
        self.lock = _parse_lock(self.layout.dvc_lock)

    def remove(self) -> None:
        """Delete the clone."""
        if self.layout.root.exists():
            shutil.rmtree(self.layout.root)

    def open_dvc(self) -> Dvc:
        """DVC for the clone, with its state in the clone: the machine's might list an object as already verified."""
        dvc = open_dvc(self.layout)
        engine = self.engine.environment if self.engine else {}
        place = str(self.layout.private / "dvc")
        environment = {**dvc.environment, **engine, "DVC_SITE_CACHE_DIR": place}
        return replace(dvc, environment=environment, check=self._check_trusted)

    def outputs(self, stage: str) -> list[Mapping[str, Any]]:
        """The entries of `dvc.lock` for a stage's outputs (`path`, `md5`)."""
        return list(self.lock[stage]["outs"])

    def output_paths(self) -> list[str]:
        """The paths of the outputs of all stages."""
        return [entry["path"] for stage in STAGES for entry in self.outputs(stage)]

    def pull_missing_sources(self, dvc: Dvc) -> None:
        """Fetch the sources that this call has not fetched for an earlier round yet; no outputs of stages.

        Those from an earlier round are compared with `dvc.lock` like the others.
        """
        fetched, cache = self.home / "fetched", self.layout.root / ".dvc/cache"
        _link_tree(fetched, cache)
        try:
            self._pull(dvc, [str(pointer.relative_to(self.layout.root)) for pointer in self.layout.pointers])
        finally:
            _link_tree(cache, fetched)

    def check_inputs(self) -> None:
        """Raise FoundDifference unless all sources and parameters of the stages match `dvc.lock`."""
        params = _parse_yaml(self.layout.params)
        made = set(self.output_paths())
        for stage in STAGES:
            for entry in self.lock[stage].get("deps", ()):
                path = entry["path"]
                found = None if path in made else digest(self.layout.root / path)
                if path not in made and found != entry["md5"]:
                    message = f"{path} has digest {found}, dvc.lock says {entry['md5']}"
                    raise FoundDifference(Difference(stage, _CAUSES.get(path, "data"), message))
            for key, value in self.lock[stage].get("params", {}).get("params.yaml", {}).items():
                if (found := _dig(params, key)) != value:
                    message = f"params.yaml says {key}: {found}, dvc.lock says {value}"
                    raise FoundDifference(Difference(stage, "parameters", message))

    def pull_outputs(self, dvc: Dvc) -> Difference | None:
        """Fetch the published outputs (some are in git); return the first that is lost or differs from `dvc.lock`.

        The round can be reproduced without them: they are only compared.
        """
        first = None
        for stage in STAGES:
            for entry in self.outputs(stage):
                path = self.layout.root / entry["path"]
                try:
                    if not path.exists():
                        self._pull(dvc, [entry["path"]])
                except FoundDifference as lost:
                    first = first or lost.difference
                    continue
                if digest(path) != entry["md5"]:
                    message = f"{entry['path']} is published with other content than dvc.lock says"
                    first = first or Difference(stage, "data", message)
        return first

    def use_this_engine(self) -> None:
        """Write the files that closing the round with this engine would have written."""
        bring_up_to_date(self.layout)
        write_engine(self.layout.engine, self.device, self._plugins())
        if not self.layout.asked_at_random.exists():
            plans = read_plans(self.git, f"{self.tag}^").values()
            write_json(self.layout.asked_at_random, {"items": drawn_at_random(plans)})

    def encode(self) -> None:
        """Compute the vectors that this call has not computed yet."""
        self.report_progress("encode")
        try:
            encode(self.layout, load_params(self.layout.params).features, self.engine)
        except StageFailed as error:
            raise FoundDifference(Difference("encode", "features", str(error))) from None

    def run(self, dvc: Dvc, stage: str) -> None:
        """Run a stage even if DVC considers it up to date."""
        self.report_progress(stage)
        try:
            dvc.repro(stage, force=True, run_cache=False)
        except StageFailed as error:
            raise FoundDifference(Difference(stage, "engine", str(error))) from None

    def _plugins(self) -> dict[str, str]:
        """What the plug-ins that the round used are made of. Raises UnexpectedChange if one is not trusted here."""
        try:
            return trusted_plugins(self.layout, load_params(self.layout.params))
        except UnexpectedChange as error:
            raise UnexpectedChange(
                f"at the tag {self.tag}, {error}. If its code has changed since, check that tag out in a clone of your "
                "own first"
            ) from None

    def _check_records(self, same_record: bool) -> None:
        """Raise FoundDifference unless the tag's files match the last commit's record of the round."""
        layout, hashes = self.layout, self.record.hashes
        same: tuple[tuple[bool, Cause, str], ...] = (
            (same_record, "data", "its record"),
            (sha256_file(layout.dvc_lock) == hashes.get("dvc_lock"), "data", "dvc.lock"),
            (sha256_file(layout.params) == hashes["params"], "parameters", "params.yaml"),
            (not difference(read_json(layout.engine), self.record.engine.to_row()), "engine", "engine.json"),
        )
        for equal, cause, name in same:
            if not equal:
                message = f"{name} at the tag {self.tag} does not match the last commit's record of the round"
                raise FoundDifference(Difference("", cause, message))

    def _check_trusted(self, root: Path) -> None:
        """Raise UnexpectedChange if a file that controls DVC is not trusted; an older layout's `dvc.yaml` is ours."""
        doubts = doubtful(root)
        if sha256_file(root / "dvc.yaml") in OLD_DVC_YAML:
            doubts.pop("dvc.yaml", None)
        if doubts:
            name, problem = next(iter(doubts.items()))
            raise UnexpectedChange(
                f"{name} at the tag {self.tag} {problem}. Check that tag out in a clone of your own and inspect the "
                "file; `al trust` there accepts it on this machine"
            )

    def _pull(self, dvc: Dvc, targets: Collection[str]) -> None:
        """Fetch each target from the remote separately, so that the error can name a missing one."""
        for target in targets:
            name = target.removesuffix(".dvc")
            self.report_progress(f"fetching {name}")
            try:
                dvc.pull(target)
            except (RepositoryError, RemoteIncomplete) as error:
                message = f"the DVC remote does not deliver {name} of {self.tag}: {error}"
                raise FoundDifference(Difference("", _CAUSES.get(name, "data"), message, missing=True)) from None


def _link_tree(source: Path, target: Path) -> None:
    """Add every file of `source` to `target`, as a hard link if the file system supports it, else as a copy."""
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_dir() or there.exists():
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            there.hardlink_to(path)
        except OSError:
            shutil.copy2(path, there)


def _parse_lock(path: Path) -> Mapping[str, Any]:
    """Read the stages of a `dvc.lock`. Raises FoundDifference unless the entries in use are as DVC writes them."""
    stages: Any = _parse_yaml(path).get("stages")
    try:
        entries = [entry for stage in STAGES for kind in ("deps", "outs") for entry in stages[stage][kind]]
        if all(_PATH.fullmatch(entry["path"]) and _MD5.fullmatch(entry["md5"]) for entry in entries):
            return dict(stages)
    except (KeyError, TypeError):
        pass
    raise FoundDifference(Difference("", "data", f"{path.name} is not a valid DVC file"))


def _parse_yaml(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise FoundDifference(Difference("", "data", f"{path.name} at the tag is not valid"))
    return found


def _dig(values: Any, key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
