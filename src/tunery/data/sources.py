"""Where rows come from: local files and folders, hub names, and LLaMA-Factory's dataset_info.json."""

from __future__ import annotations

from pydantic import Field

from tunery.config import Config


class Source(Config):
    """One data set. In YAML a bare path or name stands for {path: ...}."""

    path: str = Field(description="a file, a folder, a hub name, or a name in dataset_info.json")
    format: str = Field("auto", description="auto, or a file name in data/formats: alpaca, sharegpt, openai, text")
    columns: dict[str, str] = Field({}, description="our column name -> the data's, e.g. {prompt: question}")
    tags: dict[str, str] = Field({}, description="sharegpt tags as in dataset_info.json, e.g. {role_tag: role}")
    weight: float = Field(1.0, gt=0, description="share of this source when data.mix is weighted")
    samples: int | None = Field(None, gt=0, description="use only the first n rows")
    split: str | None = Field(None, description="split of a hub data set")
    subset: str | None = Field(None, description="configuration (subset) of a hub data set")
