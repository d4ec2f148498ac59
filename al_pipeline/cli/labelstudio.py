"""`al labelstudio`: run a Label Studio for the workspace, manage its accounts, or connect to another one."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Json, current_workspace, original_workspace
from al_pipeline.cli.output import echo, escape, print_json, spinner

if TYPE_CHECKING:
    from al_pipeline.workspace.workspace import Workspace

app = typer.Typer(
    no_args_is_help=True,
    help="Run Label Studio on this machine, or connect to your own.",
)


@app.command("start")
def start(as_json: Json = False) -> None:
    """Start Label Studio for this workspace. The first start installs it, which takes a few minutes."""
    from al_pipeline.servers import start_label_studio

    workspace = original_workspace()
    with spinner(not as_json) as on_progress:
        studio = start_label_studio(workspace, on_progress)
    if as_json:
        return print_json({"label_studio_url": studio.url})
    print_login(workspace, studio.url)


@app.command("stop")
def stop(as_json: Json = False) -> None:
    """Stop this workspace's Label Studio; its data is kept."""
    from al_pipeline.servers import stop_label_studio

    stopped = stop_label_studio(original_workspace())
    if as_json:
        return print_json({"stopped": stopped})
    echo("Stopped." if stopped else "It was not running.")


@app.command("invite")
def invite(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Create an account for an annotator and print its password, once."""
    from al_pipeline.operations.connect import project_page
    from al_pipeline.servers import invite

    workspace = original_workspace()
    invited = invite(workspace, email)
    page = project_page(workspace)
    if as_json:
        return print_json({"email": email, "password": invited.password, "token": invited.token, "page": page})
    url = escape(page or workspace.credentials().get("url", ""))
    echo(f"{escape(email)} can log in at {url} with the password {escape(invited.password)}")
    where = "there" if page else "on the project's page, which `al status` shows once `al round` has created it"
    echo(f'and starts {where} with the button "Label All Tasks".')


@app.command("reset")
def reset(as_json: Json = False) -> None:
    """Offer only the classes of params.yaml in the project; answers with other classes stay there but do not count."""
    from al_pipeline.operations.connect import reset_page

    removed = reset_page(current_workspace())
    if as_json:
        return print_json({"removed_classes": list(removed)})
    named = ", ".join(map(repr, removed))
    echo(f"Removed from the project: {escape(named)}." if removed else "The project offers the classes of params.yaml.")


@app.command("password")
def password(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Set a new password for an annotator and print it, once; their annotations are kept."""
    from al_pipeline.servers import reset_password

    password = reset_password(original_workspace(), email)
    if as_json:
        return print_json({"email": email, "password": password})
    echo(f"{escape(email)} can log in with the password {escape(password)}; the old one no longer works")


@app.command("connect")
def connect(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Your own Label Studio, such as https://labels.example.org")
    ],
    as_json: Json = False,
) -> None:
    """Use your own Label Studio. The token is read from AL_LABEL_STUDIO_TOKEN or standard input."""
    from al_pipeline.operations.connect import connect_to

    workspace = current_workspace()
    about = connect_to(workspace, url, os.environ.get("AL_LABEL_STUDIO_TOKEN") or _read_token())
    if as_json:
        return print_json({"label_studio_url": url, "version": about.version, "user": about.user})
    echo(f"Connected to {escape(url)} (Label Studio {escape(about.version)}) as {escape(about.user)}.")
    echo(f"The token is stored in {escape(workspace.credentials_file)}, readable only by you.")


def print_login(workspace: Workspace, url: str) -> None:
    """Print the address of Label Studio, and where the password of its administrator is."""
    from al_pipeline.servers import admin

    account = admin(workspace)
    echo(f"Label Studio: [bold]{url}[/]")
    if account:
        echo(f"    log in as {account.email}; the password is in {escape(account.file)}, readable only by you")


def _read_token() -> str:
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("Label Studio's access token: ").strip()
    return sys.stdin.readline().strip()
