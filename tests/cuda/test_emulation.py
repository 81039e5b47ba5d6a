"""The emulation of the CUDA execution model (csrc/cuda/emulate) against plain loops, and what it must refuse."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstrata import reference

SEEDS = (0, 1, 2)  # 0: threads run in order


@pytest.fixture(params=SEEDS)
def emulated(emulated_library: Path, request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The emulated library, threads and blocks in the order of a seed."""
    lib = ctypes.CDLL(str(emulated_library), mode=ctypes.RTLD_LOCAL)
    lib.kvstrata_cuda_last_error.restype = ctypes.c_char_p
    lib.kvstrata_cuda_emulate_seed(ctypes.c_uint64(request.param))
    yield lib
    lib.kvstrata_cuda_emulate_seed(ctypes.c_uint64(0))


def at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def mask_of(lanes: Iterator[int]) -> int:
    return sum(1 << i for i in lanes)


def c_mod(a: int, b: int) -> int:
    """The remainder as C has it, with the sign of `a`."""
    return abs(a) % b * (1 if a >= 0 else -1)


def test_shuffles_votes_and_reductions(emulated: ctypes.CDLL) -> None:
    x = torch.randint(-5, 100, (96,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    out = torch.full((96, 12), -77, dtype=torch.int64)
    assert emulated.kvstrata_cuda_selftest_lanes(at(x), at(out), 96) == 0
    for first in range(0, 96, 32):
        w = x[first : first + 32].tolist()
        for i in range(32):
            half = w[:16] if i < 16 else w[16:]
            want = [
                w[5],
                w[i // 8 * 8 + (i + 1) % 8],
                w[i ^ 3],
                w[i + 2] if i % 16 < 14 else w[i],
                w[i - 2] if i >= 2 else w[i],
                mask_of(j for j in range(32) if w[j] % 2),
                int(7 in w),
                int(min(w) >= 0),
                mask_of(j for j in range(32) if c_mod(w[j], 3) == c_mod(w[i], 3)),
                sum(w),
                max(w),
                sum(half) if i < 16 else w[31],
            ]
            assert out[first + i].tolist() == want, (first, i)


def test_lanes_that_a_block_lacks_take_no_part(emulated: ctypes.CDLL) -> None:
    x, out = torch.arange(16, dtype=torch.int32), torch.zeros(16, 12, dtype=torch.int64)
    assert emulated.kvstrata_cuda_selftest_lanes(at(x), at(out), 16) == 0
    assert out[:, 5].tolist() == [0xAAAA] * 16 and out[:, 9].tolist() == [120] * 16


def test_barriers_shared_memory_and_block_reductions(emulated: ctypes.CDLL) -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(4))
    x[5, 40] = float("nan")
    out = torch.full((7, 96, 5), -7.0)
    assert emulated.kvstrata_cuda_selftest_block(at(x), at(out), 7) == 0
    assert torch.equal(out[:, :, 0].nan_to_num(9.0), x.flip(1).nan_to_num(9.0))
    torch.testing.assert_close(out[:, 0, 1], x.sum(1), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(out[:, 0, 2].nan_to_num(99.0), x.max(1).values.nan_to_num(99.0))
    assert torch.equal(out[:, 0, 3], (x > 0).sum(1).float())
    assert torch.equal(out[:, 0, 4], x[:, 95])
    for i in range(1, 5):
        assert torch.equal(out[:, :, i].nan_to_num(99.0), out[:, :1, i].nan_to_num(99.0).expand(7, 96))


def test_unwritten_shared_memory_is_poisoned(emulated: ctypes.CDLL) -> None:
    out = torch.zeros(2, dtype=torch.int32)
    for _ in range(2):
        assert emulated.kvstrata_cuda_selftest_unwritten(at(out), 64, 12) == 0
        assert out.tolist() == [-1, -1]


@pytest.mark.parametrize("kind", ["bf16", "f16", "s8", "u8s8", "s8_k16", "u8s8_k16"])
def test_matrix_products(emulated: ctypes.CDLL, kind: str) -> None:
    number = ["bf16", "f16", "s8", "u8s8", "s8_k16", "u8s8_k16"].index(kind)
    g = torch.Generator().manual_seed(number)
    if number < 2:
        dtype = (torch.bfloat16, torch.float16)[number]
        a, b = torch.randn(16, 16, generator=g).to(dtype), torch.randn(8, 16, generator=g).to(dtype)
        d = torch.randn(16, 8, generator=g)
        want = d.double() + a.double() @ b.double().T
    else:
        depth = 16 if kind.endswith("k16") else 32
        low, dtype = (0, torch.uint8) if kind.startswith("u8") else (-128, torch.int8)
        a = torch.randint(low, low + 256, (16, depth), generator=g).to(dtype)
        b = torch.randint(-128, 128, (8, depth), generator=g).to(torch.int8)
        d = torch.randint(-1000, 1000, (16, 8), generator=g, dtype=torch.int32)
        want = d.long() + a.long() @ b.long().T
    assert emulated.kvstrata_cuda_selftest_mma(number, at(a), at(b), at(d)) == 0
    if number < 2:
        torch.testing.assert_close(d.double(), want, rtol=1e-5, atol=1e-5)  # fp32 sums of 17 terms
    else:
        assert torch.equal(d.long(), want)


def test_asynchronous_copies_arrive_at_the_wait(emulated: ctypes.CDLL) -> None:
    x = torch.randint(0, 2**31 - 1, (2, 128), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    out = torch.zeros(3, 128, dtype=torch.int32)
    assert emulated.kvstrata_cuda_selftest_copies(at(x), at(out)) == 0
    assert torch.all(out[0] == -1) and torch.equal(out[1:], x)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 30])
def test_rows_travel_in_batches(emulated: ctypes.CDLL, n: int) -> None:
    rows, out = torch.randint(0, 1000, (n, 32), dtype=torch.int32), torch.full((n + 1,), -7, dtype=torch.int32)
    assert emulated.kvstrata_cuda_selftest_rows(at(rows), n, at(out)) == 0
    assert torch.equal(out[:n], rows[:, 0]) and out[n] == -7


def test_exp_and_tanh(emulated: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-88, 88, 4001), torch.linspace(-1, 1, 999), torch.tensor([0.0, float("nan")])])
    out = torch.zeros(2, len(x))
    assert emulated.kvstrata_cuda_selftest_functions(at(x), at(out), len(x)) == 0
    exact = x.double().exp()
    exact[x < -87] = 0.0
    torch.testing.assert_close(out[0].double(), exact, rtol=2.0**-20, atol=0.0, equal_nan=True)
    torch.testing.assert_close(out[1].double(), x.double().tanh(), rtol=0.0, atol=2.0**-20, equal_nan=True)
    assert out[0][x == 0].eq(1).all()


