"""The tick as a Prefect flow. The code is `al_pipeline/flows`, so that an installed wheel carries it."""
