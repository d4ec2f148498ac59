"""How many workers a Dask cluster has, asked in a process of its own: the import of Dask takes seconds, and may hang.

    python -P -m al_pipeline.integrations.dask_cluster ADDRESS SECONDS

is that process. It sends the scheduler one request, as Dask's own client does when it connects, and loads no pickles.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from al_pipeline.errors import ExternalServiceError
from al_pipeline.sanitize import redact

_ANSWER_SECONDS = 5.0
_IMPORT_SECONDS = 30.0


def count_workers(address: str, seconds: float = _ANSWER_SECONDS) -> int:
    """The number of workers that the scheduler at `address` has. Raises ExternalServiceError if it gives no answer.

    `seconds` limits the wait for the connection; connection and answer together may take twice as long.
    """
    limit = _IMPORT_SECONDS + 2 * seconds
    command = [sys.executable, "-P", "-m", __name__, address, str(seconds)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise ExternalServiceError(f"no Dask scheduler answered within {limit:.0f} s") from None
    try:
        found = json.loads(done.stdout)
        if type(workers := found.get("workers")) is int:
            return workers
        why = str(found["error"])
    except (ValueError, AttributeError, LookupError):
        why = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise ExternalServiceError(f"no Dask scheduler answers: {redact(why)}")


def main() -> None:
    """Print the number of workers, or the error, as JSON."""
    address, seconds = sys.argv[1], float(sys.argv[2])
    try:
        found: dict[str, Any] = {"workers": asyncio.run(_ask(address, seconds))}
    except Exception as error:  # whatever listens there
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))  # noqa: T201


async def _ask(address: str, seconds: float) -> int:
    from distributed.core import rpc
    from distributed.security import Security

    security = Security().get_connection_args("client")  # TLS, from the user's settings of Dask
    async with rpc(address, timeout=seconds, deserialize=False, connection_args=security) as scheduler:
        reply = await asyncio.wait_for(scheduler.identity(), 2 * seconds)
    return len(reply["workers"])


if __name__ == "__main__":
    main()
