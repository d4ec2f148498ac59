"""`make chaos`: play every scenario that has no outcome yet, then write and print the table.

    python -m chaos [--fresh] [--failed] [--only REGEX] [--workers 2] [--live-kills 500]

Outcomes are appended to .cache/chaos/outcomes.jsonl as they come, so that an interrupted run continues. They hold for
the sources of the product that were tested: after any change of a line, all scenarios are played again.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from embedded import REPOSITORY
from harness import ENVIRONMENT, NOT_THE_USERS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from warm import choose_folder, end_servers, start_servers

from benchmarks.record import record
from chaos.live import KILLS, KILLS_VARIABLE
from chaos.reference import make_reference
from chaos.suite import (
    Outcome,
    append_outcome,
    figures,
    play_all,
    product_digest,
    read_outcomes,
    scenarios,
    stop_once,
    table,
)

OUTCOMES = REPOSITORY / ".cache/chaos/outcomes.jsonl"


def main() -> int:
    """Play the scenarios; returns 0 if the product survived all faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget earlier outcomes")
    parser.add_argument("--failed", action="store_true", help="play those that failed again, too")
    parser.add_argument("--only", default="", help="scenarios whose name or kind matches this")
    parser.add_argument("--record", help="name of the record; default: chaos, and none with --only")
    parser.add_argument("--workers", type=int, default=2, help="scenarios at once")
    parser.add_argument("--live-kills", type=int, default=KILLS, help="random kills of al live; 500 take 20 minutes")
    parser.add_argument("--outcomes", type=Path, default=OUTCOMES)
    options = parser.parse_args()
    for name in (*NOT_THE_USERS, "PYTHONPATH"):
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("AL_LABEL_STUDIO_VENV", str(REPOSITORY / ".venv-label-studio"))
    os.environ[KILLS_VARIABLE] = str(options.live_kills)
    stop_once()
    if options.fresh:
        options.outcomes.unlink(missing_ok=True)
    console = Console()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="al-chaos-") as folder:
        os.environ["AL_HOME"] = f"{folder}/home"
        choose_folder()
        start_servers()
        try:
            outcomes, played = _play(options, Path(folder), console)
        except KeyboardInterrupt:
            console.print("Stopped; the same command goes on from here.")
            return 130
        finally:
            end_servers()
    told = figures(list(outcomes.values()))
    told["this_run"] = {"scenarios": played, "minutes": round((time.monotonic() - began) / 60, 1)}
    console.print(table(told))
    for outcome in outcomes.values():
        if outcome.why:
            console.print(f"[red]not survived:[/] {outcome.name}: {outcome.why}", markup=True, highlight=False)
    if name := options.record or ("" if options.only else "chaos"):
        console.print(str(record(name, told).relative_to(REPOSITORY)))
    return 1 if told["failed"] else 0


def _play(options: argparse.Namespace, folder: Path, console: Console) -> tuple[dict[str, Outcome], int]:
    """The outcomes of all scenarios that were requested, and how many were played now."""
    product = product_digest()
    known = read_outcomes(options.outcomes, product)
    with console.status("The run that nobody disturbs"):
        reference = make_reference(folder / "reference")
    asked = [s for s in scenarios(reference) if re.search(options.only, f"{s.name} | {s.kind}")]
    todo = [s for s in asked if s.name not in known or (options.failed and known[s.name].why)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("scenarios", total=len(asked), completed=len(asked) - len(todo))
        for outcome in play_all(reference, todo, folder, options.workers, product):
            append_outcome(options.outcomes, outcome)
            known[outcome.name] = outcome
            if outcome.why:
                bar.console.print(f"[red]not survived:[/] {outcome.name}", highlight=False)
            bar.update(task, advance=1, description=outcome.name[:44].ljust(44))
    return {scenario.name: known[scenario.name] for scenario in asked}, len(todo)


if __name__ == "__main__":
    sys.exit(main())
