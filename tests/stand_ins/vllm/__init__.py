"""A stand-in for vLLM: what Tunery uses of it, with the signatures of vLLM 0.33.0 (entrypoints/llm.py,
engine/arg_utils.py, sampling_params.py, outputs.py, v1/worker/gpu_worker.py, v1/executor/uniproc_executor.py,
platforms/__init__.py), on a transformers model of its own.

Only a test's sys.path has it. It is as strict as the original where that matters: its weights are random until
`reload_weights` brings them, under a checkpoint's names and in its shapes, rounded to its own dtype; what was loaded
and what its prefix cache remembers is gone after a sleep of level 2; log-probabilities are "raw" or "processed";
requests stop where SamplingParams says. Its random numbers are HFGenerator's for the same seed and number, so that both
can be compared token for token, which no real engine would allow."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tunery.generate.base import Request, Sampling
from tunery.generate.hf import HFGenerator
from vllm.platforms import current_platform

LOADED: list[LLM] = []  # every engine that was made, the last one last


@dataclasses.dataclass
class SamplingParams:
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            self.temperature = 0.01
        assert not self.stop or self.detokenize, "stop strings are only supported when detokenize is True"
        assert self.seed is None or -(2**63) <= self.seed < 2**63


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclasses.dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


class Worker:
    """The process that holds the weights; here the same one."""

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self.forget()

    def forget(self) -> None:
        """What `load_format="dummy"` leaves, and a sleep of level 2."""
        torch.manual_seed(0)
        for tensor in self.model.state_dict().values():
            tensor.copy_(torch.empty(tensor.shape).uniform_(-1e-3, 1e-3))

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True
    ) -> None:
        assert weights_iterator is not None and weights_path is None and is_checkpoint_format
        own = self.model.state_dict()
        buffered = list(weights_iterator)  # vLLM, too, holds what it is given until a layer is whole
        for name, tensor in buffered:
            if name not in own:
                raise ValueError(f"There is no module or parameter named {name!r} in {type(self.model).__name__}")
            assert own[name].shape == tensor.shape, f"{name}: {tuple(tensor.shape)}"
            assert not tensor.requires_grad
            own[name].copy_(tensor.to(self.dtype))


class _Engine:
    """`llm.llm_engine.engine_core`."""

    def __init__(self, llm: LLM):
        self._llm = llm
        self.engine_core = self

    def shutdown(self, timeout: float | None = None) -> None:
        self._llm.events.append("shutdown")
        self._llm.worker = None


class LLM:
    def __init__(
        self, model: str, *, tokenizer: str | None = None, trust_remote_code: bool = False,
        tensor_parallel_size: int = 1, dtype: str = "auto", revision: str | None = None,
        tokenizer_revision: str | None = None, seed: int = 0,
        gpu_memory_utilization: float = 0.92, load_format: str = "auto", max_model_len: int | None = None,
        logprobs_mode: str = "raw_logprobs", generation_config: str = "auto", enable_sleep_mode: bool = False,
        distributed_executor_backend: str | None = None,
    ):  # fmt: skip
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and tensor_parallel_size == 1
        assert logprobs_mode in ("raw_logprobs", "processed_logprobs") and load_format == "dummy"
        assert dtype in ("float32", "bfloat16", "float16")
        if gpu_memory_utilization > current_platform.free:
            raise ValueError("Free memory on device is less than desired GPU memory utilization")
        self._join(distributed_executor_backend)
        config = AutoConfig.from_pretrained(model)
        assert max_model_len is not None and max_model_len <= config.max_position_embeddings
        self.max_model_len, self.logprobs_mode, self.sleeps = max_model_len, logprobs_mode, enable_sleep_mode
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        own = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self.worker: Worker | None = Worker(own, getattr(torch, dtype))
        self.llm_engine = _Engine(self)
        self.asleep: set[str] = set()
        self.cached: dict[tuple[int, ...], float] = {}
        self.events: list[str] = []
        LOADED.append(self)

    def _join(self, backend: str | None) -> None:
        """One device alone, or one of torchrun's: then all ranks agree on the memory of a cache, all at once."""
        if backend == "uni":
            assert not dist.is_initialized() or dist.get_world_size() == 1
            return
        assert backend == "external_launcher"
        assert int(os.environ["RANK"]) == dist.get_rank() and os.environ["LOCAL_RANK"]
        dist.all_reduce(torch.tensor([1]), op=dist.ReduceOp.MIN)

    # ------------------------------------------------------------ weights and memory

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        assert "weights" not in self.asleep, "weights are written to memory that is not mapped"
        self.events.append(method)
        return [getattr(self.worker, method)(*args, **(kwargs or {}))]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.cached.clear()
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.sleeps and not self.asleep and level == 2 and self.worker is not None
        self.events.append("sleep")
        self.worker.forget()
        self.cached.clear()
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str] | None = None) -> bool:
        assert self.sleeps
        self.events.append(f"wake {tags}")
        self.asleep -= set(tags or ("weights", "kv_cache"))
        return not self.asleep

    # ------------------------------------------------------------ answers

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert not self.asleep and not torch.is_autocast_enabled("cpu")
        assert len(prompts) == len(sampling_params) and self.worker is not None
        self.events.append("generate")
        return [
            RequestOutput(str(i), prompt["prompt_token_ids"], [self._answer(prompt["prompt_token_ids"], params)], True)
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    def _answer(self, prompt: list[int], params: SamplingParams) -> CompletionOutput:
        assert self.worker is not None and params.ignore_eos and params.seed is not None and params.max_tokens
        assert len(prompt) + params.max_tokens <= self.max_model_len
        self._remember(prompt)
        generator = HFGenerator(self.worker.model, self.tokenizer)
        generator.end_ids = set(params.stop_token_ids or ())
        sampling = Sampling(
            max_new_tokens=params.max_tokens, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k,
            repetition_penalty=params.repetition_penalty, stop=list(params.stop or ()), seed=params.seed >> 31,
        )  # fmt: skip
        (made,) = generator.generate([Request(ids=prompt, number=params.seed % 2**31)], sampling)
        logps = self._logprobs(prompt, made.ids, params)
        steps = [{token: Logprob(value)} for token, value in zip(made.ids, logps, strict=True)]
        text = made.text if params.detokenize else ""
        return CompletionOutput(
            0, text, made.ids, sum(logps), steps if params.logprobs is not None else None, made.finish
        )

    def _remember(self, prompt: list[int]) -> None:
        """A prefix cache that was not reset would answer with what earlier weights made of the prompt."""
        assert self.worker is not None
        now = sum(float(parameter.detach().double().sum()) for parameter in self.worker.model.parameters())
        assert self.cached.setdefault(tuple(prompt), now) == now, "the prefix cache is of other weights"

    def _logprobs(self, prompt: list[int], ids: list[int], params: SamplingParams) -> list[float]:
        assert self.worker is not None
        with torch.no_grad():
            logits_TV = self.worker.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
        if self.logprobs_mode == "processed_logprobs":
            # vLLM's would be normalised over what these leave, which is not what Tunery asks for.
            assert not params.top_k and params.top_p == 1.0 and params.repetition_penalty == 1.0
            logits_TV = logits_TV / (params.temperature or 1.0)
        return logits_TV.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
