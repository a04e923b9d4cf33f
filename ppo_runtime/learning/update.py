"""The optimisation of one PPO step: epochs x updates x minibatches over a scored rollout."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, NamedTuple, Protocol

import attrs
import torch
from torch import Tensor

from ppo_core.averages import Average, average, mean_of, merge
from ppo_core.losses import PolicyLoss, ValueLoss, clipped_policy_loss, clipped_value_loss
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.forward import Evaluation, Rows, evaluate
from ppo_runtime.learning.guards import SEEN, Cause, cause_in_losses, clip_gradients, seen_in_losses, stop_if_asked
from ppo_runtime.learning.optimisers import beside
from ppo_runtime.models.modes import recomputes_within_backward, without_dropout
from ppo_runtime.ranks.agreement import Ballot, all_or_none
from ppo_runtime.ranks.gather import gather_averages, sum_gradients
from ppo_runtime.ranks.parallel import Alone
from ppo_runtime.ranks.shards import here
from ppo_runtime.ranks.world import World

Plan = list[list[list[Tensor]]]
"""Row indices: epochs of updates of minibatches."""


class PolicyObjective(Protocol):
    """A policy's loss and its diagnostics over kept tokens; each tensor [B, T], of which ``logprobs`` gets gradient."""

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, config: PPOConfig
    ) -> PolicyLoss:
        """Of one minibatch."""
        ...


def clipped_objective(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, config: PPOConfig
) -> PolicyLoss:
    """PPO's own: the ratio is clipped to the configuration's ``cliprange``."""
    return clipped_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange=config.cliprange)


def check_policy_loss(found: object, *, has_gradient: bool) -> None:
    """Refuse what is no loss and diagnostics of one minibatch, as an objective of the user's own may give."""
    if not isinstance(found, PolicyLoss):
        raise TypeError(f"policy_loss= gave a {type(found).__name__}, expected ppo_core.losses.PolicyLoss")
    for name, part in found._asdict().items():
        numbers = [part] if name == "ratio_deviation" else part if isinstance(part, Average) else [None]
        if not all(isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point() for x in numbers):
            raise TypeError(
                f"policy_loss= gave {name} as {part!r:.80}, expected 0-d tensors of floating-point numbers: a sum over "
                "tokens and its weight, as ppo_core.averages.average gives, and one number for ratio_deviation"
            )
    if has_gradient and not found.loss.total.requires_grad:
        raise ValueError("policy_loss= gave a loss without gradient, expected one that depends on logprobs")


class Targets(NamedTuple):
    """What the update trains towards, each [B, T] and without gradient."""

    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, index: Tensor, time: int) -> "Targets":
        """These rows, cut to ``time`` tokens."""
        index = index.to(self.advantages.device)  # once, and not with every tensor
        return Targets(*(x[index, :time] for x in self))


class Losses(NamedTuple):
    """Both objectives of one minibatch, and the entropy as a diagnostic."""

    policy: PolicyLoss
    value: ValueLoss
    entropy: Average
    value_mean: Average


class Outcome(NamedTuple):
    """What happened in the updates of one step, on this rank."""

    averages: dict[str, Average]
    first_ratio_deviation: Tensor
    """max |pi / pi_old - 1| before the first update; more than rounding: other weights made the rollout."""
    skipped: Counter[Cause]
    """How many updates were left out, by cause."""
    epochs: int


@attrs.define
class Progress:
    """How far the updates of a step have come, for the caller to read when they are broken off."""

    waiting: list[tuple[Tensor, Tensor]]
    """Parameters with the gradients that they held before; none once they are of other weights."""
    update: list[Tensor] | None = None
    """The rows of the minibatches of the update that is being made."""
    left_out: list[tuple[Cause, list[Tensor]]] = attrs.field(factory=list)
    """Updates that were left out, and why."""
    begun: int = 0
    """Steps of the optimiser, one that was broken off included."""
    ahead: bool = False
    """Whether this rank has made one that others may not have made."""

    def begin(self) -> None:
        """Record that the weights are about to change."""
        self.begun += 1
        self.waiting.clear()

    def put_back(self) -> None:
        """Restore the gradients from before the step, if no weight has changed since."""
        for parameter, gradient in self.waiting:
            parameter.grad = gradient


class Prepared(NamedTuple):
    """Whether an update's gradients may be stepped on, and their norm before clipping."""

    cause: Cause
    norm: Tensor


