"""A sampler sees to seeds, labels, batches, what is drawn again, and the report, over a stream of batches."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import host_ops
from ..backend import check_compile, check_threads, choose_backend, make_engines
from ..checks import (
    Count,
    Flag,
    Labels,
    Number,
    batch_labels,
    check_choice,
    check_count,
    check_number,
    check_tensor,
    check_weights,
    short,
    warn_range,
)
from ..devices import check_device, check_dtype, free_memory
from ..dtypes import residual_dtype
from ..engine import BlockShape, Condition, Guidance
from ..engine.backend import Request
from ..errors import ArgumentError, NonFiniteError, OutOfMemoryError
from ..flow import Flow
from ..forking import safe_in_forked_child
from ..limits import (
    MOST_ATTN_TEMP,
    MOST_BATCH,
    MOST_GUIDANCE,
    MOST_NOISE_STD,
    MOST_NUMBER,
    MOST_SCALE,
    MOST_SEED,
    MOST_TOL,
)
from ..probe import Prober, naming_faults
from ..progress import Bar
from ..scalars import check_flag, plain
from ..solvers import TOL, Solver, SolverPlan, Solvers, adaptive, make_solvers, widths
from .inverse import Inverse, invert
from .labels import LabelRule, LabelsByNumber
from .noise import latent_noise, resolve_noise_std
from .report import BlockReport, Report, Samples

MAX_REDRAWS = 3
MAX_BATCH = 256  # beyond this a batch gains no speed, and progress becomes hard to see
MEMORY_SHARE = 0.8  # one batch may take so much of the free memory
LATENT_RANGE = 20.0  # standard normal noise has no value beyond, however much of it is drawn
PACED = 16  # a plan counts the passes of so many images


class Sampler:
    """A `Sampler` draws images from a TarFlow.

    The model's weights are packed when the sampler is made, and changing them later has no effect on sampling;
    denoising, copies and pickles, which read the model's own weights, then raise ArgumentError. A sampler can be copied
    and pickled: a pickle holds the weights and the options.

    Args:
        model: A TarFlow, a `Flow`, or any model that has a method `flow` which returns one (see `flow.py`).
        backend: A name from `backends()`, or "auto": on a CPU the best there is; on a GPU, for each size of batch, the
            quickest that a probe has proven there (see `probe`, and `Report.backend` for which). A backend that is
            named serves without a probe.
        device: The device to sample on, by default the model's own.
        dtype: The dtype of weights and KV cache (float32, bfloat16, float16, float64), by default the model's own. The
            residual stream is fp32, or fp64 in float64.
        solver: "sequential" (exact, T − 1 steps a block), "adaptive" (parallel passes, as few as a block allows; see
            `solvers/frontier.py`), or "auto", for each block the one that takes less time (see `solvers/auto.py`).
        tol: How far a token may still move in a parallel pass when it is taken as final, in units of the images; by
            default 3e-6 in float32 and float64, 4e-4 in float16, 3e-3 in bfloat16 (see `solvers.TOL`).
        plan: Where parallel passes start and how many a block takes, from `learn_plan`; by default they start at the
            latents, and their numbers are learnt from what is sampled.
        compile: Whether the `torch` backend runs its step under torch.compile.
        probe: When "auto" has backends probed whose verdict for this device, model and size of batch is not known, each
            in a process of its own: "background" while the `torch` backend serves the first batches, where the switch
            comes between two batches; "now" before the first batch, so that images do not depend on when the probe is
            done, which they otherwise do up to rounding; "never". Verdicts are kept, see `tarflow-fast check`.
        threads: The number of threads of the `cpu` backend, by default as many as torch's, if there are cores for them
            (`devices.default_threads`). Images do not depend on it.

    Attributes:
        device: The device that it samples on.
        dtype: The dtype of weights and KV cache.
        backend: The name of the backend, or "auto" where each size of batch has its own.
        backend_reason: Why that backend was chosen.
        solver: The solver that was asked for.
        plan: The plan that was given, or None.
        flow: The `Flow` of the model.
        engines: The engine of each flow block, by its index.
        solvers: The solver of each flow block, by its index.
        config: The `config` of the model, or None where it has none.

    Raises:
        ArgumentError: An argument has the wrong type, range or name, or the model computes another thing than its
            weights say, as with hooks that change what they see, or has a `reverse` of its own.
        BackendError: The backend, device, dtype or number of threads cannot be had.
        CheckpointError: The weights are not finite, or not those of a TarFlow of the model's sizes.
    """

    @safe_in_forked_child()
    def __init__(
        self,
        model: Any,
        *,
        backend: str = "auto",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        solver: str = "auto",
        tol: float | None = None,
        plan: SolverPlan | None = None,
        compile: bool = False,
        probe: str = "background",
        threads: int | None = None,
    ):
        check_flow_of(model)
        self.device = check_device(model.device if device is None else device)
        self.dtype = check_dtype(model.dtype if dtype is None else dtype, self.device)
        compile = check_compile(compile, self.device)
        self.backend, self.backend_reason = choose_backend(backend, Request(self.device, self.dtype, compile))
        self._threads = threads = check_threads(threads, self.backend)
        with torch.inference_mode(False), torch.no_grad():  # a sampler outlives the mode that it is made in
            self.flow: Flow = model if isinstance(model, Flow) else model.flow(self.device)
            if not isinstance(self.flow, Flow) or not self.flow.stages:
                raise ArgumentError("model", "one whose flow(device) is a Flow of at least one stage", repr(self.flow))
            shapes = [stage.shape for stage in self.flow.stages]
            self.plan = None if plan is None else check_plan(plan, shapes)
            self.solvers = make_solvers(solver, tol, self.plan, dtype=self.dtype, shapes=shapes)
            if tol is not None:
                check_number("tol", tol, 0, MOST_TOL)
            self.solver, self._tol = solver, TOL[self.dtype] if tol is None else float(plain(tol))
            self._request = request = Request(self.device, self.dtype, compile, threads)
            prober = Prober(shapes, request, probe)
            self.engines = make_engines(self.backend, (stage.weights() for stage in self.flow.stages), request, prober)
        self.config = getattr(self.flow.model, "config", None)
        self._options: dict[str, Any] = {
            **{"backend": backend, "device": self.device, "dtype": self.dtype, "solver": solver, "tol": tol},
            **{"plan": self.plan, "compile": compile, "probe": probe, "threads": threads},
        }

    @safe_in_forked_child()
    def sample(
        self,
        n: Count = 1,
        labels: LabelsByNumber = None,
        *,
        seed: Count = 0,
        first: Count = 0,
        guidance: Number = 0.0,
        guide_what: str = "ab",
        attn_temp: Number = 1.0,
        annealed_guidance: Flag = False,
        denoise: Flag = False,
        noise_std: Number | None = None,
        denoise_scale: Number = 1.0,
        trajectory: Flag = False,
        batch_size: Count | None = None,
        on_nonfinite: str = "raise",
        progress: bool = False,
    ) -> Samples:
        """Draws the images numbered first … first+n−1 of a seed.

        Image i depends on (seed, i) and its label alone: batch size, device and order do not matter, up to rounding,
        and up to what `tol` allows where passes are parallel.

        Args:
            n: The number of images.
            labels: None (no class), one label, a sequence, array or tensor of which image i takes entry i mod its
                length, or a function from i to a label. A label is an integer, negative for no class, or the name of a
                class.
            seed: The seed, an integer >= 0.
            first: The number of the first image.
            guidance: The weight w >= 0 of guidance; 0 is none. See `Guidance`, as for the next three.
            guide_what: Which of the log-scale ("a") and the shift ("b") guidance changes: "a", "b" or "ab".
            attn_temp: A number > 0, which divides the attention logits of the unguided branch.
            annealed_guidance: Whether the weight grows along the tokens, up to w.
            denoise: Whether Tweedie's step follows, which takes off the noise that the model was trained with.
            noise_std: σ of that noise, by default what the checkpoint records.
            denoise_scale: A multiplier of the optimal denoising step, >= 0.
            trajectory: Whether the images after each block are returned too.
            batch_size: The most images of a batch, by default what fits in memory, and at most 256.
            on_nonfinite: "raise" NonFiniteError where an image overflows, or "redraw" that image, at most three times.
            progress: Whether to show a bar.

        Returns:
            The images and how they were made, on the CPU.

        Raises:
            ArgumentError: An argument has the wrong type or range, or would have no effect; the model does not have one
                of the labels, or has changed since, where `denoise` reads it.
            NonFiniteError: An image is infinite or NaN, with "redraw" after three more attempts too.
            OutOfMemoryError: The images, or a batch of `batch_size`, do not fit in memory.
            TarFlowError: A denoised image would be infinite or NaN.
        """
        n = check_count("n", n, high=MOST_NUMBER)
        parts = self.stream(
            n,
            labels,
            seed=seed,
            first=first,
            guidance=guidance,
            guide_what=guide_what,
            attn_temp=attn_temp,
            annealed_guidance=annealed_guidance,
            denoise=denoise,
            noise_std=noise_std,
            denoise_scale=denoise_scale,
            trajectory=trajectory,
            batch_size=batch_size,
            on_nonfinite=on_nonfinite,
            progress=progress,
        )
        self._check_room(n, len(self.flow.stages) + 2 if trajectory else 1)
        return Samples.collect(n, parts)

    def stream(
        self,
        n: Count = 1,
        labels: LabelsByNumber = None,
        *,
        seed: Count = 0,
        first: Count = 0,
        guidance: Number = 0.0,
        guide_what: str = "ab",
        attn_temp: Number = 1.0,
        annealed_guidance: Flag = False,
        denoise: Flag = False,
        noise_std: Number | None = None,
        denoise_scale: Number = 1.0,
        trajectory: Flag = False,
        batch_size: Count | None = None,
        on_nonfinite: str = "raise",
        progress: bool = False,
    ) -> Generator[Samples, None, None]:
        """Draws the images of `sample` batch by batch, on the sampler's device.

        However large n is, no more than a batch is held. Arguments are checked when this is called, before the first
        batch is asked for.

        Args:
            n: See `sample`, as for all other arguments.
            labels: See `sample`.
            seed: See `sample`.
            first: See `sample`.
            guidance: See `sample`.
            guide_what: See `sample`.
            attn_temp: See `sample`.
            annealed_guidance: See `sample`.
            denoise: See `sample`.
            noise_std: See `sample`.
            denoise_scale: See `sample`.
            trajectory: See `sample`.
            batch_size: See `sample`.
            on_nonfinite: See `sample`.
            progress: See `sample`.

        Yields:
            The images of each batch, in the order of their numbers, and how they were made.

        Raises:
            ArgumentError: As in `sample`.
            NonFiniteError: As in `sample`, while batches are drawn.
            OutOfMemoryError: A batch does not fit in memory.
            TarFlowError: As in `sample`, while batches are drawn.
        """
        n, seed = check_count("n", n, high=MOST_NUMBER), check_count("seed", seed, 0, MOST_SEED)
        first = check_count("first", first, 0, MOST_NUMBER - n)
        classifier_free = Guidance(plain(guidance), guide_what, plain(attn_temp), plain(annealed_guidance))
        check_number("guidance", guidance, 0, MOST_GUIDANCE)
        check_number("attn_temp", attn_temp, 0, MOST_ATTN_TEMP, open_low=True)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "redraw"))
        denoise_scale = check_number("denoise_scale", denoise_scale, 0, MOST_SCALE)
        trajectory, progress = check_flag("trajectory", trajectory), check_flag("progress", progress)
        if check_flag("denoise", denoise):
            if self.flow.denoise is None:
                raise ArgumentError("denoise", "False, as the model has no denoising step", True)
            noise_std = resolve_noise_std(self.flow.metadata, noise_std)
            check_number("noise_std", noise_std, 0, MOST_NOISE_STD, open_low=True)
        elif noise_std is not None or denoise_scale != 1:
            name, value = ("denoise_scale", denoise_scale) if noise_std is None else ("noise_std", noise_std)
            raise ArgumentError(name, "the default where denoise is off, as it has no effect", repr(value))
        label_of = LabelRule(labels, self.flow.num_classes, self.flow.class_names)
        check_effect(classifier_free, unlabelled=label_of.none)
        batch = self._batch_size(n, classifier_free.active, batch_size)

        def draw() -> Generator[Samples, None, None]:
            if denoise:
                self.flow.check_unchanged(True)
            with self._bar(n, progress) as bar:
                for start in range(first, first + n, batch):
                    numbers = range(start, min(start + batch, first + n))
                    y = label_of(numbers)
                    part = self._draw(
                        numbers, y, seed, classifier_free, batch, bar, trajectory, on_nonfinite == "redraw"
                    )
                    if denoise:
                        self._denoise(part, noise_std, denoise_scale)
                    yield part

        return draw()

    def _draw(
        self,
        numbers: range,
        labels: Tensor | None,
        seed: int,
        guidance: Guidance,
        batch: int,
        bar: Any,
        trajectory: bool,
        redraw: bool,
    ) -> Samples:
        """Returns the images of these numbers, before denoising.

        labels: (len(numbers),) on the CPU, or None. batch: the most images of one pass, for the report. bar: what
        progress is shown on. redraw: whether images that are not finite are drawn again.
        """
        report = self._report(batch)
        n, (T, D) = len(numbers), self.flow.latent_shape
        y = None if labels is None else labels.to(self.device)
        images = torch.empty((n, *self.flow.data_shape), device=self.device, dtype=residual_dtype(self.dtype))
        log_prob = None if guidance.active else images.new_empty(n)
        error = torch.empty(n, device="cpu", dtype=torch.float32)
        sequence = [torch.empty_like(images) for _ in range(len(self.flow.stages) + 1)] if trajectory else None
        sizes: list[int] = []  # how many rows each attempt draws
        rows = list(range(n))  # the rows that still have to be drawn
        started, setup = time.perf_counter(), self._setup_seconds()
        for attempt in range(MAX_REDRAWS + 1):
            z = latent_noise(seed, [numbers[row] for row in rows], T, D, attempt)
            part = self._invert(z, None if y is None else y[rows], guidance, bar, trajectory)
            sizes.append(len(rows))
            report.tokens += len(rows) * self.flow.block_tokens
            for k, solution in part.solutions.items():
                report.blocks[k].add(solution)
            report.cache_bytes = max(report.cache_bytes, part.cache_bytes)
            host_ops.put_rows(images, rows, part.data)
            error[rows] = part.error
            if log_prob is not None and part.log_prob is not None:
                log_prob[rows] = part.log_prob
            if sequence is not None:
                for whole, piece in zip(sequence, part.sequence, strict=True):
                    host_ops.put_rows(whole, rows, piece)
            if not part.failures:
                break
            if not redraw or attempt == MAX_REDRAWS:
                row = min(part.failures)
                raise NonFiniteError(*part.failures[row], numbers[rows[row]])
            rows = [rows[row] for row in sorted(part.failures)]
            report.redrawn.update({numbers[row]: attempt + 1 for row in rows})
        report.seconds = time.perf_counter() - started
        report.backend, report.backend_reason = self._served_by(sizes, guidance.active)
        report.setup_seconds = self._setup_seconds() - setup
        return Samples(images, log_prob, labels, report, error, sequence)

    def _denoise(self, part: Samples, noise_std: float | None, scale: float) -> None:
        """Puts denoised images into `part`, and the time that they took into its report."""
        started = time.perf_counter()
        assert self.flow.denoise is not None
        self.flow.check_unchanged(False)
        part.images = self.flow.denoise(
            part.images,
            part.labels,
            noise_std=noise_std,
            scale=scale,
            batch_size=None if self.backend == "cpu" else min(part.report.batch_size, 16),
            dtype=self.dtype,
            backend="cpu" if self.backend == "cpu" else "torch",
            threads=self._threads,
        )
        part.report.denoise_seconds = time.perf_counter() - started

    @safe_in_forked_child()
    def reverse(
        self,
        x: Tensor,
        y: Labels = None,
        guidance: Number = 0,
        guide_what: str = "ab",
        attn_temp: Number = 1.0,
        annealed_guidance: Flag = False,
        return_sequence: Flag = False,
        *,
        return_log_det: Flag = False,
        on_nonfinite: str = "raise",
    ) -> Any:
        """Takes latents to images, with the signature and result of ml-tarflow's `Model.reverse`.

        Args:
            x: (B, T, D) float latents, finite, not mutated.
            y: (B,) labels, or one for all; a label is an integer, negative for no class, or the name of a class. None
                stands for no class.
            guidance: See `sample`.
            guide_what: See `sample`.
            attn_temp: See `sample`.
            annealed_guidance: See `sample`.
            return_sequence: Whether to return the K + 1 images of the way: the latents, then the images after each
                block.
            return_log_det: Whether to return log|det dx/dz| too.
            on_nonfinite: "raise" NonFiniteError where an image overflows, or "return" such images as they are, beside
                the others.

        Returns:
            Images (B, in_channels, H, W) on x's device, or the list of them with `return_sequence`. With
            `return_log_det`, a pair of these and log|det dx/dz| (B,) in nats, the prior's scale included: log N(x; 0,
            1) − log_det is the log-density of the images, if unguided.

        Raises:
            ArgumentError: An argument has the wrong type, shape or range, or the model does not have one of the labels.
            NonFiniteError: An image is infinite or NaN, unless on_nonfinite is "return".
            OutOfMemoryError: Not even one image fits in memory.

        Warns:
            TarFlowWarning: x has values beyond ±20, which no noise of a standard normal distribution has.
        """
        x = check_tensor("x", x, self.flow.latent_shape)
        warn_range("x", x, LATENT_RANGE, "noise of a standard normal distribution")
        labels = batch_labels(y, x.shape[0], self.flow.num_classes, self.device, class_names=self.flow.class_names)
        classifier_free = Guidance(plain(guidance), guide_what, plain(attn_temp), plain(annealed_guidance))
        return_sequence = check_flag("return_sequence", return_sequence)
        return_log_det = check_flag("return_log_det", return_log_det)
        check_choice("on_nonfinite", on_nonfinite, ("raise", "return"))
        batch = self._batch_size(x.shape[0], classifier_free.active, None)
        parts = []
        for start in range(0, x.shape[0], batch):
            rows = slice(start, start + batch)
            part = self._invert(
                x[rows], None if labels is None else labels[rows], classifier_free, None, return_sequence
            )
            for row, (block, token) in sorted(part.failures.items()):
                if on_nonfinite == "raise":
                    raise NonFiniteError(block, token, start + row)
            parts.append(part)
        images: Any = torch.cat([part.data for part in parts]).to(x.device)
        if return_sequence:
            pieces = zip(*(part.sequence for part in parts), strict=True)
            images = [torch.cat(piece).to(x.device) for piece in pieces]
        return (images, torch.cat([part.log_det for part in parts]).to(x.device)) if return_log_det else images

    def with_solvers(self, solvers: Sequence[Solver]) -> Sampler:
        """Returns a sampler that shares this one's weights and engines, and inverts block k by solvers[k].

        Copies and pickles of it have the solvers of the sampler that it was made of.
        """
        if not isinstance(solvers, Sequence) or not all(map(callable, solvers)):
            raise ArgumentError("solvers", "a sequence of solvers", repr(solvers))
        if len(solvers) != len(self.engines):
            raise ArgumentError("solvers", f"one for each of the {len(self.engines)} blocks", len(solvers))
        new = copy.copy(self)
        new.solvers = Solvers(solvers)
        return new

    @torch.no_grad()
    def invert_block(self, k: int, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Inverts block k, in its own token order, on this sampler's device.

        Args:
            k: The index of the block.
            z: (B, T, D) latents of the block, not mutated.
            condition: The labels and guidance of the batch.

        Returns:
            x (B, T, D) and its token log-dets (B, T), Σ_d xa in nats.
        """
        state = self.engines[k].begin(z, condition)
        self.solvers[k](self.engines[k], state, None)
        return state.x, state.token_log_det

    @safe_in_forked_child()
    def learn_plan(
        self, n: Count = 256, labels: Labels = None, *, seed: Count = 0, progress: bool = False
    ) -> SolverPlan:
        """Learns a plan for parallel passes from images that this sampler draws without guidance; see `SolverPlan`.

        The first 16 images, or a batch if that is fewer, are drawn again with each window, at this sampler's tol, to
        count passes.

        Args:
            n: The number of images, >= 2.
            labels: The labels of the images, as in `sample`; for a conditional model give the classes that will be
                drawn.
            seed: The seed of the images.
            progress: Whether to show a bar.

        Returns:
            A plan, to be given to a sampler of the same model.

        Raises:
            ArgumentError: As in `sample`.
            NonFiniteError: An image is infinite or NaN.
            OutOfMemoryError: The images and their trajectories do not fit in memory.
        """
        n = check_count("n", n, 2)
        if len({(stage.shape.tokens, stage.shape.token_dim) for stage in self.flow.stages}) > 1:
            expected = "a model whose blocks have as many tokens, as a plan is of these"
            raise ArgumentError("model", expected, [stage.shape.tokens for stage in self.flow.stages])
        samples = self.sample(n, labels, seed=seed, trajectory=True, progress=progress)
        assert samples.trajectory is not None
        tokens = [self.flow.to_tokens(images) for images in samples.trajectory]
        tokens[0] = tokens[0] * self.flow.prior_var.sqrt().cpu()
        stages = self.flow.stages
        pairs = [  # z and x of each block; sampling comes to block 0 last
            (stage.enter(tokens[-2 - k]), stage.enter(tokens[-1 - k])) for k, stage in enumerate(stages)
        ]
        plan = SolverPlan.fit(pairs)
        some = slice(0, min(PACED, samples.report.batch_size))
        condition = Condition(None if samples.labels is None else samples.labels[some].to(self.device))
        state = None
        for k, (z, _) in enumerate(pairs):
            engine, z = self.engines[k], z[some].to(self.device, residual_dtype(self.dtype))
            for i, window in enumerate(widths(stages[k].shape.tokens)):
                state = engine.begin(z, condition, reuse=state)
                guess = functools.partial(plan.guess, k)
                solution = adaptive(engine, state, tol=self._tol, guess=guess, window=window, least=self._tol)
                plan.passes[k, i] = max(solution.passes, 1)
                plan.evaluations[k, i] = max(solution.evaluations / z.shape[0], 1)
        return plan

    # Pickles and deep copies leave out what the solvers have learnt of times: another process or machine takes others.

    def __reduce__(self) -> tuple[Callable[[Any], Sampler], tuple[Any]]:
        """Pickles the weights and the options; the engines are made anew where the pickle is read."""
        self.flow.check_unchanged(True)
        return functools.partial(type(self), **self._options), (self.flow.model,)

    def __copy__(self) -> Sampler:
        """Returns a sampler that shares the weights and the engines, which keep nothing of a batch."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        """Returns a sampler of a copy of the model, with engines of its own."""
        self.flow.check_unchanged(True)
        return type(self)(copy.deepcopy(self.flow.model), **self._options)

    @safe_in_forked_child()
    def _invert(self, z: Tensor, y: Tensor | None, guidance: Guidance, bar: Any, trajectory: bool) -> Inverse:
        """Takes one batch through all blocks. z: (B, T, D) on any device; y: (B,) on the sampler's device, or None."""
        z = z.detach().to(self.device, residual_dtype(self.dtype))
        advance, condition = None if bar is None else bar.update, Condition(y, guidance)

        def served() -> str:
            return self._served_by([len(z)], guidance.active)[0]

        with naming_faults(served, [stage.shape for stage in self.flow.stages], self._request):
            return invert(self.flow, self.engines, self.solvers, z, condition, progress=advance, trajectory=trajectory)

    def _served_by(self, sizes: list[int], guided: bool) -> tuple[str, str]:
        """Returns which backends served batches of these sizes, and why."""
        served: dict[str, str] = {}
        for size in sizes:
            choice = self.engines[-1].served_by(size, guided)
            if choice is None:
                return self.backend, self.backend_reason
            served.setdefault(*choice)
        return ", ".join(served), "; ".join(served.values())

    def _setup_seconds(self) -> float:
        """Returns the seconds that engines and solvers have spent so far on what is done once."""
        return sum(engine.setup_seconds for engine in self.engines) + self.solvers.setup_seconds

    def _report(self, batch: int) -> Report:
        """Returns a report of batches of this size, before anything is drawn."""
        return Report(
            self.backend,
            self.backend_reason,
            self.solver,
            str(self.device),
            short(self.dtype),
            batch,
            blocks=[BlockReport() for _ in self.flow.stages],
        )

    def _bar(self, n: int, progress: bool) -> Any:
        """Returns a progress bar over the tokens that the blocks of n images transform."""
        total = n * (self.flow.block_tokens - len(self.flow.stages))
        return Bar(total=total, unit="token", unit_scale=True, desc="sampling", disable=not progress)

    def _check_room(self, n: int, copies: int) -> None:
        """Raises OutOfMemoryError where memory cannot hold n images so many times."""
        each = copies * math.prod(self.flow.data_shape) * residual_dtype(self.dtype).itemsize
        free = free_memory(torch.device("cpu"))
        if n * each > free:
            raise OutOfMemoryError(
                f"n: {n} images need {n * each / 2**20:.0f} MiB, {free / 2**20:.0f} are free; stream() holds one batch"
            )

    def _batch_size(self, n: int, guided: bool, batch_size: Count | None) -> int:
        """Returns the batch size, as asked for if it fits, else the largest that does. Raises OutOfMemoryError."""
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size, high=MOST_BATCH)
        first = self.engines[-1]  # a batch comes to the last block first
        each = first.bytes_per_sample(guided)
        free = free_memory(self.device) + first.cached_bytes
        fits = int(MEMORY_SHARE * free / each)
        wanted = min(n, MAX_BATCH if batch_size is None else batch_size)
        if fits < 1 or (batch_size is not None and wanted > fits):
            raise OutOfMemoryError(
                f"batch_size: {wanted} samples need {wanted * each / 2**20:.0f} MiB on {self.device}, {fits} would fit"
            )
        return min(wanted, fits)


