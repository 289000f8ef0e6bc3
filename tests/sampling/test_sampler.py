"""The sampler: golden images, seeds and batches, log-probabilities and options."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import GOLDEN as CASES
from cases import Case, random_latents, random_model
from tolerances import BATCH, GOLDEN, INVERSE_F64, assert_close

from tarflow_fast import reference
from tarflow_fast.errors import ArgumentError, OutOfMemoryError
from tarflow_fast.sampling import memory
from tarflow_fast.sampling.noise import latent_noise
from tarflow_fast.sampling.sampler import Sampler

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# The published code's own results


@golden
def test_reverse_is_the_published_one(case: Case) -> None:
    s = Sampler(case.model())
    z, y = case.tensor("in.z"), case.y
    given_z = z.clone()
    assert_close(s.reverse(z, y, **case.reverse_args), case.tensor("out.reverse"), GOLDEN)
    sequence = s.reverse(z, y, **case.reverse_args, return_sequence=True)
    assert_close(torch.stack(list(sequence)), case.tensor("out.reverse_sequence"), GOLDEN)
    assert_close(s.reverse(z, y), case.tensor("out.reverse_unguided"), GOLDEN)
    assert torch.equal(z, given_z)


@golden
def test_models_own_reverse_has_the_published_signature(case: Case) -> None:
    a = {"guidance": 0.0, "guide_what": "ab", "attn_temp": 1.0, "annealed_guidance": False, **case.reverse_args}
    positional = (a["guidance"], a["guide_what"], a["attn_temp"], a["annealed_guidance"])
    assert_close(case.model().reverse(case.tensor("in.z"), case.y, *positional), case.tensor("out.reverse"), GOLDEN)


def test_reverse_under_autocast_runs_in_its_dtype() -> None:
    model = random_model()
    z = random_latents(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.reverse(z)
    assert torch.equal(got, Sampler(model, dtype=torch.bfloat16).reverse(z))


# Laws


@pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}, {"nvp": False, "num_classes": 3}], ids=str)
def test_reverse_inverts_forward_in_float64(sizes: dict[str, Any]) -> None:
    model = random_model(1, torch.float64, num_blocks=3, **sizes)
    x = torch.randn(4, *model.config.data_shape, dtype=torch.float64)
    y = torch.tensor([0, 2, -1, 1]) if sizes else None
    with torch.no_grad():
        z = model(x, y)[0] / model.var.sqrt()
    assert_close(Sampler(model).reverse(z, y), x, INVERSE_F64)


@pytest.mark.parametrize("sizes", [{}, {"num_classes": 3}, {"nvp": False, "num_classes": 3}], ids=str)
def test_log_prob_is_that_of_the_density_pass(sizes: dict[str, Any]) -> None:
    model = random_model(1, torch.float64, **sizes)
    out = Sampler(model).sample(3, [0, 1, -1] if sizes else None, seed=4)
    assert out.log_prob is not None
    with torch.no_grad():
        assert_close(out.log_prob, model.log_prob(out.images, out.labels), 1e-8)


def test_image_does_not_depend_on_its_batch() -> None:
    """Image i of a seed, alone, in a batch, in small batches, from another first image, in another order."""
    model = random_model(num_classes=3)
    s = Sampler(model)
    labels = [0, 1, 2, -1]
    options: dict[str, Any] = {"seed": 7, "guidance": 1.0, "denoise": True, "noise_std": 0.1}
    whole = s.sample(64, labels, **options).images
    assert_close(s.sample(1, labels, **options).images, whole[:1], BATCH)
    assert_close(s.sample(9, labels, batch_size=2, **options).images, whole[:9], BATCH)
    assert_close(s.sample(6, labels, first=5, **options).images, whole[5:11], BATCH)
    z = latent_noise(7, [3, 0], model.config.num_patches, model.config.token_dim)
    backwards = s.reverse(z, torch.tensor([-1, 0]), guidance=1.0)
    assert_close(backwards, s.sample(4, labels, seed=7, guidance=1.0).images[[3, 0]], BATCH)


def test_seeds_and_images_differ() -> None:
    noise = torch.cat([latent_noise(seed, [0, 1, 2], 16, 4, attempt) for seed in (0, 1) for attempt in (0, 1)])
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6
    assert flat.mean().abs() < 0.15
    assert (flat.std() - 1).abs() < 0.1


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (2, [2, 2, 2, 2, 2]),
        ([0, 1], [0, 1, 0, 1, 0]),
        ((0, -5, 2), [0, -1, 2, 0, -1]),
        (torch.tensor([2, 1, 0, 2, 1]), [2, 1, 0, 2, 1]),
        (torch.tensor(1, dtype=torch.uint8), [1, 1, 1, 1, 1]),
        (-1, [-1] * 5),
    ],
    ids=str,
)
def test_labels_of_every_kind(labels: Any, wanted: list[int]) -> None:
    model = random_model(num_classes=3)
    s = Sampler(model)
    out = s.sample(5, labels)
    assert out.labels is not None
    assert out.labels.tolist() == wanted
    z = latent_noise(0, range(5), model.config.num_patches, model.config.token_dim)
    assert_close(out.images, s.reverse(z, torch.tensor(wanted)), BATCH)


def test_no_labels_is_no_class() -> None:
    s = Sampler(random_model(num_classes=3))
    assert s.sample(2).labels is None
    assert_close(s.sample(2).images, s.sample(2, -1).images, BATCH)
    assert (s.sample(2).images - s.sample(2, 0).images).abs().max() > 0.01


# Options


def test_denoise_is_tweedies_step() -> None:
    model = random_model(num_classes=2)
    model.metadata["noise_std"] = 0.2
    s = Sampler(model)
    plain = s.sample(3, [0, 1, -1]).images
    wanted = reference.denoise(model.state_dict(), plain, torch.tensor([0, 1, -1]), noise_std=0.2)
    assert_close(s.sample(3, [0, 1, -1], denoise=True).images, wanted, GOLDEN)
    half = s.sample(3, [0, 1, -1], denoise=True, denoise_scale=0.5).images
    assert_close(half - plain, (wanted - plain) / 2, GOLDEN)
    other = s.sample(3, [0, 1, -1], denoise=True, noise_std=0.1).images
    assert_close(other - plain, (wanted - plain) / 4, GOLDEN)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trajectory_ends_in_the_image() -> None:
    model = random_model(num_blocks=3, num_classes=2)
    s = Sampler(model)
    out = s.sample(5, 1, trajectory=True, guidance=1.0, batch_size=2)
    z = latent_noise(0, range(5), model.config.num_patches, model.config.token_dim)
    wanted = s.reverse(z, 1, guidance=1.0, return_sequence=True)
    assert out.trajectory is not None
    assert len(out.trajectory) == 4
    assert_close(torch.stack(out.trajectory), torch.stack(list(wanted)), BATCH)
    assert torch.equal(out.trajectory[-1], out.images)
    assert out.log_prob is None


def test_report_says_what_ran() -> None:
    model = random_model()
    out = Sampler(model, backend="torch", dtype=torch.bfloat16).sample(3, batch_size=2)
    report = out.report.to_dict()
    config = model.config
    assert (report["backend"], report["backend_reason"]) == ("torch", "asked for")
    assert (report["device"], report["dtype"], report["solver"]) == ("cpu", "bfloat16", "auto")
    assert report["batch_size"] == 2
    assert report["tokens"] == 3 * config.num_blocks * config.num_patches
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["seconds"])
    assert report["cache_bytes"] == 2 * 2 * config.layers_per_block * config.num_patches * config.channels * 2
    assert report["redrawn"] == {}


def test_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    s = Sampler(random_model())
    s.sample(1)
    assert capsys.readouterr().err == ""
    s.sample(1, progress=True)
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"backend": "torch"}, {"device": "cpu"}, {"solver": "sequential"}], ids=str)
def test_explicit_choices_give_the_same_images(option: dict[str, Any]) -> None:
    model = random_model()
    assert_close(Sampler(model, **option).sample(2).images, Sampler(model).sample(2).images, BATCH)


def test_weights_changed_later_have_no_effect() -> None:
    model = random_model()
    model.metadata["noise_std"] = 0.3
    s = Sampler(model)
    before, copied = s.sample(2), copy.deepcopy(s)
    denoised = s.sample(2, denoise=True).images
    with torch.no_grad():
        for value in (*model.parameters(), model.var):
            value.mul_(1.1)
    after = s.sample(2)
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.log_prob, before.log_prob)
    uses: list[Callable[[Sampler], object]] = [lambda s: s.sample(1, denoise=True), copy.deepcopy, pickle.dumps]
    for use in uses:
        with pytest.raises(ArgumentError, match=r"^model: expected the weights that the sampler was made of"):
            use(s)
    assert torch.equal(copied.sample(2, denoise=True).images, denoised)  # it has weights of its own


# Memory


def test_large_requests_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    s = Sampler(model)
    wanted = s.sample(7).images
    z = random_latents(model, 7)
    wanted_reverse = s.reverse(z)
    room = int(3.5 * s.engines[0].bytes_per_sample(False) / memory.MEMORY_SHARE)
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    out = s.sample(7)
    assert out.report.batch_size == 3
    assert_close(out.images, wanted, BATCH)
    assert_close(s.reverse(z), wanted_reverse, BATCH)
    with pytest.raises(OutOfMemoryError, match=r"7 samples need .* 3 would fit"):
        s.sample(7, batch_size=7)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.raises(OutOfMemoryError, match="0 would fit"):
        s.sample(1)
