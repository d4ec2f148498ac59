"""The Oracle implemented with Label Studio.

The only module that imports its SDK, which takes a second. The requests of most ticks (tasks, answers) are plain ones;
the SDK is imported for the first request about projects, users or versions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from uuid import uuid4

import httpx
from msgspec import Struct

from al_pipeline.errors import LabelStudioDown
from al_pipeline.integrations.label_studio.failures import NotFound, UnusableReply, no_label_studio
from al_pipeline.integrations.label_studio.label_config import label_config
from al_pipeline.integrations.label_studio.parsers import (
    ListedVersion,
    ProjectSettings,
    parse_answered_tasks,
    parse_id,
    parse_project,
    parse_task_states,
    parse_task_totals,
    parse_task_versions,
    parse_text,
    parse_user,
    parse_users,
)
from al_pipeline.integrations.label_studio.payloads import (
    ANSWER_FIELDS,
    LIVE,
    PROJECT_FIELDS,
    STATE_FIELDS,
    TOTALS_FIELDS,
    VERSION_FIELDS,
    task_filter,
    task_json,
    task_query,
)
from al_pipeline.integrations.label_studio.projects import (
    ProjectMark,
    check_mark,
    find_mark,
    find_project,
    is_our_title,
    missing_project,
    page_edit,
    with_mark,
)
from al_pipeline.integrations.label_studio.transport import Transport
from al_pipeline.integrations.oracle import PageEdit, ProjectRef, ProjectSpec, ignore
from al_pipeline.records import AnsweredTask, Task, TaskState, TaskTotals, TaskVersion

if TYPE_CHECKING:
    from label_studio_sdk.base_client import LabelStudioBase


_TaskT = TypeVar("_TaskT", TaskState, AnsweredTask, ListedVersion)
_PageT = TypeVar("_PageT")

SEQUENTIAL, UNCERTAINTY = "Sequential sampling", "Uncertainty sampling"
"""Orders in which Label Studio serves tasks, by its names."""

_PAGE = 500
_PROJECTS_PAGE = 100
_KEYS_PER_REQUEST = 50


class About(Struct, frozen=True):
    """The server's version, the e-mail address of our user, and how far its clock is ahead of ours, in seconds."""

    version: str
    user: str
    clock_ahead: float | None


