"""The proposal to stop: from how far successive models agree, and from the score that was to be reached.

Bloodgood & Vijay-Shanker 2009, A method for stopping active learning based on stabilizing predictions: stop once the
mean of Cohen's kappa over the last three pairs of successive models is at least .99 on a fixed set of items. It says
that more labels of this kind hardly change the model, not that the model is good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

AGREEMENT = 0.99
PATIENCE = 3
_ROUNDING = 1e-12


class Gain(Struct, frozen=True):
    """What the next batch is expected to bring, and what that is worth."""

    labels: int
    """The labels that it costs."""
    change: float
    """Of the accuracy, with its interval."""
    low: float
    high: float
    confidence: float
    predictions: int
    """How many texts the model is to predict."""
    error_price: float
    """What a wrong prediction costs, in labels."""

    def worth(self, change: float) -> float:
        """The errors that a change of the accuracy spares, in labels."""
        return change * self.predictions * self.error_price

    @property
    def pays(self) -> bool | None:
        """Whether the batch is worth its labels: True at the lower end already, False not even at the upper one."""
        if self.worth(self.low) >= self.labels:
            return True
        return False if self.worth(self.high) < self.labels else None

    def sentence(self) -> str:
        """Cost and gain in words."""
        errors = [f"{end * self.predictions:,.0f}" for end in (self.change, self.low, self.high)]
        said = {True: "that pays", False: "not worth it, even at best", None: "that may pay"}[self.pays]
        return (
            f"{self.labels:,} more labels are expected to change the accuracy by {self.change:+.4f} "
            f"({self.confidence:.0%} interval {self.low:+.4f} to {self.high:+.4f}), which spares {errors[0]} errors "
            f"({errors[1]} to {errors[2]}) in {self.predictions:,} predictions, at {self.error_price:g} labels each: "
            f"{said}"
        )


class Proposal(Struct, frozen=True):
    """Whether more labels of this kind are worth asking, with the evidence."""

    stop: bool
    evidence: tuple[str, ...]

    def sentence(self) -> str:
        """The proposal in words."""
        return f"{'stop' if self.stop else 'go on'}: {'; '.join(self.evidence)}"


def propose(
    agreements: Sequence[float | None],
    patience: int,
    agreement: float,
    low: float | None,
    target: float,
    gain: Gain | None = None,
) -> Proposal | None:
    """Propose to stop once predictions are stable, the target is reached, or a batch is not worth its labels.

    None without evidence.

    `agreements`: Cohen's kappa of each model and the one before on the test items, oldest first; None where it is not
    known. They are stable if the newest `patience` are `agreement` on average (see `stability`). `low`: the lower end
    of macro-F1's interval; `target`: the macro-F1 to reach, 0 for none. `gain`: None if errors have no price.
    """
    evidence, stop = [], False
    if target and low is not None:
        reached = low >= target
        stop = stop or reached
        evidence.append(
            f"macro-F1 is {'at least' if reached else 'not yet surely'} {target:g} (its interval begins at {low:.3f})"
        )
    newest = [value for value in agreements[-patience:] if value is not None]
    if len(newest) == patience:
        mean, stable = sum(newest) / patience, is_stable(newest, patience, agreement)
        stop = stop or stable
        evidence.append(
            f"the last {patience} models agree with the ones before by {mean:.3f} (Cohen's kappa on the test items; "
            f"{'stable' if stable else 'they count as stable'} from {agreement:g} on)"
        )
    if gain is not None:
        stop = stop or gain.pays is False
        evidence.append(gain.sentence())
    return Proposal(stop, tuple(evidence)) if evidence else None


def is_stable(kappas: Sequence[float], patience: int = PATIENCE, agreement: float = AGREEMENT) -> bool:
    """Whether the last `patience` agreements of successive models, oldest first, are `agreement` on average."""
    newest = kappas[-patience:]
    return len(newest) == patience and math.fsum(newest) / patience >= agreement - _ROUNDING
