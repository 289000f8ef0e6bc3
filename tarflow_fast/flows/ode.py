"""The initial-value problem ds/dt = f(t, s), solved in fixed steps, or in adaptive ones by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torchdiffeq
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_number
from ..errors import ODEDiverged

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]
Method = Literal["euler", "midpoint", "rk4", "dopri5", "dopri8"]

EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4}
"""How often a method of fixed steps evaluates the field in one step; the other methods adapt their steps."""


@dataclass(frozen=True)
class ODE:
    """How an ODE is solved.

    Attributes:
        method: "euler", "midpoint" and "rk4" take `steps` steps of one size, each sample for itself. "dopri5" and
            "dopri8" choose their steps by the error of the whole batch, so that a sample depends on its batch mates
            within the tolerance.
        steps: How many steps the methods of fixed steps take.
        tolerance: The relative and the absolute error that an adaptive method allows itself in one step.
        max_evaluations: How many evaluations of the field an adaptive method may take before it counts as diverged.
    """

    method: Method = "dopri5"
    steps: int = 32
    tolerance: float = 1e-5
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_count("steps", self.steps)
        check_number("tolerance", self.tolerance, 0, 1, open_low=True)
        check_count("max_evaluations", self.max_evaluations)

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps."""
        return self.method not in EVALUATIONS


def integrate(
    field: Field,
    state: State,
    start: float,
    end: float,
    ode: ODE,
    *,
    project: Callable[[Tensor], Tensor] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> tuple[State, int]:
    """Returns s(end) for ds/dt = field(t, s), s(start) = state, and how often the field was evaluated.

    Args:
        field: The function (t, s) -> ds/dt. t: () the time. s: a tuple of (B, …) tensors, as is what it returns.
        state: The state at `start`, a tuple of (B, …) floating-point tensors.
        start: The time at which the state is given. It may come after `end`.
        end: The time at which the state is asked for.
        ode: How the problem is solved.
        project: What the first tensor of the state is put through after each fixed step, or at the end of adaptive
            ones, such as a projection onto a manifold that only rounding and the steps' errors lead away from.
        parameters: If given, gradients of adaptive methods come from the adjoint ODE, whose memory does not grow with
            the number of steps, and reach these parameters and the state. If None, they come through the steps.

    Raises:
        ODEDiverged: The state became infinite or NaN, or an adaptive method needed too many or too small steps. Where
            gradients come from the adjoint ODE, `backward` raises it too.
    """
    if not ode.adaptive:
        end_state = fixed_steps(field, state, start, end, ode, project=project)
        check_finite(end_state, end)
        return end_state, ode.steps * EVALUATIONS[ode.method]
    limited = _Limited(field, ode.max_evaluations)
    # Metal has no float64, in which torchdiffeq keeps time otherwise.
    dtype = torch.float32 if state[0].device.type == "mps" else torch.float64
    times = torch.tensor([start, end], device=state[0].device, dtype=state[0].dtype)
    # The last step ends where the solution does, as torchdiffeq interpolates within a step less exactly than it steps.
    options, back = ({"dtype": dtype, "step_t": times[i : i + 1]} for i in (1, 0))
    how: dict[str, Any] = {"rtol": ode.tolerance, "atol": ode.tolerance, "method": ode.method, "options": options}
    if parameters is None or not torch.is_grad_enabled():
        solution = torchdiffeq.odeint(limited, state, times, **how)
    else:
        solution = torchdiffeq.odeint_adjoint(
            limited, state, times, adjoint_params=tuple(parameters), adjoint_options=back, **how
        )
    end_state = tuple(part[1] for part in solution)
    check_finite(end_state, end)
    if project is not None:
        end_state = (project(end_state[0]), *end_state[1:])
    return end_state, limited.evaluations


def fixed_steps(
    field: Field,
    state: State,
    start: float,
    end: float,
    ode: ODE,
    *,
    project: Callable[[Tensor], Tensor] | None = None,
) -> State:
    """Returns s(end) after `ode.steps` steps of one size; the arguments are those of `integrate`.

    Nothing here waits for the device, so that all steps together can be one CUDA graph.
    """
    size = (end - start) / ode.steps
    for index in range(ode.steps):
        state = _step(field, state, start + index * size, size, ode.method)
        if project is not None:
            state = (project(state[0]), *state[1:])
    return state


def check_finite(state: State, time: float) -> None:
    """Raises ODEDiverged where the state at this time has an infinity or a NaN."""
    if not all(bool(torch.isfinite(part).all()) for part in state):
        raise ODEDiverged(time, "its state is infinite or NaN")


def _step(field: Field, state: State, time: float, size: float, method: str) -> State:
    """Returns the state after one step of a Runge-Kutta method: Euler's, the midpoint method, or the classical one."""

    def slope(at: float, s: State) -> State:
        return field(torch.full((), at, dtype=s[0].dtype, device=s[0].device), s)

    first = slope(time, state)
    if method == "euler":
        return _moved(state, size, first)
    second = slope(time + size / 2, _moved(state, size / 2, first))
    if method == "midpoint":
        return _moved(state, size, second)
    third = slope(time + size / 2, _moved(state, size / 2, second))
    fourth = slope(time + size, _moved(state, size, third))
    mean = tuple((a + 2 * (b + c) + d) / 6 for a, b, c, d in zip(first, second, third, fourth, strict=True))
    return _moved(state, size, mean)


def _moved(state: State, size: float, slope: State) -> State:
    """Returns state + size · slope."""
    return tuple(torch.add(s, k, alpha=size) for s, k in zip(state, slope, strict=True))


class _Limited(nn.Module):
    """A field that counts its evaluations and ends the solution where it diverges.

    torchdiffeq calls `callback_step` before each step, and `callback_step_adjoint` before each of the adjoint ODE.
    """

    def __init__(self, field: Field, most: int):
        super().__init__()
        self.field, self.most, self.evaluations = field, most, 0

    def forward(self, t: Tensor, state: State) -> State:
        self.evaluations += 1
        if self.evaluations > self.most:
            raise ODEDiverged(float(t.detach()), f"it takes more than max_evaluations = {self.most} evaluations")
        return self.field(t, state)

    def callback_step(self, t: Tensor, state: Tensor | State, size: Tensor) -> None:
        if not bool(t + size > t):
            raise ODEDiverged(float(t.detach()), "its steps became too small for the dtype, or NaN")

    def callback_step_adjoint(self, t: Tensor, state: Tensor | State, size: Tensor) -> None:
        # The adjoint ODE runs from the end to the start, in a time with the sign that torchdiffeq gives it.
        self.callback_step(t, state, size)
