"""The Oracle that is Label Studio. The only importer of its SDK, which costs a second: what a tick asks while it waits
goes without it (`reads`), and the SDK is loaded by the first request of another kind.

Only reads are repeated: after a lost reply nobody knows whether a write took place, and Label Studio never notices a
duplicate. Errors name the call and the status, never a body or a header: those hold texts, tokens and sessions.

A server that asks us to wait (429 or 503 with `Retry-After`) is not asked earlier than it says, whatever the request.
We wait for a minute at most, all waits of one client taken together; where more is asked, the call fails and says so.
"""

from __future__ import annotations

import json
import random
import socket
import ssl
import string
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from uuid import uuid4
from xml.etree import ElementTree

import httpx

from al_pipeline.errors import BadParams, LabelStudioDown, LabelStudioRefused
from al_pipeline.integrations.label_studio.reads import PlainReads, UnusableReply
from al_pipeline.integrations.oracle import (
    CONTROL,
    TIME_FORMAT,
    PageEdit,
    ProjectMark,
    ProjectRef,
    check_mark,
    data_key,
    find_mark,
    ignore,
    is_our_title,
    missing_project,
    page_edit,
    raw_result,
    several_projects,
    task_json,
    task_state,
    with_mark,
)
from al_pipeline.params import Schema
from al_pipeline.records import Annotation, AnsweredTask, Task, TaskState, composed, shown_text
from al_pipeline.sanitize import redact

if TYPE_CHECKING:
    from label_studio_sdk.base_client import LabelStudioBase

_T = TypeVar("_T")

_READ_ATTEMPTS = 4
_FIRST_DELAY = 0.5
_PATIENCE_SECONDS = 60.0
"""How long a server may have one client wait by `Retry-After`, in all: a tick must come to its end."""
_DAY = 86_400.0
_PAGE = 500
_KEYS_PER_REQUEST = 50
_HOTKEYS = string.digits[1:] + "0" + "".join(key for key in string.ascii_lowercase if key not in "hru")
"""Of the classes, in their order. Label Studio's editor has h, r and u for itself (pan, rectangle, unselect)."""
_STATE = "id,data,is_labeled,total_annotations,cancelled_annotations"
_ANSWERS = "id,data,annotations,updated_at,result,completed_by,was_cancelled,lead_time,created_at"
"""Also filters inside annotations, hence the names of their keys."""


@dataclass(frozen=True, slots=True)
class About:
    """Which server answers, as whom we talk to it, and how far its clock is ahead of ours, in seconds."""

    version: str
    user: str
    clock_ahead: float | None


class _NotFound(LabelStudioRefused):
    """The server has no such thing (404), or does not let us see it."""


