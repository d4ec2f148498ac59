"""What status and report show of a workspace, as values: one place computes them, the terminal and the page render."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from al_pipeline.evaluation.figures import FIGURES, Decision, Metrics, Running
from al_pipeline.evaluation.online import Saved

if TYPE_CHECKING:
    from al_pipeline.reporting.charts import CurvePoint
    from al_pipeline.rounds.manifests import Histogram


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One published round. `labels`: it was trained on."""

    number: int
    labels: int
    metrics: Metrics
    decision: Decision
    date: str | None = None
    """When it closed, in the time zone of whoever is shown it."""
    closed_at: float | None = None
    """The same in seconds since 1970."""
    test_labels: int = 0
    interventions: tuple[str, ...] = ()
    """What people decided that it carried out, in a few words each."""

    def to_json(self) -> dict[str, Any]:
        """This round as a JSON object."""
        return {
            "round": self.number,
            "labelled": self.labels,
            "test_labelled": self.test_labels,
            "verdict": self.decision.verdict,
            "reasons": list(self.decision.reasons),
            "interventions": list(self.interventions),
            "closed_at": self.closed_at,
            "metrics": {name: self.metrics.figure(name).to_row() for name in FIGURES},
        }


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """The four disjoint parts of the pool."""

    labeled: int = 0
    pending: int = 0
    ignored: int = 0
    unlabeled: int = 0

    @property
    def total(self) -> int:
        """All items of the pool."""
        return self.labeled + self.pending + self.ignored + self.unlabeled


@dataclass(frozen=True, slots=True)
class LabelMix:
    """How many items carry each class: in the labelled set, and in the test set."""

    labeled: Mapping[str, int] = field(default_factory=dict)
    test: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AskedItem:
    """One item that this round asked about, with what came of it.

    `answer` is the label that the answers gave, `answers` how many people's were counted, `agreement` the share of
    them that gave it. Where there is no label, `outcome` says why: skipped, a tie, refused, not answered. `score` is
    None where no model scored the item.
    """

    item_id: str
    text: str
    score: float | None
    strategy: str
    answer: str | None = None
    answers: int = 0
    agreement: float | None = None
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One test item that the model gets wrong. `probability`: what it gave its own, wrong, label."""

    item_id: str
    text: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came back from the annotators.

    `asked`: questions of this round, `for_test` of them about the test set; each is `answered` (with as many labels as
    asked for), `given_up` (skipped by two people, or by all there are) or `unanswered`. `skipped`: people's skips.
    `unanswered`: questions of this round that were still open when it closed, `kept` of them for the next round.
    `carried`: questions of this round that the round before had kept for it. `waiting`: questions that lie in
    Label Studio now, of whatever round. `refused` counts answers by the reason.
    """

    asked: int = 0
    for_test: int = 0
    answered: int = 0
    skipped: int = 0
    given_up: int = 0
    unanswered: int = 0
    kept: int = 0
    carried: int = 0
    late: int = 0
    waiting: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    annotators: int = 0
    lead_seconds: float | None = None
    """How long the tasks were shown until they were answered, idle time included, as Label Studio's page measures.

    Of all annotators together; None where Label Studio told none.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that a report says, from records alone (but for `links`).

    `history` is the closed rounds with this one, oldest first. `metrics` is None where nothing was measured.
    `baseline` is macro-F1 of random sampling at the same budgets, where it was simulated, and `baseline_note` how.
    `confidence` is that of every interval.
    """

    title: str
    question: str
    classes: tuple[str, ...]
    round: int
    state: str
    labels: int
    date: str | None = None
    history: tuple[RoundRow, ...] = ()
    metrics: Metrics | None = None
    decision: Decision | None = None
    pool: PoolCounts = PoolCounts()
    mix: LabelMix = LabelMix()
    histogram: Histogram | None = None
    asked: tuple[AskedItem, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    answers: Answers = Answers()
    next_step: str = ""
    params_digest: str = ""
    engine: Mapping[str, str] = field(default_factory=dict)
    baseline: tuple[CurvePoint, ...] = ()
    baseline_note: str = ""
    confidence: float = 0.95
    running: Running | None = None
    saved: Saved | None = None
    asked_because: str = ""
    """Why the strategy of this round's batch was chosen, where it is known."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Where items can be looked at, by id. Of this clone alone: no record holds them, and another clone shows none."""
