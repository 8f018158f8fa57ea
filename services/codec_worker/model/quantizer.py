"""Residual vector quantisation, inverted: from codes to the conditioning of the flow."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.model.checkpoint import CodecConfig


class Quantizer(nn.Module):
    """The quantiser: eight codebooks, the projection out of their space, and the conditioning layer."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        shape = (config.num_quantizers, config.codebook_size, config.codebook_dim)
        self.embed = nn.Parameter(torch.empty(shape), requires_grad=False)
        same = config.dim == config.codebook_dim  # then the checkpoint has no projection either
        self.project_out = nn.Identity() if same else nn.Linear(config.codebook_dim, config.dim)
        self.cond_feature_emb = nn.Linear(config.dim, config.dim)

    def codebook_sum(self, codes: Tensor) -> Tensor:
        """Add up the rows of all codebooks for codes int64 ``[8, T]`` → ``[T, codebook_dim]``.

        A code outside its codebook adds nothing. (The language model knows a few more codes than the codec; the
        reference reads them from the next codebook.)
        """
        size = self.embed.shape[1]
        known = (codes >= 0) & (codes < size)
        rows = [F.embedding(code.clamp(0, size - 1), book) for code, book in zip(codes, self.embed, strict=True)]
        return (torch.stack(rows) * known[..., None]).sum(0)

    def forward(self, codes: Tensor) -> Tensor:
        """Turn codes int64 ``[8, T]`` into conditioning ``[2T, dim]``: each 80 ms frame twice, for latents at 25 Hz."""
        mu: Tensor = self.cond_feature_emb(self.project_out(self.codebook_sum(codes)))
        return mu.repeat_interleave(2, dim=0)
