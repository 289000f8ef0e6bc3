"""Faults planted into the CUDA kernel's source: the emulation finds what only a GPU would show, and only at times."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cases import KERNEL_DEVICE, random_latents, random_model
from cuda_emulation import SOURCES, compiler_missing, emulated
from engines import GUIDED

from tarflow_fast.backend.cuda import engine as cuda_engine
from tarflow_fast.backend.cuda.engine import CudaEngine
from tarflow_fast.engine import Condition

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing())),
    pytest.mark.skipif(KERNEL_DEVICE.type == "cuda", reason="of the emulation"),
]


BATCH = 9  # rows are twice as many: one group, of which no blocks are pairs
MUTANTS = {  # file, text, instead, what is found
    "no sync before the signal": (
        "grid.cuh",
        "    sync_block();\n    if (thread() == 0) signal",
        "    if (thread() == 0) signal",
        "race on",
    ),
    "no barrier": (
        "kernel.cuh",
        "      end(phase, layer);",
        "      if (phase != QKV) end(phase, layer);",
        "race on",
    ),
    "a turn that is not emptied": (
        "kernel.cuh",
        "    empty_turn(1 - turn);\n  }",
        "  }",
        "not empty",
    ),
    "a turn that is emptied too early": (
        "kernel.cuh",
        "    turn = 1 - turn;\n    empty_turn(1 - turn);",
        "    turn = 1 - turn;\n    empty_turn(turn);",
        "race on|not empty",
    ),
    "nothing is empty at first": (
        "kernel.cuh",
        "if constexpr (SENDS) begin_turns();",
        "",
        "not empty|never emptied",
    ),
    "parts that are not emptied": (
        "inputs.cuh",
        "        empty<4>(rest, place(i));",
        "",
        "not empty: rest",
    ),
    "queries of the turn that is read": (
        "kernel.cuh",
        "SENDS ? 1 - turn : 0",
        "SENDS ? turn : 0",
        "race on queries",
    ),
    "something sent that is read at once": (
        "sent.cuh",
        "values[u] = look<N>(from, place(u), sent)",
        "values[u] = sent ? load_vector<N>(from, place(u)) : values[u]",
        "race on",
    ),
    "no sync after a copy": (
        "linear.cuh",
        "        sync_block();\n        const auto multiply_k",
        "        const auto multiply_k",
        "race on shared memory",
    ),
    "no sync before the rest of the inputs": (
        "linear.cuh",
        "if (share == REST) sync_block();",
        "",
        "race on shared memory|sync_block",
    ),
    "no sync between two rows": (
        "inputs.cuh",
        "if (spots || row != block()) sync_block();",
        "if (spots) sync_block();",
        "race on shared memory",
    ),
    "a slot too many": (
        "ring.cuh",
        "ahead_ + held_ < p_.slots",
        "ahead_ + held_ <= p_.slots",
        "race on shared memory|copy|wait_copies",
    ),
    "another block's jobs": (
        "kernel.cuh",
        "block() * p.most_jobs * 2 + i",
        "(block() + 1) * p.most_jobs * 2 + i",
        "out of bounds: jobs",
    ),
    "rows that nobody zeroed": (
        "kernel.cuh",
        "store(scratch.staged, i, from_float<T>(0.0f))",
        "sync_block()",
        "never written: shared memory|sync_block",
    ),
    "a token too far": (
        "affine.cuh",
        "rows.place(position, token + 1)",
        "rows.place(position, token + 2)",
        "out of bounds: z",
    ),
}
WITHOUT_GATES = {
    "a copy not waited for": (
        "ring.cuh",
        "wait_copies(ahead_ < 7 ? ahead_ : 7)",
        "wait_copies(ahead_ < 7 ? ahead_ + 1 : 7)",
        "wait_copies|copy",
    ),
}
OF_PAIRS = {  # of so many samples that the rows are two groups
    "a slot filled before the other block has freed it": (
        "ring.cuh",
        "if (p_.pairs) pass_gate(gates_, gate + 1, ~laps_ >> 1 & 1);",
        "",
        "race on shared memory.*(copies in bulk to|waits for a copy)",
    ),
    "a slot read before it has come": (
        "ring.cuh",
        "      pass_gate(gates_, gate_of(take_), laps_ & 1);\n    else",
        "      ;\n    else",
        "race on shared memory.*waits for a copy|never written",
    ),
    "sums in a slot that no fence follows": (
        "linear.cuh",
        "if (GATED && p.sums_in_slots) fence_copies();",
        "",
        "wrote without a fence",
    ),
    "a block that does not wait for its last copies": (
        "ring.cuh",
        "    if constexpr (GATED) {\n      sync_block();\n      release();",
        "    if constexpr (GATED) {\n      return;\n      release();",
        "nobody waited for|has ended",
    ),
    "the same half by both blocks": (
        "ring.cuh",
        "const int rank = block() & 1,",
        "const int rank = 0,",
        "race on shared memory.*(copies in bulk to|waits for a copy)|deadlock",
    ),
    "gates that the other block may not have yet": (
        "ring.cuh",
        "        publish_gates();\n      }\n      sync();",
        "        publish_gates();\n      }",
        "there is no gate",
    ),
}
PLANTED = [
    *(pytest.param(*mutant, BATCH, True, id=name) for name, mutant in MUTANTS.items()),
    *(pytest.param(*mutant, BATCH, False, id=name) for name, mutant in WITHOUT_GATES.items()),
    *(pytest.param(*mutant, 17, True, id=name) for name, mutant in OF_PAIRS.items()),
]


@pytest.mark.parametrize(("file", "text", "instead", "found", "batch", "gates"), PLANTED)
def test_is_caught(
    file: str,
    text: str,
    instead: str,
    found: str,
    batch: int,
    gates: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(SOURCES, folder)
    source = (folder / file).read_text()
    assert text in source
    (folder / file).write_text(source.replace(text, instead))
    monkeypatch.setattr(cuda_engine, "load_native", lambda: emulated(2, folder, gates))
    model = random_model(6, num_classes=2, img_size=6, layers_per_block=2)
    engine = CudaEngine(model.block_weights(0), device=KERNEL_DEVICE, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1, -1]).repeat(6)[:batch]
    state = engine.begin(random_latents(model, batch), Condition(labels, GUIDED))
    with pytest.raises(RuntimeError, match=found):
        engine.reverse(state)
