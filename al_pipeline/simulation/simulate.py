"""Simulate a project on a labelled corpus: encode it once, run strategies over seeds, compare, write the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

import al_pipeline
from al_pipeline.active_learning.choice import AUTO, QueryConfig
from al_pipeline.active_learning.relabeling import Relabel
from al_pipeline.active_learning.strategies import COLD_STARTS, STRATEGIES
from al_pipeline.errors import UsageError
from al_pipeline.evaluation.savings import Comparison, compare
from al_pipeline.features.encoder import install_encoder, installed_source
from al_pipeline.features.names import class_prototypes
from al_pipeline.features.shards import digest_rows
from al_pipeline.features.vectors import Vectors, guide_vectors
from al_pipeline.files import remove_leftovers, sha256_bytes, sha256_file, write_bytes, write_json, write_text
from al_pipeline.models.estimators import HEAD
from al_pipeline.params import FINETUNED, AnswerCost, Features, Params, plugins_of
from al_pipeline.records import CPU, RANDOM
from al_pipeline.simulation.annotators import NoiseKind, Team
from al_pipeline.simulation.corpus import LabeledTexts
from al_pipeline.simulation.finish import finish_figures
from al_pipeline.simulation.hours import hours_figures
from al_pipeline.simulation.live import LIVE, LiveWork, live_arms, live_figures
from al_pipeline.simulation.page import pictures, render
from al_pipeline.simulation.runs import AGAIN, FULL, METRICS, OVERLAP, WITHOUT, Run, Work, read_run, run_all
from al_pipeline.simulation.team import team_figures
from al_pipeline.workspace.fingerprint import current_engine
from al_pipeline.workspace.layout import Layout

FORMAT = "al-simulation/1"
TEST_SHARE = 5
LARGEST_TEST = 5000
FEW_POSITIVES = 20
"""Number of test items of a class below which the page warns that its metrics are noisy."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a simulation. None means the value of the parameters (`test_size`: a fifth)."""

    strategies: tuple[str, ...] = ("random", "margin")
    seeds: int = 10
    budget: int = 1000
    batch_size: int | None = None
    seed_size: int | None = None
    cold_start: str | None = None
    guide: Mapping[str, Sequence[str]] | None = None
    names: bool | None = None
    """Use the names of the classes in training and in the search for rare classes, and compare with runs without."""
    test_size: int | None = None
    annotators: int | None = None
    """Annotators who make mistakes; None: everybody is always right."""
    noise: float = 0.2
    noise_kind: NoiseKind = "uniform"
    overlap: int = 1
    """People who answer each item in the runs that are compared with one answer each; 1: no such runs."""
    relabel: Relabel | None = None
    """Largest share of labels that is asked again in the runs compared with none; None: that of the parameters."""
    live: int | None = None
    """People at work in runs whose questions are asked live, which are compared with batches; None: no such runs."""
    finish: float | None = None
    """The error rate at which the model may label the rest of the pool at the end; None: not simulated."""
    cost: AnswerCost | None = None
    """What an answer takes, by which savings are told in hours too; None: they are not."""
    workers: int = 1
    root: Path = Path()
    """The workspace in which plug-ins are looked for."""


@dataclass(frozen=True)
class Simulation:
    """The results of a simulation, and the folder that holds them."""

    folder: Path
    result: Mapping[str, Any]
    """The content of `result.json`, which `al simulate --json` prints."""
    done: int
    """Number of runs computed by this call."""


