"""Shared by tests of whole rounds: a small workspace on real git and DVC, and an annotator who answers it."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import asdict

from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.dvc.settings import change_config
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.tick import TickReport, tick
from al_pipeline.workspace.identity import here
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "OMP_WAIT_POLICY": "passive",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GIT_AUTHOR_NAME": "Test",
    "GIT_AUTHOR_EMAIL": "test@example.com",
    "GIT_COMMITTER_NAME": "Test",
    "GIT_COMMITTER_EMAIL": "test@example.com",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}
"""The environment of every test: quiet, offline, with a git identity that is not the user's.

By default a thread of OpenMP that waits for others keeps its processor busy: where more processes run than there are
processors, that takes several times the time of the work.
"""

NOT_THE_USERS = (
    "AL_LABEL_STUDIO_URL", "AL_LABEL_STUDIO_TOKEN", "AL_NOTIFY_URLS", "AL_WORKSPACE", "PREFECT_API_URL",
    "PREFECT_PROFILE", "PREFECT_PROFILES_PATH",
)  # fmt: skip
"""Variables that would lead a test to the user's own servers and workspace."""

WORDS = {
    "ham": ("meeting agenda tomorrow", "project report please", "lunch on friday", "minutes of the call"),
    "spam": ("win money now", "cheap pills click", "free offer today", "claim your prize"),
}

NEVER = "0 0 29 2 *"
"""A schedule of which no run is due while tests run: one that fires on the hour takes the slot of a run by hand."""

HOURLY = 'cron: "0 * * * *"'
"""The schedule of the template."""

SMALL = {
    HOURLY: f'cron: "{NEVER}"',
    "kind: encoder+tfidf": "kind: tfidf",
    "test_size: 500": "test_size: 12",
    "seed_size: 40": "seed_size: 10",
    "batch_size: 40": "batch_size: 8",
    "min_labels: 10": "min_labels: 1",
    "bootstrap: 1000": "bootstrap: 100",
}
"""Changes to the template that make a round small and fast."""


def later_today() -> dict[str, str]:
    """The change to the template with which a run is scheduled, but due in twelve hours."""
    return {HOURLY: f'cron: "0 {(datetime.now(UTC) + timedelta(hours=12)).hour} * * *"'}


def write_pool(path: Path, size: int = 80, seed: int = 7, start: int = 0) -> dict[str, str]:
    """Write a JSONL pool of short mails; returns the true label of each id."""
    draw = random.Random(seed)
    truth: dict[str, str] = {}
    lines = []
    for number in range(start, start + size):
        label = "spam" if draw.random() < 0.4 else "ham"
        other = "ham" if label == "spam" else "spam"
        words = [draw.choice(WORDS[label if draw.random() < 0.85 else other]) for _ in range(4)]
        truth[f"mail-{number:03d}"] = label
        lines.append(json.dumps({"id": f"mail-{number:03d}", "text": f"{number} {' '.join(words)}"}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return truth


def change_params(workspace: Workspace, changes: Mapping[str, str]) -> None:
    """Replace lines of `params.yaml`, each of which must exist."""
    text = workspace.layout.params.read_text(encoding="utf-8")
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    workspace.layout.params.write_text(text, encoding="utf-8")


def small_workspace(
    folder: Path, size: int = 80, changes: Mapping[str, str] | None = None
) -> tuple[Workspace, dict[str, str]]:
    """A workspace with a small pool, and the true label of each item. Its id is fixed, so that two can be compared."""
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / "workspace"
    workspace = init(root, ["ham", "spam"], remote=str(folder / "remote"))
    change_params(workspace, {**SMALL, **(changes or {})})
    truth = write_pool(folder / "pool.jsonl", size)
    workspace = open_workspace(root)
    ingest(workspace, [folder / "pool.jsonl"])
    return workspace, truth


def answer_all(oracle: SimulatedOracle, truth: Mapping[str, str], annotator: str = "ann@example.org") -> int:
    """Answer everything in the annotator's queue correctly; returns the number of tasks."""
    keys = oracle.queue(annotator)
    for key in keys:
        oracle.answer(key, annotator, truth[key.rsplit(":", 1)[1]])
    return len(keys)


def play(workspace: Workspace, oracle: SimulatedOracle, truth: Mapping[str, str], rounds: int) -> TickReport:
    """Tick, answer everything, tick again, until `rounds` rounds are published."""
    report = tick(workspace, lambda: oracle)
    for _ in range(rounds):
        answer_all(oracle, truth)
        report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    return report


class Killed(BaseException):
    """Simulates a process that dies between two steps."""


def killing(name: str, moment: str) -> Callable[..., Any]:
    """Runs the steps of a tick, and dies "before" or "after" the step `name`."""

    def run(step: str, action: Callable[[], Any], /) -> Any:
        if step == name and moment == "before":
            raise Killed
        result = action()
        if step == name:
            raise Killed
        return result

    return run


def copy_workspace(template: tuple[Path, Mapping[str, str]], folder: Path) -> Workspace:
    """A copy of the template's workspace with the same id and a DVC remote of its own."""
    shutil.copytree(template[0], folder / "copy")
    root = folder / "copy/workspace"
    settle(root)
    change_config(root / ".dvc/config", {'remote "store"': {"url": str(folder / "copy/remote")}}, 0o644)
    subprocess.run(["git", "commit", "-qam", "Use another remote"], cwd=root, check=True)
    return open_workspace(root)


Played = tuple[Path, Mapping[str, str], SimulatedOracle]
"""The folder of a workspace with rounds, the true labels, and the state of its Label Studio."""


def go_on(played: Played, folder: Path) -> tuple[Workspace, SimulatedOracle, dict[str, str]]:
    """Copies of all three, to continue from."""
    place, truth, oracle = played
    return copy_workspace((place, truth), folder), copy.deepcopy(oracle), dict(truth)


def settle(root: Path) -> Path:
    """Make a copied workspace look like one that was always in its folder, with the id of its original."""
    layout = Layout(root)
    known = read_json(layout.clone)
    write_json(layout.clone, {"clone_id": known["clone_id"], "place": asdict(here(layout))})
    return root


def ask_prefect(method: str, url: str, body: Any = None, auth: tuple[str, str] | None = None) -> httpx.Response:
    """One request to a Prefect server, repeated while its database is busy (503), as Prefect's client does."""
    deadline = time.monotonic() + 300
    while True:
        reply = httpx.request(
            method, url, json=body, auth=auth, timeout=300, trust_env=False, follow_redirects=True, verify=False
        )
        if reply.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            return reply
        time.sleep(1)


def dvc_at(root: Path) -> Dvc:
    """DVC in a repository that is no workspace, and that may run any command."""
    return Dvc(root, root / ".al/dvc.json", root / ".al/logs/dvc.log", check=lambda _: None)


def tools_first() -> dict[str, str]:
    """The environment with this Python's tools first on the PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def results(workspace: Workspace, number: int) -> dict[str, str]:
    """The digests that must not depend on faults during the run."""
    hashes = read_json(workspace.layout.record(number))["hashes"]
    return {name: hashes[name] for name in ("labeled", "test_labels", "unresolved", "model", "queries", "plan")}
