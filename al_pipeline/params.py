"""`params.yaml` as typed values, validated when it is loaded.

An invalid value is reported with its key, its value and what the key takes; an unknown key is an error too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
import yaml
from msgspec import Meta
from msgspec.structs import replace

from al_pipeline.cron import check_cron, check_timezone
from al_pipeline.errors import BadInput, BadParams, UsageError
from al_pipeline.files import read_json
from al_pipeline.records import composed, with_present_names
from al_pipeline.sanitize import one_line, plain_form, storable
from al_pipeline.validation import parse
from al_pipeline.yaml_text import SafeLoader, read_yaml

MAX_CHARACTERS = 1_000_000
"""The maximum size of a `params.yaml`: a larger file is a mistake, and would only be slow to reject."""

_Name = Annotated[
    str, Meta(min_length=1, max_length=100, pattern=r"\A[^\x00-\x1f\x7f]+\Z", description="without control characters")
]
_Phrase = Annotated[str, Meta(max_length=20_000, pattern=r"\S", description="that is not blank"), str.strip]
_Phrases = Annotated[list[_Phrase], Meta(description="texts")]


def _one_line(text: str) -> str:
    if one_line(text) != text:
        raise ValueError("must be on one line, with single blanks and without control characters")
    return text


_Sentence = Annotated[
    str,
    Meta(min_length=1, max_length=500, pattern=r"\S", description="on one line, that is not blank"),
    str.strip,
    _one_line,
]
_Example = Annotated[
    str, Meta(min_length=1, max_length=2000, pattern=r"\S", description="that is not blank"), str.strip
]

StrategyName = Literal[
    "auto",
    "margin",
    "entropy",
    "least_confidence",
    "cluster_margin",
    "herding",
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

PluginKind = Literal["model", "strategy", "redaction"]
PLUGIN_GROUPS: dict[PluginKind, str] = {
    "model": "al_pipeline.models",
    "strategy": "al_pipeline.strategies",
    "redaction": "al_pipeline.redactions",
}
"""The groups of entry points in which installed packages name their plug-ins."""
_PLUGIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


class PluginName(NamedTuple):
    """A model, a strategy or a redaction that is not part of al-pipeline, as `params.yaml` names it."""

    kind: PluginKind
    name: str


class _Choice(NamedTuple):
    """A check of a name: one of al-pipeline's own, `package.module:name`, or that of an entry point."""

    names: tuple[str, ...]
    kind: PluginKind

    def __call__(self, name: str) -> str:
        if name in self.names or _PLUGIN.fullmatch(name):
            return name
        from importlib.metadata import entry_points  # takes time, and few names come here

        if name in entry_points(group=PLUGIN_GROUPS[self.kind]).names:
            return name
        raise ValueError(f"expected: {self.takes(repr)} (the latter in the group {PLUGIN_GROUPS[self.kind]})")

    def takes(self, shown: Callable[[Any], str]) -> str:
        """What is valid, in words."""
        return f"one of {', '.join(map(shown, self.names))}; package.module:name; or the name of an entry point"


StrategyChoice = Annotated[str, Meta(min_length=1, max_length=200), _Choice(get_args(StrategyName), "strategy")]
ModelChoice = Annotated[str, Meta(min_length=1, max_length=200), _Choice(get_args(ModelName), "model")]


def plugins_of(model: str | None = None, strategy: str | None = None) -> tuple[PluginName, ...]:
    """Those of a model's and a strategy's name that are not al-pipeline's own."""
    named: tuple[tuple[PluginKind, str | None, tuple[str, ...]], ...] = (
        ("model", model, get_args(ModelName)),
        ("strategy", strategy, get_args(StrategyName)),
    )
    return tuple(PluginName(kind, name) for kind, name, known in named if name is not None and name not in known)


