"""Fitted classifiers as bytes and back, by skops: without pickle, equal models as equal bytes, trusted types alone."""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from al_pipeline.errors import BadInput, BadParams
from al_pipeline.plugins.loading import load, said
from al_pipeline.plugins.references import Reference

_KEPT = 64
"""Number of restored models in memory: a committee and its model, several times."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SCHEMA = "schema.json"


def dump(model: Any, reference: Reference) -> bytes:
    """The bytes of a fitted classifier. Raises BadInput if it cannot be saved without pickle."""
    skops = _skops(reference)
    try:
        data = _canonical(skops.dumps(model))
        unknown = skops.get_untrusted_types(data=data)
    except Exception as error:
        raise _unsaved(reference, said(error)) from error
    if foreign := [name for name in unknown if not _is_ours(name, reference)]:
        raise _unsaved(reference, f"it holds {', '.join(foreign[:3])}")
    return data


def restore(data: bytes, reference: Reference) -> Any:
    """The classifier that `dump` saved. The plug-in runs only if the model holds types of it.

    Raises BadInput if the model holds others, UnexpectedChange if the plug-in is needed and not trusted.
    """
    return _restored(data, reference)


@lru_cache(maxsize=_KEPT)
def _restored(data: bytes, reference: Reference) -> Any:
    skops = _skops(reference)
    try:
        unknown = skops.get_untrusted_types(data=data)
        if unknown:
            load(reference)
        if foreign := [name for name in unknown if not _is_ours(name, reference)]:
            raise BadInput(
                f"{reference.where}: the saved model holds {', '.join(foreign[:3])}, which is neither of scikit-learn "
                "nor of the plug-in; it was not loaded"
            )
        return skops.loads(data, trusted=unknown)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise BadInput(
            f"{reference.where}: the saved model cannot be read ({said(error)}); it needs the versions of "
            "scikit-learn, skops and the plug-in that its round recorded"
        ) from error


def _is_ours(name: str, reference: Reference) -> bool:
    """Whether a type's full name is a class of the plug-in, or of scikit-learn: no function, nothing else."""
    module, _, attribute = name.rpartition(".")
    top = reference.module if reference.file else reference.module.partition(".")[0]
    if module not in (top, "sklearn") and not module.startswith((f"{top}.", "sklearn.")):
        return False
    try:
        return isinstance(getattr(importlib.import_module(module), attribute, None), type)
    except ImportError:
        return False


def _unsaved(reference: Reference, why: str) -> BadInput:
    return BadInput(
        f"{reference.where}: the fitted model cannot be saved without pickle, since {why}; keep arrays, plain values, "
        "estimators of scikit-learn and classes of your own module in its attributes"
    )


def _skops(reference: Reference) -> Any:
    try:
        return importlib.import_module("skops.io")
    except ModuleNotFoundError as error:
        raise BadParams(
            f"{reference.where} needs {error.name}, which is not installed: `pip install 'al-pipeline[plugins]'`"
        ) from None


def _canonical(data: bytes) -> bytes:
    """The archive with numbers in place of memory addresses and random names, and without the time."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        schema = json.loads(archive.read(_SCHEMA))
        files: dict[str, str] = {}
        _renumber(schema, {}, files)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as made:
            made.writestr(zipfile.ZipInfo(_SCHEMA, _EPOCH), json.dumps(schema, separators=(",", ":")))
            for old, new in files.items():
                made.writestr(zipfile.ZipInfo(new, _EPOCH), archive.read(old))
    return out.getvalue()


def _renumber(node: Any, ids: dict[Any, int], files: dict[str, str]) -> None:
    """Number objects and files in the order of their first occurrence.

    Plain values get a number each: whether two are one object in memory is chance.
    """
    if isinstance(node, list):
        for one in node:
            _renumber(one, ids, files)
    elif isinstance(node, dict):
        if "__id__" in node:
            own = ("value", len(ids)) if node.get("__loader__") == "JsonNode" else node["__id__"]
            node["__id__"] = ids.setdefault(own, len(ids))
        if isinstance(node.get("file"), str) and "__loader__" in node:
            old = node["file"]
            node["file"] = files.setdefault(old, f"{len(files)}{PurePosixPath(old).suffix}")
        for value in node.values():
            _renumber(value, ids, files)
