"""Scenarios of the worker that `al up` starts: kill -9 while it runs a tick, then `al up` again.

They use a real Label Studio, a real Prefect server, and runs of the workspace's deployment, as the schedule or the
button in Prefect's page starts them. A run to be killed at a step's boundary waits there (`runs/sitecustomize.py`);
apart from that, nothing of the suite is inside the processes that are killed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
from embedded import al_home_at
from harness import ask_prefect, change_params

from al_pipeline.integrations import forks
from al_pipeline.servers import process as servers
from al_pipeline.servers import stop_worker
from al_pipeline.workspace.home import fork_servers
from al_pipeline.workspace.workspace import open_workspace
from chaos.lab import FaultCount, Lab, Scenario
from chaos.reference import Reference
from chaos.sites import Failure, Recovery, Site, expect

Victim = Literal["worker", "both"]
VICTIMS: tuple[Victim, Victim] = ("worker", "both")
"""Prefect's worker alone, whose tick continues; or the worker with everything that it started."""

RANDOM_STORIES, KILLS_PER_STORY = 2, 4
START_SECONDS = 4.0
"""Time limit from `al up` to the first step of a due tick."""

LASTING = ("pull", "close", "train", "decide", "publish", "tag", "sync", "push")
"""The steps whose results the next tick finds."""

STAGE = "train"
"""The stage during which a worker is killed."""

LOOK_SECONDS = 5.0
"""The interval of polling a run's state: a stage may begin and end while Prefect answers."""

RUN_SECONDS = 120.0
"""Time limit of a run from its creation to its end, including the worker's polling interval."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@dataclass(frozen=True)
class Strike:
    """One kill of the worker while it runs a tick."""

    victim: Victim
    at: str | None
    """Where the tick waits for it (see `chaos.ticker`); None: in the middle of its longest stage."""


def worker_scenarios(reference: Reference) -> Iterator[Scenario]:
    """All of them."""
    steps = reference.steps[1]
    for name, strikes in (
        ("before each step", tuple(_before(steps))),
        ("after each lasting step", tuple(_after(steps))),
        ("in the middle of a stage, its tick left running", (Strike("worker", None),)),
    ):
        yield Scenario(
            f"worker of `al up` {name}",
            "kill -9 of Prefect's worker at a step's boundary, alone or with its tick",
            partial(_at_boundaries, strikes=strikes),
            kills=True,
            real=True,
            strikes=len(strikes),
        )
    for number in range(RANDOM_STORIES):
        yield Scenario(
            f"worker of `al up` at random {number}",
            "kill -9 of Prefect's worker at a random instant, alone or with its tick",
            partial(_at_random, seed=number),
            kills=True,
            real=True,
            strikes=KILLS_PER_STORY,
        )


# A tick that continues after a kill takes each remaining step for the first time, hence the 1.


def _before(steps: Sequence[str]) -> Iterator[Strike]:
    """Before each step of a tick, alternating the victim, and both in the middle of a stage.

    There the worker alone is killed in a scenario of its own, since nobody knows how far its tick gets.
    """
    for place, step in enumerate(steps):
        yield Strike(VICTIMS[place % 2], f"before:{step}:1:stop")
        if step == STAGE:
            yield Strike("both", None)


def _after(steps: Sequence[str]) -> Iterator[Strike]:
    """At the boundaries that matter most, the other victim too, before the tick could see what it did."""
    for place, step in enumerate(steps):
        if step in LASTING:
            yield Strike(VICTIMS[place % 2], f"after:{step}:1:stop")


def _at_boundaries(lab: Lab, tally: FaultCount, strikes: Sequence[Strike]) -> None:
    """Repeated kills: each run continues where the previous one was killed, and gets one step further."""
    with _box(lab, tally) as box:
        for one in strikes:
            run = box.start_run(one.at)
            box.await_(box.waiting if one.at else lambda: box.site.stage_process(STAGE), run)
            box.kill(one.victim)
            tally.strike()


def _at_random(lab: Lab, tally: FaultCount, seed: int) -> None:
    """Repeated kills, from a run's creation to its end; then `al up`, at once or when a tick left running has ended."""
    draw = random.Random(f"worker {seed}")
    with _box(lab, tally) as box:
        while tally.injected < KILLS_PER_STORY:
            run = box.start_run()
            time.sleep(draw.uniform(0, START_SECONDS + lab.reference.seconds[1]))
            state = box.state(run)
            expect(state not in ("FAILED", "CANCELLED", "CRASHED"), f"a run that nobody disturbed is {state}")
            victim, patient = draw.choice(VICTIMS), draw.random() < 0.5
            box.kill(victim)
            tally.strike(state not in ENDED)  # killing an idle worker interrupts no tick
            if victim == "worker" and patient:
                box.await_stillness()
            if state == "COMPLETED":
                box.site.answer()


@contextmanager
def _box(lab: Lab, tally: FaultCount) -> Iterator[Box]:
    """A round whose questions are all answered, no worker yet. At the end all must be as if nothing had happened."""
    with lab.studio_site() as site:
        site.extra["AL_HOME"] = str(lab.prefect.home)
        change_params(open_workspace(site.root), {"active: true": "active: false"})  # no runs except those created here
        site.git.run("commit", "--quiet", "--all", "--message", "No schedule")
        box = Box(lab, site)
        try:
            site.recover()
            site.answer()
            site.al("schedule", "apply")
            yield box
            begin = time.perf_counter()
            run = box.start_run()
            box.await_end(run)
            found = site.recover()
            tally.recoveries.append(Recovery(found.ticks + 1, time.perf_counter() - begin))
            site.check()
        finally:
            with al_home_at(lab.prefect.home):
                stop_worker(open_workspace(site.root))


