"""The share of wrong labels in a labelled set, from a random sample of it that was reviewed."""

from __future__ import annotations

from msgspec import Struct

from al_pipeline.evaluation.figures import Estimate
from al_pipeline.evaluation.online import wilson
from al_pipeline.quality.agreement import CONFIDENCE


class ErrorRate(Struct, frozen=True, kw_only=True):
    """How many labels of a set are wrong, as people gave them: before any ruling corrected them."""

    labels: int
    """The size of the set."""
    sampled: int
    """The size of the random sample that is to be reviewed; `reviewed` of it have a ruling."""
    reviewed: int
    wrong: int
    """Of `reviewed`, those whose ruling is another class."""
    rate: Estimate


def error_rate(labels: int, sampled: int, reviewed: int, wrong: int) -> ErrorRate:
    """The error rate of `labels` labels, of which a random sample was reviewed, with a 95 % interval.

    It is Wilson's, with the correction for a sample of a finite set: the interval of a set that was reviewed
    altogether is its error rate.
    """
    if not reviewed:
        reason = "no label of the random sample is reviewed" if labels else "there are no labels"
        return ErrorRate(labels=labels, sampled=sampled, reviewed=0, wrong=0, rate=Estimate(value=None, reason=reason))
    share = wrong / reviewed
    if reviewed >= labels:
        rate = Estimate(value=share, low=share, high=share)
    else:
        more = (labels - 1) / (labels - reviewed)
        low, high = wilson(share * reviewed * more, reviewed * more, CONFIDENCE)
        assert low is not None and high is not None
        rate = Estimate(value=share, low=min(low, share), high=max(high, share))
    return ErrorRate(labels=labels, sampled=sampled, reviewed=reviewed, wrong=wrong, rate=rate)
