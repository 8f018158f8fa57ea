"""The query encoder: four streams at 25 Hz → one vector a frame, at 12.5 Hz."""

import torch
from torch import Tensor, nn

from services.codec_worker.encoder.chunks import FRAMES
from services.codec_worker.encoder.layers import LayerNorm, attend, rope_table, rotate
from services.codec_worker.model.linear import Linear
from shared.model.encoder_config import EncoderConfig, QueryConfig

ROPE_BASE = 10_000.0
POSITIONS = 3 * FRAMES  # two frames of the streams and a query for each frame


class Block(nn.Module):
    """A transformer block without norms but those of queries and keys; what it adds is scaled by channel."""

    def __init__(self, config: QueryConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = dim // config.head_dim
        self.to_qkv, self.to_out = Linear(dim, 3 * dim, bias=False), Linear(dim, dim, bias=False)
        self.q_norm, self.k_norm = LayerNorm(config.head_dim), LayerNorm(config.head_dim)
        self.attention_scale = nn.Parameter(torch.empty(dim))
        self.proj, self.down = Linear(dim, 8 * dim), Linear(4 * dim, dim)
        self.ff_scale = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Run the block on ``[rows, T, D]``; keeps the shape."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        x = x + self.attention_scale * self.to_out(attend(q, k, v))
        value, gate = self.proj(x).chunk(2, dim=-1)
        out: Tensor = x + self.ff_scale * self.down(value * gate.sigmoid())
        return out


class QueryEncoder(nn.Module):
    """Transformer over the streams' frames, with a query after each two of them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        query, dim = config.query, config.query.dim
        mu, words = 2 * config.mu.conformer_config.hidden_size, 2 * config.whisper.d_model
        self.cond_fusion_layer_acoustic = Linear(mu, dim)
        self.cond_fusion_layer_semantic = Linear(mu, dim)
        self.cond_fusion_layer_phone = Linear(2 * config.wavlm.hidden_size, dim)
        self.feature_proj = Linear(3 * dim + words, dim)
        self.cls_token = nn.Parameter(torch.empty(1, dim))
        self.layers = nn.ModuleList(Block(query) for _ in range(query.num_layers))
        self.table: Tensor
        self.register_buffer("table", rope_table(query.rotary_dim, ROPE_BASE, POSITIONS), persistent=False)

    def forward(self, acoustic: Tensor, semantic: Tensor, whisper: Tensor, wavlm: Tensor) -> Tensor:
        """Turn stereo streams ``[chunks, 744, left | right]`` into ``[chunks, 372, D]``."""
        fused = self.feature_proj(
            torch.cat(
                (
                    self.cond_fusion_layer_acoustic(acoustic),
                    self.cond_fusion_layer_semantic(semantic),
                    whisper,  # the only one without a layer of its own
                    self.cond_fusion_layer_phone(wavlm),
                ),
                dim=-1,
            )
        )
        two = fused.unflatten(1, (-1, 2))  # [chunks, 372, 2, D]
        queries = self.cls_token.expand(*two.shape[:2], 1, -1)
        x = torch.cat((two, queries), dim=2).flatten(1, 2)
        for layer in self.layers:
            x = layer(x, self.table)
        return torch.unflatten(x, 1, (-1, 3))[:, :, 2]
