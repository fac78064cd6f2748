"""Generation by a vLLM engine in this process, beside the model: it has weights of its own, which are given to it.

Written against the source of vLLM 0.33.0 and tested with a stand-in that has its signatures. No real engine and no GPU
has run it. What of vLLM is relied on:

- `LLM(load_format="dummy")` makes an engine without reading weights, and the worker's `reload_weights` takes tensors
  under the names of the family's checkpoints. In one process (VLLM_ENABLE_V1_MULTIPROCESSING=0) they are handed over
  as they are, one layer at a time. `reset_prefix_cache` forgets what earlier weights made of the prompts.
- Log-probabilities are "raw", of the logits before temperature, penalties, top-k and top-p; or "processed", after all
  of them: what top-k and top-p leave is normalised anew. A Completion's are at the temperature and before top-k and
  top-p, so one of the two has them wherever the temperature is 1 or nothing is left out, and neither elsewhere.
- A request's `seed` is of its own random numbers. Its logits are rounded by kernels that may choose another order for
  another batch, so unlike HFGenerator's an answer may depend on its neighbours by rounding.
- With several ranks each has an engine of one device ("external_launcher": the ranks' process group and LOCAL_RANK are
  torchrun's)."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tunery.errors import ConfigError, ModelError
from tunery.generate.base import Request, Sampling
from tunery.generate.detokenize import decode
from tunery.generate.exchange import completion_of, context_of, ends_of, limit_of, numbers_of, prompts_of
from tunery.models.load import ModelConfig, base_source, resolve_name
from tunery.models.parts import unwrap
from tunery.models.weights import checkpoint_weights, ties_apart
from tunery.types import Completion

COLDEST = 0.01  # vLLM samples at this temperature where it is asked for a lower one
DTYPES = ("bfloat16", "float16", "float32")


def check(sampling: Sampling, dtype: str) -> None:
    """Raises ConfigError where vLLM cannot answer like that and say the probabilities. `dtype`: model.dtype. Loads
    nothing, and needs no vLLM."""
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"model.dtype: {dtype}, but vLLM computes in {', '.join(DTYPES)}; use rollout.generator: hf")
    if 0 < sampling.temperature < COLDEST:
        raise ConfigError(f"rollout.temperature: {sampling.temperature}, but vLLM samples at {COLDEST} at least")
    logprobs_mode(sampling)


def check_installed() -> None:
    """Raises ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("rollout.generator: vllm is not installed. Install it with: pip install 'tunery[vllm]'")


def check_device(kind: str) -> None:
    """Raises ConfigError where the vLLM that is installed does not run on this kind of device ("cuda", "cpu")."""
    try:
        from vllm.platforms import current_platform  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(f"rollout.generator: vllm is installed and cannot be imported: {error}") from error
    if current_platform.device_type != kind:
        there = f"is for {current_platform.device_type}" if current_platform.device_type else "finds no device for it"
        raise ConfigError(
            f"rollout.generator: the policy trains on {kind}, and the vllm that is installed {there}; use "
            "rollout.generator: hf"
        )


def logprobs_mode(sampling: Sampling) -> str:
    """Which of vLLM's log-probabilities are those of a Completion. Raises ConfigError where none is."""
    if sampling.temperature in (0.0, 1.0):
        return "raw_logprobs"
    if sampling.top_k or sampling.top_p < 1.0 or sampling.repetition_penalty != 1.0:
        raise ConfigError(
            f"rollout.temperature: {sampling.temperature} with top_k or top_p: vLLM then gives no probability from "
            "before they left tokens out; set the temperature to 1, leave nothing out, or use rollout.generator: hf"
        )
    return "processed_logprobs"


def request_seed(seed: int, number: int) -> int:
    """A seed of 63 bits for the answer of this number: no two of a rollout have the same."""
    return seed % 2**32 << 31 | number % 2**31


