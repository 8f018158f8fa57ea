"""Training of the language model: prompts and codes in, the next frame's codes out."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ckpt.training import codes, examples, loop, words
from ckpt.training.music import ENTRIES
from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.llama import Block, Llama, Span
from shared.model.checkpoint import Flavor, LMConfig

POSITIONS = 2048
END = codes.CODES  # the first code that no stream has
CONFIG = LMConfig(
    version="demo",
    backbone=Flavor(
        num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=160, intermediate_dim=448, max_seq_len=POSITIONS
    ),
    decoder=Flavor(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=96, intermediate_dim=256, max_seq_len=64),
    text_vocab_size=len(words.TOKENS),
    audio_vocab_size=codes.CODES + 1,
    num_codebooks=len(codes.STREAMS),
    muq_dim=16,
)
STEPS, RATE = 6000, 3e-3
ROWS, FRAMES = 12, 320  # of a batch
DEEP = 5  # of so many frames one is given to the depth decoder, but all of those at which a bar begins
UNCONDITIONAL = 0.1  # of the songs are learnt without their prompt, for guidance


class Fields(nn.Module):
    """A table with a row for each code or token, which is the sum of a row for each of its fields.

    So what is learnt of one code holds for all that share a field with it. For training alone: afterwards the rows are
    what they add up to.
    """

    says: Tensor  # [rows, fields], 0 or 1

    def __init__(self, says: Tensor) -> None:
        super().__init__()
        self.register_buffer("says", says, persistent=False)

    def forward(self, fields: Tensor) -> Tensor:
        """Add up the rows of the fields, ``[fields, D]`` → ``[rows, D]``."""
        return self.says @ fields

    def right_inverse(self, rows: Tensor) -> Tensor:
        """Random rows of fields whose sums are as large as these rows."""
        return rows.new_empty(self.says.shape[1], rows.shape[1]).normal_() * rows.std() / self.says.sum(1).mean().sqrt()


def says(stream: str) -> Tensor:
    """The fields of each code of a stream, and of `END`, as 0 or 1, fp32 ``[END + 1, fields]``; other codes say
    nothing."""
    table = codes.says(stream)
    whole = torch.zeros(END + 1, table.shape[1] + 1)
    whole[: len(table), :-1] = torch.from_numpy(table)
    whole[END, -1] = 1
    return whole


def untrained(seed: int) -> HeartMuLa:
    """An untrained model: random weights scaled by their inputs; embeddings and heads are made of `Fields`."""
    torch.manual_seed(seed)
    model = HeartMuLa(CONFIG, torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter) if "bias" not in name else nn.init.zeros_(parameter)
        else:
            embedding = "embeddings" in name or name == "unconditional"
            nn.init.normal_(parameter, std=0.3 if embedding else parameter.shape[1] ** -0.5)
        if name.endswith(("output.weight", "down.weight")):
            with torch.no_grad():
                parameter.mul_(0.3)
    parametrize.register_parametrization(model, "text_embeddings", Fields(torch.from_numpy(words.says())))
    tables = [says(stream) for stream in codes.STREAMS]
    parametrize.register_parametrization(model, "audio_embeddings", Fields(torch.block_diag(*tables)))  # type: ignore[no-untyped-call]
    for head, table in zip((model.head, *model.depth_heads), tables, strict=True):
        parametrize.register_parametrization(head, "weight", Fields(table))
    return model


def finished(model: HeartMuLa) -> HeartMuLa:
    """Replace every sum of `Fields` by an ordinary table; returns the model."""
    for name in ("text_embeddings", "audio_embeddings"):
        parametrize.remove_parametrizations(model, name, leave_parametrized=True)
    for head in (model.head, *model.depth_heads):
        parametrize.remove_parametrizations(head, "weight", leave_parametrized=True)
    return model


def train(steps: int, path: Path, seed: int) -> HeartMuLa:
    """Train the model in fp32."""
    model = untrained(seed)
    loop.train(
        model,
        lambda rng: loss(model, rng),
        steps,
        path=path,
        seed=seed,
        rate=RATE,
        muon=lambda name: ".blocks." in name or name.startswith("projection"),
    )
    return finished(model)


def batch(rng: np.random.Generator) -> tuple[list[Tensor], Tensor, int]:
    """Token ids of the prompts' tags, of their lyrics, int64 ``[ROWS, …]``; codes ``[ROWS, 1 + FRAMES, 8]``; and the
    frame that comes second of them.

    Prompts of a batch are of one length. Of the codes the first frame is what is fed first; it is −1 where that is the
    end of the prompt. Frames after a song's end are −1, too.
    """
    count = int(rng.integers(0, 13) if rng.random() < 0.8 else rng.integers(13, ENTRIES + 1))
    tags = int(rng.integers(5))
    found = [examples.draw(rng, examples.draw_tags(rng, tags), examples.draw_entries(rng, count)) for _ in range(ROWS)]
    asked = [[words.BOS, *map(words.tag_id, song.tags.values()), words.EOS] for song in found]
    lyrics = [[words.BOS, *words.lyrics_ids(song.entries), words.EOS] for song in found]
    longest = max(song.codes.shape[1] for song in found)
    last = min(longest - FRAMES // 2, POSITIONS - FRAMES - ENTRIES - 16)
    start = 0 if rng.random() < 0.6 else int(rng.integers(max(1, last)))
    framed = np.full((ROWS, 1 + FRAMES, CONFIG.num_codebooks), -1)
    for row, song in zip(framed, found, strict=True):
        whole = np.full((song.codes.shape[1] + 2, CONFIG.num_codebooks), -1)
        whole[1:-1] = song.codes.T
        whole[-1, 0] = END
        part = whole[start : start + 1 + FRAMES]
        row[: len(part)] = part
    return [torch.tensor(asked), torch.tensor(lyrics)], torch.from_numpy(framed), start


@parametrize.cached()
def loss(model: HeartMuLa, rng: np.random.Generator) -> Tensor:
    """Cross-entropy of a random batch in nats a frame."""
    (tags, lyrics), framed, start = batch(rng)
    hidden, targets = backbone(model, tags, lyrics, framed, start, torch.from_numpy(rng.random(ROWS) < UNCONDITIONAL))
    known = targets[..., 0] >= 0  # [ROWS, FRAMES]
    weight = importance(targets, framed[:, :-1])
    hidden, targets, weight = hidden[known], targets[known], weight[known]
    first = F.cross_entropy(model.head(hidden[:, None])[:, 0].float(), targets[:, 0], reduction="none")
    total = (first * weight).sum() / weight.sum()
    deep = (targets[:, 0] != END) & ((weight > 1) | torch.from_numpy(rng.random(len(targets)) < 1 / DEEP))
    return total + depth(model, hidden[deep], targets[deep], weight[deep])


def importance(targets: Tensor, before: Tensor) -> Tensor:
    """Weight of each frame in the loss, fp32 ``[ROWS, FRAMES]``; ``before`` are the frames before the targets.

    What the prompt decides shows in few frames: all of the style in a song's first, a line's length where it begins.
    """
    bar = torch.from_numpy(np.isin(targets[..., 2].numpy(), BAR_STARTS))
    part = targets[..., 0] != before[..., 0]
    return 1.0 + 2 * bar + 16 * part + 80 * (before[..., 0] < 0)


BAR_STARTS = [codes.beat(tempo, beats, 0) for tempo in range(3) for beats in (3, 4)]


def backbone(
    model: HeartMuLa, tags: Tensor, lyrics: Tensor, framed: Tensor, start: int, blind: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden states ``[ROWS, FRAMES, D]`` at the positions before each target, and the targets, ``[ROWS, FRAMES, 8]``.

    The frames before `start` are left out, and those after it are where they would be. `blind` rows, bool ``[ROWS]``,
    do not see their prompt.
    """
    rows = len(framed)
    muq = model.muq_bias.expand(rows, 1, -1)
    prompt = torch.cat((F.embedding(tags, model.text_embeddings), muq, F.embedding(lyrics, model.text_embeddings)), 1)
    prompt = torch.where(blind[:, None, None], model.unconditional, prompt)
    length = prompt.shape[1]
    fed = framed[:, :-1] if start else framed[:, 1:-1]
    x = torch.cat((prompt, model.embed_frames(fed.clamp(min=0))), 1)
    rope = model.backbone.rope
    before = length + max(start - 1, 0)
    table = torch.cat((rope[:length], rope[before : before + fed.shape[1]]))
    hidden = stack(model.backbone, x, table)
    return hidden[:, -FRAMES:], framed[:, 1:]


