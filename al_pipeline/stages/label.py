"""Stage `label`: aggregate the ledger into one label for each item."""

from __future__ import annotations

from functools import partial

from al_pipeline.annotation.aggregation import fold_by
from al_pipeline.data.ledger import read_events, read_forecasts
from al_pipeline.data.outputs import write_labeled, write_unresolved
from al_pipeline.params import load_params
from al_pipeline.stages import stage
from al_pipeline.workspace.fingerprint import check_engine
from al_pipeline.workspace.layout import Layout


@stage
def main(layout: Layout) -> None:
    """Aggregate the ledger into the labelled set, the labelled test set, and the unresolved items."""
    check_engine(layout.engine)
    params = load_params(layout.params)
    folded = fold_by(params, read_events(layout.events), partial(read_forecasts, layout.events))
    write_labeled(layout.labeled, folded.labeled)
    write_labeled(layout.test_labels, folded.test)
    write_unresolved(layout.unresolved, folded.unresolved)


if __name__ == "__main__":
    main()
