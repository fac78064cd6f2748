"""The rungs of activation checkpointing (recompute.py) by name, for whoever must not wait for torch."""

from __future__ import annotations

from typing import Literal, get_args

RungName = Literal["none", "selective", "full", "offload"]
# From everything kept to the least on the device.
RUNGS: tuple[RungName, ...] = get_args(RungName)
