"""The one seam to Intel's extension for PyTorch, and the only module that names it.

:func:`choose` decides from metadata alone, since a mere import on the wrong torch release or processor ends the
process. :func:`accelerate_frozen` then packs the linear layers of a model that never changes, such as the reference:
packed weights go stale after an optimiser step, so a model that trains is never packed.

Importing the extension costs 7 to 11 seconds and changes the process: it replaces a few Python functions of torch and
sets up logging (both put back here), and brings its own kernels for some of torch's operators, ``sum`` and ``mean``
among them (which stay). Eager results differ from those before the import in their last bits; to repeat a run bit
for bit, accelerate before its first step.
"""

import importlib
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Literal, Protocol, get_args, runtime_checkable

import attrs
import torch
from torch import nn

logger = logging.getLogger(__name__)

Requested = Literal["auto", "eager", "ipex"]
Backend = Literal["eager", "ipex"]

_EXTENSION = "intel-extension-for-pytorch"
_INSTALL = "install the matching pair with: pip install 'ppo-core[ipex]'"
_REPLACED_ON_IMPORT = (
    (torch, "embedding_bag"),
    (torch.jit, "trace"),
    (torch.Tensor, "numpy"),
    (torch.Tensor, "__format__"),
)


@runtime_checkable
class _LanguageModel(Protocol):
    """A module that knows its output head, as the models of transformers do."""

    def get_output_embeddings(self) -> nn.Module | None: ...


@attrs.frozen
class AccelChoice:
    """What runs the frozen models, and why; kept in a run's metadata."""

    requested: Requested
    strict: bool
    """True turns every fallback into an error, the one found while packing too."""
    backend: Backend
    reason: str
    """A sentence for the log."""
    versions: dict[str, str]
    """Installed versions of torch and, if it is there, of the extension."""


def choose(requested: Requested, *, strict: bool) -> AccelChoice:
    """Decide between eager torch and the extension, without importing the extension.

    Args:
        requested: "eager"; "ipex"; or "auto", which is the extension wherever it would work.
        strict: refuse to fall back from "auto" or "ipex" to eager.

    Raises:
        ValueError: ``requested`` is none of the three.
        RuntimeError: ``strict``, and the extension can't be used here; the message says what to do.
    """
    if requested not in get_args(Requested):
        raise ValueError(f"requested is {requested!r}, expected one of {', '.join(map(repr, get_args(Requested)))}")
    versions = {name: version for name in ("torch", _EXTENSION) if (version := _version(name))}
    if requested == "eager":
        return AccelChoice(requested, strict, "eager", "eager torch, as requested", versions)
    obstacle = _obstacle(versions)
    if obstacle is None:
        reason = f"{_EXTENSION} {versions[_EXTENSION]} fits torch {versions['torch']}"
        return AccelChoice(requested, strict, "ipex", reason, versions)
    return _fall_back(AccelChoice(requested, strict, "ipex", "", versions), obstacle)


