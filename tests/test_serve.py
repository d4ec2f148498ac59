"""`al serve` on a real HTTP server: what it answers, what it refuses, and that it follows the workspace."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from harness import Played, go_on
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.errors import BadParams, RepositoryError, ServerFailed, UsageError
from al_pipeline.files import sha256_tree
from al_pipeline.operations.intervene import approve, dvc_for_intervention, rollback
from al_pipeline.operations.predict import predict
from al_pipeline.params import SERVE, Serve, parse_params
from al_pipeline.serving import server as server_module
from al_pipeline.serving.app import Answered, Recorder
from al_pipeline.serving.batches import Batcher, Closed, QueueFull, TimedOut
from al_pipeline.serving.log import RequestLog
from al_pipeline.serving.server import Server, listen, model_name, token_of, url_of
from al_pipeline.serving.versions import Served, TooManyRounds, Versions
from al_pipeline.serving.workspace_models import WorkspaceModels
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

TOKEN = "a-token-for-tests-only"
TEXTS = ["win money now, free offer today", "meeting agenda tomorrow, minutes of the call", "?", "\0 \N{SNOWMAN} ẞ"]


@dataclass
class Running:
    """A server in a thread of this process."""

    url: str
    versions: Versions
    log: io.StringIO

    def client(self, token: str | None = TOKEN) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)


@contextlib.contextmanager
def running(
    source: Any, serve: Serve | None = None, name: str = "mails", recorder: Recorder | None = None, kept: Any = None
) -> Iterator[Running]:
    """Serve `source` on a free port."""
    serve = serve or replace(SERVE, timeout_seconds=5.0)
    versions, out, bound = Versions(source, serve.versions), io.StringIO(), listen("127.0.0.1", 0)
    log = RequestLog(out)
    versions.start()
    server = Server(versions, serve, name, TOKEN, bound, log, recorder, kept)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield Running(url_of(bound), versions, out)
    finally:
        server.stop()
        thread.join(30)
        versions.close()
        log.close()
        bound.close()
    assert not thread.is_alive()


class Fake:
    """A source of models whose probabilities say which model answered: class `a` has (round + 1) / 100."""

    def __init__(self, seconds: float = 0.0, gains: bool = True) -> None:
        self.promoted_round: int | None = 0
        self.seconds, self.gains, self.broken = seconds, gains, False
        self.batches: list[int] = []

    def mark(self) -> Any:
        return self.promoted_round

    def promoted(self) -> tuple[int, str] | None:
        return None if self.promoted_round is None else (self.promoted_round, f"digest-{self.promoted_round}")

    def rounds(self) -> tuple[int, ...]:
        return tuple(range(20))

    def load(self, number: int) -> Served:
        if self.broken:
            raise RepositoryError("its digest is wrong")

        def predict_proba(texts: Sequence[str]) -> Any:
            self.batches.append(len(texts))
            if "boom" in texts:
                raise ValueError("boom")
            time.sleep(self.seconds)
            return np.array([[(number + 1) / 100, 1 - (number + 1) / 100]] * len(texts))

        return Served(number, f"digest-{number}", "fake", ("a", "b"), predict_proba, self.gains)


@pytest.fixture(scope="module")
def fake() -> Iterator[Running]:
    with running(
        Fake(), replace(SERVE, timeout_seconds=5.0, max_bytes=100_000, max_texts=100, min_confidence=0.985)
    ) as made:
        yield made


@pytest.fixture(scope="module")
def workspace(twice: Played, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two published rounds, the second promoted."""
    made, _, _ = go_on(twice, tmp_path_factory.mktemp("serve"))
    with dvc_for_intervention(made) as dvc:
        approve(made, dvc, 1, "a test")
    return made


