"""Take in what is new in the files that `params.yaml` names (`ingest.sources`), at every tick."""

from __future__ import annotations

from pathlib import Path

from al_pipeline.errors import BadParams
from al_pipeline.files import read_json, sha256_file, write_json
from al_pipeline.operations.ingest import finish_ingest, ingest
from al_pipeline.workspace import Workspace


def ingest_sources(workspace: Workspace) -> int:
    """Finish an ingest that was killed, then ingest every source file that is new or changed; how many items came in.

    What was taken in already is remembered by digest; a lost memory costs a second reading, since known content is
    not added twice. Raises BadParams where a pattern leaves the workspace.
    """
    params = workspace.params.ingest
    finish_ingest(workspace.layout)
    if not params.sources:
        return 0
    memory = workspace.layout.private / "ingested.json"
    seen: dict[str, str] = read_json(memory, {})
    added = 0
    for path in _files(workspace.layout.root, params.sources):
        name, digest = str(path.relative_to(workspace.layout.root)), sha256_file(path)
        if seen.get(name) == digest:
            continue
        report = ingest(workspace, [path], text_column=params.text_column, label_column=params.label_column or None)
        added += report.added
        seen[name] = digest
        write_json(memory, seen)
    return added


def _files(root: Path, patterns: list[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise BadParams(
                f"params.yaml: ingest.sources: got {pattern!r}; takes files or patterns below the workspace"
            )
        found.update(
            path for path in root.glob(pattern) if path.is_file() and path.resolve().is_relative_to(root.resolve())
        )
    return sorted(found)
