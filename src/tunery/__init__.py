"""Tunery: fine-tune language models. Check the data, plan the run, train fast, prove the result, serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Tuner", "__version__", "train"]

if TYPE_CHECKING:
    from tunery.api import Tuner, train


def __getattr__(name: str) -> Any:
    # `import tunery` must stay instant; torch comes with the first use.
    if name in ("Tuner", "train"):
        from tunery import api

        return getattr(api, name)
    raise AttributeError(f"module 'tunery' has no attribute {name!r}")
