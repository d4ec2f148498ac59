"""The plug-ins of a workspace: what `engine.json` records of them, and those that a saved model needs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from al_pipeline.errors import BadInput, BadParams, NothingToDo, UnexpectedChange
from al_pipeline.files import read_object
from al_pipeline.params import Params, PluginKind, PluginName, plugins_of
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:  # most workspaces have none
    from al_pipeline.plugins.contract import Checked
    from al_pipeline.plugins.references import Reference


_PACKAGE = re.compile(r"(?P<name>[^\s/()]+) (?P<version>[^\s/()]+) \([0-9a-f]+\)")
"""The record of a plug-in in an installed package: its name and version, and the digest of its files."""


def named_plugins(layout: Layout, params: Params, strategy: str | None = None) -> tuple[PluginName, ...]:
    """The plug-ins that a workspace uses. `strategy`: that of the batch; None: as `rounds/overrides.json` has it."""
    batch = strategy or read_object(layout.overrides).get("strategy") or params.select.strategy
    return plugins_of(params.train.model, batch if isinstance(batch, str) else None)


def redaction_of(params: Params) -> tuple[PluginName, ...]:
    """What changes logged texts, `serve.log.redact`; no round depends on it."""
    return (PluginName("redaction", params.serve.log.redact),) if params.serve.log.redact else ()


def plugin_record(layout: Layout, params: Params, strategy: str | None = None) -> dict[str, str]:
    """What `engine.json` records of the plug-ins in use; empty without any, which is found out without an import."""
    named = named_plugins(layout, params, strategy)
    if not named:
        return {}
    from al_pipeline.plugins.references import record

    return record(named, layout.root)


def trusted_plugins(layout: Layout, params: Params, strategy: str | None = None) -> dict[str, str]:
    """The same, before a build. Raises UnexpectedChange if one of them is not trusted on this machine."""
    named = named_plugins(layout, params, strategy)
    if not named:
        return {}
    from al_pipeline.plugins.references import check_trusted, find, record_of

    references = [find(plugin, layout.root) for plugin in named]
    for reference in references:
        check_trusted(reference)
    return record_of(references)


def plugin_files(layout: Layout, params: Params) -> list[Path]:
    """The files of the workspace that hold the plug-ins in use: a round's commit includes them."""
    named = named_plugins(layout, params)
    if not named:
        return []
    from al_pipeline.plugins.references import find

    return [file for plugin in named if (file := find(plugin, layout.root).file)]


def other_packages(recorded: Mapping[str, str], root: Path) -> dict[str, str]:
    """The versions of the packages that a record of plug-ins names and that are not installed here as recorded.

    Raises NothingToDo if no version of one is: a record may come from anyone, and the user has not chosen that package.
    """
    if not recorded:
        return {}
    from al_pipeline.plugins.packages import version_of
    from al_pipeline.workspace.fingerprint import PACKAGES

    wanted: dict[str, str] = {}
    for name, value in recorded.items():
        package = _PACKAGE.fullmatch(value)
        if package:
            if value not in _records_here(name, root):
                wanted[package["name"]] = package["version"]
        elif "(" not in value and name not in PACKAGES and value not in ("absent", version_of(name)):
            wanted[name] = value
    if strange := [f"{name}=={version}" for name, version in wanted.items() if version_of(name) == "absent"]:
        raise NothingToDo(
            f"the round's plug-ins need {', '.join(strange)}, and no version of {strange[0].partition('==')[0]} is "
            "installed here; a record may come from anyone, so only packages that you have chosen are installed: if "
            f"you know it, `pip install {strange[0]}` into the environment of `al`, or leave `--engine` out"
        )
    return wanted


