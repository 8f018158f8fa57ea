"""Attention and RoPE with the KV write as Triton kernels: results in the interpreter, and what compiles for cards."""

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", minversion="3.7")  # the interpreter of older ones leaves its patches behind

from services.tokenizer_worker.model import kernels
from services.tokenizer_worker.model.kernels.row_table import Field
from services.tokenizer_worker.model.kernels.triton_kernels import attention, rope_kv
from services.tokenizer_worker.model.llama import Block, KVCache, Llama, rms_norm, rope_frequencies
from shared.model.checkpoint import Flavor
from tests.unit.triton_compile import SHARED_MEMORY, Compiled, compile_launches
from tests.unit.triton_interpreter import interpreted

LAYERS, LAYER = 3, 1
LENGTHS, CAPACITIES = (0, 1, 17, 300, 513, 64), (8, 1, 40, 300, 700, 70)
Row = tuple[Tensor, Tensor, int]
CPU = torch.device("cpu")


def random_rows(kv_heads: int, width: int, dtype: torch.dtype) -> list[Row]:
    """Rows of several lengths and capacities; all that is not of LAYER and below the row's length is not a number."""
    torch.manual_seed(1)
    rows = []
    for length, capacity in zip(LENGTHS, CAPACITIES, strict=True):
        cache = torch.full((2, LAYERS, kv_heads, capacity, width), torch.nan, dtype=dtype)
        cache[:, LAYER, :, :length] = torch.randn(2, kv_heads, length, width).to(dtype)
        rows.append((cache[0], cache[1], length))
    return rows


def row_table(rows: Sequence[Row]) -> Tensor:
    table = torch.empty(len(Field), len(rows), dtype=torch.int64)
    for index, (keys, values, length) in enumerate(rows):
        table[Field.KEYS, index], table[Field.VALUES, index] = keys.data_ptr(), values.data_ptr()
        table[Field.LAYER, index], table[Field.CAPACITY, index] = keys.stride(0), keys.shape[2]
        table[Field.LENGTH, index] = length
    return table


def angles(positions: int, width: int) -> Tensor:
    angle = torch.outer(torch.arange(positions), rope_frequencies(width))
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "group", "kv_heads", "splits"),
    [(16, 1, 2, 1), (32, 2, 1, 8), (128, 3, 2, 2), (128, 3, 1, 1), (384, 2, 1, 2), (8, 3, 1, 1)],
)
def test_attention_over_caches_of_several_lengths(
    width: int, group: int, kv_heads: int, splits: int, dtype: torch.dtype
) -> None:
    rows = random_rows(kv_heads, width, dtype)
    q = torch.randn(len(rows), group * kv_heads, width).to(dtype)
    with interpreted():
        found = attention.attend(q, row_table(rows), LAYER, kv_heads, splits)
    floats = [(keys.float(), values.float(), length) for keys, values, length in rows]
    exact = kernels.attend(q.float(), row_table(floats), LAYER, kv_heads, splits)
    assert found.dtype == dtype
    assert not found[0].any()  # an empty row
    if dtype == torch.float32:
        assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    else:  # weights and the result are rounded
        torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(8, 3, 1), (128, 6, 2), (384, 2, 1)])
def test_a_position_is_rotated_and_written_into_the_caches(
    width: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    rows, expected = random_rows(kv_heads, width, dtype), random_rows(kv_heads, width, dtype)
    qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * width).to(dtype)
    rope = angles(max(LENGTHS), width)
    with interpreted():
        queries = rope_kv.rope_kv(qkv, rope, row_table(rows), LAYER, heads, kv_heads)
    assert queries.equal(kernels.rope_kv(qkv, rope, row_table(expected), LAYER, heads, kv_heads))
    assert not queries[0].any()  # an empty row
    for got, want in zip(rows, expected, strict=True):
        for cache, same in zip(got[:2], want[:2], strict=True):
            torch.testing.assert_close(cache, same, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_step_of_all_songs_with_the_kernels_is_that_of_each_alone(splits: int) -> None:
    flavor = Flavor(num_layers=2, num_heads=6, num_kv_heads=2, embed_dim=96, intermediate_dim=96, max_seq_len=128)
    torch.manual_seed(2)
    model = Llama(flavor, 128, torch.float32).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.2)
    # Two guided songs and one without guidance: two rows of the former, and one of the latter.
    songs = [(2, 40, 37), (2, 128, 99), (1, 8, 0)]  # rows, capacity, position
    caches = [KVCache.empty(flavor, rows, capacity, torch.float32, CPU) for rows, capacity, _ in songs]
    for cache, (_, _, position) in zip(caches, songs, strict=True):
        cache.keys[..., :position, :].normal_()
        cache.values[..., :position, :].normal_()
    copies = [KVCache(cache.keys.clone(), cache.values.clone()) for cache in caches]
    x = torch.randn(5, 1, 96)

    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]  # song and row of the song, as they lie in a batch
    expected = torch.empty(5, 96)
    for song, (cache, (_, _, position)) in enumerate(zip(caches, songs, strict=True)):
        expected[song::3] = model(x[song::3], cache, position)[:, 0]
    table = row_table(
        [(copies[song].keys[:, row], copies[song].values[:, row], songs[song][2] + 1) for song, row in places]
    )
    with interpreted():
        found = step(model, x[:, 0], table, splits)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    for cache, copy in zip(caches, copies, strict=True):
        torch.testing.assert_close(copy.keys, cache.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.values, cache.values, rtol=1e-5, atol=1e-5)


