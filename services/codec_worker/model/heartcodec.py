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
