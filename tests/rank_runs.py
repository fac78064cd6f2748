"""What torchrun starts for processes.runs_on_two_ranks: ranks that wait for jobs, and run each together, until torchrun
or the process that asks (its number is the second word) is gone.

In the folder they are given, N.json is the next request ({jobs, paths, environment, folder}: what to train one after
the other, where else to look for modules, what else is in the environment, where to be). Each rank answers with N.RANK,
which says what went wrong and is empty where nothing did."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tunery.api import train


def serve(folder: Path) -> None:
    for number in itertools.count():
        request = folder / f"{number}.json"
        while not request.exists():
            time.sleep(0.02)
        asked, wrong = json.loads(request.read_text(encoding="utf-8")), ""
        with _as_asked(asked):
            try:
                for job in asked["jobs"]:
                    train(job)
            except BaseException:
                wrong = traceback.format_exc()
        name = f"{number}.{os.environ['RANK']}"
        (folder / f"{name}.part").write_text(wrong, encoding="utf-8")
        (folder / f"{name}.part").rename(folder / name)


@contextmanager
def _as_asked(asked: dict[str, Any]) -> Iterator[None]:
    """Nothing of one request is there for the next: not its environment, and none of its modules."""
    paths = [Path(path).resolve() for path in asked["paths"]]
    sys.path[:0] = asked["paths"]
    os.chdir(asked["folder"])
    with patch.dict(os.environ, asked["environment"]):
        yield
    del sys.path[: len(paths)]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and any(path in Path(file).resolve().parents for path in paths):
            del sys.modules[name]


def end_with(folder: Path, asking: int) -> None:
    """In a thread, for a job that hangs does not look. Where one rank ends, torchrun ends the others and itself."""
    parent = os.getppid()
    while os.getppid() == parent and _lives(asking):
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    where, who = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=end_with, args=(where, who), daemon=True).start()
    serve(where)
