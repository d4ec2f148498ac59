"""When ticks run by themselves: what `params.yaml` says, what the workspace's Prefect server has, and how to change it.

Telling the server is the work of `al_pipeline/flows/deployments.py`; here it is only looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from al_pipeline.errors import BadParams
from al_pipeline.files import write_bytes
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.params import Schedule, parse_params
from al_pipeline.servers import Deployment, prefect_status, read_deployment, worker_status
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Standing:
    """A workspace's schedule, as wanted and as it is."""

    wanted: Schedule
    server: str | None
    """The page of the workspace's own Prefect server; None where it is not up."""
    deployment: Deployment | None
    """What that server has; None where it was never told."""
    worker: bool
    """Whether a worker takes the runs that are due."""
    differs: tuple[str, ...]
    """In what the server's schedule is not the one of `params.yaml`, in words; empty where there is none to compare."""

    @property
    def next_run(self) -> str | None:
        """When the next tick is due by itself, as ISO 8601 in UTC; None where none is."""
        return self.deployment.next_run if self.deployment is not None else None

    def to_json(self) -> dict[str, Any]:
        """This, as a JSON object."""
        return {
            **self.wanted.model_dump(),
            "prefect_url": self.server,
            "applied": self.deployment is not None and not self.differs,
            "differences": list(self.differs),
            "worker": self.worker,
            "next_run": self.next_run,
        }


def read_schedule(workspace: Workspace) -> Standing:
    """The schedule as wanted and as it is. Raises BadParams, ServerFailed where the server gives no usable answer."""
    wanted = workspace.params.schedule
    server = prefect_status(workspace)
    if server is None:
        return Standing(wanted, None, None, False, ())
    deployment = read_deployment(workspace, server)
    differs = () if deployment is None else tuple(_differences(workspace, wanted, deployment))
    return Standing(wanted, server.url, deployment, worker_status(workspace) is not None, differs)


def _differences(workspace: Workspace, wanted: Schedule, deployment: Deployment) -> list[str]:
    has = [f"{cron} {zone}{'' if active else ', off'}" for cron, zone, active in deployment.schedules]
    want = f"{wanted.cron} {wanted.timezone}{'' if wanted.active else ', off'}"
    found = [] if has == [want] else [f"params.yaml says {want}, the server has {' and '.join(has) or 'none'}"]
    if deployment.paused:
        found.append("the server has the deployment paused")
    root = str(workspace.layout.root)
    if deployment.root not in (None, root):
        found.append(f"its runs work in {deployment.root}, and this is {root}")
    return found


def change_schedule(
    workspace: Workspace, cron: str | None = None, timezone: str | None = None, active: bool | None = None
) -> bool:
    """Write what is given into `params.yaml`, and commit that file if it was as committed; whether it was committed.

    Comments and all other lines stay. Raises BadParams where a value is wrong, and nothing is changed then.
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
    """The text of a `params.yaml` with other values in its section `schedule`; all else stays to the letter.

    A file older than schedules gets the template's section first. Raises BadParams where a value is wrong.

    The parser's marks say where a value stands, and nothing else is touched. ruamel.yaml writes the whole file anew:
    `al_pipeline/workspace/params_file.py` has what was measured of it.
    """
    before = parse_params(text)
    if "schedule" not in before.model_fields_set:
        section = f"\n\n{_template_section()}"
        text = text.rstrip() + (section.replace("\n", "\r\n") if "\r\n" in text else section)
        before = parse_params(text)
    places = _places(text)
    for name in sorted(values, key=lambda name: places[name][0], reverse=True):
        text = _replace(text, *places[name], _scalar(name, values[name]))
    after = parse_params(text)
    expected = {**before.model_dump(), "schedule": {**before.schedule.model_dump(), **values}}
    if after.model_dump() != expected:
        raise BadParams("params.yaml is written in a way that cannot be edited by machine; edit its `schedule` by hand")
    return text


def _places(text: str) -> dict[str, tuple[int, int]]:
    """Where in the text each value of the section `schedule` stands."""
    document = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(document, yaml.MappingNode), "it has been parsed"
    section = next(value for key, value in document.value if key.value == "schedule")
    return {key.value: (value.start_mark.index, value.end_mark.index) for key, value in section.value}


def _replace(text: str, start: int, end: int, value: str) -> str:
    """`text` with another value between two places; a comment behind it stays in its column, if there is room."""
    end = start + len(text[start:end].rstrip())  # a value of several lines ends behind its line's end
    start = end - len(re.sub(r"\A(?:[&!]\S*\s+)+", "", text[start:end]))  # an anchor and a tag stay
    blanks = re.match(r"( +)#", text[end:])
    if blanks:
        room = max(2, len(blanks.group(1)) + (end - start) - len(value))
        end, value = end + len(blanks.group(1)), value + " " * room
    return text[:start] + value + text[end:]


def _scalar(name: str, value: object) -> str:
    """A value as YAML; a cron expression always in quotes, since YAML reads a leading * otherwise."""
    style = '"' if name == "cron" else None
    return str(yaml.safe_dump(value, allow_unicode=True, width=10_000, default_style=style)).split("\n")[0]


def _template_section() -> str:
    """The lines of the template that make the section `schedule`."""
    lines = template("params.yaml").splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if line.startswith("schedule:"))
    end = next(number for number in range(start + 1, len(lines)) if not lines[number].startswith(" "))
    return "".join(lines[start:end])
