"""The specification, run against any implementation.

    python -m tests.conformance ours
    python -m tests.conformance textbook
    python -m tests.conformance trl --report tests/conformance/trl-0.11.4.md     # where trl 0.11.4 is installed
    python -m tests.conformance my_package.adapter:implementation --only advantages

The property tests of ``tests/core`` are pointed at an adapter: an object that has our functions, under our names and
conventions, in areas named like our modules (``implementation.advantages.gae``). One row is printed per property:
whether it holds, the smallest counterexample if it fails, or that the implementation lacks what it speaks of. An
adapter leaves out what there is none of, and calls :func:`not_offered` for a setting that cannot be had; a property
then speaks of the remaining settings only.

Needs torch, attrs, jaxtyping, pytest, pytest-timeout and hypothesis, and whatever the adapter imports.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

from hypothesis import reject


def areas(**functions: list[Callable[..., Any]]) -> SimpleNamespace:
    """An implementation from its functions: ``areas(advantages=[gae], rewards=[compute_rewards])``."""
    return SimpleNamespace(
        **{name: SimpleNamespace(**{f.__name__: f for f in found}) for name, found in functions.items()}
    )


def not_offered() -> NoReturn:
    """Say, from inside an adapter, that the implementation has no such setting: the example does not count."""
    reject()