def check_installed(recorded: Mapping[str, str], installed: Mapping[str, str], library: Path) -> None:
    """Check the plug-ins of the packages that were `installed` in the folder `library` for a record.

    Raises BadInput if one has other files than the record says, UnexpectedChange if it is not trusted on this machine.
    """
    if not installed:
        return
    from al_pipeline.plugins.references import find_in

    for name, value in recorded.items():
        package = _PACKAGE.fullmatch(value)
        if package and package["name"] in installed:
            found = find_in(library, name, package["name"])
            if found is None or found.record != value:
                raise BadInput(
                    f"the round was made with {name!r} of {value}, and what pip installed is "
                    f"{found.record if found else 'without it'}; name the folder of the very wheel in PIP_FIND_LINKS, "
                    "or leave `--engine` out to compare metrics only"
                )
            if not found.trusted:
                raise UnexpectedChange(
                    f"the round runs {name!r} of {found.package}, which is not trusted on this machine. If you know "
                    f"it, install {package['name']}=={package['version']} into the environment of `al` and run "
                    "`al trust` in a clone at the round's tag; or leave `--engine` out to compare metrics only"
                )


def _records_here(name: str, root: Path) -> set[str]:
    """What would be recorded of the plug-in `name`, whose kind a record does not say."""
    from al_pipeline.plugins.references import find

    found = set()
    for kind in get_args(PluginKind):
        with contextlib.suppress(BadParams):
            found.add(find(PluginName(kind, name), root).record)
    return found


class Doubt(NamedTuple):
    """A plug-in in use that is not trusted on this machine."""

    name: str
    problem: str
    lines: list[str]
    """Its file, if it lies in the workspace."""
    claim: bytes
    """What the user would trust."""


def doubtful_plugins(workspace: Workspace) -> list[Doubt]:
    """The plug-ins in use that are not trusted on this machine. Raises BadParams if one is not there."""
    return [
        _doubt(found, found.name, f"({found.key}) runs code of {found.package}")
        for found in _untrusted(
            workspace, (*named_plugins(workspace.layout, workspace.params), *redaction_of(workspace.params))
        )
    ]


def doubtful_code(workspace: Workspace) -> list[Doubt]:
    """The same, with all other files in `plugins/`, which a single batch could use (`al round --strategy`)."""
    used = doubtful_plugins(workspace)
    claims = {doubt.claim for doubt in used}
    files = [path for path in sorted(workspace.layout.plugins.glob("*.py")) if path.stem.isidentifier()]
    named = [PluginName("strategy", f"plugins.{path.stem}:name") for path in files if not path.is_symlink()]
    others = [found for found in _untrusted(workspace, named) if found.claim not in claims]
    return used + [_doubt(found, found.package, "is not used yet") for found in others]


def _untrusted(workspace: Workspace, named: Sequence[PluginName]) -> list[Reference]:
    if not named:
        return []
    from al_pipeline.plugins.references import find

    references = [find(plugin, workspace.layout.root) for plugin in named]
    return [found for found in references if not found.trusted]


def _doubt(found: Reference, name: str, problem: str) -> Doubt:
    return Doubt(name, problem, found.source.decode("utf-8", "replace").splitlines(), found.claim)


def check_plugin(name: str, kind: PluginKind, root: Path) -> list[Checked]:
    """Check a plug-in against what every model and strategy must do. It runs: the user named it.

    Raises BadParams or BadInput if it cannot be used at all.
    """
    from al_pipeline.plugins.contract import check_model, check_strategy
    from al_pipeline.plugins.references import find, let_run
    from al_pipeline.plugins.use import use

    plugins = plugins_of(name) if kind == "model" else plugins_of(strategy=name)
    for plugin in plugins:
        let_run(find(plugin, root))
    use(plugins, root)
    return list((check_model if kind == "model" else check_strategy)(name))


def use_plugin_of(model: Path, layout: Layout) -> None:
    """Let this process load a saved model that a plug-in made."""
    from al_pipeline.models.loading import estimator_name

    for plugin in plugins_of(estimator_name(model)):
        from al_pipeline.plugins.use import use_saved

        use_saved(plugin, layout.root)
