"""The trunk and the LM head of a model, apart, so that logits are computed at chosen positions only.

A batch of logits [B, L, V] is by far the largest tensor of a PPO step, and most of it is prompt and padding:

    hidden = hidden_states(model, input_ids, attention_mask, position_ids)   # [B, L, H]
    logits = logits_at(lm_head(model), hidden[mask])                        # [N, V]

Every function takes a value-head wrapper, a transformers model or a PEFT model. The trunk is called directly,
past the `forward` of whatever wraps it: under DistributedDataParallel, enter through a module of your own.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_runtime.models.inner import is_compiled, is_peft_model, pretrained_model, transformers_model
from ppo_runtime.models.modes import dropout_off
from ppo_runtime.models.precision import computing, is_widened

# Their logits are scaled by d_model^-0.5 when the embeddings are tied, where no field says so outright.
_T5_KIN = ("t5", "longt5", "umt5", "switch_transformers")


_UNSUPPORTED = (
    "this architecture is not supported: choose one of the README's, or report its name and configuration to the "
    "project's issue tracker"
)


class SplitError(ValueError):
    """The model's logits are not its LM head applied to its trunk, which is all that is trained here."""


class LMHead(NamedTuple):
    """logits = softcap * tanh(z / softcap), z = scale * (hidden @ weight.T + bias); no cap if softcap is None.

    The tensors are the model's parameters themselves, so gradients reach them.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


def hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """What the LM head of a decoder-only model reads, [B, L, H].

    `position_ids` count real tokens from 0 (`mask_positions` makes them), so that padding on either side leaves
    the result unchanged. Architectures without absolute or rotary positions do not take them. Without a mask, rows
    may lie end to end: see `packing`.
    """
    inner = _splittable(model)
    if inner.config.is_encoder_decoder:
        raise ValueError(f"{type(inner).__name__} is an encoder-decoder; use seq2seq_hidden_states")
    trunk = inner.base_model
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None and takes_positions(trunk):
        inputs["position_ids"] = position_ids
    with computing(inner):
        return trunk(**inputs, **_named(trunk)).last_hidden_state


def seq2seq_hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
) -> Tensor:
    """What the LM head of an encoder-decoder reads, [B, L, H] with L the decoder's length.

    `decoder_input_ids` are the labels shifted right, behind the decoder's start token. Pad them on the right:
    then causality alone keeps padding away from real tokens.
    """
    inner = _splittable(model)
    if not inner.config.is_encoder_decoder:
        raise ValueError(f"{type(inner).__name__} is decoder-only; use hidden_states")
    with computing(inner):
        encoder, decoder = inner.get_encoder(), inner.get_decoder()
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask, **_named(encoder)).last_hidden_state
        return decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            **_named(decoder),
        ).last_hidden_state


def _named(module: nn.Module) -> dict[str, bool]:
    """What makes its outputs go by names, where its configuration asks for a tuple."""
    return {} if getattr(module.config, "return_dict", True) else {"return_dict": True}


def takes_positions(module: nn.Module) -> bool:
    """Whether a forward pass, a trunk's or a whole model's, is told where its tokens stand."""
    return "position_ids" in inspect.signature(module.forward).parameters


def mask_positions(attention_mask: Tensor) -> Tensor:
    """Position ids [B, L] that count a mask's real tokens from 0; padding before the first one gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def lm_head(model: nn.Module) -> LMHead:
    """The LM head's parameters and constants. Take it anew for every pass: PEFT may switch heads."""
    inner = _splittable(model)
    head = inner.get_output_embeddings()
    # peft trains a copy of a module named in modules_to_save, and passes calls to whichever one is active.
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        use_original = head.disable_adapters or not head.active_adapters
        head = head.original_module if use_original else copies[head.active_adapters[0]]
    # Not isinstance: LoRA and quantised layers compute more than weight and bias show.
    if type(head) is not nn.Linear:
        raise SplitError(
            f"the LM head of {type(inner).__name__} is a {type(head).__module__}.{type(head).__name__}, "
            f"expected a plain torch.nn.Linear; {_head_remedy(head)}"
        )
    return LMHead(head.weight, _bias(head, inner), _softcap(inner.config), _scale(inner.config))


def logits_at(head: LMHead, hidden: Tensor) -> Tensor:
    """Logits [..., V] of hidden states [..., H], the model's own to rounding, in float32 at least."""
    logits = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    return logits


