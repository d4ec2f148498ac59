"""Decide on the new model, plan the next round, and publish: data first, then the commit, then the tag."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from al_pipeline.annotation.aggregation import fold_by
from al_pipeline.data.ledger import read_events, read_forecasts, read_refused
from al_pipeline.data.pool import count_items, iter_items
from al_pipeline.data.served import request_weights
from al_pipeline.errors import ManualActionRequired, RepositoryError, UnexpectedChange
from al_pipeline.evaluation.figures import Control, Decision, Metrics, OnTraffic, Running
from al_pipeline.evaluation.online import Forecast, running_accuracy
from al_pipeline.files import read_json, read_object, sha256_file, sha256_tree, write_json, write_jsonl
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.operations.checkout import ROUND_TAGS
from al_pipeline.operations.close import foreign_edits, refuse_edits
from al_pipeline.operations.costs import cost_of_round, outlook
from al_pipeline.operations.counting import counted_events
from al_pipeline.operations.history import History, events_known, read_plans
from al_pipeline.operations.planning import plan_tasks
from al_pipeline.operations.plugins import plugin_files
from al_pipeline.params import Params, recorded
from al_pipeline.records import RANDOM_SLICE, LabeledItem, PlannedTask, round_name
from al_pipeline.rounds.interventions import Intervention
from al_pipeline.rounds.manifests import (
    Counts,
    Engine,
    NextBatch,
    Record,
    Reviewed,
    ReviewedPart,
    RoundRecord,
    TaskCounts,
    parse_record,
)
from al_pipeline.rounds.manifests import Params as RecordedParams
from al_pipeline.workspace.fingerprint import current_engine, recorded_device, recorded_plugins
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

if TYPE_CHECKING:  # at run time imported where used: a tick with nothing to do needs no numpy
    import numpy as np
    from numpy.typing import NDArray

    from al_pipeline.data.outputs import Predictions


class RoundFacts(Struct, frozen=True, kw_only=True):
    """What the tick knows about a round, besides its results."""

    opened_at: float | None
    closed_at: float | None
    reason: str | None
    """Why the round was closed."""
    seconds: dict[str, float]
    """Duration of each step of the build."""
    project: dict[str, Any] | None
    interventions: tuple[Intervention, ...]
    """Those about labels that the build carries out."""
    answers: TaskCounts | None
    """None for the first build."""


Tags = Mapping[str, tuple[str, str]]
"""References by name: the id of the object, and of the commit that it points to."""


def decide_and_plan(
    workspace: Workspace, git: Git, history: History, number: int | None, build: str, facts: RoundFacts
) -> None:
    """Write the record of round `number` (None: of the first build) and the plan of the next round.

    `build` identifies the inputs of the build.
    """
    from al_pipeline.data.outputs import read_labeled

    layout, params = workspace.layout, workspace.params
    upcoming = 0 if number is None else number + 1
    labeled = read_labeled(layout.labeled)
    plan = plan_tasks(workspace, git, upcoming, history.abandoned)
    write_jsonl(layout.plan(upcoming), (task.to_row() for task in plan))
    next_batch, control = read_json(layout.choice), read_json(layout.control)
    record = Record(
        round=number,
        build=build,
        project=facts.project,
        parent=git.head(),
        promoted_before=history.promoted,
        reason=facts.reason,
        opened_at=facts.opened_at,
        closed_at=facts.closed_at,
        seconds=facts.seconds,
        counts=_counts(layout, plan, labeled),
        hashes=_hashes(layout, upcoming),
        params=RecordedParams.from_row(recorded(params)),
        overrides=chosen(layout),
        engine=Engine.from_row(_engine(layout)),
        metrics=Metrics.from_row(read_json(layout.metrics)),
        next_batch=None if next_batch is None else NextBatch.from_row(next_batch),
        control=None if control is None else Control.from_row(control),
        traffic=_on_traffic(layout, params),
        running=_running(layout, labeled, git, history, params, number),
        review=_review(layout, params),
        cost=None if number is None else cost_of_round(layout, read_object(layout.asked_at_random).get("items") or ()),
        interventions=facts.interventions,
    )
    if number is not None:
        assert facts.answers is not None
        decision = _held(_decide(layout, git, history, params), history.holding)
        record = RoundRecord(**asdict(record), decision=decision, answers=facts.answers)
        record = replace(record, outlook=outlook(history, record, params), agreement=_agreement(layout, git))
    checked = type(record).from_row(record.to_json())
    write_json(layout.genesis if number is None else layout.record(number), checked.to_json())


def _engine(layout: Layout) -> dict[str, Any]:
    """The engine of the build, as its record says: this one, on that device, with those plug-ins."""
    recorded = read_json(layout.engine)
    plugins = recorded_plugins(recorded)
    return current_engine(recorded_device(recorded)) | ({"plugins": plugins} if plugins else {})


def chosen(layout: Layout) -> dict[str, Any]:
    """Return the settings of the next round's batch that override `params.yaml`: `size`, `strategy`."""
    return {name: value for name, value in read_object(layout.overrides).items() if name in ("size", "strategy")}


