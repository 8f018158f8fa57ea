"""HeartMuLa: a Llama backbone over frames, and a small Llama over the codebooks within a frame."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.tokenizer_worker.model.kernels.noise import exponential_noise, mix, noise_counters
from services.tokenizer_worker.model.linear import Matrix, empty
from services.tokenizer_worker.model.llama import KVCache, Llama, spread
from services.tokenizer_worker.model.sampling import Sampler
from shared.model.checkpoint import LMConfig

Choose = Callable[[int, Tensor], Tensor]
"""(codebook, logits ``[rows, Va]``) → the chosen code of each song, int64 ``[songs]``, on the same device."""


@dataclass(kw_only=True, eq=False)
class BatchTensors:
    """The tensors of songs that are made together."""

    caches: Sequence[KVCache]  # of the backbone, one a song
    depth_cache: KVCache  # of all their rows: codebooks 0 … 7, overwritten every frame
    sampler: Sampler
    embedded: Tensor  # [rows, D], what is fed next


class HeartMuLa(nn.Module):
    """The language model's weights and its computations: advance by positions, and choose the codes of a frame.

    Va is the audio vocabulary, D the backbone's width, E the depth decoder's. A song has a conditional row and,
    with guidance, an unconditional one; of several songs the guided ones come first, and their rows lie as `spread`
    lays them. The text embeddings stay in host memory: only prompts need them, and of them a
    few rows, while they are a tenth of the weights.

    The stacks named in `int8` ("backbone", "decoder") are weight-only int8, the projection with the decoder; heads and
    embeddings never are.
    """

    noise_counters: Tensor  # int64 [codebooks, Va]

    def __init__(self, config: LMConfig, dtype: torch.dtype, int8: Collection[str] = ()) -> None:
        super().__init__()
        d, e = config.backbone.embed_dim, config.decoder.embed_dim
        va, books = config.audio_vocab_size, config.num_codebooks
        self.config, self.dtype = config, dtype
        small = "decoder" in int8
        self.backbone = Llama(config.backbone, config.backbone.max_seq_len, dtype, int8="backbone" in int8)
        self.decoder = Llama(config.decoder, books, dtype, int8=small)
        self.text_embeddings = empty(config.text_vocab_size, d, dtype=dtype)
        self.audio_embeddings = empty(books * va, d, dtype=dtype)  # row = codebook · Va + code
        self.unconditional = empty(1, d, dtype=dtype)
        self.muq_bias = empty(d, dtype=dtype)  # all that is left of muq_linear without reference audio
        self.projection = Matrix(e, d, dtype, int8=small)
        self.head = Matrix(va, d, dtype)  # of codebook 0
        # Of codebooks 1 …, each [Va, E]; the checkpoint has them transposed.
        self.depth_heads = nn.ModuleList(Matrix(va, e, dtype) for _ in range(books - 1))
        self.register_buffer("noise_counters", noise_counters(books, va), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.audio_embeddings.device

    def backbone_cache(self, rows: int, positions: int) -> KVCache:
        return KVCache.empty(self.config.backbone, rows, positions, self.dtype, self.device)

    def depth_cache(self, rows: int) -> KVCache:
        """Allocate the cache of the depth decoder for one frame; every frame starts over in it."""
        return KVCache.empty(self.config.decoder, rows, self.config.num_codebooks, self.dtype, self.device)

    def embed_prompt(self, tags: Sequence[int], lyrics: Sequence[int], rows: int) -> Tensor:
        """Embed token ids as ``[rows, P, D]``: tags, the MuQ slot, lyrics; the second row is all unconditional."""
        ids = torch.tensor([*tags, 0, *lyrics])
        conditional = F.embedding(ids, self.text_embeddings).to(self.device)  # [P, D]
        conditional[len(tags)] = self.muq_bias  # muq_linear of no reference audio, that is of zeros
        if rows == 1:
            return conditional[None]
        return torch.stack((conditional, self.unconditional.expand_as(conditional)))

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Embed frames, int64 ``[…, codebooks]``, as sums of an embedding a codebook, ``[…, D]``, equal in all rows."""
        books, va = self.config.num_codebooks, self.config.audio_vocab_size
        offsets = torch.arange(0, books * va, va, device=codes.device)
        return F.embedding(codes + offsets, self.audio_embeddings).sum(-2)

    def advance(self, embedded: Tensor, cache: KVCache, start: int) -> Tensor:
        """Advance by ``[rows, S, D]`` at positions start …; returns the hidden state after them, ``[rows, D]``."""
        return self.backbone.norm(self.backbone(embedded, cache, start)[:, -1])

    def step(self, embedded: Tensor, caches: Sequence[KVCache], positions: Sequence[int]) -> Tensor:
        """Feed each song ``[rows, D]`` at its position, in its cache; returns hidden states, ``[rows, D]``."""
        return self.backbone.norm(self.backbone.step(embedded[:, None], caches, positions)[:, 0])

    def frame(self, hidden: Tensor, cache: KVCache, choose: Choose) -> Tensor:
        """Choose the codes of a frame of each song, codebook by codebook, from ``hidden [rows, D]``.

        Returns int64 ``[songs, codebooks]``. `choose` is called once a codebook with its logits before guidance. The
        decoder sees the hidden state at position 0 and the codes before the current one at 1 …; the last code is
        never fed to it.
        """
        rows, va = hidden.shape[0], self.config.audio_vocab_size
        codes = [choose(0, self.head(hidden[:, None])[:, 0].contiguous())]
        first = spread(F.embedding(codes[0], self.audio_embeddings), rows)
        x = self.projection(torch.stack((hidden, first), dim=1)).contiguous()  # [rows, 2, E]
        start = 0
        for book, head in enumerate(self.depth_heads, start=1):
            out = self.decoder.norm(self.decoder(x, cache, start)[:, -1:])  # [rows, 1, E]
            codes.append(choose(book, head(out)[:, 0].contiguous()))
            start = book + 1
            if start < self.config.num_codebooks:
                code = F.embedding(codes[-1] + book * va, self.audio_embeddings)  # [songs, D]
                x = self.projection(spread(code, rows)[:, None]).contiguous()
        return torch.stack(codes, dim=1)

    def next_frame(
        self, batch: BatchTensors, positions: Sequence[int], counters: Sequence[int], barred: Tensor | None = None
    ) -> Tensor:
        """Make a frame of every song, int64 ``[songs, codebooks]``: at its position, with its `sampling.counter`.

        Codes that are `barred`, bool ``[songs, Va]``, are not drawn in any codebook.

        Before the last line nothing of a song has changed but its cache's entries at that position, so a frame that
        failed on the way can be made again.
        """
        hidden = self.step(batch.embedded, batch.caches, positions)
        seeds = mix(torch.tensor(counters, device=self.device))

        def draw(book: int, logits: Tensor) -> Tensor:
            return batch.sampler.draw(logits, exponential_noise(seeds, self.noise_counters[book]), barred)

        codes = self.frame(hidden, batch.depth_cache, draw)
        batch.embedded.copy_(spread(self.embed_frames(codes), len(hidden)))
        return codes
