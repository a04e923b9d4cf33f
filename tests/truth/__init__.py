"""Ground truth by enumeration: small languages in which every expectation of the theory is a finite sum.

>>> from tests.truth import Language, objective, gibbs_optimum, exact_gradient

A :class:`Language` lists all its strings. A policy is a table of logits, one row per prefix, in float64. From there
everything is exact up to rounding: the objective J, its gradient, the policy that maximises it, the value of every
prefix, and the expectation of whatever a trainer would do with a sample. Nothing here uses ``ppo_core``: these are
the figures it is measured against.
"""

from tests.truth.gradients import exact_gradient, expected_gradient
from tests.truth.language import Language, kl_divergence, objective, string_logprobs, token_logprobs
from tests.truth.optimum import (
    Gibbs,
    SoftValues,
    gibbs_optimum,
    optimal_logits,
    per_token,
    policy_values,
    soft_values,
)

__all__ = [
    "Gibbs",
    "Language",
    "SoftValues",
    "exact_gradient",
    "expected_gradient",
    "gibbs_optimum",
    "kl_divergence",
    "objective",
    "optimal_logits",
    "per_token",
    "policy_values",
    "soft_values",
    "string_logprobs",
    "token_logprobs",
]
