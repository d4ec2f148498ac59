"""Scenarios of `al live`: killed anywhere, Label Studio away, the machine asleep, while people answer."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from harness import change_params

from al_pipeline.errors import LabelStudioDown
from al_pipeline.integrations.simulated_oracle import Moment
from al_pipeline.operations.history import read_history, read_live, read_plans
from al_pipeline.workspace.workspace import open_workspace
from chaos.lab import FaultCount, Lab, Scenario
from chaos.sites import TICK_SECONDS, Site, Tick, TwinPeople, expect, said

KILLS_VARIABLE = "CHAOS_LIVE_KILLS"
KILLS, KILLS_PER_STORY = 40, 20
"""The number of random kills, unless the variable says another; and in each story: the pool has 68 items."""
_PAUSE = 0.8
"""Between two answers while it is killed, in seconds: two or three in each of its lives, so that the pool lasts."""
_LONGEST = 3.0
"""The latest instant of a kill after a start, in seconds."""


def live_scenarios() -> Iterator[Scenario]:
    """All of them; the number of random kills is that of the command line."""
    kills = int(os.environ.get(KILLS_VARIABLE, KILLS))
    for number in range(-(-kills // KILLS_PER_STORY)):
        yield Scenario(
            f"live at random {number}",
            "kill -9 of al live at a random instant, while people answer",
            partial(_at_random, seed=number, kills=min(KILLS_PER_STORY, kills - number * KILLS_PER_STORY)),
            kills=True,
            strikes=min(KILLS_PER_STORY, kills - number * KILLS_PER_STORY),
        )
    yield Scenario("live, Label Studio away", "Label Studio away while al live runs", _studio_away)
    yield Scenario("live asleep", "the machine asleep while people answer", _asleep)
    yield Scenario("live and ticks", "ticks by hand and a schedule beside al live", _beside_ticks)


class Room:
    """A live workspace and its people, who answer one question after the other."""

    def __init__(self, site: Site) -> None:
        assert isinstance(site.people, TwinPeople)
        self.site, self.people = site, site.people
        change_params(
            open_workspace(site.root), {"enabled: false": "enabled: true", "poll_seconds: 1 ": "poll_seconds: 0.1 "}
        )
        self.answered = 0

    @contextmanager
    def live(self) -> Iterator[Tick]:
        """`al live` as a process, which is ended by SIGTERM unless it was killed."""
        tick = self.site.start_live()
        try:
            yield tick
        finally:
            if tick.process.poll() is None:
                tick.process.send_signal(signal.SIGTERM)
            tick.process.wait(TICK_SECONDS)

    def go_on(self, seconds: float, pause: float = 0.1) -> None:
        """Answer for so long, whenever somebody is asked something."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.answered += self.people.answer(self.site.truth, 1)
            time.sleep(pause)

    def until_closed(self, number: int) -> None:
        """Answer until round `number` is published. Raises Failure if that takes too long."""
        end = time.monotonic() + TICK_SECONDS
        while not self.site.layout.record(number).exists():
            self.go_on(0.2)
            expect(time.monotonic() < end, f"round {number} was not published")

    def check(self) -> None:
        """All that must hold at the end."""
        site = self.site
        site.recover()
        plans, held = read_plans(site.git), self.people.keys()
        expect(set(held) <= plans.keys(), "Label Studio has a task that is in no plan")
        with self.people._server.lock:
            oracle = self.people.oracle
            open_keys = Counter(oracle.queue("nobody@example.com", next(iter(oracle.projects))))
        expect(not [key for key, count in open_keys.items() if count > 1], "a question is asked twice")
        given = Counter(key for key, _ in self.people.given)
        heard = Counter((event.push_key, event.annotator) for event in site.events() if event.type in ("label", "skip"))
        lost = [pair for pair in self.people.given if heard[pair] != 1]
        expect(not lost, f"{len(lost)} answers were lost or counted twice, first {lost[:1]}")
        expect(all(given[key] == len(said(key, site.truth)) for key in given), "people answered one question twice")
        history = read_history(site.layout, site.git)
        expect(len(history.rounds) > 1, "no live round was published")
        for record in history.rounds[1:]:
            asked = read_live(site.git, record.round)
            expect(asked and {one.kind for one in asked} > {"planned"}, f"round {record.round} asked nothing live")
        site.al("reproduce")


def _at_random(lab: Lab, tally: FaultCount, seed: int, kills: int) -> None:
    """Kill it again and again while people answer, then let it publish a round."""
    draw = random.Random(f"live {seed}")
    with lab.site("start-1") as site:
        room = Room(site)
        for _ in range(kills):
            with room.live() as live:
                room.go_on(draw.uniform(0.3, _LONGEST), pause=_PAUSE)
                live.process.kill()
            tally.strike()
        with room.live():
            room.until_closed(max(1, read_history(site.layout, site.git).planned or 0))
        room.check()


def _studio_away(lab: Lab, tally: FaultCount) -> None:
    """Label Studio fails before and after its work, for seconds; the queue is filled again when it is back."""
    with lab.site("start-1") as site:
        room = Room(site)

        def away(call: str, moment: Moment) -> None:
            raise LabelStudioDown(f"{moment} {call}")

        with room.live():
            room.until_closed(0)
            for _ in range(3):
                room.go_on(1.0)
                room.people.oracle.fault = away
                time.sleep(2)
                room.people.oracle.fault = None
                tally.strike()
                time.sleep(1)
            room.until_closed(2)
        room.check()


def _asleep(lab: Lab, tally: FaultCount) -> None:
    """The process stands still while people answer what is open, and goes on."""
    with lab.site("start-1") as site:
        room = Room(site)
        with room.live() as live:
            room.until_closed(0)
            for _ in range(2):
                room.go_on(1.0)
                live.process.send_signal(signal.SIGSTOP)
                room.go_on(4.0)
                live.process.send_signal(signal.SIGCONT)
                tally.strike()
            room.until_closed(2)
        room.check()


def _beside_ticks(lab: Lab, tally: FaultCount) -> None:
    """Ticks run between its steps, and close rounds."""
    with lab.site("start-1") as site:
        room = Room(site)
        with room.live():
            room.until_closed(0)
            for _ in range(3):
                room.go_on(1.0)
                ended = site.round("--close-now")
                expect(ended.code in (0, 4), f"a tick beside al live failed: {ended.short}")
                tally.strike()
            room.until_closed(3)
        room.check()
