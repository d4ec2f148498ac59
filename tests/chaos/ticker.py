"""`al` itself, which can use the twin, die or stop at the boundary of a step, and have another clock.

CHAOS_TWIN=SOCKET                 use a TwinServer instead of Label Studio
CHAOS_AT=before:publish:1:die     before (or after) that step's first (second, …) time: kill -9 of itself, or
CHAOS_AT=after:train:1:stop       SIGSTOP of itself, so that something else can happen before SIGCONT
CHAOS_AT=before:*:0:stop          before every step; its name is written to CHAOS_STEPS first
CHAOS_CLOCK=-86400                the tick's clock is that many seconds ahead
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from al_pipeline.cli import app as cli
from al_pipeline.operations import connect, tick
from al_pipeline.operations.steps.context import Context
from al_pipeline.rounds.state_machine import Facts, Step


def main() -> None:
    """Prepare what the environment asks for, then run `al`."""
    if address := os.environ.get("CHAOS_TWIN"):
        from chaos.twin import TwinOracle

        connect.connect = lambda _workspace, *_, **__: TwinOracle(address)  # type: ignore[assignment, return-value]
    if at := os.environ.get("CHAOS_AT"):
        arm(*at.split(":"))
    if ahead := os.environ.get("CHAOS_CLOCK"):
        moved = timedelta(seconds=float(ahead))
        tick.tick.__kwdefaults__["now"] = lambda: datetime.now(UTC) + moved
    cli.main()


def arm(moment: str, step: str, time: str, deed: str) -> None:
    """Strike at the `time`-th `step`; with `*` before every step."""
    taken = Counter[str]()
    number = signal.SIGKILL if deed == "die" else signal.SIGSTOP

    def strike(name: str) -> None:
        if step == "*":
            with Path(os.environ["CHAOS_STEPS"]).open("a", encoding="ascii") as steps:
                steps.write(f"{name}\n")
        os.kill(os.getpid(), number)

    def armed(now: Step, context: Context, facts: Facts) -> None:
        name = str(now)
        taken[name] += 1
        due = step == "*" or (name == step and taken[name] == int(time))
        if due and moment == "before":
            strike(name)
        whole[now](context, facts)
        if due and moment == "after":
            strike(name)

    whole = dict(tick.STEPS)
    tick.STEPS.update({now: partial(armed, now) for now in whole})


if __name__ == "__main__":
    main()
