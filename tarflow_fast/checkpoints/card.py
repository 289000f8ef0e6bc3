"""The model card tells a stranger what there is to know of a model's file, as the README.md of a repository."""

from __future__ import annotations

import json

from ..models.density import check_model
from ..models.tarflow import TarFlow
from ..sizes import by

CARD = "library_name: tarflow_fast"  # `save` knows a card of its own making by this line


def model_card(model: TarFlow) -> str:
    """Returns a model card: sizes, noise, classes and use, with the front matter that the Hugging Face Hub reads.

    The card says what the model itself records, and leaves a place for data, licence and results, which it does not.

    Args:
        model: A TarFlow.

    Returns:
        The card in Markdown.

    Raises:
        ArgumentError: `model` is no TarFlow.
    """
    check_model(model, values=False)
    config, known, sequences = model.config, model.metadata, model.config.layout == "tokens"
    kind = "class-conditional" if config.num_classes else "unconditional"
    parameters = sum(p.numel() for p in model.parameters())
    names = known.get("class_names")
    noise = "not recorded"
    if known.get("noise_type") == "uniform":
        noise = "uniform (dequantisation)"
    elif known.get("noise_std"):
        noise = f"Gaussian, σ = {known['noise_std']:g}; `denoise=True` takes it off"
    tokens = f"{config.num_patches} tokens of {config.token_dim} values"
    height, width = config.image_size
    images = {
        "images": f"{config.in_channels} × {height} × {width}, values from −1 to 1",
        "patches": f"{by(config.patch_size)}; {tokens}",
    }
    rows = {
        **({"sequences": tokens} if sequences else images),
        "flow blocks": f"{config.num_blocks}, {'affine' if config.nvp else 'volume-preserving'}",
        "transformer": f"{config.layers_per_block} layers, width {config.channels}, heads of {config.head_dim}",
        "parameters": f"{parameters:,}",
        "classes": f"{config.num_classes}" if config.num_classes else "none",
        "noise of training": noise,
    }
    if names:
        listed = ", ".join(json.dumps(name, ensure_ascii=False) for name in names[:20])
        rows["class names"] = listed + (", …" if len(names) > 20 else "")
    sampling = known.get("sampling", {})
    if sampling:
        rows["sampled by default with"] = ", ".join(f"{name} = {value}" for name, value in sampling.items())
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
    labels = ", labels=[0, 1]" if config.num_classes else ""
    rule = {"denoise": True} if known.get("noise_std") and known.get("noise_type") != "uniform" else {}
    how = "".join(f", {name}={value!r}" for name, value in {**rule, **sampling}.items())
    task = "" if sequences else "pipeline_tag: unconditional-image-generation\n"
    drawn = "sequences" if sequences else "images"
    return f"""---
{CARD}
{task}tags:
- tarflow
- normalizing-flow
---

# A TarFlow model

A {kind} [TarFlow](https://arxiv.org/abs/2412.06329), a normalizing flow of autoregressive transformers, in the format
of `tarflow_fast`.

| | |
|---|---|
{table}

```python
import tarflow_fast as tff

model = tff.load("model.safetensors")  # or "hf://owner/name"
{drawn} = tff.Sampler(model).sample(16{labels}{how}, seed=0).images
```

## Data, licence, results

Not recorded in the model; to be written by whoever publishes it.
"""


def _cell(text: str) -> str:
    """Returns text as a cell of a Markdown table can hold it."""
    return text.replace("|", "\\|").replace("\n", " ")
