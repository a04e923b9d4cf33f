"""What the value of a setting of generation has to be: the tables, and the numbers among them."""

import contextlib
import math
import operator
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

_TOKENS_ONLY = "generate returns token ids and nothing else: call trainer.model.generate for more"
_SEVERAL_AT_ONCE = "assisted decoding takes several tokens at a time, and where a row ended among them is not known"
_GONE = "transformers has moved this way of decoding out to code on the hub, and it samples from no distribution"
# Settings that a caller may only leave out or leave neutral: what is neutral, and why.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_return_sequences": ((1,), "one response per query is returned: put each query into the list several times"),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        ((False,), _TOKENS_ONLY),
    ),
    **dict.fromkeys(
        ("assistant_model", "assistant_tokenizer", "assistant_early_exit", "prompt_lookup_num_tokens"),
        ((), _SEVERAL_AT_ONCE),
    ),
    "use_mtp": ((False,), _SEVERAL_AT_ONCE),
    "is_assistant": ((False,), _SEVERAL_AT_ONCE),
    "custom_generate": ((), "where its rows end is not known"),
    "token_healing": ((False,), "it rewrites the end of the prompt, which the step then reads as it was"),
    "num_beam_groups": ((1,), _GONE),
    "diversity_penalty": ((0.0,), _GONE),
    "penalty_alpha": ((0.0,), _GONE),
    "dola_layers": ((), _GONE),
    "constraints": ((), _GONE),
    "force_words_ids": ((), _GONE),
}
# The same for encoder-decoders alone.
REFUSED_WITH_ENCODER: dict[str, tuple[tuple[Any, ...], str]] = {
    "guidance_scale": ((1, 1.0), "the second pass that it guides by is one of decoder-only models"),
    "prefill_chunk_size": ((), "the encoder reads the prompt whole, and a decoder fed in chunks gives other tokens"),
}


class _Number(NamedTuple):
    """What a number has to be: whole or not, and the values that make sense."""

    whole: bool
    fits: Callable[[float], bool]
    expected: str


COUNT = _Number(True, lambda value: value >= 1, "a whole number from 1")
_COUNT_OR_NONE = _Number(True, lambda value: value >= 0, "a whole number from 0")
# Old scripts write min_length=-1 for "none".
_LEAST = _Number(True, lambda value: True, "a whole number")
_ANY = _Number(False, lambda value: True, "a finite number")
_POSITIVE = _Number(False, lambda value: value > 0, "a finite number above 0")
# Numbers that logits are multiplied with or divided by: beyond these, single precision makes infinities of them.
_LARGEST = 1e30
_FACTOR = _Number(False, lambda value: 1 / _LARGEST <= value <= _LARGEST, "a number from 1e-30 to 1e30")
_SHARE = _Number(False, lambda value: 0 < value <= 1, "a number above 0 and up to 1")
_CUTOFF = _Number(False, lambda value: 0 <= value < 1, "a number from 0 up to, not including, 1")
NUMBERS: dict[str, _Number] = {
    "max_new_tokens": COUNT,
    "max_length": COUNT,
    "num_beams": COUNT,
    "min_length": _LEAST,
    "min_new_tokens": _LEAST,
    "no_repeat_ngram_size": _COUNT_OR_NONE,
    "encoder_no_repeat_ngram_size": _COUNT_OR_NONE,
    "top_k": _Number(True, lambda value: value >= 0, "a whole number from 0, where 0 keeps all tokens"),
    "temperature": _FACTOR._replace(expected="a number from 1e-30 to 1e30; for the likeliest tokens, do_sample=False"),
    "max_time": _POSITIVE,
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "top_p": _SHARE,
    "typical_p": _SHARE,
    "top_h": _SHARE,
    "min_p": _Number(False, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "epsilon_cutoff": _CUTOFF,
    "eta_cutoff": _CUTOFF,
    "prefill_chunk_size": COUNT,
    "max_cache_len": COUNT,
    "assistant_ensemble_weight": _Number(False, lambda value: 0 < value < 1, "a number between 0 and 1"),
    "guidance_scale": _Number(False, lambda value: abs(value) <= _LARGEST, "a number from -1e30 to 1e30"),
    "length_penalty": _ANY,
}
FLAGS = (
    *("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "disable_compile", "low_memory"),
    *("synced_gpus", "trust_remote_code"),
)
# Other kinds of values, and what an entry has to be.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens"),
        (lambda value: isinstance(value, list | tuple) and all(map(_is_id, value)), "a list of token ids"),
    ),
    **dict.fromkeys(
        ("forced_bos_token_id", "bos_token_id", "decoder_start_token_id"), (lambda value: _is_id(value), "a token id")
    ),
    "forced_eos_token_id": (
        lambda value: _is_id(value) or (isinstance(value, list) and len(value) > 0 and all(map(_is_id, value))),
        "a token id or a list of them",
    ),
    "bad_words_ids": (
        lambda value: (
            isinstance(value, list)
            and len(value) > 0
            and all(isinstance(word, list) and len(word) > 0 and all(map(_is_id, word)) for word in value)
        ),
        "a list of lists of token ids, none of them empty",
    ),
    "sequence_bias": (
        lambda value: _is_bias(value),
        "a dictionary from tuples of token ids to floats, or a list of [list of token ids, float], where a float is at "
        "most 1e30 and -inf forbids",
    ),
    "exponential_decay_length_penalty": (
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_real, value)),
        "a pair (first token, factor)",
    ),
    "watermarking_config": (
        lambda value: hasattr(value, "validate") and hasattr(value, "construct_processor"),
        "a transformers WatermarkingConfig",
    ),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "True, False or 'never'"),
    "cache_config": (lambda value: isinstance(value, dict), "a dictionary"),
    "streamer": (lambda value: hasattr(value, "put") and hasattr(value, "end"), "a transformers streamer"),
    "tokenizer": (lambda value: hasattr(value, "get_vocab"), "a transformers tokenizer"),
    "prefix_allowed_tokens_fn": (callable, "a function of a row's number and its tokens"),
    **dict.fromkeys(
        ("logits_processor", "stopping_criteria"),
        (
            lambda value: callable(value) or (isinstance(value, list | tuple) and all(map(callable, value))),
            "a list of callables",
        ),
    ),
    "stop_strings": (
        lambda value: (
            isinstance(value, str | list | tuple) and value != "" and all(isinstance(one, str) and one for one in value)
        ),
        "a string or a list of strings, none of them empty",
    ),
    **dict.fromkeys(
        ("negative_prompt_ids", "negative_prompt_attention_mask"),
        (lambda value: isinstance(value, Tensor), "a tensor"),
    ),
}


