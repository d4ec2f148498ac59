"""Scenarios of the worker that `al up` starts: kill -9 of it while it runs a tick, then `al up` again.

A real Label Studio, a real Prefect server, and runs of the workspace's deployment, as the schedule or the button in
Prefect's page starts them: nothing of the suite is inside of the processes that are killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import httpx
import psutil
from embedded import al_home_at
from harness import change_params

from al_pipeline.lock import holder
from al_pipeline.servers import process as servers
from al_pipeline.servers import stop_worker
from al_pipeline.workspace import open_workspace
from chaos.lab import Lab, Scenario, Tally
from chaos.sites import Failure, Recovery, Site, expect

Victim = Literal["worker", "both"]

RUN_SECONDS = 120.0
"""What a run may take from its order to its end, the worker's wait between two looks included."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


def worker_scenarios() -> Iterator[Scenario]:
    """All of them."""
    shown: dict[Victim, str] = {
        "worker": "kill -9 of Prefect's worker, its tick left running",
        "both": "kill -9 of Prefect's worker and its tick",
    }
    for victim, kind in shown.items():
        yield Scenario(
            f"worker of `al up`, {victim}", kind, partial(_killed, victim=victim), kills=True, real=True, strikes=3
        )


def _killed(lab: Lab, tally: Tally, victim: Victim) -> None:
    """Before a tick did anything, in the middle of a stage, and between a round's commit and what must follow it."""
    with lab.studio_site() as site:
        site.extra["AL_HOME"] = str(lab.prefect.home)
        change_params(open_workspace(site.root), {"active: true": "active: false"})  # no run but those asked for here
        site.git.run("commit", "--quiet", "--all", "--message", "No schedule")
        box = Box(lab, site)
        try:
            site.recover()
            site.answer()
            site.al("up")
            head = site.git.head()
            for moment in (
                lambda: holder(site.layout.lock).get("purpose", "").startswith("a tick, Prefect's run"),
                lambda: site.stage_process("train"),
                lambda: site.git.head() != head,
            ):
                run = box.start_run()
                box.await_(moment, run)
                box.kill(victim)
                tally.strike()
                begin = time.perf_counter()
                site.al("up")
                state = box.state(run)
                expect(state in ("CRASHED", "COMPLETED"), f"a run whose worker was killed is shown as {state}")
                expect(not holder(site.layout.lock), "a tick is still at work although its worker was killed")
            box.await_end(box.start_run())
            found = site.recover()
            tally.recoveries.append(Recovery(found.ticks + 1, time.perf_counter() - begin))
            site.check()
        finally:
            with al_home_at(lab.prefect.home):
                stop_worker(open_workspace(site.root))


class Box:
    """The site's Prefect server and worker, as their users see them."""

    def __init__(self, lab: Lab, site: Site) -> None:
        where = lab.prefect.environment
        user, _, word = where["PREFECT_API_AUTH_STRING"].partition(":")
        self._client = httpx.Client(
            base_url=where["PREFECT_API_URL"], auth=(user, word), timeout=60, trust_env=False, follow_redirects=True
        )
        self._id = open_workspace(site.root).id
        with al_home_at(lab.prefect.home):
            self._mark = str(open_workspace(site.root).home / "worker/server.json")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return self._client.request(method, path, json=body).raise_for_status().json()

    def start_run(self) -> str:
        """Order a run of the deployment; its id."""
        deployment = self._ask("GET", f"/deployments/name/al-round/{self._id}")
        return str(self._ask("POST", f"/deployments/{deployment['id']}/create_flow_run", {})["id"])

    def state(self, run: str) -> str:
        """What the server says of a run."""
        return str(self._ask("GET", f"/flow_runs/{run}")["state"]["type"])

    def await_(self, moment: Callable[[], Any], run: str) -> None:
        """Wait for the moment to strike. Raises Failure where the run ends first."""
        end, look = time.monotonic() + RUN_SECONDS, 0.0
        while not moment():
            if time.monotonic() > look:
                expect((state := self.state(run)) not in ENDED, f"the run ended too early: {state}")
                look = time.monotonic() + 1
            if time.monotonic() > end:
                raise Failure(f"waited in vain for the moment to strike: the run is {self.state(run)}")
            time.sleep(0.005)

    def await_end(self, run: str) -> None:
        """Wait until the run has ended well."""
        end = time.monotonic() + RUN_SECONDS
        while (state := self.state(run)) not in ENDED and time.monotonic() < end:
            time.sleep(0.2)
        expect(state == "COMPLETED", f"a run after the kill is {state}")

    def kill(self, victim: Victim) -> None:
        """kill -9 of the worker alone, or of all that it started too."""
        found = [one for one in psutil.process_iter() if servers._carries(one, self._mark)]
        ids = {one.pid for one in found}
        doomed = [one for one in found if victim == "both" or one.ppid() not in ids]
        expect(doomed and len(found) > 1, "the worker runs no tick")
        for one in doomed:
            one.kill()
        psutil.wait_procs(doomed, timeout=15)
