"""Generation with a transformers model in this process: batched, with a key-value cache, reproducible.

Suffixes: B rows of a batch, P prompt tokens (left-padded), V vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tunery.errors import ModelError
from tunery.generate.base import Request, Sampling
from tunery.generate.detokenize import TextStream, decode
from tunery.generate.exchange import completion_of, context_of, ends_of, limit_of, numbers_of, prompts_of
from tunery.models.parts import unwrap
from tunery.types import Completion

MAX_ROWS = 256


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """The model ready for generation, and as it was again afterwards: evaluation mode in every module, and an
    attention implementation that takes padded batches and a cache (training uses the packed hook "tunery", which
    does not). Models with soft-capped scores or attention sinks get "eager": "sdpa" leaves both out."""
    base = unwrap(model)
    before = base.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    text = base.config.get_text_config(decoder=True)
    wanted = "sdpa" if before == "tunery" else before
    if wanted == "sdpa" and getattr(text, "attn_logit_softcapping", None):
        wanted = "eager"
    model.eval()
    try:
        _set_attention(base, wanted)
        yield
    finally:
        _set_attention(base, before)
        for module in training:
            module.training = True


def _set_attention(base: PreTrainedModel, wanted: str | None) -> None:
    if wanted is None or base.config._attn_implementation == wanted:
        return
    try:
        base.set_attn_implementation(wanted)
    except (ValueError, ImportError):
        if wanted == "eager":
            raise
        base.set_attn_implementation("eager")


def choose(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None, uniforms_B: Tensor) -> Tensor:
    """The next token of each row, int64 [B].

    In this order: repetition penalty (Keskar et al., arXiv:1909.05858, eq. 5's sign-aware form: positive logits are
    divided, negative ones multiplied), temperature, top-k, top-p (Holtzman et al., arXiv:1904.09751: the smallest
    set whose probability reaches p). A row is drawn by inverting its cumulative distribution at its own uniform
    number, so that a row's draw does not depend on the other rows. `seen_BV` is True for tokens the row has."""
    logits_BV = logits_BV.float()
    if seen_BV is not None:
        penalised = torch.where(
            logits_BV > 0, logits_BV / sampling.repetition_penalty, logits_BV * sampling.repetition_penalty
        )
        logits_BV = torch.where(seen_BV, penalised, logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    if not sampling.top_k and sampling.top_p == 1:  # nothing is left out, so nothing has to be in order
        return _drawn((logits_BV / sampling.temperature).softmax(-1), uniforms_B)
    logits_BV, order_BV = torch.sort(logits_BV / sampling.temperature, dim=-1, descending=True, stable=True)
    if sampling.top_k:
        logits_BV, order_BV = logits_BV[:, : sampling.top_k], order_BV[:, : sampling.top_k]
    probs_BV = logits_BV.double().softmax(-1)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    probs_BV = probs_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    return order_BV.gather(-1, _drawn(probs_BV, uniforms_B)[:, None])[:, 0]


def _drawn(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Places drawn by their probabilities (which need not sum to 1), int64 [B]."""
    cumulative_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    whole_B1 = cumulative_BV[:, -1:].contiguous()
    place_B1 = torch.searchsorted(cumulative_BV, uniforms_B.to(cumulative_BV)[:, None] * whole_B1, right=True)
    # Rounding may put the number at the very end, past the last place that has a probability: the first that has all.
    return torch.minimum(place_B1, torch.searchsorted(cumulative_BV, whole_B1))[:, 0]


def logps_of(logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
    """Log-probability of each row's token at a temperature (0: at 1, since the likeliest token has no odds): float32 or
    wider, [B]."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)) / (temperature or 1.0)
    return logits_BV.gather(-1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)


@dataclass(slots=True)
class _Row:
    """One request on its way: `ids` grows until `finish` is set. `text` is kept up only where there is a `stream`."""

    index: int
    prompt: list[int]
    limit: int
    uniforms: np.random.Generator
    stream: TextStream | None = None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish: str = ""

    def add(self, token: int, end_ids: set[int], stops: Sequence[str]) -> None:
        self.ids.append(token)
        if token in end_ids:
            self.finish = "stop"
        elif len(self.ids) >= self.limit:
            self.finish = "length"
        if self.stream is None:
            return
        new = "" if self.finish == "stop" else self.stream.push(token)
        if self.finish:
            new += self.stream.flush()
        self.text += new
        if new and stops:
            begin = max(0, len(self.text) - len(new) - max(map(len, stops)) + 1)
            found = [at for at in (self.text.find(stop, begin) for stop in stops) if at >= 0]
            if found:
                self.text, self.finish = self.text[: min(found)], "stop"


class HFGenerator:
    """Answers requests with a transformers model, plain or wrapped by PEFT.

    `template` turns messages into prompts and says which tokens end an answer (`end_ids`); None will do for requests
    that are token ids (the tokenizer's end-of-sequence token ends them). `batch_tokens` bounds a batch: rows x
    (longest prompt + max_new_tokens); a batch that still does not fit the device's memory is halved. `logps`: have each
    Completion say what probability its tokens had."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: Any = None,
        *,
        batch_tokens: int = 16384,
        logps: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.batch_tokens = batch_tokens
        self.logps = logps
        self.end_ids = ends_of(template, tokenizer)
        base = unwrap(model)
        accepted = inspect.signature(base.forward).parameters
        learned_prompt = any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values())
        # Without a cache each step recomputes a whole row: slow, but right for every family.
        self.cached = "past_key_values" in accepted and not learned_prompt
        self.positions = "position_ids" in accepted
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.context = context_of(base)

    # ------------------------------------------------------------ the two ways to ask

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions as their batches finish, longest prompts first (so that what does not fit shows at once).
        Raises ModelError naming the request for a prompt that does not fit the model's context."""
        asked = list(requests)
        rows = [self._row(i, ids, sampling) for i, ids in zip(numbers_of(asked), self.prompts(asked), strict=True)]
        pending = self._batches(rows)[::-1]
        while pending:
            rows = pending.pop()
            try:
                with generating(self.model):
                    for _ in self._steps(rows, sampling):
                        pass
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise ModelError(
                        f"request {rows[0].index + 1}: not enough device memory for {len(rows[0].prompt)} prompt "
                        f"tokens and up to {rows[0].limit} new ones; lower max_new_tokens or shorten the prompt"
                    ) from None
                torch.cuda.empty_cache()
                fresh = [self._row(row.index, row.prompt, sampling) for row in rows]
                pending += [fresh[len(fresh) // 2 :], fresh[: len(fresh) // 2]]
                continue
            for row in rows:
                yield self._completion(row)

    def stream(self, request: Request, sampling: Sampling) -> Generator[str, None, Completion]:
        """One answer's text in pieces of whole characters; joined they are the text of the Completion that the iterator
        returns. A stop text is not given out, nor what may yet become one. Close the iterator to stop generating."""
        row = self._row(0, self.prompts([request])[0], sampling)
        row.stream = TextStream(self.tokenizer)
        hold = max((len(stop) for stop in sampling.stop), default=1) - 1
        shown = 0
        with generating(self.model):
            for _ in self._steps([row], sampling):
                ready = len(row.text) - (0 if row.finish else hold)
                if ready > shown:
                    yield row.text[shown:ready]
                    shown = ready
        return self._completion(row)

    def prompts(self, requests: Sequence[Request]) -> list[list[int]]:
        """The token ids each request is answered from. Raises ModelError where there is nothing to go on from."""
        return prompts_of(requests, self.template)

    def sync(self) -> None:
        """Nothing to do: the model itself answers."""

    def close(self) -> None:
        """Nothing to give back."""

    # ------------------------------------------------------------ rows and batches

    def _row(self, index: int, prompt: list[int], sampling: Sampling) -> _Row:
        return _Row(
            index=index,
            prompt=prompt,
            limit=limit_of(index, prompt, self.context, sampling),
            uniforms=np.random.default_rng([sampling.seed, index]),
            stream=TextStream(self.tokenizer) if sampling.stop else None,
        )

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        """Longest first, each batch of near-equal lengths and at most `batch_tokens` large (one row always fits)."""
        batches: list[list[_Row]] = []
        for row in sorted(rows, key=lambda row: -len(row.prompt)):
            batch = batches[-1] if batches else []
            size = (len(batch) + 1) * (len(batch[0].prompt) + batch[0].limit) if batch else 0
            if not batch or size > self.batch_tokens or len(batch) >= MAX_ROWS or not self.cached:
                batches.append([row])
            else:
                batch.append(row)
        return batches

    def _completion(self, row: _Row) -> Completion:
        if row.stream is None:
            ended = row.finish == "stop"
            row.text = decode(self.tokenizer, row.ids[:-1] if ended else row.ids)
        return completion_of(row.index, row.ids, row.text, row.finish, row.logps, self.template, self.end_ids)

    # ------------------------------------------------------------ the loop

    def _steps(self, rows: list[_Row], sampling: Sampling) -> Iterator[None]:
        """Generates until every row has finished, yielding after each token. Rows that have finished are taken out
        of the batch once they are a quarter of it: selecting from the cache costs about as much as a step."""
        state = _State(self, rows, sampling) if self.cached else None
        alive = list(rows)
        while alive:
            with torch.no_grad():
                logits_BV = state.forward() if state else self._uncached(alive)
                tokens_B = self._pick(logits_BV, alive, sampling)
                tokens = tokens_B.tolist()
                logps = logps_of(logits_BV, tokens_B, sampling.temperature).tolist() if self.logps else None
            for number, row in enumerate(alive):
                if not row.finish:
                    row.add(tokens[number], self.end_ids, sampling.stop)
                    if logps is not None:
                        row.logps.append(logps[number])
            keep = [i for i, row in enumerate(alive) if not row.finish]
            if keep and state is not None:
                if len(keep) > 0.75 * len(alive):
                    keep = list(range(len(alive)))
                state.next(tokens, keep)
            alive = [alive[i] for i in keep]
            yield

    def _uncached(self, alive: list[_Row]) -> Tensor:
        (row,) = alive
        ids_1T = torch.tensor([row.prompt + row.ids], device=unwrap(self.model).device)
        return self.model(input_ids=ids_1T, **self.last_only).logits[:, -1]

    def _pick(self, logits_BV: Tensor, alive: list[_Row], sampling: Sampling) -> Tensor:
        if bool(logits_BV.isnan().any()):
            raise ModelError(
                f"request {alive[0].index + 1} (or one beside it): the model's output is not a number; its weights are "
                "damaged, or the precision too low (try dtype float32)"
            )
        seen_BV = None
        if sampling.repetition_penalty != 1.0:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            for i, row in enumerate(alive):
                seen_BV[i, torch.tensor(row.prompt + row.ids, device=seen_BV.device)] = True
        uniforms_B = torch.tensor([row.uniforms.random() for row in alive], dtype=torch.float64)
        return choose(logits_BV, sampling, seen_BV, uniforms_B.to(logits_BV.device))


class _State:
    """The batch on the device: what goes into the next forward, the mask so far, the cache. A prompt that several rows
    have runs once; each of them goes on from a copy of what it left in the cache (`spread`: the prompt of each row)."""

    def __init__(self, generator: HFGenerator, rows: list[_Row], sampling: Sampling):
        self.generator = generator
        base = unwrap(generator.model)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(tuple(row.prompt) for row in rows))}
        longest = max(map(len, numbers))
        pad = generator.tokenizer.pad_token_id or 0  # masked, so any token will do
        lines = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in numbers]
        masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in numbers]
        places = torch.tensor([numbers[tuple(row.prompt)] for row in rows], device=base.device)
        self.spread = places if len(numbers) < len(rows) else None
        self.ids_BP = torch.tensor(lines, device=base.device)
        self.mask_BP = torch.tensor(masks, device=base.device)
        self.positions_BP = (self.mask_BP.cumsum(-1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=base.config)

    def forward(self) -> Tensor:
        """Logits of the next token, [B, V]."""
        options: dict[str, Any] = dict(self.generator.last_only)
        if self.generator.positions:
            options["position_ids"] = self.positions_BP
        output = self.generator.model(
            input_ids=self.ids_BP, attention_mask=self.mask_BP, past_key_values=self.cache, use_cache=True, **options
        )
        logits_BV = output.logits[:, -1]
        if self.spread is not None:
            spread_B, self.spread = self.spread, None
            self.cache.reorder_cache(spread_B)  # type: ignore[arg-type]  # an index_select over rows, which may repeat some
            logits_BV = logits_BV[spread_B]
            self.ids_BP, self.mask_BP = self.ids_BP[spread_B], self.mask_BP[spread_B]
            self.positions_BP = self.positions_BP[spread_B]
        return logits_BV

    def next(self, tokens: list[int], keep: list[int]) -> None:
        """Goes on with `tokens`, in the rows numbered in `keep` only."""
        ids_B = torch.tensor(tokens, device=self.ids_BP.device)
        if len(keep) < len(tokens):
            keep_B = torch.tensor(keep, device=ids_B.device)
            self.cache.reorder_cache(keep_B)  # type: ignore[arg-type]  # an index_select over rows, which may leave some out
            ids_B, self.mask_BP, self.positions_BP = ids_B[keep_B], self.mask_BP[keep_B], self.positions_BP[keep_B]
        self.ids_BP = ids_B[:, None]
        self.mask_BP = torch.cat([self.mask_BP, self.mask_BP.new_ones(len(keep), 1)], dim=-1)
        self.positions_BP = self.positions_BP[:, -1:] + 1