def optimise(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    targets: Targets,
    plan: Plan,
    tokens: Tensor,
    config: PPOConfig,
    *,
    policy_loss: PolicyObjective,
    parallel: Alone,
    progress: Progress,
) -> Outcome:
    """Train on one batch, by a plan, of whose updates ``tokens`` are the kept ones over all ranks.

    Every update divides by the number of tokens in its *whole* backward batch, over minibatches and ranks, so that
    the gradient does not depend on how the batch was split. Dropout is off while gradient checkpointing stays on.
    An update that is left out counts as skipped; where what it says is not finite, no statistic and no decision to stop
    early sees it. No gradient is left behind, exceptions included; ``progress`` then says whether weights have moved.
    After a step on a CPU there are zeros in its place, as TRL leaves them; a GPU has better use for the room.
    """
    weights = tokens.view(len(plan), -1).tolist()
    averages: dict[str, Average] = {}
    deviation = torch.zeros((), device=rows.mask.device)
    skipped: Counter[Cause] = Counter()
    epochs = updates = 0
    shards_of = parallel.world if parallel.sharded else None
    own = beside(model, optimizer)

    def minibatch(index: Tensor, counts: bool, last: bool) -> tuple[Tensor, dict[str, Average], Tensor]:
        """A loss, and what is said of it without gradient."""
        part = rows.select(index)
        if not counts:
            part = part._replace(mask=torch.zeros_like(part.mask))

        def made(now: Evaluation) -> tuple[Tensor, dict[str, Average], Tensor]:
            losses = minibatch_losses(now, part, targets, index, config, policy_loss)
            total = losses.policy.loss.total + config.vf_coef * losses.value.loss.total
            return total, averages_of(losses), losses.policy.ratio_deviation.detach()

        return parallel.through(lambda policy: evaluate(policy, part), made, last=last)

    with (
        without_dropout(model),
        _gradients_cleared(model),
        parallel.updating(reentrant=recomputes_within_backward(model)),
    ):
        for epoch, epoch_weights in zip(plan, weights, strict=True):
            epochs += 1
            epoch_averages: dict[str, Average] = {}
            for update, weight in zip(epoch, epoch_weights, strict=True):
                model.zero_grad(set_to_none=True)
                optimizer.zero_grad(set_to_none=True)  # it may step parameters of the user's beside the model's
                update_averages: dict[str, Average] = {}
                cause, finite = Cause.NONE, True
                for group in parallel.rounds(update):
                    with voted(parallel.world) as ballot:
                        for number, (index, counts) in enumerate(group, 1):
                            last = number == len(group)
                            total, found, deviated = minibatch(index, counts, last)
                            if weight or parallel.sharded:
                                parallel.backward(total / max(weight, 1.0), last=last)
                            merge_into(update_averages, found)
                            if updates == 0:
                                deviation = torch.maximum(deviation, deviated)
                        ballot.mine[:] = seen_in_losses(update_averages)
                    cause = elected(ballot, weight, config)
                    finite = bool(ballot.all[:, -1].isfinite().all())
                    parallel.settle(agreed=cause is Cause.NONE)
                if own and cause is Cause.NONE:
                    sum_gradients(own, parallel.world)
                progress.update = update
                cause, norm = prepare_update(model, optimizer, cause, config, shards_of=shards_of)
                if cause is Cause.NONE:
                    progress.begin()
                    with all_or_none(parallel.world, phase="a step of the optimiser"):  # which may be the user's own
                        optimizer.step()
                        progress.ahead = True
                    progress.ahead = False
                    merge_into(averages, {"ppo/policy/grad_norm": Average(norm, torch.ones_like(norm))})
                else:
                    skipped[cause] += 1
                    progress.left_out.append((cause, update))
                    if not finite:  # on any rank: their parts would not add up to an update
                        update_averages = _nothing_said(update_averages)
                        deviation = torch.zeros_like(deviation) if updates == 0 else deviation
                updates += 1
                merge_into(epoch_averages, update_averages)
            merge_into(averages, epoch_averages)
            if config.early_stopping and _has_moved(epoch_averages, config, parallel.world):
                break
        had_gradients = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if progress.begun and rows.mask.device.type == "cpu":
        for parameter in had_gradients:
            parameter.grad = torch.zeros_like(parameter)
    return Outcome(averages, deviation, skipped, epochs)


