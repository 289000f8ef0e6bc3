"""The emulated device by itself: what csrc/cuda/device.cuh promises holds, and what it does not promise is an error.

Kernels are those of emulation_kernels.cpp, in which `mode` plants a fault.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from torch import Tensor

if cuda_emulation.compiler_missing() is not None:
    pytest.skip(str(cuda_emulation.compiler_missing()), allow_module_level=True)

SEEDS = range(20)
THREADS = 64


@functools.cache
def native() -> Any:
    sources = [Path(__file__).parent / "emulation_kernels.cpp", *cuda_emulation.SOURCES.glob("emulation/*.cpp")]
    return cuda_emulation.build("emulation_kernels", sources)


@pytest.fixture(autouse=True)
def _first_device() -> Iterator[None]:
    native().set_device(3, 227 * 1024)
    native().set_seed(0)
    yield
    native().set_device(3, 227 * 1024)


def run(kernel: str, *, blocks: int = 1, warps: int = 2, shared_bytes: int = 1024, **given: Tensor | int) -> None:
    """Tensors are buffers, numbers sizes."""
    sizes = {name: value for name, value in given.items() if isinstance(value, int)}
    buffers = {n: (value.data_ptr(), value.numel()) for n, value in given.items() if isinstance(value, Tensor)}
    native().run(kernel, sizes, buffers, blocks, warps, shared_bytes)


def fault(kernel: str, seed: int = 0, **given: Any) -> str:
    """What is wrong with a launch."""
    native().set_seed(seed)
    with pytest.raises(RuntimeError) as caught:
        run(kernel, **given)
    return str(caught.value)


def premature(message: str) -> bool:
    """A use of memory that nothing orders after what it needs, which may not have begun."""
    return "race" in message or "never written" in message


def nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


# How it is built


def test_what_many_ask_for_at_once_is_made_once(tmp_path: Path) -> None:
    made = []

    def make(to: Path) -> None:
        made.append(to)
        time.sleep(0.1)  # in which the others come
        to.write_text("whole")
        if len(made) == 1:
            raise RuntimeError("the compiler was killed")

    def ask(_: int) -> str:
        return cuda_emulation.made_once(tmp_path / "folder" / "module.so", make).read_text()

    with pytest.raises(RuntimeError, match="killed"):
        ask(0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {"whole"}
    assert len(made) == 2


# What is promised


DTYPES = [("bf16", torch.bfloat16), ("fp16", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_tiles_are_multiplied_as_matrices(name: str, dtype: torch.dtype) -> None:
    a, b, c, out = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8), nan(16, 8)
    run(f"product_{name}", warps=1, weights=a, keys_values=b, h=c, parameters=out)
    torch.testing.assert_close(out, c + a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def special_numbers() -> Tensor:
    """Every 16-bit number of both types, those halfway between two neighbours, just beside these, and random ones."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    of_bf16 = (bits[:, None] * 65536 + low).flatten().view(torch.float32)
    of_fp16 = bits.to(torch.int16).view(torch.float16).float()
    halfway = (of_fp16 + of_fp16.roll(1)) / 2
    beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    return torch.cat([of_bf16, of_fp16, halfway, *beside])


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_numbers_are_rounded_as_torch_rounds_them(name: str, dtype: torch.dtype) -> None:
    x = special_numbers()
    hidden, z = torch.zeros_like(x, dtype=dtype), nan(len(x))
    run(f"convert_{name}", x=x, hidden=hidden, z=z)
    wanted = x.to(dtype)
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_exchange_lanes(seed: int) -> None:
    native().set_seed(seed)
    x, z = torch.randn(THREADS), nan(5, THREADS)
    run("shuffle", x=x, z=z)
    lanes = torch.arange(THREADS)
    torch.testing.assert_close(z, torch.stack([x[lanes ^ 1 << i] for i in range(5)]), rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_exchanges_data_between_syncs(seed: int) -> None:
    native().set_seed(seed)
    x, z = torch.randn(THREADS).bfloat16().float(), nan(THREADS)
    run("neighbours", blocks=3, x=x, z=z)
    torch.testing.assert_close(z, x.roll(-1), rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_all_have_read_is_written_after_a_sync(seed: int) -> None:
    native().set_seed(seed)
    z = torch.ones(1)
    run("read_by_all", z=z)
    assert z.item() == 4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_blocks_exchange_data_across_a_barrier(blocks: int, seed: int) -> None:
    native().set_device(8, 1024)
    native().set_seed(seed)
    z, barrier = nan(blocks, THREADS), torch.zeros(1, dtype=torch.int32)
    run("exchange", blocks=blocks, h=nan(2, blocks, THREADS), z=z, barrier=barrier)
    t, rounds = torch.arange(THREADS), torch.arange(6)[:, None]
    for block in range(blocks):
        wanted = ((block + 1) % blocks * 100 + (t + rounds) % THREADS + rounds).sum(0)
        torch.testing.assert_close(z[block], wanted.float(), rtol=0, atol=0)
    assert barrier.item() == 6 * blocks


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_hands_data_to_another(seed: int) -> None:
    native().set_seed(seed)
    z = nan(1)
    run("handover", blocks=2, warps=1, x=nan(1), z=z, barrier=torch.zeros(1, dtype=torch.int32))
    assert z.item() == 7


def test_copies_come_when_they_are_waited_for() -> None:
    x, z = torch.randn(32), nan(32)
    run("late_wait", warps=1, x=x, z=z)
    torch.testing.assert_close(z, x[torch.arange(32) ^ 1], rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_written_before_a_sync_is_copied(seed: int) -> None:
    native().set_seed(seed)
    z = nan(32)
    run("copy_of_written", warps=1, h=nan(32), z=z)
    torch.testing.assert_close(z, torch.arange(32.0), rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_copies_brings_every_tile(seed: int) -> None:
    native().set_seed(seed)
    x, z = torch.randint(100, (7, THREADS)).float(), nan(THREADS)
    run("ring", blocks=2, x=x, z=z, tokens=7)
    torch.testing.assert_close(z, x.sum(0), rtol=0, atol=0)


@pytest.mark.parametrize(("blocks", "shared_bytes"), [(4, 0), (0, 0), (1, 1025), (1, -1)])
def test_a_launch_that_the_device_cannot_hold(blocks: int, shared_bytes: int) -> None:
    native().set_device(3, 1024)
    with pytest.raises(RuntimeError):
        run("shuffle", blocks=blocks, shared_bytes=shared_bytes, x=torch.randn(THREADS), z=nan(5, THREADS))


def sent(blocks: int, start: int, mode: int = 0) -> dict[str, Any]:
    """The arguments of the kernel `sending`."""
    given = {"h": nan(2, blocks, 4), "z": nan(blocks), "barrier": torch.zeros(1, dtype=torch.int32)}
    return {"blocks": blocks, "start": start, "mode": mode, **given}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 1], ids=["emptied by the sender", "emptied by the reader"])
def test_what_is_sent_is_got_without_a_barrier(start: int, seed: int) -> None:
    native().set_seed(seed)
    given = sent(3, start)
    run("sending", **given)
    torch.testing.assert_close(given["z"], torch.tensor([184.0, 344.0, 24.0]), rtol=0, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("blocks", [2, 4])
def test_the_blocks_of_a_pair_copy_for_each_other(blocks: int, seed: int) -> None:
    native().set_device(4, 1024)
    native().set_seed(seed)
    x, z = torch.randint(100, (8, THREADS)).float(), nan(blocks, THREADS)
    run("pair_ring", blocks=blocks, x=x, z=z, tokens=8)
    torch.testing.assert_close(z, x.sum(0).expand(blocks, THREADS), rtol=0, atol=0)


# What is not


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (1, "race on shared memory.*copies in bulk to"),  # a slot that the other has not freed
        (2, "race on shared memory.*waits for a copy|never written"),  # read before it has come
        (3, "race on shared memory|never written"),  # passed by one thread alone, with no sync after it
        (4, "wrote without a fence.*copies in bulk to"),
        (5, "copies that nobody waited for: to block 0"),
        (6, "no gate|not been published"),
        (7, "deadlock.*pass_gate|race on shared memory|never written"),  # fewer bytes promised than come
        (8, "race on shared memory"),  # freed before all have written
        (9, "no gate"),  # used before the other has made its own
        (10, "block 1 has ended|deadlock|nobody waited for: to block 1"),  # that ends before the other
        (11, "deadlock.*pass_gate"),  # a gate for three
        (12, "deadlock.*pass_gate"),  # copies for one block, where bytes for both are promised
    ],
)
def test_a_pair_that_lacks_a_part(mode: int, message: str, seed: int) -> None:
    given = {"x": torch.randn(8, THREADS), "z": nan(2, THREADS), "tokens": 8}
    assert re.search(message, fault("pair_ring", seed, blocks=2, mode=mode, **given), re.DOTALL)


def test_a_block_that_has_no_other() -> None:
    given = {"x": torch.randn(8, THREADS), "z": nan(3, THREADS), "tokens": 8}
    assert "in no pair: block 2" in fault("pair_ring", blocks=3, **given)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mode", "start", "message"),
    [
        (1, 0, "race on h.*emptied|never emptied: h"),  # no barrier after the first emptying
        (2, 0, "not empty: h"),  # sent twice
        (3, 0, "race on h.*sent to it"),  # read as if a barrier had come before
        (4, 0, "race on h"),  # emptied while others may look
        (5, 0, "deadlock.*look"),  # never sent
        (6, 0, "not empty: h|never emptied: h"),
        (7, 1, "race on h|deadlock.*look"),  # emptied by one of two readers, which the other may wait for
        (8, 0, "not empty: h"),  # not emptied for the second use
    ],
)
def test_sending_that_lacks_a_part(mode: int, start: int, message: str, seed: int) -> None:
    assert re.search(message, fault("sending", seed, **sent(3, start, mode)), re.DOTALL)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", [1, 2], ids=["before the read", "before the next write"])
