"""The codec: codebooks and scalar decoder in closed form, and the training of the estimator between them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ckpt.training import codes, examples, loop, synthesizer
from ckpt.training.music import TIMBRES
from ckpt.training.synthesizer import TABLES
from services.codec_worker.model.estimator import Block
from services.codec_worker.model.flow_matching import GUIDANCE, STEPS
from services.codec_worker.model.heartcodec import HeartCodec
from services.codec_worker.model.waveform_decoder import Activation, Convolution, UpsamplingBlock, WaveformDecoder
from shared.model.checkpoint import CodecConfig

WIDTH = 192
_RANKS = {"melody": 72, "chord": 54, "bass": 23}
_DRUM_STATES = sum(ages - 1 for ages in codes.DRUM_AGES)
assert sum(_RANKS.values()) + codes.CLOCK + len(TIMBRES) + _DRUM_STATES == WIDTH
MARKED = {stream: codes.says(stream) for stream in codes.STREAMS}
MARKS = sum(table.shape[1] for table in MARKED.values())
MARK = 32.0
FACTORS = (10, 2, 4, 4, 3)  # of upsampling; together `synthesizer.HOP`
CONFIG = CodecConfig(
    dim=WIDTH,
    codebook_size=codes.CODES,
    codebook_dim=WIDTH + MARKS,
    num_quantizers=len(codes.STREAMS),
    attention_head_dim=32,
    in_channels=2 * 256 + WIDTH,
    num_attention_heads=4,
    num_layers=1,
    num_layers_2=2,
    out_channels=256,
    sample_rate=synthesizer.SAMPLE_RATE,
    num_samples=1,
    upsample_factors=list(FACTORS),
    upsample_kernel_sizes=[2 * factor for factor in FACTORS],
    latent_hidden_dim=synthesizer.CHANNELS,
    default_kernel_size=1,
    delay_kernel_size=1,
    init_channel=6,
    res_kernel_size=1,
)
TRAINED_STEPS, RATE = 9_000, 2e-3
UNIT = 8 / synthesizer.SCALE
"""Latents are learnt at this scale; `fold` puts the other into the weights."""


def untrained(seed: int) -> HeartCodec:
    """An untrained codec: closed-form codebooks and decoder, random weights of the estimator scaled by their inputs."""
    torch.manual_seed(seed)
    model = HeartCodec(CONFIG, torch.float32)
    with torch.no_grad():
        model.quantizer.embed.copy_(codebooks())
        unmarked(model.quantizer.project_out)
        model.quantizer.cond_feature_emb.weight.copy_(2 * torch.eye(WIDTH))
        model.quantizer.cond_feature_emb.bias.zero_()
        write_down(model.scalar)
        for name, parameter in model.estimator.named_parameters():
            if name.endswith(("bias", "adaln_single.linear.weight")) or "scale_shift_table" in name:
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for block in model.estimator.modules():
            if isinstance(block, Block):
                block.scale_shift_table[[2, 5]] = 1  # the gates: blocks take part from the start
                block.o_proj.weight.mul_(0.1)
                block.down.weight.mul_(0.5)
        model.estimator.proj_out.linear.weight.mul_(0.2)
    return model


def unmarked(projection: nn.Module) -> None:
    """Let the projection out of the codebooks' space take what sounds, and leave the marks."""
    assert isinstance(projection, nn.Linear)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(WIDTH, WIDTH + MARKS))
        projection.bias.zero_()


def codebooks() -> Tensor:
    """Codebooks, fp32 ``[8, CODES, WIDTH + MARKS]``: what sounds of a code, then its marks.

    A stream has entries of its own in both, so that their sum loses nothing. Marks say each field of a code, sounding
    or not, and are so large that the encoder need not say anything else. Rows that no code names are far from all
    others.
    """
    books = sounding()
    marks, first = np.zeros((*books.shape[:2], MARKS), np.float32), 0
    for book, table in zip(marks, MARKED.values(), strict=True):
        book[:, first : first + table.shape[1]] = MARK
        book[: len(table), first : first + table.shape[1]] *= table
        first += table.shape[1]
    return torch.from_numpy(np.concatenate((books, marks), axis=2))


def sounding() -> np.ndarray:
    """What sounds of each code, fp32 ``[8, CODES, WIDTH]``.

    The gains of melody, chord and bass are reduced by a singular value decomposition to as many entries as are given to
    them; clock, timbre and drums are one-hot. The streams that do not sound are 0.
    """
    books = np.zeros((len(codes.STREAMS), codes.CODES, WIDTH), np.float32)
    number = {stream: index for index, stream in enumerate(codes.STREAMS)}
    first = 0
    for stream, rank in _RANKS.items():
        table = TABLES[stream].reshape(len(TABLES[stream]), -1)
        left, values, _ = np.linalg.svd(table, full_matrices=False)
        rows = left[:, :rank] * values[:rank] ** 0.5  # the root: faint details are to be seen, too
        books[number[stream], : len(rows), first : first + rank] = rows / rows.std(0).max()
        first += rank
    for code in range(int(np.prod(codes.STREAMS["wheels"]))):
        clock, timbre = np.unravel_index(code, codes.STREAMS["wheels"])
        books[number["wheels"], code, [first + clock, first + codes.CLOCK + timbre]] = 1
    first += codes.CLOCK + len(TIMBRES)
    for code in range(int(np.prod(codes.STREAMS["drums"]))):
        place = first
        for age, ages in zip(np.unravel_index(code, codes.STREAMS["drums"])[:-1], codes.DRUM_AGES, strict=True):
            if age:
                books[number["drums"], code, place + age - 1] = 1
            place += ages - 1
    return books


