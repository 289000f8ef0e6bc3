"""`python -m bench density`: log p and denoising on a CPU, our pass against torch's and the machine's matrix rate."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import TarFlow, denoise, load_pretrained
from tarflow_fast.backend.cpu.engine import choose_instruction_set
from tarflow_fast.devices import torch_threads

from ..common import harness, models, options
from ..common.harness import Case
from ..common.machine import CPU
from ..common.ml_tarflow import autocast
from ..common.models import DTYPES
from ..common.roofline import denoise_work, density_work
from ..common.suite import Suite

TOLERANCE = 2e-5  # fp32, absolute: of denoised values, and of log p for each value of an image
NAMES = ("shipped", "medium", "tiny")
OPERATIONS = {"log_prob": density_work, "denoise": denoise_work}
NOISE_STD = 0.1  # of denoising


@functools.cache
def model_of(name: str, seed: int) -> TarFlow:
    return load_pretrained() if name == "shipped" else models.random_model(models.MODELS[name], seed)


def case_of(model: str, operation: str, batch: int, dtype: str = "float32", threads: int = 1) -> Case:
    """Returns an operation on a batch, on so many threads, in fp32 or under torch's autocast."""
    label = {"model": model, "operation": operation, "batch": batch, "dtype": dtype, "threads": threads}
    sizes = model_of(model, 0).config
    return Case(label, sizes, OPERATIONS[operation](sizes, batch, itemsize=DTYPES[dtype].itemsize), dtype, threads)


def ready(case: Case, seed: int, backend: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a case's operation by a backend: what of its result is held to the tolerance, how far denoising moves the
    images, or log p a value. The images are noise about a grey one, as nothing takes longer for better ones."""
    model, batch = model_of(case.label["model"], seed), case.label["batch"]
    images = 0.5 * torch.randn(batch, *case.sizes.data_shape, generator=torch.Generator().manual_seed(seed))
    _, y = models.inputs(case.sizes, batch, seed)
    if case.label["operation"] == "denoise":
        how: dict[str, Any] = {"backend": backend, "noise_std": NOISE_STD, "batch_size": batch}
        how |= {} if dtype == torch.float32 else {"dtype": dtype}
        return lambda: denoise(model, images, y, **how) - images
    log_prob = autocast(torch.no_grad()(copy.deepcopy(model).set_density(backend).log_prob), CPU, dtype)
    return lambda: log_prob(images, y) / images[0].numel()


class Density(Suite):
    """log p and its gradient on the CPU: the C++ pass against torch's, and the machine's own matrix rate.

    log_prob is the density pass, denoise that pass and the gradient by the images. Same weights, images, process and
    threads; bf16 is torch's autocast. A cell is timed only if its results are right: in fp32 within 2e-5 of torch's, by
    values of the images, in bf16 within twice torch's own error. The limit is that of the cell's dtype and threads.

    \b
    Models:
      shipped  the Fashion-MNIST model of the package: 28×28×1, T = 49, width 128, 4 blocks of 4 layers
      medium   32×32×3, T = 256, width 256, 4 blocks of 4 layers, random weights
      tiny     to try the suite itself, in seconds
    """

    name = "density"
    baseline = "torch"
    held = True
    panels = ("operation", "model")
    options = (
        options.several("--model", "models", type=NAMES, default=NAMES[:2], help="Models to be measured"),
        options.several("--operation", "operations", type=OPERATIONS, default=tuple(OPERATIONS), help="Operations"),
        options.batches(1, 16, 80),
        options.dtypes(),
        options.EVERY_THREADS,
        *options.of_every_suite("density", 60.0),
    )

    def settings(self) -> dict[str, Any]:
        return {"instruction_set": choose_instruction_set()}

    def cases(self) -> list[Case]:
        lists = [getattr(self.chosen, name) for name in ("models", "operations", "batches", "dtypes", "threads")]
        return [case_of(*choice) for choice in itertools.product(*map(dict.fromkeys, lists))]

    def measure(self, case: Case) -> Any:
        """Our fp32 is held to torch's; in bf16 both are held to torch's fp32, by torch's own error."""
        dtype, given = DTYPES[case.dtype], (case, self.chosen.seed)
        with torch_threads(case.threads):
            held: dict[str, Any] = {"tolerance": TOLERANCE}
            if dtype != torch.float32:
                held = {"exact": ready(*given, "torch", torch.float32)(), "yardstick": ("torch", dtype)}
            candidates = {name: functools.partial(ready, *given, name, dtype) for name in ("torch", "cpu")}
            return harness.measure_cell(case, candidates, self.rounds, **held)


SUITE = Density()
