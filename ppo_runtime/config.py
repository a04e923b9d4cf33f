"""The trainer's settings, and the only place of their defaults."""

import sys
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from ppo_runtime.common.checked_settings import CheckedSettings, taking_former_names
from ppo_runtime.common.dataclass_view import JSONDict
from ppo_runtime.common.launcher import processes_started
from ppo_runtime.common.setting_kinds import (
    FRACTION,
    MAYBE_POSITIVE,
    NOT_NEGATIVE,
    OPTIONS,
    POSITIVE,
    Options,
    count,
    flag,
    label,
    natural,
    one_of,
    setting,
    shown_without_secrets,
    text,
)

KLPenalty = Literal["kl", "abs", "mse", "full"]
TrackerName = Literal["tensorboard", "wandb"]
OnNonfinite = Literal["skip", "drop", "stop"]
Parallelism = Literal["ddp", "fsdp2"]
ACCELERATORS = ("auto", "eager", "ipex", "onednn", "compile")


LARGE_BATCH = 32
"""From here on a minibatch of one sequence is more likely an oversight than a wish."""
_OF_THE_RUN = "name the run before its trainer is made"
FIXED = {
    "exp_name": _OF_THE_RUN,
    "log_with": _OF_THE_RUN,
    "tracker_kwargs": _OF_THE_RUN,
    "tracker_project_name": _OF_THE_RUN,
    "project_kwargs": _OF_THE_RUN,
    "seed": "call ppo_runtime.set_seed",
    "accel": "choose before the trainer is made: its reference has been prepared",
    "accel_strict": "choose before the trainer is made: its reference has been prepared",
    "device": "choose before the trainer is made: its models have been placed",
    "ranks_timeout": "choose before the trainer is made: the process group has been made with it",
    "parallelism": "choose before the trainer is made: its models have been divided",
    "learning_rate": "set 'lr' in each of trainer.optimizer.param_groups",
    "adap_kl_ctrl": "put another controller in place of trainer.kl_ctl",
    "init_kl_coef": "set trainer.kl_ctl.value",
    "target": "set trainer.kl_ctl.target",
    "horizon": "set trainer.kl_ctl.horizon",
    "is_encoder_decoder": "the trainer has it from its model",
    "is_peft_model": "the trainer has it from its model",
}
"""What a trainer reads once, when it is made, and where to change that afterwards."""


def _script_name() -> str:
    return Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "ppo"


