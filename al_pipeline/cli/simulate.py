"""`al simulate`: how many labels active learning would save on a labelled corpus."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from al_pipeline.cli.options import Encoding, InputFormat, Invocation, Json, TextColumn, current_workspace, parse_list
from al_pipeline.cli.output import echo, escape, print_json, print_table, progress_bar, warn
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.params import AnswerCost, Params
    from al_pipeline.simulation.annotators import NoiseKind
    from al_pipeline.simulation.corpus import LabeledTexts
    from al_pipeline.simulation.simulate import Options, Simulation
    from al_pipeline.workspace.layout import Layout

_LONGEST_ANSWER = 86_400

# The corpus and its samples.
Corpus = Annotated[
    Path, typer.Argument(metavar="CORPUS", help="CSV, JSONL, Parquet or XLSX with texts and labels, a folder, or -.")
]
LabelColumn = Annotated[str, typer.Option(help="Column with the label.")]
Limit = Annotated[int, typer.Option(min=50, help="Size of the random sample taken from a larger corpus.")]
TestSize = Annotated[
    int | None, typer.Option(min=1, help="Size of the test set, at most a fifth. Default: a fifth, at most 5,000.")
]
Features = Annotated[
    str | None, typer.Option(help="encoder, tfidf or encoder+tfidf. Default: features.kind in params.yaml.")
]

# The rounds.
Strategies = Annotated[str, typer.Option(help="Comma-separated query strategies.")]
Seeds = Annotated[int, typer.Option(min=1, help="Repetitions, each with its own test set and seed round.")]
Budget = Annotated[int, typer.Option(min=1, help="Number of labels that each run may use.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Labels per round. Default: select.batch_size in params.yaml.")
]
SeedSize = Annotated[
    int | None, typer.Option(min=1, help="Labels in the seed round. Default: round.seed_size in params.yaml.")
]
ColdStart = Annotated[
    str | None, typer.Option(help="Query strategy of the seed round. Default: select.cold_start in params.yaml.")
]
Guide = Annotated[
    list[str] | None,
    typer.Option(help='Keywords of a rare class: spam="free money,act now"; may be repeated for other classes.'),
]
Names = Annotated[
    bool | None,
    typer.Option(
        help="Use the names and descriptions of the classes, and compare with runs without them. Default: "
        "train.names and select.names in params.yaml."
    ),
]

# Annotators who make mistakes.
Annotators = Annotated[
    int | None, typer.Option(min=1, help="Simulate this many annotators who make mistakes; --budget counts answers.")
]
Noise = Annotated[float, typer.Option(help="With --annotators: mean share of wrong answers.")]
NoiseKindName = Annotated[
    str,
    typer.Option(
        help="With --annotators: uniform (errors fall evenly on the other classes), confusable (they name the most "
        "similar class) or careless-person (one person makes most of them)."
    ),
]
Overlap = Annotated[
    int, typer.Option(min=1, help="With --annotators: also let this many people answer each item, at equal answers.")
]
RelabelShare = Annotated[
    str | None,
    typer.Option(
        help="With --annotators: also ask doubtful labels again, at most this share of each batch, or auto; 0: not. "
        "Default: select.relabel in params.yaml."
    ),
]

# Live questions.
Live = Annotated[
    bool,
    typer.Option(
        "--live", help="Also ask live, by a model updated at each answer, and show what that saves against batches."
    ),
]
People = Annotated[
    int | None, typer.Option(min=1, help="With --live: people at work. Default: live.people in params.yaml.")
]
Finish = Annotated[
    float | None,
    typer.Option(
        help="Also tell what `al finish --bound` would label at the end of each run, and how much of it is wrong."
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Seconds of an answer, to tell savings in hours too. Default: predicted from the workspace's answers, if "
        "30 of them or more have a time."
    ),
]

# The run.
Workers = Annotated[
    int | None, typer.Option(min=1, help="Number of processes, one core each. Default: the number of cores.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Output folder. Default: simulations/; in a workspace, in its reports/."),
]


def simulate(
    corpus: Corpus,
    strategies: Strategies = "random,margin,auto",
    seeds: Seeds = 10,
    budget: Budget = 1000,
    annotators: Annotators = None,
    noise: Noise = 0.2,
    noise_kind: NoiseKindName = "uniform",
    overlap: Overlap = 1,
    relabel: RelabelShare = None,
    live: Live = False,
    people: People = None,
    finish: Finish = None,
    seconds: Seconds = None,
    batch_size: BatchSize = None,
    seed_size: SeedSize = None,
    cold_start: ColdStart = None,
    guide: Guide = None,
    names: Names = None,
    features: Features = None,
    test_size: TestSize = None,
    limit: Limit = 20_000,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    workers: Workers = None,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Estimate on a labelled corpus how many labels active learning would save, before spending anything.

    Rounds run in this process, with the functions that the pipeline's stages call: no git, no Label Studio, no Prefect.

    With --live, questions are also asked one at a time, as `al live` does: two more than there are people at work are \
open. The table shows what that saves against batches, also where it is nothing.

    With --annotators people make mistakes; --overlap and --relabel show what more answers per item are worth.

    Inside a workspace its params.yaml is used, otherwise the template's. A repeated call computes only what is missing.
    """
    from al_pipeline.simulation.corpus import read_corpus
    from al_pipeline.simulation.simulate import Options

    layout, params = _current_params(features)
    with progress_bar("reading", not as_json) as on_progress:
        texts = read_corpus(
            corpus, text_column, label_column, limit, params.seed, params.schema_.labels, on_progress,
            max_characters=params.ingest.max_characters, format=input_format, encoding=encoding, on_note=warn,
        )  # fmt: skip
    asked = tuple(name.strip() for name in strategies.split(",") if name.strip())
    options = Options(
        strategies=asked, seeds=seeds, budget=budget, batch_size=batch_size, seed_size=seed_size,
        cold_start=cold_start, guide=_parse_guide(guide) if guide else None, names=names,
        test_size=test_size, workers=workers or _core_count(), annotators=annotators, noise=noise,
        noise_kind=cast("NoiseKind", noise_kind), overlap=overlap,
        relabel=None if relabel is None else _parse_relabel(relabel), finish=finish,
        live=_people(live, people, params), cost=_cost(seconds, layout),
        root=Path() if layout is None else layout.root,
    )  # fmt: skip
    out = out or (Path("simulations") if layout is None else layout.reports / "simulations")
    name = "stdin" if str(corpus) == "-" else corpus.resolve().stem
    _show(_run(texts, name, params, options, out, layout, visible=not as_json), as_json)


