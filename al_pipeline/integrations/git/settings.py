"""What makes our git commands independent of the user's settings and of the caller's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from al_pipeline.workspace.home import own_environment

_SETTINGS = {
    "advice.detachedHead": "false",
    "advice.graftFileDeprecated": "false",
    "color.ui": "false",
    "column.ui": "never",
    "commit.cleanup": "whitespace",
    "commit.gpgSign": "false",
    "commit.template": "",
    "commit.verbose": "false",
    "core.attributesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.commentChar": "#",
    "core.excludesFile": "/dev/null",
    "core.fsmonitor": "false",
    "core.fsync": "all",
    "core.fsyncMethod": "fsync",
    "core.hooksPath": "/dev/null",
    "core.preferSymlinkRefs": "false",
    "core.quotePath": "false",
    "core.safecrlf": "false",
    "core.splitIndex": "false",
    "diff.ignoreSubmodules": "none",
    "diff.orderFile": "/dev/null",
    "diff.renames": "false",
    "feature.experimental": "false",
    "feature.manyFiles": "false",
    "fetch.all": "false",
    "fetch.prune": "false",
    "fetch.pruneTags": "false",
    "fetch.recurseSubmodules": "false",
    "fetch.writeCommitGraph": "false",
    "gc.auto": "0",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "index.skipHash": "false",
    "index.sparse": "false",
    "index.version": "2",
    "init.defaultObjectFormat": "sha1",
    "init.defaultRefFormat": "files",
    "log.follow": "false",
    "log.showSignature": "false",
    "maintenance.auto": "false",
    "push.followTags": "false",
    "push.gpgSign": "false",
    "push.recurseSubmodules": "no",
    "status.renames": "false",
    "status.submoduleSummary": "false",
    "submodule.recurse": "false",
    "tag.forceSignAnnotated": "false",
    "tag.gpgSign": "false",
}
"""Settings that make the behaviour and output of our commands independent of the user's. Access to remotes
(`core.sshCommand`, `credential.*`, `http.*`, `url.*`), `safe.directory` and the identity stay the user's."""

QUIET = tuple(word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}"))

NOT_OURS = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_ATTR_SOURCE",
    "GIT_AUTHOR_DATE",
    "GIT_COMMITTER_DATE",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_DEFAULT_HASH",
    "GIT_DEFAULT_REF_FORMAT",
    "GIT_DIFF_OPTS",
    "GIT_DIR",
    "GIT_EXTERNAL_DIFF",
    "GIT_GLOB_PATHSPECS",
    "GIT_ICASE_PATHSPECS",
    "GIT_INDEX_FILE",
    "GIT_INDEX_VERSION",
    "GIT_LITERAL_PATHSPECS",
    "GIT_NAMESPACE",
    "GIT_NOGLOB_PATHSPECS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_QUARANTINE_PATH",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_TRACE",
    "GIT_TRACE2",
    "GIT_TRACE2_EVENT",
    "GIT_TRACE2_PERF",
    "GIT_TRACE_SETUP",
    "GIT_WORK_TREE",
)
"""Variables that git sets for its hooks. Inherited, they would direct our commands to another repository, or change
their behaviour or output."""

_AS_STORED = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_GRAFT_FILE": os.devnull, "GIT_LITERAL_PATHSPECS": "1"}
"""History as stored, without `git replace` and grafts; file names are not patterns."""


def command_environment(root: Path, more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a git command in the repository at `root`: ours, with `more` added."""
    inherited = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    quiet = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    here = {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent)}  # do not find an enclosing repository
    return {**inherited, **own_environment(inherited), **quiet, **_AS_STORED, **here, **more}
