"""The oracle against the published code's outputs, and against the laws that any correct flow obeys."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GOLDEN, Case, random_images, random_latents, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import GOLDEN as GOLDEN_TOLERANCE
from tolerances import INVERSE_F64, LOG_DET_F64, SAME_F64, assert_close
from torch import Tensor

import tarflow_fast
from tarflow_fast import reference

TINY: dict[str, Any] = {"in_channels": 2, "img_size": 2, "patch_size": 1, "channels": 16, "head_dim": 8}
"""T = 4 tokens of D = 2 values: a Jacobian of 8 × 8."""

golden = pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)

sizes = st.fixed_dictionaries(
    {
        "in_channels": st.integers(1, 3),
        "img_size": st.sampled_from([2, 4, 6]),
        "patch_size": st.sampled_from([1, 2]),
        "channels": st.sampled_from([16, 32]),
        "head_dim": st.sampled_from([8, 16]),
        "num_blocks": st.integers(1, 3),
        "layers_per_block": st.integers(1, 2),
        "nvp": st.booleans(),
        "num_classes": st.sampled_from([0, 1, 3]),
    }
)


def tokens_of(case: Case, name: str = "in.image") -> Tensor:
    return reference.patchify(case.tensor(name), case.constructor["patch_size"])


def images_of(case: Case, tokens: Tensor) -> Tensor:
    return reference.unpatchify(tokens, case.constructor["patch_size"])


@golden
class TestGolden:
    def test_density(self, case: Case) -> None:
        x = tokens_of(case)
        labels = {"forward": case.y}
        if case.y is not None:
            labels |= {"forward_dropped": case.tensor("in.y_dropped"), "forward_nolabel": None}
        for key, y in labels.items():
            result = reference.density(case.weights, x, y)
            assert_close(result.z, case.tensor(f"out.{key}_z"), GOLDEN_TOLERANCE)
            mean_log_det = result.log_det / x[0].numel()
            wanted = case.tensor(f"out.{key}_logdet").expand(len(x))
            assert_close(mean_log_det, wanted, GOLDEN_TOLERANCE)

    def test_every_block(self, case: Case) -> None:
        outputs = reference.density(case.weights, tokens_of(case), case.y).outputs
        assert_close(torch.stack(outputs), case.tensor("out.forward_outputs"), GOLDEN_TOLERANCE)

    def test_inverse(self, case: Case) -> None:
        result = reference.inverse(case.weights, case.tensor("in.z"), case.y, **case.reverse_args)
        assert_close(images_of(case, result.x), case.tensor("out.reverse"), GOLDEN_TOLERANCE)
        sequence = torch.stack([images_of(case, x) for x in result.sequence])
        assert_close(sequence, case.tensor("out.reverse_sequence"), GOLDEN_TOLERANCE)

    def test_inverse_unguided(self, case: Case) -> None:
        result = reference.inverse(case.weights, case.tensor("in.z"), case.y)
        assert_close(images_of(case, result.x), case.tensor("out.reverse_unguided"), GOLDEN_TOLERANCE)

    def test_loss_and_gradient(self, case: Case) -> None:
        images = case.tensor("out.reverse_unguided").requires_grad_()
        x = reference.patchify(images, case.constructor["patch_size"])
        result = reference.density(case.weights, x, case.y)
        loss = 0.5 * (result.z**2).mean() - (result.log_det / x[0].numel()).mean()
        assert_close(loss.reshape(1), case.tensor("out.loss_at_unguided"), GOLDEN_TOLERANCE)
        (gradient,) = torch.autograd.grad(loss, images)
        # The loss is a mean over all values: bring the gradient to the size of one value's before comparing.
        wanted = case.tensor("out.grad_at_unguided")
        assert_close(gradient * x.numel(), wanted * x.numel(), GOLDEN_TOLERANCE)

    def test_denoise(self, case: Case) -> None:
        images = case.tensor("out.reverse_unguided")
        denoised = reference.denoise(case.weights, images, case.y, noise_std=case.noise_std)
        assert_close(denoised, case.tensor("out.denoised_unguided"), GOLDEN_TOLERANCE)


@settings(max_examples=20)
@given(sizes=sizes, seed=st.integers(0, 9), batch=st.integers(1, 3), data=st.data())
def test_inverse_undoes_density(sizes: dict[str, Any], seed: int, batch: int, data: st.DataObject) -> None:
    model = random_model(seed, torch.float64, **sizes)
    weights, head_dim = model.state_dict(), sizes["head_dim"]
    labels = data.draw(st.lists(st.integers(-2, sizes["num_classes"] - 1), min_size=batch, max_size=batch))
    y = torch.tensor(labels) if sizes["num_classes"] else None
    x = random_latents(model, batch, seed)
    forward = reference.density(weights, x, y, head_dim=head_dim)
    backward = reference.inverse(weights, forward.z / weights["var"].sqrt(), y, head_dim=head_dim)
    assert_close(backward.x, x, INVERSE_F64)
    assert_close(backward.token_log_det, -forward.token_log_det, INVERSE_F64)
    for k, output in enumerate(forward.outputs):  # sequence[0] is z before the prior's scale
        if k < len(forward.outputs) - 1:
            assert_close(backward.sequence[-2 - k], output, INVERSE_F64)


def jacobian_log_det(f: Any, x: Tensor) -> Tensor:
    """log|det df/dx| of f: (1, T, D) → (1, T, D)."""
    jacobian = torch.autograd.functional.jacobian(f, x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet


@pytest.mark.parametrize("nvp", [True, False])
@pytest.mark.parametrize("label", [None, -1, 1])
class TestLogDet:
    def test_density(self, nvp: bool, label: int | None) -> None:
        model = random_model(1, torch.float64, **TINY, nvp=nvp, num_classes=3)
        weights, x = model.state_dict(), random_latents(model, 1)
        y = None if label is None else torch.tensor([label])
        log_det = reference.density(weights, x, y, head_dim=8).log_det
        wanted = jacobian_log_det(lambda x: reference.density(weights, x, y, head_dim=8).z, x)
        assert_close(log_det[0], wanted, LOG_DET_F64)
        assert (log_det.abs().item() > 1e-3) == nvp

    @pytest.mark.parametrize("options", [{}, {"guidance": 1.5, "attn_temp": 0.5, "annealed_guidance": True}])
    def test_inverse(self, nvp: bool, label: int | None, options: dict[str, Any]) -> None:
        model = random_model(2, torch.float64, **TINY, nvp=nvp, num_classes=3)
        weights, z = model.state_dict(), random_latents(model, 1)
        y = None if label is None else torch.tensor([label])
        log_det = reference.inverse(weights, z, y, head_dim=8, **options).log_det
        wanted = jacobian_log_det(lambda z: reference.inverse(weights, z, y, head_dim=8, **options).x, z)
        assert_close(log_det[0], wanted, LOG_DET_F64)

    def test_log_prob_of_a_sample(self, nvp: bool, label: int | None) -> None:
        """log N(z; 0, 1) less the inverse's log-det is log_prob of what z became."""
        model = random_model(3, torch.float64, nvp=nvp, num_classes=3)
        weights, z = model.state_dict(), random_latents(model, 2)
        y = None if label is None else torch.tensor([label, label])
        result = reference.inverse(weights, z, y)
        normal = -0.5 * (z**2 + math.log(2 * math.pi)).sum(dim=(1, 2))
        assert_close(normal - result.log_det, reference.log_prob(weights, result.x, y), LOG_DET_F64)