RuntimeName = Literal["torch", "onnx", "onnx-int8"]
RUNTIMES = get_args(RuntimeName)
"""What computes the encoder's vectors of a served model."""
DeviceName = Literal["cpu", "cuda", "mps", "auto"]
BatchSize = Annotated[int, Meta(ge=1, le=100_000)]
"""The number of items in a batch."""


def stays_below(name: str) -> bool:
    """Whether a path, joined to a folder, stays below it (not considering links)."""
    return name.isprintable() and not name.startswith(("/", "~")) and ".." not in name.split("/")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values are checked where a file is read (`validation.parse`), not when a section is made or changed."""


def _composed(names: list[str]) -> list[str]:
    """The names in Unicode's NFC form: an é of one character and one of two are the same class."""
    return [composed(name) for name in names]


def _distinct(names: list[str]) -> list[str]:
    if len({plain_form(name) for name in names}) < len(names):
        raise ValueError("names must differ by more than case, blanks, invisible characters or Unicode normalisation")
    if not all(map(plain_form, names)):
        raise ValueError("names must contain a visible character")
    return names


def _trimmed(names: list[str]) -> list[str]:
    if any(name != name.strip() for name in names):
        raise ValueError("names must not begin or end with blanks")
    return names


def _below(name: str) -> str:
    if not stays_below(name):
        raise ValueError(
            "must be an installed package, a folder below the workspace, or a name on the Hugging Face hub; copy "
            "a folder from elsewhere into the workspace, since somebody else may have written its params.yaml"
        )
    return name


def _composed_keys(guide: dict[str, list[str]]) -> dict[str, list[str]]:
    return {composed(name): texts for name, texts in guide.items()}


class Meaning(_Section, frozen=True, kw_only=True):
    """What a class means: a description that annotators see too, and texts typical of it."""

    description: str = ""
    examples: list[str] = msgspec.field(default_factory=list)


class _Described(_Section, frozen=True, kw_only=True):
    """An entry of `schema.labels` that is more than a name."""

    name: _Name
    description: _Sentence | None = None
    examples: Annotated[list[_Example], Meta(max_length=20, description="texts")] = msgspec.field(default_factory=list)


class Schema(_Section, frozen=True, kw_only=True):
    """What annotators are asked: the question, its classes in the order shown, and the fields shown."""

    version: Annotated[int, Meta(ge=1)]
    question: Annotated[str, Meta(min_length=1, max_length=500)]
    labels: Annotated[list[_Name], Meta(min_length=2, max_length=200), _composed, _distinct, _trimmed]
    fields: Annotated[list[_Name], Meta(min_length=1, max_length=20), _composed, _distinct, _trimmed]
    meanings: dict[str, Meaning] = msgspec.field(default_factory=dict)
    """The meanings of those classes that have one. In the file they are part of `labels`, see `_split_meanings`."""


class Ingest(_Section, frozen=True, kw_only=True):
    """What may enter the pool, and the size of the test set."""

    test_size: Annotated[int, Meta(ge=0)]
    max_characters: Annotated[int, Meta(ge=1)]
    sources: list[str]
    """Files or patterns below the workspace. One that leads outside causes a warning at each tick, not an error."""
    text_column: _Name
    label_column: Annotated[str, Meta(max_length=100)]
    encoding: Annotated[str, Meta(max_length=100)] = ""


class Features(_Section, frozen=True, kw_only=True):
    """The features that the model gets from a text."""

    kind: Literal["encoder", "tfidf", "encoder+tfidf"]
    encoder: Annotated[str, Meta(min_length=1, max_length=500), _below]
    max_tokens: Annotated[int, Meta(ge=8, le=8192)]
    precision: Literal["auto", "float32", "bfloat16"]
    device: DeviceName = "cpu"

    @property
    def uses_encoder(self) -> bool:
        """Whether vectors of a frozen encoder are part of the features."""
        return self.kind != "tfidf"

    @property
    def uses_tfidf(self) -> bool:
        """Whether TF-IDF is part of the features."""
        return self.kind != "encoder"


