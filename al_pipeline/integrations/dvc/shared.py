"""Files in the DVC remote that DVC knows nothing of: the team's cache of vectors. Runs in DVC's process."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from al_pipeline.files import write_bytes

LARGEST = 256 * 2**20
"""The size in bytes from which a file is ignored: none of ours is so large."""
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors\Z")


def names(repo: Any, folder: str) -> list[str]:
    """The names of the files in `folder` of the default remote that may be shards."""
    fs, place = _place(repo, folder)
    fs.fs.invalidate_cache()
    try:
        paths = [path for path in fs.find(place) if _NAME.match(fs.name(path)) and fs.parent(path) == place]
    except FileNotFoundError:
        return []
    infos = fs.info(paths, return_exceptions=True, batch_size=fs.jobs) if paths else []
    found = {fs.name(path): info for path, info in zip(paths, infos, strict=True) if not isinstance(info, Exception)}
    return sorted(name for name, info in found.items() if (info.get("size") or 0) <= LARGEST)


def fetch(repo: Any, folder: str, wanted: Sequence[str], target: Path) -> None:
    """Copy files of `folder` in the default remote to `target`, without believing anything of them."""
    fs, place = _place(repo, folder)
    with ThreadPoolExecutor(max_workers=min(16, fs.jobs)) as pool:
        list(pool.map(lambda name: fs.get_file(fs.join(place, name), os.fspath(target / name)), wanted))


def send(repo: Any, folder: str, source: Path) -> None:
    """Copy the files in `source` to `folder` of the default remote, each atomically."""
    fs, place = _place(repo, folder)
    local = fs.protocol == "local"
    if not local:
        fs.makedirs(place, exist_ok=True)

    def put(path: Path) -> None:
        if local:
            write_bytes(Path(fs.join(place, path.name)), path.read_bytes())
        else:
            fs.put_file(os.fspath(path), fs.join(place, path.name))

    with ThreadPoolExecutor(max_workers=min(16, fs.jobs)) as pool:
        list(pool.map(put, sorted(source.iterdir())))


def _place(repo: Any, folder: str) -> tuple[Any, str]:
    remote = repo.cloud.get_remote(command="push")
    return remote.fs, remote.fs.join(remote.path, *folder.split("/"))
