"""Intel's extension for PyTorch: whether it fits what is installed here, and its import.

What is used of it, ``optimize`` and its kernels, needs nothing of transformers; but its import pulls in parts that do,
break with every release of transformers that moves something, and replace functions in it. These parts are left out:
for the length of the import, and for these names alone, a finder gives empty stand-ins, which are gone afterwards
together with every name that was taken from them. Whoever imports such a part later gets the real one or its own error.
"""

import functools
import importlib
import importlib.util
import logging
import os
import platform
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from ppo_runtime.accel.probing import first_line
from ppo_runtime.common.extras import installed_version

logger = logging.getLogger(__name__)

EXTENSION = "intel-extension-for-pytorch"
PACKAGE = "intel_extension_for_pytorch"
INSTALL = "install the matching pair with: pip install 'ppo-core[ipex]'"
NEWEST_PYTHON = (3, 13)
"""The last that the extension, archived since, has wheels for."""

_LEFT_OUT = tuple(f"{PACKAGE}.{part}" for part in ("llm", "transformers", "cpu.tpp.fused_bert"))
_REPLACED_ON_IMPORT = (
    (torch, "embedding_bag"),
    (torch.jit, "trace"),
    (torch.Tensor, "numpy"),
    (torch.Tensor, "__format__"),
)


def installed() -> dict[str, str]:
    """Versions of torch and, if it is there, of the extension."""
    # A torch that was built in place has no metadata.
    found = {"torch": installed_version("torch") or str(torch.__version__), EXTENSION: installed_version(EXTENSION)}
    return {name: version for name, version in found.items() if version}


def obstacle(versions: Mapping[str, str]) -> str | None:
    """Why the extension can't be used here, as far as that can be known without importing it; None if it may."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine.lower() not in ("x86_64", "amd64"):
        return f"{EXTENSION} runs on Linux on x86-64 only, and this is {system} on {machine}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith(("AVX2", "AVX512")):
        return f"{EXTENSION} needs a processor with AVX2, and torch reports {capability} here"
    python = tuple(map(int, platform.python_version_tuple()[:2]))
    if EXTENSION not in versions and python > NEWEST_PYTHON:
        newest, here = (".".join(map(str, version)) for version in (NEWEST_PYTHON, python))
        return f"{EXTENSION} is made for Python up to {newest}, and this is {here}; use Python {newest} if you want it"
    if EXTENSION not in versions:
        return f"{EXTENSION} is not installed; {INSTALL}"
    if _release(versions[EXTENSION]) != _release(versions["torch"]):
        return f"{EXTENSION} {versions[EXTENSION]} does not fit torch {versions['torch']}; {INSTALL}"
    return None


def circumstances(versions: Mapping[str, str]) -> dict[str, str]:
    """All that the outcome of an import may depend on: versions, the processor, which copy, and how it is found."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [spec.origin if spec else None, torch.__file__]
    places = {
        f"file {number}": f"{file} of {os.stat(file).st_mtime_ns}"
        for number, file in enumerate(files)
        if file and os.path.exists(file)
    }
    loader = {name: os.environ[name] for name in ("LD_PRELOAD", "LD_LIBRARY_PATH") if name in os.environ}
    return {
        **versions,
        **places,
        **loader,
        "python": sys.version,
        "numpy": installed_version("numpy") or "",
        "transformers": installed_version("transformers") or "",
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_processor()}",
    }


def is_loaded() -> bool:
    """The extension is part of this process already."""
    return PACKAGE in sys.modules


@functools.cache
def load() -> tuple[ModuleType | None, str | None]:
    """The extension, imported; or None and why it can't be, in one line.

    Tried once: what has failed half-way through leaves native code behind that can't be loaded twice.
    """
    try:
        with quiet():
            return import_it(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the extension answers an old processor with sys.exit
        return None, first_line(error)


def import_it() -> ModuleType:
    """Import the extension, and put back what that replaces in torch's Python interface and in logging.

    Its notices go where it sends them, and it raises what it raises; :func:`load` does neither.
    """
    functions = [(owner, name, getattr(owner, name)) for owner, name in _REPLACED_ON_IMPORT]
    root, logger_class = logging.getLogger(), logging.getLoggerClass()
    level, handlers = root.level, root.handlers[:]
    from torch._inductor import config as inductor

    # The import would also start a pool of compiler processes, half a gigabyte that nobody here uses.
    threads, inductor.compile_threads = inductor.compile_threads, 1
    try:
        with _stand_ins():
            return importlib.import_module(PACKAGE)
    finally:
        inductor.compile_threads = threads
        for owner, name, function in functions:
            setattr(owner, name, function)
        logging.setLoggerClass(logger_class)
        root.setLevel(level)
        root.handlers[:] = handlers


class _Nothing(type):
    """The type of what is imported from a stand-in: a class, whose attributes are such classes again."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _StandIn(ModuleType):
    """An empty module in which every name can be found."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _Finder(MetaPathFinder, Loader):
    """Finds stand-ins for what is left out, and nothing else."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        left_out = any(f"{fullname}.".startswith(f"{name}.") for name in _LEFT_OUT)
        return ModuleSpec(fullname, self, is_package=True) if left_out else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Install the stand-ins for the block, and remove them after it, with all of an import that failed."""
    before, finder = _modules(), _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    except BaseException:
        for name in _modules().keys() - before.keys():
            del sys.modules[name]
        raise
    finally:
        sys.meta_path.remove(finder)
        for name, module in _modules().items():
            if isinstance(module, _StandIn):
                del sys.modules[name]
                continue
            for attribute, value in list(vars(module).items()):
                if isinstance(value, _StandIn | _Nothing):
                    delattr(module, attribute)


def _modules() -> dict[str, ModuleType]:
    return {name: module for name, module in list(sys.modules.items()) if f"{name}.".startswith(f"{PACKAGE}.")}


def _processor(path: str = "/proc/cpuinfo") -> str:
    """Name and, as a checksum, abilities of the first processor; a home directory may be that of many machines."""
    known: dict[str, str] = {}
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = (part.strip() for part in line.partition(":"))
            known.setdefault(name, value)
            if not name:  # the end of the first
                break
    return f"{known.get('model name', '')} {zlib.crc32(known.get('flags', '').encode())}"


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


@contextmanager
def quiet() -> Iterator[None]:
    """Send the extension's notices about itself to the log, at debug level.

    Some are written by C++ straight to the terminal, hence the detour over the file descriptor. That is the whole
    process's: for the seconds of an import or a packing, what other threads write to stderr goes to the log too. A
    process without a stderr has no terminal to keep clean, and where no file can be made the notices are let through.
    """
    with warnings.catch_warnings(), ExitStack() as opened:
        warnings.simplefilter("ignore")
        terminal, sink = -1, None
        if sys.stderr is not None and sys.__stderr__ is not None:
            with suppress(OSError):
                terminal = os.dup(2)
                opened.callback(os.close, terminal)
                sink = opened.enter_context(tempfile.TemporaryFile())
        if sink is None:
            yield
            return
        _flush()
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            _flush()
            os.dup2(terminal, 2)
            sink.seek(0)
            if notices := sink.read().decode(errors="replace").strip():
                logger.debug("%s says:\n%s", EXTENSION, notices)


def _flush() -> None:
    with suppress(AttributeError, OSError, ValueError):  # whatever stands there: closed, or no file at all
        sys.stderr.flush()
