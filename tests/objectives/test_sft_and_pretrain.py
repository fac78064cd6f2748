"""Oracle: cross-entropy by hand from the model's logits; which tokens are trained is the templates' test."""

from __future__ import annotations

import math

import pytest
import torch

from tiny_model import byte_tokenizer
from tiny_models import random_sequences, reference_loss, tiny_model
from tunery.config import build, load_kind
from tunery.data.collate import collate
from tunery.errors import ModelError
from tunery.kernels.linear_cross_entropy import linear_token_losses
from tunery.models.load import hook_attention
from tunery.models.recompute import recompute
from tunery.objectives import sft
from tunery.objectives._experts import load_balance
from tunery.policy import CausalPolicy
from tunery.types import Example, Message


@pytest.mark.parametrize("kind", ["sft", "pretrain"])
def test_loss_is_the_weighted_sum_and_metrics_add_up(kind):
    model = tiny_model().eval()
    objective = build("objectives", load_kind("objectives", kind).Config())
    policy = CausalPolicy(model, dtype=torch.float64)
    sequences = random_sequences()
    whole = objective.loss(policy, collate(sequences))
    torch.testing.assert_close(whole.sum, reference_loss(model, sequences), rtol=1e-9, atol=1e-9)
    parts = [objective.loss(policy, collate([s])).metrics["loss"] for s in sequences]
    value, weight = whole.metrics["loss"]
    torch.testing.assert_close(value, torch.stack([p[0] for p in parts]).sum())
    torch.testing.assert_close(weight, torch.stack([p[1] for p in parts]).sum())
    assert not value.requires_grad
    expected = sum(float(s.weights[1:].sum()) for s in sequences)
    assert float(objective.weight(collate(sequences))) == pytest.approx(expected)


class Template:
    """Says which examples came, and in which order."""

    def encode_many(self, examples, train):
        return [[example.messages[-1].content] for example in examples]

    def encode_texts(self, examples, append_eos):
        return [[example.text] for example in examples]


def chat(answer: str, **more) -> Example:
    return Example([Message("user", "q"), Message("assistant", answer)], **more)


def test_each_objective_refuses_the_rows_that_are_for_another():
    rows = [chat("a"), chat("b", label=False), Example(text="t"), chat("c", label=True), chat("d", rejected=[])]
    trained, down, text, *others = (
        load_kind("objectives", "sft").Objective(load_kind("objectives", "sft").Config()).rows(rows, Template())
    )
    assert [trained, *others] == [["a"], ["c"], ["d"]]
    assert down.reason == "thumbs down" and text.reason == "wrong objective" and "objective: pretrain" in text.detail
    module = load_kind("objectives", "pretrain")
    refused, made = module.Objective(module.Config()).rows([chat("a"), Example(text="t")], Template())
    assert made == ["t"] and refused.reason == "wrong objective" and "objective: sft" in refused.detail


def test_sft_says_that_it_does_not_use_the_rejected_answer():
    module = load_kind("objectives", "sft")
    pair = chat("a", rejected=[Message("assistant", "b")])
    assert (
        module.Objective(module.Config()).unused(pair)
        == "rows with a rejected answer, which objective sft does not use"
    )
    assert module.Objective(module.Config()).unused(chat("a")) is None


# ------------------------------------------------------------ relatives


def one_token(**options) -> tuple[float, torch.Tensor]:
    """Logits (0, ln 3), target 0, weight 2: p = 1/4, logsumexp = ln 4. The loss and its gradient by the logits."""
    z = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    head = torch.eye(2, dtype=torch.float64)
    z.requires_grad_()
    losses = linear_token_losses(z, head, torch.tensor([0]), torch.tensor([2.0]), **options)
    losses.total.backward()
    assert z.grad is not None
    assert float(losses.nll) == pytest.approx(2 * math.log(4))
    return float(losses.total.detach()), z.grad[0]


def test_dft_and_z_loss_by_hand():
    """dft: 2 * 1/4 * ln 4, slope 2 * 1/4 * (1/4 - 1, 3/4). z_loss 0.1: 0.1 * 2 * (ln 4)^2 more, and 0.4 ln 4 p."""
    loss, slope = one_token(dft=True)
    assert loss == pytest.approx(0.5 * math.log(4))
    torch.testing.assert_close(slope, torch.tensor([-0.375, 0.375], dtype=torch.float64))
    loss, slope = one_token(dft=True, z_loss=0.1)
    assert loss == pytest.approx(0.5 * math.log(4) + 0.2 * math.log(4) ** 2)
    more = 0.4 * math.log(4)
    torch.testing.assert_close(slope, torch.tensor([-0.375 + more / 4, 0.375 + more * 0.75], dtype=torch.float64))


RELATIVES = [{"loss": "dft"}, {"z_loss": 1e-2}, {"loss": "dft", "z_loss": 1e-2}]


