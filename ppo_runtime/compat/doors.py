"""Checks of the piecewise methods' arguments, under the names that the arguments have there."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_runtime.common import inputs
from ppo_runtime.learning.update import Targets
from ppo_runtime.models.inner import pretrained_model


def floating(like: str, **tensors: Any) -> None:
    """Refuse what is no floating-point tensor of the shape and on the device of the one named ``like``."""
    for name in (like, *(name for name in tensors if name != like)):
        x, first = tensors[name], tensors[like]
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a torch.Tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point dtype; convert with {name}.float()")
        if x.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(first.shape)} like {like}")
        _same_device(name, x, like, first)


def token_mask(name: str, mask: Any, like: str, x: Tensor) -> Tensor:
    """A mask [B, T] as booleans: True where it is not 0.

    Raises:
        TypeError, ValueError: no tensor of real numbers of the first two axes of ``x``, or NaN among them.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}, expected a torch.Tensor")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])} like {like}")
    _same_device(name, mask, like, x)
    if mask.is_complex() or (mask.is_floating_point() and bool(mask.isnan().any())):
        raise ValueError(f"{name} holds NaN or complex numbers, expected 1 where a token counts and 0 elsewhere")
    return mask.bool()


def kept_tokens(targets: Targets, logits: Any, vpreds: Any, logprobs: Any, mask: Any) -> Tensor:
    """The mask as booleans, after everything that goes with it has been looked at."""
    named = {"values": targets.old_values, "advantages": targets.advantages, "returns": targets.returns}
    floating("logprobs", logprobs=logprobs, old_logprobs=targets.old_logprobs, vpreds=vpreds, **named)
    if logits is not None and not (isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim):
        raise TypeError(
            f"logits is {logits.dtype if isinstance(logits, Tensor) else f'a {type(logits).__name__}'}, "
            "expected a floating-point tensor [B, T, V], or None"
        )
    if logits is not None and (logits.shape[:-1] != logprobs.shape or logits.device != logprobs.device):
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} on {logits.device}, expected {tuple(logprobs.shape)} and the "
            f"vocabulary on {logprobs.device}, like logprobs"
        )
    return token_mask("mask", mask, "logprobs", logprobs)


def score_numbers(scores: Any, *, count: int) -> Tensor:
    """One finite score per sequence, a tensor or a list of numbers, as float32 or wider [count]."""
    if isinstance(scores, Tensor):
        wide = torch.promote_types(scores.dtype, torch.float32)
        listed = inputs.score_vector(list(scores.reshape(-1)), count=count)
        return scores.reshape(count).to(wide) if wide.is_floating_point else listed
    if isinstance(scores, str | bytes | Mapping) or not isinstance(scores, Iterable):
        raise ValueError(f"scores is a {type(scores).__name__}, expected a tensor or a list of numbers")
    return inputs.score_vector(list(scores), count=count)


def batch(
    queries: Any, responses: Any, masks: Any, *, vocab_size: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Prompts, responses and response masks as ``step`` takes them."""
    queries = inputs.token_rows("queries", queries, vocab_size=vocab_size)
    responses = inputs.token_rows("responses", responses, vocab_size=vocab_size)
    inputs.same_count(len(queries), responses=responses)
    return queries, responses, inputs.mask_rows(masks, responses)


def language_model(model: Any) -> None:
    """Refuse a model that has no forward pass of a language model."""
    if not isinstance(model, nn.Module) or not hasattr(pretrained_model(model), "config"):
        raise TypeError(f"model is a {type(model).__name__}, expected the policy or a reference: a language model")


def padded_inputs(model_inputs: Any, *, count: int, vocab_size: int, encoder_decoder: bool) -> dict[str, Tensor]:
    """The entries of ``model_inputs`` that a pass reads, each [B, L] and of integers.

    Raises:
        TypeError, ValueError: one is missing or of another kind, shape or number of rows.
    """
    if not isinstance(model_inputs, Mapping):
        raise TypeError(
            f"model_inputs is a {type(model_inputs).__name__}, expected the dictionary that prepare_model_inputs makes"
        )
    pairs = [("input_ids", "attention_mask")]
    if encoder_decoder:
        pairs.append(("decoder_input_ids", "decoder_attention_mask"))
    for ids, real in pairs:
        for name in (ids, real):
            where, x = f"model_inputs[{name!r}]", model_inputs.get(name)
            if not isinstance(x, Tensor):
                kind = "missing" if x is None else f"a {type(x).__name__}"
                raise ValueError(f"{where} is {kind}, expected a tensor; make it with prepare_model_inputs")
            inputs.holds_numbers(where, x)
            if x.ndim != 2 or len(x) != count or x.shape != model_inputs[ids].shape:
                like = (count, model_inputs[ids].shape[-1] if model_inputs[ids].ndim else 0)
                raise ValueError(f"{where} has shape {tuple(x.shape)}, expected {like}: a row for each of queries")
        tokens = model_inputs[ids]
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"model_inputs[{ids!r}] has dtype {tokens.dtype}, expected token ids in torch.int64")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            raise ValueError(f"model_inputs[{ids!r}] holds ids outside [0, {vocab_size}); was it made for this model?")
    return {name: model_inputs[name] for pair in pairs for name in pair}


def entries(where: str, data: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a dictionary that lacks an entry."""
    if missing := [name for name in names if data.get(name) is None]:
        raise ValueError(f"{where} needs {', '.join(missing)}, which it was not given; see its docstring")


def counted(name: str, rows: Any, *, batch_size: Any) -> None:
    """Refuse what is no list of ``batch_size`` rows."""
    if not isinstance(rows, list | tuple | Tensor):
        raise ValueError(f"{name} is a {type(rows).__name__}, expected a list of token ids, one tensor per row")
    if batch_size != len(rows):
        raise ValueError(f"{name} has {len(rows)} rows, expected batch_size = {batch_size!r}")


def rows_each(count: int, **lists: Any) -> None:
    """Refuse lists that have not one sized entry for each of ``count`` sequences."""
    for name, rows in lists.items():
        if not _sized(rows) or len(rows) != count or not all(map(_sized, rows)):
            kind = f"{len(rows)} rows" if isinstance(rows, list | tuple) else f"a {type(rows).__name__}"
            raise ValueError(f"{name} is {kind}, expected a list of {count} rows of tokens")


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def _same_device(name: str, x: Tensor, like: str, first: Tensor) -> None:
    if x.device != first.device:
        raise ValueError(
            f"{name} is on {x.device}, expected {first.device} like {like}; move it with {name}.to({like}.device)"
        )
