"""The affine map of a flow block in one kernel: against the equation, its laws, and the model with and without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import KERNEL_DEVICE, random_images, random_model
from tolerances import SAME_F32, SAME_F64, assert_close, error_budget, max_error
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tarflow_fast.errors import ArgumentError, BackendError
from tarflow_fast.kernels import launch
from tarflow_fast.kernels.affine_density import TILE, affine_density, affine_density_backward, affine_density_reference
from tarflow_fast.models import affine_density as ops

SIZES = [(2, 5, 3), (3, 1, 4), (1, 16, 1), (2, 37, 100), (1, 2, 2100)]
"""B, T, D: odd, one token, one value, tokens in several programs, a token larger than a program should be."""

every_size = pytest.mark.parametrize("size", SIZES, ids=str)
every_kind = pytest.mark.parametrize(("nvp", "flip"), [(True, False), (True, True), (False, False), (False, True)])
every_dtype = pytest.mark.parametrize("dtype", launch.DTYPES, ids=str)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nothing has been written to holds NaNs."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9, device=KERNEL_DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def operands(size: tuple[int, int, int], nvp: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """out, with xa of some tenths, and x."""
    B, T, D = size
    out = torch.randn(B, T, 2 * D if nvp else D, device=KERNEL_DEVICE)
    out[..., :D] *= 0.3 if nvp else 1
    return out.to(dtype), torch.randn(B, T, D, device=KERNEL_DEVICE)


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def pullback(f: Callable[..., Any], out: Tensor, x: Tensor, seeds: tuple[Tensor, Tensor], *how: bool) -> list[Tensor]:
    """The gradients of ⟨seeds, f(out, x)⟩."""
    out, x = out.detach().requires_grad_(), x.detach().requires_grad_()
    results = f(out, x, *how)
    loss = sum((s.to(r.dtype) * r).sum() for s, r in zip(seeds, results, strict=True))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, (out, x)))


def seeds_for(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.randn_like(x), torch.randn(x.shape[:2], device=x.device)


def test_the_reference_by_hand() -> None:
    out = torch.tensor([[[0.5, -1.0], [0.25, 2.0], [9.0, 9.0]]], dtype=torch.float64)  # T = 3, D = 1
    x = torch.tensor([[[3.0], [4.0], [5.0]]], dtype=torch.float64)
    z, log_det = affine_density_reference(out, x, True)
    assert_close(z, torch.tensor([[[3.0], [5 * 0.6065306597126334], [3 * 0.7788007830714049]]]).double(), 1e-6)
    assert_close(log_det, torch.tensor([[0.0, -0.5, -0.25]]), 0)
    z, log_det = affine_density_reference(out[..., 1:], x.flip(1), False, flip=True)
    assert_close(z, torch.tensor([[[3.0], [5.0], [3.0]]]), 0)
    assert not log_det.any()


@every_kind
class TestAgainstReference:
    @every_size
    @every_dtype
    def test_forward(self, nvp: bool, flip: bool, dtype: torch.dtype, size: Any, poisoned: None) -> None:
        out, x = operands(size, nvp, dtype)
        z, log_det = affine_density(out, x, nvp, flip)
        wanted, wanted_log_det = affine_density_reference(*double(out, x), nvp, flip)
        assert z.dtype == log_det.dtype == torch.float32
        assert_close(z, wanted, SAME_F32)
        assert_close(log_det, wanted_log_det, SAME_F32)

    @every_size
    @every_dtype
    def test_backward(self, nvp: bool, flip: bool, dtype: torch.dtype, size: Any, poisoned: None) -> None:
        out, x = operands(size, nvp, dtype)
        seeds = seeds_for(x)
        dout, dx = pullback(affine_density, out, x, seeds, nvp, flip)
        exact, wanted_dx = pullback(affine_density_reference, *double(out, x), seeds, nvp, flip)
        plain, _ = pullback(affine_density_reference, out, x, seeds, nvp, flip)
        assert (dout.dtype, dx.dtype) == (dtype, torch.float32)
        assert not dout[:, -1].any()
        assert_close(dx, wanted_dx, SAME_F32)
        assert max_error(dout, exact) <= (SAME_F32 if dtype == torch.float32 else error_budget(plain, exact, dtype))

    def test_the_torch_path(self, nvp: bool, flip: bool) -> None:
        out, x = double(*operands((2, 5, 3), nvp))
        for got, wanted in zip(
            ops.affine_density(out, x, nvp, flip), affine_density_reference(out, x, nvp, flip), strict=True
        ):
            assert_close(got, wanted, SAME_F64)

    @pytest.mark.parametrize("expanded", [True, False])
    def test_any_strides(self, nvp: bool, flip: bool, expanded: bool, poisoned: None) -> None:
        """Operands that are views; gradients that are one value expanded, as of sums, or a transposed view."""
        B, T, D = 2, 7, 5
        x = operands((B, D, T))[1].transpose(1, 2)
        out = operands((B, T, 2 * D), nvp)[0][..., ::2]
        seed = torch.ones(()) if expanded else torch.randn(B, D, T)
        rows = torch.tensor([[2.0], [3.0]]) if expanded else torch.randn(T, B).T
        seeds = seed.to(x.device).expand(B, D, T).transpose(1, 2), rows.to(x.device).expand(B, T)
        assert not any(t.is_contiguous() for t in (x, out, *seeds))
        out.requires_grad_(), x.requires_grad_()
        got = torch.autograd.grad(affine_density(out, x, nvp, flip), (out, x), seeds)
        wanted = pullback(affine_density_reference, *double(out, x), seeds, nvp, flip)
        for a, b in zip(got, wanted, strict=True):
            assert_close(a, b, SAME_F32)


@every_kind
class TestLaws:
    def test_token_by_token_inverse(self, nvp: bool, flip: bool) -> None:
        """x_{i+1} = z_{i+1} · exp(xa_i) + xb_i gives x back."""
        out, x = operands((2, 6, 3), nvp)
        z = affine_density(out, x, nvp, flip)[0]
        z = z.flip(1) if flip else z
        xa, xb = out.chunk(2, -1) if nvp else (torch.zeros_like(out), out)
        back = torch.cat([z[:, :1], z[:, 1:] * xa[:, :-1].exp() + xb[:, :-1]], 1)
        assert_close(back.flip(1) if flip else back, x, SAME_F32)

    def test_log_det_is_the_jacobians(self, nvp: bool, flip: bool) -> None:
        out, x = operands((1, 4, 3), nvp)
        jacobian = torch.autograd.functional.jacobian(lambda x: affine_density(out, x, nvp, flip)[0], x)
        log_det = affine_density(out, x, nvp, flip)[1].sum()
        assert_close(log_det, torch.linalg.slogdet(jacobian.reshape(12, 12)).logabsdet, SAME_F32)
        assert (log_det.abs().item() > 0.1) == nvp

    def test_backward_is_the_adjoint_of_the_tangent(self, nvp: bool, flip: bool) -> None:
        """⟨seeds, J v⟩ = ⟨Jᵀ seeds, v⟩: J of the reference, Jᵀ the kernel's."""
        out, x = operands((2, 6, 3), nvp)
        v, seeds = double(torch.randn_like(out), torch.randn_like(x)), seeds_for(x)
        _, tangents = torch.autograd.functional.jvp(
            lambda out, x: affine_density_reference(out, x, nvp, flip), tuple(double(out, x)), tuple(v)
        )
        gradients = pullback(affine_density, out, x, seeds, nvp, flip)
        left, right = (
            sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((seeds, tangents), (gradients, v))
        )
        assert abs(left - right) <= 10 * SAME_F32


