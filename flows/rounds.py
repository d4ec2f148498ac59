"""The flow that Prefect runs: one tick of a workspace, each of its steps a task."""

from al_pipeline.flows.rounds import al_round

__all__ = ["al_round"]
