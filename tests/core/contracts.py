"""What is true of every function of a kind, and how the functions of a kind are found.

Nothing here names a function. The public functions of ``ppo_core`` are discovered, their jaxtyping annotations say what
to feed them, and the kind follows from the annotations too: a function with a ``mask`` is masked, one with a ``time``
axis is temporal, one that takes tensors at all is numeric. A new function is therefore under contract the moment it
exists; all it may need is a line in ``SETTINGS`` or ``DOMAINS`` for an argument of a new name.
"""

import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import ppo_core
from ppo_core.scores import ScoreState
from tests.core.strategies import turned_product
from tests.core.subject import subject

VOCAB = 7
"""Sizes of named axes are constants beyond every time: no axis is mistaken for another."""

SETTINGS: dict[str, tuple[Any, ...]] = {
    "n": (2, 1, 3, 9),
    "rho_clip": (1.0, 0.5, 4.0),
    "c_clip": (1.0, 0.5, 4.0),
    "gamma": (0.95, 1.0, 0.5, 0.0),
    "lam": (0.9, 1.0, 0.5, 0.0),
    "cliprange": (0.2, 0.05, 0.9),
    "kl_coef": (0.2, 0.0, 1.5),
    "shift_mean": (True, False),
    "correction": (1, 0),
    "eps": (1e-8, 1e-3),
    "dim": (-1, None),
    "temperature": (0.7, 1.0, 2.0),
    "scale": (0.5, 1.0),
    "softcap": (5.0, None),
    "chunk_size": (3, 1, VOCAB, VOCAB + 1),
    "keep_logits": (True, False),
    "product": (torch.mm, turned_product),
    "scale_by_std": (True, False),
    "use_scaling": (True, False),
    "use_norm": (True, False),
    "clip": (2.0, None),
    "state": (ScoreState(9.0, 0.5, 20.0), ScoreState(0.0, 0.0, 0.0)),
    "top_k": (3, None, 1, VOCAB),
    "top_p": (0.8, None, 0.35, 1.0),
}
"""Hyper-parameters by name, the customary value first; an unknown one fails with a request to be added."""

DOMAINS: dict[str, tuple[float, float]] = {
    "coef": (-1.5, 1.5),
    "gamma": (0.0, 1.0),
    "lam": (0.0, 1.0),
    "m2": (1.0, 8.0),
}
"""Ranges of tensors by name; all others are within +-4, so that a ratio exp(a - b) stays comparable in float32."""

COUNTS = ("n", "weight")
"""Fields of bundles that count something: 2, 3, ... as floating-point numbers."""

TARGETS: dict[str, tuple[str, ...]] = {
    "losses.clipped_policy_loss": ("old_logprobs", "advantages"),
    "losses.clipped_value_loss": ("old_values", "returns"),
    "off_policy.vtrace": ("logprobs", "old_logprobs"),
    "surrogates.k2_surrogate": ("ref_logprobs",),
    "surrogates.k3_surrogate": ("ref_logprobs",),
    "surrogates.weighted_k1_surrogate": ("old_logprobs", "ref_logprobs"),
}
"""Arguments that a function takes as given: their gradient is exactly 0, whatever its slope in them."""

STRAIGHT_THROUGH = ("surrogates.k3_surrogate",)
"""Functions whose gradient is not that of their value, on purpose; their own property files say which it is."""

EXEMPT = {
    "controllers.adaptive_kl_update": "takes numbers on the host, no tensors: test_controllers says all there is",
    "controllers.fixed_kl_update": "takes numbers on the host, no tensors: test_controllers says all there is",
    "scores.update_score_state": "reads numbers off to the host, so no tensor leaves it: test_scores says all there is",
}
"""Public functions without a contract, each with its reason."""


@dataclass(frozen=True)
class Parameter:
    """One argument, as its annotation describes it."""

    name: str
    what: str
    """"float", "bool", "int" (tensors), "bundle" or "setting"."""
    dims: tuple[str, ...] = ()
    optional: bool = False
    or_number: bool = False
    """Whether a number will do as well as a tensor."""
    keyword: bool = False
    bundle: Any = None

    @property
    def is_tensor(self) -> bool:
        return self.what in ("float", "bool", "int")

    @property
    def many(self) -> bool:
        """Whether it has the leading axes over which everything is vectorised."""
        return bool(self.dims) and self.dims[0].startswith("*")


def _parameter(name: str, annotation: Any) -> Parameter:
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    tensors = [option for option in options if hasattr(option, "dim_str")]
    if tensors:
        return replace(_parameter(name, tensors[0]), optional=type(None) in options, or_number=float in options)
    if hasattr(annotation, "dim_str"):
        dtypes = annotation.dtypes
        what = "bool" if "bool" in dtypes else "float" if "float32" in dtypes else "int"
        return Parameter(name, what, tuple(annotation.dim_str.split()))
    if isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields"):
        return Parameter(name, "bundle", bundle=annotation)
    return Parameter(name, "setting")


