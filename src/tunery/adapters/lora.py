"""LoRA and its kin through PEFT: low-rank updates of linear layers, with rsLoRA, DoRA, LoRA+ and PiSSA as options.

PEFT owns the parameters and the saved files. PiSSA is initialised here (not by PEFT), so that a resumed run rebuilds
its residual base bit for bit, and a run ends as ONE plain LoRA for the original base."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tunery.config import KindConfig
from tunery.errors import ConfigError, ModelError
from tunery.models.parts import score_head, to_master
from tunery.models.score import TASK, fitting_config

PISSA_FILE = "pissa.safetensors"
# What PEFT trains whole in any classifier, asked or not.
HEADS = frozenset({"classifier", "score"})


class Config(KindConfig):
    kind: str = "lora"
    rank: int = Field(8, ge=1, description="rank r of the update")
    alpha: float | None = Field(None, gt=0, description="the update is scaled by alpha / r; null: 2 r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of the update")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear (but the head), module names such as [q_proj, v_proj], or a regex"
    )
    modules_to_save: list[str] = Field([], description="modules trained whole and saved along, e.g. [embed_tokens]")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) (arXiv:2312.03732)")
    dora: bool = Field(False, description="direction and magnitude apart (arXiv:2402.09353)")
    init: Literal["default", "pissa"] = Field("default", description="pissa: from the principal singular vectors")
    pissa_iter: int = Field(16, ge=-1, description="power iterations of PiSSA's fast SVD; -1: exact SVD")
    loraplus_ratio: float | None = Field(
        None, gt=0, description="LoRA+: B learns this many times faster than A; 16 is usual"
    )

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.init == "pissa" and (self.dora or self.dropout):
            raise ValueError("init: pissa goes with neither dora nor dropout")
        if self.pissa_iter == 0:
            raise ValueError("pissa_iter must be -1 (exact) or at least 1")
        return self


class Adapter:
    """W x + s B A x (Hu et al., arXiv:2106.09685, eq. 3), s = alpha / r, with W frozen; A, B in float32."""

    whole = False
    default_lr = 2e-4

    def __init__(self, config: Config):
        self.config = config
        self._pissa_start: dict[str, tuple[Tensor, Tensor]] = {}  # name -> the A and B taken out of the base

    def apply(self, model: Any, start: Path | None = None, resume: Path | None = None) -> Any:
        """Wrap the model. `start`: go on from this adapter, with its shape; `resume`: a checkpoint of this run."""
        from peft import LoraConfig, get_peft_model

        if start is not None:
            peft_config = fitting_config(model, start, trains=True)
            if not isinstance(peft_config, LoraConfig):
                raise ModelError(f"model.init_from: {start} is not a LoRA adapter")
            self._same_shape(peft_config, start)
            peft_config.inference_mode = False
        else:
            peft_config = self._peft_config(TASK if score_head(model) is not None else "CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of GPT-2's layers, which PEFT sets right by itself
            try:
                wrapped = get_peft_model(model, peft_config)
            except (ValueError, re.error) as error:
                raise ConfigError(f"adapter.targets: {error}") from error
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                to_master(parameter)  # PEFT itself leaves modules that are trained whole in 16 bits
        self._all_found(wrapped)
        if self.config.init == "pissa" and start is None:
            self._pissa(wrapped, resume)
        folder = resume or start
        if folder is not None:
            self._load(wrapped, folder, may_lack=HEADS if resume is None else frozenset())
        return wrapped

    def load(self, model: Any, folder: Path) -> None:
        """Put the weights of an adapter folder (for PiSSA: of a checkpoint of this run) into the applied adapter."""
        self._load(model, folder)

    def _load(self, model: Any, folder: Path, may_lack: Set[str] = frozenset()) -> None:
        """`may_lack`: modules that stay as they are where the folder has no weights of them."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        if self._pissa_start:
            parts = load_file(folder / PISSA_FILE)
            for name, _ in _lora_layers(model):
                saved[f"{name}.lora_A.weight"], saved[f"{name}.lora_B.weight"] = parts[f"{name}.A"], parts[f"{name}.B"]
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items() if may_lack else ():
            if name.split(".")[-2] in may_lack:
                saved.setdefault(name, value)
        result = set_peft_model_state_dict(model, saved)
        if result.unexpected_keys:
            raise ModelError(f"{folder}: its weights do not fit this model: {result.unexpected_keys[:3]}")

    @property
    def changes_base(self) -> bool:
        """Whether the model in memory has another base than what is saved is for, so that the two must be compared."""
        return bool(self._pissa_start)

    def lr_scale(self, name: str) -> float:
        """LoRA+ (Hayou et al., arXiv:2402.12354): B's learning rate is a multiple of A's."""
        return self.config.loraplus_ratio or 1.0 if ".lora_B." in name or ".lora_embedding_B" in name else 1.0

    def save(self, model: Any, folder: Path, base: str) -> None:
        """An adapter folder as PEFT writes it; for PiSSA the equivalent plain LoRA, and what a resume needs beside."""
        from safetensors.torch import save_file

        for config in model.peft_config.values():
            config.base_model_name_or_path = base
        if not self._pissa_start:
            card = folder / "README.md"
            had_card = card.exists()
            model.save_pretrained(str(folder), save_embedding_layers=False)
            if not had_card:  # PEFT's is an empty form
                card.unlink(missing_ok=True)
            return
        tensors: dict[str, Tensor] = {}
        for name, layer in _lora_layers(model):
            start_A, start_B = self._pissa_start[name]
            tensors |= {f"{name}.start_A": start_A, f"{name}.start_B": start_B}
            tensors |= {f"{name}.A": layer.lora_A["default"].weight, f"{name}.B": layer.lora_B["default"].weight}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / PISSA_FILE)
        self._save_plain(model, folder)

    def finish(self, model: Any, folder: Path, base: str, dtype: torch.dtype) -> None:
        """What the run leaves behind: the adapter alone."""
        self.save(model, folder, base)
        (folder / PISSA_FILE).unlink(missing_ok=True)

    # ------------------------------------------------------------------ PEFT's config

    def _peft_config(self, task: str) -> Any:
        """For a model with a scalar head PEFT adds that to what is trained whole and saved."""
        from peft import LoraConfig

        config = self.config
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha if config.alpha is not None else 2 * config.rank,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=config.targets,
            modules_to_save=config.modules_to_save or None,
            use_rslora=config.rslora,
            use_dora=config.dora,
            task_type=task,
        )

    def _same_shape(self, theirs: Any, folder: Path) -> None:
        """What makes an adapter's shape is that of the one it starts from. Raises ConfigError where the configuration
        asks for another. Dropout is no shape, and is the configuration's."""
        config = self.config
        names = (
            sorted(theirs.target_modules) if isinstance(theirs.target_modules, set | list) else theirs.target_modules
        )
        saved = {
            "rank": theirs.r, "alpha": theirs.lora_alpha, "rslora": theirs.use_rslora, "dora": theirs.use_dora,
            "targets": names, "modules_to_save": sorted({*(theirs.modules_to_save or [])} - HEADS), "init": "default",
        }  # fmt: skip
        for key, value in saved.items():
            mine = getattr(config, key)
            mine = sorted(mine) if isinstance(mine, list) else mine
            if key not in config.model_fields_set or mine is None or (key, mine) == ("targets", "all-linear"):
                continue
            if mine != value:
                raise ConfigError(f"adapter.{key}: {mine}, but model.init_from ({folder}) has {value}; drop the key")
        theirs.lora_dropout = config.dropout

    def _all_found(self, model: Any) -> None:
        """PEFT passes over a name that no module has. Raises ConfigError naming it."""
        whole = {n.rpartition(".modules_to_save")[0] for n, _ in model.named_modules() if ".modules_to_save" in n}
        low_rank = {n.partition(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
        asked = {"modules_to_save": (self.config.modules_to_save, whole)}
        if isinstance(self.config.targets, list):
            asked["targets"] = (self.config.targets, low_rank)
        for key, (wanted, found) in asked.items():
            for name in wanted:
                if not any(f"{module}.".endswith(f".{name}.") for module in found):
                    raise ConfigError(f"adapter.{key}: the model has no module named {name!r} that could be trained")

    # ------------------------------------------------------------------ PiSSA

    def _pissa(self, model: Any, resume: Path | None) -> None:
        """W = U S V^T; A = sqrt(S_r / s) V_r^T, B = U_r sqrt(S_r / s), and the base keeps W - s B A
        (Meng et al., arXiv:2404.02948, eq. 2-4)."""
        from safetensors.torch import load_file

        saved = load_file(resume / PISSA_FILE) if resume is not None else {}
        self._check_pissa(model)
        for name, layer in _lora_layers(model):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            weight, scale = layer.get_base_layer().weight, layer.scaling["default"]
            if saved:
                start_A, start_B = saved[f"{name}.start_A"].to(A), saved[f"{name}.start_B"].to(B)
            else:
                start_A, start_B = self._principal(_oriented(layer, weight).to(A.dtype), scale)
            update = _oriented(layer, scale * (start_B @ start_A))
            weight.data = (weight.data.to(update.dtype) - update).to(weight.dtype)
            A.data, B.data = start_A.clone(), start_B.clone()
            self._pissa_start[name] = (start_A, start_B)

    def _check_pissa(self, model: Any) -> None:
        """Raises ConfigError for what has no principal part to take, or shares its weight with something else."""
        shared = model.get_base_model().get_input_embeddings().weight
        for name, module in model.named_modules():
            if getattr(module, "lora_embedding_A", None):
                raise ConfigError(f"adapter.init: pissa is for linear layers; leave {name} out of the targets")
        for name, layer in _lora_layers(model):
            weight = layer.get_base_layer().weight
            if weight is shared:
                raise ConfigError(
                    f"adapter.init: pissa would change the embeddings that {name} is tied to; leave it out"
                )
            if self.config.rank > min(weight.shape):
                raise ConfigError(f"adapter.rank: {self.config.rank} is more than {name} has ({min(weight.shape)})")

    def _principal(self, W: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        rank = self.config.rank
        if self.config.pissa_iter == -1:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            U, S, V = U[:, :rank], S[:rank], Vh[:rank].T
        else:
            U, S, V = torch.svd_lowrank(W, q=rank, niter=self.config.pissa_iter)
        root = (S / scale).sqrt()
        return (root[:, None] * V.T).contiguous(), (U * root).contiguous()

    def _save_plain(self, model: Any, folder: Path) -> None:
        """s B A - s B0 A0 = s [B, -B0] [A; A0]: one plain LoRA of rank 2 r for the original base, exact."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, layer in _lora_layers(model):
            start_A, start_B = self._pissa_start[name]
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            state[f"{name}.lora_A.weight"] = torch.cat([A, start_A])
            state[f"{name}.lora_B.weight"] = torch.cat([B, -start_B], dim=1)
        config = type(model.peft_config["default"])(**model.peft_config["default"].to_dict())
        config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
        config.r, config.inference_mode = 2 * config.r, True
        config.save_pretrained(str(folder))
        state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """(name in the saved file, layer) of every linear layer with an update."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield name, module


def _oriented(layer: Any, weight: Tensor) -> Tensor:
    """GPT-2's Conv1D stores its weight transposed."""
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight
