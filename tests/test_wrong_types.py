"""Public functions that are given another kind of thing than they take say so in one line, before any work."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_latents, random_model
from foreign import Foreign
from tolerances import GOLDEN, assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune

import tarflow_fast as tff
from tarflow_fast import ArgumentError, TarFlow
from tarflow_fast.engine import Condition
from tarflow_fast.evaluation import Noise

PIXELS = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)


def refused(argument: str, call: Callable[[], Any]) -> str:
    with pytest.raises(ArgumentError, match=rf"^{argument}: expected ") as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


THINGS: dict[str, Any] = {
    **{"None": None, "3": 3, "text": "m.pth", "module": nn.Linear(3, 3), "class": TarFlow, "dict": {}},
    "tensor": torch.zeros(2, 2),
}


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_what_is_no_model(tmp_path: Path, thing: Any) -> None:
    for call in (
        lambda: tff.denoise(thing, torch.zeros(1, 1, 8, 8), noise_std=0.1),
        lambda: tff.model_card(thing),
        lambda: tff.save(thing, tmp_path / "m.pth"),
        lambda: tff.Sampler(thing),
        lambda: tff.bits_per_dim(thing, PIXELS),
        lambda: tff.bayes_accuracy(thing, PIXELS, 0),
    ):
        refused("model", call)


@pytest.mark.parametrize("thing", THINGS.values(), ids=THINGS)
def test_what_is_none_of_the_others(tmp_path: Path, thing: Any) -> None:
    model, labels = random_model(num_classes=2), torch.tensor([0, 1])
    refused("config", lambda: tff.train(thing))
    refused("config", lambda: TarFlow.from_config(thing))
    if not isinstance(thing, torch.Tensor):
        refused("images", lambda: tff.ImageData(thing))
        refused("images", lambda: tff.save_grid(thing, tmp_path / "g.png"))
        refused("images", lambda: tff.dequantize(thing))
        refused("z", lambda: model.prior_log_prob(thing))
    if thing is not None:
        refused("noise", lambda: tff.bits_per_dim(model, PIXELS, noise=thing))
        refused("noise", lambda: tff.bayes_accuracy(model, PIXELS, labels, noise=thing))
        refused("class_names", lambda: tff.ImageData(PIXELS, labels, thing))
        refused("numbers", lambda: tff.ImageData(PIXELS, labels, None, thing))
        refused("generator", lambda: tff.dequantize(PIXELS, thing))
        refused("plan", lambda: tff.Sampler(model, plan=tff.SolverPlan(thing, thing, thing, thing)))
        refused("autocast", lambda: tff.bits_per_dim(model, PIXELS, autocast=thing))
        refused("guide_what", lambda: tff.Sampler(model).sample(guide_what=thing))
    if not isinstance(thing, str):
        refused("path", lambda: tff.load_images(thing))
    if not isinstance(thing, str | None):
        refused("cache", lambda: tff.load_images(tmp_path, size=4, cache=thing))
    if isinstance(thing, nn.Module | torch.Tensor | type):
        refused("info", lambda: tff.save_grid(PIXELS, tmp_path / "g.png", info={"a": thing}))
    for function in (tff.bits_per_dim, tff.bayes_accuracy):
        if thing is not None:
            refused("progress", lambda function=function: function(model, PIXELS, labels, progress=thing))
    refused("channels", lambda: tff.load_images(tmp_path, size=4, channels=None if type(thing) is int else thing))


def test_sizes_that_no_machine_can_serve(tmp_path: Path) -> None:
    model, much = random_model(), 10**30
    refused("draws", lambda: tff.bits_per_dim(model, PIXELS, draws=much))
    refused("size", lambda: tff.load_images(tmp_path, size=much))
    refused("in_channels", lambda: TarFlow(much, 8, 2, 64, 1, 1))
    refused("device", lambda: tff.Sampler(model, device=much))  # type: ignore[arg-type]
    for name in ("columns", "pad", "scale"):
        refused(name, lambda name=name: tff.save_grid(PIXELS, tmp_path / "g.png", **{name: much}))


def kinds(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "meta": x.to("meta"),
        "sparse_coo": x.to_sparse(),
        "nested": torch.nested.nested_tensor([x[0], x[1]]),
        "quantized": torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    }


@pytest.mark.parametrize("kind", ["meta", "sparse_coo", "nested", "quantized"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_values_or_strides(tmp_path: Path, kind: str) -> None:
    model = random_model(num_classes=2)
    z, x, y = (
        kinds(random_latents(model, 2))[kind],
        kinds(torch.zeros(2, 1, 8, 8))[kind],
        kinds(torch.zeros(2, 1))[kind],
    )
    for call in (
        lambda: tff.Sampler(model).reverse(z),
        lambda: model.reverse(z),
        lambda: model.reverse(z, differentiable=True),
        lambda: model.blocks[0].reverse(z),  # type: ignore[operator]
        lambda: model(x),
        lambda: model.log_prob(x),
        lambda: model.bits_per_dim(x),
    ):
        refused("x", call)
    refused("images", lambda: tff.denoise(model, x, noise_std=0.1))
    refused("images", lambda: tff.save_grid(x, tmp_path / "g.png"))
    refused("images", lambda: tff.ImageData(x))
    refused("z", lambda: random_model().update_prior(z))
    refused("labels", lambda: tff.Sampler(model).sample(2, y))
    refused("guidance", lambda: tff.Sampler(model).sample(2, 0, guidance=z))  # type: ignore[arg-type]
    if kind == "meta":
        refused("labels", lambda: tff.Sampler(model).sample(2, torch.zeros(2, dtype=torch.int64, device="meta")))


def test_a_model_without_values_tells_its_shapes_and_no_more(tmp_path: Path) -> None:
    model = random_model().to("meta")
    assert model(torch.zeros(2, 1, 8, 8, device="meta"))[0].shape == (2, 16, 4)
    assert "16 tokens" in tff.model_card(model)
    for call in (
        lambda: tff.Sampler(model),
        lambda: tff.accelerate(model),
        lambda: tff.accelerate(Foreign(model)),
        lambda: tff.save(model, tmp_path / "m.safetensors"),
        lambda: tff.save(model, tmp_path / "m.pth"),
        lambda: tff.denoise(model, torch.zeros(1, 1, 8, 8), noise_std=0.1),
        lambda: tff.bits_per_dim(model, PIXELS),
        lambda: model.reverse(torch.zeros(1, 16, 4)),
        lambda: model.reverse(torch.zeros(1, 16, 4), differentiable=True),
    ):
        assert "load_state_dict" in refused("model", call)
    refused("x", lambda: model(torch.zeros(2, 1, 8, 8)))
    assert list(tmp_path.iterdir()) == []


def layer(model: TarFlow) -> Any:
    return model.blocks[0].proj_in


CHANGES: dict[str, tuple[Callable[[TarFlow], Any], str]] = {
    "weight norm": (lambda m: parametrizations.weight_norm(layer(m)), "remove_parametrizations"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(layer(m)), "remove_parametrizations"),
    "old weight norm": (lambda m: torch.nn.utils.weight_norm(layer(m)), "remove_weight_norm"),
    "old spectral norm": (lambda m: torch.nn.utils.spectral_norm(layer(m)), "remove_spectral_norm"),
    "pruned": (lambda m: prune.l1_unstructured(layer(m), "weight", 0.1), r"prune\.remove"),
    "quantized": (
        lambda m: setattr(m.blocks[0], "proj_in", torch.ao.quantization.quantize_dynamic(nn.Sequential(layer(m)))[0]),
        "before it was quantized",
    ),
    "lazy": (lambda m: setattr(m.blocks[0], "proj_in", nn.LazyLinear(64)), "initialised weights"),
    "float8": (lambda m: m.to(torch.float8_e4m3fn), "weights of float16, bfloat16"),
    "complex": (lambda m: m.to(torch.complex64), "weights of float16, bfloat16"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_weights_that_are_made_of_others(tmp_path: Path, change: str) -> None:
    model = random_model()
    CHANGES[change][0](model)
    for call in (
        lambda: tff.Sampler(model),
        lambda: tff.accelerate(model),
        lambda: tff.accelerate(nn.Sequential(Foreign(model))),
        lambda: tff.save(model, tmp_path / "m.safetensors"),
        lambda: tff.denoise(model, torch.zeros(1, 1, 8, 8), noise_std=0.1),
        lambda: model.reverse(torch.zeros(1, 16, 4)),
    ):
        assert re.search(CHANGES[change][1], refused("model", call))


def test_transforms_of_functions_are_refused() -> None:
    model, z = random_model(), random_latents(random_model(), 2)
    weights = dict(model.named_parameters())
    for differentiable in (False, True):  # the first would be 0 without a word
        call = lambda z, d=differentiable: model.reverse(z, differentiable=d).sum()  # noqa: E731
        refused("x", lambda call=call: torch.func.grad(call)(z))
        by_weights = lambda w, d=differentiable: torch.func.functional_call(  # noqa: E731
            _Reverse(model, d), {f"model.{name}": value for name, value in w.items()}, z
        )
        refused("x", lambda by_weights=by_weights: torch.func.grad(by_weights)(weights))


class _Reverse(nn.Module):
    def __init__(self, model: TarFlow, differentiable: bool):
        super().__init__()
        self.model, self.differentiable = model, differentiable

    def forward(self, z: torch.Tensor) -> Any:
        return self.model.reverse(z, differentiable=self.differentiable).sum()


def test_a_plan_of_tokens_that_never_change_is_one() -> None:
    """Where a block takes in the same in all images, there is no slope to be fitted, and the mean is the guess."""
    z = torch.randn(5, 4, 3)
    z[:, 1] = 2.0
    plan = tff.SolverPlan.fit([(z, z + 1)])
    plan.check((1, 4, 3))
    assert torch.allclose(plan.guess(0, z), z + 1, atol=1e-5)


@pytest.mark.parametrize("device", ["foo", "meta", 10**9, [], ""])
def test_devices_that_are_none(device: Any) -> None:
    model = random_model()
    for call in (
        lambda: model.flow(device),
        lambda: tff.Sampler(model, device=device),
        lambda: tff.load_pretrained(device=device),
        lambda: tff.load("none.pth", device=device),
    ):
        refused("device", call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_flow_on_a_device_that_is_not_there() -> None:
    with pytest.raises(tff.BackendError, match="device 'cuda' cannot be used"):
        random_model().flow("cuda")


def test_the_block_of_a_sampler() -> None:
    sampler = tff.Sampler(random_model(num_classes=3), solver="sequential")
    z, plain = torch.randn(2, 16, 4), Condition()
    for k in (2, -1, "0", 0.0, None):
        refused("k", lambda k=k: sampler.invert_block(k, z, plain))
    for wrong in (3, None, z[:, :3], z.long(), z[:0]):
        refused("z", lambda wrong=wrong: sampler.invert_block(0, wrong, plain))
    refused("condition", lambda: sampler.invert_block(0, z, None))  # type: ignore[arg-type]
    for labels in ([3, 0], [0, 1, 2]):
        refused("labels", lambda labels=labels: sampler.invert_block(0, z, Condition(torch.tensor(labels))))
    refused("labels", lambda: Condition([0, 1]))  # type: ignore[arg-type]
    refused("guidance", lambda: Condition(None, 1.5))  # type: ignore[arg-type]
    x, log_det = sampler.invert_block(1, z.double(), Condition(torch.tensor([2, -1])))
    block: Any = sampler.flow.model.blocks[1]
    back, token_log_det = block.transform(block.permutation(x), torch.tensor([2, -1]))
    assert_close(block.permutation(back), z, GOLDEN)
    assert_close(token_log_det, -log_det, GOLDEN)


def test_a_sampler_of_a_flow_without_its_model_cannot_be_copied() -> None:
    sampler = tff.Sampler(replace(random_model().flow(), model=None))
    assert copy.copy(sampler).sample(1).images.isfinite().all()
    for call in (lambda: pickle.dumps(sampler), lambda: copy.deepcopy(sampler)):
        assert "whose model is None" in refused("model", call)


def test_sizes_of_sequences() -> None:
    for sizes, named, got in (
        ((), {}, "missing 3 required positional arguments: 'channels'"),
        ((64, 1, 1), {"foo": 2}, "got an unexpected keyword argument 'foo'"),
        ((64, 1, 1, True, 0, 64, 5), {}, "takes from 6 to 9 positional arguments but 10"),
    ):
        assert got in refused("sizes", lambda s=sizes, n=named: TarFlow.for_tokens(4, 4, *s, **n))
    refused("tokens", lambda: TarFlow.for_tokens(4.5, 4, 64, 1, 1))  # type: ignore[arg-type]


def test_other_arguments_of_public_methods() -> None:
    model = random_model()
    refused("options", lambda: tff.accelerate(model, foo=3))
    refused("z", lambda: model.get_loss(3, torch.zeros(1)))  # type: ignore[arg-type]
    refused("logdets", lambda: model.get_loss(torch.zeros(1), None))  # type: ignore[arg-type]
    refused("check", lambda: model.flow(check="yes"))  # type: ignore[arg-type]
    for k in (2, -1, "0"):
        refused("k", lambda k=k: model.config.permutation(k))
    block: Any = model.blocks[0]
    block.set_sample_mode()
    for i in (16, -1, None):
        refused("i", lambda i=i: block.reverse_step(torch.zeros(1, 16, 4), torch.zeros(16, 64), i))
    refused("model", lambda: Noise.of(3))  # type: ignore[arg-type]
    refused("images", lambda: Noise().add(3))  # type: ignore[arg-type]
    report = tff.Sampler(model).sample(1).report
    refused("other", lambda: report.merge(3))  # type: ignore[arg-type]
    refused("parts", lambda: tff.Samples.collect(1, []))
