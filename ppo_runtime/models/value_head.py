"""The value head, and where it lives on disk.

We write the head to `value_head.safetensors` beside the model, so that the directory stays an ordinary
transformers (or PEFT) checkpoint. We also read the older habit of keeping `v_head.*` among the model's weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

HEAD_FILE = "value_head.safetensors"
HEAD_PREFIX = "v_head."
INNER_PREFIX = "pretrained_model."

# In transformers' own order of preference: the first that exists is what the model is loaded from.
_CHECKPOINTS = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME


class ValueHead(nn.Module):
    """One scalar per position, read from the hidden state that the language-model head reads.

    Computes in float32 (float64 where the head itself is), under autocast too: returns are regressed to a
    precision that bfloat16, with its 8 bits, cannot express.
    """

    def __init__(self, config: Any, *, summary_dropout_prob: float | None = None) -> None:
        """`summary_dropout_prob` defaults to the model configuration's field of that name, else to 0.1."""
        super().__init__()
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(config, "summary_dropout_prob", 0.1)
        if not (isinstance(summary_dropout_prob, int | float) and 0 <= summary_dropout_prob <= 1):
            raise ValueError(f"summary_dropout_prob is {summary_dropout_prob!r}, expected a number from 0 to 1")
        self.dropout = nn.Dropout(summary_dropout_prob) if summary_dropout_prob else nn.Identity()
        self.summary = nn.Linear(_width(config), 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] to values [..., 1]."""
        weight, bias = self.summary.weight, self.summary.bias
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            hidden = self.dropout(hidden.to(weight.device, dtype))
            return F.linear(hidden, weight.to(dtype), bias.to(dtype))


def _width(config: Any) -> int:
    """Width of the LM head's input; OPT-350m projects down to its word embeddings before the head."""
    for part in (config, getattr(config, "decoder", None), getattr(config, "text_config", None)):
        for field in ("word_embed_proj_dim", "hidden_size"):
            if isinstance(width := getattr(part, field, None), int):
                return width
    raise ValueError(
        f"{type(config).__name__} names no hidden_size, so the value head's width is unknown; "
        "set config.hidden_size to the width of the hidden states the LM head reads"
    )


class StoredHead(NamedTuple):
    """What of ours was found on disk: a value head, and weights of the model that transformers would not recognise."""

    head: dict[str, Tensor]
    """Empty where there are such weights without a head."""
    file: str
    """The file that names the tensors."""
    inner: dict[str, Tensor] | None = None
    """The model's weights where only we can read their names."""


