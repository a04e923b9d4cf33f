"""What a trainer is assembled from: checked models, special tokens, a reference, a controller and an optimiser."""

import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ppo_runtime.accel.backends import AccelChoice, AccelError, Requested, accelerate_frozen, choose, fall_back, tell
from ppo_runtime.accel.products import fast_products
from ppo_runtime.accel.products import obstacle as products_obstacle
from ppo_runtime.config import PPOConfig
from ppo_runtime.learning.controllers import AdaptiveKLController, FixedKLController
from ppo_runtime.learning.forward import Reference, evaluate, lay_out
from ppo_runtime.models.context import decoder_start
from ppo_runtime.models.heads import check_split, lm_head
from ppo_runtime.models.inner import has_encoder, transformers_model
from ppo_runtime.models.own_reference import check_stays, tell_of_a_difference
from ppo_runtime.models.precision import is_half, is_widened, trains_half, widen
from ppo_runtime.models.references import check_apart, create_reference_model, is_own_base, reference_context
from ppo_runtime.models.wrapper import PreTrainedModelWrapper
from ppo_runtime.rollout.values import token_ids

logger = logging.getLogger(__name__)


def check_kinds(config: Any, model: Any, tokenizer: Any) -> None:
    """Refuse what cannot be trained with, by name."""
    if not isinstance(config, PPOConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a PPOConfig")
    if not isinstance(model, PreTrainedModelWrapper):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a value-head model; "
            "make one with AutoModelForCausalLMWithValueHead.from_pretrained(...)"
        )
    if not hasattr(tokenizer, "pad_token_id"):
        what = "None" if tokenizer is None else f"a {type(tokenizer).__name__}"
        raise TypeError(f"tokenizer is {what}, expected the model's transformers tokenizer")
    if config.pad_for_acceleration and has_encoder(model) and not config.pad_max_input_len:
        raise ValueError(
            "pad_max_input_len is 0, expected the longest prompt: pad_for_acceleration pads an encoder-decoder's "
            "prompts to pad_max_input_len and its responses to pad_max_len"
        )


def check_callables(**functions: Any) -> None:
    """Refuse what cannot be called, by name."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} is {function!r}, expected a function; see the protocol that its argument names")


def check_takes_config(name: str, function: Any) -> None:
    """Refuse, by name, a function that cannot be told the settings."""
    try:
        inspect.signature(function).bind_partial(config=None)
    except ValueError:
        return  # what is not written in Python may not say what it takes
    except TypeError as error:
        raise TypeError(f"{name} is {function!r}, expected a function that takes config=: {error}") from error


def check_reference_kind(model: PreTrainedModelWrapper, ref_model: Any | None) -> None:
    """Refuse what gives no log-probabilities to compare with the policy's, by name."""
    if ref_model is None:
        return
    inner = transformers_model(ref_model)
    inner = getattr(inner, "_orig_mod", inner)  # inside torch.compile
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"ref_model is a {type(ref_model).__name__}, expected a value-head model or a transformers model like "
            f"model; load one with {type(model).__name__}.from_pretrained(...), or pass None for a copy of model"
        )
    if inner.get_output_embeddings() is None:
        raise ValueError(
            f"ref_model is a {type(inner).__name__}, which has no language-model head, expected one that gives logits; "
            f"load it with transformers.{model.transformers_parent_class.__name__}.from_pretrained"
        )
    if has_encoder(ref_model) != has_encoder(model):
        kinds = {True: "an encoder-decoder", False: "decoder-only"}
        raise ValueError(
            f"ref_model is {kinds[has_encoder(ref_model)]}, expected {kinds[has_encoder(model)]} like model: both read "
            "the same rows; load both from the same family"
        )


def check_vocabularies(model: Any, ref_model: Any) -> None:
    """Refuse a reference that knows other tokens than the policy."""
    mine, theirs = model.config.vocab_size, ref_model.config.vocab_size
    if mine != theirs:
        raise ValueError(
            f"ref_model has a vocabulary of {theirs}, expected {mine} like model: log-probabilities of the same "
            "token ids are compared; load both from the same family, and resize both before the trainer is made"
        )


def special_tokens(tokenizer: Any, model: Any) -> tuple[int, set[int]]:
    """Padding id and EOS ids; EOS pads where there is no padding token."""
    generation_config = getattr(model.pretrained_model, "generation_config", None)
    found = token_ids("eos_token_id", getattr(generation_config, "eos_token_id", None))
    eos_ids = set(found or token_ids("eos_token_id", tokenizer.eos_token_id))
    name, pad = "pad_token_id", tokenizer.pad_token_id
    if pad is None and not eos_ids:
        raise ValueError(
            "tokenizer has neither a padding nor an EOS token, expected at least one; "
            "set one, for example tokenizer.pad_token = tokenizer.unk_token"
        )
    vocabulary = model.config.vocab_size
    if pad is None:
        # An EOS beyond the vocabulary ends nothing, and is said by generate.
        name, pad = (
            "eos_token_id, which pads for want of a padding token,",
            min(eos_ids, key=lambda t: (not 0 <= t < vocabulary, t)),
        )
    if not 0 <= pad < vocabulary:
        raise ValueError(
            f"{name} is {pad}, expected a token id in [0, {vocabulary}): the model has no embedding for it; make "
            "room before the model is wrapped, with model.resize_token_embeddings(len(tokenizer)), or take a token "
            "that it knows, as in tokenizer.pad_token = tokenizer.eos_token"
        )
    return pad, eos_ids


