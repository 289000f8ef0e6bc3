"""Models of rectangular images and of sequences: against the reference, and by the laws that any flow obeys."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_images, random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN, INVERSE_F64, LOG_DET_F64, SAME_F64, assert_close
from torch import Tensor

import tarflow_fast as tff
from tarflow_fast import reference
from tarflow_fast.data import ImageData
from tarflow_fast.errors import ArgumentError
from tarflow_fast.evaluation import Noise

RECTANGLE: dict[str, Any] = {"in_channels": 3, "img_size": (6, 8), "patch_size": (3, 2), "num_classes": 3}
SEQUENCE: dict[str, Any] = {
    "in_channels": 5,
    "img_size": (11, 1),
    "patch_size": 1,
    "layout": "tokens",
    "num_classes": 3,
}
SHAPES = {"rectangle": RECTANGLE, "sequence": SEQUENCE}
LABELS = torch.tensor([2, -1, 0])
GUIDED: dict[str, Any] = {"guidance": 1.5, "attn_temp": 0.7, "annealed_guidance": True}
RULES = [{}, GUIDED, {"guidance": 0.8, "guide_what": "b"}]
BACKENDS = ["cpu", "torch"]

shapes = pytest.mark.parametrize("shape", SHAPES)
backends = pytest.mark.parametrize("backend", BACKENDS)


def tokens_of(model: tff.TarFlow, x: Tensor) -> Tensor:
    """Data as the reference has them."""
    return x if model.config.layout == "tokens" else reference.patchify(x, model.config.patch_shape)


def data_of(model: tff.TarFlow, tokens: Tensor) -> Tensor:
    config = model.config
    return tokens if config.layout == "tokens" else reference.unpatchify(tokens, config.patch_shape, config.grid[0])


def reference_weights(model: tff.TarFlow) -> dict[str, Tensor]:
    return {name: value.double() for name, value in model.state_dict().items()}


# --- the reference itself --------------------------------------------------------------------------------------------


def test_patches_of_rectangles() -> None:
    """A patch is a rectangle of pixels, its values ordered (channel, row, column); patches go row by row."""
    images = torch.arange(2 * 3 * 6 * 8).reshape(2, 3, 6, 8)
    tokens = reference.patchify(images, (3, 2))
    assert tokens.shape == (2, 8, 18)
    assert tokens[1, 5].tolist() == images[1, :, 3:6, 2:4].flatten().tolist()
    assert torch.equal(reference.unpatchify(tokens, (3, 2), rows=2), images)
    assert torch.equal(reference.unpatchify(reference.patchify(images[..., :6], 3), 3), images[..., :6])
    assert torch.equal(reference.patchify(images, (2, 2)), reference.patchify(images, 2))


@given(
    patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
)
def test_patchify_is_the_references(patch: tuple[int, int], grid: tuple[int, int], channels: int) -> None:
    size = (patch[0] * grid[0], patch[1] * grid[1])
    model = random_model(in_channels=channels, img_size=size, patch_size=patch, channels=8, head_dim=8)
    images = random_images(model, 2)
    tokens = model.patchify(images)
    assert torch.equal(tokens, reference.patchify(images, patch))
    assert torch.equal(model.unpatchify(tokens), images)
    assert torch.equal(reference.unpatchify(tokens, patch, grid[0]), images)


# --- fp32 against the reference --------------------------------------------------------------------------------------


@backends
@shapes
class TestAgainstTheReference:
    @pytest.mark.parametrize("y", [None, LABELS], ids=["no class", "labels"])
    @pytest.mark.parametrize("nvp", [True, False])
    def test_density(self, shape: str, backend: str, y: Tensor | None, nvp: bool) -> None:
        model = random_model(1, **SHAPES[shape], nvp=nvp).set_density(backend)
        x = random_images(model, 3)
        wanted = reference.density(reference_weights(model), tokens_of(model, x), y)
        with torch.no_grad():
            z, outputs, mean_log_det = model(x, y)
            nats = model.log_prob(x, y)
        assert_close(z, wanted.z, GOLDEN)
        assert_close(torch.stack(outputs), torch.stack(wanted.outputs), GOLDEN)
        assert_close(mean_log_det.expand(3), wanted.log_det / x[0].numel(), GOLDEN)
        true_nats = reference.log_prob(reference_weights(model), tokens_of(model, x), y)
        assert_close(nats / x[0].numel(), true_nats / x[0].numel(), GOLDEN)

    @pytest.mark.parametrize("rule", RULES, ids=["unguided", "annealed", "shifts"])
    @pytest.mark.parametrize("solver", ["sequential", "adaptive"])
    def test_inverse(self, shape: str, backend: str, rule: dict[str, Any], solver: str) -> None:
        model = random_model(2, **SHAPES[shape])
        z = random_latents(model, 3)
        wanted = reference.inverse(reference_weights(model), z, LABELS, **rule)
        sampler = tff.Sampler(model, backend=backend, solver=solver)
        sequence, log_det = sampler.reverse(z, LABELS, **rule, return_sequence=True, return_log_det=True)
        for got, tokens in zip(sequence, wanted.sequence, strict=True):
            assert_close(got, data_of(model, tokens), GOLDEN)
        assert_close(log_det / z[0].numel(), wanted.log_det / z[0].numel(), GOLDEN)

    def test_denoise(self, shape: str, backend: str) -> None:
        model = random_model(3, **SHAPES[shape])
        x = 0.5 * random_images(model, 3)
        patch = None if shape == "sequence" else model.config.patch_shape
        wanted = reference.denoise(reference_weights(model), x, LABELS, noise_std=0.1, patch_size=patch)
        got = tff.denoise(model, x, LABELS, noise_std=0.1, backend=backend)
        assert_close(got, wanted, GOLDEN)
        assert (got - x).abs().max() > 1e-3

    def test_samples(self, shape: str, backend: str) -> None:
        """Unguided samples, denoised or not, and their log-density."""
        model = random_model(4, **SHAPES[shape])
        sampler = tff.Sampler(model, backend=backend, solver="sequential")
        found = sampler.sample(3, [0, 2], seed=5)
        assert found.images.shape == (3, *model.config.data_shape)
        true_nats = reference.log_prob(
            reference_weights(model), tokens_of(model, found.images), torch.tensor([0, 2, 0])
        )
        assert found.log_prob is not None
        assert_close(found.log_prob / found.images[0].numel(), true_nats / found.images[0].numel(), GOLDEN)
        assert_close(sampler.sample(2, [0, 2], seed=5, first=1, batch_size=1).images[1:], found.images[2:], GOLDEN)
        denoised = sampler.sample(3, [0, 2], seed=5, denoise=True, noise_std=0.1).images
        assert_close(denoised, tff.denoise(model, found.images, [0, 2, 0], noise_std=0.1), GOLDEN)


# --- laws, in float64 ------------------------------------------------------------------------------------------------

any_shape = st.one_of(
    st.builds(
        lambda patch, grid, ch: {
            "in_channels": ch,
            "img_size": (patch[0] * grid[0], patch[1] * grid[1]),
            "patch_size": patch,
        },
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.integers(1, 3),
    ),
    st.builds(
        lambda tokens, D: {"in_channels": D, "img_size": (tokens, 1), "patch_size": 1, "layout": "tokens"},
        st.integers(1, 20),
        st.integers(1, 6),
    ),
)


@backends
@settings(max_examples=20)
@given(shape=any_shape, seed=st.integers(0, 9), nvp=st.booleans(), guided=st.booleans())
def test_inverse_undoes_density(backend: str, shape: dict[str, Any], seed: int, nvp: bool, guided: bool) -> None:
    dtype = torch.float64 if backend == "torch" else torch.float32
    tolerance = INVERSE_F64 if backend == "torch" else GOLDEN
    model = random_model(seed, dtype, **shape, channels=16, head_dim=8, nvp=nvp, num_classes=2)
    x = 0.5 * random_images(model, 2, seed)
    sampler = tff.Sampler(model, backend=backend, solver="sequential", dtype=dtype)
    with torch.no_grad():
        z, _, mean_log_det = model(x, [0, -1])
    back, log_det = sampler.reverse(z / model.var.sqrt(), [0, -1], return_log_det=True)
    assert_close(back, x, tolerance)
    prior = 0.5 * model.var.log().sum()
    assert_close((log_det - prior) / x[0].numel(), -mean_log_det.expand(2), tolerance)
    if guided and backend == "torch":
        tokens = reference.inverse(
            model.state_dict(), random_latents(model, 2), torch.tensor([0, -1]), head_dim=8, **GUIDED
        )
        got = sampler.reverse(random_latents(model, 2), [0, -1], **GUIDED)
        assert_close(got, data_of(model, tokens.x), INVERSE_F64)


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        {"in_channels": 2, "img_size": (2, 3), "patch_size": (1, 3)},
        {"in_channels": 1, "img_size": (4, 2), "patch_size": (2, 1)},
        {"in_channels": 3, "img_size": (4, 1), "patch_size": 1, "layout": "tokens"},
    ],
    ids=["rows", "columns", "sequence"],
)
def test_log_det_is_the_jacobians(shape: dict[str, Any], nvp: bool) -> None:
    """log|det| of autograd's Jacobian, of data and of latents, in float64."""
    model = random_model(5, torch.float64, **shape, channels=16, head_dim=8, nvp=nvp, num_classes=2)
    model.set_density("torch")
    y, N = torch.tensor([1]), model.var.numel()
    x, z = random_images(model, 1), random_latents(model, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, y)[0], x).reshape(N, N)
    assert_close(model(x, y)[2].reshape(()) * N, torch.linalg.slogdet(jacobian).logabsdet, LOG_DET_F64)
    backward = torch.autograd.functional.jacobian(lambda z: model.reverse(z, y, differentiable=True), z).reshape(N, N)
    _, log_det = model.reverse(z, y, return_log_det=True)
    assert_close(log_det[0], torch.linalg.slogdet(backward).logabsdet, LOG_DET_F64)


