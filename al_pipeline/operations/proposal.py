"""The proposal to stop asking, by the published rounds, and what it does (`stop` in `params.yaml`)."""

from __future__ import annotations

from collections.abc import Sequence

from al_pipeline.operations.history import History, same_classes
from al_pipeline.params import Params
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.stopping.proposal import Gain, Proposal, propose


def proposal(history: History, params: Params) -> Proposal | None:
    """Whether to stop; None without evidence. Rounds that were rolled back are no evidence."""
    stop = params.stop
    rounds = same_classes([record for record in history.rounds if record.round not in history.abandoned])
    if not rounds:
        return None
    low = rounds[-1].metrics.macro_f1.low
    agreements = [record.agreement for record in rounds]
    return propose(agreements, stop.patience, stop.agreement, low, stop.target, _gain(rounds, params))


def _gain(rounds: Sequence[RoundRecord], params: Params) -> Gain | None:
    """What the next batch is expected to bring and to cost; None unless errors have a price, or without a forecast."""
    stop = params.stop
    if not (stop.error_price and stop.predictions):
        return None
    from al_pipeline.operations.costs import outlook_of  # few workspaces have a price

    found = outlook_of(rounds, ("accuracy",), params)
    if found is None:
        return None
    ends = (found.value - found.now, found.low - found.now, found.high - found.now)
    labels = found.labels - rounds[-1].counts.labelled
    return Gain(labels, *ends, found.confidence, stop.predictions, stop.error_price)


def stopped(history: History, params: Params) -> str:
    """Why nothing new is asked, as a sentence; empty unless `stop.action` is pause and the proposal is to stop."""
    if params.stop.action != "pause":
        return ""
    found = proposal(history, params)
    return found.sentence() if found is not None and found.stop else ""