class LabelStudioOracle:
    """Label Studio at `url`, with a token of either kind. Close it, or use it as a context manager.

    `timeout` bounds each request, in seconds; `transport` stands in for the network in tests. Creating it sends
    nothing. Raises LabelStudioRefused for an address or token that cannot be right.
    """

    def __init__(
        self,
        url: str,
        token: str,
        timeout: float = 60.0,
        *,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise LabelStudioRefused("the address of Label Studio must begin with http:// or https://")
        if redact(url) != url:
            raise LabelStudioRefused(
                "the address of Label Studio must hold no user or password, which would show in `al status` and in "
                "messages; the token alone says who we are"
            )
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise LabelStudioRefused(
                "the token of Label Studio is empty or holds characters that no token has; copy it again from "
                "Account & Settings in Label Studio"
            )
        self.url = url.rstrip("/")
        self._http = httpx.Client(timeout=timeout, transport=transport, trust_env=not _on_this_machine(self.url))
        self._plain = PlainReads(self.url, token, self._http)
        self._token, self._timeout = token, timeout
        self._sleep = sleep
        self._jitter = random.Random()
        self._not_before = 0.0
        """Until when (`time.monotonic`) the server asked us to be silent."""
        self._patience = _PATIENCE_SECONDS
        self._emails: dict[int, str] = {}

    def __repr__(self) -> str:
        return f"LabelStudioOracle({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @cached_property
    def _client(self) -> LabelStudioBase:
        # The generated client. The SDK's own top-level class adds label interfaces and exports that nothing here uses,
        # and with them pandas and a JSON Schema faker: three seconds of imports.
        from label_studio_sdk.base_client import LabelStudioBase

        return LabelStudioBase(
            base_url=self.url, api_key=self._token, timeout=self._timeout, max_retries=0, httpx_client=self._http
        )

    def _by_sdk(self, call: Callable[[LabelStudioBase], Any]) -> Callable[[], Any]:
        """A request that the SDK makes; what it raises for a reply becomes UnusableReply."""

        def send() -> Any:
            from label_studio_sdk.core.api_error import ApiError

            try:
                return call(self._client)
            except ApiError as error:
                reply = UnusableReply(error.status_code, error.headers or {}, error.body)
            raise reply  # outside the handler, so that the SDK's error does not travel with it

        return send

    # Projects ------------------------------------------------------------------------------------------------------

    def about(self) -> About:
        """The server's version, our user and the clocks; what `al doctor` asks. Checks the token."""
        try:
            user = self._read("asking who we are", self._by_sdk(lambda sdk: sdk.users.whoami()), _user)
        except _NotFound:
            raise _no_label_studio("asking who we are", self.url) from None
        ask = self._by_sdk(lambda sdk: sdk.versions.get())
        version = self._read("asking for the version", ask, lambda found: str(found.release))
        return About(version, user[1], self._clock_ahead())

    def ensure_project(
        self,
        workspace_id: str,
        clone_id: str,
        schema: Schema,
        overlap: int,
        show_guess: bool,
        known: ProjectRef | None,
        published: Collection[str] = (),
        on_page_edit: Callable[[PageEdit], None] = ignore,
        title: str | None = None,
    ) -> ProjectRef:
        """Find or create our project and bring its settings in line; see Oracle. Raises BadParams too."""
        settings: dict[str, Any] = {
            "label_config": label_config(schema),
            "maximum_annotations": overlap,
            "show_collab_predictions": show_guess,
            "title": title or f"al {workspace_id}",
        }
        ref = known or self._find_project(workspace_id)
        if ref is None:
            return self._create_project(workspace_id, clone_id, settings)
        project = self._project(ref, workspace_id, clone_id)
        if title is None or not is_our_title(project.title, workspace_id):
            del settings["title"]
        if edit := page_edit(project.labels, schema, published):
            settings["label_config"] = label_config(schema, edit.added)
            on_page_edit(edit)
        if changed := {key: value for key, value in settings.items() if getattr(project, key) != value}:
            self._update(ref, "changing the project's settings", changed)
        return ref

    def check(self, ref: ProjectRef, workspace_id: str, clone_id: str | None = None) -> None:
        """Raise WrongProject unless `ref` is ours; see Oracle."""
        self._project(ref, workspace_id, clone_id)

    def adopt(self, ref: ProjectRef, workspace_id: str, clone_id: str) -> None:
        """Make this clone the writer; see Oracle."""
        project = self._project(ref, workspace_id, None)
        mark = ProjectMark(workspace_id, clone_id, ref.project_uid)
        self._update(ref, "adopting the project", {"description": with_mark(project.description, mark)})

    def _update(self, ref: ProjectRef, what: str, changes: Mapping[str, Any]) -> None:
        self._write(what, self._by_sdk(lambda sdk: sdk.projects.update(ref.project_id, **changes)), _id)

    def _create_project(self, workspace_id: str, clone_id: str, settings: Mapping[str, Any]) -> ProjectRef:
        mark = ProjectMark(workspace_id, clone_id, uuid4().hex[:12])
        create = self._by_sdk(
            lambda sdk: sdk.projects.create(
                description=str(mark),
                sampling="Sequential sampling",
                overlap_cohort_percentage=100,
                skip_queue="REQUEUE_FOR_OTHERS",
                enable_empty_annotation=False,
                **settings,
            )
        )
        return ProjectRef(self._write("creating the project", create, _id), mark.project_uid)

    def _project(self, ref: ProjectRef, workspace_id: str, clone_id: str | None) -> _Project:
        try:
            project = self._read("reading the project", partial(self._plain.project, ref.project_id), _project)
        except _NotFound:
            self.about()  # raises where another service answers, which cannot tell
            raise missing_project(ref) from None
        check_mark(find_mark(project.description), ref, workspace_id, clone_id)
        return project

    def _find_project(self, workspace_id: str) -> ProjectRef | None:
        """The project that says it is ours: the trace of a creation whose reply, or record, was lost."""
        found: dict[int, str] = {}
        for number, description in self._descriptions():
            mark = find_mark(description)
            if mark is not None and mark.workspace_id == workspace_id:
                found[number] = mark.project_uid
        if len(found) > 1:
            raise several_projects(workspace_id, found)
        return next((ProjectRef(number, uid) for number, uid in found.items()), None)

    def _descriptions(self) -> Iterator[tuple[int, str | None]]:
        page, size = 1, 100
        while True:
            wanted = self._by_sdk(partial(_projects, page=page, page_size=size))
            try:
                found = self._read(
                    "listing the projects", wanted, _each(lambda p: (_id(p), _text_or_none(p.description)))
                )
            except _NotFound:
                if page == 1:
                    raise
                return  # the page after a full last one
            yield from found
            if len(found) < size:
                return
            page += 1

    # Tasks ---------------------------------------------------------------------------------------------------------

    def task_states(self, ref: ProjectRef, round: int | None = None) -> Iterator[TaskState]:
        """Every task (of one round); see Oracle."""
        of_round = [] if round is None else [_filter("data.al_round", "equal", "Number", round)]
        return self._tasks(ref, of_round, _STATE, "task_only", _state)

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """Every task that people may still be served; see Oracle."""
        is_open = [_filter("is_labeled", "equal", "Boolean", False)]
        return self._tasks(ref, is_open, _STATE, "task_only", _state)

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """Add tasks in one request, never repeated; see Oracle."""
        request: Any = [task_json(task) for task in tasks]
        send = self._by_sdk(
            lambda sdk: sdk.projects.import_tasks(ref.project_id, request=request, return_task_ids=True)
        )
        taken = self._write(f"sending {len(tasks)} tasks", send, lambda reply: reply.task_count)
        if taken != len(tasks):
            raise LabelStudioDown(f"Label Studio says that it took {taken!r} of {len(tasks)} tasks")

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """Tasks touched since then with all annotations; see Oracle."""
        touched = [] if since is None else [_filter("updated_at", "greater_or_equal", "Datetime", since)]
        self._emails = self._list_emails()
        yield from self._tasks(ref, touched, _ANSWERS, "all", self._answered)

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """Tasks with these keys; see Oracle."""
        keys = sorted(push_keys)
        for start in range(0, len(keys), _KEYS_PER_REQUEST):
            some = keys[start : start + _KEYS_PER_REQUEST]
            wanted = [_filter("data.push_key", "in_list", "List", some)]
            yield from self._tasks(ref, wanted, _ANSWERS, "all", self._answered)

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """Take tasks out of the queue; see Oracle."""
        for task_id in task_ids:
            try:
                self._write("retiring a task", self._by_sdk(partial(_take_out, task_id=task_id)), _id)
            except _NotFound:
                continue

    def _tasks(
        self,
        ref: ProjectRef,
        filters: list[dict[str, Any]],
        include: str,
        fields: Literal["all", "task_only"],
        parse: Callable[[Any], _T],
    ) -> Iterator[_T]:
        """Tasks by rising id, page by page from the last id on, so that concurrent changes lose no row."""
        last = 0
        while True:
            items = [*filters, _filter("id", "greater", "Number", last)]
            query = {"filters": {"conjunction": "and", "items": items}, "ordering": ["tasks:id"]}
            wanted = partial(
                self._plain.tasks,
                project=ref.project_id,
                page=1,
                page_size=_PAGE,
                fields=fields,
                include=include,
                query=json.dumps(query),
            )
            try:
                found = self._read("listing tasks", wanted, lambda tasks: [(_id(task), parse(task)) for task in tasks])
            except _NotFound:
                raise missing_project(ref) from None
            ids = [task_id for task_id, _ in found]
            if any(later <= earlier for earlier, later in zip([last, *ids], ids, strict=False)):
                raise LabelStudioDown("Label Studio listed tasks out of order; is something between us and it?")
            yield from (task for _, task in found)
            if len(found) < _PAGE:
                return
            last = ids[-1]

    def _answered(self, task: Any) -> AnsweredTask:
        data = _data(task)
        key = data.get("push_key")
        return AnsweredTask(
            task_id=task.id,
            push_key=key if isinstance(key, str) else None,
            updated_at=_time(task.updated_at),
            data=data,
            annotations=tuple(self._annotation(row) for row in task.annotations or ()),
            created_at=_time(task.created_at),
        )

    def _annotation(self, row: Any) -> Annotation:
        if not isinstance(row, Mapping):
            raise LabelStudioDown("Label Studio sent an annotation that is no object")
        lead_time = row.get("lead_time")
        return Annotation(
            annotation_id=_whole_number(row.get("id"), "an annotation's id"),
            annotator=self._annotator(row.get("completed_by")),
            result=raw_result(row.get("result")),
            was_cancelled=row.get("was_cancelled") is True,
            created_at=_time(row.get("created_at")),
            updated_at=_time(row.get("updated_at")),
            lead_time=float(lead_time) if isinstance(lead_time, int | float) else None,
        )

    def _annotator(self, completed_by: Any) -> str:
        number = completed_by.get("id") if isinstance(completed_by, Mapping) else completed_by
        if type(number) is not int:
            return "user:unknown"
        if number not in self._emails:  # somebody who joined since the listing
            self._emails = {number: f"user:{number}", **self._list_emails()}
        return self._emails[number]

    def _list_emails(self) -> dict[int, str]:
        return dict(self._read("listing the users", self._plain.users, lambda users: [_user(u) for u in users]))

    # Requests ------------------------------------------------------------------------------------------------------

    def _read(self, what: str, send: Callable[[], Any], parse: Callable[[Any], _T]) -> _T:
        """Send a request that changes nothing; repeat it a few times, ever later, while there is no usable reply."""
        for attempt in range(1, _READ_ATTEMPTS):
            try:
                return self._write(what, send, parse)
            except LabelStudioDown:
                if self._silence() > self._patience:
                    raise
                self._sleep(_FIRST_DELAY * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5))
        return self._write(what, send, parse)

    def _write(self, what: str, send: Callable[[], Any], parse: Callable[[Any], _T]) -> _T:
        """Send a request once, when the server allows, and read its reply.

        Raises LabelStudioDown, LabelStudioRefused, _NotFound for a 404.
        """
        self._keep_silence(what)
        try:
            return parse(send())
        except UnusableReply as error:
            if error.status_code in (429, 503):
                self._not_before = time.monotonic() + asked_to_wait(error.headers)
            failure = _failure(what, self.url, error, self._silence())
        except httpx.TimeoutException:
            failure = LabelStudioDown(
                f"{what}: Label Studio at {self.url} gave no reply in time "
                "(label_studio.timeout_seconds in params.yaml)"
            )
        except httpx.HTTPError as error:
            failure = _no_reply(what, self.url, error)
        except (httpx.InvalidURL, UnicodeError):
            failure = LabelStudioRefused(f"{what}: {self.url!r} is no usable address, or the request no valid text")
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            failure = LabelStudioDown(
                f"{what}: Label Studio at {self.url} sent something that is no answer to it ({type(error).__name__})"
            )
        # Outside the handlers: the first error holds headers and bodies, and must not travel with ours.
        raise failure

    def _silence(self) -> float:
        """How many seconds we must still be silent."""
        return max(0.0, self._not_before - time.monotonic())

    def _keep_silence(self, what: str) -> None:
        """Wait as long as the server asked. Raises LabelStudioDown where that is too long, and sends nothing."""
        seconds = self._silence()
        if seconds > self._patience:
            raise _busy(what, self.url, 429, seconds)
        if seconds:
            self._patience -= seconds
            self._sleep(seconds)
            self._not_before = 0.0

    def _clock_ahead(self) -> float | None:
        try:
            reply = self._http.get(f"{self.url}/health")
            return (parsedate_to_datetime(reply.headers["date"]) - datetime.now(UTC)).total_seconds()
        except (httpx.HTTPError, KeyError, ValueError, TypeError):
            return None


