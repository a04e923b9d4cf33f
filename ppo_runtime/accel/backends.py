"""Chooses what runs the models that never change: eager torch, Intel's extension, or torch.compile if asked for.

:func:`choose` decides from metadata alone: versions, machine, processor. :func:`accelerate_frozen` then packs the
linear layers of a frozen model, or compiles its layers: packed weights go stale after an optimiser step, so what trains
is never packed. What is compiled is compared with eager torch like what is packed, see
:mod:`ppo_runtime.accel.compiled`.

The extension is archived and what it stands on moves, so anything may go wrong with it at any time, and nothing of that
may cost a run that did not insist on it. In this order, each step cheaper than those behind it:

- what metadata or the model can tell (milliseconds): another release, another device, half precision;
- one try of import and packing in a process of its own (about 6 seconds, once for each set of versions; the answer is
  remembered, see :mod:`ppo_runtime.accel.probing`), since an import that ends the process can't be caught in it. It is
  made just before the first import, so that whoever has nothing to pack doesn't pay, and not if the user has
  imported the extension already;
- the import here and the packing, whatever they raise;
- a comparison of a few rows with eager torch (two small forward passes).

Importing the extension costs 3 to 5 seconds and changes the process: it replaces a few Python functions of torch and
sets up logging (both put back), and brings its own kernels for some of torch's operators, ``sum`` and ``mean`` among
them (which stay). Eager results differ from those before the import in their last bits; to repeat a run bit for bit,
accelerate before its first step.
"""

import copy
import logging
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from ppo_runtime.accel import intel, probing
from ppo_runtime.accel.compiled import REMEDY, compiled_twin
from ppo_runtime.accel.intel import EXTENSION, INSTALL
from ppo_runtime.accel.probing import first_line, try_once
from ppo_runtime.common import extras
from ppo_runtime.models import modes
from ppo_runtime.models.modes import dropout_off

logger = logging.getLogger(__name__)

Requested = Literal["auto", "eager", "ipex", "onednn", "compile"]
Backend = Literal["eager", "ipex", "compile"]

TOLERANCE = 1e-3
"""Of the outputs compared, log-probabilities for a language model. Another order of summation makes 1e-6 in a small
model and 1e-4 in a deep one; a layer packed wrongly makes tenths."""


@runtime_checkable
class _LanguageModel(Protocol):
    """A module that knows its output head, as the models of transformers do."""

    def get_output_embeddings(self) -> nn.Module | None: ...


class AccelError(RuntimeError):
    """What was insisted on can't be used; the message says why and what to do."""


@attrs.frozen
class AccelChoice:
    """What runs the frozen models, and why; kept in a run's metadata."""

    requested: Requested
    strict: bool
    """True turns every fallback into an error, the one found while packing too."""
    backend: Backend
    reason: str
    """A sentence for the log: what is used and, after a fallback, why and what to do."""
    versions: dict[str, str]
    """Installed versions of torch and, if it is there, of the extension."""


def choose(requested: Requested, *, strict: bool) -> AccelChoice:
    """Decide between eager torch, the extension and torch.compile, without importing the extension.

    Args:
        requested: "eager"; "ipex"; "auto", which is the extension wherever it would work; "onednn", which is eager
            torch here and packs for rollouts, see :mod:`ppo_runtime.accel.onednn`; or "compile", which "auto" never
            is, since it takes up to a minute.
        strict: refuse to fall back from any of them to eager.

    Raises:
        ValueError: ``requested`` is none of these.
        AccelError: ``strict``, and the extension can't be used here; the message says what to do.
    """
    if requested not in get_args(Requested):
        raise ValueError(f"requested is {requested!r}, expected one of {', '.join(map(repr, get_args(Requested)))}")
    versions = intel.installed()
    if requested == "eager":
        return AccelChoice(requested, strict, "eager", "eager torch, as requested", versions)
    if requested == "onednn":
        reason = "eager torch for frozen models: 'onednn' packs for rollouts alone"
        return AccelChoice(requested, strict, "eager", reason, versions)
    if requested == "compile":
        return AccelChoice(requested, strict, "compile", f"torch.compile of torch {versions['torch']}", versions)
    obstacle = intel.obstacle(versions)
    if obstacle is None:
        reason = f"{EXTENSION} {versions[EXTENSION]} fits torch {versions['torch']}"
        return AccelChoice(requested, strict, "ipex", reason, versions)
    if requested == "auto" and not strict and EXTENSION not in versions:
        obstacle = obstacle.partition(";")[0]  # who left it out, and asks for nothing, needs no advice to install it
    return fall_back(AccelChoice(requested, strict, "ipex", "", versions), obstacle)


