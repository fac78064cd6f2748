"""The micro-batch and the rung of a run: the fastest that fits."""

from __future__ import annotations

from tunery.devices import Device
from tunery.job import Job
from tunery.models.load import load_config
from tunery.models.rungs import RUNGS
from tunery.plan.closed_form import kept_numbers
from tunery.plan.planner import STEP, Planner, dtype_on, experts_of, layer_parameters, most_tokens
from tunery.plan.work import Rows

NEARLY = 1.02  # of two times that differ by less, neither is the shorter


def choose(job: Job, rows: Rows, device: Device, world: int = 1) -> tuple[int, str]:
    """(train.micro_tokens, train.checkpointing) for `job` on `device`, whatever of them the job leaves open: the
    fastest that fits, of as many tokens as keep the device busy. Where nothing fits, what comes nearest. A function of
    its arguments alone (and of this machine's rates, which are measured once). Raises ModelError and ConfigError for a
    model or an adapter that cannot be."""
    train = job.train
    most = most_tokens(job, rows, device)
    rungs = rungs_of(job, device)
    if (train.micro_tokens and len(rungs) == 1) or roughly(job, most, device) < device.memory // 2:
        return most, rungs[0]
    return best(Planner(job, rows, device, world), rungs)


def best(planner: Planner, rungs: tuple[str, ...]) -> tuple[int, str]:
    """Of the largest micro-batch on each rung, the fastest; what keeps more where two are nearly as fast. Recomputing
    pays where a rung that keeps more leaves room for small micro-batches only."""
    found: list[tuple[float, int, str]] = []
    for rung in rungs:
        tokens = largest(planner, rung)
        if tokens is None:
            continue
        if not found or planner.seconds(tokens, rung) * NEARLY < found[-1][0]:
            found.append((planner.seconds(tokens, rung), tokens, rung))
        if tokens == planner.most:  # the rungs below make more again, of micro-batches that are no larger
            break
    return found[-1][1:] if found else (least(planner), rungs[-1])


def largest(planner: Planner, rung: str) -> int | None:
    """The largest micro-batch that fits on a rung, None where not even the smallest does: looked for on the line, and
    then made smaller until the real one fits."""
    room, low, tokens = planner.device.memory, least(planner), planner.most
    if planner.about(tokens, rung) > room:
        below, above = low, tokens
        while above - below > STEP:
            middle = (below + above) // 2
            below, above = (middle, above) if planner.about(middle, rung) <= room else (below, middle)
        tokens = max(low, below // STEP * STEP)
    while planner.memory(tokens, rung).total > room:
        if tokens == low:
            return None
        tokens = max(low, tokens * 31 // 32)
    return tokens


def least(planner: Planner) -> int:
    """The smallest micro-batch there is any use in: the longest example. One that the job fixes is the smallest too."""
    if planner.job.train.micro_tokens is not None:
        return planner.most
    return max(8, min(planner.most, int(planner.rows.lengths.max())))


def rungs_of(job: Job, device: Device) -> tuple[str, ...]:
    """The rungs a job leaves open on a device, fastest first."""
    if job.train.checkpointing != "auto":
        return (job.train.checkpointing,)
    return RUNGS[:-1] if device.kind == "cpu" else RUNGS


def roughly(job: Job, tokens: int, device: Device) -> int:
    """Bytes that a run would hardly take, from config.json at a glance: to see that a small model fits easily without
    running it on shapes. Parameters at 16 bytes; twice what eager code keeps of a layer's token, and every score of
    attention that is written out."""
    config = load_config(job.model).get_text_config()
    layers = config.num_hidden_layers
    parameters = layers * layer_parameters(config, experts_of(config)) + 2 * config.vocab_size * config.hidden_size
    width = dtype_on(job.model.dtype, device).itemsize
    per_layer = width * 2 * kept_numbers(config)
    if getattr(config, "attn_logit_softcapping", None):
        per_layer += 4 * width * config.num_attention_heads * job.data.max_length
    return device.overhead + 16 * parameters + tokens * layers * per_layer
