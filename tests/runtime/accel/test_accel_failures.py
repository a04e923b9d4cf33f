"""Everything that can go wrong with Intel's extension costs a run nothing, and is an error for those who insist on it.

Each way to fail is a line of a table; the extension is a fake one, so that the tests run wherever torch does.
"""

import copy
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ppo_runtime import AutoModelForCausalLMWithValueHead
from ppo_runtime.accel import backends as accel
from ppo_runtime.accel import intel, probing
from ppo_runtime.accel.backends import AccelError, accelerate_frozen, choose
from ppo_runtime.assembly import make_reference
from ppo_runtime.cli import app
from ppo_runtime.common import extras
from ppo_runtime.config import PPOConfig
from tests.runtime.support.fake_extension import HEALTHY, installed, pretend
from tests.runtime.support.tiny import tiny_lora, tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed


def layers() -> nn.Module:
    """A frozen model with dropout, half of it in training mode: a fallback has to leave all of that alone."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 1, 1)))
    model[2].eval()
    model.register_buffer("counts", torch.arange(3))
    return model.requires_grad_(False)


def rows(model: nn.Module) -> Tensor:
    return model[2][0](model[1](model[0](torch.arange(12.0).view(3, 4))))


def nan(model: nn.Module) -> Tensor:
    return rows(model) * float("nan")


def unable(model: nn.Module) -> Tensor:
    raise IndexError("index out of range in self\nand a second line")


def of_dtype(dtype: torch.dtype) -> Callable[[], nn.Module]:
    return lambda: layers().to(dtype)


def convolution() -> nn.Module:
    return nn.Conv1d(1, 1, 1).requires_grad_(False)


def frozen(kind: type[nn.Sequential]) -> nn.Module:
    return kind(*layers()).requires_grad_(False)


class Uncopyable(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot pickle '_thread.lock' object")


class Headless(nn.Sequential):
    """As a wrapper that hands every call on to something which isn't there."""

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError("no head")


class Headed(nn.Sequential):
    """Its first layer is its output head, and can be reached under two names."""

    def get_output_embeddings(self) -> nn.Module:
        return self[0]


class Elsewhere(nn.Sequential):
    """Its parameters say that they are on a GPU, which no test machine needs to have for that."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for name, _ in super().named_parameters(*args, **kwargs):
            yield name, SimpleNamespace(device=torch.device("cuda:1"), dtype=torch.float32, requires_grad=False)


@attrs.frozen
class Case:
    says: str
    """What the reason has to contain."""
    does: str
    """And what it tells the user to do."""
    source: str = HEALTHY
    """Of the fake extension."""
    model: Callable[[], nn.Module] = layers
    outputs: Callable[[nn.Module], Tensor] = rows
    warns: bool = True
    """Something is broken that the user installed, which ``auto`` says aloud too; else the model just isn't suited."""
    probed: bool = False
    """It ends the process, which takes a second one (seconds) to find out."""


IMPORT, PACKING, MODEL = "ppo-core doctor", "set accel='eager'", "to have it packed"
ABORT = """
import os, sys
print('terminate called', file=sys.stderr, flush=True)
os.abort()
"""
HALFWAY = """
import torch
def optimize(model, **_):
    for parameter in model.parameters():
        parameter.fill_(7)
    model.train()
    torch.manual_seed(0)
    raise MemoryError
"""


def forward(expression: str) -> str:
    """A fake whose layers compute something else."""
    return HEALTHY.replace("return self.layer(x)", f"return {expression}")


def optimize(body: str) -> str:
    """A fake that packs in another way."""
    return f"def optimize(model, **_): {body}"


