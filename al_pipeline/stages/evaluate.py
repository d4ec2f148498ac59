"""Stage `evaluate`: measure the model on the labelled test set. The only stage that reads test labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.data.outputs import Predictions, csv_cell, read_labeled, write_predictions
from al_pipeline.data.pool import iter_items
from al_pipeline.data.served import request_weights
from al_pipeline.errors import BadInput
from al_pipeline.evaluation.figures import Control, Metrics
from al_pipeline.evaluation.metrics import evaluate
from al_pipeline.features.vectors import open_vectors
from al_pipeline.files import write_json, write_text
from al_pipeline.models.loading import load_model, vectors_for
from al_pipeline.params import load_params
from al_pipeline.records import Item
from al_pipeline.stages import open_terms, stage, use_plugin_of
from al_pipeline.workspace.fingerprint import check_engine
from al_pipeline.workspace.layout import Layout


@stage
def main(layout: Layout) -> None:
    """Write the metrics with their intervals, the control's score, and predictions for all test items.

    Unlabelled test items are predicted too, for comparison with a later model. Raises BadInput if a labelled test item
    is missing from data/test.
    """
    device = check_engine(layout.engine)
    params = load_params(layout.params)
    classes = params.schema_.labels
    items, label_of = _test_set(layout)
    asked = request_weights(items)  # measured apart, when the round is decided
    labelled = [row for row, item in enumerate(items) if item.item_id in label_of and item.item_id not in asked]
    texts = [item.text for item in items]
    vectors = open_vectors(layout.encoder, layout.features, params.features, device)
    use_plugin_of(layout, layout.model)
    model = load_model(layout.model, layout.encoder, open_terms(layout), device)
    own = vectors_for(model, vectors, items)
    truth = np.array([classes.index(label_of[items[row].item_id]) for row in labelled], dtype=np.intp)

    def measure(proba: NDArray[np.float64]) -> Metrics:
        rng = np.random.default_rng([params.seed, 0xE7A1])
        return evaluate(proba[labelled], truth, classes, rng, params.evaluate.bootstrap, params.evaluate.confidence)

    proba = model.predict_proba(texts, own)
    metrics = measure(proba)
    control = model.as_control()
    control_score = None
    if control is not None and control.counts:
        figure = measure(control.predict_proba(texts, own)).macro_f1
        control_score = Control(labels=sum(control.counts.values()), macro_f1=figure).to_json()
    write_json(layout.control, control_score)
    write_json(layout.metrics, metrics.to_json())
    write_text(layout.metrics_csv, _metrics_csv(metrics.to_table()))
    predicted = proba[labelled].argmax(axis=1)
    pairs = [(classes[a], classes[b]) for a, b in zip(truth, predicted, strict=True)]
    write_text(layout.confusion_csv, _confusion_csv(pairs))
    ids = tuple(item.item_id for item in items)
    labels = tuple(label_of.get(item_id, "") for item_id in ids)
    write_predictions(layout.predictions, Predictions(ids, labels, tuple(classes), proba))


def _test_set(layout: Layout) -> tuple[list[Item], dict[str, str]]:
    """All test items, by id, and the labels of those that are labelled."""
    label_of = {row.item_id: row.label for row in read_labeled(layout.test_labels)}
    items = sorted((item for batch in iter_items([layout.test]) for item in batch), key=lambda item: item.item_id)
    there = sum(item.item_id in label_of for item in items)
    if there < len(label_of):
        raise BadInput(
            f"data/test has {there:,} of the {len(label_of):,} items in test_labels.parquet; "
            "restore it with `dvc checkout data/test`"
        )
    return items, label_of


def _metrics_csv(rows: list[dict[str, Any]]) -> str:
    """One row per metric; `name` includes the class, for plots."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ("name", "metric", "label", "value", "low", "high", "reason"), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        label = csv_cell(row["label"])
        writer.writerow({**row, "label": label, "name": f"{row['metric']} ({label})" if label else row["metric"]})
    return out.getvalue()


def _confusion_csv(pairs: Sequence[tuple[str, str]]) -> str:
    """One row per labelled test item: its actual and its predicted class."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("actual", "predicted"))
    writer.writerows((csv_cell(actual), csv_cell(predicted)) for actual, predicted in pairs)
    return out.getvalue()


if __name__ == "__main__":
    main()
