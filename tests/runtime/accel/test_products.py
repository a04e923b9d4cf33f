"""Products by oneDNN: what they compute, forward and backward, where they are left to torch, and that nothing stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ppo_runtime.accel import products
from ppo_runtime.accel.backends import AccelError
from ppo_runtime.accel.onednn import packed
from ppo_runtime.accel.products import current_product, fast_products, obstacle, product, rounded
from tests.operations import Operations
from tests.runtime.support.tiny import CAUSAL_FAMILIES, tiny_lora, tiny_model
from tests.runtime.support.trainers import make_batch, make_trainer, untimed

pytestmark = pytest.mark.usefixtures("torchs_layer_norm")

here = pytest.mark.skipif(obstacle("onednn") is not None, reason="no products by oneDNN")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size are oneDNN's, for models as small as these."""
    monkeypatch.setattr(products, "SMALLEST", 1)


def by_onednn(operations: Operations) -> int:
    return operations.count("_linear_pointwise")


def layers(bias: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    turned = Conv1D(160, 96)
    with torch.no_grad():
        turned.bias.normal_()
    return {"linear": nn.Linear(96, 160, bias=bias), "turned": turned}


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rows", [(1,), (7,), (129,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "turned"])
def test_a_layer_and_its_gradients_are_what_they_are(rows: tuple[int, ...], bias: bool, kind: str) -> None:
    """Against the same layer in float64, from inputs and gradients that lie in rows, in columns and in one place."""
    layer = layers(bias)[kind]
    exact = copy.deepcopy(layer).double()
    for lay in (
        lambda x: x,
        lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        lambda x: x[..., :1].expand_as(x),
        lambda x: torch.stack((x, x), -1)[..., 0],
    ):
        inputs, gradient = lay(torch.randn(*rows, 96)), lay(torch.randn(*rows, 160))
        leaf, exact_leaf = inputs.detach().requires_grad_(), inputs.double().contiguous().requires_grad_()
        with fast_products(layer, "onednn"), Operations() as operations:
            found = layer(leaf)
            grads = torch.autograd.grad(found, (leaf, *layer.parameters()), gradient)
        assert by_onednn(operations) == 3
        assert found.shape == (*rows, 160)
        expected = exact(exact_leaf)
        wanted = torch.autograd.grad(expected, (exact_leaf, *exact.parameters()), gradient.double())
        for x, y in zip((found, *grads), (expected, *wanted), strict=True):
            assert x.dtype is torch.float32
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
        assert all(grad.stride() == p.stride() for grad, p in zip(grads[1:], layer.parameters(), strict=True))


@here
@pytest.mark.usefixtures("small")
def test_gradients_that_nobody_wants_are_not_made() -> None:
    layer = layers(bias=True)["linear"].requires_grad_(False)
    for inputs, expected in ((torch.randn(3, 96).requires_grad_(), 2), (torch.randn(3, 96), 1)):
        with fast_products(layer, "onednn"), Operations() as operations:
            found = layer(inputs)
            if found.requires_grad:
                found.sum().backward()
        assert by_onednn(operations) == expected


@here
@pytest.mark.usefixtures("small")
def test_a_weight_is_read_when_it_is_needed() -> None:
    """An optimiser's step between two passes is seen by the second."""
    layer = layers(bias=False)["linear"]
    inputs = torch.randn(3, 96)
    with fast_products(layer, "onednn"), torch.no_grad():
        before = layer(inputs)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(inputs), 2 * before)


@here
@pytest.mark.usefixtures("small")
def test_a_second_derivative_is_refused() -> None:
    layer = layers(bias=True)["linear"]
    leaf = torch.randn(3, 96, requires_grad=True)
    with fast_products(layer, "onednn"):
        (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lies", ["rows", "columns", "slices", "every other"])
def test_a_product_of_matrices_however_they_lie(lies: str) -> None:
    def lay(x: torch.Tensor) -> torch.Tensor:
        if lies == "columns":
            return x.T.contiguous().T
        if lies == "slices":
            return torch.cat((x, x), 1)[:, : x.shape[1]]
        return torch.stack((x, x), -1)[..., 0] if lies == "every other" else x

    a, b = lay(torch.randn(5, 33)), lay(torch.randn(33, 7))
    exact = a.double() @ b.double()
    out = torch.full((9, 7), torch.nan)
    with Operations() as operations:
        found = product(a, b)
        given = product(a, b, out=out[2:7])
    assert by_onednn(operations) == 2
    assert given.data_ptr() == out[2:7].data_ptr()
    for x in (found, given, out[2:7]):
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=1e-4)
    assert out[[0, 1, 7, 8]].isnan().all()


