"""Scenarios of kill -9: of the tick, its DVC process and stages, and the flow, at step boundaries and within steps."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Literal

import psutil

from al_pipeline.workspace.layout import STAGES
from chaos.lab import FaultCount, Lab, Scenario
from chaos.reference import Reference
from chaos.sites import Moment, Site, Tick, expect, stopped_before, strike

RANDOM_STORIES, KILLS_PER_STORY = 12, 5
STUDIO_STORIES, KILLS_WITH_STUDIO = 9, 6
INSTANT_SECONDS = (0.05, 0.8)
"""The range of delays before a kill within a step."""


def kill_scenarios(reference: Reference) -> Iterator[Scenario]:
    """All of them. The names are the same in every run, so that an interrupted suite can continue."""
    for phase in (0, 1):
        for place, step in enumerate(reference.steps[phase]):
            for moment in ("before", "after"):
                yield Scenario(
                    f"tick {phase}-{place:02d} {moment} {step}",
                    "kill -9 of the tick at a step's boundary",
                    partial(_at_boundary, phase=phase, place=place, moment=moment),
                    kills=True,
                )
    for number in range(RANDOM_STORIES):
        yield Scenario(
            f"tick at random {number}",
            "kill -9 of the tick at a random instant",
            partial(_at_random, seed=number),
            kills=True,
            strikes=KILLS_PER_STORY,
        )
    for stage, victim in product(STAGES, ("stage", "dvc", "tick")):
        kind = {
            "stage": "kill -9 of a DVC stage",
            "dvc": "kill -9 of the DVC process",
            "tick": "kill -9 of the tick in the middle of a stage, which is left running",
        }[victim]
        yield Scenario(f"{victim} in {stage}", kind, partial(_in_stage, stage=stage, victim=victim), kills=True)
    for step, delay in product(("close", "encoder", "publish"), (0.0, 0.15)):
        yield Scenario(
            f"dvc in {step} {delay}",
            "kill -9 of the DVC process",
            partial(_dvc_in_step, step=step, delay=delay),
            kills=True,
        )
    for number in range(STUDIO_STORIES):
        yield Scenario(
            f"tick with Label Studio {number}",
            "kill -9 of the tick, real Label Studio",
            partial(_with_studio, seed=number),
            kills=True,
            strikes=KILLS_WITH_STUDIO,
            real=True,
        )
    for place, step in enumerate(reference.steps[1]):
        yield Scenario(
            f"flow 1-{place:02d} {step}",
            "kill -9 of the flow's process",
            partial(_flow, place=place, moment=("before", "after", "during")[place % 3]),
            kills=True,
        )


def _at_boundary(lab: Lab, tally: FaultCount, phase: int, place: int, moment: Moment) -> None:
    """One kill, from the snapshot just before the step."""
    with lab.site(f"{phase}-{place:02d}") as site:
        strike(site, moment, lab.reference.steps[phase][place])
        tally.strike()
        tally.recovered(site)
        site.check()


def _at_random(lab: Lab, tally: FaultCount, seed: int) -> None:
    """Kill the tick repeatedly, alone or with its DVC process, then play the next round undisturbed."""
    draw = random.Random(f"random {seed}")
    phase = draw.choice((0, 1, 1))
    latest = 0.6 + lab.reference.seconds[phase]
    with lab.site(f"start-{phase}") as site:
        while tally.injected < KILLS_PER_STORY:
            tick = site.start()
            time.sleep(draw.uniform(0.5, latest))
            both = site.dvc_process() if draw.random() < 0.5 else None
            ended = tick.kill()
            if ended.code == 0:  # it ended before the kill: play the next round, and kill sooner; the pool is small
                latest = max(0.7, 0.7 * latest)
                site.recover()
                site.answer()
                continue
            expect(ended.code == -signal.SIGKILL, f"the tick was not killed: {ended.short}")
            tally.strike()
            if both is not None:
                _kill(both)
        tally.recovered(site)
        site.check()
        site.answer()
        site.recover()
        site.check()


def _in_stage(lab: Lab, tally: FaultCount, stage: str, victim: Literal["stage", "dvc", "tick"]) -> None:
    """Kill while a stage runs: the stage, DVC above it, or the tick above both."""
    with lab.site(lab.reference.before(1, stage)) as site:
        tick = site.start()
        process = site.await_(lambda: site.stage_process(stage), tick)
        if victim == "tick":
            ended = tick.kill()
            expect(ended.code == -signal.SIGKILL, f"the tick was not killed: {ended.short}")
        else:
            aim = process if victim == "stage" else site.dvc_process()
            assert aim is not None
            _kill(aim)
            _ends_by_itself(tick, 6 if victim == "stage" else 5, stage)
        tally.strike()
        tally.recovered(site)
        site.check()


def _dvc_in_step(lab: Lab, tally: FaultCount, step: str, delay: float) -> None:
    """Kill the DVC process while the tick uses it."""
    with lab.site(lab.reference.before(1, step)) as site, stopped_before(site, step) as tick:
        known = site.dvc_process()  # an earlier step may have started one
        tick.go_on()
        process = known or site.await_(site.dvc_process, tick)
        time.sleep(delay)
        _kill(process)
        ended = tick.end()
        expect(ended.code in (0, 5), f"expected exit code 5, got {ended.short}")
        if ended.code == 5:
            expect("DVC process" in ended.message, f"it does not say what ended: {ended.message}")
        tally.strike()
        tally.recovered(site)
        site.check()


def _ends_by_itself(tick: Tick, code: int, named: str) -> None:
    ended = tick.end()
    expect(ended.code == code, f"expected exit code {code}, got {ended.short}")
    expect(named in ended.message, f"the message does not name {named}: {ended.message}")
    expect("Traceback" not in ended.err, f"a tick ended with a traceback: {ended.err[-1500:]}")


def _with_studio(lab: Lab, tally: FaultCount, seed: int) -> None:
    """Six kills: while the first questions are asked, the round closes, and the next one is published and asked."""
    draw = random.Random(f"studio {seed}")
    with lab.studio_site() as site:
        for _ in range(2):
            _somewhere(site, tally, draw, ("connect", "retire", "push", "pull"))
        tally.recovered(site)
        site.answer()
        _somewhere(site, tally, draw, ("connect", "retire", "push", "pull"))
        _somewhere(site, tally, draw, ("close", "label", "train", "select", "decide"))
        tally.recovered(site)
        site.check()
        site.answer()
        _somewhere(site, tally, draw, ("publish", "tag", "sync"))
        _somewhere(site, tally, draw, ("connect", "retire", "push", "pull"))
        tally.recovered(site)
        site.check()


def _somewhere(site: Site, tally: FaultCount, draw: random.Random, steps: tuple[str, ...]) -> None:
    moment: Moment = draw.choice(("before", "after", "during", "during"))
    ended = strike(site, moment, draw.choice(steps), delay=draw.uniform(*INSTANT_SECONDS))
    tally.strike(ended.code != 0)


def _flow(lab: Lab, tally: FaultCount, place: int, moment: Moment) -> None:
    """One kill of the process that runs the flow."""
    step = lab.reference.steps[1][place]
    with lab.flow_site(f"1-{place:02d}") as site:
        ended = strike(site, moment, step, delay=0.1 + 0.05 * place)
        tally.strike(ended.code != 0)
        tally.recovered(site)
        site.check()


def _kill(process: psutil.Process) -> None:
    """kill -9 of one process, if the id still belongs to it."""
    try:
        if process.is_running():
            os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