def fall_back(choice: AccelChoice, obstacle: str) -> AccelChoice:
    """Eager torch in place of what was chosen.

    Args:
        choice: eager already, it stays as it is.
        obstacle: why that can't be used, and what to do.

    Raises:
        AccelError: ``choice.strict``.
    """
    if choice.backend == "eager":
        return choice
    if choice.strict:
        raise AccelError(
            f"acceleration {choice.requested!r} is strict, but {obstacle}. Or let eager torch stand in: "
            "PPOConfig(accel_strict=False), on the command line --accel auto"
        )
    return attrs.evolve(choice, backend="eager", reason=f"eager torch: {obstacle}")


def accelerate_frozen(
    model: nn.Module, choice: AccelChoice, outputs: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module, AccelChoice]:
    """The model to compute with in place of ``model``, and the choice as it turned out.

    Under "eager" that is ``model`` itself. Under "ipex" it is a copy with packed float32 linear layers and, for a
    language model, with the very output head of ``model``: whoever computes log-probabilities from hidden states
    needs that weight plain. A copy's other weights are blocked garbage to a reader: use it to compute, never to save.
    Under "compile" it is a twin of the very tensors of ``model``, whose layers are compiled.
    Whatever is in the way of that falls back to eager, with ``model`` as it was: weights, flags and random numbers.

    Args:
        model: frozen; in whichever mode, which it keeps.
        choice: of :func:`choose`.
        outputs: what a model computes for a few rows, always the same. Those of the other model have to agree with
            those of ``model``; called without gradients and with dropout off.

    Raises:
        ValueError: a parameter requires grad.
        AccelError: ``choice.strict``, and the other model could not be made or does not agree.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable:
        raise ValueError(
            f"model has {len(trainable)} parameters that require grad (the first: {trainable[0]}), expected a frozen "
            "model, since packed weights don't follow an optimiser; call model.requires_grad_(False) if it never trains"
        )
    broken = False
    if choice.backend != "eager":
        accelerated, obstacle = (_accelerated if choice.backend == "ipex" else _compiled), None
        try:
            obstacle = _unsuitable(model) if choice.backend == "ipex" else None
        except Exception as error:  # of the model's own methods
            obstacle = f"{type(model).__name__} can't be looked through ({first_line(error)}); set accel='eager' for it"
        if obstacle is None:
            other, report = accelerated(model, choice, outputs)
            if other is not None:
                model, choice = other, attrs.evolve(choice, reason=f"{choice.reason}; {report}")
            else:
                obstacle, broken = report, True
        if obstacle is not None:
            choice = fall_back(choice, obstacle)
    tell(choice, broken=broken)
    return model, choice


def tell(choice: AccelChoice, *, broken: bool = False) -> None:
    """Log what runs the frozen models: a warning if something else was asked for by name, or is broken."""
    asked_in_vain = choice.requested in ("ipex", "compile") and choice.backend == "eager"
    logger.log(logging.WARNING if asked_in_vain or broken else logging.INFO, "acceleration: %s", choice.reason)


def try_out() -> str | None:
    """Import the extension, pack two layers and compare, in a process of its own; what went wrong, None if nothing."""
    intel.import_it()  # aloud: its notices are all there is to read once it has ended the process
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval().requires_grad_(False)
    rows = torch.randn(3, 64)
    packed, _ = _pack(model)
    return _disagreement(model, packed, lambda layers: layers(rows))


def import_problem(versions: dict[str, str], *, again: bool = False) -> str | None:
    """Why the extension can't be imported or does not pack, in one line; None if it does.

    Tried in a process of its own unless the answer is remembered; ``again`` tries anyway.
    """
    circumstances = {**intel.circumstances(versions), "sources": _sources()}
    return try_once(f"{__name__}:{try_out.__name__}", circumstances, again=again)


def _sources() -> str:
    """A checksum of the modules that import, pack and compare: what failed for older ones is tried again."""
    checksum = 0
    for module in (sys.modules[__name__], intel, modes, probing, extras):
        with suppress(OSError):  # an installation without sources
            checksum = zlib.crc32(Path(str(module.__file__)).read_bytes(), checksum)
    return str(checksum)


def _unsuitable(model: nn.Module) -> str | None:
    """What about a model is known to be in the way of packing it, and what to do; None if nothing."""
    name = type(model).__name__
    heads = _heads(model)
    if not any(type(layer) is nn.Linear and layer not in heads for layer in model.modules()):
        return f"{name} has no linear layer that {EXTENSION} can pack; accel='eager' is the same for it"
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for place, tensor in tensors:
            if tensor.device.type == "meta":
                return f"{kind} {place} of {name} has no storage (device meta); load the model's weights first"
            if tensor.device.type != "cpu":
                return (
                    f"{kind} {place} of {name} is on {tensor.device}, and {EXTENSION} packs for the CPU alone; "
                    "move the model with .to('cpu') to have it packed"
                )
            if kind == "parameter" and tensor.dtype is not torch.float32:
                return (
                    f"parameter {place} of {name} is {tensor.dtype}, and only torch.float32 is packed; "
                    "load the model with dtype=torch.float32 to have it packed"
                )
    return None


def _accelerated(
    model: nn.Module, choice: AccelChoice, outputs: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module | None, str]:
    """A packed copy that agrees and what was packed; or None and the obstacle."""
    version = choice.versions.get(EXTENSION, "")
    try:
        problem = None if intel.is_loaded() else import_problem(choice.versions)
        problem = problem or intel.load()[1]
    except Exception as error:
        problem = first_line(error)
    if problem is not None:
        return None, (
            f"{EXTENSION} {version} can't be used here ({problem}); {INSTALL}, or do without: accel='eager'. "
            "'ppo-core doctor' tries it anew"
        )
    name = type(model).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            packed, count = _pack(model)
            if not count:
                return None, f"{name} has no linear layer that {EXTENSION} can pack; set accel='eager' for it"
            problem = _disagreement(model, packed, outputs)
    except (Exception, SystemExit) as error:
        return None, f"{EXTENSION} {version} could not pack {name} ({first_line(error)}); set accel='eager' for it"
    if problem is not None:
        return None, f"{name} packed by {EXTENSION} {version} is not what it was ({problem}); set accel='eager' for it"
    # Its layer norm is differentiable, by way of operators that are, but not registered as such: torch would warn at
    # every backward pass of GPT-2 that gradients may be wrong. That they are right is tested.
    warnings.filterwarnings("ignore", message="aten::layer_norm: an autograd kernel was not registered")
    return packed, f"{count} linear layers packed"


def _compiled(
    model: nn.Module, choice: AccelChoice, outputs: Callable[[nn.Module], Tensor]
) -> tuple[nn.Module | None, str]:
    """A compiled twin that agrees and what was compiled; or None and the obstacle."""
    name = type(model).__name__
    try:
        with torch.random.fork_rng(devices=[]):
            twin, count, trust = compiled_twin(model)
            if not count:
                return None, f"{name} keeps no list of layers to compile; accel='eager' is the same for it"
            problem = _disagreement(model, twin, outputs)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # of which torch's compiler says less
        return None, f"{name} could not be compiled ({first_line(cause)}); {REMEDY}"
    if problem is not None:
        return None, f"{name} compiled is not what it was ({problem}); set accel='eager' for it"
    trust.gives_way = not choice.strict
    return twin, f"{count} layers compiled"


def _pack(model: nn.Module) -> tuple[nn.Module, int]:
    """A packed copy of the model, and how many of its linear layers really were packed."""
    extension, problem = intel.load()
    if extension is None:
        raise RuntimeError(problem)
    # The extension would make the copy itself, but rearranges some weights of the original before it does.
    # Output heads stay as they are, so nothing is spent on copying and packing them.
    heads = _heads(model)
    packed = copy.deepcopy(model, {id(head): nn.Identity() for head in heads}).eval()
    with intel.quiet():
        packed = extension.optimize(
            packed,
            dtype=torch.float32,
            inplace=True,
            conv_bn_folding=False,
            linear_bn_folding=False,
            auto_kernel_selection=True,
        )
    done = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer in heads:
            packed.set_submodule(name, layer)
        elif type(layer) is nn.Linear and type(packed.get_submodule(name)) is not nn.Linear:
            done.add(layer)
    return packed, len(done)


def _heads(model: nn.Module) -> set[nn.Module]:
    """Output heads of the model and of models within it."""
    heads = (part.get_output_embeddings() for part in model.modules() if isinstance(part, _LanguageModel))
    return {head for head in heads if head is not None}


def _disagreement(model: nn.Module, other: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> str | None:
    """How the two models' outputs differ; None if they agree, which a NaN never does."""
    with torch.no_grad(), dropout_off(model, other):
        plain, fast = outputs(model).double(), outputs(other).double()
    if plain.shape != fast.shape:
        return f"its outputs have the shape {tuple(fast.shape)}, expected {tuple(plain.shape)}"
    difference = float((fast - plain).abs().max())
    if not difference <= TOLERANCE:
        of_both = " and torch's own are not finite" if not plain.isfinite().all() else ""
        return f"its outputs differ by {difference:.3g}, expected at most {TOLERANCE:g}{of_both}"
    return None