class Finetune(_Section, frozen=True, kw_only=True):
    """How the encoder is trained if the model is `finetuned`."""

    epochs: Annotated[int, Meta(ge=1, le=100)] = 6
    batch_size: Annotated[int, Meta(ge=1, le=256)] = 16
    learning_rate: Annotated[float, Meta(gt=0, le=0.01)] = 1e-4
    passes: Annotated[int, Meta(ge=2, le=100)] = 10


class Train(_Section, frozen=True, kw_only=True):
    """How the classifier is fitted."""

    model: ModelChoice
    names: bool = False
    calibrate: bool
    weigh_by_confidence: bool = False
    finetune: Finetune = Finetune()


class Select(_Section, frozen=True, kw_only=True):
    """How the next batch is selected."""

    strategy: StrategyChoice
    cold_start: Literal["random", "typiclust", "kmeans", "core_set"] = "random"
    batch_size: BatchSize
    random_share: Annotated[float, Meta(ge=0, le=1)]
    shortlist: Annotated[int, Meta(ge=1)]
    max_similarity: Annotated[float, Meta(gt=0, le=1)] = 1.0
    names: bool = False
    cost: Literal["items", "seconds"] = "items"
    guide: Annotated[dict[_Name, _Phrases], Meta(max_length=200), _composed_keys] = msgspec.field(default_factory=dict)
    relabel: Annotated[float, Meta(ge=0, le=1)] | Literal["auto"] = 0.0


NEEDS_ENCODER = frozenset(
    {"badge", "cluster_margin", "core_set", "density", "herding", "kmeans", "relevance", "typiclust"}
)
"""Strategies that use the encoder's vectors."""


class Evaluate(_Section, frozen=True, kw_only=True):
    """How confidence intervals are computed."""

    bootstrap: Annotated[int, Meta(ge=100, le=100_000)]
    confidence: Annotated[float, Meta(gt=0.5, lt=1)]


class Gate(_Section, frozen=True, kw_only=True):
    """When a new model replaces the promoted one."""

    max_drop: Annotated[float, Meta(ge=0, le=1)]
    min_test_per_class: Annotated[int, Meta(ge=0)]
    traffic: bool = False


class Round(_Section, frozen=True, kw_only=True):
    """The size of a round, when it has enough answers to close, and when it closes anyway."""

    seed_size: Annotated[int, Meta(ge=1, le=100_000)]
    test_tasks: Annotated[int, Meta(ge=0, le=100_000)] = 40
    quorum: Annotated[float, Meta(gt=0, le=1)]
    deadline_days: Annotated[float, Meta(gt=0)]
    min_labels: Annotated[int, Meta(ge=0)]
    overlap: Annotated[int, Meta(ge=1, le=50)]
    max_overlap: Annotated[int, Meta(ge=1, le=50)] = 3


ConsensusName = Literal["majority", "dawid_skene", "crowdlab", "auto"]


class Labels(_Section, frozen=True, kw_only=True):
    """How several people's answers become one label, and how sure it has to be."""

    consensus: ConsensusName = "majority"
    min_confidence: Annotated[float, Meta(ge=0, lt=1)] = 0.0

    @property
    def uses_model(self) -> bool:
        """Whether a model's probabilities are part of the consensus."""
        return self.consensus != "majority"

    @property
    def have_confidence(self) -> bool:
        """Whether labels carry the probability that they are right."""
        return self.uses_model or self.min_confidence > 0


MAJORITY = Labels()
"""The section of a workspace whose `params.yaml` is older than it."""


class LabelStudio(_Section, frozen=True, kw_only=True):
    """How Label Studio is used. Its address and token are not parameters: see `al labelstudio --help`."""

    show_guess: bool
    timeout_seconds: Annotated[float, Meta(gt=0, le=3600)]
    max_vanished: Annotated[int, Meta(ge=0)]


