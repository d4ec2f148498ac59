"""`make demo-team`: several people label the same e-mails, one of them without care; gold and a reviewer find out.

Five simulated colleagues and a reviewer work in the real Label Studio of the workspace `demo-team/`. Each item is asked
of two people, and of a third where the label is not sure. After two rounds the reviewer rules on what `al review` puts
forward; the rulings count from the third round on. At the end, what `al` found stands beside what is true: `al` learns
the answer key of the e-mails for the gold items alone.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from al_pipeline import frames
from al_pipeline.data.pool import iter_items
from al_pipeline.errors import AlError, ExternalServiceError
from al_pipeline.files import read_json, replacing
from al_pipeline.workspace.workspace import Workspace
from examples.spam.annotators import chance
from examples.spam.colleagues import Colleague, answer_open
from examples.spam.corpus import prepare
from examples.spam.demo import (
    LABELS,
    ROOT,
    Timings,
    al,
    bar_for,
    clean,
    console,
    create_workspace,
    invite,
    near,
    plain,
    run_tick,
    step,
)

CARELESS = "eve@example.com"
CARE: Mapping[str, Mapping[str, float]] = {
    "ada@example.com": {"accuracy": 0.98, "seconds": 16},
    "grace@example.com": {"accuracy": 0.95, "seconds": 12},
    "edsger@example.com": {"accuracy": 0.92, "seconds": 11},
    "barbara@example.com": {"accuracy": 0.88, "seconds": 9},
    CARELESS: {"accuracy": 0.9, "reads": 0.2, "seconds": 3},
}
"""The colleagues; eve reads a fifth of the mails, and gives the others any class."""
REVIEWER = "chief@example.com"
GOLD = 40
ROUNDS = 3
REVIEW_SIZE = 120
SETTINGS = {
    "ingest.test_size": "120",
    "features.kind": "tfidf",
    "select.batch_size": "40",
    "round.seed_size": "40",
    "round.test_tasks": "120",
    "round.quorum": "1.0",
    "round.overlap": "2",
    "round.max_overlap": "3",
    "labels.consensus": "auto",
    "labels.min_confidence": "0.9",
    "quality.review_sample": "40",
    "quality.gold_share": "0.3",
    "quality.min_gold": "0.8",
    "schedule.active": "false",
    "reviewers": f"[{REVIEWER}]",
}
"""Values set in `params.yaml`. Without an encoder, since the demo is about people."""
SEED = 11
_PATIENCE = 6
"""Ticks after which a round must be published: with a maximal overlap of 3 it takes three."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or remove it (`--clean`); returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.spam.team", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo-team", help="the workspace (default: demo-team/)")
    parser.add_argument("--clean", action="store_true", help="stop the servers and remove everything that it created")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.resolve()
    try:
        if options.clean:
            clean(folder)
        else:
            run(folder)
    except AlError as error:
        console.print(f"[red]{type(error).__name__}:[/] {plain(error)}")
        return error.exit_code
    except KeyboardInterrupt:
        console.print("\nInterrupted. `make demo-team` continues from here.")
        return 130
    return 0


def run(folder: Path) -> None:
    """Create what is missing, have it labelled and reviewed, show what was found; again: with one more round."""
    if (ROOT / ".venv-label-studio").is_dir():
        os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(ROOT / ".venv-label-studio"))
    with console.status("fetching 6,046 e-mails"):
        corpus = prepare()
    workspace = create_workspace(folder, corpus, Timings(), SETTINGS)
    key: dict[str, str] = read_json(corpus.key)
    tokens = invite(workspace, str(al(folder, "status")["label_studio_url"]), [*CARE, REVIEWER])
    team = Team(workspace, key, tokens)
    started = time.monotonic()
    now = al(folder, "status")
    if now["round"] is None:
        run_tick(folder)  # plans round 0: gold and reviews come after it
    if now["gold"] is None:
        team.add_gold()
    done = len(al(folder, "rounds")["rounds"])
    step(
        f"{len(CARE)} people label, of whom {CARELESS} reads a fifth of the mails; two answers an item, three in doubt"
    )
    team.publish(max(done, ROUNDS - 1))
    before = team.true_state()
    team.review()
    found = al(folder, "status")["review"]
    team.publish(max(done + 1, ROUNDS))
    show(team, before, found, team.true_state())
    console.print(f"[dim]From the first task on it took {time.monotonic() - started:.0f} s.[/]")


