"""One DVC process for many commands: a line of JSON in (`["repro", "-s", "train"]`), a line with the exit code out.

Starting DVC costs about a second, a command in a running one a tenth of it. The process leads a group of its own, so
that a stage outlives no kill of the group; it ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Serve commands until standard input ends. What DVC and the stages print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from dvc.cli import main as dvc

    for line in sys.stdin:
        try:
            code = dvc(json.loads(line))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        replies.write(json.dumps(code) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
