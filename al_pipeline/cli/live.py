"""`al live`: train as people annotate; `al watch`: what it learns, in the terminal."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from al_pipeline.cli.options import Json, current_workspace, original_workspace
from al_pipeline.cli.output import discard, echo, escape, print_json, print_step, print_table, warn
from al_pipeline.errors import NothingToDo

if TYPE_CHECKING:
    from al_pipeline.live.state import LiveState
    from al_pipeline.operations.live import Live, Step
    from al_pipeline.workspace.layout import Layout
    from al_pipeline.workspace.workspace import Workspace

_STATE_SECONDS = 0.5
"""Between two states, at least, unless something failed."""
_LOOK_SECONDS = 1.0
_ACCOUNTS_SECONDS = 60.0
"""Between two looks at the accounts of annotators, at least."""


def live(
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port of the page that shows what it learns, on this machine alone; 0: any free one. Default: that of "
            "the last page, or any free one.",
        ),
    ] = None,
    listen: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port, on this machine alone, for Label Studio's webhook and health checks; 0: any free one. Default: "
            "none, or any free one with --webhook.",
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
reproduced; `al log ITEM` shows which model asked. A page on this machine shows what it learns, as does `al watch`. \
With `live.enabled` in params.yaml, `al up` runs this beside the worker. Ctrl+C or SIGTERM ends it after the \
step it is in; `al round` then asks the rest of the batch, as ever.
    """
    from al_pipeline.live.page import address_of, serve_page, token_of, usual_port
    from al_pipeline.live.plan import running
    from al_pipeline.operations.connect import connect, project_page
    from al_pipeline.operations.live import Live

    workspace = original_workspace()
    layout = workspace.layout
    with running(layout):
        asking = Live(
            workspace,
            lambda: connect(workspace, accounts_seconds=_ACCOUNTS_SECONDS),
            on_progress=discard if as_json else print_step,
        )
        _stop_on_signals(asking)
        shown, token = _Shown(asking, not as_json), token_of(workspace)
        with (
            closing(asking),
            serve_page(shown.newest, port, token, asking.is_alive, usual_port(layout)) as shown.page,
            shown.artifact.running(),
            _listener(asking, listen, webhook),
        ):
            page = address_of(shown.page, token)
            if as_json:
                print_json({"workspace": str(layout.root), "page": page})
            else:
                echo(f"Asking live in [bold]{escape(layout.root.name)}[/]; Ctrl+C ends it")
                echo(f"What it learns: {escape(page)} (its token is secret); or `al watch`")
                if where := project_page(workspace):
                    echo(f'Annotators: {escape(where)}, then the button "Label All Tasks"')
            sys.stdout.flush()
            shown.write()
            asking.run(shown.after_step)
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


class _Shown:
    """What `al live` shows after each step: its state, for the page, `al watch` and Prefect, and what it asked."""

    def __init__(self, asking: Live, prints: bool) -> None:
        from al_pipeline.operations.live_artifact import LiveArtifact
        from al_pipeline.operations.live_state import LiveStates

        self._asking, self._prints = asking, prints
        self._states = LiveStates()
        self.artifact = LiveArtifact(asking.workspace)
        self.page = ""
        self._ticking: tuple[LiveState, LiveState] | None = None
        self._state: LiveState | None = None

    def after_step(self, step: Step | None) -> None:
        """Show the state, not too often; print what was asked. `step`: None if it failed."""
        last = self._state
        if last is None or step is None or self._asking.now() - last.time >= _STATE_SECONDS:
            self.write()
        if self._prints and step is not None:
            _print_step(step)

    def write(self) -> None:
        """Write the state for terminals, and hand it to page and Prefect."""
        from al_pipeline.live.state import write_state

        self._state = state = self._states.now(self._asking, self.page)
        write_state(self._asking.workspace.layout, state)
        self.artifact.offer(state)

    def newest(self) -> LiveState | None:
        """The last state; while a tick runs, which takes longer than a step, it says so."""
        state = self._state
        if state is None or not self._asking.ticking:
            return state
        if self._ticking is None or self._ticking[0] is not state:
            from msgspec.structs import replace

            self._ticking = (state, replace(state, health="a tick runs"))
        return self._ticking[1]


def _print_step(step: Step) -> None:
    for question in step.asked:
        task = question.task
        by = f"model {question.model[:8]}, which knows {question.events:,} answers" if question.model else "the batch"
        print_step(f"asked {task.item_id} ({question.kind}, score {task.score:.3f}) by {by}")


