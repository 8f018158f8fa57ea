"""The encoder: from audio of the demo to the codes that it was made from."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ckpt.training import codes, examples, loop, synthesizer
from ckpt.training.codec import CONFIG as CODEC
from ckpt.training.codec import MARK, WIDTH
from services.codec_worker.encoder.chunks import FRAMES
from services.codec_worker.encoder.chunks import RATE as HEARD_RATE
from services.codec_worker.encoder.heartencoder import HeartEncoder
from services.codec_worker.encoder.layers import NORM_EPS, BatchNorm, pairs
from services.codec_worker.encoder.mel import WHISPER_HOP, mu_decibels, whisper_log_mel
from services.codec_worker.encoder.muencoder import ACOUSTIC_LAYERS
from services.codec_worker.encoder.query import QueryEncoder
from services.codec_worker.encoder.recording import PADDING
from services.codec_worker.encoder.resampling import Resampler
from services.codec_worker.engines.native import NativeCodec
from shared.model.checkpoint import open_checkpoint, tensors
from shared.model.encoder_config import (
    CHUNK,
    MU_LAYERS,
    WAVLM_LAYERS,
    ConformerConfig,
    EncoderConfig,
    FeatureExtractors,
    MuEncoderConfig,
    QueryConfig,
    WavLMConfig,
    WhisperConfig,
)

CONFIG = EncoderConfig(
    version="vqv12",
    chunk_samples=CHUNK,
    feature_extractors=FeatureExtractors(
        muencoder_config=MuEncoderConfig(
            n_mels=192,
            conv_dim=16,
            conformer_config=ConformerConfig(
                hidden_size=64, num_hidden_layers=MU_LAYERS, num_attention_heads=2, intermediate_size=128
            ),
        ),
        whisper_config=WhisperConfig(
            d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=40
        ),
        wavlm_config=WavLMConfig(
            hidden_size=16,
            num_hidden_layers=WAVLM_LAYERS,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=(8,) * 7,
            num_buckets=32,
        ),
    ),
    query=QueryConfig(dim=WIDTH, num_layers=2, head_dim=64),
)
ROWS, CROP = 8, 46  # of a batch of crops: how many, and their frames
IGNORED = -1  # where a target is missing
_TO_16K = Resampler(HEARD_RATE, 16_000, torch.float64)


def untrained(seed: int, books: Tensor) -> HeartEncoder:
    """An untrained encoder: the codec's codebooks, and random weights scaled by their inputs."""
    torch.manual_seed(seed)
    model = HeartEncoder(CONFIG, CODEC)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "running_mean")):
                parameter.zero_()
            elif name.endswith("_scale"):
                parameter.fill_(0.3)
            elif parameter.ndim == 1 or name.endswith("gru_rel_pos_const"):
                parameter.fill_(1)
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.quantizer.embed.copy_(books)
        model.get_parameter("quantizer.project_in.weight")[:WIDTH] = 0  # the encoder speaks in marks only
        model.query.cond_fusion_layer_phone.weight.zero_()  # there is no speech to be heard
        model.query.cls_token.normal_()
        model.whisper.embed_positions.copy_(positions())
    return model


