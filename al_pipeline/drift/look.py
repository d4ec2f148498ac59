"""What a look at the newest requests found, as a workspace keeps it: figures, words and ids, never a text."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec import Struct

from al_pipeline.evaluation.figures import Estimate

_SHOWN = 5
_DAY = 86_400.0


class Look(Struct, frozen=True, kw_only=True):
    """How the requests of a time differ from the pool, see `drift.assessment`. Times are seconds since 1970."""

    since: float
    until: float
    """When the look was made."""
    round: str
    """The round of the model."""
    rows: int
    texts: int
    """Different texts that were compared."""
    found: tuple[str, ...]
    """The tests that found a difference, the most significant first; empty: no alarm."""
    p_values: dict[str, float]
    words: tuple[str, ...]
    """New words, the most significant first."""
    newest: tuple[str, ...]
    """The texts least like the pool, as `REQUEST:PLACE`; empty without an alarm of the domain classifier."""
    accuracy: Estimate
    """Of the model on these texts, estimated without labels."""
    measured: Estimate | None = None
    """Of the model on labelled test items from requests, as of its round; None if there was none."""
    alarm_since: float | None = None
    """When the first look of an unbroken row of alarms was made; None without an alarm."""

    @property
    def alarm(self) -> bool:
        """Whether the texts differ from the pool."""
        return bool(self.found)

    def sentence(self, words: bool = True) -> str:
        """What was found, in words; with some of the new words."""
        texts = f"{self.texts:,} texts of {_spoken(self.until - self.since)} until {_stamp(self.until)}"
        if not self.alarm:
            told = f"{texts} do not differ from the pool"
        else:
            told = f"{texts} differ from the pool by {', '.join(self.found)}"
            if self.alarm_since is not None and self.alarm_since < self.until:
                told += f", as those of each look since {_stamp(self.alarm_since)}"
            if words and self.words:
                told += f"; new words: {', '.join(self.words[:_SHOWN])}"
        if (estimated := _shown(self.accuracy)) is None:
            told += f"; no estimated accuracy, since {self.accuracy.reason}"
        else:
            told += f"; estimated accuracy {estimated}"
        if self.measured is None or (measured := _shown(self.measured)) is None:
            return told
        return f"{told}; measured on labelled requests {measured}, as of {self.round}"


class Looks(Struct, frozen=True, kw_only=True):
    """The newest look of a workspace, and the newest attempt."""

    tried_at: float
    look: Look | None = None
    """None before the first one that had enough texts."""
    problem: str = ""
    """Why the newest attempt made no look; empty if it did."""

    def sentence(self, words: bool = True) -> str:
        """The look, and why there is no newer one. `words`: also some of the new words."""
        told = "" if self.look is None else self.look.sentence(words)
        if not self.problem:
            return told
        return f"{told}{'; ' if told else ''}no look at {_stamp(self.tried_at)}: {self.problem}"


def followed(look: Look, before: Look | None) -> float | None:
    """`alarm_since` of a look that follows another."""
    if not look.alarm:
        return None
    return before.alarm_since if before is not None and before.alarm_since is not None else look.until


def _shown(one: Estimate) -> str | None:
    if one.value is None or one.low is None or one.high is None:
        return None
    return f"{one.value:.3f} ({one.low:.3f}–{one.high:.3f})"


def _spoken(seconds: float) -> str:
    days = seconds / _DAY
    return f"{days:.0f} days" if days >= 2 else f"{seconds / 3600:.0f} hours"


def _stamp(time: float) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"
