"""``import ppo_core`` costs torch, attrs and jaxtyping, and nothing else."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires

from packaging.requirements import Requirement

ROOTS = ("torch", "attrs", "jaxtyping")

PROBE = """
import sys, importlib.abc, importlib.metadata

allowed = set(sys.argv[1].split(","))

class Only(importlib.abc.MetaPathFinder):
    finders = list(sys.meta_path)
    find_distributions = importlib.metadata.MetadataPathFinder.find_distributions

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top in sys.stdlib_module_names:
            found = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in found if spec), None)

sys.meta_path[:] = [Only()]
import pkgutil, importlib
import ppo_core
for module in pkgutil.iter_modules(ppo_core.__path__):
    importlib.import_module(f"ppo_core.{module.name}")
print(",".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def closure(names):
    """The distributions that some distributions need, themselves included."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:  # for another platform
            continue
        waiting += [r.name for r in map(Requirement, needs) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def allowed():
    """Top-level modules of what torch, attrs and jaxtyping bring along."""
    tops = set()
    for name in closure(ROOTS):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:  # for another platform
            continue
        tops |= {file.parts[0].removesuffix(".py") for file in files}
    return tops | {"ppo_core"}


def imported(modules):
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(sorted(modules))], capture_output=True, text=True, timeout=300
    )
    assert probe.returncode == 0, probe.stderr[-2000:]
    return set(probe.stdout.strip().split(","))


def test_the_core_imports_only_what_it_needs():
    """With everything else out of reach, every module of ppo_core can be imported."""
    modules = imported(allowed())
    assert {"ppo_core", "torch", "attr", "jaxtyping"} <= modules
    assert not modules & {"ppo_runtime", "transformers", "datasets", "numpy", "hypothesis", "beartype", "scipy"}


def test_a_trainer_does_without_tables():
    """Importing the trainer costs none of the 100 MiB of libraries that only some of its users' prompts lie in."""
    probe = "import sys; from ppo_runtime import PPOTrainer; print({'datasets', 'pandas', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