def infer(data: Any, **changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": data, **changes}]}


# What it answers ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_it_answers_what_predict_says_to_the_byte(workspace: Workspace) -> None:
    rows = {number: list(predict(workspace, iter([[(text, text) for text in TEXTS]]), number)) for number in (0, 1)}
    assert rows[0] != rows[1]
    name = model_name(workspace)
    with running(WorkspaceModels(workspace), name=name) as made, made.client() as client:
        for asked, number in (({}, 1), ({"round": 0}, 0), ({"round": "round-0001"}, 1)):
            found = client.post("/predict", json={"texts": TEXTS, **asked})
            said = found.json()
            assert (said["round"], said["runtime"]) == (f"round-000{number}", "torch")
            assert said["digest"] == sha256_tree(workspace.layout.private / f"published/round-000{number}/model")
            for row, one in zip(rows[number], said["predictions"], strict=True):
                assert {key: one[key] for key in ("label", "probability", "probabilities")} == {
                    key: row[key] for key in ("label", "probability", "probabilities")
                }
                assert json.dumps(row["probabilities"], separators=(",", ":")) in found.text, "the bytes, too"
            one = client.post("/predict", json={"text": TEXTS[0], **asked}).json()
            assert one == {**said, "predictions": said["predictions"][:1]}
        for path, number in ((f"/v2/models/{name}/infer", 1), (f"/v2/models/{name}/versions/0/infer", 0)):
            answer = client.post(path, json={**infer(TEXTS), "id": "42"}).json()
            tensors = {tensor.pop("name"): tensor for tensor in answer["outputs"]}
            assert (answer["id"], answer["model_name"], answer["model_version"]) == ("42", name, str(number))
            assert tensors["label"] == {
                "datatype": "BYTES",
                "shape": [4],
                "data": [row["label"] for row in rows[number]],
            }
            flat = [value for row in rows[number] for value in row["probabilities"].values()]
            assert tensors["probabilities"] == {"datatype": "FP64", "shape": [4, 2], "data": flat}
            assert tensors["abstained"]["data"] == [False] * 4
        about = client.get(f"/v2/models/{name}").json()
        assert about["versions"] == ["0", "1"] and about["parameters"]["round"] == "round-0001"
        assert client.get(f"/v2/models/{name}/versions/0").json()["parameters"]["round"] == "round-0000"
        assert client.get(f"/v2/models/{name}/versions/0/ready").json()["ready"] is True
    assert "meeting" not in made.log.getvalue() and '"texts": 4' in made.log.getvalue()


def test_below_the_set_confidence_it_abstains(fake: Running) -> None:
    with fake.client() as client:
        (sure,) = client.post("/predict", json={"text": "x"}).json()["predictions"]
        assert sure == {"label": "b", "probability": 0.99, "abstained": False, "probabilities": {"a": 0.01, "b": 0.99}}
        (unsure,) = client.post("/predict", json={"text": "x", "round": 1}).json()["predictions"]
        assert unsure == {
            "label": None,
            "probability": 0.98,
            "abstained": True,
            "probabilities": {"a": 0.02, "b": 0.98},
        }
        tensors = client.post("/v2/models/mails/versions/1/infer", json=infer(["x"])).json()["outputs"]
        assert [tensor["data"] for tensor in tensors if tensor["name"] in ("label", "abstained")] == [[""], [True]]


def test_what_needs_no_token_and_what_describes_it(fake: Running) -> None:
    with fake.client(token=None) as client:
        assert client.get("/v2").json()["name"] == "al-pipeline"
        assert client.get("/v2/health/live").status_code == client.get("/v2/health/ready").status_code == 200
        page, openapi = client.get("/docs").text, client.get("/openapi.json").json()
    assert "//" not in page.replace("http://127.0.0.1:8000", ""), "the page loads nothing from elsewhere"
    for path in openapi["paths"]:
        assert path in page
    assert openapi["components"]["schemas"].keys() >= {"PredictRequest", "InferAnswer", "Failure"}
    path = "/v2/models/{model}/versions/{version}/infer"
    assert [one["name"] for one in openapi["paths"][path]["post"]["parameters"]] == ["model", "version"]
    with fake.client() as client:
        client.post("/predict", json={"text": "x"})
        text = client.get("/metrics").text
    assert 'al_serve_requests_total{route="/predict",status="200"}' in text
    assert 'al_serve_predictions_total{label="b",round="round-0000"}' in text
    assert "al_serve_round 0.0" in text


def test_what_records_answers_gets_each_before_it_goes_out() -> None:
    kept: list[Answered] = []

    async def recorder(answered: Answered) -> None:
        await asyncio.sleep(0.05)
        if "unwritable" in answered.texts:
            raise OSError("the disk is full")
        kept.append(answered)

    begin = time.time()
    with running(Fake(), recorder=recorder) as made, made.client() as client:
        for number in (0, 3):
            asked = {"texts": ["x", "y"], "round": number}
            client.post("/predict", json=asked, headers={"X-Request-Id": f"r{number}"})
            assert (kept[-1].request_id, kept[-1].model.round, list(kept[-1].texts)) == (
                f"r{number}",
                number,
                ["x", "y"],
            )
            assert kept[-1].proba.tolist() == [[(number + 1) / 100, 1 - (number + 1) / 100]] * 2
            assert begin <= kept[-1].time <= time.time()
        assert client.post("/v2/models/mails/infer", json=infer(["z"])).status_code == 200
        assert client.post("/predict", json={"text": ""}).status_code == 400
        assert len(kept) == 3, "no answer, no record"
        assert client.post("/predict", json={"text": "unwritable"}).status_code == 500, (
            "what cannot be kept is not said"
        )


def test_an_output_that_is_asked_for_comes_alone(fake: Running) -> None:
    asked = {**infer(["x", "y"]), "outputs": [{"name": "probability"}, {"name": "label"}]}
    with fake.client() as client:
        outputs = client.post("/v2/models/mails/infer", json=asked).json()["outputs"]
    assert [tensor["name"] for tensor in outputs] == ["probability", "label"]


# What it refuses ----------------------------------------------------------------------------------------------------
PREDICT, INFER = "/predict", "/v2/models/mails/infer"
BAD: list[tuple[str, Any, int, str]] = [
    (PREDICT, b"", 400, "not JSON"),
    (PREDICT, b"text=hello", 400, "not JSON"),
    (PREDICT, b'{"text": "x"', 400, "not JSON"),
    (PREDICT, b"\xff\xfe{\x00}\x00", 400, "not UTF-8 (byte 0)"),
    (PREDICT, '{"text": "café"}'.encode("latin-1"), 400, "not UTF-8"),
    (PREDICT, '{"text": "hello"}'.encode("utf-16"), 400, "not UTF-8"),
    (PREDICT, b'{"text": "a\x00b"}', 400, "not JSON"),
    (PREDICT, b'{"text": "\\ud800"}', 400, "not JSON"),
    (INFER, b'{"inputs": [{"name": "text", "data": ' + b"[" * 50_000, 400, "nested too deeply"),
    (PREDICT, {"text": ""}, 400, "text: no text"),
    (PREDICT, {"text": 7}, 400, "Expected `str`"),
    (PREDICT, {"texts": "x"}, 400, "Expected `array`"),
    (PREDICT, {"texts": []}, 400, "texts is empty"),
    (PREDICT, {"texts": ["x", " \n"]}, 400, "texts[1]: no text"),
    (PREDICT, {"texts": ["x", None]}, 400, "Expected `str`"),
    (PREDICT, {"text": "x", "texts": ["x"]}, 400, "either"),
    (PREDICT, {}, 400, "either"),
    (PREDICT, {"txt": "x"}, 400, "unknown field `txt`"),
    (PREDICT, ["x"], 400, "Expected `object`"),
    (PREDICT, {"text": "x", "round": 99}, 404, "round-0099 is not published"),
    (PREDICT, {"text": "x", "round": "latest"}, 404, "no such version"),
    (PREDICT, {"texts": ["x"] * 10_000}, 413, "10,000 texts are too many for one request; send at most 100"),
    (PREDICT, {"text": "x" * 10_000_000}, 413, "larger than 100,000 bytes"),
    (INFER, {}, 400, "missing required field `inputs`"),
    (INFER, {"inputs": []}, 400, "expected one input"),
    (INFER, infer(["x"], name="texts"), 400, "name must be 'text', got 'texts'"),
    (INFER, infer(["x"], datatype="FP32"), 400, "datatype must be 'BYTES'"),
    (INFER, infer(["x"], shape=[2]), 400, "shape says 2 texts, but data has 1"),
    (INFER, infer(["x"], shape=[1, 2]), 400, "shape must be [n] or [n, 1]"),
    (INFER, infer(["x"], shape=[-1]), 400, "Expected `int` >= 0"),
    (INFER, infer(["x"], shape=[2**70]), 400, "shape"),
    (INFER, infer([7]), 400, "data[0]: the text is not a string"),
    (INFER, infer([["x"]]), 400, "data[0]: the text is not a string"),
    (INFER, infer(["x"], parameters={"binary_data_size": 1}), 400, "binary"),
    (INFER, {**infer(["x"]), "outputs": [{"name": "logits"}]}, 400, "no output 'logits'"),
    ("/v2/models/other/infer", infer(["x"]), 404, "no model of that name; there is 'mails'"),
    ("/v2/models/mails/versions/x/infer", infer(["x"]), 404, "no such version"),
    ("/v2/models/mails/versions/77/infer", infer(["x"]), 404, "not published"),
    ("/predict/more", {}, 404, "no such address"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_gets_a_status_and_a_sentence(fake: Running, path: str, body: Any, status: int, says: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with fake.client() as client:
        found = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert (found.status_code, list(found.json())) == (status, ["error"]), found.text
        assert says in found.json()["error"]
        assert client.get("/v2/health/ready").status_code == 200


def test_headers_that_are_wrong(fake: Running) -> None:
    with fake.client() as client:
        for headers, status, says in (
            ({"Authorization": "Bearer wrong"}, 401, "token is wrong"),
            ({"Authorization": "Bearer caf\xe9"}, 401, "token is wrong"),
            ({"Authorization": TOKEN}, 401, "Bearer TOKEN"),
            ({"Content-Type": "text/csv"}, 415, "send JSON"),
            ({"Content-Type": "application/json; charset=latin-1"}, 415, "as UTF-8"),
            ({"Content-Encoding": "gzip"}, 415, "compressed"),
        ):
            coded = {name: value.encode("latin-1") for name, value in headers.items()}
            found = client.post("/predict", content=b'{"text": "x"}', headers=coded)
            assert found.status_code == status and says in found.json()["error"], headers
        assert client.put("/predict").status_code == 405
        long = client.get("/v2", headers={"X-Long": "x" * 100_000})
        assert long.status_code in (400, 431)
    with fake.client(token=None) as client:
        found = client.post("/predict", content=b"x" * 1_000_000)
        assert found.status_code == 401 and "a token is needed" in found.json()["error"]
        assert found.headers["www-authenticate"].startswith("Bearer")
        assert client.get("/metrics").status_code == client.get("/v2/models/mails").status_code == 401


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
_KEYS = st.sampled_from(["text", "texts", "round", "inputs", "id", "outputs", "name", "shape", "datatype", "data"])
_TENSORS = st.fixed_dictionaries(
    {"name": st.just("text") | _ANYTHING, "shape": st.lists(st.integers(-2, 3), max_size=3) | _ANYTHING},
    optional={"datatype": st.just("BYTES") | _ANYTHING, "data": st.lists(st.text(max_size=5), max_size=3) | _ANYTHING},
)
_OBJECTS = st.dictionaries(_KEYS, _ANYTHING, max_size=4) | st.fixed_dictionaries(
    {"inputs": st.lists(_TENSORS, max_size=2)}
)
BODIES = st.binary(max_size=200) | _OBJECTS.map(lambda value: json.dumps(value).encode())
"""Bodies of requests: bytes, and objects with the fields of requests and anything in them."""


@pytest.fixture(scope="module")
def fuzzer(fake: Running) -> Iterator[httpx.Client]:
    """One client for many examples."""
    with fake.client() as made:
        yield made


@settings(max_examples=200)
@given(body=BODIES, path=st.sampled_from([PREDICT, INFER]), kind=st.sampled_from(["application/json", "text/x", ""]))
def test_nothing_that_is_sent_is_a_bug(fuzzer: httpx.Client, body: bytes, path: str, kind: str) -> None:
    found = fuzzer.post(path, content=body, headers={"Content-Type": kind})
    assert found.status_code in (200, 400, 404, 413, 415), (found.status_code, found.text)
    assert found.status_code == 200 or isinstance(found.json()["error"], str)


def test_slow_and_broken_clients_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.3)
    with running(Fake(), replace(SERVE, timeout_seconds=0.5)) as made, made.client() as client:
        address = ("127.0.0.1", int(made.url.rsplit(":", 1)[1]))
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 50\r\n\r\n"
        for sent, says in (
            (b"", b"408"),
            (b"POST /pre", b"408"),
            (head.encode() + b'{"te', b"the body did not arrive within 0.5 s"),
            (b"not http\r\n\r\n", b"400"),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 5, b"400"),
        ):
            with socket.create_connection(address, timeout=10) as one:
                one.sendall(sent)
                said = b""
                while part := one.recv(4096):
                    said += part
            assert says in said, (sent, said)
        for sent in (head.encode() + b'{"te', b"GET /v2 HTTP/1.1\r\n"):
            with socket.create_connection(address, timeout=10) as one:
                one.sendall(sent)
        assert client.post("/predict", json={"text": "x"}).status_code == 200


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, lost = server_module._TimedProtocol, threading.Event()
    let_go = protocol.connection_lost

    def connection_lost(self: Any, error: Exception | None) -> None:
        lost.set()
        let_go(self, error)

    monkeypatch.setattr(server_module, "_SEND_SECONDS", 0.5)
    monkeypatch.setattr(protocol, "connection_lost", connection_lost)
    with running(Fake(), replace(SERVE, timeout_seconds=0.5)) as made, socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", int(made.url.rsplit(":", 1)[1])))
        one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        assert lost.wait(15), "it holds a connection, without a token"


def test_a_full_queue_says_when_to_come_again() -> None:
    source = Fake(seconds=0.3)
    with running(source, replace(SERVE, queue_texts=4, max_texts=4, batch_texts=2, timeout_seconds=5.0)) as made:
        found: list[httpx.Response] = []

        def ask() -> None:
            with made.client() as client:
                found.append(client.post("/predict", json={"texts": ["x", "y"]}))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    codes = [one.status_code for one in found]
    assert set(codes) == {200, 429} and codes.count(200) >= 3
    assert all(int(one.headers["retry-after"]) >= 1 for one in found if one.status_code == 429)
    assert "too many texts wait" in next(one for one in found if one.status_code == 429).json()["error"]


def test_what_takes_too_long_is_given_up() -> None:
    with running(Fake(seconds=1.0), replace(SERVE, timeout_seconds=0.3)) as made, made.client() as client:
        found = client.post("/predict", json={"text": "x"})
        assert found.status_code == 503 and "no answer within 0.3 s" in found.json()["error"]
        assert "retry-after" in found.headers


def test_at_the_end_accepted_requests_are_answered_and_new_connections_refused() -> None:
    found: list[int] = []
    source = Fake(seconds=0.3)
    with running(source, replace(SERVE, batch_texts=2, timeout_seconds=5.0)) as made:

        def ask() -> None:
            with made.client() as client:
                found.append(client.post("/predict", json={"text": "x"}).status_code)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 5
        while not source.batches[1:] and time.monotonic() < deadline:
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert found == [200] * 5
    with made.client() as client, pytest.raises(httpx.ConnectError):
        client.get("/v2/health/live")


# Batches ------------------------------------------------------------------------------------------------------------
def batched(work: Any, batch_texts: int = 8, queue_texts: int = 100, timeout: float = 5.0) -> Any:
    """Run `work(batcher)` in an event loop, with a batcher that computes."""

    async def main() -> Any:
        batcher = Batcher(batch_texts, 0.01, queue_texts, timeout)
        batcher.start()
        try:
            return await work(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main())


def test_requests_that_arrive_together_are_computed_together_and_kept_apart() -> None:
    source = Fake()
    one, other = source.load(0), source.load(1)

    async def work(batcher: Batcher) -> Any:
        return await asyncio.gather(*(batcher.predict((one, other)[n % 2], ["x"] * (n % 3 + 1)) for n in range(12)))

    found = batched(work)
    assert [len(proba) for proba in found] == [n % 3 + 1 for n in range(12)]
    assert [float(proba[0, 0]) for proba in found] == [0.01, 0.02] * 6, "each request has the answer of its own model"
    assert all((proba == proba[0]).all() for proba in found)
    assert max(source.batches) <= 8 and len(source.batches) <= 5


def test_a_large_request_lets_small_ones_through() -> None:
    source = Fake(seconds=0.02)
    model, ended = source.load(0), []

    async def work(batcher: Batcher) -> None:
        async def ask(name: str, size: int) -> None:
            await batcher.predict(model, ["x"] * size)
            ended.append(name)

        large = asyncio.create_task(ask("large", 80))
        await asyncio.sleep(0.03)
        await asyncio.gather(large, *(ask("small", 1) for _ in range(3)))

    batched(work)
    assert ended == ["small"] * 3 + ["large"]


def test_texts_that_gain_nothing_together_are_computed_side_by_side_and_put_in_order() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def predict_proba(texts: Sequence[str]) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05 if "0" in texts else 0.005)  # the first part ends after others
        with lock:
            now -= 1
        return np.array([[float(text)] for text in texts])

    model = Served(0, "digest", "fake", ("a",), predict_proba, gains=False)

    async def main() -> Any:
        batcher = Batcher(4, 0.0, 100, 5.0, workers=2)
        batcher.start()
        try:
            return await asyncio.gather(*(batcher.predict(model, [str(n) for n in range(m)]) for m in (30, 1, 7)))
        finally:
            await batcher.close()

    assert [[row[0] for row in found] for found in asyncio.run(main())] == [list(range(m)) for m in (30, 1, 7)]
    assert most == 2


def test_a_text_that_fails_does_not_fail_the_requests_beside_it() -> None:
    model = Fake().load(0)

    async def work(batcher: Batcher) -> Any:
        asked = (batcher.predict(model, [text]) for text in ("x", "boom", "y"))
        return await asyncio.gather(*asked, return_exceptions=True)

    first, failed, last = batched(work)
    assert len(first) == len(last) == 1 and isinstance(failed, ValueError)


def test_the_queue_is_bounded_and_the_end_is_said() -> None:
    model = Fake(seconds=0.1).load(0)

    async def work(batcher: Batcher) -> Any:
        asked = [asyncio.create_task(batcher.predict(model, ["x"] * 8)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert batcher.waiting == 16
        with pytest.raises(QueueFull):
            await batcher.predict(model, ["x"] * 9)
        late = asyncio.create_task(batcher.predict(model, ["x"]))
        await asyncio.sleep(0.01)
        await batcher.close()
        with pytest.raises(Closed):
            await batcher.predict(model, ["x"])
        return await asyncio.gather(*asked, late, return_exceptions=True)

    found = batched(work, queue_texts=24)
    assert len(found[0]) == 8 and all(isinstance(one, Closed) for one in found[1:])


def test_a_request_that_was_given_up_leaves_the_queue() -> None:
    model = Fake(seconds=0.2).load(0)

    async def work(batcher: Batcher) -> int:
        asked = [asyncio.create_task(batcher.predict(model, ["x"] * 8)) for _ in range(3)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert any(isinstance(one, TimedOut) for one in found)
        await asyncio.sleep(0.3)
        return batcher.waiting

    assert batched(work, timeout=0.25) == 0


# Following the workspace --------------------------------------------------------------------------------------------
def asking(made: Running, ended: threading.Event, found: list[tuple[str, str, float]], problems: list[Any]) -> None:
    """Ask again and again, each time with several texts, until `ended`."""
    draw = random.Random(threading.get_ident())
    with made.client() as client:
        while not ended.is_set():
            try:
                said = client.post("/predict", json={"texts": ["x y", "z"] * draw.randint(1, 4)})
                body = said.json()
                probabilities = {one["probabilities"][first] for one in body["predictions"] for first in ("a",)}
                found.append((body["round"], body["digest"], *probabilities))
            except Exception as error:
                problems.append(error)


def test_swaps_neither_drop_nor_mix_a_request() -> None:
    source, ended, problems = Fake(seconds=0.001), threading.Event(), []
    found: list[Any] = []
    with running(source, replace(SERVE, versions=2)) as made:
        threads = [threading.Thread(target=asking, args=(made, ended, found, problems)) for _ in range(8)]
        for thread in threads:
            thread.start()
        swap, deadline = 0, time.monotonic() + 60
        while (swap < 40 or len(found) < 100) and time.monotonic() < deadline:
            swap += 1
            source.promoted_round = swap % 20
            made.versions.look()
            time.sleep(0.02)
        ended.set()
        for thread in threads:
            thread.join()
    assert problems == [] and len(found) >= 100
    for row in found:
        assert len(row) == 3, "the texts of a request were answered by several models"
        number = int(row[0].removeprefix("round-"))
        assert row[1:] == (f"digest-{number}", (number + 1) / 100)
    assert len({row[0] for row in found}) > 5


class Slow(Fake):
    """A source whose old models take as long as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.may_load, self.loads = threading.Event(), list[int]()

    def load(self, number: int) -> Served:
        self.loads.append(number)
        if number < 10:
            assert self.may_load.wait(20)
        return super().load(number)


def test_requests_for_old_rounds_delay_no_promotion_and_share_a_bounded_queue() -> None:
    source = Slow()
    source.promoted_round = 10
    with running(source, replace(SERVE, timeout_seconds=20.0)) as made, made.client() as client:
        asked = [made.versions.ask(number) for number in range(8)]
        assert made.versions.ask(0) is asked[0], "requests for one round share its loading"
        with pytest.raises(TooManyRounds):
            made.versions.ask(8)
        refused = client.post("/predict", json={"text": "x", "round": 9})
        assert refused.status_code == 429 and "8 models of other rounds wait" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/predict", json={"text": "x", "round": 99}).status_code == 404, "what is none does not wait"
        source.promoted_round, begin = 11, time.monotonic()
        while client.post("/predict", json={"text": "x"}).json()["round"] != "round-0011":
            assert time.monotonic() < begin + 10, "a promotion waits for those who ask for old rounds"
            time.sleep(0.01)
        assert source.loads == [10, 0, 11], "old rounds are loaded one by one"
        source.may_load.set()
        assert [one.result(10).round for one in asked] == list(range(8))
        assert client.post("/predict", json={"text": "x", "round": 9}).json()["round"] == "round-0009"


def test_an_old_round_waits_for_a_promotion_that_is_being_loaded() -> None:
    source = Slow()
    source.promoted_round = 10
    versions = Versions(source, 3)
    versions.start()
    try:
        source.promoted_round = 5
        promoting = threading.Thread(target=versions.look)
        promoting.start()
        while source.loads[-1] != 5:
            time.sleep(0.005)
        asked = versions.ask(4)
        time.sleep(0.3)
        assert 4 not in source.loads
        source.may_load.set()
        assert asked.result(10).round == 4
        promoting.join()
        assert versions.current is not None and versions.current.round == 5
    finally:
        source.may_load.set()
        versions.close()


def test_without_a_promoted_model_it_says_so_until_there_is_one() -> None:
    source = Fake()
    source.promoted_round = None
    with running(source) as made, made.client() as client:
        for path in ("/v2/health/ready", "/v2/models/mails"):
            found = client.get(path)
            assert found.status_code == 503 and "no model is promoted yet" in found.json()["error"]
        with made.client(token=None) as stranger:
            assert stranger.get("/v2/health/ready").json() == {"error": "no model is loaded"}, "why may name files"
        assert client.get("/v2/health/live").status_code == 200
        source.promoted_round = 3
        deadline = time.monotonic() + 5
        while client.get("/v2/health/ready").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.post("/predict", json={"text": "x"}).json()["round"] == "round-0003"


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Fake()
    versions = Versions(source, 1)
    versions.start()
    try:
        source.broken, source.promoted_round = True, 1
        versions.look()
        assert versions.current is not None and versions.current.round == 0
        assert versions.problem == "its digest is wrong"
        source.broken = False
        versions.look()
        assert versions.current.round == 0, "it is not tried all the time"
        monkeypatch.setattr("al_pipeline.serving.versions.time.monotonic", lambda: time.time() + 1e9)
        versions.look()
        assert versions.current.round == 1 and versions.problem == ""
    finally:
        versions.close()


@pytest.mark.slow
def test_it_follows_rollback_and_promotion_within_a_second_and_loads_no_wrong_model(
    twice: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, _ = go_on(twice, tmp_path)
    with dvc_for_intervention(workspace) as dvc:
        approve(workspace, dvc, 1, "a test")

    def changed(client: httpx.Client, to: str) -> float:
        begin = time.monotonic()
        while client.post("/predict", json={"text": "win"}).json()["round"] != to:
            assert time.monotonic() < begin + 10
            time.sleep(0.01)
        return time.monotonic() - begin

    with running(WorkspaceModels(workspace)) as made, made.client() as client:
        first = client.post("/predict", json={"text": "win"}).json()
        assert first["round"] == "round-0001"
        with dvc_for_intervention(workspace) as dvc:
            rollback(workspace, dvc, 0, labels=False, model=True, params=False, reason="a test", dry_run=False)
        took = [changed(client, "round-0000")]
        with dvc_for_intervention(workspace) as dvc:
            approve(workspace, dvc, 1, "a test")
        took.append(changed(client, "round-0001"))
        assert max(took) < 1, took
        assert client.post("/predict", json={"text": "win"}).json() == first
    real = sha256_tree
    with running(WorkspaceModels(workspace)) as made, made.client() as client:
        monkeypatch.setattr(
            "al_pipeline.operations.predict.sha256_tree",
            lambda path: "0" * 64 if path.name == "model" and "round-0000" in str(path) else real(path),
        )
        with dvc_for_intervention(workspace) as dvc:
            rollback(workspace, dvc, 0, labels=False, model=True, params=False, reason="a test", dry_run=False)
        begin = time.monotonic()
        while "has digest 000000000000, but its record has" not in made.versions.problem:
            assert time.monotonic() < begin + 10
            time.sleep(0.01)
        assert client.post("/predict", json={"text": "win"}).json() == first, "the old one stays"
        assert client.get("/v2/health/ready").status_code == 200


# The command --------------------------------------------------------------------------------------------------------
def test_the_token_is_of_the_environment_or_of_a_private_file(
    template: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(Layout(template[0] / "workspace"), "0123456789ab")
    token, where = token_of(workspace)
    file = workspace.home / "serve/token"
    assert len(token) > 30 and str(file) in where and token_of(workspace) == (token, where)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert not file.is_relative_to(workspace.layout.root)
    for damaged in ("", "\n", "short"):  # an empty token would let everybody in
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(UsageError, match="holds no token; delete it"):
            token_of(workspace)
    monkeypatch.setenv("AL_SERVE_TOKEN", "0123456789abcdef")
    assert token_of(workspace) == ("0123456789abcdef", "in AL_SERVE_TOKEN")
    for bad in ("short", "with blanks in the token", "tökentökentökentöken"):
        monkeypatch.setenv("AL_SERVE_TOKEN", bad)
        with pytest.raises(UsageError, match="at least 16 characters"):
            token_of(workspace)


def test_a_port_in_use_and_a_host_that_is_none() -> None:
    with listen("127.0.0.1", 0) as bound, pytest.raises(ServerFailed, match="--port chooses another"):
        listen("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(UsageError, match="no address of this machine"):
        listen("nowhere.invalid", 0)


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(workspace: Workspace) -> None:
    root = str(workspace.layout.root)
    command = [sys.executable, "-m", "al_pipeline.cli.app", "-C", root, "serve", "--port", "0", "--json"]
    environment = {**os.environ, "AL_SERVE_TOKEN": TOKEN}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            said = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
            assert said["round"] == "round-0001" and said["url"].startswith("http://127.0.0.1:")
            with httpx.Client(base_url=said["url"], trust_env=False) as client:
                found = client.post(
                    "/predict", json={"text": "a secret text"}, headers={"Authorization": f"Bearer {TOKEN}"}
                )
                assert found.json()["round"] == "round-0001"
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert "secret" not in log and json.loads(log.splitlines()[-1])["route"] == "/predict"


def test_parameters_that_contradict_each_other() -> None:
    text = (Path(__file__).parents[1] / "params.yaml").read_text(encoding="utf-8")
    assert parse_params(text).serve == SERVE
    with pytest.raises(BadParams, match="serve.max_texts must not be more than serve.queue_texts"):
        parse_params(text.replace("queue_texts: 2000", "queue_texts: 10"))
