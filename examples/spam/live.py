"""`make demo-live`: the newest model asks the next question while simulated annotators answer at human pace.

After a seed round in the workspace `demo-live/`, `al up` runs `al live` beside the worker. Then three people answer for
two minutes: with accounts of their own, they take the next task of the real Label Studio and think for some seconds.
The page of `al live` follows. At the end it is printed what was learnt. When repeated, it goes on from there.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from al_pipeline.errors import AlError, ExternalServiceError
from al_pipeline.files import read_json
from al_pipeline.live.state import LiveState, read_state
from al_pipeline.live.watch import figures
from al_pipeline.workspace.workspace import Workspace
from examples.spam.annotators import Act, Annotator, Session, answer_round
from examples.spam.corpus import prepare
from examples.spam.demo import (
    LABELS,
    PEOPLE,
    ROOT,
    SEED,
    Timings,
    al,
    bar_for,
    clean,
    console,
    create_workspace,
    invite,
    plain,
    run_tick,
    set_params,
    step,
)

SETTINGS = {
    "ingest.test_size": "100",
    "features.kind": "tfidf",
    "select.batch_size": "30",
    "select.random_share": "0.3",
    "round.seed_size": "30",
    "round.test_tasks": "20",
    "live.people": str(len(PEOPLE)),
    "schedule.active": "false",
}
"""Values set in `params.yaml`. Without an encoder, so that it starts soon; a large random share, so that two minutes
show a running accuracy."""
SECONDS = 120.0
THINKS = (2.0, 6.0)
"""The seconds that a person looks at a mail, at least and at most."""
WRONG, SKIPS = 0.02, 0.02
_TELL_SECONDS, _START_SECONDS = 15.0, 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, or remove it (`--clean`); returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m examples.spam.live", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo-live", help="the workspace (default: demo-live/)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of answering (default: 120)")
    parser.add_argument("--clean", action="store_true", help="stop the servers and remove everything that it created")
    options = parser.parse_args(arguments)
    folder: Path = options.folder.resolve()
    try:
        if options.clean:
            clean(folder)
        else:
            run(folder, options.seconds)
    except AlError as error:
        console.print(f"[red]{type(error).__name__}:[/] {plain(error)}")
        return error.exit_code
    except KeyboardInterrupt:
        console.print("\nInterrupted. `make demo-live` continues from here.")
        return 130
    return 0


def run(folder: Path, seconds: float) -> None:
    """Create what is missing, have people answer live, show what was learnt."""
    if (ROOT / ".venv-label-studio").is_dir():
        os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(ROOT / ".venv-label-studio"))
    with console.status("fetching 6,046 e-mails"):
        corpus = prepare()
    workspace = create_workspace(folder, corpus, Timings(), SETTINGS)
    now = al(folder, "status")
    tokens = invite(workspace, str(now["label_studio_url"]), PEOPLE)
    key: dict[str, str] = read_json(corpus.key)
    if not workspace.params.live.enabled:
        _seed(workspace, tokens, key)
    page = al(folder, "up")["live_page"]
    step(f"`al live` runs beside the worker; what it learns: [bold]{plain(page)}[/]")
    if sys.stdout.isatty():
        webbrowser.open(page)
    first = _wait(workspace)
    now = al(folder, "status")
    team = [Person(who, tokens[who], now["label_studio_url"], now["project_id"], key) for who in PEOPLE]
    step(f"{len(team)} people answer for {seconds:.0f} s, each in {THINKS[0]:.0f} to {THINKS[1]:.0f} s")
    _answer(workspace, team, seconds)
    _show(workspace, team, first, page)


def _seed(workspace: Workspace, tokens: Mapping[str, str], key: Mapping[str, str]) -> None:
    """The seed round, answered as in a batch; `al live` builds it and goes on."""
    folder = workspace.layout.root
    run_tick(folder)
    now = al(folder, "status")
    people = [Annotator(who, token, 0.01, 0.02, 0.0, 0.0) for who, token in tokens.items()]
    with bar_for("round 0: a random seed is answered") as advance:
        done = answer_round(
            now["label_studio_url"], now["project_id"], people, key, SEED, round_number=0, progress=advance
        )
    console.print(f"  round 0: a random seed is answered: {done.answered} answers [dim]({done.seconds:.0f} s)[/]")
    set_params(workspace.layout.params, {"live.enabled": "true"})


def _wait(workspace: Workspace) -> LiveState:
    """The first state of a process that has questions open."""
    began = time.time()
    with console.status("al live trains on the seed round and asks its first questions"):
        while time.time() - began < _START_SECONDS:
            state = read_state(workspace.layout)
            if state is not None and state.time >= began and state.round and state.queue and state.health == "up":
                return state
            time.sleep(0.3)
    raise ExternalServiceError(
        f"al live did not ask within {_START_SECONDS:.0f} s; see {workspace.home}/live/server.log"
    )


@dataclass
class Person:
    """An annotator in Label Studio's label stream."""

    email: str
    token: str
    url: str
    project: int
    key: Mapping[str, str]

    def __post_init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.failure: Exception | None = None

    def work(self, end: float) -> None:
        """Answer until the time `end`, by `time.monotonic`."""
        draw = random.Random(f"{SEED} {self.email}")
        try:
            with Session(self.url, self.token) as session:
                form = session.form(self.project)
                while time.monotonic() < end:
                    task = session.next_task(self.project)
                    if task is None:  # the page would say so until it is loaded again
                        self.done["empty"] += 1
                        time.sleep(1)
                        continue
                    looked = draw.uniform(*THINKS)
                    time.sleep(looked)
                    truth = self.key[task.item_id]
                    said = next(one for one in LABELS if one != truth) if draw.random() < WRONG else truth
                    kind = "skip" if draw.random() < SKIPS else "answer"
                    act = Act(task.push_key, self.email, "skip", None, False, looked)
                    if kind == "answer":
                        act = Act(task.push_key, self.email, "answer", said, False, looked)
                    self.done[session.perform(act, task.task_id, form)] += 1
        except AlError as error:
            self.failure = error


