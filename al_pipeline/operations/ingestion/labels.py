"""Imported labels: one per item, or none if the files contradict themselves."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping

from al_pipeline.annotation.answers import IMPORT_ROUND
from al_pipeline.data.catalog import Catalog, label_from
from al_pipeline.data.table_rows import excerpt
from al_pipeline.operations.ingestion.rejects import Refused
from al_pipeline.params import Schema
from al_pipeline.records import Event, event_digest

IMPORT_ANNOTATOR = "import"

_NO_LABEL = 0
_CONTRADICTION = 0xFFFF


class ImportedLabels:
    """The labels in the files of one ingest, by item number in the catalog."""

    def __init__(self, schema: Schema, former: Collection[str] = ()) -> None:
        """`former`: classes that the schema no longer has; files may still name them, and the fold maps them."""
        self._schema = schema
        self._classes = [*schema.labels, *sorted(former)]
        self._labels = array("H")
        """For each item the position of its label among the classes, from 1, or _NO_LABEL or _CONTRADICTION."""
        self._files = array("L")
        """For each item the index of the file with its label."""

    def add_items(self, count: int) -> None:
        """Add `count` items without labels."""
        self._labels.extend([_NO_LABEL] * count)
        self._files.extend([0] * count)

    def add(self, number: int, cell: object, file: int) -> None:
        """Add the label in `cell` to item `number`; an empty cell is no label.

        Raises Refused if the label is not in the schema or contradicts an earlier row.
        """
        labels = self._classes
        try:
            label = label_from(cell)
        except ValueError:
            label = ""
        if label is None:
            return
        if label not in labels:
            raise Refused("the label is not one of schema.labels in params.yaml", excerpt(cell)[:80])
        place = 1 + labels.index(label)
        before = self._labels[number]
        if before not in (_NO_LABEL, place):
            self._labels[number] = _CONTRADICTION
            raise Refused("the same text has another label in an earlier row; neither is taken", label)
        self._labels[number] = place
        self._files[number] = file

    def events(self, known: Catalog, latest: Mapping[str, Event], files: list[str]) -> Iterator[Event]:
        """Yield an event for each new or changed label, in the order of the items.

        `latest`: the newest import events by annotation key; `files`: the names of the files.
        """
        for number, place in enumerate(self._labels):
            if place in (_NO_LABEL, _CONTRADICTION):
                continue
            label, content = self._classes[place - 1], known.digest(number).hex()
            key = f"{IMPORT_ANNOTATOR}:{content}"
            before = latest.get(key)
            if before is not None and before.label == label:
                continue
            # The previous event is part of the id's hash, so that a label can change back.
            previous = None if before is None else before.event_id
            yield Event(
                event_id=event_digest("import", content, label, previous),
                type="import",
                item_id=known.item_id(number),
                content_hash=content,
                part=known.part(number),
                round=IMPORT_ROUND,
                annotation_key=key,
                annotator=IMPORT_ANNOTATOR,
                label=label,
                schema_version=self._schema.version,
                previous=previous,
                origin=files[self._files[number]],
            )
