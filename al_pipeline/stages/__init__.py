"""The stages of `dvc.yaml`, one module each: read files, call the library, write files. They share nothing else."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path

from al_pipeline.data.pool import count_items, iter_batches, list_parts
from al_pipeline.errors import AlError
from al_pipeline.features.encoder import library_versions
from al_pipeline.features.terms import TermCache, fitted_parts
from al_pipeline.features.tfidf import Tfidf
from al_pipeline.file_notes import FileNotes
from al_pipeline.files import read_object, sha256_file
from al_pipeline.logs import get_logger
from al_pipeline.params import PluginName, plugins_of
from al_pipeline.threads import one_thread
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT, current_engine
from al_pipeline.workspace.layout import Layout

_logger = get_logger(__name__)

_IMPORTED_LATE = (
    "pyarrow.compute",
    "pyarrow.parquet",
    "safetensors.numpy",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.sparse",
    "threadpoolctl",
)
"""Modules that stages import lazily, since not every process needs them. Importing them takes about a second."""


_COLLECTED = (50_000, 20, 20)
"""Thresholds of the collector: tens of thousands of records are no garbage, and searching them takes time."""


def stage(function: Callable[[Layout], None]) -> Callable[..., None]:
    """Decorate a stage's main. As a command it runs in the current folder and reports an AlError without traceback."""

    @wraps(function)
    def main(layout: Layout | None = None) -> None:
        _logger.info("stage %s begins", function.__globals__["__spec__"].name)
        with one_thread():  # needed if numpy was loaded before the variables were set
            if layout is not None:
                return function(layout)
            os.environ.update(STAGE_ENVIRONMENT)
            gc.set_threshold(*_COLLECTED)
            try:
                function(Layout())
            except AlError as error:
                sys.exit(f"{type(error).__name__}: {error}")

    return main


def prepare() -> None:
    """Import and compute in advance what stages need, in the process that forks them, so that they share it."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    current_engine()
    library_versions()
    with one_thread():  # finds the libraries
        pass


def use_plugins(layout: Layout, plugins: Sequence[PluginName], has_vectors: bool = True) -> None:
    """Let this stage use the plug-ins, if any. Raises EngineChanged if `engine.json` records others.

    `has_vectors`: whether the features have an encoder. Raises BadParams if a strategy needs one.
    """
    if plugins:
        from al_pipeline.plugins.use import use

        use(plugins, layout.root, read_object(layout.engine), has_vectors)


def use_plugin_of(layout: Layout, model: Path) -> None:
    """Let this stage load a saved model that a plug-in made."""
    from al_pipeline.models.loading import estimator_name  # lazy: the stage `label` needs no model

    use_plugins(layout, plugins_of(estimator_name(model)))


def open_terms(layout: Layout) -> TermCache:
    """The cache of TF-IDF vocabularies and rows for this engine, which `check_engine` has verified."""
    return TermCache(layout.terms, sha256_file(layout.engine))


def pool_vocabulary(layout: Layout) -> Tfidf:
    """TF-IDF's vocabulary, fitted on the leading parts of the pool that `fitted_parts` selects; cached."""
    parts = list_parts([layout.pool])
    leading = parts[: fitted_parts([count_items([part]) for part in parts])]
    notes = FileNotes(layout.terms / ".notes")
    source = " ".join(notes.sha256(part) for part in leading)
    notes.save()

    def texts() -> Iterator[str]:
        for batch in iter_batches(leading, ("text",)):
            yield from batch.column("text").to_pylist()

    return open_terms(layout).vocabulary(source, texts)