@dataclass(frozen=True)
class Function:
    """A public function and what its signature says."""

    path: str
    parameters: tuple[Parameter, ...]

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.is_tensor)

    @property
    def mask(self) -> Parameter | None:
        return next((p for p in self.parameters if p.name == "mask"), None)

    @property
    def is_masked(self) -> bool:
        return self.mask is not None

    @property
    def is_temporal(self) -> bool:
        return any("time" in p.dims for p in self.tensors)

    @property
    def is_numeric(self) -> bool:
        return any(p.is_tensor or p.what == "bundle" for p in self.parameters)

    @property
    def is_differentiable(self) -> bool:
        return any(p.what in ("float", "bundle") for p in self.parameters)

    @property
    def inner_axis(self) -> str | None:
        """The last axis of an argument that another one lacks: what the function looks along."""
        dims = [p.dims for p in self.tensors if p.many]
        return next((mine[-1] for mine in dims if mine[:-1] in dims), None)

    @property
    def steps(self) -> str | None:
        """The axis that stands for time: ``time``, or the last of ``*shape`` where that is all a mask says."""
        if self.is_temporal:
            return "time"
        return self.mask.dims[-1] if self.mask else None

    def has_steps(self, parameter: Parameter) -> bool:
        return parameter.is_tensor and self.steps in parameter.dims


def _discover() -> dict[str, Function]:
    found = {}
    for module in pkgutil.iter_modules(ppo_core.__path__):
        if module.name.startswith("_"):
            continue
        namespace = importlib.import_module(f"ppo_core.{module.name}")
        for name, value in vars(namespace).items():
            if (
                name.startswith("_")
                or "__" in name
                or not inspect.isfunction(value)
                or value.__module__ != namespace.__name__
            ):
                continue
            hints = typing.get_type_hints(value)
            parameters = tuple(
                replace(_parameter(p.name, hints.get(p.name)), keyword=p.kind is inspect.Parameter.KEYWORD_ONLY)
                for p in inspect.signature(value).parameters.values()
            )
            found[f"{module.name}.{name}"] = Function(f"{module.name}.{name}", parameters)
    return found


FUNCTIONS = _discover()


def paths(kind: Callable[[Function], bool]) -> list[str]:
    """All functions of a kind, exempt ones apart."""
    return [path for path, function in FUNCTIONS.items() if path not in EXEMPT and kind(function)]


NUMERIC = paths(lambda f: f.is_numeric)
DIFFERENTIABLE = paths(lambda f: f.is_differentiable)
MASKED = paths(lambda f: f.is_masked)
STEPWISE = paths(lambda f: f.steps is not None)
INWARD = paths(lambda f: f.inner_axis is not None)
BATCHED = paths(lambda f: any(p.many for p in f.tensors) or (not f.tensors and f.is_numeric))


@dataclass(frozen=True)
class Call:
    """One call: a function with its arguments, which can be changed by name."""

    function: Function
    arguments: dict[str, Any]
    batch: tuple[int, ...]
    time: int

    def __call__(self, **changes: Any) -> list[Tensor]:
        """What the function under test answers: all tensors of the result, in order."""
        arguments = self.arguments | changes
        keywords = {p.name: arguments.pop(p.name) for p in self.function.parameters if p.keyword}
        return leaves(subject.function(self.function.path)(*arguments.values(), **keywords))

    def but(self, change: Callable[[Tensor], Tensor], *, where: Callable[[Parameter], bool]) -> "Call":
        """The same call with some tensors (those in bundles too) changed."""
        return replace(
            self,
            arguments={
                p.name: map_tensors(change, self.arguments[p.name]) if where(p) else self.arguments[p.name]
                for p in self.function.parameters
            },
        )

    @property
    def mask(self) -> Tensor:
        return self.arguments["mask"]

    @property
    def floats(self) -> dict[str, Any]:
        """The differentiable arguments, tensors and bundles, by name."""
        return {
            p.name: self.arguments[p.name]
            for p in self.function.parameters
            if p.what in ("float", "bundle") and isinstance(self.arguments[p.name], (Tensor, tuple))
        }

    def is_stepwise(self, x: Tensor) -> bool:
        """Whether a result has one entry per step."""
        at = len(self.batch)
        return x.ndim > at and tuple(x.shape[: at + 1]) == (*self.batch, self.time)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self.arguments.items())
        return f"{self.function.path}({shown})"


def _show(value: Any) -> str:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return repr(tuple(field.tolist() for field in value))
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.int().tolist() if value.dtype == torch.bool else value.tolist())


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A tensor, or a bundle field by field, changed; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return type(value)(*(change(field) for field in value))
    return value


