"""The stages of `dvc.yaml`, one module each: read, call, write. They communicate only through files."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import wraps

from al_pipeline.errors import AlError
from al_pipeline.features.encoder import library_versions
from al_pipeline.features.terms import TermCache
from al_pipeline.files import sha256_file
from al_pipeline.logs import get_logger
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT, THREADS, current_engine
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
"""What modules of stages import where they use it, since others that import them do not; about a second."""


def stage(function: Callable[[Layout], None]) -> Callable[..., None]:
    """Decorate a stage's main: as a command it runs in the current folder and reports an AlError without traceback."""

    @wraps(function)
    def main(layout: Layout | None = None) -> None:
        from threadpoolctl import threadpool_limits

        _logger.info("stage %s begins", function.__globals__["__spec__"].name)
        with threadpool_limits(THREADS):  # also where the environment came too late, as in a `dvc repro` by hand
            if layout is not None:
                return function(layout)
            os.environ.update(STAGE_ENVIRONMENT)
            try:
                function(Layout())
            except AlError as error:
                sys.exit(f"{type(error).__name__}: {error}")

    return main


def prepare() -> None:
    """Load and compute what stages need of the installation, in a process that then forks them: they share it."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    current_engine()
    library_versions()


def open_terms(layout: Layout) -> TermCache:
    """The cache of what TF-IDF computes, under the engine that `check_engine` found to be this one."""
    return TermCache(layout.terms, sha256_file(layout.engine))
