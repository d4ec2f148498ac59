"""`al notify`: the services that tell people what happens in a workspace."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from al_pipeline.cli.options import Json, current_workspace, original_workspace
from al_pipeline.cli.output import echo, escape, print_json, print_table
from al_pipeline.errors import ExternalServiceError

if TYPE_CHECKING:
    from al_pipeline.notifications.messages import Answer

app = typer.Typer(
    no_args_is_help=True,
    help="Tell people by e-mail, chat or webhook what happens: rounds that are full or published, ticks that need a "
    "person. `notify` in params.yaml says which events.",
)

Number = Annotated[str, typer.Argument(metavar="SERVICE", help="As `al notify list` numbers it.")]


@app.command("add")
def add(as_json: Json = False) -> None:
    """Store the address of a service, read from standard input: it holds secrets. `al notify test` tries it.

    An address is one that Apprise takes, such as mailto://user:password@example.org or discord://ID/TOKEN. It is \
stored outside the workspace, readable only by you. AL_NOTIFY_URLS, addresses separated by blanks, replaces what is \
stored.
    """
    from al_pipeline.operations.notify import add_service

    workspace = original_workspace()
    found = add_service(workspace, _read_address())
    if as_json:
        return print_json({"service": found.service, "kind": found.kind})
    echo(f"Service {escape(found.service)}: {escape(found.kind)}. [bold]al notify test[/] sends a message.")
    echo(f"Its address is stored in {escape(workspace.services_file)}, readable only by you.")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the services, without their addresses, and the events that are told."""
    from al_pipeline.operations.notify import list_services

    workspace = current_workspace()
    found, events = list_services(workspace), workspace.params.notify.events
    if as_json:
        return print_json(
            {"services": [{"service": one.service, "kind": one.kind} for one in found], "events": list(events)}
        )
    if found:
        print_table(("service", "kind"), [[one.service, one.kind or one.answer] for one in found])
    else:
        echo("There is no service; [bold]al notify add[/] stores one.")
    echo("told of: " + (", ".join(events) or "nothing (notify.events in params.yaml)"))


@app.command("remove")
def remove(number: Number, as_json: Json = False) -> None:
    """Forget a service and its address."""
    from al_pipeline.operations.notify import remove_service

    remove_service(original_workspace(), number)
    if as_json:
        return print_json({"removed": number})
    echo(f"Service {escape(number)} is forgotten.")


@app.command("test")
def test(
    number: Annotated[str | None, typer.Argument(metavar="SERVICE", help="Default: all services.")] = None,
    as_json: Json = False,
) -> None:
    """Send a test message and say what each service answered. Exits with 5 if one did not take it."""
    from al_pipeline.operations.notify import test_services

    found = test_services(current_workspace(), number)
    if as_json:
        print_json({"services": [_to_json(one) for one in found]})
    else:
        print_table(("service", "kind", "answer"), [[one.service, one.kind or "unknown", one.answer] for one in found])
    if not all(one.delivered for one in found):
        raise typer.Exit(ExternalServiceError.exit_code)


def _to_json(one: Answer) -> dict[str, Any]:
    return {"service": one.service, "kind": one.kind, "delivered": one.delivered, "answer": one.answer}


def _read_address() -> str:
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("Address of the service: ")
    return sys.stdin.readline()
