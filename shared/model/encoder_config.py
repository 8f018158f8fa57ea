"""Configuration of HeartCodec's encoder, as the file in its checkpoint names it.

A missing key has the value of the official checkpoint. What the encoder computes in one way only is a `Literal`: a
file that says otherwise is refused.
"""

from typing import Final, Literal

import msgspec

CHUNK: Final = 714_240  # samples at 24 kHz that are encoded at once: 29.76 s, 372 frames
MU_LAYERS = 11  # blocks of the conformer whose output is used, the second's and the last's
WAVLM_LAYERS = 9  # blocks of WavLM whose output is used, the last four


class _Layers(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of a transformer stack."""

    hidden_size: int
    num_hidden_layers: int = 12
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5

    def _check(self, layers: int) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of its {self.num_attention_heads} heads")
        if self.num_hidden_layers < layers:
            raise ValueError(f"num_hidden_layers {self.num_hidden_layers} must be at least {layers}")


class ConformerConfig(_Layers, frozen=True, kw_only=True):
    """The transformer of MuEncoder."""

    hidden_size: int = 1024
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: Literal["swish"] = "swish"
    position_embeddings_type: Literal["rotary"] = "rotary"
    rotary_embedding_base: float = 10_000
    conv_depthwise_kernel_size: int = 31

    def __post_init__(self) -> None:
        self._check(MU_LAYERS)


class MuEncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The encoder of the acoustic and the semantic stream."""

    sample_rate: Literal[24_000] = 24_000
    n_fft: Literal[2048] = 2048
    hop_length: Literal[240] = 240
    n_mels: int = 128
    conv_dim: int = 512
    mean: float = 6.768444971712967
    std: float = 18.417922652295623
    conformer_config: ConformerConfig = ConformerConfig()


class WavLMConfig(_Layers, frozen=True, kw_only=True):
    """WavLM, the encoder of the phonetic stream."""

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Literal["gelu"] = "gelu"
    feat_extract_norm: Literal["group"] = "group"
    feat_extract_activation: Literal["gelu"] = "gelu"
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    num_buckets: int = 320
    max_bucket_distance: int = 800
    do_stable_layer_norm: bool = False

    def __post_init__(self) -> None:
        self._check(WAVLM_LAYERS)
        if self.conv_bias or self.do_stable_layer_norm:
            raise ValueError("conv_bias and do_stable_layer_norm must be false")
        if len({len(self.conv_dim), len(self.conv_kernel), len(self.conv_stride)}) != 1:
            raise ValueError("conv_dim, conv_kernel and conv_stride must have as many entries")


class WhisperConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Whisper's encoder, that of the lyrics' stream."""

    d_model: int = 768
    encoder_layers: int = 12
    encoder_attention_heads: int = 12
    encoder_ffn_dim: int = 3072
    num_mel_bins: int = 80
    max_source_positions: Literal[1500] = 1500
    activation_function: Literal["gelu"] = "gelu"
    scale_embedding: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.encoder_attention_heads:
            raise ValueError(f"d_model {self.d_model} is no multiple of its {self.encoder_attention_heads} heads")
        if self.scale_embedding:
            raise ValueError("scale_embedding must be false")


class FeatureExtractors(msgspec.Struct, frozen=True, kw_only=True):
    """The encoders of the four streams."""

    whisper_config: WhisperConfig = WhisperConfig()
    wavlm_config: WavLMConfig = WavLMConfig()
    muencoder_config: MuEncoderConfig = MuEncoderConfig()


class QueryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The encoder that makes one vector a frame of the four streams."""

    dim: int = 512
    num_layers: int = 6
    head_dim: int = 128
    interval: Literal[2] = 2

    def __post_init__(self) -> None:
        if self.dim % self.head_dim:
            raise ValueError(f"dim {self.dim} is no multiple of head_dim {self.head_dim}")
        if self.head_dim < self.rotary_dim:
            raise ValueError(f"head_dim {self.head_dim} must be at least {self.rotary_dim}")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are turned by its position."""
        return max(self.head_dim // 2, 32)


class EncoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of HeartCodec's encoder."""

    version: Literal["vqv12"]
    chunk_samples: Literal[714_240]
    feature_extractors: FeatureExtractors = FeatureExtractors()
    query: QueryConfig = QueryConfig()

    @property
    def mu(self) -> MuEncoderConfig:
        """Dimensions of MuEncoder."""
        return self.feature_extractors.muencoder_config

    @property
    def wavlm(self) -> WavLMConfig:
        """Dimensions of WavLM."""
        return self.feature_extractors.wavlm_config

    @property
    def whisper(self) -> WhisperConfig:
        """Dimensions of Whisper's encoder."""
        return self.feature_extractors.whisper_config