def publish(workspace: Workspace, git: Git, dvc: Dvc, number: int | None) -> str:
    """Push the data, verify that the remote has it, then commit the pointers to it; return the commit.

    Raises UnexpectedChange if a file that no build writes was changed while the round was built, and
    ManualActionRequired if another clone published a round with this number.
    """
    layout = workspace.layout
    if number is not None:
        _refuse_published(git, number)
    refuse_edits(set(foreign_edits(layout, git)) - _written(layout, number))
    dvc.push()
    message = "Plan round-0000, before any label" if number is None else _message(_built_record(layout, number))
    commit = git.commit(
        message, [*layout.owned, layout.params, layout.dvc_yaml, *plugin_files(layout, workspace.params)]
    )
    _logger.info("published in commit %s: %s", commit[:12], message.splitlines()[0])
    return commit


def _refuse_published(git: Git, number: int) -> None:
    """Raise ManualActionRequired if the git remote already has this round, which is not published here yet.

    Skip the check if the remote is unreachable: rounds do not wait for it.
    """
    with contextlib.suppress(RepositoryError):
        if git.remote_has_tag(round_name(number)):
            raise ManualActionRequired(
                f"{round_name(number)} is already on the git remote: another clone published it and took over the "
                "project in Label Studio. Nothing was published here and no answer is lost: continue in that clone, "
                "or make a new one (`git clone`) and run `al adopt` there"
            )


def _written(layout: Layout, number: int | None) -> set[str]:
    """Paths of the files that building a round and deciding on its model write."""
    upcoming = 0 if number is None else number + 1
    record = layout.genesis if number is None else layout.record(number)
    closing = (layout.engine, layout.overrides, layout.asked_at_random, layout.dvc_lock)
    written = (*closing, *layout.results, *layout.pointers, record, layout.plan(upcoming))
    return {path.relative_to(layout.root).as_posix() for path in written}


def tag(git: Git, layout: Layout, number: int) -> None:
    """Tag the commit that added the record of round `number`; harmless if the tag exists."""
    if (remote := git.remote()) is not None:
        with contextlib.suppress(RepositoryError):  # unreachable; every clone creates the same tag
            git.fetch_tags(remote, round_name(number))
    path = layout.record(number).relative_to(layout.root).as_posix()
    commit = git.brought(path)
    text = git.show(commit, path)
    if text is None:
        raise UnexpectedChange(f"{path} is not in the commit {commit[:12]}, which should have added it")
    (layout.private / "synced.json").unlink(missing_ok=True)
    git.tag(round_name(number), _message(parse_record(text, path)), commit)


def sync(git: Git, layout: Layout) -> list[str]:
    """Push the branch and the round tags that the git remote lacks, in one atomic step.

    Returns a sentence for each tag that is a different object there; neither tag is overwritten.
    """
    remote, branch = git.remote(), git.branch()
    if not remote or not branch:
        return []
    here, there, _ = round_tags(git, remote)
    git.push(remote, [f"refs/heads/{branch}", *(f"refs/tags/{name}" for name in sorted(here.keys() - there.keys()))])
    write_json(layout.private / "synced.json", {"head": git.head()})
    return other_tags(remote, here, there)


def round_tags(git: Git, remote: str, *more: str) -> tuple[Tags, Tags, Tags]:
    """The current round tags here, those on the remote, and all references found there, including `more`."""
    tags = f"refs/tags/{ROUND_TAGS}"
    found = git.remote_refs(remote, tags, *more)
    there = {name.removeprefix("refs/tags/"): tag for name, tag in found.items() if name.startswith("refs/tags/")}
    return git.tag_objects(tags), there, found


def other_tags(remote: str, here: Tags, there: Tags) -> list[str]:
    """A sentence for each round tag that is a different object on the git remote, with the command that fixes it."""
    return [
        f"the tag {name} differs from the one on {remote} "
        f"({'of the same commit' if here[name][1] == there[name][1] else f'of the commit {there[name][1][:12]}'}), "
        f"and neither was changed: `git tag -d {name} && git fetch {remote} tag {name}` takes the one on {remote}"
        for name in sorted(here.keys() & there.keys())
        if here[name][0] != there[name][0]
    ]


def unsynced(git: Git, layout: Layout) -> bool:
    """Whether there is a git remote to which the current HEAD was not pushed."""
    return git.remote() is not None and read_object(layout.private / "synced.json").get("head") != git.head()


