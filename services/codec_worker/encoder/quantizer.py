"""Residual vector quantisation: one vector a frame → eight codes."""

import torch
from torch import Tensor, nn

from services.codec_worker.model.linear import Linear
from shared.model.checkpoint import CodecConfig


class ResidualQuantizer(nn.Module):
    """The decoder's codebooks, and the projection into their space."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        shape = (config.num_quantizers, config.codebook_size, config.codebook_dim)
        self.embed = nn.Parameter(torch.empty(shape))
        same = config.dim == config.codebook_dim  # then the checkpoint has no projection either
        self.project_in = nn.Identity() if same else Linear(config.dim, config.codebook_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Quantise ``[…, dim]`` → codes int64 ``[8, …]``."""
        return self.nearest(self.project_in(x))

    def nearest(self, z: Tensor) -> Tensor:
        """Codes int64 ``[8, …]`` of ``z […, codebook_dim]``: in each codebook the row nearest to what is left of z.

        Distances are Euclidean, in float64, so that they do not depend on the order of their sums; of rows as near the
        lower index is taken.
        """
        codes, left = [], z.flatten(0, -2)
        for book in self.embed:
            wide = book.double()
            # |z − e|² without |z|², which is the same for all rows
            code = (wide.square().sum(1) - 2 * (left.double() @ wide.T)).argmin(dim=1)
            codes.append(code.view(z.shape[:-1]))
            left = left - book[code]
        return torch.stack(codes)