class PoolView(ctypes.Structure):
    """csrc/ops/pool_view.h, field by field."""

    _fields_ = (
        ("format", ctypes.c_uint8),
        ("n_slabs", ctypes.c_int32),
        ("stride", ctypes.c_int64),
        ("slabs", ctypes.POINTER(ctypes.c_void_p)),
        ("positions", ctypes.POINTER(ctypes.c_void_p)),
    )


FULL = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FORMATS = (*FULL, "int8", "int4", "int2")


def random_pages(name: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three pages uint8 [3, bytes] and what they stand for, f32 [3, 2 (K, V), 16, dim]."""
    g = torch.Generator().manual_seed(dim)
    x = torch.randn(2, 3, 16, dim, generator=g)
    if name in FULL:
        x = x.to(FULL[name])
        return reference.pack(x[0], x[1], name), x.float().transpose(0, 1)
    bits = int(name[3:])
    low = 0 if bits == 2 else -(1 << (bits - 1))
    codes = torch.randint(low, low + (1 << bits), x.shape, generator=g).to(torch.int8)
    group = dim if name == "int8" and dim <= 128 else {"int8": 128, "int4": 64, "int2": 32}[name]
    while dim % group:
        group //= 2
    scales = torch.randn(3, 2, dim // group, 16, generator=g).to(torch.bfloat16)
    level = codes.float() * 2 - 3 if bits == 2 else codes.float()
    want = scales.float().permute(0, 1, 3, 2).repeat_interleave(group, -1) * level.transpose(0, 1)
    return reference.pack(codes[0], codes[1], name, scales), want


@pytest.mark.parametrize("dim", [64, 80, 333, 512])
@pytest.mark.parametrize("name", FORMATS)
def test_pages_are_read_as_they_are_written(emulated: ctypes.CDLL, name: str, dim: int) -> None:
    if name not in FULL and dim % 16:
        return  # no such pages
    pages, want = random_pages(name, dim)
    slabs = (ctypes.c_void_p * 2)(None, pages.data_ptr())
    pools = (PoolView * 8)()
    pools[5] = PoolView(FORMATS.index(name), 2, pages.shape[1], ctypes.cast(slabs, ctypes.POINTER(ctypes.c_void_p)))
    for index in range(3):
        out = torch.full((2, 16, dim), float("nan"))
        assert emulated.kvstrata_cuda_selftest_page(pools, 5 << 28 | 1 << 16 | index, dim, at(out)) == 0
        assert torch.equal(out, want[index])


def test_launches_that_no_device_takes(emulated: ctypes.CDLL) -> None:
    assert emulated.kvstrata_cuda_selftest_launch(1025, 0) == 9
    text = emulated.kvstrata_cuda_last_error().decode()
    assert "unwritten at csrc/cuda/device/launch.cuh" in text and "invalid configuration argument (9)" in text
    assert emulated.kvstrata_cuda_selftest_launch(32, 240 * 1024) == 1


FAULT = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
out = (ctypes.c_int * 64)()
{call}
"""
FAULTS = {
    "divergent": (
        0,
        ("no thread can go on", "threads 0..39 wait at __syncthreads", "threads 40..63 wait at __syncwarp"),
    ),
    "returned": (1, ("__shfl_xor_sync: its mask names thread 3, which has returned",)),
    "outside": (2, ("__shfl_sync: the thread is not in its mask", "thread (16, 0, 0)")),
    "two places": (3, ("__syncthreads: thread 0 is at", "thread 32 at __syncthreads")),
    "half mma": (4, ("threads 0..15 wait at mma_s8", "threads 16..31 have returned")),
}


def run_faulty(library: Path, call: str) -> subprocess.CompletedProcess[str]:
    code = FAULT.format(call=call)
    return subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_kernel_ends_the_process(emulated_library: Path, name: str) -> None:
    number, texts = FAULTS[name]
    done = run_faulty(emulated_library, f"lib.kvstrata_cuda_selftest_fault({number}, out)")
    assert done.returncode < 0, "it ran"
    assert "launch of faulty" in done.stderr and "block (0, 0, 0)" in done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr


def test_a_write_past_dynamic_shared_memory_ends_the_process(emulated_library: Path) -> None:
    done = run_faulty(emulated_library, "lib.kvstrata_cuda_selftest_unwritten(out, 64, 64)")
    assert done.returncode < 0 and "wrote byte 64 of 64 bytes of dynamic shared memory" in done.stderr


def test_a_shuffled_order_shows_a_missing_barrier(emulated_library: Path) -> None:
    lib = ctypes.CDLL(str(emulated_library), mode=ctypes.RTLD_LOCAL)
    seen = set()
    for seed in SEEDS:
        out = torch.zeros(64, dtype=torch.int32)
        lib.kvstrata_cuda_emulate_seed(ctypes.c_uint64(seed))
        assert lib.kvstrata_cuda_selftest_fault(5, at(out)) == 0
        seen.add(tuple(out.tolist()))
    lib.kvstrata_cuda_emulate_seed(ctypes.c_uint64(0))
    assert len(seen) == len(SEEDS)