@dataclass(frozen=True)
class State:
    """What is true of the newest published round, by the answer key."""

    labels: int
    wrong: int
    test_labels: int
    test_wrong: int
    macro_f1: float
    """Of the model, against the true test labels."""


class Team:
    """The workspace, and the people who work on it."""

    def __init__(self, workspace: Workspace, key: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self.workspace, self.key = workspace, key
        self.folder = workspace.layout.root
        self.people = [Colleague(who, tokens[who], skip_rate=0.02, **care) for who, care in CARE.items()]
        self.reviewer = Colleague(REVIEWER, tokens[REVIEWER], accuracy=1.0)

    def add_gold(self) -> None:
        """Give `al` the labels of a few random items of the pool."""
        pool = [item.item_id for batch in iter_items([self.workspace.layout.pool]) for item in batch]
        pool.sort(key=lambda item: chance(SEED, item, "gold"))
        path = self.workspace.home / "gold.csv"
        with replacing(path) as target, target.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("id", "label"), *((item, self.key[item]) for item in pool[:GOLD])])
        added = al(self.folder, "gold", "add", str(path))["gold"]
        step(f"{added} mails with known labels are gold: from round 1 on, they are mixed into everybody's tasks")

    def publish(self, rounds: int) -> None:
        """Label until so many rounds are published."""
        published, patience = len(al(self.folder, "rounds")["rounds"]), _PATIENCE
        while published < rounds:
            if not patience:
                raise ExternalServiceError(f"round {published} does not close: {al(self.folder, 'status')['next']}")
            tick, seconds = run_tick(self.folder)
            patience -= 1
            for number in tick["published"]:
                published, patience = published + 1, _PATIENCE
                self._tell(number, seconds)
            if published < rounds:
                self._answer()

    def _tell(self, number: int, seconds: float) -> None:
        row = next(row for row in al(self.folder, "rounds")["rounds"] if row["round"] == number)
        told, true = row["metrics"]["macro_f1"]["value"], self.true_state().macro_f1
        console.print(
            f"  [green]round-{number:04d} is published[/]: {row['labelled']} labels, macro-F1 "
            f"{'not measured' if told is None else f'{told:.3f}'}, by the true test labels {true:.3f} "
            f"[dim](pull to next batch in {seconds:.0f} s)[/]"
        )

    def _answer(self) -> None:
        now = al(self.folder, "status")
        what = f"round {now['round']}: {len(self.people)} people answer"
        started = time.monotonic()
        with bar_for(what) as advance:
            done = answer_open(now["label_studio_url"], now["project_id"], self.people, self.key, SEED, advance)
        skipped = f", {done['skip']} skipped" if done["skip"] else ""
        console.print(f"  {what}: {done['answer']} answered{skipped} [dim]({time.monotonic() - started:.0f} s)[/]")

    def review(self) -> None:
        """Have the reviewer rule on what `al review` puts forward, and pull the rulings."""
        found = al(self.folder, "status")["review"]
        if found is not None and all(one["reviewed"] >= one["sampled"] for one in found["rates"].values()):
            return
        given = al(self.folder, "review", "--size", str(REVIEW_SIZE))
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(given["added"].items()))
        step(f"{REVIEWER} reviews {given['waiting']} labels: {plain(reasons)}")
        url = al(self.folder, "status")["label_studio_url"]
        project = read_json(self.workspace.layout.review_project)["project_id"]
        with bar_for("reviewing") as advance:
            answer_open(url, project, [self.reviewer], self.key, SEED, advance)
        run_tick(self.folder)

    def true_state(self) -> State:
        """What is true of the newest published round."""
        labels, test = frames.labeled(self.folder), frames.predictions(self.folder)
        true = test["item_id"].map(self.key)
        return State(
            labels=len(labels),
            wrong=int((labels["label"] != labels["item_id"].map(self.key)).sum()),
            test_labels=len(test),
            test_wrong=int((test["label"] != true).sum()),
            macro_f1=_macro_f1(true.to_numpy(), test["predicted"].to_numpy()),
        )


