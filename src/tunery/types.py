"""The nouns. Data flows down this line and never back:

    row -> Example -> [Tokens] -> Batch -> Objective(policy) -> Loss(sum)

Shape legend, used as suffixes in names everywhere:
    T  tokens of one packed stream        N  labelled rows (weight not 0)       V  vocabulary        H  hidden size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call by the assistant. `arguments` is the parsed JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """The characters start to end (the first one after) of an assistant turn's `field`, "content" or "reasoning", and
    what the loss of their tokens is multiplied by, beside the turn's own weight."""

    start: int
    end: int
    weight: float
    field: str = "content"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is one of ROLES. `weight` scales the loss of an assistant turn (None means 1; 0 means
    shown, not trained) and is meaningless for other roles. `reasoning` is the thinking that precedes `content`.
    `spans`: parts of an assistant turn that weigh more or less than its rest; no two of a field overlap."""

    role: str
    content: str
    weight: float | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning: str | None = None
    spans: tuple[Span, ...] = ()


@dataclass(slots=True)
class Example:
    """One row of data before tokenising: a conversation, or raw `text` (pretraining), never both.

    `rejected` holds the worse final turn(s) of a preference pair (then `messages` ends with the chosen ones),
    `label` a thumbs up or down, `meta` where the row came from: {"file": str, "row": int (1-based)}."""

    messages: list[Message] = field(default_factory=list)
    text: str | None = None
    rejected: list[Message] | None = None
    label: bool | None = None
    tools: list[dict[str, Any]] | None = None
    media: list[Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that cannot be used. `reason` is a short fixed phrase to count by ("no assistant turn"),
    `detail` is for this row alone."""

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Tokens:
    """One sequence, unshifted. `ids` int32 [T]; `weights` float32 [T], the loss weight of each token *as a target*
    (0 = not trained). `extra`: further arrays [T], and `truncated` (True when something was cut to fit)."""

    ids: np.ndarray
    weights: np.ndarray
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> int:
        """Number of trained targets. The first token of a sequence has nothing before it to be predicted from."""
        return int(np.count_nonzero(self.weights[1:]))


@dataclass(slots=True)
class Batch:
    """ONE packed stream of whole sequences, already shifted: position t predicts `targets_T[t]`, and the last
    position of each sequence (which would predict the neighbour's first token) has weight 0.

    The stream is made of pieces. A piece is a sequence, or, where sequences of one example begin alike and that
    beginning is computed once (data/collate.py), the shared beginning, followed by a piece for what each goes on with.

    `ids_T`, `targets_T` int64; `weights_T` float32; `positions_T` int64, the place in the sequence; `cu_seqlens` int32
    [P + 1], cumulative lengths of the P pieces; `max_seqlen` the longest; `labelled_N` int64, the positions of nonzero
    weight; `labelled_S` int64, how many of them each sequence has; `lengths` the pieces' lengths as plain numbers (all
    found here, on the CPU, so that a device never has to be asked); `continues`, of each piece, the number of the piece
    that comes before it in its sequence, or -1 (empty: all are whole sequences); `rows` the example number of each
    sequence (for messages to people); `extra` the sequences' Tokens.extra: an array [T] of each as one tensor [T]
    beside `ids_T`, a number of each as a tensor [S]."""

    ids_T: Tensor
    targets_T: Tensor
    weights_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labelled_N: Tensor
    labelled_S: Tensor
    lengths: list[int]
    continues: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return int(self.ids_T.shape[0])

    @property
    def n_sequences(self) -> int:
        return int(self.labelled_S.shape[0])

    @property
    def ends_S(self) -> Tensor:
        """The position of each sequence's last token, [S]."""
        import torch

        ends = self.cu_seqlens[1:] - 1
        if self.continues:  # chosen by slices, which ask a device nothing
            shared = set(self.continues)
            ends = torch.cat([ends[i : i + 1] for i in range(len(self.lengths)) if i not in shared])
        return ends.long()

    def per_sequence(self, values_T: Tensor) -> Tensor:
        """Sums of a value of each token over the labelled ones of each sequence: [S], with a gradient. A sequence that
        has none gives 0."""
        import torch

        return torch.segment_reduce(values_T[self.labelled_N], "sum", lengths=self.labelled_S, unsafe=True)

    def to(self, device: torch.device | str) -> Batch:
        """The same there. A copy to a device is only begun; one back to the CPU is waited for."""
        begun = str(device) != "cpu"
        return self._each(lambda tensor: tensor.to(device, non_blocking=begun))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a CUDA device copies without anybody waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            return change(value) if hasattr(value, "pin_memory") else value

        values = {field.name: changed(getattr(self, field.name)) for field in fields(self)}
        return Batch(**{**values, "extra": {name: changed(value) for name, value in self.extra.items()}})


