"""Make published rounds again in fresh clones, from what the DVC remote holds, and compare every byte.

A clean `dvc status` proves nothing: DVC takes outputs from its run cache, and its lock says what was, not what would
be. So a round is made anew from its sources, with the run cache off and no feature vector known, and what comes out is
compared with three things that were published: `dvc.lock`, the round's record, and the bytes themselves.

Nothing here writes to the workspace, takes its lock or talks to Label Studio: people may be labelling.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import (
    AlError,
    BadInput,
    NothingToDo,
    NotReproduced,
    RemoteIncomplete,
    RepositoryError,
    StageFailed,
    UnexpectedChange,
)
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.files import json_line, read_json, read_object, sha256_bytes, sha256_file, sha256_tree, write_json
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.digests import digest
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.environment import Engine, recorded_engine
from al_pipeline.integrations.git import Git
from al_pipeline.models.text_model import CARD_FILE
from al_pipeline.operations.build import encode
from al_pipeline.operations.close import drawn_at_random
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plans
from al_pipeline.operations.publish import plan_tasks
from al_pipeline.operations.upgrade import OLD_DVC_YAML, bring_up_to_date
from al_pipeline.params import load_params
from al_pipeline.records import LabeledItem, round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.fingerprint import difference, write_engine
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import STAGES, Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import check_dvc, doubtful
from al_pipeline.workspace.workspace import Workspace

TOLERANCE = 0.02
"""How far a metric may move under another engine. Another CPU or library moves it by far less; another rule by more."""

Cause = Literal["data", "features", "parameters", "engine"]
Source = Literal["dvc.lock", "round.json", "published"]

_NAMES = (
    *(
        "labeled",
        "test_labels",
        "unresolved",
        "model",
        "predictions",
        "control",
        "metrics",
        "metrics_csv",
        "confusion_csv",
    ),
    *("scores", "histogram", "guided", "queries", "choice"),
)
OUTPUTS: Mapping[str, str] = {getattr(Layout(), name).as_posix(): name for name in _NAMES}
"""What stages write: its path, and its name in a round's record."""
IN_RECORD = {"metrics": "metrics", "control": "control", "choice": "next_batch"}
"""Outputs whose content stands in the record itself, and under which key."""
PLAN = "plan"
"""The one output that no stage writes: the next round's plan, derived from the queries."""

_CAUSES: Mapping[str, Cause] = {
    "engine.json": "engine",
    "models/encoder": "features",
    "rounds/overrides.json": "parameters",
    "rounds/random.json": "data",
}
"""What it means where a stage's input is not the recorded one; of any other it is the data."""


_PATH = re.compile(r"(?!.*\.\.)\w[\w./-]*")
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


@dataclass(frozen=True, slots=True)
class Output:
    """One output, made again: which published accounts of it say the same, and which something else."""

    name: str
    stage: str
    """Empty for the plan."""
    sha256: str
    alike: tuple[Source, ...]
    unlike: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric as recorded and as made again under another engine."""

    name: str
    recorded: float | None
    made: float | None
    near: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """The first thing that differs. `stage` is empty where it shows before any stage has run."""

    stage: str
    cause: Cause
    what: str
    missing: bool = False
    """Whether the remote simply lacks it."""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A round made again. It is reproduced where `difference` is None."""

    round: int
    compared: Literal["bytes", "metrics"]
    engine: str
    """How the recorded engine differs from the one that made it again, in words; empty where it does not."""
    outputs: tuple[Output, ...]
    figures: tuple[Figure, ...]
    difference: Difference | None
    seconds: float
    folder: str | None
    """Where the clone lies, if it was kept."""


@dataclass(frozen=True, slots=True)
class _Published:
    """What was published, read before it is made again."""

    digests: Mapping[str, str | None]
    """Of each output, by path; None where the remote does not give it."""
    card: Mapping[str, Any]
    """The model's."""
    labels: list[list[LabeledItem]]


class _Different(Exception):
    """Ends a reproduction at the first difference behind which nothing can be learnt."""

    def __init__(self, found: Difference) -> None:
        super().__init__(found.what)
        self.found = found