def test_a_sequence_is_an_image_of_one_column() -> None:
    """The same weights and values: (B, T, D) as (B, D, T, 1) in patches of one pixel."""
    sequences = random_model(6, torch.float64, **SEQUENCE)
    images = random_model(6, torch.float64, **{**SEQUENCE, "layout": "image"})
    x = random_images(sequences, 2)
    as_image = x.transpose(1, 2)[..., None]
    assert_close(sequences.log_prob(x, 1), images.log_prob(as_image, 1), SAME_F64)
    z = random_latents(sequences, 2)
    assert_close(sequences.reverse(z, 1).transpose(1, 2)[..., None], images.reverse(z, 1), SAME_F64)


@shapes
def test_models_that_are_held_against_their_weights(shape: str) -> None:
    """A hook makes a sampler compare small passes of the model with what its weights say."""
    model = random_model(7, **SHAPES[shape])
    model.register_forward_hook(lambda *_: None)
    assert tff.Sampler(model).sample(2, seed=1).images.isfinite().all()
    model.register_forward_hook(lambda module, inputs, out: (out[0] * 2, *out[1:]))
    with pytest.raises(ArgumentError, match="model"):
        tff.Sampler(model)


# --- files -----------------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_keep_the_shape(shape: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = random_model(8, **SHAPES[shape])
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.1}
    tff.save(model, tmp_path / "m.safetensors", dtype=dtype, card=True)
    found = tff.load(tmp_path / "m.safetensors")
    assert (found.config, found.metadata) == (model.config, model.metadata)
    if dtype is None:
        assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    if shape == "sequence":
        assert "| sequences | 11 tokens of 5 values |" in card
        assert "sequences = tff.Sampler(model)" in card
        assert "image-generation" not in card
    else:
        assert "| images | 3 × 6 × 8, values" in card
        assert "| patches | 3×2; 8 tokens of 18 values |" in card
        assert "images = tff.Sampler(model)" in card


