"""Format values for HTML pages: numbers as text, cleaned and shortened texts, and the page templates."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from al_pipeline.evaluation.figures import Accuracy, Decision, Estimate
from al_pipeline.records import shown_text
from al_pipeline.sanitize import counted

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

EXCERPT_CHARACTERS = 280
NOTHING = "–"
_THIN = "\u202f"
_UNPRINTABLE = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""C1 controls, non-characters, and bidi controls, which could reverse surrounding text."""


@cache
def page(name: str) -> Template:
    """A template of this package, with autoescaping. Its page is self-contained."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("al_pipeline", "reporting/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.filters.update(
        verdict=verdict, excerpt=excerpt, count=count, thousands=thousands, duration=duration, fixed=fixed,
        sentence=sentence,
    )  # fmt: skip
    return environment.get_template(name)


def verdict(decision: Decision) -> str:
    """A decision in words: its verdict, such as `promoted`, and `promoted for now` if provisional."""
    return f"{decision.verdict} for now" if decision.provisional else decision.verdict


def excerpt(text: str, limit: int = EXCERPT_CHARACTERS) -> str:
    """The start of a text on one line, at most `limit` characters; control characters become spaces."""
    text = text.lstrip()
    words = clean(text[: 4 * limit]).split()
    line = " ".join(words)
    if len(line) <= limit and len(text) <= 4 * limit:
        return line
    return line[: limit - 1].rstrip() + "…"


def clean(text: str) -> str:
    """A text with the characters that a page must not contain replaced by spaces."""
    return _UNPRINTABLE.sub(" ", shown_text(text))


def interval(estimate: Estimate | Accuracy, digits: int = 2) -> str:
    """An interval such as `0.89–0.96`; empty if there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.{digits}f}–{estimate.high:.{digits}f}"


def fixed(value: Any, digits: int = 2) -> str:
    """A number with this many digits; a dash if there is none."""
    number = _finite(value)
    return NOTHING if number is None else f"{number:.{digits}f}"


def thousands(number: int) -> str:
    """A number such as `5 543`, grouped by thin spaces."""
    return f"{number:,}".replace(",", _THIN)


def count(number: int, noun: str) -> str:
    """A count with its noun, such as `1 label` or `2 labels`."""
    return counted(number, noun).replace(",", _THIN)


def duration(seconds: float) -> str:
    """A duration such as `1 h 13 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def sentence(text: str) -> Markup:
    """A message of the engine as a sentence for the page: capitalised, with backticks as code."""
    from markupsafe import Markup, escape

    shown = str(escape(clean(text[:1].upper() + text[1:])))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", shown))


def finalize(value: Any) -> Any:
    """Applied to every value that a template prints: None becomes a dash, text is cleaned."""
    if value is None:
        return NOTHING
    return clean(value) if type(value) is str else value


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
