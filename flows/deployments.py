"""The functions that `prefect deploy` calls in a workspace (see `prefect.yaml`)."""

from al_pipeline.flows.deployments import describe, rename, watch

__all__ = ["describe", "rename", "watch"]