def reproduce(
    workspace: Workspace,
    numbers: Collection[int] | None,
    *,
    engine: str | None = None,
    tolerance: float = TOLERANCE,
    keep: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Reproduction]:
    """Make rounds again (None: all that are published; none: the latest), one after the other.

    Under the recorded engine bytes are compared, under another one metrics within `tolerance`. `engine`: None for the
    running one, `recorded` for one installed in an environment of its own, else the path of its sources (checkout or
    wheel). `keep` leaves the clones for a look, until the next call.

    Within one call sources are fetched once, and vectors made once, not once a round: a pool that grows is the same
    objects in every round. Outputs are fetched for each round anew, since stages write theirs into the clone's cache.

    Raises NothingToDo where a round is not published, Locked where another call works, AlError where it cannot be done.
    """
    git = Git(workspace.layout.root)
    check_dvc(workspace.layout.root)  # its settings say where the clones' data come from
    history = read_history(workspace.layout, git)
    records = history.rounds if numbers is None else history.rounds[-1:]
    if numbers:
        records = tuple(history.record(number) for number in numbers)
    if not records:
        raise NothingToDo("no round is published yet; `al status` says what the first one waits for")
    if untagged := [name for r in records if (name := round_name(r.round)) not in git.tags()]:
        raise NothingToDo(f"without a tag here: {', '.join(untagged)}; `git fetch --tags`, or `al round` makes it")
    home = workspace.home / "reproduce"
    with locked(home / "lock", "al reproduce"):
        _remove_clones(home)
        try:
            for record in records:
                other = _engine(record.engine.to_row(), engine, on_progress)
                yield _Attempt(workspace, record, home, other, tolerance, keep, on_progress).run()
        finally:
            if not keep:
                _remove_clones(home)


def failure(made: Iterable[Reproduction]) -> AlError | None:
    """The error that says that not all came out as published; None where they did."""
    different = [one for one in made if one.difference is not None]
    if not different:
        return None
    names = ", ".join(round_name(one.round) for one in different)
    if all(one.difference and one.difference.missing for one in different):
        return RemoteIncomplete(
            f"the DVC remote lacks objects of {names}, or holds damaged ones; `al remote repair` in a clone that has "
            "them"
        )
    return NotReproduced(f"not what was published: {names}; `--keep` leaves the clone for a look")


def _engine(recorded: Mapping[str, Any], choice: str | None, on_progress: Callable[[str], None]) -> Engine | None:
    """The engine to run under; None for the running one, which is taken wherever it is the recorded one."""
    if choice is None or not difference(dict(recorded)):
        return None
    return recorded_engine(recorded, None if choice == "recorded" else Path(choice), on_progress)


def _remove_clones(home: Path) -> None:
    """Delete clones (a killed call may have left some), first ending what works in them."""
    for folder in [path for path in home.iterdir() if path.is_dir()]:
        layout = Layout(folder)
        for process in (layout.private / "dvc.json", layout.encoding):
            child.end_remembered(process)
        shutil.rmtree(folder)


