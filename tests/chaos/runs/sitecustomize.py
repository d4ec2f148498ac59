"""Python runs this at its start where this folder is in PYTHONPATH: it arms a run that Prefect's worker starts.

The product starts the process itself, `python -P -m prefect.engine` or a fork of the server that has imported it, so
nothing else of the suite can be inside of it.
"""

import os
import sys


def arm_run() -> None:
    """Arm this process as its environment says."""
    if at := os.environ.get("CHAOS_AT"):
        from chaos.ticker import arm

        arm(*at.split(":"))


def arm_fork() -> None:
    """Arm this fork of a server once its environment is that of the run: it then reads Prefect's settings again."""
    from prefect import context

    refresh = context.refresh_global_settings_context

    def refresh_and_arm() -> None:
        refresh()
        arm_run()

    context.refresh_global_settings_context = refresh_and_arm


if "prefect.engine" in sys.orig_argv:
    arm_run()
elif "al_pipeline.flows.engine" in sys.orig_argv:
    os.register_at_fork(after_in_child=arm_fork)
