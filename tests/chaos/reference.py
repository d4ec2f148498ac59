"""The undisturbed run, which every scenario must equal, and snapshots of it to begin from."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import settle, small_workspace

from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from chaos.sites import LATEST, People, Site, Tick, TwinPeople, expect
from chaos.twin import TwinServer

PHASES = 3
"""Ticks of the reference run: the first build and round 0's questions, then two rounds, with answers in between."""


@dataclass(frozen=True)
class Snapshot:
    """The workspace with its remotes, and Label Studio, at one moment."""

    folder: Path
    oracle: SimulatedOracle
    given: Mapping[tuple[str, str], str | None]


@dataclass(frozen=True)
class Reference:
    """The results of the undisturbed run."""

    truth: Mapping[str, str]
    expected: tuple[Mapping[str, str], ...]
    """Digests of the first build's record, then of each round's."""
    steps: tuple[tuple[str, ...], ...]
    """The steps of each phase's tick, in order."""
    seconds: tuple[float, ...]
    """The seconds of each phase's tick, without the snapshots."""
    snapshots: Mapping[str, Snapshot]
    """`start-1`: phase 1 before its tick; `1-07`: before its eighth step."""

    @contextmanager
    def site(self, folder: Path, start: str, outside: Path) -> Iterator[Site]:
        """A copy of a snapshot, with the twin in the state it had then."""
        snapshot = self.snapshots[start]
        with (
            TwinServer(copy.deepcopy(snapshot.oracle)) as server,
            self.placed(folder, start, TwinPeople(server, snapshot.given), outside) as site,
        ):
            yield site

    @contextmanager
    def placed(self, folder: Path, start: str, people: People, outside: Path) -> Iterator[Site]:
        """A copy of a snapshot's workspace, with these people instead of the twin's. It is removed at the end."""
        shutil.copytree(self.snapshots[start].folder, folder, symlinks=True)
        settle(folder / "workspace")
        site = Site(folder, people, self.truth, self.expected, outside)
        try:
            yield site
        finally:
            site.clean_up()

    def before(self, phase: int, step: str, time: int = 1) -> str:
        """The name of the snapshot before the `time`-th `step` of a phase."""
        places = [place for place, name in enumerate(self.steps[phase]) if name == step]
        return f"{phase}-{places[time - 1]:02d}"


def make_reference(folder: Path, phases: int = PHASES) -> Reference:
    """Play the undisturbed run, with a snapshot before each step of each tick."""
    truth = _template(folder / "run")
    snapshots: dict[str, Snapshot] = {}
    steps: list[tuple[str, ...]] = []
    seconds: list[float] = []
    with TwinServer(SimulatedOracle()) as server:
        people = TwinPeople(server, {})
        site = Site(folder / "run", people, truth, (), folder / "outside")

        def save(name: str) -> None:
            place = folder / "snapshots" / name
            shutil.copytree(site.folder, place, symlinks=True)
            with server.lock:
                snapshots[name] = Snapshot(place, copy.deepcopy(server.oracle), dict(people.given))

        for phase in range(phases):
            if phase:
                site.answer()
            save(f"start-{phase}")
            told = folder / f"steps-{phase}"
            tick = site.start(at="before:*:0:stop", CHAOS_STEPS=str(told))
            seconds.append(_follow(tick, phase, save))
            steps.append(tuple(told.read_text("ascii").split()))
        expected = tuple(_digests(site, number) for number in range(-1, phases - 1))
        reference = Reference(truth, expected, tuple(steps), tuple(seconds), snapshots)
        Site(site.folder, people, truth, expected, site.outside).check()
        site.clean_up()
    return reference


def _follow(tick: Tick, phase: int, save: object) -> float:
    """Run a tick that stops before every step, where a snapshot is taken; returns the sum of its steps' seconds."""
    assert callable(save)
    place = 0
    while tick.stopped():
        save(f"{phase}-{place:02d}")
        place += 1
        tick.go_on()
    ended = tick.end()
    expect(ended.code == 0, f"the undisturbed run failed: {ended.short}")
    return float(sum(ended.told["steps"].values()))


def _digests(site: Site, number: int) -> dict[str, str]:
    record = read_json(site.layout.genesis if number < 0 else site.layout.record(number))
    return {name: record["hashes"][name] for name in LATEST}


def _template(folder: Path) -> dict[str, str]:
    """A small workspace whose remotes are beside it, named by relative paths so that each copy has its own."""
    workspace, truth = small_workspace(folder)
    root = workspace.layout.root
    config = root / ".dvc/config"
    text = config.read_text("utf-8")
    absolute = str(folder / "remote")
    assert absolute in text
    config.write_text(text.replace(absolute, "../../remote"), "utf-8")
    (folder / "remote").mkdir(exist_ok=True)
    git = Git(root)
    git.commit("Use the remote beside it", [config, workspace.layout.params])
    Git(folder).run("init", "--quiet", "--bare", "--initial-branch=main", "origin.git")
    git.run("remote", "add", "origin", "../origin.git")
    return truth
