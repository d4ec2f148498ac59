"""Compare new texts with the pool, by the promoted model and its encoder. Changes nothing but the cache of vectors.

Vectors of kept requests do not enter that cache: a team may share it, and it does not know how long requests are kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from al_pipeline.data.pool import fetch, iter_keys
from al_pipeline.data.served import request_weights
from al_pipeline.drift.assessment import LEAST_WINDOW, REFERENCE, WINDOW, Drift, Texts, compare
from al_pipeline.drift.domain import term_vectors
from al_pipeline.errors import AlError, NothingToDo
from al_pipeline.evaluation.figures import OnTraffic
from al_pipeline.features import tfidf
from al_pipeline.features.vectors import Vectors, open_vectors
from al_pipeline.files import temporary_folder
from al_pipeline.models.loading import vectors_for
from al_pipeline.operations.predict import PublishedModel, TextRow, check_encoder, open_model
from al_pipeline.operations.snapshots import snapshots
from al_pipeline.records import Item, LabeledItem, content_hash, round_name
from al_pipeline.traffic.store import TrafficStore
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.features.cache import Vectors as Rows

_MOST_TEST = 2000
_BATCH = 10_000


@dataclass(frozen=True)
class FileDrift:
    """How the texts of a file differ from those of the pool."""

    round: str
    """The round of the model."""
    rows: int
    distinct: int
    """Number of texts among the rows; at most `WINDOW` of them are compared. Repeated texts count once."""
    drift: Drift
    on_requests: OnTraffic | None
    """The same model on test items that were drawn from requests, as of its round; None if none was labelled."""

    def to_json(self) -> dict[str, Any]:
        """All figures, with examples."""
        found, requests = self.drift.to_json(), self.on_requests
        return {
            **found,
            "round": self.round,
            "texts": {"rows": self.rows, "distinct": self.distinct, **found["texts"]},
            "on_requests": requests and {**requests.accuracy_of_requests.to_row(), "items": requests.metrics.items},
        }


def drift(workspace: Workspace, texts: Iterator[Sequence[TextRow]], *, store: bool) -> FileDrift:
    """Compare the texts of a file, in batches of (id, text), with a fixed random sample of the pool.

    `store`: whether their vectors enter the cache, too. Raises NothingToDo without a promoted model or enough texts,
    and what `open_model` raises.
    """
    layout = workspace.layout
    rows, distinct, window = _window(texts)
    if len(window) < LEAST_WINDOW:
        raise NothingToDo(f"{len(window)} different texts are too few to compare; {LEAST_WINDOW} are needed")
    published = open_model(workspace)
    model = published.model
    reference = _reference(workspace)
    if len(reference) < LEAST_WINDOW:
        raise NothingToDo(f"the pool has {len(reference)} texts; {LEAST_WINDOW} are needed to compare others with them")
    test, labels = _test_set(workspace, published)
    encoded = open_vectors(published.folder / "encoder", layout.features, published.features, published.device)
    own = None
    if encoded is None:
        read = [item.text for item in (*reference, *window)]
        vectors = term_vectors(tfidf.fit(read).transform(read))
    else:
        check_encoder(published, encoded.identity)
        if store:
            vectors = encoded.of([*reference, *window])
        else:
            vectors = _unstored(published, encoded, reference, window, private_folder(layout.traffic))
        own = vectors[len(reference) :]
    proba = [
        model.predict_proba([item.text for item in window], own if model.needs_vectors else None),
        model.predict_proba([item.text for item in test], vectors_for(model, encoded, test)),
    ]
    found = compare(
        [item.text for item in reference],
        Texts([item.item_id for item in window], [item.text for item in window], proba[0]),
        vectors,
        model.classes,
        proba[1],
        labels,
        workspace.params.seed,
    )
    return FileDrift(round_name(published.record.round), rows, distinct, found, published.record.traffic)


def _unstored(
    published: PublishedModel, encoded: Vectors, reference: Sequence[Item], window: Sequence[Item], folder: Path
) -> Rows:
    """The vectors of both, (n, d); those of the window are computed in a cache of their own, which is then deleted."""
    with temporary_folder(folder) as place:
        own = Vectors(published.folder / "encoder", place, published.features, published.device)
        own.store([item.content_hash for item in reference], encoded.of(reference))
        return own.of([*reference, *window])


def _window(batches: Iterator[Sequence[TextRow]]) -> tuple[int, int, list[Item]]:
    """The number of rows and of different texts, and those with the smallest content hashes: a random sample."""
    kept: list[tuple[int, str, str]] = []
    seen: set[bytes] = set()
    rows = 0
    for batch in batches:
        for name, text, *_ in batch:
            rows += 1
            digest = bytes.fromhex(content_hash(text))
            if digest in seen:
                continue
            seen.add(digest)
            one = (-int.from_bytes(digest), name, text)
            if len(kept) < WINDOW:
                heapq.heappush(kept, one)
            else:
                heapq.heappushpop(kept, one)
    chosen = sorted(kept, reverse=True)
    return rows, len(seen), [Item(name, content_hash(text), text) for _, name, text in chosen]


def _reference(workspace: Workspace) -> list[Item]:
    """The texts of the pool with the smallest content hashes: a random sample that a growing pool changes little."""
    chosen = _smallest([workspace.layout.pool], REFERENCE)
    found = fetch([workspace.layout.pool], chosen)
    return [found[name] for name in chosen]


def _smallest(folders: Sequence[Path], most: int) -> list[str]:
    """The ids of the items with the smallest content hashes."""
    keys = (pair for ids, hashes, _ in iter_keys(folders, _BATCH) for pair in zip(hashes, ids, strict=True))
    return [name for _, name in heapq.nsmallest(most, keys)]


def _test_set(workspace: Workspace, published: PublishedModel) -> tuple[list[Item], list[str | None]]:
    """A random sample of the test set like that of the pool, and the labels as of the model's round."""
    try:
        with snapshots(workspace) as labels:
            known = {key: row.label for key, row in labels(published.record).items() if isinstance(row, LabeledItem)}
    except AlError:  # without them no accuracy is estimated, and the reason is shown
        known = {}
    test = fetch([workspace.layout.test], _smallest([workspace.layout.test], _MOST_TEST))
    served = request_weights(test.values())
    items = [item for name, item in test.items() if name not in served]
    return items, [known.get(item.item_id) for item in items]


def kept_requests(workspace: Workspace, since: float = 0.0, until: float | None = None) -> Iterator[list[TextRow]]:
    """The (id, text) pairs that `serve.log` has kept between two times (seconds since 1970), in batches.

    Raises NothingToDo if there is none, BadInput for a damaged file.
    """
    rows = TrafficStore(workspace.layout.traffic).rows(int(since * 1e6), None if until is None else int(until * 1e6))
    some = list(islice(rows, _BATCH))
    if not some:
        raise NothingToDo(
            "no requests are kept"
            + (" from that time on" if since else "; `serve.log.share` in params.yaml keeps those of `al serve`")
        )
    while some:
        yield [(f"{row.request_id}:{row.place}", row.text) for row in some]
        some = list(islice(rows, _BATCH))
