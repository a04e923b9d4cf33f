"""Tokens drawn from scores by uniform numbers: the inverse of the distribution, to the last token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_runtime.rollout.drawing import Uniforms, draw


@given(width=st.sampled_from([1, 2, 99, 127, 128, 129, 300, 1000]), seed=st.integers(0, 99), spread=st.floats(0, 30))
def test_a_uniform_number_falls_where_the_running_sum_says(width: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(5, width, generator=generator)
    uniforms = torch.rand(5, generator=generator, dtype=torch.float64)
    shares = scores.double().softmax(-1)
    found, good = draw(scores, uniforms)
    above, its_own = (sums.gather(-1, found[:, None]).squeeze(-1) for sums in (shares.cumsum(-1), shares))
    assert good.all()
    assert (above - its_own - 1e-6 <= uniforms).all()
    assert (uniforms <= above + 1e-6).all()


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("width", [3, 128, 129, 700])
def test_what_cannot_be_is_never_drawn(width: int, uniform: float) -> None:
    """At either end of the interval too."""
    for allowed in ({0}, {width - 1}, {1, width // 2}, {width // 3}):
        scores = torch.full((1, width), -torch.inf)
        scores[0, sorted(allowed)] = torch.tensor([-3.0, 80.0])[: len(allowed)]
        assert int(draw(scores, torch.tensor([uniform], dtype=torch.float64))[0]) in allowed


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_found(bad: float) -> None:
    scores = torch.zeros(3, 7)
    scores[1, 4] = bad
    assert draw(scores, torch.full((3,), 0.5, dtype=torch.float64))[1].tolist() == [True, False, True]
    assert not draw(torch.full((1, 4), -torch.inf), torch.zeros(1, dtype=torch.float64))[1]


def test_numbers_belong_to_a_row_and_a_step() -> None:
    """Across the steps that are drawn at a time."""
    device = torch.device("cpu")
    torch.manual_seed(3)
    every = Uniforms(6)
    columns = every.columns([4, 1], device)
    found = torch.stack([columns(step) for step in range(200)])
    again = every.columns(range(6), device)
    whole = torch.stack([again(step) for step in range(200)])
    assert torch.equal(found, whole[:, [4, 1]])
    assert whole.unique().numel() == whole.numel()
    assert 0 <= float(whole.min()) < 0.01
    assert 0.99 < float(whole.max()) < 1


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_numbers_do_not_depend_on_how_many_rows_there_are(rows: int) -> None:
    found: list[torch.Tensor] = []
    for every in (rows, 101):
        torch.manual_seed(4)
        columns = Uniforms(every).columns(range(rows), torch.device("cpu"))
        found.append(torch.stack([columns(step) for step in range(150)]))
    assert torch.equal(*found)