def check_effect(guidance: Guidance, unlabelled: bool) -> None:
    """Raises ArgumentError for arguments of guidance that would have no effect.

    unlabelled: whether no image has a class.
    """
    details = {
        "guide_what": (guidance.what, "ab"),
        "attn_temp": (guidance.attn_temp, 1),
        "annealed_guidance": (guidance.annealed, False),
    }
    if not guidance.active:
        for name, (value, default) in details.items():
            if value != default:
                raise ArgumentError(name, "the default where guidance is 0, as it has no effect", repr(value))
    elif unlabelled and guidance.attn_temp == 1:
        expected = "0 without labels, where it has no effect unless attn_temp differs from 1"
        raise ArgumentError("guidance", expected, repr(guidance.scale))


def check_plan(plan: object, shapes: Sequence[BlockShape]) -> SolverPlan:
    """Returns the plan. Raises ArgumentError if it is no plan of a model whose blocks have these shapes."""
    if not isinstance(plan, SolverPlan):
        raise ArgumentError("plan", "a SolverPlan", type(plan).__name__)
    sizes = {(shape.tokens, shape.token_dim) for shape in shapes}
    if len(sizes) > 1:
        raise ArgumentError("plan", "None for a model whose blocks have different numbers of tokens", "a SolverPlan")
    return plan.check((len(shapes), *sizes.pop()))


def check_flow_of(model: object) -> None:
    """Raises ArgumentError unless this is a flow, or a model that gives one, of weights that have values."""
    if isinstance(model, type) or not (isinstance(model, Flow) or callable(getattr(model, "flow", None))):
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise ArgumentError("model", "a TarFlow (for ml-tarflow's own class use accelerate)", got)
    for name, kind in (("device", torch.device), ("dtype", torch.dtype)):
        if not isinstance(getattr(model, name, None), kind):
            raise ArgumentError(
                "model", f"one with a {name}", f"{type(model).__name__}.{name} = {getattr(model, name, None)!r}"
            )
    if isinstance(model, nn.Module):
        check_weights(model)
