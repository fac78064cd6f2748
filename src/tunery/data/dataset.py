"""From the `data:` section to tokenised examples: read, parse, check, tokenise, cache, split."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunery.config import Config
from tunery.data.sources import Source


def _sources(value: Any) -> Any:
    """A path, a mapping, or a list of either -> a list of mappings."""
    if value is None or isinstance(value, float):
        return value
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_sources)]


class DataConfig(Config):
    """The `data:` section."""

    train: Sources = Field([], description="path, list, or {path, format, columns, weight, samples, split}")
    eval: Annotated[list[Source] | float | None, BeforeValidator(_sources)] = Field(
        None, description="the same as train, or a fraction of it to hold out, such as 0.02"
    )
    dataset_dir: str | None = Field(
        None, description="folder of dataset_info.json; names in train/eval are looked up there"
    )
    template: str = Field("auto", description="auto (the tokenizer's own), a named one, or a path to a .jinja file")
    system: str | None = Field(None, description="system message for rows that have none")
    max_length: int = Field(1024, ge=8, description="longest sequence, in tokens")
    too_long: Literal["drop", "truncate", "error"] = Field("drop", description="what happens to longer rows")
    max_bad: float = Field(0.05, ge=0, le=1, description="stop when more than this share of the rows cannot be used")
    mix: Literal["concat", "weighted"] = Field(
        "concat", description="concat: every row once an epoch; weighted: by weight"
    )
    streaming: bool = Field(False, description="read while training, for data larger than memory")
    shuffle_buffer: int = Field(16384, ge=1, description="rows held for shuffling when streaming")
    workers: int | None = Field(None, ge=1, description="tokenising processes (default: one per core)")
    cache: bool = Field(True, description="keep tokenised data in TUNERY_CACHE (default ~/.cache/tunery)")
