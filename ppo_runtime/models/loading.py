"""Loading the transformers model that a wrapper wraps: names, dtypes, quantisation, PEFT adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

from ppo_runtime.models.inner import import_peft
from ppo_runtime.models.value_head import StoredHead, find_file, no_such_place, read_head

_HUB_ARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# A revision or subfolder of an adapter says nothing about its base model's.
_ADAPTERS_OWN = ("revision", "subfolder")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where files come from."""
    return {name: kwargs[name] for name in _HUB_ARGS if name in kwargs}


def unmet(kwargs: dict[str, Any]) -> list[str]:
    """Names of the loading arguments that ask for something: None does not, nor does quantisation switched off."""
    return [k for k, v in kwargs.items() if v is not None and not (k in ("load_in_8bit", "load_in_4bit") and not v)]


def load_stored(
    name: str | os.PathLike[str],
    parent: Any,
    check_config: Callable[[Any, str], None],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_trainable: bool,
) -> tuple[Any, StoredHead | None]:
    """The model of a directory or repository, by transformers' class for its kind, and what is stored of ours with it.

    An adapter comes on the base model that it names, whose head will do where it has none of its own.
    """
    load = partial(load_model, parent, check_config)
    stored = read_head(name, **hub_arguments(kwargs))
    if not is_adapter(name, kwargs):
        return load(name, args, kwargs, stored.inner if stored is not None else None), stored
    model, below = load_adapter(load, name, args, kwargs, is_trainable)
    return model, stored if stored is not None and stored.head else below


