"""Bytes that the models take on a device, from their dimensions alone: what a worker may know before torch is loaded.

Weights lie in one block a model, each tensor aligned as `shared.model.weights` aligns them. The engines count their own
tensors; a test holds these formulas equal to them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from shared.model.checkpoint import CodecConfig, Flavor, LMConfig

ALIGNMENT = 256  # bytes, as CUDA aligns its allocations
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PREFILL = 512  # positions that the language model prefills at once
WINDOW_LATENTS, STRETCH_LATENTS = 744, 62  # that the codec's estimator and its waveform decoder take at once

_NUMBER, _COMPLEX = 8, 8  # bytes of an int64, of a complex64
_FIELDS = 5  # numbers in each row of a table of songs
_SETTINGS = 32  # bytes of a song's counter and settings

Tensors = Iterator[tuple[int, int]]
"""Numbers of elements, and the bytes of each."""


class Sizes(Protocol):
    """Bytes of both models on a device, by dtype."""

    def language_model(self, dtype: str, int8: str) -> int:
        """Bytes of the language model's weights, without the text embeddings, which stay on the host.

        `int8` is off, decoder or all, as in the settings.
        """

    def language_model_work(self, dtype: str, int8: str) -> int:
        """Upper estimate of what prefill and frames take beside weights and caches."""

    def song(self, dtype: str, frames: int, *, prompt: int, rows: int) -> int:
        """Bytes of a song of `frames` frames after `prompt` positions; two `rows` with guidance.

        On CUDA; on the CPU it takes less by a few kB. No song is counted as longer than the model's positions.
        """

    def codec(self, dtype: str) -> int:
        """Bytes of the codec's weights, with the estimator's matrices in `dtype` and all else in float32."""

    def codec_work(self) -> int:
        """Upper estimate of what decoding takes beside the weights."""

    def encoder(self) -> int:
        """Bytes of the encoder's weights and of what encoding takes; 0 where there is none."""


def codec_work(config: CodecConfig, stretch: int = STRETCH_LATENTS) -> int:
    """Upper estimate of what decoding takes beside the weights, of which `stretch` latents at a time become a waveform.

    A block of the estimator in fp32, and eight copies of the widest activation, of which four live at once and the
    others are what allocators keep.
    """
    samples, widest = stretch, 0
    for n, factor in enumerate(config.upsample_factors, start=1):
        samples *= factor
        widest = max(widest, samples * (config.init_channel << (len(config.upsample_factors) - n)))
    widest = max(widest, samples * config.num_samples * config.init_channel)
    heads, wide = config.num_attention_heads, 2 * config.num_attention_heads * config.attention_head_dim
    estimator = 2 * WINDOW_LATENTS * (2 * heads * WINDOW_LATENTS + 16 * wide)
    return 4 * (estimator + 8 * 2 * widest)


@dataclass(frozen=True)
class CheckpointSizes:
    """Sizes of the models of a checkpoint, as the native engines hold them."""

    lm: LMConfig
    codec_config: CodecConfig
    encoder_bytes: int = 0  # with what encoding takes

    def language_model(self, dtype: str, int8: str) -> int:
        """See `Sizes`."""
        lm, item = self.lm, ITEM_BYTES[dtype]
        d, e, va, books = lm.backbone.embed_dim, lm.decoder.embed_dim, lm.audio_vocab_size, lm.num_codebooks

        def tensors() -> Tensors:
            yield from _stack(lm.backbone, lm.backbone.max_seq_len, item, int8=int8 == "all")
            yield from _stack(lm.decoder, books, item, int8=int8 != "off")
            yield from ((books * va * d, item), (d, item), (d, item))  # audio embeddings, unconditional, MuQ's bias
            yield from _matrix(e, d, item, int8=int8 != "off")  # projection
            yield from ((va * d, item), *((va * e, item) for _ in range(books - 1)))  # heads
            yield books * va, _NUMBER  # counters of the noise

        return block_bytes(tensors())

    def language_model_work(self, dtype: str, int8: str) -> int:
        """See `Sizes`. Activations of a prefilled part in two rows; with int8 the largest matrix, converted."""
        stack, item = self.lm.backbone, ITEM_BYTES[dtype]
        activations = 2 * PREFILL * (4 * stack.intermediate_dim + 12 * stack.embed_dim) * item
        converted = 0 if int8 == "off" else 2 * stack.intermediate_dim * stack.embed_dim * item
        return activations + converted

    def song(self, dtype: str, frames: int, *, prompt: int, rows: int) -> int:
        """See `Sizes`."""
        lm, item = self.lm, ITEM_BYTES[dtype]
        positions = min(prompt + frames, lm.backbone.max_seq_len)
        cache = rows * _cache(lm.backbone, positions, item)
        depth = 2 * _cache(lm.decoder, lm.num_codebooks, item)
        tables = _NUMBER * _FIELDS * 2 * (lm.num_codebooks + 1)
        numbers = _NUMBER * lm.num_codebooks + _SETTINGS
        return cache + depth + tables + 2 * lm.backbone.embed_dim * item + numbers

    def codec(self, dtype: str) -> int:
        """See `Sizes`."""
        return block_bytes(_codec(self.codec_config, ITEM_BYTES[dtype]))

    def codec_work(self) -> int:
        """See `Sizes`."""
        return codec_work(self.codec_config)

    def encoder(self) -> int:
        """See `Sizes`."""
        return self.encoder_bytes


