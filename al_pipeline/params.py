"""`params.yaml` as typed values, validated when it is loaded.

An invalid value is reported with its key, its value and what the key takes; an unknown key is an error too.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from al_pipeline.cron import check_cron, check_timezone
from al_pipeline.errors import BadInput, BadParams, UsageError
from al_pipeline.files import read_json
from al_pipeline.records import composed
from al_pipeline.sanitize import plain_form

MAX_CHARACTERS = 1_000_000
"""The maximum size of a `params.yaml`: a larger file is a mistake, and would only be slow to reject."""

_Name = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]

ClassName = _Name
"""The name of a class, as `schema.labels` takes it."""
_Phrase = Annotated[str, StringConstraints(min_length=1, max_length=20_000, strip_whitespace=True)]

StrategyName = Literal[
    "auto",
    "margin",
    "entropy",
    "least_confidence",
    "cluster_margin",
    "class_balanced",
    "relevance",
    "badge",
    "density",
    "vote_entropy",
    "consensus_entropy",
    "kl_disagreement",
    "bald",
    "power_bald",
    "core_set",
    "random",
    "typiclust",
    "kmeans",
]
ModelName = Literal["head", "centroid", "finetuned"]
"""The linear head, another estimator of `al_pipeline/models/estimators.py`, or the fine-tuned encoder."""
FINETUNED: ModelName = "finetuned"
DeviceName = Literal["cpu", "cuda", "mps", "auto"]
BatchSize = Annotated[int, Field(ge=1, le=100_000)]
"""The number of items in a batch."""


def stays_below(name: str) -> bool:
    """Whether a path, joined to a folder, stays below it (not considering links)."""
    return name.isprintable() and not name.startswith(("/", "~")) and ".." not in name.split("/")


class _Section(BaseModel):
    # defer_build: sections are built once, as part of `Params`, and not also on their own (saves a tenth of a second).
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class Schema(_Section):
    """What annotators are asked: the question, its classes in the order shown, and the fields shown."""

    version: int = Field(ge=1)
    question: str = Field(min_length=1, max_length=500)
    labels: list[_Name] = Field(min_length=2, max_length=200)
    fields: list[_Name] = Field(min_length=1, max_length=20)

    @field_validator("labels", "fields")
    @classmethod
    def _composed(cls, names: list[str]) -> list[str]:
        """The names in Unicode's NFC form: an é of one character and one of two are the same class."""
        return [composed(name) for name in names]

    @field_validator("labels", "fields")
    @classmethod
    def _distinct(cls, names: list[str]) -> list[str]:
        if len({plain_form(name) for name in names}) < len(names):
            raise ValueError(
                "names must differ by more than case, blanks, invisible characters or Unicode normalisation"
            )
        if not all(map(plain_form, names)):
            raise ValueError("names must contain a visible character")
        return names

    @field_validator("labels", "fields")
    @classmethod
    def _trimmed(cls, names: list[str]) -> list[str]:
        if any(name != name.strip() for name in names):
            raise ValueError("names must not begin or end with blanks")
        return names


class Ingest(_Section):
    """What may enter the pool, and the size of the test set."""

    test_size: int = Field(ge=0)
    max_characters: int = Field(ge=1)
    sources: list[str]
    """Files or patterns below the workspace. One that leads outside causes a warning at each tick, not an error."""
    text_column: _Name
    label_column: str = Field(max_length=100)
    encoding: str = Field(max_length=100, default="")


class Features(_Section):
    """The features that the model gets from a text."""

    kind: Literal["encoder", "tfidf", "encoder+tfidf"]
    encoder: str = Field(min_length=1, max_length=500)
    max_tokens: int = Field(ge=8, le=8192)
    precision: Literal["auto", "float32", "bfloat16"]
    device: DeviceName = "cpu"

    @field_validator("encoder")
    @classmethod
    def _below(cls, name: str) -> str:
        if not stays_below(name):
            raise ValueError(
                "must be an installed package, a folder below the workspace, or a name on the Hugging Face hub; copy "
                "a folder from elsewhere into the workspace, since somebody else may have written its params.yaml"
            )
        return name

    @property
    def uses_encoder(self) -> bool:
        """Whether vectors of a frozen encoder are part of the features."""
        return self.kind != "tfidf"

    @property
    def uses_tfidf(self) -> bool:
        """Whether TF-IDF is part of the features."""
        return self.kind != "encoder"


