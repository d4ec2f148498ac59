"""The HTTP interface: the Open Inference Protocol, `POST /predict`, metrics, and a page that describes them."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from al_pipeline.drift.look import Looks
from al_pipeline.errors import AlError, NothingToDo
from al_pipeline.features.encoder import usable_cpus
from al_pipeline.logs import get_logger
from al_pipeline.params import Serve
from al_pipeline.serving import metrics as prometheus
from al_pipeline.serving import protocol
from al_pipeline.serving.batches import Batcher, Closed, QueueFull, TimedOut
from al_pipeline.serving.log import RequestLog
from al_pipeline.serving.page import html_page
from al_pipeline.serving.protocol import Refused
from al_pipeline.serving.versions import Served, TooManyRounds, Versions

_logger = get_logger(__name__)

_JSON = "application/json"
_ROUND = re.compile(r"(?:round-)?(\d{1,6})\Z", re.ASCII)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}\Z")
_DRAINED = 64 * 2**20
"""Most bytes of a refused body that are read, and thrown away, so that the client reads the answer."""
_DRAIN_SECONDS = 10.0
_HEAD_BYTES = 16 * 2**10
"""Most bytes of a request's headers and address. The protocol bounds only what arrives in several pieces."""
_AGAIN = 5.0
"""Seconds after which a client may try again where the time is not known."""

Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answered:
    """Texts that were predicted in one request, before the answer goes out."""

    time: float
    """Seconds since 1970."""
    request_id: str
    model: Served
    texts: Sequence[str]
    proba: NDArray[np.float64]
    """Class probabilities, (n, C), columns as in `model.classes`."""


Recorder = Callable[[Answered], Awaitable[None]]
"""Is called and awaited with each answer before it goes out; an exception fails the request."""


