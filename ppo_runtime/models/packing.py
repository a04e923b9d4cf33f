"""Rows end to end in one, without padding, for the models that keep them apart by their positions.

transformers lets a token attend to its own row alone where position ids start again and no attention mask is given.
Not every architecture listens to that (states that run along the row do not), so each model is tried before it is
trusted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ppo_runtime.models.heads import hidden_states, mask_positions, takes_positions
from ppo_runtime.models.inner import transformers_model
from ppo_runtime.models.modes import dropout_off

logger = logging.getLogger(__name__)

# By model, and by its attention's implementation, which a user may set anew.
_found: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def packed_hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the LM head reads of the real tokens alone, [N, H] in row-major order of the mask.

    For a model of which :func:`keeps_rows_apart` is True.
    """
    real = attention_mask.nonzero(as_tuple=True)  # whose size the device has to tell, once
    return hidden_states(model, input_ids[real][None], None, mask_positions(attention_mask)[real][None])[0]


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether rows that lie end to end have the hidden states that they have alone; tried once per model."""
    inner = transformers_model(model)
    known = _found.setdefault(inner, {})
    implementation = str(getattr(inner.config, "_attn_implementation", None))
    if implementation not in known:
        known[implementation] = (
            not inner.config.is_encoder_decoder and takes_positions(inner.base_model) and _proved(model)
        )
        if not known[implementation]:
            logger.info("%s reads rows padded: it does not keep rows apart that lie end to end", type(inner).__name__)
    return known[implementation]


def most_tokens_end_to_end(model: nn.Module) -> float:
    """How many tokens one row may have whatever their positions: as many as the smallest square mask that is kept.

    Some models look up who may attend to whom in a table over the context, by the tokens' places in the row.
    """
    sides = [buffer.shape[-2:] for buffer in transformers_model(model).base_model.buffers() if buffer.ndim > 1]
    return min((width for height, width in sides if height == width > 1), default=math.inf)


def packing_pays(lengths: Sequence[int], width: int) -> bool:
    """Whether rows of these lengths cost less end to end than padded, in a trunk of this hidden size.

    A layer's linear maps cost about 24 width^2 per token and its attention 4 width per pair of tokens, masked or not;
    end to end, all pairs of all rows are pairs.
    """
    count, longest, tokens = len(lengths), max(lengths), sum(lengths)
    return tokens * (6 * width + tokens) < count * longest * (6 * width + longest)


@torch.no_grad()
def _proved(model: nn.Module) -> bool:
    """Whether a row's states are those of the row padded, and stay as they are whatever lies before it."""
    embeddings = transformers_model(model).get_input_embeddings().weight
    ids = torch.arange(15, device=embeddings.device).reshape(3, 5) % embeddings.shape[0]
    mask = (torch.arange(5, device=ids.device) < torch.tensor([[3], [1], [5]], device=ids.device)).long()
    others = ids.clone()
    others[0] = ids[1]
    try:
        with dropout_off(model):
            packed = packed_hidden_states(model, ids, mask)
            beside_others = packed_hidden_states(model, others, mask)
            padded = hidden_states(model, ids, mask, mask_positions(mask))[mask.bool()]
    except Exception as error:  # of the model's own code, to which rows end to end may be news
        logger.debug("rows end to end: %s: %s", type(error).__name__, error)
        return False
    scale = float(padded.abs().max())
    precise = max(1e-4, 4 * torch.finfo(padded.dtype).eps)
    apart = float((packed[3:] - beside_others[3:]).abs().max()) <= 0.1 * precise * scale
    return apart and float((packed - padded).abs().max()) <= 10 * precise * scale