class LabelStudioOracle:
    """Label Studio at `url`, with a token of either kind. Close it, or use it as a context manager.

    `timeout` limits each request, in seconds; `transport` replaces the network in tests. `accounts_seconds`: how long
    the addresses of accounts are believed before changes are read with them. Creating it sends nothing. Raises
    LabelStudioRefused for an invalid address or token.
    """

    def __init__(
        self,
        url: str,
        token: str,
        timeout: float = 60.0,
        *,
        accounts_seconds: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._transport = Transport(url, token, timeout, sleep=sleep, transport=transport)
        self._token, self._timeout = token, timeout
        self._emails: dict[int, str] = {}
        self._accounts_seconds, self._listed_at = accounts_seconds, -math.inf

    def __repr__(self) -> str:
        return f"LabelStudioOracle({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The server's address, without a slash at its end."""
        return self._transport.url

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @cached_property
    def _client(self) -> LabelStudioBase:
        # The generated client. The SDK's top-level class adds label interfaces and exports that are not used here, and
        # imports pandas and a JSON Schema faker for them, which takes three seconds.
        from label_studio_sdk.base_client import LabelStudioBase

        http = self._transport.http
        return LabelStudioBase(
            base_url=self.url, api_key=self._token, timeout=self._timeout, max_retries=0, httpx_client=http
        )

    def _by_sdk(self, call: Callable[[LabelStudioBase], Any]) -> Callable[[], Any]:
        """Wrap a request made through the SDK: its ApiError becomes UnusableReply."""

        def send() -> Any:
            from label_studio_sdk.core.api_error import ApiError

            try:
                return call(self._client)
            except ApiError as error:
                reply = UnusableReply(error.status_code, error.headers or {}, error.body)
            raise reply  # outside the handler, so that the SDK's error is not chained to it

        return send

    # Projects ------------------------------------------------------------------------------------------------------

    def about(self) -> About:
        """The server's version, our user and the clock difference, for `al doctor`. Checks the token."""
        what, whoami = "asking who we are", self._by_sdk(lambda sdk: sdk.users.whoami())
        try:
            _, email = self._transport.read(what, whoami, lambda user: parse_user(user.id, user.email))
        except NotFound:
            raise no_label_studio(what, self.url) from None
        ask = self._by_sdk(lambda sdk: sdk.versions.get())
        version = self._transport.read("asking for the version", ask, lambda found: str(found.release))
        return About(version, email, self._transport.clock_ahead())

    def ensure_project(
        self, spec: ProjectSpec, known: ProjectRef | None = None, on_page_edit: Callable[[PageEdit], None] = ignore
    ) -> ProjectRef:
        """Find or create our project and update its settings; see Oracle. Also raises BadParams."""
        settings: dict[str, Any] = {
            "label_config": label_config(spec.schema, review=spec.review),
            "maximum_annotations": spec.overlap,
            "show_collab_predictions": spec.show_guess,
            "title": spec.title or f"al {spec.workspace_id}",
        }
        ref = known or find_project(self._descriptions(), spec.workspace_id)
        if ref is None:
            return self._create_project(spec.workspace_id, spec.clone_id, settings)
        project = self._project(ref, spec.workspace_id, spec.clone_id)
        if spec.title is None or not is_our_title(project.title, spec.workspace_id):
            del settings["title"]
        if edit := page_edit(project.labels, spec.schema, spec.published):
            settings["label_config"] = label_config(spec.schema, edit.added, review=spec.review)
            on_page_edit(edit)
        if changed := {key: value for key, value in settings.items() if getattr(project, key) != value}:
            self._update(ref, "changing the project's settings", changed)
        return ref

    def serve_newest(self, ref: ProjectRef, newest: bool) -> None:
        """Serve live questions by falling place, or tasks in order of their ids; see Oracle.

        Label Studio does so by the scores of predictions of one version (uncertainty sampling). Where several people
        have answered, it draws one of them instead [seen in its source].
        """
        get = partial(self._transport.get, f"api/projects/{ref.project_id}/", {"include": PROJECT_FIELDS})
        project = self._transport.read("reading the project", get, parse_project)
        ours = project.sampling == UNCERTAINTY and project.model_version == LIVE
        if newest and not ours:
            self._update(ref, "changing the order of tasks", {"sampling": UNCERTAINTY, "model_version": LIVE})
        elif ours and not newest:
            self._update(ref, "changing the order of tasks", {"sampling": SEQUENTIAL})

    def add_webhook(self, ref: ProjectRef, url: str, headers: Mapping[str, str]) -> int:
        """Have Label Studio send an empty request to `url` whenever an answer is given, changed or deleted; its id.

        Raises LabelStudioRefused if the server may not send requests to that address.
        """
        create = self._by_sdk(
            lambda sdk: sdk.webhooks.create(
                project=ref.project_id,
                url=url,
                headers=dict(headers),
                actions=["ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"],
                send_for_all_actions=False,
                send_payload=False,
                is_active=True,
            )
        )
        return self._transport.write("adding a webhook", create, _id_of)

    def remove_webhook(self, number: int) -> None:
        """Remove a webhook; one that is gone already does no harm."""
        with suppress(NotFound):
            remove = self._by_sdk(lambda sdk: sdk.webhooks.delete(number))
            self._transport.write("removing a webhook", remove, lambda _: None)

    def check(self, ref: ProjectRef, workspace_id: str, clone_id: str | None = None) -> None:
        """Raise WrongProject unless `ref` is ours; see Oracle."""
        self._project(ref, workspace_id, clone_id)

    def adopt(self, ref: ProjectRef, workspace_id: str, clone_id: str) -> None:
        """Make this clone the writer; see Oracle."""
        project = self._project(ref, workspace_id, None)
        mark = ProjectMark(workspace_id, clone_id, ref.project_uid)
        self._update(ref, "adopting the project", {"description": with_mark(project.description, mark)})

    def _update(self, ref: ProjectRef, what: str, changes: Mapping[str, Any]) -> None:
        update = self._by_sdk(lambda sdk: sdk.projects.update(ref.project_id, **changes))
        self._transport.write(what, update, _id_of)

    def _create_project(self, workspace_id: str, clone_id: str, settings: Mapping[str, Any]) -> ProjectRef:
        mark = ProjectMark(workspace_id, clone_id, uuid4().hex[:12])
        create = self._by_sdk(
            lambda sdk: sdk.projects.create(
                description=str(mark),
                sampling=SEQUENTIAL,
                overlap_cohort_percentage=100,
                skip_queue="REQUEUE_FOR_OTHERS",
                enable_empty_annotation=False,
                **settings,
            )
        )
        return ProjectRef(self._transport.write("creating the project", create, _id_of), mark.project_uid)

    def _project(self, ref: ProjectRef, workspace_id: str, clone_id: str | None) -> ProjectSettings:
        get = partial(self._transport.get, f"api/projects/{ref.project_id}/", {"include": PROJECT_FIELDS})
        try:
            project = self._transport.read("reading the project", get, parse_project)
        except NotFound:
            self.about()  # raises if another service answers: its 404 proves nothing
            raise missing_project(ref) from None
        check_mark(find_mark(project.description), ref, workspace_id, clone_id)
        return project

    def _descriptions(self) -> Iterator[tuple[int, str | None]]:
        """Yield the number and description of every project."""
        page = 1
        while True:
            wanted = self._by_sdk(partial(_list_projects, page=page))
            try:
                found = self._transport.read("listing the projects", wanted, _descriptions_of)
            except NotFound:
                if page == 1:
                    raise
                return  # the last page was full
            yield from found
            if len(found) < _PROJECTS_PAGE:
                return
            page += 1

    # Tasks ---------------------------------------------------------------------------------------------------------

    def task_states(self, ref: ProjectRef, round: int | None = None, first: int = 0) -> Iterator[TaskState]:
        """Every task (of one round); see Oracle."""
        of_round = [] if round is None else [task_filter("data.al_round", "equal", "Number", round)]
        return self._states(ref, of_round, max(0, first - 1))

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """Every task still in the queue; see Oracle."""
        return self._states(ref, [task_filter("is_labeled", "equal", "Boolean", False)])

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """Add tasks in one request that is never retried; see Oracle."""
        path, body = f"api/projects/{ref.project_id}/import", [task_json(task) for task in tasks]
        send = partial(self._transport.send, "POST", path, body, {"return_task_ids": "true"})
        taken = self._transport.write(f"sending {len(tasks)} tasks", send, lambda reply: reply["task_count"])
        if taken != len(tasks):
            raise LabelStudioDown(f"Label Studio reports that it accepted {taken!r} of {len(tasks)} tasks")

    def changed(self, ref: ProjectRef, since: str) -> Mapping[int, TaskVersion]:
        """The versions of the tasks changed since then; see Oracle."""
        return dict(self._tasks(ref, [_changed_since(since)], VERSION_FIELDS, "task_only", parse_task_versions))

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """Tasks changed since then with all annotations; see Oracle."""
        touched = [] if since is None else [_changed_since(since)]
        if since is None or time.monotonic() - self._listed_at >= self._accounts_seconds:
            self._emails = self._list_emails()
        yield from self._answered(ref, touched)

    def answered_after(self, ref: ProjectRef, task_id: int, before: str, limit: int) -> Iterator[AnsweredTask]:
        """The next tasks by id; see Oracle."""
        page = min(limit, _PAGE)
        return islice(self._answered(ref, [_changed_before(before)], after=task_id, page=page), limit)

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """Tasks with these keys; see Oracle."""
        keys = sorted(push_keys)
        for start in range(0, len(keys), _KEYS_PER_REQUEST):
            some = keys[start : start + _KEYS_PER_REQUEST]
            yield from self._answered(ref, [task_filter("data.push_key", "in_list", "List", some)])

    def totals(self, ref: ProjectRef, before: str) -> TaskTotals:
        """Totals of the tasks last changed earlier; see Oracle."""
        query = task_query([_changed_before(before)], ordering=["-tasks:updated_at"])
        return self._page(ref, query, TOTALS_FIELDS, "task_only", 1, parse_task_totals)

    def accounts(self) -> Mapping[int, str]:
        """All accounts; see Oracle."""
        self._emails = self._list_emails()
        return dict(self._emails)

    def ask_more(self, ref: ProjectRef, answers: Mapping[int, int]) -> None:
        """Put tasks back into the queue; see Oracle. Both fields in one request: else the task is not served again."""
        for task_id, wanted in answers.items():
            self._change_task("asking another person", task_id, {"overlap": wanted, "is_labeled": False})

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """Take tasks out of the queue; see Oracle."""
        for task_id in task_ids:
            self._change_task("retiring a task", task_id, {"is_labeled": True})

    def _change_task(self, what: str, task_id: int, changes: Mapping[str, Any]) -> None:
        change = partial(self._transport.send, "PATCH", f"api/tasks/{task_id}/", dict(changes))
        with suppress(NotFound):
            self._transport.write(what, change, lambda reply: parse_id(reply["id"]))

    def _states(self, ref: ProjectRef, filters: list[dict[str, Any]], after: int = 0) -> Iterator[TaskState]:
        return self._tasks(ref, filters, STATE_FIELDS, "task_only", parse_task_states, after)

    def _answered(
        self, ref: ProjectRef, filters: list[dict[str, Any]], after: int = 0, page: int = _PAGE
    ) -> Iterator[AnsweredTask]:
        parse = partial(parse_answered_tasks, email_of=self._email_of)
        return self._tasks(ref, filters, ANSWER_FIELDS, "all", parse, after, page)

    def _tasks(
        self,
        ref: ProjectRef,
        filters: list[dict[str, Any]],
        include: str,
        fields: Literal["all", "task_only"],
        parse: Callable[[Any], list[_TaskT]],
        after: int = 0,
        size: int = _PAGE,
    ) -> Iterator[_TaskT]:
        """Yield tasks by increasing id. Each page starts after the last id, so that concurrent changes skip no row."""
        last = after
        ids: list[int]
        while True:
            query = task_query([*filters, task_filter("id", "greater", "Number", last)], ordering=["tasks:id"])
            found = self._page(ref, query, include, fields, size, parse)
            ids = [task.task_id for task in found]
            if any(later <= earlier for earlier, later in zip([last, *ids], ids, strict=False)):
                raise LabelStudioDown(
                    "Label Studio listed tasks out of order; does a proxy in between change its replies?"
                )
            yield from found
            if len(found) < size:
                return
            last = ids[-1]

    def _page(
        self,
        ref: ProjectRef,
        query: str,
        include: str,
        fields: Literal["all", "task_only"],
        size: int,
        parse: Callable[[Any], _PageT],
    ) -> _PageT:
        """One page of a task listing, with at most `size` tasks."""
        parameters: dict[str, str | int] = {
            "project": ref.project_id,
            "page": 1,
            "page_size": size,
            "fields": fields,
            "include": include,
            "query": query,
        }
        try:
            return self._transport.read("listing tasks", partial(self._transport.get, "api/tasks/", parameters), parse)
        except NotFound:
            raise missing_project(ref) from None

    # Users ---------------------------------------------------------------------------------------------------------

    def _email_of(self, number: int) -> str:
        if number not in self._emails:  # a user added since the listing
            self._emails = {number: f"user:{number}", **self._list_emails()}
        return self._emails[number]

    def _list_emails(self) -> dict[int, str]:
        found = self._transport.read("listing the users", partial(self._transport.get, "api/users/"), parse_users)
        self._listed_at = time.monotonic()
        return found


# Requests and replies of the SDK, as objects with attributes --------------------------------------------------------


def _list_projects(sdk: LabelStudioBase, *, page: int) -> Any:
    return sdk.projects.list(page=page, page_size=_PROJECTS_PAGE, include="id,description")


def _descriptions_of(page: Any) -> list[tuple[int, str | None]]:
    # `.items` is one page; the SDK's iterator would end silently on an error.
    return [(parse_id(project.id), parse_text(project.description)) for project in page.items]


def _changed_since(time: str) -> dict[str, Any]:
    return task_filter("updated_at", "greater_or_equal", "Datetime", time)


def _changed_before(time: str) -> dict[str, Any]:
    return task_filter("updated_at", "less", "Datetime", time)


def _id_of(found: Any) -> int:
    return parse_id(found.id)
