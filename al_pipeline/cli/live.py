"""`al live`: train as people annotate."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Json, original_workspace
from al_pipeline.cli.output import discard, echo, escape, print_json, print_step

if TYPE_CHECKING:
    from al_pipeline.operations.live import Live, Step


def live(
    listen: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port, on this machine alone, for health checks and for Label Studio's webhook; 0: any free one. "
            "Default: none.",
        ),
    ] = None,
    webhook: Annotated[
        bool,
        typer.Option(
            "--webhook",
            help="Be told of answers by Label Studio instead of asking each second. It must run with "
            "LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS=false, which lets it reach this machine's own addresses.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train as you annotate: the newest model asks the next question, seconds after the last answer.

    Keeps a short queue in Label Studio: one question for each person at work, and two more. Annotators use the button \
"Label All Tasks" as ever. The round stays a round: it closes by the same rules, is built from scratch, and can be \
reproduced; `al log ITEM` shows which model asked. With `live.enabled` in params.yaml, `al up` runs this beside the \
worker. Ctrl+C or SIGTERM ends it after the step it is in; `al round` then asks the rest of the batch, as ever.
    """
    from al_pipeline.live.plan import running
    from al_pipeline.operations.connect import connect, project_page
    from al_pipeline.operations.live import Live

    workspace = original_workspace()
    layout = workspace.layout
    with running(layout):
        asking = Live(workspace, lambda: connect(workspace), on_progress=discard if as_json else print_step)
        _stop_on_signals(asking)
        with closing(asking), _listener(asking, listen, webhook):
            if as_json:
                print_json({"workspace": str(layout.root)})
            else:
                echo(f"Asking live in [bold]{escape(layout.root.name)}[/]; Ctrl+C ends it")
                if where := project_page(workspace):
                    echo(f'Annotators: {escape(where)}, then the button "Label All Tasks"')
            sys.stdout.flush()
            asking.run(partial(_after_step, asking, not as_json))
    if not as_json:
        echo("Ended. `al live` goes on; `al round` asks the rest of the batch.")


def _stop_on_signals(asking: Live) -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        asking.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


@contextmanager
def _listener(asking: Live, port: int | None, webhook: bool) -> Iterator[None]:
    """Listen for health checks, and for Label Studio's webhook if it is wanted and allowed."""
    if port is None and not webhook:
        yield
        return
    from al_pipeline.live.listener import listening
    from al_pipeline.operations.live_webhook import told

    with (
        listening(port or 0, asking.wake, asking.is_alive) as found,
        told(asking.workspace, found) if webhook else nullcontext(),
    ):
        yield


def _after_step(asking: Live, shows: bool, step: Step | None) -> None:
    """Write the state for pages and terminals, and print what was asked. `step`: None if it failed."""
    from al_pipeline.live.state import write_state
    from al_pipeline.operations.live_state import state_of

    write_state(asking.workspace.layout, state_of(asking))
    if shows and step is not None:
        _print_step(step)


def _print_step(step: Step) -> None:
    for question in step.asked:
        task = question.task
        by = f"model {question.model[:8]}, which knows {question.events:,} answers" if question.model else "the batch"
        print_step(f"asked {task.item_id} ({question.kind}, score {task.score:.3f}) by {by}")
