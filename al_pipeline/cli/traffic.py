"""`al traffic`: the log of served requests."""

from __future__ import annotations

from typing import Annotated

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import echo, escape, print_json, warn

app = typer.Typer(
    no_args_is_help=True,
    help="What `al serve` keeps of requests and answers (`serve.log` in params.yaml), and its deletion.",
)


@app.command()
def show(as_json: Json = False) -> None:
    """Show how much the log of requests holds, and how many of its texts entered the pool.

    Its files are Parquet, for pandas, Polars or DuckDB; what came in the last hour is still in journals, and counts \
here. `traffic` in params.yaml says what each tick takes into the pool.
    """
    from al_pipeline.operations.traffic import show as show_traffic

    found = show_traffic(current_workspace())
    if as_json:
        return print_json(found)
    if not found["texts"]:
        echo(
            "No request is logged."
            + ("" if found["share"] else " `serve.log.share` in params.yaml is 0: `al serve` keeps none.")
        )
        return
    size = f"{found['bytes'] / 1e6:,.1f} MB"
    echo(f"{found['texts']:,} texts, {found['from']} to {found['to']}, {size} in {escape(found['folder'])}")
    chosen = found["chosen"]
    echo(
        f"Chosen so far: {chosen['random']:,} at random, {chosen['uncertain']:,} uncertain and "
        f"{chosen['novel']:,} novel for the pool, {chosen['test']:,} for the test set"
    )
    if found["damaged_lines"]:
        warn(f"{found['damaged_lines']:,} lines are damaged")


@app.command()
def delete(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="The id of a request: its `X-Request-Id`.")],
    as_json: Json = False,
) -> None:
    """Delete all texts of a request from the log.

    A running server deletes what it still writes to within seconds. Items of the pool that are from the request are \
named, not deleted: SECURITY.md has the steps for them.
    """
    from al_pipeline.operations.traffic import delete as delete_request

    found = delete_request(current_workspace(), request)
    if as_json:
        return print_json({"texts": found.texts, "waiting": found.waiting, "items": list(found.items)})
    echo(f"[green]{found.texts:,} texts were deleted from the log of requests.[/]")
    if found.waiting:
        warn(
            f"{found.waiting:,} more are in the journal of a server that does not answer; nobody reads them, and they "
            "go when it ends. Run this again then"
        )
    for item in found.items:
        echo(f"{escape(item)} in the pool is from this request; SECURITY.md says how it is deleted")
