"""When a loss or gradient is not finite: stop before the update, say where it began, and keep what replays it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunery.errors import TuneryError
from tunery.types import Batch, Objective, Policy

RECORD, BATCHES = "failure.json", "batches.pt"
# Numbers in a tensor, on average, from which a CPU updates it with all of its threads: LOG.md, 2026-11-20.
SMALL = 1 << 16


class Gate:
    """Lets an optimizer move only while losses and gradients are finite.

    torch's fused optimizers look at a `found_inf` on the device, made for torch.amp.GradScaler: where it is 1 they
    leave weights, moments and step count as they are, and nobody has to wait to know. Once shut, the gate stays shut:
    when the numbers of the step that shut it are read, the weights are still those it began with. `shut`: a float32
    scalar, 0 or 1. For an optimizer without `found_inf` the answer is waited for, at every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.optimizer: Any = optimizer
        self.shut = torch.zeros((), device=device)
        self.on_device = getattr(optimizer, "_step_supports_amp_scaling", False)  # as GradScaler asks

    def make_moments(self, parameters: Sequence[Tensor]) -> None:
        """Have the optimizer make what it keeps of each parameter, as its first update would, and move nothing. One
        without `found_inf` makes it when it comes to that."""
        if not self.on_device or self.optimizer.state:
            return
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.found_inf = torch.ones_like(self.shut)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, bad: Tensor) -> None:
        """Update the weights, unless `bad` (a scalar, 0 for a good step) is or was not 0."""
        self.shut = torch.maximum(self.shut, (bad != 0).to(self.shut.dtype))
        if self.on_device:
            self.optimizer.found_inf = self.shut
        elif self.shut.item():
            return
        with _one_thread(self.shut.device.type == "cpu" and self._small()):
            self.optimizer.step()

    def _small(self) -> bool:
        """Whether the tensors that move are so small that to wake the other threads for each takes longer."""
        sizes = [parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"]]
        return sum(sizes) < SMALL * len(sizes)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    if not wanted or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Finding:
    """What one micro-batch does. `module`: the first one whose output (or parameter, or gradient) is not finite, and
    `where` says which of these; None when all is finite. `rows`: the examples of the stream."""

    stream: int
    loss: float
    module: str | None
    where: str
    rows: list[int]

    def __str__(self) -> str:
        if self.module is None:
            return f"stream {self.stream}: loss sum {self.loss:.6g}, all finite"
        return f"stream {self.stream}: loss sum {self.loss:.6g}; first not finite: the {self.where} of {self.module}"


def investigate(
    model: nn.Module, objective: Objective, policy: Policy, batches: Sequence[Batch], seed: Callable[[], None]
) -> list[Finding]:
    """Run each micro-batch again, watching every module. `seed` puts the step's randomness back."""
    broken = next((n for n, p in model.named_parameters() if not p.isfinite().all()), None)
    findings = []
    seed()
    for number, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        with _watch(model) as seen:
            loss = objective.loss(policy, batch).sum
        module, where = (broken, "parameter") if broken else (seen[0], "output") if seen else (None, "")
        if module is None and not loss.isfinite():
            module, where = "the loss", "value"
        if module is None:
            loss.backward()
            bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            module, where = (bad[-1], "gradient") if bad else (None, "")  # the backward met the last one first
        findings.append(Finding(number, float(loss.detach()), module, where, sorted(set(batch.rows))))
    model.zero_grad(set_to_none=True)
    return findings


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules in the order in which their outputs stop being finite."""
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            # detached: what is recomputed in the backward would otherwise save another number of tensors than here
            if isinstance(first, Tensor) and first.is_floating_point() and not first.detach().isfinite().all():
                seen.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def keep_failure(
    folder: Path,
    step: int,
    ranks: Sequence[tuple[list[Finding], list[dict[str, Any]]]],
    origins: dict[int, str],
    objective: dict[str, Any] | None = None,
) -> None:
    """Write what `replay` needs: each rank's streams as they were (`as_dict`), what was found, and what the objective
    remembered (its state). The weights are saved beside them by the caller, as in a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save([batches for _, batches in ranks], folder / BATCHES)
    where = {str(row): origin for row, origin in origins.items()}
    found = [[asdict(finding) for finding in findings] for findings, _ in ranks]
    (folder / RECORD).write_text(
        json.dumps({"step": step, "findings": found, "origins": where, "objective": objective}, indent=1)
    )


def load_failure(folder: Path) -> tuple[dict[str, Any], list[list[Batch]]]:
    """What `keep_failure` wrote: the record, and each rank's streams. Raises TuneryError when there is none."""
    try:
        record = json.loads((folder / RECORD).read_text())
        saved = torch.load(folder / BATCHES, weights_only=True)
        return record, [[Batch(**batch) for batch in batches] for batches in saved]
    except (OSError, ValueError, TypeError) as error:
        raise TuneryError(f"{folder}: holds no failure to replay ({error})") from error


def as_dict(batch: Batch) -> dict[str, Any]:
    """A batch as plain values on the CPU."""
    batch = batch.to("cpu")
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def explain(step: int, findings: Sequence[Finding], origins: dict[int, str], run: Path) -> str:
    """The error message for a person."""
    bad = [f for f in findings if f.module is not None] or list(findings)
    lines = [f"step {step}: the loss or gradient is not finite; the weights were not updated"]
    for finding in bad[:3]:
        rows = ", ".join(origins.get(row, f"example {row}") for row in finding.rows[:4])
        more = f" and {len(finding.rows) - 4} more" if len(finding.rows) > 4 else ""
        lines.append(f"  {finding}; rows: {rows}{more}")
    if all(f.module is None for f in findings):
        lines.append("  every stream is finite alone: their sum overflowed; try a lower learning rate or max_grad_norm")
    lines.append(
        f"  run `tunery replay {run}` to see it again; usual causes: a learning rate too high, float16 weights"
    )
    return "\n".join(lines)
