"""The fingerprint of the engine: everything that must be equal for the same inputs to give the same bytes.

`engine.json` is a dependency of every DVC stage. Closing a round writes it; a stage refuses to run if it records
another engine. The digest covers the computations of all modules that stages import (a test compares the list with
their imports): their syntax trees without docstrings, comments, messages and type annotations, see `code_digest`. The
version of al-pipeline is recorded but not compared: a release with the same computations is the same engine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import al_pipeline
from al_pipeline.errors import EngineChanged
from al_pipeline.files import read_json, write_json
from al_pipeline.records import CPU
from al_pipeline.workspace.code_digest import package_digest

MODULES = (
    "__init__.py",
    "active_learning/__init__.py",
    "active_learning/acquisition.py",
    "active_learning/batch.py",
    "active_learning/choice.py",
    "active_learning/clustering.py",
    "active_learning/names.py",
    "active_learning/relabeling.py",
    "active_learning/sampling.py",
    "active_learning/shortlist.py",
    "active_learning/strategies.py",
    "annotation/__init__.py",
    "annotation/active_events.py",
    "annotation/aggregation.py",
    "annotation/answered.py",
    "annotation/answers.py",
    "annotation/class_changes.py",
    "annotation/confidence.py",
    "annotation/consensus.py",
    "annotation/crowdlab.py",
    "annotation/dawid_skene.py",
    "annotation/gold.py",
    "annotation/schema_change.py",
    "annotation/vote_arrays.py",
    "annotation/votes.py",
    "costs/__init__.py",
    "costs/answer_times.py",
    "costs/seconds.py",
    "data/__init__.py",
    "data/ledger.py",
    "data/outputs.py",
    "data/parquet.py",
    "data/pool.py",
    "data/served.py",
    "errors.py",
    "evaluation/__init__.py",
    "evaluation/figures.py",
    "evaluation/metrics.py",
    "features/__init__.py",
    "features/cache.py",
    "features/device.py",
    "features/encoder.py",
    "features/names.py",
    "features/onednn.py",
    "features/packing.py",
    "features/shards.py",
    "features/terms.py",
    "features/texts.py",
    "features/tfidf.py",
    "features/vectors.py",
    "file_notes.py",
    "files.py",
    "models/__init__.py",
    "models/approximate.py",
    "models/calibration.py",
    "models/ensembles.py",
    "models/estimators.py",
    "models/feature_matrix.py",
    "models/finetuned.py",
    "models/held_out.py",
    "models/linear.py",
    "models/loading.py",
    "models/names.py",
    "models/probabilities.py",
    "models/softmax.py",
    "models/text_model.py",
    "models/training.py",
    "models/transformer.py",
    "params.py",
    "plugins/__init__.py",
    "plugins/loading.py",
    "plugins/models.py",
    "plugins/packages.py",
    "plugins/references.py",
    "plugins/storage.py",
    "plugins/strategies.py",
    "plugins/use.py",
    "records.py",
    "sanitize.py",
    "stages/__init__.py",
    "stages/evaluate.py",
    "stages/label.py",
    "stages/score.py",
    "stages/select.py",
    "stages/train.py",
    "threads.py",
    "validation.py",
    "workspace/__init__.py",
    "workspace/fingerprint.py",
    "workspace/layout.py",
    "yaml_text.py",
)
"""Modules that stages import and whose computations are part of the fingerprint."""

NO_OUTPUT = {
    "cron.py": "checks `schedule`, which no stage reads",
    "logs.py": "says what happens, and returns nothing to a stage",
    "progress.py": "writes a file that is no output, and returns nothing to a stage",
    "workspace/code_digest.py": "computes the digest itself",
    "workspace/trust.py": "decides whether code may run, and returns nothing else to a stage",
    "workspace/home.py": "finds the folder in which the digest is cached",
}
"""Modules that stages import and that cannot change their outputs, each with the reason (tests check the list)."""

PACKAGES = (
    "numpy",
    "pyarrow",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages that stages compute with, in all or some workspaces."""