class VLLMGenerator:
    """Answers requests with a vLLM engine that is given the weights of `model`, plain or wrapped by PEFT, in `sync`. It
    has none before the first.

    `template` as HFGenerator's. `source`: the model as it is named, for its configuration and tokenizer; `dtype` of the
    engine's weights and arithmetic; `world`: the ranks, each of which makes an engine at the same time; `longest`: of
    prompt and answer together, in tokens; `memory`: the share of the device's that the engine takes; `sleeps`: it gives
    that back after each `generate` and takes it again in `sync`. `mode`: of the log-probabilities (logprobs_mode);
    None: Completions say none. Raises ModelError where the engine does not start."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, template: Any, *, source: ModelConfig, dtype: torch.dtype,
        world: int, longest: int, memory: float, sleeps: bool, mode: str | None, seed: int,
    ):  # fmt: skip
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.mode, self.sleeps = mode, sleeps
        self.end_ids = ends_of(template, tokenizer)
        causal = unwrap(model)
        self.device: torch.device = causal.device
        self.context = min(longest, context_of(causal) or longest)
        if ties_apart(model):
            raise ModelError(
                "the adapter changes one of the embeddings, which are one tensor in vLLM; leave them out of the "
                "adapter, or use rollout.generator: hf"
            )
        weights = base_source(source)  # whose shape the policy has; the tokenizer is the named model's
        options: dict[str, Any] = {
            "model": resolve_name(weights.name), "tokenizer": resolve_name(source.name),
            "revision": weights.revision, "tokenizer_revision": source.revision,
            "trust_remote_code": source.trust_remote_code, "load_format": "dummy", "generation_config": "vllm",
            "dtype": str(dtype).removeprefix("torch."), "max_model_len": self.context, "seed": seed,
            "tensor_parallel_size": 1, "gpu_memory_utilization": memory, "enable_sleep_mode": sleeps,
            "distributed_executor_backend": "external_launcher" if world > 1 else "uni",
            **({} if mode is None else {"logprobs_mode": mode}),
        }  # fmt: skip
        self._llm: Any = self._start(options)
        self._asleep = False

    def _start(self, options: dict[str, Any]) -> Any:
        from vllm import LLM  # type: ignore[import-not-found]

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that weights need not be sent
        self._free()
        try:
            return LLM(**options)
        except Exception as error:  # whatever it is, a person can only change the configuration
            raise ModelError(
                f"vLLM did not start: {error}. It was to take {options['gpu_memory_utilization']:.0%} of the device's "
                "memory (rollout.vllm_memory)"
            ) from error

    # ------------------------------------------------------------ weights

    def sync(self) -> None:
        """Give the engine the model's weights, with the adapter merged, rounded once to the engine's dtype. Raises
        ModelError where it does not take them."""
        if self._asleep:
            self._free()
            self._llm.wake_up(tags=["weights"])
        weights = checkpoint_weights(self.model)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # vLLM's loaders raise what they please
            raise ModelError(
                f"vLLM does not take the weights of {type(unwrap(self.model)).__name__}: {error}; use "
                "rollout.generator: hf"
            ) from error
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise ModelError("vLLM still answers earlier requests and keeps what other weights made of their prompts")

    def close(self) -> None:
        """End the engine and give its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()  # an engine refers to itself
            self._free()

    def _free(self) -> None:
        """Leave the device the memory that torch keeps for later: the engine's is not torch's."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------ answers

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions in the order of the requests, once all are there. Raises ModelError, naming the request, for a
        prompt that leaves no room and for an answer that vLLM broke off."""
        self._check(sampling)
        asked = list(requests)
        numbers, prompts = numbers_of(asked), prompts_of(asked, self.template)
        parameters = [self._parameters(number, ids, sampling) for number, ids in zip(numbers, prompts, strict=True)]
        if self._asleep:
            self.sync()
        with torch.autocast(self.device.type, enabled=False):  # the caller's is the training model's
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False
            )  # fmt: skip
        if self.sleeps:
            self._llm.sleep(level=2)  # the weights are given anew in any case
            self._asleep = True
        for number, output in zip(numbers, outputs, strict=True):
            yield self._completion(number, output.outputs[0], sampling)

    def _check(self, sampling: Sampling) -> None:
        """The engine's kind of log-probabilities is fixed. Those of greedy answers are the same in both."""
        greedy = sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0
        if self.mode is not None and not greedy and logprobs_mode(sampling) != self.mode:
            raise ModelError(f"this vLLM engine gives {self.mode}, which are not those of this sampling")

    def _parameters(self, number: int, prompt: list[int], sampling: Sampling) -> Any:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        return SamplingParams(
            max_tokens=limit_of(number, prompt, self.context, sampling), temperature=sampling.temperature,
            top_p=sampling.top_p, top_k=sampling.top_k, repetition_penalty=sampling.repetition_penalty,
            seed=request_seed(sampling.seed, number), stop=sampling.stop, detokenize=bool(sampling.stop),
            stop_token_ids=sorted(self.end_ids), ignore_eos=True,  # no others than HFGenerator ends at
            logprobs=None if self.mode is None else 0,  # 0: of the chosen token alone
        )  # fmt: skip

    def _completion(self, number: int, output: Any, sampling: Sampling) -> Completion:
        ids, finish = list(output.token_ids), str(output.finish_reason)
        if finish not in ("stop", "length"):
            raise ModelError(f"request {number + 1}: vLLM broke the answer off ({finish})")
        logps = []
        if self.mode is not None:
            logps = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
            if not all(map(math.isfinite, logps)):
                raise ModelError(
                    f"request {number + 1}: the model's output is not a number; its weights are damaged, or the "
                    "precision too low (try dtype float32)"
                )
        ended = finish == "stop" and ids[-1] in self.end_ids
        text = decode(self.tokenizer, ids[:-1] if ended else ids)
        text = text[: min((at for at in map(text.find, sampling.stop) if at >= 0), default=len(text))]
        return completion_of(number, ids, text, finish, logps, self.template, self.end_ids)
