"""The proposal to stop: from how much successive models agree, and from the score that was to be reached."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

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
        mean = sum(newest) / patience
        stable = mean >= agreement - _ROUNDING
        stop = stop or stable
        evidence.append(
            f"the last {patience} models agree with the ones before by {mean:.3f} (Cohen's kappa on the test items; "
            f"{'stable' if stable else 'they count as stable'} from {agreement:g} on)"
        )
    return Proposal(stop, tuple(evidence)) if evidence else None
