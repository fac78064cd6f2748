"""Models with a scalar head: transformers' sequence classification with one label, as reward models are.

The value of a sequence is what the head makes of the hidden state of its last token. A folder that is saved here is
loaded by AutoModelForSequenceClassification, and an adapter by AutoPeftModelForSequenceClassification(num_labels=1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.errors import ModelError
from tunery.models.load import ModelConfig, from_config, load_config, load_model, pretrained
from tunery.models.parts import score_head
from tunery.types import Message

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

HEAD = "score"  # as transformers names it in its causal families, and objectives ask for it (`head = "score"`)
LABEL = "reward"
TASK = "SEQ_CLS"  # what PEFT calls such a model


def has_scores(config: PretrainedConfig) -> bool:
    """Whether a model folder holds a sequence classifier rather than a language model."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def load_with_head(
    head: str | None,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    seed: int | None = None,
) -> PreTrainedModel:
    """load_model, or for the head "score" the backbone with a scalar head in float32 at least. A head that the folder
    does not have is drawn from `seed`, the same on every device: N(0, initializer_range^2), so that rewards begin near
    0. Raises ModelError without a seed then, for a family that transformers has no sequence classification of, for a
    classifier of several labels, and for weights that are not all there."""
    import torch

    if head is None:
        return load_model(model, dtype, device, attention)
    config = load_config(model)
    _check_family(model, config)
    if has_scores(config) and config.num_labels != 1:
        raise ModelError(
            f"model {model.name!r}: classifies into {config.num_labels} labels; a reward model has one (num_labels: 1)"
        )
    loaded, fresh = _load(model, config, dtype, device, attention)
    score = getattr(loaded, HEAD, None)
    if type(score) is not torch.nn.Linear or score.out_features != 1:
        raise ModelError(
            f"model {model.name!r}: {type(loaded).__name__} is not a backbone with a linear head, so it cannot be a "
            "reward model here; take a causal family such as Qwen, Llama, Mistral or Gemma"
        )
    if fresh:
        if seed is None:
            raise ModelError(f"model {model.name!r}: has no trained head ({HEAD}), so it cannot score anything")
        _draw(score, seed, getattr(loaded.config.get_text_config(), "initializer_range", None) or 0.02)
        loaded.config.id2label, loaded.config.label2id = {0: LABEL}, {LABEL: 0}
        loaded.config.problem_type = "regression"  # or pipelines would put it through a sigmoid
    score.to(torch.promote_types(dtype, torch.float32))
    return loaded


def scorer_from_config(model: ModelConfig, config: Any, **options: Any) -> PreTrainedModel:
    """One with random weights."""
    from transformers import AutoModelForSequenceClassification

    _check_family(model, config)
    config.num_labels = 1
    return from_config(AutoModelForSequenceClassification, model, config, **options)


def _load(
    model: ModelConfig, config: Any, dtype: torch.dtype, device: torch.device | str, attention: str | None
) -> tuple[Any, bool]:
    """The model, and whether its head is not from the folder."""
    loaded: Any
    import torch
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": dtype} | ({"attn_implementation": attention} if attention else {})
    with _quiet():
        if model.random_init:
            with torch.device(device):
                loaded = scorer_from_config(model, config, **options)
                return loaded.to(device), True
        loaded, found = pretrained(
            AutoModelForSequenceClassification, model, num_labels=1, output_loading_info=True, **options
        )
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(f"{HEAD}."))
    if missing:
        raise ModelError(
            f"model {model.name!r}: {len(missing)} weights of {type(loaded).__name__} are not in it (for example "
            f"{missing[0]}), so its sequence classification would begin with random ones"
        )
    return loaded.to(device), f"{HEAD}.weight" in found["missing_keys"]


@contextmanager
def _quiet() -> Iterator[None]:
    """The library would warn of the head that is new and of the one that is not taken, in a table."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_family(model: ModelConfig, config: Any) -> None:
    """Raises ModelError where transformers has no sequence classification for the model's family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as known

    if config.model_type not in known and "AutoModelForSequenceClassification" not in (
        getattr(config, "auto_map", None) or {}
    ):
        raise ModelError(
            f"model {model.name!r}: transformers has no sequence classification for {config.model_type} models, so "
            "there is no form that a reward model of this family could be saved in; take another family"
        )


def _draw(head: torch.nn.Linear, seed: int, spread: float) -> None:
    import torch

    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=numbers) * spread)
        if head.bias is not None:
            head.bias.zero_()


def fitting_config(model: Any, folder: Path, trains: bool) -> Any:
    """PEFT's configuration of the adapter in `folder`, to be put on `model` to train on, or only to be merged into it.
    One of a language model fits a scalar head's backbone as well; if it `trains`, the head does beside it. Raises
    ModelError for the other way round."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if score_head(model) is not None:
        config.task_type = TASK if trains or config.task_type == TASK else None  # None: PEFT looks for no head in it
    elif config.task_type == TASK:
        raise ModelError(f"{folder}: is the adapter of a reward model, and this run trains a language model")
    return config


# ---------------------------------------------------------------- where a sequence ends, for transformers


def agree_on_padding(model: Any, tokenizer: Any, template: Any) -> None:
    """Let transformers find the same last token as we do: it takes the last one that is not `config.pad_token_id`. So
    that id is set to the tokenizer's padding, or to another special token where sequences end with that one (as where
    padding is the end of sequence), which then becomes the tokenizer's padding too; where there is no other, there is
    none, and transformers scores one sequence at a time."""
    (ends,) = template.encode([Message("user", "?"), Message("assistant", "!")], train="last")
    last = int(ends.ids[-1])
    choices = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    padding = next((choice for choice in choices if choice is not None and choice != last), None)
    if padding is not None and padding != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = padding
