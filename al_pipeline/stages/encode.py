"""Fill the caches of features before the stages read them: the encoder's vectors, and TF-IDF's vocabulary and rows.

Not a stage of `dvc.yaml`, since the caches may be deleted.
"""

from __future__ import annotations

import sys

from al_pipeline.data.pool import iter_batches, iter_digests, iter_texts
from al_pipeline.errors import AlError
from al_pipeline.features.cache import CHUNK
from al_pipeline.features.vectors import open_vectors
from al_pipeline.files import read_json, read_object, write_json
from al_pipeline.params import FINETUNED, Features, load_params
from al_pipeline.sanitize import printable
from al_pipeline.stages import pool_vocabulary
from al_pipeline.threads import one_thread
from al_pipeline.workspace.fingerprint import current_engine, difference, recorded_device
from al_pipeline.workspace.layout import Layout

_FEWEST = 200
"""Texts from which a rate is stored: with fewer, most of the time is the encoder's start."""


def main(layout: Layout | None = None) -> int:
    """Encode the texts of the pool and the test set that have no vectors yet; return their number.

    Then compute the TF-IDF rows that they lack, so that no later tick has to.
    """
    layout = layout or Layout()
    params = load_params(layout.params)
    encoded = _fill_vectors(layout, params.features)
    if params.features.uses_tfidf and params.train.model != FINETUNED:
        _fill_terms(layout)
    return encoded


def _fill_vectors(layout: Layout, features: Features) -> int:
    device = recorded_device(read_json(layout.engine))
    vectors = open_vectors(layout.encoder, layout.features, features, device)
    if vectors is None:
        return 0
    folders = [layout.pool, layout.test]
    missing = vectors.missing(iter_digests(folders))
    if not missing:
        return 0

    def remember(done: int, seconds: float) -> None:
        """Store the rate, by which `al doctor` tells how long an encoding will take."""
        if done >= _FEWEST:
            known = read_object(layout.encoded)
            rates = {vectors.fingerprint: round(done / max(seconds, 1e-9), 3)}
            write_json(layout.encoded, {**known, "rates": {**known.get("rates", {}), **rates}})

    return vectors.prepare(iter_texts(folders), missing, remember)


def _fill_terms(layout: Layout) -> None:
    """Cache the vocabulary and the rows of pool and test set, in batches as the stage `score` reads them.

    Does nothing if another engine than this one is recorded, whose cache it is.
    """
    recorded = read_json(layout.engine)
    if difference(recorded, current_engine(recorded_device(recorded))):
        return
    with one_thread():
        vocabulary = pool_vocabulary(layout)
    for batch in iter_batches([layout.pool, layout.test], ("text",), CHUNK):
        vocabulary.prepare(batch.column("text").to_pylist())
    vocabulary.remember_written()


if __name__ == "__main__":
    try:
        main()
    except AlError as error:
        sys.exit(printable(f"{type(error).__name__}: {error}"))
