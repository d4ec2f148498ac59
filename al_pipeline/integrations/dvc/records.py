"""What DVC's records say, compared with the work tree without asking DVC."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import yaml

from al_pipeline.errors import UnexpectedChange
from al_pipeline.integrations.dvc.defects import Different
from al_pipeline.integrations.dvc.digests import Digests, listing_digest
from al_pipeline.integrations.dvc.process import DvcProcess
from al_pipeline.integrations.git import Git
from al_pipeline.yaml_text import read_yaml

_NEW_PARTS = 4
"""Up to this many new files in a folder are recognised without asking DVC; see `_added`."""


class Records(DvcProcess):
    """Reads `dvc.lock` and `.dvc` files, and verifies what they record by its bytes."""

    def digest(self, path: Path) -> str | None:
        """The DVC digest of a file or folder, from its bytes; unchanged files are not read again."""
        with Digests(self._notes) as digests:
            return digests.of(path)

    def unlike(self, *targets: str) -> list[str]:
        """Those of `targets` (as for `recorded`) that are missing or hold other bytes than recorded.

        Does not ask DVC, which trusts its own state about what it fetched.
        """
        recorded = self.recorded(*targets)
        with Digests(self._notes) as digests:
            return [name for name, wanted in recorded.items() if digests.of(self.root / name) != wanted]

    def recorded(self, *targets: str, revision: str | None = None) -> dict[str, str]:
        """The digest of each of `targets` by its path, as recorded in the work tree, or in the commit `revision`.

        `targets`: `.dvc` files, and paths that `dvc.lock` records; none: all outputs in `dvc.lock`. Raises
        UnexpectedChange if a record is malformed.
        """
        return {
            name: digest
            for record in sorted({name if name.endswith(".dvc") else "dvc.lock" for name in targets or ("dvc.lock",)})
            for name, digest in self._outputs(record, revision)
            if record.endswith(".dvc") or not targets or name in targets
        }

    def _outputs(self, record: str, revision: str | None, stage: str | None = None) -> Iterator[tuple[str, str]]:
        path = self.root / record
        if revision is not None:
            text = Git(self.root).show(revision, record)
        else:
            text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else None
        try:
            rows = _parse_outputs(text or "", record.endswith(".dvc"))
        except (yaml.YAMLError, AttributeError, KeyError, TypeError):
            raise UnexpectedChange(
                f"{record} is not a valid DVC file; `git checkout -- {record}` restores it"
            ) from None
        folder = Path(record).parent
        for of, name, wanted in rows:
            if stage in (None, of):
                yield (folder / name).as_posix(), wanted

    def differences(self, *targets: str) -> list[Different]:
        """The files that differ from the record, each with what the cache and the remote hold for it."""
        if (added := self._added(targets)) is not None:
            return added
        return [Different(**row) for row in self._ask("compare", "status", targets=targets)["differences"]]

    def _added(self, targets: Sequence[str]) -> list[Different] | None:
        """The unrecorded files of folders if they sort after all recorded ones, which are unchanged; else None.

        New parts of a folder sort last by name, so the recorded listing can be recognised without asking DVC.
        """
        found: list[Different] = []
        with Digests(self._notes) as digests:
            for name, wanted in self.recorded(*targets).items():
                listing = digests.listing(self.root / name)
                counts = range(len(listing), max(-1, len(listing) - 1 - _NEW_PARTS), -1)
                count = next((count for count in counts if listing_digest(listing[:count]) == wanted), None)
                if count is None:
                    return None
                names = (f"{name}/{entry['relpath']}" for entry in listing[count:])
                found += [Different(one, "", "extra", "absent", "absent", False) for one in names]
        return found


@lru_cache(maxsize=32)
def _parse_outputs(text: str, single: bool) -> tuple[tuple[str | None, str, str], ...]:
    """Stage, path and digest of each output in the text of a `dvc.lock`, or of a `.dvc` file (`single`).

    Cached by text: a tick compares the same records before and after each of its steps.
    """
    found = read_yaml(text) if text else {}
    stages = {None: found} if single else found.get("stages", {})
    return tuple((name, out["path"], out["md5"]) for name, stage in stages.items() for out in stage.get("outs", ()))