def make_controller(config: PPOConfig) -> AdaptiveKLController | FixedKLController:
    """The controller that ``adap_kl_ctrl`` asks for."""
    if config.adap_kl_ctrl:
        return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    return FixedKLController(config.init_kl_coef)


def make_optimizer(model: torch.nn.Module, config: PPOConfig) -> torch.optim.Optimizer:
    """Adam over the parameters that train, in one kernel where the device has it: several times as fast on a CPU."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The kernel takes memory as it lies: that of a view may belong to others.
    fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_contiguous() for parameter in trainable)
    return torch.optim.Adam(trainable, lr=config.learning_rate, fused=fused)


def make_reference(
    model: PreTrainedModelWrapper,
    ref_model: Any | None,
    num_shared_layers: int | None,
    config: PPOConfig,
    *,
    divided: bool = False,
) -> tuple[Any, Reference, AccelChoice]:
    """The reference as the user sees it (None: the policy without its adapter), as a pass enters it, and what runs it.

    A PEFT policy's own base, without its adapter, is what None stands for.
    ``divided`` has nothing of it packed or compiled: each rank will hold a part of its weights, and none a copy.

    Raises:
        ValueError: ``ref_model`` has another vocabulary, or shares parameters that train with ``model``; or
            there is none and the policy without its adapter would move while it trains.
        SplitError: a pass can't be made of either one's trunk and head.
        AccelError: ``config.accel_strict``, and the backend asked for can't serve the reference.
    """
    if ref_model is not None and num_shared_layers is not None:
        warnings.warn(
            f"num_shared_layers is {num_shared_layers} and ref_model is given, which is taken as it is: layers are "
            "shared only with a reference that the trainer makes; leave one of the two out",
            UserWarning,
            stacklevel=_frames_of_ours(),
        )
    if ref_model is not None and is_own_base(model, ref_model):
        ref_model = None
    choice = choose(cast(Requested, config.accel), strict=config.accel_strict)
    if divided:
        choice = fall_back(choice, "every rank holds a part of the reference; parallelism='ddp' leaves it whole")
    _check_products(config)
    lm_head(model)  # what can be refused is, before anything is widened
    if ref_model is None and model.is_peft_model:
        check_stays(model)
        choice = fall_back(
            choice, "the reference is the policy itself without its adapter; a ref_model can be packed or compiled"
        )
        widen(model, None)
        check_split(model)
        tell_of_a_difference(model)
        tell(choice)

        @contextmanager
        def adapter_off() -> Iterator[Any]:
            with reference_context(model):
                yield model

        return None, adapter_off, choice
    if (trains_half(model) or is_widened(model)) and (ref_model is None or is_half(ref_model) or is_widened(ref_model)):
        choice = fall_back(
            choice,
            "policy and reference compute in bfloat16; load the policy with dtype=torch.float32 to have it packed or "
            "compiled",
        )
    if ref_model is None:
        ref_model = create_reference_model(model, num_shared_layers)
    check_vocabularies(model, ref_model)
    check_apart(model, ref_model)
    lm_head(ref_model)
    widen(model, ref_model)
    check_split(model)
    check_split(ref_model)
    ref_model.requires_grad_(False)
    ref_model.eval()
    inner = ref_model.pretrained_model if isinstance(ref_model, PreTrainedModelWrapper) else ref_model
    fast, choice = accelerate_frozen(inner, choice, _few_logprobs)

    @contextmanager
    def in_use() -> Iterator[Any]:
        # What is compiled has its own.
        with nullcontext() if choice.backend == "compile" else fast_products(fast, config.accel):
            yield fast

    return ref_model, in_use, choice


def _check_products(config: PPOConfig) -> None:
    """Say that products by oneDNN were asked for by name in vain; an AccelError if that is strict."""
    if config.accel != "onednn" or (why := products_obstacle("onednn")) is None:
        return
    if config.accel_strict:
        raise AccelError(f"acceleration 'onednn' is strict, but {why}; or set PPOConfig(accel_strict=False)")
    logger.warning("products of a step: eager torch: %s", why)


def _frames_of_ours() -> int:
    """Stack level of the nearest caller outside this package, for a warning by the function that asks."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        level, frame = level + 1, frame.f_back
    return level + 1


def _few_logprobs(model: Any) -> torch.Tensor:
    """Log-probabilities of three short rows, as a step computes them; no random number is drawn."""
    config = model.config
    ids = torch.arange(24).mul(7919).remainder(config.vocab_size)
    rows = lay_out(
        [ids[:4], ids[4:5], ids[5:8]],
        [ids[8:12], ids[12:15], ids[15:17]],
        None,
        pad_token_id=0,
        decoder_start_token_id=decoder_start(model) if config.is_encoder_decoder else None,
        device=next(model.parameters()).device,
    )
    return evaluate(model, rows).logprobs
