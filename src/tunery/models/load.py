"""Models and tokenizers: built in, local folders, or hub names."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunery.config import Config
from tunery.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class ModelConfig(Config):
    """The `model:` section. In YAML a bare name stands for {name: ...}."""

    name: str = Field(default="builtin:tiny", description="builtin:tiny, a folder, or a hub name")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub name")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        default="auto", description="of frozen weights and arithmetic; auto: bfloat16 where that is fast, else float32"
    )
    attention: str = Field(
        default="auto", description="auto (our packed hook), or an implementation of transformers, e.g. eager"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    random_init: bool = Field(
        default=False, description="random weights from config.json: for pretraining and benchmarks"
    )
    init_from: str | None = Field(
        default=None, description="start from this adapter or weights folder, with a fresh optimizer (not a resume)"
    )


ModelField = Annotated[ModelConfig, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]


def resolve_name(name: str) -> str:
    """What `from_pretrained` takes: the packaged folder for `builtin:...`, the name itself otherwise.
    Raises ModelError for an unknown built-in or something that is meant as a folder and does not exist."""
    if name.startswith("builtin:"):
        folder = Path(__file__).resolve().parents[1] / "assets" / name.removeprefix("builtin:")
        if not (folder / "config.json").is_file():
            known = sorted(p.parent.name for p in folder.parent.glob("*/config.json"))
            raise ModelError(f"{name}: no such built-in model (there are: {', '.join('builtin:' + k for k in known)})")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or (path.parent.is_dir() and "/" in name)
    if looks_local:
        siblings = [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ModelError(f"model {name!r}: no such folder{hint}")
    return name


def pretrained(cls: Any, model: ModelConfig, **options: Any) -> Any:
    """`cls.from_pretrained`, with ModelError for what can be wrong with the folder or the name."""
    folder = resolve_name(model.name)
    try:
        return cls.from_pretrained(
            folder, revision=model.revision or "main", trust_remote_code=model.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = f"model {model.name!r}"
        if not Path(folder).is_dir():
            where += " (not a local folder, so looked up on the hub)"
        raise ModelError(f"{where}: {cls.__name__} cannot load it: {error}") from error


def load_config(model: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without weights."""
    from transformers import AutoConfig

    return pretrained(AutoConfig, model)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer. Raises ModelError when there is none or it has no end-of-sequence token."""
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, model)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {model.name!r}: its tokenizer has no end-of-sequence token, so answers could never end"
        )
    return tokenizer


def load_model(
    model: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", attention: str | None = None
) -> PreTrainedModel:
    """The causal language model in `dtype` on `device`. `attention` is one of transformers' implementations (None:
    its own choice). `random_init` builds it from its config with random weights instead."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
    if model.random_init:
        with torch.device(device):
            loaded = AutoModelForCausalLM.from_config(
                load_config(model), trust_remote_code=model.trust_remote_code, **options
            )
    else:
        loaded = pretrained(AutoModelForCausalLM, model, **options)
    return loaded.to(device)  # not to(dtype): it would round the rotary frequencies, which are float32 in any model


def hook_attention(model: PreTrainedModel, reference: bool = False) -> bool:
    """Put our packed attention hook (or its `reference`) into a loaded model; False where its code takes no attention
    from outside, or cuts attention into chunks (Llama 4), which the hook does not know."""
    from tunery.models import attention

    if getattr(model.config.get_text_config(), "attention_chunk_size", None):
        return False
    before = model.config._attn_implementation or "eager"
    wanted = attention.register(reference)
    model.set_attn_implementation(wanted)
    if model.config._attn_implementation == wanted:
        return True
    model.set_attn_implementation(before)
    return False
