"""The decision is a table over versions and machines; what packing does is measured once, in a process of its own."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_runtime.accel import backends as accel
from tests.runtime.support.fake_extension import FITTING, pretend
from tests.runtime.support.tiny import tiny_lora
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

ROOT = Path(__file__).resolve().parents[3]
HERE = accel.choose("auto", strict=False)

needs_extension = pytest.mark.skipif(HERE.backend != "ipex", reason=f"needs the extension: {HERE.reason}")


OBSTACLES = [
    pytest.param({"versions": {"torch": "2.8.0"}}, "is not installed; .*pip install 'ppo-core.ipex.'", id="missing"),
    pytest.param(
        {"versions": {**FITTING, "torch": "2.13.0+cpu"}},
        "2.8.0 does not fit torch 2.13.0.*pip install 'ppo-core.ipex.'",
        id="newer torch",
    ),
    pytest.param({"versions": {**FITTING, "torch": "2.80.0"}}, "does not fit torch 2.80.0", id="digits are numbers"),
    pytest.param(
        {"versions": {"torch": "2.13.0"}, "python": "3.14.0"},
        "made for Python up to 3.13, and this is 3.14; use Python 3.13",
        id="no wheel for this Python",
    ),
    pytest.param({"capability": "DEFAULT"}, "needs a processor with AVX2, and torch reports DEFAULT", id="no AVX2"),
    pytest.param({"machine": "arm64"}, "Linux on x86-64 only, and this is Linux on arm64", id="arm64"),
    pytest.param({"system": "Darwin"}, "this is Darwin on x86_64", id="macOS"),
]


@pytest.mark.parametrize("requested", ["auto", "ipex"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("strict", [False, True])
def test_uses_the_extension_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, requested: accel.Requested, capability: str, strict: bool
) -> None:
    pretend(monkeypatch, capability=capability)
    choice = accel.choose(requested, strict=strict)
    assert (choice.requested, choice.strict, choice.backend) == (requested, strict, "ipex")
    assert choice.versions == FITTING


@pytest.mark.parametrize("requested", ["auto", "ipex"])
@pytest.mark.parametrize(("machine", "reason"), OBSTACLES)
def test_falls_back_and_says_why_or_refuses_when_strict(
    monkeypatch: pytest.MonkeyPatch, requested: accel.Requested, machine: dict, reason: str
) -> None:
    pretend(monkeypatch, **machine)
    choice = accel.choose(requested, strict=False)
    assert choice.backend == "eager"
    left_out = requested == "auto" and "versions" in machine and len(machine["versions"]) == 1
    said = reason.partition(";")[0] if left_out else reason
    assert re.search(f"^eager torch: .*{said}", choice.reason)
    assert not left_out or ";" not in choice.reason, "no advice to install what was left out"
    with pytest.raises(accel.AccelError, match=f"'{requested}' is strict, but .*{reason}.*accel_strict=False"):
        accel.choose(requested, strict=True)


def test_eager_is_never_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, versions={"torch": "2.13.0"})
    choice = accel.choose("eager", strict=True)
    assert choice.backend == "eager"
    assert "as requested" in choice.reason
    assert choice.versions == {"torch": "2.13.0"}


def test_an_unknown_request_is_refused() -> None:
    with pytest.raises(ValueError, match="requested is 'cuda', expected one of 'auto', 'eager', 'ipex'"):
        accel.choose("cuda", strict=False)


def test_choosing_never_imports_the_extension() -> None:
    code = (
        "import sys; from ppo_runtime.accel.backends import choose\n"
        "choose('auto', strict=False); choose('ipex', strict=False)\n"
        "assert not [name for name in sys.modules if name.startswith('intel_extension')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment())


def whole(model: nn.Module) -> Tensor:
    raise AssertionError("eager is compared with nothing")


def test_eager_gives_the_model_itself(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    choice = accel.choose("eager", strict=False)
    with caplog.at_level(logging.INFO, logger="ppo_runtime.accel.backends"):
        same, final = accel.accelerate_frozen(model, choice, whole)
    assert same is model
    assert final == choice
    assert [record.getMessage() for record in caplog.records] == ["acceleration: eager torch, as requested"]


def test_a_fallback_from_an_explicit_request_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, machine="arm64")
    accel.accelerate_frozen(nn.Linear(2, 2).requires_grad_(False), accel.choose("ipex", strict=False), whole)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("requested", ["eager", "auto"])
def test_a_trainable_model_is_refused_on_every_machine(requested: accel.Requested) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"2 parameters that require grad \(the first: 1.weight\).*requires_grad_"):
        accel.accelerate_frozen(model, accel.choose(requested, strict=False), whole)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What MEASURE prints: one import of the extension, in a fresh process in which warnings are errors."""
    script = tmp_path_factory.mktemp("accel") / "measure.py"
    script.write_text(MEASURE)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


@needs_extension
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_packed_llama_agrees_with_eager(facts: dict, model: str) -> None:
    assert facts[model]["difference"] < 1e-5
    assert facts[model]["reason"].endswith("; 14 linear layers packed")
    assert facts[model]["backend"] == "ipex"


@needs_extension
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_output_head_stays_plain(facts: dict, model: str) -> None:
    assert facts[model]["head_is_plain"]


