"""A sampler is how people sample: it sees to arguments, seeds and labels, over a stream of batches."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from ..backend import check_compile, check_threads, choose_backend, make_engines
from ..backend.registry import names
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
    warn_range,
)
from ..devices import check_device, check_dtype
from ..dtypes import residual_dtype
from ..engine import Guidance
from ..engine.backend import Request
from ..errors import ArgumentError, NonFiniteError
from ..flow import Flow, check_flow_of
from ..forking import safe_in_forked_child
from ..limits import (
    MOST_NUMBER,
    MOST_SEED,
    MOST_TOL,
)
from ..probe import Prober
from ..scalars import check_flag, plain
from ..solvers import TOL, SolverPlan, check_plan, make_solvers
from .batch import BatchSampler
from .inverse import joined
from .labels import LabelRule, LabelsByNumber
from .memory import check_room, fitting_batch
from .plan_fitting import fitted_plan
from .report import Samples
from .rule import Rule

LATENT_RANGE = 20.0  # standard normal noise has no value beyond, however much of it is drawn


class Sampler(BatchSampler):
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
        device = None if device is None else check_device(device)
        dtype = None if dtype is None else check_dtype(dtype, device or torch.device("cpu"))
        check_choice("backend", backend, ("auto", *names()))
        with torch.inference_mode(False), torch.no_grad():  # a sampler outlives the mode that it is made in
            self.flow: Flow = model if isinstance(model, Flow) else model.flow(device or model.device)
            if not isinstance(self.flow, Flow):
                raise ArgumentError("model", "one whose flow(device) is a Flow", repr(self.flow))
            self.device = check_device(device or self.flow.device)
            self.dtype = check_dtype(dtype or self.flow.dtype, self.device)
            compile = check_compile(compile, self.device)
            self.backend, self.backend_reason = choose_backend(backend, Request(self.device, self.dtype, compile))
            self._threads = threads = check_threads(threads, self.backend)
            shapes = [stage.shape for stage in self.flow.stages]
            self.plan = None if plan is None else check_plan(plan, shapes)
            self.solvers = make_solvers(solver, tol, self.plan, dtype=self.dtype, shapes=shapes)
            if tol is not None:
                check_number("tol", tol, 0, MOST_TOL)
            self.solver, self._tol = solver, TOL[self.dtype] if tol is None else float(plain(tol))
            self._request = request = Request(self.device, self.dtype, compile, threads)
            prober = Prober(shapes, request, probe)
            self.engines = make_engines(
                self.backend, (stage.make_weights() for stage in self.flow.stages), request, prober
            )
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
        copies = len(self.flow.stages) + 2 if trajectory else 1
        check_room(n, self.flow.data_shape, residual_dtype(self.dtype), copies)
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
        label_of = LabelRule(labels, self.flow.num_classes, self.flow.class_names)
        progress = check_flag("progress", progress)
        rule = Rule.checked(
            self.flow,
            label_of.none,
            guidance=guidance,
            guide_what=guide_what,
            attn_temp=attn_temp,
            annealed_guidance=annealed_guidance,
            denoise=denoise,
            noise_std=noise_std,
            denoise_scale=denoise_scale,
            trajectory=trajectory,
            on_nonfinite=on_nonfinite,
        )
        batch = fitting_batch(self.engines[-1], self.device, n, rule.guidance.active, batch_size)

        def draw() -> Generator[Samples, None, None]:
            if rule.denoise:
                self.flow.check_unchanged(True)
            with self._bar(n, progress) as bar:
                for start in range(first, first + n, batch):
                    numbers = range(start, min(start + batch, first + n))
                    part = self._draw(numbers, label_of(numbers), seed, rule, batch, bar)
                    if rule.denoise:
                        self._denoise(part, rule)
                    yield part

        return draw()

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
        batch = fitting_batch(self.engines[-1], self.device, x.shape[0], classifier_free.active, None)
        parts = []
        for start in range(0, x.shape[0], batch):
            rows = slice(start, start + batch)
            y_rows = None if labels is None else labels[rows]
            part = self._invert(x[rows], y_rows, classifier_free, None, return_sequence)
            if part.failures and on_nonfinite == "raise":
                row = min(part.failures)
                raise NonFiniteError(*part.failures[row], start + row)
            parts.append(part)
        return joined(parts, x.device, return_sequence, return_log_det)

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
        return fitted_plan(self.flow, self.engines, samples, device=self.device, tol=self._tol)

    # Pickles and deep copies leave out what the solvers have learnt of times: another process or machine takes others.

    def __reduce__(self) -> tuple[Callable[[Any], Sampler], tuple[Any]]:
        """Pickles the weights and the options; the engines are made anew where the pickle is read."""
        return functools.partial(type(self), **self._options), (self._model(),)

    def __copy__(self) -> Sampler:
        """Returns a sampler that shares the weights and the engines, which keep nothing of a batch."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Sampler:
        """Returns a sampler of a copy of the model, with engines of its own."""
        return type(self)(copy.deepcopy(self._model()), **self._options)

    def _model(self) -> Any:
        """Returns the model that copies are made of. Raises ArgumentError where it has changed, or there is none."""
        self.flow.check_unchanged(True)
        if self.flow.model is None:
            expected = "a flow with its `model`, to make a copy or a pickle of its sampler from"
            raise ArgumentError("model", expected, "a flow whose model is None")
        return self.flow.model