def gradients_waiting(model: Any, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Parameters, the model's and the optimiser's, with gradients that hold anything; zeros wait for nothing."""
    theirs = (parameter for group in optimizer.param_groups for parameter in group["params"])
    parameters = {id(parameter): parameter for parameter in chain(model.parameters(), theirs)}.values()
    return [(p, p.grad) for p in parameters if p.grad is not None and bool(here(p.grad).any())]


def minibatch_losses(
    now: Evaluation, part: Rows, targets: Targets, index: Tensor, config: PPOConfig, policy_loss: PolicyObjective
) -> Losses:
    """Both losses of one minibatch from what the model says of it, with gradient."""
    return losses_of(now, targets.select(index, part.mask.shape[1]), part.mask, config, policy_loss)


def losses_of(
    now: Evaluation,
    targets: Targets,
    mask: Tensor,
    config: PPOConfig,
    policy_loss: PolicyObjective,
) -> Losses:
    """Both losses of what the model says now, and the diagnostics beside them."""
    assert now.values is not None
    policy = policy_loss(now.logprobs, targets.old_logprobs, targets.advantages, mask, config=config)
    check_policy_loss(policy, has_gradient=now.logprobs.requires_grad and torch.is_grad_enabled())
    return Losses(
        policy,
        clipped_value_loss(now.values, targets.old_values, targets.returns, mask, cliprange=config.cliprange_value),
        average(now.entropy.detach(), mask),
        average(now.values.detach(), mask),
    )


def prepare_update(
    model: Any, optimizer: torch.optim.Optimizer, cause: Cause, config: PPOConfig, *, shards_of: World | None = None
) -> Prepared:
    """Make the gradients of all ranks, which stand in every one of them, ready for a step: clipped.

    Args:
        model: the policy.
        optimizer: whose parameters count in the norm.
        cause: what all ranks have said of the losses.
        config: for the threshold.
        shards_of: ranks of which each holds a part of every gradient, if it is so.

    Returns:
        A cause other than NONE if no step may be made: then neither weights nor moments shall see these gradients. (A
        loss times 0 would step on stale moments, and inf * 0 is NaN.)

    Raises:
        ValueError: the same, where ``on_nonfinite`` asks for it; on all ranks.
    """
    if cause is not Cause.NONE:
        stop_if_asked(cause, config)
        return Prepared(cause, torch.zeros(()))
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # The same bits on every rank, and so the same verdict.
    mine = [p for p in model.parameters() if id(p) in theirs]
    norm, cause = clip_gradients(mine, config.max_grad_norm, shards_of=shards_of)
    stop_if_asked(cause, config)
    return Prepared(cause, norm)


def voted(world: World) -> AbstractContextManager[Ballot]:
    """A block at whose end every rank has told what it sees of an update; one that fails fails on all of them."""
    return all_or_none(world, carries=SEEN, phase="the vote on an update")


def elected(ballot: Ballot, weight: float, config: PPOConfig) -> Cause:
    """What speaks against an update with ``weight`` kept tokens on all ranks, from what all of them have told."""
    return cause_in_losses(ballot.all, config) if weight else Cause.EMPTY


@contextmanager
def _gradients_cleared(model: Any) -> Iterator[None]:
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)


def plan_updates(batch: int, config: PPOConfig, generator: torch.Generator) -> Plan:
    """The minibatches of every update of every epoch, shuffled anew for each epoch."""
    orders = (torch.randperm(batch, generator=generator) for _ in range(config.ppo_epochs))
    return [
        [list(update.split(config.mini_batch_size)) for update in order.split(config.backward_batch_size)]
        for order in orders
    ]


def tokens_per_update(plan: Plan, mask: Tensor) -> Tensor:
    """Kept tokens [updates] of every update of every epoch, on this rank."""
    tokens = mask.sum(-1).cpu()
    return torch.tensor([float(tokens[torch.cat(update)].sum()) for epoch in plan for update in epoch])


def averages_of(losses: Losses) -> dict[str, Average]:
    """The metrics of one minibatch, without gradient, by the names of :data:`ppo_runtime.reporting.metrics.METRICS`."""
    averages = {
        "ppo/loss/policy": losses.policy.loss,
        "ppo/loss/value": losses.value.loss,
        "ppo/policy/entropy": losses.entropy,
        "ppo/policy/approxkl": losses.policy.approx_kl,
        "ppo/policy/policykl": losses.policy.policy_kl,
        "ppo/policy/clipfrac": losses.policy.clip_fraction,
        "ppo/policy/ratio": losses.policy.ratio,
        "ppo/val/vpred": losses.value_mean,
        "ppo/val/error": losses.value.error,
        "ppo/val/clipfrac": losses.value.clip_fraction,
    }
    return {name: Average(total.detach(), weight) for name, (total, weight) in averages.items()}


def merge_into(averages: dict[str, Average], more: dict[str, Average]) -> None:
    """Merge the metrics of another minibatch, update or epoch into ``averages``, in place."""
    for name, part in more.items():
        averages[name] = merge(averages[name], part) if name in averages else part


def _nothing_said(averages: dict[str, Average]) -> dict[str, Average]:
    """Neutral elements under the same names: all ranks must gather the same metrics."""
    return {name: Average(*map(torch.zeros_like, part)) for name, part in averages.items()}


def _has_moved(averages: dict[str, Average], config: PPOConfig, world: World) -> bool:
    """Whether the KL from the rollout's policy exceeds 1.5 target_kl or is not finite, over all ranks."""
    key = "ppo/policy/policykl"
    policy_kl = float(mean_of(gather_averages({key: averages[key]}, world)[key]))
    return not policy_kl <= 1.5 * config.target_kl  # NaN compares as False