def simulate(
    texts: LabeledTexts,
    name: str,
    params: Params,
    options: Options,
    out: Path,
    vectors: Vectors | None,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Replay `texts` with every strategy and seed, and compare. Raises UsageError for options that do not fit.

    `vectors` are those of `params.features` (None for TF-IDF alone). The seeds are that of `params` and the following
    ones. Repeating a call computes only what is missing in `out`.
    """
    work = make_work(texts, params, options, vectors)
    settings = _settings(texts, params, work, vectors)
    folder = out / f"{name}-{sha256_bytes(json.dumps(settings, sort_keys=True).encode())[:12]}"
    seeds = range(params.seed, params.seed + options.seeds)
    plain = tuple(f"{strategy}{WITHOUT}" for strategy in options.strategies if strategy != RANDOM)
    arms = (RANDOM, *options.strategies, *(plain if work.prototypes is not None else ()))
    several = _team_arms(arms, work, _relabel(params, options), options.overlap)
    strategies = dict.fromkeys([*arms, *several, *_live_arms(options)])
    runs: list[Run] = [(arm, seed) for seed in seeds for arm in (FULL, *strategies)]
    remove_leftovers(folder, folder / "runs")
    write_json(folder / "settings.json", settings)
    done = run_all(work, runs, folder, options.workers, progress)
    found = {run: read_run(folder, run) or {} for run in runs}
    result = _result(texts, name, params, work, list(strategies), list(seeds), found, options.cost)
    write_json(folder / "result.json", result)
    for file, png in pictures(result).items():
        write_bytes(folder / file, png)
    write_text(folder / "report.html", render(result))
    return Simulation(folder, result, done)


def _relabel(params: Params, options: Options) -> Relabel:
    """The share of labels that is asked again. Raises UsageError for one that is none, or if nobody makes mistakes."""
    relabel = params.select.relabel if options.relabel is None else options.relabel
    if relabel != "auto" and not 0 <= relabel <= 1:
        raise UsageError(f"--relabel takes a share from 0 to 1, or auto, got {relabel:g}")
    if options.annotators is None:
        if options.overlap > 1 or options.relabel:
            raise UsageError("--overlap and --relabel are for annotators who make mistakes: give --annotators too")
        return 0.0
    if options.overlap > options.annotators:
        raise UsageError(f"--overlap {options.overlap} needs as many --annotators, got {options.annotators}")
    if options.relabel and options.annotators < 2:
        raise UsageError("--relabel needs --annotators 2 or more: one person's second answer tells nothing new")
    return relabel if options.annotators > 1 else 0.0


def _team_arms(arms: Sequence[str], work: Work, relabel: Relabel, overlap: int) -> list[str]:
    """The runs in which several people answer each item, or in which labels are asked again."""
    if work.team is None:
        return []
    several = [f"{arm}{OVERLAP}{overlap}" for arm in arms if overlap > 1]
    return several + [
        f"{arm}{AGAIN}{relabel if relabel == 'auto' else format(relabel, 'g')}" for arm in arms if relabel
    ]


def _live_arms(options: Options) -> list[str]:
    """The runs in which questions are asked live. Raises UsageError if that cannot be simulated."""
    if options.live is None:
        return []
    if options.live < 1:
        raise UsageError(f"--people takes a number from 1, got {options.live}")
    if options.annotators is not None:
        raise UsageError("--live and --annotators do not go together: live questions are simulated with true labels")
    found = live_arms(options.strategies)
    if not found:
        raise UsageError("--live needs a strategy other than random to compare with")
    return list(found.values())


def corpus_vectors(texts: LabeledTexts, features: Features, home: Path, workspace: Layout | None) -> Vectors | None:
    """The encoder's vectors for `texts`, encoded if the cache lacks them; None if the features are TF-IDF alone.

    Uses the encoder and cache of `workspace` if its encoder is the requested one, else those below `home`.
    """
    if not features.uses_encoder:
        return None
    encoder, cache = home / "encoders" / sha256_bytes(features.encoder.encode())[:12], home / "features"
    if workspace is not None and installed_source(workspace.encoder) == features.encoder:
        encoder, cache = workspace.encoder, workspace.features
    elif installed_source(encoder) != features.encoder:
        install_encoder(features.encoder, encoder)
    vectors = Vectors(encoder, cache, features)
    if missing := vectors.missing([digest_rows([item.content_hash for item in texts.items])]):
        vectors.prepare(((item.content_hash, item.text) for item in texts.items), missing)
    return vectors


def make_work(texts: LabeledTexts, params: Params, options: Options, vectors: Vectors | None) -> Work:
    """The inputs that all runs of a simulation share. Raises UsageError for options that do not fit."""
    classifier = HEAD if params.train.model == FINETUNED else params.train.model
    named = [plugin for strategy in options.strategies if ":" in strategy for plugin in plugins_of(strategy=strategy)]
    plugins = (*plugins_of(classifier), *named)
    if plugins:
        from al_pipeline.plugins.use import use

        use(plugins, options.root)
    known = [*STRATEGIES, AUTO]
    if options.finish is not None and not 0 < options.finish < 1:
        raise UsageError(f"--finish takes an error rate above 0 and below 1, got {options.finish:g}")
    for strategy in options.strategies:
        if strategy not in known:
            raise UsageError(f"unknown query strategy {strategy!r}; choose from {', '.join(sorted(known))}")
    dense = None if vectors is None else vectors.of(texts.items)
    knobs = msgspec.structs.asdict(params.select)
    knobs |= {
        key: value
        for key in ("batch_size", "cold_start", "guide", "names")
        if (value := getattr(options, key)) is not None
    }
    config = QueryConfig(params.seed, options.seed_size or params.round.seed_size, **knobs | {"relabel": 0.0})
    team = None
    if options.annotators is not None:
        team = Team(annotators=options.annotators, noise=options.noise, kind=options.noise_kind)
        team.check(len(texts.classes))
    if unknown := sorted(set(config.guide) - set(texts.classes)):
        raise UsageError(
            f"the guide names {unknown[0]!r}, but the classes of the corpus are {', '.join(texts.classes)}"
        )
    for strategy in (*options.strategies, config.cold_start):
        if dense is None and strategy in STRATEGIES and "vectors" in STRATEGIES[strategy].needs:
            raise UsageError(f"strategy {strategy!r} needs vectors: use --features encoder or encoder+tfidf")
    if config.cold_start not in COLD_STARTS:
        raise UsageError(f"--cold-start {config.cold_start} needs a model; use {' or '.join(COLD_STARTS)}")
    rounds = (options.budget - config.seed_size) // config.batch_size
    if rounds < 1:
        raise UsageError(
            f"a budget of {options.budget} {unit_of(team)} is too small for a round after a seed round of "
            f"{config.seed_size} with batches of {config.batch_size}: raise --budget, or lower --seed-size or "
            "--batch-size"
        )
    size = min(LARGEST_TEST, len(texts.items) // TEST_SHARE) if options.test_size is None else options.test_size
    guide = {name: guide_vectors(vectors, phrases) for name, phrases in config.guide.items()}
    train = params.train.names if options.names is None else options.names
    prototypes = None
    if train or config.names:
        if vectors is None:
            raise UsageError("the names of classes need vectors: use --features encoder or encoder+tfidf")
        prototypes = class_prototypes(vectors, texts.classes, params.schema_.meanings)
    live = None if options.live is None else LiveWork(options.live, params.live.max_similarity)
    return Work(
        texts, dense, params.features.uses_tfidf, params.train.calibrate, config, rounds, size, guide, classifier,
        plugins, options.root, prototypes, train, team, params.labels, live, options.finish,
    )  # fmt: skip


def unit_of(team: Team | None) -> str:
    """What a budget counts: labels, or answers where an item can have several."""
    return "labels" if team is None else "answers"


def _settings(texts: LabeledTexts, params: Params, work: Work, vectors: Vectors | None) -> dict[str, Any]:
    """Everything on which a run depends besides strategy and seed; its digest names the folder."""
    return {
        "format": FORMAT,
        "corpus": texts.digest,
        "classes": list(texts.classes),
        "features": msgspec.structs.asdict(params.features),
        "encoder": None if vectors is None else vectors.identity,
        "calibrate": work.calibrate,
        "classifier": work.classifier,
        **_names(work, params),
        "asking": {
            key: value for key, value in asdict(work.config).items() if key not in ("seed", "strategy", "relabel")
        },
        **({} if work.team is None else {"team": asdict(work.team) | {"consensus": work.labels.consensus}}),
        **({} if work.live is None else {"live": asdict(work.live) | {"code": _live_sources()}}),
        **({} if work.finish is None else {"finish": work.finish}),
        "rounds": work.rounds,
        "test_size": work.test_size,
        "engine": current_engine(CPU if vectors is None else vectors.device) | {"simulation": _own_sources()},
        **_plugin_sources(work),
    }


def _plugin_sources(work: Work) -> dict[str, Any]:
    if not work.plugins:
        return {}
    from al_pipeline.plugins.references import record

    return {"plugins": record(work.plugins, work.root)}


def _names(work: Work, params: Params) -> dict[str, Any]:
    """The settings that concern the names of classes; none if the runs do not use them."""
    if work.prototypes is None:
        return {}
    meanings = {
        name: msgspec.to_builtins(meaning)
        for name, meaning in sorted(params.schema_.meanings.items())
        if name in work.texts.classes
    }
    return {"names": {"train": work.names_train, "meanings": meanings}}


def _own_sources() -> str:
    """A digest of the code that runs depend on and that is not part of the stages."""
    package = Path(al_pipeline.__file__).parent
    digest = hashlib.sha256()
    for name in (
        "data/catalog.py",
        *(f"simulation/{name}.py" for name in ("annotators", "corpus", "finish", "replay", "runs")),
    ):
        digest.update(sha256_file(package / name).encode())
    return digest.hexdigest()


def _live_sources() -> str:
    """A digest of the code that live runs depend on besides."""
    package = Path(al_pipeline.__file__).parent
    digest = hashlib.sha256()
    for name in ("simulation/live.py", *(f"live/{name}.py" for name in ("asker", "model", "queue", "queue_size"))):
        digest.update(sha256_file(package / name).encode())
    return digest.hexdigest()


def _result(
    texts: LabeledTexts,
    name: str,
    params: Params,
    work: Work,
    strategies: Sequence[str],
    seeds: Sequence[int],
    found: Mapping[Run, Mapping[str, Any]],
    cost: AnswerCost | None = None,
) -> dict[str, Any]:
    """The content of `result.json`, which the page shows and `--json` prints."""
    metric = "average_precision" if texts.positive else "macro_f1"
    hours = {} if cost is None else hours_figures(texts, cost, strategies, seeds, found, metric)
    found = _on_one_grid(found, strategies, seeds)
    budgets = found[strategies[0], seeds[0]]["budgets"]
    compared = {}
    for figure in ("macro_f1", "average_precision") if texts.positive else ("macro_f1",):
        curves = {arm: table([found[arm, seed][figure] for seed in seeds]) for arm in strategies}
        full = table([found[FULL, seed][figure] for seed in seeds])
        compared[figure] = to_row(compare(budgets, curves, full, np.random.default_rng(0)))
    sizes = {
        "texts": len(texts.items),
        "test": found[FULL, seeds[0]] and len(texts.items) - found[FULL, seeds[0]]["labels"],
    }
    return {
        "corpus": {"name": name, **sizes, "classes": texts.counts, "left_out": dict(texts.left_out)},
        "warnings": [*_stand_in(params), *_warnings(texts, work, budgets)],
        "settings": {
            "features": ("encoder" if work.dense is not None else "") + ("+tfidf" if work.uses_tfidf else ""),
            **{key: value for key, value in asdict(work.config).items() if key not in ("seed", "strategy", "relabel")},
            **({} if work.team is None else asdict(work.team)),
        },
        "unit": unit_of(work.team),
        **({} if work.team is None else {"team": team_figures(work.team, strategies, seeds, found, metric)}),
        **_live(work, strategies, seeds, found, metric, budgets),
        **hours,
        **({} if work.finish is None else {"finish": _finish(work.finish, strategies, seeds, found)}),
        "seeds": list(seeds),
        "budgets": budgets,
        "strategies": list(strategies),
        "metric": metric,
        "positive": texts.positive,
        **{key: compared[metric][key] for key in ("savings", "savings_interval", "area", "area_interval")},
        "metrics": compared,
        "choices": {arm: _choices(found[arm, seeds[0]]["choices"], budgets) for arm in strategies},
        "found": {
            arm: {label: _mean([found[arm, seed]["found"][label] for seed in seeds]) for label in texts.classes}
            for arm in strategies
        },
        "seconds": round(sum(row.get("seconds", 0.0) for row in found.values()), 1),
    }


def _live(
    work: Work,
    strategies: Sequence[str],
    seeds: Sequence[int],
    found: Mapping[Run, Mapping[str, Any]],
    metric: str,
    budgets: Sequence[int],
) -> dict[str, Any]:
    """What live questions save, if there are live runs."""
    if work.live is None:
        return {}
    curves = {arm: table([found[arm, seed][metric] for seed in seeds]) for arm in strategies}
    full = table([found[FULL, seed][metric] for seed in seeds])
    plain = [arm for arm in strategies if live_arms([arm]).get(arm) in curves and not arm.endswith((LIVE, WITHOUT))]
    return {"live": live_figures(budgets, curves, full, plain, work.live)}


def _finish(
    bound: float, strategies: Sequence[str], seeds: Sequence[int], found: Mapping[Run, Mapping[str, Any]]
) -> dict[str, Any]:
    return finish_figures(
        bound, strategies, {arm: [found[arm, seed]["finish"] for seed in seeds] for arm in strategies}
    )


def _on_one_grid(found: Mapping[Run, Mapping[str, Any]], arms: Sequence[str], seeds: Sequence[int]) -> dict[Run, Any]:
    """The runs with their figures at the budgets of the first arm: several answers per item do not add up to the same.

    Figures between two budgets are interpolated, and the first and the last one hold for a whole batch beyond.
    """
    grid = found[arms[0], seeds[0]]["budgets"]
    told = dict(found)
    for run, row in found.items():
        if run[0] in arms and row["budgets"] != grid:
            told[run] = (
                {**row, "budgets": grid}
                | {
                    key: _interpolated(row["budgets"], row[key], grid)
                    for key in (*METRICS, "labels", "right", "again")
                    if key in row
                }
                | {"found": {name: _interpolated(row["budgets"], row["found"][name], grid) for name in row["found"]}}
            )
    return told


def _interpolated(budgets: Sequence[int], values: Sequence[float | None], grid: Sequence[int]) -> list[float | None]:
    """`values` at `budgets` at the points of `grid`; None more than a batch beyond the last."""
    points, own = np.asarray(budgets, np.float64), np.array([np.nan if v is None else v for v in values], np.float64)
    most = points[-1] + (np.diff(points).max() if len(points) > 1 else points[0])
    made = np.where(np.asarray(grid) <= most, np.interp(grid, points, own), np.nan)
    return [None if np.isnan(value) else float(value) for value in made]


def to_row(comparison: Comparison) -> dict[str, Any]:
    """A comparison as a JSON object: each figure by strategy; savings also by share of the full-data score."""
    arms = comparison.arms
    return {
        "full": comparison.full.value,
        "full_interval": [comparison.full.low, comparison.full.high],
        "curves": {name: [[p.value, p.low, p.high] for p in arm.curve] for name, arm in arms.items()},
        "area": {name: arm.area.value for name, arm in arms.items()},
        "area_interval": {name: [arm.area.low, arm.area.high] for name, arm in arms.items()},
        "gain": {name: arm.gain.value for name, arm in arms.items()},
        "gain_interval": {name: [arm.gain.low, arm.gain.high] for name, arm in arms.items()},
        "labels_needed": {name: {str(s): one.labels for s, one in arm.savings.items()} for name, arm in arms.items()},
        "savings": {name: {str(s): one.saving.value for s, one in arm.savings.items()} for name, arm in arms.items()},
        "savings_interval": {
            name: {str(s): [one.saving.low, one.saving.high] for s, one in arm.savings.items()}
            for name, arm in arms.items()
        },
        "savings_at_least": {
            name: {str(s): one.at_least for s, one in arm.savings.items()} for name, arm in arms.items()
        },
        "wins": {name: dict(arm.wins) for name, arm in arms.items()},
        "below_random": {name: list(arm.below_random) for name, arm in arms.items()},
    }


def table(rows: Sequence[Any]) -> NDArray[np.float64]:
    """The values of all seeds as an array, (seeds,) or (seeds, budgets); NaN where undefined."""
    return np.array(
        [
            [np.nan if v is None else v for v in row] if isinstance(row, list) else np.nan if row is None else row
            for row in rows
        ],
        dtype=np.float64,
    )


def _mean(rows: Sequence[Sequence[int]]) -> list[float]:
    return [float(value) for value in np.mean(rows, axis=0)]


def _choices(choices: Sequence[Mapping[str, str]], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """The strategies used in the first seed, each up to which number of labels and why; one row per change."""
    rows: list[dict[str, Any]] = []
    for choice, labels in zip(choices, budgets, strict=True):
        if rows and rows[-1]["strategy"] == choice["strategy"]:
            rows[-1]["labels"] = labels
        else:
            rows.append({"strategy": choice["strategy"], "reason": choice["reason"], "labels": labels})
    return rows


def _warnings(texts: LabeledTexts, work: Work, budgets: Sequence[int]) -> list[str]:
    """Warnings about the reliability of the metrics."""
    said = []
    share = min(work.test_size / len(texts.items), 1 / TEST_SHARE)
    rare = [
        f"{label} ({round(expected)})"
        for label, n in texts.counts.items()
        if 0 < (expected := n * share) < FEW_POSITIVES
    ]
    if rare:
        said.append(
            f"each seed has few test items of {', '.join(rare)}: metrics of such a class vary by chance, and "
            "intervals are wide"
        )
    planned = work.config.seed_size + work.rounds * work.config.batch_size
    if budgets[-1] < planned:
        said.append(f"the pool is exhausted at {budgets[-1]:,} {unit_of(work.team)}, before the budget of {planned:,}")
    return said


def _stand_in(params: Params) -> list[str]:
    """A warning if the simulated model is not the workspace's."""
    if params.train.model != FINETUNED:
        return []
    return [
        "the model is the linear head on frozen features: the fine-tuned model of params.yaml would have to be "
        "trained in every round of every run"
    ]


def with_features(params: Params, kind: str) -> Params:
    """The parameters with another kind of features. Raises UsageError if there is no such kind."""
    if kind not in ("encoder", "tfidf", "encoder+tfidf"):
        raise UsageError(f"unknown features {kind!r}; use encoder, tfidf or encoder+tfidf")
    return replace(params, features=replace(params.features, kind=kind))