def test_a_pth_of_a_rectangle_is_told_its_size(tmp_path: Path) -> None:
    model = random_model(9, in_channels=3, img_size=(4, 16), patch_size=2)
    with pytest.warns(tff.TarFlowWarning, match=r"load it with img_size=\(4, 16\)"):
        tff.save(model, tmp_path / "m.pth")
    assert tff.load(tmp_path / "m.pth").config.img_size == 8  # 16 patches, taken for a square of them
    found = tff.load(tmp_path / "m.pth", img_size=(4, 16))
    assert found.config == model.config
    with pytest.raises(ArgumentError, match="img_size: expected a size of 16 patches of 2×2"):
        tff.load(tmp_path / "m.pth", img_size=(4, 8))


def test_all_that_a_pth_of_a_rectangle_leaves_open_is_asked_for_at_once(tmp_path: Path) -> None:
    model = random_model(9, **{**RECTANGLE, "channels": 48, "head_dim": 24})
    sizes = {"patch_size": (3, 2), "img_size": (6, 8), "head_dim": 24}
    path = tmp_path / "m.pth"
    with pytest.warns(tff.TarFlowWarning, match="load it with patch_size"):
        tff.save(model, path)
    asked = (
        "a token has 18 values, neither 3 nor 1 channels of a square patch; 8 tokens make no square; "
        "its width 48 is no multiple of 64; give patch_size, img_size and head_dim"
    )
    for told in ({}, {"patch_size": (3, 2)}, {"img_size": (6, 8)}, {"head_dim": 24}):
        with pytest.raises(tff.CheckpointError) as caught:
            tff.load(path, **told)
        text, open_ = str(caught.value), [name for name in sizes if name not in told]
        assert text.endswith(asked if not told else f"; give {open_[0]} and {open_[1]}")
    assert tff.load(path, **sizes).config == model.config


@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_a_pth_does_not_say_that_data_are_sequences(tokens: int, tmp_path: Path) -> None:
    model = random_model(9, **{**SEQUENCE, "img_size": (tokens, 1)})
    with pytest.warns(tff.TarFlowWarning, match="loaded as a model of images, not of sequences: save as .safetensors"):
        tff.save(model, tmp_path / "m.pth")
    with pytest.raises(ArgumentError, match="patch_size: expected a patch size whose product divides"):
        tff.load(tmp_path / "m.pth", patch_size=(2, 1))


