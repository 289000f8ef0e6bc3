"""The density pass in C++ and the gradient of its log-density: against the plain equations on every instruction set
that this machine has, and bit-equal however a batch is divided."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import GOLDEN, Case, random_images, random_model
from instruction_sets import every_set
from tolerances import GOLDEN as GOLDEN_TOLERANCE
from tolerances import SAME_F32, assert_close, error_budget, max_error
from torch import Tensor, nn

from tarflow_fast import reference
from tarflow_fast.checkpoints import load_pretrained
from tarflow_fast.errors import BackendError
from tarflow_fast.models import cpu_density as module
from tarflow_fast.models.cpu_density import CpuDensity, cpu_density
from tarflow_fast.models.denoising import denoise
from tarflow_fast.models.tarflow import TarFlow
from tarflow_fast.native import ISA_VARIABLE, load_native

try:
    load_native()
except BackendError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_density")


def density(model: TarFlow, images: Tensor, y: Tensor | None = None, **options: Any) -> CpuDensity:
    return cpu_density(model.blocks, model.patchify(images), y, **{"gradient": True, "threads": 1, **options})


def plain(model: TarFlow, images: Tensor, y: Tensor | None = None) -> CpuDensity:
    """The same by the plain equations, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    tokens = reference.patchify(images.double(), model.patch_size).requires_grad_()
    found = reference.density(weights, tokens, y, head_dim=model.config.head_dim)
    (found.log_det.sum() - 0.5 * found.z.square().sum()).backward()
    assert tokens.grad is not None
    return CpuDensity(torch.stack(found.outputs).detach(), found.log_det.detach(), tokens.grad, 0)


def assert_agree(found: CpuDensity, wanted: CpuDensity, tolerance: float = SAME_F32) -> None:
    for got, right in zip(found[:3], wanted[:3], strict=True):
        assert got is not None
        assert right is not None
        assert_close(got, right, tolerance * max(1.0, right.abs().max().item()))


def assert_equal(one: CpuDensity, other: CpuDensity) -> None:
    """To the bit."""
    for a, b in zip(one[:3], other[:3], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "odd-channels": {"channels": 15, "head_dim": 5, "layers_per_block": 2},
    "narrow-heads": {"channels": 12, "head_dim": 3, "in_channels": 3, "img_size": 6, "num_blocks": 3},
    "wide-heads": {"channels": 72, "head_dim": 72, "layers_per_block": 2},
    "one-head-of-21": {"channels": 21, "head_dim": 21},
    "one-token": {"patch_size": 8},
    "two-blocks-of-queries": {"img_size": 14, "channels": 16, "head_dim": 8},  # T = 49
    "many-blocks-of-queries": {"img_size": 22, "channels": 16, "head_dim": 8, "num_blocks": 3},  # T = 121
    "large-tokens": {"in_channels": 3, "patch_size": 4, "channels": 32, "head_dim": 16},
    "volume-preserving": {"nvp": False, "channels": 40, "head_dim": 20},
    "threads-that-share": {"img_size": 24, "channels": 256, "head_dim": 64},  # a sample is work for several
    "classes": {"num_classes": 5, "channels": 32, "head_dim": 16, "num_blocks": 3},
}


