"""The methods that TRL's `step` is made of, for scripts that call them one by one.

`step` does not call them: it never holds logits of a whole batch. Both use the same functions of ppo_core and of this
package, so that their numbers are the same. Masks may be integers here, as they are in TRL.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ppo_core import kl as kl_estimators
from ppo_core.averages import Average, mean_of
from ppo_core.logprobs import token_entropy
from ppo_core.masking import masked_mean
from ppo_core.moments import masked_moments, variance
from ppo_core.rewards import compute_rewards
from ppo_runtime.accel.products import fast_products
from ppo_runtime.compat import doors
from ppo_runtime.compat.layout import model_inputs_of, rows_of
from ppo_runtime.compat.recording import recorded_stats
from ppo_runtime.compat.stats import TOKENS, gather_stats
from ppo_runtime.learning.advantages import estimated, globally_whitened
from ppo_runtime.learning.forward import KL_ESTIMATORS, Evaluation, at_predictors, read_off, row_states
from ppo_runtime.learning.guards import Cause, seen_in_losses
from ppo_runtime.learning.step_inputs import start_token
from ppo_runtime.learning.update import (
    Losses,
    Targets,
    averages_of,
    elected,
    losses_of,
    merge_into,
    prepare_update,
    voted,
)
from ppo_runtime.models.heads import lm_head, logits_at
from ppo_runtime.models.modes import dropout_off, recomputes, without_dropout
from ppo_runtime.models.precision import own_precision
from ppo_runtime.models.references import reference_context
from ppo_runtime.ranks.agreement import all_or_none
from ppo_runtime.ranks.gather import gather_averages
from ppo_runtime.trainer import ON_ANOTHER, Trainer


class Piecewise(Trainer):
    """A trainer with the parts of a step as methods. Shapes: B sequences of L tokens, padding included."""

    # Minibatches whose gradients wait for an optimiser step: the step they belong to, how many, and their averages.
    _pending: tuple[int, int, dict[str, Average]] = (0, 0, {})

    @property
    def _start_token(self) -> int | None:
        return start_token(self.model)

    def optional_peft_ctx(self) -> AbstractContextManager[None]:
        """A context in which a PEFT policy is its own reference, its adapter switched off; else an empty one."""
        return reference_context(self.model) if self.model.is_peft_model else nullcontext()

    def prepare_model_inputs(self, queries: list[Tensor], responses: list[Tensor]) -> dict[str, Tensor]:
        """Prompts and responses as one padded batch: input_ids and attention_mask, on the model's device.

        An encoder-decoder has its prompts there, and decoder_input_ids (the start token in front of each response) and
        decoder_attention_mask besides. Padding is on the right, or as wide as ``pad_for_acceleration`` has it.
        """
        queries, responses, _ = doors.batch(queries, responses, None, vocab_size=self.model.config.vocab_size)
        responses, _ = self.response_generator.without_start_token(responses, None)
        rows = self._lay_out(queries, responses, None)
        return model_inputs_of(rows, self._start_token)

    def batched_forward_pass(
        self,
        model: Any,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Any],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """What a model says of the responses, ``mini_batch_size`` rows at a time; with gradient where it is enabled.

        Args:
            model: the policy, or a reference.
            queries: prompts, for their lengths.
            responses: likewise.
            model_inputs: from ``prepare_model_inputs``; padded on either side.
            return_logits: also return all logits. They are as large as everything else together: leave it off unless
                you need them.
            response_masks: 1 where a response token counts; all do if None.

        Returns:
            logprobs [B, L-1], logits [B, L-1, V] or None, values [B, L-1] (None for a model without value head) and
            masks [B, L-1] of 0 and 1. Entry t is about token t+1 of ``model_inputs`` (of the decoder's, where there is
            one). Log-probabilities and values are 0 where the mask is.
        """
        doors.language_model(model)
        if self.parallel.sharded and torch.is_grad_enabled():
            raise ValueError(
                "parallelism is 'fsdp2', where step() alone makes passes with gradient: all ranks make them together; "
                "call step(), use torch.no_grad(), or set parallelism='ddp'"
            )
        start, vocab_size = self._start_token, self.model.config.vocab_size
        queries, responses, masks = doors.batch(queries, responses, response_masks, vocab_size=vocab_size)
        read = doors.padded_inputs(
            model_inputs, count=len(queries), vocab_size=vocab_size, encoder_decoder=start is not None
        )
        read = {name: x.to(self.device) for name, x in read.items()}
        rows = rows_of(read, queries, responses, masks, start=start)
        found: list[tuple[Evaluation, Tensor | None]] = []
        # Gradient checkpointing needs the training mode, and only passes with gradient need checkpointing.
        quiet = without_dropout if torch.is_grad_enabled() else dropout_off
        fast = fast_products(model, self._products(model) if torch.is_grad_enabled() else self.config.accel)
        with self.parallel.whole(), own_precision(rows.mask.device), fast, quiet(model):
            for index in torch.arange(len(rows.mask)).split(self.config.mini_batch_size):
                part = rows.select(index)
                hidden = row_states(model, part)
                logits = logits_at(lm_head(model), hidden[:, : part.mask.shape[1]]) if return_logits else None
                found.append((read_off(model, at_predictors(hidden, part), part), logits))
        evaluations = [evaluation for evaluation, _ in found]
        values = [evaluation.values for evaluation in evaluations if evaluation.values is not None]
        logits = [logits for _, logits in found if logits is not None]
        return (
            torch.cat([evaluation.logprobs for evaluation in evaluations]),
            torch.cat(logits) if logits else None,
            torch.cat(values) if values else None,
            rows.mask.to(rows.attention_mask.dtype),
        )

    def compute_rewards(
        self,
        scores: Tensor | Sequence[Any],
        logprobs: Tensor,
        ref_logprobs: Tensor,
        masks: Tensor,
        *,
        return_kls: bool = False,
    ) -> tuple[Tensor, ...]:
        """Rewards per token from scores and the KL penalty of ``kl_penalty``, at the controller's coefficient.

        Args:
            scores: one per sequence.
            logprobs: of the policy, [B, T]; for ``kl_penalty="full"`` of the whole vocabulary, [B, T, V].
            ref_logprobs: of the reference, likewise.
            masks: [B, T], not 0 where a response token counts.
            return_kls: add the penalty's KL estimates as a third result.

        Returns:
            (rewards, non_score_rewards[, kls]), each [B, T] and 0 where the mask is.
        """
        doors.floating("logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs)
        mask = doors.token_mask("masks", masks, "logprobs", logprobs)
        full = self.config.kl_penalty == "full"
        kl = (kl_estimators.full if full else KL_ESTIMATORS[self.config.kl_penalty])(logprobs, ref_logprobs, mask)
        given = doors.score_numbers(scores, count=len(kl)).to(kl.device)
        found = compute_rewards(given, kl, mask, kl_coef=self.kl_ctl.value)
        return (*found, kl) if return_kls else tuple(found)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(values, advantages, returns) [B, T], 0 where the mask is; advantages whitened over all ranks."""
        doors.floating("rewards", values=values, rewards=rewards)
        kept = doors.token_mask("mask", mask, "rewards", rewards)
        if self.config.whiten_rewards:
            rewards = globally_whitened(rewards, kept, self.world, shift_mean=False)
        found = estimated(self.advantage_estimator, rewards, values.detach(), kept, config=self.config)
        whitened = globally_whitened(found.advantages, kept, self.world, shift_mean=True)
        return torch.where(kept, values, 0.0), whitened, found.returns

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor | None,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(policy loss, ``vf_coef`` * value loss, statistics) of one minibatch, both losses means over its tokens.

        Logits serve the entropy in the statistics alone; without them (None) it is left out.
        """
        targets = Targets(old_logprobs, values, advantages, returns)
        kept = doors.kept_tokens(targets, logits, vpreds, logprobs, mask)
        losses = self._losses(targets, logits, vpreds, logprobs, kept)
        stats = self._minibatch_stats(losses, targets, kept, has_entropy=logits is not None)
        return mean_of(losses.policy.loss), self.config.vf_coef * mean_of(losses.value.loss), stats

    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logprobs: Tensor,
        logits: Tensor | None,
        vpreds: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> dict[str, Tensor]:
        """Backward pass on one minibatch, and an optimiser step after every ``gradient_accumulation_steps`` of them.

        ``logprobs`` and ``vpreds`` come from ``batched_forward_pass`` with gradient; the others are targets. The
        gradient is that of the mean over all tokens of the accumulated minibatches and ranks, clipped to
        ``max_grad_norm``. An update whose mean ratio exceeds ``ratio_threshold`` is left out. Where a pass fails, the
        minibatches accumulated before it are dropped as well: begin the update again.

        Returns:
            Statistics by the names of ``loss``, ready for ``stack_dicts``.
        """
        with all_or_none(self.world, phase="the check of a minibatch") as ballot:
            ballot.facts = self._last_update
            self._check_parts()
            targets = Targets(old_logprobs, values, advantages, returns)
            kept = doors.kept_tokens(targets, logits, vpreds, logprobs, mask)
            if not (logprobs.requires_grad or vpreds.requires_grad):
                raise ValueError(
                    "neither logprobs nor vpreds carries a gradient, so there is nothing to train by; take them from "
                    "batched_forward_pass outside torch.no_grad()"
                )
            losses = self._losses(targets, logits, vpreds, logprobs, kept)
        step, count, averages = self._pending
        if count == 0 or step != self.current_step:
            count, averages = 0, {}
            self.model.zero_grad(set_to_none=True)
        with self._dropped_unless_whole():
            # A checkpointed layer runs again here.
            fast = fast_products(self.model, self._products(self.model))
            passed = all_or_none(self.world, phase="the backward pass of a minibatch")
            with passed, own_precision(mask.device), fast, without_dropout(self.model):
                (losses.policy.loss.total + self.config.vf_coef * losses.value.loss.total).backward()
            merge_into(averages, averages_of(losses))
            count += 1
            if count >= self.config.gradient_accumulation_steps:  # fewer may be asked for meanwhile
                weight = self._divide_gradients(averages["ppo/loss/policy"])
                with voted(self.world) as ballot:
                    ballot.mine[:] = seen_in_losses(averages)
                if (cause := elected(ballot, weight, self.config)) is Cause.NONE:
                    self.parallel.sum_gradients()
                cause, _ = prepare_update(self.model, self.optimizer, cause, self.config)
                if cause is Cause.NONE:
                    self._step_optimizer()
                else:
                    self._say_skipped(Counter({cause: 1}), self.current_step + 1)
                self.model.zero_grad(set_to_none=True)
                count, averages = 0, {}
            self._pending = (self.current_step, count, averages)
        return self._minibatch_stats(losses, targets, kept, has_entropy=logits is not None)

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Statistics of a step from its pieces, over all ranks (which must all call it).

        Args:
            kl_coef: the coefficient of the step.
            data: queries, responses, scores, logprobs, ref_logprobs, non_score_reward, masks, train_stats
                (``stack_dicts`` of what ``train_minibatch`` returned), and kls where ``compute_rewards`` gave them.

        Returns:
            Floats and numpy arrays by the names of :data:`ppo_runtime.reporting.metrics.METRICS`.
        """
        return recorded_stats(kl_coef, data, self.config.kl_penalty, self.world)

    def gather_stats(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Statistics over all ranks; see :func:`ppo_runtime.compat.stats.gather_stats`."""
        if not isinstance(stats, Mapping):
            raise ValueError(f"stats is a {type(stats).__name__}, expected a dictionary of statistics")
        return gather_stats(stats, self.world)

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """TRL's name for the estimate of ``kl_penalty`` at every token; "full" takes whole distributions."""
        full = self.config.kl_penalty == "full"
        mask = torch.ones(logprob.shape[: logprob.ndim - full], dtype=torch.bool, device=logprob.device)
        return (kl_estimators.full if full else KL_ESTIMATORS[self.config.kl_penalty])(logprob, ref_logprob, mask)

    def _step_safety_checker(
        self, batch_size: int, queries: Any, responses: Any, scores: Any, masks: Any = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """TRL's name for the checks of what ``step`` is given."""
        doors.counted("queries", queries, batch_size=batch_size)
        queries, responses, scores, masks = self._check_step(queries, responses, scores, masks)
        return queries, responses, list(scores), masks

    def _products(self, model: Any) -> str:
        """What multiplies in a pass with gradient: what runs again in a backward pass of the caller's is torch's."""
        return "eager" if recomputes(model) else self.config.accel

    def _step_optimizer(self) -> None:
        """One update; weights that a broken one leaves are no model until the next whole one."""
        where = ""
        try:
            with all_or_none(self.world, phase="a step of the optimiser"):
                self.optimizer.step()
                where = ON_ANOTHER
        except BaseException as error:
            kind = type(error).__name__
            self.broken_off = f"an update of step {self.current_step + 1} was broken off by {kind}{where}"
            raise
        self.broken_off = None

    @contextmanager
    def _dropped_unless_whole(self) -> Iterator[None]:
        """Drop all waiting gradients if the block fails: a backward pass may have added some of its own."""
        try:
            yield
        except BaseException:
            self._drop_accumulated()
            raise

    def _drop_accumulated(self) -> None:
        self._pending = (0, 0, {})
        super()._drop_accumulated()

    def _losses(
        self, targets: Targets, logits: Tensor | None, vpreds: Tensor, logprobs: Tensor, mask: Tensor
    ) -> Losses:
        entropy = torch.zeros_like(logprobs) if logits is None else token_entropy(logits.detach())
        return losses_of(Evaluation(logprobs, entropy, vpreds), targets, mask, self.config, self.policy_objective)

    def _minibatch_stats(
        self, losses: Losses, targets: Targets, mask: Tensor, *, has_entropy: bool
    ) -> dict[str, Tensor]:
        averages = averages_of(losses)
        stats = {name.removeprefix("ppo/"): mean_of(found) for name, found in averages.items()}
        if not has_entropy:
            del stats["policy/entropy"]
        stats["loss/total"] = stats["loss/policy"] + self.config.vf_coef * stats["loss/value"]
        stats["policy/advantages"] = targets.advantages[mask].detach()
        stats["policy/advantages_mean"] = masked_mean(targets.advantages.detach(), mask)
        for name, x in {"returns": targets.returns, "val": targets.old_values}.items():
            moments = masked_moments(x.detach(), mask)
            stats |= {f"{name}/mean": moments.mean, f"{name}/var": variance(moments, correction=1)}
        stats[TOKENS] = averages["ppo/loss/policy"].weight
        return stats

    def _divide_gradients(self, tokens: Average) -> float:
        """From a sum over tokens to a mean over those of all minibatches and ranks, whose number is returned."""
        weight = float(gather_averages({"loss": tokens}, self.world)["loss"].weight)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(max(weight, 1.0))
        return weight
