"""Another forward pass for the length of a block: nothing of it counts afterwards, wherever an interrupt comes."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

import ppo_runtime
from ppo_runtime.accel import heap, onednn, products
from ppo_runtime.models import stand_ins
from ppo_runtime.models.bottom import recorded, replayed
from ppo_runtime.models.modes import dropout_off, without_dropout
from ppo_runtime.models.precision import own_precision
from ppo_runtime.models.stand_ins import has_own_forward, standing_in
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer

OURS = str(Path(ppo_runtime.__file__).parent)
Block = Callable[[Any], AbstractContextManager[Any]]
BLOCKS: dict[str, Block] = {
    "packed": onednn.packed,
    "fast_products": lambda model: products.fast_products(model, "onednn"),
    "replayed": lambda model: replayed(model, 1, torch.ones(2, 5, 64)),
    "recorded": lambda model: recorded(model, 1),
    "dropout_off": dropout_off,
    "without_dropout": without_dropout,
    "own_precision": lambda _: own_precision(torch.device("cpu")),
}
needs_onednn = pytest.mark.skipif(onednn.obstacle(nn.Linear(64, 64)) is not None, reason="no oneDNN operators")


class Interrupt(KeyboardInterrupt):
    pass


def interrupted(act: Callable[[], Any], moment: int) -> bool:
    """Act, with an interrupt at one of the lines of the package that are run; whether there are as many."""
    lines = 0

    def local(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == moment:
                raise Interrupt
        return local

    former = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(OURS) else None)
    try:
        act()
    except Interrupt:
        return True
    finally:
        sys.settrace(former)
    return False


def made() -> Any:
    model = tiny_model("llama", dropout=0.1, hidden_size=64, intermediate_size=128).train()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.model.layers[1].mlp.up_proj.eval()
    return model


def state(model: Any) -> Any:
    """Whatever a block may change."""
    parts = [{name: value for name, value in vars(part).items() if name[0] != "_"} for part in model.modules()]
    hooks = [list(part._forward_hooks.values()) for part in model.modules()]
    flags = [(p.requires_grad, p.dtype) for p in model.parameters()]
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), products.current_product()
    return copy.copy(parts), model.config.to_dict(), hooks, flags, modes


@pytest.fixture(params=[torch.float32, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@needs_onednn
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("default_dtype")
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entering and leaving, and after the next time too."""
    monkeypatch.setattr(products, "obstacle", lambda requested: None)
    model = made()
    before = state(model)

    def act() -> None:
        with BLOCKS[name](model):
            pass

    moment = 1
    while interrupted(act, moment):
        assert state(model) == before, moment
        act()
        assert state(model) == before, moment
        moment += 1
    assert moment > 8


@needs_onednn
@pytest.mark.parametrize("name", ["packed", "fast_products", "replayed"])
def test_what_is_left_behind_all_the_same_counts_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was taken away, as by one interrupt after the other."""
    monkeypatch.setattr(products, "obstacle", lambda requested: None)
    monkeypatch.setattr(products, "SMALLEST", 1)
    model = made().eval()
    ids = torch.arange(10).reshape(2, 5)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    def leave_behind() -> None:
        def interrupt(self: Any) -> None:
            raise Interrupt

        with monkeypatch.context() as patched:
            patched.setattr(stand_ins._StandIn, "take_away", interrupt)
            with pytest.raises(Interrupt), BLOCKS[name](model):
                pass

    before = state(model)
    leave_behind()
    assert state(model) != before
    leave_behind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    fresh = made().eval()
    fresh.load_state_dict(model.state_dict())
    with BLOCKS[name](model), BLOCKS[name](fresh):
        torch.testing.assert_close(logits(), fresh(ids).logits, rtol=1e-4, atol=1e-4)
    assert state(model) == before
    leave_behind()
    with torch.no_grad():
        assert torch.equal(logits(), fresh(ids).logits)
    assert state(model) == before


def test_blocks_within_blocks_and_somebody_elses_forward() -> None:
    layer: Any = nn.Linear(2, 2)
    layer.flag = True
    inputs, own = torch.ones(1, 2), lambda rows: rows * 3
    plain = layer(inputs)
    with standing_in([layer], lambda _: lambda rows: rows, flag=False, other=False):
        assert has_own_forward(layer)
        assert torch.equal(layer(inputs), inputs)
        assert not layer.flag
        assert not hasattr(layer, "other")
        with standing_in([layer], lambda _: lambda rows: rows * 2):
            assert torch.equal(layer(inputs), inputs * 2)
        assert torch.equal(layer(inputs), inputs)
    assert torch.equal(layer(inputs), plain)
    assert layer.flag
    assert not has_own_forward(layer)
    layer.forward = own
    with standing_in([layer], lambda _: lambda rows: rows):
        pass
    assert layer.forward is own
    with standing_in([layer], lambda _: lambda rows: rows):
        layer.forward = own  # put there meanwhile
    assert layer.forward is own


def test_a_copy_of_a_layer_with_something_left_behind_computes_its_own() -> None:
    layer: Any = nn.Linear(2, 2)
    gone = stand_ins._Block()
    stand_ins._StandIn(layer, lambda rows: rows, ref(gone), {}, {}).put()
    del gone
    assert not has_own_forward(layer)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(twin(torch.ones(1, 2)), twin.bias[None])
    assert not torch.equal(layer(torch.ones(1, 2)), layer.bias[None])


@needs_onednn
@pytest.mark.parametrize("block", ["packed", "fast_products", "dropout_off"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_made_inside_a_block_has_layers_of_its_own(
    block: str, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALLEST", 0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Dropout(0.5)).train()
    rows = torch.ones(4, 64)
    with BLOCKS[block](model), torch.no_grad():
        theirs = copied(model)
        for parameter in theirs.parameters():
            parameter.zero_()
        assert not theirs(rows).any()
        assert model[0](rows).any()
        again = copied(theirs)
    assert "forward" not in vars(theirs[0])
    assert not again[0](rows).any()
    assert model[0](rows).any()


def test_an_interrupted_heap_is_as_usual_after_the_next_block(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_mallopt", lambda: lambda name, value: told.append((name, value)))
    for name in heap._CHOICES:
        monkeypatch.delenv(name, raising=False)

    def act() -> None:
        with heap.freed_memory_kept():
            pass

    moment = 1
    while interrupted(act, moment):
        act()
        assert told[-2:] == [(heap._M_MMAP_THRESHOLD, heap._USUAL_MMAP), (heap._M_TRIM_THRESHOLD, heap._USUAL_TRIM)]
        moment += 1
    assert moment > 5


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_step_computes_its_gradients_wherever_it_is_called(around: Any) -> None:
    batch = make_batch()
    plain, inside = make_trainer(num_shared_layers=1), make_trainer(num_shared_layers=1)
    plain.step(*batch)
    with around():
        inside.step(*batch)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    for mine, theirs in zip(inside.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
