"""A run of `tarflow-fast sample` ends with what was done, in numbers and in lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..sizes import by
from .labels import MOST_LISTED, Chosen, label_name

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.tarflow import TarFlow
    from ..sampling.report import Report, Samples


class Totals:
    """The `Totals` of a run sum up its batches."""

    def __init__(self) -> None:
        self._report: Report | None = None
        self._n = 0
        self._labels: list[Tensor] = []
        self._log_prob: list[Tensor] = []

    def add(self, part: Samples) -> None:
        self._n += len(part.images)
        if self._report is None:
            self._report = part.report
        else:
            self._report.merge(part.report)
        if part.labels is not None:
            self._labels.append(part.labels)
        if part.log_prob is not None:
            self._log_prob.append(part.log_prob.cpu())

    def facts(self) -> dict[str, Any]:
        """Returns what was done, in numbers."""
        report = self._report
        assert report is not None
        facts: dict[str, Any] = {
            "images": self._n,
            "images_per_second": self._n / (report.seconds + report.denoise_seconds),
            **report.to_dict(),
        }
        if self._labels:
            facts["labels"] = [label for part in self._labels for label in part.tolist()]
        if self._log_prob:
            facts["log_prob"] = [nats for part in self._log_prob for nats in part.tolist()]
        return facts


def summary_lines(facts: dict[str, Any], model: TarFlow, chosen: Chosen, rows: bool) -> list[str]:
    """Returns the lines that tell what was done. rows: whether each class has a row of the grid."""
    from ..flow import known_names

    size, names = by(model.config.img_size), known_names(model.metadata)
    what = f"images of {size}"
    if model.config.layout == "tokens":
        what = f"sequences of {model.config.num_patches} tokens of {model.config.token_dim} values"
    how = f"guidance {facts['guidance']:g}" if facts["guidance"] else "unguided"
    how += ", denoised" if facts["denoise"] else ""
    lines = [
        f"{', '.join(facts['files'].values())}: {facts['images']} {what}, {how}",
        f"{facts['seconds'] + facts['denoise_seconds']:.2f} s, {facts['images_per_second']:.3g} {model.config.kind}/s, "
        f"{facts['tokens_per_second']:,.0f} tokens/s in batches of {facts['batch_size']}",
        f"backend {facts['backend']} ({facts['backend_reason']}), {facts['device']}, {facts['dtype']}, "
        f"{facts['solver']} solver",
    ]
    if facts["setup_seconds"] >= 0.01:
        lines.append(f"{facts['setup_seconds']:.2f} s of it to set up for this batch size: the next batch does without")
    blocks, most = facts["blocks"], model.config.num_patches - 1
    if any(block["window"] > 1 for block in blocks):
        passes = ", ".join(str(block["passes"]) for block in blocks)
        residual = max(block["residual"] for block in blocks)
        instead = f" instead of {most}" if sum(block["passes"] for block in blocks) < most * len(blocks) else ""
        lines.append(f"passes of each block: {passes}{instead}; residual at most {residual:.1e}")
    if rows and chosen.entries:
        lines.append("rows: " + ", ".join(label_name(y, names) for y in chosen.entries))
    elif chosen.described is not None:
        drawn = sorted(set(facts.get("labels", ())))
        few = f" ({', '.join(label_name(y, names) for y in drawn)})" if 0 < len(drawn) <= MOST_LISTED else ""
        lines.append(f"classes: {chosen.described}{few}")
    if facts["redrawn"]:
        lines.append(f"drawn again, not being finite: {model.config.kind} " + ", ".join(map(str, facts["redrawn"])))
    if "log_prob" in facts:
        nats, when = facts["log_prob"], " before denoising" if facts["denoise"] else ""
        mean = sum(nats) / len(nats)
        lines.append(f"log p{when}: mean {mean:.1f} nats, from {min(nats):.1f} to {max(nats):.1f}")
    return lines
