"""Where `al` keeps what belongs to this machine and its user, and to no workspace."""

from __future__ import annotations

import os
from pathlib import Path


def al_home() -> Path:
    """`AL_HOME`, else `~/.local/share/al`."""
    return Path(os.environ.get("AL_HOME") or Path.home() / ".local/share/al")
