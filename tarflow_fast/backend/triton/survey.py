"""What the Triton kernels compile to, without a GPU: registers, shared memory, spills.

The engine itself says which kernels it launches in which tiles: it is run on tensors without storage, and its launches
are recorded and compiled for each architecture.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...engine.contract import Condition, Guidance
from ...engine.shape import BlockShape
from ...engine.weights import BlockWeights
from ...kernels.affine_coupling import coupling_backward, coupling_forward
from ...kernels.affine_density import density_backward, density_forward
from ...kernels.launch import Launch, recording
from ...kernels.spline import spline_backward, spline_forward
from ...machine_code import Compiled, resource_usage, triton_findings
from ...masked import Activation, Affine, Layer, MaskedTransform, Shift, Spline, Univariate
from ...masked.layers import ACTIVATIONS
from ...masked.sorting import sort_transform
from ...masked.univariate import AFFINE_LAWS
from ...spline import SplineLaw
from .engine import TritonEngine
from .masked import TritonMasked

FIRST_WITH_PDL = 90
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}


@dataclass(frozen=True, eq=False)
class Case:
    """A case is what an engine is asked for: a block, whose weights are on "meta", and so many images and tokens."""

    weights: BlockWeights
    batch: int
    guided: bool
    window: int
    dtype: torch.dtype

    def launches(self, every: bool, pdl: bool) -> list[Launch]:
        """Returns the launches of one pass; every: under all tiles to choose from, not those of first choice alone."""
        shape = self.weights.shape
        engine = TritonEngine(self.weights, device=torch.device("meta"), dtype=self.dtype, pdl=pdl)
        z = torch.empty(self.batch, shape.tokens, shape.token_dim, device="meta")
        state = engine.begin(z, Condition(None, Guidance(2.0 if self.guided else 0.0)))
        return engine.possible_launches(state, self.window, every=every)


def density_launches(shapes: Iterable[BlockShape]) -> list[Launch]:
    """Returns the launches of the density pass of blocks, there and back, in weights of either precision."""
    with recording() as launches:
        for shape, dtype in itertools.product(shapes, (torch.bfloat16, torch.float32)):
            sizes = (2, shape.tokens, shape.token_dim)
            z, log_det = torch.empty(sizes, device="meta"), torch.empty(2, 1, device="meta").expand(2, sizes[1])
            out = torch.empty(*sizes[:2], shape.parameters, dtype=dtype, device="meta")
            density_forward(out, z, shape.affine)
            scaled = (z, out) if shape.affine else (None, None)
            density_backward(z, log_det, scaled[0], scaled[1], dtype, False)
    return launches


def spline_launches() -> list[Launch]:
    """Returns the launches of splines of either kind, there or back, in either precision, and of their gradients."""
    laws = SplineLaw.zuko(8), SplineLaw.nflows(32, None)
    with recording() as launches:
        for law, (dtype, inverse) in itertools.product(laws, ((torch.float32, True), (torch.float64, False))):
            value = torch.empty(4096, dtype=dtype, device="meta")
            parameters = torch.empty(4096, law.parameters, dtype=dtype, device="meta")
            spline_forward(parameters, value, law, inverse)
            spline_backward(value, value, parameters, value, value, law, inverse)
    return launches


def coupling_launches() -> list[Launch]:
    """Returns the launches of couplings, with a scale and without, in either direction, and of their gradients."""
    with recording() as launches:
        for outputs, (dtype, inverse) in itertools.product((1, 2), ((torch.float32, True), (torch.float64, False))):
            value = torch.empty(64, 784, dtype=dtype, device="meta")
            parameters, changes = value.new_empty(64, outputs, 784), value.new_empty(784)
            coupling_forward(parameters, value, changes, 2.0, inverse)
            coupling_backward(value, value.new_empty(64), parameters, value, changes, 2.0, inverse)
    return launches


def masked_launches() -> list[Launch]:
    """Returns the launches of the inverse of masked transforms, of every activation and univariate transform."""
    laws: list[Univariate] = [Shift(), Spline(SplineLaw.zuko(8)), Spline(SplineLaw.nflows(10))]
    laws += [Affine(law) for law in AFFINE_LAWS]
    cases = [(law, "relu") for law in laws]
    cases += [(Affine("exp"), name) for name in ACTIVATIONS]
    D, H, B = 16, 64, 256
    with recording() as launches:
        for univariate, name in cases:
            degrees, outputs = torch.arange(H) % (D - 1), torch.arange(D).repeat_interleave(univariate.parameters)
            first, last = degrees[:, None] >= torch.arange(D), outputs[:, None] > degrees
            layers = (
                Layer(torch.empty(H, D, device="meta"), first),
                Layer(torch.empty(len(last), H, device="meta"), last, source=1, activation=Activation(name)),
            )
            made = TritonMasked(sort_transform(MaskedTransform(D, layers, univariate)))
            made.run(torch.empty(B, D, device="meta"), None)
    return launches


def source(launch: Launch) -> ASTSource:
    """Returns what Triton's own launch would make of these arguments: a size of 1 is compiled in, and a divisibility by
    16."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value is None or (value == 1 and name != "offset"):
            constants[name] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and name != "offset":
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(constants, "constexpr"))
    signature = {name: signature[name] for name in launch.kernel.arg_names}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Launch, architecture: int) -> Compiled:
    """Returns what a launch's kernel is compiled to."""
    kernel = triton.compile(source(launch), target=GPUTarget("cuda", architecture, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = resource_usage(file.name)
        findings = triton_findings(file.name, kernel.asm["ptx"], launch.pdl)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    numbers = {name: value for name, value in launch.constants.items() if isinstance(value, (int, str))}
    tile = " ".join(f"{name}={value}" for name, value in numbers.items() if name not in ("EPS", "PDL", "PREFETCH"))
    return Compiled(
        launch.kernel.__name__.strip("_"),
        architecture,
        tile,
        launch.warps,
        found["REG"],
        found["STACK"] + found["LOCAL"],
        kernel.metadata.shared,
        findings=findings,
    )


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Returns one of each that compile to the same."""
    found: dict[str, Launch] = {}
    for launch in launches:
        types = [
            value.dtype if isinstance(value, Tensor) else value is None or (value == 1, value % 16 == 0)
            for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False)
            if name != "offset"
        ]
        found.setdefault(repr((launch.kernel.__name__, types, launch.constants, launch.options)), launch)
    return list(found.values())


def survey(
    cases: Sequence[Case], architectures: Iterable[int], shapes: Sequence[BlockShape], *, every: bool
) -> Iterator[Compiled]:
    """Yields what each kernel is compiled to that the engine launches in these cases, or the density pass of shapes."""
    with ThreadPoolExecutor() as pool:
        for architecture in architectures:
            pdl = architecture >= FIRST_WITH_PDL
            steps = (launch for case in cases for launch in case.launches(every, pdl))
            flows = spline_launches(), coupling_launches(), masked_launches()
            launches = distinct(itertools.chain(steps, density_launches(shapes), *flows))
            yield from pool.map(lambda launch, on=architecture: compile_for(launch, on), launches)
