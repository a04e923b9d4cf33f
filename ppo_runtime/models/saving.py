"""Saving a wrapped model: a directory that plain transformers or PEFT loads, with the head in a file of its own."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ppo_runtime.models.inner import is_peft_model
from ppo_runtime.models.value_head import HEAD_PREFIX, INNER_PREFIX, check_head, write_head

logger = logging.getLogger(__name__)


def save(wrapper: Any, save_directory: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """Write what `save_pretrained` of the wrapper writes; `kwargs` are its arguments without those of an upload."""
    if wrapper.reward_adapter is not None:  # it has a place of its own, and would go without its score head
        mine = [name for name in wrapper.pretrained_model.peft_config if name != wrapper.reward_adapter.name]
        kwargs.setdefault("selected_adapters", mine)
    head: Mapping[str, Tensor] = wrapper.v_head.state_dict()
    if os.path.isfile(save_directory):
        raise NotADirectoryError(f"{os.fspath(save_directory)!r} is a file, expected a directory to write to")
    writes = kwargs.get("is_main_process", True)
    if (state := kwargs.pop("state_dict", None)) is not None:
        given = {k.removeprefix(HEAD_PREFIX): v for k, v in state.items() if k.startswith(HEAD_PREFIX)}
        inner = {k.removeprefix(INNER_PREFIX): v for k, v in state.items() if not k.startswith(HEAD_PREFIX)}
        if writes:  # the others may well have been given nothing
            _check_weights(wrapper.pretrained_model, inner)
        if given and writes:
            check_head(given, wrapper.v_head, "state_dict")
        head = given or head
        kwargs["state_dict"] = inner
    with _no_bar():
        wrapper.pretrained_model.save_pretrained(save_directory, **kwargs)
    if writes:
        for place in (save_directory, *_adapter_places(wrapper.pretrained_model, save_directory)):
            write_head(dict(head), place)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' progress bar, which fails the save where nobody reads standard error any more."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    hub_has_none = are_progress_bars_disabled()
    _quietly(transformers_logging.disable_progress_bar)
    try:
        yield
    finally:
        _quietly(transformers_logging.enable_progress_bar)
        if hub_has_none:
            disable_progress_bars()


def _quietly(switch: Callable[[], None]) -> None:
    """Without the hub's warning where the environment decides about its bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        switch()


def _adapter_places(model: Any, directory: str | os.PathLike[str]) -> list[Path]:
    """Where peft has written the active adapters that are not called "default": a directory in this one for each.

    Their head belongs beside them: that is where they are loaded from.
    """
    active = model.active_adapters if is_peft_model(model) else []
    places = [Path(directory, name) for name in active if name != "default"]
    written = [place for place in places if (place / "adapter_config.json").is_file()]
    if written:
        # By its name alone: the directory may be a draft that is put in its place later.
        names = " and ".join(place.name for place in written)
        logger.info("the policy's adapter lies in the folder %s of what was saved: load it from there", names)
    return written


def _check_weights(model: Any, given: Mapping[str, Any]) -> None:
    """Refuse a state without weights of the model; an adapter's alone, whose names peft shortens, will do for it."""
    expected = model.state_dict()
    if not given or not (is_peft_model(model) or given.keys() & expected.keys()):
        raise ValueError(
            f"state_dict holds none of the {len(expected)} weights of {type(model).__name__}, "
            f"such as {next(iter(expected))!r}, but {', '.join(map(repr, list(given)[:3])) or 'none at all'}; pass "
            "one as state_dict() of this model gives it, or leave it out"
        )
