"""The proposal to stop asking, by the published rounds, and what it does (`stop` in `params.yaml`)."""

from __future__ import annotations

from al_pipeline.operations.history import History, same_classes
from al_pipeline.params import Stop
from al_pipeline.stopping.proposal import Proposal, propose


def proposal(history: History, stop: Stop) -> Proposal | None:
    """Whether to stop; None without evidence. Rounds that were rolled back are no evidence."""
    rounds = same_classes([record for record in history.rounds if record.round not in history.abandoned])
    if not rounds:
        return None
    low = rounds[-1].metrics.macro_f1.low
    return propose([record.agreement for record in rounds], stop.patience, stop.agreement, low, stop.target)


def stopped(history: History, stop: Stop) -> str:
    """Why nothing new is asked, as a sentence; empty unless `stop.action` is pause and the proposal is to stop."""
    if stop.action != "pause":
        return ""
    found = proposal(history, stop)
    return found.sentence() if found is not None and found.stop else ""
