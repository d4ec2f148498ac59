"""The values that status and report show of a workspace, computed in one place and rendered by terminal and page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from al_pipeline.evaluation.figures import FIGURES, Decision, Metrics, OnTraffic, Running
from al_pipeline.evaluation.online import Saved

if TYPE_CHECKING:
    from al_pipeline.quality.assessment import Quality
    from al_pipeline.reporting.charts import CurvePoint
    from al_pipeline.rounds.manifests import Cost, Histogram, Outlook


class RoundRow(Struct, frozen=True):
    """One published round. `labels`: number of labels that its model was trained on."""

    number: int
    labels: int
    metrics: Metrics
    decision: Decision
    date: str | None = None
    """When it closed, in the reader's time zone."""
    closed_at: float | None = None
    """When it closed, as Unix time in seconds."""
    test_labels: int = 0
    test_version: str = ""
    """The version of the test labels that the metrics are of: the beginning of their digest."""
    interventions: tuple[str, ...] = ()
    """The interventions that it carried out, in a few words each."""
    schema_version: int = 1
    new_classes: bool = False
    """Whether it has other classes than the round before: their scores are of different tasks."""

    def to_json(self) -> dict[str, Any]:
        """This round as a JSON object."""
        return {
            "round": self.number,
            "labelled": self.labels,
            "test_labelled": self.test_labels,
            "test_version": self.test_version,
            "verdict": self.decision.verdict,
            "reasons": list(self.decision.reasons),
            "interventions": list(self.interventions),
            "schema_version": self.schema_version,
            "new_classes": self.new_classes,
            "closed_at": self.closed_at,
            "metrics": {name: self.metrics.figure(name).to_row() for name in FIGURES},
        }


class PoolCounts(Struct, frozen=True):
    """The four disjoint parts of the pool."""

    labeled: int = 0
    pending: int = 0
    ignored: int = 0
    unlabeled: int = 0

    @property
    def total(self) -> int:
        """All items of the pool."""
        return self.labeled + self.pending + self.ignored + self.unlabeled


class LabelMix(Struct, frozen=True):
    """Number of items of each class, in the labelled set and in the test set."""

    labeled: Mapping[str, int] = msgspec.field(default_factory=dict)
    test: Mapping[str, int] = msgspec.field(default_factory=dict)


class AskedItem(Struct, frozen=True):
    """One item of this round's batch, and its outcome.

    `answer` is the aggregated label, `answers` the number of votes, `agreement` the share of votes for it. Without a
    label, `outcome` says why: skipped, a tie, refused, not answered. `score` is None if no model scored the item.
    """

    item_id: str
    text: str
    score: float | None
    strategy: str
    answer: str | None = None
    answers: int = 0
    agreement: float | None = None
    outcome: str = ""


class Mistake(Struct, frozen=True):
    """One misclassified test item. `probability`: that of the predicted, wrong class."""

    item_id: str
    text: str
    label: str
    predicted: str
    probability: float


class Answers(Struct, frozen=True, kw_only=True):
    """Counts of questions and answers.

    `asked`: questions of this round, `for_test` of them about the test set. Each is `answered` (with as many labels as
    requested), `given_up` (skipped by two people, or by all if there are fewer) or `unanswered` (open when the round
    closed); `kept` of the latter stay open in the next round. `skipped`: number of skips. `carried`: questions of this
    round that the previous one had kept for it. `waiting`: questions now in Label Studio, of any round. `refused`:
    answers by reason.
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
    refused: Mapping[str, int] = msgspec.field(default_factory=dict)
    annotators: int = 0
    lead_seconds: float | None = None
    """How long tasks were shown before they were answered, including idle time, as Label Studio's page measures it.

    Of all annotators together; None if Label Studio reported no times.
    """


class ReportData(Struct, frozen=True, kw_only=True):
    """Everything that a report shows, from records alone (except `links`).

    `history`: the closed rounds up to this one, oldest first. `metrics`: None if nothing was measured. `baseline`:
    macro-F1 of random sampling at the same budgets, if it was simulated, and `baseline_note` how. `confidence`: that of
    all intervals.
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
    engine: Mapping[str, str] = msgspec.field(default_factory=dict)
    baseline: tuple[CurvePoint, ...] = ()
    baseline_note: str = ""
    confidence: float = 0.95
    running: Running | None = None
    traffic: OnTraffic | None = None
    saved: Saved | None = None
    cost: Cost | None = None
    budget: tuple[str, ...] = ()
    """The limits of the budget with what is spent now, in words; only in the report of the newest round."""
    outlook: Outlook | None = None
    proposal: str = ""
    """Whether to stop asking, in words; empty without evidence."""
    drift: str = ""
    """Whether kept requests differ from the pool, in words; empty before the first look, and in older reports."""
    quality: Quality | None = None
    reviewed: tuple[str, ...] = ()
    """What reviewers found, in sentences; empty before the first review."""
    test_version: str = ""
    """The version of the test labels that all metrics on the page are of, in words; empty before the first review."""
    recomputed: bool = False
    """Whether the metrics of earlier rounds are computed anew, on the labels of this round's test set."""
    asked_because: str = ""
    """Why the strategy of this round's batch was chosen, if known."""
    links: Mapping[str, str] = msgspec.field(default_factory=dict)
    """URLs of items by id. They are local to this clone: no record holds them, and another clone shows none."""
