"""The build steps of a round: install the encoder's weights, compute the features, run the DVC stages one by one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from al_pipeline.errors import StageFailed, UsageError
from al_pipeline.features.device import device_of
from al_pipeline.files import read_json, read_object, sha256_bytes, sha256_file, write_json, write_text
from al_pipeline.integrations.git import Git
from al_pipeline.operations.close import check_sources
from al_pipeline.operations.plugins import trusted_plugins
from al_pipeline.params import LOCAL, Features, Params
from al_pipeline.progress import shown
from al_pipeline.rounds.state_machine import BUILD, Step
from al_pipeline.workspace.home import SECRET_VARIABLES, own_environment
from al_pipeline.workspace.layout import Layout, pointer_of

if TYPE_CHECKING:
    from al_pipeline.integrations.dvc.session import Dvc
    from al_pipeline.integrations.environment import Engine
    from al_pipeline.operations.encoding import ShardRunner
    from al_pipeline.operations.sharing import SharedVectors

_ENCODE_TIMEOUT = 24 * 3600.0


def restore_torn_records(layout: Layout, git: Git) -> None:
    """Restore the committed version of DVC's records that a kill left incomplete; delete those never committed.

    DVC writes them in place and cannot recover from an incomplete one. The killed step writes them again. Call only
    while a round is being closed or built.
    """
    for path in (layout.dvc_lock, *layout.pointers):
        if path.exists() and _is_torn(path):
            committed = git.show("HEAD", path.relative_to(layout.root).as_posix())
            if committed is None:
                path.unlink()
            else:
                write_text(path, committed)


def _is_torn(path: Path) -> bool:
    """Whether a DVC file is incomplete: invalid YAML, or an entry without `md5` or `path`."""
    import yaml  # lazy: needed only after a close has begun

    from al_pipeline.yaml_text import read_yaml

    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
        stages = found["stages"].values() if path.name == "dvc.lock" else [found]
        return any("md5" not in entry or "path" not in entry for stage in stages for entry in _entries(stage))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return True


def _entries(stage: dict[str, Any]) -> list[dict[str, Any]]:
    return [*stage.get("deps", ()), *stage["outs"]]


def refresh_engine(layout: Layout, params: Params) -> bool:
    """Record this engine if the build under way began with another, or on another device, or with other plug-ins.

    Returns True if so: the build starts over. Raises UnexpectedChange if a plug-in is not trusted.
    """
    from al_pipeline.workspace.fingerprint import current_engine, difference, write_engine  # not for `al status`

    device, plugins = device_of(params.features), trusted_plugins(layout, params)
    if not difference(read_json(layout.engine), current_engine(device), plugins):
        return False
    write_engine(layout.engine, device, plugins)
    return True


def build_key(layout: Layout) -> str:
    """The digest of the inputs of the build under way; a different value starts the build over."""
    pointers = [pointer_of(path) for path in (layout.events, layout.pool, layout.test)]
    inputs = [*pointers, layout.engine, layout.params, layout.dvc_yaml, layout.overrides, layout.asked_at_random]
    return _digest_of(inputs)


def built(layout: Layout) -> frozenset[Step]:
    """The steps that were completed for exactly the current inputs."""
    known = read_object(layout.build)
    return (
        frozenset(Step(name) for name in known.get("steps", ()))
        if known.get("key") == build_key(layout)
        else frozenset()
    )


def record_built(layout: Layout, step: Step, seconds: float) -> None:
    """Record that `step` was completed for the current inputs."""
    known, key = read_object(layout.build), build_key(layout)
    if known.get("key") != key:
        known = {"key": key, "steps": [], "seconds": {}}
    steps = [name for name in known["steps"] if name != step] + [str(step)]
    write_json(
        layout.build, {"key": key, "steps": steps, "seconds": {**known["seconds"], str(step): round(seconds, 3)}}
    )


def forget_built(layout: Layout) -> None:
    """Make the build start over; steps that are up to date cost nothing."""
    layout.build.unlink(missing_ok=True)


def record_decided(layout: Layout, *files: Path) -> None:
    """Note the content of `files`, which the decision on this build wrote, and of `dvc.lock`, which it describes."""
    known = read_object(layout.build)
    if known.get("key") == build_key(layout):  # else its inputs were edited meanwhile: it starts over
        write_json(layout.build, {**known, "decided": _digest_of([*files, layout.dvc_lock])})


def is_decided(layout: Layout, *files: Path) -> bool:
    """Whether a decision was made on this build, and `files` and `dvc.lock` are still what it left."""
    known = read_object(layout.build)
    return (
        all(file.exists() for file in files)
        and known.get("key") == build_key(layout)
        and known.get("decided") == _digest_of([*files, layout.dvc_lock])
    )


def build_seconds(layout: Layout) -> dict[str, float]:
    """The duration of each build step in seconds."""
    found: dict[str, float] = read_object(layout.build).get("seconds", {})
    return found


def run_step(
    step: Step,
    layout: Layout,
    params: Params,
    dvc: Dvc,
    run_shards: ShardRunner | None = None,
    warn: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Run one step of the build, after checking that the source data match their recorded digests.

    One stage at a time: evaluate and score need only train, but side by side they would save no more than evaluate's
    0.1 s, at 100,000 items too. `run_shards`: carries shards to the cluster of `engine.runner`, if anything does;
    `warn` gets warnings. Raises StageFailed with the last lines that the stage printed, UnexpectedChange if a source
    was edited.
    """
    if step is not Step.ENCODER:  # a killed encoder step may have left its weights half recorded
        check_sources(layout, dvc)
    if step is Step.ENCODER:
        install(layout, params.features, dvc)
    elif step is Step.ENCODE:
        shared = None
        if os.environ.get("AL_VECTORS_KEY"):
            from al_pipeline.operations.sharing import shared_vectors

            shared = shared_vectors(layout, params.features, dvc, warn)
        runner = params.engine.runner
        encode(layout, params.features, None, runner, run_shards, shared, on_progress)
    elif step in BUILD:
        with shown(layout.progress):
            dvc.repro(str(step))


