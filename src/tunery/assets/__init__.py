"""What Tunery carries with it: the tiny base model `builtin:tiny` and the grammar its data come from."""

from pathlib import Path

FOLDER = Path(__file__).parent
TINY = FOLDER / "tiny"