def probe_logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits [2, 5, V] of two short made-up rows, by trunk and head, and where their tokens are real [2, 5].

    In whichever mode the model is; one row begins with padding.
    """
    inner = _splittable(model)
    ids, mask = probe_rows(inner)
    if inner.config.is_encoder_decoder:
        hidden, real = seq2seq_hidden_states(model, ids, mask, ids), torch.ones_like(mask).bool()
    else:
        hidden, real = hidden_states(model, ids, mask, mask_positions(mask)), mask.bool()
    return logits_at(lm_head(model), hidden), real


def check_split(model: nn.Module) -> None:
    """Prove on a few tokens that trunk and head reproduce the model's logits; SplitError says why not.

    The tolerance is 1e-4 times the largest logit (at least 1), wider for half precision. Costs one tiny forward
    pass of each kind, so once per run is enough, and it keeps us honest about architectures nobody here tried.
    """
    outer = pretrained_model(model)
    if is_compiled(outer):
        raise SplitError(
            "the model inside is wrapped by torch.compile, which trunk and head pass by; pass it as it was before "
            "torch.compile"
        )
    inner = _splittable(model)
    ids, mask = probe_rows(inner)
    with torch.no_grad(), dropout_off(model):
        logits, real = probe_logits(model)
        with computing(model):
            if inner.config.is_encoder_decoder:
                expected = outer(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits
            else:
                positions = {"position_ids": mask_positions(mask)} if takes_positions(inner) else {}
                expected = outer(input_ids=ids, attention_mask=mask, **positions).logits
    name = type(inner).__name__
    if logits.shape != expected.shape:
        raise SplitError(
            f"logits of {name} have shape {tuple(expected.shape)}, its trunk and head give {tuple(logits.shape)}; "
            f"{_UNSUPPORTED}"
        )
    if not expected[real].isfinite().all():
        raise SplitError(
            f"logits of {name} are not finite on a few of its own tokens: its weights hold NaN or infinity, or are too "
            f"large for {inner.dtype}; load it with dtype=torch.float32, and look at its weights"
        )
    precision = torch.bfloat16 if is_widened(model) else expected.dtype
    allowed = max(1e-4, 4 * torch.finfo(precision).eps) * max(1.0, expected[real].abs().max().item())
    error = (logits - expected)[real].abs().max().item()
    if not error <= allowed:  # NaN included
        raise SplitError(
            f"logits of {name} differ by {error:.3g} from its trunk and head, expected at most {allowed:.3g}: "
            f"something comes between them that is not known here; {_UNSUPPORTED}"
        )


def reads_padding(model: nn.Module) -> bool:
    """Whether a decoder-only model's logits depend on what stands in the padding before a row, as RWKV's do."""
    inner = _splittable(model)
    ids, mask = probe_rows(inner)
    bare = ids[1:, 2:]
    with torch.no_grad(), dropout_off(model):
        hidden = hidden_states(model, ids, mask, mask_positions(mask))[1:, 2:]
        alone = hidden_states(model, bare, torch.ones_like(bare), mask_positions(torch.ones_like(bare)))
    # Rounding differs with the width; what padding does to a state is no matter of rounding.
    return not (hidden - alone).abs().max().item() <= 0.05 * alone.abs().max().item()


def probe_rows(inner: Any) -> tuple[Tensor, Tensor]:
    """Token ids and mask [2, 5], the second row with two tokens of padding in front."""
    embeddings = inner.get_input_embeddings().weight
    ids = torch.arange(10, device=embeddings.device).reshape(2, 5) % embeddings.shape[0]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def _splittable(model: nn.Module) -> Any:
    outer = pretrained_model(model)
    # Virtual tokens enter in PeftModel.forward, which the trunk does not pass through.
    if is_peft_model(outer) and outer.active_peft_config.is_prompt_learning:
        kind = outer.active_peft_config.peft_type
        raise SplitError(
            f"the adapter's peft_type is {getattr(kind, 'value', kind)}, which acts outside the trunk of the model, "
            "expected one inside it; use LoRA, peft.LoraConfig(...), or another that changes layers"
        )
    inner = transformers_model(model)
    if not inner.config.is_encoder_decoder and inner.base_model is inner:
        raise SplitError(f"{type(inner).__name__} keeps no trunk apart from its head; {_UNSUPPORTED}")
    return inner


def _bias(head: nn.Linear, inner: Any) -> Tensor | None:
    """The head's own bias and the buffer [1, V] that BART's kin add to their logits, as [V]."""
    buffer = getattr(inner, "final_logits_bias", None)
    if buffer is None:
        return head.bias
    return buffer.reshape(-1) if head.bias is None else head.bias + buffer.reshape(-1)


def _head_remedy(head: nn.Module) -> str:
    if type(head).__module__.startswith("peft."):
        return (
            "leave the LM head out of the adapter: not in target_modules, and, where it is tied to the embeddings, no "
            "trainable_token_indices; modules_to_save trains a whole copy of it where it is not tied"
        )
    return f"load the model with its head as it is, not quantised; else {_UNSUPPORTED}"


def _softcap(config: Any) -> float | None:
    named = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    return next((cap for cap in named if cap is not None), None)


def _scale(config: Any) -> float:
    """The constant factor between the linear map and the logits; `check_split` catches what is not listed."""
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        return float(scale)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        return 1.0 / float(divisor)
    scaled = getattr(config, "scale_decoder_outputs", None)
    if scaled is None:
        scaled = config.model_type in _T5_KIN and config.tie_word_embeddings
    return config.d_model**-0.5 if scaled else 1.0
