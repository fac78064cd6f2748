"""Writes the quickstart's rows: 1,000 to train on, 200 held out, in the house style of `tunery.assets.rendering`;
pairs of an answer in that style and one in another, 300 and 60; and as many answers of either kind with a label.

python scripts/make_quickstart_data.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from tunery.assets.quickstart import preference_rows, quickstart_rows, thumb_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "examples" / "data")
    parser.add_argument("--train", type=int, default=1000, help="training rows")
    parser.add_argument("--eval", type=int, default=200, help="held-out rows")
    parser.add_argument("--train-pairs", type=int, default=300, help="training pairs, and rows with a label")
    parser.add_argument("--eval-pairs", type=int, default=60, help="held-out pairs, and rows with a label")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = [
        ("quickstart_train", quickstart_rows, 11, args.train), ("quickstart_eval", quickstart_rows, 12, args.eval),
        ("preferences_train", preference_rows, 13, args.train_pairs),
        ("preferences_eval", preference_rows, 14, args.eval_pairs),
        ("thumbs_train", thumb_rows, 15, args.train_pairs), ("thumbs_eval", thumb_rows, 16, args.eval_pairs),
    ]  # fmt: skip
    for name, rows, seed, count in files:
        path = args.out / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in rows(Random(seed), count, evaluation=name.endswith("_eval")):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