class Schedule(_Section, frozen=True, kw_only=True):
    """When ticks run automatically, once a Prefect server has the schedule (`al up`, `al schedule apply`)."""

    cron: Annotated[str, Meta(max_length=200), check_cron]
    timezone: Annotated[str, Meta(max_length=100), check_timezone]
    active: bool


NO_SCHEDULE = Schedule(cron="0 * * * *", timezone="UTC", active=False)
"""The inactive schedule of a workspace whose `params.yaml` is older than schedules."""


class Engine(_Section, frozen=True, kw_only=True):
    """Where the pool is encoded. No stage depends on it, since it does not change a byte of their outputs."""

    runner: Literal["local", "dask", "ray"]


LOCAL = Engine(runner="local")
"""The engine of a workspace whose `params.yaml` is older than this section."""

Occasion = Literal[
    "round_full",
    "published",
    "held",
    "needs_person",
    "annotator_silent",
    "gold_accuracy_fell",
    "budget_nearly_spent",
    "drift_found",
]
"""What people can be told of."""


class Notify(_Section, frozen=True, kw_only=True):
    """What people are told. The services' addresses hold secrets and are no parameters: see `al notify --help`."""

    events: list[Occasion]
    silent_days: Annotated[float, Meta(gt=0, le=3650)]


SILENT = Notify(events=[], silent_days=5.0)
"""What is told in a workspace whose `params.yaml` is older than notifications: nothing."""


class Quality(_Section, frozen=True, kw_only=True):
    """How labels are checked by reviewers, and annotators by gold."""

    review_size: Annotated[int, Meta(ge=1, le=10_000)] = 20
    review_sample: Annotated[int, Meta(ge=0, le=100_000)] = 50
    review_each_tick: bool = False
    gold_share: Annotated[float, Meta(ge=0, le=0.5)] = 0.0
    min_gold: Annotated[float, Meta(ge=0, le=1)] = 0.7
    hold: bool = False


CHECKED = Quality()
"""The quality checks of a workspace whose `params.yaml` is older than this section."""


class Budget(_Section, frozen=True, kw_only=True):
    """What may be spent on answers; 0: no limit. Nothing new is asked past it."""

    labels: Annotated[int, Meta(ge=0, le=10**9)]
    hours: Annotated[float, Meta(ge=0, le=10**9)]
    money: Annotated[float, Meta(ge=0, le=10**12)]
    hourly_rate: Annotated[float, Meta(ge=0, le=10**6)]

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return self.labels > 0 or self.hours > 0 or self.money > 0


NO_BUDGET = Budget(labels=0, hours=0.0, money=0.0, hourly_rate=0.0)
"""The budget of a workspace whose `params.yaml` is older than budgets: none."""


def _redaction(name: str) -> str:
    if name and not _PLUGIN.fullmatch(name):
        raise ValueError("expected: package.module:function, plugins.NAME:function for a file of the workspace, or ''")
    return name


class ServeLog(_Section, frozen=True, kw_only=True):
    """Which requests `al serve` keeps, with their answers, and for how long."""

    share: Annotated[float, Meta(ge=0, le=1)]
    days: Annotated[float, Meta(gt=0, le=36_500)]
    max_mb: Annotated[float, Meta(ge=10, le=10_000_000)]
    redact: Annotated[str, Meta(max_length=200), _redaction]


NOT_LOGGED = ServeLog(share=0.0, days=90.0, max_mb=1000.0, redact="")
"""What is kept in a workspace whose `params.yaml` is older than this section: nothing."""


class Stop(_Section, frozen=True, kw_only=True):
    """When `al status` proposes to stop, and whether ticks then ask nothing new."""

    patience: Annotated[int, Meta(ge=1, le=100)]
    agreement: Annotated[float, Meta(gt=0, le=1)]
    target: Annotated[float, Meta(ge=0, lt=1)]
    predictions: Annotated[int, Meta(ge=0, le=10**12)] = 0
    error_price: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    action: Literal["propose", "pause"]