@dataclass(frozen=True)
class TrivialSizes:
    """Sizes that the trivial engines pretend to have."""

    LANGUAGE_MODEL = 40 * 2**20
    FRAME = 1024
    CODEC = 30 * 2**20
    CODEC_WORK = 2**20
    ENCODER = 20 * 2**20

    def language_model(self, dtype: str, int8: str) -> int:
        """See `Sizes`."""
        return self.LANGUAGE_MODEL

    def language_model_work(self, dtype: str, int8: str) -> int:
        """See `Sizes`."""
        return 0

    def song(self, dtype: str, frames: int, *, prompt: int, rows: int) -> int:
        """See `Sizes`."""
        return self.FRAME * frames

    def codec(self, dtype: str) -> int:
        """See `Sizes`."""
        return self.CODEC

    def codec_work(self) -> int:
        """See `Sizes`."""
        return self.CODEC_WORK

    def encoder(self) -> int:
        """See `Sizes`."""
        return self.ENCODER + self.CODEC_WORK


def block_bytes(tensors: Tensors) -> int:
    return sum(-(-count * item // ALIGNMENT) * ALIGNMENT for count, item in tensors)


def _matrix(outputs: int, inputs: int, item: int, *, int8: bool) -> Tensors:
    yield outputs * inputs, 1 if int8 else item
    if int8:
        yield outputs, item  # a scale a row


def _cache(flavor: Flavor, positions: int, item: int) -> int:
    """Bytes of keys and values of one row."""
    return 2 * flavor.num_layers * flavor.num_kv_heads * flavor.head_dim * positions * item


def _stack(flavor: Flavor, positions: int, item: int, *, int8: bool) -> Tensors:
    d, f, h = flavor.embed_dim, flavor.intermediate_dim, flavor.head_dim
    for _ in range(flavor.num_layers):
        yield from ((d, item), (d, item))  # norms
        yield from _matrix((flavor.num_heads + 2 * flavor.num_kv_heads) * h, d, item, int8=int8)
        yield from _matrix(d, flavor.num_heads * h, item, int8=int8)
        yield from _matrix(2 * f, d, item, int8=int8)
        yield from _matrix(d, f, item, int8=int8)
    yield from ((d, item), (positions * (h // 2), _COMPLEX), (positions, _NUMBER))  # norm, rotations, positions


def _codec(config: CodecConfig, item: int) -> Tensors:
    yield config.num_quantizers * config.codebook_size * config.codebook_dim, 4
    if config.dim != config.codebook_dim:
        yield from ((config.dim * config.codebook_dim, 4), (config.dim, 4))
    yield from ((config.dim * config.dim, 4), (config.dim, 4))
    yield from _estimator(config, item)
    yield from _waveform_decoder(config)


def _estimator(config: CodecConfig, item: int) -> Tensors:
    heads, width = config.num_attention_heads, config.attention_head_dim
    dim, wide = heads * width, 2 * heads * width
    yield from _projection(config.in_channels, dim, item)
    yield from _projection(config.in_channels + dim, wide, item)
    yield from _projection(wide, config.out_channels, item)
    for blocks, d in ((config.num_layers, dim), (config.num_layers_2, wide)):
        ffn = 256 * math.ceil(int(8 * d / 3) / 256)
        for _ in range(blocks):
            yield from ((d, 4), (d, 4), (6 * d, 4))  # norms and modulation
            yield from ((3 * d * d, item), (d * d, item), *((d * ffn, item) for _ in range(3)))
        yield from ((2 * d, 4), (WINDOW_LATENTS * (d // heads // 2), _COMPLEX))  # last modulation, rotations


def _projection(inputs: int, outputs: int, item: int) -> Tensors:
    yield from ((outputs * 3 * inputs, item), (outputs, item), (outputs * outputs, item), (outputs, item))


def _waveform_decoder(config: CodecConfig) -> Tensors:
    def convolution(inputs: int, outputs: int, kernel: int) -> Tensors:
        yield from ((outputs * kernel * inputs, 4), (outputs, 4))

    widths = [config.init_channel << n for n in range(len(config.upsample_factors), -1, -1)]
    yield from convolution(config.latent_hidden_dim, widths[0], config.delay_kernel_size)
    for n, factor in enumerate(config.upsample_factors):
        yield from convolution(widths[n], widths[n + 1], 2 * factor)
        for _ in range(5):  # residual units
            yield from convolution(widths[n + 1], widths[n + 1], config.res_kernel_size)
            yield from convolution(widths[n + 1], widths[n + 1], 1)
            yield from ((1, 4), (1, 4))  # slopes
    if config.num_samples > 1:
        yield from convolution(widths[-1], widths[-1], config.default_kernel_size)
        yield 1, 4
    yield from convolution(widths[-1], 1, config.default_kernel_size)
