"""A cell of `bench gpu`: one flow block of a large model, who takes part, and the process that measures it.

A kernel that hangs, crashes or leaves a process without a GPU costs its own cell, and nothing else. `python -m
bench.suites.gpu.cells REQUEST FILE` measures a cell; the request and what it leaves in FILE are JSON.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tarflow_fast import Sampler
from tarflow_fast.probe.processes import run_all

from ...common import harness, limits, models
from ...common.harness import Candidate, Case, Rounds
from ...common.machine import ROOT
from ...common.ml_tarflow import MlTarflow, autocast
from ...common.models import ONE_BLOCK as SIZES
from ...common.models import random_model
from ...common.roofline import density_work, inverse_work
from . import inside
from .inside import DTYPE

BASELINE, LOSS = "ml-tarflow bf16 autocast", "tarflow_fast bf16"
TORCH, TRITON, COMPILED, CUDA = "torch", "triton", models.COMPILED, "cuda"  # samplers
BACKEND = "triton"  # of the candidate TRITON
GUIDANCE = {"guided": 2.0, "unguided": 0.0}
PASSES = (*GUIDANCE, "loss")
DRY_BATCH = 3
CASES = (  # the most important first
    *("afhq:16:guided", "afhq:1:guided", "imagenet:16:guided", "imagenet:1:guided", "afhq:128:guided"),
    *("afhq:16:unguided", "afhq:1:unguided", "imagenet:16:unguided", "imagenet:1:unguided", "afhq:16:loss"),
    *("imagenet:256:unguided", "afhq:4:guided", "afhq:4:unguided", "imagenet:4:guided", "imagenet:4:unguided"),
    *("imagenet:16:loss", "afhq:128:unguided"),
)
COMMAND = (sys.executable, "-m", "bench.suites.gpu.cells")
INSIDE_SHARE = 0.25  # of the time for a sampling cell, for the inside of each engine
ONCE = {BASELINE: 0.25}  # of the time for a cell: a baseline that takes longer than this is not run again
SLACK = {BASELINE: 2.0}  # under autocast it rounds exp(xa) too: its error is up to 2.7 times the torch backend's
LOSS_TOLERANCE = 0.01  # of the loss and of the gradient's norm, relative to the exact ones


def case_of(text: str, dry: bool = False) -> Case:
    """Returns the case that is written MODEL:BATCH:PASS; dry: of tiny sizes. Raises ValueError."""
    found = re.fullmatch(rf"({'|'.join(SIZES)}):([1-9]\d*):({'|'.join(PASSES)})", text)
    if found is None:
        known = f"MODEL one of {', '.join(SIZES)}; PASS of {', '.join(PASSES)}"
        raise ValueError(f"{text!r} is not MODEL:BATCH:PASS, with {known}")
    model, what, batch = found[1], found[3], min(int(found[2]), DRY_BATCH) if dry else int(found[2])
    sizes, how = (models.DRY if dry else SIZES)[model], {"itemsize": DTYPE.itemsize}
    work = density_work(sizes, batch, backward=True, **how)
    if what in GUIDANCE:
        work = inverse_work(sizes, batch, guided=GUIDANCE[what] > 0, **how)
    return Case({"model": model, "batch": batch, "pass": what}, sizes, work, "bfloat16")


def text_of(case: Case) -> str:
    return ":".join(map(str, case.label.values()))


def loss_and_norm(model: Any, images: Tensor, y: Tensor | None) -> Tensor:
    """Returns (2,) the loss of images, and the norm of its gradient over all parameters. model: of ours or theirs."""
    z, _, log_dets = model(images, y)
    loss = model.get_loss(z, log_dets)
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return torch.stack([loss.detach().float(), torch.nn.utils.get_total_norm(gradients)])


def in_process(request: dict[str, Any], seconds: float) -> Any:
    """Returns what `cell` does, in a process stopped after `seconds`. Raises RuntimeError if there is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left.json"
        done = run_all({"cell": (*COMMAND, json.dumps(request), str(left))}, seconds, ROOT)["cell"]
        if done.code != 0:
            raise RuntimeError(f"its process ended with {done.code}: {' '.join(done.tail[-1:])}")
        return json.loads(left.read_text(encoding="utf-8"))