class _Attempt:
    """One round on its way through a clone."""

    def __init__(
        self,
        workspace: Workspace,
        record: RoundRecord,
        home: Path,
        engine: Engine | None,
        tolerance: float,
        keep: bool,
        on_progress: Callable[[str], None],
    ) -> None:
        self.workspace, self.record, self.engine, self.tolerance, self.keep = workspace, record, engine, tolerance, keep
        self.name = round_name(record.round)
        self.layout = Layout(home / self.name)
        self.features = home / "features"
        self.cache = self.layout.root / ".dvc/cache"
        self.fetched = home / "fetched"
        """The sources' objects, as the remote gave them in this call."""
        self._on_progress = on_progress
        self.changes = "" if engine else difference(record.engine.to_row())
        self.outputs: list[Output] = []
        self.figures: tuple[Figure, ...] = ()

    def run(self) -> Reproduction:
        begin = time.perf_counter()
        try:
            found = self._make()
        except _Different as stopped:
            found = stopped.found
        finally:
            if not self.keep and self.layout.root.exists():
                shutil.rmtree(self.layout.root)
        return Reproduction(
            round=self.record.round,
            compared="metrics" if self.changes else "bytes",
            engine=self.changes,
            outputs=tuple(self.outputs),
            figures=self.figures,
            difference=found,
            seconds=round(time.perf_counter() - begin, 3),
            folder=str(self.layout.root) if self.keep else None,
        )

    def _make(self) -> Difference | None:
        """Clone, fetch, check what goes in, make it, compare what comes out; the first difference."""
        layout, git = self.layout, Git(self.workspace.layout.root)
        self.report_progress("cloning")
        then = read_history(self.workspace.layout, git, self.name)  # before its files lie anywhere: they are checked
        self.git = git.clone(layout.root, self.name)
        private_folder(layout.private)
        private_folder(self.features)
        layout.features.symlink_to(self.features)
        self._check_records(self.record in then.rounds)
        self.lock = _parse_lock(layout.dvc_lock)
        with self._dvc() as dvc:
            dvc.stand_alone(self.workspace.layout.root)
            self._pull_missing_sources(dvc)
            self._check_inputs()
            first = self._bring_outputs(dvc)
            published = _Published(
                {path: digest(layout.root / path) for path in self._outs()},
                self._published_card(),
                self._labels() if self.changes and first is None else [],
            )
            if self.changes:
                self._fit_to_this_engine()
            self._encode()
            for stage in STAGES:
                found = self._stage(dvc, stage, published)
                first = first or found
        if self.changes:
            return first or self._compare_metrics(published.labels)
        found = self._compare_plan()
        return first or found

    def _dvc(self) -> Dvc:
        """DVC for the clone. It keeps its notes in the clone too: those of the machine might know an object as good."""
        dvc = open_dvc(self.layout)
        engine = self.engine.environment if self.engine else {}
        place = str(self.layout.private / "dvc")
        environment = {**dvc.environment, **engine, "DVC_SITE_CACHE_DIR": place}
        return replace(dvc, environment=environment, check=self._check_trusted)

    def _check_trusted(self, root: Path) -> None:
        """What steers DVC in the clone is believed as in the workspace; an older layout's `dvc.yaml` was ours too."""
        doubts = doubtful(root)
        if sha256_file(root / "dvc.yaml") in OLD_DVC_YAML:
            doubts.pop("dvc.yaml", None)
        if doubts:
            name, problem = next(iter(doubts.items()))
            raise UnexpectedChange(
                f"{name} at the tag {self.name} {problem}. Check that tag out in a clone of your own and look at it; "
                "`al trust` there accepts it on this machine"
            )

    def report_progress(self, what: str) -> None:
        self._on_progress(f"{self.name}: {what}")

    # Before any stage ---------------------------------------------------------------------------------------------

    def _check_records(self, same_record: bool) -> None:
        """The tag's own files say one thing, and what the last commit says of this round is the same."""
        layout, hashes = self.layout, self.record.hashes
        same: tuple[tuple[bool, Cause, str], ...] = (
            (same_record, "data", "its record"),
            (sha256_file(layout.dvc_lock) == hashes.get("dvc_lock"), "data", "dvc.lock"),
            (sha256_file(layout.params) == hashes["params"], "parameters", "params.yaml"),
            (not difference(read_json(layout.engine), self.record.engine.to_row()), "engine", "engine.json"),
        )
        for equal, cause, name in same:
            if not equal:
                what = f"{name} at the tag {self.name} is not what the last commit's record of the round says"
                raise _Different(Difference("", cause, what))

    def _bring(self, dvc: Dvc, targets: Collection[str]) -> None:
        """Fetch from the remote, each by itself, so that what is missing has a name."""
        for target in targets:
            name = target.removesuffix(".dvc")
            self.report_progress(f"fetching {name}")
            try:
                dvc.pull(target)
            except (RepositoryError, RemoteIncomplete) as error:
                what = f"the DVC remote does not give {name} of {self.name}: {error}"
                raise _Different(Difference("", _CAUSES.get(name, "data"), what, missing=True)) from None

    def _pull_missing_sources(self, dvc: Dvc) -> None:
        """Fetch what goes in, as far as this call has not fetched it for an earlier round.

        Nothing that a stage made is among it. Whatever is at hand is compared with `dvc.lock` like all else.
        """
        _link_tree(self.fetched, self.cache)
        try:
            self._bring(dvc, [f"{path.relative_to(self.layout.root)}.dvc" for path in self.layout.sources])
        finally:
            _link_tree(self.cache, self.fetched)

    def _bring_outputs(self, dvc: Dvc) -> Difference | None:
        """Fetch the published outputs too (some are in git); what is lost or is not what `dvc.lock` says.

        The round can be made all the same: they are only compared.
        """
        first = None
        for stage in STAGES:
            for entry in self.lock[stage]["outs"]:
                path = self.layout.root / entry["path"]
                try:
                    if not path.exists():
                        self._bring(dvc, [entry["path"]])
                except _Different as lost:
                    first = first or lost.found
                    continue
                if digest(path) != entry["md5"]:
                    what = f"{entry['path']} is published with other bytes than dvc.lock says"
                    first = first or Difference(stage, "data", what)
        return first

    def _published_card(self) -> Mapping[str, Any]:
        """What the published model says of itself; nothing where its bytes are no longer what they were."""
        try:
            return read_object(self.layout.model / CARD_FILE)
        except BadInput:
            return {}

    def _check_inputs(self) -> None:
        """Every source and parameter of every stage is what `dvc.lock` says."""
        params = _parse_yaml(self.layout.params)
        made = set(self._outs())
        for stage in STAGES:
            for entry in self.lock[stage].get("deps", ()):
                path = entry["path"]
                found = None if path in made else digest(self.layout.root / path)
                if path not in made and found != entry["md5"]:
                    what = f"{path} has digest {found}, dvc.lock says {entry['md5']}"
                    raise _Different(Difference(stage, _CAUSES.get(path, "data"), what))
            for key, value in self.lock[stage].get("params", {}).get("params.yaml", {}).items():
                if (found := _dig(params, key)) != value:
                    what = f"params.yaml says {key}: {found}, dvc.lock says {value}"
                    raise _Different(Difference(stage, "parameters", what))

    def _outs(self) -> list[str]:
        return [entry["path"] for stage in STAGES for entry in self.lock[stage]["outs"]]

    # Stages -------------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        self.report_progress("encode")
        try:
            encode(self.layout, load_params(self.layout.params).features, self.engine)
        except StageFailed as error:
            raise _Different(Difference("encode", "features", str(error))) from None

    def _run(self, dvc: Dvc, stage: str) -> None:
        self.report_progress(stage)
        try:
            dvc.repro(stage, force=True, run_cache=False)
        except StageFailed as error:
            raise _Different(Difference(stage, "engine", str(error))) from None

    def _stage(self, dvc: Dvc, stage: str, published: _Published) -> Difference | None:
        """Run a stage and compare what it wrote; what differs first, and why."""
        self._run(dvc, stage)
        rows = [self._compare(stage, entry, published) for entry in self.lock[stage]["outs"]]
        self.outputs += rows
        if self.changes:
            return None
        if other := [row for row in rows if not row.alike]:
            return self._why(dvc, stage, [row.name for row in other], published)
        return next((_contradiction(row) for row in rows if row.unlike), None)

    def _compare(self, stage: str, entry: Mapping[str, Any], published: _Published) -> Output:
        path = self.layout.root / entry["path"]
        name = OUTPUTS.get(entry["path"], entry["path"])
        md5, sha256 = digest(path), sha256_tree(path)
        same: dict[Source, bool] = {"dvc.lock": md5 == entry["md5"]}
        if name in self.record.hashes:
            same["round.json"] = sha256 == self.record.hashes[name]
        elif name in IN_RECORD and IN_RECORD[name] in self.record.model_fields_set:
            same["round.json"] = read_json(path) == self.record.to_row()[IN_RECORD[name]]
        if there := published.digests[entry["path"]]:
            same["published"] = md5 == there
        return _output(name, stage, sha256, same)

    def _why(self, dvc: Dvc, stage: str, names: Sequence[str], published: _Published) -> Difference:
        """Why a stage with the recorded inputs and parameters, under the recorded engine, wrote something else."""
        what = f"{', '.join(names)} came out different from everything that was published"
        card = read_json(self.layout.model / CARD_FILE, {})
        if stage != "label" and card.get("vectors") != published.card.get("vectors"):
            return Difference(stage, "features", f"{what}: the encoder's vectors of the labelled items are others")
        paths = [self.layout.root / entry["path"] for entry in self.lock[stage]["outs"]]
        before = [digest(path) for path in paths]
        self._run(dvc, stage)
        if [digest(path) for path in paths] == before:
            told = "the same each time, so something that engine.json does not name is not what it was"
        else:
            told = "and again different when run twice: the stage is not deterministic"
        return Difference(
            stage, "engine", f"{what}, from the same inputs and parameters under the same engine.json; {told}"
        )

    def _compare_plan(self) -> Difference | None:
        """The next round's plan, derived again from the queries."""
        upcoming = self.record.round + 1
        before = read_history(self.layout, self.git, f"{self.name}^")
        tasks = plan_tasks(Workspace(self.layout, self.workspace.id), self.git, upcoming, before.abandoned)
        sha256 = sha256_bytes("".join(json_line(asdict(task)) for task in tasks).encode())
        path = self.layout.plan(upcoming)
        row = _output(
            PLAN,
            "",
            sha256,
            {
                "round.json": sha256 == self.record.hashes.get(PLAN),
                "published": path.exists() and sha256 == sha256_file(path),
            },
        )
        self.outputs.append(row)
        if row.alike:
            return _contradiction(row) if row.unlike else None
        return Difference("", "engine", "the plan derived from the queries is another; stages are not to blame")

    # Under another engine -----------------------------------------------------------------------------------------

    def _fit_to_this_engine(self) -> None:
        """What closing the round with this engine would have written."""
        bring_up_to_date(self.layout)
        write_engine(self.layout.engine)
        if not self.layout.asked_at_random.exists():
            plans = read_plans(self.git, f"{self.name}^").values()
            write_json(self.layout.asked_at_random, {"items": drawn_at_random(plans)})

    def _labels(self) -> list[list[LabeledItem]]:
        return [read_labeled(path) for path in (self.layout.labeled, self.layout.test_labels) if path.exists()]

    def _compare_metrics(self, labels: list[list[LabeledItem]]) -> Difference | None:
        """Labels must be the same; metrics may have moved a little."""
        made = read_json(self.layout.metrics, {})
        for name in FIGURES:
            was, now = self.record.metrics.figure(name).value, made[name]["value"]
            near = was == now or None not in (was, now) and abs(was - now) <= self.tolerance
            self.figures += (Figure(name, was, now, near),)
        if labels and self._labels() != labels:
            return Difference("label", "engine", "the labelled set is another: this engine folds answers differently")
        if far := [f"{f.name} {_shown(f.recorded)} → {_shown(f.made)}" for f in self.figures if not f.near]:
            what = f"moved by more than {self.tolerance:g} under another engine: {', '.join(far)}"
            return Difference("evaluate", "engine", what)
        return None


