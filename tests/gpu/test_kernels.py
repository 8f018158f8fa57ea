"""Every kernel on the device beside its operator's plain path on the CPU, in fp32, at the official sizes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from services.tokenizer_worker.model import KVCache, kernels
from services.tokenizer_worker.model.kernels.attention import splits_for
from services.tokenizer_worker.model.kernels.noise import counter
from services.tokenizer_worker.model.llama import rope_table

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# ‖got − wanted‖ / ‖wanted‖ where inputs are the same: sums in another order, and one rounding of the result. TF32
# factors would be some 3e-4 apart.
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Query heads, KV heads and width of a head: of the backbone, and of the depth decoder.
HEADS = pytest.mark.parametrize("heads", [(24, 8, 128), (8, 4, 384)], ids=["backbone", "decoder"])
SHORT = (0, 1, 17, 300, 513, 0)
LONG = (2048, 8192, 8193)  # for the backbone on a card


def apart(got: Tensor, wanted: Tensor) -> float:
    assert got.isfinite().all()
    difference, size = (got.double().cpu() - wanted.double()).norm(), wanted.double().norm()
    return float(difference / size) if size else float(difference)


def random(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers that are the same in `dtype` and in fp32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def moved(rows: list[tuple[KVCache, int, int]], device: str, dtype: torch.dtype) -> list[tuple[KVCache, int, int]]:
    """Copy rows together with their caches."""
    return [
        (KVCache(c.keys.to(device, dtype, copy=True), c.values.to(device, dtype, copy=True)), row, length)
        for c, row, length in rows
    ]


def rows_of(kv_heads: int, width: int, dtype: torch.dtype, device: str) -> list[tuple[KVCache, int, int]]:
    """A row for each of the lengths, each in a cache of its own that is longer."""
    found = []
    for seed, length in enumerate(SHORT + LONG if device != "cpu" and width == 128 else SHORT):
        shape = (2, 1, kv_heads, length + 3 + 7 * seed, width)  # [layers, rows, KV heads, positions, h]
        found.append((KVCache(random(shape, dtype, seed), random(shape, dtype, 100 + seed)), 0, length))
    return found


@HEADS
@DTYPES
def test_attention(device: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    queries, kv_heads, width = heads
    rows = rows_of(kv_heads, width, dtype, device)
    q = random((len(rows), queries, width), dtype, 7)
    exact = moved(rows, "cpu", torch.float32)
    here = moved(rows, device, dtype)
    table = kernels.row_table(here).to(device)
    for layer in (0, 1):
        wanted = kernels.attend(q.float(), kernels.row_table(exact), layer, kv_heads, 1)
        for splits in {1, 2, 32, splits_for(len(rows), kv_heads, 8192)}:
            got = kernels.attend(q.to(device), table, layer, kv_heads, splits)
            assert apart(got, wanted) < ALLOWED[dtype], (layer, splits)
            assert not got[[length == 0 for *_, length in rows]].any()


@pytest.mark.gpu
def test_attention_reaches_beyond_two_billion_entries() -> None:
    """The second layer begins 2^31 entries after the first: no product of strides may overflow 32 bits."""
    kv_heads, width, length, away = 8, 128, 300, 2**31 + 4096
    free, _ = torch.cuda.mem_get_info()
    if free < 12e9:
        pytest.skip(f"needs 12 GB on the device, {free / 1e9:.0f} are free")
    memory = torch.empty(away + 4 * kv_heads * length * width, dtype=torch.bfloat16, device="cuda:0")
    shape = (2, 1, kv_heads, length, width)
    strides = (away, kv_heads * length * width, length * width, width, 1)
    keys = memory.as_strided(shape, strides)
    values = memory.as_strided(shape, strides, storage_offset=2 * kv_heads * length * width)
    small = KVCache(random(shape, torch.bfloat16, 1), random(shape, torch.bfloat16, 2))
    keys.copy_(small.keys)
    values.copy_(small.values)
    q = random((1, 24, width), torch.bfloat16, 3)
    wanted = kernels.attend(
        q.float(), kernels.row_table([(KVCache(small.keys.float(), small.values.float()), 0, length)]), 1, kv_heads, 1
    )
    table = kernels.row_table([(KVCache(keys, values), 0, length)]).to("cuda:0")
    assert apart(kernels.attend(q.to("cuda:0"), table, 1, kv_heads, 4), wanted) < ALLOWED[torch.bfloat16]


@HEADS
@DTYPES
def test_rotation_and_entry_into_the_cache(device: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    queries, kv_heads, width = heads
    rows = rows_of(kv_heads, width, dtype, device)
    qkv = random((len(rows), (queries + 2 * kv_heads) * width), dtype, 7)
    rope = torch.view_as_real(rope_table(width, 8200))[:, 0].contiguous()
    exact, here = moved(rows, "cpu", torch.float32), moved(rows, device, dtype)
    wanted = kernels.rope_kv(qkv.float(), rope, kernels.row_table(exact), 1, queries, kv_heads)
    got = kernels.rope_kv(qkv.to(device), rope.to(device), kernels.row_table(here).to(device), 1, queries, kv_heads)
    assert apart(got, wanted) < ALLOWED[dtype]
    for (ours, _, length), (theirs, _, _), (before, _, _) in zip(here, exact, rows, strict=True):
        for mine, right, old in ((ours.keys, theirs.keys, before.keys), (ours.values, theirs.values, before.values)):
            assert apart(mine[1], right[1]) < ALLOWED[dtype]
            others = torch.ones(old.shape[3], dtype=torch.bool)
            others[max(0, length - 1) : length] = False
            assert torch.equal(mine.cpu()[:, :, :, others], old[:, :, :, others]), "another position was written"
            assert torch.equal(mine.cpu()[0], old[0]), "another layer was written"


@DTYPES
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_norms_and_gates(device: str, dtype: torch.dtype, rows: int) -> None:
    x, delta = random((rows, 3072), dtype, 1), random((rows, 3072), dtype, 2)
    scale, gate_up = random((3072,), dtype, 3), random((rows, 2 * 8192), dtype, 4)
    here = [tensor.to(device) for tensor in (x, delta, scale, gate_up)]
    normed = kernels.norm(here[0], here[2], 1e-5)
    assert apart(normed, kernels.norm(x.float(), scale.float(), 1e-5)) < ALLOWED[dtype]
    total, normed = kernels.add_norm(*here[:3], 1e-5)
    wanted = kernels.add_norm(x.float(), delta.float(), scale.float(), 1e-5)
    assert apart(total, wanted[0]) < ALLOWED[dtype]
    assert apart(normed, wanted[1]) < ALLOWED[dtype]
    assert apart(kernels.silu_mul(here[3]), kernels.silu_mul(gate_up.float())) < ALLOWED[dtype]


@DTYPES
@pytest.mark.parametrize("songs", [1, 5, 32])
def test_draws(device: str, dtype: torch.dtype, songs: int) -> None:
    """The chosen code is the plain path's, or one whose chance was the same up to rounding."""
    vocabulary = 8197
    logits = random((2 * songs, vocabulary), dtype, 5) * 3
    noise = noise_of(songs, vocabulary)
    temperature = torch.tensor([(1.0, 0.7, 0.0, 1.3)[n % 4] for n in range(songs)])
    topk = torch.tensor([(50, 1, 50, vocabulary, 9000)[n % 5] for n in range(songs)])
    cfg = torch.tensor([(1.5, 1.0, 3.0)[n % 3] for n in range(songs)])
    length, least, end = torch.full((songs,), 20), torch.tensor([(0, 20, 21)[n % 3] for n in range(songs)]), 8000
    tensors = (logits, noise, temperature, topk, cfg, length, least)
    wanted = kernels.sample(*tensors, end)
    got = kernels.sample(*(tensor.to(device) for tensor in tensors), end).cpu()
    assert (got[least > length] < end).all()
    if torch.equal(got, wanted):
        return
    assert dtype != torch.float32 or (got != wanted).sum() <= 1
    for song in torch.nonzero(got != wanted).flatten().tolist():
        c, u = logits[song].double(), logits[songs + song].double()
        guided = c if cfg[song] == 1 else u + (c - u) * cfg[song]
        chances = (guided / (temperature[song] or 1)).softmax(0)
        if least[song] > length[song]:
            chances[end:] = 0
        score = chances / (1 if temperature[song] == 0 else noise[song].double())
        assert score[got[song]] > score[wanted[song]] * (1 - 20 * ALLOWED[dtype])