def accelerate_frozen(model: nn.Module, choice: AccelChoice) -> tuple[nn.Module, AccelChoice]:
    """The model to compute with in place of ``model``, and the choice as it turned out.

    Under "eager" that is ``model`` itself. Under "ipex" it is a copy with packed float32 linear layers and, for a
    language model, with the very output head of ``model``: whoever computes log-probabilities from hidden states
    needs that weight plain. A copy's other weights are blocked garbage to a reader: use it to compute, never to save.
    A model in which nothing can be packed (GPT-2 has no ``nn.Linear`` but its head) falls back to eager.

    Raises:
        ValueError: a parameter requires grad.
        RuntimeError: nothing could be packed and ``choice.strict``.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable:
        raise ValueError(
            f"model has {len(trainable)} parameters that require grad (the first: {trainable[0]}), expected a frozen "
            "model, since packed weights don't follow an optimiser; call model.requires_grad_(False) if it never trains"
        )
    if choice.backend == "ipex":
        packed, count = _pack(model)
        if count:
            model, choice = packed, attrs.evolve(choice, reason=f"{choice.reason}; {count} linear layers packed")
        else:
            choice = _fall_back(choice, f"{type(model).__name__} has no linear layer that {_EXTENSION} can pack")
    asked_in_vain = choice.requested == "ipex" and choice.backend == "eager"
    logger.log(logging.WARNING if asked_in_vain else logging.INFO, "acceleration: %s", choice.reason)
    return model, choice


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _obstacle(versions: dict[str, str]) -> str | None:
    """Why the extension can't be used here; None if it can."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine.lower() not in ("x86_64", "amd64"):
        return f"{_EXTENSION} runs on Linux on x86-64 only, and this is {system} on {machine}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith(("AVX2", "AVX512")):
        return f"{_EXTENSION} needs a processor with AVX2, and torch reports {capability} here"
    if _EXTENSION not in versions:
        return f"{_EXTENSION} is not installed; {_INSTALL}"
    if _release(versions[_EXTENSION]) != _release(versions["torch"]):
        return f"{_EXTENSION} {versions[_EXTENSION]} does not fit torch {versions['torch']}; {_INSTALL}"
    return None


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def _fall_back(choice: AccelChoice, obstacle: str) -> AccelChoice:
    if choice.strict:
        raise RuntimeError(
            f"acceleration {choice.requested!r} is strict, but {obstacle}. Or allow eager torch with strict=False"
        )
    return attrs.evolve(choice, backend="eager", reason=f"eager torch: {obstacle}")


def _pack(model: nn.Module) -> tuple[nn.Module, int]:
    """A packed copy of the model, and how many of its linear layers really were packed."""
    with _quiet():
        packed = _import_extension().optimize(
            model.eval(),
            dtype=torch.float32,
            inplace=False,
            conv_bn_folding=False,
            linear_bn_folding=False,
            auto_kernel_selection=True,
        )
    # Its layer norm is differentiable, by way of operators that are, but not registered as such: torch would warn at
    # every backward pass of GPT-2 that gradients may be wrong. That they are right is tested.
    warnings.filterwarnings("ignore", message="aten::layer_norm: an autograd kernel was not registered")
    heads = {m.get_output_embeddings() for m in model.modules() if isinstance(m, _LanguageModel)}
    count = 0
    for name, layer in model.named_modules():
        if layer in heads:
            packed.set_submodule(name, layer)
        elif type(layer) is nn.Linear and type(packed.get_submodule(name)) is not nn.Linear:
            count += 1
    return packed, count


def _import_extension() -> ModuleType:
    """Import the extension, and put back what that replaces in torch's Python interface and in logging."""
    functions = [(owner, name, getattr(owner, name)) for owner, name in _REPLACED_ON_IMPORT]
    root, logger_class = logging.getLogger(), logging.getLoggerClass()
    level, handlers = root.level, root.handlers[:]
    from torch._inductor import config as inductor

    # The import would also start a pool of compiler processes, half a gigabyte that nobody here uses.
    threads, inductor.compile_threads = inductor.compile_threads, 1
    try:
        extension = importlib.import_module("intel_extension_for_pytorch")
    finally:
        inductor.compile_threads = threads
        for owner, name, function in functions:
            setattr(owner, name, function)
        logging.setLoggerClass(logger_class)
        root.setLevel(level)
        root.handlers[:] = handlers
    return extension


@contextmanager
def _quiet() -> Iterator[None]:
    """Send the extension's notices about itself to the log, at debug level or, if it fails, at error level.

    Some are written by C++ straight to the terminal, hence the detour over the file descriptor.
    """
    level = logging.DEBUG
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        terminal = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except BaseException:
            level = logging.ERROR
            raise
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            sink.seek(0)
            if notices := sink.read().decode(errors="replace").strip():
                logger.log(level, "%s says:\n%s", _EXTENSION, notices)