def test_parameters_are_causal() -> None:
    """xa_i and xb_i depend on tokens 0 … i and on no later one; a prefix alone gives the same."""
    model = random_model(0, torch.float64)
    weights, x = model.state_dict(), random_latents(model, 2)
    for k in range(2):
        whole = reference.affine_parameters(weights, k, x, None)
        prefix = reference.affine_parameters(weights, k, x[:, :5], None)
        changed = x.clone()
        changed[:, 5:] += 1
        later = reference.affine_parameters(weights, k, changed, None)
        for a, b, c in zip(whole, prefix, later, strict=True):
            assert_close(b, a[:, :5], SAME_F64)
            assert_close(c[:, :5], a[:, :5], SAME_F64)
            assert not torch.allclose(c[:, 5:], a[:, 5:])


class TestGuidance:
    weights = random_model(4, torch.float64, num_classes=3).state_dict()
    z = random_latents(random_model(4, torch.float64), 2)
    y = torch.tensor([0, 2])

    def inverse(self, **options: Any) -> Tensor:
        return reference.inverse(self.weights, self.z, self.y, **options).x

    def test_zero_is_unguided(self) -> None:
        plain = self.inverse()
        assert torch.equal(self.inverse(guidance=0.0, attn_temp=0.1, annealed_guidance=True), plain)

    def test_every_option_matters(self) -> None:
        plain = {"guidance": 1.0}
        changes: list[dict[str, Any]] = [
            {"guidance": 0.0},
            {"guide_what": "a"},
            {"guide_what": "b"},
            {"attn_temp": 0.5},
            {"annealed_guidance": True},
        ]
        results = [self.inverse(**plain)] + [self.inverse(**plain | change) for change in changes]
        for i, a in enumerate(results):
            assert all((a - b).abs().max() > 1e-3 for b in results[:i])

    def test_weights_by_token(self) -> None:
        """(guided − conditional) / (conditional − unguided) is g_i, the same for every value of token i."""
        x = self.z
        cond = reference.affine_parameters(self.weights, 0, x, self.y)
        free = reference.affine_parameters(self.weights, 0, x, None, attn_temp=0.5)
        options = {"guidance": 2.0, "attn_temp": 0.5}
        T = x.shape[1]
        ramp = 2.0 * torch.arange(1, T + 1, dtype=torch.float64).view(1, T, 1) / (T - 1)
        for annealed, g in ((True, ramp), (False, torch.full_like(ramp, 2.0))):
            guided = reference.guided_parameters(self.weights, 0, x, self.y, annealed_guidance=annealed, **options)
            for out, c, u in zip(guided, cond, free, strict=True):
                assert_close(out, c + g * (c - u), SAME_F64)

    def test_only_what_is_asked(self) -> None:
        cond = reference.affine_parameters(self.weights, 1, self.z, self.y)
        for what, kept in (("a", 1), ("b", 0)):
            guided = reference.guided_parameters(self.weights, 1, self.z, self.y, guidance=1.0, guide_what=what)
            assert torch.equal(guided[kept], cond[kept])
            assert not torch.allclose(guided[1 - kept], cond[1 - kept])

    def test_no_class_is_not_guided(self) -> None:
        """Without a class and at temperature 1 both branches agree, so that guidance changes nothing."""
        free = reference.inverse(self.weights, self.z, None).x
        guided = reference.inverse(self.weights, self.z, torch.tensor([-1, -1]), guidance=3.0).x
        assert_close(guided, free, SAME_F64)


