"""The plan of a model for its parallel solvers: where passes start, and how many of them a block takes.

A pass refines guesses, and the better the first one, the fewer passes. The guess is affine for each position and value,

    x ≈ slope · z + shift,      slope = cov(z, x) / var(z),   shift = mean(x) − slope · mean(z),

fitted by least squares to the tokens that each flow block took in and gave out for images of the model itself. The
passes and evaluations that each window takes are counted from those guesses; they do not depend on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..checks import check_dense, kind_of
from ..engine.shape import BlockShape
from ..errors import ArgumentError, CheckpointError
from ..files import check_path, replacing
from .pass_estimate import PassEstimate
from .windows import widths


@dataclass(frozen=True, eq=False)
class SolverPlan:
    """A plan of a model for its parallel solvers: guesses for tokens, and known numbers of passes.

    All tensors are fp32 and have the flow blocks along their first dimension. K is the number of blocks, and n that of
    the windows `widths(T)`.

    Attributes:
        slope: (K, T, D), the slope of the guess x ≈ slope · z + shift, in each block's own token order.
        shift: (K, T, D), the shift of the guess.
        passes: (K, n), the passes that a block takes with each window; NaN where it is not known.
        evaluations: (K, n), the evaluations of one sample that a block takes with each window; NaN where it is not
            known.
    """

    slope: Tensor
    shift: Tensor
    passes: Tensor
    evaluations: Tensor

    @classmethod
    def fit(cls, pairs: Sequence[tuple[Tensor, Tensor]]) -> SolverPlan:
        """Fit the guesses of a plan by least squares.

        Its passes and evaluations are not known yet.

        Args:
            pairs: For each block, the tokens that it took in and those that it gave out: (n, T, D) each, in its own
                token order, n >= 2.

        Returns:
            The plan, on the CPU.
        """
        slopes, shifts = [], []
        for z, x in pairs:
            mean_z, mean_x = z.mean(0), x.mean(0)
            slope = ((z - mean_z) * (x - mean_x)).mean(0) / (z - mean_z).square().mean(0)
            slope = torch.where(slope.isfinite(), slope, 0)  # 0 / 0 where a value is the same in all images
            slopes.append(slope)
            shifts.append(mean_x - slope * mean_z)
        unknown = torch.full(
            (len(pairs), len(widths(pairs[0][0].shape[1]))), torch.nan, dtype=torch.float32, device="cpu"
        )
        return cls(torch.stack(slopes).float().cpu(), torch.stack(shifts).float().cpu(), unknown, unknown.clone())

    def guess(self, k: int, z: Tensor) -> Tensor:
        """Returns where the passes of a block start.

        Args:
            k: The number of the block.
            z: (B, T, D), the block's latents, in its own token order.

        Returns:
            (B, T, D), slope · z + shift, in the dtype and on the device of z.
        """
        slope, shift = self.slope[k].to(z), self.shift[k].to(z)
        return torch.addcmul(shift, slope, z)

    def pace(self, k: int) -> PassEstimate:
        """Returns what a block takes, as far as it is known.

        Args:
            k: The number of the block.

        Returns:
            The passes and evaluations of the block for each window that is known.
        """
        tokens = self.slope.shape[1]
        passes, evaluations = (
            {window: value for window, value in zip(widths(tokens), row[k].tolist(), strict=True) if value == value}
            for row in (self.passes, self.evaluations)
        )
        return PassEstimate(tokens, passes, evaluations)

    def check(self, shape: tuple[int, int, int]) -> SolverPlan:
        """Check that this is a plan of a model of these sizes.

        Args:
            shape: (K, T, D) of the model.

        Returns:
            The plan itself.

        Raises:
            ArgumentError: A tensor has another shape, a guess is not finite, or a number of passes or evaluations is
                not positive.
        """
        K, T, _ = shape
        for field in fields(self):
            tensor = getattr(self, field.name)
            if not isinstance(tensor, Tensor):
                raise ArgumentError("plan", f"one whose {field.name} is a tensor", type(tensor).__name__)
            check_dense("plan", tensor)
        for tensor in (self.slope, self.shift):
            if tuple(tensor.shape) != shape:
                raise ArgumentError("plan", f"one of a model with (blocks, tokens, values) = {shape}", tensor.shape)
            if not torch.isfinite(tensor).all():
                raise ArgumentError("plan", "finite guesses", "infinities or NaNs")
        for tensor in (self.passes, self.evaluations):
            if tuple(tensor.shape) != (K, len(widths(T))):
                wanted = f"passes and evaluations of (blocks, windows) = {(K, len(widths(T)))}"
                raise ArgumentError("plan", wanted, tuple(tensor.shape))
            if (tensor <= 0).any() or tensor.isinf().any():
                raise ArgumentError("plan", "positive numbers of passes and evaluations", f"{tensor.min().item():g}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a `.safetensors` file, replacing it.

        Args:
            path: A file name that ends in `.safetensors`, in an existing folder.

        Raises:
            ArgumentError: The path is not a place where such a file can be written.
            OSError: The system refuses to write.
        """
        path = check_path("path", path, (".safetensors",))
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        with replacing(path) as partial:
            partial.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SolverPlan:
        """Read a plan that `save` wrote.

        Args:
            path: The file to read.

        Returns:
            The plan, on the CPU.

        Raises:
            ArgumentError: `path` is not a path.
            CheckpointError: The file is missing, damaged, or no solver plan.
        """
        if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
            raise ArgumentError("path", "a path", type(path).__name__)
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: not a solver plan (no such file)")
        names = [field.name for field in fields(cls)]
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if sorted(file.keys()) != sorted(names):
                    raise CheckpointError(f"{path}: not a solver plan, which holds {', '.join(names)}")
                plan = cls(**{name: file.get_tensor(name).clone() for name in names})
        except CheckpointError:
            raise
        except Exception as error:  # a foreign or damaged file may make the parser raise any error
            raise CheckpointError(f"{path}: not a solver plan (no whole .safetensors file)") from error
        tensors = [getattr(plan, name) for name in names]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        alike = shapes[0] == shapes[1] and shapes[2] == shapes[3] and [len(shapes[0]), len(shapes[2])] == [3, 2]
        if not alike or any(tensor.dtype != torch.float32 for tensor in tensors):
            raise CheckpointError(f"{path}: not a solver plan (its tensors do not belong together)")
        return plan


def check_plan(plan: object, shapes: Sequence[BlockShape]) -> SolverPlan:
    """Returns the plan. Raises ArgumentError if it is no plan of a model whose blocks have these shapes."""
    if not isinstance(plan, SolverPlan):
        raise ArgumentError("plan", "a SolverPlan", kind_of(plan))
    sizes = {(shape.tokens, shape.token_dim) for shape in shapes}
    if len(sizes) > 1:
        raise ArgumentError("plan", "None for a model whose blocks have different numbers of tokens", "a SolverPlan")
    return plan.check((len(shapes), *sizes.pop()))