def make_app(
    versions: Versions,
    settings: Serve,
    name: str,
    token: str,
    log: RequestLog,
    recorder: Recorder | None = None,
    kept: Callable[[], Mapping[str, int]] | None = None,
    looks: Callable[[], Looks | None] | None = None,
) -> FastAPI:
    """The application that serves `versions` as the model `name` to whoever has the `token`.

    Its lifespan starts and ends the threads that compute; `versions` are the caller's to start and close. `recorder`
    gets every answer; `kept` says, for the metrics, what became of their texts, `looks` how they differ from the pool.
    """
    metrics = prometheus.Metrics(lambda: batcher.waiting, kept, looks)
    batcher = Batcher(
        settings.batch_texts,
        settings.window_ms / 1000,
        settings.queue_texts,
        settings.timeout_seconds,
        metrics.computed,
        usable_cpus(),
    )
    versions.on_swap = metrics.swapped
    metrics.swapped(versions.current)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.close()

    app = FastAPI(title=name, version=version("al-pipeline"), docs_url=None, redoc_url=None, lifespan=lifespan)

    async def current() -> Served:
        model = versions.current
        if model is None:
            raise Refused(503, versions.problem, protocol.retry_after(_AGAIN))
        return model

    async def model_of(asked: int | str | None) -> Served:
        if asked is None:
            return await current()
        found = _ROUND.match(str(asked))
        if not found:
            raise Refused(404, "there is no such version; give a round's number, such as 7")
        number = int(found[1])
        if model := versions.loaded(number):
            return model
        try:
            loading = asyncio.wrap_future(versions.ask(number))
            loading.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # who asked may be gone
            return await asyncio.wait_for(asyncio.shield(loading), settings.timeout_seconds)
        except TooManyRounds as error:
            raise Refused(429, str(error), protocol.retry_after(_AGAIN)) from None
        except NothingToDo as error:
            raise Refused(404, str(error)) from None
        except asyncio.CancelledError:
            if versions.ended:
                raise Refused(503, "the server is ending", protocol.retry_after(_AGAIN)) from None
            raise
        except AlError as error:
            raise Refused(503, str(error), protocol.retry_after(_AGAIN)) from None
        except TimeoutError:
            raise Refused(503, "the model is being loaded", protocol.retry_after(_AGAIN)) from None

    def known(asked: str) -> None:
        if asked != name:
            raise Refused(404, f"there is no model of that name; there is {name!r}")

    async def predict_proba(model: Served, texts: list[str]) -> NDArray[Any]:
        try:
            return await batcher.predict(model, texts)
        except QueueFull as full:
            raise Refused(429, str(full), protocol.retry_after(full.seconds)) from None
        except TimedOut:
            sentence = f"no answer within {settings.timeout_seconds:g} s (serve.timeout_seconds)"
            raise Refused(503, sentence, protocol.retry_after(_AGAIN)) from None
        except Closed:
            raise Refused(503, "the server is ending", protocol.retry_after(_AGAIN)) from None

    async def body_of(request: Request) -> bytes:
        kind, _, options = request.headers.get("content-type", _JSON).partition(";")
        if kind.strip().lower() not in (_JSON, "application/octet-stream", "application/x-www-form-urlencoded"):
            raise Refused(415, f"send JSON (Content-Type: {_JSON})")
        charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", options, re.IGNORECASE)
        if charset and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
            raise Refused(415, "send the JSON as UTF-8")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "compressed bodies are not supported")
        too_large = Refused(413, f"the body is larger than {settings.max_bytes:,} bytes (serve.max_bytes)")
        length = request.headers.get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > settings.max_bytes):
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > settings.max_bytes:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            sentence = f"the body did not arrive within {settings.timeout_seconds:g} s (serve.timeout_seconds)"
            raise Refused(408, sentence, {"Connection": "close"}) from None
        request.state.bytes = size
        return b"".join(parts)

    def has_token(request: Request) -> bool:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())

    def check_token(request: Request) -> None:
        if not has_token(request):
            what = "the token is wrong" if request.headers.get("authorization") else "a token is needed"
            sentence = f"{what}; send the header Authorization: Bearer TOKEN"
            raise Refused(401, sentence, {"WWW-Authenticate": 'Bearer realm="al serve"'})

    async def answer(request: Request, texts: list[str], model: Served) -> tuple[NDArray[Any], list[dict[str, Any]]]:
        request.state.texts, request.state.round = len(texts), model.name
        proba = await predict_proba(model, texts)
        rows = list(protocol.predictions(model, proba, settings.min_confidence))
        metrics.predicted(model, rows)
        if recorder is not None:
            await recorder(Answered(time.time(), request.state.id, model, texts, proba))
        return proba, rows

    @app.get("/v2", openapi_extra=_described("Server metadata"))
    async def server_metadata() -> Response:
        return _json({"name": "al-pipeline", "version": version("al-pipeline"), "extensions": []})

    @app.get("/v2/health/live", openapi_extra=_described("Whether the server runs"))
    async def live() -> Response:
        return _json({"live": True})

    @app.get("/v2/health/ready", openapi_extra=_described("Whether a promoted model is loaded"))
    async def ready(request: Request) -> Response:
        if versions.current is None and not has_token(request):  # why may name files
            raise Refused(503, "no model is loaded", protocol.retry_after(_AGAIN))
        await current()
        return _json({"ready": True})

    @app.get("/v2/models/{model}", openapi_extra=_described("Metadata of the promoted model", "ModelMetadata"))
    @app.get("/v2/models/{model}/versions/{version}", openapi_extra=_described("Metadata of a round", "ModelMetadata"))
    async def model_metadata(request: Request) -> Response:
        check_token(request)
        known(request.path_params["model"])
        model = await model_of(request.path_params.get("version"))
        return _json(protocol.metadata(name, model, versions.rounds()))

    @app.get("/v2/models/{model}/ready", openapi_extra=_described("Whether the promoted model is loaded"))
    @app.get("/v2/models/{model}/versions/{version}/ready", openapi_extra=_described("Whether a round can answer"))
    async def model_ready(request: Request) -> Response:
        check_token(request)
        known(request.path_params["model"])
        model = await model_of(request.path_params.get("version"))
        return _json({"name": name, "version": str(model.round), "ready": True})

    @app.post("/v2/models/{model}/infer", openapi_extra=_described("Predict", "InferAnswer", "InferRequest"))
    @app.post(
        "/v2/models/{model}/versions/{version}/infer",
        openapi_extra=_described("Predict with the model of a round", "InferAnswer", "InferRequest"),
    )
    async def infer(request: Request) -> Response:
        check_token(request)
        known(request.path_params["model"])
        asked, texts = protocol.decode_infer(await body_of(request), settings.max_texts)
        model = await model_of(request.path_params.get("version"))
        proba, rows = await answer(request, texts, model)
        return _json(protocol.infer_answer(name, model, rows, proba, asked))

    @app.post("/predict", openapi_extra=_described("Predict one text or several", "PredictAnswer", "PredictRequest"))
    async def predict(request: Request) -> Response:
        check_token(request)
        texts, wanted = protocol.decode_predict(await body_of(request), settings.max_texts)
        model = await model_of(wanted)
        _, rows = await answer(request, texts, model)
        return _json(protocol.predict_answer(model, rows))

    @app.get("/metrics", openapi_extra=_described("Metrics for Prometheus"))
    async def read_metrics(request: Request) -> Response:
        check_token(request)
        return Response(metrics.text(), media_type=prometheus.CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(html_page(app.openapi()), media_type="text/html; charset=utf-8")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return await _failed(request, error.status, error.sentence, error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        sentence = {
            404: "there is no such address; GET /docs describes those that there are",
            405: f"this address does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        return await _failed(request, error.status_code, sentence, dict(error.headers or {}))

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(_Watched, metrics=metrics, log=log, seconds=settings.timeout_seconds)
    return app


class _Watched:
    """Times, counts and logs each request, gives it an id, and turns a bug into a 500 without its details."""

    def __init__(self, app: Any, metrics: prometheus.Metrics, log: RequestLog, seconds: float) -> None:
        self._app, self._metrics, self._log, self._seconds = app, metrics, log, seconds

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["id"] = request_id

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            # a client that does not read its answer must not hold it for ever
            await asyncio.wait_for(send(message), self._seconds)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"]) > _HEAD_BYTES:
                sentence = f"the head of the request is larger than {_HEAD_BYTES:,} bytes"
                await _json({"error": sentence}, 431, {"Connection": "close"})(scope, receive, sent)
            else:
                await self._app(scope, receive, sent)
        except ClientDisconnect:
            status = status or 499
        except TimeoutError:
            status = status or 408
        except Exception as error:
            # Where it failed, without the error's own words, which may quote a text.
            where = " ".join(f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__))
            _logger.error("request %s failed: %s at %s", request_id, type(error).__name__, where)
            if status == 0:
                failure = _json({"error": f"a bug in the server: {type(error).__name__}; its log has more"}, 500)
                await failure(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - begin
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, status, seconds)
            self._log.write(
                "request", id=request_id, method=scope["method"], route=route, status=status,
                ms=round(seconds * 1000, 2), texts=state.get("texts", 0), bytes=state.get("bytes", 0),
                round=state.get("round"),
            )  # fmt: skip


async def _failed(request: Request, status: int, sentence: str, headers: dict[str, str]) -> Response:
    """A refusal, after the rest of the body was thrown away: else the client could lose the answer."""
    left, size = True, 0
    if request.headers.get("expect", "").lower() != "100-continue":
        try:
            async with asyncio.timeout(0 if status == 408 else _DRAIN_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > _DRAINED:
                        break
                else:
                    left = False
        except (TimeoutError, RuntimeError, ClientDisconnect):  # RuntimeError: it was read already, or partly
            left = status in (408, 413)
    return _json({"error": sentence}, status, {**headers, **({"Connection": "close"} if left else {})})


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(protocol.encode(value), status, headers, media_type=_JSON)


# What describes it ---------------------------------------------------------------------------------------------------
_KINDS = (
    protocol.PredictRequest, protocol.PredictAnswer, protocol.InferRequest, protocol.InferAnswer,
    protocol.ModelMetadata, protocol.Failure,
)  # fmt: skip


def _described(summary: str, answer: str | None = None, asked: str | None = None) -> dict[str, Any]:
    """What OpenAPI says of an operation, by the names of types in `protocol`."""

    def content(kind: str) -> dict[str, Any]:
        return {_JSON: {"schema": {"$ref": f"#/components/schemas/{kind}"}}}

    answers: dict[str, Any] = {"200": {"description": "OK", **({"content": content(answer)} if answer else {})}}
    answers["default"] = {"description": "Not answered, and why", "content": content("Failure")}
    body = {"requestBody": {"required": True, "content": content(asked)}} if asked else {}
    return {"summary": summary, "responses": answers, **body}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, kinds = msgspec.json.schema_components(_KINDS, ref_template="#/components/schemas/{name}")
        found["components"] = {
            "schemas": kinds,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        }
        found["security"] = [{"token": []}]
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["parameters"] = [
                    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                    for name in re.findall(r"\{(\w+)\}", path)
                ]
        app.openapi_schema = found
    return app.openapi_schema