PROPOSE = Stop(patience=3, agreement=0.99, target=0.0, action="propose")
"""What a workspace does whose `params.yaml` is older than proposals."""


class Serve(_Section, frozen=True, kw_only=True):
    """How `al serve` answers requests. No round depends on it. Address and token are not parameters: see its help."""

    runtime: RuntimeName
    min_confidence: Annotated[float, Meta(ge=0, le=1)]
    batch_texts: Annotated[int, Meta(ge=1, le=10_000)]
    window_ms: Annotated[float, Meta(ge=0, le=1000)]
    queue_texts: Annotated[int, Meta(ge=1, le=1_000_000)]
    max_texts: Annotated[int, Meta(ge=1, le=1_000_000)]
    max_bytes: Annotated[int, Meta(ge=1000, le=1_000_000_000)]
    timeout_seconds: Annotated[float, Meta(gt=0, le=3600)]
    versions: Annotated[int, Meta(ge=1, le=100)]
    log: ServeLog = NOT_LOGGED


SERVE = Serve(
    runtime="torch", min_confidence=0.0, batch_texts=32, window_ms=2.0, queue_texts=2000, max_texts=1000,
    max_bytes=2_000_000, timeout_seconds=30.0, versions=3,
)  # fmt: skip
"""How a workspace is served whose `params.yaml` is older than this section."""


class Traffic(_Section, frozen=True, kw_only=True):
    """Which logged texts each tick takes into the pool (`serve.log`). What a round publishes does not depend on it."""

    random: Annotated[int, Meta(ge=0, le=100_000)]
    uncertain: Annotated[int, Meta(ge=0, le=100_000)]
    test: Annotated[int, Meta(ge=0, le=100_000)]
    novel: Annotated[int, Meta(ge=0, le=1000)] = 0


NO_TRAFFIC = Traffic(random=0, uncertain=0, test=0)
"""The section of a workspace whose `params.yaml` is older than it: no logged text enters the pool."""


class DriftLooks(_Section, frozen=True, kw_only=True):
    """How often ticks compare the newest kept requests with the pool. No round depends on it."""

    every_hours: Annotated[float, Meta(ge=0, le=8760)]


NO_DRIFT = DriftLooks(every_hours=0.0)
"""The section of a workspace whose `params.yaml` is older than it: ticks compare nothing."""


class Live(_Section, frozen=True, kw_only=True):
    """How questions are asked while people answer (`al live`). What a round publishes does not depend on it."""

    enabled: bool
    people: Annotated[int, Meta(ge=1, le=1000)]
    away_minutes: Annotated[float, Meta(gt=0, le=1440)]
    poll_seconds: Annotated[float, Meta(ge=0.1, le=60)]
    max_similarity: Annotated[float, Meta(gt=0, le=1)]


LIVE = Live(enabled=False, people=1, away_minutes=5.0, poll_seconds=1.0, max_similarity=0.95)
"""The section of a workspace whose `params.yaml` is older than it: questions are asked in batches."""


class Params(_Section, frozen=True, kw_only=True):
    """All of `params.yaml`."""

    version: Literal[1]
    seed: Annotated[int, Meta(ge=0, lt=2**32)]
    schema_: Schema = msgspec.field(name="schema")
    ingest: Ingest
    features: Features
    train: Train
    select: Select
    evaluate: Evaluate
    gate: Gate
    round: Round
    labels: Labels = MAJORITY
    label_studio: LabelStudio
    schedule: Schedule = NO_SCHEDULE
    engine: Engine = LOCAL
    quality: Quality = CHECKED
    notify: Notify = SILENT
    budget: Budget = NO_BUDGET
    stop: Stop = PROPOSE
    serve: Serve = SERVE
    traffic: Traffic = NO_TRAFFIC
    drift: DriftLooks = NO_DRIFT
    live: Live = LIVE
    annotators: list[_Name]
    reviewers: list[_Name] = msgspec.field(default_factory=list)


