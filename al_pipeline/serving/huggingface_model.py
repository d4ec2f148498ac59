"""A text classifier of al-pipeline for Hugging Face transformers.

The vector of a text is the mean of its token vectors, of unit length; a linear layer on it, and on TF-IDF if the
model has one, gives the classes. Logits are the logarithms of the calibrated probabilities. It is a file of
al-pipeline, unchanged.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, TextClassificationPipeline
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.hub import cached_file

_LEAST = 1e-12
VOCABULARY_FILE = "vocabulary.json"


class ClassifierConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The encoder's configuration, and the sizes of the classifier."""

    model_type = "al-pipeline-classifier"

    def __init__(self, **options: Any) -> None:
        self.encoder = options.pop("encoder", None) or {"model_type": "bert"}
        # seen: classes that had labels; terms: those of TF-IDF
        usual = {"seen": 2, "terms": 0, "temperature": 1.0, "scale": 1.0, "is_estimate": False}
        self.head = {**usual, **(options.pop("head", None) or {})}
        super().__init__(**options)


class TextClassifier(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The classifier. With TF-IDF it needs the columns and counts of a text's terms, (n, terms) each; 0 is none."""

    config_class = ClassifierConfig
    base_model_prefix = "encoder"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        options = dict(config.encoder)
        encoder = AutoConfig.for_model(options.pop("model_type"), **options)
        self.encoder = AutoModel.from_config(encoder)  # type: ignore[no-untyped-call]
        width, seen, classes = encoder.hidden_size, config.head["seen"], config.num_labels
        shapes = {
            "dense": (seen, width),
            "bias": (seen,),
            "shift": (seen,),
            "spread": (seen, classes),
            "base": (classes,),
        }
        if terms := config.head["terms"]:
            shapes |= {"sparse": (terms, seen), "idf": (terms,)}
        self.head = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        terms: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """The logits (n, C): the logarithms of the probabilities."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        total = (states * mask.unsqueeze(-1)).sum(1)
        vectors = total / total.norm(dim=1, keepdim=True).clamp(min=_LEAST)
        found = self.head["bias"] + vectors @ self.head["dense"].T
        head = self.config.head
        if head["terms"]:
            if terms is None or counts is None:
                raise ValueError("the model has TF-IDF, so it needs `terms` and `counts`; the pipeline makes them")
            found = found + self._tfidf(terms, counts.to(found.dtype))
        if head["is_estimate"]:
            found = (found * head["scale"]).softmax(-1).clamp(min=_LEAST).log()
        shared = (found / head["temperature"] + self.head["shift"]).softmax(-1)
        proba = shared @ self.head["spread"] + self.head["base"]
        logits = (proba / proba.sum(1, keepdim=True)).log()
        loss = None if labels is None else torch.nn.functional.nll_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _tfidf(self, terms: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        raw = (counts.clamp(min=1).log() + 1) * self.head["idf"][terms] * (counts > 0)
        raw = raw / raw.norm(dim=1, keepdim=True).clamp(min=_LEAST)
        found: torch.Tensor = (self.head["sparse"][terms] * raw.unsqueeze(-1)).sum(1)
        return found


class TextPipeline(TextClassificationPipeline):
    """From a text to the probabilities of the classes."""

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing to check: `TextClassifier` is none of transformers' own models, of which it would warn."""

    def preprocess(self, inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        """The inputs of the model for one text."""
        text = inputs.encode("utf-8", "replace").decode()
        tokenizer: Any = self.tokenizer
        limit = tokenizer.model_max_length
        found = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt", **options)
        found.pop("token_type_ids", None)
        if self.model.config.head["terms"]:
            found.update(self._terms(text))
        return found

    def _terms(self, text: str) -> dict[str, torch.Tensor]:
        if not hasattr(self, "_columns"):
            file = cached_file(str(self.model.name_or_path), VOCABULARY_FILE)
            known = json.loads(Path(str(file)).read_text("utf-8"))
            self._columns = {term: column for column, term in enumerate(known["terms"])}
        words = re.findall(r"\b\w\w+\b", text[:10_000].lower())
        named = words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]
        counts = Counter(self._columns[term] for term in named if term in self._columns) or {0: 0}
        return {"terms": torch.tensor([list(counts)]), "counts": torch.tensor([list(counts.values())])}
