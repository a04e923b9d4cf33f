"""Every function is one graph for torch.compile, in value and gradient, and few graphs serve many lengths."""

import pytest
import torch
from torch._dynamo.utils import counters

from tests.core import contracts
from tests.core.contracts import example, gradients
from tests.core.subject import only_ours, subject
from tests.core.test_contracts import same

pytestmark = [
    pytest.mark.compiled,
    only_ours,
]

LENGTHS = (5, 6, 7, 9, 12, 15)
OCTAVES = 2
"""(4, 8] and (8, 16]: a scan has one level more in each, and so another graph."""
BY_OCTAVE = ("advantages", "scan", "returns", "off_policy")
"""Modules built on the scan."""

BY_INDUCTOR = ("advantages.gae", "losses.clipped_policy_loss", "rewards.compute_rewards")
"""The compiler that people use takes up to a minute for a graph, so it compiles one of each kind."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def agrees(call, compiled):
    """The compiled function answers as the eager one, in value and gradient."""
    values, slopes = call(), gradients(call)
    with subject.replaced(call.function.path, compiled):
        same(call(), values)
        for name, expected in gradients(call).items():
            same(expected, slopes[name])


@pytest.mark.parametrize("path", contracts.NUMERIC)
def test_one_graph_equals_eager(path):
    """Compiled without a graph break, a function gives the same values and gradients as eagerly."""
    compiled = torch.compile(subject.function(path), fullgraph=True, backend="aot_eager")
    agrees(example(path, batch=(2,), time=5), compiled)


@pytest.mark.parametrize("path", contracts.STEPWISE)
def test_few_graphs_serve_all_lengths(path):
    """With dynamic shapes one graph serves every length, or one per octave where the function is a scan."""
    function = subject.function(path)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for time in LENGTHS:
        call = example(path, batch=(3,), time=time)
        expected = call()
        with subject.replaced(path, compiled):
            same(call(), expected)
    graphs = OCTAVES if path.split(".")[0] in BY_OCTAVE else 1
    assert counters["stats"]["unique_graphs"] <= graphs


@pytest.mark.parametrize("path", BY_INDUCTOR)
def test_inductor_equals_eager(path):
    """What torch.compile makes of a function by default gives the same values and gradients as eagerly."""
    agrees(example(path, batch=(2,), time=5), torch.compile(subject.function(path), fullgraph=True))
