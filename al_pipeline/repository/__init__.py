"""The only runner of git and DVC: `Git` for commits and tags, `Dvc` for one long-lived DVC process."""

from al_pipeline.repository.dvc import Dvc, digest
from al_pipeline.repository.git import Git

__all__ = ["Dvc", "Git", "digest"]
