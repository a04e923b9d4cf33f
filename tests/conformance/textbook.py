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
from ppo_core.off_policy import VTrace
from ppo_core.rewards import Rewards
from ppo_core.scores import ScoreState
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
    mean, spread = (y.double().expand(x.shape) for y in (moments.mean, variance(moments, correction=correction)))

    def standardise(values, mean, spread):
        pairs = zip(values, mean, spread + eps, strict=True)
        scaled = [(value - m) / s.sqrt() if s > 0 else 0 * value for value, m, s in pairs]
        scaled = torch.stack(scaled) if scaled else values
        return scaled if shift_mean else scaled + mean

    return answer(on_kept(mask, standardise, x, mean, spread), x)


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


# KL as a loss: Tang & Munos (2025)


def counted(mask, terms):
    return Average(terms.sum(), mask.sum().to(terms.dtype))


def k2_surrogate(logprobs, ref_logprobs, mask):
    return counted(mask, k2(logprobs, ref_logprobs.detach(), mask))


def weighted_k1_surrogate(logprobs, old_logprobs, ref_logprobs, mask):
    ratio = on_kept(mask, lambda new, old: (new - old).exp(), logprobs, old_logprobs.detach())
    return counted(mask, ratio * k1(logprobs, ref_logprobs.detach(), mask))


def k3_surrogate(logprobs, ref_logprobs, mask):
    slope = k2(logprobs, ref_logprobs.detach(), mask)
    return counted(mask, k3(logprobs, ref_logprobs, mask).detach() + (slope - slope.detach()))


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


# the recurrence


def linear_recurrence(x, coef, after=None):
    y = torch.zeros(x.shape[:-1], dtype=torch.float64) if after is None else after.double()
    steps = []
    for t in reversed(range(x.shape[-1])):
        y = x[..., t].double() + coef[..., t].double() * y
        steps.insert(0, y)
    return answer(torch.stack(steps, dim=-1), x, coef) if steps else x


# returns: Sutton & Barto (2018), equations 3.9, 12.18 and 7.1


def by_row(mask, bootstrap, function, *inputs):
    """function(kept steps of each input, what follows the last one) of every row, put back; 0 elsewhere."""
    inputs = [x if isinstance(x, torch.Tensor) else torch.full(mask.shape, x, dtype=torch.float64) for x in inputs]
    found, zero = [], torch.zeros((), dtype=torch.float64)
    for row, kept in enumerate(mask):
        places = [t for t in range(len(kept)) if kept[t]]
        after = zero if bootstrap is None else bootstrap[row].double()
        found += function(*([x[row, t].double() for t in places] for x in inputs), after)
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, torch.stack([*found, zero]))


def reward_to_go(rewards, mask, bootstrap=None, *, gamma):
    def discount(rewards, gamma, after):
        out = []
        for t in reversed(range(len(rewards))):
            after = rewards[t] + gamma[t] * after
            out.insert(0, after)
        return out

    return answer(by_row(mask, bootstrap, discount, rewards, gamma), rewards)


def lambda_returns(rewards, values, mask, bootstrap=None, *, gamma, lam):
    def mix(rewards, values, gamma, lam, after):
        out, value, weight = [], after, 1.0
        for t in reversed(range(len(rewards))):
            after = rewards[t] + gamma[t] * ((1 - weight) * value + weight * after)
            value, weight = values[t], lam[t]
            out.insert(0, after)
        return out

    return answer(by_row(mask, bootstrap, mix, rewards, values, gamma, lam), rewards, values)


def n_step_returns(rewards, values, mask, bootstrap=None, *, gamma, n):
    def look_ahead(rewards, values, gamma, after):
        out = []
        for t in range(len(rewards)):
            end = min(t + n, len(rewards))
            target = values[end] if end < len(values) else after
            for k in reversed(range(t, end)):
                target = rewards[k] + gamma[k] * target
            out.append(target)
        return out

    return answer(by_row(mask, bootstrap, look_ahead, rewards, values, gamma), rewards, values)


# advantages: Schulman et al. (2015), equations 11 to 16; Ahmadian et al. (2024); Shao et al. (2024)


