"""What a person points at when they want to use a result: TARGET = run, checkpoint, adapter or model folder, hub name,
or builtin:tiny."""

from __future__ import annotations

import difflib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunery.config import validate
from tunery.config_file import read_config
from tunery.errors import ModelError, TemplateError
from tunery.host import keep_few_products
from tunery.models.load import ModelConfig, load_config, load_tokenizer, resolve_name
from tunery.models.score import HEAD, TASK, has_scores, load_with_head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Kind = Literal["run", "checkpoint", "adapter", "model"]
JOB = "tunery.yaml"
ADAPTER = "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Target:
    """A target, found but not loaded. `base` is the model to load, `adapter` the folder of the adapter on top of it
    (None for a whole model), `tokenizer` the folder or name the tokenizer comes from, `template` and `system` the chat
    template and default system message for `load_template`, `name` what the person wrote."""

    name: str
    kind: Kind
    base: ModelConfig
    adapter: Path | None
    tokenizer: str
    template: str
    system: str | None = None


@dataclass(slots=True)
class Loaded:
    """A target in memory: the model (wrapped by PEFT where there is an adapter; in evaluation mode), its tokenizer and
    its chat template."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: Any
    target: Target


# ---------------------------------------------------------------- finding


def resolve_target(target: str | Path) -> Target:
    """What `target` is and where its parts lie; loads nothing.

    Raises ModelError for a folder that does not exist (naming the nearest), a run that has no finished model yet
    (naming its checkpoints), and an adapter that names no base or one that cannot be found."""
    name = str(target)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _not_a_folder(name)
        if folder is None:
            return Target(name, "model", model_config(name), None, name, "auto")
    job = _job(folder)
    kind: Kind = _kind(folder, job)
    if (folder / ADAPTER).is_file():
        base = _base_of(folder, job)
        tokenizer = str(folder) if _has_tokenizer(folder) else base.name
        return Target(name, kind, base, folder, tokenizer, *_template(folder, job))
    if not (folder / "config.json").is_file() or not _has_weights(folder):
        raise ModelError(_nothing_here(folder, job))
    trust = bool(job and job["model"].get("trust_remote_code"))
    base = model_config(str(folder), trust_remote_code=trust)
    tokenizer = str(folder)
    if not _has_tokenizer(folder):
        if not job:
            raise ModelError(f"{folder}: a model without tokenizer files; copy them from the model it was made from")
        tokenizer = job["model"]["name"]
    return Target(name, kind, base, None, tokenizer, *_template(folder, job))


def model_config(name: str, **options: Any) -> ModelConfig:
    """The `model:` section of a model that is used as it is."""
    return validate(ModelConfig, {"name": name, **options})


def _not_a_folder(name: str) -> Path | None:
    """None for a model's name; the downloaded folder for an adapter on the hub. Raises for a mistyped path."""
    if Path(name).expanduser().is_file():
        raise ModelError(f"{name}: is a file; give the folder it lies in")
    siblings = [path.name for path in Path(name).expanduser().parent.glob("*/")] if not name.count(":") else []
    near = difflib.get_close_matches(Path(name).name, siblings, n=1, cutoff=0.8)
    if near:
        raise ModelError(f"{name}: no such folder; did you mean {Path(name).parent / near[0]}?")
    if resolve_name(name) != name:  # built in
        return None
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    if cached_file(name, ADAPTER, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
                   _raise_exceptions_for_connection_errors=False) is None:  # fmt: skip
        return None
    return Path(snapshot_download(name))


def _job(folder: Path) -> dict[str, Any] | None:
    """The resolved configuration of the run that `folder` is, or is a checkpoint of."""
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if (place / JOB).is_file():
            return read_config(place / JOB)
    return None


def _kind(folder: Path, job: dict[str, Any] | None) -> Kind:
    if job:
        return "checkpoint" if folder.name.startswith("checkpoint-") else "run"
    return "adapter" if (folder / ADAPTER).is_file() else "model"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _template(folder: Path, job: dict[str, Any] | None) -> tuple[str, str | None]:
    """The template and the default system message. The saved tokenizer carries the template trained with."""
    data = (job or {}).get("data") or {}
    saved = job is None or (folder / "chat_template.jinja").is_file()
    return "auto" if saved else str(data.get("template", "auto")), data.get("system")


def _nothing_here(folder: Path, job: dict[str, Any] | None) -> str:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if job or checkpoints:
        what = f"{folder}: this run has no finished model yet"
        if not checkpoints:
            return f"{what} and no checkpoint; train it to the end first"
        return f"{what}; use one of its checkpoints ({', '.join(str(c) for c in checkpoints)}) or train it to the end"
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return f"{folder}: neither an adapter nor a model: no {ADAPTER}, no config.json with weights (it holds: {found})"