def _running(
    layout: Layout, labeled: Sequence[LabeledItem], git: Git, history: History, params: Params, number: int | None
) -> Running | None:
    """The models' accuracy on the random slices up to round `number`, by the current labels.

    A consensus in which forecasts take part would let a model decide ties by what it is measured on: those of people
    alone count here.
    """
    if number is None:
        return None
    if params.labels.uses_model:
        labeled = fold_by(params, read_events(layout.events), dict).labeled
    labels = {row.item_id: row.label for row in labeled}
    in_present_classes, abandoned = _forecasts_mapped(layout, history), history.abandoned
    forecasts = [
        Forecast(task.round, predicted, labels.get(task.item_id))
        for task in read_plans(git).values()
        if task.strategy == RANDOM_SLICE and task.round <= number and task.round not in abandoned
        if (predicted := in_present_classes(task)) is not None
    ]
    return running_accuracy(forecasts, params.evaluate.confidence)


def _agreement(layout: Layout, git: Git) -> float | None:
    """How far the new model agrees with that of the round before on the test items; None if they share none."""
    from al_pipeline.data.outputs import parse_predictions
    from al_pipeline.stopping.stability import cohens_kappa

    before = git.show("HEAD", layout.predictions.relative_to(layout.root).as_posix())
    if before is None:
        return None
    old = parse_predictions(before, unlabelled=True)
    new = parse_predictions(layout.predictions.read_text(encoding="utf-8"), unlabelled=True)
    places = {item: place for place, item in enumerate(new.item_ids)}
    shared = [place for place, item in enumerate(old.item_ids) if item in places]
    if set(old.classes) != set(new.classes) or not shared:
        return None
    own = new.proba[[places[old.item_ids[place]] for place in shared]].argmax(axis=1)
    return cohens_kappa(
        [old.classes[best] for best in old.proba[shared].argmax(axis=1)], [new.classes[best] for best in own]
    )


def _on_traffic(layout: Layout, params: Params) -> OnTraffic | None:
    """The new model on the test items that were drawn from requests; None if none of them is labelled."""
    weights = request_weights(item for batch in iter_items([layout.test]) for item in batch)
    if not weights:
        return None
    import numpy as np

    from al_pipeline.data.outputs import parse_predictions
    from al_pipeline.evaluation.metrics import evaluate
    from al_pipeline.evaluation.online import weighted_accuracy

    found = parse_predictions(layout.predictions.read_text(encoding="utf-8"))
    found = found.only([row for row, item in enumerate(found.item_ids) if item in weights])
    if not found.item_ids:
        return None
    truth = np.array([found.classes.index(label) for label in found.labels], dtype=np.intp)
    settings, rng = params.evaluate, np.random.default_rng([params.seed, 0x7AFF])
    right = (found.proba.argmax(axis=1) == truth).tolist()
    return OnTraffic(
        metrics=evaluate(found.proba, truth, found.classes, rng, settings.bootstrap, settings.confidence),
        accuracy_of_requests=weighted_accuracy(right, [weights[one] for one in found.item_ids], settings.confidence),
    )


def _review(layout: Layout, params: Params) -> Reviewed | None:
    """What reviewers had ruled; None before the first review."""
    if not layout.reviews.exists():
        return None
    from al_pipeline.operations.review_figures import figures_of, read_reviews

    forecasts = partial(read_forecasts, layout.events)
    found = figures_of(params, read_events(layout.events), read_reviews(layout), forecasts)
    pool, test = (ReviewedPart(**asdict(found.rates[part])) for part in ("pool", "test"))
    return Reviewed(pool=pool, test=test, rulings=found.ruled, test_rulings=found.test_ruled)


def _forecasts_mapped(layout: Layout, history: History) -> Callable[[PlannedTask], str | None]:
    """The prediction in a plan as a present class; None if it was none, or if no single class came of it."""
    schemas = counted_events(layout.events).schemas
    if schemas is None:
        return lambda task: task.predicted
    events = read_events(layout.events)
    known = {record.round + 1: events_known(record, events) - 1 for record in history.rounds}

    def mapped(task: PlannedTask) -> str | None:
        if task.predicted is None:
            return None
        names = schemas.relation([task.predicted], known.get(task.first_round, -1))[task.predicted]
        return next(iter(names)) if len(names) == 1 else None

    return mapped


def _counts(layout: Layout, plan: list[PlannedTask], labeled: Sequence[LabeledItem]) -> Counts:
    from al_pipeline.data.outputs import read_labeled, read_unresolved

    test_labels = read_labeled(layout.test_labels)
    unresolved = read_unresolved(layout.unresolved)
    # Each item counts once: one that waits for a second answer has a label, and one that was requested may be ignored.
    pending = {task.item_id for task in plan if task.part == "pool"} - {row.item_id for row in labeled}
    ignored = {row.item_id for row in unresolved if row.part == "pool" and row.kind == "ignored"} - pending
    pool = count_items([layout.pool])
    return Counts(
        pool=pool,
        labelled=len(labeled),
        pending=len(pending),
        ignored=len(ignored),
        unlabelled=pool - len(labeled) - len(ignored) - len(pending),
        ties=sum(row.kind == "tie" for row in unresolved),
        test=count_items([layout.test]),
        test_labelled=len(test_labels),
        labels=dict(Counter(row.label for row in labeled)),
        test_labels=dict(Counter(row.label for row in test_labels)),
        refused=len(read_refused(layout.events)),
        events=len(read_events(layout.events)),
    )


