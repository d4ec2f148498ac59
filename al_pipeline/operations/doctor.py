"""Check everything that a round needs and say how to fix problems. Read-only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from al_pipeline.errors import AlError
from al_pipeline.operations.checks.data import (
    check_data,
    check_dvc_remote,
    check_encoder,
    check_encoding,
    check_source_files,
)
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.checks.machine import (
    check_disk,
    check_engine,
    check_lock,
    check_parameters,
    check_plugins,
    check_versions,
)
from al_pipeline.operations.checks.repository import check_classes, check_clone, check_git, check_secrets
from al_pipeline.operations.checks.services import (
    check_budget,
    check_cluster,
    check_label_studio,
    check_notifications,
    check_schedule,
)
from al_pipeline.workspace.workspace import Workspace


def examine(workspace: Workspace) -> list[Finding]:
    """Run all checks and return their findings, in order of importance. An AlError or OSError becomes a finding."""
    checks: tuple[tuple[str, Callable[[Workspace], Iterator[Finding]]], ...] = (
        ("versions", check_versions),
        ("parameters", check_parameters),
        ("git", check_git),
        ("classes", check_classes),
        ("identity", check_clone),
        ("secrets", check_secrets),
        ("data", check_data),
        ("sources", check_source_files),
        ("remote", check_dvc_remote),
        ("encoder", check_encoder),
        ("encoding", check_encoding),
        ("engine", check_engine),
        ("cluster", check_cluster),
        ("plug-ins", check_plugins),
        ("Label Studio", check_label_studio),
        ("schedule", check_schedule),
        ("notifications", check_notifications),
        ("budget", check_budget),
        ("disk", check_disk),
        ("lock", check_lock),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check(workspace)
        except AlError as error:
            if all(finding.message != str(error) for finding in findings):  # invalid parameters fail several checks
                findings.append(Finding(name, "error", str(error)))
        except OSError as error:
            what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error.strerror or error)
            findings.append(
                Finding(name, "error", what, "check the file system and its permissions, then run `al doctor` again")
            )
    return findings