FORMER_PACKAGES = ("pandas",)
"""Packages that only earlier engines recorded."""

_CPU_FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")

THREADS = 1
"""The number of linear algebra threads in stages: another number changes the order of summation and so the bytes."""

STAGE_ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "OPENBLAS_NUM_THREADS": str(THREADS),
    "MKL_NUM_THREADS": str(THREADS),
    "PYTHONHASHSEED": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONSAFEPATH": "1",
}
"""The environment of stages. PYTHONSAFEPATH: a file in the workspace, such as `numpy.py`, must not shadow a module."""


def current_engine(device: str = CPU) -> dict[str, Any]:
    """The fingerprint of the running engine on `device`, which is absent if it is the CPU."""
    return _engine() if device == CPU else {**_engine(), "device": device}


@cache
def _engine() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "version": version("al-pipeline"),
        "sources": package_digest(Path(al_pipeline.__file__).parent, MODULES),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": platform.machine(),
        "cpu": _cpu_flags(),
        "blas": os.environ.get("OPENBLAS_CORETYPE", ""),
        "threads": THREADS,
    }


def write_engine(path: Path, device: str = CPU, plugins: Mapping[str, str] | None = None) -> None:
    """Record this engine and the device on which stages will encode; only closing a round may call this.

    `plugins`: what the plug-ins in use are made of (`plugins.references.record`). A record of the same engine is not
    rewritten.
    """
    engine = current_engine(device) | ({"plugins": dict(plugins)} if plugins else {})
    if difference(read_json(path), engine, plugins or {}):
        write_json(path, engine)


def recorded_device(recorded: dict[str, Any] | None) -> str:
    """The device that the record of an engine names; the CPU if it names none."""
    return str(recorded.get("device", CPU)) if isinstance(recorded, dict) else CPU


def difference(
    recorded: dict[str, Any] | None, other: dict[str, Any] | None = None, plugins: Mapping[str, str] | None = None
) -> str:
    """The differences between the recorded engine and this one (or `other`), as text; empty if there are none.

    `plugins`: those in use, compared with the recorded ones; None: plug-ins are not compared.
    """
    mine = _flat(current_engine() if other is None else other)
    theirs = _flat(recorded if isinstance(recorded, dict) else {})
    if plugins is not None:
        mine |= {f"plug-in {name}": value for name, value in plugins.items()}
        theirs |= {f"plug-in {name}": str(value) for name, value in recorded_plugins(recorded).items()}
    return "; ".join(
        f"{key}: was {theirs.get(key, 'absent')}, is {mine.get(key, 'absent')}"
        for key in sorted((mine.keys() | theirs.keys()) - {"version"})
        if mine.get(key) != theirs.get(key)
    )


def check_engine(path: Path) -> str:
    """Raise EngineChanged if `path` records another engine than this one; return the device that it records.

    The device is not compared: a stage computes on that one, or fails. Plug-ins are compared where they are used.
    """
    recorded = read_json(path)
    device = recorded_device(recorded)
    if changes := difference(recorded, current_engine(device)):
        raise EngineChanged(f"{path} records another engine ({changes}); `al round` restarts the build with this one")
    return device


def recorded_plugins(recorded: dict[str, Any] | None) -> dict[str, str]:
    """What the record of an engine says of plug-ins; empty if none was in use."""
    plugins = recorded.get("plugins") if isinstance(recorded, dict) else None
    return dict(plugins) if isinstance(plugins, dict) else {}


def _flat(engine: dict[str, Any]) -> dict[str, str]:
    flat = {key: str(value) for key, value in engine.items() if key not in ("packages", "plugins")}
    flat["device"] = recorded_device(engine)
    packages = engine.get("packages")
    return flat | {key: str(value) for key, value in (packages if isinstance(packages, dict) else {}).items()}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    present = next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return [flag for flag in _CPU_FLAGS if flag in present]
