"""What torchrun starts for processes.runs_on_two_ranks: ranks that wait for jobs, and run each together.

In the folder they are given, N.json is the next request ({jobs, paths}: what to train one after the other, and where
else to look for modules). Each rank answers with N.RANK, which says what went wrong and is empty where nothing did."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

from tunery.api import train


def serve(folder: Path) -> None:
    parent = os.getppid()
    for number in itertools.count():
        request = folder / f"{number}.json"
        while not request.exists():
            if os.getppid() != parent:
                return
            time.sleep(0.02)
        asked, wrong = json.loads(request.read_text(encoding="utf-8")), ""
        sys.path[:0] = asked["paths"]
        try:
            for job in asked["jobs"]:
                train(job)
        except BaseException:
            wrong = traceback.format_exc()
        del sys.path[: len(asked["paths"])]
        name = f"{number}.{os.environ['RANK']}"
        (folder / f"{name}.part").write_text(wrong, encoding="utf-8")
        (folder / f"{name}.part").rename(folder / name)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
