"""Oracle: algorithm 2 of arXiv:1711.05101 by hand, in float64."""

from __future__ import annotations

import torch

from tunery.optimizers.adamw import Config, Optimizer


def test_three_updates_by_hand():
    torch.manual_seed(0)
    theta = torch.randn(5, dtype=torch.float64)
    parameter = torch.nn.Parameter(theta.clone())
    config = Config(betas=[0.8, 0.95], eps=1e-6)
    optimizer = Optimizer(config, [{"params": [parameter], "lr": 0.1, "weight_decay": 0.3}])
    m = v = torch.zeros(5, dtype=torch.float64)
    for t in range(1, 4):
        gradient = torch.randn(5, dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        theta = theta * (1 - 0.1 * 0.3)
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        theta = theta - 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        torch.testing.assert_close(parameter.data, theta, rtol=1e-12, atol=1e-14)


def test_groups_keep_their_own_rates_and_decay():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.1, "weight_decay": 0.5}, {"params": [b], "lr": 0.0, "weight_decay": 0.5}]
    optimizer = Optimizer(Config(), groups)
    a.grad, b.grad = torch.zeros(3), torch.ones(3)
    optimizer.step()
    assert torch.allclose(a, torch.full((3,), 0.95)) and b.equal(torch.ones(3))
