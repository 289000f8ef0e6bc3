"""The density pass of a whole model on a CPU, in C++ (`csrc/cpu/density_pass.h`): z, log-det, and the gradient of the
log-density, without torch's threads.

Weights are read where the modules have them at each call, so that nothing is packed in advance and nothing can be
out of date. PyTorch's own pass (`flow_block.py`) serves wherever something is asked for that this one does not do:
gradients of the weights, transforms of torch.func, modules that were exchanged or have hooks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..devices import default_threads
from ..errors import BackendError
from ..forking import safe_in_forked_child
from ..native import CPU_DTYPES, address, choose_instruction_set, load_native
from .flow_block import Attention, layer_weights, unknown_arithmetic

DENSITY_BACKENDS = ("auto", "cpu", "torch")
MOST_BYTES = 2**30


class CpuDensity(NamedTuple):
    """What `cpu_density` found.

    outputs: (K, B, T, D) fp32, x after each block, the last of which is z; log_det: (B,) fp64, log|det dz/dx| in nats;
    gradient: (B, T, D) fp32, d(log|det dz/dx| − ½ |z|²)/dx, or None where it was not asked for; workspace_bytes: the
    memory that the pass took beside these, which it has given back.
    """

    outputs: Tensor
    log_det: Tensor
    gradient: Tensor | None
    workspace_bytes: int


def cpu_density_missing(blocks: nn.ModuleList, x: Tensor, dtype: torch.dtype, *, gradients: bool) -> str | None:
    """Why the C++ pass cannot serve these blocks and this input, with the mend, or None if it can.

    dtype: of the products. gradients: whether autograd is to record the pass. Raises BackendError if
    TARFLOW_FAST_CPU_ISA names instructions that this machine lacks.
    """
    if x.device.type != "cpu" or any(p.device.type != "cpu" for p in blocks.parameters()):
        return "it needs the model and x on the CPU"
    if dtype not in CPU_DTYPES or any(p.dtype not in CPU_DTYPES for p in blocks.parameters()):
        return "it has float32 and bfloat16 only; use density 'torch' for other dtypes"
    if gradients and (x.requires_grad or any(p.requires_grad for p in blocks.parameters())):
        return "autograd is to record the pass; use torch.no_grad(), or density 'torch'"
    if type(x) is not Tensor or _watched():
        return "a transform or mode of torch is active, which only PyTorch's own operations can follow"
    unknown = unknown_arithmetic(blocks)
    if unknown is not None:
        return f"{unknown}; use density 'torch'"
    for module in blocks.modules():
        if isinstance(module, Attention) and module.backend != "auto":
            return f"attention={module.backend!r} was asked for, which is PyTorch's; use set_attention('auto')"
    try:
        load_native()
    except BackendError as error:
        return str(error)
    choose_instruction_set()
    return None


def _watched() -> bool:
    """Whether torch is to see each operation: it compiles, traces, transforms or counts.

    A default device, which torch keeps as a mode too, has no part in this pass.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or bool(nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
    )


@safe_in_forked_child()
@torch.no_grad()
def cpu_density(
    blocks: nn.ModuleList,
    tokens: Tensor,
    y: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    gradient: bool = False,
    threads: int | None = None,
) -> CpuDensity:
    """z = f_K ∘ … ∘ f_1 (x) and log|det dz/dx|; with `gradient`, also d(log|det dz/dx| − ½ |z|²)/dx.

    tokens: (B, T, D) float on the CPU, x in the image's order; y: (B,) int64, negative for no class, or None; dtype: of
    the linear layers' products, float32 or bfloat16, all else being fp32; threads: default `default_threads()`.
    Results do not depend on threads, nor on what else is in the batch. Beyond the result it needs up to 1 GiB, or what
    a single image needs if that is more: with a gradient, about 40 K L T C bytes. The caller has asked
    `cpu_density_missing`.
    """
    x = tokens.detach().to(torch.float32).contiguous()
    B, T, D = x.shape
    kept: list[Tensor] = []  # copies live until the call is over

    def plain(tensor: Tensor) -> int:
        kept.append(tensor.detach().to(torch.float32).contiguous())
        return address("weights", kept[-1], torch.float32)

    def addresses(block: Any) -> dict[str, Any]:
        embedding, order, C = block._class_embedding(y), block.permutation, block.shape.channels
        tensors = {
            "proj_in_weight": block.proj_in.weight,
            "proj_in_bias": block.proj_in.bias,
            "position": block.pos_embed,
            "proj_out_weight": block.proj_out.weight,
            "proj_out_bias": block.proj_out.bias,
        }
        if embedding is not None:
            tensors["embedding"] = embedding.reshape(-1, C).expand(B, C)
        places = None if order.is_identity else torch.tensor(order.indices, dtype=torch.int64, device="cpu")
        if places is not None:
            kept.append(places)
        return {
            "sizes": block.shape.native,
            "weights": {"embedding": 0, **{name: plain(tensor) for name, tensor in tensors.items()}},
            "layers": [
                {name: plain(tensor) for name, tensor in vars(layer_weights(layer)).items()}
                for layer in block.attn_blocks
            ],
            "order": 0 if places is None else address("order", places, torch.int64),
        }

    outputs = torch.empty((len(blocks), B, T, D), dtype=torch.float32, device="cpu")
    log_det = torch.empty(B, dtype=torch.float64, device="cpu")
    slope = torch.empty_like(x) if gradient else None
    workspace_bytes = load_native().density(
        blocks=[addresses(block) for block in blocks],
        samples=B,
        x=address("x", x, torch.float32),
        outputs=address("outputs", outputs, torch.float32),
        log_det=address("log_det", log_det, torch.float64),
        gradient=0 if slope is None else address("gradient", slope, torch.float32),
        bf16=dtype == torch.bfloat16,
        instruction_set=choose_instruction_set(),
        threads=threads or default_threads(),
        most_bytes=MOST_BYTES,
    )
    return CpuDensity(outputs, log_det, slope, workspace_bytes)
