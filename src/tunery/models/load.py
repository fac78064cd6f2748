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


def in_folder(model: ModelConfig, folder: Path) -> ModelConfig:
    """The model whose weights lie in `folder`, otherwise loaded as `model` is."""
    return model.model_copy(update={"name": str(folder), "revision": None, "random_init": False})


def base_source(model: ModelConfig) -> ModelConfig:
    """The weights that an adapter is put on: of the weights folder it starts from, or the model's own."""
    start = Path(model.init_from) if model.init_from else None
    return model if start is None or (start / "adapter_config.json").is_file() else in_folder(model, start)


# What a library's code may raise over a folder that contradicts itself, besides what is meant for people.
_WRONG = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def _said(error: Exception) -> str:
    """What an error says, on one line. Raises it where memory ran out: that is no fault of a folder's."""
    if isinstance(error, RuntimeError) and "memory" in str(error).lower():
        raise error
    text = " ".join(str(error).split())
    known = isinstance(error, OSError | ValueError | ImportError) or not type(error).__module__.startswith("builtins")
    return text if known else f"{type(error).__name__}: {text}"


def pretrained(cls: Any, model: ModelConfig, **options: Any) -> Any:
    """`cls.from_pretrained`, with ModelError for what can be wrong with the folder or the name."""
    from huggingface_hub.errors import StrictDataclassError

    folder = resolve_name(model.name)
    try:
        return cls.from_pretrained(
            folder, revision=model.revision or "main", trust_remote_code=model.trust_remote_code, **options
        )
    except (*_WRONG, StrictDataclassError) as error:
        said, where = _said(error), f"model {model.name!r}"
        if not Path(folder).is_dir():
            where += " (not a local folder, so looked up on the hub)"
        if isinstance(error, StrictDataclassError):
            raise ModelError(f"{where}: its config.json contradicts itself: {said}") from error
        raise ModelError(f"{where}: {cls.__name__} cannot load it: {said}") from error


def load_config(model: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without weights. Raises ModelError where there is none, or it contradicts itself."""
    from transformers import AutoConfig

    config = pretrained(AutoConfig, model)
    _check_sizes(model, config.get_text_config())
    return config


def _check_sizes(model: ModelConfig, text: Any) -> None:
    """What a library takes from config.json unlooked at, and fails on later and elsewhere."""

    def size(key: str) -> Any:
        try:
            return getattr(text, key, None)
        except RuntimeError:  # a family whose layers differ in it
            return None

    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        value = size(key)
        if isinstance(value, int) and value < 1:
            raise ModelError(f"model {model.name!r}: {key} is {value} in its config.json; it has to be 1 at least")
    heads, shared = size("num_attention_heads"), size("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ModelError(
            f"model {model.name!r}: its config.json has num_attention_heads {heads} and num_key_value_heads {shared}, "
            "which does not divide it"
        )


def from_config(cls: Any, model: ModelConfig, config: PretrainedConfig, **options: Any) -> Any:
    """A model with random weights (on the meta device: with none), by one of transformers' auto classes. Raises
    ModelError where its code can make no model of these sizes."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return cls.from_config(config, trust_remote_code=model.trust_remote_code, **options)
    except (*_WRONG, StrictDataclassError) as error:
        said = f"{cls.__name__} can make no {config.model_type} model of its config.json: {_said(error)}"
        raise ModelError(f"model {model.name!r}: {said}") from error


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
            loaded = from_config(AutoModelForCausalLM, model, load_config(model), **options)
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