class AnswerCost(_Section, frozen=True, kw_only=True):
    """The expected seconds of an answer, by length and class: what `select` needs of `costs.seconds`."""

    base: Annotated[float, Meta(ge=-50, le=50)]
    """Logarithm of the mean seconds of an answer to a text of mean log-length, of a class without an effect."""
    slope: Annotated[float, Meta(ge=-50, le=50)]
    """Exponent of the length: 0, every text takes as long; 1, a text twice as long takes twice as long."""
    length: Annotated[float, Meta(ge=0, le=50)]
    """Mean of log(1 + characters)."""
    shortest: Annotated[float, Meta(ge=0, le=50)]
    longest: Annotated[float, Meta(ge=0, le=50)]
    """The range of log(1 + characters); outside it nothing is extrapolated."""
    classes: dict[str, float] = msgspec.field(default_factory=dict)
    """Effect of each class on the logarithm."""


class Overrides(_Section, frozen=True, kw_only=True):
    """Settings for a single batch that override `params.yaml`, and its requested items (`rounds/overrides.json`)."""

    round: Annotated[int, Meta(ge=0)]
    """The round that the batch is for."""
    size: BatchSize | None = None
    strategy: StrategyChoice | None = None
    interventions: Annotated[list[int], Meta(description="whole numbers")] = msgspec.field(default_factory=list)
    """The numbers of the interventions that the close applied."""
    ask: list[str] = msgspec.field(default_factory=list)
    """Items that people requested for the batch (`al ask`), in the order of the requests."""
    kept: list[str] = msgspec.field(default_factory=list)
    """Pool items that are asked already and stay in the batch because an intervention closed their round."""
    kept_test: list[str] = msgspec.field(default_factory=list)
    """The same for the test set."""
    cost: AnswerCost | None = None
    """What the answers took so far, if the batch is selected by `select.cost: seconds`."""

    def applied_to(self, select: Select) -> Select:
        """`select` with this batch's size and strategy, if they are set."""
        own = {"batch_size": self.size, "strategy": self.strategy}
        return replace(select, **{name: value for name, value in own.items() if value is not None})


class _Loader(SafeLoader):  # type: ignore[misc]
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
        values = read_yaml(text, _Loader, aliases=False)
    except yaml.YAMLError as error:
        raise BadParams(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadParams(f"{source} must contain keys and values, got {type(values).__name__}")
    try:
        values, meanings = _split_meanings(values, source)
        params = parse(Params, values, source)
        params = replace(params, schema_=replace(params.schema_, meanings=meanings)) if meanings else params
        _check_together(params, source)
    except ValueError as error:
        raise BadParams(str(error)) from None
    return params


def _split_meanings(values: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Meaning]]:
    """The values with plain names in `schema.labels`, and the meanings that its other entries give, by class.

    Raises ValueError naming the entries that are wrong.
    """
    schema = values.get("schema")
    if not isinstance(schema, dict):
        return values, {}
    if "meanings" in schema:
        raise ValueError(f"{source}: schema.meanings: no such key; remove it or fix its spelling")
    labels = schema.get("labels")
    if not isinstance(labels, list) or not any(isinstance(entry, dict) for entry in labels):
        return values, {}
    names, meanings, problems = [], {}, []
    for place, entry in enumerate(labels):
        if not isinstance(entry, dict):
            names.append(entry)
            continue
        try:
            found = parse(_Described, entry, f"{source}: schema.labels.{place}")
        except ValueError as error:
            problems.append(str(error))
            continue
        names.append(found.name)
        if found.description is not None or found.examples:
            meanings[composed(found.name)] = Meaning(description=found.description or "", examples=found.examples)
    if problems:
        raise ValueError("\n".join(problems))
    return {**values, "schema": {**schema, "labels": names}}, meanings


