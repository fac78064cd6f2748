"""LLaMA-Factory's files. Oracle: what each option means there, as its documentation and defaults state it, written
down here as the mapping a person would write by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from tunery.compat.llamafactory import NEVER, Converted, convert, is_llamafactory, load, to_yaml
from tunery.compat.llamafactory_options import FAMILIES, GOVERNED, IGNORED, KNOWN, READ, REFUSED, STYLES
from tunery.compat.llamafactory_reader import Options
from tunery.config_file import parse_yaml, read_config
from tunery.data.template import named_templates
from tunery.errors import ConfigError
from tunery.job import Job, load_job

ROOT = Path(__file__).resolve().parents[2]

# Every option of LLaMA-Factory 0.9.5 that a training, evaluation or export file may hold.
OPTIONS = """
model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab split_special_tokens
add_tokens add_special_tokens model_revision rope_scaling flash_attn shift_attn mixture_of_depths use_unsloth
use_unsloth_gc enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing use_reentrant_gc upcast_layernorm
upcast_lmhead_output train_from_scratch infer_backend infer_dtype use_kv_cache trust_remote_code quantization_method
quantization_bit quantization_type double_quantization export_dir export_size export_device export_quantization_bit
export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format
export_hub_model_id template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt mask_history
streaming buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size preprocessing_num_workers
max_samples ignore_pad_token_for_loss val_size eval_on_each_dataset packing neat_packing tool_format default_system
enable_thinking tokenized_path stage finetuning_type pure_bf16 use_llama_pro use_adam_mini use_muon freeze_vision_tower
freeze_multi_modal_projector freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss
include_effective_tokens_per_second use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha
freeze_trainable_layers freeze_trainable_modules freeze_extra_modules additional_target lora_alpha lora_dropout
lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert
create_new_adapter oft_rank oft_block_size oft_target module_dropout pref_beta pref_ftx pref_bco_weight pref_loss
dpo_label_smoothing kto_chosen_weight kto_rejected_weight simpo_gamma ld_alpha ppo_buffer_size ppo_epochs
ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters reward_model reward_model_adapters
reward_model_type use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type
galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_scale_type
use_badam badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio do_sample temperature
top_p top_k num_beams max_new_tokens repetition_penalty length_penalty output_dir overwrite_output_dir do_train do_eval
do_predict predict_with_generate per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
learning_rate num_train_epochs max_steps lr_scheduler_type warmup_ratio warmup_steps weight_decay max_grad_norm optim
adam_beta1 adam_beta2 logging_steps save_steps save_strategy save_total_limit save_only_model eval_strategy eval_steps
load_best_model_at_end bf16 fp16 seed resume_from_checkpoint report_to run_name deepspeed fsdp ddp_timeout
neftune_noise_alpha group_by_length dataloader_num_workers remove_unused_columns
"""

SMALL = {"model_name_or_path": "builtin:tiny", "do_train": True, "dataset": "mine", "template": "qwen"}


def job(text: str = "", **values: object) -> Job:
    """The job a file becomes, through the same door as any other configuration."""
    return load_job(convert({**SMALL, **(parse_yaml(text) or {}), **values}).config)


def problem(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        convert({**SMALL, **values}, where="their.yaml")
    return str(caught.value)


def notes(**values: object) -> str:
    return "\n".join(convert({**SMALL, **values}).notes)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", OPTIONS.split())
def test_every_option_has_exactly_one_place(name):
    governed = [name for names in GOVERNED.values() for name in names.split()]
    places = [name in READ, name in IGNORED, name in REFUSED, name in governed]
    assert sum(places) == 1


def test_the_tables_do_not_overlap():
    governed = [name for names in GOVERNED.values() for name in names.split()]
    assert len(READ) + len(IGNORED) + len(REFUSED) + len(governed) + 2 == len(KNOWN)  # and the two older names


def test_every_translated_option_is_read_and_cast(monkeypatch):
    """No option is in the table and read nowhere: over these files every one is asked for, and a value of the wrong
    type is an error that names it."""
    files = [
        {},
        {"stage": "pt"},
        {"finetuning_type": "freeze", "adapter_name_or_path": None},
        {"adapter_name_or_path": "a", "loraplus_lr_ratio": 2},
        {"streaming": True, "mix_strategy": "interleave_over", "dataset": "a,b", "pissa_init": True},
        {"predict_with_generate": True, "eval_strategy": "steps", "do_train": None},
        {"export_dir": "x", "do_train": None},
        {"stage": "dpo"},
        {"stage": "dpo", "pref_loss": "simpo"},
        {"stage": "kto", "ref_model": "builtin:tiny"},
        {"stage": "ppo", "reward_model": "x"},
    ]
    asked: set[str] = set()
    ask = Options.__call__
    monkeypatch.setattr(Options, "__call__", lambda self, name: (asked.add(name), ask(self, name))[1])
    for file in files:
        convert({**SMALL, **file})
    assert asked == set(READ)
    for name, (kind, _) in READ.items():
        if kind not in ("str", "path", "list"):
            texts = []
            for file in files:
                try:
                    convert({**SMALL, **file, name: ["wrong", {"kind": 1}]})
                except ConfigError as error:
                    texts.append(str(error))
            assert any(f"{name}: expected " in text for text in texts), name


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options_are_accepted_at_their_default_and_refused_by_name(name):
    harmless, near = REFUSED[name]
    on_by_default = any(value is True for value in harmless)
    for value in (None, *(() if on_by_default else (False, "false")), *harmless):
        convert({**SMALL, name: value})
    assert f"{name}: " in problem(**{name: "8"}) and f"not in Tunery; nearest: {near}" in problem(**{name: "8"})


def test_all_problems_come_at_once():
    text = problem(use_galore=True, lora_rnk=4, stage="dpoo", learning_rate="fast", optim="paged_adamw_8bit")
    assert [line.split(": ")[:2] for line in text.splitlines()] == [
        ["their.yaml", "use_galore"],
        ["their.yaml", "lora_rnk"],
        ["their.yaml", "stage"],
        ["their.yaml", "optim"],
        ["their.yaml", "learning_rate"],
    ]
    assert "did you mean 'lora_rank'?" in text and "unknown stage" in text


def test_an_unknown_stage_names_the_nearest():
    assert "stage: unknown stage 'dpoo'; did you mean 'dpo'?" in problem(stage="dpoo")


def test_recognised_by_its_vocabulary():
    assert is_llamafactory({"model_name_or_path": "x", "template": "qwen"})
    assert is_llamafactory({"stage": "sft", "dataset": "x"})
    assert not is_llamafactory({"model": "x", "train": {"epochs": 1}})
    assert not is_llamafactory({})


def test_a_mixture_of_both_vocabularies_is_one_line():
    mixed = {"model_name_or_path": "x", "stage": "sft", "dataset": "y", "adapter": "lora"}
    with pytest.raises(ConfigError) as caught:
        is_llamafactory(mixed)
    assert "\n" not in str(caught.value)
    assert "LLaMA-Factory's keys (model_name_or_path, stage) with ours (adapter)" in str(caught.value)


def test_our_own_file_needs_no_conversion(tmp_path):
    (tmp_path / "ours.yaml").write_text("model: builtin:tiny\ndata: {train: rows.jsonl}\n")
    with pytest.raises(ConfigError, match=r"ours\.yaml: is in Tunery's shape already"):
        load(tmp_path / "ours.yaml")


# ---------------------------------------------------------------- meaning


def test_their_defaults_hold_where_the_file_says_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = job()
    assert result.optimizer.model_dump() == {
        "kind": "adamw", "lr": 5e-5, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8,
    }  # fmt: skip
    assert (result.schedule.kind, result.schedule.warmup) == ("linear", 0)
    assert (result.adapter.kind, result.adapter.rank, result.adapter.alpha) == ("lora", 8, 16)  # type: ignore
    assert (result.adapter.dropout, result.adapter.targets) == (0.0, "all-linear")  # type: ignore
    assert (result.data.max_length, result.data.too_long, result.data.dataset_dir) == (2048, "truncate", "data")
    train = result.train
    assert (train.batch_size, train.epochs, train.max_steps, train.seed, train.max_grad_norm) == (8, 3, None, 42, 1.0)
    assert (train.save_every, train.log_every, train.resume, train.keep) == (500, 500, True, None)
    assert (result.eval.every, result.eval.best, result.eval.patience) == (NEVER, False, None)
    assert result.objective.model_dump(exclude_defaults=True) == {} and result.objective.kind == "sft"
    assert result.report.to == []


LORA = """
### model
model_name_or_path: builtin:tiny
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj, v_proj
additional_target: embed_tokens,lm_head
loraplus_lr_ratio: 16.0
use_rslora: true
lora_dropout: 0.05
### dataset
dataset: identity,alpaca_en_demo
eval_dataset: alpaca_zh_demo
template: llama3
cutoff_len: 1024
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 4
mask_history: true
default_system: You are kind.
### output
output_dir: saves/lora
logging_steps: 10
save_steps: 250
save_total_limit: 3
plot_loss: true
report_to: wandb
run_name: first
### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: '1.0e-4'
num_train_epochs: 2
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
weight_decay: 0.01
max_grad_norm: 0
neftune_noise_alpha: 5
ddp_timeout: 180000000
### eval
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 100
load_best_model_at_end: true
early_stopping_steps: 3
"""


def test_lora_file(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = load_job(
        {
            "model": {"name": "builtin:tiny", "trust_remote_code": True, "dtype": "bfloat16"},
            "data": {
                "train": [{"path": "identity", "samples": 1000}, {"path": "alpaca_en_demo", "samples": 1000}],
                "eval": [{"path": "alpaca_zh_demo", "samples": 1000}],
                "dataset_dir": "data",
                "system": "You are kind.",
                "max_length": 1024,
                "too_long": "truncate",
                "workers": 4,
            },
            "objective": {"kind": "sft", "train_on": "last"},
            "adapter": {
                "kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.05, "targets": ["q_proj", "v_proj"],
                "modules_to_save": ["embed_tokens", "lm_head"], "rslora": True, "loraplus_ratio": 16.0,
            },
            "optimizer": {"kind": "adamw", "lr": 1e-4, "weight_decay": 0.01},
            "schedule": {"kind": "cosine", "warmup": 0.1},
            "train": {
                "epochs": 2, "batch_size": 32, "seed": 42, "max_grad_norm": None, "neftune": 5.0, "save_every": 250,
                "keep": 3, "log_every": 10,
            },
            "eval": {"every": 100, "best": True, "patience": 3},
            "report": {"to": ["wandb"], "name": "first"},
            "output": "saves/lora",
        }
    )  # fmt: skip
    assert job(LORA).model_dump() == expected.model_dump()


def test_full_file():
    result = job(
        "{finetuning_type: full, deepspeed: '', pure_bf16: true, val_size: 0.1, num_train_epochs: 4.0, "
        "eval_strategy: epoch, save_strategy: epoch, resume_from_checkpoint: saves/full/checkpoint-500}"
    )
    assert result.adapter.kind == "full" and result.model.dtype == "bfloat16"
    assert result.data.eval == 0.1
    assert result.eval.every is None and result.train.save_every is None  # null is every epoch
    assert result.train.resume == "saves/full/checkpoint-500"


def test_freeze_file():
    result = job(
        "{finetuning_type: freeze, freeze_trainable_layers: -4, freeze_trainable_modules: 'mlp,self_attn', "
        "freeze_extra_modules: 'embed_tokens,norm'}"
    )
    assert result.adapter.model_dump(exclude={"cache"}) == {
        "kind": "freeze", "layers": -4, "modules": ["mlp", "self_attn"], "extra": ["embed_tokens", "norm"],
    }  # fmt: skip
    assert job(finetuning_type="freeze").adapter.modules == []  # type: ignore[attr-defined]


def test_pissa_file():
    result = job("{pissa_init: true, pissa_iter: -1, pissa_convert: true, lora_rank: 4, lora_alpha: 4}")
    adapter = result.adapter.model_dump()
    assert (adapter["init"], adapter["pissa_iter"], adapter["rank"], adapter["alpha"]) == ("pissa", -1, 4, 4)
    assert "pissa_init: goes with neither" in problem(pissa_init=True, use_dora=True)


def test_pretraining_file():
    result = job(
        "{stage: pt, dataset: c4_demo, template: null, lr_scheduler_type: constant_with_warmup, warmup_steps: 20}"
    )
    assert result.objective.kind == "pretrain" and result.data.template == "auto"
    assert (result.schedule.kind, result.schedule.warmup) == ("constant", 20)
    assert "into full blocks" in notes(stage="pt")  # packing is its default there, and its batch counts blocks


def test_packing():
    assert job().train.packing and "blocks" not in notes()
    for values in ({"packing": True}, {"neat_packing": True}, {"packing": False, "neat_packing": True}):
        assert job(**values).train.packing and "packed blocks of 2048 tokens" in notes(**values)
    assert not job(packing=False).train.packing


def test_tool_data_file():
    result = job("{dataset: glaive_toolcall_en_demo, dataset_dir: data/tools, template: qwen3, enable_thinking: true}")
    assert [source.path for source in result.data.train] == ["glaive_toolcall_en_demo"]
    assert result.data.dataset_dir == "data/tools"
    assert "tool_format: " in problem(tool_format="glm4")
    assert "enable_thinking: false is not in Tunery" in problem(enable_thinking=False)


def test_hub_data_sets():
    result = job(dataset_dir="ONLINE", dataset="tatsu-lab/alpaca")
    assert result.data.dataset_dir is None and result.data.train[0].path == "tatsu-lab/alpaca"
    assert "dataset_dir" in problem(dataset_dir="REMOTE:someone/info")


def test_mixing():
    result = job("{dataset: 'a,b', mix_strategy: interleave_over, interleave_probs: '0.7,0.3'}")
    assert result.data.mix == "weighted" and [source.weight for source in result.data.train] == [0.7, 0.3]
    assert job("{dataset: 'a,b', mix_strategy: interleave_once, interleave_probs: '0.7,0.3'}").data.mix == "concat"
    assert "interleave_probs: expected 2 positive numbers" in problem(
        dataset="a,b", mix_strategy="interleave_under", interleave_probs="1.0"
    )


def test_streaming():
    result = job("{streaming: true, buffer_size: 128, max_steps: 50}")
    assert (result.data.streaming, result.data.shuffle_buffer, result.train.max_steps) == (True, 128, 50)


def test_losses_on_the_prompt():
    assert job(train_on_prompt=True).objective.train_on == "all"  # type: ignore[attr-defined]
    assert "choose one" in problem(train_on_prompt=True, mask_history=True)


def test_going_on_and_starting_anew():
    assert job(overwrite_output_dir=True).train.resume is False
    assert job(overwrite_output_dir=True, resume_from_checkpoint=True).train.resume is True
    assert job(resume_from_checkpoint="false").train.resume is True  # LLaMA-Factory looks into output_dir by itself
    result = job(adapter_name_or_path="saves/lora", lora_rank=64)
    assert result.model.init_from == "saves/lora"
    assert "rank" not in result.adapter.model_fields_set, "the adapter brings its own shape"
    assert "merge" in problem(adapter_name_or_path="a,b")
    assert "create_new_adapter" in problem(adapter_name_or_path="a", create_new_adapter=True)
    assert "adapter_name_or_path" in problem(adapter_name_or_path="a", finetuning_type="full")


def test_schedules():
    assert job(lr_scheduler_type="constant", warmup_ratio=0.1).schedule.warmup == 0  # `constant` has no warm-up there
    assert job(warmup_ratio=0.1, warmup_steps=7).schedule.warmup == 7
    assert job(warmup_steps=0.05).schedule.warmup == 0.05
    with_floor = job(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-5}, learning_rate=1e-4)
    assert math.isclose(with_floor.schedule.min_ratio, 0.1)
    stable = job(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs='{"decay_type": "linear", "num_decay_steps": 40}'
    )
    assert (stable.schedule.kind, stable.schedule.decay) == ("wsd", 40)
    assert "lr_scheduler_type" in problem(lr_scheduler_type="warmup_stable_decay")  # its decay is a cosine by default
    assert "lr_scheduler_type" in problem(lr_scheduler_type="polynomial")
    assert "power" in problem(lr_scheduler_kwargs={"power": 2})


def test_intervals():
    assert job(eval_strategy="steps", logging_steps=20).eval.every == 20  # eval_steps falls back on logging_steps
    assert job(evaluation_strategy="steps", eval_steps=0.1).eval.every == 0.1
    assert job(save_strategy="no").train.save_every == NEVER == job().eval.every
    assert job(save_steps=0.25).train.save_every == 0.25
    assert "save_strategy" in problem(save_strategy="best")
    assert job(logging_steps=0.1).train.log_every == 5


def test_evaluation_and_generation():
    result = job(val_size=0.1, do_eval=True, predict_with_generate=True, max_new_tokens=64, max_samples=50)
    assert (result.eval.generate, result.eval.max_new_tokens) == (50, 64)
    assert "val_size" in problem(val_size=0.1, eval_dataset="x")
    assert "val_size" in problem(val_size=200)
    assert "tunery generate" in problem(do_train=False, do_predict=True)
    assert "tunery generate" in problem(do_train=None, do_predict=True)
    assert "tunery chat" in problem(dataset=None)
    assert "metric_for_best_model" in problem(metric_for_best_model="accuracy")


def test_checkpointing_is_asked_for_or_mentioned():
    assert job().train.checkpointing == "auto" and "train.checkpointing: only" in notes()
    assert job(disable_gradient_checkpointing=False).train.checkpointing == "full"
    assert job(gradient_checkpointing=True).train.checkpointing == "full"
    assert job(disable_gradient_checkpointing=True).train.checkpointing == "none"
    assert "checkpointing" not in notes(disable_gradient_checkpointing=True)


def test_a_bare_no_is_the_word():
    assert job("save_strategy: no\neval_strategy: no").train.save_every == NEVER


def test_trackers():
    assert job(report_to="none").report.to == []
    assert job(report_to=["tensorboard", "mlflow"]).report.to == ["tensorboard", "mlflow"]
    assert job(use_swanlab=True, swanlab_project="p").report.model_dump() == {
        "to": ["swanlab"], "project": "p", "name": None,
    }  # fmt: skip
    assert "report_to" in problem(report_to="comet_ml")


def test_ignored_options_are_mentioned():
    text = notes(ddp_timeout=180000000, dataloader_num_workers=4, overwrite_cache=True, galore_rank=16)
    for name in ("ddp_timeout", "dataloader_num_workers", "overwrite_cache", "galore_rank"):
        assert f"{name}: ignored; " in text


# ---------------------------------------------------------------- templates


@pytest.fixture
def tokenizer_without(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return str(tmp_path)


def test_the_tokenizers_own_template_is_the_policy(tokenizer_without):
    assert job(template="llama3").data.template == "auto"  # builtin:tiny brings its own
    assert job(template=None).data.template == "auto"
    assert job(template="some_new_family", model_name_or_path="nobody/knows-it").data.template == "auto"
    assert "the tokenizer's own" in notes(template="qwen")
    for theirs, ours in FAMILIES.items():
        assert convert({**SMALL, "template": theirs, "model_name_or_path": tokenizer_without}).config["data"][
            "template"
        ] == (ours)
    (Path(tokenizer_without) / "chat_template.jinja").write_text("{{ messages }}")
    assert job(template="llama2", model_name_or_path=tokenizer_without).data.template == "auto"


def test_styles_are_kept_and_unknown_ones_refused(tokenizer_without):
    assert job(template="alpaca").data.template == "alpaca"
    assert "nearest: plain" in problem(template="empty")
    assert "template: " in problem(template="default", model_name_or_path=tokenizer_without)


def test_every_template_named_here_exists():
    assert {*STYLES.values(), *FAMILIES.values()} <= set(named_templates())


# ---------------------------------------------------------------- export and text


def test_export_file(tmp_path):
    values = {
        "model_name_or_path": "builtin:tiny",
        "adapter_name_or_path": str(tmp_path),
        "template": "llama3",
        "trust_remote_code": True,
        "export_dir": "output/merged",
        "export_size": 2,
        "export_device": "cpu",
        "export_legacy_format": False,
    }
    result = convert(values)
    assert (result.action, result.config) == ("export", {})
    assert result.export == {"target": str(tmp_path), "out": "output/merged", "dtype": None, "max_shard_size": "2GB"}
    assert f"\n# tunery export {tmp_path} output/merged --max-shard-size 2GB\n" in to_yaml(result)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/base"}))
    with pytest.raises(ConfigError, match="trained on other/base"):
        convert(values)
    with pytest.raises(ConfigError, match="export_quantization_bit: 4 is not in Tunery"):
        convert({**values, "model_name_or_path": "other/base", "export_quantization_bit": 4})


def test_written_out_it_reads_back_the_same(tmp_path):
    converted = convert({**SMALL, **parse_yaml(LORA)})
    path = tmp_path / "ours.yaml"
    path.write_text(to_yaml(converted))
    assert read_config(path) == converted.config
    assert load_job(path).model_dump() == load_job(converted.config).model_dump()
    assert converted.notes and all(f"# {note}\n" in path.read_text() for note in converted.notes)


def test_overrides_in_either_vocabulary(tmp_path):
    path = tmp_path / "their.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    result = load(path, ["learning_rate=3e-4", "train.epochs=1", "lora_rank=2"])
    assert isinstance(result, Converted)
    built = load_job(result.config)
    assert (built.optimizer.lr, built.train.epochs, built.adapter.alpha) == (3e-4, 1, 4)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"their\.yaml: lr: unknown option"):
        load(path, ["lr=1"])


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "llamafactory").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_examples_are_in_their_vocabulary(path):
    assert is_llamafactory(read_config(path))
    built = load_job(load(path).config)
    info = json.loads((ROOT / str(built.data.dataset_dir) / "dataset_info.json").read_text())
    assert built.data.train and all(source.path in info for source in built.data.train)
