"""A certificate of samples: how far the model's own density pass is from what sampling said of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Certificate:
    """What a model's own density pass says of samples.

    Attributes:
        residual: (…), max_d |z − forward(x)| of each sample x, which was made of the latents z.
        log_prob_error: (…), |log q(x) by the density pass − log q(x) that came with the sample|, in nats.
    """

    residual: Tensor
    log_prob_error: Tensor

    def count(self, limit: float) -> tuple[int, int]:
        """Returns how many samples have a residual above a limit, and how many a log_prob_error above it.

        Args:
            limit: The limit, such as 1e-3. A NaN counts as above.
        """
        return int((~(self.residual <= limit)).sum()), int((~(self.log_prob_error <= limit)).sum())
