"""The choice of a round's query strategy: the configured one, the cold start, or the one that `auto` selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from al_pipeline.active_learning.relabeling import Relabel
from al_pipeline.active_learning.strategies import RARE, STRATEGIES, is_unbalanced

AUTO = "auto"
FEW_LABELS = 500
"""With fewer labels `auto` uses herding; with more, margin is as good."""

RARE_OF_TWO = 1 / 4
"""`RARE` of two classes, which need no search of their own."""


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
    names: bool = False
    """Whether classes with few labels are searched by their names and descriptions."""
    guide: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Words, phrases or texts typical of a class, by class."""
    cost: str = "items"
    """What a batch is to save: items, or predicted seconds (`Shortlist.per_second`)."""
    relabel: Relabel = 0.0
    """The largest share of a batch that consists of labelled items that are asked again."""


def choose_strategy(config: QueryConfig, round_number: int, counts: Sequence[int], has_vectors: bool) -> Choice:
    """The strategy of a round, given the number of labels of each class, `counts` (C,).

    Before the first label it is `cold_start`. `auto` depends on label counts and features, not on scores. While all
    labels are of one class it alternates between core-set, since items of a rare class are often outliers, and random
    sampling, since many outliers are not of a rare class. Of two classes margin asks the likeliest items of a rare one,
    as a search does, since hardly any item is more likely of that class than of the other.
    """
    strategy, reason = _choose(config, round_number, counts, has_vectors)
    return Choice(strategy, STRATEGIES[strategy].acquisition, reason)


def _choose(config: QueryConfig, round_number: int, counts: Sequence[int], has_vectors: bool) -> tuple[str, str]:
    seen, labels = sum(count > 0 for count in counts), sum(counts)
    if labels == 0:
        return config.cold_start, "there is no label yet"
    if config.strategy != AUTO:
        return config.strategy, "set in params.yaml"
    if seen < 2:
        alone = f"only {seen} of {len(counts)} classes has labels, so a model cannot distinguish classes"
        if has_vectors and round_number % 2 == 1:
            return "core_set", f"{alone}; items least similar to the labelled ones are queried"
        return "random", alone
    missing = f", {len(counts) - seen} of {len(counts)} classes unseen" if seen < len(counts) else ""
    fewest = min(count for count in counts if count)
    two = has_vectors and len(counts) == 2
    if is_unbalanced(counts, RARE_OF_TWO if two else RARE):
        few = f"{labels} labels, only {fewest} of the rarest class{missing}"
        if two:
            return "margin", f"{few}: of two classes the margin asks the likeliest items of the rare one"
        return "relevance" if has_vectors else "class_balanced", f"{few}: half of a batch is for rare classes"
    if not has_vectors:
        return "margin", "the features have no encoder, so there are no vectors to compare"
    if labels < FEW_LABELS:
        return "herding", f"{labels} labels, fewer than {FEW_LABELS}{missing}: a diverse batch is better"
    return "margin", f"{labels} labels: the margin alone is as good"