def label_config(schema: Schema, others: Sequence[str] = ()) -> str:
    """What annotators see, as Label Studio's XML: the question, the fields as plain text, the classes.

    `others` are classes behind the schema's that the page is to go on offering.
    Raises BadParams where a `$` would make Label Studio put a field's content in its place.
    """
    if any("$" in label for label in schema.labels) or "$" in schema.question:
        raise BadParams("params.yaml: schema: question and labels must not hold `$`: Label Studio puts a field there")
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Header", value=shown_text(schema.question))
    for field in schema.fields:
        key = data_key(field)
        if len(schema.fields) > 1:
            ElementTree.SubElement(view, "Header", value=field.replace("$", " "), size="5")
        ElementTree.SubElement(view, "Text", name=key, value=f"${key}")
    choices = ElementTree.SubElement(
        view,
        "Choices",
        name=CONTROL,
        toName=data_key(schema.fields[0]),
        choice="single",
        showInLine="true",
        required="true",
    )
    for position, label in enumerate(schema.labels):
        hotkey = {"hotkey": _HOTKEYS[position]} if position < len(_HOTKEYS) else {}
        ElementTree.SubElement(choices, "Choice", {"value": label, **hotkey})
    for label in others:
        ElementTree.SubElement(choices, "Choice", value=label)
    return ElementTree.tostring(view, encoding="unicode")


