"""Predictions of the newest model, shown to annotators if `label_studio.show_guess` is set."""

from __future__ import annotations

from collections.abc import Sequence

from al_pipeline.errors import UnexpectedChange
from al_pipeline.files import sha256_tree
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import read_history
from al_pipeline.records import Item
from al_pipeline.workspace.workspace import Workspace


def guess(workspace: Workspace, items: Sequence[Item]) -> dict[str, tuple[str, float]]:
    """The predicted label of each item and its probability, by item id; empty while the model is untrained.

    Never call it for test items: a guess anchors annotators and would bias the metrics. Raises UnexpectedChange if the
    model is not that of the newest record.
    """
    from al_pipeline.features.device import device_of
    from al_pipeline.features.vectors import open_vectors
    from al_pipeline.models.loading import load_model, vectors_for
    from al_pipeline.operations.plugins import use_plugin_of

    layout = workspace.layout
    published = read_history(layout, Git(layout.root)).latest
    if published is None or sha256_tree(layout.model) != published.hashes["model"]:
        raise UnexpectedChange(
            f"{layout.model} is not the model of the last record; `dvc pull models/candidate` fetches it"
        )
    device = device_of(workspace.params.features)
    use_plugin_of(layout.model, layout)
    model = load_model(layout.model, layout.encoder, device=device)
    if not items or not model.counts:
        return {}
    vectors = open_vectors(workspace.layout.encoder, workspace.layout.features, workspace.params.features, device)
    proba = model.predict_proba([item.text for item in items], vectors_for(model, vectors, items))
    return {
        item.item_id: (model.classes[int(row.argmax())], float(row.max()))
        for item, row in zip(items, proba, strict=True)
    }
