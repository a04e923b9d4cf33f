"""The formulas as the papers print them, in float64, with loops over time and no regard for speed.

Written to be checked by eye: ``x[mask]`` is all there is to masking. Whoever doubts a property can ask whether this
file disagrees with it. The tiled head and the restriction to a sampling support are left out, being an economy of
memory and an order of operations rather than formulas.
"""

import math

import torch

from ppo_core.advantages import Advantages
from ppo_core.averages import Average
from ppo_core.controllers import KLControllerState
from ppo_core.losses import PolicyLoss, ValueLoss
from ppo_core.moments import Moments
from ppo_core.rewards import Rewards
from tests.conformance import areas


def answer(result, *inputs):
    """float64 as the arguments want it: their widest dtype, float32 at least."""
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return result.to(dtype)


def on_kept(mask, function, *inputs):
    """function(kept entries of each input), put back to where they were; 0 elsewhere."""
    values = function(*(x[mask].double() for x in inputs))
    return answer(torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values), *inputs)


def over(dim, x, mask, function):
    """function(list of kept entries) over the axes ``dim``, for each of what remains."""
    axes = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else dim
    axes = sorted(axis % x.ndim for axis in axes)
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    shape = [x.shape[axis] for axis in rest]
    sizes = math.prod(shape), math.prod(x.shape[axis] for axis in axes)
    x, mask = (y.permute(*rest, *axes).reshape(sizes) for y in (x, mask))
    results = [function(values[kept].double()) for values, kept in zip(x, mask, strict=True)]
    return answer(torch.stack(results).reshape(shape), x)


# masking


def keep(x, mask):
    return on_kept(mask, lambda values: values, x)


def masked_sum(x, mask, *, dim=None):
    return over(dim, x, mask, lambda values: values.sum())


def masked_mean(x, mask, *, dim=None):
    return over(dim, x, mask, lambda values: values.mean() if len(values) else values.sum())


def last_kept(mask):
    out = torch.zeros_like(mask)
    for row, kept in zip(out.reshape(-1, mask.shape[-1]), mask.reshape(-1, mask.shape[-1]), strict=True):
        places = [t for t in range(len(kept)) if kept[t]]
        if places:
            row[places[-1]] = True
    return out


# averages


def average(x, mask):
    total = masked_sum(x, mask)
    return Average(total, torch.tensor(len(x[mask]), dtype=total.dtype))


def merge_averages(a, b):
    return Average(a.total + b.total, a.weight + b.weight)


def mean_of(a):
    pairs = zip(a.total.reshape(-1), a.weight.reshape(-1), strict=True)
    return torch.stack([total / weight if weight else 0.0 * total for total, weight in pairs]).reshape(a.total.shape)


# moments


def masked_moments(x, mask, *, dim=None):
    return Moments(
        over(dim, x, mask, lambda values: torch.tensor(float(len(values)), dtype=torch.float64)),
        masked_mean(x, mask, dim=dim),
        over(dim, x, mask, lambda values: ((values - values.mean()) ** 2).sum()),
    )


def merge_moments(a, b):
    """Pooled: the mean weighed by the counts, and each side's deviations from it."""
    n = a.n + b.n
    mean = torch.where(n > 0, (a.n * a.mean + b.n * b.mean) / n, 0.0)
    return Moments(n, mean, a.m2 + b.m2 + a.n * (a.mean - mean) ** 2 + b.n * (b.mean - mean) ** 2)


def variance(m, *, correction):
    pairs = zip(m.n.reshape(-1), m.m2.reshape(-1), strict=True)
    found = [m2 / (n - correction) if n > correction else 0.0 * m2 for n, m2 in pairs]
    return torch.stack(found).reshape(m.n.shape)


# whitening


def whiten(x, mask, moments, *, shift_mean, correction, eps):
    mean, spread = moments.mean.double(), variance(moments, correction=correction).double() + eps

    def standardise(values):
        scaled = (values - mean) / spread.sqrt() if spread > 0 else 0.0 * values
        return scaled if shift_mean else scaled + mean

    return on_kept(mask, standardise, x)


# KL: Schulman's note of 2020


def k1(logprobs, ref_logprobs, mask):
    return on_kept(mask, lambda p, q: p - q, logprobs, ref_logprobs)


def kl_abs(logprobs, ref_logprobs, mask):
    return on_kept(mask, lambda p, q: (p - q).abs(), logprobs, ref_logprobs)


def k2(logprobs, ref_logprobs, mask):
    return on_kept(mask, lambda p, q: (p - q) ** 2 / 2, logprobs, ref_logprobs)


def k3(logprobs, ref_logprobs, mask):
    return on_kept(mask, lambda p, q: (q - p).exp() - 1 - (q - p), logprobs, ref_logprobs)


def full(logprobs, ref_logprobs, mask):
    def divergences(p, q):
        rows = []
        for row_p, row_q in zip(p, q, strict=True):
            terms = [a.exp() * (a - b) for a, b in zip(row_p, row_q, strict=True) if a > -math.inf]
            rows.append(sum(terms, torch.zeros((), dtype=torch.float64)))
        return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)

    return on_kept(mask, divergences, logprobs, ref_logprobs)


