"""The schedule of ticks: what `params.yaml` says, what the Prefect server has, and how to change it.

This module only reads from the server; `al_pipeline/flows/deployments.py` deploys the schedule there.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from typing import Any

import msgspec
import yaml
from msgspec.structs import replace

from al_pipeline.errors import BadParams, ServerFailed
from al_pipeline.files import write_bytes
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.params import Schedule, parse_params
from al_pipeline.sanitize import redact
from al_pipeline.servers import Deployment, prefect_elsewhere, prefect_status, read_deployment, worker_status
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """A workspace's schedule, as configured and as deployed."""

    wanted: Schedule
    server: str | None
    """URL of the workspace's own Prefect server, else of the one of `prefect_elsewhere`; None if there is neither."""
    deployment: Deployment | None
    """The deployment on that server; None if there is none."""
    worker: bool
    """Whether a worker is running that executes due runs."""
    differs: tuple[str, ...]
    """How the server's schedule differs from `params.yaml`, in words; empty if there is none to compare."""
    elsewhere: bool = False
    """Whether the server is not the workspace's own."""
    problem: str = ""
    """Why that server could not be asked, in words."""
    source: str = ""
    """What names it: `PREFECT_API_URL`, or a profile of Prefect."""

    @property
    def fix(self) -> str:
        """How to bring the schedule of `params.yaml` to the server."""
        return "`prefect --no-prompt deploy --prefect-file prefect.yaml`" if self.elsewhere else "`al schedule apply`"

    @property
    def start_worker(self) -> str:
        """How to start a worker."""
        if not self.elsewhere:
            return "`al up`"
        pool = self.deployment.pool if self.deployment is not None and self.deployment.pool else "POOL"
        return f"`prefect worker start --pool {shlex.quote(pool)} --type process` on the machine of the workspace"

    @property
    def next_run(self) -> str | None:
        """When the next scheduled tick is due, as ISO 8601 in UTC; None if none is."""
        return self.deployment.next_run if self.deployment is not None else None

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            **msgspec.structs.asdict(self.wanted),
            "prefect_url": self.server,
            "applied": self.deployment is not None and not self.differs,
            "differences": list(self.differs),
            "worker": self.worker,
            "next_run": self.next_run,
            "elsewhere": self.elsewhere,
            "problem": self.problem or None,
        }


def read_schedule(workspace: Workspace) -> Standing:
    """Read the configured and deployed schedule. Raises BadParams, ServerFailed if its own server's answer is unusable.

    Without a server of the workspace's own, the one that PREFECT_API_URL or the user's Prefect profile names is asked.
    """
    wanted = workspace.params.schedule
    server = prefect_status(workspace)
    if server is None:
        return _elsewhere(workspace, wanted)
    deployment = read_deployment(workspace, server)
    differs = () if deployment is None else tuple(_differences(workspace, wanted, deployment))
    return Standing(wanted, server.url, deployment, worker_status(workspace) is not None, differs)


def _elsewhere(workspace: Workspace, wanted: Schedule) -> Standing:
    if (api := prefect_elsewhere()) is None:
        return Standing(wanted, None, None, False, ())
    url = redact(api.url)
    try:
        found = read_deployment(workspace, api)
    except ServerFailed as error:
        return Standing(wanted, url, None, False, (), True, str(error), api.source)
    if found is None:
        return Standing(wanted, url, None, False, (), True, source=api.source)
    placeless = dataclasses.replace(found, root=None)  # the server's may be a clone on another machine
    differs = _differences(workspace, wanted, placeless)
    return Standing(wanted, url, found, found.has_worker, tuple(differs), True, source=api.source)


def _differences(workspace: Workspace, wanted: Schedule, deployment: Deployment) -> list[str]:
    has = [f"{cron} {zone}{'' if active else ', off'}" for cron, zone, active in deployment.schedules]
    want = f"{wanted.cron} {wanted.timezone}{'' if wanted.active else ', off'}"
    found = [] if has == [want] else [f"params.yaml says {want}, the server has {' and '.join(has) or 'none'}"]
    if deployment.paused:
        found.append("the server has the deployment paused")
    root = str(workspace.layout.root)
    if deployment.root not in (None, root):
        found.append(f"its runs work in {deployment.root}, but this is {root}")
    return found