def recorded(params: Params) -> dict[str, Any]:
    """The parameters as a round's record has them: names of classes, consensus and reviews only where they are used.

    Whom a tick tells of what, what may be spent, how the model is served, what of its requests is kept and
    taken into the pool, and whether questions are asked live, is no part of a round.
    """
    row: dict[str, Any] = msgspec.to_builtins(params)
    del row["notify"], row["budget"], row["stop"], row["serve"], row["traffic"], row["drift"], row["live"]
    if params.select.cost == "items":
        del row["select"]["cost"]
    for section, key in (
        ("schema", "meanings"),
        ("train", "names"),
        ("train", "weigh_by_confidence"),
        ("select", "names"),
        ("select", "relabel"),
        ("gate", "traffic"),
    ):
        if not row[section][key]:
            del row[section][key]
    if params.labels == MAJORITY:
        del row["labels"], row["round"]["max_overlap"]
    if params.quality == CHECKED:
        del row["quality"]
    if not params.reviewers:
        del row["reviewers"]
    return row


def _check_together(params: Params, source: str) -> None:
    """Raise ValueError if a value does not fit that of another key."""
    if wrong := next(_contradictions(params), None):
        raise ValueError(f"{source}: {wrong}")


def _contradictions(params: Params) -> Iterator[str]:
    select, uses_encoder = params.select, params.features.uses_encoder
    if params.train.model == FINETUNED and not uses_encoder:
        yield "train.model 'finetuned' trains the encoder: it needs features.kind encoder or encoder+tfidf"
    if params.train.weigh_by_confidence and (params.train.model != "head" or params.train.names):
        yield "train.weigh_by_confidence needs train.model head, with train.names false"
    if params.train.weigh_by_confidence and not params.labels.have_confidence:
        yield "train.weigh_by_confidence needs confidences: set labels.consensus or labels.min_confidence"
    for section, on in (("train", params.train.names), ("select", select.names)):
        if on and not uses_encoder:
            yield f"{section}.names needs features.kind encoder or encoder+tfidf"
    for key in ("strategy", "cold_start"):
        if getattr(select, key) in NEEDS_ENCODER and not uses_encoder:
            yield f"select.{key} {getattr(select, key)!r} needs features.kind encoder or encoder+tfidf"
    if params.labels.min_confidence and params.round.max_overlap < params.round.overlap:
        yield (
            f"round.max_overlap {params.round.max_overlap} is below round.overlap {params.round.overlap}: with "
            "labels.min_confidence, it is the most people who answer a task"
        )
    if params.budget.money and not params.budget.hourly_rate:
        yield "budget.money needs budget.hourly_rate: an hour of answering costs that much"
    if params.serve.max_texts > params.serve.queue_texts:
        yield "serve.max_texts must not be more than serve.queue_texts: a request has to fit into the queue"
    if unknown := sorted(set(select.guide) - set(params.schema_.labels)):
        yield f"select.guide names {unknown[0]!r}, which is not a class in schema.labels"
    if empty := next((name for name, texts in select.guide.items() if not texts), None):
        yield f"select.guide.{empty} is empty; give it words or texts, or remove it"


def load_overrides(path: Path) -> Overrides:
    """The settings of the batch that the current build selects. Raises BadInput."""
    values = read_json(path)
    try:
        return parse(Overrides, with_present_names(values) if isinstance(values, dict) else values, str(path))
    except ValueError as error:
        raise BadInput(str(error)) from None


def check_overrides(size: int | None, strategy: str | None) -> None:
    """Raise UsageError, saying what is valid, if the size or the strategy of a batch is invalid."""
    try:
        parse(Overrides, {"round": 0, "size": size, "strategy": strategy}, "this round")
    except ValueError as error:
        raise UsageError(str(error)) from None


def is_class_name(text: str) -> bool:
    """Whether `schema.labels` takes this name."""
    try:
        msgspec.convert(text, _Name)
    except msgspec.ValidationError:
        return False
    return storable(text)