# log-probabilities


def per_position(logits, function):
    """function(logits of one position, its number) for every position."""
    rows = logits.double().reshape(-1, logits.shape[-1])
    out = torch.stack([function(row, i) for i, row in enumerate(rows)])
    return answer(out.reshape(logits.shape[:-1]), logits)


def log_softmax(row):
    row = row - row.detach().max()
    return row - row.exp().sum().log()


def token_logprobs(logits, tokens):
    tokens = tokens.reshape(-1)
    return per_position(logits, lambda row, i: log_softmax(row)[tokens[i]])


def token_entropy(logits):
    def entropy(row, _):
        logprobs = log_softmax(row[row > -math.inf])
        return -(logprobs.exp() * logprobs).sum()

    return per_position(logits, entropy)


# rewards: Ziegler et al. (2019), equation 2


def compute_rewards(scores, kl, mask, *, kl_coef):
    penalties, rewards = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    for row in range(mask.shape[0]):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        for t in places:
            penalties[row, t] = -float(kl_coef) * kl[row, t].item()
            rewards[row, t] = penalties[row, t] + (scores[row].item() if t == places[-1] else 0.0)
    return Rewards(answer(rewards, scores, kl), answer(penalties, scores, kl))


# advantages: Schulman et al. (2015), equations 11 to 16


def gae(rewards, values, mask, bootstrap=None, *, gamma, lam):
    out = torch.zeros(mask.shape).double()
    for row in range(mask.shape[0]):
        following, advantage = 0.0 if bootstrap is None else bootstrap[row].item(), 0.0
        for t in reversed([t for t in range(mask.shape[1]) if mask[row, t]]):
            delta = rewards[row, t].item() + gamma * following - values[row, t].item()
            advantage = delta + gamma * lam * advantage
            following = values[row, t].item()
            out[row, t] = advantage
    out = answer(out, rewards, values)
    return Advantages(out, on_kept(mask, lambda a, v: a + v, out, values))


# losses: Schulman et al. (2017), equation 7; baselines' ppo2 for the value


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, *, cliprange):
    new, old, advantage = logprobs[mask].double(), old_logprobs[mask].detach().double(), advantages[mask].detach()
    ratio = (new - old).exp()
    # max over the improving side is a bound: (1 + eps) A for a good token, (1 - eps) A for a bad one.
    bound = torch.where(advantage > 0, (1 + cliprange) * advantage, (1 - cliprange) * advantage)
    objective = torch.minimum(ratio * advantage, bound)
    moved, weight = (new - old).detach(), torch.tensor(float(mask.sum())).double()

    def total(x):
        return Average(x.sum(), weight)

    return PolicyLoss(
        loss=total(-objective),
        clip_fraction=total((ratio * advantage > bound).double()),
        approx_kl=total(moved**2 / 2),
        policy_kl=total(-moved),
        ratio=total(ratio.detach()),
        ratio_deviation=(ratio.detach() - 1).abs().max() if len(ratio) else weight,
    )


def clipped_value_loss(values, old_values, returns, mask, *, cliprange):
    value, old, target = values[mask].double(), old_values[mask].detach().double(), returns[mask].detach().double()
    near = torch.minimum(torch.maximum(value, old - cliprange), old + cliprange)
    plain, clipped = (value - target) ** 2, (near - target) ** 2
    weight = torch.tensor(float(mask.sum())).double()
    return ValueLoss(
        loss=Average(torch.maximum(plain, clipped).sum() / 2, weight),
        clip_fraction=Average((clipped > plain).double().sum(), weight),
        error=Average(plain.detach().sum(), weight),
    )


# controllers: Ziegler et al. (2019), section 2.2


def adaptive_kl_update(state, kl, n_steps, *, target, horizon):
    for name, value, legal in (
        ("target", target, 0 < target < math.inf),
        ("horizon", horizon, 0 < horizon < math.inf),
        ("n_steps", n_steps, 0 <= n_steps < 5 * horizon),
        ("kl", kl, math.isfinite(kl)),
    ):
        if not legal:
            raise ValueError(f"{name} is {value}")
    error = (kl - target) / target
    return KLControllerState(coef=state.coef * (1 + max(-0.2, min(0.2, error)) * n_steps / horizon))


def fixed_kl_update(state, kl, n_steps):
    return state


merge_averages.__name__ = merge_moments.__name__ = "merge"

implementation = areas(
    masking=[keep, masked_sum, masked_mean, last_kept],
    averages=[average, merge_averages, mean_of],
    moments=[masked_moments, merge_moments, variance],
    whitening=[whiten],
    kl=[k1, kl_abs, k2, k3, full],
    logprobs=[token_logprobs, token_entropy],
    rewards=[compute_rewards],
    advantages=[gae],
    losses=[clipped_policy_loss, clipped_value_loss],
    controllers=[adaptive_kl_update, fixed_kl_update],
)
