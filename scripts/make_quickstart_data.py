"""Writes the quickstart's rows: 1,000 to train on, 200 held out, in the house style of `tunery.assets.rendering`.

python scripts/make_quickstart_data.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from tunery.assets.quickstart import quickstart_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "examples" / "data")
    parser.add_argument("--train", type=int, default=1000, help="training rows")
    parser.add_argument("--eval", type=int, default=200, help="held-out rows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 11, args.train), ("eval", 12, args.eval)):
        path = args.out / f"quickstart_{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in quickstart_rows(Random(seed), count, evaluation=name == "eval"):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
