"""A published model as an MLflow model: a folder that `mlflow.pyfunc.load_model` reads, written without MLflow.

The model is that of `onnx_export.py`; MLflow loads it by `code/al_exported.py`, without pickle.
"""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from al_pipeline.files import make_folder, write_text
from al_pipeline.operations.predict import PublishedModel
from al_pipeline.records import round_name
from al_pipeline.serving.agreement import Agreement
from al_pipeline.serving.model_card import as_yaml
from al_pipeline.serving.onnx_encoder import EXACT
from al_pipeline.serving.onnx_export import PROGRAM, write_onnx
from al_pipeline.workspace.workspace import Workspace

_MODULE = "al_exported"
_WRITTEN_LIKE = "3.17.2"
"""The version of MLflow whose format this is."""


def write_mlflow(workspace: Workspace, published: PublishedModel, folder: Path) -> Agreement:
    """Write the folder of an MLflow model; the comparison with the original. Raises what `write_onnx` raises."""
    model = make_folder(folder / "model")
    model.chmod(0o755)
    agreement = write_onnx(workspace, published, model, EXACT)
    code = make_folder(folder / "code")
    code.chmod(0o755)
    write_text(code / f"{_MODULE}.py", PROGRAM.read_text(encoding="utf-8"), 0o644)
    needs = [*(model / "requirements.txt").read_text(encoding="utf-8").split(), "pandas"]
    pinned = "".join(f"{name}=={version(name)}\n" for name in needs)
    for name in ("requirements.txt", "predict.py"):
        (model / name).unlink()
    write_text(folder / "requirements.txt", pinned, 0o644)
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    write_text(folder / "python_env.yaml", as_yaml(environment), 0o644)
    write_text(folder / "MLmodel", as_yaml(_mlmodel(published)), 0o644)
    return agreement


def _mlmodel(published: PublishedModel) -> dict[str, Any]:
    record = published.record
    digest = record.hashes["model"]
    outputs = [("label", "string"), ("probability", "double")]
    outputs += [(f"probability_{name}", "double") for name in published.model.classes]
    written = datetime.fromtimestamp(record.closed_at or 0, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    return {
        "artifact_path": "model",
        "flavors": {
            "python_function": {
                "loader_module": _MODULE,
                "code": "code",
                "data": "model",
                "env": {"virtualenv": "python_env.yaml"},
                "python_version": platform.python_version(),
            }
        },
        "metadata": {"round": round_name(record.round), "digest": digest, "classes": list(published.model.classes)},
        "mlflow_version": _WRITTEN_LIKE,
        "model_uuid": digest[:32],
        "signature": {
            "inputs": json.dumps([{"type": "string", "name": "text", "required": True}]),
            "outputs": json.dumps([{"type": kind, "name": name, "required": True} for name, kind in outputs]),
            "params": None,
        },
        "utc_time_created": written,
    }