@pytest.mark.parametrize("direction", ["density", "inverse"])
def test_negative_label_is_no_class(direction: str) -> None:
    model = random_model(5, torch.float64, num_classes=3)
    weights, x = model.state_dict(), random_latents(model, 3)

    def run(y: Tensor | None) -> Tensor:
        result: Tensor = getattr(reference, direction)(weights, x, y)[0]
        return result

    mixed, none, labelled = run(torch.tensor([-1, 2, -7])), run(None), run(torch.tensor([2, 2, 2]))
    assert_close(mixed, torch.stack([none[0], labelled[1], none[2]]), SAME_F64)
    assert not torch.allclose(none, labelled)


def test_denoise_is_a_step_along_the_score() -> None:
    model = random_model(6, torch.float64, num_classes=3)
    images, y = random_images(model, 2).requires_grad_(), torch.tensor([1, -1])
    log_p = reference.log_prob(model.state_dict(), reference.patchify(images, 2), y).sum()
    (score,) = torch.autograd.grad(log_p, images)
    with torch.no_grad():  # the caller's mode must not matter
        denoised = reference.denoise(model.state_dict(), images, y, noise_std=0.2, scale=0.5)
    assert_close(denoised, images + 0.5 * 0.04 * score, SAME_F64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_everything_in_the_weights_dtype(dtype: torch.dtype) -> None:
    weights = random_model(0, dtype, num_classes=2).state_dict()
    x, y = random_latents(random_model(), 2), torch.tensor([0, -1])
    forward = reference.density(weights, x, y)
    backward = reference.inverse(weights, x, y, guidance=1.0, annealed_guidance=True)
    images = reference.unpatchify(x, 2)
    results = [
        forward.z,
        *forward.outputs,
        forward.log_det,
        forward.token_log_det,
        backward.x,
        *backward.sequence,
        backward.log_det,
        backward.token_log_det,
        reference.log_prob(weights, x, y),
        reference.denoise(weights, images, y, noise_std=0.1),
    ]
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patchify(channels: int, patch_size: int) -> None:
    images = torch.randn(2, channels, 8, 8)
    tokens = reference.patchify(images, patch_size)
    assert torch.equal(tokens, F.unfold(images, patch_size, stride=patch_size).transpose(1, 2))
    assert torch.equal(reference.unpatchify(tokens, patch_size), images)


def imports(path: Path) -> set[str]:
    """What a file imports: `from m import n` as m.n, relative names from the package's on."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ("tarflow_fast." if node.level else "") + (node.module or "")
            names |= {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return names


def test_stands_alone() -> None:
    """The oracle imports nothing of the package, and nothing of the package imports the oracle."""
    package = Path(tarflow_fast.__file__).parent
    own = imports(package / "reference.py")
    assert {name.split(".")[0] for name in own} <= {"__future__", "collections", "math", "torch", "typing"}
    kernels = package.parent / "kernels"
    for path in [*package.rglob("*.py"), *kernels.rglob("*.py")]:
        assert not any(name.split(".")[:2] == ["tarflow_fast", "reference"] for name in imports(path)), path