@taking_former_names
@attrs.define(kw_only=True, slots=False, on_setattr=attrs.setters.NO_OP)
class PPOConfig(CheckedSettings):
    """Settings of a :class:`ppo_runtime.PPOTrainer`, named and defaulted as in TRL.

    A value out of range is a ValueError here, with its name and what was expected, and not an odd curve later. That
    holds for an assignment as well, which then changes nothing; to change several settings that must fit together,
    ``attrs.evolve(config, batch_size=64, mini_batch_size=8)``.

    A trainer works with a copy, ``trainer.config``. An assignment to that one is in force from then on, but for what
    the trainer has already built from it: a dataloader keeps its batches, and the names in :data:`FIXED` are refused
    with what to change instead.
    """

    # The run.
    exp_name: str = attrs.field(factory=_script_name, validator=text)
    """Names the run; metrics go to ``runs/<exp_name>`` unless ``project_kwargs["logging_dir"]`` says otherwise."""
    seed: int = setting(0, natural)
    """Of everything random: sampling, the order of the data, the order of the minibatches."""
    log_with: TrackerName | None = attrs.field(default=None, validator=one_of((None, *get_args(TrackerName))))
    """A tracker beside the JSONL file that is always written."""
    task_name: str | None = label(None)
    """These four go with the run's settings to the trackers; nothing is loaded by them."""
    model_name: str | None = label("gpt2")
    query_dataset: str | None = label("imdb")
    reward_model: str | None = label("sentiment-analysis:lvwerra/distilbert-imdb")
    remove_unused_columns: bool = flag(True)
    """Drop columns of a ``datasets.Dataset`` that neither the model nor the trainer reads."""
    drop_last: bool = flag(True)
    """Drop a last batch shorter than ``batch_size``; False trains on it as well."""
    tracker_kwargs: Options = attrs.field(factory=JSONDict, converter=OPTIONS, repr=shown_without_secrets)
    """For the tracker of ``log_with``, plain or under its name: {"wandb": {"entity": "us"}}."""
    accelerator_kwargs: Options = attrs.field(factory=JSONDict, converter=OPTIONS, repr=shown_without_secrets)
    """Not used: this runtime has no accelerate. Anything in it is refused."""
    project_kwargs: Options = attrs.field(factory=JSONDict, converter=OPTIONS, repr=shown_without_secrets)
    """Where metrics go, as "logging_dir" or else "project_dir"; it takes nothing else."""
    tracker_project_name: str = attrs.field(default="ppo", validator=text)
    """Project of a Weights & Biases run."""
    push_to_hub_if_best_kwargs: Options = attrs.field(factory=JSONDict, converter=OPTIONS, repr=shown_without_secrets)
    """Arguments of ``push_to_hub``, "repo_id" among them: the policy is uploaded whenever its batch has the highest
    mean raw score so far. Empty: never."""
    compare_steps: int = count(1)
    """Look for the best policy every so many steps."""
    use_habana: bool = flag(False)
    """Not used: this runtime has no Habana backend. True is refused."""
    accel: str = attrs.field(default="auto", validator=one_of(ACCELERATORS))
    """What speeds up a CPU: "ipex" or (a minute later) "compile" frozen models, "onednn" rollouts and the products of a
    step, "auto" all but "compile" where they pay, "eager" none. "ipex" and "compile" do what "auto" does for rollouts
    and steps. What is asked for in vain is a warning."""
    accel_strict: bool = flag(False)
    """An error, which says what to do, instead of eager torch wherever what "accel" asks for can't be had."""
    device: str = attrs.field(default="auto", validator=text)
    """Where the models are brought: "auto" has what is still on the CPU on the GPU of this process (torchrun's
    LOCAL_RANK), where there is one; or the name of a device, "cpu" or "cuda"."""
    ranks_timeout: float = setting(1800.0, POSITIVE)
    """Seconds that ranks wait for one that does not come, before they end with an error that names it. For a process
    group that the trainer makes itself."""
    parallelism: Parallelism = attrs.field(default="ddp", validator=one_of(get_args(Parallelism)))
    """How several processes share the models: "ddp" has all of them in each, "fsdp2" a part (weights, gradients and
    moments), which takes 1/n of the memory and sends half as much again, with every minibatch and not every update."""

    # The optimisation.
    steps: int = count(20000)
    """Sequences to train on in the whole run; ``total_ppo_epochs`` steps of ``batch_size``."""
    learning_rate: float = setting(1e-5, POSITIVE)
    batch_size: int = count(256)
    """Sequences per ``step`` on each rank."""
    mini_batch_size: int = count(1)
    """Sequences per forward and backward pass."""
    gradient_accumulation_steps: int = count(1)
    """Minibatches per optimiser step."""
    ppo_epochs: int = count(4)
    """Passes over a batch."""
    max_grad_norm: float | None = setting(None, MAYBE_POSITIVE)
    optimize_device_cache: bool = flag(False)
    """Empty a GPU's allocator cache after every step."""
    early_stopping: bool = flag(False)
    """Leave out the remaining epochs of a step once the policy has moved 1.5 ``target_kl`` away from the rollout's."""
    target_kl: float = setting(1.0, POSITIVE)
    """Nats per token between the rollout's policy and the present one."""
    ratio_threshold: float = setting(10.0, POSITIVE)
    """An update whose mean pi / pi_old exceeds this is left out: neither weights nor moments change."""
    on_nonfinite: OnNonfinite = attrs.field(default="skip", validator=one_of(get_args(OnNonfinite)))
    """What to do about numbers that are not finite; weights and moments stay in any case, and the batch is kept in
    ``not-finite`` of the metrics' directory. An update whose loss or gradient is not finite is left out ("skip",
    "drop") or an error ("stop"). A batch whose scores, log-probabilities or KL are not finite is an error of ``step``,
    after which ``train`` takes the next batch ("drop") or ends. Ten of either in a row are an error in any case."""

    # The objective.
    adap_kl_ctrl: bool = flag(True)
    init_kl_coef: float = setting(0.2, NOT_NEGATIVE)
    """Score units per nat."""
    kl_penalty: KLPenalty = attrs.field(default="kl", validator=one_of(get_args(KLPenalty)))
    target: float = setting(6.0, POSITIVE)
    """Nats per sequence that the adaptive controller holds."""
    horizon: float = setting(10000.0, POSITIVE)
    """Sequences over which the coefficient changes by at most 20 %."""
    gamma: float = setting(1.0, FRACTION)
    lam: float = setting(0.95, FRACTION)
    cliprange: float = setting(0.2, POSITIVE)
    cliprange_value: float = setting(0.2, POSITIVE)
    vf_coef: float = setting(0.1, NOT_NEGATIVE)
    use_score_scaling: bool = flag(False)
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = flag(False)
    """Subtract the running mean first; only together with ``use_score_scaling``."""
    score_clip: float | None = setting(None, MAYBE_POSITIVE)
    """Keep scores, after scaling, within plus or minus this."""
    whiten_rewards: bool = flag(False)
    """Scale the rewards per token to variance 1 over the batch and all ranks; their mean stays."""

    # Static shapes for compiled graphs.
    pad_for_acceleration: bool = flag(False)
    """Give every forward pass the same shape; longer rows are refused, never cut."""
    pad_max_len: int = setting(0, natural)
    """Width of prompt and response together; of the response alone for an encoder-decoder."""
    pad_max_input_len: int = setting(0, natural)
    """Width of the prompts in generation and in an encoder. 0: as wide as they are."""

    # Found out by the trainer.
    is_encoder_decoder: bool | None = setting(None, one_of((None, True, False)))
    is_peft_model: bool | None = setting(None, one_of((None, True, False)))

    def _fixed(self, name: str) -> str | None:
        return FIXED.get(name)

    def _check_together(self) -> None:
        if self.use_habana:
            raise ValueError("use_habana is True, but this runtime has no Habana backend; leave it False")
        if self.accelerator_kwargs:
            raise ValueError(
                f"accelerator_kwargs has {', '.join(map(repr, self.accelerator_kwargs))}, expected to be empty: this "
                "runtime has no accelerate. For several processes start the script with torchrun; for the CPU "
                "backend set accel"
            )
        if unknown := sorted(set(self.project_kwargs) - {"logging_dir", "project_dir"}):
            raise ValueError(
                f"project_kwargs has {', '.join(map(repr, unknown))}, expected 'logging_dir' or 'project_dir' alone: "
                "there is no accelerate to configure; checkpoints go where ppo_runtime.checkpoint is told"
            )
        for name, place in self.project_kwargs.items():
            if place is not None and not isinstance(place, str | Path):
                raise ValueError(
                    f"project_kwargs[{name!r}] is {shown_without_secrets(place)}, expected the path of a directory"
                )
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ValueError(
                f"push_to_hub_if_best_kwargs has {sorted(self.push_to_hub_if_best_kwargs)}, expected 'repo_id' among "
                "them, as push_to_hub needs it"
            )
        if self.pad_for_acceleration and not self.pad_max_len:
            raise ValueError(
                "pad_max_len is 0, expected the longest prompt + response, since pad_for_acceleration is on"
            )
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of mini_batch_size * "
                f"gradient_accumulation_steps = {self.backward_batch_size}"
            )
        if self.adap_kl_ctrl and self.global_batch_size >= 5 * self.horizon:
            raise ValueError(
                f"horizon is {self.horizon}, expected more than batch_size * world_size / 5 = "
                f"{self.global_batch_size / 5}: one update could make the KL coefficient zero or negative"
            )

    @property
    def world_size(self) -> int:
        """Processes that train together: those of the process group, else those that torchrun started, else 1."""
        return processes_started()

    @property
    def backward_batch_size(self) -> int:
        """Sequences per optimiser step on one rank."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def updates_of_one_sequence(self) -> int:
        """Optimiser steps per ``step`` if each of them sees one sequence of a large batch, else 0."""
        lonely = self.global_backward_batch_size == 1 and self.batch_size >= LARGE_BATCH
        return self.ppo_epochs * self.batch_size if lonely else 0

    @property
    def global_backward_batch_size(self) -> int:
        """Sequences per optimiser step over all ranks."""
        return self.backward_batch_size * self.world_size

    @property
    def global_batch_size(self) -> int:
        """Sequences per ``step`` over all ranks."""
        return self.batch_size * self.world_size

    @property
    def total_ppo_epochs(self) -> int:
        """Calls of ``step`` that make up ``steps`` sequences, rounded up."""
        return -(-self.steps // self.batch_size)

    @property
    def logging_dir(self) -> Path:
        """Where metrics go."""
        chosen = self.project_kwargs.get("logging_dir") or self.project_kwargs.get("project_dir")
        return Path(chosen or Path("runs") / self.exp_name)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of every field."""
        return attrs.asdict(self)
