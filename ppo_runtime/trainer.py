"""PPOTrainer: the order of the steps, nothing clever."""

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ppo_core.rewards import compute_rewards
from ppo_core.scores import ScoreState
from ppo_runtime import assembly, inputs
from ppo_runtime.advantages import gae_estimator
from ppo_runtime.compat.accelerator import Familiar
from ppo_runtime.compat.piecewise import Piecewise
from ppo_runtime.config import PPOConfig
from ppo_runtime.context import Context, decoder_start
from ppo_runtime.data import prepare_dataloader
from ppo_runtime.devices import check_devices
from ppo_runtime.distributed import all_or_none, broadcast_parameters, world_from_environment
from ppo_runtime.experience import make_experience
from ppo_runtime.forward import Rows, lay_out, score_rollout
from ppo_runtime.generating import Generating
from ppo_runtime.guards import SkipLog
from ppo_runtime.inner import has_encoder
from ppo_runtime.models import PreTrainedModelWrapper
from ppo_runtime.optimisers import (
    check_kind_of_scheduler,
    check_optimizer,
    check_scheduler,
    check_trains,
    first_learning_rate,
    say_what_stays,
)
from ppo_runtime.precision import check_moments, own_precision
from ppo_runtime.publishing import Publishing
from ppo_runtime.redact import plain_settings
from ppo_runtime.scheduling import advance, no_rate
from ppo_runtime.scoring import ScoreProcessor
from ppo_runtime.seeding import mixed, set_seed
from ppo_runtime.statistics import scalars, score_statistics, step_statistics
from ppo_runtime.tables import rollout_table
from ppo_runtime.tracking import make_trackers
from ppo_runtime.update import (
    Progress,
    clipped_objective,
    gradients_waiting,
    optimise,
    plan_updates,
    same_updates,
    tokens_per_update,
)

__all__ = ["PPOTrainer", "set_seed"]

logger = logging.getLogger(__name__)


