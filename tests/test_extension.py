"""What comes from outside: a backend and a model of one's own, each in one place, without a change to the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import random_images, random_latents, random_model
from tolerances import GOLDEN, INVERSE_F64, assert_close
from torch import Tensor

from tarflow_fast import ArgumentError, BackendError, Sampler, backends
from tarflow_fast.backend import registry
from tarflow_fast.engine import BlockShape, BlockState, BlockWeights, Condition, LayerWeights
from tarflow_fast.engine.backend import Backend, Request
from tarflow_fast.engine.base import EngineBase
from tarflow_fast.engine.contract import Moved, embedding_rows
from tarflow_fast.flow import Flow, Stage
from tarflow_fast.permutation import Permutation


def transformed(w: BlockWeights, x: Tensor, embedding: Tensor | None = None, temp: float = 1.0) -> Tensor:
    """(xa, xb) or xb after each token, (B, T, 2D or D), by the equations; embedding: (B, C)."""
    h = F.linear(x, w.proj_in_weight, w.proj_in_bias) + w.position[: x.shape[1]]
    h = h if embedding is None else h + embedding[:, None]
    for layer in w.layers:
        a = F.layer_norm(h, h.shape[-1:], layer.norm1_weight, layer.norm1_bias)
        heads = F.linear(a, layer.qkv_weight, layer.qkv_bias).unflatten(-1, (3, w.shape.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        a = F.scaled_dot_product_attention(q / temp, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + F.linear(a, layer.proj_weight, layer.proj_bias)
        a = F.layer_norm(h, h.shape[-1:], layer.norm2_weight, layer.norm2_bias)
        h = h + F.linear(F.gelu(F.linear(a, layer.fc1_weight, layer.fc1_bias)), layer.fc2_weight, layer.fc2_bias)
    return F.linear(h, w.proj_out_weight, w.proj_out_bias)


# A backend: all tokens anew for every token, no cache.


class PlainEngine(EngineBase):
    def __init__(self, weights: BlockWeights, request: Request):
        self.weights, self.shape, self.device, self.dtype = weights, weights.shape, request.device, request.dtype

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        z = self.latents(z, self.dtype)
        return self.state(z, z.clone(), condition, None, 0)

    def bytes_per_sample(self, guided: bool) -> int:
        return 2 * self.shape.tokens * self.shape.token_dim * self.dtype.itemsize

    def reverse(self, state: BlockState, progress: Any = None, start: int = 1, stop: int | None = None) -> None:
        for i in range(start, self.shape.tokens if stop is None else stop):
            self.fixed_point(state, i, i + 1)
            if progress is not None:
                progress(1)

    def fixed_point(self, state: BlockState, start: Any, stop: Any) -> Moved:
        rule, B = state.condition.guidance, len(state.x)
        rows = embedding_rows(state.condition, B, self.shape.classes, self.device)
        classes = None if self.weights.classes is None else self.weights.classes[rows]
        window = slice(start - 1, stop - 1)
        out = transformed(self.weights, state.x, None if classes is None else classes[:B])[:, window]
        if rule.active:
            unguided = transformed(self.weights, state.x, None if classes is None else classes[B:], rule.attn_temp)
            out = out + torch.tensor(rule.schedule(self.shape.tokens))[window, None] * (out - unguided[:, window])
        xa, xb = out.chunk(2, -1) if self.shape.affine else (torch.zeros_like(out), out)
        new = state.z[:, start:stop] * xa.exp() + xb
        moved = (new - state.x[:, start:stop]).abs()
        state.x[:, start:stop], state.token_log_det[:, start:stop] = new, xa.sum(-1)
        return Moved(moved.amax(-1), (moved * (-xa).exp()).amax(-1))


PLAIN = Backend(
    name="plain",
    devices=("cpu",),
    missing=lambda request: None if request.dtype == torch.float32 else "it has float32 only",
    maker=lambda request: lambda weights: PlainEngine(weights, request),
    describe=lambda device: "all tokens anew",
    unsupported=lambda shape, dtype: "it takes at most 64 tokens" if shape.tokens > 64 else None,
)


@pytest.fixture
def plain() -> Iterator[str]:
    registry.register(PLAIN)
    yield PLAIN.name
    registry.unregister(PLAIN.name)


@pytest.mark.parametrize("solver", ["sequential", "adaptive", "auto"])
@pytest.mark.parametrize("nvp", [True, False])
def test_a_backend_from_outside_samples(plain: str, solver: str, nvp: bool) -> None:
    model = random_model(5, num_classes=3, nvp=nvp)
    how: dict[str, Any] = {"labels": [0, 2, -1], "guidance": 1.5, "attn_temp": 0.7, "annealed_guidance": True}
    wanted = Sampler(model, backend="torch", solver="sequential").sample(3, **how)
    found = Sampler(model, backend=plain, solver=solver).sample(3, **how)
    assert_close(found.images, wanted.images, GOLDEN)
    assert found.report.backend == plain


def test_a_backend_from_outside_is_known_and_can_refuse(plain: str) -> None:
    assert [each.reason for each in backends() if each.name == plain] == ["all tokens anew"]
    with pytest.raises(BackendError, match="backend 'plain' cannot be had: it has float32 only"):
        Sampler(random_model(), backend=plain, dtype=torch.float64)
    with pytest.raises(BackendError, match="it takes at most 64 tokens"):
        Sampler(random_model(img_size=18), backend=plain)
    with pytest.raises(ArgumentError, match=r"^backend: expected a name that no other backend has, got 'plain'"):
        registry.register(PLAIN)


# A model: images of 4 × 6 pixels in patches of 2 × 3, blocks of different sizes, orders of their own, a start token.

T, D = 4, 6
BLOCKS = [  # tokens, width, layers, heads, hidden width, transform
    (T + 1, 32, 1, 2, 48, "affine"),
    (T, 64, 3, 1, 256, "affine"),
    (T, 24, 2, 3, 40, "shift"),
]
ORDERS = [Permutation.identity(T), Permutation.reverse(T), Permutation([2, 0, 3, 1])]


class Mosaic:
    """z = T_K ∘ … ∘ T_1 (x), of weights that are drawn at random."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, seed: int = 0):
        self.draw = torch.Generator().manual_seed(seed)
        self.weights = [self._block(BlockShape(t, D, c, n, h, c // h, f, 0, kind)) for t, c, n, h, f, kind in BLOCKS]
        self.starts = [torch.randn(D, generator=self.draw), None, None]
        self.var = torch.rand(T, D, generator=self.draw) + 0.5

    def _random(self, *shape: int) -> Tensor:
        return 0.4 * shape[-1] ** -0.5 * torch.randn(shape, generator=self.draw)

    def _block(self, s: BlockShape) -> BlockWeights:
        C, layers = s.channels, []
        for _ in range(s.layers):
            sizes = {"norm1": (C,), "qkv": (3 * C, C), "proj": (C, C), "norm2": (C,)}
            sizes |= {"fc1": (s.hidden, C), "fc2": (C, s.hidden)}
            parts = {f"{name}_weight": self._random(*size) for name, size in sizes.items()}
            layers.append(LayerWeights(**parts, **{f"{name}_bias": self._random(n) for name, (n, *_) in sizes.items()}))
        ends = {"proj_in": (C, D), "proj_out": (s.parameters, C)}
        parts = {f"{name}_weight": 0.5 * self._random(*size) for name, size in ends.items()}
        parts |= {f"{name}_bias": 0.5 * self._random(n) for name, (n, _) in ends.items()}
        return BlockWeights(s, position=self._random(s.tokens, C), classes=None, layers=tuple(layers), **parts)

    def flow(self, device: Any = None) -> Flow:
        made = zip(self.weights, ORDERS, self.starts, strict=True)
        return Flow(
            stages=tuple(Stage(w.shape, lambda w=w: w, order, start) for w, order, start in made),  # type: ignore[misc]
            prior_var=self.var,
            data_shape=(1, 4, 6),
            to_tokens=lambda x: x.reshape(-1, 2, 2, 2, 3).permute(0, 1, 3, 2, 4).reshape(-1, T, D),
            to_data=lambda x: x.reshape(-1, 2, 2, 2, 3).permute(0, 1, 3, 2, 4).reshape(-1, 1, 4, 6),
            dtype=self.dtype,
            device=self.device,
            model=self,
        )

    def density(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and log p(x), by the equations."""
        flow, log_det = self.flow(), torch.zeros(len(x))
        x = flow.to_tokens(x)
        for stage, w in zip(flow.stages, self.weights, strict=True):
            own = stage.enter(x)
            out = transformed(w, own)[:, :-1]
            xa, xb = out.chunk(2, -1) if w.shape.affine else (torch.zeros_like(out), out)
            x = stage.leave(torch.cat([own[:, :1], (own[:, 1:] - xb) * (-xa).exp()], dim=1))
            log_det = log_det - xa.sum((1, 2))
        prior = torch.distributions.Normal(0, self.var.sqrt()).log_prob(x).sum((1, 2))
        return x / self.var.sqrt(), prior + log_det


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("solver", ["sequential", "adaptive", "auto"])
def test_a_model_from_outside_is_sampled(backend: str, solver: str) -> None:
    model = Mosaic()
    sampler = Sampler(model, backend=backend, solver=solver)
    found = sampler.sample(5, seed=3, trajectory=True)
    assert found.images.shape == (5, 1, 4, 6)
    z, log_prob = model.density(found.images)
    flow = model.flow()
    assert_close(z, flow.to_tokens(found.trajectory[0]), GOLDEN)  # type: ignore[index]
    assert_close(found.log_prob, log_prob, GOLDEN)
    assert found.report.tokens == 5 * (3 * T + 1)
    with pytest.raises(ArgumentError, match=r"^denoise: expected False"):
        sampler.sample(1, denoise=True)
    with pytest.raises(ArgumentError, match=r"^plan: expected None for a model whose blocks have different numbers"):
        Sampler(model, plan=Sampler(random_model()).learn_plan(2))


def test_blocks_of_any_size_and_order_are_inverted_by_every_engine(plain: str) -> None:
    model = Mosaic(1)
    x = torch.randn(3, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    z, _ = model.density(x)
    for backend in ("torch", "auto", plain):
        assert_close(Sampler(model, backend=backend).reverse(z), x, GOLDEN)


def test_what_is_no_model_is_refused() -> None:
    for model in (SimpleNamespace(), Mosaic, 3):
        with pytest.raises(ArgumentError, match=r"^model: expected a TarFlow"):
            Sampler(model)
    known = {"device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(ArgumentError, match=r"^model: expected one whose flow\(device\) is a Flow, got 3"):
        Sampler(SimpleNamespace(flow=lambda device: 3, **known))
    with pytest.raises(ArgumentError, match=r"^model: expected one with a device"):
        Sampler(SimpleNamespace(flow=lambda device: 3))
    with pytest.raises(ArgumentError, match=r"^model: expected a model whose blocks have as many tokens"):
        Sampler(Mosaic()).learn_plan(2)
    for solvers in (3, [3, 3, 3]):
        with pytest.raises(ArgumentError, match=r"^solvers: expected a sequence of solvers"):
            Sampler(Mosaic()).with_solvers(solvers)  # type: ignore[arg-type]


SHAPE = Mosaic().weights[1].shape  # of T tokens


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"stages": ()}, "stages: expected at least one, got none"),
        ({"stages": 3}, "stages: expected a tuple of Stages, got 3"),
        ({"stages": Mosaic().flow().stages[:1] * 2, "prior_var": torch.ones(T + 1, D)}, "prior_var: expected a float"),
        ({"prior_var": torch.ones(T)}, r"prior_var: expected a floating-point tensor \(4, 6\), got a float32 tensor"),
        ({"prior_var": torch.ones(T, D, dtype=torch.int64)}, "prior_var: expected a floating-point tensor"),
        ({"prior_var": None}, "prior_var: expected a floating-point tensor .*, got None"),
        ({"prior_var": torch.zeros(T, D)}, "prior_var: expected finite variances > 0"),
        ({"prior_var": torch.full((T, D), torch.nan)}, "prior_var: expected finite variances > 0"),
        ({"data_shape": (1, 6, 4)}, r"to_data: expected .* data_shape = \(1, 6, 4\), got \(1, 1, 4, 6\) with B = 1"),
        ({"data_shape": [1, 4, 6]}, "data_shape: expected a tuple of integers >= 1"),
        ({"to_data": lambda x: None}, "to_data: expected a function to .*, got None with B = 1"),
        ({"to_tokens": None}, "to_tokens: expected a function, got None"),
        ({"num_classes": -1}, "num_classes: expected an integer >= 0"),
        ({"dtype": torch.int8}, "dtype: expected one of torch.float16"),
        ({"device": "cpu"}, "device: expected a torch.device, got 'cpu'"),
        ({"denoise": 3}, "denoise: expected a function, or None"),
        ({"metadata": None}, "metadata: expected a dict"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_flow_is_checked_when_it_is_made(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{says}"):
        replace(Mosaic().flow(), **changed)


def test_stages_that_do_not_go_together_are_refused() -> None:
    flow = Mosaic().flow()
    other = Stage(replace(SHAPE, tokens=T + 1), flow.stages[1].weights, Permutation.identity(T + 1))
    with pytest.raises(
        ArgumentError, match=r"^stages: expected blocks of 4 tokens of 6 values, .* got \(5, 6\) in stage 1"
    ):
        replace(flow, stages=(flow.stages[0], other))
    other = Stage(replace(SHAPE, classes=2), flow.stages[1].weights, Permutation.identity(T))
    with pytest.raises(ArgumentError, match=r"^stages: expected blocks of num_classes = 3 .* got 2 in stage 0"):
        replace(flow, stages=(other,), num_classes=3)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"order": Permutation.identity(T + 1)}, "order: expected a Permutation of 4 tokens, got one of 5"),
        ({"order": Permutation.identity(T), "start": torch.ones(D)}, "order: .* of 3 tokens, one of the block's being"),
        ({"order": [0, 1, 2, 3]}, "order: expected a Permutation, got list"),
        ({"start": torch.ones(D + 1)}, r"start: expected a floating-point tensor \(6,\), got a float32 tensor \(7,\)"),
        ({"shape": 3}, "shape: expected a BlockShape, got int"),
        ({"weights": None}, "weights: expected a function that makes the block's weights, got None"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_stage_is_checked_when_it_is_made(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{says}"):
        replace(Mosaic().flow().stages[1], **changed)


def test_weights_that_are_not_of_the_block_are_refused() -> None:
    flow, w = Mosaic().flow(), Mosaic().weights[1]
    for wrong in (None, w):
        stage = replace(flow.stages[2], weights=lambda wrong=wrong: wrong)
        with pytest.raises(ArgumentError, match=r"^weights: expected a function that makes the BlockWeights of Block"):
            Sampler(replace(flow, stages=(stage,)))
    for name in ("proj_in_weight", "proj_out_bias", "position"):
        with pytest.raises(ArgumentError, match=rf"^{name}: expected a tensor of shape \("):
            replace(w, **{name: getattr(w, name)[1:]})
    for name in ("norm2_bias", "fc1_weight", "qkv_bias"):
        layer = replace(w.layers[1], **{name: getattr(w.layers[1], name)[1:]})
        with pytest.raises(ArgumentError, match=rf"^layers\[1\].{name}: expected a tensor of shape \("):
            replace(w, layers=(w.layers[0], layer, w.layers[2]))
    with pytest.raises(ArgumentError, match=r"^layers: expected 3, as the block's sizes say, got 1"):
        replace(w, layers=w.layers[:1])
    with pytest.raises(ArgumentError, match=r"^classes: expected None"):
        replace(w, classes=torch.ones(2, 64))
    with pytest.raises(ArgumentError, match=r"^classes: expected a tensor of shape \(3, 64\), got NoneType"):
        replace(w, shape=replace(w.shape, classes=2))


def test_any_order_of_tokens_in_a_model_of_ours() -> None:
    """Density, its gradient in C++ too, and sampling, of blocks that read the tokens in an order of their own."""
    model = random_model(2)
    for k, block in enumerate(model.blocks):
        tokens = torch.randperm(16, generator=torch.Generator().manual_seed(k)).tolist()
        object.__setattr__(block, "_permutation", Permutation(tokens))
    x = random_images(model, 3)
    with torch.no_grad():
        z, _, log_det = model.set_density("torch")(x)
        for found, wanted in zip(model.set_density("auto")(x)[::2], (z, log_det), strict=True):
            assert_close(found, wanted, GOLDEN)
    for backend in ("torch", "auto"):
        assert_close(Sampler(model, backend=backend).reverse(z), x, GOLDEN)
    double = model.double()
    z = random_latents(model, 2).double()
    assert_close(double(double.reverse(z))[0], z, INVERSE_F64)
