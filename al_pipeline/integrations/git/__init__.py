"""A client for git: explicit paths only, no prompts, hooks or signing, and never resets the user's changes.

An unreadable object raises RepositoryError, naming it, and never counts as missing: see `head`, `show`, `read`, `tags`.
"""

from __future__ import annotations

from al_pipeline.integrations.git.commits import Commits
from al_pipeline.integrations.git.objects import Objects
from al_pipeline.integrations.git.remotes import Remotes
from al_pipeline.integrations.git.settings import NOT_OURS

__all__ = ["NOT_OURS", "Git"]


class Git(Objects, Commits, Remotes):
    """The git repository at `root`."""
