"""`al serve`: the promoted model over HTTP."""

from __future__ import annotations

import gc
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from al_pipeline.cli.options import Json, current_workspace
from al_pipeline.cli.output import echo, escape, print_json, warn
from al_pipeline.errors import UsageError

if TYPE_CHECKING:
    from al_pipeline.serving.log import RequestLog
    from al_pipeline.serving.traffic_log import TrafficRecorder
    from al_pipeline.serving.workspace_models import WorkspaceModels
    from al_pipeline.workspace.workspace import Workspace

Host = Annotated[
    str,
    typer.Option(help="Address to listen on; by default only this machine can connect. The traffic is not encrypted."),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")]
Runtime = Annotated[
    str | None,
    typer.Option(
        metavar="torch|onnx|onnx-int8", help="What computes the vectors. Default: serve.runtime in params.yaml."
    ),
]


def serve(host: Host = "127.0.0.1", port: Port = 8000, runtime: Runtime = None, as_json: Json = False) -> None:
    """Serve the promoted model over HTTP: the Open Inference Protocol, and `POST /predict`.

    It follows the workspace: a promotion or a rollback changes the model within a second, without a lost request. \
Clients send a token, which is in a file that only you can read, or in AL_SERVE_TOKEN. `/docs` describes the \
interface, `/metrics` is for Prometheus. Requests are logged on standard error as JSON, without texts. Ctrl+C or \
SIGTERM ends it, after the requests that it has accepted.
    """
    from al_pipeline.operations.drift_looks import read_looks
    from al_pipeline.serving.log import RequestLog
    from al_pipeline.serving.server import LOOPBACK, Server, listen, model_name, token_of, url_of
    from al_pipeline.serving.versions import Versions

    workspace = current_workspace()
    settings = workspace.params.serve
    source = _source(workspace, runtime or settings.runtime)
    token, where = token_of(workspace)
    bound = listen(host, port)
    versions = Versions(source, settings.versions)
    log, recorder = RequestLog(), None
    try:
        recorder = _recorder(workspace, log)
        versions.start()
        kept = None if recorder is None else recorder.counts
        looks = partial(read_looks, workspace.layout)
        server = Server(versions, settings, model_name(workspace), token, bound, log, recorder, kept, looks)
        current, url = versions.current, url_of(bound)
        if host not in LOOPBACK:
            warn("other machines can connect, and the traffic is not encrypted; put a proxy with TLS before it")
        if current is None:
            warn(f"{versions.problem}; until then requests are answered with 503")
        if as_json:
            promoted = {"round": current and current.name, "digest": current and current.digest}
            print_json({"url": url, "model": model_name(workspace), "runtime": source.runtime, **promoted})
        else:
            shown = f"{current.name} ({current.runtime})" if current else "nothing yet"
            echo(f"Serving [bold]{escape(shown)}[/] at {url}; {url}/docs describes the interface")
            echo(f"The token is {escape(where)}")
            if recorder is not None:
                echo(f"{settings.log.share:.0%} of the requests are kept in {escape(workspace.layout.traffic)}")
        sys.stdout.flush()
        gc.collect()
        gc.freeze()  # what is loaded stays; a collection that looks through all of it would delay answers
        server.run()
    finally:
        if recorder is not None:
            recorder.close()
        log.close()
        versions.close()
        bound.close()


def _recorder(workspace: Workspace, log: RequestLog) -> TrafficRecorder | None:
    if not workspace.params.serve.log.share:
        return None
    from al_pipeline.serving.traffic_log import open_recorder

    return open_recorder(workspace, log)


def _source(workspace: Workspace, runtime: str) -> WorkspaceModels:
    from al_pipeline.params import RUNTIMES
    from al_pipeline.serving.workspace_models import TORCH, WorkspaceModels

    if runtime == TORCH:
        return WorkspaceModels(workspace)
    if runtime in RUNTIMES:
        from al_pipeline.serving.onnx_models import OnnxModels

        return OnnxModels(workspace, runtime)
    raise UsageError(f"--runtime must be torch, onnx or onnx-int8, not {runtime!r}")
