"""What annotators (and vandals) do, by the same methods at the simulated oracle and a real Label Studio."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from al_pipeline.files import read_json
from al_pipeline.integrations.label_studio.payloads import choice_result
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.params import Schema
from al_pipeline.records import Part, PlannedTask, Task, push_key
from al_pipeline.workspace.workspace import Workspace

ANN, BOB = "ann@example.com", "bob@example.com"
SCHEMA = Schema(version=1, question="Which label fits?", labels=["ham", "spam"], fields=["text"])


def planned(workspace: str, number: int, item: str, part: Part = "pool", rank: int = 0) -> PlannedTask:
    """One row of a plan."""
    return PlannedTask(
        push_key=push_key(workspace, number, item),
        item_id=item,
        content_hash=f"hash-of-{item}",
        part=part,
        round=number,
        rank=rank,
        score=0.5,
        strategy="margin",
        probability=0.25,
    )


def tasks_of(workspace: str, number: int, count: int, part: Part = "pool") -> list[Task]:
    """The tasks of a round, `item-0` first."""
    plans = [planned(workspace, number, f"item-{n}", part, n) for n in range(count)]
    return [Task(plan, {"text": f"text of {plan.item_id}"}) for plan in plans]


def shown(tasks: Sequence[Task]) -> Callable[[Sequence[PlannedTask]], list[Task]]:
    """A function that adds what annotators see to planned tasks, as `push` expects it."""
    by_key = {task.plan.push_key: task for task in tasks}
    return lambda plan: [by_key[planned.push_key] for planned in plan]


class Rig(Protocol):
    """A Label Studio of some kind, and people who work in it. `served`: the key that the label stream serves next."""

    oracle: Oracle

    def answer(self, ref: ProjectRef, key: str, who: str, label: Any) -> int: ...
    def skip(self, ref: ProjectRef, key: str, who: str) -> int: ...
    def edit(self, ref: ProjectRef, annotation: int, label: Any, cancelled: bool = False) -> None: ...
    def delete_annotation(self, ref: ProjectRef, annotation: int) -> None: ...
    def delete_task(self, ref: ProjectRef, key: str) -> None: ...
    def edit_data(self, ref: ProjectRef, key: str, **changes: Any) -> None: ...
    def delete_project(self, ref: ProjectRef) -> None: ...
    def served(self, ref: ProjectRef) -> str: ...


class SimulatedRig:
    """People who work in the simulated oracle."""

    def __init__(self) -> None:
        self.oracle = SimulatedOracle()

    def answer(self, ref: ProjectRef, key: str, who: str, label: Any) -> int:
        return self.oracle.answer(key, who, label, ref.project_id)

    def skip(self, ref: ProjectRef, key: str, who: str) -> int:
        return self.oracle.skip(key, who, ref.project_id)

    def edit(self, ref: ProjectRef, annotation: int, label: Any, cancelled: bool = False) -> None:
        self.oracle.edit(annotation, label, cancelled, ref.project_id)

    def delete_annotation(self, ref: ProjectRef, annotation: int) -> None:
        self.oracle.delete_annotation(annotation, ref.project_id)

    def delete_task(self, ref: ProjectRef, key: str) -> None:
        self.oracle.delete_task(key, ref.project_id)

    def edit_data(self, ref: ProjectRef, key: str, **changes: Any) -> None:
        self.oracle.edit_data(key, ref.project_id, **changes)

    def delete_project(self, ref: ProjectRef) -> None:
        del self.oracle.projects[ref.project_id]

    def served(self, ref: ProjectRef) -> str:
        return self.oracle.queue("somebody@example.com", ref.project_id)[0]


def leave(server: Any, workspace: Workspace) -> None:
    """Delete the workspace's projects: a later test whose workspace has the same id would find them."""
    from label_studio_sdk.core.api_error import ApiError

    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

    stored = (read_json(path, {}) for path in (workspace.layout.project, workspace.layout.review_project))
    for found in filter(None, stored):
        with LabelStudioOracle(server.url, server.token) as oracle, ServerRig(server, oracle) as rig:
            try:
                rig.delete_project(ProjectRef(**found))
            except ApiError as error:  # the test may have named one that never existed
                if error.status_code != 404:
                    raise


class ServerRig:
    """People at a real server, all played by an administrator: Label Studio lets any member answer for another."""

    def __init__(self, server: Any, oracle: Oracle) -> None:
        import httpx
        from label_studio_sdk import LabelStudio

        self.oracle = oracle
        self._server = server
        self._users: dict[str, int] = {}
        self._http = httpx.Client(timeout=60)
        self._client = LabelStudio(
            base_url=server.url, api_key=server.token, timeout=60, max_retries=0, httpx_client=self._http
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def answer(self, ref: ProjectRef, key: str, who: str, label: Any) -> int:
        result = choice_result(label) if isinstance(label, str) else label
        return self._annotate(ref, key, who, result, False)

    def skip(self, ref: ProjectRef, key: str, who: str) -> int:
        return self._annotate(ref, key, who, [], True)

    def edit(self, ref: ProjectRef, annotation: int, label: Any, cancelled: bool = False) -> None:
        result = choice_result(label) if isinstance(label, str) else label
        self._client.annotations.update(annotation, result=result, was_cancelled=cancelled)

    def delete_annotation(self, ref: ProjectRef, annotation: int) -> None:
        self._client.annotations.delete(annotation)

    def delete_task(self, ref: ProjectRef, key: str) -> None:
        self._client.tasks.delete(str(self._task(ref, key).id))

    def edit_data(self, ref: ProjectRef, key: str, **changes: Any) -> None:
        task = self._task(ref, key)
        self._client.tasks.update(str(task.id), data={**task.data, **changes})

    def delete_project(self, ref: ProjectRef) -> None:
        self._client.projects.delete(ref.project_id)

    def served(self, ref: ProjectRef) -> str:
        reply = self._client._client_wrapper.httpx_client.request(f"api/projects/{ref.project_id}/next", method="GET")
        return str(reply.json()["data"]["push_key"])

    def _annotate(self, ref: ProjectRef, key: str, who: str, result: Any, cancelled: bool) -> int:
        made = self._client.annotations.create(
            self._task(ref, key).id,
            result=result,
            was_cancelled=cancelled,
            completed_by=self._user(who),
            lead_time=1.0,
        )
        return int(made.id)

    def _user(self, email: str) -> int:
        if email not in self._users:
            self._users = {user.email: user.id for user in self._client.users.list()}
        if email not in self._users:
            self._server.invite(email)
            self._users = {user.email: user.id for user in self._client.users.list()}
        return self._users[email]

    def _task(self, ref: ProjectRef, key: str) -> Any:
        wanted = {"filter": "filter:tasks:data.push_key", "operator": "equal", "type": "String", "value": key}
        query = json.dumps({"filters": {"conjunction": "and", "items": [wanted]}, "ordering": ["tasks:id"]})
        found = self._client.tasks.list(project=ref.project_id, page=1, page_size=10, query=query, include="id,data")
        return found.items[0]
