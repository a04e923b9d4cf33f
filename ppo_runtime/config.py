"""Every setting of the trainer and the only home of its defaults."""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import attrs

from ppo_runtime.redact import without_secrets

KL_PENALTIES = ("kl", "abs", "mse", "full")
TRACKERS = (None, "tensorboard", "wandb")
TrackerName = Literal["tensorboard", "wandb"]
ACCELERATORS = ("auto", "eager", "ipex")

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _positive_integer(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field.name} is {value!r}, expected an integer of at least 1")


def _natural(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field.name} is {value!r}, expected an integer of at least 0")


def _number(low: float, high: float, *, low_open: bool, optional: bool = False) -> Validator:
    """A validator for a finite number in [low, high], or (low, high] if ``low_open``."""
    interval = f"{'(' if low_open else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"

    def check(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
        if value is None and optional:
            return
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
            raise ValueError(
                f"{field.name} is {value!r}, expected a finite number in {interval}{' or None' if optional else ''}"
            )

    return check


def _one_of(choices: tuple[Any, ...]) -> Validator:
    def check(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        if value not in choices:
            raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(map(repr, choices))}")

    return check


def _boolean(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{field.name} is {value!r}, expected True or False")


def _script_name() -> str:
    return Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "ppo"


def _without_secrets(value: object) -> str:
    return repr(without_secrets(value))


_POSITIVE = _number(0.0, math.inf, low_open=True)
_NOT_NEGATIVE = _number(0.0, math.inf, low_open=False)
_FRACTION = _number(0.0, 1.0, low_open=False)
_MAYBE_POSITIVE = _number(0.0, math.inf, low_open=True, optional=True)


def _flag(default: bool) -> Any:
    return attrs.field(default=default, validator=_boolean)


def _count(default: int) -> Any:
    return attrs.field(default=default, validator=_positive_integer)


@attrs.frozen(kw_only=True)
class PPOConfig:
    """Settings of a :class:`ppo_runtime.PPOTrainer`, named and defaulted as in the reference.

    Frozen: change one with ``attrs.evolve(config, learning_rate=1e-6)``. A value out of range is a ValueError
    here, with its name and what was expected, and not an odd curve later.
    """

    # The run.
    exp_name: str = attrs.field(factory=_script_name)
    """Names the run; metrics go to ``runs/<exp_name>`` unless ``project_kwargs["logging_dir"]`` says otherwise."""
    seed: int = attrs.field(default=0, validator=_natural)
    """Of everything random: sampling, the order of the data, the order of the minibatches."""
    log_with: TrackerName | None = attrs.field(default=None, validator=_one_of(TRACKERS))
    """A tracker beside the JSONL file that is always written."""
    task_name: str | None = None
    """These four go with the run's settings to the trackers; nothing is loaded by them."""
    model_name: str | None = "gpt2"
    query_dataset: str | None = "imdb"
    reward_model: str | None = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = _flag(True)
    """Drop columns of a ``datasets.Dataset`` that neither the model nor the trainer reads."""
    drop_last: bool = _flag(True)
    """Drop a last batch shorter than ``batch_size``; False trains on it as well."""
    tracker_kwargs: dict[str, Any] = attrs.field(factory=dict, repr=_without_secrets)
    """For the tracker of ``log_with``, plain or under its name: {"wandb": {"entity": "us"}}."""
    accelerator_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Not used: this runtime has no accelerate. Anything in it is refused."""
    project_kwargs: dict[str, Any] = attrs.field(factory=dict)
    """Where metrics go, as "logging_dir" or else "project_dir"; it takes nothing else."""
    tracker_project_name: str = "ppo"
    """Project of a Weights & Biases run."""
    push_to_hub_if_best_kwargs: dict[str, Any] = attrs.field(factory=dict, repr=_without_secrets)
    """Arguments of ``push_to_hub``, "repo_id" among them: the policy is uploaded whenever its batch has the highest
    mean raw score so far. Empty: never."""
    compare_steps: int = _count(1)
    """Look for the best policy every so many steps."""
    use_habana: bool = _flag(False)
    """Not used: this runtime has no Habana backend. True is refused."""
    accel: str = attrs.field(default="auto", validator=_one_of(ACCELERATORS))
    """How frozen forwards run: "ipex", "eager", or "auto", which takes IPEX where it is installed and fits."""

    # The optimisation.
    steps: int = _count(20000)
    """Sequences to train on in the whole run; ``total_ppo_epochs`` steps of ``batch_size``."""
    learning_rate: float = attrs.field(default=1e-5, validator=_POSITIVE)
    batch_size: int = _count(256)
    """Sequences per ``step`` on each rank."""
    mini_batch_size: int = _count(1)
    """Sequences per forward and backward pass."""
    gradient_accumulation_steps: int = _count(1)
    """Minibatches per optimiser step."""
    ppo_epochs: int = _count(4)
    """Passes over a batch."""
    max_grad_norm: float | None = attrs.field(default=None, validator=_MAYBE_POSITIVE)
    optimize_device_cache: bool = _flag(False)
    """Empty a GPU's allocator cache after every step."""
    early_stopping: bool = _flag(False)
    """Leave out the remaining epochs of a step once the policy has moved 1.5 ``target_kl`` away from the rollout's."""
    target_kl: float = attrs.field(default=1.0, validator=_POSITIVE)
    """Nats per token between the rollout's policy and the present one."""
    ratio_threshold: float = attrs.field(default=10.0, validator=_POSITIVE)
    """An update whose mean pi / pi_old exceeds this is left out: neither weights nor moments change."""

    # The objective.
    adap_kl_ctrl: bool = _flag(True)
    init_kl_coef: float = attrs.field(default=0.2, validator=_NOT_NEGATIVE)
    """Score units per nat."""
    kl_penalty: str = attrs.field(default="kl", validator=_one_of(KL_PENALTIES))
    target: float = attrs.field(default=6.0, validator=_POSITIVE)
    """Nats per sequence that the adaptive controller holds."""
    horizon: float = attrs.field(default=10000.0, validator=_POSITIVE)
    """Sequences over which the coefficient changes by at most 20 %."""
    gamma: float = attrs.field(default=1.0, validator=_FRACTION)
    lam: float = attrs.field(default=0.95, validator=_FRACTION)
    cliprange: float = attrs.field(default=0.2, validator=_POSITIVE)
    cliprange_value: float = attrs.field(default=0.2, validator=_POSITIVE)
    vf_coef: float = attrs.field(default=0.1, validator=_NOT_NEGATIVE)
    use_score_scaling: bool = _flag(False)
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = _flag(False)
    """Subtract the running mean first; only together with ``use_score_scaling``."""
    score_clip: float | None = attrs.field(default=None, validator=_MAYBE_POSITIVE)
    """Keep scores, after scaling, within plus or minus this."""
    whiten_rewards: bool = _flag(False)
    """Scale the rewards per token to variance 1 over the batch and all ranks; their mean stays."""

    # Static shapes for compiled graphs.
    pad_for_acceleration: bool = _flag(False)
    """Give every forward pass the same shape; longer rows are refused, never cut."""
    pad_max_len: int = attrs.field(default=0, validator=_natural)
    """Width of prompt and response together; of the response alone for an encoder-decoder."""
    pad_max_input_len: int = attrs.field(default=0, validator=_natural)
    """Width of the prompts in generation and in an encoder. 0: as wide as they are."""

    # Found out by the trainer.
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None

    def __attrs_post_init__(self) -> None:
        """Check what takes more than one field to check."""
        if self.use_habana:
            raise ValueError("use_habana is True, but this runtime has no Habana backend; leave it False")
        if self.accelerator_kwargs:
            raise ValueError(
                f"accelerator_kwargs is {self.accelerator_kwargs!r}, expected to be empty: this runtime has no "
                "accelerate. For several processes start the script with torchrun; for the CPU backend set accel"
            )
        if unknown := sorted(set(self.project_kwargs) - {"logging_dir", "project_dir"}):
            raise ValueError(
                f"project_kwargs has {', '.join(map(repr, unknown))}, expected 'logging_dir' or 'project_dir' alone: "
                "there is no accelerate to configure; checkpoints go where ppo_runtime.checkpoint is told"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm is True and use_score_scaling False; set both, or use_score_norm=False")
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
        """Processes started by torchrun, 1 otherwise."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def backward_batch_size(self) -> int:
        """Sequences per optimiser step on one rank."""
        return self.mini_batch_size * self.gradient_accumulation_steps

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
        return math.ceil(self.steps / self.batch_size)

    @property
    def logging_dir(self) -> Path:
        """Where metrics go."""
        chosen = self.project_kwargs.get("logging_dir") or self.project_kwargs.get("project_dir")
        return Path(chosen or Path("runs") / self.exp_name)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary of every field."""
        return attrs.asdict(self)
