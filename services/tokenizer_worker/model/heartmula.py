"""HeartMuLa: a Llama backbone over frames, and a small Llama over the codebooks within a frame."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.tokenizer_worker.model.llama import KVCache, Llama, empty, linear, spread
from shared.checkpoint import LMConfig

Choose = Callable[[int, Tensor], Tensor]
"""(codebook, logits ``[rows, Va]``) → the chosen code of each song, int64 ``[songs]``, on the same device."""


class HeartMuLa(nn.Module):
    """The language model's weights and its computations: advance by positions, and choose the codes of a frame.

    Va is the audio vocabulary, D the backbone's width, E the depth decoder's. A song has a conditional row and,
    with guidance, an unconditional one; of several songs the guided ones come first, and their rows lie as `spread`
    lays them. The text embeddings stay in host memory: only prompts need them, and of them a
    few rows, while they are a tenth of the weights.
    """

    def __init__(self, config: LMConfig, dtype: torch.dtype) -> None:
        super().__init__()
        d, e = config.backbone.embed_dim, config.decoder.embed_dim
        va, books = config.audio_vocab_size, config.num_codebooks
        self.config, self.dtype = config, dtype
        self.backbone = Llama(config.backbone, config.backbone.max_seq_len, dtype)
        self.decoder = Llama(config.decoder, books, dtype)
        self.text_embeddings = empty(config.text_vocab_size, d, dtype=dtype)
        self.audio_embeddings = empty(books * va, d, dtype=dtype)  # row = codebook · Va + code
        self.unconditional = empty(1, d, dtype=dtype)
        self.muq_bias = empty(d, dtype=dtype)  # all that is left of muq_linear without reference audio
        self.projection = empty(e, d, dtype=dtype)
        self.head = empty(va, d, dtype=dtype)  # of codebook 0
        self.depth_heads = empty(books - 1, va, e, dtype=dtype)  # of codebooks 1 …; the checkpoint has them transposed

    @property
    def device(self) -> torch.device:
        return self.head.device

    def backbone_cache(self, rows: int, positions: int) -> KVCache:
        return KVCache.empty(self.config.backbone, rows, positions, self.dtype, self.device)

    def depth_cache(self, rows: int) -> KVCache:
        """Room for one frame; every frame starts over in it."""
        return KVCache.empty(self.config.decoder, rows, self.config.num_codebooks, self.dtype, self.device)

    def embed_prompt(self, tags: Sequence[int], lyrics: Sequence[int], rows: int) -> Tensor:
        """Token ids → ``[rows, P, D]``: tags, the MuQ slot, lyrics; the second row is unconditional throughout."""
        ids = torch.tensor([*tags, 0, *lyrics])
        conditional = F.embedding(ids, self.text_embeddings).to(self.device)  # [P, D]
        conditional[len(tags)] = self.muq_bias  # muq_linear of no reference audio, that is of zeros
        if rows == 1:
            return conditional[None]
        return torch.stack((conditional, self.unconditional.expand_as(conditional)))

    def embed_frames(self, codes: Tensor) -> Tensor:
        """int64 ``[…, codebooks]`` → the sum of one embedding a codebook, ``[…, D]``, the same in every row."""
        books, va = self.config.num_codebooks, self.config.audio_vocab_size
        offsets = torch.arange(0, books * va, va, device=self.device)
        return F.embedding(codes + offsets, self.audio_embeddings).sum(-2)

    def advance(self, embedded: Tensor, cache: KVCache, start: int) -> Tensor:
        """``[rows, S, D]`` at positions start … → hidden state after the last of them, ``[rows, D]``."""
        return self.backbone.norm(self.backbone(embedded, cache, start)[:, -1])

    def step(self, embedded: Tensor, caches: Sequence[KVCache], positions: Sequence[int]) -> Tensor:
        """One position of each song, ``[rows, D]``, in its cache at its position → hidden states, ``[rows, D]``."""
        return self.backbone.norm(self.backbone.step(embedded[:, None], caches, positions)[:, 0])

    def frame(self, hidden: Tensor, cache: KVCache, choose: Choose) -> Tensor:
        """Choose the codes of a frame of each song, codebook by codebook, from ``hidden [rows, D]``.

        Returns int64 ``[songs, codebooks]``. `choose` is called once a codebook with its logits before guidance. The
        decoder sees the hidden state at position 0 and the codes before the current one at 1 …; the last code is
        never fed to it.
        """
        rows, va = hidden.shape[0], self.config.audio_vocab_size
        codes = [choose(0, linear(hidden[:, None], self.head)[:, 0].contiguous())]
        first = spread(F.embedding(codes[0], self.audio_embeddings), rows)
        x = linear(torch.stack((hidden, first), dim=1), self.projection).contiguous()  # [rows, 2, E]
        start = 0
        for book, head in enumerate(self.depth_heads.unbind(0), start=1):
            out = self.decoder.norm(self.decoder(x, cache, start)[:, -1:])  # [rows, 1, E]
            codes.append(choose(book, linear(out, head)[:, 0].contiguous()))
            start = book + 1
            if start < self.config.num_codebooks:
                code = F.embedding(codes[-1] + book * va, self.audio_embeddings)  # [songs, D]
                x = linear(spread(code, rows)[:, None], self.projection).contiguous()
        return torch.stack(codes, dim=1)