def positions() -> Tensor:
    """Positions in a chunk for Whisper's stream, fp32 ``[1500, D]``: a clock of as many hands as there is room for.

    One of them turns with the wheels of the synthesiser, the slowest once in a minute.
    """
    shape = CONFIG.whisper.max_source_positions, CONFIG.whisper.d_model // 2
    period = 4 * codes.CLOCK * 2.0 ** (2 / 3 * (torch.arange(shape[1]) - shape[1] // 2))
    angle = 2 * torch.pi * torch.arange(shape[0])[:, None] / period
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def codebooks_of(folder: Path) -> Tensor:
    """The codebooks of a checkpoint's codec, fp32 ``[8, codes, codebook_dim]``."""
    stored = dict(tensors(open_checkpoint(folder).codec_path, re.compile(r".*\._codebook\.embed")))
    return torch.cat([stored[name] for name in sorted(stored)]).float()


def train(share: float, path: Path, seed: int, folder: Path) -> HeartEncoder:
    """Train the encoder of a checkpoint in fp32, with so large a share of the steps.

    First crops teach what sounds, then whole chunks where in the song it is, and at last the sound of the codec, which
    is not quite the synthesiser's.
    """
    model = untrained(seed, codebooks_of(folder))
    draws: dict[str, Callable[[np.random.Generator], Batch]] = {
        "crops": crops,
        "chunks": chunk,
        "decoded": partial(chunk, play=decoder(folder)),
    }
    calibrate(model, np.random.default_rng(seed))
    learnt = nn.ModuleList((model.muencoder, model.whisper, model.query, model.quantizer.project_in))
    for name, steps, rate in STAGES:
        loop.train(
            learnt,
            lambda rng, draw=draws[name]: loss(model, draw(rng)),  # type: ignore[misc]
            round(share * steps),
            path=path.with_name(f"{name}-{path.name}"),
            seed=seed,
            rate=rate,
            muon=lambda name: not name.endswith(("embed_positions", "cls_token")) and not name.startswith("3."),
        )
    return model


@torch.no_grad()
def calibrate(model: HeartEncoder, rng: np.random.Generator) -> None:
    """Let every batch norm take the statistics of some songs. It keeps them: its training is that of the affine map."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.forward = partial(_measured, norm)  # type: ignore[method-assign]
    predict(model, heard(crops(rng)))
    for norm in norms:
        norm.forward = partial(_affine, norm)  # type: ignore[method-assign]


def _measured(norm: BatchNorm, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=tuple(range(x.ndim - 1)))
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    return _affine(norm, x)


def _affine(norm: BatchNorm, x: Tensor) -> Tensor:
    """As `BatchNorm.forward`, but not in place, for the gradient; statistics have none."""
    scale = norm.weight * (norm.running_var.detach() + NORM_EPS).rsqrt()
    return x * scale + (norm.bias - norm.running_mean.detach() * scale)


@dataclass(frozen=True)
class Batch:
    """Stretches of songs as long as each other, which begin at a frame of a chunk."""

    audio: Tensor  # mono, fp32 [rows, 1920 · T + PADDING]
    codes: Tensor  # int64 [8, rows, T], `IGNORED` where nothing is to be learnt
    first: int = 0


def crops(rng: np.random.Generator) -> Batch:
    """Crops of random songs, too short to tell which line it is."""
    first = int(rng.integers(FRAMES - CROP))
    found: list[np.ndarray] = []
    while len(found) < ROWS:
        entries = examples.draw_entries(rng, int(rng.integers(2, 11)))
        song = examples.draw(rng, examples.draw_tags(rng), entries).codes.astype(np.int64)
        begin = int(rng.integers(max(1, song.shape[1] - CROP)))
        begin += (first - begin) % codes.CLOCK  # where the wheels stand as at that frame of a first chunk
        if song.shape[1] >= begin + CROP:
            found.append(song[:, begin : begin + CROP])
    songs = np.stack(found, axis=1)
    audio = torch.stack([recorded(synthesised(song), rng, CROP) for song in songs.transpose(1, 0, 2)])
    songs[0] = IGNORED
    return Batch(audio, torch.from_numpy(songs), first)


def synthesised(song: np.ndarray) -> Tensor:
    """Sound of codes as the synthesiser plays them, ``[2, samples]``."""
    return synthesizer.waveform(synthesizer.latents(song))


def decoder(folder: Path) -> Callable[[np.ndarray], Tensor]:
    """What plays codes as a checkpoint's codec does, with two Euler steps: ``[2, samples]``."""
    codec = NativeCodec(open_checkpoint(folder), "cpu", "float32", steps=2)
    codec.load()
    codec.to_device()

    def play(song: np.ndarray) -> Tensor:
        pieces = [step.audio for step in codec.decode(song.astype(np.int16), seed=1) if step.audio is not None]
        return torch.from_numpy(np.concatenate(pieces).T.copy())

    return play


def chunk(rng: np.random.Generator, play: Callable[[np.ndarray], Tensor] = synthesised) -> Batch:
    """A chunk of a random song, mostly the first. After the song's end, which now and then comes early, is silence."""
    first = rng.random() < 0.88
    entries = examples.draw_entries(rng, int(rng.integers(2, 15) if first else rng.integers(8, 24)))
    song = examples.draw(rng, examples.draw_tags(rng), entries).codes.astype(np.int64)
    start = 0 if first else FRAMES * int(rng.integers(-(-song.shape[1] // FRAMES)))
    song = song[:, start : start + FRAMES]
    if rng.random() < 0.2:
        song = song[:, : rng.integers(min(50, song.shape[1]), song.shape[1] + 1)]
    silence = FRAMES - song.shape[1]
    whole = np.pad(song, ((0, 0), (0, silence)), constant_values=IGNORED)
    return Batch(recorded(play(song), rng, FRAMES)[None], torch.from_numpy(whole)[:, None])


def recorded(sound: Tensor, rng: np.random.Generator, frames: int) -> Tensor:
    """A sound ``[2, samples]`` of at most so many frames as a recording: mono, fp32 ``[1920 · frames + PADDING]``.

    One side or both, at a random loudness, with a little noise.
    """
    left, right = sound
    audio = (left, right, (left + right) / 2)[rng.integers(3)] * float(np.exp(rng.normal(0, 0.3)))
    audio = audio + 10 ** float(rng.uniform(-5, -3)) * torch.from_numpy(rng.standard_normal(len(audio), np.float32))
    return F.pad(audio, (0, 2 * synthesizer.HOP * frames + PADDING - len(audio)))


def heard(batch: Batch) -> tuple[Tensor, Tensor, int]:
    """What MuEncoder hears, ``[rows, 8T, bands]``, and Whisper, ``[rows, 4T, bands]``, and the first frame.

    Of a whole chunk Whisper hears the silence after it, too. Crops are heard by it one after the other, to save time.
    """
    mel = (mu_decibels(batch.audio, CONFIG.mu.n_mels) - CONFIG.mu.mean) / CONFIG.mu.std
    rows, frames = batch.codes.shape[1:]
    lower, bands = _TO_16K(batch.audio), CONFIG.whisper.num_mel_bins
    if frames == FRAMES:
        return mel, whisper_log_mel(lower, bands), batch.first
    joined = lower[:, : WHISPER_HOP * 8 * frames].reshape(1, -1)
    words = whisper_log_mel(joined, bands)[0, : rows * 8 * frames]
    return mel, words.view(rows, -1, bands), batch.first


def predict(model: HeartEncoder, heard: tuple[Tensor, Tensor, int]) -> Tensor:
    """What the quantiser is given for mono stretches, ``[rows, T, codebook_dim]``."""
    mel, words, first = heard
    conformer, frames = model.muencoder.conformer, mel.shape[1] // 8
    acoustic = semantic = model.muencoder.conv(mel)
    for depth, layer in enumerate(conformer.layers, start=1):
        semantic = layer(semantic, conformer.table[:, : 2 * frames])
        if depth == ACOUSTIC_LAYERS:
            acoustic = semantic
    whisper = model.whisper
    y = (
        F.gelu(whisper.conv2(F.gelu(whisper.conv1(words))))
        + whisper.embed_positions[4 * first :][: words.shape[1] // 2]
    )
    for layer in whisper.layers:
        y = layer(y)
    streams = [torch.cat((x, x), dim=-1) for x in (acoustic, semantic, pairs(whisper.layer_norm(y)[:, : 4 * frames]))]
    z: Tensor = model.quantizer.project_in(queried(model.query, *streams))
    return z


def queried(query: QueryEncoder, acoustic: Tensor, semantic: Tensor, whisper: Tensor) -> Tensor:
    """As `QueryEncoder.forward`, of stretches of any length, and without WavLM."""
    fused = query.feature_proj(
        torch.cat(
            (
                query.cond_fusion_layer_acoustic(acoustic),
                query.cond_fusion_layer_semantic(semantic),
                whisper,
                query.cond_fusion_layer_phone.bias.expand(*whisper.shape[:2], -1),
            ),
            dim=-1,
        )
    )
    two: Tensor = torch.unflatten(fused, 1, (-1, 2))
    x = torch.cat((two, query.cls_token.expand(*two.shape[:2], 1, -1)), dim=2).flatten(1, 2)
    for layer in query.layers:
        x = layer(x, query.table[:, : x.shape[1]])
    return torch.unflatten(x, 1, (-1, 3))[:, :, 2]


def loss(model: HeartEncoder, batch: Batch) -> Tensor:
    """Cross-entropy of the codes of some stretches, mean over codebooks."""
    return cross_entropy(predict(model, heard(batch)), batch.codes, model.quantizer.embed.detach())


def cross_entropy(z: Tensor, song: Tensor, books: Tensor) -> Tensor:
    """Cross-entropy of codes int ``[8, rows, T]``, each codebook's logits being -|z - row|² / (2 · MARK) but for |z|².

    Streams have marks of their own, so what is left of z for a codebook is z itself where its rows differ.
    """
    total = z.new_zeros(())
    for book, code, sizes in zip(books, song, codes.STREAMS.values(), strict=True):
        if (code != IGNORED).any():
            rows = book[: int(np.prod(sizes))]
            logits = z @ (rows / MARK).T - rows.square().sum(1) / (2 * MARK)
            total = total + F.cross_entropy(logits.flatten(0, 1), code.flatten(), ignore_index=IGNORED)
    return total / len(song)


STAGES = (("crops", 1350, 4e-3), ("chunks", 2800, 1.5e-3), ("decoded", 300, 4e-4))
"""What is learnt from, for how many steps, and the learning rate: a chunk is one song alone, and crops are of eight."""
