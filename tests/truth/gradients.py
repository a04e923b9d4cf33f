"""Two ways to the gradient: of the enumerated objective, and of a surrogate averaged over every possible sample."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tests.truth.language import Language, objective, string_logprobs, token_logprobs

Surrogate = Callable[[Float[Tensor, "strings time"]], Float[Tensor, ""]]


def exact_gradient(
    language: Language,
    logits: Float[Tensor, "states vocab"],
    ref_logits: Float[Tensor, "states vocab"],
    scores: Float[Tensor, "strings"],
    beta: float,
) -> Float[Tensor, "states vocab"]:
    """dJ / dlogits, by automatic differentiation of the whole sum."""
    logits = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(objective(language, logits, ref_logits, scores, beta), logits)[0]


def expected_gradient(
    language: Language, logits: Float[Tensor, "states vocab"], surrogate: Surrogate
) -> Float[Tensor, "states vocab"]:
    """sum_y pi(y) d surrogate(y) / dlogits, the probabilities held fixed: what a trainer sees on average.

    Args:
        language: the strings.
        logits: of the policy that both samples and is trained, so that every ratio is 1.
        surrogate: from the log-probabilities of all tokens, the sum over strings of what is differentiated on each.
            Of a sum, the gradient by a string's log-probabilities is that string's own; they are weighed after.
    """
    logits = logits.detach().clone().requires_grad_()
    logprobs = token_logprobs(language, logits)
    sampled = logprobs.detach().requires_grad_()
    (pull,) = torch.autograd.grad(surrogate(sampled), sampled)
    weights = string_logprobs(language, logits).detach().exp()
    return torch.autograd.grad((weights[:, None] * pull * logprobs).sum(), logits)[0]