def whole(name: str, value: Any, number: _Number) -> int:
    """A whole number of any kind (numpy's, a tensor of one), as an int.

    Raises:
        ValueError: it is something else, or does not fit.
    """
    found = None
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            found = operator.index(value)
    if found is None or not number.fits(found):
        raise ValueError(f"{name} is {shown(value)}, expected {number.expected}")
    return found


def token_ids(name: str, value: Any) -> list[int]:
    """One token id or several, as a list; None gives none."""
    if value is None:
        return []
    if hasattr(value, "tolist"):  # a tensor, or an array
        value = value.tolist()
    several = value if isinstance(value, list | tuple | set | frozenset) else [value]
    return [whole(name, token, _LEAST._replace(expected="a token id or a list of them")) for token in several]


def check_number(name: str, value: Any, number: _Number) -> None:
    """Refuse what is neither None nor such a number.

    Raises:
        ValueError: with the setting's name and value, and what was expected.
    """
    if value is None:
        return
    # A float may stand for "none", as top_k=0.0 does in old scripts, and for no other whole number.
    fits = _is_real(value) and not (number.whole and isinstance(value, float) and value != 0)
    if not fits or not number.fits(value):
        raise ValueError(f"{name} is {shown(value)}, expected {number.expected}")


def plain_number(name: str, value: Any) -> Any:
    """A number of numpy's or a tensor of one as Python's; a float where transformers insists on one."""
    if name not in NUMBERS:
        return value
    if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:
        value = value.item()
    return float(value) if type(value) is int and _is_real(value) and not NUMBERS[name].whole else value


def _is_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def biases(value: Any) -> list[tuple[Any, Any]]:
    """The pairs of token ids and number in a ``sequence_bias`` of either form."""
    return [*value.items()] if isinstance(value, dict) else [tuple(pair) for pair in value]


def _is_bias(value: Any) -> bool:
    kind = {dict: tuple, list: list}.get(type(value))
    if kind is None or not value or not all(isinstance(entry, tuple | list) for entry in value):
        return False
    return all(
        len(pair) == 2
        and type(pair[0]) is kind
        and len(pair[0]) > 0
        and all(map(_is_id, pair[0]))
        and isinstance(pair[1], float)  # transformers takes no whole number for one
        and (-_LARGEST <= pair[1] <= _LARGEST or pair[1] == -math.inf)
        for pair in biases(value)
    )


def _is_real(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def among(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of these, in type as well: True is no 1."""
    return any(type(value) is type(one) and value == one for one in neutral)


def shown(value: Any, most: int = 60) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= most else f"a {type(value).__name__}"
