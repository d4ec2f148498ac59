"""The DVC half of a round as steps: the encoder's weights, the features, then the stages one by one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from al_pipeline.errors import StageFailed
from al_pipeline.files import read_json, read_object, sha256_bytes, sha256_file, write_json, write_text
from al_pipeline.integrations.git import Git
from al_pipeline.operations.close import check_sources
from al_pipeline.params import Features
from al_pipeline.progress import shown
from al_pipeline.rounds.state_machine import BUILD, Step
from al_pipeline.workspace.home import own_environment
from al_pipeline.workspace.layout import Layout

if TYPE_CHECKING:
    from al_pipeline.integrations.dvc.session import Dvc
    from al_pipeline.integrations.environment import Engine

_ENCODE_TIMEOUT = 24 * 3600.0


def restore_torn_records(layout: Layout, git: Git) -> None:
    """Put DVC's records back where a kill tore them, as they were committed: DVC writes them in place, and stops at a
    torn one for ever. The step that was killed writes them again. Call only while a round is being closed or built.
    """
    for path in (layout.dvc_lock, *(path.parent / f"{path.name}.dvc" for path in layout.sources)):
        if path.exists() and _is_torn(path):
            committed = git.show("HEAD", path.relative_to(layout.root).as_posix())
            if committed is None:
                path.unlink()
            else:
                write_text(path, committed)


def _is_torn(path: Path) -> bool:
    """Whether a file of DVC's lacks what each such file has: its end, or all of it."""
    import yaml  # for the middle of a close alone

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        stages = found["stages"].values() if path.name == "dvc.lock" else [found]
        return any("md5" not in entry or "path" not in entry for stage in stages for entry in _entries(stage))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return True


def _entries(stage: dict[str, Any]) -> list[dict[str, Any]]:
    return [*stage.get("deps", ()), *stage["outs"]]


def refresh_engine(layout: Layout) -> bool:
    """Write this engine down where the build under way began with another; True where that starts it over."""
    from al_pipeline.workspace.fingerprint import difference, write_engine  # which `al status` does not need

    if not difference(read_json(layout.engine)):
        return False
    write_engine(layout.engine)
    return True


def build_key(layout: Layout) -> str:
    """What the build under way is made from: another value starts the build over."""
    pointers = [path.parent / f"{path.name}.dvc" for path in (layout.events, layout.pool, layout.test)]
    inputs = [*pointers, layout.engine, layout.params, layout.dvc_yaml, layout.overrides, layout.asked_at_random]
    return sha256_bytes("\n".join(sha256_file(path) if path.exists() else "-" for path in inputs).encode())


def built(layout: Layout) -> frozenset[Step]:
    """The steps that have ended for exactly the inputs that lie there now."""
    known = read_object(layout.build)
    return (
        frozenset(Step(name) for name in known.get("steps", ()))
        if known.get("key") == build_key(layout)
        else frozenset()
    )


def record_built(layout: Layout, step: Step, seconds: float) -> None:
    """Remember that `step` has ended for these inputs."""
    known, key = read_object(layout.build), build_key(layout)
    if known.get("key") != key:
        known = {"key": key, "steps": [], "seconds": {}}
    steps = [name for name in known["steps"] if name != step] + [str(step)]
    write_json(
        layout.build, {"key": key, "steps": steps, "seconds": {**known["seconds"], str(step): round(seconds, 3)}}
    )


def forget_built(layout: Layout) -> None:
    """Make the build start over (what is up to date costs nothing)."""
    layout.build.unlink(missing_ok=True)


def build_seconds(layout: Layout) -> dict[str, float]:
    """How long each step of the build took."""
    found: dict[str, float] = read_object(layout.build).get("seconds", {})
    return found


def run_step(step: Step, layout: Layout, features: Features, dvc: Dvc) -> None:
    """Take one step of the build, from data whose bytes are what is recorded.

    Raises StageFailed with the stage's last words, UnexpectedChange where somebody changed a source.
    """
    if step is not Step.ENCODER:  # which may find its own weights half recorded
        check_sources(layout, dvc)
    if step is Step.ENCODER:
        install(layout, features, dvc)
    elif step is Step.ENCODE:
        encode(layout, features)
    elif step in BUILD:
        with shown(layout.progress):
            dvc.repro(str(step))


def install(layout: Layout, features: Features, dvc: Dvc) -> None:
    """Bring the encoder that `params.yaml` names into the workspace, once; DVC versions its weights."""
    wanted: dict[str, Any] = {"source": features.encoder if features.uses_encoder else None}
    have = read_object(layout.encoder / "source.json")
    pointer = layout.encoder.parent / f"{layout.encoder.name}.dvc"
    if not have and pointer.exists():
        dvc.pull(str(pointer.relative_to(layout.root)))
        have = read_object(layout.encoder / "source.json")
    if "source" not in have or have["source"] != wanted["source"]:
        if features.uses_encoder:
            from al_pipeline.features.encoder import install_encoder

            install_encoder(features.encoder, layout.encoder, layout.root)
        else:
            write_json(layout.encoder / "source.json", wanted)
    dvc.add(layout.encoder)  # where nothing changed, too: the cache may have been lost


def encode(layout: Layout, features: Features, engine: Engine | None = None) -> None:
    """Fill the cache of features with what it lacks, in a process of its own that gives its memory back.

    No process is started where the cache was filled for just these items; a stage that finds a vector missing all the
    same encodes its text. `engine`: another than the running one.
    """
    if not features.uses_encoder:
        return
    filled_for = _encoding_key(layout, features)
    if (
        engine is None
        and read_object(layout.encoded).get("key") == filled_for
        and any(layout.features.glob("[!.]*/[!.]*"))
    ):
        return
    from al_pipeline.integrations import processes as child
    from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT  # which `al status` has no need of

    settings = {k: v for k, v in STAGE_ENVIRONMENT.items() if not k.endswith("_NUM_THREADS")}
    environment = {**os.environ, **own_environment(), **settings, **(engine.environment if engine else {})}
    environment.pop("AL_LABEL_STUDIO_TOKEN", None)
    command = [str(engine.python) if engine else sys.executable, "-P", "-m", "al_pipeline.stages.encode"]
    code = child.run(command, layout.root, environment, layout.encoding, _ENCODE_TIMEOUT)
    if code:
        raise StageFailed(f"encoding the pool failed ({code}); what it printed stands above")
    if code is None:
        raise StageFailed(f"encoding the pool took more than {_ENCODE_TIMEOUT / 3600:.0f} hours; `al round` goes on")
    if engine is None:
        write_json(layout.encoded, {"key": filled_for})


def _encoding_key(layout: Layout, features: Features) -> str:
    """What the vectors in the cache depend on: the items, the encoder and how it is used, the engine."""
    pointers = [path.parent / f"{path.name}.dvc" for path in (layout.pool, layout.test, layout.encoder)]
    digests = [sha256_file(path) if path.exists() else "-" for path in (*pointers, layout.engine)]
    return sha256_bytes("\n".join([*digests, features.model_dump_json()]).encode())
