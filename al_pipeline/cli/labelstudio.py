"""`al labelstudio`: a Label Studio of the workspace's own, its accounts, or the address of another."""

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
    help="A Label Studio on this machine for those who have none of their own, or the address of yours.",
)


@app.command("start")
def start(as_json: Json = False) -> None:
    """Start Label Studio for this workspace (the first start installs it, a few minutes)."""
    from al_pipeline.servers import start_label_studio

    workspace = original_workspace()
    with spinner(not as_json) as say:
        studio = start_label_studio(workspace, say)
    if as_json:
        return print_json({"label_studio_url": studio.url})
    print_login(workspace, studio.url)


@app.command("stop")
def stop(as_json: Json = False) -> None:
    """Stop this workspace's Label Studio; everything in it is kept."""
    from al_pipeline.servers import stop_label_studio

    stopped = stop_label_studio(original_workspace())
    if as_json:
        return print_json({"stopped": stopped})
    echo("Stopped." if stopped else "It was not running.")


@app.command("invite")
def invite(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Make an account for an annotator and print its password, once."""
    from al_pipeline.operations.connect import project_page
    from al_pipeline.servers import invite

    workspace = original_workspace()
    invited = invite(workspace, email)
    page = project_page(workspace)
    if as_json:
        return print_json({"email": email, "password": invited.password, "token": invited.token, "page": page})
    url = escape(page or workspace.credentials().get("url", ""))
    echo(f"{escape(email)} can log in at {url} with the password {escape(invited.password)}")
    where = "there" if page else "on the project's page, which `al status` shows once `al round` has made it"
    echo(f'and begins {where} with the button "Label All Tasks".')


@app.command("reset")
def reset(as_json: Json = False) -> None:
    """Have the project's page offer the classes of params.yaml alone; answers with others stay, and are not counted."""
    from al_pipeline.operations.connect import reset_page

    taken_out = reset_page(current_workspace())
    if as_json:
        return print_json({"taken_out": list(taken_out)})
    named = ", ".join(map(repr, taken_out))
    echo(f"Taken out of the page: {escape(named)}." if taken_out else "The page offers the classes of params.yaml.")


@app.command("password")
def password(email: Annotated[str, typer.Argument(metavar="EMAIL")], as_json: Json = False) -> None:
    """Give an annotator who lost it a new password, printed once; what they annotated stays theirs."""
    from al_pipeline.servers import reset_password

    password = reset_password(original_workspace(), email)
    if as_json:
        return print_json({"email": email, "password": password})
    echo(f"{escape(email)} can log in with the password {escape(password)}; the old one is void")


@app.command("connect")
def connect(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="Your own Label Studio, such as https://labels.example.org")
    ],
    as_json: Json = False,
) -> None:
    """Use your own Label Studio. The token is read from AL_LABEL_STUDIO_TOKEN, else from standard input."""
    from al_pipeline.operations.connect import connect_to

    workspace = current_workspace()
    about = connect_to(workspace, url, os.environ.get("AL_LABEL_STUDIO_TOKEN") or _read_token())
    if as_json:
        return print_json({"label_studio_url": url, "version": about.version, "user": about.user})
    echo(f"Connected to {escape(url)} (Label Studio {escape(about.version)}) as {escape(about.user)}.")
    echo(f"The token lies in {escape(workspace.credentials_file)}, readable by you alone.")


def print_login(workspace: Workspace, url: str) -> None:
    from al_pipeline.servers import admin

    account = admin(workspace)
    echo(f"Label Studio: [bold]{url}[/]")
    if account:
        echo(f"    log in as {account.email}; the password lies in {escape(account.file)}, readable by you alone")


def _read_token() -> str:
    if sys.stdin.isatty():
        import getpass

        return getpass.getpass("Label Studio's access token: ").strip()
    return sys.stdin.readline().strip()