@here
@pytest.mark.usefixtures("small")
def test_rows_of_any_number_make_few_shapes() -> None:
    """Every shape has a kernel of its own, which is compiled and kept: of a hundred numbers of rows there are seven."""
    layer = layers(bias=False)["linear"]
    with fast_products(layer, "onednn"), Operations() as operations:
        for rows in range(151, 251):
            inputs = torch.randn(rows, 96, requires_grad=True)
            layer(inputs).sum().backward()
            hidden = inputs.detach()
            product(product(hidden, layer.weight.detach().T), layer.weight.detach())
            product(hidden.T, hidden)
    made = {made[0] for name, made in operations.ran if name == "_linear_pointwise"}
    few = {rounded(rows) for rows in range(151, 251)}
    assert by_onednn(operations) == 600
    assert len(few) == 7
    assert made == {(rows, width) for rows in few for width in (96, 160)} | {(160, 96), (96, 96)}
    for count in range(1, 3000):
        assert count <= rounded(count) <= count * 9 / 8


@here
@pytest.mark.parametrize("why", ["small", "double", "half", "autocast", "subclass", "compiled"])
def test_what_is_left_to_torch(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(torch.Tensor):
        pass

    if why != "small":
        monkeypatch.setattr(products, "SMALLEST", 1)
    dtype = {"double": torch.float64, "half": torch.bfloat16}.get(why, torch.float32)
    layer: Any = nn.Sequential(nn.Linear(8, 4)).to(dtype)
    rows = torch.randn(3, 8, dtype=dtype)
    if why == "subclass":
        rows = rows.as_subclass(Other)
    expected = layer(rows)
    if why == "compiled":
        layer = torch.compile(layer, backend="eager")
    with fast_products(layer, "onednn"), torch.autocast("cpu", enabled=why == "autocast"), Operations() as operations:
        found = layer(rows)
        product(rows, rows.T)
    assert by_onednn(operations) == (1 if why == "compiled" else 0)  # the bare product has no model
    assert type(found) is type(expected)
    torch.testing.assert_close(found.to(dtype), expected, rtol=1e-2, atol=1e-2)


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_model_and_its_gradients_are_what_they_are(family: str) -> None:
    model = tiny_model(family)
    ids = torch.arange(12).reshape(3, 4) % 90

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = run()
    with fast_products(model, "onednn"), Operations() as operations:
        found = run()
        names = model.state_dict().keys()
    assert by_onednn(operations) > 6
    assert names == tiny_model(family).state_dict().keys()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in model.modules())