def _hashes(layout: Layout, upcoming: int) -> dict[str, str]:
    files = {
        "labeled": layout.labeled,
        "test_labels": layout.test_labels,
        "unresolved": layout.unresolved,
        "model": layout.model,
        "predictions": layout.predictions,
        "queries": layout.queries,
        "plan": layout.plan(upcoming),
        "params": layout.params,
    }
    return {name: sha256_tree(path) for name, path in files.items()} | {"dvc_lock": sha256_file(layout.dvc_lock)}


def _decide(layout: Layout, git: Git, history: History, params: Params) -> Decision:
    import numpy as np

    from al_pipeline.data.outputs import parse_predictions
    from al_pipeline.evaluation.comparison import common_groups
    from al_pipeline.evaluation.promotion import both, decide

    challenger = parse_predictions(layout.predictions.read_text(encoding="utf-8"))
    champion, related = None, None
    if history.promoted and (text := git.show(history.promoted, "rounds/predictions.csv")):
        champion = parse_predictions(text, unlabelled=True)
        related = _related_classes(layout, history, champion.classes)
    weights = request_weights(item for batch in iter_items([layout.test]) for item in batch)

    def on(of_requests: bool) -> Decision:
        rows = [row for row, item in enumerate(challenger.item_ids) if (item in weights) == of_requests]
        own = challenger if len(rows) == len(challenger.item_ids) else challenger.only(rows)
        before, after = _shared(champion, own, related) if champion else (None, own)
        truth = np.array([after.classes.index(label) for label in after.labels], dtype=np.intp)
        return decide(
            champion=before,
            challenger=after.proba,
            truth=truth,
            classes=after.classes,
            limits=params.gate,
            rng=np.random.default_rng([params.seed, 0x6A7E]),
            bootstrap=params.evaluate.bootstrap,
            confidence=params.evaluate.confidence,
            groups=None if related is None else common_groups(after.classes, related),
        )

    return both(on(False), on(True), "on requests") if params.gate.traffic else on(False)


def _related_classes(layout: Layout, history: History, classes: Sequence[str]) -> Mapping[str, frozenset[str]] | None:
    """The present classes to which each class of the promoted model is related; None if its schema never changed."""
    schemas = counted_events(layout.events).schemas
    if schemas is None:
        return None
    promoted = history.promoted
    record = next((one for one in reversed(history.rounds) if round_name(one.round) == promoted), None)
    if record is None:
        return None
    related = schemas.relation(classes, events_known(record, read_events(layout.events)) - 1)
    return None if all(names == {name} for name, names in related.items()) else related


def _held(decision: Decision, holding: Intervention | None) -> Decision:
    """Turn the decision into `held` while promotion waits for approval; its reasons include the gate's verdict."""
    if holding is None:
        return decision
    said = f"promotion waits for `al approve`: {holding.sentence()}"
    reasons = (said, f"else {decision.verdict}", *decision.reasons)
    return msgspec.structs.replace(decision, verdict="held", reasons=reasons)


def _shared(
    champion: Predictions, challenger: Predictions, related: Mapping[str, frozenset[str]] | None
) -> tuple[NDArray[np.float64], Predictions]:
    """Both models on their common test items, in the challenger's order: the champion's probabilities of the
    challenger's classes (with `related` of groups of them), and the challenger's predictions.
    """
    from al_pipeline.data.outputs import Predictions
    from al_pipeline.evaluation.comparison import aligned, in_groups, shared

    rows, keep = shared(champion, challenger)
    items = tuple(challenger.item_ids[row] for row in keep)
    labels = tuple(challenger.labels[row] for row in keep)
    classes = challenger.classes
    old = aligned(champion, rows, classes) if related is None else in_groups(champion, rows, classes, related)
    return old, Predictions(items, labels, classes, challenger.proba[keep])


def _built_record(layout: Layout, number: int) -> RoundRecord:
    path = layout.record(number)
    return parse_record(path.read_text(encoding="utf-8"), path.relative_to(layout.root).as_posix())


def _message(record: RoundRecord) -> str:
    f1 = record.metrics.macro_f1.value
    score = "no test labels" if f1 is None else f"macro-F1 {f1:.3f}"
    return f"{round_name(record.round)}: {record.counts.labelled} labelled, {score}, {record.decision.verdict}"
