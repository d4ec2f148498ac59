"""Fill the feature cache before the stages read it. Not a stage of `dvc.yaml`, since the cache may be deleted."""

from __future__ import annotations

import sys

from al_pipeline.data.pool import iter_digests, iter_texts
from al_pipeline.errors import AlError
from al_pipeline.features.vectors import open_vectors
from al_pipeline.files import read_json, read_object, write_json
from al_pipeline.params import load_params
from al_pipeline.sanitize import printable
from al_pipeline.workspace.fingerprint import recorded_device
from al_pipeline.workspace.layout import Layout

_FEWEST = 200
"""Texts from which a rate is stored: with fewer, most of the time is the encoder's start."""


def main(layout: Layout | None = None) -> int:
    """Encode the texts of the pool and the test set that have no vectors yet; return their number."""
    layout = layout or Layout()
    device = recorded_device(read_json(layout.engine))
    vectors = open_vectors(layout.encoder, layout.features, load_params(layout.params).features, device)
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


if __name__ == "__main__":
    try:
        main()
    except AlError as error:
        sys.exit(printable(f"{type(error).__name__}: {error}"))
