"""Checks of the data: ledger, pool, test set, `ingest.sources`, the DVC remote, the encoder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from al_pipeline.errors import AlError, BadParams
from al_pipeline.files import read_object
from al_pipeline.integrations.dvc.defects import describe_defects
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.close import absent_sources, check_sources, foreign_edits, is_closed
from al_pipeline.operations.facts import open_dvc, read_facts
from al_pipeline.operations.history import read_history
from al_pipeline.operations.ingestion.source_states import source_news
from al_pipeline.operations.needs import next_encoding
from al_pipeline.quantities import format_size
from al_pipeline.records import CPU
from al_pipeline.workspace.workspace import Workspace

_MOST_SHOWN = 10


def check_data(workspace: Workspace) -> Iterator[Finding]:
    """Check that ledger, pool, test set and records match the last commit."""
    layout = workspace.layout
    if _is_building(workspace):
        yield Finding("data", "ok", "a round is being built; `al round` continues it")
        return
    if changed := foreign_edits(layout, Git(layout.root)):
        yield Finding(
            "data",
            "error",
            f"changed by somebody else: {', '.join(changed[:5])}",
            "`git diff`, then `git checkout -- FILE`",
        )
    with replace(open_dvc(layout), state=None) as dvc:
        if absent := absent_sources(layout):
            yield Finding(
                "data",
                "warning",
                f"not fetched yet: {', '.join(absent)}",
                "`dvc pull`; otherwise the next `al round` fetches what it needs",
            )
            return
        check_sources(layout, dvc)  # before anything reads the data
    facts, _ = read_facts(workspace)
    yield Finding("data", "ok", f"{facts.items:,} items; ledger, pool and test set match git's records")


def check_source_files(workspace: Workspace) -> Iterator[Finding]:
    """Report files of `ingest.sources` that the last tick could not read; those not yet quiet for a minute are fine."""
    failing = [one.sentence() for one in source_news(workspace.layout) if one.state == "failing"]
    if failing:
        more = f"; and {len(failing) - _MOST_SHOWN:,} more" if len(failing) > _MOST_SHOWN else ""
        yield Finding(
            "sources",
            "warning",
            "; ".join(failing[:_MOST_SHOWN]) + more,
            "fix or remove the file, or change ingest in params.yaml; every `al round` tries again",
        )


def check_dvc_remote(workspace: Workspace) -> Iterator[Finding]:
    """Check that the DVC remote is writable and holds what the last commit references."""
    layout = workspace.layout
    with replace(open_dvc(layout), state=None) as dvc:
        published = layout.dvc_lock.exists() and not _is_building(workspace)
        if published and (gone := dvc.absent_folder()):
            yield Finding(
                "remote",
                "error",
                f"the DVC remote {gone} does not exist",
                "mount its disk, or set its current address: `dvc remote list`, `dvc remote modify`",
            )
            return
        name = dvc.check_writable()
        checked, defects = dvc.check_remote() if published else (0, [])
        shared = list(_shared_vectors(workspace, dvc))
    if not defects:
        yield Finding("remote", "ok", f"DVC remote {name} can be written to and has what the last commit names")
    elif len(defects) == checked and all(one.why == "missing" for one in defects):
        yield Finding(
            "remote",
            "error",
            f"the DVC remote {name} has nothing of what the last commit names",
            "if the rounds were pushed elsewhere, `dvc remote modify` sets the right address; if its objects are "
            "lost, `al remote repair` in a clone that has the data uploads them again",
        )
    else:
        here = all(one.have for one in defects)
        yield Finding(
            "remote",
            "error",
            "the DVC remote lacks what the last commit names, or has wrong content for it: "
            f"{describe_defects(defects)}",
            "`al remote repair` uploads it" + (" from this clone" if here else "; run it in a clone that has the data"),
        )
    yield from shared


def _shared_vectors(workspace: Workspace, dvc: Dvc) -> Iterator[Finding]:
    """Check that AL_VECTORS_KEY fits the team's vectors in the DVC remote, if there are any for this encoder."""
    from al_pipeline.operations.sharing import KEY, SharedVectors, key_problem

    layout, features, key = workspace.layout, workspace.params.features, os.environ.get(KEY, "")
    if not features.uses_encoder or not (layout.encoder / "source.json").exists():
        return
    if problem := key_problem(key):
        yield Finding("vectors", "error", problem)
        return
    try:
        fits = SharedVectors(layout, features, dvc, key.encode(), lambda _: None).is_sealed()
    except AlError as error:  # without the encoder's device, or the remote, other checks say more
        if key:
            yield Finding("vectors", "warning", f"whether {KEY} fits the team's vectors is not known: {error}")
        return
    if fits is None:
        if key:
            yield Finding("vectors", "ok", f"{KEY} is set; the DVC remote has no vectors of this encoder yet")
    elif not key:
        yield Finding(
            "vectors",
            "warning",
            f"the DVC remote has vectors that the team shares, and {KEY} is not set: this clone encodes texts itself",
            f"set {KEY} to the team's key, which the person has who stored them",
        )
    elif fits:
        yield Finding("vectors", "ok", f"{KEY} fits the vectors that the team shares on the DVC remote")
    else:
        yield Finding(
            "vectors",
            "error",
            f"{KEY} did not seal the vectors that the team shares on the DVC remote: this clone cannot use them, nor "
            "the others those that it stores",
            f"set {KEY} to the team's key, or unset it",
        )