def test_infinities_and_nans_stay_where_they_are() -> None:
    """A token's values reach its own row alone, and token 0 nothing but itself; the last output, nothing."""
    out, x = operands((1, 4, 2))
    x[0, 0, 0], x[0, 2, 1], out[0, 3] = torch.inf, torch.nan, torch.nan
    z, log_det = affine_density(out, x, True)
    assert z[0, 0].tolist() == x[0, 0].tolist()
    assert z.isnan().nonzero().tolist() == [[0, 2, 1]]
    dout, dx = pullback(affine_density, out, x, seeds_for(x), True, False)
    assert not dout[0, 3].any()
    assert dout.isnan().nonzero().tolist() == [[0, 1, 1]]  # dxa = −dz · z
    assert dx.isfinite().all()
    assert log_det.isfinite().all()


def test_log_dets_are_fp32_under_any_default() -> None:
    out, x = operands((2, 5, 3))
    wanted = affine_density(out, x, True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = affine_density(out, x, True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


class TestOperator:
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck of torch 2.15
    @every_kind
    def test_is_a_well_behaved_op(self, nvp: bool, flip: bool) -> None:
        out, x = operands((2, 3, 2), nvp, torch.bfloat16)
        torch.library.opcheck(affine_density, (out.requires_grad_(), x.requires_grad_(), nvp, flip))
        z, dz, dlog_det = x.detach(), torch.randn_like(x), torch.randn(1, 1, device=x.device).expand(2, 3)
        kept = (z, out.detach()) if nvp else (None, None)
        torch.library.opcheck(affine_density_backward, (dz, dlog_det, *kept, out.dtype, flip))

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiled(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One graph, forward and backward, at two batch sizes."""
        monkeypatch.setattr(ops, "fused", lambda x, nvp: True)
        torch.compiler.reset()

        def f(out: Tensor, x: Tensor, nvp: bool, flip: bool) -> tuple[Tensor, Tensor]:
            z, log_det = ops.affine_density(2 * out, x.flip(1), nvp, flip)
            return z.square(), log_det.sum(1, keepdim=True).expand(x.shape[:2])

        compiled = torch.compile(f, backend=backend, fullgraph=True)
        for B, nvp, flip in ((2, True, True), (3, True, True), (3, False, False)):
            out, x = operands((B, 5, 3), nvp)
            seeds = seeds_for(x)
            for got, wanted in zip(compiled(out, x, nvp, flip), f(out, x, nvp, flip), strict=True):
                assert_close(got, wanted, SAME_F32)
            grads = pullback(compiled, out, x, seeds, nvp, flip), pullback(f, out, x, seeds, nvp, flip)
            for got, wanted in zip(*grads, strict=True):
                assert_close(got, wanted, 10 * SAME_F32)

    def test_volume_preserving_keeps_nothing(self) -> None:
        """Its gradients need neither z nor out; those of the other kind need no more than the two."""
        for nvp, kept in ((True, 2), (False, 0)):
            out, x = operands((2, 3, 2), nvp)
            z, _ = affine_density(out.requires_grad_(), x, nvp)
            assert sum(t is not None for t in z.grad_fn.saved_tensors) == kept  # type: ignore[union-attr]


class TestInTheModel:
    @pytest.mark.parametrize(
        "sizes",
        [
            {"num_classes": 2},
            {"nvp": False},
            {"in_channels": 3, "img_size": 9, "patch_size": 3, "channels": 48, "head_dim": 16, "num_blocks": 3},
            {"img_size": 4, "patch_size": 4, "num_blocks": 2},
        ],
        ids=str,
    )
    def test_the_kernel_changes_nothing(self, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        model = random_model(7, **sizes).to(KERNEL_DEVICE)
        x = random_images(model, 2)

        def run(fused: bool) -> list[Tensor]:
            tokens: list[torch.Size] = []
            monkeypatch.setattr(ops, "fused", lambda x, nvp: tokens.append(x.shape) or fused)
            images = x.to(KERNEL_DEVICE).requires_grad_()
            model.zero_grad()
            z, outputs, log_det = model(images)
            assert len(tokens) == len(outputs) == model.config.num_blocks
            (z.numel() * model.get_loss(z, log_det)).backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert images.grad is not None
            return [z, torch.stack(outputs), log_det, images.grad, *grads]

        for got, wanted in zip(run(True), run(False), strict=True):
            assert_close(got, wanted, SAME_F32 * max(1.0, wanted.abs().max().item()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        model = random_model(7).to(KERNEL_DEVICE)
        x = random_images(model, 2).to(KERNEL_DEVICE)
        results = []
        for fused in (True, False):
            monkeypatch.setattr(ops, "fused", lambda x, nvp, fused=fused: fused)
            with torch.autocast(KERNEL_DEVICE.type, dtype=dtype):
                z, _, log_det = model(x)
            assert z.dtype == log_det.dtype == torch.float32
            results.append((z, log_det))
        for got, wanted in zip(*results, strict=True):
            assert_close(got, wanted, error_budget(wanted, wanted, dtype))

    @pytest.mark.parametrize("proven", [True, False])
    @pytest.mark.parametrize("triton", [True, False])
    def test_where_it_is_used(self, triton: bool, proven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU that has proven it, in fp32, if there is Triton; never in the interpreter unless a test says so."""
        asked: list[Any] = []
        monkeypatch.setattr(ops, "HAS_TRITON", triton)
        monkeypatch.setattr(ops, "density_proven", lambda *block: asked.append(block) or proven)
        with FakeTensorMode():  # needs no GPU
            for device in ("cpu", "cuda"):
                wanted = device == "cuda" and triton and proven
                assert ops.fused(torch.empty(2, 3, 4, device=device), True) == wanted
                assert not ops.fused(torch.empty(2, 3, 4, device=device, dtype=torch.float64), True)
        assert asked == ([(torch.device("cuda", 0), 3, 4, True)] if triton else [])

    def test_the_model_needs_no_triton(self) -> None:
        """It is not imported on the CPU, and may be missing."""
        code = (
            "import sys; sys.modules['triton'] = None; import torch; from tarflow_fast import TarFlow\n"
            "from tarflow_fast.models import affine_density as ops; assert not ops.HAS_TRITON\n"
            "TarFlow(1, 4, 2, 8, 2, 1, head_dim=8)(torch.zeros(1, 1, 4, 4))"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "out", "x", "message"),
        [
            ("x", {}, {"shape": (2, 3)}, r"shape \(-1, -1, -1\), got \(2, 3\)"),
            ("x", {}, {"dtype": torch.float64}, "float32, got float64"),
            ("x", {}, {"dtype": torch.bfloat16}, "float32, got bfloat16"),
            ("out", {"shape": (2, 3, 4)}, {}, r"shape \(2, 3, 8\), got \(2, 3, 4\)"),
            ("out", {"shape": (2, 2, 8)}, {}, r"shape \(2, 3, 8\), got \(2, 2, 8\)"),
            ("out", {"dtype": torch.float64}, {}, "float32 or bfloat16 or float16, got float64"),
            pytest.param(
                *("out", {"device": "cpu"}, {}, "a tensor on cuda:0, got cpu"),
                marks=pytest.mark.skipif(KERNEL_DEVICE.type == "cpu", reason="there is one device"),
            ),
        ],
    )
    def test_operands(self, name: str, out: dict[str, Any], x: dict[str, Any], message: str) -> None:
        def make(*size: int, shape: tuple[int, ...] | None = None, **how: Any) -> Tensor:
            return torch.zeros(shape or size, **{"device": KERNEL_DEVICE, **how})

        with pytest.raises(ArgumentError, match=f"^{name}: expected {message}"):
            affine_density(make(2, 3, 8, **out), make(2, 3, 4, **x), True)

    @pytest.mark.parametrize("name", ["dz", "dlog_det", "z", "out"])
    def test_operands_of_the_backward(self, name: str) -> None:
        out, x = operands((2, 3, 4))
        given = {"dz": x, "dlog_det": x[..., 0], "z": x, "out": out}
        given[name] = given[name][:, 0] if name == "dz" else given[name][:, :2]
        with pytest.raises(ArgumentError, match=f"^{name}: expected shape"):
            affine_density_backward(**given, dtype=out.dtype, flip=False)

    def test_no_device_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "interpreting", lambda: False)
        with pytest.raises(BackendError, match="affine_density: Triton kernels need a CUDA device, these"):
            affine_density(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2), True)

    def test_second_derivatives(self) -> None:
        out, x = operands((1, 2, 2))
        z, _ = affine_density(out.requires_grad_(), x, True)
        (dout,) = torch.autograd.grad(z.sum(), out, create_graph=True)
        with pytest.raises(RuntimeError, match="affine_density_backward"):
            dout.sum().backward()


def test_sizes_reach_every_branch() -> None:
    """SIZES holds tokens for more than one program, and a token of more values than TILE."""
    assert any(T * D > TILE and D < TILE for _, T, D in SIZES)
    assert any(D > TILE for _, _, D in SIZES)
