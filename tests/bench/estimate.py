"""Estimate of a frame's time on cards from their datasheets: ``python -m tests.bench.estimate`` prints its table.

A frame's kernels wait for each other, so their times add up:

    t = max(W / (r · B), F / (u · P)) + K / (r · B) + n · l + o

W are the bytes of weights that a frame reads, K those of keys and values, F its operations on weights, n its launches;
B is a card's memory bandwidth and P its rate of dense 16-bit products. Assumed are r, the part of B that kernels reach;
l, the time from the end of a kernel in a graph until the next one runs at full speed; u, the part of P that products of
few rows reach; and o, what passes between two frames.
"""

from dataclasses import dataclass

from tests.bench.checkpoints import OFFICIAL_LM, frame_weights

LAUNCHES = 526  # a frame, from 1 to 16 songs, and 28 fewer for 32: `make bench BENCH=launches` counts them
BYTES = 2  # of a weight, and of an entry of a cache: bfloat16


@dataclass(frozen=True)
class Card:
    """A card's datasheet."""

    name: str
    gb_per_s: float  # of its memory
    tflop_per_s: float  # dense, 16-bit factors, sums in fp32
    aim: float  # of one song: times the floor of weights


CARDS = (
    Card("RTX 3090", 936, 71, 1.3),
    Card("RTX 4090", 1008, 165, 1.3),
    Card("RTX 5090", 1792, 209, 1.3),
    Card("H100 SXM", 3350, 989, 1.5),
)


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """What cannot be read from a datasheet."""

    reach: float  # r
    launch_us: float  # l
    products: float  # u
    between_us: float  # o


LOW = Assumption(reach=0.92, launch_us=1.2, products=0.7, between_us=20)
HIGH = Assumption(reach=0.82, launch_us=2.0, products=0.4, between_us=60)
SONGS, POSITIONS = (1, 8, 16, 32), (512, 2048)
RATIO = 1.8  # aim: sixteen songs at position 2,048, times one


def floor_ms(card: Card) -> float:
    """Milliseconds in which a card reads the weights of a frame once."""
    return frame_weights(OFFICIAL_LM) * BYTES / card.gb_per_s / 1e6


def frame_ms(card: Card, songs: int, position: int, assumed: Assumption) -> float:
    """Milliseconds of a frame of so many guided songs at a position."""
    weights, backbone, rows = frame_weights(OFFICIAL_LM), OFFICIAL_LM.backbone, 2 * songs
    entries = 2 * backbone.num_layers * backbone.num_kv_heads * backbone.head_dim  # of a position and row
    reached = assumed.reach * card.gb_per_s * 1e6  # bytes a millisecond
    products = 2 * weights * rows / (assumed.products * card.tflop_per_s * 1e9)
    read = max(weights * BYTES / reached, products)
    return (
        read + rows * position * entries * BYTES / reached + (LAUNCHES * assumed.launch_us + assumed.between_us) / 1000
    )


def verdict(low: float, high: float, aim: float) -> str:
    """Whether a figure between `low` and `high` meets an aim."""
    return "yes" if high <= aim else "no" if low > aim else "at the lower end"


def table() -> str:
    """All estimates as Markdown, then the aims."""
    lines = ["| ms a frame | floor | position | " + " | ".join(f"{songs} songs" for songs in SONGS) + " |"]
    lines.append("|---" * (3 + len(SONGS)) + "|")
    for card in CARDS:
        for position in POSITIONS:
            cells = [
                f"{frame_ms(card, songs, position, LOW):.1f}–{frame_ms(card, songs, position, HIGH):.1f}"
                for songs in SONGS
            ]
            first = (card.name, f"{floor_ms(card):.1f}") if position == POSITIONS[0] else ("", "")
            lines.append("| " + " | ".join([*first, f"{position:,}", *cells]) + " |")
    lines += ["", "| aim at position 2,048 | one song ÷ floor | aim | reached | sixteen ÷ one | aim | reached |"]
    lines.append("|---" * 7 + "|")
    for card in CARDS:
        ones = [frame_ms(card, 1, 2048, assumed) for assumed in (LOW, HIGH)]
        alone = [one / floor_ms(card) for one in ones]
        many = [frame_ms(card, 16, 2048, assumed) / one for assumed, one in zip((LOW, HIGH), ones, strict=True)]
        cells = []
        for (low, high), aim in ((sorted(alone), card.aim), (sorted(many), RATIO)):
            cells += [f"{low:.2f}–{high:.2f}", f"{aim}", verdict(low, high, aim)]
        lines.append("| " + " | ".join([card.name, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
