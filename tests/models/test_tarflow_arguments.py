"""What TarFlow takes for labels, images, tokens, sizes and options, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import random_images, random_model
from tolerances import SAME_F64, assert_close
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.models.tarflow import TarFlow


class TestLabels:
    def test_negative_is_no_class(self) -> None:
        model = random_model(5, torch.float64, num_classes=3)
        x = random_images(model, 3)
        mixed = model(x, torch.tensor([-1, 2, -9]))[0]
        none, labelled = model(x)[0], model(x, torch.tensor([2, 2, 2]))[0]
        assert_close(mixed, torch.stack([none[0], labelled[1], none[2]]), SAME_F64)
        assert not torch.allclose(none, labelled)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
    def test_any_integers(self, dtype: torch.dtype) -> None:
        model = random_model(5, num_classes=3)
        x = random_images(model, 2)
        y = torch.tensor([0, 2])
        assert torch.equal(model(x, y.to(dtype))[0], model(x, y)[0])

    @pytest.mark.parametrize("y", [[0, 2], (0, 2)])
    def test_sequences(self, y: Any) -> None:
        model = random_model(5, num_classes=3)
        x = random_images(model, 2)
        assert torch.equal(model(x, y)[0], model(x, torch.tensor([0, 2]))[0])

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (torch.tensor([0, 3]), "labels below num_classes = 3"),
            (torch.tensor([0.0, 1.0]), "integers, got a float32 tensor"),
            (torch.tensor([True, False]), "integers, got a bool tensor"),
            (torch.tensor([0]), "2 labels"),
            (torch.tensor([0, 1, 2]), "2 labels"),
            (torch.tensor([[0], [1]]), "1-D tensor"),
            (torch.tensor([], dtype=torch.int64), "at least one label"),
            ("01", "records no names of classes"),
            ([0, 1.5], "integers"),
        ],
    )
    def test_bad_labels(self, y: Any, message: str) -> None:
        model = random_model(5, num_classes=3)
        x = random_images(model, 2)
        for call in (model, model.log_prob, model.bits_per_dim):
            with pytest.raises(ArgumentError, match=f"y: expected .*{message}"):
                call(x, y)

    def test_unconditional(self) -> None:
        model = random_model(5)
        x = random_images(model, 2)
        assert torch.equal(model(x, torch.tensor([-1, -1]))[0], model(x)[0])
        with pytest.raises(ArgumentError, match="unconditional"):
            model(x, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"shape \(B, 1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 10), r"shape \(B, 1, 8, 8\)"),
        (torch.zeros(2, 1, 9, 9), r"shape \(B, 1, 8, 8\)"),
        (torch.zeros(2, 1, 16, 16), r"shape \(B, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"shape \(B, 1, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), "B >= 1"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "a floating-point tensor, got uint8"),
        ([[0.0]], r"a tensor \(B, 1, 8, 8\), got list"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "log_prob", "bits_per_dim", "patchify"])
def test_bad_images(call: str, x: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"x: expected .*{message}"):
        getattr(random_model(), call)(x)


def test_bad_values() -> None:
    """Refused by the likelihoods; the training pass does not wait for the device to look at values."""
    model = random_model()
    x = torch.full((1, 1, 8, 8), math.nan)
    for call in (model.log_prob, model.bits_per_dim):
        with pytest.raises(ArgumentError, match="x: expected finite values"):
            call(x)
    assert model(x)[0].isnan().any()


@pytest.mark.parametrize("shape", [(2, 16, 5), (2, 15, 4), (16, 4), (0, 16, 4), (2, 4, 16)])
def test_bad_tokens(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"x: expected shape \(B, 16, 4\)"):
        random_model().unpatchify(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "img_size: expected a multiple of patch_size = 3, got 8"),
        ({"channels": 65}, "channels: expected a multiple of head_dim = 64, got 65"),
        ({"num_blocks": 0}, "num_blocks: expected an integer >= 1, got 0"),
        ({"layers_per_block": 1.5}, "layers_per_block: expected an integer >= 1, got 1.5"),
        ({"num_classes": -1}, "num_classes: expected an integer >= 0, got -1"),
        ({"nvp": 2}, "nvp: expected a bool, got 2"),
        ({"in_channels": True}, "in_channels: expected an integer >= 1, got True"),
    ],
)
def test_bad_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        random_model(**change)
    assert str(caught.value) == message


class TestUnknownOptions:
    """What ml-tarflow's signatures do not have is refused, not ignored."""

    @pytest.mark.parametrize(
        "call",
        [
            lambda model, x: TarFlow(1, 8, 2, 64, 2, 1, expansion=4),
            lambda model, x: model(x, None, guidance=1.0),
            lambda model, x: model.log_prob(x, temperature=1.0),
            lambda model, x: model.reverse(model.patchify(x), temperature=1.0),
        ],
    )
    def test_refused(self, call: Callable[[TarFlow, Tensor], Any]) -> None:
        model = random_model()
        with pytest.raises(TypeError, match="unexpected keyword"):
            call(model, random_images(model, 1))
