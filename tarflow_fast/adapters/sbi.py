"""This module accelerates sbi's posteriors that are sampled directly, whose estimators are flows of nflows or zuko."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from sbi.inference.posteriors import DirectPosterior
from sbi.neural_nets.estimators.nflows_flow import NFlowsFlow
from sbi.neural_nets.estimators.zuko_flow import ZukoFlow
from torch import Tensor, nn

from ..errors import ArgumentError
from ..scalars import check_flag
from . import nflows, zuko


def accelerate(posterior: Any, *, check: bool = True, **options: Any) -> FastPosterior:
    """Returns a fast counterpart of an sbi posterior: the same distribution, to rounding.

    Args:
        posterior: A `DirectPosterior` whose estimator is an `NFlowsFlow` or a `ZukoFlow`, such as `NPE` builds with
            density_estimator="maf", "maf_rqs", "nsf", "zuko_maf" or "zuko_nsf".
        check: Whether small density passes of both flows are compared.
        **options: The keyword arguments of `FlowInverse`.

    Raises:
        ArgumentError: The posterior is of another kind; its flow has a transform or a network that no engine knows,
            which the error names; `check` found that it computes another thing; or an option is wrong.
        BackendError: The backend that was asked for cannot serve.
    """
    if type(posterior) is not DirectPosterior:
        raise ArgumentError("model", "an sbi DirectPosterior", type(posterior).__name__)
    return FastPosterior(posterior, check=check_flag("check", check), **options)


class FastPosterior(DirectPosterior):
    """An sbi `DirectPosterior` whose estimator samples by engines.

    `sample`, `sample_batched`, `log_prob` and all other methods are as there. The default x is taken over.

    Args:
        posterior: The posterior, whose prior and embedding network are shared.
        check: Whether small density passes of both flows are compared.
        **options: The keyword arguments of `FlowInverse`.
    """

    def __init__(self, posterior: DirectPosterior, *, check: bool, **options: Any):
        own = posterior.posterior_estimator
        shapes = {"input_shape": own.input_shape, "condition_shape": own.condition_shape}
        self._fast: _Refreshed
        if type(own) is NFlowsFlow:
            fast = nflows.accelerate(own.net, check=check, **options)
            self._fast, estimator = fast, NFlowsFlow(fast, **shapes)
        elif type(own) is ZukoFlow:
            net = _Net(own.net, check=check, **options)
            self._fast, estimator = net.fast, ZukoFlow(net, own.embedding_net, **shapes)
        else:
            raise ArgumentError("model.posterior_estimator", "an NFlowsFlow or a ZukoFlow", type(own).__name__)
        super().__init__(
            estimator.eval(),
            posterior.prior,
            max_sampling_batch_size=posterior.max_sampling_batch_size,
            device=posterior._device,
            enable_transform=posterior.enable_transform,
        )
        if posterior.default_x is not None:
            self.set_default_x(posterior.default_x)

    def refresh(self) -> None:
        """Take the estimator's weights as they are now."""
        self._fast.refresh()
        self._leakage_density_correction_factor = None


class _Refreshed(Protocol):
    def refresh(self) -> None: ...


class _Net(nn.Module):
    """A zuko flow by engines, as the module that `ZukoFlow` has it be.

    Args:
        flow: The flow.
        **options: Those of the adapter of zuko.
    """

    def __init__(self, flow: nn.Module, **options: Any):
        super().__init__()
        self.fast = zuko.accelerate(flow, **options)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the weights of the flow itself, which sbi looks at for its device."""
        return self.fast.flow.parameters(recurse)

    def forward(self, context: Tensor) -> Any:
        """Returns the distribution of the flow for a context, (…, C)."""
        return self.fast(context)
