"""Whisper's encoder (Radford et al. 2022): a log-mel spectrum of 30 s → the stream that hears words."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.codec_worker.encoder.layers import Convolution, LayerNorm, attend, pairs
from services.codec_worker.model.linear import Linear
from shared.model.encoder_config import WhisperConfig

FRAMES = 1488  # of a chunk, at 50 Hz; the silence after it is heard, and left out of the stream


class Attention(nn.Module):
    """Attention over all positions; keys have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Linear(dim, dim), Linear(dim, dim, bias=False)
        self.v_proj, self.out_proj = Linear(dim, dim), Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over ``[rows, T, D]``; keeps the shape."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        attended: Tensor = self.out_proj(attend(q, k, v))
        return attended


class Block(nn.Module):
    """A transformer block, normed before its two parts."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        dim, inner = config.d_model, config.encoder_ffn_dim
        self.self_attn_layer_norm = LayerNorm(dim)
        self.self_attn = Attention(dim, config.encoder_attention_heads)
        self.final_layer_norm = LayerNorm(dim)
        self.fc1, self.fc2 = Linear(dim, inner), Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block on ``[rows, T, D]``; keeps the shape."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return out


class Whisper(nn.Module):
    """The encoder of Whisper small, or one of other dimensions."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.conv1 = Convolution(config.num_mel_bins, dim, 3, padding=1)
        self.conv2 = Convolution(dim, dim, 3, stride=2, padding=1)
        self.embed_positions = nn.Parameter(torch.empty(config.max_source_positions, dim))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.layer_norm = LayerNorm(dim)

    def forward(self, mel: Tensor) -> Tensor:
        """Turn ``mel [rows, 3000, bands]`` into the stream ``[rows, 744, D]``."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))) + self.embed_positions
        for layer in self.layers:
            x = layer(x)
        return pairs(self.layer_norm(x)[:, :FRAMES])
