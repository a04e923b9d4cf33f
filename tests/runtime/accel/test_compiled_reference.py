"""A reference whose layers are compiled: what it computes, of whose tensors, and what comes of it where that fails.

Compiling takes tens of seconds for a graph, so few tests do it; the others put something else in the compiler's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ppo_runtime import AutoModelForCausalLMWithValueHead, PPOConfig
from ppo_runtime.accel.backends import AccelError, accelerate_frozen, choose
from ppo_runtime.accel.compiled import compiled_twin
from ppo_runtime.assembly import make_reference
from ppo_runtime.models.heads import hidden_states
from tests.operations import Operations
from tests.runtime.support.tiny import tiny_lora, tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


Pass = Callable[..., Any]


class Compiler:
    """Stands in for torch.compile: passes through it are counted, and fail or go astray where told to."""

    def __init__(self) -> None:
        self.passes = 0
        self.error: Exception | None = None
        self.shift = 0.0
        self.options: list[dict[str, Any]] = []

    def __call__(self, plain: Pass, **options: Any) -> Pass:
        self.options.append(options)

        def compiled(*args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            if self.error is not None:
                raise self.error
            output = plain(*args, **kwargs)
            return (output[0] + self.shift, *output[1:]) if isinstance(output, tuple) else output + self.shift

        return compiled


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    stand_in = Compiler()
    monkeypatch.setattr(torch, "compile", stand_in)
    return stand_in


def names(model: nn.Module) -> list[str]:
    return [*model.state_dict(), *(name for name, _ in model.named_modules())]


def check_steps(family: str, **more: Any) -> None:
    """Steps beside a compiled reference are those beside the eager one."""
    fast, plain = make_trainer(family, accel="compile", accel_strict=True, **more), make_trainer(family, **more)
    assert fast.acceleration.backend == "compile"
    assert fast.acceleration.reason.endswith(f"; {4 if family == 't5' else 2} layers compiled")
    for seed in range(3):
        mine, theirs = (untimed(trainer.step(*make_batch(seed=seed))) for trainer in (fast, plain))
        for name in ("objective/ref_logprobs", "objective/kl", "ppo/loss/total"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert names(fast.ref_model) == names(plain.ref_model)


@pytest.mark.compiled
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_steps_beside_a_compiled_reference_are_the_eager_ones(family: str) -> None:
    check_steps(family)
    if family == "llama":
        check_steps(family, num_shared_layers=1)
    # Padded rows, rows end to end and a row alone, of one layer that stands for all; for T5 of either stack's two.
    assert counters["stats"]["unique_graphs"] <= (6 if family == "t5" else 3)


@pytest.mark.compiled
def test_without_a_compiler_eager_torch_runs_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    cpp_builder.cpp_compiler_search.cache_clear()
    trainer = make_trainer(accel="compile")
    assert trainer.acceleration.backend == "eager"
    assert "LlamaForCausalLM could not be compiled (" in trainer.acceleration.reason
    assert "InvalidCxxCompiler: No working C++ compiler" in trainer.acceleration.reason
    assert "a C++ compiler (g++) and Python's headers are installed, or do without" in trainer.acceleration.reason
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_reference_alone_is_compiled_with_dynamic_shapes(family: str, compiler: Compiler) -> None:
    check_steps(family)
    assert compiler.options == [{"dynamic": True}] * (4 if family == "t5" else 2)
    assert compiler.passes > 0


def test_layers_shared_with_the_policy_are_left_out_of_a_pass(compiler: Compiler) -> None:
    """The reference goes on from what they have made for the policy; the others stay compiled."""
    counts: list[int] = []
    for shared in (None, 1):
        trainer = make_trainer(accel="compile", accel_strict=True, num_shared_layers=shared)
        compiler.passes = 0
        trainer.step(*make_batch())
        counts.append(compiler.passes)
    assert counts[0] == 2 * counts[1] > 0, "one of two layers"
    check_steps("llama", num_shared_layers=1)


def test_what_the_reference_holds_is_what_is_computed_with(compiler: Compiler) -> None:
    model = tiny_model("gpt2").eval().requires_grad_(False)
    twin, ids = compiled_twin(model)[0], torch.arange(6).reshape(2, 3)
    assert [*map(id, twin.parameters())] == [*map(id, model.parameters())]
    assert [*map(id, twin.buffers())] == [*map(id, model.buffers())]
    assert not any("forward" in vars(part) for part in model.modules())
    other = tiny_model("gpt2").requires_grad_(False)
    for parameter in other.parameters():
        parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(hidden_states(twin, ids, None), hidden_states(other.eval(), ids, None))
    assert compiler.passes == 2


def test_passes_that_a_graph_would_get_wrong_are_eager(compiler: Compiler) -> None:
    twin = compiled_twin(tiny_model("llama").requires_grad_(False))[0]
    part = twin.get_submodule("model.layers.0.mlp")
    seen: list[Any] = []

    def passes() -> int:
        before = compiler.passes
        with torch.no_grad():
            hidden_states(twin, torch.arange(6).reshape(2, 3), None)
        return compiler.passes - before

    assert passes() == 2
    hidden_states(twin, torch.arange(6).reshape(2, 3), None)
    assert compiler.passes == 2, "with gradients, as the search for frozen layers is made"
    with Operations() as operations:
        assert passes() == 0, "an operator inside a graph is not seen"
    assert operations.ran
    hook = part.register_forward_hook(lambda *_: seen.append(None))
    assert (passes(), len(seen)) == (1, 1)
    hook.remove()
    vars(part)["forward"] = lambda hidden, *_, **__: seen.append(None) or hidden
    assert (passes(), len(seen)) == (1, 2)
    del vars(part)["forward"]
    assert passes() == 2


@pytest.mark.parametrize(
    ("error", "shift", "said"),
    [
        (
            RuntimeError("no\nroom"),
            0.0,
            r"LlamaForCausalLM could not be compiled \(RuntimeError: no\); see that a C\+\+",
        ),
        (None, 0.5, r"LlamaForCausalLM compiled is not what it was .*; set accel='eager' for it"),
        (None, float("nan"), r"LlamaForCausalLM compiled is not what it was \(its outputs differ by nan"),
    ],
    ids=["fails", "differs", "no numbers"],
)
def test_what_fails_or_differs_is_a_fallback_or_an_error(
    error: Exception | None, shift: float, said: str, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.error, compiler.shift = error, shift
    with pytest.raises(AccelError, match=f"'compile' is strict, but {said}.*accel_strict=False"):
        make_trainer(accel="compile", accel_strict=True)
    caplog.clear()
    trainer, plain = make_trainer(accel="compile"), make_trainer()
    (record,) = [record for record in caplog.records if "could not" in record.message or "is not" in record.message]
    assert record.levelname == "WARNING"
    assert record.getMessage() == f"acceleration: {trainer.acceleration.reason}"
    assert trainer.acceleration.backend == "eager"
    mine, theirs = (untimed(one.step(*make_batch())) for one in (trainer, plain))
    assert mine["ppo/loss/total"] == theirs["ppo/loss/total"]


def test_a_shape_that_fails_later_costs_no_run_unless_compiling_is_insisted_on(
    compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, strict, plain = (
        make_trainer(accel="compile"),
        make_trainer(accel="compile", accel_strict=True),
        make_trainer(),
    )
    compiler.error, compiler.passes = RuntimeError("another shape"), 0
    mine, theirs = (untimed(one.step(*make_batch())) for one in (trainer, plain))
    assert mine["ppo/loss/total"] == theirs["ppo/loss/total"]
    assert compiler.passes == 1
    assert (
        "eager torch from here on: LlamaDecoderLayer failed compiled (RuntimeError: another shape); see that"
        in caplog.text
    )
    with pytest.raises(RuntimeError, match="another shape"):
        strict.step(*make_batch())


def test_a_model_without_layers_is_left_to_eager_torch(compiler: Compiler) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.model.layers = nn.Sequential()
    same, choice = accelerate_frozen(model, choose("compile", strict=False), lambda _: torch.zeros(1))
    assert same is model
    assert "LlamaForCausalLM keeps no list of layers to compile; accel='eager' is the same for it" in choice.reason
    assert not compiler.options


def test_a_policy_that_is_its_own_reference_is_not_compiled(compiler: Compiler) -> None:
    policy: Any = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=tiny_lora("llama"))
    choice = make_reference(policy, None, None, PPOConfig(accel="compile"))[2]
    assert choice.backend == "eager"
    assert "the policy itself without its adapter; a ref_model can be packed or compiled" in choice.reason
    assert not compiler.options


def test_auto_never_compiles(compiler: Compiler) -> None:
    assert choose("auto", strict=False).backend != "compile"
    assert choose("compile", strict=True).backend == "compile"