def change_schedule(
    workspace: Workspace, cron: str | None = None, timezone: str | None = None, active: bool | None = None
) -> bool:
    """Write the given values to `params.yaml`, and commit it if it had no uncommitted edits.

    Returns whether it was committed. Comments and all other lines stay. Raises BadParams, with nothing changed, if a
    value is invalid.
    """
    layout, git = workspace.layout, Git(workspace.layout.root)
    with locked(layout.lock, "al schedule"):
        text = layout.params.read_bytes().decode("utf-8")
        wanted = {"cron": cron, "timezone": timezone, "active": active}
        values = {name: value for name, value in wanted.items() if value is not None}
        edited = with_schedule(text, values)
        if edited == text:
            return False
        if clean := not git.changed([layout.params]):
            git.check_idle()
        write_bytes(layout.params, edited.encode())
        _logger.info("params.yaml: schedule: %s", values)
        if clean:
            schedule = parse_params(edited).schedule
            git.commit(
                f"Schedule ticks: {schedule.cron} {schedule.timezone}{'' if schedule.active else ', off'}",
                [layout.params],
            )
        return clean


def with_schedule(text: str, values: dict[str, Any]) -> str:
    """Return the text of a `params.yaml` with new values in its section `schedule`, all else unchanged.

    A file without that section gets the template's first. Raises BadParams if a value is invalid.

    Values are replaced at the positions that the parser's marks give. ruamel.yaml would rewrite the whole file: see
    the measurements in `al_pipeline/workspace/params_file.py`.
    """
    before = parse_params(text)
    if _schedule(text) is None:
        section = f"\n\n{_template_section()}"
        text = text.rstrip() + (section.replace("\n", "\r\n") if "\r\n" in text else section)
        before = parse_params(text)
    places = _places(text)
    for name in sorted(values, key=lambda name: places[name][0], reverse=True):
        text = _replace(text, *places[name], _scalar(name, values[name]))
    after = parse_params(text)
    if after != replace(before, schedule=replace(before.schedule, **values)):
        raise BadParams("params.yaml cannot be edited automatically; edit its `schedule` by hand")
    return text


def _places(text: str) -> dict[str, tuple[int, int]]:
    """Start and end of each value of the section `schedule` in the text."""
    section = _schedule(text)
    assert section is not None
    return {key.value: (value.start_mark.index, value.end_mark.index) for key, value in section.value}


def _schedule(text: str) -> yaml.MappingNode | None:
    """The section `schedule` of the text; None if it has none."""
    document = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(document, yaml.MappingNode), "it was parsed before"
    return next((value for key, value in document.value if key.value == "schedule"), None)


def _replace(text: str, start: int, end: int, value: str) -> str:
    """Replace the value between two positions; a comment after it stays in its column, if there is room."""
    end = start + len(text[start:end].rstrip())  # the end mark of a multi-line value is past its line
    start = end - len(re.sub(r"\A(?:[&!]\S*\s+)+", "", text[start:end]))  # keep an anchor and a tag
    blanks = re.match(r"( +)#", text[end:])
    if blanks:
        room = max(2, len(blanks.group(1)) + (end - start) - len(value))
        end, value = end + len(blanks.group(1)), value + " " * room
    return text[:start] + value + text[end:]


def _scalar(name: str, value: object) -> str:
    """Format a value as YAML; always quote a cron expression, since a leading * has a meaning of its own in YAML."""
    style = '"' if name == "cron" else None
    return str(yaml.safe_dump(value, allow_unicode=True, width=10_000, default_style=style)).split("\n")[0]


def _template_section() -> str:
    """The section `schedule` of the template, as text."""
    lines = template("params.yaml").splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if line.startswith("schedule:"))
    end = next(number for number in range(start + 1, len(lines)) if not lines[number].startswith(" "))
    return "".join(lines[start:end])
