"""Bits per dimension and Bayes accuracy against the reference, closed forms and themselves."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from cases import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tarflow_fast import reference
from tarflow_fast.data import ImageData
from tarflow_fast.errors import ArgumentError, TarFlowError
from tarflow_fast.evaluation import Noise, bayes_accuracy, bits_per_dim
from tarflow_fast.models.tarflow import TarFlow

UNIFORM, GAUSSIAN, NONE = Noise("uniform", seed=3), Noise("gaussian", 0.2, seed=3), Noise("none")
CLOSE = 1e-5  # bits, between fp32 and float64


def pictures(n: int, ch: int = 1, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, ch, size, size), generator=generator, dtype=torch.uint8)


def reference_log_prob(model: TarFlow, x: Tensor, y: Tensor | None) -> Tensor:
    """In float64, by the slow and plain code."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    return reference.log_prob(weights, reference.patchify(x.double(), model.patch_size), y)


def identity_model(num_classes: int = 0) -> TarFlow:
    """z = x: a standard normal density over images."""
    model = random_model(num_classes=num_classes)
    for block in model.blocks:
        torch.nn.init.zeros_(block.proj_out.weight)
        torch.nn.init.zeros_(block.proj_out.bias)
    return model


class TestNoise:
    def test_uniform_noise_keeps_the_8_bit_value(self) -> None:
        v = pictures(20)
        x = UNIFORM.add(v)
        assert x.dtype == torch.float32
        assert torch.equal(((x.double() + 1) * 128).floor(), v.double())
        u = (x.double() + 1) * 128 - v
        assert abs(float(u.mean()) - 0.5) < 0.03
        assert abs(float(u.std()) - math.sqrt(1 / 12)) < 0.03

    def test_gaussian_noise_has_its_level(self) -> None:
        v = pictures(40)
        noise = (GAUSSIAN.add(v) - NONE.add(v)) / 0.2
        assert abs(float(noise.mean())) < 0.08
        assert abs(float(noise.std()) - 1) < 0.05

    def test_no_noise_spans_the_interval(self) -> None:
        v = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
        assert NONE.add(v).tolist() == [[[[-1.0, 1.0]]]]

    @pytest.mark.parametrize("noise", [UNIFORM, GAUSSIAN])
    def test_it_depends_on_seed_image_and_draw_alone(self, noise: Noise) -> None:
        v = pictures(5)
        x = noise.add(v)
        assert torch.equal(noise.add(v[3:], first=3), x[3:])
        other = Noise(noise.kind, noise.std, seed=4)
        for changed in (noise.add(v, first=1), noise.add(v, draw=1), other.add(v)):
            assert not (changed == x).all(dim=(1, 2, 3)).any()

    @pytest.mark.parametrize(
        ("metadata", "arguments", "kind", "std"),
        [
            ({}, (), "uniform", 0.0),
            ({"noise_type": "gaussian", "noise_std": 0.1}, (), "gaussian", 0.1),
            ({"noise_std": 0.1}, (), "gaussian", 0.1),
            ({"noise_type": "uniform", "noise_std": 0.1}, (), "uniform", 0.0),
            ({"noise_type": "gaussian", "noise_std": 0.1}, ("uniform",), "uniform", 0.0),
            ({"noise_type": "gaussian", "noise_std": 0.1}, ("auto", 0.3), "gaussian", 0.3),
            ({}, ("gaussian", 0.3), "gaussian", 0.3),
            ({"noise_std": 0.1}, ("none",), "none", 0.0),
        ],
    )
    def test_of_a_model(self, metadata: dict[str, Any], arguments: tuple[Any, ...], kind: str, std: float) -> None:
        model = random_model()
        model.metadata = metadata
        assert Noise.of(model, *arguments, seed=5) == Noise(kind, std, 5)

    def test_of_a_model_that_does_not_tell(self) -> None:
        with pytest.raises(ArgumentError, match="noise_std"):
            Noise.of(random_model(), "gaussian")

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("normal",), "noise"),
            (("gaussian", 0.0), "noise_std"),
            (("gaussian", float("nan")), "noise_std"),
            (("uniform", 0.1), "noise_std"),
            (("none", 0.1), "noise_std"),
            (("uniform", 0.0, -1), "seed"),
        ],
    )
    def test_bad_arguments(self, arguments: tuple[Any, ...], named: str) -> None:
        with pytest.raises(ArgumentError, match=f"^{named}:"):
            Noise(*arguments)
        with pytest.raises(ArgumentError, match="noise"):
            Noise.of(random_model(), "normal")

    def test_names(self) -> None:
        assert [str(n) for n in (UNIFORM, GAUSSIAN, NONE)] == [
            "uniform dequantisation",
            "Gaussian noise, σ = 0.2",
            "no noise",
        ]


