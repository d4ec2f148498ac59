"""The tick as a Prefect flow, and its deployments."""
