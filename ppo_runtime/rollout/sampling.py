"""Which settings sample from another distribution than the plain one, whose log-probabilities PPO trains.

The ratio, the KL and the entropy are those of a policy that draws each token from the softmax of its logits. Whatever
moves the draws elsewhere trains on responses of a policy that is not the one in the losses.
"""

from collections.abc import Mapping
from typing import Any

from ppo_runtime.rollout.settings import Settings, fields

# Every setting that moves the distribution, and the value under which it does not.
NEUTRAL: Mapping[str, Any] = {
    # Of sampling alone: greedy decoding passes them by.
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    # Of all ways to choose a token.
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": None,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "watermarking_config": None,
}
_SAMPLING_ALONE = tuple(NEUTRAL)[:8]
# Other values that do nothing.
_AS_GOOD: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "guidance_scale": (1,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
}
# Arguments of generate, besides settings, that move it.
_FUNCTIONS = ("logits_processor", "prefix_allowed_tokens_fn")


def plain(settings: Mapping[str, Any] | None = None, **defaults: Any) -> dict[str, Any]:
    """The settings, over plain sampling as far as the installed transformers has settings for it, and over defaults.

    What a ``generation_config`` among the settings sets is left to it. ``plain(max_new_tokens=16)`` is all it takes to
    sample what PPO trains, whatever the model's own generation config says.
    """
    settings, known = dict(settings or {}), fields()
    passed = settings.get("generation_config")
    neutral = {"do_sample": True} | {name: value for name, value in NEUTRAL.items() if name in known} | defaults
    return {name: value for name, value in neutral.items() if getattr(passed, name, None) is None} | settings


def gaps(settings: Settings) -> dict[str, Any]:
    """Neutral values where neither caller nor model has any but tokens are sampled.

    transformers fills these gaps with defaults of its own, top_k=50 among them.
    """
    if not settings["do_sample"]:
        return {}
    return {name: NEUTRAL[name] for name in ("temperature", "top_k", "top_p") if settings[name] is None}


def departures(settings: Settings) -> dict[str, str]:
    """What makes the tokens chosen others than those that plain log-probabilities score: names, and "name=value"."""
    sampled = bool(settings["do_sample"])
    names = [name for name in NEUTRAL if sampled or name not in _SAMPLING_ALONE]
    found = [name for name in names if _departs(name, settings[name])]
    found += [name for name in _FUNCTIONS if settings.asked(name)]
    return {name: f"{name}={_shown(settings[name])}" for name in found}


def _departs(name: str, value: Any) -> bool:
    if value is None:
        return False
    if name in ("min_length", "min_new_tokens"):
        return value > 0
    return value != NEUTRAL[name] and not any(value == one for one in _AS_GOOD.get(name, ()))


def _shown(value: Any) -> str:
    if isinstance(value, int | float | str):
        return str(value)
    if isinstance(value, list | tuple) and all(callable(one) for one in value):
        return f"[{', '.join(map(_shown, value))}]"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value) if len(repr(value)) <= 40 else "..."