def test_a_missing_sync_is_a_race(mode: int, seed: int) -> None:
    x, z = torch.randn(THREADS), nan(THREADS)
    assert premature(fault("neighbours", seed, x=x, z=z, mode=mode))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shuffle_orders_no_memory(seed: int) -> None:
    assert "race on shared memory" in fault("after_shuffle", seed, x=torch.randn(THREADS), z=nan(THREADS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", [1, 2], ids=["shared", "global"])
def test_a_write_races_with_every_reader(mode: int, seed: int) -> None:
    assert "race" in fault("read_by_all", seed, z=torch.zeros(1), mode=mode)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", [1, 2, 3, 5], ids=["all", "sync before", "sync after", "one signal"])
def test_a_barrier_that_lacks_a_part_is_a_race(mode: int, seed: int) -> None:
    given = {"h": nan(2, 3, THREADS), "z": nan(3, THREADS), "barrier": torch.zeros(1, dtype=torch.int32)}
    assert "race" in fault("exchange", seed, blocks=3, mode=mode, **given)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", [1, 2, 3], ids=["sync before", "sync after", "a later signal"])
def test_only_what_a_signal_promises_is_ordered(mode: int, seed: int) -> None:
    given = {"x": nan(1), "z": nan(1), "barrier": torch.zeros(1, dtype=torch.int32)}
    assert "race on x[0]" in fault("handover", seed, blocks=2, warps=1, mode=mode, **given)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_is_seen_by_others_after_the_sync_that_follows_the_wait(seed: int) -> None:
    assert "race on shared memory" in fault("late_wait", seed, warps=1, mode=1, x=torch.randn(32), z=nan(32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", [1, 2], ids=["before it was asked for", "before it came"])
def test_what_is_copied_is_written_by_nobody_meanwhile(mode: int, seed: int) -> None:
    assert "race on h" in fault("copy_of_written", seed, warps=1, mode=mode, h=nan(32), z=nan(32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mode", [1, 2, 3, 4, 6], ids=["no wait", "short wait", "no sync", "overwritten while read", "no commit"]
)
def test_a_ring_that_lacks_a_part(mode: int, seed: int) -> None:
    assert premature(fault("ring", seed, x=torch.randn(7, THREADS), z=nan(THREADS), tokens=7, mode=mode))


def test_copies_that_nobody_waits_for() -> None:
    assert "waited for" in fault("ring", x=torch.randn(7, THREADS), z=nan(THREADS), tokens=7, mode=5)


# By number in the kernel `access`: the width of what is touched, and whether in shared memory.
ACCESSES = {0: 1, 1: 1, 2: 1, 3: 2, 4: 4, 5: 1, 6: 4, 7: 1, 8: 1, 9: 2, 10: 4, 11: 4, 12: 4}


@pytest.mark.parametrize(("mode", "width"), ACCESSES.items())
def test_bounds_and_alignment(mode: int, width: int) -> None:
    x = torch.zeros(64)[16:48]
    for inside in (0, 16, 32 - width):
        run("access", x=x, start=inside, mode=mode)
    for outside in (-1, -width, 32 - width + 1, 32, 10**6):
        assert "out of bounds" in fault("access", x=x, start=outside, mode=mode)
    if width > 1:
        assert "not aligned" in fault("access", x=x, start=1, mode=mode)


@pytest.mark.parametrize("mode", [3, 4, 6])
@pytest.mark.parametrize("start", [0, 3])
def test_alignment_is_that_of_the_index_and_of_the_address(start: int, mode: int) -> None:
    assert "not aligned" in fault("access", x=torch.zeros(64)[17:49], start=start, mode=mode)


@pytest.mark.parametrize("written", [0, 1, 3])
def test_shared_memory_is_read_before_it_is_written(written: int) -> None:
    run("unwritten", start=4)
    assert "shared memory" in fault("unwritten", start=written)


@pytest.mark.parametrize(("byte", "count"), [(0, 257), (1024, 1), (-16, 1), (8, 1), (0, -1)])
def test_shared_memory_that_a_block_does_not_have(byte: int, count: int) -> None:
    run("reserved", start=16, stop=252)
    assert "shared" in fault("reserved", start=byte, stop=count)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("mode", [0, 1, 2], ids=["read", "copied", "written after"])
def test_a_constant_that_is_written(mode: int, blocks: int, seed: int) -> None:
    x = torch.zeros(4)
    assert "constant" in fault("written_constant", seed, blocks=blocks, x=x, z=x, mode=mode)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("mode", "message"), [(1, "deadlock"), (2, "shuffle_xor"), (3, "multiply_tiles")])
def test_part_of_a_warp_is_elsewhere(mode: int, message: str, seed: int) -> None:
    assert message in fault("shuffle", seed, x=torch.randn(THREADS), z=nan(5, THREADS), mode=mode)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sync_that_one_thread_skips(seed: int) -> None:
    message = fault("skipped_sync", seed, blocks=2, start=17)
    assert "deadlock" in message
    assert "sync_block" in message


@pytest.mark.parametrize("seed", SEEDS)
def test_a_signal_that_never_comes(seed: int) -> None:
    given = {"h": nan(2, 3, THREADS), "z": nan(3, THREADS), "barrier": torch.zeros(1, dtype=torch.int32)}
    message = fault("exchange", seed, blocks=3, mode=4, **given)
    assert "deadlock" in message
    assert "100" in message


def test_schedules_differ_and_come_again() -> None:
    given = {"x": torch.randn(THREADS), "z": nan(THREADS), "mode": 1}
    messages = [fault("neighbours", seed, **given) for seed in SEEDS]
    assert len(set(messages)) > 10
    assert messages == [fault("neighbours", seed, **given) for seed in SEEDS]


def test_the_device_is_whole_after_a_fault() -> None:
    given = {"x": torch.randn(THREADS), "z": nan(5, THREADS)}
    fault("shuffle", **given, mode=1)
    run("shuffle", **given)
    assert not given["z"].isnan().any()


def test_launches_of_two_python_threads_take_turns() -> None:
    def launch(_: int) -> Tensor:
        z = nan(3, THREADS)
        run("exchange", blocks=3, h=nan(2, 3, THREADS), z=z, barrier=torch.zeros(1, dtype=torch.int32))
        return z

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(launch, range(20)))
    assert all(torch.equal(z, results[0]) for z in results)
    assert not results[0].isnan().any()