CASES = {
    "files missing": Case("ModuleNotFoundError: No module named 'intel_ex", IMPORT, f"import {intel.PACKAGE}.gone"),
    "ImportError": Case("ImportError: libfabric.so.1: ", IMPORT, "raise ImportError('libfabric.so.1: cannot open')"),
    "NameError": Case("NameError: name 'MoeModelOutputWithPast' is not", IMPORT, "MoeModelOutputWithPast"),
    "AttributeError": Case("AttributeError: module 'os' has no attribute 'exit'", IMPORT, "import os\nos.exit(127)"),
    "SystemExit": Case("SystemExit: only with AVX2", IMPORT, "import sys\nsys.exit('only with AVX2')"),
    "OSError": Case("OSError: 28", IMPORT, "raise OSError(28)"),
    "BaseException": Case(r"Odd: first\)", IMPORT, "class Odd(BaseException): pass\nraise Odd('first\\nsecond')"),
    "fails late": Case("SyntaxError: ", IMPORT, f"{HEALTHY}\nfrom . import fine, broken"),
    "SIGABRT": Case(r"ends the process \(SIGABRT, saying: terminate called\)", IMPORT, ABORT, probed=True),
    "no optimize": Case("AttributeError: module .* has no attribute 'optimize'", PACKING, ""),
    "packing raises": Case(r"OSError: no primitive\)", PACKING, optimize(r"raise OSError('no primitive\nx')")),
    "packing exits": Case("SystemExit: 1", PACKING, optimize("raise SystemExit(1)")),
    "packing fails halfway": Case("MemoryError", PACKING, HALFWAY),
    "packing packs nothing": Case("has no linear layer", PACKING, optimize("return model")),
    "packing returns nothing": Case("AttributeError: 'NoneType'", PACKING, optimize("pass")),
    "not copyable": Case("TypeError: cannot pickle", PACKING, model=lambda: Uncopyable(*layers())),
    "other numbers": Case("differ by .*, expected at most 0.001", PACKING, forward("self.layer(x) + 0.1")),
    "NaN": Case("differ by nan, expected at most 0.001", PACKING, forward("self.layer(x) * float('nan')")),
    "NaN of torch's own": Case("torch's own are not finite", PACKING, outputs=nan),
    "other shape": Case(r"the shape \(1, 8\), expected \(3, 8\)", PACKING, forward("self.layer(x[:1])")),
    "rows fail": Case(r"IndexError: index out of range in self\)", PACKING, outputs=unable),
    "bfloat16": Case("0.weight of Sequential is torch.bfloat16", MODEL, model=of_dtype(torch.bfloat16), warns=False),
    "float16": Case("is torch.float16", MODEL, model=of_dtype(torch.float16), warns=False),
    "float64": Case("is torch.float64", MODEL, model=of_dtype(torch.float64), warns=False),
    "on a GPU": Case("0.weight of Elsewhere is on cuda:1", MODEL, model=lambda: Elsewhere(*layers()), warns=False),
    "without storage": Case("no storage", "load the model's weights", model=lambda: layers().to("meta"), warns=False),
    "head can't be told": Case("NotImplementedError: no head", PACKING, model=lambda: frozen(Headless), warns=False),
    "nothing to pack": Case("Conv1d has no linear layer", "accel='eager'", model=convolution, warns=False),
}


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a fallback must not change."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "strides": {name: tensor.stride() for name, tensor in model.state_dict().items()},
        "training": [part.training for part in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "types": [type(part) for part in model.modules()],
    }


@pytest.mark.parametrize("name", CASES)
def test_auto_survives_and_strict_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    if not case.probed:
        monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    with installed(monkeypatch, tmp_path, case.source), caplog.at_level(logging.INFO, "ppo_runtime.accel.backends"):
        if name == "fails late":
            (tmp_path / intel.PACKAGE / "fine.py").write_text("")
            (tmp_path / intel.PACKAGE / "broken.py").write_text("def")
        model = case.model()
        before, finders, random = state(model), list(sys.meta_path), torch.get_rng_state()
        choice = choose("auto", strict=False)
        assert choice.backend == "ipex"
        same, final = accelerate_frozen(model, choice, case.outputs)
        assert same is model
        assert final.backend == "eager"
        assert torch.equal(torch.get_rng_state(), random)
        assert sys.meta_path == finders
        if case.does == IMPORT:
            assert [module for module in sys.modules if module.startswith(intel.PACKAGE)] == []
        after = state(model)
        for key in before["tensors"]:
            if not before["tensors"][key].is_meta:
                assert torch.equal(before["tensors"][key], after["tensors"][key]), key
        assert {**before, "tensors": None} == {**after, "tensors": None}
        with pytest.raises(AccelError) as refusal:
            accelerate_frozen(model, choose("ipex", strict=True), case.outputs)
    said = [record for record in caplog.records if record.name == "ppo_runtime.accel.backends"]
    assert [record.getMessage() for record in said] == [f"acceleration: {final.reason}"], "once"
    assert said[0].levelno == (logging.WARNING if case.warns else logging.INFO)
    assert final.reason.startswith("eager torch: ")
    assert "\n" not in final.reason
    for sentence in (final.reason, str(refusal.value)):
        assert re.search(case.says, sentence), sentence
        assert case.does in sentence
    assert "'ipex' is strict, but" in str(refusal.value)
    assert "accel_strict=False" in str(refusal.value)


def test_a_healthy_one_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's fake is broken by what the table says alone."""
    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    with installed(monkeypatch, tmp_path):
        model = layers()
        before = copy.deepcopy(state(model))
        packed, final = accelerate_frozen(model, choose("auto", strict=True), rows)
        assert packed is not model
        assert final.backend == "ipex"
        assert final.reason.endswith("; 2 linear layers packed")
        assert state(model)["training"] == before["training"]


