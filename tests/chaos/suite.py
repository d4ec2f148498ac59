"""All scenarios, their outcomes, and the table by kind of fault."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from statistics import median
from typing import Any

from embedded import REPOSITORY
from rich.table import Table

from al_pipeline.files import json_line, sha256_bytes, sha256_file
from al_pipeline.integrations import forks
from chaos.answers import answer_scenarios
from chaos.kills import kill_scenarios
from chaos.lab import FaultCount, Lab, Scenario
from chaos.live import live_scenarios
from chaos.machine import machine_scenarios
from chaos.network import network_scenarios
from chaos.reference import Reference
from chaos.sites import Failure
from chaos.team import team_scenarios
from chaos.workers import worker_scenarios

_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """The outcome of one scenario."""

    name: str
    kind: str
    kills: bool
    real: bool
    injected: int
    survived: int
    """All of `injected`, or 0 if the scenario failed."""
    recover_seconds: tuple[float, ...]
    ticks: tuple[int, ...]
    why: str
    """Why it failed; empty if it did not."""
    seconds: float
    product: str
    """Digest of the tested product."""
    forked: bool = False
    """Whether DVC and the stages were forks of a server, as under `al up`; otherwise processes."""


def scenarios(reference: Reference) -> list[Scenario]:
    """Every scenario: those on a real Label Studio first, those with Prefect last, so that few servers are started."""
    found = [*network_scenarios(), *kill_scenarios(reference), *machine_scenarios(), *worker_scenarios(reference)]
    found += [*answer_scenarios(), *live_scenarios(), *team_scenarios()]
    assert len({scenario.name for scenario in found}) == len(found)
    return sorted(found, key=lambda one: (not one.real, one.name.startswith(("flow", "Prefect"))))


def forked(name: str) -> bool:
    """Whether a scenario is played with fork servers: half of them, always the same; `al up` starts its own."""
    return not name.startswith("worker of") and zlib.crc32(name.encode()) % 2 == 0


def play(scenario: Scenario, lab: Lab, product: str) -> Outcome:
    """Play one scenario to its end."""
    tally, why = FaultCount(), ""
    begin = time.perf_counter()
    servers = os.environ.pop(forks.FOLDER)
    if forked(scenario.name):
        os.environ[forks.FOLDER] = servers
    try:
        scenario.play(lab, tally)
    except Failure as failure:
        why = str(failure)
    except Exception:  # a fault of the suite or of a server counts as a failure of the product, since nothing is proved
        why = traceback.format_exc(limit=-6)
    finally:
        os.environ[forks.FOLDER] = servers
    return Outcome(
        name=scenario.name,
        kind=scenario.kind,
        kills=scenario.kills,
        real=scenario.real,
        injected=max(tally.injected, bool(why)),
        survived=0 if why else tally.injected,
        recover_seconds=tuple(round(one.seconds, 2) for one in tally.recoveries),
        ticks=tuple(one.ticks for one in tally.recoveries),
        why=why,
        seconds=round(time.perf_counter() - begin, 2),
        product=product,
        forked=forked(scenario.name),
    )


def product_digest() -> str:
    """A digest of the product's sources. Outcomes hold only for the same digest."""
    files = sorted(path for top in ("al_pipeline", "flows") for path in (REPOSITORY / top).rglob("*.py"))
    return sha256_bytes("\n".join(sha256_file(path) for path in files).encode())[:16]


# Outcomes on disk ----------------------------------------------------------------------------------------------------


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Add one line. A line that a kill left incomplete is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as out:
        out.write(("\n" if torn else "") + json_line(asdict(outcome)))


def read_outcomes(path: Path, product: str) -> dict[str, Outcome]:
    """The newest outcome of each scenario, by name; those of another product, and incomplete lines, are skipped."""
    found: dict[str, Outcome] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            row = json.loads(line)
            if row["product"] == product:
                lists = {name: tuple(row[name]) for name in ("recover_seconds", "ticks")}
                found[row["name"]] = Outcome(**{**row, **lists})
    return found


