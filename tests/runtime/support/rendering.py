"""One PPO step, written out: float64, one sequence at a time, loops over tokens, Adam by hand.

A second opinion about the whole default path. It is made from the formulas alone, shares no code with the packages it
judges, and takes the slow way wherever there is one: every row is run unpadded and by itself, advantages are the
double sum of the paper, and log-probabilities come from all the logits.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """The numbers in the formulas."""

    kl_coef: float
    gamma: float
    lam: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    learning_rate: float
    adam_eps: float


class Sequence(NamedTuple):
    """What is known of one sequence before the update, a number per response token."""

    logprobs: list[float]
    ref_logprobs: list[float]
    values: list[float]
    rewards: list[float]
    raw_advantages: list[float]
    returns: list[float]


class Step(NamedTuple):
    """All that one step computed."""

    sequences: list[Sequence]
    advantages: list[list[float]]
    """Whitened over the batch."""
    kl: float
    """Mean over sequences of the sum over tokens."""
    policy_losses: list[float]
    """One per optimiser step."""
    value_losses: list[float]
    weights: dict[str, Tensor]
    """After the last optimiser step."""
    smallest_gradient: dict[str, Tensor]
    """Per weight, over all optimiser steps: where it is rounding, Adam turns noise into a full step."""


def in_float64(model: Any) -> Any:
    """A copy that computes in double precision."""
    return copy.deepcopy(model).double().eval()


def ppo_step(
    policy: Any,
    reference: Any,
    queries: list[list[int]],
    responses: list[list[int]],
    scores: list[float],
    order: list[list[list[int]]],
    settings: Settings,
) -> Step:
    """Score the batch and train on it.

    Args:
        policy: a float64 value-head model; its weights change.
        reference: a float64 transformers model.
        queries: prompts.
        responses: answers to them.
        scores: one per sequence.
        order: row numbers, as epochs of optimiser steps.
        settings: the rest.
    """
    sequences: list[Sequence] = []
    for query, response, score in zip(queries, responses, scores, strict=True):
        with torch.no_grad():
            logprobs, values = read_off(policy.pretrained_model, policy.v_head.summary, query, response)
            ref_logprobs, _ = read_off(reference, None, query, response)
        mine, theirs, seen = ([float(x) for x in column] for column in (logprobs, ref_logprobs, values))
        rewards = [-settings.kl_coef * (a - b) for a, b in zip(mine, theirs, strict=True)]
        rewards[-1] += score
        advantages = generalised_advantages(rewards, seen, settings.gamma, settings.lam)
        returns = [a + v for a, v in zip(advantages, seen, strict=True)]
        sequences.append(Sequence(mine, theirs, seen, rewards, advantages, returns))
    whitened = whiten([sequence.raw_advantages for sequence in sequences])
    kl = sum(sum(s.logprobs) - sum(s.ref_logprobs) for s in sequences) / len(sequences)

    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    adam = Adam(parameters, settings)
    policy_losses: list[float] = []
    value_losses: list[float] = []
    smallest = {name: torch.full_like(p, math.inf) for name, p in parameters.items()}
    for epoch in order:
        for rows in epoch:
            policy_terms: list[Tensor] = []
            value_terms: list[Tensor] = []
            for row in rows:
                logprobs, values = read_off(
                    policy.pretrained_model, policy.v_head.summary, queries[row], responses[row]
                )
                for t in range(len(responses[row])):
                    ratio = (logprobs[t] - sequences[row].logprobs[t]).exp()
                    policy_terms.append(clipped_policy_term(ratio, whitened[row][t], settings.cliprange))
                    value_terms.append(
                        clipped_value_term(
                            values[t], sequences[row].values[t], sequences[row].returns[t], settings.cliprange_value
                        )
                    )
            policy_loss = sum(policy_terms, torch.zeros(())) / len(policy_terms)
            value_loss = 0.5 * sum(value_terms, torch.zeros(())) / len(value_terms)
            gradients = torch.autograd.grad(policy_loss + settings.vf_coef * value_loss, list(parameters.values()))
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                smallest[name] = torch.minimum(smallest[name], gradient.abs())
                adam.move(name, parameter, gradient)
            policy_losses.append(float(policy_loss.detach()))
            value_losses.append(float(value_loss.detach()))
    return Step(
        sequences,
        whitened,
        kl,
        policy_losses,
        value_losses,
        {name: parameter.detach().clone() for name, parameter in parameters.items()},
        smallest,
    )


def read_off(model: Any, head: Any, query: list[int], response: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability of each response token, and, with a value head, the value of the state before it."""
    if model.config.is_encoder_decoder:
        decoder = [model.config.decoder_start_token_id, *response[:-1]]
        inputs = {"input_ids": torch.tensor([query]), "decoder_input_ids": torch.tensor([decoder])}
        first, field = 0, "decoder_hidden_states"
    else:
        inputs = {"input_ids": torch.tensor([query + response])}
        first, field = len(query) - 1, "hidden_states"
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    logprobs: list[Tensor] = []
    values: list[Tensor] = []
    for t, token in enumerate(response):
        logits = output.logits[0, first + t]
        top = logits.detach().max()
        logprobs.append(logits[token] - top - (logits - top).exp().sum().log())
        if head is not None:
            hidden = output[field][-1][0, first + t]
            values.append((head.weight[0] * hidden).sum() + head.bias[0])
    return logprobs, values


def generalised_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}; the value after the last token is 0."""
    time = len(rewards)
    later = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * later[t] - values[t] for t in range(time)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, time)) for t in range(time)]


def whiten(rows: list[list[float]]) -> list[list[float]]:
    """(x - mean) / sqrt(var + 1e-8) with Bessel's variance, over all entries of all rows."""
    entries = [x for row in rows for x in row]
    mean = math.fsum(entries) / len(entries)
    variance = math.fsum((x - mean) ** 2 for x in entries) / (len(entries) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def clipped_policy_term(ratio: Tensor, advantage: float, cliprange: float) -> Tensor:
    """max(-A ratio, -A clip(ratio)); no gradient through the clip where it acts."""
    now = ratio.item()
    clipped = min(max(now, 1.0 - cliprange), 1.0 + cliprange)
    if -advantage * now >= -advantage * clipped:
        return -advantage * ratio
    return 0.0 * ratio - advantage * clipped


def clipped_value_term(value: Tensor, old: float, target: float, cliprange: float) -> Tensor:
    """max((V - R)^2, (clip(V) - R)^2), V clipped to the neighbourhood of the old value."""
    now = value.item()
    clipped = min(max(now, old - cliprange), old + cliprange)
    if (now - target) ** 2 >= (clipped - target) ** 2:
        return (value - target) ** 2
    return 0.0 * value + (clipped - target) ** 2


class Adam:
    """Kingma & Ba (2015), algorithm 1."""

    def __init__(self, parameters: dict[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.steps = dict.fromkeys(parameters, 0)

    def move(self, name: str, parameter: Tensor, gradient: Tensor) -> None:
        self.steps[name] += 1
        t = self.steps[name]
        self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
        self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
        first = self.first[name] / (1 - 0.9**t)
        second = self.second[name] / (1 - 0.999**t)
        with torch.no_grad():
            parameter -= self.settings.learning_rate * first / (second.sqrt() + self.settings.adam_eps)