def gae(rewards, values, mask, bootstrap=None, *, gamma, lam):
    def accumulate(rewards, values, gamma, lam, after):
        out, advantage, trace = [], 0.0, 0.0
        for t in reversed(range(len(rewards))):
            advantage = rewards[t] + gamma[t] * after - values[t] + gamma[t] * trace * advantage
            after, trace = values[t], lam[t]
            out.insert(0, advantage)
        return out

    advantages = answer(by_row(mask, bootstrap, accumulate, rewards, values, gamma, lam), rewards, values)
    return Advantages(advantages, on_kept(mask, lambda a, v: a + v, advantages, values))


def per_group(scores, function):
    groups = scores.double().reshape(-1, scores.shape[-1])
    return answer(torch.stack([function(group) for group in groups]).reshape(scores.shape), scores)


def rloo(scores):
    def leave_one_out(group):
        others = [torch.cat((group[:i], group[i + 1 :])) for i in range(len(group))]
        return torch.stack([x - rest.mean() if len(rest) else 0 * x for x, rest in zip(group, others, strict=True)])

    return per_group(scores, leave_one_out)


def grpo(scores, *, scale_by_std, correction, eps):
    def standardise(group):
        centred = (group[:, None] - group).mean(-1)  # x - mean, as the mean of differences: exact under an offset
        squares = (centred**2).sum()
        if not scale_by_std or squares == 0:
            return centred
        return centred / ((squares / max(len(group) - correction, 1)).sqrt() + eps)

    return per_group(scores, standardise)


# off-policy: Espeholt et al. (2018), equation 1 and remark 1


def vtrace(logprobs, old_logprobs, rewards, values, mask, bootstrap=None, *, gamma, lam, rho_clip, c_clip):
    def targets(new, old, rewards, values, gamma, lam, after):
        advantages, returns, value, target = [], [], after, after
        for t in reversed(range(len(rewards))):
            ratio = (new[t] - old[t]).detach().exp()
            rho, c = ratio.clamp(max=rho_clip), lam[t] * ratio.clamp(max=c_clip)
            advantages.insert(0, rho * (rewards[t] + gamma[t] * target - values[t]))
            delta = rho * (rewards[t] + gamma[t] * value - values[t])
            target, value = values[t] + delta + gamma[t] * c * (target - value), values[t]
            returns.insert(0, target)
        return advantages, returns

    steps = (logprobs, old_logprobs, rewards, values, gamma, lam)
    pair = (by_row(mask, bootstrap, lambda *row, part=part: targets(*row)[part], *steps) for part in (0, 1))
    return VTrace(*(answer(x, *steps[:4]) for x in pair))


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


# running scores


def update_score_state(state, moments):
    n, mean, m2 = (float(x) for x in moments)
    if not all(map(math.isfinite, (n, mean, m2))):
        raise ValueError(f"moments are {(n, mean, m2)}, expected finite numbers")
    if n == 0:
        return state
    total = state.count + n
    middle = (state.count * state.mean + n * mean) / total
    spread = state.m2 + m2 + state.count * (state.mean - middle) ** 2 + n * (mean - middle) ** 2
    return ScoreState(total, middle, spread)


def scale_scores(scores, state, *, use_scaling, use_norm, clip):
    scaled = scores.double()
    if use_scaling:
        scaled = (scaled - (state.mean if use_norm else 0.0)) / (state.std if state.std > 0 else 1.0)
    return answer(scaled if clip is None else scaled.clamp(-clip, clip), scores)


merge_averages.__name__ = merge_moments.__name__ = "merge"

implementation = areas(
    masking=[keep, masked_sum, masked_mean, last_kept],
    averages=[average, merge_averages, mean_of],
    moments=[masked_moments, merge_moments, variance],
    whitening=[whiten],
    kl=[k1, kl_abs, k2, k3, full],
    logprobs=[token_logprobs, token_entropy],
    rewards=[compute_rewards],
    scan=[linear_recurrence],
    returns=[reward_to_go, lambda_returns, n_step_returns],
    advantages=[gae, rloo, grpo],
    off_policy=[vtrace],
    surrogates=[k2_surrogate, weighted_k1_surrogate, k3_surrogate],
    scores=[update_score_state, scale_scores],
    losses=[clipped_policy_loss, clipped_value_loss],
    controllers=[adaptive_kl_update, fixed_kl_update],
)