# The table -----------------------------------------------------------------------------------------------------------


def summary(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """By kind of fault: injected, survived, seconds to recover (median, maximum), ticks until recovery (the same)."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda one: (not one.kills, one.kind)):
        kinds.setdefault(outcome.kind, []).append(outcome)
    return {kind: _row(some) for kind, some in kinds.items()}


def _row(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    seconds = [value for outcome in outcomes for value in outcome.recover_seconds]
    ticks = [value for outcome in outcomes for value in outcome.ticks]
    return {
        "scenarios": len(outcomes),
        "injected": sum(outcome.injected for outcome in outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "recover_seconds": {"median": round(median(seconds), 1), "max": round(max(seconds), 1)} if seconds else None,
        "ticks_until_quiet": {"median": median(ticks), "max": max(ticks)} if ticks else None,
    }


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The content of `benchmarks/results/chaos.json`."""
    kills = [outcome for outcome in outcomes if outcome.kills]
    return {
        "scenarios": len(outcomes),
        "faults": sum(outcome.injected for outcome in outcomes),
        "survived": sum(outcome.survived for outcome in outcomes),
        "kills": sum(outcome.injected for outcome in kills),
        "kills_with_fork_servers": sum(outcome.injected for outcome in kills if outcome.forked),
        "kills_with_label_studio": sum(outcome.injected for outcome in kills if outcome.real),
        "scenario_seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "kinds": summary(outcomes),
        "failed": sorted(outcome.name for outcome in outcomes if outcome.why),
    }


def table(told: Mapping[str, Any]) -> Table:
    """The same for a terminal."""
    shown = Table("fault", "injected", "survived", "recovers in s", "(most)", "ticks", "(most)", title="Chaos")
    for column in shown.columns[1:]:
        column.justify = "right"
    for kind, row in told["kinds"].items():
        seconds, ticks = row["recover_seconds"] or {}, row["ticks_until_quiet"] or {}
        pairs = [seconds.get("median", "–"), seconds.get("max", "–"), ticks.get("median", "–"), ticks.get("max", "–")]
        style = "" if row["survived"] == row["injected"] else "red"
        shown.add_row(kind, *map(str, (row["injected"], row["survived"], *pairs)), style=style)
    shown.add_section()
    shown.add_row("all", str(told["faults"]), str(told["survived"]), "", "", "", "")
    return shown


# Side by side --------------------------------------------------------------------------------------------------------


def play_all(
    reference: Reference, todo: Sequence[Scenario], folder: Path, workers: int, product: str
) -> Iterator[Outcome]:
    """Play scenarios in worker processes, which take them from both ends of the list; yields outcomes as they come."""
    context = multiprocessing.get_context("fork")
    front, back = context.Value("i", 0), context.Value("i", len(todo))
    results: Any = context.Queue()

    def take(from_front: bool) -> int | None:
        with front.get_lock():
            if front.value >= back.value:
                return None
            if from_front:
                front.value += 1
                return int(front.value) - 1
            back.value -= 1
            return int(back.value)

    def work(slot: int) -> None:
        stop_once()
        place = folder / f"worker-{slot}"
        place.mkdir()
        lab = Lab(reference, place)
        try:
            while (number := take(slot % 2 == 0)) is not None:
                results.put(play(todo[number], lab, product))
        except KeyboardInterrupt:
            return
        finally:
            lab.close()

    processes = [context.Process(target=work, args=(slot,)) for slot in range(workers)]
    for process in processes:
        process.start()
    left = len(todo)
    try:
        while left:
            try:
                yield results.get(timeout=_PATIENCE_SECONDS)
                left -= 1
            except Empty:
                if not any(process.is_alive() for process in processes):
                    raise RuntimeError(f"the workers ended with {left} scenarios to go") from None
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    finally:
        for process in processes:
            process.join()


def stop_once() -> None:
    """Let SIGTERM stop this process as Ctrl-C does, and ignore further ones while it cleans up."""

    def stop(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
