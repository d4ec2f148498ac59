"""Predicts with an exported model: `python predict.py "a text" "another"`, in the folder of the model.

It needs onnxruntime and numpy, tokenizers for a model with an encoder, and pandas for MLflow. It is a file of
al-pipeline, unchanged.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class ExportedModel:
    """A model that `al export --format onnx` wrote."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        self.classes = self.card["classes"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {one.name for one in self._session.get_inputs()}
        if "input_ids" in self._inputs:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.card["max_tokens"])
        if "terms" in self._inputs:
            terms = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))["terms"]
            self._columns = {term: column for column, term in enumerate(terms)}

    def predict_proba(self, texts: list[str]) -> NDArray[np.float64]:
        """Calibrated probabilities, (n, C), columns as in `classes`; each text is computed by itself."""
        return np.concatenate([self._session.run(["probabilities"], self.features(text))[0] for text in texts])

    def features(self, text: str) -> dict[str, NDArray[Any]]:
        """The inputs of the graph for one text: token ids, and the columns and counts of its terms."""
        text = text.encode("utf-8", "replace").decode()
        found: dict[str, NDArray[Any]] = {}
        if "input_ids" in self._inputs:
            ids = np.array([self._tokenizer.encode(text).ids or [0]], np.int64)
            found |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        if "terms" in self._inputs:
            words = re.findall(r"\b\w\w+\b", text[:10_000].lower())
            named = words + [f"{first} {second}" for first, second in zip(words, words[1:], strict=False)]
            counts = Counter(self._columns[term] for term in named if term in self._columns) or {0: 0}
            found["terms"] = np.array([list(counts)], np.int64)
            found["counts"] = np.array([list(counts.values())], np.float32)
        return found


class PythonFunction:
    """What MLflow calls: texts in, a table out."""

    def __init__(self, model: ExportedModel) -> None:
        self._model = model

    def predict(self, model_input: Any, params: Any = None) -> Any:
        """A row for each text: `label`, `probability`, and the probability of each class.

        `model_input` is a table with a column `text`, or with a single column, or texts.
        """
        import pandas

        if isinstance(model_input, str):
            texts = [model_input]
        elif isinstance(model_input, pandas.DataFrame):
            column = "text" if "text" in model_input.columns else model_input.columns[0]
            texts = list(model_input[column])
        else:
            texts = [text for text in model_input]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"a text is a string, not {type(wrong[0]).__name__}")
        classes = self._model.classes
        proba = self._model.predict_proba(texts) if texts else np.empty((0, len(classes)))
        columns = {f"probability_{name}": proba[:, place] for place, name in enumerate(classes)}
        best = [classes[place] for place in proba.argmax(axis=1)]
        return pandas.DataFrame({"label": best, "probability": proba.max(axis=1, initial=0.0), **columns})


def _load_pyfunc(folder: str) -> PythonFunction:
    """What MLflow calls to load the model in a folder."""
    return PythonFunction(ExportedModel(folder))


def main() -> None:
    """Print a line of JSON for each text of the command line."""
    model = ExportedModel(Path(__file__).resolve().parent)
    for text, row in zip(sys.argv[1:], model.predict_proba(sys.argv[1:]), strict=True):
        best = int(row.argmax())
        probabilities = dict(zip(model.classes, row.tolist(), strict=True))
        answer = {"text": text, "label": model.classes[best], "probabilities": probabilities}
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
