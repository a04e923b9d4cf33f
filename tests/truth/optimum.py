"""The best that can be done, by two routes: over whole strings (Gibbs) and token by token (soft values)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tests.truth.language import Language, string_logprobs


class Gibbs(NamedTuple):
    """The optimal policy as log-probabilities of whole strings, and the objective it attains."""

    logprobs: Float[Tensor, "strings"]
    value: Float[Tensor, ""]


class SoftValues(NamedTuple):
    """V*(prefix), and Q*(prefix, token): what is still to come, the KL penalty included."""

    v: Float[Tensor, "states"]
    q: Float[Tensor, "states vocab"]


def gibbs_optimum(
    language: Language, ref_logits: Float[Tensor, "states vocab"], scores: Float[Tensor, "strings"], beta: float
) -> Gibbs:
    """pi*(y) = ref(y) e^(r(y) / beta) / Z and J* = beta log Z."""
    unnormalised = string_logprobs(language, ref_logits) + scores / beta
    log_z = unnormalised.logsumexp(0)
    return Gibbs(unnormalised - log_z, beta * log_z)


def soft_values(
    language: Language, ref_logits: Float[Tensor, "states vocab"], scores: Float[Tensor, "strings"], beta: float
) -> SoftValues:
    """V*(s) = beta log sum_a ref(a | s) e^(Q*(s, a) / beta), by induction from the end of the strings.

    Q*(s, a) is the score if a ends the string and V* of the longer prefix if not.
    """
    ref = ref_logits.log_softmax(-1)
    return SoftValues(*_induction(language, scores, lambda s, q: beta * (ref[s] + q / beta).logsumexp(-1)))


def policy_values(
    language: Language,
    logits: Float[Tensor, "states vocab"],
    ref_logits: Float[Tensor, "states vocab"],
    scores: Float[Tensor, "strings"],
    beta: float,
) -> Float[Tensor, "states"]:
    """V^pi(s) = sum_a pi(a | s) (Q^pi(s, a) - beta log(pi / ref)(a | s)): the perfect critic of this policy."""
    own, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return _induction(language, scores, lambda s, q: (own[s].exp() * (q - beta * (own[s] - ref[s]))).sum(-1))[0]


def optimal_logits(
    ref_logits: Float[Tensor, "states vocab"], values: SoftValues, beta: float
) -> Float[Tensor, "states vocab"]:
    """The table of pi*(a | s) = ref(a | s) e^((Q*(s, a) - V*(s)) / beta), already normalised."""
    return ref_logits.log_softmax(-1) + (values.q - values.v[:, None]) / beta


def per_token(language: Language, values: Float[Tensor, "states"]) -> Float[Tensor, "strings time"]:
    """The value of the prefix before every token of every string: a critic's output; 0 behind the end."""
    return torch.where(language.mask, values[language.prefixes], 0.0)


def _induction(language, scores, backup):
    """Fill q from the last position to the first; ``backup(states, q)`` turns their rows of q into their values."""
    v = torch.zeros(language.states, dtype=scores.dtype)
    q = torch.zeros(language.states, language.vocab, dtype=scores.dtype)
    last = language.mask.sum(-1) - 1
    for t in reversed(range(language.length)):
        here, ends = language.mask[:, t], last == t
        q[language.prefixes[ends, t], language.tokens[ends, t]] = scores[ends]
        if t + 1 < language.length:
            goes_on = here & ~ends
            q[language.prefixes[goes_on, t], language.tokens[goes_on, t]] = v[language.prefixes[goes_on, t + 1]]
        reached = language.prefixes[here, t].unique()
        v[reached] = backup(reached, q[reached])
    return v, q
