"""What the random labels of the test set prove about a model, and requests for the labels that are lacking."""

from __future__ import annotations

from msgspec import Struct

from al_pipeline.data.outputs import parse_predictions
from al_pipeline.data.served import without_requests
from al_pipeline.errors import NothingToDo, UsageError
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import History, read_history, read_plans, rounds_of
from al_pipeline.operations.intervene import commit_intervention, locked_for_intervention, new_intervention
from al_pipeline.operations.planning import next_test_items
from al_pipeline.operations.predict import published_record
from al_pipeline.records import round_name
from al_pipeline.rounds.interventions import MAX_ITEMS, asked_for
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.stopping.certificate import Certificate
from al_pipeline.stopping.certificate import certify as certify_counts
from al_pipeline.stopping.predictions import LabelledPredictions, of_labelled
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

_EMPTY = "item_id,label\n"


class Certified(Struct, frozen=True):
    """A certificate of a round's model."""

    round: str
    certificate: Certificate
    waiting: int
    """Test items that the open round asks and that have no answer in a published round yet."""
    unasked: int
    """Test items that no round has asked."""


def certify(
    workspace: Workspace, metric: str, target: float, confidence: float = 0.95, number: int | None = None
) -> Certified:
    """Whether a round's model (default: the promoted one) has `metric` above `target`, from all test labels so far.

    The labels are those of the newest published round. Raises UsageError for an unknown metric or a share that is none,
    NothingToDo without such a round.
    """
    git = Git(workspace.layout.root)
    history = read_history(workspace.layout, git)
    record = published_record(history, number)
    known = labelled_predictions(git, record)
    place = 1 + [one.round for one in history.rounds].index(record.round)
    try:
        found = certify_counts(known.confusion, known.classes, metric, target, confidence, place)
    except ValueError as error:
        raise UsageError(str(error)) from None
    waiting = sum(task.part == "test" for task in history.open_tasks())
    return Certified(round_name(record.round), found, waiting, len(_next_items(workspace, git, history, MAX_ITEMS)))


def ask_lacking(workspace: Workspace, dvc: Dvc, metric: str, target: float, confidence: float, reason: str) -> int:
    """Request as many test items as the promoted model's certificate lacks, for the next round; returns how many.

    Those that the open round asks are part of them. The request is an intervention, like that of `al ask`. Raises
    NothingToDo if nothing is lacking, no number of labels suffices, or no test item is left.
    """
    lacking = certify(workspace, metric, target, confidence)
    if lacking.certificate.certified:
        raise NothingToDo(lacking.certificate.sentence())
    if lacking.certificate.lacking is None:
        raise NothingToDo(f"{lacking.certificate.sentence()}; labels alone will not certify it")
    wanted = lacking.certificate.lacking - lacking.waiting
    if wanted <= 0:
        raise NothingToDo(f"the open round asks {lacking.waiting:,} test items already: enough, as far as is known")
    return ask_test_items(workspace, dvc, wanted, reason)


def ask_test_items(workspace: Workspace, dvc: Dvc, count: int, reason: str) -> int:
    """Request the next `count` test items in their random order, for the next round; returns how many there were.

    Raises NothingToDo if all were asked, or before the first plan.
    """
    with locked_for_intervention(workspace, dvc, "al certify --ask") as (git, history):
        waiting = asked_for(history.interventions, rounds_of(read_plans(git).values()))
        unasked = _next_items(workspace, git, history, len(waiting) + min(count, MAX_ITEMS))
        if not unasked:
            raise NothingToDo("all test items were asked; `al ingest FILE --test` adds random items from elsewhere")
        items = [item for item in unasked[:count] if item not in waiting]
        if not items:
            raise NothingToDo(f"{min(count, len(unasked)):,} test items wait for the next round already")
        intervention = new_intervention(history, git, "ask", reason, items=tuple(items))
        commit_intervention(workspace.layout, git, intervention)
        return len(items)


def _next_items(workspace: Workspace, git: Git, history: History, most: int) -> list[str]:
    number = -1 if history.planned is None else history.planned
    return next_test_items(workspace, git, number, history.abandoned, most)


def labelled_predictions(git: Git, record: RoundRecord) -> LabelledPredictions:
    """The test items of a round's model; their labels are those of the newest published round with the same classes."""
    tag = round_name(record.round)
    text = git.show(tag, "rounds/predictions.csv") if tag in git.tags() else None
    # those drawn from requests are a sample of something else; they may have got labels since that round
    then = without_requests(parse_predictions(text or _EMPTY, unlabelled=True), Layout(git.root).test)
    classes = then.classes or tuple(record.params.schema_.labels)
    labels = dict(zip(then.item_ids, then.labels, strict=True))
    newest = parse_predictions(git.show("HEAD", "rounds/predictions.csv") or _EMPTY, unlabelled=True)
    if set(newest.classes) == set(classes):
        labels |= {item: label for item, label in zip(newest.item_ids, newest.labels, strict=True) if item in labels}
    return of_labelled([labels[item] for item in then.item_ids], classes, then.proba)