def depth(model: HeartMuLa, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of codebooks 1 … 7 of some frames: hidden ``[n, D]``, targets ``[n, 8]``, weight ``[n]``."""
    va, books = CONFIG.audio_vocab_size, CONFIG.num_codebooks
    fed = F.embedding(targets[:, :-1] + torch.arange(0, va * (books - 1), va), model.audio_embeddings)
    x = model.projection(torch.cat((hidden[:, None], fed), 1))
    out = stack(model.decoder, x, model.decoder.rope[:books])
    total = hidden.new_zeros(())
    for book, head in enumerate(model.depth_heads, start=1):
        found = F.cross_entropy(head(out[:, book : book + 1])[:, 0].float(), targets[:, book], reduction="none")
        total = total + (found * weight).sum() / weight.sum()
    return total


def stack(llama: Llama, x: Tensor, table: Tensor) -> Tensor:
    """All positions of ``x [rows, S, D]`` through a stack and its final norm, differentiably; its cache is dropped."""
    rows, steps, _ = x.shape
    at = torch.arange(steps)
    span = Span(0, steps, (at <= at[:, None]).repeat(llama.shared, 1))
    for block in llama.blocks:
        assert isinstance(block, Block)
        shape = (rows, block.kv_heads, steps, block.head_dim)
        x = block(x, table, [(torch.zeros(shape), torch.zeros(shape))], [span])
    return llama.norm(x)