class TestBitsPerDim:
    def test_standard_normal(self) -> None:
        """−log2 N(x; 0, 1) + 7 for each value, x = (v + u)/128 − 1."""
        v = pictures(6)
        found = bits_per_dim(identity_model(), v, noise=UNIFORM)
        x = UNIFORM.add(v).double()
        each = (x.square() + math.log(2 * math.pi)).mean(dim=(1, 2, 3)) / (2 * math.log(2)) + 7
        assert abs(found.mean - float(each.mean())) < CLOSE
        assert found.standard_error is not None
        assert abs(found.standard_error - float(each.std()) / math.sqrt(6)) < CLOSE
        assert (found.images, found.draws, found.noise) == (6, 1, UNIFORM)
        assert found.seconds > 0

    @pytest.mark.parametrize("noise", [UNIFORM, GAUSSIAN])
    @pytest.mark.parametrize("labels", [None, 1, [0, 2, 1, -1, 0]])
    def test_against_the_reference(self, noise: Noise, labels: Any) -> None:
        model, v = random_model(num_classes=3), pictures(5)
        y = torch.tensor(labels if isinstance(labels, list) else [-1 if labels is None else labels] * 5)
        nats = reference_log_prob(model, noise.add(v), y)
        wanted = float((-nats / 64 / math.log(2) + 7).mean())
        assert abs(bits_per_dim(model, v, labels, noise=noise, batch_size=2).mean - wanted) < CLOSE

    def test_draws_are_averaged_for_each_image(self) -> None:
        model, v = random_model(), pictures(3)
        each = torch.stack([reference_log_prob(model, UNIFORM.add(v, draw=d), None) for d in range(3)])
        bits = (-each / 64 / math.log(2) + 7).mean(dim=0)
        found = bits_per_dim(model, v, noise=UNIFORM, draws=3)
        assert abs(found.mean - float(bits.mean())) < CLOSE
        assert found.standard_error is not None
        assert abs(found.standard_error - float(bits.std()) / math.sqrt(3)) < CLOSE

    @given(batch_size=st.integers(1, 9))
    def test_batches_do_not_matter(self, batch_size: int) -> None:
        model, v = random_model(), pictures(7)
        whole = bits_per_dim(model, v, noise=UNIFORM).mean
        assert abs(bits_per_dim(model, v, noise=UNIFORM, batch_size=batch_size).mean - whole) < CLOSE

    def test_one_image_has_no_standard_error(self) -> None:
        assert bits_per_dim(random_model(), pictures(1)).standard_error is None

    def test_the_models_own_noise_is_the_default(self) -> None:
        model, v = random_model(), pictures(2)
        assert bits_per_dim(model, v).noise == Noise("uniform")
        model.metadata = {"noise_type": "gaussian", "noise_std": 0.1}
        assert bits_per_dim(model, v).noise == Noise("gaussian", 0.1)

    def test_autocast(self) -> None:
        model, v = random_model(), pictures(4)
        exact = bits_per_dim(model, v).mean
        half = bits_per_dim(model, v, autocast=torch.bfloat16).mean
        assert 0 < abs(half - exact) < 0.05

    def test_float64_model(self) -> None:
        model, v = random_model(dtype=torch.float64), pictures(4)
        nats = reference_log_prob(model, UNIFORM.add(v), None)
        wanted = float((-nats / 64 / math.log(2) + 7).mean())
        assert abs(bits_per_dim(model, v, noise=UNIFORM).mean - wanted) < 1e-10