def _on_this_machine(url: str) -> bool:
    """Whether a proxy from the environment would only stand in the way."""
    try:
        return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    except httpx.InvalidURL:
        raise LabelStudioRefused(f"{url!r} is no address; give one such as https://labels.example.org") from None


def asked_to_wait(headers: Mapping[str, str]) -> float:
    """For how many seconds a reply asks us to wait; 0 where it does not, or not in a form that the standard knows.

    `Retry-After` is a number of seconds or a date; a date is compared with the server's own `Date`, if it tells it.
    """
    found = {name.lower(): value.strip() for name, value in headers.items()}
    asked = found.get("retry-after", "")
    if asked.isascii() and asked.isdecimal():
        return float(asked)
    try:
        until = _header_date(asked)
    except (ValueError, TypeError):
        return 0.0
    try:
        now = _header_date(found.get("date", ""))
    except (ValueError, TypeError):
        now = datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _header_date(text: str) -> datetime:
    moment = parsedate_to_datetime(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _failure(what: str, url: str, error: UnusableReply, wait: float = 0.0) -> Exception:
    """What an unsuccessful reply means; `wait`: for how many seconds the server asked to be left alone."""
    status = error.status_code
    theirs = not error.body or isinstance(
        error.body, Mapping
    )  # Label Studio says in JSON what is wrong; pages are of somebody else
    headers = {name.lower(): value for name, value in error.headers.items()}
    if status == 404 and theirs:
        return _NotFound(f"{what}: Label Studio at {url} has no such thing (404), or does not let us see it")
    if status == 404:
        return _no_label_studio(what, url)
    if status in (401, 403) and not theirs:
        return LabelStudioRefused(
            f"{what}: something in front of Label Studio at {url} wants a password ({status}), or another service is "
            "there; give an address by which programs reach Label Studio itself"
        )
    if status in (401, 403):
        return LabelStudioRefused(
            f"{what}: Label Studio at {url} refused the token ({status}): expired, revoked, or of another server. "
            "Copy a new one from Account & Settings there; a legacy token must also be allowed for the organisation"
        )
    if status is not None and 300 <= status < 400:
        target = _origin(headers.get("location", ""))
        if target and target != _origin(url):
            return LabelStudioRefused(f"{what}: {url} sends us on to {target} ({status}); if that is right, give it")
        return LabelStudioDown(
            f"{what}: {url} sends us on to another page ({status}), such as a log-in in front of Label Studio; "
            "give an address by which programs reach Label Studio itself"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return LabelStudioRefused(f"{what}: Label Studio at {url} says that this is not valid (status {status})")
    if status is not None and 200 <= status < 300:
        return LabelStudioDown(
            f"{what}: {url} answered {status} with something that is not Label Studio's; "
            "is the address right, or a log-in page in between?"
        )
    return _busy(what, url, status, wait)


def _no_label_studio(what: str, url: str) -> LabelStudioRefused:
    """Another service answers. No _NotFound: it cannot tell what Label Studio has, and what it lacks."""
    return LabelStudioRefused(
        f"{what}: there is no Label Studio at {url} (404); is the address right? It is what a browser shows before "
        "/projects"
    )


def _busy(what: str, url: str, status: int | None, wait: float) -> LabelStudioDown:
    """A server that has no time for us, or none for anybody."""
    if wait:
        why = f"asks us to wait for {wait:.0f} s" if wait <= _DAY else "asks us to wait for more than a day"
    else:
        why = "asks us to wait" if status == 429 else "failed; its own log says why"
    return LabelStudioDown(f"{what}: Label Studio at {url} {why} (status {status}). Nothing is lost: try again later")


def _no_reply(what: str, url: str, error: httpx.HTTPError) -> LabelStudioDown | LabelStudioRefused:
    """Why a connection came to nothing."""
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return LabelStudioRefused(
            f"{what}: the certificate of {url} is not one that this machine trusts, or is of another host; where it is "
            "your own authority's, set SSL_CERT_FILE to its certificate"
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return LabelStudioRefused(f"{what}: {url} does not speak TLS as https needs it; is it http:// there?")
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return LabelStudioDown(f"{what}: the host of {url} is not found; is its name right, and the network up?")
    if isinstance(error, httpx.ConnectError):
        return LabelStudioDown(
            f"{what}: nobody answers at {url} ({type(error).__name__}); is it running? "
            "(`al labelstudio start` starts the workspace's own)"
        )
    return LabelStudioDown(
        f"{what}: no usable reply from {url} ({type(error).__name__}); is it running, and is it Label Studio? "
        "(`al labelstudio start` starts the workspace's own)"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _origin(address: str) -> str:
    """`https://host:port` of an address; nothing where it has no host."""
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        return ""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}" if url.host and "@" not in address else ""


def _filter(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}


# What is in a reply. Whatever is not of its form raises: LabelStudioDown here, or what `_write` turns into it.


@dataclass(frozen=True, slots=True)
class _Project:
    """A project's settings, as far as they are ours."""

    title: str | None
    description: str | None
    label_config: str
    maximum_annotations: int
    show_collab_predictions: bool
    labels: frozenset[str]


def _project(found: Any) -> _Project:
    asked = (found.parsed_label_config or {}).get(CONTROL, {}).get("labels", [])
    return _Project(
        title=_text_or_none(found.title),
        description=_text_or_none(found.description),
        label_config=found.label_config,
        maximum_annotations=found.maximum_annotations,
        show_collab_predictions=found.show_collab_predictions,
        labels=frozenset(composed(label) for label in asked if isinstance(label, str)),
    )


def _projects(sdk: LabelStudioBase, *, page: int, page_size: int) -> Any:
    return sdk.projects.list(page=page, page_size=page_size, include="id,description")


def _take_out(sdk: LabelStudioBase, *, task_id: int) -> Any:
    return sdk.tasks.update(str(task_id), is_labeled=True)


def _each(parse: Callable[[Any], _T]) -> Callable[[Any], list[_T]]:
    """For a page of a listing. `.items` is one page; the SDK's iterator would end in silence at an error."""
    return lambda page: [parse(item) for item in page.items]


def _state(task: Any) -> TaskState:
    return task_state(
        _id(task),
        _data(task),
        is_labeled=bool(task.is_labeled),
        annotations=_whole_number(task.total_annotations, "a number of answers"),
        cancelled=_whole_number(task.cancelled_annotations, "a number of skips"),
    )


def _user(found: Any) -> tuple[int, str]:
    email = shown_text(_text_or_none(found.email) or "").strip().lower()
    return _id(found), email or f"user:{found.id}"


def _data(task: Any) -> dict[str, Any]:
    if not isinstance(task.data, Mapping):
        raise LabelStudioDown("Label Studio sent a task without data")
    return dict(task.data)


def _id(found: Any) -> int:
    return _whole_number(found.id, "an id")


def _text_or_none(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise LabelStudioDown("Label Studio sent something else where text belongs")
    return value


def _whole_number(value: Any, what: str) -> int:
    if type(value) is not int:
        raise LabelStudioDown(f"Label Studio sent {what} that is no whole number")
    return value


def _time(value: Any) -> str:
    """A time of the server's in our form, from either of the forms in which the SDK gives it."""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise LabelStudioDown("Label Studio sent a time that is none") from None
    return moment.astimezone(UTC).strftime(TIME_FORMAT)