def _link_tree(source: Path, target: Path) -> None:
    """Have `target` hold every file of `source` too, without a second copy where the file system knows links."""
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_dir() or there.exists():
            continue
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            there.hardlink_to(path)
        except OSError:
            shutil.copy2(path, there)


def _output(name: str, stage: str, sha256: str, same: Mapping[Source, bool]) -> Output:
    alike = tuple(source for source, equal in same.items() if equal)
    return Output(name, stage, sha256, alike, tuple(source for source in same if source not in alike))


def _contradiction(row: Output) -> Difference:
    what = f"{row.name} came out as {' and '.join(row.alike)} has it, but {' and '.join(row.unlike)} is something else"
    return Difference(row.stage, "data", what)


def _parse_lock(path: Path) -> Mapping[str, Any]:
    """The stages of a `dvc.lock`; what is used of it is of the form that DVC writes."""
    stages: Any = _parse_yaml(path).get("stages")
    try:
        entries = [entry for stage in STAGES for kind in ("deps", "outs") for entry in stages[stage][kind]]
        if all(_PATH.fullmatch(entry["path"]) and _MD5.fullmatch(entry["md5"]) for entry in entries):
            return dict(stages)
    except (KeyError, TypeError):
        pass
    raise _Different(Difference("", "data", f"{path.name} is not as DVC writes it"))


def _parse_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _Different(Difference("", "data", f"{path.name} at the tag is not valid"))
    return found


def _dig(values: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