class TestBayesAccuracy:
    @pytest.mark.parametrize("noise", [None, UNIFORM, GAUSSIAN])
    def test_against_the_reference(self, noise: Noise | None) -> None:
        model, v = random_model(num_classes=3), pictures(9)
        x = (noise or NONE).add(v)
        each = [reference_log_prob(model, x, torch.full((9,), c)) for c in range(3)]
        best = torch.stack(each, dim=1).argmax(1)
        assert len(set(best.tolist())) > 1
        right = bayes_accuracy(model, v, best, noise=noise, batch_size=4)
        assert (right.accuracy, right.correct, right.images) == (1.0, 9, 9)
        assert right.standard_error == 0
        assert right.noise == (noise or NONE)
        labels = best.clone()
        labels[:3] = (best[:3] + 1) % 3
        wrong = bayes_accuracy(model, v, labels, noise=noise)
        assert (wrong.accuracy, wrong.correct) == (6 / 9, 6)
        assert abs(wrong.standard_error - math.sqrt(2 / 9 / 9)) < 1e-12

    def test_draws_are_averaged(self) -> None:
        model, v, noise = random_model(num_classes=3), pictures(12), Noise("gaussian", 2.0)
        draws = []
        for draw in range(2):
            x = noise.add(v, draw=draw)
            each = [reference_log_prob(model, x, torch.full((12,), c)) for c in range(3)]
            draws.append(torch.stack(each, dim=1))
        best = (draws[0] + draws[1]).argmax(1)
        for draw in draws:
            assert not torch.equal(draw.argmax(1), best)
        assert bayes_accuracy(model, v, best, noise=noise, draws=2).accuracy == 1

    def test_one_label_for_all(self) -> None:
        model, v = random_model(num_classes=3), pictures(9)
        shares = [bayes_accuracy(model, v, c).accuracy for c in range(3)]
        assert abs(sum(shares) - 1) < 1e-12

    @pytest.mark.parametrize("labels", [None, -1, [0, 1, -1]])
    def test_every_image_needs_a_class(self, labels: Any) -> None:
        with pytest.raises(ArgumentError, match="labels"):
            bayes_accuracy(random_model(num_classes=3), pictures(3), labels)

    def test_an_unconditional_model_is_no_classifier(self) -> None:
        with pytest.raises(ArgumentError, match="class-conditional"):
            bayes_accuracy(random_model(), pictures(3), [0, 0, 0])


