"""The proposal to stop: from how far successive models agree, and from the score that was to be reached.

Bloodgood & Vijay-Shanker 2009, A method for stopping active learning based on stabilizing predictions: stop once the
mean of Cohen's kappa over the last three pairs of successive models is at least .99 on a fixed set of items. It says that
more labels of this kind hardly change the model, not that the model is good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

AGREEMENT = 0.99
PATIENCE = 3
_ROUNDING = 1e-12


class Proposal(Struct, frozen=True):
    """Whether more labels of this kind are worth asking, with the evidence."""

    stop: bool
    evidence: tuple[str, ...]

    def sentence(self) -> str:
        """The proposal in words."""
        return f"{'stop' if self.stop else 'go on'}: {'; '.join(self.evidence)}"


def propose(
    agreements: Sequence[float | None], patience: int, agreement: float, low: float | None, target: float
) -> Proposal | None:
    """Propose to stop once predictions are stable, or once the score has reached the target; None without evidence.

    `agreements`: Cohen's kappa of each model and the one before on the test items, oldest first; None where it is not
    known. They are stable if the newest `patience` are `agreement` on average (see `stability`). `low`: the lower end
    of macro-F1's interval; `target`: the macro-F1 to reach, 0 for none.
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
    return Proposal(stop, tuple(evidence)) if evidence else None


def is_stable(kappas: Sequence[float], patience: int = PATIENCE, agreement: float = AGREEMENT) -> bool:
    """Whether the last `patience` agreements of successive models, oldest first, are `agreement` on average."""
    newest = kappas[-patience:]
    return len(newest) == patience and math.fsum(newest) / patience >= agreement - _ROUNDING
