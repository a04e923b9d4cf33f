"""Trainer: the parts of a PPO step in their order, and the state that changes from step to step."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ppo_core.rewards import compute_rewards
from ppo_core.scores import ScoreState
from ppo_runtime import assembly
from ppo_runtime.accel.heap import freed_memory_kept
from ppo_runtime.accel.products import fast_products
from ppo_runtime.common.launcher import speaks_for_all
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning import sameness
from ppo_runtime.learning.advantages import AdvantageEstimator, gae_estimator
from ppo_runtime.learning.controllers import check_controller, coefficient_of
from ppo_runtime.learning.experience import make_experience
from ppo_runtime.learning.forward import Bottom, Rows, Scored, score_rollout
from ppo_runtime.learning.guards import SkipLog
from ppo_runtime.learning.inspection import Inspection, Watched
from ppo_runtime.learning.optimisers import (
    check_fits,
    check_kind_of_scheduler,
    check_optimizer,
    check_scheduler,
    check_trains,
    first_learning_rate,
    say_what_stays,
)
from ppo_runtime.learning.scheduling import advance, no_rate
from ppo_runtime.learning.scoring import RecentScores, ScoreProcessor
from ppo_runtime.learning.step_inputs import check_batch, check_lengths, lay_out_batch
from ppo_runtime.learning.update import (
    PolicyObjective,
    Progress,
    clipped_objective,
    gradients_waiting,
    optimise,
    plan_updates,
    tokens_per_update,
)
from ppo_runtime.models.devices import check_devices, check_own_gpus, own_number, place
from ppo_runtime.models.hub import take_upload, upload
from ppo_runtime.models.inner import has_encoder
from ppo_runtime.models.modes import recomputes_within_backward
from ppo_runtime.models.packing import keeps_rows_apart
from ppo_runtime.models.precision import check_moments, check_wide, own_precision
from ppo_runtime.models.sharing import check_dividing, divides, share, with_parameters_of
from ppo_runtime.models.wrapper import PreTrainedModelWrapper
from ppo_runtime.ranks.agreement import all_or_none, differences
from ppo_runtime.ranks.gather import broadcast_parameters
from ppo_runtime.ranks.presence import lost_ranks_named
from ppo_runtime.ranks.seeding import mixed, set_seed
from ppo_runtime.ranks.world import world_from_environment
from ppo_runtime.reporting.model_card import is_ours, write_model_card
from ppo_runtime.reporting.publishing import upload_if_best
from ppo_runtime.reporting.run_log import RunLog, log_entry
from ppo_runtime.reporting.statistics import step_statistics
from ppo_runtime.rollout.data import prepare_dataloader
from ppo_runtime.rollout.engine import Engine, generate_responses
from ppo_runtime.rollout.generating import Remembered, ResponseGenerator

logger = logging.getLogger(__name__)

DEFAULT_NAME = "PPO model"
ON_ANOTHER = " on another rank"
UPDATES = "the number of updates that the step makes of its sequences"


class Trainer:
    """Proximal Policy Optimization of a language model with a value head.

    ``generate`` responses, score them by whatever means, and give all three to ``step``; or hand a score function to
    :func:`ppo_runtime.loop.train`. See :class:`PPOConfig` for the settings.

    Args:
        config: settings; every default of :class:`PPOConfig` if None.
        model: the policy, a value-head wrapper (``AutoModelForCausalLMWithValueHead.from_pretrained(...)``).
        tokenizer: needs an EOS or a padding token. Without a padding token EOS pads, which is harmless: masks are
            made from lengths. Without EOS no response ends early.
        ref_model: the frozen model to stay close to: a wrapper or a plain transformers model with the policy's
            vocabulary. None: a copy of the policy as it is now, or, for a PEFT policy, the policy without adapter.
        dataset: rows with "input_ids" (and "query" for logs); becomes ``dataloader``.
        optimizer: over the policy's trainable parameters, or some of them, which is said; Adam at ``learning_rate`` if
            None. What it holds beside them, such as a parameter of a ``policy_loss`` of yours, must begin the same on
            all ranks; ``step`` sums its gradients over them, and does not clip them.
        data_collator: from a list of rows to a batch; lists per column if None.
        num_shared_layers: bottom layers that a reference made here shares with the policy, frozen in both.
        lr_scheduler: of that optimiser; stepped once after every ``step`` in which the optimiser has stepped. One that
            is at its end refuses the next ``step``.
        engine: what turns prompts into responses; the ``response_engine``.
        advantages: what estimates advantages and returns from rewards and values; the ``advantage_estimator``.
        policy_loss: what the policy minimises; the ``policy_objective``.

    What a trainer was made with can be assigned as well, and holds from then on; another model is refused, and so are
    settings that a trainer reads once (:data:`ppo_runtime.config.FIXED`).

    Raises:
        ValueError, TypeError: an argument that cannot work, by name, before anything is trained.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        tokenizer: Any = None,
        *,
        ref_model: Any | None = None,
        dataset: Any | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any | None = None,
        engine: Engine = generate_responses,
        advantages: AdvantageEstimator = gae_estimator,
        policy_loss: PolicyObjective = clipped_objective,
    ) -> None:
        config = PPOConfig() if config is None else config
        self.world = world_from_environment(getattr(config, "ranks_timeout", None))
        with all_or_none(self.world, carries=1, phase="the check of the trainer's arguments") as ballot:
            assembly.check_callables(engine=engine, advantages=advantages, policy_loss=policy_loss)
            assembly.check_takes_config("advantages", advantages)
            assembly.check_takes_config("policy_loss", policy_loss)
            assembly.check_kinds(config, model, tokenizer)
            assert model is not None
            assembly.check_reference_kind(model, ref_model)
            check_dividing(model, ref_model, optimizer, divided=divides(config, self.world))
            # Ranks that drew the same numbers would answer the same prompt with the same words.
            set_seed(config.seed if self.world.size == 1 else mixed(config.seed, self.world.rank))
            self._model, self._tokenizer = model, tokenizer
            self.config = config
            self.tokenizer = tokenizer
            check_trains(model)
            if optimizer is not None:
                check_optimizer(optimizer, model)
            place(model, ref_model, optimizer, config.device)
            check_devices(model, ref_model)
            ballot.mine[0] = own_number(model)
            ballot.facts = lambda: self._standing_facts(ref_model)
        check_own_gpus(ballot.all[:, 0].tolist())
        self._warn_at_the_start()
        broadcast_parameters(model, self.world)
        with all_or_none(self.world, phase="the making of the trainer") as ballot:
            if optimizer is not None:
                check_moments(optimizer, model)
            check_scheduler(lr_scheduler, optimizer)
            self.data_collator, self.dataset = data_collator, dataset
            self.dataloader: DataLoader[Any] | None = (
                None if dataset is None else self.prepare_dataloader(dataset, data_collator)
            )
            # Before models are divided, which can't be taken back.
            ballot.facts = lambda: sameness.data(dataset) | sameness.moments(optimizer, model)
            self._ref_model, self._reference, self.acceleration = assembly.make_reference(
                model, ref_model, num_shared_layers, config, divided=divides(config, self.world)
            )
            check_trains(model)  # again: the reference may have frozen what it shares
        before = dict(model.named_parameters())
        self.parallel = share(model, self._ref_model, config, self.world)
        """How the ranks share the models; ``whole()`` is for passes of one's own where they are divided."""
        with all_or_none(self.world, phase="the making of the trainer's parts") as ballot:
            if optimizer is not None:
                optimizer = with_parameters_of(optimizer, before, model)
            self.optimizer = assembly.make_optimizer(model, config) if optimizer is None else optimizer
            # What was said of the parts, once each.
            self._said: set[str] = set()
            say_what_stays(self.optimizer, model, self._said)
            self.lr_scheduler: Any = lr_scheduler
            self.kl_ctl = assembly.make_controller(config)
            self.scores = ScoreProcessor()
            self.recent_scores = RecentScores()
            self.best_score: float | None = None
            """Highest mean raw score of an uploaded batch so far; see ``push_to_hub_if_best_kwargs``."""
            self.advantage_estimator, self.policy_objective = advantages, policy_loss
            self.response_engine = engine
            self._remembered = Remembered()
            self.current_step = 0
            self.generation: dict[str, Any] = {}
            """The settings of generation of a loop's last call, as plain values, which its checkpoints hold."""
            self.broken_off: str | None = None
            """What broke the last step off while it was moving the weights; None after a whole step."""
            # A scheduler that had no learning rate for the next step.
            self._unscheduled: Any | None = None
            self.shuffle = torch.Generator().manual_seed(config.seed)
            self._say_skipped = SkipLog()
            self._inspection = Inspection()
            self.run_log = RunLog()
            ballot.facts = self._moving_facts

    def _standing_facts(self, ref_model: Any) -> dict[str, Any]:
        """What must be the same on all ranks from the start."""
        return {
            **sameness.settings(self.config),
            "pad_token_id": self.pad_token_id,
            "eos_token_ids": sorted(self.eos_token_ids),
            **sameness.models(self.model, ref_model),
            **sameness.tokens(self.tokenizer),
        }

    def _moving_facts(self) -> dict[str, Any]:
        """What must be the same on all ranks at every step, but could have been changed on one of them."""
        functions = self.advantage_estimator, self.policy_objective
        return {
            "current_step": self.current_step,
            **self._last_update(),
            "the class of ref_model": type(self.ref_model).__name__,
            **sameness.settings(self.config),
            **sameness.moving_parts(self.model, self.optimizer, self.lr_scheduler, self.kl_ctl, *functions),
            **(sameness.trained(self.model, self.optimizer) if self._rounds_alike else {}),
        }

    def _last_update(self) -> dict[str, str]:
        """Whether the optimiser's last step was whole here: where it was not on all ranks, their weights differ."""
        whole = self.broken_off is None or self.broken_off.endswith(ON_ANOTHER)
        return {"the last update": "made" if whole else "broken off (load a checkpoint on all ranks)"}

    def _warn_at_the_start(self) -> None:
        """Say what works, but is hardly meant."""
        found = differences(sameness.versions(), self.world, "the comparison of versions")
        self._rounds_alike = not found
        """Whether weights that are the same on all ranks, and make the same step, are the same again."""
        if found:
            _say("%s: numbers may be rounded differently there", "; ".join(found))
        if updates := self.config.updates_of_one_sequence:
            _say(
                "mini_batch_size is 1 and batch_size %d: every step makes %d optimiser updates, each on one sequence "
                "alone; set mini_batch_size, or gradient_accumulation_steps where memory is short",
                self.config.batch_size,
                updates,
            )

    @property
    def config(self) -> PPOConfig:
        """The settings, with what kind the model is of."""
        return self._config

    @config.setter
    def config(self, config: PPOConfig) -> None:
        assembly.check_kinds(config, self.model, self.tokenizer)
        kinds = {"is_encoder_decoder": has_encoder(self.model), "is_peft_model": self.model.is_peft_model}
        self._config = config.in_use(getattr(self, "_config", None), **kinds)

    @property
    def model(self) -> PreTrainedModelWrapper:
        """The policy; another one needs a trainer of its own."""
        return self._model

    @model.setter
    def model(self, model: PreTrainedModelWrapper) -> None:
        if model is not self._model:
            raise ValueError(
                "model is another one than the trainer was made with, whose parameters the optimiser has and whose "
                "reference was made beside it; make a new trainer for it"
            )

    @property
    def ref_model(self) -> Any:
        """The frozen model to stay close to; None where it is the policy without its adapter."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, ref_model: Any | None) -> None:
        if self.parallel.sharded:
            raise ValueError(
                "ref_model can't be assigned where parallelism is 'fsdp2': the models have been divided among the "
                "ranks; make a new trainer with it"
            )
        assembly.check_reference_kind(self.model, ref_model)
        place(self.model, ref_model, None, self.config.device)
        check_devices(self.model, ref_model)
        self._ref_model, self._reference, self.acceleration = assembly.make_reference(
            self.model, ref_model, None, self.config
        )

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; ``pad_token_id`` and ``eos_token_ids`` are made of it when it is set."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        assembly.check_kinds(self.config, self.model, tokenizer)
        self.pad_token_id, self.eos_token_ids = assembly.special_tokens(tokenizer, self.model)
        self._tokenizer = tokenizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What steps the policy's parameters."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer, self.model)
        check_moments(optimizer, self.model)
        self._optimizer = optimizer

    @property
    def kl_ctl(self) -> Any:
        """What gives the KL coefficient as its ``value``, and is told the KL of every step."""
        return self._kl_ctl

    @kl_ctl.setter
    def kl_ctl(self, controller: Any) -> None:
        check_controller(controller)
        self._kl_ctl = controller

    @property
    def response_generator(self) -> ResponseGenerator:
        """What generates, of what the trainer is now."""
        return ResponseGenerator(
            self.model,
            self.ref_model,
            self.tokenizer,
            self.config,
            pad_token_id=self.pad_token_id,
            eos_token_ids=self.eos_token_ids,
            engine=self.response_engine,
            remembered=self._remembered,
        )

    def prepare_dataloader(
        self, dataset: Any, data_collator: Callable[[list[dict[str, Any]]], Any] | None = None
    ) -> DataLoader[Any]:
        """A shuffled DataLoader of ``batch_size`` rows over a torch or ``datasets`` dataset."""
        return prepare_dataloader(dataset, data_collator, config=self.config, model=self.model, world=self.world)

    def generate(
        self,
        query_tensor: Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int | None = None,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to one query or to each of a list.

        Args:
            query_tensor: token ids (length,), or a list of such rows; a row is a tensor or a list of ints.
            length_sampler: gives ``max_new_tokens`` of every ``batch_size`` queries in their order; of every 4 if None.
            batch_size: queries generated together, in their order. None: as many as half of the free memory holds,
                sorted by length where that takes several batches; but 4 in their order where functions of yours see
                the rows (``prefix_allowed_tokens_fn``, ``logits_processor``, ``stopping_criteria``), and where a
                ``length_sampler`` meets beams, a forced last token or too little room. With a decoder-only model and a
                plain choice of tokens, what is sampled for a query does not depend on it.
            return_prompt: True puts the prompt in front, except with an encoder-decoder.
            generate_ref_response: also sample from the reference.
            generation_kwargs: for transformers' ``generate``: settings, or a ``generation_config``. What samples from
                another distribution than the one PPO trains is warned about. With a decoder-only model ``max_length``
                and ``min_length`` count the longest prompt of the call, whatever is generated together. A response
                ends with the token that ended it, be it an EOS (one outside the vocabulary is never drawn), the end of
                one of ``stop_strings`` (by the trainer's tokenizer unless you pass one) or what ``stopping_criteria``
                say.

        Returns:
            For a list, a list of 1-d tensors; for one query, a [1, length] tensor. With ``generate_ref_response`` a
            pair of these, policy first.

        Raises:
            ValueError: an empty query, ids outside the vocabulary, a prompt that leaves no room in the context, or a
                setting that is unknown or cannot be, by name; nothing has been generated then.
        """
        with self.parallel.whole():
            return self.response_generator.generate(
                query_tensor,
                length_sampler,
                batch_size=batch_size,
                return_prompt=return_prompt,
                generate_ref_response=generate_ref_response,
                generation_kwargs=generation_kwargs,
            )

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
            Statistics by the names of :data:`ppo_runtime.reporting.metrics.METRICS`; single numbers as floats,
            distributions as numpy arrays.

        Raises:
            ValueError: anything about the input that does not fit, or scores, log-probabilities or values that cannot
                be trained on, by name; nothing has changed then.
            RankLost: another rank has ended, or does not come to where the others wait for it.

        Whatever one rank refuses is raised on all of them, in the same words, which name the rank.

        Whatever else ends a step early leaves everything as it was before, but for an optimiser that has stepped
        already: ``broken_off`` then says so. Minibatches that wait for their update stay as well, unless
        the step was whole or has moved weights.
        """
        fast = fast_products(self.model, self.config.accel)
        # Outermost, so that gradients are on and off as before however the rest ends.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            freed_memory_kept(),
            own_precision(self.device),
            fast,
            # Around the undoing: a step is whole before its batch is kept, which may be interrupted.
            self._inspection.watching(
                watched := Watched(queries, responses, scores, response_masks),
                progress := Progress(gradients_waiting(self.model, self.optimizer)),
                step=self.current_step + 1,
                config=self.config,
                world=self.world,
            ),
            self._undone_unless_whole(progress),
            lost_ranks_named(self.world, f"step {self.current_step + 1}"),
        ):
            return self._step(queries, responses, scores, response_masks, progress, watched.computed)

    def _step(
        self,
        queries: Any,
        responses: Any,
        scores: Any,
        response_masks: Any,
        progress: Progress,
        computed: dict[str, Any],
    ) -> dict[str, Any]:
        started = time.perf_counter()
        times: dict[str, float] = {}
        config, model = self.config, self.model
        with all_or_none(self.world, carries=1, phase="the check of the batch") as ballot:
            self._check_parts()
            self._settle_schedule()
            queries, responses, raw, masks = self._check_step(queries, responses, scores, response_masks)
            rows = self._lay_out(queries, responses, masks)
            self.response_generator.warn_of_greedy_responses(responses)
            plan = plan_updates(len(queries), config, self.shuffle)
            kl_coef = coefficient_of(self.kl_ctl)
            ballot.mine[0] = len(queries)
            ballot.facts = lambda: {**self._moving_facts(), UPDATES: sum(map(len, plan))}
            seen = None if self.parallel.sharded else self._score(rows, times, computed)
        if seen is None:  # weights are gathered by all ranks together
            with self.parallel.whole(), all_or_none(self.world, phase="the scoring of the responses"):
                keeps_rows_apart(self.model)  # again, if its attention has been set anew: passes of updates will ask
                seen = self._score(rows, times, computed)
        scored, bottom = seen
        scores_now = self.scores(raw, config=config, world=self.world).to(self.device)

        with _clock(times, "compute_rewards"):
            rewards = compute_rewards(scores_now, scored.kl, rows.mask, kl_coef=kl_coef)
            computed |= rewards._asdict()
        with _clock(times, "compute_advantages"):
            batch, tokens = make_experience(
                scored,
                scores_now,
                rewards,
                rows.mask,
                estimator=self.advantage_estimator,
                tokens=tokens_per_update(plan, rows.mask),
                config=config,
                world=self.world,
            )
        computed |= batch._asdict()
        self.best_score = upload_if_best(
            raw, self.best_score, self.current_step, self.push_to_hub, config=config, world=self.world
        )
        learning_rate = first_learning_rate(self.optimizer)
        with _clock(times, "optimize_step"), lost_ranks_named(self.world, "the updates"):
            outcome = optimise(
                model,
                self.optimizer,
                rows._replace(bottom=bottom),
                batch.targets,
                plan,
                tokens,
                config,
                policy_loss=self.policy_objective,
                parallel=self.parallel,
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
        self._update_controller(stats["objective/kl"], int(ballot.all[:, 0].sum()))
        if config.optimize_device_cache:
            torch.cuda.empty_cache()
        self._say_skipped(outcome.skipped, self.current_step + 1, made=progress.begun)
        times["total"] = time.perf_counter() - started
        # Last, together with the counter: what is broken off before is undone without them.
        if self.lr_scheduler is not None and progress.begun and (error := advance(self.lr_scheduler, self.optimizer)):
            self._unscheduled = self.lr_scheduler
            _say("%s", no_rate(self.lr_scheduler, self.current_step + 2, error))
        self.current_step += 1
        self.recent_scores.add(raw)
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
        numbers, table = log_entry(stats, batch, rewards, columns_to_log, tokenizer=self.tokenizer, world=self.world)
        with all_or_none(self.world, phase="the writing of statistics"):
            if self.world.rank == 0:
                self.run_log.log(self.trackers, self.current_step, numbers, {"game_log": table})

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

    def _drop_accumulated(self) -> None:
        """Forget gradients that wait for an update."""
        self.model.zero_grad(set_to_none=True)

    def _take_over(self, state: dict[str, Any]) -> None:
        step, coefficient, best = state["current_step"], state["kl_coef"], state["best_score"]
        scores = ScoreState(**state["scores"])
        if self.kl_ctl.value != coefficient:
            self.kl_ctl.value = coefficient  # a user's own controller has no more than this
        self.current_step, self.best_score, self.scores.state = step, best, scores
        self._unscheduled = self.lr_scheduler if state.get("unscheduled") else None  # older checkpoints cannot say
        self.broken_off = None

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write policy, value head, tokenizer and model card; ``transformers`` loads the directory as a plain model.

        A README.md that somebody else wrote there is kept. Every rank calls it, and rank 0 writes. ``push_to_hub=True``
        uploads the same afterwards, to ``repo_id`` or else a repository of the directory's name, with the arguments of
        ``push_to_hub``.
        """
        if "state_dict" not in kwargs:
            kwargs |= self.parallel.saved_as(self.model)
        if self.world.rank != 0:
            return
        if (uploading := take_upload(kwargs, save_directory)) is not None:
            self.save_pretrained(save_directory, **kwargs)
            weights = {name: kwargs[name] for name in ("state_dict",) if name in kwargs}
            self._upload(weights, **uploading)
            return
        card_is_free = is_ours(save_directory)
        self.model.save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        if card_is_free:
            self.create_model_card(str(save_directory), Path(save_directory).name or DEFAULT_NAME)

    def create_model_card(self, path: str, model_name: str | None = DEFAULT_NAME) -> None:
        """Write ``path``/README.md: what the model is, how it was trained and how to load it. Needs no network."""
        if self.world.rank == 0:
            write_model_card(
                path,
                model_name or DEFAULT_NAME,
                config=self.config,
                base_model=getattr(self.model.config, "name_or_path", None),
                is_encoder_decoder=has_encoder(self.model),
                steps=self.current_step,
                broken_off=self.broken_off,
            )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what ``save_pretrained`` writes, from rank 0; every rank calls it.

        Args:
            repo_id: of the repository; made if it does not exist.
            kwargs: ``commit_message``, ``commit_description``, ``private``, ``token``, ``revision``, ``create_pr`` and
                ``use_temp_dir``.

        Returns:
            huggingface_hub's commit information; None on other ranks.
        """
        weights = self.parallel.saved_as(self.model)
        return self._upload(weights, repo_id, **kwargs) if self.world.rank == 0 else None

    def _upload(self, weights: dict[str, Any], repo_id: str, **kwargs: Any) -> Any:
        message = kwargs.pop("commit_message", f"Policy after {self.current_step} PPO steps")
        return upload(partial(self.save_pretrained, **weights), repo_id, commit_message=message, **kwargs)

    def close(self, *, failed: bool = False) -> None:
        """Close the trackers' files; the next ``log_stats`` opens them again and appends.

        ``failed`` is for a run that an error has ended, which Weights & Biases then shows.
        """
        self.run_log.close(failed=failed)

    @property
    def device(self) -> torch.device:
        """Where the policy lives."""
        return self.model.device

    @property
    def trackers(self) -> list[Any]:
        """Those of the run, opened at the first use."""
        return self.run_log.opened(self.config, {"acceleration": attrs.asdict(self.acceleration)})

    def _score(self, rows: Rows, times: dict[str, float], computed: dict[str, Any]) -> tuple[Scored, Bottom | None]:
        with _clock(times, "forward_pass"):
            scored, bottom = score_rollout(self.model, self._reference, rows, kl_penalty=self.config.kl_penalty)
            computed |= scored._asdict()
        return scored, bottom

    def _lay_out(self, queries: Sequence[Tensor], responses: Sequence[Tensor], masks: Any) -> Rows:
        return lay_out_batch(
            queries, responses, masks, model=self.model, config=self.config, pad_token_id=self.pad_token_id
        )

    def _check_parts(self) -> None:
        """Refuse, or say, what models and optimiser have become since the trainer was made and would not train."""
        check_trains(self.model)
        self.parallel.check(reentrant=recomputes_within_backward(self.model))
        check_wide(self.optimizer, self.model)
        check_fits(self.optimizer, self.model)
        if self.ref_model is not None:
            assembly.check_vocabularies(self.model, self.ref_model)
        say_what_stays(self.optimizer, self.model, self._said)

    def _check_step(
        self, queries: Any, responses: Any, scores: Any, response_masks: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor] | None]:
        queries, responses, scores, masks = check_batch(
            queries, responses, scores, response_masks, model=self.model, config=self.config
        )
        responses, masks = self.response_generator.without_start_token(responses, masks)
        check_lengths(queries, responses, self.model)
        return queries, responses, scores, masks

    @contextmanager
    def _undone_unless_whole(self, progress: Progress) -> Iterator[None]:
        """A step that does not end leaves the trainer as it was; where weights have moved, ``broken_off`` says so.

        No copy of the weights is kept to go back to: it would be as large as the model.
        """
        before, order = self.state_dict(), self.shuffle.get_state()
        try:
            yield
        except BaseException as error:
            marked = self.broken_off
            if progress.begun:
                marked = (
                    f"step {before['current_step'] + 1} was broken off by {type(error).__name__} after "
                    f"{progress.begun} steps of the optimiser{ON_ANOTHER if progress.ahead else ''}"
                )
            try:
                # What was uploaded in the meantime stays uploaded, and a scheduler's step that was owed stays made.
                owed = before["unscheduled"] and self._unscheduled is not None
                self._take_over(before | {"best_score": self.best_score, "unscheduled": owed})
            except Exception as failure:  # a part of the user's own may refuse; the error that matters is the first
                logger.warning("the step could not be undone whole: %s: %s", type(failure).__name__, failure)
            finally:
                self.shuffle.set_state(order)
                self.broken_off = marked
                progress.put_back()
            if progress.begun:
                self._drop_accumulated()
                advice = "go back to the last one, or go on: the next whole step makes checkpoints possible again"
                logger.warning(
                    "%s: the weights are between two steps. No checkpoint is made of them; %s",
                    self.broken_off,
                    advice if self.world.size == 1 else "load a checkpoint on all ranks",
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
        with all_or_none(self.world, phase="the update of the KL controller"):  # which may be the user's own
            try:
                self.kl_ctl.update(kl, n_steps)
            except ValueError as refusal:
                _say("the KL controller kept its coefficient %s: %s", self.kl_ctl.value, refusal)


def _say(text: str, *values: Any) -> None:
    """Log what all ranks have come to, once."""
    if speaks_for_all():
        logger.warning(text, *values)


@contextmanager
def _clock(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start
