"""The waveform decoder (the checkpoint's ScalarModel): latents to waveform by causal convolutions, always in fp32.

It runs in stretches of any length: each convolution keeps the last of its inputs, so that stretches give the same
samples as a single pass. Activations are ``[channels, T, width]``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.codec_worker.model.convolution import convolve
from shared.model.checkpoint import CodecConfig
from shared.model.matrix_product import linear

LEVELS = 9
DILATIONS = (1, 3, 5, 7, 9)


class ConvCache:
    """The last inputs of every convolution of a window, for its next stretch; zeros at the window's start."""

    def __init__(self) -> None:
        self._last: dict[nn.Module, Tensor] = {}  # [channels, reach, width]

    def extend(self, layer: nn.Module, x: Tensor, reach: int) -> Tensor:
        """Put the previous inputs before ``[channels, T, width]`` → ``[channels, reach + T, width]``."""
        before = self._last.get(layer)
        if before is None:
            before = x.new_zeros(x.shape[0], reach, x.shape[2])
        x = torch.cat((before, x), dim=1)
        self._last[layer] = x[:, x.shape[1] - reach :].clone()  # a view would keep all of `x`
        return x


class Convolution(nn.Module):
    """A causal convolution, whose weight norm is folded when it is loaded."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, kernel, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.dilation = dilation

    @property
    def reach(self) -> int:
        """Number of inputs before the present one that an output depends on."""
        return self.dilation * (self.weight.shape[1] - 1)

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve ``[channels, reach + T, inputs]`` → ``[channels, T, outputs]``."""
        return convolve(x, self.weight, self.bias, dilation=self.dilation)

    def forward(self, x: Tensor, conv_cache: ConvCache) -> Tensor:
        """Convolve causally, ``[channels, T, inputs]`` → ``[channels, T, outputs]``."""
        return self.convolve(conv_cache.extend(self, x, self.reach) if self.reach else x)


class Upsampling(nn.Module):
    """A transposed convolution of kernel 2 · stride whose last stride is dropped, so that it stays causal.

    The stride outputs of an input depend on it and on the one before: two matrix products.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * stride, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, conv_cache: ConvCache) -> Tensor:
        """Upsample ``[channels, T, inputs]`` → ``[channels, T · stride, outputs]``."""
        x = conv_cache.extend(self, x, 1)
        here, before = self.weight.flatten(0, 1).chunk(2)  # [stride · outputs, inputs]
        y = linear(x[:, 1:], here, self.bias.repeat(len(self.weight) // 2), sequence=True)
        y += linear(x[:, :-1], before, sequence=True)
        return y.view(len(y), -1, len(self.bias))


class Activation(nn.Module):
    """PReLU with one slope."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply PReLU elementwise."""
        return F.prelu(x, self.weight)


class ResidualUnit(nn.Module):
    """A residual unit: x + PReLU(conv1(PReLU(dilated conv(x))))."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, channels, kernel, dilation)
        self.conv2 = Convolution(channels, channels, 1)
        self.activation1 = Activation()
        self.activation2 = Activation()

    def forward(self, x: Tensor, conv_cache: ConvCache) -> Tensor:
        """Run the unit on ``[channels, T, width]``; returns the same shape."""
        h: Tensor = self.activation1(self.conv1(x, conv_cache))
        h = self.activation2(self.conv2(h, conv_cache))
        h += x
        return h


class UpsamplingBlock(nn.Module):
    """A block for one upsampling factor: a transposed convolution and five residual units."""

    def __init__(self, inputs: int, outputs: int, stride: int, residual_kernel: int) -> None:
        super().__init__()
        self.up_conv = Upsampling(inputs, outputs, stride)
        self.convs = nn.ModuleList(ResidualUnit(outputs, residual_kernel, dilation) for dilation in DILATIONS)

    def forward(self, x: Tensor, conv_cache: ConvCache) -> Tensor:
        """Upsample ``[channels, T, inputs]`` → ``[channels, T · stride, outputs]``."""
        x = self.up_conv(x, conv_cache)
        for unit in self.convs:
            x = unit(x, conv_cache)
        return x


class Repeat(nn.Module):
    """Repeats every sample several times, then smooths with a convolution."""

    def __init__(self, channels: int, kernel: int, times: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, kernel)
        self.activation = Activation()
        self.times = times

    def forward(self, x: Tensor, conv_cache: ConvCache) -> Tensor:
        """Repeat and smooth, ``[channels, T, width]`` → ``[channels, T · times, width]``."""
        smoothed: Tensor = self.activation(self.conv(x.repeat_interleave(self.times, dim=1), conv_cache))
        return smoothed


class WaveformDecoder(nn.Module):
    """Turns the latents of a window into its waveform."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = [config.init_channel << n for n in range(len(config.upsample_factors), -1, -1)]
        layers: list[nn.Module] = [Convolution(config.latent_hidden_dim, widths[0], config.delay_kernel_size)]
        for n, factor in enumerate(config.upsample_factors):
            layers.append(UpsamplingBlock(widths[n], widths[n + 1], factor, config.res_kernel_size))
        if config.num_samples > 1:
            layers.append(Repeat(widths[-1], config.default_kernel_size, config.num_samples))
        layers.append(Convolution(widths[-1], 1, config.default_kernel_size))
        self.decoder = nn.ModuleList(layers)

    def forward(
        self, latents: Tensor, start: int = 0, stop: int | None = None, conv_cache: ConvCache | None = None
    ) -> Tensor:
        """Decode the latents from `start` to `stop` of a window, ``[T, 256]`` fp32, to ``[2, samples]`` fp32.

        The halves of a latent are the two stereo channels. `conv_cache` comes from the call that ended at `start`;
        at the start of a window it is new.
        """
        stop = len(latents) if stop is None else stop
        conv_cache = ConvCache() if conv_cache is None else conv_cache
        first = self.decoder[0]
        assert isinstance(first, Convolution)
        side = first.reach // 2  # only this convolution is not causal: it looks ahead as far as it looks back
        low, high = max(0, start - side), min(len(latents), stop + side)
        x = latents[low:high].view(high - low, 2, -1).transpose(0, 1)  # [2, T, 128]
        return self.waveform(F.pad(x, (0, 0, side - (start - low), side - (high - stop))), conv_cache)

    def waveform(self, x: Tensor, conv_cache: ConvCache) -> Tensor:
        """Decode latents with two neighbours on each side, ``[rows, 2 + T + 2, 128]`` → ``[rows, samples]``."""
        first, *layers = self.decoder
        assert isinstance(first, Convolution)
        x = first.convolve(torch.round(LEVELS * x) / LEVELS)
        for layer in layers:
            x = layer(x, conv_cache)
        return x[..., 0]