def noise_of(songs: int, vocabulary: int) -> Tensor:
    """Noise of one codebook in one frame of each song, fp32 ``[songs, V]``."""
    generator = torch.Generator().manual_seed(9)
    return torch.empty(songs, vocabulary).exponential_(generator=generator)


def test_noise_is_the_same_on_every_device(device: str) -> None:
    counters = torch.tensor([counter(seed, frame) for seed, frame in ((0, 0), (1, 7), (2**40, 5000), (2**63 - 1, 1))])
    wanted = kernels.noise(counters, 8, 8197)
    got = kernels.noise(counters.to(device), 8, 8197).cpu()
    assert got.shape == (8, len(counters), 8197)
    assert (got > 0).all()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@DTYPES
@pytest.mark.parametrize("shape", [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)], ids=str)
def test_int8_products(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    outputs, inputs = shape if device != "cpu" else (shape[0] // 16, shape[1] // 16)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = random((outputs,), dtype, 6).abs() / 100
    x = random((64, inputs), dtype, 7)
    wanted = kernels.int8_product(x.float(), weight, scale.float())
    here = [tensor.to(device) for tensor in (x, weight, scale)]
    for rows in (1, 2, 16, 31, 32, 64):
        assert apart(kernels.int8_product(here[0][:rows], *here[1:]), wanted[:rows]) < ALLOWED[dtype], rows
