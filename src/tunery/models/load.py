"""Models and tokenizers: built in, local folders, or hub names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tunery.config import Config


class ModelConfig(Config):
    """The `model:` section. In YAML a bare name stands for {name: ...}."""

    name: str = Field("builtin:tiny", description="builtin:tiny, a folder, or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub name")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="of the frozen weights and the arithmetic; auto is bfloat16 where that is fast, else float32",
    )
    attention: str = Field("auto", description="auto, or one of the back ends in models/attention.py")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    random_init: bool = Field(False, description="random weights from config.json: for pretraining and benchmarks")
    init_from: str | None = Field(None, description="start from this adapter or weights folder, with a fresh optimizer")


ModelField = Annotated[ModelConfig, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]
