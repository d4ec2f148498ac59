"""Prefect's engine in a process that has imported it: a fork of the workspace's fork server (see `launch`)."""

from __future__ import annotations

import importlib
import runpy
import sys

_IMPORTED_LATE = (
    "al_pipeline.cli.app",
    "al_pipeline.flows.rounds",
    "al_pipeline.integrations.label_studio.client",
    "al_pipeline.operations.sources",
    "anyio._backends._asyncio",
    "configobj",
    "encodings.idna",
    "prefect._internal.metrics",
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.telemetry.run_telemetry",
    "prefect.utilities.visualization",
)
"""Modules that a flow run imports when it runs, and the command line of a manual one."""
_ENGINE = "prefect.engine"


def prepare() -> None:
    """Import what a flow run needs, for the processes forked from here."""
    for name in (_ENGINE, *_IMPORTED_LATE):
        importlib.import_module(name)


def read_settings_again() -> None:
    """Make Prefect in this process follow the present environment: it read that of its import."""
    from prefect.context import refresh_global_settings_context
    from prefect.logging.configuration import setup_logging

    refresh_global_settings_context()
    setup_logging(incremental=False)


def main() -> None:
    """Run the flow run that `PREFECT__FLOW_RUN_ID` names, as `python -m prefect.engine` would."""
    read_settings_again()
    sys.modules.pop(_ENGINE, None)
    sys.argv = [_ENGINE]
    runpy.run_module(_ENGINE, run_name="__main__", alter_sys=True)