def _run(
    texts: LabeledTexts, name: str, params: Params, options: Options, out: Path, layout: Layout | None, visible: bool
) -> Simulation:
    from al_pipeline.simulation.simulate import corpus_vectors
    from al_pipeline.simulation.simulate import simulate as run
    from al_pipeline.workspace.home import al_home

    vectors = corpus_vectors(texts, params.features, al_home() / "simulate", layout)
    with progress_bar("simulating", visible) as on_progress:
        return run(texts, name, params, options, out, vectors, on_progress)


def _current_params(features: str | None) -> tuple[Layout | None, Params]:
    """The layout of the current workspace, if there is one, and the parameters for a simulation with `features`."""
    from al_pipeline.params import parse_params
    from al_pipeline.simulation.simulate import with_features
    from al_pipeline.workspace.trust import template
    from al_pipeline.workspace.workspace import in_workspace

    if Invocation.folder is None and not in_workspace():
        layout, params = None, parse_params(template("params.yaml"))
    else:
        workspace = current_workspace()
        layout, params = workspace.layout, workspace.params
    return layout, params if features is None else with_features(params, features)


def _parse_guide(words: list[str]) -> dict[str, list[str]]:
    """Parse `spam=free money,act now`: keywords by class. Raises UsageError."""
    found = {}
    for word in words:
        name, _, phrases = word.partition("=")
        found[name.strip()] = [phrase for phrase in parse_list(phrases, "--guide") if phrase]
        if not name.strip() or not found[name.strip()]:
            raise UsageError(f"--guide {word!r} is not of the form CLASS=keywords,more keywords")
    return found


def _parse_relabel(text: str) -> float | Literal["auto"]:
    """Parse a share, or auto. Raises UsageError."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--relabel takes a share from 0 to 1, or auto, got {text!r}") from None


def _people(live: bool, people: int | None, params: Params) -> int | None:
    """The people at work in live runs; None without such runs. Raises UsageError."""
    if not live and people is not None:
        raise UsageError("--people is for live questions: give --live too")
    return (people or params.live.people) if live else None


def _cost(seconds: float | None, layout: Layout | None) -> AnswerCost | None:
    """What an answer takes; None if nothing is known of it. Raises UsageError."""
    from al_pipeline.simulation.hours import same_seconds

    if seconds is not None:
        if not 0 < seconds <= _LONGEST_ANSWER:
            raise UsageError(f"--seconds takes the seconds of an answer, up to {_LONGEST_ANSWER:,}, got {seconds:g}")
        return same_seconds(seconds)
    if layout is None:
        return None
    from al_pipeline.operations.costs import answer_cost

    return answer_cost(layout)


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show(done: Simulation, as_json: bool) -> None:
    from al_pipeline.simulation.page import hours_table, live_table, names_tables, summary, table, team_table

    if as_json:
        return print_json({**done.result, "folder": str(done.folder), "report": str(done.folder / "report.html")})
    told = (hours_table(done.result), team_table(done.result), live_table(done.result))
    others = [one for one in told if one is not None]
    for name, header, rows in [*table(done.result), *names_tables(done.result), *others]:
        echo(f"[bold]{escape(name)}[/]")
        print_table(header, rows)
    for sentence in summary(done.result):
        echo(escape(sentence))
    for warning in done.result["warnings"]:
        echo(f"[yellow]{escape(warning)}[/]")
    echo(f"Report: [bold]{escape(done.folder / 'report.html')}[/]")
