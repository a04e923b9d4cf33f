"""Properties of returns, V-trace, per-step discounts, and advantages within a group."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.close import assert_close
from tests.core.strategies import NUMBERS, POSITIVE, UNIT, cases, gradient, put_back, rows_of, tensors
from tests.core.subject import subject

PLAIN = {"names": "rewards values", "per_row": "bootstrap", "gamma": UNIT, "lam": UNIT}


@st.composite
def per_step(draw):
    """A case whose gamma and lam are tensors."""
    case = draw(cases(names="rewards values", per_row="bootstrap"))
    shape = tuple(case.rewards.shape)
    return case.but(gamma=draw(tensors(*shape, numbers=UNIT)), lam=draw(tensors(*shape, numbers=UNIT)))


def by_row(case, function, *names):
    """function(*kept values of the named tensors, bootstrap) of each row, put back in place."""
    rows = rows_of(case.mask, *(getattr(case, name) for name in names))
    return put_back(
        case.mask,
        [function(*row, after) for (_, row), after in zip(rows, case.bootstrap.tolist(), strict=True)],
    )


def reward_to_go(case, **changes):
    case = case.but(**changes)
    return subject.returns.reward_to_go(case.rewards, case.mask, case.bootstrap, gamma=case.gamma)


def lambda_returns(case, **changes):
    case = case.but(**changes)
    return subject.returns.lambda_returns(
        case.rewards, case.values, case.mask, case.bootstrap, gamma=case.gamma, lam=case.lam
    )


def n_step_returns(case, n, **changes):
    case = case.but(**changes)
    return subject.returns.n_step_returns(case.rewards, case.values, case.mask, case.bootstrap, gamma=case.gamma, n=n)


def gae(case, **changes):
    case = case.but(**changes)
    return subject.advantages.gae(case.rewards, case.values, case.mask, case.bootstrap, gamma=case.gamma, lam=case.lam)


def vtrace(case, **changes):
    case = case.but(**changes)
    return subject.off_policy.vtrace(
        case.logprobs,
        case.old_logprobs,
        case.rewards,
        case.values,
        case.mask,
        case.bootstrap,
        gamma=case.gamma,
        lam=case.lam,
        rho_clip=case.rho_clip,
        c_clip=case.c_clip,
    )


def products(xs):
    """1, x_0, x_0 x_1, ..."""
    return [math.prod(xs[:i]) for i in range(len(xs) + 1)]


# Returns.


@pytest.mark.parametrize("n", [1, 7, 64])
def test_n_steps_are_kept_steps_in_long_sequences_too(n):
    """Of 500 steps with holes, the kept ones are answered as if the others had never been."""
    generator = torch.Generator().manual_seed(n)
    rewards, values = torch.randn(2, 1, 500, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 500, generator=generator) < 0.6
    options = {"gamma": 0.9, "n": n}
    whole = subject.returns.n_step_returns(rewards, values, mask, **options)
    alone = subject.returns.n_step_returns(rewards[:, mask[0]], values[:, mask[0]], mask[:, mask[0]], **options)
    assert_close(whole[:, mask[0]], alone)


@given(case=per_step())
def test_reward_to_go_is_the_discounted_sum(case):
    """G_t is the sum of every later kept reward, times all discounts on the way, and of the bootstrap at the end."""

    def direct(rewards, gamma, after):
        return [
            math.fsum(x * p for x, p in zip([*rewards[t:], after], products(gamma[t:]), strict=True))
            for t in range(len(rewards))
        ]

    assert_close(reward_to_go(case), by_row(case, direct, "rewards", "gamma"), scale=10)


@given(case=per_step())
def test_lambda_return_mixes_n_step_returns(case):
    """G_t is the average of all n-step returns, each weighted by stopping there: lam_{t+1} ... (1 - lam_{t+n})."""

    def mixture(rewards, values, gamma, lam, after):
        out = []
        steps = len(rewards)
        for t in range(steps):
            total, going_on = 0.0, 1.0
            for n in range(1, steps - t + 1):
                discounts = products(gamma[t : t + n])
                ahead = values[t + n] if t + n < steps else after
                n_step = math.fsum(r * d for r, d in zip(rewards[t : t + n], discounts, strict=False))
                stop = 1.0 - lam[t + n] if t + n < steps else 1.0
                total += going_on * stop * (n_step + discounts[-1] * ahead)
                going_on *= 1.0 - stop
            out.append(total)
        return out

    assert_close(lambda_returns(case), by_row(case, mixture, "rewards", "values", "gamma", "lam"), scale=10)


@given(case=per_step(), n=st.integers(1, 9))
def test_n_step_return_is_n_rewards_and_the_critic(case, n):
    """G_t is n kept rewards, discounted, and then the value; where the sequence ends before, the bootstrap."""

    def direct(rewards, values, gamma, after):
        out = []
        for t in range(len(rewards)):
            end = min(t + n, len(rewards))
            discounts = products(gamma[t:end])
            ahead = values[end] if end < len(rewards) else after
            terms = [r * d for r, d in zip([*rewards[t:end], ahead], discounts, strict=True)]
            out.append(math.fsum(terms))
        return out

    assert_close(n_step_returns(case, n), by_row(case, direct, "rewards", "values", "gamma"), scale=10)


@given(case=cases(**PLAIN))
def test_limits_of_returns(case):
    """lam 1 and n >= time are the reward to go, lam 0 and n = 1 the one-step target."""
    assert_close(lambda_returns(case, lam=1.0), reward_to_go(case), scale=10)
    assert_close(n_step_returns(case, 6), reward_to_go(case), scale=10)
    assert_close(lambda_returns(case, lam=0.0), n_step_returns(case, 1), scale=10)


@given(case=cases(**PLAIN), n=st.integers(1, 7))
def test_one_number_is_a_constant_tensor(case, n):
    """gamma and lam as numbers equal tensors full of them."""
    full = {
        "gamma": torch.full_like(case.rewards, case.gamma),
        "lam": torch.full_like(case.rewards, case.lam),
    }
    for function in (reward_to_go, lambda_returns, gae, lambda case, **changes: n_step_returns(case, n, **changes)):
        result, constant = function(case), function(case, **full)
        assert_close(tuple(result) if isinstance(result, tuple) else result, constant, scale=10)


@given(case=per_step())
def test_gae_is_the_lambda_return_minus_the_value(case):
    """A_t = G_t - V_t for per-step gamma and lam too."""
    expected = torch.where(case.mask, lambda_returns(case) - case.values, 0.0)
    assert_close(gae(case).advantages, expected, scale=10)


@given(case=per_step())
def test_gae_double_sum_per_step(case):
    """A_t sums delta_j over j >= t with weight prod gamma_i lam_{i+1}: gamma_t is of t -> t+1, lam_t of state t."""

    def double_sum(rewards, values, gamma, lam, after):
        ahead = [*values, after][1:]
        deltas = [r + g * v_next - v for r, g, v_next, v in zip(rewards, gamma, ahead, values, strict=True)]
        return [
            math.fsum(deltas[j] * math.prod(gamma[i] * lam[i + 1] for i in range(t, j)) for j in range(t, len(deltas)))
            for t in range(len(deltas))
        ]

    assert_close(gae(case).advantages, by_row(case, double_sum, "rewards", "values", "gamma", "lam"), scale=10)


@given(case=per_step(), garbage=st.sampled_from((math.nan, math.inf, -math.inf, 1e300)))
def test_masked_discounts_are_not_there(case, garbage):
    """Whatever gamma and lam hold at a masked position changes nothing, and gets exactly zero gradient."""
    gamma, lam = (torch.where(case.mask, x, garbage) for x in (case.gamma, case.lam))
    torch.testing.assert_close(gae(case, gamma=gamma, lam=lam), gae(case), rtol=0, atol=0)
    for name, x in (("gamma", gamma), ("lam", lam)):
        slope = gradient(lambda x, name=name: gae(case.but(gamma=gamma, lam=lam), **{name: x}).advantages.sum(), x)
        assert (slope[~case.mask] == 0).all()
        assert slope.isfinite().all()


@given(case=cases(kept=1, **PLAIN), n=st.integers(1, 6))
def test_truncated_against_terminated(case, n):
    """A bootstrap of 0 is termination; any other is as if one more token earned it and then the sequence terminated."""
    zeros = torch.zeros_like(case.bootstrap)
    assert_close(gae(case, bootstrap=zeros), gae(case, bootstrap=None))
    longer = case.but(
        rewards=torch.cat((case.rewards, case.bootstrap[:, None]), 1),
        values=torch.cat((case.values, case.bootstrap[:, None]), 1),
        mask=torch.cat((case.mask, torch.ones_like(case.mask[:, :1])), 1),
        bootstrap=None,
    )
    for function in (reward_to_go, lambda_returns, lambda case: n_step_returns(case, n)):
        assert_close(function(longer)[:, :-1][case.mask], function(case)[case.mask], scale=10)


@given(case=cases(batch=2, kept=1, **PLAIN))
def test_truncation_bootstraps_termination_does_not(case):
    """Only in a row with a bootstrap does the last token see beyond itself, by gamma times the bootstrap."""
    truncated = torch.tensor([True, False])
    after = torch.where(truncated, case.bootstrap, 0.0)
    last = subject.masking.last_kept(case.mask)
    seen = torch.where(last, lambda_returns(case, bootstrap=after) - case.rewards, 0.0)
    assert_close(seen, torch.where(last, (case.gamma * after)[:, None], 0.0), scale=10)


@given(n=st.integers(-2, 0))
def test_n_is_positive(n):
    """n below 1 is refused by name."""
    with pytest.raises(ValueError, match=f"n is {n}"):
        subject.returns.n_step_returns(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), gamma=1.0, n=n
        )


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(torch.ones(1), ValueError, "has shape"), (torch.ones(1, 2, dtype=torch.int64), TypeError, "has dtype")],
)
def test_per_step_arguments_are_checked(name, value, error, message):
    """A per-step gamma or lam of another shape or dtype is refused by name."""
    settings = {"gamma": 1.0, "lam": 1.0} | {name: value}
    with pytest.raises(error, match=f"{name} {message}"):
        subject.returns.lambda_returns(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), **settings
        )


# V-trace.


@st.composite
def off_policy(draw):
    small = NUMBERS.map(lambda x: x / 4)
    case = draw(per_step())
    shape = tuple(case.rewards.shape)
    return case.but(
        logprobs=draw(tensors(*shape, numbers=small)),
        old_logprobs=draw(tensors(*shape, numbers=small)),
        rho_clip=draw(POSITIVE),
        c_clip=draw(POSITIVE),
    )


@given(case=off_policy())
def test_vtrace_is_the_papers_sum(case):
    """v_t is V_t plus the sum of rho_j delta_j, each discounted and weighted by the product of all c before it."""

    def ratios(new, old):
        return [math.exp(x - y) for x, y in zip(new, old, strict=True)]

    def targets(new, old, rewards, values, gamma, lam, after):
        ratio, ahead = ratios(new, old), [*values, after][1:]
        out = []
        for t in range(len(rewards)):
            total = values[t]
            for j in range(t, len(rewards)):
                weight = math.prod(gamma[i] * lam[i] * min(case.c_clip, ratio[i]) for i in range(t, j))
                delta = min(case.rho_clip, ratio[j]) * (rewards[j] + gamma[j] * ahead[j] - values[j])
                total += weight * delta
            out.append(total)
        return out

    def advantages(new, old, rewards, values, gamma, lam, after):
        ratio = ratios(new, old)
        ahead = [*targets(new, old, rewards, values, gamma, lam, after), after][1:]
        return [
            min(case.rho_clip, w) * (r + g * v_next - v)
            for w, r, g, v_next, v in zip(ratio, rewards, gamma, ahead, values, strict=True)
        ]

    names = ("logprobs", "old_logprobs", "rewards", "values", "gamma", "lam")
    scale = 1e3 * max(1.0, case.c_clip) ** 6
    assert_close(vtrace(case).returns, by_row(case, targets, *names), scale=scale)
    assert_close(vtrace(case).advantages, by_row(case, advantages, *names), scale=scale)


@given(case=off_policy(), lam=UNIT)
def test_vtrace_on_policy_is_the_lambda_return(case, lam):
    """At ratio 1, clips of at least 1 and one lam for all steps, v_t is the lambda return."""
    at_one = case.but(old_logprobs=case.logprobs, rho_clip=1.0, c_clip=1.0, lam=lam)
    assert_close(vtrace(at_one).returns, lambda_returns(at_one), scale=10)


@given(case=off_policy(), garbage=st.sampled_from((math.inf, -math.inf, math.nan)))
def test_vtrace_ratios_are_safe(case, garbage):
    """An unusable log-probability under the mask changes nothing; a huge ratio is clipped; neither gets a gradient."""
    dirty = torch.where(case.mask, case.logprobs, garbage)
    torch.testing.assert_close(vtrace(case, logprobs=dirty), vtrace(case), rtol=0, atol=0)
    large = vtrace(case, logprobs=case.logprobs + 1e4)
    assert large.returns.isfinite().all()
    assert (gradient(lambda x: vtrace(case, logprobs=x).returns.sum(), case.logprobs) == 0).all()


# Groups.

GROUPS = st.tuples(st.integers(1, 3), st.integers(1, 5)).flatmap(lambda shape: tensors(*shape))
SPECS = st.fixed_dictionaries({"scale_by_std": st.booleans(), "correction": st.sampled_from((0, 1))})


def grpo(scores, spec, eps=0.0):
    return subject.advantages.grpo(scores, **spec, eps=eps)


@given(scores=GROUPS)
def test_rloo_is_the_score_minus_the_mean_of_the_others(scores):
    """A_i is r_i minus the mean of the other scores, and 0 in a group of one."""
    expected = [
        [x - math.fsum(row[:i] + row[i + 1 :]) / (len(row) - 1) if len(row) > 1 else 0.0 for i, x in enumerate(row)]
        for row in scores.tolist()
    ]
    assert_close(subject.advantages.rloo(scores), expected)


@given(scores=GROUPS.filter(lambda x: x.shape[-1] > 1), change=NUMBERS)
def test_rloo_baseline_ignores_its_own_sample(scores, change):
    """Changing one score by x changes its own advantage by exactly x: the baseline does not move."""
    moved = scores.clone()
    moved[:, 0] += change
    before, after = subject.advantages.rloo(scores), subject.advantages.rloo(moved)
    assert_close(after[:, 0] - before[:, 0], torch.full_like(before[:, 0], change))


@given(scores=GROUPS)
def test_rloo_is_the_scaled_deviation(scores):
    """A is G / (G - 1) (r - mean)."""
    size = scores.shape[-1]
    mean = torch.tensor([[math.fsum(row) / size] for row in scores.tolist()], dtype=torch.float64)
    assert_close(subject.advantages.rloo(scores), (scores - mean) * (size / max(size - 1, 1)))


@given(scores=GROUPS, spec=SPECS)
def test_grpo_is_the_standardised_score(scores, spec):
    """Within a group the advantages have mean 0 and, if scaled, variance 1 with eps 0; without spread they are 0."""
    out = grpo(scores, spec)
    size = scores.shape[-1]
    assert_close(out.sum(-1), torch.zeros(len(scores)).double(), scale=10)
    for row, scaled in zip(scores.tolist(), out.tolist(), strict=True):
        if len(set(row)) == 1:
            assert max(map(abs, scaled)) == 0
        elif spec["scale_by_std"]:
            assert_close(math.fsum(x * x for x in scaled), float(size - spec["correction"]))
        else:
            assert_close(scaled, [x - math.fsum(row) / size for x in row])


@given(scores=GROUPS, spec=SPECS, factor=POSITIVE, shift=st.integers(-1_000_000, 1_000_000))
def test_grpo_is_affine_invariant(scores, spec, factor, shift):
    """Scaled advantages do not change when all scores are multiplied and shifted, by up to 1e6."""
    spec = spec | {"scale_by_std": True}
    assert_close(grpo(factor * scores + shift, spec), grpo(scores, spec), scale=10)


def test_grpo_does_not_cancel():
    """In float32 the group {10000, 10001} gives +-0.707, and offsets of 1e6 as much."""
    spec = {"scale_by_std": True, "correction": 1}
    for offset in (0.0, 1e4, 1e6):
        out = grpo(torch.tensor([0.0, 1.0]) + offset, spec, eps=1e-6)
        assert_close(out, torch.tensor([-math.sqrt(0.5), math.sqrt(0.5)]))


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_offsets_of_groups_leave_no_trace(offset):
    """In float32, {0, 1, 3} stays {-4/3, -1/3, 5/3} under any offset, although its mean is no float32 number."""
    scores = torch.tensor([0.0, 1.0, 3.0]) + torch.tensor([[-offset], [0.0], [offset]])
    expected = torch.tensor([[-4.0, -1.0, 5.0]] * 3) / 3
    assert_close(subject.advantages.grpo(scores, scale_by_std=False, correction=1, eps=0.0), expected)
    assert_close(subject.advantages.rloo(scores), 1.5 * expected)


@given(scores=GROUPS, spec=SPECS, eps=POSITIVE)
def test_grpo_eps_is_added_to_the_deviation(scores, spec, eps):
    """With eps the advantages are those without, times std / (std + eps)."""
    spec = spec | {"scale_by_std": True}
    size = scores.shape[-1]
    bare = grpo(scores, spec | {"scale_by_std": False})
    std = (bare.square().sum(-1, keepdim=True) / max(size - spec["correction"], 1)).sqrt()
    assert_close(grpo(scores, spec, eps), grpo(scores, spec) * (std / (std + eps)))


@given(value=NUMBERS, spec=SPECS)
def test_group_of_one_is_zero(value, spec):
    """A group of one gives 0, in value and in gradient."""
    alone = torch.tensor([[value]], dtype=torch.float64)
    for function in (subject.advantages.rloo, lambda x: grpo(x, spec)):
        assert (function(alone) == 0).all()
        assert (gradient(lambda x, function=function: function(x).sum(), alone) == 0).all()


@given(scores=GROUPS, spec=SPECS, data=st.data())
def test_groups_are_sets(scores, spec, data):
    """Reordering a group reorders its advantages."""
    order = torch.tensor(data.draw(st.permutations(range(scores.shape[-1]))))
    for function in (subject.advantages.rloo, lambda x: grpo(x, spec, 0.5)):
        assert_close(function(scores[:, order]), function(scores)[:, order])


@pytest.mark.parametrize("function", ["rloo", "grpo"])
def test_groups_are_checked(function):
    """Integer scores and scores without a group axis are refused by name."""
    settings = {"scale_by_std": True, "correction": 1, "eps": 0.0} if function == "grpo" else {}
    call = getattr(subject.advantages, function)
    with pytest.raises(TypeError, match="scores has dtype"):
        call(torch.zeros(2, 2, dtype=torch.int64), **settings)
    with pytest.raises(ValueError, match="scores has no axes"):
        call(torch.tensor(1.0), **settings)
