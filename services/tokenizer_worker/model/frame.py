"""A frame of many songs on CUDA: few calls, no shape that depends on a song, nothing that waits for the host.

The songs stand in `Places`. Who they are, how long they have become and how they are sampled is data on the device, so
a frame that was recorded once serves whatever songs stand there later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from services.tokenizer_worker.model import kernels
from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.kernels.noise import COUNTER_STEP
from services.tokenizer_worker.model.kernels.row_table import Field
from services.tokenizer_worker.model.llama import NORM_EPS, Block, KVCache, Llama
from shared.model.checkpoint import LMConfig


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A song, as it takes a place."""

    cache: KVCache  # of the backbone
    embedded: Tensor  # [rows, D], what is fed next
    position: int  # at which it is fed
    least: int  # positions, prompt included, that it has before it can end
    counter: int  # of the next frame's noise
    temperature: float  # 0 is greedy
    topk: int
    cfg_scale: float  # 1: no guidance


class Places:
    """The tensors of n places for songs. `make_frame` advances them in place.

    Place i has rows i, the conditional one, and n + i, the unconditional one. The rows of an empty place, and the
    second row of a song without guidance, have length 0: they attend to nothing, and what else is computed for them is
    not looked at. It costs no time where reading the weights takes longer than multiplying with them.
    """

    def __init__(self, model: HeartMuLa, count: int) -> None:
        device, books = model.device, model.config.num_codebooks
        self.count = count
        self.embedded = torch.zeros(2 * count, model.config.backbone.embed_dim, dtype=model.dtype, device=device)
        self.codes = torch.zeros(count, books, dtype=torch.int64, device=device)  # of the frame that was made last
        # What `enter` sets is one block of integers and one of fractions, each a single copy to the device.
        self._integers = torch.zeros(2 * len(Field) + 3, count, dtype=torch.int64, device=device)
        self._fractions = torch.ones(2, count, dtype=torch.float32, device=device)
        self.rows = self._integers[:-3].view(len(Field), 2 * count)  # a row table
        self.counters, self.topk, self.least = self._integers[-3:]
        self.temperature, self.cfg_scale = self._fractions
        self._depth = model.depth_cache(2 * count)  # every frame starts over in it
        # A row table for each pass of the depth decoder: the first feeds two positions, the others one.
        passes = [(0, 1), *((position,) for position in range(2, books))]
        tables = [_depth_rows(self._depth, positions).flatten() for positions in passes]
        parts = torch.split(torch.cat(tables).to(device), [len(table) for table in tables])
        self.depth_rows = [part.view(len(Field), -1) for part in parts]

    @staticmethod
    def bytes_per_place(model: HeartMuLa) -> int:
        """Bytes on the device that each place takes."""
        config = model.config
        depth = KVCache.size(config.decoder, 2, config.num_codebooks, model.dtype)
        tables = 8 * len(Field) * 2 * (config.num_codebooks + 1)  # of the backbone, and of eight positions
        return depth + tables + 2 * config.backbone.embed_dim * model.dtype.itemsize + 8 * config.num_codebooks + 32

    def enter(self, songs: Sequence[Entrant]) -> None:
        """Give these songs the first places, and leave the others empty. Nothing of their caches is copied."""
        count, empty = self.count, [None] * (self.count - len(songs))
        conditional = [(song.cache, 0, song.position + 1) for song in songs]
        guided = [(song.cache, 1, song.position + 1) if song.cfg_scale != 1 else None for song in songs]
        table = kernels.row_table([*conditional, *empty, *guided, *empty])
        numbers = torch.ones(3, count, dtype=torch.int64)  # counters, top-k, least lengths
        fractions = torch.ones(2, count)
        for place, song in enumerate(songs):
            numbers[:, place] = torch.tensor((song.counter, song.topk, song.least))
            fractions[0, place], fractions[1, place] = song.temperature, song.cfg_scale
        # A song without guidance has one row, which serves for both.
        embedded = torch.stack([song.embedded[row] for row in (0, -1) for song in songs])
        self._integers.copy_(torch.cat((table.view(-1, count), numbers)))
        self._fractions.copy_(fractions)
        self.embedded.view(2, count, -1)[:, : len(songs)].copy_(embedded.view(2, len(songs), -1))


