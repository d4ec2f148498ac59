"""A workspace's models with a converted encoder, each accepted only if it agrees with the original.

With a quantized encoder, texts near the boundary of two classes are computed again by the exact one (`margins.py`).

The head, TF-IDF and calibration are the original's own code, in numpy; rounds share one converted encoder. So another
round is loaded without a conversion, and only texts that are new to the comparison are encoded. A fine-tuned encoder is
converted for each round.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from al_pipeline.data.pool import fetch, read_ids
from al_pipeline.errors import AlError, UsageError
from al_pipeline.features.cache import FeatureCache, ensure
from al_pipeline.features.encoder import encoder_identity
from al_pipeline.files import read_object, write_json
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.models.loading import vectors_for
from al_pipeline.operations.predict import PublishedModel, check_encoder, open_model
from al_pipeline.operations.snapshots import snapshots
from al_pipeline.records import Item, LabeledItem, round_name
from al_pipeline.serving.agreement import Agreement, compare
from al_pipeline.serving.margins import margins, needed_margin, refined
from al_pipeline.serving.onnx_encoder import (
    EXACT,
    QUANTIZED,
    OnnxEncoder,
    convert_encoder,
    converted_at,
    keep_newest,
    parts_of,
)
from al_pipeline.serving.versions import Served
from al_pipeline.serving.workspace_models import Predict, WorkspaceModels, encodes, predictor, served
from al_pipeline.workspace.workspace import Workspace

_SAMPLE = 500
"""Texts of the pool that are compared, besides the test set."""
_MOST_TEST = 2000
_TRAINED = "trained-"
"""The beginning of the names of converted encoders that were trained: those of one round each."""
_KEPT = 8
"""The number of these that stay on disk, 90 MB each for a small encoder."""


class Sample(NamedTuple):
    """Texts on which models are compared, and the labels of those in the test set."""

    items: list[Item]
    truth: list[str | None]
    tested: int
    """The number of items of the test set, which come first."""


class OnnxModels(WorkspaceModels):
    """The models of a workspace, with vectors computed by ONNX Runtime."""

    def __init__(self, workspace: Workspace, runtime: str) -> None:
        super().__init__(workspace)
        self.runtime = runtime
        self._sessions: WeakValueDictionary[tuple[str, str], OnnxEncoder] = WeakValueDictionary()

    def load(self, number: int) -> Served:
        """Load the model of a round, compared with the original. Raises BadInput if it is refused, with the figures."""
        published = open_model(self.workspace, number, self._history)
        if not encodes(published):
            return served(published, predictor(published, None), self.runtime, gains=False)
        held = self._encoders_of(published)  # else they would be loaded again below
        agreement = self.agreement(published)
        agreement.check(round_name(number), self.runtime)
        made = served(published, self.predictor(published, agreement.margin), self.runtime, gains=False)
        del held
        return made

    def predictor(self, published: PublishedModel, margin: float) -> Predict:
        """What predicts with a converted encoder, and again with an exact one where it is quantized and has to be.

        It computes in the thread that calls it; several may.
        """
        predict = predictor(published, self.converted(published, self.runtime).encode_in_turn)
        if self.runtime != QUANTIZED:
            return predict
        exact = predictor(published, self.converted(published, EXACT).encode_in_turn)
        return lambda texts: refined(predict(texts), margin, lambda rows: exact([texts[row] for row in rows]))

    def converted(self, published: PublishedModel, runtime: str) -> OnnxEncoder:
        """The converted encoder of a model."""
        folder, limit, model = published.folder / "encoder", published.features.max_tokens, published.model
        if isinstance(model, FinetunedModel):
            identity, limit = f"{_TRAINED}{published.record.hashes['model']}", model.max_tokens
        else:
            identity = encoder_identity(folder, limit, self._notes)
            check_encoder(published, identity)
        found = self._sessions.get((identity, runtime))
        if found is None:
            cache = self.workspace.layout.private / "onnx"
            if isinstance(model, FinetunedModel):
                place = converted_at(cache, identity, limit, runtime, lambda: parts_of(model.trained))
                keep_newest(cache, _TRAINED, _KEPT)
            else:
                place = convert_encoder(folder, limit, runtime, cache)
            found = self._sessions[identity, runtime] = OnnxEncoder(place)
        return found

    def _encoders_of(self, published: PublishedModel) -> list[OnnxEncoder]:
        """The converted encoder, and the exact one if that is quantized."""
        runtimes = (self.runtime, EXACT) if self.runtime == QUANTIZED else (self.runtime,)
        return [self.converted(published, runtime) for runtime in runtimes]

    def agreement(self, published: PublishedModel) -> Agreement:
        """The comparison of a model with its original; computed once for a model and its converted encoders."""
        encoders = self._encoders_of(published)
        key = "-".join([published.record.hashes["model"], *(encoder.key for encoder in encoders)])
        note = self.workspace.layout.private / "onnx/agreement" / f"{key}.json"
        known = read_object(note)
        if known:
            known.pop("accepted")
            return Agreement(**known)
        sample = comparison_sample(self.workspace, published)
        original = self.original_proba(published, sample)
        found = [self._sampled_proba(published, sample, encoder) for encoder in encoders]
        margin, again = 0.0, 0
        if len(found) > 1 and sample.items:
            rows = slice(sample.tested if len(sample.items) > sample.tested else 0, None)
            margin = needed_margin(found[0][rows], found[1][rows])
            again = int((margins(found[0]) < margin).sum())
        converted = refined(found[0], margin, lambda rows: found[1][rows])
        compared = compare(original, converted, sample.truth, published.model.classes, margin, again)
        write_json(note, compared.to_json())
        return compared

    def _sampled_proba(self, published: PublishedModel, sample: Sample, encoder: OnnxEncoder) -> Any:
        """The probabilities (n, C) of a sample with a converted encoder; its vectors are kept for the next round."""
        texts = [item.text for item in sample.items]
        hashes = [item.content_hash for item in sample.items]
        if not texts:
            return np.zeros((0, len(published.model.classes)))
        if isinstance(published.model, FinetunedModel):  # no other round has these vectors
            return published.model.proba_of(encoder.encode(texts))
        cache = FeatureCache(self.workspace.layout.features / f"onnx-{encoder.key}")
        ensure(cache, zip(hashes, texts, strict=True), lambda: encoder, progress=False)
        return published.model.predict_proba(texts, cache.get(hashes))

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
    return Sample(items, [rows.get(item.item_id) if item.item_id in test else None for item in items], len(test))