@needs_extension
def test_nothing_packed_is_a_fallback_and_said(facts: dict) -> None:
    assert facts["gpt2"]["same_model"]
    assert facts["gpt2"]["backend"] == "eager"
    assert "GPT2LMHeadModel has no linear layer that" in facts["gpt2"]["reason"]
    assert "is strict, but GPT2LMHeadModel has no linear layer" in facts["gpt2"]["strict"]


@needs_extension
def test_training_after_the_import_gives_equal_results(facts: dict) -> None:
    # Not equal bits: the extension brings its own kernels for sum and mean.
    assert facts["training_difference"] < 1e-6


@needs_extension
def test_the_import_needs_nothing_of_transformers() -> None:
    """Whatever a release of it takes away, the extension's import can't see it."""
    code = (
        "import sys; sys.modules['transformers'] = None\nfrom ppo_runtime.accel import backends\n"
        "problem = backends.try_out(); assert problem is None, problem\n"
        "assert not hasattr(sys.modules['intel_extension_for_pytorch'], 'llm')\n"
        "import intel_extension_for_pytorch.llm as real; assert real.__file__"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment())


@needs_extension
def test_import_leaves_torch_transformers_and_logging_in_place_and_the_terminal_quiet(facts: dict) -> None:
    assert facts["replaced"] == []
    assert facts["stand-ins"] == []
    assert facts["logging"] == ["Logger", logging.WARNING, 0]
    # One line, which Python's handler of last resort prints where no logging is set up: our own fallback.
    assert facts["stderr"].splitlines() == [f"acceleration: {facts['gpt2']['reason']}"]


MEASURE = '''
import json
import logging
import sys
import types
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from ppo_runtime.accel.backends import accelerate_frozen, choose

PUBLIC = {
    "torch": torch, "nn.functional": torch.nn.functional, "jit": torch.jit, "Tensor": torch.Tensor,
    "tokenizer": transformers.PreTrainedTokenizerBase, "dynamic modules": transformers.dynamic_module_utils,
    "utils": transformers.utils, "file utils": transformers.file_utils,
}
ids = torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(0))
where = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(17).expand(3, 17)}


def llama(tied):
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    ))


def gpt2_model():
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


def train():
    """Losses and gradients of a model with RMS norm and one with layer norm, for which the extension has kernels."""
    results = []
    for model in (llama(False), gpt2_model().eval()):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results += [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    return results


def replaced():
    """Public functions of torch whose code now lies in the extension (functools.wraps hides that, globals don't)."""
    return [
        f"{owner}.{name}"
        for owner, module in PUBLIC.items() for name in dir(module)
        if isinstance(function := getattr(module, name), types.FunctionType)
        and function.__globals__["__name__"].startswith("intel_extension")
    ]


def score(model, head):
    with torch.no_grad():
        return torch.log_softmax(model.model(input_ids=ids, **where)[0] @ head.weight.T, -1)


def logits(model):
    return model(input_ids=ids).logits


facts = {}
choice = choose("ipex", strict=True)
train_before = train()
for name, tied in {"untied": False, "tied": True}.items():
    plain = llama(tied).eval().requires_grad_(False)
    packed, final = accelerate_frozen(plain, choice, lambda model: score(model, plain.lm_head))
    facts[name] = {
        "backend": final.backend,
        "reason": final.reason,
        "head_is_plain": packed.lm_head.weight is plain.lm_head.weight,
        "difference": (score(packed, packed.lm_head) - score(plain, plain.lm_head)).abs().max().item(),
    }
gpt2 = gpt2_model().eval().requires_grad_(False)
same, final = accelerate_frozen(gpt2, choose("ipex", strict=False), logits)
facts["gpt2"] = {"same_model": same is gpt2, "backend": final.backend, "reason": final.reason}
try:
    accelerate_frozen(gpt2, choice, logits)
except RuntimeError as error:
    facts["gpt2"]["strict"] = str(error)
facts["training_difference"] = max((a - b).abs().max().item() for a, b in zip(train_before, train()))
facts["replaced"] = replaced()
facts["stand-ins"] = [
    f"{module.__name__}.{name}"
    for module in list(sys.modules.values()) if getattr(module, "__name__", "").startswith("intel_extension")
    for name, value in vars(module).items()
    if type(module).__module__ == "ppo_runtime.accel.intel" or type(value).__module__ == "ppo_runtime.accel.intel"
]
facts["logging"] = [logging.getLoggerClass().__name__, logging.root.level, len(logging.root.handlers)]
print(json.dumps(facts))
'''


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@pytest.mark.parametrize(
    "settings", [{"num_shared_layers": 1}, {"peft_config": tiny_lora()}, {}], ids=["shared", "adapter", "whole"]
)
def test_a_step_with_whatever_auto_takes_is_one_in_eager_torch(settings: dict[str, Any]) -> None:
    """A packed reference, where there is one, has none of the policy's layers, and no gradient."""
    found = []
    for requested in ("auto", "eager"):
        trainer = make_trainer("gpt2", accel=requested, **settings)
        found.append(untimed(trainer.step(*make_batch())))
    for name, value in found[1].items():
        torch.testing.assert_close(
            torch.as_tensor(found[0][name]), torch.as_tensor(value), rtol=1e-2, atol=1e-3, equal_nan=True, msg=name
        )
