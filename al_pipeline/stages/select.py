"""Stage `select`: which unlabelled items to ask about in the next round."""

from __future__ import annotations

from al_pipeline.engine import check_engine
from al_pipeline.files import read_json
from al_pipeline.items import read_ids
from al_pipeline.layout import Layout
from al_pipeline.params import load_params
from al_pipeline.query_strategies import COLD_START, Shortlist, choose, round_seed
from al_pipeline.results import read_labeled, read_scores, read_unresolved, write_queries
from al_pipeline.stages import stage


@stage
def main(layout: Layout) -> None:
    """Choose the batch from the shortlist and, for its random slice, from the whole unlabelled pool."""
    check_engine(layout.engine)
    params = load_params(layout.params)
    number = int(read_json(layout.overrides)["round"])
    labeled = {row.item_id for row in read_labeled(layout.labeled)}
    unresolved = read_unresolved(layout.unresolved)
    closed = labeled | {row.item_id for row in unresolved if row.kind == "ignored"}
    candidates = [item_id for item_id in read_ids([layout.pool]).ids() if item_id not in closed]
    ids, scores = read_scores(layout.scores)
    strategy = params.select.strategy if labeled else COLD_START
    queries = choose(
        candidates,
        Shortlist(ids, scores),
        strategy=strategy,
        k=params.round.seed_size if number == 0 else params.select.batch_size,
        random_share=params.select.random_share,
        seed=round_seed(params.seed, number, strategy),
        cold_start=not labeled,
        first=[row.item_id for row in unresolved if row.kind == "tie" and row.part == "pool"],
    )
    write_queries(layout.queries, queries)


if __name__ == "__main__":
    main()
