"""TRL's import lines, with its name replaced by ours."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import ppo_runtime
import ppo_runtime.compat as trl
from ppo_runtime.compat import elsewhere

LINES = (
    "from {} import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer",
    "from {} import PreTrainedModelWrapper, create_reference_model, set_seed, is_peft_available, is_xpu_available",
    "from {} import is_bitsandbytes_available, is_diffusers_available, is_wandb_available, is_npu_available",
    "from {} import core, import_utils, models, trainer, extras, environment",
    "from {}.core import LengthSampler, masked_mean, masked_var, masked_whiten, respond_to_batch, set_seed, whiten",
    "from {}.core import clip_by_value, convert_to_scalar, entropy_from_logits, flatten_dict, logprobs_from_logits",
    "from {}.core import stack_dicts, stats_to_np",
    "from {}.import_utils import is_npu_available, is_xpu_available, is_rich_available, is_torchvision_available",
    "from {}.import_utils import is_unsloth_available",
    "from {}.models import SUPPORTED_ARCHITECTURES, AutoModelForCausalLMWithValueHead, create_reference_model",
    "from {}.models.modeling_base import PreTrainedModelWrapper, create_reference_model",
    "from {}.models.modeling_value_head import AutoModelForCausalLMWithValueHead, ValueHead",
    "from {}.trainer import AdaptiveKLController, FixedKLController, PPOConfig, PPOTrainer",
    "from {}.trainer.ppo_config import PPOConfig",
    "from {}.trainer.ppo_trainer import PPOTrainer",
    "from {}.trainer.utils import AdaptiveKLController, FixedKLController",
    "from {}.trainer import ppo_config, ppo_trainer, utils",
    "from {}.models import modeling_base, modeling_value_head",
)


@pytest.mark.parametrize("line", LINES)
def test_an_old_import_line_works(line: str) -> None:
    exec(line.format("ppo_runtime.compat"), {})


@pytest.mark.parametrize("line", LINES)
def test_it_works_first_of_all(line: str) -> None:
    """In a process that has imported nothing yet; two lines stand for all, since each costs seconds."""
    if line not in (LINES[0], LINES[-1]):
        return
    subprocess.run([sys.executable, "-c", line.format("ppo_runtime.compat")], check=True, timeout=240)


def test_it_can_stand_for_the_reference() -> None:
    assert trl.PPOTrainer is ppo_runtime.PPOTrainer
    assert trl.core.LengthSampler is ppo_runtime.LengthSampler
    assert all(getattr(trl, name) is getattr(ppo_runtime, name) for name in ppo_runtime.__all__)
    from ppo_runtime import core, import_utils

    assert core is trl.core
    assert isinstance(import_utils.is_peft_available(), bool)


@pytest.mark.parametrize(
    "name",
    [
        "trainer.ppo_config",
        "trainer.ppo_trainer",
        "trainer.utils",
        "models.modeling_base",
        "models.modeling_value_head",
    ],
)
def test_a_submodule_is_an_attribute(name: str) -> None:
    outer, inner = name.split(".")
    assert getattr(getattr(trl, outer), inner) is importlib.import_module(f"ppo_runtime.compat.{name}")


def test_the_lists_of_names_are_one() -> None:
    """The outermost one is written out, so that it can be read before torch is imported."""
    assert sorted(trl.__all__) == sorted(set(ppo_runtime.__all__) - set(ppo_runtime._HOMES))
    assert sorted(trl.core.__all__) == sorted({*trl.__all__, "set_seed"})
    assert all(getattr(trl.core, name) is getattr(ppo_runtime, name) for name in trl.core.__all__)


def test_functions_that_look_around_answer() -> None:
    functions = [name for name in vars(trl.import_utils) if name.startswith("is_")]
    assert len(functions) > 7
    assert all(isinstance(getattr(trl.import_utils, name)(), bool) for name in functions)


def test_what_was_made_unimportable_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert not trl.is_peft_available()


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_package_for_a_device_needs_both(installed: bool, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.import_utils, "can_be_found", lambda _: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: there), raising=False)
    assert trl.is_bitsandbytes_available() == trl.is_npu_available() == (installed and there)


@pytest.mark.parametrize("module", ["ppo_runtime", "ppo_runtime.compat", "ppo_runtime.compat.core"])
@pytest.mark.parametrize("name", sorted(elsewhere.ELSEWHERE))
def test_what_is_not_here_says_what_became_of_it(module: str, name: str) -> None:
    with pytest.raises(ImportError) as refusal:
        exec(f"from {module} import {name}", {})
    assert str(refusal.value) == f"{name} {elsewhere.ELSEWHERE[name]}"


@pytest.mark.parametrize("module", ["ppo_runtime", "ppo_runtime.compat", "ppo_runtime.compat.core"])
@pytest.mark.parametrize("name", sorted(elsewhere.ELSEWHERE))
def test_what_is_not_here_is_not_there_for_who_asks(module: str, name: str) -> None:
    """Libraries ask so for what a version has; an AttributeError with the same text otherwise."""
    found = importlib.import_module(module)
    assert not hasattr(found, name)
    assert getattr(found, name, None) is None
    with pytest.raises(AttributeError) as refusal:
        eval(f"found.{name}", {"found": found})
    assert str(refusal.value) == f"{name} {elsewhere.ELSEWHERE[name]}"


@pytest.mark.parametrize("module", ["ppo_runtime", "ppo_runtime.compat.core"])
def test_it_says_so_in_a_function_and_in_a_long_script(module: str) -> None:
    """The instruction that asks is found wherever it stands, and however many names come before its own."""
    names = "\n    ".join(f"name_{number} = {number}.5" for number in range(300))
    script = f"def load():\n    {names}\n    global PPOConfig, SFTTrainer\n    from {module} import SFTTrainer\nload()"
    with pytest.raises(ImportError, match="SFTTrainer is no part of PPO training"):
        exec(script, {})
    many = "\n".join(f"name_{number} = {number}.5" for number in range(300))
    with pytest.raises(ImportError, match="SFTTrainer is no part of PPO training"):
        exec(f"{many}\nfrom {module} import SFTTrainer as trainer", {})


@pytest.mark.parametrize(
    ("module", "name"), [("extras", "BestOfNSampler"), ("environment", "TextEnvironment"), ("trainer", "SFTTrainer")]
)
def test_modules_of_other_things_say_so(module: str, name: str) -> None:
    with pytest.raises(ImportError, match=name):
        exec(f"from ppo_runtime.compat.{module} import {name}", {})


@pytest.mark.parametrize("module", ["ppo_runtime", "ppo_runtime.compat", "ppo_runtime.compat.models"])
def test_an_unknown_name_is_an_attribute_error(module: str) -> None:
    found = importlib.import_module(module)
    for name in ("PPOTrainr", "__wrapped__", "is_nothing_available"):
        assert not hasattr(found, name)
    with pytest.raises(ImportError, match="cannot import name 'PPOTrainr'"):
        exec(f"from {module} import PPOTrainr", {})


def test_a_name_with_a_dot_is_no_attribute() -> None:
    for name in ("foo.bar", "config.PPOConfig", "", "a b"):
        assert not hasattr(ppo_runtime, name)
        assert not hasattr(trl, name)


def test_advice_names_what_exists() -> None:
    """Dotted names of ours in the advice can be imported."""
    import re

    for text in elsewhere.ELSEWHERE.values():
        for module, attribute in re.findall(r"(ppo_(?:core|runtime)\.\w+)\.(\w+)", text):
            assert hasattr(importlib.import_module(module), attribute), (module, attribute)
