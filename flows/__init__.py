"""The tick as a Prefect flow. The code is in `al_pipeline/flows`, so that an installed wheel includes it."""
