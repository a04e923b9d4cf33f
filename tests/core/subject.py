"""The implementation under test. Property tests reach functions through ``subject`` and through nothing else.

``PPO_SPEC_IMPLEMENTATION`` names another implementation as ``module`` or ``module:attribute``: anything that has our
functions, under our conventions, either in areas of the same names (``implementation.advantages.gae``) or, where a
name is unique, directly (``implementation.gae``). What it lacks is reported as absent. Bundles (``Moments``,
``Average``, ``KLControllerState``) are data and always ours.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

import ppo_core

VARIABLE = "PPO_SPEC_IMPLEMENTATION"
AREAS = tuple(sorted(module.name for module in pkgutil.iter_modules(ppo_core.__path__) if module.name[0] != "_"))


class Area:
    """The functions of one module of the specification: ``subject.advantages``."""

    def __init__(self, subject: "Subject", name: str) -> None:
        self._subject, self._name = subject, name

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._subject.function(f"{self._name}.{name}")


class Subject:
    """An implementation, with functions that can be replaced for a while (which makes a mutant of it)."""

    def __init__(self, implementation: Any) -> None:
        self.implementation = implementation
        self.is_ours = implementation is ppo_core
        self._replaced: dict[str, Callable[..., Any]] = {}

    def function(self, path: str) -> Callable[..., Any]:
        """The function at ``area.name``; skips the test when a foreign implementation has none."""
        if path in self._replaced:
            return self._replaced[path]
        area, name = path.split(".")
        found = getattr(_area(self.implementation, area), name, None)
        if found is None and not self.is_ours:
            found = getattr(self.implementation, name, None)
        if found is not None:
            return found
        if self.is_ours:
            raise AttributeError(f"ppo_core has no {path}")
        pytest.skip(f"absent: {path}")

    def __getattr__(self, name: str) -> Area:
        if name not in AREAS:
            raise AttributeError(f"{name} is no area of the specification; there are {', '.join(AREAS)}")
        return Area(self, name)

    @contextmanager
    def replaced(self, path: str, function: Callable[..., Any]) -> Iterator[None]:
        """Within the block, ``path`` is ``function``."""
        self._replaced[path] = function
        try:
            yield
        finally:
            del self._replaced[path]


def _area(implementation: Any, name: str) -> Any:
    if isinstance(implementation, ModuleType) and hasattr(implementation, "__path__"):
        try:
            return importlib.import_module(f"{implementation.__name__}.{name}")
        except ModuleNotFoundError:
            return None
    return getattr(implementation, name, None)


def _resolve(reference: str) -> Any:
    module, _, attribute = reference.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


subject = Subject(_resolve(os.environ.get(VARIABLE) or "ppo_core"))

only_ours = pytest.mark.skipif(not subject.is_ours, reason="absent: how it is computed is its own affair")
"""For what ppo_core promises beyond the specification: how it computes, and what it is made of."""