def measure_loss(case: Case, rounds: Rounds, theirs: MlTarflow, seed: int) -> Any:
    """Returns the cell of a loss with its gradient, in units of the exact ones, of our model in fp32."""
    device, model = rounds.device, random_model(case.sizes, seed)
    z, y = models.inputs(case.sizes, case.label["batch"], seed, device)
    loss = functools.partial(loss_and_norm, images=model.unpatchify(z), y=y)

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        return functools.partial(loss, random_model(case.sizes, seed).to(device, dtype))

    def published() -> Callable[[], Tensor]:
        made = theirs.model(case.sizes, model.state_dict()).to(device)
        return functools.partial(autocast(loss, device, DTYPE), made)

    exact = ours(torch.float32)()
    candidates: dict[str, Candidate] = {BASELINE: published, LOSS: functools.partial(ours, DTYPE)}
    how: dict[str, Any] = {"view": lambda result: result / exact, "tolerance": LOSS_TOLERANCE, "once": ONCE}
    return harness.measure_cell(case, candidates, rounds, exact=torch.ones_like(exact), **how)


def measure_sampling(
    case: Case, rounds: Rounds, theirs: MlTarflow, seed: int, compiled: bool, cuda: bool
) -> tuple[Any, list[str]]:
    """Returns the cell of a sampling pass, and what went wrong of the inside of engines.

    The exact images are the torch backend's in fp32, for which a block is a second of work where ml-tarflow takes
    minutes. That this is no check of the torch backend by itself is the baseline's part: it has to agree as well.
    """
    device, model, failures = rounds.device, random_model(case.sizes, seed), list[str]()
    inputs = (*models.inputs(case.sizes, case.label["batch"], seed, device), GUIDANCE[case.label["pass"]])
    ours = {TORCH: "torch", TRITON: BACKEND, **({COMPILED: "torch"} if compiled else {})}
    ours |= {CUDA: "cuda"} if cuda else {}  # the last: a kernel that goes wrong can leave a process without a GPU
    candidates = models.samplers(BASELINE, theirs, ours, model, inputs, device, DTYPE, their_dtype=DTYPE)
    exact = Sampler(model, solver="sequential", backend="torch", device=device, dtype=torch.float32).reverse(*inputs)
    how: dict[str, Any] = {"exact": exact, "yardstick": (TORCH, DTYPE), "slack": SLACK, "once": ONCE}
    found = harness.measure_cell(case, candidates, rounds.share(1 - 2 * INSIDE_SHARE), **how)
    parts = {TRITON: ("engine", inside.measure_kernels), CUDA: ("cuda", inside.measure_phases)}
    for run in found["runs"]:
        name, measure = parts.get(run["name"], ("", None))
        try:
            found |= {name: measure(model, inputs, rounds.share(INSIDE_SHARE))} if measure else {}
        except Exception as error:  # a failure must not cost the rest, as minutes on a GPU are dear
            failures.append(f"inside {run['name']}: {harness.in_a_line(error)}")
    return found, failures


def cell(case: str, dry: bool, repeat: int, seconds: float, seed: int, checkout: str, **part: Any) -> Any:
    """Returns {cell, limits, failures} of a case. part: whether "compiled" and "cuda" take part."""
    this, rounds = case_of(case, dry), Rounds(repeat, seconds, torch.device("cpu" if dry else "cuda"))
    found = {"limits": limits.measure_gpu(rounds.device), "failures": []}
    how = (this, rounds, MlTarflow.load(Path(checkout)), seed)
    if this.label["pass"] == "loss":
        return {**found, "cell": measure_loss(*how)}
    made, failures = measure_sampling(*how, **part)
    return {**found, "cell": made, "failures": failures}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(cell(**json.loads(sys.argv[1]))), encoding="utf-8")