class Finetune(_Section):
    """How the encoder is trained if the model is `finetuned`."""

    epochs: int = Field(ge=1, le=100, default=6)
    batch_size: int = Field(ge=1, le=256, default=16)
    learning_rate: float = Field(gt=0, le=0.01, default=1e-4)
    passes: int = Field(ge=2, le=100, default=10)


class Train(_Section):
    """How the classifier is fitted."""

    model: ModelName
    calibrate: bool
    finetune: Finetune = Field(default_factory=Finetune)


class Select(_Section):
    """How the next batch is selected."""

    strategy: StrategyName
    cold_start: Literal["random", "typiclust", "kmeans", "core_set"] = "random"
    batch_size: BatchSize
    random_share: float = Field(ge=0, le=1)
    shortlist: int = Field(ge=1)
    max_similarity: float = Field(gt=0, le=1, default=1.0)
    guide: dict[_Name, list[_Phrase]] = Field(default_factory=dict, max_length=200)

    @field_validator("guide")
    @classmethod
    def _composed(cls, guide: dict[str, list[str]]) -> dict[str, list[str]]:
        return {composed(name): texts for name, texts in guide.items()}


NEEDS_ENCODER = frozenset({"badge", "cluster_margin", "core_set", "density", "kmeans", "relevance", "typiclust"})
"""Strategies that use the encoder's vectors."""


class Evaluate(_Section):
    """How confidence intervals are computed."""

    bootstrap: int = Field(ge=100, le=100_000)
    confidence: float = Field(gt=0.5, lt=1)


class Gate(_Section):
    """When a new model replaces the promoted one."""

    max_drop: float = Field(ge=0, le=1)
    min_test_per_class: int = Field(ge=0)


class Round(_Section):
    """The size of a round, when it has enough answers to close, and when it closes anyway."""

    seed_size: int = Field(ge=1, le=100_000)
    test_tasks: int = Field(ge=0, le=100_000, default=40)
    quorum: float = Field(gt=0, le=1)
    deadline_days: float = Field(gt=0)
    min_labels: int = Field(ge=0)
    overlap: int = Field(ge=1, le=50)


class LabelStudio(_Section):
    """How Label Studio is used. Its address and token are not parameters: see `al labelstudio --help`."""

    show_guess: bool
    timeout_seconds: float = Field(gt=0, le=3600)
    max_vanished: int = Field(ge=0)


class Schedule(_Section):
    """When ticks run automatically, once a Prefect server has the schedule (`al up`, `al schedule apply`)."""

    cron: str = Field(max_length=200)
    timezone: str = Field(max_length=100)
    active: bool

    @field_validator("cron")
    @classmethod
    def _comes_due(cls, text: str) -> str:
        return check_cron(text)

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        return check_timezone(name)


def no_schedule() -> Schedule:
    """The inactive schedule of a workspace whose `params.yaml` is older than schedules."""
    return Schedule(cron="0 * * * *", timezone="UTC", active=False)


class Params(_Section):
    """All of `params.yaml`."""

    version: Literal[1]
    seed: int = Field(ge=0, lt=2**32)
    schema_: Schema = Field(alias="schema")
    ingest: Ingest
    features: Features
    train: Train
    select: Select
    evaluate: Evaluate
    gate: Gate
    round: Round
    label_studio: LabelStudio
    schedule: Schedule = Field(default_factory=no_schedule)
    annotators: list[_Name]

    @model_validator(mode="after")
    def _fits_together(self) -> Params:
        if self.train.model == FINETUNED and not self.features.uses_encoder:
            raise ValueError(
                "train.model 'finetuned' trains the encoder: it needs features.kind encoder or encoder+tfidf"
            )
        for key in ("strategy", "cold_start"):
            if getattr(self.select, key) in NEEDS_ENCODER and not self.features.uses_encoder:
                raise ValueError(
                    f"select.{key} {getattr(self.select, key)!r} needs features.kind encoder or encoder+tfidf"
                )
        if unknown := sorted(set(self.select.guide) - set(self.schema_.labels)):
            raise ValueError(f"select.guide names {unknown[0]!r}, which is not a class in schema.labels")
        if empty := next((name for name, texts in self.select.guide.items() if not texts), None):
            raise ValueError(f"select.guide.{empty} is empty; give it words or texts, or remove it")
        return self