class TestImageData:
    """Data with their labels: classes meet by name."""

    def test_labels_are_matched_by_name(self) -> None:
        model, v = random_model(num_classes=3), pictures(6)
        model.metadata = {"class_names": ["a", "b", "c"]}
        data = ImageData(v, torch.tensor([0, 1, 0, 1, 0, 1]), ("c", "a"))
        right = torch.tensor([2, 0, 2, 0, 2, 0])
        assert bits_per_dim(model, data).mean == bits_per_dim(model, v, right).mean
        assert bayes_accuracy(model, data).correct == bayes_accuracy(model, v, right).correct
        with pytest.raises(ArgumentError, match="classes that the model knows"):
            bits_per_dim(model, ImageData(v, data.labels, ("c", "d")))
        with pytest.raises(ArgumentError, match="labels: expected None"):
            bits_per_dim(model, data, right)

    def test_data_without_labels(self) -> None:
        model, v = random_model(num_classes=3), pictures(3)
        assert bits_per_dim(model, ImageData(v)).mean == bits_per_dim(model, v).mean
        with pytest.raises(ArgumentError, match="a class for every image"):
            bayes_accuracy(model, ImageData(v))

    def test_data_that_are_no_pictures(self) -> None:
        """x = v + σε, with as many channels as the model has."""
        model, v = random_model(in_channels=4), torch.randn(5, 4, 8, 8)
        nats = reference_log_prob(model, v + GAUSSIAN.add(torch.zeros_like(v)), None)
        wanted = float((-nats / 256 / math.log(2) + 7).mean())
        assert abs(bits_per_dim(model, ImageData(v), noise=GAUSSIAN).mean - wanted) < CLOSE
        assert torch.equal(NONE.add(v), v)
        with pytest.raises(ArgumentError, match="noise: expected 'gaussian'"):
            bits_per_dim(model, ImageData(v), noise=UNIFORM)

    @pytest.mark.parametrize("x", [pictures(2).float(), torch.rand(2, 1, 8, 8) * 255])
    def test_8_bit_floats_are_named(self, x: Tensor) -> None:
        model = random_model()
        for density in (model.log_prob, model.bits_per_dim):
            with pytest.raises(ArgumentError, match="x: expected values of about -1 to 1"):
                density(x)
        with pytest.raises(ArgumentError, match="x: expected values of about -1 to 1"):
            bits_per_dim(model, ImageData(x), noise=GAUSSIAN)
        model.metadata = {"values": "raw"}
        assert model.log_prob(x).shape == (2,)


class TestBoth:
    @pytest.mark.parametrize("evaluate", [bits_per_dim, bayes_accuracy])
    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"images": torch.zeros(3, 1, 8, 8)}, "images"),
            ({"images": [1, 2]}, "images"),
            ({"images": pictures(3, size=4)}, "images"),
            ({"images": pictures(3, ch=3)}, "images"),
            ({"images": pictures(3)[0]}, "images"),
            ({"images": pictures(3)[:0]}, "images"),
            ({"labels": [0, 1]}, "labels"),
            ({"labels": [0, 1, 3]}, "labels"),
            ({"labels": [0.5, 1, 2]}, "labels"),
            ({"draws": 0}, "draws"),
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": 1.5}, "batch_size"),
            ({"autocast": torch.float32}, "autocast"),
            ({"autocast": "bfloat16"}, "autocast"),
        ],
    )
    def test_bad_arguments(self, evaluate: Any, changed: dict[str, Any], named: str) -> None:
        arguments = {"images": pictures(3), "labels": [0, 1, 2], **changed}
        with pytest.raises(ArgumentError, match=f"^{named}:"):
            evaluate(random_model(num_classes=3), **arguments)

    def test_bits_need_noise(self) -> None:
        with pytest.raises(ArgumentError, match=r"^noise:"):
            bits_per_dim(random_model(), pictures(1), noise=NONE)

    @pytest.mark.parametrize("evaluate", [bits_per_dim, bayes_accuracy])
    def test_a_density_that_overflows_is_an_error(self, evaluate: Any) -> None:
        model = identity_model(num_classes=2)
        with torch.no_grad():
            model.blocks[0].proj_out.bias[0] = -1000.0  # x · e¹⁰⁰⁰
        with pytest.raises(TarFlowError, match="density of image 0 is not finite"):
            evaluate(model, pictures(2), [0, 1])
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("evaluate", [bits_per_dim, bayes_accuracy])
    def test_progress_bars(self, evaluate: Any, capsys: pytest.CaptureFixture[str]) -> None:
        model = random_model(num_classes=3)
        evaluate(model, pictures(3), [0, 1, 2])
        assert capsys.readouterr() == ("", "")
        evaluate(model, pictures(3), [0, 1, 2], progress=True, draws=2)
        out, err = capsys.readouterr()
        assert out == ""
        assert "0/6" in err

    @pytest.mark.parametrize("evaluate", [bits_per_dim, bayes_accuracy])
    def test_the_report_is_json(self, evaluate: Any) -> None:
        found = evaluate(random_model(num_classes=3), pictures(3), [0, 1, 2])
        assert json.loads(json.dumps(found.to_dict())) == asdict(found)
