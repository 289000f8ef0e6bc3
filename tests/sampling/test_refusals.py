"""What the sampler refuses, with the argument's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import GOLDEN as CASES
from cases import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tarflow_fast.backend import backends
from tarflow_fast.errors import ArgumentError, BackendError, NonFiniteError
from tarflow_fast.models import tarflow
from tarflow_fast.sampling.sampler import Sampler

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"backend": "tpu"}, ArgumentError, "backend: expected one of 'auto', "),
        ({"solver": "magic"}, ArgumentError, "solver: expected one of 'auto', 'sequential'"),
        ({"device": "gpu"}, ArgumentError, "device: expected"),
        ({"device": "meta"}, ArgumentError, "device: expected a device of kind"),
        ({"dtype": torch.int8}, ArgumentError, "dtype: expected"),
        ({"dtype": "bfloat16"}, ArgumentError, "dtype: expected"),
        ({"compile": "yes"}, ArgumentError, "compile: expected a bool"),
        ({"threads": 0}, ArgumentError, "threads: expected an integer >= 1"),
        ({"threads": 2, "backend": "torch"}, BackendError, "threads is for backend 'cpu', and this is 'torch'"),
        ({"threads": 2, "dtype": torch.float64}, BackendError, "threads is for backend 'cpu', and this is 'torch'"),
    ],
    ids=str,
)
def test_sampler_refuses(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Sampler(random_model(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_with_the_reason() -> None:
    with pytest.raises(BackendError, match=r"device 'cuda' cannot be used: torch .*(CUDA|driver)"):
        Sampler(random_model(), device="cuda")
    status = next(s for s in backends() if s.device == "cuda")
    assert not status.available
    assert "CUDA" in status.reason


def test_compile_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendError, match=r"compiler; install g\+\+"):
        Sampler(random_model(), compile=True)


def test_weights_are_checked_once_when_a_sampler_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("check_weights", "check_masks", "check_prior"):
        known = getattr(tarflow, name)
        monkeypatch.setattr(tarflow, name, lambda *given, n=name, f=known: (seen.append(n), f(*given))[1])
    Sampler(random_model())
    assert seen == ["check_weights", "check_masks", "check_prior"]
    seen.clear()
    random_model().reverse(torch.zeros(1, 16, 4))
    assert seen == ["check_weights", "check_masks", "check_prior"]


def test_sampler_takes_only_a_model() -> None:
    with pytest.raises(ArgumentError, match="model: expected a TarFlow"):
        Sampler(random_model().state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 2.0},
        {"n": True},
        {"seed": -1},
        {"seed": None},
        {"first": -1},
        {"labels": 3},
        {"labels": [0, 3]},
        {"labels": []},
        {"labels": "cat"},
        {"labels": [0.5]},
        {"labels": torch.tensor([0.0])},
        {"labels": torch.tensor([[0]])},
        {"labels": torch.tensor([True])},
        {"guidance": -0.1},
        {"guidance": float("inf")},
        {"guide_what": "x"},
        {"attn_temp": 0},
        {"attn_temp": -1.0},
        {"annealed_guidance": "yes"},
        {"noise_std": 0.0, "denoise": True},
        {"noise_std": None, "denoise": True},
        {"denoise_scale": -1.0},
        {"batch_size": 0},
        {"on_nonfinite": "ignore"},
    ],
    ids=str,
)
def test_sample_refuses(options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
        Sampler(random_model(num_classes=3)).sample(**options)


def test_unconditional_model_refuses_labels() -> None:
    with pytest.raises(ArgumentError, match="labels: expected None or negative labels for an unconditional model"):
        Sampler(random_model()).sample(1, 0)
    assert Sampler(random_model()).sample(1, -1).labels is None


NUMBERS = st.one_of(st.integers(-3, 5), st.floats(allow_nan=True), st.none(), st.text(max_size=2), st.booleans())


@given(
    shape=st.lists(st.integers(0, 17), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64]),
    fill=st.sampled_from([0.5, float("nan"), float("inf")]),
    y=st.one_of(NUMBERS, st.lists(st.integers(-2, 4), max_size=3), st.just(torch.zeros(2))),
    options=st.fixed_dictionaries(
        {},
        optional={
            "guidance": NUMBERS,
            "guide_what": st.sampled_from(["a", "ab", "", "c", None, 1]),
            "attn_temp": NUMBERS,
            "annealed_guidance": NUMBERS,
            "return_sequence": NUMBERS,
        },
    ),
)
def test_fuzzed_reverse_gives_images_or_a_named_error(
    shape: list[int], dtype: torch.dtype, fill: float, y: Any, options: dict[str, Any]
) -> None:
    s = SMALL_SAMPLER
    if len(shape) == 3 and shape[0] % 2:  # half of them of the right shape
        shape = [2, s.config.num_patches, s.config.token_dim]
    z = torch.ones(shape, dtype=dtype)
    if z.numel() and z.is_floating_point():
        z.view(-1)[0] = fill
    try:
        out = s.reverse(z, y, **options)
    except (ArgumentError, NonFiniteError):
        return
    images: Tensor = out[-1] if isinstance(out, list) else out
    assert images.shape == (2, *s.config.data_shape)
    assert torch.isfinite(images).all()


SMALL_SAMPLER = Sampler(random_model(num_classes=3, img_size=4))
