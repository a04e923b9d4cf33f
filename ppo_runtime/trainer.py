"""PPOTrainer: the order of the steps, nothing clever."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ppo_core.advantages import gae
from ppo_core.rewards import compute_rewards
from ppo_core.whitening import whiten
from ppo_runtime import inputs
from ppo_runtime.accel import accelerate_frozen, choose
from ppo_runtime.config import PPOConfig
from ppo_runtime.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.data import prepare_dataloader
from ppo_runtime.distributed import broadcast_parameters, world_from_environment
from ppo_runtime.forward import lay_out, score_rollout
from ppo_runtime.heads import check_split
from ppo_runtime.models import PreTrainedModelWrapper
from ppo_runtime.modes import dropout_off
from ppo_runtime.references import create_reference_model, reference_context
from ppo_runtime.rollout import SamplingSpec, generate_responses
from ppo_runtime.statistics import global_moments, scalars, step_statistics
from ppo_runtime.tracking import make_trackers
from ppo_runtime.update import Targets, optimise

logger = logging.getLogger(__name__)

WHITENING_EPS = 1e-8


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  users' score functions and collators may use the legacy generator
    torch.manual_seed(seed)


class PPOTrainer:
    """Proximal Policy Optimization of a language model with a value head.

    ``generate`` responses, score them by whatever means, and give all three to ``step``; or hand a score function to
    ``train``. See :class:`PPOConfig` for the settings.

    Args:
        config: settings; every default of :class:`PPOConfig` if None.
        model: the policy, a value-head wrapper (``AutoModelForCausalLMWithValueHead.from_pretrained(...)``).
        ref_model: the frozen model to stay close to: a wrapper or a plain transformers model with the policy's
            vocabulary. None: a copy of the policy as it is now, or, for a PEFT policy, the policy without adapter.
        tokenizer: needs an EOS or a padding token. Without a padding token EOS pads, which is harmless: masks are
            made from lengths. Without EOS no response ends early.
        dataset: rows with "input_ids" (and "query" for logs); becomes ``dataloader``.
        optimizer: over the policy's trainable parameters; Adam at ``learning_rate`` if None.
        data_collator: from a list of rows to a batch; lists per column if None.
        num_shared_layers: bottom layers that a reference made here shares with the policy, frozen in both.
        lr_scheduler: stepped once after every ``step``.

    Raises:
        ValueError, TypeError: an argument that cannot work, by name, before anything is trained.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: Any | None = None,
        tokenizer: Any | None = None,
        dataset: Any | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any | None = None,
    ) -> None:
        config = PPOConfig() if config is None else config
        if not isinstance(config, PPOConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a PPOConfig")
        if not isinstance(model, PreTrainedModelWrapper):
            raise TypeError(
                f"model is a {type(model).__name__}, expected a value-head model; "
                "make one with AutoModelForCausalLMWithValueHead.from_pretrained(...)"
            )
        if tokenizer is None:
            raise TypeError("tokenizer is None, expected the model's transformers tokenizer")
        set_seed(config.seed)
        self.world = world_from_environment()
        self.config = attrs.evolve(
            config, is_encoder_decoder=model.is_encoder_decoder, is_peft_model=model.is_peft_model
        )
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id, self.eos_token_ids = _special_tokens(tokenizer, model)
        broadcast_parameters(model, self.world)
        check_split(model)

        self.ref_model, self._reference, self.acceleration = self._make_reference(ref_model, num_shared_layers)
        self.optimizer = optimizer or torch.optim.Adam(
            [parameter for parameter in model.parameters() if parameter.requires_grad], lr=config.learning_rate
        )
        self.lr_scheduler = lr_scheduler
        self.kl_ctl: AdaptiveKLController | FixedKLController = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.data_collator = data_collator
        self.dataset = dataset
        self.dataloader: DataLoader[Any] | None = (
            None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        )
        self.current_step = 0
        self.shuffle = torch.Generator().manual_seed(config.seed)
        self._sampling_warned = False
        self._trackers: list[Any] | None = None

    def prepare_dataloader(
        self, dataset: Any, data_collator: Callable[[list[dict[str, Any]]], Any] | None = None
    ) -> DataLoader[Any]:
        """A shuffled DataLoader of ``batch_size`` rows over a torch or ``datasets`` dataset."""
        return prepare_dataloader(dataset, data_collator, config=self.config, model=self.model)

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to one query or to each of a list.

        Args:
            query_tensor: token ids (length,), or a list of such tensors.
            length_sampler: gives ``max_new_tokens`` of each generated batch.
            batch_size: queries generated together.
            return_prompt: True puts the prompt in front. Only the response is ever cut at an EOS.
            generate_ref_response: also sample from the reference.
            generation_kwargs: for transformers' ``generate``. Temperature, top-k and top-p other than 1, 0 and 1
                sample from another distribution than the one PPO trains, and are warned about.

        Returns:
            For a list, a list of 1-d tensors; for one tensor, a [1, length] tensor. With ``generate_ref_response`` a
            pair of these, policy first.

        Raises:
            ValueError: an empty query, ids outside the vocabulary, or a prompt that leaves no room in the context.
        """
        single = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else query_tensor
        queries = inputs.token_rows("query_tensor", queries, vocab_size=self.model.config.vocab_size, allow_empty=False)
        new_tokens = generation_kwargs.get("max_new_tokens") or 1
        inputs.fits_context(
            "query_tensor",
            [len(query) + new_tokens for query in queries],
            self._context,
            what="prompt + max_new_tokens",
        )
        self._warn_of_sampling(generation_kwargs)
        models = [(self.model, nullcontext())]
        if generate_ref_response:
            reference = self.model if self.ref_model is None else self.ref_model
            models.append((reference, nullcontext() if self.ref_model is not None else reference_context(self.model)))
        eos = generation_kwargs.get("eos_token_id")
        answers: list[Any] = []
        for model, context in models:
            with context, dropout_off(model):
                responses = generate_responses(
                    model,
                    [query.to(self.device) for query in queries],
                    batch_size=batch_size,
                    pad_token_id=generation_kwargs.get("pad_token_id", self.pad_token_id),
                    eos_token_ids=self.eos_token_ids if eos is None else {eos} if isinstance(eos, int) else set(eos),
                    length_sampler=length_sampler,
                    is_encoder_decoder=self.model.is_encoder_decoder,
                    generation_kwargs={k: v for k, v in generation_kwargs.items() if k != "pad_token_id"},
                )
            if return_prompt and not self.model.is_encoder_decoder:
                responses = [
                    torch.cat((query.to(response.device), response))
                    for query, response in zip(queries, responses, strict=True)
                ]
            answers.append(responses[0].unsqueeze(0) if single else responses)
        return tuple(answers) if generate_ref_response else answers[0]

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on a batch.

        Args:
            queries: prompt token ids, 1-d each; ``batch_size`` of them.
            responses: response token ids without the prompt, 1-d each.
            scores: one number per response, 0-d or 1-element tensors.
            response_masks: 1 where a response token was the policy's own choice and counts; all do if None.

        Returns:
            Statistics by the names of :data:`ppo_runtime.metrics.METRICS`; single numbers as floats, distributions as
            numpy arrays.

        Raises:
            ValueError: anything about the input that does not fit, by name; nothing has changed then.
        """
        started = time.perf_counter()
        times: dict[str, float] = {}
        config, model = self.config, self.model
        queries, responses, raw_scores, response_masks = self._check_step(queries, responses, scores, response_masks)
        scores_now = raw_scores.to(self.device)

        with _clock(times, "forward_pass"):
            rows = lay_out(
                queries,
                responses,
                response_masks,
                pad_token_id=self.pad_token_id,
                decoder_start_token_id=model.config.decoder_start_token_id if model.is_encoder_decoder else None,
                device=self.device,
            )
            scored = score_rollout(model, self._reference, rows, kl_penalty=config.kl_penalty)
        with _clock(times, "compute_rewards"):
            rewards = compute_rewards(scores_now, scored.kl, rows.mask, kl_coef=self.kl_ctl.value)
        with _clock(times, "compute_advantages"):
            token_rewards = rewards.rewards
            if config.whiten_rewards:
                token_rewards = self._whiten(token_rewards, rows.mask, shift_mean=False)
            estimate = gae(token_rewards, scored.values, rows.mask, gamma=config.gamma, lam=config.lam)
            advantages = self._whiten(estimate.advantages, rows.mask, shift_mean=True)
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        with _clock(times, "optimize_step"):
            outcome = optimise(
                model,
                self.optimizer,
                rows,
                Targets(scored.logprobs, scored.values, advantages, estimate.returns),
                config,
                generator=self.shuffle,
                world=self.world,
            )
        with _clock(times, "calc_stats"):
            stats = step_statistics(
                rows=rows,
                scored=scored,
                scores=scores_now,
                non_score_rewards=rewards.non_score_rewards,
                raw_advantages=estimate.advantages,
                advantages=advantages,
                returns=estimate.returns,
                query_lengths=torch.tensor([len(query) for query in queries]),
                response_lengths=torch.tensor([len(response) for response in responses]),
                outcome=outcome,
                kl_coef=self.kl_ctl.value,
                learning_rate=learning_rate,
                vf_coef=config.vf_coef,
                world=self.world,
            )
        self._update_controller(stats["objective/kl"], len(queries) * self.world.size)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if config.optimize_device_cache and self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.current_step += 1
        times["total"] = time.perf_counter() - started
        return stats | {f"time/ppo/{name}": seconds for name, seconds in times.items()}

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[Any],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Write one step's statistics and a table of its texts to the trackers.

        Args:
            stats: what ``step`` returned.
            batch: columns by name; those in ``columns_to_log`` go into the table, where present.
            rewards: the scores as the user made them; env/reward_{mean,std,dist} are about these.
            columns_to_log: columns of ``batch``.

        Raises:
            ValueError: ``rewards`` is not one finite number per sequence.
        """
        scores = inputs.score_vector(list(rewards), count=len(rewards))
        everything = torch.ones(len(scores), dtype=torch.bool)
        moments = global_moments(scores, everything, self.world)
        spread = float((moments.m2 / (moments.n - 1).clamp(min=1)).sqrt())
        stats = dict(stats)
        stats |= {"env/reward_mean": float(moments.mean), "env/reward_std": spread, "env/reward_dist": scores.numpy()}
        if self.world.rank != 0:
            return
        columns = [name for name in columns_to_log if name in batch]
        table = [dict(zip(columns, row, strict=True)) for row in zip(*(batch[name] for name in columns), strict=True)]
        for row, score in zip(table, scores.tolist(), strict=False):
            row["reward"] = score
        for tracker in self.trackers:
            tracker.log(self.current_step, scalars(stats), {"game_log": table})

    def train(self, score_fn: Callable[[list[str], list[str]], Sequence[float]], **options: Any) -> Any:
        """Prompts -> responses -> scores -> step over ``dataloader``; see :func:`ppo_runtime.loop.train`."""
        from ppo_runtime.loop import train

        return train(self, score_fn, **options)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write policy, value head and tokenizer; ``transformers`` loads the directory as a plain model."""
        if self.world.rank == 0:
            self.model.save_pretrained(save_directory, **kwargs)
            self.tokenizer.save_pretrained(save_directory)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step besides weights, optimiser, scheduler and random generators."""
        return {"current_step": self.current_step, "kl_coef": self.kl_ctl.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.current_step = state["current_step"]
        self.kl_ctl.state = attrs.evolve(self.kl_ctl.state, coef=state["kl_coef"])

    def close(self) -> None:
        """Close the trackers' files; the next ``log_stats`` opens them again and appends."""
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None

    @property
    def device(self) -> torch.device:
        """Where the policy lives."""
        return self.model.device

    @property
    def trackers(self) -> list[Any]:
        """Opened at the first use, so that a trainer that never logs leaves no file."""
        if self._trackers is None:
            self._trackers = make_trackers(
                self.config.log_with,
                self.config.logging_dir,
                self.config.tracker_kwargs,
                self.config.tracker_project_name,
                self.config.to_dict() | {"acceleration": attrs.asdict(self.acceleration)},
            )
        return self._trackers

    @property
    def _context(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def _make_reference(self, ref_model: Any | None, num_shared_layers: int | None) -> tuple[Any, Any, Any]:
        """The reference as the user sees it, as ``score_rollout`` enters it, and what runs it."""
        choice = choose(self.config.accel, strict=False)  # type: ignore[arg-type]  # validated by PPOConfig
        if ref_model is None and self.model.is_peft_model:
            choice = attrs.evolve(choice, backend="eager", reason="eager torch: the reference is the policy itself")

            @contextmanager
            def adapter_off() -> Iterator[Any]:
                with reference_context(self.model):
                    yield self.model

            return None, adapter_off, choice
        if ref_model is None:
            ref_model = create_reference_model(self.model, num_shared_layers)
        elif num_shared_layers is not None:
            raise ValueError(
                f"num_shared_layers is {num_shared_layers} and ref_model is given; layers can only be shared with a "
                "reference that the trainer makes: leave one of the two out"
            )
        _check_same_vocabulary(self.model, ref_model)
        ref_model.requires_grad_(False)
        ref_model.eval()
        check_split(ref_model)
        inner = ref_model.pretrained_model if isinstance(ref_model, PreTrainedModelWrapper) else ref_model
        fast, choice = accelerate_frozen(inner, choice)
        return ref_model, lambda: nullcontext(fast), choice

    def _check_step(
        self, queries: Any, responses: Any, scores: Any, response_masks: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor] | None]:
        vocab_size = self.model.config.vocab_size
        queries = inputs.token_rows("queries", queries, vocab_size=vocab_size, allow_empty=False)
        responses = inputs.token_rows("responses", responses, vocab_size=vocab_size, allow_empty=False)
        inputs.same_count(len(queries), responses=responses)
        inputs.batch_count(len(queries), batch_size=self.config.batch_size, drop_last=self.config.drop_last)
        scores = inputs.score_vector(scores, count=len(queries))
        masks = inputs.mask_rows(response_masks, responses)
        lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
        inputs.fits_context("queries", lengths, self._context, what="prompt + response")
        return queries, responses, scores, masks

    def _whiten(self, x: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
        moments = global_moments(x, mask, self.world)
        return whiten(x, mask, moments, shift_mean=shift_mean, correction=1, eps=WHITENING_EPS)

    def _update_controller(self, kl: float, n_steps: int) -> None:
        try:
            self.kl_ctl.update(kl, n_steps)
        except ValueError as refusal:
            logger.warning("the KL controller kept its coefficient %s: %s", self.kl_ctl.value, refusal)

    def _warn_of_sampling(self, generation_kwargs: dict[str, Any]) -> None:
        spec = SamplingSpec.of(self.model.pretrained_model, generation_kwargs)
        if departures := spec.departures():
            if not self._sampling_warned:
                logger.warning(
                    "responses are sampled with %s, but PPO trains the plain distribution: the KL can then turn "
                    "negative; sample with temperature=1.0, top_k=0, top_p=1.0",
                    ", ".join(departures),
                )
            self._sampling_warned = True


@contextmanager
def _clock(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


def _special_tokens(tokenizer: Any, model: Any) -> tuple[int, set[int]]:
    """Padding id and EOS ids; EOS pads where there is no padding token."""
    generation_config = getattr(model.pretrained_model, "generation_config", None)
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = tokenizer.eos_token_id
    eos_ids = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    pad = tokenizer.pad_token_id
    if pad is None and not eos_ids:
        raise ValueError(
            "tokenizer has neither a padding nor an EOS token, expected at least one; "
            "set one, for example tokenizer.pad_token = tokenizer.unk_token"
        )
    return (min(eos_ids) if pad is None else pad), eos_ids


def _check_same_vocabulary(model: Any, ref_model: Any) -> None:
    mine, theirs = model.config.vocab_size, ref_model.config.vocab_size
    if mine != theirs:
        raise ValueError(
            f"ref_model has a vocabulary of {theirs}, expected {mine} like model: log-probabilities of the same "
            "token ids are compared; load both from the same family"
        )