class Overrides(_Section):
    """Settings for a single batch that override `params.yaml`, and its requested items (`rounds/overrides.json`)."""

    round: int = Field(ge=0)
    """The round that the batch is for."""
    size: BatchSize | None = None
    strategy: StrategyName | None = None
    interventions: list[int] = Field(default_factory=list, validation_alias=AliasChoices("interventions", "rulings"))
    """The numbers of the interventions that the close applied."""
    ask: list[str] = Field(default_factory=list)
    """Items that people requested for the batch (`al ask`), in the order of the requests."""
    kept: list[str] = Field(default_factory=list)
    """Pool items that are asked already and stay in the batch because an intervention closed their round."""
    kept_test: list[str] = Field(default_factory=list)
    """The same for the test set."""

    def applied_to(self, select: Select) -> Select:
        """`select` with this batch's size and strategy, if they are set."""
        own = {"batch_size": self.size, "strategy": self.strategy}
        return select.model_copy(update={name: value for name, value in own.items() if value is not None})


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that rejects duplicate keys, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice; keep one of the two", key.start_mark
                    )
                seen.add((key.tag, key.value))
        made: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return made


def _read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises YAMLError, also for an alias: a few lines could expand to more than memory."""
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            where = str(event.start_mark).strip()
            raise yaml.YAMLError(f"aliases are not supported; write the value out, {where}")
    return yaml.load(text, _Loader)


def load_params(path: Path) -> Params:
    """Read and check a `params.yaml`. Raises BadParams naming every wrong key."""
    try:
        return parse_params(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise BadParams(f"{path} is missing; `git checkout -- params.yaml` brings it back") from None
    except UnicodeDecodeError as error:
        raise BadParams(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def parse_params(text: str, source: str = "params.yaml") -> Params:
    """Check the text of a `params.yaml`. Raises BadParams naming every wrong key."""
    if len(text) > MAX_CHARACTERS:
        raise BadParams(f"{source} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are allowed")
    try:
        values = _read_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadParams(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadParams(f"{source} must contain keys and values, got {type(values).__name__}")
    try:
        return Params.model_validate(values)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise BadParams(f"{source} is nested too deeply") from None
        raise BadParams("\n".join(_explain(source, problem) for problem in error.errors())) from None


def load_overrides(path: Path) -> Overrides:
    """The settings of the batch that the current build selects. Raises BadInput."""
    try:
        return Overrides.model_validate(read_json(path))
    except ValidationError as error:
        raise BadInput("\n".join(_explain(str(path), problem) for problem in error.errors())) from None


def check_overrides(size: int | None, strategy: str | None) -> None:
    """Raise UsageError, saying what is valid, if the size or the strategy of a batch is invalid."""
    try:
        Overrides.model_validate({"round": 0, "size": size, "strategy": strategy})
    except ValidationError as error:
        raise UsageError("\n".join(_explain("this round", problem) for problem in error.errors())) from None


def _explain(source: str, problem: Any) -> str:
    key = ".".join(str(step) for step in problem["loc"]) or "(top level)"
    takes = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"] and problem["type"] == "value_error":
        return f"{source}: {takes}"
    if problem["type"] == "missing":
        return f"{source}: {key}: is missing"
    if problem["type"] == "extra_forbidden":
        return f"{source}: {key}: no such key; remove it or fix its spelling"
    got = _show(problem["input"])
    if isinstance(problem["input"], str) and problem["type"] == "float_type" and _is_number(problem["input"]):
        takes += " (YAML reads 5e-5 as text: write 5.0e-5, or 0.00005)"
    if isinstance(problem["input"], bool) and problem["type"] == "string_type":
        takes += ' (YAML reads yes, no, on and off as true and false: put it in "quotes")'
    return f"{source}: {key}: got {got}; {takes[0].lower()}{takes[1:]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(value: Any) -> str:
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deeply nested lists
        shown = f"a very large {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