def watch(
    once: Annotated[bool, typer.Option("--once", help="Show the state once, and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each new state; with --once, one.")
    ] = False,
) -> None:
    """Show in the terminal what `al live` learns: accuracy, learning curve, open questions, classes, people.

    It reads what `al live` shows of itself, also on its page. If that does not run, the last state is shown, and said \
to be old. Ctrl+C ends it.
    """
    from al_pipeline.live.state import state_file

    workspace = current_workspace()
    layout = workspace.layout
    if not state_file(layout).exists():
        raise NothingToDo("`al live` has not run in this workspace; start it, or `al up` with `live.enabled`")
    if once:
        return _show_once(workspace, as_json)
    try:
        if not as_json and sys.stdout.isatty():
            _follow(layout)
        else:
            _print_changes(layout, as_json)
    except KeyboardInterrupt:
        return


def _read(layout: Layout) -> tuple[LiveState, str, bool]:
    """The last state, how it stands, and whether `al live` runs. Raises NothingToDo without a readable state."""
    from al_pipeline.live.plan import is_running
    from al_pipeline.live.state import read_state
    from al_pipeline.live.watch import standing

    runs, state = is_running(layout), read_state(layout)
    if state is None:
        raise NothingToDo("what `al live` wrote cannot be read: another version wrote it; start `al live` again")
    return state, standing(state, time.time(), runs), runs


def _as_json(state: LiveState, said: str, runs: bool) -> dict[str, Any]:
    from al_pipeline.live.state import to_row

    return {"runs": runs, "standing": said, **to_row(state)}


def _show_once(workspace: Workspace, as_json: bool) -> None:
    from al_pipeline.live.page import page_of
    from al_pipeline.live.watch import figures, tables

    state, said, runs = _read(workspace.layout)
    if as_json:
        return print_json(_as_json(state, said, runs))
    if not runs:
        warn(said)
    echo(f"[bold]{escape(state.workspace)}[/], live: {escape(said)}")
    for name, value in figures(state):
        echo(f"{name}: {escape(value)}")
    for table in tables(state):
        echo(f"[bold]{escape(table.title)}[/]")
        print_table(table.header, [list(row) for row in table.rows])
    if page := page_of(workspace):
        echo(f"page: {escape(page)} (its token is secret)")


def _print_changes(layout: Layout, as_json: bool) -> None:
    """For pipes: a line for each new state, at most one a second."""
    from al_pipeline.cli.output import write_json
    from al_pipeline.live.watch import figures

    seen = None
    while True:
        state, said, runs = _read(layout)
        if (state.time, runs) != seen:
            if as_json:
                import json

                write_json(json.dumps(_as_json(state, said, runs), ensure_ascii=False) + "\n", sys.stdout)
            else:
                told = "; ".join(f"{name} {value}" for name, value in figures(state)[:4])
                echo(f"{escape(said if state.health != 'up' or not runs else 'up')}; {escape(told)}")
            sys.stdout.flush()
            seen = (state.time, runs)
        time.sleep(_LOOK_SECONDS)


def _follow(layout: Layout) -> None:
    """In a terminal: a picture that is drawn again each second."""
    from rich.console import Console
    from rich.live import Live as Screen

    with Screen(console=Console(highlight=False), refresh_per_second=2, screen=False) as screen:
        while True:
            screen.update(_picture(*_read(layout)))
            time.sleep(_LOOK_SECONDS)


def _picture(state: LiveState, said: str, runs: bool) -> Any:
    from rich.console import Group
    from rich.table import Table

    from al_pipeline.live.watch import figures, tables

    head = Table(
        box=None, pad_edge=False, show_header=False, title=f"{escape(state.workspace)}, live", title_justify="left"
    )
    head.add_row("[dim]service[/]", escape(said) if runs else f"[yellow]{escape(said)}[/]")
    for name, value in figures(state):
        head.add_row(f"[dim]{name}[/]", escape(value))
    shown = [head]
    for table in tables(state):
        made = Table(box=None, pad_edge=False, header_style="dim", title=escape(table.title), title_justify="left")
        for name in table.header:
            made.add_column(name, no_wrap=True, overflow="ellipsis")
        for row in table.rows[:12]:
            made.add_row(*map(escape, row))
        shown.append(made)
    return Group(*shown)
