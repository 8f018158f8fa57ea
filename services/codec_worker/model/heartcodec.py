"""HeartCodec's decoder: the weights and computations that decoding needs."""

import torch
from torch import nn

from services.codec_worker.model.estimator import Estimator
from services.codec_worker.model.quantizer import Quantizer
from services.codec_worker.model.waveform_decoder import WaveformDecoder
from shared.model.checkpoint import CodecConfig


class HeartCodec(nn.Module):
    """The three networks of decoding: codes → conditioning, latents → velocity, latents → waveform.

    `dtype` is that of the estimator's matrices; all else stays in fp32, where rounding errors would be heard.
    """

    def __init__(self, config: CodecConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.quantizer = Quantizer(config)
        self.estimator = Estimator(config, dtype)
        self.scalar = WaveformDecoder(config)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(p.nbytes for p in self.parameters())

    @property
    def time_weights(self) -> list[str]:
        """Names of the parameters that only a `Schedule` reads."""
        return [name for name, _ in self.named_parameters() if ".adaln_single" in name]

    def work_bytes(self, window: int, stretch: int) -> int:
        """Upper estimate of what decoding takes beside the weights, for `window` latents of which `stretch` at a time
        become a waveform: a block of the estimator in fp32, and eight copies of the widest activation, of which four
        live at once and the others are what allocators keep."""
        config, samples, widest = self.config, stretch, 0
        for n, factor in enumerate(config.upsample_factors, start=1):
            samples *= factor
            widest = max(widest, samples * (config.init_channel << (len(config.upsample_factors) - n)))
        widest = max(widest, samples * config.num_samples * config.init_channel)
        heads, dim = config.num_attention_heads, 2 * config.num_attention_heads * config.attention_head_dim
        estimator = 2 * window * (2 * heads * window + 16 * dim)
        return 4 * (estimator + 8 * 2 * widest)
