"""The functions under test against exact ground truth: sums over every string of a small language, in float64."""

import pytest
import torch

from tests.core.subject import subject
from tests.truth import (
    Language,
    exact_gradient,
    expected_gradient,
    gibbs_optimum,
    kl_divergence,
    objective,
    optimal_logits,
    per_token,
    policy_values,
    soft_values,
    string_logprobs,
    token_logprobs,
)

BETA = 0.7
LANGUAGES = {
    "one token": Language.of(5, 1),
    "fixed length": Language.of(3, 4),
    "with an end token": Language.of(3, 4, eos=2),
}


class Task:
    """A language with a policy, a reference, a score for every string and a careless critic."""

    def __init__(self, language: Language, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.language = language
        self.policy, self.reference = language.table(generator), language.table(generator)
        self.scores = torch.randn(language.strings, dtype=torch.float64, generator=generator)
        self.critic = torch.randn(language.states, dtype=torch.float64, generator=generator)
        self.generator = generator

    def objective(self, logits):
        return objective(self.language, logits, self.reference, self.scores, BETA)

    def rewards(self, logits):
        """What a trainer gives each token, by the functions under test."""
        logprobs, ref = token_logprobs(self.language, logits), token_logprobs(self.language, self.reference)
        penalty = subject.kl.k1(logprobs, ref, self.language.mask)
        return subject.rewards.compute_rewards(self.scores, penalty, self.language.mask, kl_coef=BETA).rewards

    def perturbed(self, logits, scale):
        return logits + scale * self.language.table(self.generator)


@pytest.fixture(params=LANGUAGES.values(), ids=LANGUAGES.keys())
def task(request):
    return Task(request.param)


def agree(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def policy_surrogate(language, old_logprobs, advantages):
    """The clipped loss as a sum: weighed by sequences, no string is divided by its length."""

    def total(logprobs):
        return subject.losses.clipped_policy_loss(
            logprobs, old_logprobs, advantages, language.mask, cliprange=0.2
        ).loss.total

    return total


def surrogate_gradient(task, critic, lam):
    """The step a trainer takes on average at ratio 1: rewards, advantages, clipped loss, backward."""
    old = token_logprobs(task.language, task.policy)
    values = per_token(task.language, critic)
    advantages = subject.advantages.gae(
        task.rewards(task.policy), values, task.language.mask, gamma=1.0, lam=lam
    ).advantages
    return expected_gradient(task.language, task.policy, policy_surrogate(task.language, old, advantages))


# G1, G2: the optimum


def test_probabilities_of_all_strings_sum_to_one(task):
    """The strings of the language are all there is: pi(y) sums to 1."""
    agree(string_logprobs(task.language, task.policy).exp().sum(), torch.tensor(1.0).double(), 1e-12)


def test_optimum_is_attained(task):
    """J* = beta log Z is the objective of pi* = ref e^(r / beta) / Z."""
    optimum = gibbs_optimum(task.language, task.reference, task.scores, BETA)
    log_ratio = optimum.logprobs - string_logprobs(task.language, task.reference)
    agree(optimum.logprobs.exp().sum(), torch.tensor(1.0).double(), 1e-12)
    agree((optimum.logprobs.exp() * (task.scores - BETA * log_ratio)).sum(), optimum.value, 1e-12)


def test_nothing_beats_the_optimum(task):
    """Every policy falls short of J* by exactly beta KL(pi || pi*), and no step away from pi* gains."""
    optimum = gibbs_optimum(task.language, task.reference, task.scores, BETA)
    best = optimal_logits(task.reference, soft_values(task.language, task.reference, task.scores, BETA), BETA)
    agree(string_logprobs(task.language, best), optimum.logprobs, 1e-12)
    for scale in (1e-3, 1e-2, 0.1, 1.0, 3.0):
        other = task.perturbed(best, scale)
        gap = optimum.value - task.objective(other)
        assert gap > 0
        agree(gap, BETA * kl_divergence(task.language, other, best), 1e-12)
    agree(exact_gradient(task.language, best, task.reference, task.scores, BETA), torch.zeros_like(best), 1e-12)


def test_soft_values_satisfy_their_equations(task):
    """V* = beta log sum ref e^(Q* / beta), V* = E_pi*[Q* - beta log(pi* / ref)], V*(root) = J*."""
    soft = soft_values(task.language, task.reference, task.scores, BETA)
    best = optimal_logits(task.reference, soft, BETA)
    reached = task.language.prefixes[task.language.mask].unique()
    ref = task.reference.softmax(-1)
    agree(soft.v[reached], BETA * (ref * (soft.q / BETA).exp()).sum(-1).log()[reached], 1e-12)
    agree(policy_values(task.language, best, task.reference, task.scores, BETA), soft.v, 1e-12)
    agree(soft.v[0], gibbs_optimum(task.language, task.reference, task.scores, BETA).value, 1e-12)


def test_at_the_optimum_every_token_has_advantage_zero(task):
    """Where pi = pi* and the critic is V*, every advantage of every string is 0, for every lambda."""
    soft = soft_values(task.language, task.reference, task.scores, BETA)
    rewards = task.rewards(optimal_logits(task.reference, soft, BETA))
    for lam in (0.0, 0.3, 0.95, 1.0):
        values = per_token(task.language, soft.v)
        estimate = subject.advantages.gae(rewards, values, task.language.mask, gamma=1.0, lam=lam)
        agree(estimate.advantages, torch.zeros_like(values), 1e-12)
        agree(estimate.returns, values, 1e-12)


def test_value_loss_is_minimal_at_the_value_of_the_policy(task):
    """The expected gradient of the value loss at lam = 1 is 0 at V^pi, and only there."""
    language, exact = task.language, policy_values(task.language, task.policy, task.reference, task.scores, BETA)
    weights = string_logprobs(language, task.policy).exp()

    def gradient(critic):
        critic = critic.detach().clone().requires_grad_()
        values = per_token(language, critic)
        old = values.detach()
        targets = subject.advantages.gae(task.rewards(task.policy), old, language.mask, gamma=1.0, lam=1.0).returns
        loss = subject.losses.clipped_value_loss(values, old, targets, language.mask, cliprange=0.2).loss.total
        (pull,) = torch.autograd.grad(loss, values, retain_graph=True)
        return torch.autograd.grad((weights[:, None] * pull * values).sum(), critic)[0]

    agree(gradient(exact), torch.zeros_like(exact), 1e-12)
    assert gradient(task.critic).abs().max() > 1e-3


# G3: the gradient


def test_surrogate_gradient_is_the_policy_gradient(task):
    """At ratio 1, gamma = lam = 1, the clipped loss has expected gradient -dJ, whatever the critic says."""
    exact = exact_gradient(task.language, task.policy, task.reference, task.scores, BETA)
    for critic in (task.critic, torch.zeros_like(task.critic), 100.0 * task.critic.square()):
        agree(-surrogate_gradient(task, critic, lam=1.0), exact, 1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_exact_critic_makes_every_lambda_unbiased(task, lam):
    """With V^pi for a critic the expected gradient is -dJ for lam < 1 too."""
    critic = policy_values(task.language, task.policy, task.reference, task.scores, BETA)
    exact = exact_gradient(task.language, task.policy, task.reference, task.scores, BETA)
    agree(-surrogate_gradient(task, critic, lam=lam), exact, 1e-10)


@pytest.mark.parametrize("name", ["fixed length", "with an end token"])
def test_a_wrong_critic_biases_smaller_lambdas(name):
    """With a careless critic and lam < 1 the gradient is not dJ: the two tests above can fail."""
    task = Task(LANGUAGES[name])
    exact = exact_gradient(task.language, task.policy, task.reference, task.scores, BETA)
    assert (surrogate_gradient(task, task.critic, lam=0.5) + exact).abs().max() > 1e-3


def test_dividing_each_string_by_its_length_is_another_objective():
    """Where lengths differ, the mean over tokens per string is not dJ: the weight has to be of sequences."""
    task = Task(LANGUAGES["with an end token"])
    language, old = task.language, token_logprobs(task.language, task.policy)
    values = per_token(language, task.critic)
    advantages = subject.advantages.gae(task.rewards(task.policy), values, language.mask, gamma=1.0, lam=1.0).advantages
    lengths = language.mask.sum(-1, keepdim=True)
    divided = expected_gradient(language, task.policy, policy_surrogate(language, old, advantages / lengths))
    exact = exact_gradient(language, task.policy, task.reference, task.scores, BETA)
    parallel = (divided * exact).sum() / (divided.norm() * exact.norm())
    assert parallel.abs() < 0.999


# G4: gradients of the KL estimators


def estimator_gradient(language, policy, reference, estimator, whole_strings):
    """Expected gradient of an estimator on samples: of the sum over tokens, or of strings taken as single tokens."""
    ref = token_logprobs(language, reference)

    def surrogate(logprobs):
        if whole_strings:
            everything = torch.ones(language.strings, 1, dtype=torch.bool)
            return estimator(logprobs.sum(-1, keepdim=True), ref.sum(-1, keepdim=True), everything).sum()
        return estimator(logprobs, ref, language.mask).sum()

    return expected_gradient(language, policy, surrogate)


def gradient_of(function, logits):
    logits = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def test_k1_has_no_expected_gradient(task):
    """E[grad k1] = 0: as a loss it does nothing."""
    for whole_strings in (False, True):
        got = estimator_gradient(task.language, task.policy, task.reference, subject.kl.k1, whole_strings)
        agree(got, torch.zeros_like(got), 1e-12)


def test_k2_descends_the_kl_from_the_policy(task):
    """E[grad k2] = grad KL(pi || ref) for whole strings."""
    exact = gradient_of(lambda logits: kl_divergence(task.language, logits, task.reference), task.policy)
    got = estimator_gradient(task.language, task.policy, task.reference, subject.kl.k2, whole_strings=True)
    agree(got, exact, 1e-12)


def test_k3_descends_the_kl_from_the_reference(task):
    """E[grad k3] = grad KL(ref || pi) for whole strings: the other direction."""
    exact = gradient_of(lambda logits: kl_divergence(task.language, task.reference, logits), task.policy)
    got = estimator_gradient(task.language, task.policy, task.reference, subject.kl.k3, whole_strings=True)
    agree(got, exact, 1e-12)


@pytest.mark.parametrize("name", ["k2_surrogate", "weighted_k1_surrogate", "k3_surrogate"])
def test_surrogates_descend_the_kl_from_the_policy(task, name):
    """E[grad of each surrogate] = grad KL(pi || ref) for whole strings."""

    def surrogate(logprobs, ref_logprobs, mask):
        function = getattr(subject.surrogates, name)
        sampled = (logprobs.detach(),) if name == "weighted_k1_surrogate" else ()
        return function(logprobs, *sampled, ref_logprobs, mask).total[None]

    exact = gradient_of(lambda logits: kl_divergence(task.language, logits, task.reference), task.policy)
    got = estimator_gradient(task.language, task.policy, task.reference, surrogate, whole_strings=True)
    agree(got, exact, 1e-12)


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_per_token_estimators_hold_the_visited_prefixes_fixed(task, estimator):
    """Summed over tokens, k2, k3 and full have the gradients of the KLs per prefix, prefixes drawn from pi and fixed.

    That is not the gradient of the KL of whole strings: a token does not answer for the prefixes it leads to.
    """
    language, ref = task.language, task.reference.log_softmax(-1)
    visits = torch.zeros(language.states, dtype=torch.float64)
    weights = string_logprobs(language, task.policy).exp()[:, None] * language.mask
    visits.index_put_((language.prefixes.flatten(),), weights.flatten(), accumulate=True)

    def per_prefix(logits):
        own = logits.log_softmax(-1)
        if estimator == "k3":
            return (visits[:, None] * ref.exp() * (ref - own)).sum()
        return (visits[:, None] * own.exp() * (own - ref)).sum()

    def whole_table(logprobs, ref_logprobs, mask):
        own = logits.log_softmax(-1)[language.prefixes]
        return subject.kl.full(own, ref[language.prefixes], mask)

    exact = gradient_of(per_prefix, task.policy)
    if estimator == "full":
        logits = task.policy.clone().requires_grad_()
        sampled = string_logprobs(language, task.policy).exp()
        got = torch.autograd.grad((sampled * whole_table(None, None, language.mask).sum(-1)).sum(), logits)[0]
    else:
        got = estimator_gradient(
            language, task.policy, task.reference, getattr(subject.kl, estimator), whole_strings=False
        )
    agree(got, exact, 1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_unbiased_estimators_average_to_the_kl(task, estimator):
    """E[sum of k1] = E[sum of k3] = E[sum of full] = KL(pi || ref)."""
    language, weights = task.language, string_logprobs(task.language, task.policy).exp()
    exact = kl_divergence(language, task.policy, task.reference)
    if estimator == "full":
        tables = (logits.log_softmax(-1)[language.prefixes] for logits in (task.policy, task.reference))
        got = subject.kl.full(*tables, language.mask)
    else:
        sides = (token_logprobs(language, logits) for logits in (task.policy, task.reference))
        got = getattr(subject.kl, estimator)(*sides, language.mask)
    agree((weights * got.sum(-1)).sum(), exact, 1e-12)


# G5: GAE as a matrix


@pytest.mark.parametrize("gamma", [0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gae_is_a_triangular_matrix_times_the_td_errors(task, gamma, lam):
    """A = L delta with L_ij = (gamma lam)^(j - i) for j >= i, on every string of the language."""
    mask = task.language.mask
    rewards, values = task.rewards(task.policy), per_token(task.language, task.critic)
    got = subject.advantages.gae(rewards, values, mask, gamma=gamma, lam=lam).advantages
    for row, (r, v, m) in enumerate(zip(rewards, values, mask, strict=True)):
        r, v = r[m], v[m]
        delta = r + gamma * torch.cat((v[1:], v.new_zeros(1))) - v
        steps = torch.arange(len(r))
        distance = (steps[None, :] - steps[:, None]).double()
        matrix = torch.where(distance >= 0, (gamma * lam) ** distance.clamp(min=0), 0.0)
        agree(got[row][m], matrix @ delta, 1e-12)


def test_holes_leave_the_gradient_alone(task):
    """Strings with masked tool tokens between their tokens have the same rewards, advantages and gradient."""
    language = task.language
    old, critic = token_logprobs(language, task.policy), per_token(language, task.critic)
    columns = 2 * torch.arange(language.length)  # every second column of the wider layout is a hole

    def spread(x, filler):
        wide = torch.full((language.strings, 2 * language.length), filler, dtype=x.dtype)
        return wide.index_copy(1, columns, x)

    mask = spread(language.mask, False)
    penalty = subject.kl.k1(spread(old, 7.0), spread(token_logprobs(language, task.reference), -3.0), mask)
    rewards = subject.rewards.compute_rewards(task.scores, penalty, mask, kl_coef=BETA).rewards
    advantages = subject.advantages.gae(rewards, spread(critic, 9.0), mask, gamma=1.0, lam=0.5).advantages
    plain = subject.advantages.gae(task.rewards(task.policy), critic, language.mask, gamma=1.0, lam=0.5).advantages
    agree(advantages[:, columns], plain, 1e-12)


# G6: leave-one-out and group-relative baselines


def group_gradient(task, size, estimator):
    """Expected gradient of sum_i A_i log pi(y_i) / size over every group of ``size`` strings."""
    language = task.language
    logits = task.policy.clone().requires_grad_()
    logprobs = string_logprobs(language, logits)
    groups = torch.cartesian_prod(*[torch.arange(language.strings)] * size)
    penalised = task.scores - BETA * (logprobs.detach() - string_logprobs(language, task.reference))
    weights = logprobs.detach()[groups].sum(-1).exp()
    return torch.autograd.grad((weights * (estimator(penalised[groups]) * logprobs[groups]).mean(-1)).sum(), logits)[0]


@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_unbiased(eos, size):
    """Over all groups of two or three strings, the leave-one-out advantage has the exact gradient as its mean."""
    task = Task(Language.of(2, 2, eos=eos))
    exact = exact_gradient(task.language, task.policy, task.reference, task.scores, BETA)
    agree(group_gradient(task, size, subject.advantages.rloo), exact, 1e-10)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rloo_is_the_centred_score_enlarged(size):
    """RLOO is G / (G - 1) (r - mean): the baseline of everybody, with the share of one's own taken out again."""
    scores = torch.randn(20, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    centred = scores - scores.mean(-1, keepdim=True)
    agree(subject.advantages.rloo(scores), size / (size - 1) * centred, 1e-12)
    others = (scores.sum(-1, keepdim=True) - scores) / (size - 1)
    agree(subject.advantages.rloo(scores), scores - others, 1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_without_std_is_the_gradient_made_smaller(size):
    """Centred by the group's mean, own score included, the gradient is (G - 1) / G of the exact one."""
    task = Task(Language.of(2, 2))
    exact = exact_gradient(task.language, task.policy, task.reference, task.scores, BETA)

    def centred(scores):
        return subject.advantages.grpo(scores, scale_by_std=False, correction=1, eps=1e-4)

    agree(group_gradient(task, size, centred), (size - 1) / size * exact, 1e-10)


def test_grpo_with_std_is_another_direction():
    """Divided by the group's deviation, the gradient is not the exact one at any length."""
    task = Task(Language.of(2, 2))
    exact = exact_gradient(task.language, task.policy, task.reference, task.scores, BETA)

    def standardised(scores):
        return subject.advantages.grpo(scores, scale_by_std=True, correction=1, eps=1e-4)

    got = group_gradient(task, 3, standardised)
    assert (got * exact).sum() / (got.norm() * exact.norm()) < 0.999


# G7: partitions


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_any_partition_gives_the_same_gradient(task, parts):
    """Losses of microbatches add up: total, weight and gradient do not depend on where a batch was cut."""
    language = task.language
    old = token_logprobs(language, task.perturbed(task.policy, 0.1))
    values = per_token(language, task.critic)
    advantages = subject.advantages.gae(
        task.rewards(task.policy), values, language.mask, gamma=1.0, lam=0.95
    ).advantages
    logits = task.policy.clone().requires_grad_()

    def loss(rows):
        logprobs = token_logprobs(language, logits)[rows]
        return subject.losses.clipped_policy_loss(
            logprobs, old[rows], advantages[rows], language.mask[rows], cliprange=0.2
        ).loss

    whole = loss(torch.arange(language.strings))
    expected = torch.autograd.grad(whole.total / whole.weight, logits)[0]
    shuffled = torch.randperm(language.strings, generator=task.generator)
    pieces = [loss(rows) for rows in shuffled.tensor_split(parts)]
    weight = sum(piece.weight for piece in pieces)
    assert weight == whole.weight
    got = sum(torch.autograd.grad(piece.total / weight, logits, retain_graph=True)[0] for piece in pieces)
    agree(got, expected, 1e-12)


# G8: whitening


@pytest.mark.parametrize(("correction", "first_row"), [(0, [0.0508, 0.4381, 0.8254]), (1, [0.1394, 0.5046, 0.8697])])
def test_whitening_goldens(correction, first_row):
    """1.2, 1.3 ... 2.0 in a 3x3 with its mean kept: the published figures for both variances."""
    x = torch.arange(12, 21).reshape(3, 3) / 10.0
    mask = torch.ones(3, 3, dtype=torch.bool)
    moments = subject.moments.masked_moments(x, mask)
    got = subject.whitening.whiten(x, mask, moments, shift_mean=False, correction=correction, eps=1e-8)
    agree(got[0], torch.tensor(first_row), 5e-5)


# All together, without a trainer


@pytest.mark.parametrize("eos", [None, 2])
def test_gradient_ascent_reaches_the_optimum(eos):
    """Plain gradient descent on the clipped loss, from the reference on, ends within 1e-3 of J*."""
    task = Task(Language.of(3, 3, eos=eos))
    task.reference = 0.5 * task.reference
    best = gibbs_optimum(task.language, task.reference, task.scores, BETA).value
    assert best - task.objective(task.reference) > 0.3
    task.policy = task.reference
    for _ in range(200):
        task.policy = task.policy - 4.0 * surrogate_gradient(task, task.critic, lam=1.0)
    assert -1e-12 <= best - task.objective(task.policy) < 1e-3