def step(model: Llama, x: Tensor, table: Tensor, splits: int) -> Tensor:
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        heads, kv_heads = block.heads, block.kv_heads
        qkv = block.qkv(rms_norm(x, block.attention_norm))
        q = rope_kv.rope_kv(qkv, angles(128, block.head_dim), table, layer, heads, kv_heads)
        x = x + block.output(attention.attend(q, table, layer, kv_heads, splits))
        gate, up = block.gate_up(rms_norm(x, block.mlp_norm)).chunk(2, dim=-1)
        x = x + block.down(F.silu(gate) * up)
    return x


def test_what_the_kernels_could_not_address_is_refused() -> None:
    table = torch.zeros(5, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple of 8: 12"):
        attention.attend(torch.zeros(4, 1, 12), table, 0, 1, 1)
    for other in (table[:, :3], table[:, :2], table[:, ::2]):
        with pytest.raises(ValueError, match="2 rows need a contiguous table"):
            attention.attend(torch.zeros(2, 1, 16), other, 0, 1, 1)
    with pytest.raises(ValueError, match="2 rows need a contiguous table"):
        rope_kv.rope_kv(torch.zeros(2, 48), torch.zeros(1, 8, 2), table, 0, 1, 1)


@pytest.mark.parametrize(
    ("songs", "positions", "splits"),
    [(1, 8192, 32), (2, 8192, 16), (8, 8192, 4), (16, 8192, 2), (32, 8192, 1), (64, 8192, 1), (1, 8, 1), (1, 200, 4)],
)
def test_the_positions_of_few_songs_are_divided_among_more_programs(songs: int, positions: int, splits: int) -> None:
    assert kernels.splits_for(2 * songs, kv_heads=8, positions=positions) == splits


def compiled(width: int, group: int, kv_heads: int, splits: int, dtype: torch.dtype, capability: int) -> list[Compiled]:
    """Kernels of both operators for one guided song. Tensors have no contents here: nothing may depend on them."""
    heads = group * kv_heads
    q = torch.empty(2, heads, width, dtype=dtype, device="meta")
    qkv = torch.empty(2, (heads + 2 * kv_heads) * width, dtype=dtype, device="meta")
    rope = torch.empty(64, width // 2, 2, device="meta")
    table = torch.empty(5, 2, dtype=torch.int64, device="meta")

    def launch() -> None:
        rope_kv.rope_kv(qkv, rope, table, LAYER, heads, kv_heads)
        attention.attend(q, table, LAYER, kv_heads, splits)

    return compile_launches(launch, capability)


BACKBONE, DEPTH_DECODER = (128, 3, 8, 32), (384, 2, 4, 1)
stacks = pytest.mark.parametrize("stack", [BACKBONE, DEPTH_DECODER], ids=["backbone", "depth decoder"])


def fits(kernel: Compiled, capability: int) -> bool:
    return kernel.shared <= SHARED_MEMORY[capability] and kernel.spilled == 0


@stacks
@pytest.mark.parametrize("capability", [86, 90])
def test_kernels_compile_for_cards_and_fit_them(stack: tuple[int, int, int, int], capability: int) -> None:
    found = compiled(*stack, torch.bfloat16, capability)
    splits = stack[-1]
    assert len(found) == sum(
        kernels.launches(f"heartmula::{operator}", *[None] * 4, splits) for operator in ("rope_kv", "attend")
    )
    assert [kernel for kernel in found if not fits(kernel, capability)] == []


@pytest.mark.slow
@stacks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_for_every_card(
    stack: tuple[int, int, int, int], dtype: torch.dtype, capability: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for kernel in compiled(*stack, dtype, capability):
        assert fits(kernel, capability), kernel
        with capsys.disabled():
            print(f"\nsm_{capability} {dtype} {kernel.name}: {kernel.shared} B shared, {kernel.registers} registers")


def test_caches_are_read_16_bytes_at_a_time_and_ahead() -> None:
    """Loads through addresses out of a table are of single elements where nothing tells how they are aligned."""
    rotate, attend, _ = compiled(*BACKBONE, torch.bfloat16, 86)
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[.*\], (\S+),", attend.ptx)) == {"0x10"}
    assert "ld.global.b16" not in attend.ptx + rotate.ptx
