"""The flow that Prefect runs: one tick of a workspace, with each step as a task."""

from al_pipeline.flows.rounds import al_round

__all__ = ["al_round"]