def write_down(decoder: WaveformDecoder) -> None:
    """Make the decoder the synthesiser's filter bank: latents times `KERNELS`, overlapped and added.

    Its transposed convolutions are as long as two strides, the kernels as two latents. So the first of them can turn a
    latent into stretches of 96 samples, as channels, and what follows has only to lay channels out as time; residual
    units add nothing. The default guidance is undone here: where the estimator says 0 without conditioning, guidance is
    a factor.
    """
    kernels = synthesizer.KERNELS / GUIDANCE  # [128, 2 · HOP]
    for parameter in decoder.parameters():
        parameter.zero_()
    first, *stages, last = decoder.decoder
    assert isinstance(first, Convolution)
    assert isinstance(last, Convolution)
    first.weight[: len(kernels), 0] = torch.eye(len(kernels))
    for module in decoder.modules():
        if isinstance(module, Activation):
            module.weight.fill_(1)
    for number, stage in enumerate(stages):
        assert isinstance(stage, UpsamplingBlock)
        weight = stage.up_conv.weight  # [2 · stride, outputs, inputs]
        if number == 0:
            stretches = kernels.view(len(kernels), len(weight), -1).permute(1, 2, 0)
            weight[:, : stretches.shape[1], : len(kernels)] = stretches
            width = stretches.shape[1]
        else:
            stride = len(weight) // 2
            width //= stride
            for step in range(stride):
                weight[step, :width, step * width : (step + 1) * width] = torch.eye(width)
    last.weight[0, 0, 0] = 1


def train(steps: int, path: Path, seed: int) -> HeartCodec:
    """Train the codec in fp32. Its latents are at `UNIT` of their scale until they are folded."""
    model = untrained(seed)
    learnt = nn.ModuleList((model.estimator, model.quantizer.cond_feature_emb))
    loop.train(
        learnt,
        lambda rng: loss(model, rng),
        steps,
        path=path,
        seed=seed,
        rate=RATE,
        muon=lambda name: "adaln" not in name and "scale_shift" not in name,
    )
    return model


def batch(rng: np.random.Generator) -> np.ndarray:
    """Crops of random songs, int ``[rows, 8, T]``: mostly short, now and then whole windows."""
    rows, frames = (24, 32) if rng.random() < 7 / 8 else (2, 372)
    found: list[np.ndarray] = []
    while len(found) < rows:
        entries = examples.draw_entries(rng, int(rng.integers(1, 5) if frames < 100 else rng.integers(9, 16)))
        song = examples.draw(rng, examples.draw_tags(rng), entries).codes
        for _ in range(3):
            if song.shape[1] > frames:
                start = rng.integers(song.shape[1] - frames)
                found.append(song[:, start : start + frames])
    return np.stack(found[:rows])


@torch.autocast("cpu", torch.bfloat16)  # type: ignore[untyped-decorator]
def loss(model: HeartCodec, rng: np.random.Generator) -> Tensor:
    """Flow matching (Lipman et al. 2023) on a random batch: squared error of the velocity over the latents' power.

    On the path from noise to latents lie latents that are off, as the estimator's own are; so it learns to believe the
    codes rather than what it said a step before.
    """
    songs = batch(rng)
    target = torch.stack([synthesizer.latents(song) for song in songs]) * UNIT
    power = target.square().mean()
    mu = torch.stack([model.quantizer(song) for song in torch.from_numpy(songs.astype(np.int64))])
    if rng.random() < 1 / 16:  # without conditioning there is silence
        mu, target = torch.zeros_like(mu), torch.zeros_like(target)
    step = 0 if rng.random() < 0.6 else int(rng.integers(1, STEPS))
    t = step / STEPS
    noise = UNIT * torch.from_numpy(rng.standard_normal(target.shape, np.float32))
    wrong = target * rng.uniform(0.5, 1.5) + target.roll(1, 0) * rng.random()
    context = torch.zeros_like(target)
    if rng.random() < 0.2:
        known = int(rng.integers(target.shape[1] // 2))
        context[:, :known] = target[:, :known]
    x = (1 - t) * noise + t * wrong
    velocity = model.estimator(
        torch.cat((x, context, mu), -1), model.estimator.modulation(torch.tensor([t], dtype=torch.float32)), 0
    )
    error: Tensor = (velocity - (target - noise)).square().mean() / power
    return error


@torch.no_grad()
def fold(model: HeartCodec) -> None:
    """Rescale the estimator's weights, so that its latents have the scale of `synthesizer.latents`, for noise of 1."""
    estimator = model.estimator
    for projection in (estimator.proj_in, estimator.connection_proj):
        projection.weight[..., :512].mul_(UNIT)  # latents and context
    estimator.proj_out.linear.weight.div_(UNIT)
    estimator.proj_out.linear.bias.div_(UNIT)
