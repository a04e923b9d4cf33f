"""The settings of one call of ``generate``: which are in force, and which cannot be."""

import copy
import difflib
import inspect
import math
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from ppo_runtime.models.inner import has_encoder, transformers_model
from ppo_runtime.rollout.values import (
    FLAGS,
    KINDS,
    NUMBERS,
    REFUSED,
    REFUSED_WITH_ENCODER,
    among,
    biases,
    check_number,
    plain_number,
    shown,
    token_ids,
)

# Arguments of transformers' generate that reach it by its **kwargs.
_OTHER_ARGUMENTS = ("tokenizer", "trust_remote_code")
# Where None would reach arithmetic of transformers: what it stands for, or that it is left out.
_NONE_IS: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1}
_LEFT_OUT = ("max_length",)
# Two ways to say one thing, of which transformers heeds the second wherever that is set.
_SAME_THING = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}


class Settings:
    """The caller's keywords, over the generation config that was passed, over the model's own, as in transformers.

    A keyword that is None puts the setting off, whatever the others say.
    """

    def __init__(self, model: Any, generation_kwargs: dict[str, Any]) -> None:
        self.keywords = {
            name: _NONE_IS.get(name) if value is None else plain_number(name, value)
            for name, value in generation_kwargs.items()
            if name != "generation_config" and not (value is None and name in _LEFT_OUT)
        }
        processor = self.keywords.get("logits_processor")
        if callable(processor) and not isinstance(processor, list):
            self.keywords["logits_processor"] = [processor]
        self.passed: GenerationConfig | None = generation_kwargs.get("generation_config")
        self.own = getattr(transformers_model(model), "generation_config", None)
        self._refused = refused(model)
        for name, stronger in _SAME_THING.items():
            # The model's own must not win over what the caller said in the other way.
            if self.asked(name) is not None and self.asked(stronger) is None:
                self.keywords[stronger] = None

    def __getitem__(self, name: str) -> Any:
        """The value in force; None where everyone leaves it to transformers' defaults."""
        if name in self.keywords:
            return self.keywords[name]
        given = getattr(self.passed, name, None)
        return getattr(self.own, name, None) if given is None else given

    def count_responses(self, prompt: int) -> None:
        """Have lengths that count the prompt count the response alone, behind a prompt of so many tokens.

        Behind the longest of its batch, as transformers has it, a row's length would hang on what it shares that with.
        """
        for name, stronger in _SAME_THING.items():
            if self[stronger] is None and self[name] is not None:
                self.keywords[stronger] = max(self[name] - prompt, 0)
                self.keywords.pop(name, None)

    def asked(self, name: str) -> Any:
        """The caller's value, by keyword or in the config that was passed; None if there is none."""
        return self.keywords.get(name, getattr(self.passed, name, None))

    def overruled(self) -> dict[str, Any]:
        """Neutral values in place of what the model's own config asks for and the trainer does not do."""
        return {
            name: neutral[0] if neutral else None
            for name, (neutral, _) in self._refused.items()
            if getattr(self.own, name, None) is not None and not among(getattr(self.own, name), neutral)
        }

    def generate(self, model: Any, **ours: Any) -> Any:
        """The model's ``generate`` with the caller's arguments, and ours in place of any of the same name."""
        settings = fields()
        # What is refused is neutral by now; a release that does not know such a setting takes it for a model's input.
        keywords = {
            name: value
            for name, value in (self.keywords | ours).items()
            if name not in REFUSED or name in settings or hasattr(self.own, name)
        }
        if self.passed is None and not self.overruled():
            return model.generate(**keywords)
        # Keywords beside a generation config are on their way out of transformers, what is None in a config is filled
        # from the model's own, and that one is validated before any keyword replaces what does not go together in it:
        # so one config holds them all, and the model's own is put away meanwhile.
        config = copy.deepcopy(self.own or GenerationConfig())
        passed = {} if self.passed is None else vars(self.passed)
        given = {name: value for name, value in passed.items() if value is not None and name[0] != "_"}
        given |= {name: keywords.pop(name) for name in settings & keywords.keys()}
        for name, stronger in _SAME_THING.items():
            if given.get(stronger) is not None:  # of both, transformers would warn with every batch
                given[name] = getattr(GenerationConfig(), name)
        for name, value in given.items():
            setattr(config, name, value)
        inner = transformers_model(model)
        try:
            inner.generation_config = GenerationConfig()
            return model.generate(**keywords, generation_config=config)
        finally:
            inner.generation_config = self.own


