"""What the Triton kernels compile to, without a GPU: registers, shared memory, spills.

The engine itself says which kernels it launches in which tiles: it is run on tensors without storage, and its launches
are recorded and compiled for each architecture.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tarflow_fast import TarFlow
from tarflow_fast.backend.triton.engine import TritonEngine
from tarflow_fast.backend.triton.masked import TritonMasked
from tarflow_fast.engine import Condition, Guidance
from tarflow_fast.kernels.affine_density import density_backward, density_forward
from tarflow_fast.kernels.launch import Launch, recording
from tarflow_fast.kernels.spline import spline_backward, spline_forward
from tarflow_fast.masked import Activation, Affine, Layer, MaskedTransform, Shift, Spline, Univariate
from tarflow_fast.masked.layers import ACTIVATIONS
from tarflow_fast.masked.sorting import sort_transform
from tarflow_fast.masked.univariate import AFFINE_LAWS
from tarflow_fast.spline import SplineLaw

from .compiled import SIZES, Compiled, resource_usage
from .linted import triton_findings

FIRST_WITH_PDL = 90
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Case:
    """A case is what an engine is asked for: a model's block, so many images and tokens at once."""

    model: str
    batch: int
    guided: bool
    window: int
    dtype: torch.dtype

    def launches(self, every: bool, pdl: bool) -> list[Launch]:
        """Returns the launches of one pass; every: under all tiles to choose from, not those of first choice alone."""
        config = SIZES[self.model]
        with torch.device("meta"):
            weights = TarFlow.from_config(config).block_weights(0)
        engine = TritonEngine(weights, device=torch.device("meta"), dtype=self.dtype, pdl=pdl)
        z = torch.empty(self.batch, config.num_patches, config.token_dim, device="meta")
        state = engine.begin(z, Condition(None, Guidance(2.0 if self.guided else 0.0)))
        return engine.possible_launches(state, self.window, every=every)


def density_launches() -> list[Launch]:
    """Returns the launches of the density pass of every model, there and back, in weights of either precision."""
    with recording() as launches:
        for config, dtype in itertools.product(SIZES.values(), (HALF, FULL)):
            sizes = (2, config.num_patches, config.token_dim)
            outputs = 2 * config.token_dim if config.nvp else config.token_dim
            z, log_det = torch.empty(sizes, device="meta"), torch.empty(2, 1, device="meta").expand(2, sizes[1])
            out = torch.empty(*sizes[:2], outputs, dtype=dtype, device="meta")
            density_forward(out, z, config.nvp)
            density_backward(z, log_det, *((z, out) if config.nvp else (None, None)), dtype, False)
    return launches


def spline_launches() -> list[Launch]:
    """Returns the launches of splines of either kind, there or back, in either precision, and of their gradients."""
    laws = SplineLaw.zuko(8), SplineLaw.nflows(32, None)
    with recording() as launches:
        for law, (dtype, inverse) in itertools.product(laws, ((FULL, True), (torch.float64, False))):
            value = torch.empty(4096, dtype=dtype, device="meta")
            parameters = torch.empty(4096, law.parameters, dtype=dtype, device="meta")
            spline_forward(parameters, value, law, inverse)
            spline_backward(value, value, parameters, value, value, law, inverse)
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


HALF, FULL = torch.bfloat16, torch.float32
SHORT = [
    Case("afhq", 16, True, 1, HALF),
    Case("afhq", 1, False, 1, HALF),
    Case("imagenet", 256, False, 1, HALF),
    Case("afhq", 1, True, 64, HALF),
    Case("small", 4, True, 1, FULL),
]
WHOLE = [
    *(Case(m, b, g, 1, HALF) for m in ("afhq", "imagenet") for b in (1, 2, 4, 16, 128) for g in (False, True)),
    *(Case(m, b, True, 1, HALF) for m in ("small", "wide heads", "volume-preserving") for b in (1, 8, 64)),
    *(Case(m, b, False, 1, FULL) for m in SIZES for b in (1, 16, 64)),
    *(Case(m, b, False, 1, torch.float16) for m in ("afhq", "small") for b in (1, 16)),
    *(Case(m, b, False, w, d) for m in SIZES for b in (1, 16) for w in (4, 48) for d in (HALF, FULL)),
]


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


def survey(cases: Iterable[Case], architectures: Iterable[int], *, every: bool) -> Iterator[Compiled]:
    cases = list(cases)
    with ThreadPoolExecutor() as pool:
        for architecture in architectures:
            pdl = architecture >= FIRST_WITH_PDL
            steps = (launch for case in cases for launch in case.launches(every, pdl))
            launches = distinct(itertools.chain(steps, density_launches(), spline_launches(), masked_launches()))
            yield from pool.map(lambda launch, on=architecture: compile_for(launch, on), launches)
