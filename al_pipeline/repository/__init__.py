"""The only runner of git and DVC: `Git` for commits and tags, `Dvc` for one long-lived DVC process."""

from al_pipeline.repository.digests import digest
from al_pipeline.repository.dvc import Different, Dvc, Wrong, remote_wrong, told
from al_pipeline.repository.git import Git

__all__ = ["Different", "Dvc", "Git", "Wrong", "digest", "remote_wrong", "told"]