def check_encoder(workspace: Workspace) -> Iterator[Finding]:
    """Check that the encoder is the one that `params.yaml` names, and that its vectors are reproducible."""
    layout, features = workspace.layout, workspace.params.features
    if not features.uses_encoder:
        yield Finding("encoder", "ok", "not needed: the features are TF-IDF only")
        return
    have = read_object(layout.encoder / "source.json").get("source")
    if have == features.encoder:
        yield from _invariance(workspace, have)
    elif have is None and layout.encoder.relative_to(layout.root).as_posix() in absent_sources(layout):
        yield Finding("encoder", "ok", "versioned, but not here yet; it is fetched with the data")
    elif have is None:
        here = (layout.root / features.encoder).is_dir() or _is_installed(features.encoder)
        found = "is installed" if here else "will be fetched from the hub"
        yield Finding(
            "encoder",
            "ok",
            f"{features.encoder} {found}; the first `al round` copies it into the workspace, and doctor then tests "
            "whether its vectors depend on the other texts in their batch",
        )
    else:
        yield Finding(
            "encoder",
            "warning",
            f"params.yaml names {features.encoder}, but the workspace has {have}",
            "the next build replaces it",
        )


def check_encoding(workspace: Workspace) -> Iterator[Finding]:
    """Say how many items are not encoded yet, how long that takes, and whether the disk has room for it."""
    layout, features = workspace.layout, workspace.params.features
    if not features.uses_encoder or absent_sources(layout):
        return
    try:
        found = next_encoding(layout, features)
    except BadParams:
        return  # without its device there is no encoding; `engine` says so
    if not found.items:
        yield Finding("encoding", "ok", "all items are encoded")
    elif found.bytes > (free := shutil.disk_usage(layout.root).free):
        yield Finding(
            "encoding",
            "warning",
            f"{found.sentence()}, where {format_size(free)} are free",
            "free some space, or set `features.kind: tfidf` in params.yaml",
        )
    else:
        yield Finding("encoding", "ok", found.sentence())


def _invariance(workspace: Workspace, source: str) -> Iterator[Finding]:
    """Check by a few forward passes that vectors do not depend on their batch, in each precision in use."""
    from al_pipeline.features.device import device_of
    from al_pipeline.features.encoder import Encoder, Precision, resolve_precision
    from al_pipeline.features.invariance import find_dependence
    from al_pipeline.params import FINETUNED

    features, model = workspace.params.features, workspace.params.train.model
    device = device_of(features)
    used: set[Precision] = {resolve_precision(features.precision, device)}
    if model == FINETUNED:
        used.add("float32")
    where = "" if device == CPU else f" ({device})"
    for precision in sorted(used):
        encoder = Encoder(workspace.layout.encoder, features.max_tokens, precision, device=device)
        if not (found := find_dependence(encoder)):
            continue
        yield Finding(
            "encoder",
            "error",
            f"on this machine{where} a text's {precision} vector depends on the other texts in its batch "
            f"({found[0]}), so rounds made here may not be reproducible",
            "set `features.precision: float32` in params.yaml"
            if precision != "float32"
            else "set `features.device: cpu` in params.yaml"
            if device != CPU
            else "run rounds on another machine, or with the torch of requirements.lock",
        )
        return
    tested = " and ".join(sorted(used)) + where
    yield Finding(
        "encoder",
        "ok",
        f"{source}, versioned in the workspace; in {tested} its vectors do not depend on the other texts in their "
        "batch",
    )


def _is_installed(source: str) -> bool:
    try:
        return bool(version(source))
    except (PackageNotFoundError, ValueError):
        return False


def _is_building(workspace: Workspace) -> bool:
    layout = workspace.layout
    planned = read_history(layout, Git(layout.root)).planned
    return layout.closing.exists() or is_closed(layout, planned)
