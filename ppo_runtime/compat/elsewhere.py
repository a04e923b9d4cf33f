"""Where TRL's names are that this package does not have; asking for one raises an error that says so."""

import dis
import sys
from collections.abc import Callable
from typing import Any

_FOR_OTHER_TASKS = [
    "AlignPropConfig",
    "AlignPropTrainer",
    "BCOConfig",
    "BCOTrainer",
    "CPOConfig",
    "CPOTrainer",
    "ConstantLengthDataset",
    "DataCollatorForCompletionOnlyLM",
    "DDPOConfig",
    "DDPOPipelineOutput",
    "DDPOSchedulerOutput",
    "DDPOStableDiffusionPipeline",
    "DDPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "DefaultDDPOStableDiffusionPipeline",
    "GKDConfig",
    "GKDTrainer",
    "IterativeSFTTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "NashMDConfig",
    "NashMDTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOv2Config",
    "PPOv2Trainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "XPOConfig",
    "XPOTrainer",
    "compute_accuracy",
    "get_kbit_device_map",
    "get_peft_config",
    "get_quantization_config",
    "peft_module_casting_to_bf16",
    "setup_chat_format",
]

ELSEWHERE: dict[str, str] = dict.fromkeys(
    _FOR_OTHER_TASKS, "is no part of PPO training and has stayed with its library; import it from there"
) | {
    "BestOfNSampler": "is not here: give trainer.generate every query n times and keep the response that your score "
    "function likes best",
    "PPODecorators": "is not needed: PPOConfig(optimize_device_cache=True) empties the cache after every step",
    "RunningMoments": "is trainer.running to read, and ppo_core.scores.ScoreState to compute with",
    "TextEnvironment": "is not here: join a dialogue with tools into one response yourself, and give step "
    "response_masks with 0 where the tool has written and 1 where the policy has",
    "TextHistory": "went with TextEnvironment: keep texts, tokens and masks in lists of your own",
    "WANDB_PADDING": "is gone: stack_dicts fills with NaN, and nanmean leaves that out",
    "add_suffix": "is {key + suffix: value for key, value in stats.items()}",
    "average_torch_dicts": "is stack_dicts, and then nanmean(0) of every entry",
    "disable_dropout_in_model": "is not needed: the trainer computes without dropout; a context that does so is "
    "ppo_runtime.models.modes.without_dropout",
    "pad_to_size": "is torch.nn.functional.pad(tensor, (0, size - tensor.shape[-1]), value=padding)",
    "randn_tensor": "is torch.randn(shape, generator=generator, device=device, dtype=dtype)",
    "top_k_top_p_filtering": "is ppo_core.logprobs.restrict_to_support(logits, temperature=1.0, top_k=k, top_p=p)",
}
"""What became of a name, as the end of a sentence that begins with it."""


def refuse(name: str) -> None:
    """Nothing, for a name that is unknown. To be called by a module's ``__getattr__``.

    Raises:
        AttributeError: what became of the name; ``hasattr`` is then False.
        ImportError: the same for ``from x import y``, which would hide an AttributeError's message.
    """
    if name in ELSEWHERE:
        raise (ImportError if _is_importing() else AttributeError)(f"{name} {ELSEWHERE[name]}")


def _is_importing() -> bool:
    """Whether a module was asked for a name by the ``from x import y`` of the nearest frame that is no module's."""
    # No class of errors can be both of those, and nothing but its instruction tells the one who asks from others.
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in ("refuse", "__getattr__"):
        frame = frame.f_back
    code = frame.f_code.co_code
    at = frame.f_lasti
    while code[at] == dis.EXTENDED_ARG:  # Python 3.10 is still at the prefix of an instruction with a large argument
        at += 2
    return dis.opname[code[at]] == "IMPORT_FROM"


def attributes_of(module: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for what it does not hold."""

    def __getattr__(name: str) -> Any:
        refuse(name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