@dataclass(slots=True)
class Loss:
    """`sum`: scalar tensor with a gradient, a SUM over the batch and never a mean. `metrics`: name -> (sum, weight),
    both detached, so that reducing them over micro-batches and ranks is exact."""

    sum: Tensor
    metrics: dict[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)


@dataclass(slots=True)
class Completion:
    """What a generator made of one request. `finish` is "stop" (an end token) or "length". `logps`, where the generator
    was asked for them: the log-probability it gave each of `ids` at the sampling's temperature, before top-k and
    top-p."""

    index: int
    ids: list[int]
    text: str
    finish: str
    message: Message | None = None
    logps: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """A completion as a reward sees it (rewards/): the conversation it answers, its `text`, its tokens `ids` (the end
    token included), how it ended (`finish` as Completion's), and what the row says of it: `ground_truth`, and all its
    `columns`. `where` is the row's file:row."""

    prompt: Sequence[Message]
    text: str
    ids: Sequence[int]
    finish: str
    ground_truth: Any = None
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(slots=True)
class Sample:
    """One completion of a rollout. `row`: the number of its example; `tokens`: the prompt's ids and the completion's
    exactly as generated, with weight 1 on the completion, and in `extra` what is known of each token. `rewards` by name
    (None where a reward does not apply), `reward` their weighted sum (None where none applies)."""

    row: int
    tokens: Tokens
    answer: Answer
    rewards: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None


class Template(Protocol):
    """Messages to tokens and back. See data/template.py."""

    def encode(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, train: str = "answers"
    ) -> list[Tokens]: ...

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]: ...

    def parse(self, ids: Sequence[int]) -> Message: ...


class Policy(Protocol):
    """The model as an objective may see it. See policy.py."""

    longest: int | None  # tokens of a sequence that the run and the model's context have room for

    def nll(self, batch: Batch) -> Tensor:
        """sum_t weights_T[t] * -log p(targets_T[t] | before), a scalar; its gradient is made in the forward."""
        ...

    def token_losses(self, batch: Batch, dft: bool = False, z_loss: float = 0.0) -> Any:
        """nll's relatives, (total, nll, squares) as kernels/linear_cross_entropy.py's TokenLosses has them; only
        `total` has a gradient."""
        ...

    def logps(self, batch: Batch) -> Tensor:
        """log p of each target, float32 [T]; 0 where the weight is 0. Takes any upstream gradient."""
        ...

    def reference_logps(self, batch: Batch) -> Tensor:
        """The same by the policy as it stood when training began, without a gradient. For objectives that say so
        (`reference = True`)."""
        ...

    def routing(self) -> Any:
        """A context around a forward: a list that fills with its routers' logits, [T, experts] each."""
        ...

    @property
    def experts_per_token(self) -> int: ...

    def lazy_logits(self, batch: Batch) -> Any:
        """The labelled rows' logits as kernels/divergence.py's LazyLogits: made in chunks where they are needed."""
        ...

    def teacher_logits(self, batch: Batch) -> Any:
        """The same of another model, without a gradient. For objectives that name one (`teacher`)."""
        ...

    def logps_and_values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logps`, and a number for each labelled position from a head beside the model, or with an adapter of its own
        (0 elsewhere), float32 [T] each. For objectives that say so (`value_head = True`, and `critic = True`)."""
        ...

    def values(self, batch: Batch, at: Tensor | None = None) -> Tensor:
        """A number for each position, float32 [T], or for those `at` [N] alone, [N], from a head of its own. For
        objectives that say so (`head = "score"`)."""
        ...


class Objective(Protocol):
    """One file in objectives/ each: a `Config` and a class `Objective(config)` with these methods. What else one needs
    or offers it says by an attribute, which is looked for where it matters:

    reference = True       policy.reference_logps (reference.py)         head = "score"     a scalar head: policy.values
    value_head = True      policy.logps_and_values (ppo)                 its Config's teacher: policy.teacher_logits
    critic = True          of these, values that share nothing with the policy but the base (critic.py)
    pairs = True           two answers a row, for those who show them    unused(example)    what of a row is left out
    generates = True       rows are prompts, steps are rollouts: judge, measure, least_group, needs_rewards (rollout/)
    observe, take_in, companions, only_training                          numbers of a whole step (observe.py)
    state, load_state                                                    what a checkpoint has to hold of it"""

    def rows(self, examples: Sequence[Example], template: Any) -> list[list[Tokens] | Refused]:
        """Each example's sequences, which will share a stream, or why it cannot be used."""
        ...

    def weight(self, batch: Batch) -> Tensor:
        """This batch's share of the optimizer step (labelled weight, or pairs), from data alone: a scalar."""
        ...

    def loss(self, policy: Policy, batch: Batch) -> Loss:
        """The loss summed over the batch. The engine divides once by the step's total weight."""
        ...
