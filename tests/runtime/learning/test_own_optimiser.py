"""The trainer's own Adam steps what it is given, as it lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ppo_runtime import PPOConfig
from ppo_runtime.assembly import make_optimizer


@pytest.mark.parametrize("lies", ["whole", "a part of wider rows", "transposed"])
def test_every_entry_moves_and_nothing_else(lies: str) -> None:
    torch.manual_seed(0)
    storage = torch.randn(6, 8)
    data = {"whole": storage, "a part of wider rows": storage[:, :4], "transposed": storage.T}[lies]
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(0))
    model.weight.data = data
    before, around = data.clone(), storage.clone()
    optimizer = make_optimizer(model, PPOConfig(learning_rate=0.1))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full_like(before, 0.1), rtol=1e-4, atol=1e-6)
    assert int((storage != around).sum()) == data.numel()
