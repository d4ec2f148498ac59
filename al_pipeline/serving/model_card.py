"""The model card of an exported model: `README.md` with front matter as Hugging Face reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from al_pipeline.evaluation.figures import Estimate
from al_pipeline.features.encoder import installed_source
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.operations.predict import PublishedModel
from al_pipeline.records import round_name
from al_pipeline.sanitize import one_line
from al_pipeline.serving.agreement import Agreement

UNKNOWN_LICENSE = "unknown"


def model_card(
    published: PublishedModel,
    title: str,
    agreement: Agreement,
    use: Sequence[str],
    library: str,
    license_name: str = UNKNOWN_LICENSE,
) -> str:
    """The card as Markdown: `title` names the format in a sentence, `use` are the lines that say how it is used."""
    front = as_yaml(_front_matter(published, library, license_name))
    lines = ["---", *front.splitlines(), "---", "", *_body(published, title, agreement, use)]
    return "\n".join(lines) + "\n"


def as_yaml(value: Any) -> str:
    """A value of a JSON file as YAML."""
    return str(yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=1000))


def card_fields(published: PublishedModel, agreement: Agreement) -> dict[str, Any]:
    """What every format's `card.json` says of the model."""
    record = published.record
    return {
        "round": round_name(record.round),
        "digest": record.hashes["model"],
        "classes": list(published.model.classes),
        "max_tokens": published.features.max_tokens,
        "encoder": encoder_source(published),
        "agreement": agreement.to_json(),
    }


def encoder_source(published: PublishedModel) -> str | None:
    """Where the encoder came from; None for a model without one."""
    has_one = published.model.needs_vectors or isinstance(published.model, FinetunedModel)
    return installed_source(published.folder / "encoder") if has_one else None


def _front_matter(published: PublishedModel, library: str, license_name: str) -> dict[str, Any]:
    record = published.record
    metrics = record.metrics
    found = [
        {"type": kind, "name": name, "value": figure.value}
        for kind, name, figure in (
            ("accuracy", "accuracy", metrics.accuracy), ("f1", "macro-F1", metrics.macro_f1),
        )
        if figure.value is not None
    ]  # fmt: skip
    front: dict[str, Any] = {
        "license": license_name,
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": ["text-classification", "active-learning", "al-pipeline"],
        "metrics": ["accuracy", "f1"],
    }
    if found:
        task = {"type": "text-classification", "name": "text classification"}
        dataset = {"type": "private", "name": f"test set of {round_name(record.round)}, {metrics.items} texts"}
        results = [{"task": task, "dataset": dataset, "metrics": found}]
        front["model-index"] = [{"name": one_line(record.params.schema_.question), "results": results}]
    return front


def _body(published: PublishedModel, title: str, agreement: Agreement, use: Sequence[str]) -> Iterator[str]:
    record = published.record
    schema, counts, metrics = record.params.schema_, record.counts, record.metrics
    source = encoder_source(published)
    yield f"# {round_name(record.round)}: {one_line(schema.question)}"
    yield ""
    yield f"A text classifier, trained by active learning, exported by al-pipeline {title}."
    yield ""
    yield f"- **Round**: {round_name(record.round)}; decision: {record.decision.verdict}"
    yield f"- **SHA-256 of the original model**: `{record.hashes['model']}`"
    is_trained = isinstance(published.model, FinetunedModel)
    yield f"- **Features**: {'fine-tuned encoder' if is_trained else record.params.features.get('kind', '')}" + (
        f"; encoder {source}, at most {published.features.max_tokens} tokens" if source else ""
    )
    yield f"- **Export against the original**: {agreement.sentence()}"
    yield ""
    yield "## Intended use"
    yield ""
    classes = list(map(_cell, published.model.classes))
    yield f"It answers one question about a text, “{one_line(schema.question)}”, with one of: {', '.join(classes)}."
    yield "The probabilities are calibrated on texts like those of the pool; on other texts neither they nor the"
    yield "figures below hold. Let a person decide where an error is costly, above all at low probabilities."
    yield ""
    yield "## Data"
    yield ""
    yield f"Trained on {counts.labelled:,} labelled texts of a pool of {counts.pool:,}, evaluated on"
    yield f"{counts.test_labelled:,} random texts that were never trained on. Labels by class:"
    yield ""
    yield "| class | training | test |"
    yield "|---|---|---|"
    for name in published.model.classes:
        yield f"| {_cell(name)} | {counts.labels.get(name, 0):,} | {counts.test_labels.get(name, 0):,} |"
    yield ""
    yield "## Metrics"
    yield ""
    level = f"{metrics.confidence:.0%} interval" if metrics.confidence else "interval"
    yield f"On {metrics.items:,} test texts, of the original model:"
    yield ""
    yield f"| metric | value | {level} |"
    yield "|---|---|---|"
    for name, figure in (
        ("accuracy", metrics.accuracy), ("macro-F1", metrics.macro_f1), ("log loss", metrics.log_loss),
        ("calibration error", metrics.calibration_error),
    ):  # fmt: skip
        yield _row(name, figure)
    for name, per_class in metrics.per_class.items():
        yield _row(f"F1 of {_cell(name)}", per_class.f1)
    yield ""
    yield "## Use"
    yield ""
    yield from use


def _cell(text: str) -> str:
    """A class name in a table of Markdown."""
    return one_line(text).replace("|", "\\|")


def _row(title: str, figure: Estimate) -> str:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    return f"| {title} | {shown(figure.value)} | {shown(figure.low)} to {shown(figure.high)} |"
