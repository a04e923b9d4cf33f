"""A stand-in for Intel's extension, written to a directory on sys.path: whole, or broken in a given way."""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ppo_runtime.accel import intel

FITTING = {"torch": "2.8.0+cpu", "intel-extension-for-pytorch": "2.8.0"}

HEALTHY = '''
import torch
from torch import nn

class Packed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        return self.layer(x)

def optimize(model, **options):
    """Deterministic, and neither in training mode nor on a copy."""
    assert not model.training and options["inplace"]
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, Packed(layer))
    return model
'''


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str] = FITTING,
    capability: str = "AVX2",
    system: str = "Linux",
    machine: str = "x86_64",
    python: str = "3.12.0",
) -> None:
    """Another machine, with other versions installed."""
    found = metadata.version

    def version(name: str) -> str:
        if name not in ("torch", intel.EXTENSION):
            return found(name)
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "python_version_tuple", lambda: tuple(python.split(".")))


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, directory: Path, source: str = HEALTHY) -> Iterator[None]:
    """The fake on sys.path, in place of the real one if that is there.

    Processes that are started inside see it as well. The answers they give are remembered in ``directory``.
    """
    package = directory / intel.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / "cache"))
    pretend(monkeypatch)
    real = {name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{intel.PACKAGE}.")}
    for name in real:
        del sys.modules[name]
    intel.load.cache_clear()
    try:
        yield
    finally:
        for name in [name for name in sys.modules if f"{name}.".startswith(f"{intel.PACKAGE}.")]:
            del sys.modules[name]
        sys.modules.update(real)
        intel.load.cache_clear()