def _macro_f1(true: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]) -> float:
    scores = []
    for name in LABELS:
        hits = ((true == name) & (predicted == name)).sum()
        scores.append(2 * hits / max(1, (true == name).sum() + (predicted == name).sum()))
    return float(np.mean(scores))


def show(team: Team, before: State, review: Mapping[str, Any], after: State) -> None:
    """What `al` found, beside what is true."""
    folder, quality = team.folder, al(team.folder, "quality")
    console.print()
    console.print(_people(team, quality, al(folder, "status")["gold"]), soft_wrap=False)
    for remark in quality["remarks"]:
        console.print(f"Named: [bold]{remark['annotator']}[/] {plain(remark['evidence'])}")
    named = {remark["annotator"] for remark in quality["remarks"]}
    if named == {CARELESS}:
        console.print(f"True: {CARELESS} is the careless one, and nobody else.")
    else:
        console.print(f"True: {CARELESS} is the careless one; named: {', '.join(sorted(named)) or 'nobody'}.")
    console.print()
    for part, title, wrong in (
        ("pool", "the labelled set", [(one.wrong, one.labels) for one in (before, after)]),
        ("test", "the test set", [(one.test_wrong, one.test_labels) for one in (before, after)]),
    ):
        console.print(_error_rate(title, review["rates"][part], *wrong))
    console.print(f"{review['ruled']} rulings changed {review['changed']} labels; they count from the next round on.")
    rows = al(folder, "rounds")["rounds"]
    for row, true, when in ((rows[-2], before, "before"), (rows[-1], after, "after")):
        told = _estimate(row["metrics"]["macro_f1"])
        console.print(
            f"Macro-F1 {when} the review (round-{row['round']:04d}): {told} by its test labels, {true.macro_f1:.2f} by "
            "the true ones"
        )
    report = Path(al(folder, "report")["report"])
    program = plain(near(Path(sys.executable).with_name("al"), folder))
    console.print(f"\nThe report: [bold]{plain(near(report))}[/], section Annotators (one page, opens offline)")
    console.print(f"All figures: cd {plain(near(folder))} && {program} quality; {program} review shows the rulings")
    console.print("[bold]make demo-team[/] adds a round; [bold]make clean[/] removes it.")


def _people(team: Team, quality: Mapping[str, Any], gold: Mapping[str, Any]) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="dim", title="What al found, and the truth", title_justify="left"
    )
    for name in ("annotator", "answers", "seconds", "accuracy, estimated", "true", "on gold"):
        table.add_column(name, justify="left" if name == "annotator" else "right", no_wrap=True)
    rows = {row["name"]: row for row in quality["people"]}
    for person in team.people:
        row = rows[person.email]
        table.add_row(
            person.email,
            str(row["answers"]),
            f"{row['seconds']:.0f}",
            _estimate(row["accuracy"]),
            f"{person.share_right(len(LABELS)):.2f}",
            f"{round((row['gold']['value'] or 0) * row['gold_answers'])} of {row['gold_answers']}",
        )
    if gold["below"]:
        table.caption = "\n".join(f"Below the bound on gold: {plain(sentence)}" for sentence in gold["below"])
        table.caption_justify = "left"
    return table


def _error_rate(title: str, found: Mapping[str, Any], before: tuple[int, int], after: tuple[int, int]) -> str:
    told, rate = "not known", found["rate"]
    if rate.get("value") is not None:
        value, low, high = (f"{100 * rate[name]:.1f}" for name in ("value", "low", "high"))
        told = f"{value} % ({low} to {high}), from {found['wrong']} of {found['reviewed']} random labels"
    truths = [f"{100 * wrong / max(1, total):.1f} % ({wrong} of {total})" for wrong, total in (before, after)]
    return f"Wrong labels in {title}: {told}; true {truths[0]}. After the rulings: true {truths[1]}"


def _estimate(row: Mapping[str, Any]) -> str:
    if row.get("value") is None:
        return "–"
    ends = "" if row.get("low") is None else f" ({row['low']:.2f} to {row['high']:.2f})"
    return f"{row['value']:.2f}{ends}"


if __name__ == "__main__":
    sys.exit(main())
