"""A workspace's models with a converted encoder, each accepted only if it agrees with the original.

The head, TF-IDF and calibration are the original's own code, in numpy; rounds share one converted encoder. So another
round is loaded without a conversion, and only texts that are new to the comparison are encoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from al_pipeline.data.pool import fetch, read_ids
from al_pipeline.errors import AlError, BadInput, UsageError
from al_pipeline.features.cache import FeatureCache, ensure
from al_pipeline.features.encoder import encoder_identity
from al_pipeline.files import read_object, write_json
from al_pipeline.models.finetuned import FORMAT as FINETUNED
from al_pipeline.models.loading import vectors_for
from al_pipeline.models.text_model import CARD_FILE
from al_pipeline.operations.predict import PublishedModel, check_encoder, open_model
from al_pipeline.operations.snapshots import snapshots
from al_pipeline.records import Item, LabeledItem, round_name
from al_pipeline.serving.agreement import Agreement, compare
from al_pipeline.serving.onnx_encoder import OnnxEncoder, convert_encoder
from al_pipeline.serving.versions import Served
from al_pipeline.serving.workspace_models import WorkspaceModels, served
from al_pipeline.workspace.workspace import Workspace

_SAMPLE = 500
"""Texts of the pool that are compared, besides the test set."""
_MOST_TEST = 2000


class Sample(NamedTuple):
    """Texts on which models are compared, and the labels of those in the test set."""

    items: list[Item]
    truth: list[str | None]


class OnnxModels(WorkspaceModels):
    """The models of a workspace, with vectors computed by ONNX Runtime."""

    def __init__(self, workspace: Workspace, runtime: str) -> None:
        super().__init__(workspace)
        self.runtime = runtime
        self._sessions: WeakValueDictionary[Path, OnnxEncoder] = WeakValueDictionary()

    def load(self, number: int) -> Served:
        """Load the model of a round, compared with the original. Raises BadInput if it is refused, with the figures."""
        published = open_model(self.workspace, number, self._history)
        refuse_finetuned(published, self.runtime)
        if not published.model.needs_vectors:
            return served(published, None, self.runtime, gains=False)
        encoder = self.converted(published)
        self.agreement(published, encoder).check(round_name(number), self.runtime)
        return served(published, encoder.encode, self.runtime, gains=False)

    def converted(self, published: PublishedModel) -> OnnxEncoder:
        """The converted encoder of a model."""
        folder, features = published.folder / "encoder", published.features
        check_encoder(published, encoder_identity(folder, features.max_tokens, self._notes))
        place = convert_encoder(folder, features.max_tokens, self.runtime, self.workspace.layout.private / "onnx")
        found = self._sessions.get(place)
        if found is None:
            found = self._sessions[place] = OnnxEncoder(place)
        return found

    def agreement(self, published: PublishedModel, encoder: OnnxEncoder) -> Agreement:
        """The comparison of a model with its original; computed once for a model and a converted encoder."""
        note = (
            self.workspace.layout.private / "onnx/agreement" / f"{published.record.hashes['model']}-{encoder.key}.json"
        )
        known = read_object(note)
        if known:
            known.pop("accepted")
            return Agreement(**known)
        sample = comparison_sample(self.workspace, published)
        proba = self.original_proba(published, sample)
        cache = FeatureCache(self.workspace.layout.features / f"onnx-{encoder.key}")
        texts = [item.text for item in sample.items]
        hashes = [item.content_hash for item in sample.items]
        ensure(cache, zip(hashes, texts, strict=True), lambda: encoder, progress=False)
        converted = published.model.predict_proba(texts, cache.get(hashes)) if texts else np.zeros_like(proba)
        found = compare(proba, converted, sample.truth, published.model.classes)
        write_json(note, found.to_json())
        return found

    def original_proba(self, published: PublishedModel, sample: Sample) -> Any:
        """The original's probabilities (n, C): its vectors are in the cache, or torch computes them."""
        from al_pipeline.features.vectors import open_vectors

        encoder, features = published.folder / "encoder", published.features
        texts = [item.text for item in sample.items]
        if not texts:
            return np.zeros((0, len(published.model.classes)))
        try:
            vectors = open_vectors(encoder, self.workspace.layout.features, features, published.device)
            return published.model.predict_proba(texts, vectors_for(published.model, vectors, sample.items))
        except ImportError as error:
            raise UsageError(
                f"{round_name(published.record.round)} was never compared with its original, which needs {error.name}: "
                "serve it once where al-pipeline is installed whole, and copy `.al`"
            ) from None


def refuse_finetuned(published: PublishedModel, runtime: str) -> None:
    """Raise BadInput for a fine-tuned encoder, which is not converted."""
    if read_object(published.folder / "model" / CARD_FILE).get("format") == FINETUNED:
        raise BadInput(
            f"{round_name(published.record.round)} is a fine-tuned encoder, which is not converted to {runtime}; "
            "use the runtime torch"
        )


def comparison_sample(workspace: Workspace, published: PublishedModel) -> Sample:
    """The test set, its labels as of the round, and the texts of the pool with the smallest content hashes."""
    layout = workspace.layout
    try:
        with snapshots(workspace) as labels:
            rows = {key: row.label for key, row in labels(published.record).items() if isinstance(row, LabeledItem)}
    except AlError:  # without the labels of that round only predictions are compared
        rows = {}
    test = fetch([layout.test], sorted(read_ids([layout.test]).ids())[:_MOST_TEST])
    keys = read_ids([layout.pool])
    smallest = np.argsort(keys.content_hashes[:, :8].copy().view(">u8").ravel(), kind="stable")[:_SAMPLE]
    chosen = set(smallest.tolist())
    pool = fetch([layout.pool], [key for place, key in enumerate(keys.ids()) if place in chosen])
    items = [*test.values(), *pool.values()]
    return Sample(items, [rows.get(item.item_id) if item.item_id in test else None for item in items])