def gradient(policy, objective, batches) -> tuple[torch.Tensor, torch.Tensor]:
    policy.model.zero_grad()
    total = torch.stack([objective.loss(policy, batch).sum for batch in batches]).sum()
    total.backward()
    grads = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return total.detach(), torch.cat(grads)


@pytest.mark.parametrize("options", RELATIVES, ids=str)
@pytest.mark.parametrize("family", ["granite", "gemma2"])  # scaled; capped, and partly in float32
def test_relatives_are_the_same_for_every_path_and_cut(family, options):
    """Fused head, all logits at once, the head behind a wrapper, the model's own head; one stream or one each."""
    model = tiny_model(family).eval()
    objective = sft.Objective(sft.Config(**options))
    batches = [collate([s]) for s in random_sequences()]
    policies = [CausalPolicy(model, dtype=torch.float64, reference_head=flag) for flag in (False, True)]
    results = [gradient(policies[0], objective, batches)]
    results += [gradient(policy, objective, [collate(random_sequences())]) for policy in policies]
    assert policies[0].parts is not None
    policies[0].parts.head = torch.nn.Sequential(policies[0].parts.head)
    results.append(gradient(policies[0], objective, batches))
    policies[0].parts = None
    results.append(gradient(policies[0], objective, batches))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-6, atol=1e-10 if family == "granite" else 1e-5)


def test_trls_dft_loss(tmp_path):
    """TRL's trainer on the same model and ids; its loss is a mean over the labelled tokens, which weigh 1."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokens = random_sequences((14,))[0]
    tokens.weights = (tokens.weights > 0).astype("float32")
    ids = torch.from_numpy(tokens.ids.astype("int64"))[None]
    labels = torch.where(torch.from_numpy(tokens.weights)[None] != 0, ids, -100)
    model = tiny_model("llama", torch.float32, hook=False).eval()
    args = trl.SFTConfig(
        output_dir=str(tmp_path), loss_type="dft", use_cpu=True, report_to=[], eos_token=None, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=byte_tokenizer())
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    theirs = trainer.compute_loss(model, inputs)
    theirs.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hook_attention(model)
    mine = sft.Objective(sft.Config(loss="dft")).loss(CausalPolicy(model), collate([tokens])).sum / tokens.labelled
    mine.backward()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_metrics_say_what_the_loss_is_made_of():
    policy = CausalPolicy(tiny_model().eval(), dtype=torch.float64)
    batch = collate(random_sequences())
    plain = sft.Objective(sft.Config()).loss(policy, batch).sum
    metrics = sft.Objective(sft.Config(z_loss=0.1)).loss(policy, batch).metrics
    torch.testing.assert_close(metrics["nll"][0], plain.detach())
    torch.testing.assert_close(metrics["loss"][0], metrics["nll"][0] + metrics["z_loss"][0])


# ------------------------------------------------------------ mixtures of experts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("rung", ["none", "full"])
def test_the_balance_of_experts_is_the_librarys(family, rung):
    """transformers' load_balancing_loss_func on one sequence, value and gradient, activations recomputed or not."""
    tokens = random_sequences((23,))[0]
    ids = torch.from_numpy(tokens.ids.astype("int64"))[None]
    model = tiny_model(family, torch.float32, output_router_logits=True).train()
    out = model(input_ids=ids, use_cache=False)
    weight = float(tokens.weights[1:].sum())
    expected = reference_loss(model, [tokens]) + 0.5 * weight * out.aux_loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = CausalPolicy(model)
    recompute(model, rung)
    made = sft.Objective(sft.Config(balance_loss=0.5)).loss(policy, collate([tokens]))
    made.sum.backward()
    torch.testing.assert_close(made.sum.double(), expected.double(), rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-4)
    shares = [count / total for name, (count, total) in made.metrics.items() if name.startswith("experts/")]
    assert len(shares) == 4 and float(sum(shares)) == pytest.approx(1.0)
    assert not any(torch.as_tensor(value).requires_grad for pair in made.metrics.values() for value in pair)


def test_balance_by_hand():
    """Two tokens, two experts, one each: both choose expert 0, at 3/4. 2 (1 * 3/4 + 0 * 1/4) = 1.5; even: 1."""
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64).log()
    balance, chosen = load_balance([logits], 1)
    assert float(balance) == pytest.approx(1.5) and chosen.tolist() == [2, 0]
    balance, chosen = load_balance([logits, logits.flip(-1)], 1)
    assert float(balance) == pytest.approx(1.0) and chosen.tolist() == [2, 2]


def test_a_model_without_experts_has_none_to_balance():
    policy = CausalPolicy(tiny_model().eval(), dtype=torch.float64)
    with pytest.raises(ModelError, match="no routers"):
        sft.Objective(sft.Config(balance_loss=0.1)).loss(policy, collate(random_sequences()))
