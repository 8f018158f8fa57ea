"""WavLM (Chen et al. 2021): a waveform at 16 kHz → the stream that hears sounds of speech."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.codec_worker.encoder.layers import (
    NORM_EPS,
    Convolution,
    FeedForward,
    GroupedConvolution,
    LayerNorm,
    attend,
    pairs,
)
from services.codec_worker.model.linear import Linear
from shared.model.encoder_config import WAVLM_LAYERS, WavLMConfig

FRAMES = 1488  # of a chunk, at 50 Hz
STATES = range(6, WAVLM_LAYERS + 1)  # of which the stream is the mean: after so many blocks


class ChannelNorm(nn.Module):
    """Norm of every channel over all its time, silence included (group norm with one channel a group)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm ``[rows, T, width]`` in place."""
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return x.sub_(mean).mul_((variance + NORM_EPS).rsqrt() * self.weight).add_(self.bias)


class WaveformConvolution(nn.Module):
    """A convolution of the waveform, the first one with a norm, before GELU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, kernel, stride=stride, bias=False)
        self.layer_norm = ChannelNorm(outputs) if first else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[rows, T, inputs]`` → ``[rows, T', outputs]``."""
        return F.gelu(self.layer_norm(self.conv(x)))


class FeatureExtractor(nn.Module):
    """The convolutions that make 50 frames a second of the waveform."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        inputs = (1, *config.conv_dim)
        sizes = enumerate(zip(inputs, config.conv_dim, config.conv_kernel, config.conv_stride, strict=False))
        self.conv_layers = nn.ModuleList(WaveformConvolution(*size, first=not n) for n, size in sizes)

    def forward(self, audio: Tensor) -> Tensor:
        """Turn ``audio [rows, samples]`` into ``[rows, T, width]``, row by row to need less memory."""
        return torch.cat([self._row(row) for row in torch.split(audio, 1)])

    def _row(self, audio: Tensor) -> Tensor:
        x = audio[..., None]
        for layer in self.conv_layers:
            x = layer(x)
        return x


class FeatureProjection(nn.Module):
    """Norm and projection of what was extracted."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(inputs)
        self.projection = Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[rows, T, inputs]`` to ``[rows, T, outputs]``."""
        projected: Tensor = self.projection(self.layer_norm(x))
        return projected


class GatedAttention(nn.Module):
    """Attention whose bias by distance is gated for every head and query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = Linear(dim, dim), Linear(dim, dim)
        self.v_proj, self.out_proj = Linear(dim, dim), Linear(dim, dim)
        self.gru_rel_pos_linear = Linear(dim // heads, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.empty(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend over ``[rows, T, D]`` with ``bias [heads, T, T]``; keeps the shape."""
        return torch.cat(
            [self._row(row, bias) for row in torch.split(x, 1)]
        )  # for each row its bias is the largest tensor

    def _row(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        attended: Tensor = self.out_proj(attend(q, k, v, self._gate(x) * bias))
        return attended

    def _gate(self, x: Tensor) -> Tensor:
        """Factor of the bias, ``[rows, heads, T, 1]``."""
        halves = self.gru_rel_pos_linear(torch.unflatten(x, -1, (self.heads, -1))).unflatten(-1, (2, 4)).sum(-1)
        update, reset = halves.sigmoid().transpose(1, 2).split(1, dim=-1)
        gate: Tensor = update * (reset * self.gru_rel_pos_const - 1) + 2
        return gate


class GeluFeedForward(FeedForward):
    """Two linear layers with GELU between them."""

    def forward(self, x: Tensor) -> Tensor:
        """Run on ``[rows, T, D]``; keeps the shape."""
        out: Tensor = self.output_dense(F.gelu(self.intermediate_dense(x)))
        return out


class Block(nn.Module):
    """A transformer block, normed after each of its two parts."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attention = GatedAttention(dim, config.num_attention_heads)
        self.layer_norm = LayerNorm(dim)
        self.feed_forward = GeluFeedForward(dim, config.intermediate_size)
        self.final_layer_norm = LayerNorm(dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Run the block on ``[rows, T, D]``; keeps the shape."""
        x = self.layer_norm(x + self.attention(x, bias))
        out: Tensor = self.final_layer_norm(x + self.feed_forward(x))
        return out


class WavLM(nn.Module):
    """The layers of WavLM whose output is used, of those that the checkpoint has."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__()
        dim, heads, kernel = config.hidden_size, config.num_attention_heads, config.num_conv_pos_embeddings
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config.conv_dim[-1], dim)
        self.pos_conv = GroupedConvolution(
            dim, kernel, config.num_conv_pos_embedding_groups, padding=kernel // 2, bias=True
        )
        self.layer_norm = LayerNorm(dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(WAVLM_LAYERS))
        self.rel_attn_embed = nn.Parameter(torch.empty(config.num_buckets, heads))
        self.buckets: Tensor
        buckets = distance_buckets(FRAMES, config.num_buckets, config.max_bucket_distance)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """Turn 16 kHz ``audio [rows, 476320]`` into the stream ``[rows, 744, D]``."""
        x = self.feature_projection(self.feature_extractor(audio))
        x = self.layer_norm(x + F.gelu(self.pos_conv(x)[:, : x.shape[1]]))
        bias, total = self._bias(), torch.zeros_like(x)
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, bias)
            if depth in STATES:
                total += x
        return pairs(total / len(STATES))

    def _bias(self) -> Tensor:
        """Bias of the scores by distance, ``[heads, T, T]``."""
        by_distance = self.rel_attn_embed[self.buckets].T  # [heads, 2T - 1], from 1 - T on
        windows = by_distance.unfold(1, FRAMES, 1)  # [heads, T, T], the last query first
        return windows.flip(1)


def distance_buckets(frames: int, buckets: int, farthest: int) -> Tensor:
    """Bucket of each distance, key - query, from 1 - `frames` to `frames` - 1: int64 ``[2 · frames - 1]``, on the host.

    Half of the buckets are for keys that come later. Of each half, half are for a distance each, and the others widen
    logarithmically up to `farthest` (T5, Raffel et al. 2019). In fp32, as the reference computes them.
    """
    distance = torch.arange(1 - frames, frames, device=torch.device("cpu"))
    half, single = buckets // 2, buckets // 4
    near = distance.abs()
    scaled = torch.log(near.clamp_min(1).float() / single) / math.log(farthest / single) * (half - single)
    far = (single + scaled.long()).clamp_max(half - 1)
    return (distance > 0) * half + torch.where(near < single, near, far)
