"""Write what workers on other machines are compared with, see `features.remote`. Not a stage of `dvc.yaml`."""

from __future__ import annotations

import sys

from al_pipeline.errors import AlError
from al_pipeline.features.encoder import Encoder
from al_pipeline.features.remote import probe
from al_pipeline.files import read_json, write_json
from al_pipeline.params import load_params
from al_pipeline.sanitize import printable
from al_pipeline.workspace.fingerprint import recorded_device
from al_pipeline.workspace.layout import Layout


def main(layout: Layout | None = None) -> None:
    """Encode the probe on this machine, and write its digest."""
    layout = layout or Layout()
    features, device = load_params(layout.params).features, recorded_device(read_json(layout.engine))
    encoder = Encoder(layout.encoder, features.max_tokens, features.precision, device=device)
    write_json(layout.probe, {"probe": probe(encoder)})


if __name__ == "__main__":
    try:
        main()
    except AlError as error:
        sys.exit(printable(f"{type(error).__name__}: {error}"))
