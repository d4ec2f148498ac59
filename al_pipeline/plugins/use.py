"""Put the plug-ins that a workspace names into the tables of models and strategies, for this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from al_pipeline.active_learning.strategies import STRATEGIES
from al_pipeline.errors import BadParams, EngineChanged
from al_pipeline.models.estimators import ESTIMATORS
from al_pipeline.params import PluginName
from al_pipeline.plugins.models import estimator_of
from al_pipeline.plugins.references import find, find_for_saved, record_of
from al_pipeline.plugins.strategies import strategy_of

VECTORS = frozenset({"vectors", "labeled", "centre"})
"""What a strategy can need of the encoder."""


def use(
    plugins: Sequence[PluginName], root: Path, engine: Mapping[str, Any] | None = None, has_vectors: bool = True
) -> None:
    """Let this process use the plug-ins of the workspace `root` under their names.

    `engine`: the record of the engine, in a stage. `has_vectors`: whether the features have an encoder. Raises
    BadParams, UnexpectedChange if a plug-in is not trusted, and EngineChanged if `engine` records another one.
    """
    references = [find(plugin, root) for plugin in plugins]
    if engine is not None:
        known = engine.get("plugins")
        known = known if isinstance(known, dict) else {}
        for name, now in record_of(references).items():
            if known.get(name) != now:
                raise EngineChanged(
                    f"engine.json records another plug-in ({name}: was {known.get(name, 'absent')}, is {now}); "
                    "`al round` restarts the build with this one"
                )
    for reference in references:
        if reference.kind == "model":
            ESTIMATORS[reference.name] = estimator_of(reference)
        else:
            strategy = strategy_of(reference)
            if strategy.needs & VECTORS and not has_vectors:
                raise BadParams(f"{reference.where} needs features.kind encoder or encoder+tfidf")
            STRATEGIES[reference.name] = strategy


def use_saved(plugin: PluginName, root: Path) -> None:
    """Let this process load models that the plug-in made; it need not be here, unless they hold classes of it."""
    ESTIMATORS[plugin.name] = estimator_of(find_for_saved(plugin, root))
