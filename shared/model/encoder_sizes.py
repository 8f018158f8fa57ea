"""Bytes that the encoder takes on a device, from its dimensions alone, in float32; see `shared.model.sizes`."""

from shared.model.checkpoint import CodecConfig
from shared.model.encoder_config import (
    MU_LAYERS,
    WAVLM_LAYERS,
    ConformerConfig,
    EncoderConfig,
    MuEncoderConfig,
    WavLMConfig,
    WhisperConfig,
)
from shared.model.sizes import Tensors, block_bytes

_FLOAT, _NUMBER = 4, 8  # bytes of a float32, of an int64
_AUDIO, _MU_FRAMES, _WHISPER_FRAMES = 476_320, 2976, 3000  # of a chunk: samples at 16 kHz, frames of the two mels
_STREAM, _FRAMES = 744, 372  # frames of a stream, codes of a chunk


def encoder_bytes(config: EncoderConfig, codec: CodecConfig) -> int:
    """Bytes of the encoder's weights and of the codebooks."""
    return block_bytes(_encoder(config, codec))


def encoder_work(config: EncoderConfig, codec: CodecConfig, chunks: int = 1) -> int:
    """Upper estimate of what encoding so many chunks of stereo at once takes beside the weights.

    The networks run one after another: the largest of their activations count, and the signals and streams of all.
    Convolutions of images and of the waveform, and WavLM's attention, are of one channel at a time. Of the widest
    activation there are six copies: three live at once, the others are what convolutions and allocators take.
    """
    rows, mu, wavlm, whisper, query = 2 * chunks, config.mu, config.wavlm, config.whisper, config.query
    conformer = mu.conformer_config
    stem = 6 * mu.conv_dim * -(-mu.n_mels // 2) * _MU_FRAMES // 2
    waveform = 6 * wavlm.conv_dim[0] * -(-_AUDIO // wavlm.conv_stride[0])
    bias = 5 * wavlm.num_attention_heads * (2 * _STREAM) ** 2
    streams = 2 * (2 * conformer.hidden_size + whisper.d_model + wavlm.hidden_size)
    work = max(
        stem,
        rows * _STREAM * _activations(conformer.hidden_size, conformer.intermediate_size),
        waveform,
        bias + rows * 2 * _STREAM * _activations(wavlm.hidden_size, wavlm.intermediate_size),
        rows * _WHISPER_FRAMES * _activations(whisper.d_model, whisper.encoder_ffn_dim),
        chunks * 3 * _FRAMES * (_activations(query.dim, 8 * query.dim) + streams),
        2 * (chunks * _FRAMES * 3 + codec.codebook_dim) * codec.codebook_size,
    )
    heard = _MU_FRAMES * mu.n_mels + _AUDIO + _WHISPER_FRAMES * whisper.num_mel_bins
    return _FLOAT * (work + rows * heard + chunks * _STREAM * 2 * streams)


def encoder_needs(config: EncoderConfig, codec: CodecConfig) -> int:
    """Bytes without which nothing can be encoded: the weights, and what one chunk takes."""
    return encoder_bytes(config, codec) + encoder_work(config, codec)


def chunks_at_once(config: EncoderConfig, codec: CodecConfig, share: int, *, most: int) -> int:
    """Chunks that a share of a device's memory holds beside the weights, in bytes: at least 1, and `most` at most."""
    left = share - encoder_bytes(config, codec)
    return max([1, *(count for count in range(1, most + 1) if encoder_work(config, codec, count) <= left)])


def _activations(width: int, inner: int) -> int:
    """Floats a position that a block of a transformer takes at most."""
    return 10 * width + 3 * inner


def _encoder(config: EncoderConfig, codec: CodecConfig) -> Tensors:
    yield from _muencoder(config.mu)
    yield from _wavlm(config.wavlm)
    yield from _whisper(config.whisper)
    yield from _query(config)
    yield codec.num_quantizers * codec.codebook_size * codec.codebook_dim, _FLOAT
    if codec.dim != codec.codebook_dim:
        yield from _linear(codec.dim, codec.codebook_dim)


def _linear(inputs: int, outputs: int, count: int = 1, *, bias: bool = True) -> Tensors:
    for _ in range(count):
        yield inputs * outputs, _FLOAT
        if bias:
            yield outputs, _FLOAT


def _vectors(width: int, count: int) -> Tensors:
    """Scales, shifts and statistics of norms."""
    for _ in range(count):
        yield width, _FLOAT


def _muencoder(config: MuEncoderConfig) -> Tensors:
    width, conformer = config.conv_dim, config.conformer_config
    for inputs in (1, width):
        yield from _linear(9 * inputs, width, 2)
        yield from _linear(9 * width, width)
        yield from _vectors(width, 3 * 4)
    yield from _linear(width * -(-config.n_mels // 4), conformer.hidden_size)
    for _ in range(MU_LAYERS):
        yield from _conformer_block(conformer)
    yield _STREAM * (conformer.hidden_size // conformer.num_attention_heads), _FLOAT  # rotations


def _conformer_block(config: ConformerConfig) -> Tensors:
    dim, inner = config.hidden_size, config.intermediate_size
    for _ in range(2):  # feed-forwards
        yield from _linear(dim, inner)
        yield from _linear(inner, dim)
    yield from _linear(dim, dim, 4)
    yield from _linear(dim, 2 * dim, bias=False)
    yield from _linear(dim, config.conv_depthwise_kernel_size, bias=False)
    yield from _linear(dim, dim, bias=False)
    yield from _vectors(dim, 5 * 2 + 4)


def _wavlm(config: WavLMConfig) -> Tensors:
    dim, heads, kernel = config.hidden_size, config.num_attention_heads, config.num_conv_pos_embeddings
    inputs = (1, *config.conv_dim)
    for narrow, wide, taps in zip(inputs, config.conv_dim, config.conv_kernel, strict=False):
        yield narrow * taps * wide, _FLOAT
    yield from _vectors(config.conv_dim[0], 2)
    yield from _vectors(config.conv_dim[-1], 2)
    yield from _linear(config.conv_dim[-1], dim)
    yield from _linear(dim // config.num_conv_pos_embedding_groups * kernel, dim)
    yield from _vectors(dim, 2)
    for _ in range(WAVLM_LAYERS):
        yield from _linear(dim, dim, 4)
        yield from _linear(dim // heads, 8)
        yield heads, _FLOAT
        yield from _linear(dim, config.intermediate_size)
        yield from _linear(config.intermediate_size, dim)
        yield from _vectors(dim, 4)
    yield config.num_buckets * heads, _FLOAT
    yield 4 * _STREAM - 1, _NUMBER  # bucket of each distance


def _whisper(config: WhisperConfig) -> Tensors:
    dim, inner = config.d_model, config.encoder_ffn_dim
    yield from _linear(3 * config.num_mel_bins, dim)
    yield from _linear(3 * dim, dim)
    yield config.max_source_positions * dim, _FLOAT
    for _ in range(config.encoder_layers):
        yield from _linear(dim, dim, 3)
        yield from _linear(dim, dim, bias=False)
        yield from _linear(dim, inner)
        yield from _linear(inner, dim)
        yield from _vectors(dim, 4)
    yield from _vectors(dim, 2)


def _query(config: EncoderConfig) -> Tensors:
    query, dim = config.query, config.query.dim
    yield from _linear(2 * config.mu.conformer_config.hidden_size, dim, 2)
    yield from _linear(2 * config.wavlm.hidden_size, dim)
    yield from _linear(3 * dim + 2 * config.whisper.d_model, dim)
    yield dim, _FLOAT
    for _ in range(query.num_layers):
        yield from _linear(dim, 3 * dim, bias=False)
        yield from _linear(dim, dim, bias=False)
        yield from _vectors(query.head_dim, 4)
        yield from _linear(dim, 8 * dim)
        yield from _linear(4 * dim, dim)
        yield from _vectors(dim, 2)
    yield 3 * _FRAMES * query.rotary_dim, _FLOAT  # rotations
