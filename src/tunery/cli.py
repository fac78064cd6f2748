"""The command line: parse, call, print. Torch and the rest are imported inside the commands that need them."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tunery import __version__
from tunery.errors import ConfigError, DataError, MissingExtraError, TemplateError, TuneryError
from tunery.host import keep_few_products, wait_quietly

TRAIN, DATA, USE, OTHER = "Train", "Data and configuration", "Use the result", "Other"

app = typer.Typer(
    name="tunery",
    help="Fine-tune language models: check the data, train, prove the result, use it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Source = Annotated[Path, typer.Argument(help="a YAML or JSON file, ours or LLaMA-Factory's", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", show_default=False)]
Temperature = Annotated[float, typer.Option(help="0: the likeliest token")]
TopP = Annotated[float, typer.Option(help="sample among the likeliest that hold this probability")]
TopK = Annotated[int, typer.Option(help="sample among this many likeliest; 0: all")]
Penalty = Annotated[float, typer.Option(help="above 1 makes tokens already seen less likely")]
Longest = Annotated[int, typer.Option(help="longest answer, in tokens")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends an answer; may be given again")]
Seed = Annotated[int, typer.Option(help="of the sampling")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Template = Annotated[str | None, typer.Option(help="another chat template than the target's own")]
Target = Annotated[str, typer.Argument(help="run folder, adapter folder, model folder or hub name", show_default=False)]


def main() -> None:
    """Run a command; errors meant for a person are printed without a traceback."""
    wait_quietly()
    keep_few_products()
    try:
        app()
    except TuneryError as error:
        if text := _said_here(error):
            print(f"tunery: {text}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # with 130 Typer answers a Ctrl-C, and says nothing
            raise
        print("tunery: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _said_here(error: TuneryError) -> str:
    """What this rank says of an error. All read the same configuration and data, so one a machine is enough for these;
    of others, such as a loss that is not finite, every rank says its own."""
    rank = os.environ.get("RANK", "0")
    if os.environ.get("LOCAL_RANK", rank) == "0":
        return str(error) if rank == "0" else f"rank {rank}: {error}"
    interrupted = error.exit_code == 130
    if interrupted or isinstance(error, ConfigError | DataError | TemplateError | MissingExtraError):
        return ""
    first_line = str(error).partition("\n")[0]
    return f"rank {rank}: {first_line}"


def read_job(path: Path, overrides: list[str] | None) -> Any:
    """A Job from our file or LLaMA-Factory's, with the notes of a conversion printed."""
    from tunery.compat import llamafactory
    from tunery.config_file import read_config
    from tunery.job import load_job

    words = overrides or []
    if not llamafactory.is_llamafactory(read_config(path)):
        return load_job(path, words)
    converted = llamafactory.load(path, words)
    for note in converted.notes if os.environ.get("RANK", "0") == "0" else ():
        print(f"note: {note}", file=sys.stderr)
    return converted if converted.action == "export" else load_job(converted.config)


@contextmanager
def _objects_that_stay() -> Iterator[None]:
    """Around a large import. The garbage collector would look through the million objects of torch and transformers
    again and again, and free none: a quarter of the import's time."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


# ---------------------------------------------------------------- train


@app.command(rich_help_panel=TRAIN)
def train(config: Source, overrides: Overrides = None) -> None:
    """Train from a YAML file (and run LLaMA-Factory's training and export files as they are)."""
    job = read_job(config, overrides)
    if not hasattr(job, "output"):
        _export(False, **job.export)
        return
    with _objects_that_stay():
        from tunery.loop import run_job
    result = run_job(job, _console())
    if int(os.environ.get("RANK", "0")) == 0:
        _after(result)


def _after(result: Any) -> None:
    from rich.console import Console

    from tunery.models.target import is_reward_model, resolve_target

    console, output = Console(), result.output
    if result.already_finished:
        console.print(f"{output} already holds this run, finished; train.resume=false trains anew beside it.")
    plots = [name for name in ("training_loss.png", "training_eval_loss.png") if (output / name).is_file()]
    if plots:
        console.print(f"Loss plot: {output / plots[0]}   Report: {output / 'report.md'}")
    console.print("Next:")
    if is_reward_model(resolve_target(output)):
        console.print(f"  tunery generate {output} PAIRS.jsonl --score --out scores.jsonl")
    else:
        console.print(f"  tunery chat {output}")
        console.print(f"  tunery generate {output} DATA.jsonl --out predictions.jsonl")
    console.print(f"  tunery export {output} {output}-merged")


@app.command(rich_help_panel=TRAIN)
def replay(run: Annotated[Path, typer.Argument(help="a run folder, or its failure-step-N folder")]) -> None:
    """Run a step again that was not finite, and say where it begins."""
    from tunery.replay import replay as replay_failure

    for line in replay_failure(run):
        print(line)


# ---------------------------------------------------------------- data and configuration


@app.command(rich_help_panel=DATA)
def check(config: Source, overrides: Overrides = None) -> None:
    """Check the data: what would be used, what not and why, and what looks wrong. Trains nothing."""
    from tunery.config import build
    from tunery.data.check import check as check_data
    from tunery.read import read_template

    job = _training_job(config, overrides)
    _, template = read_template(job)
    report = check_data(job.data, template, build("objectives", job.objective), seed=job.train.seed)
    report.print(_stdout())


@app.command(rich_help_panel=DATA)
def inspect(
    config: Source,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="rows to show")] = 2,
    seed: Annotated[int, typer.Option(help="which rows")] = 0,
) -> None:
    """Show sample rows as tokens coloured by what is trained, their exact text, and the lengths."""
    from tunery.inspect import inspect as show

    show(_training_job(config, overrides), _stdout(), rows=rows, seed=seed)