def write_head(head: dict[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Write the head's tensors (keys as in `ValueHead.state_dict`) beside a saved model."""
    tensors = {HEAD_PREFIX + key: value.detach().cpu().contiguous() for key, value in head.items()}
    save_file(tensors, Path(directory) / HEAD_FILE, metadata={"format": "pt"})


def read_head(name: str | os.PathLike[str], **hub: Any) -> StoredHead | None:
    """The value head stored in a directory or hub repository, and weights in our older layout; None if neither."""
    if (file := find_file(name, HEAD_FILE, **hub)) is not None:
        return StoredHead(_strip(_read(file), HEAD_PREFIX), file)
    found = ((checkpoint, find_file(name, checkpoint, **hub)) for checkpoint in _CHECKPOINTS)
    file = next((file for _, file in found if file is not None), None)
    if file is None:
        return None
    if not file.endswith(".json"):
        keys, shards = _keys(file), [file]
    else:
        with _named(file):
            weight_map: dict[str, str] = json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"]
        keys, shards = set(weight_map), []
        wrapped = any(key.startswith(INNER_PREFIX) for key in keys)
        names = {shard for key, shard in weight_map.items() if wrapped or key.startswith(HEAD_PREFIX)}
        for shard_name in sorted(names):
            if (shard := find_file(name, shard_name, **hub)) is None:
                raise FileNotFoundError(
                    f"{file} names {shard_name}, which {os.fspath(name)!r} does not hold: the checkpoint is not whole; "
                    "copy it anew"
                )
            shards.append(shard)
    if not any(key.startswith((HEAD_PREFIX, INNER_PREFIX)) for key in keys):
        return None
    weights = {key: value for shard in shards for key, value in _read(shard).items()}
    # Plain names are transformers' business; prefixed ones it would not recognise, and initialise at random.
    inner = _strip(weights, INNER_PREFIX) or None
    return StoredHead(_strip(weights, HEAD_PREFIX), file, inner)


def check_head(given: Mapping[str, Any], head: ValueHead, where: str) -> None:
    """Refuse tensors (keys as in `ValueHead.state_dict`) that are not, name by name, those of a head.

    Raises:
        ValueError: tensors are missing, too many, of another shape, or hold no floating-point numbers.
    """
    expected = head.state_dict()
    problems = [f"{HEAD_PREFIX}{name} is missing" for name in expected if name not in given]
    problems += [f"{HEAD_PREFIX}{name} is unknown" for name in given if name not in expected]
    for name, tensor in expected.items():
        value = given.get(name, tensor)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{HEAD_PREFIX}{name} is a {kind}, not a tensor of floating-point numbers")
        elif value.shape != tensor.shape:
            problems.append(f"{HEAD_PREFIX}{name} has the shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
    if problems:
        names = " and ".join(HEAD_PREFIX + name for name in expected)
        raise ValueError(
            f"{where} holds no value head of this model, expected {names} for hidden states of width "
            f"{head.summary.in_features}: {', '.join(problems)}"
        )


def find_file(name: str | os.PathLike[str], filename: str, **hub: Any) -> str | None:
    """Path of a file in a directory or hub repository (downloaded), or None if it is not there.

    Offline, or with `local_files_only`, the cache decides.

    Raises:
        OSError: nobody can tell whether it is there: no connection, no permission, no such repository, or a name
            that is neither a directory nor one that a repository could have.
    """
    try:
        return cached_file(name, filename, **hub)
    except OSError as error:
        if isinstance(error.__cause__, HFValidationError):
            raise OSError(no_such_place(name)) from error
        if _is_absence(error.__cause__, name, filename, hub):
            return None
        raise OSError(
            f"could not find out whether {os.fspath(name)!r} holds {filename}: {error}\nIf that should be a directory, "
            "there is none here: check the path. Else try again; or, where it has been loaded before, pass "
            "local_files_only=True to take what is in the cache"
        ) from error


def no_such_place(name: str | os.PathLike[str]) -> str:
    """What to say of a name that is no directory, and can't be or isn't a repository's."""
    what = "is a file" if os.path.isfile(name) else "is no directory here"
    return (
        f"{os.fspath(name)!r} {what}, and no name of a repository on the hub, expected one of the two; check the "
        f"path (the working directory is {os.getcwd()})"
    )


def _is_absence(cause: BaseException | None, name: str | os.PathLike[str], filename: str, hub: dict[str, Any]) -> bool:
    """Whether transformers' error, by its cause, says that there is no such file, and not that nobody could look."""
    if not isinstance(cause, LocalEntryNotFoundError):
        return cause is None or isinstance(cause, EntryNotFoundError)
    if hub.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return True
    subfolder = hub.get("subfolder") or ""
    where = {key: hub[key] for key in ("cache_dir", "revision") if hub.get(key) is not None}
    known = try_to_load_from_cache(os.fspath(name), f"{subfolder}/{filename}" if subfolder else filename, **where)
    return known is _CACHED_NO_EXIST


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Says which file it was that could not be read; the readers of the formats do not."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a torn file fails in as many ways as there are formats
        pointer = False
        with suppress(OSError), open(file, "rb") as opened:
            pointer = opened.read(8) == b"version "
        remedy = "it is a pointer of Git LFS: fetch the file itself with `git lfs pull`" if pointer else "copy it anew"
        raise ValueError(f"{file} can't be read ({type(error).__name__}: {error}); {remedy}") from error


def _keys(file: str) -> set[str]:
    if not file.endswith(".safetensors"):
        return set(_read(file))
    with _named(file), safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def _read(file: str) -> dict[str, Tensor]:
    with _named(file):
        if not file.endswith(".safetensors"):
            # Mapped into memory where the format allows, since mostly it is only the names we want.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict


def _strip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
