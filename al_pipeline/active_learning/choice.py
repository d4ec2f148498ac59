"""Which strategy asks in a round: the configured one, a cold start, or what `auto` chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from al_pipeline.active_learning.strategies import STRATEGIES, is_unbalanced

AUTO = "auto"
FEW_LABELS = 500
"""Up to so many labels `auto` uses cluster-margin; with more, margin alone is as good."""


class Choice(NamedTuple):
    """The strategy of one round, the acquisition function whose scores it uses (None without), and the reason."""

    strategy: str
    acquisition: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class QueryConfig:
    """The query settings of a project: its seed, and `round` and `select` of `params.yaml`."""

    seed: int
    seed_size: int
    strategy: str
    batch_size: int
    random_share: float
    shortlist: int
    cold_start: str = "random"
    max_similarity: float = 1.0
    guide: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For a class: words, phrases or texts that resemble it."""


def choose_strategy(config: QueryConfig, round_number: int, counts: Sequence[int], has_vectors: bool) -> Choice:
    """Which strategy asks the batch of a round, by the labels of each class that there are, `counts` (C,).

    Before the first label it is `cold_start`; `auto` goes by what is known of the project, and never reads a score.
    While all labels are of one class it searches: every other round what is least like all that was asked, since a
    rare class is often odd, and at random in between, since an odd item is often no more than that.
    """
    strategy, reason = _choose(config, round_number, counts, has_vectors)
    return Choice(strategy, STRATEGIES[strategy].acquisition, reason)


def _choose(config: QueryConfig, round_number: int, counts: Sequence[int], has_vectors: bool) -> tuple[str, str]:
    seen, labels = sum(count > 0 for count in counts), sum(counts)
    if labels == 0:
        return config.cold_start, "there is no label yet"
    if config.strategy != AUTO:
        return config.strategy, "params.yaml names it"
    if seen < 2:
        alone = f"of {len(counts)} classes only {seen} was seen: a model cannot tell anything apart"
        if has_vectors and round_number % 2 == 1:
            return "core_set", f"{alone}, so that what is least like the labelled is looked at"
        return "random", alone
    missing = f", {len(counts) - seen} of {len(counts)} classes unseen" if seen < len(counts) else ""
    fewest = min(count for count in counts if count)
    if is_unbalanced(counts):
        few = f"{labels} labels, only {fewest} of the poorest class{missing}: half of a batch looks for such classes"
        return "relevance" if has_vectors else "class_balanced", few
    if not has_vectors:
        return "margin", "the features have no encoder, so that nothing tells how the pool is spread"
    if labels < FEW_LABELS:
        return "cluster_margin", f"{labels} labels, fewer than {FEW_LABELS}{missing}: a batch is spread"
    return "margin", f"{labels} labels: the margin alone tells enough"