def leaves(value: Any) -> list[Tensor]:
    """All tensors of a result or an argument, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (tuple, list)) else []


@st.composite
def calls(
    draw: st.DrawFn,
    path: str,
    *,
    batch: tuple[int, ...] | None = None,
    time: int | None = None,
    density: float | None = None,
    rounded: bool = False,
) -> Call:
    """A legal call. Numbers come from a seed: a contract cares for shapes and masks, not for values.

    ``rounded`` numbers are the same in every dtype; others have no ties, and so are nowhere near a kink.
    """
    function = FUNCTIONS[path]
    return _build(
        function,
        batch=batch if batch is not None else draw(st.sampled_from(((), (1,), (2,), (3,), (2, 2)))),
        time=time if time is not None else draw(st.integers(1, 6)),
        seed=draw(st.integers(0, 10_000)),
        density=density if density is not None else draw(st.sampled_from((0.6, 1.0, 0.3))),
        rounded=rounded,
        settings={
            p.name: draw(st.sampled_from(_choices(p)))
            for p in function.parameters
            if p.what == "setting" or (p.or_number and draw(st.booleans()))
        },
        absent={p.name for p in function.parameters if p.optional and draw(st.booleans())},
    )


def example(path: str, *, batch: tuple[int, ...], time: int, seed: int = 0) -> Call:
    """One legal call with nothing drawn: all optional arguments given, a mask with holes."""
    function = FUNCTIONS[path]
    choices = {p.name: _choices(p)[0] for p in function.parameters if p.what == "setting"}
    return _build(
        function, batch=batch, time=time, seed=seed, density=0.7, rounded=False, settings=choices, absent=set()
    )


def _build(
    function: Function,
    *,
    batch: tuple[int, ...],
    time: int,
    seed: int,
    density: float,
    rounded: bool,
    settings: dict[str, Any],
    absent: set[str],
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, Any] = {}
    for p in function.parameters:
        if p.name in settings:
            arguments[p.name] = settings[p.name]
        elif p.name in absent:
            arguments[p.name] = None
        elif p.what == "bundle":
            shape = () if function.tensors else batch
            fields = {name: _numbers(name, shape, generator, rounded) for name in p.bundle._fields}
            arguments[p.name] = p.bundle(**fields)
        else:
            shape = _shape(function, p, batch, time)
            if p.what == "bool":
                arguments[p.name] = torch.rand(shape, generator=generator) < density
            elif p.what == "int":
                arguments[p.name] = torch.randint(VOCAB, shape, generator=generator)
            else:
                arguments[p.name] = _numbers(p.name, shape, generator, rounded)
    return Call(function, arguments, batch, time)


def _choices(p: Parameter) -> tuple[Any, ...]:
    assert p.name in SETTINGS, f"{p.name} is a setting that the contracts do not know: add it to SETTINGS"
    return SETTINGS[p.name]


def _shape(function: Function, p: Parameter, batch: tuple[int, ...], time: int) -> tuple[int, ...]:
    shape: tuple[int, ...] = ()
    for dim in p.dims:
        if dim == function.steps and dim.startswith("*"):
            shape += (*batch, time)
        elif dim.startswith("*"):
            shape += batch
        else:
            shape += (time if dim == "time" else VOCAB,)
    return shape


def _numbers(name: str, shape: tuple[int, ...], generator: torch.Generator, rounded: bool) -> Tensor:
    if name in COUNTS:
        return torch.randint(2, 9, shape, generator=generator).double()
    low, high = DOMAINS.get(name, (-4.0, 4.0))
    numbers = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return numbers.bfloat16().half().double() if rounded else numbers


def weighted_sum(results: list[Tensor]) -> Tensor:
    """One number that depends on every differentiable result, and on no two entries alike."""
    total = torch.zeros((), dtype=torch.float64)
    for result in results:
        if result.dtype.is_floating_point and result.requires_grad:
            finite = torch.where(result.isfinite(), result, 0.0).double()
            total = total + (finite * torch.linspace(0.5, 1.5, result.numel()).double().view(result.shape)).sum()
    return total


def gradients(call: Call) -> dict[str, list[Tensor]]:
    """The gradient of ``weighted_sum`` by each differentiable argument; zeros where there is none."""
    inputs = {
        name: map_tensors(lambda x: x.detach().clone().requires_grad_(True), value)
        for name, value in call.floats.items()
    }
    total = weighted_sum(call(**inputs))
    wanted = {name: leaves(value) for name, value in inputs.items()}
    if not total.requires_grad:
        return {name: [torch.zeros_like(x) for x in xs] for name, xs in wanted.items()}
    flat = torch.autograd.grad(total, [x for xs in wanted.values() for x in xs], allow_unused=True)
    found = iter(flat)
    return {name: [torch.zeros_like(x) if (g := next(found)) is None else g for x in xs] for name, xs in wanted.items()}


def magnitude(results: list[Tensor]) -> float:
    """The largest finite number in a result."""
    sizes = [x.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() for x in results if x.numel()]
    return max(sizes, default=0.0)
