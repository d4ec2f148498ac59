"""`al simulate`: how many labels active learning would save on a labelled corpus."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Encoding, InputFormat, Invocation, Json, TextColumn, current_workspace, parse_list
from al_pipeline.cli.output import echo, escape, print_json, print_table, progress_bar, warn
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.params import Params
    from al_pipeline.simulation.simulate import Simulation
    from al_pipeline.workspace.layout import Layout


def simulate(
    corpus: Annotated[
        Path,
        typer.Argument(metavar="CORPUS", help="CSV, JSONL, Parquet or XLSX with texts and labels, a folder, or -."),
    ],
    strategies: Annotated[str, typer.Option(help="Comma-separated query strategies.")] = "random,margin,auto",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with its own test set and seed round.")] = 10,
    budget: Annotated[int, typer.Option(min=1, help="Number of labels that each run may use.")] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Labels per round. Default: select.batch_size in params.yaml.")
    ] = None,
    seed_size: Annotated[
        int | None, typer.Option(min=1, help="Labels in the seed round. Default: round.seed_size in params.yaml.")
    ] = None,
    cold_start: Annotated[
        str | None, typer.Option(help="Query strategy of the seed round. Default: select.cold_start in params.yaml.")
    ] = None,
    guide: Annotated[
        list[str] | None,
        typer.Option(help='Keywords of a rare class: spam="free money,act now"; may be repeated for other classes.'),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="encoder, tfidf or encoder+tfidf. Default: features.kind in params.yaml.")
    ] = None,
    test_size: Annotated[
        int | None, typer.Option(min=1, help="Size of the test set, at most a fifth. Default: a fifth, at most 5,000.")
    ] = None,
    limit: Annotated[int, typer.Option(min=50, help="Size of the random sample taken from a larger corpus.")] = 20_000,
    text_column: TextColumn = "text",
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes, one core each. Default: the number of cores.")
    ] = None,
    encoding: Encoding = None,
    input_format: InputFormat = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder. Default: simulations/; in a workspace, in its reports/."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate on a labelled corpus how many labels active learning would save, before spending anything.

    Rounds run in this process, with the functions that the pipeline's stages call: no git, no Label Studio, no Prefect.

    Inside a workspace its params.yaml is used, otherwise the template's. A repeated call computes only what is missing.
    """
    from al_pipeline.simulation.corpus import read_corpus
    from al_pipeline.simulation.simulate import Options, corpus_vectors, with_features
    from al_pipeline.simulation.simulate import simulate as run
    from al_pipeline.workspace.home import al_home

    layout, params = _current_params()
    if features is not None:
        params = with_features(params, features)
    with progress_bar("reading", not as_json) as on_progress:
        texts = read_corpus(
            corpus, text_column, label_column, limit, params.seed, params.schema_.labels, on_progress,
            max_characters=params.ingest.max_characters, format=input_format, encoding=encoding, on_note=warn,
        )  # fmt: skip
    out = out or (Path("simulations") if layout is None else layout.reports / "simulations")
    options = Options(
        strategies=tuple(name.strip() for name in strategies.split(",") if name.strip()),
        seeds=seeds,
        budget=budget,
        batch_size=batch_size,
        seed_size=seed_size,
        cold_start=cold_start,
        guide=_parse_guide(guide) if guide else None,
        test_size=test_size,
        workers=workers or _core_count(),
    )
    vectors = corpus_vectors(texts, params.features, al_home() / "simulate", layout)
    name = "stdin" if str(corpus) == "-" else corpus.resolve().stem
    with progress_bar("simulating", not as_json) as on_progress:
        done = run(texts, name, params, options, out, vectors, on_progress)
    if as_json:
        return print_json({**done.result, "folder": str(done.folder), "report": str(done.folder / "report.html")})
    _print_simulation(done)


def _current_params() -> tuple[Layout | None, Params]:
    """The layout of the current workspace, if there is one, and the parameters for a simulation."""
    from al_pipeline.params import parse_params
    from al_pipeline.workspace.trust import template
    from al_pipeline.workspace.workspace import in_workspace

    if Invocation.folder is None and not in_workspace():
        return None, parse_params(template("params.yaml"))
    workspace = current_workspace()
    return workspace.layout, workspace.params


def _parse_guide(words: list[str]) -> dict[str, list[str]]:
    """Parse `spam=free money,act now`: keywords by class. Raises UsageError."""
    found = {}
    for word in words:
        name, _, phrases = word.partition("=")
        found[name.strip()] = [phrase for phrase in parse_list(phrases, "--guide") if phrase]
        if not name.strip() or not found[name.strip()]:
            raise UsageError(f"--guide {word!r} is not of the form CLASS=keywords,more keywords")
    return found


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print_simulation(done: Simulation) -> None:
    from al_pipeline.simulation.page import summary, table

    for name, header, rows in table(done.result):
        echo(f"[bold]{escape(name)}[/]")
        print_table(header, rows)
    for sentence in summary(done.result):
        echo(escape(sentence))
    for warning in done.result["warnings"]:
        echo(f"[yellow]{escape(warning)}[/]")
    echo(f"Report: [bold]{escape(done.folder / 'report.html')}[/]")