def _depth_rows(cache: KVCache, positions: Sequence[int]) -> Tensor:
    """Row table of a pass that feeds all rows of the depth decoder at each of the positions."""
    return kernels.row_table([(cache, row, at + 1) for at in positions for row in range(cache.keys.shape[1])])


def unsuitable(config: LMConfig) -> str | None:
    """Why the kernels cannot serve a model of these dimensions; None where they can, as the official ones."""
    heads = (config.backbone.head_dim, config.decoder.head_dim)
    if any(width % kernels.HEAD_MULTIPLE for width in heads):
        return f"the checkpoint's heads of {heads[0]} and {heads[1]} are not multiples of {kernels.HEAD_MULTIPLE}"
    return None


def make_frame(model: HeartMuLa, places: Places, end: int) -> None:
    """Make a frame of every song: its codes into ``places.codes``, and everything ready for the next frame.

    A song that is shorter than its least length, the present position included, draws no code from `end` on.

    Before the last lines nothing of a song has changed but its cache's entries at the present position, so a frame that
    failed on the way can be made again.
    """
    count, books, va = places.count, model.config.num_codebooks, model.config.audio_vocab_size
    embeddings = model.audio_embeddings.view(books, va, -1)
    noise = kernels.noise(places.counters, books, va)  # [codebooks, n, Va]
    lengths = places.rows[Field.LENGTH, :count]
    codes: list[Tensor] = []

    def draw(hidden: Tensor, head: torch.nn.Module) -> Tensor:
        """Draw the next code of each song, and look up its embedding, ``[n, D]``."""
        book, logits = len(codes), _product(head, hidden)
        numbers = (places.temperature, places.topk, places.cfg_scale, lengths, places.least)
        codes.append(kernels.sample(logits, noise[book], *numbers, end))
        return F.embedding(codes[-1], embeddings[book])

    hidden = advance(model.backbone, places.embedded, places.rows)  # [2n, D]
    code = draw(hidden, model.head)
    x = _product(model.projection, torch.cat((hidden, code, code)))  # of positions 0 and 1, [4n, E]
    for head, rows in zip(model.depth_heads, places.depth_rows, strict=True):
        code = draw(advance(model.decoder, x, rows)[-2 * count :], head)
        if len(codes) < books:
            x = _product(model.projection, code).repeat(2, 1)
    frame = torch.stack(codes, dim=1)
    embedded = model.embed_frames(frame)
    going = places.rows[Field.LENGTH] > 0
    places.codes.copy_(frame)
    places.embedded.view(2, count, -1).copy_(embedded)
    places.counters.add_(COUNTER_STEP)
    places.rows[Field.LENGTH].add_(going)


def advance(stack: Llama, x: Tensor, rows: Tensor) -> Tensor:
    """Run one position of each row, ``[rows, D]``, through a stack and its final norm. `rows` is their table."""
    blocks = [block for block in stack.blocks if isinstance(block, Block)]
    first = blocks[0]
    scales = [*(block.attention_norm for block in blocks[1:]), stack.scale]  # what norms the output of each block
    splits = kernels.splits_for(len(x), first.kv_heads, len(stack.rope))
    rope = torch.view_as_real(stack.rope)[:, 0]
    normed: Tensor = kernels.norm(x, first.attention_norm, NORM_EPS)
    for layer, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
        q = kernels.rope_kv(_product(block.qkv, normed), rope, rows, layer, block.heads, block.kv_heads)
        attended = kernels.attend(q, rows, layer, block.kv_heads, splits)
        x, normed = kernels.add_norm(x, _product(block.output, attended), block.mlp_norm, NORM_EPS)
        out = _product(block.down, kernels.silu_mul(_product(block.gate_up, normed)))
        x, normed = kernels.add_norm(x, out, scale, NORM_EPS)
    return normed


def _product(matrix: torch.nn.Module, x: Tensor) -> Tensor:
    """Multiply ``[rows, K]`` with a `Matrix`: ``[rows, N]``, contiguous."""
    product: Tensor = matrix(x[:, None])[:, 0].contiguous()
    return product
