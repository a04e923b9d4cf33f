"""Models are brought to the device of their process: tested without one, with the meta device in its place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ppo_runtime.models import devices
from ppo_runtime.models.devices import own_gpu, place
from ppo_runtime.models.wrapper import AutoModelForCausalLMWithValueHead
from tests.runtime.support.tiny import tiny_model
from tests.runtime.support.trainers import make_trainer


def wrapped() -> Any:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"))


def kinds(model: Any) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, of which a process of its own would take the third."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, for which the meta device stands."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "own_gpu", lambda: torch.device("meta"))


@pytest.mark.usefixtures("gpus")
def test_a_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_gpu() == torch.device("cuda", 2), "the current one, where nobody has numbered the processes"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 4, and torch sees 4 GPUs here.*start at most 4 processes"):
        own_gpu()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_gpu() == torch.device("cuda", 0), "of launchers that show each process its own alone"


def test_ranks_on_one_gpu_are_refused_where_they_meet_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that say they are on a GPU stand for such; two of its processes see it under other numbers."""
    monkeypatch.setattr(devices, "speaks_nccl", lambda: True)
    properties = [SimpleNamespace(uuid="a"), SimpleNamespace(uuid="b"), SimpleNamespace(uuid="a"), SimpleNamespace()]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties[gpu.index])

    def on(device: str) -> Any:
        return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))

    first, second, same, old, cpu = map(devices.own_number, map(on, ("cuda:0", "cuda:1", "cuda:2", "cuda:3", "cpu")))
    assert first == same
    assert cpu == 0
    devices.check_own_gpus([first, second, old, cpu, cpu])
    with pytest.raises(ValueError, match=r"^ranks 0 and 2 have the model on the same GPU, expected one for each"):
        devices.check_own_gpus([first, second, same, cpu])
    monkeypatch.setattr(devices, "speaks_nccl", lambda: False)
    assert devices.own_number(on("cuda:0")) == 0


def test_what_is_no_optimizer_is_refused_before_anything_is_moved() -> None:
    with pytest.raises(TypeError, match="optimizer is a str, expected"):
        make_trainer(device="cpu", optimizer_of=lambda _: "adam")


@pytest.mark.usefixtures("away")
def test_both_models_go_from_the_cpu_to_the_gpu() -> None:
    model, reference = wrapped(), tiny_model("llama")
    place(model, reference, None, "auto")
    assert kinds(model) == kinds(reference) == {"meta"}


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(
    "mark", [{"is_quantized": True}, {"hf_device_map": {"a": 0, "b": 1}}], ids=["quantised", "spread"]
)
def test_what_others_have_placed_stays(mark: dict[str, Any]) -> None:
    model = wrapped()
    for name, value in mark.items():
        setattr(model.pretrained_model, name, value)
    for device in ("auto", "meta"):
        place(model, None, None, device)
        assert kinds(model) == {"cpu"}


def test_without_a_gpu_models_stay() -> None:
    model = wrapped()
    place(model, None, None, "auto")
    assert kinds(model) == {"cpu"}


def test_a_device_that_is_named_is_taken() -> None:
    model, reference = wrapped(), tiny_model("llama")
    place(model, reference, None, "meta")
    assert kinds(model) == kinds(reference) == {"meta"}


@pytest.mark.parametrize(
    ("device", "said"),
    [("gpu7", "device is 'gpu7', expected 'auto' or"), ("cuda:1", "device is 'cuda:1', but torch sees no GPU here")],
)
def test_a_device_that_is_not_there_is_refused(device: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=said):
        make_trainer(device=device)


@pytest.mark.parametrize("device", ["xpu", "mps", "hpu", "vulkan"])
def test_a_device_that_torch_cannot_use_is_refused_by_name(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except Exception:
        with pytest.raises(ValueError, match=f"device is '{device}', which torch cannot use here"):
            make_trainer(device=device)


def test_moments_follow_their_parameters() -> None:
    """A double stands for another device: an optimiser casts what it loads to the parameter's device and dtype."""
    model = wrapped()
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    model.double()
    place(model, None, optimizer, "cpu")
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float64}