@here
def test_nothing_stays_behind() -> None:
    """Also where the block fails, or stands inside another; a layer's own forward pass is left alone."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    own = vars(model[1])["forward"] = lambda rows: rows

    def fail() -> None:
        with fast_products(model, "onednn"):
            with fast_products(model, "onednn"):
                assert current_product() is product
            assert current_product() is product
            assert "forward" in vars(model[0])
            assert vars(model[1])["forward"] is own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert current_product() is torch.mm
    assert "forward" not in vars(model[0])
    assert vars(model[1])["forward"] is own


POLICIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"family": "gpt2"},
    "t5": {"family": "t5"},
    "adapter": {"family": "gpt2", "peft_config": tiny_lora()},
    "shared bottom": {"num_shared_layers": 1},
    "recomputed": {},
}


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_is_what_it_is(policy: str) -> None:
    """Statistics and weights of a step agree with those by torch's own products, of every kind of policy."""

    def run(accel: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], int]:
        trainer = make_trainer(
            **POLICIES[policy], accel=accel, optimizer_of=lambda model: torch.optim.SGD(model.parameters(), lr=0.1)
        )
        if policy == "recomputed":
            trainer.model.gradient_checkpointing_enable()
        with Operations() as operations:
            stats = trainer.step(*make_batch())
        return untimed(stats), dict(trainer.model.named_parameters()), by_onednn(operations)

    stats, weights, none = run("eager")
    fast_stats, fast_weights, some = run("onednn")
    assert none == 0
    assert some > 50
    assert stats.keys() == fast_stats.keys()
    for name, value in stats.items():
        torch.testing.assert_close(
            torch.as_tensor(fast_stats[name]), torch.as_tensor(value), rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )
    for name, weight in weights.items():
        torch.testing.assert_close(fast_weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("requested", "maker", "expected"),
    [("auto", "AuthenticAMD", True), ("auto", "GenuineIntel", False), ("onednn", "GenuineIntel", True)],
)
def test_where_products_are_onednns(
    requested: str, maker: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the processor's maker, and by nothing that is measured: a run is the same when it is repeated."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(products, "_maker", lambda: maker)
    monkeypatch.setattr(products, "_disagreement", lambda: None)
    assert (obstacle(requested) is None) is expected


def test_the_maker_is_read_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: some\n")
    assert products._maker(str(file)) == "AuthenticAMD"
    products._maker(str(tmp_path / "none"))


def test_an_operator_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    products._disagreement.cache_clear()
    try:
        monkeypatch.setattr(products, "_by_onednn", lambda a, b: a @ b + 1e-3)
        assert "not what they should be" in str(products._disagreement())
        products._disagreement.cache_clear()
        monkeypatch.setattr(products, "_by_onednn", lambda a, b: (a @ b).reshape(-1))
        assert "could not multiply" in str(products._disagreement())
    finally:
        products._disagreement.cache_clear()


@here
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_trial_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    products._disagreement.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert products._disagreement() is None
    finally:
        torch.set_default_dtype(torch.float32)
        products._disagreement.cache_clear()


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(5,), (17,), (3, 7)], ids=str)
def test_an_output_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """Models clamp what a layer gives, and adapters add to it; as with torch's own."""
    layer = layers(bias=True)["linear"]
    inputs = torch.randn(*shape, 96, requires_grad=True)
    expected = torch.autograd.grad(layer(inputs).clamp_(-0.1, 0.5).square().sum(), (inputs, *layer.parameters()))
    with fast_products(layer, "onednn"):
        found = torch.autograd.grad(layer(inputs).clamp_(-0.1, 0.5).square().sum(), (inputs, *layer.parameters()))
        with torch.no_grad():
            assert not layer(inputs).relu_().isnan().any()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("weight_learns", "rows_learn"), [(False, True), (True, False), (True, True)])
def test_only_what_a_gradient_needs_is_kept(weight_learns: bool, rows_learn: bool) -> None:
    layer = layers(bias=False)["linear"].requires_grad_(weight_learns)
    inputs = torch.randn(3, 96, requires_grad=rows_learn)
    kept: list[torch.Size] = []
    with (
        fast_products(layer, "onednn"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x),
    ):
        layer(inputs)
    assert ((3, 96) in kept, (160, 96) in kept) == (weight_learns, rows_learn)


@here
@pytest.mark.usefixtures("small")
def test_layers_are_called_by_their_arguments_names() -> None:
    parts = layers(bias=True)
    rows = torch.randn(3, 96)
    for block in (lambda part: fast_products(part, "onednn"), packed):
        with torch.no_grad(), block(parts["linear"]), block(parts["turned"]):
            assert parts["linear"](input=rows).shape == parts["turned"](x=rows).shape == (3, 160)


@here
@pytest.mark.compiled
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_parts_are_left_alone(in_place: bool) -> None:
    inner, outer = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(inner, nn.ReLU()), outer)
    rows = torch.randn(3, 8)
    expected = model(rows)
    if in_place:
        model[0].compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    with fast_products(model, "onednn"):
        torch.testing.assert_close(model(rows), expected)
        assert "forward" not in vars(inner)
        assert "forward" in vars(outer)


@here
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("reentrant", [True, False])
def test_losses_of_the_pieces_may_be_trained_on_by_the_caller(reentrant: bool) -> None:
    """A backward pass outside runs checkpointed layers again, by whatever is there."""
    trainer = make_trainer(accel="onednn")
    trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    queries, responses, _ = make_batch()
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    assert values is not None
    old = [x.detach() for x in (logprobs, values)]
    policy, value, _ = trainer.loss(*old, None, values, logprobs, mask, torch.randn_like(old[0]), old[1] + 1)
    (policy + value).backward()
    assert all(p.grad is not None for p in trainer.model.pretrained_model.model.layers.parameters())


def test_products_that_were_asked_for_in_vain_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    make_trainer(accel="onednn")
    assert "products of a step: eager torch: torch" in caplog.text
    with pytest.raises(AccelError, match=r"'onednn' is strict, but torch .* has no oneDNN operator"):
        make_trainer(accel="onednn", accel_strict=True)
