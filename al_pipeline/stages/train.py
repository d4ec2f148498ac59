"""Stage `train`: fit the model on the labelled set, from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from al_pipeline.data.outputs import read_labeled
from al_pipeline.data.pool import fetch, hashes_of
from al_pipeline.features.names import class_prototypes
from al_pipeline.features.texts import ItemTexts
from al_pipeline.features.vectors import open_vectors
from al_pipeline.files import read_json
from al_pipeline.models.finetuned import fit_finetuned
from al_pipeline.models.text_model import fit_text_model
from al_pipeline.params import FINETUNED, load_params, plugins_of
from al_pipeline.progress import progress_reporter
from al_pipeline.stages import pool_vocabulary, stage, use_plugins
from al_pipeline.workspace.fingerprint import check_engine
from al_pipeline.workspace.layout import Layout


@stage
def main(layout: Layout) -> None:
    """Fit the classifier on the labelled set and save it; without labels it predicts the prior.

    A classifier on frozen features also gets a control, fitted on the randomly sampled items alone. A fine-tuned model
    has none, since it would need a second training.
    """
    device = check_engine(layout.engine)
    params = load_params(layout.params)
    labeled = read_labeled(layout.labeled)
    ids, labels = [row.item_id for row in labeled], [row.label for row in labeled]
    texts = _texts(layout, ids)
    if params.train.model == FINETUNED:
        fit_finetuned(
            texts,
            labels,
            params.schema_.labels,
            layout.encoder,
            params.features.max_tokens,
            params.train.finetune,
            params.seed,
            params.train.calibrate,
            on_progress=progress_reporter(layout.progress, "fine-tuning"),
            device=device,
        ).save(layout.model)
        return
    use_plugins(layout, plugins_of(params.train.model))
    vectors = open_vectors(layout.encoder, layout.features, params.features, device)
    drawn = set(read_json(layout.asked_at_random, {"items": []})["items"])
    model = fit_text_model(
        texts=texts,
        vectors=None if vectors is None else vectors.of_texts(texts.hashes, texts),
        labels=labels,
        classes=params.schema_.labels,
        features=params.features,
        tfidf=pool_vocabulary(layout) if params.features.uses_tfidf else None,
        seed=params.seed,
        calibrate=params.train.calibrate,
        encoder=None if vectors is None else vectors.identity,
        control=[row for row, item_id in enumerate(ids) if item_id in drawn],
        classifier=params.train.model,
        prototypes=class_prototypes(vectors, params.schema_.labels, params.schema_.meanings)
        if params.train.names and vectors is not None
        else None,
        weights=np.array([row.confidence for row in labeled]) if params.train.weigh_by_confidence else None,
    )
    model.save(layout.model)


def _texts(layout: Layout, ids: Sequence[str]) -> ItemTexts:
    """The texts of pool items, which are read only if a cache lacks what is computed from one."""
    hashes = hashes_of([layout.pool], ids)

    def read() -> list[str]:
        found = fetch([layout.pool], ids)
        return [found[item_id].text for item_id in ids]

    return ItemTexts([hashes[item_id] for item_id in ids], read)


if __name__ == "__main__":
    main()