def load_model(
    parent: Any,
    check_config: Callable[[Any, str], None],
    name: str | os.PathLike[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
) -> Any:
    """`parent.from_pretrained`, the configuration checked first, with `weights` in place of those on disk."""
    hub = hub_arguments(kwargs)
    config = kwargs.get("config")
    remote = {key: kwargs[key] for key in ("trust_remote_code", "code_revision") if key in kwargs}
    if config is None:
        config = _config(name, **hub, **remote)
    elif isinstance(config, str | os.PathLike):  # a place of its own; transformers' automatic classes would ignore it
        config = _config(config, **remote)
        kwargs = kwargs | {"config": config}
    check_config(config, repr(os.fspath(name)))
    kwargs = _with_dtype(_with_quantization(kwargs), config)
    if weights is None:
        return parent.from_pretrained(name, *args, **kwargs)
    # Weights need the concrete class, and building one without storage is the public way to learn it. (Renaming
    # with `key_mapping` would be shorter, but transformers applies that backwards when it saves.)
    with torch.device("meta"):
        model_class = type(parent.from_config(config))
    rest = {key: value for key, value in kwargs.items() if key not in (*hub, "config")}
    if kwargs.get("config") is None:  # as transformers does: what is no loading argument is a field of the config
        own = {key: rest.pop(key) for key in ("dtype", "quantization_config") if key in rest}
        found: Any = AutoConfig.from_pretrained(name, **hub, **rest, return_unused_kwargs=True)
        config, rest = found[0], found[1] | own
    model = model_class.from_pretrained(None, *args, config=config, state_dict=weights, **rest)
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    if find_file(name, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(name, **hub)
    return model


def _config(name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The configuration stored in a directory or hub repository; an error names both where it is neither."""
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")) and adapters_inside(name):
            raise ValueError(
                f"{os.fspath(name)!r} holds no model, but PEFT adapters in {' and '.join(adapters_inside(name))}; load "
                "one of these"
            ) from error
        if not isinstance(error, OSError):
            raise
        if os.path.isdir(name):
            raise
        if isinstance(error.__cause__, HFValidationError):
            raise OSError(no_such_place(name)) from error
        raise OSError(
            f"there is no directory {os.fspath(name)!r} here, and no repository of that name could be loaded from the "
            f"hub; check the path (the working directory is {os.getcwd()}): {error}"
        ) from error


def adapters_inside(name: str | os.PathLike[str]) -> list[str]:
    """The directories in a directory that hold a PEFT adapter: those which are not called "default" are saved so."""
    return sorted(str(file.parent) for file in Path(name).glob("*/adapter_config.json"))


def _with_quantization(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Loading arguments with `load_in_8bit` and `load_in_4bit`, which transformers 5 dropped, as a configuration."""
    kwargs = dict(kwargs)
    asked = {name: kwargs.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in kwargs}
    chosen = [name for name, value in asked.items() if value]
    if not chosen:
        return kwargs
    if len(chosen) > 1 or kwargs.get("quantization_config") is not None:
        others = ["quantization_config"] if kwargs.get("quantization_config") is not None else []
        raise ValueError(f"got {' and '.join([*chosen, *others])}, expected one way of quantising; pass one of them")
    options: dict[str, Any] = {chosen[0]: True}
    try:
        kwargs["quantization_config"] = BitsAndBytesConfig(**options)
    except PackageNotFoundError as error:
        raise ImportError(f"{chosen[0]} needs the bitsandbytes package: pip install bitsandbytes") from error
    return kwargs


def _with_dtype(kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """Loading arguments with a `dtype`: the caller's by its newer name, else float32 unless weights are quantised."""
    # None asks for nothing; transformers takes it for "as stored".
    kwargs = {
        name: value for name, value in kwargs.items() if value is not None or name not in ("dtype", "torch_dtype")
    }
    kwargs |= {name: _dtype(name, kwargs[name]) for name in ("dtype", "torch_dtype") if name in kwargs}
    if "torch_dtype" in kwargs:
        older = kwargs.pop("torch_dtype")
        newer = kwargs.setdefault("dtype", older)
        if newer != older:
            raise ValueError(f"dtype is {newer!r} and torch_dtype, its older name, is {older!r}; pass one")
    # transformers would take the dtype that the weights are stored in, and train in it.
    if kwargs.get("quantization_config") is None and getattr(config, "quantization_config", None) is None:
        kwargs.setdefault("dtype", torch.float32)
    return kwargs


def _dtype(name: str, given: Any) -> Any:
    """The dtype that a string such as "bfloat16" or "torch.bfloat16" names; "auto" and dictionaries as they are."""
    if isinstance(given, dict) or given == "auto":
        return given
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"{name} is {given!r}, expected a floating-point dtype such as torch.bfloat16, its name, or 'auto'"
        )
    return found


def is_adapter(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> bool:
    """Whether a directory or repository holds a PEFT adapter."""
    return find_file(name, "adapter_config.json", **hub_arguments(kwargs)) is not None


def load_adapter(
    load: Callable[[str, tuple[Any, ...], dict[str, Any], dict[str, Tensor] | None], Any],
    name: str | os.PathLike[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_trainable: bool,
) -> tuple[Any, StoredHead | None]:
    """A PeftModel, the adapter on the base model it names, which `load` loads; and what is stored with that base."""
    peft, name, hub = import_peft(), os.fspath(name), hub_arguments(kwargs)
    base_name = peft.PeftConfig.from_pretrained(name, **hub).base_model_name_or_path
    if not base_name:
        raise ValueError(
            f"{name!r} holds a PEFT adapter whose adapter_config.json names no base model; write the base model's "
            "name or directory into base_model_name_or_path there"
        )
    rest = {key: value for key, value in kwargs.items() if key not in _ADAPTERS_OWN}
    try:
        stored = read_head(base_name, **hub_arguments(rest))
        base = load(base_name, args, rest, stored.inner if stored is not None else None)
    except OSError as error:
        raise OSError(
            f"{name!r} holds a PEFT adapter whose base model, {base_name!r} by its adapter_config.json, can't be "
            f"loaded; write where that lies now into base_model_name_or_path there: {error}"
        ) from error
    return _same_mode(peft.PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **hub)), stored


def add_adapter(model: Any, peft_config: Any) -> Any:
    """A PeftModel: a fresh adapter on a model."""
    if not isinstance(peft_config, import_peft().PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}, expected a peft configuration; write "
            "peft.LoraConfig(**peft_config) for a dictionary of LoRA's fields"
        )
    return _same_mode(import_peft().get_peft_model(model, peft_config))


def _same_mode(model: Any) -> Any:
    """A PEFT model in the mode of its base: a new adapter's dropout would be on in an evaluating model."""
    return model.train(model.get_base_model().training)
