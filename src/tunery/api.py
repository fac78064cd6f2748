"""The Python face: `tunery.train(config)`, and `tunery.Tuner("model").load_jsonl("x.jsonl").train().chat("hi")`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunery.config import validate
from tunery.config_file import apply_overrides
from tunery.errors import ConfigError
from tunery.job import Job, load_job
from tunery.loop import Result, run_job
from tunery.types import Message


def train(config: str | Path | Mapping[str, Any] | Job, *overrides: str, console: Any = None) -> Result:
    """Train from a YAML or JSON file, a mapping of the same shape, or a Job. `overrides` are "key.sub=value" words as
    on the command line. Returns the Result: the run folder `output`, its `metrics` (all_results.json) and the `step`
    whose weights it holds. Raises ConfigError, DataError, ModelError and the other errors of tunery.errors."""
    return run_job(load_job(config, overrides), console)


class Tuner:
    """A model on its way: configure, load rows, train, talk. Every method that changes it returns it.

    >>> tuner = Tuner("builtin:tiny", output="runs/mine").load_jsonl("rows.jsonl").train(epochs=3)
    >>> print(tuner.chat("Hello"))
    """

    def __init__(self, model: str = "builtin:tiny", *, output: str = "runs/tuner", **sections: Any):
        """`model` is built in, a folder or a hub name. `sections` are those of the YAML file, as mappings or short
        names: `adapter={"kind": "lora", "rank": 16}`, `objective="sft"`."""
        self._values: dict[str, Any] = {"model": model, "output": output, **sections}
        self._loaded: Any = None
        self.result: Result | None = None

    def set(self, **keys: Any) -> Tuner:
        """Set keys by their dotted names with the dots as double underscores: `set(optimizer__lr=1e-4)`."""
        for key, value in keys.items():
            parents = key.split("__")
            # an override's text is YAML, so a value goes in by the same door as a key of a file
            self._values = apply_overrides(self._values, [f"{'.'.join(parents)}=null"])
            at = self._values
            for parent in parents[:-1]:
                at = at[parent]
            at[parents[-1]] = value
        return self

    def load_jsonl(self, *paths: str | Path, eval: str | Path | float | None = None, **source: Any) -> Tuner:
        """Add training files (jsonl, json, csv, parquet, ...). `eval` is a held-out file, or a fraction to hold out;
        `source` further options of a data source (format, columns, samples, ...)."""
        data = self._section("data")
        before = data.get("train") or []
        before = before if isinstance(before, list) else [before]
        data["train"] = [*before, *({"path": str(path), **source} for path in paths)]
        if eval is not None:
            data["eval"] = eval if isinstance(eval, float) else str(eval)
        self._values["data"] = data
        return self

    @property
    def job(self) -> Job:
        """The whole configuration as it stands. Raises ConfigError."""
        return load_job(self._values)

    def train(self, *, console: Any = None, **train: Any) -> Tuner:
        """Run the job; keyword arguments are keys of the `train` section (epochs, batch_size, ...)."""
        self._values["train"] = {**self._section("train"), **train}
        self.result = run_job(self.job, console)
        self._loaded = None
        return self

    def chat(self, message: str | Sequence[Message], *, system: str | None = None, **sampling: Any) -> str:
        """The model's answer to one message, or to a conversation of Messages: the trained model after `train`, the
        base before. `sampling`: max_new_tokens, temperature, top_p, ... (default: greedy)."""
        return "".join(self.stream(message, system=system, **sampling))

    def stream(self, message: str | Sequence[Message], *, system: str | None = None, **sampling: Any) -> Iterator[str]:
        """The same, piece by piece."""
        from tunery.generate.base import Request, Sampling

        messages = [Message("user", message)] if isinstance(message, str) else list(message)
        if system is not None:
            messages.insert(0, Message("system", system))
        yield from self._generator().stream(Request(messages=messages), validate(Sampling, sampling))

    def export(self, out: str | Path, **options: Any) -> dict[str, Any]:
        """A merged Hugging Face folder (see tunery.export.merge.export). Raises ConfigError before `train`."""
        from tunery.export.merge import export

        if self.result is None:
            raise ConfigError("Tuner.export: nothing is trained yet; call train() first")
        return export(self.result.output, out, **options)

    def _section(self, name: str) -> dict[str, Any]:
        """A section as it was given, to add to (a copy)."""
        section = self._values.get(name) or {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"{name}: expected a mapping, got {section!r}")
        return dict(section)

    def _generator(self) -> Any:
        from tunery.generate.hf import HFGenerator
        from tunery.models.target import load_target

        if self._loaded is None:
            if self.result:
                self._loaded = load_target(self.result.output)
            else:
                job = self.job
                named = None if job.data.template == "auto" else job.data.template
                self._loaded = load_target(job.model.name, template=named)
        return HFGenerator(self._loaded.model, self._loaded.tokenizer, self._loaded.template)


__all__ = ["Result", "Tuner", "train"]
