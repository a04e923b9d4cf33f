"""Every public function of the core says what it computes, of which shape, and what it refuses."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import ppo_core
from tests.core.contracts import FUNCTIONS

ROOT = Path(ppo_core.__file__).parent.parent
SOURCES = sorted(path for package in ("ppo_core", "ppo_runtime") for path in (ROOT / package).rglob("*.py"))


def function(path):
    module, name = path.split(".")
    return getattr(importlib.import_module(f"ppo_core.{module}"), name)


@pytest.mark.parametrize("path", FUNCTIONS)
def test_docstring(path):
    """A formula or sentence first; then the errors, or a reference to a function that lists them."""
    text = inspect.getdoc(function(path))
    assert text, path
    first = text.splitlines()[0]
    assert 10 <= len(first) <= 120
    refers = re.search(r":func:`([\w.]+)`", text)
    raises = re.search(r"Raises:|Raises as|Same (data )?arguments as", text)
    assert raises, f"{path} does not say what it raises"
    if "Raises:" not in text:
        assert refers, path
        target = refers[1] if refers[1].startswith("ppo_core.") else f"{function(path).__module__}.{refers[1]}"
        module, _, name = target.rpartition(".")
        assert "Raises:" in inspect.getdoc(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("path", FUNCTIONS)
def test_signature(path):
    """Every argument and the result are annotated; hyper-parameters come by keyword and without defaults."""
    signature = inspect.signature(function(path))
    assert signature.return_annotation is not inspect.Signature.empty
    for p in signature.parameters.values():
        assert p.annotation is not inspect.Parameter.empty, p.name
        if p.kind is inspect.Parameter.KEYWORD_ONLY:
            assert p.default is inspect.Parameter.empty or p.default is None, p.name
        else:
            assert p.default is inspect.Parameter.empty or p.default is None, p.name


@pytest.mark.parametrize("path", FUNCTIONS)
def test_every_setting_is_described(path):
    """A function with more than two settings describes each of them."""
    text = inspect.getdoc(function(path))
    settings = [p for p in inspect.signature(function(path)).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if len(settings) > 2:
        for p in settings:
            assert re.search(rf"\b{p.name}\b", text), p.name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_source(source):
    """A module says what it is for, and nothing is left to be done."""
    text = source.read_text()
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "no docstring"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)


def test_modules_stay_small():
    """No module of the core is longer than 300 lines."""
    for source in (ROOT / "ppo_core").glob("*.py"):
        assert len(source.read_text().splitlines()) <= 300, source.name