class PPOTrainer(Generating, Piecewise, Publishing, Familiar):
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
        optimizer: over the policy's trainable parameters, or some of them, which is said; Adam at ``learning_rate`` if
            None.
        data_collator: from a list of rows to a batch; lists per column if None.
        num_shared_layers: bottom layers that a reference made here shares with the policy, frozen in both.
        lr_scheduler: of that optimiser; stepped once after every ``step`` in which the optimiser has stepped. One that
            is at its end refuses the next ``step``.

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
        assembly.check_kinds(config, model, tokenizer)
        assert model is not None
        assembly.check_reference_kind(model, ref_model)
        self.world = world_from_environment()
        # Ranks that drew the same numbers would answer the same prompt with the same words.
        set_seed(config.seed if self.world.size == 1 else mixed(config.seed, self.world.rank))
        self.config = config.in_use(is_encoder_decoder=has_encoder(model), is_peft_model=model.is_peft_model)
        if updates := self.config.updates_of_one_sequence:
            logger.warning(
                "mini_batch_size is 1 and batch_size %d: every step makes %d optimiser updates, each on one sequence "
                "alone; set mini_batch_size, or gradient_accumulation_steps where memory is short",
                self.config.batch_size,
                updates,
            )
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id, self.eos_token_ids = assembly.special_tokens(tokenizer, model)
        broadcast_parameters(model, self.world)
        check_devices(model, ref_model)
        check_trains(model)
        if optimizer is not None:
            check_optimizer(optimizer, model)
            check_moments(optimizer, model)
        check_scheduler(lr_scheduler, optimizer)

        self.ref_model, self._reference, self.acceleration = assembly.make_reference(
            model, ref_model, num_shared_layers, config
        )
        check_trains(model)  # again: the reference may have frozen what it shares
        self.optimizer = assembly.make_optimizer(model, config) if optimizer is None else optimizer
        check_optimizer(self.optimizer, model)
        say_what_stays(self.optimizer, model)
        self.lr_scheduler: Any = lr_scheduler
        self.kl_ctl = assembly.make_controller(config)
        self.scores = ScoreProcessor(self.config, self.world)
        self.best_score = None
        self.data_collator = data_collator
        self.dataset = dataset
        self.dataloader: DataLoader[Any] | None = (
            None if dataset is None else self.prepare_dataloader(dataset, data_collator)
        )
        self.current_step = 0
        self.broken_off = None
        # A scheduler that had no learning rate for the next step.
        self._unscheduled: Any | None = None
        self.shuffle = torch.Generator().manual_seed(config.seed)
        self._trackers: list[Any] | None = None
        self._say_skipped = SkipLog()
        # The step after which the run whose metrics lie in the directory goes on; None begins a run.
        self.metrics_after: float | None = None
        # The name that this part of the run goes by in them, until a checkpoint is loaded, and its earlier ones.
        self.run_name = secrets.token_hex(8)
        self.earlier_runs: tuple[str | None, ...] = ()

    def prepare_dataloader(
        self, dataset: Any, data_collator: Callable[[list[dict[str, Any]]], Any] | None = None
    ) -> DataLoader[Any]:
        """A shuffled DataLoader of ``batch_size`` rows over a torch or ``datasets`` dataset."""
        return prepare_dataloader(dataset, data_collator, config=self.config, model=self.model, world=self.world)

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
            ValueError: anything about the input that does not fit, or scores, log-probabilities or values that cannot
                be trained on, by name; nothing has changed then.
            RuntimeError: the same on another rank.

        Whatever else ends a step early leaves everything as it was before, but for an optimiser that has stepped
        already: ``broken_off`` then says so. Minibatches that wait for their update stay as well, unless
        the step was whole or has moved weights.
        """
        with own_precision(self.device), self._undone_unless_whole() as progress:
            return self._step(queries, responses, scores, response_masks, progress)

    def _step(
        self, queries: Any, responses: Any, scores: Any, response_masks: Any, progress: Progress
    ) -> dict[str, Any]:
        started = time.perf_counter()
        times: dict[str, float] = {}
        config, model = self.config, self.model
        with all_or_none(self.world, carries=1) as ballot:
            self._settle_schedule()
            queries, responses, raw, masks = self._check_step(queries, responses, scores, response_masks)
            rows = self._lay_out(queries, responses, masks)
            self._warn_of_greedy_responses(responses)
            plan = plan_updates(len(queries), config, self.shuffle)
            ballot.mine[0] = sum(map(len, plan))
            with _clock(times, "forward_pass"):
                scored = score_rollout(model, self._reference, rows, kl_penalty=config.kl_penalty)
        same_updates(ballot.all[:, 0].int().tolist())
        kl_coef, scores_now = self.kl_ctl.value, self.scores(raw).to(self.device)

        with _clock(times, "compute_rewards"):
            rewards = compute_rewards(scores_now, scored.kl, rows.mask, kl_coef=kl_coef)
        with _clock(times, "compute_advantages"):
            batch, tokens = make_experience(
                scored,
                scores_now,
                rewards,
                rows.mask,
                estimator=gae_estimator,
                tokens=tokens_per_update(plan, rows.mask),
                config=config,
                world=self.world,
            )
        self._push_if_best(raw)
        learning_rate = first_learning_rate(self.optimizer)
        with _clock(times, "optimize_step"):
            outcome = optimise(
                model,
                self.optimizer,
                rows,
                batch.targets,
                plan,
                tokens,
                config,
                policy_loss=clipped_objective,
                world=self.world,
                progress=progress,
            )
        with _clock(times, "calc_stats"):
            stats = step_statistics(
                batch,
                outcome,
                torch.tensor([len(query) for query in queries]),
                torch.tensor([len(response) for response in responses]),
                kl_coef=kl_coef,
                learning_rate=learning_rate,
                vf_coef=config.vf_coef,
                world=self.world,
            )
        self._update_controller(stats["objective/kl"], len(queries) * self.world.size)
        if config.optimize_device_cache and self._on_gpu:
            torch.cuda.empty_cache()
        self._say_skipped(outcome.skipped, self.current_step + 1)
        times["total"] = time.perf_counter() - started
        # Last, together with the counter: what is broken off before is undone without them.
        if self.lr_scheduler is not None and progress.begun and (error := advance(self.lr_scheduler, self.optimizer)):
            self._unscheduled = self.lr_scheduler
            logger.warning("%s", no_rate(self.lr_scheduler, self.current_step + 2, error))
        self.current_step += 1
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
        for name, given in {"stats": stats, "batch": batch}.items():
            if not isinstance(given, Mapping):
                raise ValueError(f"{name} is a {type(given).__name__}, expected a dictionary")
        if isinstance(columns_to_log, str) or not isinstance(columns_to_log, Sequence):
            raise ValueError(f"columns_to_log is {columns_to_log!r}, expected a list of columns of batch")
        listed: Any = rewards.tolist() if isinstance(rewards, Tensor | np.ndarray) else rewards
        scores = inputs.score_vector(listed, count=len(listed) if isinstance(listed, Sequence) else 0, name="rewards")
        table = rollout_table(batch, columns_to_log, scores.tolist(), self.tokenizer)
        stats = dict(stats) | score_statistics(scores, self.world)
        if self.world.rank == 0:
            for tracker in self.trackers:
                tracker.log(self.current_step, scalars(stats), {"game_log": table})

    def train(self, score_fn: Callable[[list[str], list[str]], Sequence[float]], **options: Any) -> Any:
        """Prompts -> responses -> scores -> step over ``dataloader``; see :func:`ppo_runtime.loop.train`."""
        from ppo_runtime.loop import train

        return train(self, score_fn, **options)

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step besides weights, optimiser, scheduler and random generators."""
        return {
            "current_step": self.current_step,
            "kl_coef": self.kl_ctl.value,
            "best_score": self.best_score,
            "scores": self.scores.state_dict(),
            "unscheduled": self._unscheduled is not None and self._unscheduled is self.lr_scheduler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, whole or not at all; gradients that wait for an update are dropped."""
        self._take_over(state)
        self._drop_accumulated()

    def _take_over(self, state: dict[str, Any]) -> None:
        step, coefficient, best = state["current_step"], state["kl_coef"], state["best_score"]
        scores = ScoreState(**state["scores"])
        if self.kl_ctl.value != coefficient:
            self.kl_ctl.value = coefficient  # a user's own controller has no more than this
        self.current_step, self.best_score, self.scores.state = step, best, scores
        self._unscheduled = self.lr_scheduler if state.get("unscheduled") else None  # older checkpoints cannot say
        self.broken_off = None

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers' files; the next ``log_stats`` opens them again and appends.

        ``failed`` is for a run that an error has ended, which Weights & Biases then shows.
        """
        trackers, self._trackers = self._trackers or [], None
        with ExitStack() as all_of_them:
            for tracker in trackers:
                self.metrics_after = math.inf
                all_of_them.callback(tracker.close, failed=failed)

    @property
    def trackers(self) -> list[Any]:
        """Opened at the first use, so that a trainer that never logs leaves no file."""
        if self._trackers is None:
            self._trackers = make_trackers(
                self.config.log_with,
                self.config.logging_dir,
                self.config.tracker_kwargs,
                self.config.tracker_project_name,
                plain_settings(self.config) | {"acceleration": attrs.asdict(self.acceleration)},
                goes_on_after=self.metrics_after,
                run=self.run_name,
                earlier=self.earlier_runs,
            )
        return self._trackers

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def _start_token(self) -> int | None:
        return decoder_start(self.model) if has_encoder(self.model) else None

    def _lay_out(self, queries: Sequence[Tensor], responses: Sequence[Tensor], masks: Any) -> Rows:
        """The batch as the model reads it; as wide as the static padding asks for."""
        config, encoder_decoder = self.config, has_encoder(self.model)
        input_width = response_width = 0
        if config.pad_for_acceleration and encoder_decoder:
            input_width, response_width = config.pad_max_input_len, config.pad_max_len
            inputs.fits_static_padding(map(len, queries), input_width, setting="pad_max_input_len", what="the prompt")
            inputs.fits_static_padding(map(len, responses), response_width, setting="pad_max_len", what="the response")
        elif config.pad_for_acceleration:
            input_width = config.pad_max_len
            lengths = [len(query) + len(response) for query, response in zip(queries, responses, strict=True)]
            inputs.fits_static_padding(lengths, input_width, setting="pad_max_len", what="prompt + response")
        return lay_out(
            queries,
            responses,
            masks,
            pad_token_id=self.pad_token_id,
            decoder_start_token_id=self._start_token,
            device=self.device,
            input_width=input_width,
            response_width=response_width,
        )

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
        responses, masks = self._without_start_token(responses, masks)
        lengths = [len(query) for query in queries], [len(response) for response in responses]
        Context.of(self.model).check(*lengths, names=("queries", "responses"), response="response")
        return queries, responses, scores, masks

    @contextmanager
    def _undone_unless_whole(self) -> Iterator[Progress]:
        """A step that does not end leaves the trainer as it was; where weights have moved, ``broken_off`` says so.

        No copy of the weights is kept to go back to: it would be as large as the model.
        """
        before, order = self.state_dict(), self.shuffle.get_state()
        progress = Progress(gradients_waiting(self.model, self.optimizer))
        try:
            yield progress
        except BaseException as error:
            marked = self.broken_off
            if progress.begun:
                marked = (
                    f"step {before['current_step'] + 1} was broken off by {type(error).__name__} after "
                    f"{progress.begun} steps of the optimiser"
                )
            try:
                # What was uploaded in the meantime stays uploaded.
                self._take_over(before | {"best_score": self.best_score})
            except Exception as failure:  # a part of the user's own may refuse; the error that matters is the first
                logger.warning("the step could not be undone whole: %s: %s", type(failure).__name__, failure)
            finally:
                self.shuffle.set_state(order)
                self.broken_off = marked
                progress.put_back()
            if progress.begun:
                self._drop_accumulated()
                logger.warning(
                    "%s: the weights are between two steps. No checkpoint is made of them; go back to the last one, or "
                    "go on: the next whole step makes checkpoints possible again",
                    self.broken_off,
                )
            raise
        if progress.begun:  # a step without an update leaves the weights where they were
            self.broken_off = None

    def _settle_schedule(self) -> None:
        """Refuse a scheduler that has no learning rate for this step, or could have none for the next.

        The step before, which had one, was made whole. A scheduler that was mended since goes on from there.
        """
        if self.lr_scheduler is None:
            return
        check_kind_of_scheduler(self.lr_scheduler)  # it may have been assigned since the trainer was made
        if self._unscheduled is self.lr_scheduler:
            if error := advance(self.lr_scheduler, self.optimizer):
                raise ValueError(no_rate(self.lr_scheduler, self.current_step + 1, error)) from error
            self._unscheduled = None

    def _update_controller(self, kl: float, n_steps: int) -> None:
        try:
            self.kl_ctl.update(kl, n_steps)
        except ValueError as refusal:
            logger.warning("the KL controller kept its coefficient %s: %s", self.kl_ctl.value, refusal)


@contextmanager
def _clock(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start
