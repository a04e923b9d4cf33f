"""Properties of generalised advantage estimation."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, UNIT, cases, put_back, rows_of
from tests.core.subject import subject

OBSERVED = {"names": "rewards values", "per_row": "bootstrap", "gamma": UNIT, "lam": UNIT}


def gae(case, **changes):
    case = case.but(**changes)
    return subject.advantages.gae(case.rewards, case.values, case.mask, case.bootstrap, gamma=case.gamma, lam=case.lam)


def by_row(case, function):
    """function(rewards, values, bootstrap) of the kept steps of each row, put back in place."""
    rows = rows_of(case.mask, case.rewards, case.values)
    return put_back(
        case.mask,
        [function(*row, after) for (_, row), after in zip(rows, case.bootstrap.tolist(), strict=True)],
    )


def errors(rewards, values, after, gamma):
    """delta_t = r_t + gamma V_{t+1} - V_t over a list of steps."""
    following = [*values, after][1:]
    return [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, following, strict=True)]


@given(case=cases(**OBSERVED))
def test_gae_is_the_papers_double_sum(case):
    """A_t is sum_l (gamma lam)^l delta_{t+l} over the kept positions: a hole is deleted, not zero-filled."""

    def double_sum(rewards, values, after):
        deltas = errors(rewards, values, after, case.gamma)
        return [
            math.fsum((case.gamma * case.lam) ** (j - i) * deltas[j] for j in range(i, len(deltas)))
            for i in range(len(deltas))
        ]

    assert_close(gae(case).advantages, by_row(case, double_sum))


@given(case=cases(**OBSERVED))
def test_lambda_1_is_return_minus_value(case):
    """With lam 1 the advantage is the discounted return, bootstrap included, minus the value."""

    def return_minus_value(rewards, values, after):
        out = []
        for reward, value in zip(reversed(rewards), reversed(values), strict=True):
            after = reward + case.gamma * after
            out.append(after - value)
        return out[::-1]

    assert_close(gae(case, lam=1.0).advantages, by_row(case, return_minus_value))


@given(case=cases(**OBSERVED))
def test_lambda_0_is_the_td_error(case):
    """With lam 0 the advantage is r_t + gamma V_{t+1} - V_t, t+1 being the next kept position."""
    expected = by_row(case, lambda *row: errors(*row, case.gamma))
    assert_close(gae(case, lam=0.0).advantages, expected)


@given(case=cases(**OBSERVED))
def test_gamma_0_sees_one_reward(case):
    """With gamma 0 the advantage is r_t - V_t, whatever lam is."""
    expected = torch.where(case.mask, case.rewards - case.values, 0.0)
    assert_close(gae(case, gamma=0.0).advantages, expected)


@given(case=cases(**OBSERVED))
def test_returns_are_advantages_plus_values(case):
    """returns = advantages + values on kept positions, and both are 0 elsewhere."""
    got = gae(case)
    assert_close(got.returns, torch.where(case.mask, got.advantages + case.values, 0.0))
    assert not got.advantages[~case.mask].any()


@given(case=cases("rewards values rewards2 values2", per_row="bootstrap bootstrap2", gamma=UNIT, lam=UNIT, c=NUMBERS))
def test_linear(case):
    """gae is linear in rewards, values and bootstrap together."""
    both = gae(
        case,
        rewards=case.rewards + case.c * case.rewards2,
        values=case.values + case.c * case.values2,
        bootstrap=case.bootstrap + case.c * case.bootstrap2,
    )
    other = gae(case, rewards=case.rewards2, values=case.values2, bootstrap=case.bootstrap2)
    assert_close(both.advantages, gae(case).advantages + case.c * other.advantages, scale=100.0)


@given(case=cases(**OBSERVED, now=st.integers(0, 5), noise=NUMBERS))
def test_the_past_does_not_matter(case):
    """What was observed before t changes no advantage at t or later."""
    noise = torch.zeros_like(case.rewards)
    noise[:, : case.now] = case.noise
    changed = gae(case, rewards=case.rewards + noise, values=case.values - noise)
    assert_close(changed.advantages[:, case.now :], gae(case).advantages[:, case.now :])


@given(case=cases(**OBSERVED))
def test_perfect_values_give_zero(case):
    """A critic that is right, V_t = r_t + gamma V_{t+1}, leaves no advantage, whatever lam is."""

    def perfect(rewards, _, after):
        out = []
        for reward in reversed(rewards):
            after = reward + case.gamma * after
            out.append(after)
        return out[::-1]

    values = by_row(case, perfect)
    got = gae(case, values=values)
    assert_close(got.advantages, torch.zeros_like(values))
    assert_close(got.returns, values)


@given(case=cases(**OBSERVED, shift=NUMBERS))
def test_a_constant_in_all_values_cancels(case):
    """At gamma = lam = 1 a constant added to all values and the bootstrap cancels; to the values alone, it is lost."""
    moved = gae(case, gamma=1.0, lam=1.0, values=case.values + case.shift, bootstrap=case.bootstrap + case.shift)
    assert_close(moved.advantages, gae(case, gamma=1.0, lam=1.0).advantages)
    ended = gae(case, gamma=1.0, lam=1.0, values=case.values + case.shift)
    assert_close(ended.advantages, gae(case, gamma=1.0, lam=1.0).advantages - torch.where(case.mask, case.shift, 0.0))


@given(case=cases(**OBSERVED))
def test_truncation_bootstraps_and_termination_does_not(case):
    """A bootstrap b counts as gamma * b more reward on the last kept step; none means that nothing follows."""
    extra = torch.zeros_like(case.rewards)
    for row, (places, _) in enumerate(rows_of(case.mask)):
        if places:
            extra[row, places[-1]] = case.gamma * case.bootstrap[row]
    ended = gae(case, rewards=case.rewards + extra, bootstrap=None)
    assert_close(tuple(gae(case)), tuple(ended))
    assert_close(tuple(gae(case, bootstrap=None)), tuple(gae(case, bootstrap=torch.zeros_like(case.bootstrap))))


@given(case=cases(**OBSERVED))
def test_a_sequence_may_be_cut_anywhere(case):
    """Cut in front of a kept step, the first part bootstrapped with S = V + lam A of that step is as it was."""
    whole = gae(case)
    seen = case.values + case.lam * whole.advantages
    for row, (places, _) in enumerate(rows_of(case.mask)):
        for cut in places:
            part = case.but(
                rewards=case.rewards[row : row + 1, :cut],
                values=case.values[row : row + 1, :cut],
                mask=case.mask[row : row + 1, :cut],
                bootstrap=seen[row : row + 1, cut],
            )
            assert_close(gae(part).advantages[0], whole.advantages[row, :cut])


def test_a_hole_is_no_step():
    """r = [0, ., 1], V = [.2, 9, .4], gamma 1, lam .5 give A_0 = .50, as without the hole (zero-filling gives .15)."""
    rewards, values = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[0.2, 9.0, 0.4]])
    mask = torch.tensor([[True, False, True]])
    got = subject.advantages.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert_close(got.advantages, [[0.5, 0.0, 0.6]], dtype=torch.float32)


@given(
    time=st.sampled_from((1, 2, 3, 63, 64, 65, 1000, 4096)),
    seed=st.integers(0, 2**32 - 1),
    gamma=st.sampled_from((1.0, 0.99, 0.5)),
    lam=st.sampled_from((1.0, 0.95, 0.0)),
)
def test_long_sequences_agree_with_the_loop(time, seed, gamma, lam):
    """Up to 4096 steps, float32 agrees with the backward loop in float64 within 1e-5 of the largest number met."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(1, time, generator=generator) for _ in range(2))
    mask = torch.rand(1, time, generator=generator) < 0.8
    expected = torch.zeros(time, dtype=torch.float64)
    advantage = value_next = 0.0
    for t in reversed(range(time)):
        if mask[0, t]:
            r, v = rewards[0, t].item(), values[0, t].item()
            advantage = r + gamma * value_next - v + gamma * lam * advantage
            value_next = v
            expected[t] = advantage
    got = subject.advantages.gae(rewards, values, mask, gamma=gamma, lam=lam).advantages[0]
    assert_close(got, expected, scale=expected.abs().max().item())