def _answer(workspace: Workspace, team: Sequence[Person], seconds: float) -> None:
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=person.work, args=(end,), daemon=True) for person in team]
    for thread in threads:
        thread.start()
    told = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        if time.monotonic() - told >= _TELL_SECONDS and (state := read_state(workspace.layout)) is not None:
            told = time.monotonic()
            named = dict(figures(state))
            shown = ("labels", "labels per hour", "running accuracy", "round")
            console.print("  " + "; ".join(f"{name} {plain(named[name])}" for name in shown))
    for person in team:
        if person.failure is not None:
            raise person.failure


def _show(workspace: Workspace, team: Sequence[Person], first: LiveState, page: str) -> None:
    """What was learnt, from the state and the published rounds."""
    folder = workspace.layout.root
    state = al(folder, "watch", "--once")
    done = sum((person.done for person in team), Counter[str]())
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim", title="What was learnt", title_justify="left")
    for name in ("measure", "round", "labels", "accuracy", "interval"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for point in [one for one in state["curve"] if one["what"] == "test accuracy"] + state["curve"][-1:]:
        span = "" if point["low"] is None else f"{point['low']:.3f} to {point['high']:.3f}"
        row = (point["what"], str(point["round"]), str(point["labels"]), f"{point['value']:.3f}", span)
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    empty = f"; the queue was empty {done['empty']} times" if done["empty"] else "; the queue was never empty"
    console.print(f"{done['answer']} answers and {done['skip']} skips in the label stream{empty}.")
    console.print(
        f"The newest model knows {state['model_labels']} labels, at the start {first.model_labels}. Open: "
        f"{len(state['queue'])} questions, {state['stale']} of them by an earlier model."
    )
    console.print(f"Stop? {state['stop']['sentence'].capitalize()}.")
    console.print(
        f"\nThe page stays: [bold]{plain(page)}[/]; Label Studio: [bold]{plain(state['label_studio_page'])}[/]"
    )
    console.print("[bold]make demo-live[/] goes on; [bold]make clean[/] removes it.")


if __name__ == "__main__":
    sys.exit(main())