class Box:
    """The site's Prefect server and worker, as users see them."""

    def __init__(self, lab: Lab, site: Site) -> None:
        self.site = site
        where = lab.prefect.environment
        user, _, word = where["PREFECT_API_AUTH_STRING"].partition(":")
        self._url, self._auth = where["PREFECT_API_URL"], (user, word)
        self._id = open_workspace(site.root).id
        self._runs: list[str] = []
        with al_home_at(lab.prefect.home):
            self._mark = str(open_workspace(site.root).home / "worker/server.json")
            self._forking = str(fork_servers(self._id) / forks.FLOWS)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return ask_prefect(method, f"{self._url}{path}", body, self._auth).raise_for_status().json()

    def start_run(self, at: str | None = None) -> str:
        """Create a run and call `al up`: the worker is back, and what the last one left is ended, also on the server.

        The run, whose id is returned, waits `at` a step's boundary. A tick that already waits there without its worker
        continues only when it is asked to end.
        """
        if not self._runs or self.state(self._runs[-1]) != "SCHEDULED":  # otherwise no worker began the last one
            self._order()
        hook = Path(__file__).parent / "runs"
        armed = {} if at is None else {"CHAOS_AT": at, "PYTHONPATH": f"{hook}{os.pathsep}{hook.parents[1]}"}
        waiting = self.waiting()
        with self.site.start_al("up", **armed) as command:
            while command.poll() is None:
                if waiting is not None and _is_asked_to_end(waiting):
                    waiting.resume()
                    waiting = None
                time.sleep(0.02)
        self._check_the_dead()
        return self._runs[-1]

    def _order(self) -> None:
        [deployment] = self._ask("POST", "/deployments/filter", {"work_pools": {"name": {"any_": [f"al-{self._id}"]}}})
        self._runs.append(str(self._ask("POST", f"/deployments/{deployment['id']}/create_flow_run", {})["id"]))

    def _check_the_dead(self) -> None:
        """Every run whose worker was killed has ended, and did not take the place of the due run."""
        *dead, due = (self._ask("GET", f"/flow_runs/{run}")["state"] for run in self._runs)
        for state in dead:
            expect(state["type"] in ("CRASHED", "COMPLETED"), f"a run whose worker was killed is {state['type']}")
        if due["type"] == "CANCELLED" and dead and _at(due) < _at(dead[-1]):
            # On a slow machine we come late, and until then Prefect takes the dead run to be running.
            self._runs.pop()
            self._order()

    def state(self, run: str) -> str:
        """The server's state of a run."""
        return str(self._ask("GET", f"/flow_runs/{run}")["state"]["type"])

    def waiting(self) -> psutil.Process | None:
        """The run's process, if it waits at a step's boundary."""
        for one in self._processes():
            with suppress(psutil.NoSuchProcess):
                if one.status() == psutil.STATUS_STOPPED:
                    return one
        return None

    def await_(self, moment: Callable[[], Any], run: str) -> None:
        """Wait for the moment to strike. Raises Failure if the run ends first."""
        end, look = time.monotonic() + RUN_SECONDS, time.monotonic() + LOOK_SECONDS
        while not moment():
            if time.monotonic() > look:
                expect((state := self.state(run)) not in ENDED, f"the run ended too early: {state}")
                look = time.monotonic() + LOOK_SECONDS
            if time.monotonic() > end:
                raise Failure(f"waited in vain for the moment to strike: the run is {self.state(run)}")
            time.sleep(0.005)

    def await_end(self, run: str) -> None:
        """Wait until the run has ended well."""
        end = time.monotonic() + RUN_SECONDS
        while (state := self.state(run)) not in ENDED and time.monotonic() < end:
            time.sleep(0.2)
        expect(state == "COMPLETED", f"a run after the kill is {state}")

    def await_stillness(self) -> None:
        """Wait until a tick without its worker has ended by itself."""
        end = time.monotonic() + RUN_SECONDS
        while self._processes():
            expect(time.monotonic() < end, "a tick whose worker was killed does not end")
            time.sleep(0.1)

    def kill(self, victim: Victim) -> None:
        """kill -9 of the worker alone, or of all that it started too."""
        found = self._started()
        ids = {one.pid for one in found}
        doomed = self._processes() if victim == "both" else [one for one in found if one.ppid() not in ids]
        expect(doomed, "there is no worker")
        for one in doomed:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(doomed, timeout=15)

    def _processes(self) -> list[psutil.Process]:
        """The worker, all its descendants, and the runs that are forks of a server, which is none of them."""
        return [*self._started(), *(one for one in psutil.process_iter() if self._is_fork(one))]

    def _started(self) -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if servers.carries_mark(one, self._mark)]

    def _is_fork(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            words, parent = process.cmdline(), process.parent()
            return self._forking in words and parent is not None and parent.cmdline() == words
        return False


def _at(state: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(state["timestamp"])


def _is_asked_to_end(process: psutil.Process) -> bool:
    """Whether SIGTERM is pending for a process that is stopped."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text("ascii", "replace").splitlines():
            name, _, value = line.partition(":")
            if name in ("SigPnd", "ShdPnd") and int(value, 16) >> (signal.SIGTERM - 1) & 1:
                return True
    return False