def install(layout: Layout, features: Features, dvc: Dvc) -> None:
    """Install the encoder that `params.yaml` names into the workspace, once, and track its weights with DVC."""
    wanted: dict[str, Any] = {"source": features.encoder if features.uses_encoder else None}
    have = read_object(layout.encoder / "source.json")
    pointer = pointer_of(layout.encoder)
    if not have and pointer.exists():
        dvc.pull(str(pointer.relative_to(layout.root)))
        have = read_object(layout.encoder / "source.json")
    if "source" not in have or have["source"] != wanted["source"]:
        if features.uses_encoder:
            from al_pipeline.features.encoder import install_encoder

            install_encoder(features.encoder, layout.encoder, layout.root)
        else:
            write_json(layout.encoder / "source.json", wanted)
    dvc.add(layout.encoder)  # even if unchanged: the cache may have been lost


def encode(
    layout: Layout,
    features: Features,
    engine: Engine | None = None,
    runner: str = LOCAL.runner,
    run_shards: ShardRunner | None = None,
    shared: SharedVectors | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Add what is missing to the caches of features: in a subprocess, so that its memory is freed afterwards.

    Vectors may come from workers instead. Does nothing if the caches were already filled for the same inputs; a stage
    that still finds something missing computes it itself. `engine`: an engine to use instead of the running one.
    `runner`: `engine.runner`, see `run_step`. `shared`: the team's cache of vectors. `on_progress` gets a line if much
    is to be done. Raises StageFailed on a failure or timeout, UsageError if nothing carries shards to the cluster,
    NoRoom if the disk has no room for vectors.
    """
    filled_for = _encoding_key(layout, features)
    if (
        engine is None
        and read_object(layout.encoded).get("key") == filled_for
        and (not features.uses_encoder or any(layout.features.glob("[!.]*/[!.]*")))
    ):
        return
    is_encoded = False
    if features.uses_encoder:
        from al_pipeline.operations.needs import check_encoding  # lazy: `al status` does not need it

        if shared is not None:
            shared.fetch()
        if said := check_encoding(layout, features):
            on_progress(said)
        is_encoded = runner != LOCAL.runner and _encode_on_cluster(layout, features, runner, run_shards)
    if features.uses_tfidf or not is_encoded:
        _run_encoder(layout, engine, "al_pipeline.stages.encode")
    if features.uses_encoder and shared is not None:
        shared.send()
    if engine is None:
        write_json(layout.encoded, {**read_object(layout.encoded), "key": filled_for})


def _encode_on_cluster(layout: Layout, features: Features, runner: str, run_shards: ShardRunner | None) -> bool:
    """Have workers encode what is missing; False if that is too little for them."""
    from al_pipeline.features.vectors import open_vectors
    from al_pipeline.operations import encoding
    from al_pipeline.workspace.fingerprint import recorded_device

    vectors = open_vectors(layout.encoder, layout.features, features, recorded_device(read_json(layout.engine)))
    missing = 0 if vectors is None else encoding.missing_texts(layout, vectors)
    if vectors is None or missing <= encoding.SMALLEST_SHARD:
        return False
    if run_shards is None:
        raise UsageError(
            f"engine.runner is {runner}, which needs a Prefect server, and this tick runs without one: `al up` starts "
            "it, or set engine.runner: local in params.yaml"
        )
    layout.probe.unlink(missing_ok=True)
    _run_encoder(layout, None, "al_pipeline.stages.probe")
    run_shards(encoding.shards_of(layout, features, vectors, missing, runner, read_object(layout.probe)["probe"]))
    return True


def _run_encoder(layout: Layout, engine: Engine | None, module: str) -> None:
    """Run a module that encodes, in a process of its own. Raises StageFailed."""
    from al_pipeline.integrations import processes as child
    from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT

    settings = {k: v for k, v in STAGE_ENVIRONMENT.items() if not k.endswith("_NUM_THREADS")}
    environment = {**os.environ, **own_environment(), **settings, **(engine.environment if engine else {})}
    for name in SECRET_VARIABLES:
        environment.pop(name, None)
    command = [str(engine.python) if engine else sys.executable, "-P", "-m", module]
    code = child.run(command, layout.root, environment, layout.encoding, _ENCODE_TIMEOUT, server="encoder")
    if code:
        raise StageFailed(f"encoding the pool failed (exit code {code}); see its output above")
    if code is None:
        raise StageFailed(
            f"encoding the pool took more than {_ENCODE_TIMEOUT / 3600:.0f} hours; `al round` continues it"
        )


def _encoding_key(layout: Layout, features: Features) -> str:
    """The digest of what the cached vectors depend on: the items, the encoder and its settings, the engine."""
    pointers = [pointer_of(path) for path in (layout.pool, layout.test, layout.encoder)]
    return _digest_of([*pointers, layout.engine], msgspec.json.encode(features).decode())


def _digest_of(files: Sequence[Path], *more: str) -> str:
    """One digest of the contents of `files`, of which some may be missing, and of `more`."""
    digests = [sha256_file(path) if path.exists() else "-" for path in files]
    return sha256_bytes("\n".join([*digests, *more]).encode())
