"""What ``train`` is given, checked before anything is generated, and what its score function returned."""

import inspect
import operator
import tempfile
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ppo_runtime.common.files import working_directory
from ppo_runtime.common.inputs import holds_numbers
from ppo_runtime.rollout.sampling import plain

# Settings of ``trainer.generate`` that the loop decides itself.
_TAKEN = {
    "query_tensor": "the prompts come from the dataset",
    "batch_size": "pass generation_batch_size to train",
    "return_prompt": "the loop needs responses alone",
    "generate_ref_response": "the loop scores the policy's responses",
}


def whole_number(name: str, value: Any, *, optional: bool) -> int | None:
    """An integer of at least 1, numpy's included; None only where that is allowed."""
    if value is None and optional:
        return None
    try:
        number = 0 if value is None or isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least 1{' or None' if optional else ''}")
    return number


def check_kinds(*, score_fn: Any, resume: Any, keep_best: Any, console: Any) -> None:
    """Refuse a score function that cannot be called with two lists, a resume that is a path, an odd console."""
    if not callable(score_fn):
        raise TypeError(
            f"score_fn is a {type(score_fn).__name__}, expected a function from prompts and responses to their scores"
        )
    try:
        signature = inspect.signature(score_fn)
    except (TypeError, ValueError):  # what is written in C need not have one
        signature = None
    if signature is not None:
        try:
            signature.bind([], [])
        except TypeError as error:
            raise TypeError(
                f"score_fn takes {signature}, expected two arguments, the prompts and the responses ({error})"
            ) from error
    if not isinstance(resume, bool):
        raise ValueError(
            f"resume is {resume!r}, expected True or False; the run to go on with is the one in output_dir"
        )
    if not isinstance(keep_best, bool):
        raise ValueError(f"keep_best is {keep_best!r:.60}, expected True or False; keep_last is a number")
    if console is not None and not isinstance(console, Console):
        raise TypeError(f"console is a {type(console).__name__}, expected a rich.console.Console or None")


def generation_settings(given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings over plain sampling and the loop's own; what the loop decides itself is refused."""
    if given is None:
        return plain(**defaults)
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"generation_kwargs is {given!r:.80}, expected a dictionary such as {{'max_new_tokens': 32}}")
    for name, why in _TAKEN.items():
        if name in given:
            raise ValueError(f"generation_kwargs has {name!r}, which train decides itself: {why}")
    if "max_new_tokens" in given:
        whole_number("generation_kwargs['max_new_tokens']", given["max_new_tokens"], optional=False)
    length_sampler = given.get("length_sampler")
    if length_sampler is not None and not callable(length_sampler):
        raise TypeError(
            f"generation_kwargs['length_sampler'] is a {type(length_sampler).__name__}, expected a function without "
            "arguments that returns a number of tokens"
        )
    # Both lengths at once would have the user's one ignored.
    length = given.get("max_length", getattr(given.get("generation_config"), "max_length", None)) is not None
    own = {name: value for name, value in defaults.items() if not (name == "max_new_tokens" and length)}
    return plain(given, **own)


def output_directory(output_dir: Any) -> Path | None:
    """The directory as an absolute path; refused if it is no name of one."""
    if output_dir is None:
        return None
    if not isinstance(output_dir, str | Path) or not str(output_dir).strip():
        raise ValueError(f"output_dir is {output_dir!r}, expected the path of a directory or None")
    try:
        str(output_dir).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output_dir is {str(output_dir)!r}, expected a name in UTF-8, as which alone weights can be written"
        ) from error
    return working_directory() / output_dir  # a score function may go elsewhere


def make_writable(name: str, directory: Path) -> None:
    """Make a directory and write a file there, once, rather than fail after hours."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} is {str(directory)!r}, expected a directory that can be written ({error}); choose another"
        ) from error


def score_list(values: Any, *, count: int) -> list[Tensor]:
    """What a score function returned, one 0-d tensor for each response.

    Numbers, truth values and tensors or arrays of one number each are taken, in any iterable that keeps its order.

    Raises:
        ValueError: it is something else, or there are more or fewer than responses.
    """
    expected = f"expected {count} numbers, one for each response"
    if isinstance(values, Tensor):
        holds_numbers("what score_fn returned", values)
        values = values.detach().cpu()
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | Set) or _is_scalar(values):
        forgotten = "; does it return its scores?" if values is None else ""
        raise ValueError(f"score_fn returned {_shown(values)}, {expected}{forgotten}")
    entries = list(values)
    if len(entries) != count:
        shape = getattr(values, "shape", None)
        found = f"{len(entries)} scores" + ("" if shape is None else f" in shape {tuple(shape)}")
        raise ValueError(f"score_fn returned {found}, {expected}")
    return [_score(index, entry) for index, entry in enumerate(entries)]


def _score(index: int, value: Any) -> Tensor:
    array = hasattr(value, "__array__") or isinstance(value, Tensor)
    size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", 1)
    if array and size != 1:
        raise ValueError(
            f"score_fn returned an entry {index} of shape {tuple(value.shape)}, expected one number for each response; "
            "choose a column, or sum"
        )
    if isinstance(value, Tensor):
        holds_numbers(f"entry {index} of what score_fn returned", value)
    number = value.item() if array else value
    if not isinstance(number, int | float) and not (hasattr(number, "__float__") and not isinstance(number, str)):
        raise ValueError(f"score_fn returned {_shown(number)} as entry {index}, expected a number")
    try:
        # In double precision: ``step`` names a score that single precision cannot hold as it was returned.
        return torch.tensor(float(number), dtype=torch.float64)
    except OverflowError as error:
        raise ValueError(
            f"score_fn returned a number of more than 308 digits as entry {index}, expected one that float32 can hold, "
            "up to 3.4e38; scale the scores"
        ) from error
    except Exception as error:  # a class of the user's own, or Decimal's signalling NaN
        raise ValueError(f"score_fn returned {_shown(number)} as entry {index}, expected a number: {error}") from error


def _is_scalar(values: Any) -> bool:
    return getattr(values, "ndim", 1) == 0


def _shown(value: Any) -> str:
    return "None" if value is None else f"{value!r:.60} ({type(value).__name__})"
