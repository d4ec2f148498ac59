"""Python runs this at its start where this folder is in PYTHONPATH: it arms a run that Prefect's worker starts.

The product starts the process itself (`python -P -m prefect.engine`), so nothing else of the suite can be inside of it.
"""

import os
import sys

if "prefect.engine" in sys.orig_argv and (at := os.environ.get("CHAOS_AT")):
    from chaos.ticker import arm

    arm(*at.split(":"))
