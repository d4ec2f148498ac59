"""The clusters of `engine.runner`: what each needs here, and what to say if that is missing.

The engine's own settings say where a cluster is, not `params.yaml`: whoever wrote a cloned workspace must not choose
who gets its texts and whose pickles are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a kind of cluster needs on this machine."""

    packages: tuple[str, ...]
    """Modules that must be there to import."""
    variable: str
    """The environment variable with its address."""
    example: str


CLUSTERS = {
    "dask": Cluster(
        ("dask", "distributed", "prefect_dask"), "DASK_SCHEDULER_ADDRESS", "tcp://scheduler.example.org:8786"
    ),
    "ray": Cluster(("ray", "prefect_ray"), "RAY_ADDRESS", "ray://head.example.org:10001"),
}
"""For each `engine.runner` that is a cluster."""


def not_installed(runner: str, why: object) -> str:
    """Say that packages of `runner` are missing."""
    return (
        f"engine.runner is {runner}, and its packages are not installed here ({why}): `pip install "
        f"'al-pipeline[{runner}]'` in the environment that `al` runs in, and in that of every worker"
    )


def no_address(runner: str) -> str:
    """Say that nothing names the cluster of `runner`."""
    cluster = CLUSTERS[runner]
    return (
        f"engine.runner is {runner}, and {cluster.variable} does not say where the cluster is: set it (such as "
        f"{cluster.example}) in the environment of `al round` and `al up`, or set engine.runner: local in params.yaml"
    )