@app.command(rich_help_panel=DATA)
def plan(
    config: Source,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="h200, a100-80g, t4, cpu, cuda:1, ...; default: this one")] = None,
    probe: Annotated[bool, typer.Option(help="run three real steps here and correct the plan by them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
) -> None:
    """What a run will need before it starts: memory, time, disk, and what makes it fit. Loads no weights."""
    from tunery.plan.command import plan_job
    from tunery.plan.show import print_plan

    made = plan_job(_training_job(config, overrides), device, probe, _console())
    if as_json:
        print(json.dumps(made.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_plan(made, _stdout())


@app.command(rich_help_panel=DATA)
def convert(
    config: Source,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="write here instead of printing")] = None,
) -> None:
    """Print LLaMA-Factory's YAML as ours."""
    from tunery.compat import llamafactory

    text = llamafactory.to_yaml(llamafactory.load(config, overrides or []))
    if out is None:
        print(text, end="")
    else:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from None


@app.command(rich_help_panel=DATA)
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from tunery.job import Job

    print(json.dumps(Job.model_json_schema(), indent=2, ensure_ascii=False))


# ---------------------------------------------------------------- use the result


@app.command(rich_help_panel=USE)
def chat(
    target: Target,
    prompt: Annotated[str | None, typer.Option(help="answer this once and exit")] = None,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_new_tokens: Longest = 512,
    stop: Stop = None,
    seed: Seed = 42,
    template: Template = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model: streaming, with history; /help for commands."""
    from tunery.chat import chat as talk

    sampling = _sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens, stop=stop or [], seed=seed,
    )  # fmt: skip
    talk(target, prompt, system, sampling, template=template, dtype=dtype, device=device)


@app.command(rich_help_panel=USE)
def generate(
    target: Target,
    data: Annotated[str, typer.Argument(help="rows to answer: a file, folder, hub name", show_default=False)],
    out: Annotated[Path, typer.Option(help="predictions, one {prompt, predict, label} a line; or scores")],
    score: Annotated[bool, typer.Option("--score", help="score the rows' answers with a reward model instead")] = False,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_new_tokens: Longest = 256,
    stop: Stop = None,
    seed: Seed = 42,
    samples: Annotated[int | None, typer.Option(help="only the first n rows")] = None,
    dataset_dir: Annotated[str | None, typer.Option(help="folder of dataset_info.json, for a name in it")] = None,
    template: Template = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    resume: Annotated[bool, typer.Option(help="go on where an interrupted run stopped")] = True,
) -> None:
    """Answer a file of rows and score the answers, or let a reward model score those in it (--score). An interrupted
    run goes on where it stopped."""
    from tunery.generate.predict import predict

    sampling = _sampling(
        temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens, stop=stop or [], seed=seed,
    )  # fmt: skip
    options: dict[str, Any] = {
        "samples": samples, "dataset_dir": dataset_dir, "template": template, "dtype": dtype, "device": device,
        "resume": resume, "console": _console(),
    }  # fmt: skip
    if score:
        from tunery.generate.score import score as score_rows

        _no_sampling(sampling)
        scores = score_rows(target, data, out, **options)
    else:
        scores = predict(target, data, out, sampling, **options)
    print(json.dumps(scores, indent=2, ensure_ascii=False))


@app.command(rich_help_panel=USE)
def export(
    target: Target,
    out: Annotated[Path, typer.Argument(help="a new folder")],
    adapter_only: Annotated[bool, typer.Option(help="the adapter alone, not merged")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's own")] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a weights file")] = "5GB",
    template: Template = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Write a merged Hugging Face folder (or the adapter alone), compared with what was trained."""
    _export(
        as_json, target=target, out=str(out), adapter_only=adapter_only, dtype=dtype, max_shard_size=max_shard_size,
        template=template,
    )  # fmt: skip


def _export(as_json: bool, **options: Any) -> None:
    from tunery.export.merge import export as write
    from tunery.export.summary import summary

    report = write(**options)
    print(json.dumps(report, indent=2) if as_json else "\n".join(summary(report)))


# ---------------------------------------------------------------- other


@app.command(rich_help_panel=OTHER)
def version() -> None:
    """Versions of Tunery and of the libraries that decide its numbers."""
    from tunery.run_folder import versions

    for name, number in versions().items():
        print(f"{name} {number}")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tunery {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show and exit")
    ] = False,
) -> None: ...


def _training_job(config: Path, overrides: list[str] | None) -> Any:
    job = read_job(config, overrides)
    if not hasattr(job, "output"):
        raise ConfigError(f"{config}: is an export file; there is no data in it")
    return job


def _sampling(**values: Any) -> Any:
    from tunery.config import validate
    from tunery.generate.base import Sampling

    return validate(Sampling, values)


def _no_sampling(sampling: Any) -> None:
    """Raises ConfigError for options of answers where none are given."""
    usual = _sampling()
    for name in type(sampling).model_fields:
        if getattr(sampling, name) != getattr(usual, name):
            raise ConfigError(f"--{name.replace('_', '-')}: is for answers, and --score generates none; leave it out")


def _stdout() -> Any:
    from rich.console import Console

    return Console()