# --- measures --------------------------------------------------------------------------------------------------------


def some_data(shape: str, n: int = 5) -> ImageData:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 3
    if shape == "sequence":
        return ImageData(torch.randn(n, 11, 5, generator=generator), labels)
    return ImageData(torch.randint(0, 256, (n, 3, 6, 8), generator=generator, dtype=torch.uint8), labels)


@shapes
def test_measures_against_the_reference(shape: str) -> None:
    model, data = random_model(10, **SHAPES[shape]), some_data(shape)
    noise = Noise("gaussian", 0.2, seed=3)
    x = noise.add(data.images)
    assert data.labels is not None
    values = model.var.numel()
    nats = reference.log_prob(reference_weights(model), tokens_of(model, x.double()), data.labels)
    model.metadata["values"] = "raw"
    wanted = -nats / values / torch.log(torch.tensor(2.0))  # bits of a density: raw values have no levels
    found = tff.bits_per_dim(model, data, noise=noise, batch_size=2)
    assert abs(found.mean - float(wanted.mean())) < 1e-5
    if shape == "rectangle":
        del model.metadata["values"]  # of pictures: bits for one of 256 levels
        pictures = tff.bits_per_dim(model, data, noise=noise, batch_size=2)
        assert abs(pictures.mean - found.mean - 7) < 1e-5
    clean = Noise("none").add(data.images).double()
    by_class = torch.stack(
        [
            reference.log_prob(reference_weights(model), tokens_of(model, clean), torch.full((len(data),), c))
            for c in range(3)
        ]
    )
    correct = int((by_class.argmax(0) == data.labels).sum())
    accuracy = tff.bayes_accuracy(model, data, batch_size=2)
    assert (accuracy.correct, accuracy.images) == (correct, len(data))


@shapes
def test_measures_refuse_other_shapes(shape: str) -> None:
    model = random_model(**SHAPES[shape])
    other = some_data("rectangle" if shape == "sequence" else "sequence")
    for measure in (tff.bits_per_dim, tff.bayes_accuracy):
        with pytest.raises(ArgumentError, match=r"images: expected shape \(n >= 1, "):
            measure(model, other, noise=Noise("gaussian", 0.1))
    if shape == "sequence":
        with pytest.raises(ArgumentError, match="'gaussian', as only 8-bit values can be dequantised"):
            tff.bits_per_dim(model, some_data(shape), noise=Noise("uniform"))


@torch.no_grad()
def test_bits_of_sequences() -> None:
    """They are those of a density: without noise of their own, and of any values."""
    model, data = random_model(10, **SEQUENCE), some_data("sequence")
    nats = model.log_prob(data.images, data.labels)
    found = tff.bits_per_dim(model, data)
    assert str(found.noise) == "no noise"
    assert abs(found.mean - float(-nats.mean()) / 55 / math.log(2)) < 1e-5
    assert tff.bits_per_dim(model, data.images, data.labels).mean == found.mean
    assert_close(model.bits_per_dim(data.images, data.labels), -nats / 55 / math.log(2), GOLDEN)
    assert model.bits_per_dim(20 + data.images.abs()).isfinite().all()  # no picture, so no scale −1 to 1
    model.metadata = {"noise_type": "gaussian", "noise_std": 0.1}
    assert tff.bits_per_dim(model, data).noise == Noise("gaussian", 0.1)
    for wrong in (torch.zeros(2, 11, 5, dtype=torch.uint8), 3):
        with pytest.raises(ArgumentError, match=r"^images: expected a floating-point tensor \(n, T, D\), as the"):
            tff.bits_per_dim(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^images: expected shape \(n >= 1, 11, 5\)"):
        tff.bits_per_dim(model, torch.zeros(2, 5, 11))
    with pytest.raises(ArgumentError, match=r"^images: expected finite values"):
        tff.bits_per_dim(model, torch.full((2, 11, 5), math.nan))


def test_grid_of_rectangles(tmp_path: Path) -> None:
    model = random_model(11, in_channels=1, img_size=(4, 10), patch_size=2)
    images = tff.Sampler(model).sample(3, seed=0).images
    from PIL import Image

    with Image.open(tff.save_grid(images, tmp_path / "g.png", 2, scale=2)) as picture:
        assert picture.size == (2 * (20 + 2) + 2, 2 * (8 + 2) + 2)
    with pytest.raises(ArgumentError, match="images"):
        tff.save_grid(torch.zeros(3, 4, 10), tmp_path / "g.png")