def fields() -> set[str]:
    """The names of the settings that the installed transformers knows."""
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def refused(model: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Settings that may only be left out or neutral with this model: what is neutral, and why."""
    return REFUSED | (REFUSED_WITH_ENCODER if has_encoder(model) else {})


def check_settings(settings: Settings, model: Any) -> None:
    """Refuse, by name, what the caller asked for and cannot have; the model's own settings are never refused.

    Raises:
        ValueError: an unknown setting, one that generation cannot work with, or a value that makes no sense.
    """
    if settings.passed is not None and not isinstance(settings.passed, GenerationConfig):
        raise ValueError(
            f"generation_config is a {type(settings.passed).__name__}, expected a transformers GenerationConfig; "
            "a dictionary's entries are passed as keywords: generate(..., **settings)"
        )
    _known(settings, model)
    for name, (neutral, reason) in refused(model).items():
        value = settings.asked(name)
        if value is not None and not among(value, neutral):
            raise ValueError(f"{name} is {shown(value)}, expected to be left out; {reason}")
    for name, number in NUMBERS.items():
        check_number(name, settings.asked(name), number)
    for name in FLAGS:
        if not isinstance(value := settings.asked(name), bool | None):
            raise ValueError(f"{name} is {shown(value)}, expected True or False")
    for name, (fits, expected) in KINDS.items():
        if (value := settings.asked(name)) is not None and not fits(value):
            raise ValueError(f"{name} is {shown(value)}, expected {expected}")
    _leaves_tokens(settings, transformers_model(model).config.vocab_size)
    if settings.asked("synced_gpus") and not torch.distributed.is_initialized():
        raise ValueError("synced_gpus is True, expected to be left out: there is no group of processes to wait for")


def _leaves_tokens(settings: Settings, vocab_size: int) -> None:
    """What is forced exists, and what is suppressed leaves something to choose; the model's own settings likewise."""
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = settings[name]
        if value is not None and not all(0 <= token < vocab_size for token in token_ids(name, value)):
            raise ValueError(f"{name} is {shown(value)}, expected a token id in [0, {vocab_size}), or None")
    sequences = {
        "sequence_bias": [ids for ids, _ in biases(settings["sequence_bias"] or [])],
        "bad_words_ids": settings["bad_words_ids"] or [],
    }
    for name, several in sequences.items():
        if beyond := [token for ids in several for token in ids if token >= vocab_size]:
            raise ValueError(f"{name} holds token id {beyond[0]}, expected ids in [0, {vocab_size})")
    forbidden = [ids[0] for ids, bias in biases(settings["sequence_bias"] or []) if len(ids) == 1 and bias == -math.inf]
    suppressed = {name: settings[name] for name in ("suppress_tokens", "begin_suppress_tokens")}
    for name, tokens in (suppressed | {"sequence_bias": forbidden}).items():
        if tokens is not None and set(range(vocab_size)) <= set(token_ids(name, tokens)):
            raise ValueError(
                f"{name} takes away all {vocab_size} tokens of the vocabulary, expected to leave one that can be chosen"
            )


def _known(settings: Settings, model: Any) -> None:
    arguments = set(inspect.signature(vars(GenerationMixin)["generate"]).parameters)
    arguments |= set(inspect.signature(transformers_model(model).generate).parameters)
    known = (fields() | arguments | {*_OTHER_ARGUMENTS, *REFUSED}) - {"self", "inputs", "kwargs"}
    model_inputs = set(inspect.signature(transformers_model(model).forward).parameters) | {"inputs", "input_ids"}
    for name, value in settings.keywords.items():
        if name in known:
            continue
        if name in model_inputs or name.startswith(("decoder_", "encoder_")):
            if value is None:
                continue
            raise ValueError(
                f"{name} is given, expected to be left out: the trainer makes the model's inputs from query_tensor, "
                "and the step reads no others"
            )
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"{name}={shown(value)} is no setting of transformers' generate"
            + (f"; did you mean {close[0]}?" if close else ", expected one of GenerationConfig's")
        )
