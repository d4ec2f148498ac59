"""The parts of scenarios, and the servers that a worker keeps for them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from embedded import LabelStudioServer, al_home_at, silent

from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.servers import prefect_environment, start_prefect, stop_prefect
from al_pipeline.workspace.workspace import open_workspace
from chaos.reference import Reference
from chaos.sites import ANN, BOB, Recovery, Site, said

ROBOT = "robot.chaos@example.com"
"""The account whose token the pipeline uses."""

BUSY_SECONDS = 60.0


@dataclass
class FaultCount:
    """What a scenario did, counted as it runs, so that a failure shows how far it came."""

    injected: int = 0
    recoveries: list[Recovery] = field(default_factory=list)

    def strike(self, count: int = 1) -> None:
        """Count a fault that was injected."""
        self.injected += count

    def recovered(self, site: Site) -> Recovery:
        """Tick until nothing is left to do, and measure the time."""
        found = site.recover()
        self.recoveries.append(found)
        return found


@dataclass(frozen=True)
class Scenario:
    """A sequence of faults, after which all must be as if nothing had happened. `play` raises Failure otherwise."""

    name: str
    kind: str
    """The row of the table."""
    play: Callable[[Lab, FaultCount], None]
    kills: bool = False
    """Whether its faults are kills."""
    real: bool = False
    """Whether Label Studio is a real one."""
    strikes: int = 1
    """The number of its kills, unless the tick is faster."""


@dataclass
class Lab:
    """What one worker uses: the reference, a folder, and servers that start when a scenario first needs them."""

    reference: Reference
    folder: Path
    _made: int = 0

    @contextmanager
    def site(self, start: str = "start-0", folder: Path | None = None) -> Iterator[Site]:
        """A copy of a snapshot with the twin, in `folder` if its place matters."""
        place = self._place()
        with self.reference.site(folder or place, start, place.with_suffix(".outside")) as site:
            yield site

    @contextmanager
    def studio_site(self, url: str | None = None) -> Iterator[Site]:
        """A copy of the workspace whose first questions are planned but not asked, with the real Label Studio.

        `url` is the address that ticks use, such as a proxy's.
        """
        self.studio.empty()
        people = StudioPeople(self.studio, url)
        start = self.reference.before(0, "connect")
        place = self._place()
        with self.reference.placed(place, start, people, place.with_suffix(".outside")) as site:
            yield site

    @contextmanager
    def flow_site(self, start: str) -> Iterator[Site]:
        """A copy of a snapshot with the twin and a Prefect server: each tick is a flow run."""
        with self.site(start) as site:
            site.extra["AL_HOME"] = str(self.prefect.home)
            yield site

    def _place(self) -> Path:
        self._made += 1
        return self.folder / f"site-{self._made}"

    @cached_property
    def studio(self) -> Studio:
        """The worker's Label Studio."""
        return Studio(self.folder / "studio")

    @cached_property
    def prefect(self) -> Prefect:
        """The worker's Prefect server."""
        any_copy = self.reference.snapshots["start-0"].folder / "workspace"
        return Prefect(self.folder / "prefect", any_copy)

    def close(self) -> None:
        """Stop what was started."""
        for name in ("studio", "prefect"):
            if name in self.__dict__:
                self.__dict__.pop(name).stop()


class Prefect:
    """A Prefect server that all copies of the workspace use as their own: they have the same home and id."""

    def __init__(self, home: Path, workspace: Path) -> None:
        self.home = home
        self._workspace = open_workspace(workspace)
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """The environment that a client needs. Waits for a server that is too busy to report its health."""
        end = time.monotonic() + BUSY_SECONDS
        with al_home_at(self.home):
            while not (found := prefect_environment(self._workspace)) and time.monotonic() < end:
                time.sleep(0.5)
        return found

    def start(self) -> None:
        """Start it, if it is not running, at its old port."""
        with al_home_at(self.home):
            start_prefect(self._workspace, silent)

    def stop(self) -> None:
        """Stop it; its data is kept."""
        with al_home_at(self.home):
            stop_prefect(self._workspace)