def test_an_output_head_is_neither_copied_nor_shown_to_the_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = "seen = []\n" + HEALTHY.replace("assert not", "seen.extend(model.parameters())\n    assert not")
    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    with installed(monkeypatch, tmp_path, seen):
        model: Any = frozen(Headed)
        model.again = model[0]
        packed: Any = accelerate_frozen(model, choose("auto", strict=True), rows)[0]
        assert packed[0] is packed.again is model[0]
        assert type(packed[2][0]).__name__ == "Packed"
        shapes = [tuple(parameter.shape) for parameter in sys.modules[intel.PACKAGE].seen]
        assert shapes == [(8, 8), (8,), (1, 1, 1, 1), (1,)]


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("raise MemoryError", True),
        ("raise KeyboardInterrupt", True),
        ("raise OSError(24, 'Too many open files')", True),
        (optimize("raise RuntimeError('DefaultCPUAllocator: not enough memory')"), True),
        ("raise ImportError('libfabric.so.1')", False),
        (HEALTHY, False),
    ],
)
def test_the_try_tells_a_shortage_from_what_is_broken(
    source: str, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the other process does, in this one."""
    with installed(monkeypatch, tmp_path, source), torch.random.fork_rng(devices=[]):
        probing._answer("ppo_runtime.accel.backends:try_out")
    said = json.loads(capfd.readouterr().out)
    assert said["passes"] == passes
    assert (said["problem"] is None) == (source == HEALTHY)


def changed_source(module: Any) -> Callable[[pytest.MonkeyPatch, Path], None]:
    def change(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
        (place / "other.py").write_text(Path(module.__file__).read_text() + "# changed")
        monkeypatch.setattr(module, "__file__", str(place / "other.py"))

    return change


def another_numpy(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.0" if name == "numpy" else found(name))


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "importing": changed_source(intel),
    "packing": changed_source(accel),
    "trying": changed_source(probing),
    "what it is installed with": changed_source(extras),
    "numpy": another_numpy,
    "processor": lambda monkeypatch, place: monkeypatch.setattr(intel, "_processor", lambda: "another"),
    "preloaded": lambda monkeypatch, place: monkeypatch.setenv("LD_PRELOAD", ""),
    "searched": lambda monkeypatch, place: monkeypatch.setenv("LD_LIBRARY_PATH", str(place)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_holds_for_what_it_was_found_with(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(accel, "try_once", lambda target, circumstances, *, again: asked.append(circumstances))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for _ in range(2):
        accel.import_problem({})
    CHANGES[change](monkeypatch, tmp_path)
    accel.import_problem({})
    assert asked[0] == asked[1] != asked[2]


def test_a_processor_is_its_name_and_what_it_can(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    told = []
    for name, flags in (("A", "avx2"), ("A", "avx2 amx"), ("B", "avx2")):
        file.write_text(f"processor : 0\nmodel name\t: {name}\nflags : {flags}\n\nprocessor : 1\nmodel name : C\n")
        told.append(intel._processor(str(file)))
    assert len(set(told)) == 3
    assert told[1].startswith("A ")
    assert intel._processor(str(tmp_path / "none")).startswith(" ")


def test_torch_without_metadata_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {intel.EXTENSION: "2.8.0"})
    monkeypatch.setattr(torch, "__version__", "2.9.0a0+git1234")
    assert "2.8.0 does not fit torch 2.9.0a0+git1234" in choose("auto", strict=False).reason


@pytest.mark.parametrize("stream", ["closed", "none at all", "no file can be made"])
def test_notices_are_no_reason_to_fail(stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    with installed(monkeypatch, tmp_path):
        if stream == "closed":
            gone = open(tmp_path / "gone", "w")  # noqa: SIM115 - it is closed, which is the point
            gone.close()
            monkeypatch.setattr(sys, "stderr", gone)
        elif stream == "none at all":  # as under 2>&-
            monkeypatch.setattr(sys, "stderr", None)
            monkeypatch.setattr(os, "dup", lambda number: pytest.fail("descriptor 2 is another's"))
        else:
            monkeypatch.setattr(tempfile, "TemporaryFile", full)
        assert accelerate_frozen(layers(), choose("auto", strict=True), rows)[1].backend == "ipex"


def test_what_is_loaded_already_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(versions: dict[str, str]) -> None:
        raise AssertionError("a second process for what is in this one")

    monkeypatch.setattr(accel, "import_problem", never)
    with installed(monkeypatch, tmp_path):
        __import__(intel.PACKAGE)
        assert accelerate_frozen(layers(), choose("auto", strict=True), rows)[1].backend == "ipex"


def test_ctrl_c_during_the_import_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    with installed(monkeypatch, tmp_path, "raise KeyboardInterrupt"):
        for _ in range(2):  # nor is it remembered as an answer
            with pytest.raises(KeyboardInterrupt):
                accelerate_frozen(layers(), choose("auto", strict=False), rows)


PARTS = """
from . import llm
from .transformers import optimize_transformers
from .cpu.tpp.fused_bert import fast_bert
from .kept import Held, method
"""


def test_what_needs_transformers_is_left_out_and_can_be_imported_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    with installed(monkeypatch, tmp_path, HEALTHY + PARTS):
        package = tmp_path / intel.PACKAGE
        for part in ("llm", "transformers", "cpu/tpp"):
            (package / part).mkdir(parents=True)
            (package / part / "__init__.py").write_text("raise NameError('gone from transformers')")
        for empty in (package / "cpu", package / "cpu" / "tpp"):
            (empty / "__init__.py").write_text("")
        (package / "cpu" / "tpp" / "fused_bert.py").write_text("real = 1")
        (package / "kept.py").write_text(
            f"from {intel.PACKAGE}.llm.quantization.utils import Method\n"
            f"import {intel.PACKAGE}.transformers.models.cpu\n"
            "class Held: pass\ndef method(chosen=Method.FIRST): return Method"
        )
        assert accelerate_frozen(layers(), choose("auto", strict=True), rows)[1].backend == "ipex"
        extension = sys.modules[intel.PACKAGE]
        for name in ("llm", "transformers", "optimize_transformers", "fast_bert"):
            assert not hasattr(extension, name), name
        assert hasattr(extension, "Held")
        with pytest.raises(NameError):
            extension.method()  # loud, where a stand-in would compare unequal to everything in silence
        for name in ("llm", "transformers"):
            with pytest.raises(NameError, match="gone from transformers"):
                __import__(f"{intel.PACKAGE}.{name}")
        assert __import__(f"{intel.PACKAGE}.cpu.tpp.fused_bert").cpu.tpp.fused_bert.real == 1


def test_a_step_with_the_extension_is_the_step_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    for family in ("llama", "t5"):
        with installed(monkeypatch, tmp_path / family):
            packed = make_trainer(family, accel="ipex", accel_strict=True)
        assert packed.acceleration.backend == "ipex"
        plain = make_trainer(family)
        assert untimed(packed.step(*make_batch())).keys() == untimed(plain.step(*make_batch())).keys()
        for a, b in zip(packed.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(a, b), "the comparison at the start draws no random number"


def test_a_half_precision_reference_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "import_problem", lambda versions: None)
    reference = tiny_model("llama").to(torch.bfloat16)
    with installed(monkeypatch, tmp_path):
        trainer = make_trainer(ref_model=reference, accel="auto")
        with pytest.raises(AccelError, match=r"lm_head.*is torch.bfloat16|is torch.bfloat16.*dtype=torch.float32"):
            make_trainer(ref_model=reference, accel="ipex", accel_strict=True)
    assert trainer.acceleration.backend == "eager"
    assert "torch.bfloat16" in trainer.acceleration.reason
    assert trainer.step(*make_batch())["objective/kl"] == pytest.approx(0, abs=1)


def test_a_policy_that_is_its_own_reference_has_nothing_to_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy: Any = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=tiny_lora("llama"))
    with installed(monkeypatch, tmp_path):
        choice = make_reference(policy, None, None, PPOConfig(accel="ipex"))[2]
        with pytest.raises(AccelError, match="the policy itself without its adapter; a ref_model can be packed"):
            make_reference(policy, None, None, PPOConfig(accel="auto", accel_strict=True))
    assert (choice.backend, choice.reason.partition(",")[0]) == (
        "eager",
        "eager torch: the reference is the policy itself without its adapter; a ref_model can be packed or compiled",
    )
    (said,) = [record for record in caplog.records if record.name == "ppo_runtime.accel.backends"]
    assert (said.levelname, said.getMessage()) == ("WARNING", f"acceleration: {choice.reason}")


def test_the_command_line_insists_on_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, machine="arm64")
    result = CliRunner().invoke(app, ["demo", "--accel", "ipex", "--output", str(tmp_path / "run")])
    assert result.exit_code == 2
    said = " ".join((result.output + result.stderr).split())
    assert "'ipex' is strict, but intel-extension-for-pytorch runs on Linux on x86-64 only" in said
    assert "--accel auto" in said
    assert not isinstance(result.exception, AccelError), "a sentence, not a traceback"
