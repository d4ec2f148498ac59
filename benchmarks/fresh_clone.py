"""How long both commands of the README take for a newcomer: in a fresh clone without any setup.

    python -m benchmarks.fresh_clone            both, one after the other
    python -m benchmarks.fresh_clone demo       one of them

The demo's own figures and its learning curve are copied: results/demo.json, docs/learning-curve.png.
Downloads come from where pip and npm are configured to look, so the network's share depends on the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks.record import RESULTS, ROOT, record

COMMANDS = ("demo", "test")


def main() -> None:
    """Time the commands and write `results/fresh_clone_<command>.json` for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=COMMANDS, help="demo, test, test-fast (default: demo test)")
    for command in parser.parse_args().commands:
        with tempfile.TemporaryDirectory(prefix="al-fresh-") as folder:
            Path(folder).chmod(0o755)  # some tests run as another user
            measure(command, Path(folder))


def measure(command: str, folder: Path) -> None:
    """Clone, set up, run. The caches of pip and npm are kept, the corpus and Label Studio's database are not."""
    clone = folder / "clone"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "AL_HOME": str(folder / "al")}
    for name in ("VIRTUAL_ENV", "AL_LABEL_STUDIO_VENV", "MAKEFLAGS", "MAKELEVEL"):
        environment.pop(name, None)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    seconds = {}
    for step in ("setup", command):
        begin = time.monotonic()
        subprocess.run(["make", step], cwd=clone, env=environment, check=True)
        seconds[step] = round(time.monotonic() - begin, 1)
    if command == "demo":
        shutil.copyfile(clone / "demo/reports/demo.json", RESULTS / "demo.json")
        shutil.copyfile(clone / "demo/reports/learning-curve.png", ROOT / "docs/learning-curve.png")
        subprocess.run(["make", "clean"], cwd=clone, env=environment, check=True)
    record(f"fresh_clone_{command}", {"seconds": {**seconds, "total": round(sum(seconds.values()), 1)}})


if __name__ == "__main__":
    main()
