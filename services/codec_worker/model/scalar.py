"""The scalar decoder: latents to waveform, by transposed and dilated causal convolutions. Always in fp32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import CodecConfig

LEVELS = 9
DILATIONS = (1, 3, 5, 7, 9)


class Convolution(nn.Module):
    """A convolution, causal unless it looks ahead; its weight norm is folded when it is loaded."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1, *, look_ahead: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.dilation = dilation
        self.padding = kernel // 2 if look_ahead else dilation * (kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[channels, inputs, T]`` → ``[channels, outputs, T]``."""
        # Padded on both sides and cut again: padding on the left alone would copy `x`, the largest thing in memory.
        padded = F.conv1d(x, self.weight, self.bias, padding=self.padding, dilation=self.dilation)
        return padded[..., : x.shape[-1]]


class Upsampling(nn.Module):
    """A transposed convolution whose last stride is dropped, so that it stays causal."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``[channels, inputs, T]`` → ``[channels, outputs, T · stride]``."""
        return F.conv_transpose1d(x, self.weight, self.bias, self.stride)[..., : -self.stride]


class Activation(nn.Module):
    """PReLU with one slope."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.prelu(x, self.weight)


class ResidualUnit(nn.Module):
    """x + PReLU(conv1(PReLU(dilated conv(x))))."""

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, channels, kernel, dilation)
        self.conv2 = Convolution(channels, channels, 1)
        self.activation1 = Activation()
        self.activation2 = Activation()

    def forward(self, x: Tensor) -> Tensor:
        """``[channels, width, T]``, unchanged in shape."""
        h: Tensor = self.activation2(self.conv2(self.activation1(self.conv1(x))))
        return x + h


class Stage(nn.Module):
    """One upsampling factor: a transposed convolution and five residual units."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, residual_kernel: int) -> None:
        super().__init__()
        self.up_conv = Upsampling(inputs, outputs, kernel, stride)
        self.convs = nn.ModuleList(ResidualUnit(outputs, residual_kernel, dilation) for dilation in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        """``[channels, inputs, T]`` → ``[channels, outputs, T · stride]``."""
        x = self.up_conv(x)
        for unit in self.convs:
            x = unit(x)
        return x


class Repeat(nn.Module):
    """Every sample several times, then a smoothing convolution."""

    def __init__(self, channels: int, kernel: int, times: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, kernel)
        self.activation = Activation()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        """``[channels, width, T]`` → ``[channels, width, T · times]``."""
        smoothed: Tensor = self.activation(self.conv(x.repeat_interleave(self.times, dim=-1)))
        return smoothed


class ScalarDecoder(nn.Module):
    """Latents of a window → its waveform."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = [config.init_channel << n for n in range(len(config.upsample_factors), -1, -1)]
        layers: list[nn.Module] = [
            Convolution(config.latent_hidden_dim, widths[0], config.delay_kernel_size, look_ahead=True)
        ]
        for n, (factor, kernel) in enumerate(zip(config.upsample_factors, config.upsample_kernel_sizes, strict=True)):
            layers.append(Stage(widths[n], widths[n + 1], kernel, factor, config.res_kernel_size))
        if config.num_samples > 1:
            layers.append(Repeat(widths[-1], config.default_kernel_size, config.num_samples))
        layers.append(Convolution(widths[-1], 1, config.default_kernel_size))
        self.decoder = nn.ModuleList(layers)

    def forward(self, latents: Tensor) -> Tensor:
        """``[T, 256]`` fp32 → ``[2, samples]`` fp32: the halves of a latent are the two stereo channels."""
        x = latents.view(len(latents), 2, -1).permute(1, 2, 0)  # [2, 128, T]
        x = torch.round(LEVELS * x) / LEVELS
        for layer in self.decoder:
            x = layer(x)
        waveform: Tensor = x[:, 0]
        return waveform
