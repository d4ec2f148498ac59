"""Take in what is new in the files that `params.yaml` names (`ingest.sources`), at every tick."""

from __future__ import annotations

import os
from pathlib import Path

from al_pipeline.errors import BadParams, UnusableFile
from al_pipeline.files import read_object, sha256_file, write_json
from al_pipeline.inputs import is_hidden
from al_pipeline.operations.ingest import finish_ingest, ingest
from al_pipeline.workspace import Workspace


def ingest_sources(workspace: Workspace) -> tuple[int, list[str]]:
    """Finish an ingest that was killed, then ingest every source file that is new or changed.

    Returns how many items came in, and what went wrong: a file that cannot be used stops no other, and is tried again.

    What was taken in already is remembered by digest; a lost memory costs a second reading, since known content is
    not added twice. Links that lead out of the workspace are passed over. Raises BadParams for what is no pattern.
    """
    params = workspace.params.ingest
    finish_ingest(workspace.layout)
    if not params.sources:
        return 0, []
    memory = workspace.layout.private / "ingested.json"
    seen = read_object(memory)
    added = 0
    problems: list[str] = []
    for path in _files(workspace.layout.root, params.sources):
        name = os.fsencode(path.relative_to(workspace.layout.root)).decode("utf-8", "backslashreplace")
        label_column, encoding = params.label_column or None, params.encoding or None
        try:
            digest = sha256_file(path)
            if seen.get(name) == digest:
                continue
            report = ingest(
                workspace, [path], text_column=params.text_column, label_column=label_column, encoding=encoding
            )
        except (UnusableFile, OSError) as error:
            problems.append(f"ingest.sources: {name} was not taken in: {error}")
            continue
        if rejected := sum(report.rejected.values()):
            problems.append(
                f"ingest.sources: {name}: {rejected:,} rows rejected; each with its reason: {report.rejects_file}"
            )
        added += report.added
        seen[name] = digest
        write_json(memory, seen)
    return added, problems


def _files(root: Path, patterns: list[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        try:
            matches = [path for path in root.glob(pattern) if path.is_file() and not is_hidden(path.name)]
        except (ValueError, NotImplementedError) as error:
            raise BadParams(f"params.yaml: ingest.sources: got {pattern!r}; {error}") from None
        found.update(path for path in matches if path.resolve().is_relative_to(root.resolve()))
    return sorted(found)
