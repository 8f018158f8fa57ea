"""HeartCodec's encoder: the signals of some chunks → their codes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from services.codec_worker.encoder.muencoder import MuEncoder
from services.codec_worker.encoder.quantizer import ResidualQuantizer
from services.codec_worker.encoder.query import QueryEncoder
from services.codec_worker.encoder.wavlm import WavLM
from services.codec_worker.encoder.whisper import Whisper
from shared.model.checkpoint import CodecConfig
from shared.model.encoder_config import EncoderConfig


class HeartEncoder(nn.Module):
    """The networks of encoding, all in fp32: a code follows from the nearest of 8,192 rows, eight times over."""

    def __init__(self, config: EncoderConfig, codec: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.muencoder = MuEncoder(config.mu)
        self.wavlm = WavLM(config.wavlm)
        self.whisper = Whisper(config.whisper)
        self.query = QueryEncoder(config)
        self.quantizer = ResidualQuantizer(codec)


def stereo(stream: Tensor, channels: Sequence[int]) -> Tensor:
    """Join the rows of each chunk, which has one or two `channels`: ``[chunks, T, left | right]``.

    Of mono both halves are equal.
    """
    rows = torch.split(stream, list(channels))
    return torch.stack([torch.cat((chunk[0], chunk[-1]), dim=-1) for chunk in rows])