@every_set
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_agrees_with_the_plain_equations(isa: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model = random_model(**{"head_dim": 32, **sizes})
    images = random_images(model, 3)
    y = torch.tensor([2, -1, 4]) if model.config.num_classes else None
    wanted = plain(model, images, y)
    assert_agree(density(model, images, y), wanted)
    without = density(model, images, y, gradient=False)
    assert without.gradient is None
    assert_agree(without._replace(gradient=wanted.gradient), wanted)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_however_the_batch_is_divided(
    sizes: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of threads, the memory at hand, and the batch mates."""
    model = random_model(**{"head_dim": 32, **sizes})
    images = random_images(model, 7)
    y = torch.arange(7) % 6 - 1 if model.config.num_classes else None
    once = density(model, images, y, dtype=dtype)
    assert all(part.isfinite().all() for part in once[:3] if part is not None)
    alone = [density(model, images[i : i + 1], None if y is None else y[i : i + 1], dtype=dtype) for i in range(7)]
    assert torch.equal(once.outputs, torch.cat([part.outputs for part in alone], dim=1))
    assert torch.equal(once.gradient, torch.cat([part.gradient for part in alone]))  # type: ignore[arg-type, misc]
    for threads in (2, 3, 4, 7, 16):
        for most_bytes in (2**30, 1):
            monkeypatch.setattr(module, "MOST_BYTES", most_bytes)
            again = density(model, images, y, dtype=dtype, threads=threads)
            assert_equal(once, again)


@pytest.mark.parametrize("gradient", [True, False])
def test_memory_is_bounded(gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By MOST_BYTES, or by what one image needs, whatever the batch and the number of threads."""
    model = random_model(img_size=14, channels=32, head_dim=16, layers_per_block=3)
    images = random_images(model, 40)

    def taken(batch: int, threads: int) -> int:
        return density(model, images[:batch], gradient=gradient, threads=threads).workspace_bytes

    single, all_at_once = taken(1, 1), taken(40, 4)
    assert all_at_once > 4 * single
    for most_bytes in (1, 3 * single, all_at_once - 1):
        monkeypatch.setattr(module, "MOST_BYTES", most_bytes)
        for batch, threads in ((40, 4), (40, 1), (3, 2)):
            assert taken(batch, threads) <= max(most_bytes, single)
    stored = 9 * 4 * 32 * 48 * 3 * 2  # 9 C values for each token and layer
    assert stored < single < 4 * stored if gradient else single < stored


def test_many_groups_of_samples() -> None:
    """More samples than a group takes: with one thread and with teams, and a last group that is smaller."""
    model = load_pretrained()
    images, y = random_images(model, 29) / 2, torch.arange(29) % 11 - 1
    whole = density(model, images, y)
    assert_agree(whole, plain(model, images, y))
    for threads in (2, 5):
        assert_equal(whole, density(model, images, y, threads=threads))


@every_set
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_golden_cases(isa: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """z, every block's output, the mean log-det and the denoised image, as the published code returned them."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model = case.model().set_density("cpu")
    with torch.no_grad():
        z, outputs, log_det = model(case.tensor("in.image"), case.y)
    assert_close(z, case.tensor("out.forward_z"), GOLDEN_TOLERANCE)
    assert_close(torch.stack(outputs), case.tensor("out.forward_outputs"), GOLDEN_TOLERANCE)
    assert_close(log_det, case.tensor("out.forward_logdet").expand(len(z)), GOLDEN_TOLERANCE)
    images = case.tensor("out.reverse_unguided")
    denoised = denoise(model, images, case.y, noise_std=case.noise_std, backend="cpu")
    assert_close(denoised, case.tensor("out.denoised_unguided"), GOLDEN_TOLERANCE)


@every_set
def test_denoised_images_are_torchs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On trained weights and images to within 2e-5, in fp32; in bf16 as near to them as torch's autocast is."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model = load_pretrained()
    images, y = random_images(model, 6) / 3, torch.arange(6) % 11 - 1
    wanted = denoise(model, images, y, backend="torch")
    assert max_error(images, wanted) > 0.1
    assert_close(denoise(model, images, y, backend="cpu"), wanted, 2e-5)
    half = denoise(model, images, y, backend="cpu", dtype=torch.bfloat16)
    expression = denoise(model, images, y, backend="torch", dtype=torch.bfloat16)
    assert_close(half, wanted, error_budget(expression, wanted, torch.bfloat16))
    assert max_error(half, wanted) > 1e-4  # else it was not bf16


@every_set
def test_bf16_log_prob(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model = load_pretrained()
    images = random_images(model, 6) / 3
    with torch.no_grad():
        exact = model.set_density("torch").log_prob(images)
        with torch.autocast("cpu", torch.bfloat16):
            expression = model.log_prob(images)
            half = model.set_density("cpu").log_prob(images)
    assert_close(half, exact, error_budget(expression, exact, torch.bfloat16))
    assert not torch.equal(half, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_half_precision(dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype, num_classes=3)
    images, y = random_images(model, 2), torch.tensor([-1, 2])
    with torch.no_grad():
        found = model.set_density("cpu")(images, y)
        wanted = model.set_density("torch")(images, y)
    exact = plain(model, images, y)
    for got, expression, right in (
        (found[0], wanted[0], exact.outputs[-1]),
        (found[2], wanted[2], exact.log_det / images[0].numel()),
    ):
        assert got.dtype == expression.dtype == torch.float32
        assert_close(got, right, SAME_F32 if dtype == torch.float32 else error_budget(expression, right, dtype))


def test_weights_are_read_at_each_call() -> None:
    """Also where torch's version counters do not see the change."""
    model, other = random_model(0), random_model(1)
    images = random_images(model, 2)
    with torch.no_grad():
        wanted = other.log_prob(images)
        assert max_error(model.log_prob(images), wanted) > 1
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            ours.data.copy_(theirs.data)
        assert torch.equal(model.log_prob(images), wanted)


def test_strides_and_views() -> None:
    """Weights that are not contiguous, and images that are a view, give the same bits; nothing is mutated."""
    model = random_model(num_classes=3)
    images, y = random_images(model, 4), torch.tensor([0, -1, 2, 1])
    wanted = density(model, images, y)
    for linear in (part for part in model.modules() if isinstance(part, nn.Linear)):
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wide = torch.full((4, 1, 8, 16), torch.nan)
    wide[..., ::2] = images
    assert_equal(wanted, density(model, wide[..., ::2], y))
    assert torch.equal(wide[..., ::2], images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_set
def test_nan_stays_in_its_sample(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    model = random_model(img_size=14, channels=48, head_dim=16)
    images = random_images(model, 5)
    wanted = density(model, images)
    images[2, 0, 3, 3] = torch.nan
    found = density(model, images)
    others = [0, 1, 3, 4]
    assert found.log_det[2].isnan()
    assert found.gradient is not None
    assert wanted.gradient is not None
    assert found.gradient[2].isnan().any()
    assert torch.equal(found.outputs[:, others], wanted.outputs[:, others])
    assert torch.equal(found.gradient[others], wanted.gradient[others])


def test_a_default_dtype_or_device_changes_nothing() -> None:
    model = random_model(num_classes=2)
    images, y = random_images(model, 2), torch.tensor([1, -1])
    with torch.no_grad():
        wanted = model.set_density("cpu").log_prob(images, y), denoise(model, images, y, noise_std=0.1)
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                found = model.log_prob(images, y), denoise(model, images, y, noise_std=0.1, backend="cpu")
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, wanted, found))


def test_batches_of_images_do_not_matter() -> None:
    model = random_model(num_classes=3)
    images, y = random_images(model, 5), torch.tensor([0, 1, 2, -1, 0])
    whole = denoise(model, images, y, noise_std=0.1)
    assert torch.equal(whole, denoise(model, images, y, noise_std=0.1, batch_size=2))


def test_several_callers_at_once() -> None:
    model = random_model(img_size=14, channels=32, head_dim=16)
    images = [random_images(model, 4, seed) for seed in range(8)]
    wanted = [density(model, batch) for batch in images]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: density(model, batch, threads=2), images))
    for one, other in zip(wanted, found, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_ends_the_pass(threads: int) -> None:
    """What a signal's handler raises is raised by the call, long before its work is done."""
    model = TarFlow(1, 32, 2, 128, 1, 4)
    with torch.no_grad():
        nn.init.normal_(model.blocks[0].proj_out.weight, std=0.01)  # type: ignore[union-attr, arg-type]
    images = random_images(model, 24)
    begun = time.perf_counter()
    density(model, images, threads=threads)
    whole = time.perf_counter() - begun

    class Interrupted(Exception):
        pass

    def handler(*_: object) -> None:
        raise Interrupted

    images = images.repeat(40, 1, 1, 1)
    before = signal.signal(signal.SIGUSR1, handler)
    timer = threading.Timer(whole, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        begun = time.perf_counter()
        with pytest.raises(Interrupted):
            density(model, images, threads=threads)
        assert time.perf_counter() - begun < 20 * whole
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    density(model, images[:1], threads=threads)  # and the threads serve on


def test_denoising_by_torch_leaves_the_model_to_others() -> None:
    """Several callers at once, and a caller's autocast: neither is in the result, or in the model."""
    model, images = random_model(), random_images(random_model(), 3)
    before, wanted = dict(model.named_parameters()), denoise(model, images, noise_std=0.1, backend="torch")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: denoise(model, images, noise_std=0.1, backend="torch"), range(12)))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(denoise(model, images, noise_std=0.1, backend="torch"))
    assert all(torch.equal(each, wanted) for each in found)
    after = dict(model.named_parameters())
    assert all(after[name] is value and value.requires_grad for name, value in before.items())
