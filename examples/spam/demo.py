"""`make demo`: a spam filter trained by active learning, with real servers and simulated annotators.

It calls `al` as a person would: creates the workspace `demo/`, starts Label Studio and Prefect on this machine, and
alternates with the annotators until three active rounds are published. When repeated, it continues with the next round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from al_pipeline.errors import AlError, ExternalServiceError, NothingToDo
from al_pipeline.files import read_json, write_json
from al_pipeline.records import push_key
from al_pipeline.reporting.charts import CurvePoint, save_learning_curve
from al_pipeline.servers import password_file
from al_pipeline.simulation.replay import MeanPoint
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace
from benchmarks.record import record as write_record
from examples.spam.annotators import Act, Annotator, Done, acts_for, answer_round
from examples.spam.comparison import Comparison, compare
from examples.spam.corpus import Prepared, prepare

ROOT = Path(__file__).resolve().parents[2]
LABELS = ("ham", "spam")
PEOPLE = ("ada@example.com", "grace@example.com", "edsger@example.com")
SETTINGS = {
    "ingest.test_size": "300",
    "round.test_tasks": "300",
    "round.seed_size": "40",
    "select.batch_size": "40",
    "schedule.active": "false",
}
"""Values set in `params.yaml`: the whole test set is labelled in round 0, so that every round is measured on the same
items; the demo alternates with its annotators, so nothing runs by schedule."""
SEED = 7
_COMMAND_SECONDS = 3600

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Timings:
    """Seconds of everything that the demo waited for."""

    started: float = field(default_factory=time.monotonic)
    setup: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    comparison: float = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time one part of the setup."""
        before = time.monotonic()
        yield
        self.setup[name] = round(time.monotonic() - before, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or remove it (`--clean`); returns the exit code."""
    options = _options(arguments)
    folder: Path = options.folder.resolve()
    try:
        if options.clean:
            clean(folder)
        else:
            run(folder, options.rounds, options.seeds)
    except AlError as error:
        console.print(f"[red]{type(error).__name__}:[/] {plain(error)}")
        return error.exit_code
    except KeyboardInterrupt:
        console.print("\nInterrupted. `make demo` continues from here.")
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.spam.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="the workspace (default: demo/)")
    parser.add_argument("--rounds", type=int, default=3, help="active rounds of the first run (default: 3)")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the comparison with random sampling")
    parser.add_argument(
        "--clean", action="store_true", help="stop the demo's servers and remove everything that it created"
    )
    return parser.parse_args(arguments)


def run(folder: Path, rounds: int, seeds: int) -> None:
    """Create what is missing, run the rounds that are due, show the results."""
    timings = Timings()
    environment = ROOT / ".venv-label-studio"
    if environment.is_dir():
        os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(environment))
    with timings.of("corpus"), console.status("fetching 6,046 e-mails"):
        corpus = prepare()
    workspace = create_workspace(folder, corpus, timings)
    url = str(al(folder, "status")["label_studio_url"])
    people = [Annotator(email, token) for email, token in invite(workspace, url, PEOPLE).items()]
    key = read_json(corpus.key)
    published = [row["round"] for row in al(folder, "rounds")["rounds"]]
    target = rounds if len(published) <= rounds else max(published) + 1
    _rounds(folder, url, people, key, target, timings)
    _show(workspace, people, key, seeds, timings)


def create_workspace(
    folder: Path, corpus: Prepared, timings: Timings, settings: Mapping[str, str] = SETTINGS
) -> Workspace:
    """The demo's workspace with its items and running servers. `settings`: see `set_params`."""
    if not Layout(folder).marker.exists():
        step(f"Creating the workspace [bold]{plain(folder.name)}/[/], a git and DVC repository of its own")
        with timings.of("init"):
            question = "Is this e-mail spam, or ham (wanted)?"
            al(None, "init", str(folder), "--labels", ",".join(LABELS), "--question", question)
            set_params(Layout(folder).params, settings)
            al(folder, "schedule", "--off")  # the demo's annotators answer between rounds; no tick may run meanwhile
    workspace = open_workspace(folder)
    step("Starting Label Studio and Prefect on this machine")
    with timings.of("servers"), console.status("the first start sets up their databases"):
        al(folder, "up")
    if al(folder, "status")["pool"] == 0:
        step(f"Ingesting {corpus.mails:,} e-mails, without their labels")
        with timings.of("ingest"):
            al(folder, "ingest", str(corpus.pool), "--id-column", "id")
    return workspace


def set_params(path: Path, settings: Mapping[str, str]) -> None:
    """Set values in `params.yaml` as one would edit them by hand. `settings`: by name, such as `round.overlap`."""
    text = path.read_text(encoding="utf-8")
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        within = rf"{section}:.*\n(?:[ #].*\n)*?  " if section else ""
        text, found = re.subn(rf"(?m)^({within}{key}:) \S+", rf"\g<1> {value}", text)
        if found != 1:
            raise NothingToDo(f"{path} has {found} lines for {name}, expected one")
    path.write_text(text, encoding="utf-8")


def invite(workspace: Workspace, url: str, emails: Sequence[str]) -> dict[str, str]:
    """The tokens of people's accounts by address; they are stored beside the servers' data, for this user alone."""
    path = workspace.home / "annotators.json"
    known: dict[str, dict[str, str]] = read_json(path, {})
    for email in emails:
        if known.get(email, {}).get("url") != url:
            invited = al(workspace.layout.root, "labelstudio", "invite", email)
            known[email] = {"url": url, "token": invited["token"], "password": invited["password"]}
            write_json(path, known, mode=0o600)
    return {email: known[email]["token"] for email in emails}


def _rounds(
    folder: Path, url: str, people: Sequence[Annotator], key: Mapping[str, str], target: int, timings: Timings
) -> None:
    """Alternate with the annotators until round `target` is published and the next one is asked."""
    step(f"Rounds up to {target}; each is a flow run in Prefect, and labels come only from Label Studio")
    patience = 2
    told: set[str] = set()
    while True:
        tick, seconds = run_tick(folder)
        now = al(folder, "status")
        number = now["round"]
        timings.rounds.append({"published": tick["published"], "tick": seconds, "steps": tick["steps"]})
        for name in tick["published"]:
            _tell_published(folder, name, seconds)
        if number is None:
            raise NothingToDo(f"no round was planned: {tick['waits_for']}")
        if number > target:
            return
        patience = 2 if tick["published"] else patience - 1
        if patience < 0:
            raise ExternalServiceError(f"round {number} does not close: {tick['waits_for']}")
        if number:
            _answer(url, now["project_id"], people, key, number - 1, told, late=True)
        done = _answer(url, now["project_id"], people, key, number, told)
        if patience == 0:
            _answer(url, now["project_id"], people, key, number, told, late=True)
        timings.rounds[-1]["answering"] = asdict(done)


def run_tick(folder: Path) -> tuple[dict[str, Any], float]:
    before = time.monotonic()
    report = al(folder, "round", idle=True)
    return report, round(time.monotonic() - before, 2)


def _answer(
    url: str,
    project: int,
    people: Sequence[Annotator],
    key: Mapping[str, str],
    number: int,
    told: set[str],
    late: bool = False,
) -> Done:
    """Have a round's tasks answered. What this run has `told` already is told again only if more was answered."""
    what = f"late answers to round {number}" if late else f"round {number}: {len(people)} annotators answer"
    with bar_for(what) as advance:
        done = answer_round(url, project, people, key, SEED, round_number=number, late=late, progress=advance)
    if what in told and not done.answered + done.skipped + done.corrected:
        return done
    told.add(what)
    parts = {
        "answered": done.answered, "skipped": done.skipped, "corrected": done.corrected,
        "tasks with different answers": done.disagreed, "already answered": done.already,
        "to be answered late": done.left_for_later,
    }  # fmt: skip
    counts = ", ".join(f"{count} {name}" for name, count in parts.items() if count)
    console.print(f"  {what}: {counts or 'none'} [dim]({done.seconds:.0f} s)[/]")
    return done


def _tell_published(folder: Path, number: int, seconds: float) -> None:
    row = next(row for row in al(folder, "rounds")["rounds"] if row["round"] == number)
    score = row["metrics"]["macro_f1"]["value"]
    told = "not measured" if score is None else f"{score:.3f}"
    console.print(
        f"  [green]round-{number:04d} is published[/]: {row['labelled']} labels, macro-F1 {told}, {row['verdict']} "
        f"[dim](pull to next batch in {seconds:.0f} s)[/]"
    )


# What came of it ---------------------------------------------------------------------------------------------------


def _show(
    workspace: Workspace,
    people: Sequence[Annotator],
    key: Mapping[str, str],
    seeds: int,
    timings: Timings,
) -> None:
    folder = workspace.layout.root
    rounds = al(folder, "rounds")["rounds"]
    before = time.monotonic()
    said = {item: _said(item, label, people) for item, label in key.items()}
    with bar_for(
        f"replaying the rounds with {seeds} other seeds, by {workspace.params.select.strategy} and at random"
    ) as bar:
        comparison = compare(workspace, said, len(rounds) - 1, range(1, seeds + 1), bar)
    timings.comparison = round(time.monotonic() - before, 2)
    console.print()
    console.print(_table(rounds, comparison, seeds), soft_wrap=False)
    console.print(verdict(comparison, seeds))
    curve = [
        CurvePoint(row["labelled"], score["value"], score["low"], score["high"])
        for row in rounds
        if (score := row["metrics"]["macro_f1"])["value"] is not None
    ]
    report = al(folder, "report")["report"]
    reports = workspace.layout.reports
    at_random = [CurvePoint(point.labels, point.mean, point.low, point.high) for point in comparison.random]
    save_learning_curve(reports / "learning-curve.png", curve, at_random)
    write_record("demo", _figures(rounds, comparison, seeds, timings), reports)
    _farewell(workspace, Path(report))


def _said(item: str, truth: str, people: Sequence[Annotator]) -> str:
    """The annotators' label of an item: the majority of each one's last answer."""
    last: dict[str, str] = {}
    acts: list[Act] = acts_for(push_key("", 0, item), truth, LABELS, people, SEED)
    for act in acts:
        if act.label is not None:
            last[act.email] = act.label
    return Counter(last.values()).most_common(1)[0][0] if last else truth


def _table(rounds: Sequence[Mapping[str, Any]], comparison: Comparison, seeds: int) -> Table:
    title = f"Macro-F1 on the test set; right of this run: {seeds} seeds, mean ± 95 %"
    table = Table(box=None, pad_edge=False, header_style="dim", title=title, title_justify="left")
    for name in ("round", "labels", "this run", comparison.strategy, "random", "gain"):
        table.add_column(name, justify="left" if name == "round" else "right")
    for place, row in enumerate(rounds):
        score = row["metrics"]["macro_f1"]
        replayed = [
            _figure(points[place]) if place < len(points) else ""
            for points in (comparison.active, comparison.random, comparison.gain)
        ]
        value = "" if score["value"] is None else f"{score['value']:.3f}"
        table.add_row(f"round-{row['round']:04d}", str(row["labelled"]), value, *replayed)
    return table


def _figure(point: MeanPoint) -> str:
    if point.low is None or point.high is None:
        return f"{point.mean:.3f}"
    return f"{point.mean:.3f} ± {(point.high - point.low) / 2:.3f}"


def verdict(comparison: Comparison, seeds: int) -> str:
    """In words, whether uncertainty sampling paid off: gain or none."""
    if not comparison.gain:
        return "Nothing to compare yet."
    last = comparison.gain[-1]
    basis = f"at {last.labels} labels, mean of {seeds} seeds with its 95 % interval"
    amount = f"{last.mean:+.3f}"
    if last.low is not None and last.low > 0:
        saved = next((p.labels for p in comparison.active if p.mean >= comparison.random[-1].mean), last.labels)
        less = f"; it reached random's final score with {saved} labels" if saved < last.labels else ""
        return f"Active learning was better than random sampling: {amount} macro-F1 {basis}{less}."
    if last.high is not None and last.high < 0:
        return f"Active learning was worse than random sampling here: {amount} macro-F1 {basis}."
    return f"These seeds show no gain over random sampling: {amount} macro-F1 {basis}, which contains zero."


def _figures(
    rounds: Sequence[Mapping[str, Any]], comparison: Comparison, seeds: int, timings: Timings
) -> dict[str, Any]:
    encoding = sum(seconds for row in timings.rounds for name, seconds in row["steps"].items() if "encod" in name)
    ticks = sum(row["tick"] for row in timings.rounds)
    answering = sum(row["answering"]["seconds"] for row in timings.rounds if "answering" in row)
    return {
        "curve": [
            {"round": row["round"], "labels": row["labelled"], "macro_f1": row["metrics"]["macro_f1"]} for row in rounds
        ],
        "replay": {"seeds": seeds, **asdict(comparison)},
        "verdict": verdict(comparison, seeds),
        "seconds": {
            "total": round(time.monotonic() - timings.started, 2),
            "setup": timings.setup,
            "encoding": round(encoding, 2),
            "rounds_without_encoding": round(ticks + answering - encoding, 2),
            "annotators": round(answering, 2),
            "comparison": timings.comparison,
            "ticks": timings.rounds,
        },
    }


def _farewell(workspace: Workspace, report: Path) -> None:
    folder = workspace.layout.root
    now = al(folder, "status")
    people = read_json(workspace.home / "annotators.json")
    place = plain(near(folder))
    lines = [
        "",
        f"The report:    [bold]{plain(near(report))}[/] (one page, opens offline)",
        f'Label Studio:  [bold]{now["label_studio_page"]}[/], then the button "Label All Tasks"',
        f"               log in as {PEOPLE[0]}, password {plain(people[PEOPLE[0]]['password'])}",
        f"Prefect:       [bold]{now['prefect_url']}[/] (each tick is a flow run of al-round)",
        f"               log in with {plain(password_file(open_workspace(folder)).read_text('utf-8').strip())}",
        "",
        f"Round {now['round']} waits for answers. To continue by hand: answer in Label Studio, then",
        f"    cd {place} && {plain(near(Path(sys.executable).with_name('al'), folder))} round",
        "or let the annotators do it: [bold]make demo[/]. [bold]make clean[/] removes the demo.",
    ]
    console.print("\n".join(lines), soft_wrap=True)


def clean(folder: Path) -> None:
    """Stop the workspace's servers, remove it and its folder in `al`'s home. Removes nothing but a workspace."""
    if not Layout(folder).marker.exists():
        if folder.exists():
            raise NothingToDo(f"{folder} is not a workspace; if it should go, remove it by hand")
        console.print("There is no demo.")
        return
    workspace = open_workspace(folder)
    al(folder, "down", as_json=False)
    shutil.rmtree(folder)
    if workspace.home.exists():
        shutil.rmtree(workspace.home)
    console.print(f"Removed {plain(near(folder))} and its servers' data.")


# How it talks ------------------------------------------------------------------------------------------------------


def al(folder: Path | None, *words: str, as_json: bool = True, idle: bool = False) -> dict[str, Any]:
    """Run `al WORDS --json` in `folder` and return what it printed; progress bars and warnings go to the terminal.

    `idle`: having nothing to do is not a failure. Raises ExternalServiceError if the command fails; its own message has
    been printed by then.
    """
    place = [] if folder is None else ["-C", str(folder)]
    command = [sys.executable, "-m", "al_pipeline.cli.app", *place, *words, *(["--json"] if as_json else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_COMMAND_SECONDS)
    if done.returncode and not (idle and done.returncode == NothingToDo.exit_code and done.stdout):
        raise ExternalServiceError(
            f"`al {' '.join(words)}` ended with exit code {done.returncode}; see its message above"
        )
    found: dict[str, Any] = json.loads(done.stdout) if as_json else {}
    return found


def step(text: str) -> None:
    console.print(f"[bold cyan]›[/] {text}")


@contextmanager
def bar_for(what: str) -> Iterator[Any]:
    """A progress bar in a terminal; yields a callback `(done, total)`."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(plain(what), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def near(path: Path, start: Path | None = None) -> str:
    """The path as one would type it from here (or from `start`)."""
    return os.path.relpath(path, start)


def plain(text: object) -> str:
    from rich.markup import escape

    return escape(str(text))


if __name__ == "__main__":
    sys.exit(main())