def _base_of(folder: Path, job: dict[str, Any] | None) -> ModelConfig:
    """The base of an adapter, as its own file says; the job that trained it knows how to load it."""
    values = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    model = (job or {}).get("model") or {}
    model = {"name": model} if isinstance(model, str) else model
    name = values.get("base_model_name_or_path") or model.get("name")
    if not name:
        raise ModelError(f"{folder / ADAPTER}: names no base model; fill in base_model_name_or_path")
    known = model if model.get("name") == name else {}
    options = {key: known[key] for key in ("revision", "trust_remote_code") if key in known}
    base = model_config(name, **{"revision": values.get("revision"), **options})
    try:
        resolve_name(base.name)
    except ModelError as error:
        raise ModelError(
            f"{folder}: its base model cannot be found: {error}. If it was moved, put its new place into "
            f"base_model_name_or_path of {folder / ADAPTER}"
        ) from None
    return base


# ---------------------------------------------------------------- loading


def load_target(
    target: str | Path | Target,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    template: str | None = None,
    talks: bool = False,
    scores: bool = False,
    beside: Any = None,
) -> Loaded:
    """The target in memory, ready to generate; or to score, where a reward model is wanted (`scores`). `dtype` "auto"
    is bfloat16 on a GPU that has it, else float32; `device` "auto" is the GPU where there is one. `template` replaces
    the one trained with. `beside`: a language model in memory on the same base, whose weights an adapter of a reward
    model is put on instead of a copy; `dtype` and `device` are its. Raises ModelError, also where an adapter does not
    fit its base, or where the target is a reward model and none is wanted, or none and one is, and as NotShared where
    nothing can be put on the weights `beside`; TemplateError, before the model loads, where it `talks` (is asked in
    messages) and has no chat template."""
    from tunery.data.template import load_template, named_templates
    from tunery.models.shared_base import scorer_on

    keep_few_products()
    found = target if isinstance(target, Target) else resolve_target(target)
    check_kind(found, scores)
    where = pick_device(device)
    tokenizer = load_tokenizer(model_config(found.tokenizer, trust_remote_code=found.base.trust_remote_code))
    chat = load_template(template or found.template, tokenizer, system=found.system)
    if talks and chat.source is None:
        raise TemplateError(
            f"{found.name}: has no chat template. Choose one with --template NAME: a .jinja file, or one of "
            f"{', '.join(named_templates())} (the one the model was tuned with; for a base model, any)"
        )
    if beside is not None:
        model = scorer_on(beside, found.base)
    else:
        model = load_base(found, pick_dtype(dtype, where), where)
    if found.adapter is not None:
        model = load_adapter(model, found.adapter)
    return Loaded(model.eval(), tokenizer, chat, found)


def check_kind(found: Target, scores: bool) -> None:
    """Raises ModelError where a reward model is wanted (`scores`) and the target is none, or the other way round."""
    if scores != is_reward_model(found):
        what = "language model, which scores nothing; name a reward model (objective: reward makes one)"
        if not scores:
            what = "reward model, which scores answers and gives none (tunery generate --score)"
        raise ModelError(f"{found.name}: is a {what}")


def is_reward_model(found: Target) -> bool:
    """Whether a target scores answers (models/score.py), rather than giving them."""
    if found.adapter is None:
        return has_scores(load_config(found.base))
    return json.loads((found.adapter / ADAPTER).read_text(encoding="utf-8")).get("task_type") == TASK


def has_biases(found: Target) -> bool:
    """Whether an adapter has trained biases of its base (PEFT's `bias`), which loading it would overwrite."""
    if found.adapter is None:
        return False
    return json.loads((found.adapter / ADAPTER).read_text(encoding="utf-8")).get("bias", "none") != "none"


def load_base(found: Target, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The model of a target, without its adapter; under that of a reward model with a head that the adapter has the
    weights of."""
    head, seed = HEAD if is_reward_model(found) else None, None if found.adapter is None else 0
    return load_with_head(head, found.base, dtype, device, seed=seed)


def pick_device(device: str = "auto") -> str:
    import torch

    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device {device!r}: cannot be used here: {str(error).splitlines()[0]}") from None
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """ "auto" is bfloat16 on a GPU that computes in it, float32 elsewhere."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise ModelError(f"dtype {dtype!r}: expected auto, float32, bfloat16, float16 or float64")
    return getattr(torch, dtype)


def load_adapter(model: Any, folder: Path) -> Any:
    """`model` wrapped by the PEFT adapter in `folder`, not merged. Every tensor of the file must have its place in
    the model and every adapter parameter its tensor in the file; PEFT by itself only warns."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what fits and what does not is found out below, exactly
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder}: this adapter does not fit the base model: {_short(error)}") from error
    saved = set(load_peft_weights(str(folder), device="cpu"))
    own = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    missing, extra = own - saved, saved - own - set(wrapped.state_dict())
    if missing or extra:
        raise ModelError(
            f"{folder}: this adapter does not fit the base model: {len(missing)} of the adapter's tensors are not in "
            f"the file, {len(extra)} in the file have no place (for example {sorted(missing | extra)[0]})"
        )
    return wrapped


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) + (f" (and {len(lines) - 2} more lines)" if len(lines) > 2 else "")
