"""A query strategy of a plug-in: a `Strategy`, or a function (view, k, seed) -> the positions of its picks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.random import SeedSequence

from al_pipeline.active_learning.acquisition import ACQUISITION, SAMPLE_ACQUISITION
from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.active_learning.strategies import Need, Picked, Samples, Strategy
from al_pipeline.errors import BadInput, BadParams
from al_pipeline.plugins.loading import calling, load
from al_pipeline.plugins.references import Reference

_ARRAYS = ("scores", "proba", "vectors", "labeled", "counts", "centre")


def strategy_of(reference: Reference) -> Strategy:
    """The plug-in as a strategy. A function gets margin scores and probabilities; a `Strategy` declares what it needs.

    Raises BadParams if it is neither, or needs what there is not.
    """
    found = load(reference)
    if not isinstance(found, Strategy):
        if not callable(found):
            raise BadParams(
                f"{reference.where} is a {type(found).__name__}; name a function (view, k, seed) or a Strategy"
            )
        found = Strategy(found, frozenset({"scores", "proba"}), "margin")
    _check(reference, found)
    return replace(found, pick=partial(_pick, reference, found.pick))


def _check(reference: Reference, strategy: Strategy) -> None:
    if unknown := sorted(set(strategy.needs) - set(get_args(Need))):
        raise BadParams(f"{reference.where} needs {unknown[0]!r}; a strategy can need {', '.join(get_args(Need))}")
    if strategy.samples is not None and strategy.samples not in get_args(Samples):
        raise BadParams(f"{reference.where}: samples must be {' or '.join(get_args(Samples))}")
    table = ACQUISITION if strategy.samples is None else SAMPLE_ACQUISITION
    needs_scores = bool(strategy.needs & {"scores", "proba"})
    if (needs_scores or strategy.acquisition is not None) and strategy.acquisition not in table:
        raise BadParams(
            f"{reference.where}: the acquisition function is {strategy.acquisition!r}; use {', '.join(sorted(table))}"
        )


def _pick(reference: Reference, pick: Callable[..., Any], view: Shortlist, k: int, seed: SeedSequence) -> Picked:
    """The picks, checked: at most k different positions. A plug-in cannot write into the arrays of others."""
    with calling(reference, "the strategy"):
        found = pick(_read_only(view), k, seed)
    positions, probability = found if isinstance(found, Picked) else (found, None)
    try:
        chosen = np.asarray(positions)
        chances = np.ones(len(chosen)) if probability is None else np.asarray(probability, np.float64)
    except (TypeError, ValueError):
        chosen, chances = np.empty((0, 0)), np.empty(0)
    if chosen.ndim != 1 or chances.shape != chosen.shape or (len(chosen) and chosen.dtype.kind not in "iu"):
        raise BadInput(
            f"{reference.where} returned a {type(found).__name__}; it must return an array of positions in the "
            "shortlist, whole numbers, or a Picked"
        )
    if len(chosen) > k or len(set(chosen.tolist())) < len(chosen):
        raise BadInput(f"{reference.where} returned {len(chosen)} positions for k = {k}; at most k, none twice")
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(view.ids)):
        raise BadInput(f"{reference.where} returned a position outside 0 to {len(view.ids) - 1}")
    if not (np.isfinite(chances).all() and (chances >= 0).all() and (chances <= 1).all()):
        raise BadInput(f"{reference.where} returned probabilities outside 0 to 1")
    return Picked(chosen.astype(np.intp), chances)


def _read_only(view: Shortlist) -> Shortlist:
    arrays = {}
    for name in _ARRAYS:
        if (values := getattr(view, name)) is not None:
            arrays[name] = np.asarray(values).view()
            arrays[name].flags.writeable = False
    return replace(view, ids=tuple(view.ids), **arrays)