class Studio:
    """A real Label Studio whose database can be saved and restored; with two annotators and the pipeline's account."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._saved: dict[str, dict[str, str]] = {}
        """The tokens of each saved database."""
        self.server = LabelStudioServer(folder)
        self.tokens = {email: self.server.invite(email) for email in (ANN, BOB, ROBOT)}
        self.ids = {email: int(self.api("GET", "/api/current-user/whoami", email)["id"]) for email in self.tokens}
        self.save("empty")

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def token(self) -> str:
        """The pipeline's token."""
        return self.tokens[ROBOT]

    def api(self, method: str, path: str, who: str = ROBOT, **content: Any) -> Any:
        """The reply to one request of the REST API, by default as the pipeline."""
        reply = httpx.request(
            method,
            f"{self.url}{path}",
            headers={"Authorization": f"Token {self.tokens[who]}"},
            json=content or None,
            timeout=60,
            trust_env=False,
            verify=False,
        )
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def new_token(self) -> None:
        """Revoke the pipeline's token and create another."""
        self.tokens[ROBOT] = str(self.api("POST", "/api/current-user/reset-token")["token"])

    def projects(self) -> list[int]:
        """Ids of all projects."""
        return [int(project["id"]) for project in self.api("GET", "/api/projects?page_size=100")["results"]]

    def empty(self) -> None:
        """Delete every project."""
        for number in self.projects():
            self.api("DELETE", f"/api/projects/{number}/")

    def tasks(self) -> list[dict[str, Any]]:
        """All tasks of all projects, by id."""
        found: list[dict[str, Any]] = []
        for number in self.projects():
            query = f"project={number}&page_size=1000&fields=task_only&include=id,data,is_labeled"
            counts = "total_annotations,cancelled_annotations"
            found += self.api("GET", f"/api/tasks?{query},{counts}")["tasks"]
        return sorted(found, key=lambda task: int(task["id"]))

    def save(self, name: str) -> None:
        """Save the database, as a backup would. (Stops the server and starts it again.)"""
        self.server.stop()
        shutil.copytree(self.server.data_dir, self._folder / name, dirs_exist_ok=True)
        self._saved[name] = dict(self.tokens)
        self.server.restart()

    def restore(self, name: str) -> None:
        """Restore a saved database."""
        self.server.stop()
        shutil.rmtree(self.server.data_dir)
        shutil.copytree(self._folder / name, self.server.data_dir)
        self.tokens = dict(self._saved[name])
        self.server.restart()

    def stop(self) -> None:
        """Stop the server."""
        self.server.stop()


class StudioPeople:
    """People at a real Label Studio, played through the API."""

    def __init__(self, studio: Studio, url: str | None = None) -> None:
        self._studio = studio
        self._url = url
        self.given: dict[tuple[str, str], str | None] = {}
        self.backwards = False
        """Whether the last open task is answered first."""

    @property
    def environment(self) -> dict[str, str]:
        """See People."""
        return {
            "AL_LABEL_STUDIO_URL": self._url or self._studio.url,
            "AL_LABEL_STUDIO_TOKEN": self._studio.token,
        }

    def answer(self, truth: Mapping[str, str], most: int | None = None) -> int:
        """See People."""
        answered = {key for key, _ in self.given}
        open_tasks = [task for task in self._studio.tasks() if not task["is_labeled"]]
        fresh = [task for task in open_tasks if task["data"]["push_key"] not in answered][:most]
        fresh = fresh[::-1] if self.backwards else fresh
        jobs = [(task, who, label) for task in fresh for who, label in said(task["data"]["push_key"], truth)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: self.give(*job), jobs))
        return len(fresh)

    def give(self, task: Mapping[str, Any], who: str, label: str | None) -> None:
        """One answer of one person."""
        result = [] if label is None else choice_result(label)
        content = {"result": result, "was_cancelled": label is None, "lead_time": 1.0}
        self._studio.api("POST", f"/api/tasks/{task['id']}/annotations/", who, **content)
        self.given[task["data"]["push_key"], who] = label

    def keys(self) -> list[str]:
        """See People."""
        counts = ("total_annotations", "cancelled_annotations")
        live = [task for task in self._studio.tasks() if not task["is_labeled"] or any(task[name] for name in counts)]
        return [str(task["data"]["push_key"]) for task in live]


def project_of(site: Site) -> ProjectRef:
    """The site's project in Label Studio."""
    from al_pipeline.files import read_json

    return ProjectRef(**read_json(site.layout.project))


def oracle_of(studio: Studio) -> LabelStudioOracle:
    """A client of the real Label Studio."""
    return LabelStudioOracle(studio.url, studio.token)
