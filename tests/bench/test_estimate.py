"""The estimate of a frame's time: its limits, and that the documents give its table."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.estimate import CARDS, HIGH, LOW, Assumption, floor_ms, frame_ms, table

IDEAL = Assumption(reach=1, launch_us=0, products=1, between_us=0)


def test_documents_give_the_estimates() -> None:
    page = (Path(__file__).parents[2] / "docs/gpu.md").read_text()
    assert table() in page, "run `python -m tests.bench.estimate` and put its table into docs/gpu.md"


def test_without_losses_a_frame_is_its_bytes() -> None:
    """Weights alone take the time of the floor; a song at 2,048 positions reads 0.46 to 0.47 GB besides."""
    for card in CARDS:
        assert frame_ms(card, 1, 0, IDEAL) == pytest.approx(floor_ms(card))
        added = frame_ms(card, 1, 2048, IDEAL) - floor_ms(card)
        assert 0.46 < added * card.gb_per_s / 1e3 < 0.475


def test_a_frame_takes_longer_with_more_songs_positions_and_losses() -> None:
    for card in CARDS:
        assert frame_ms(card, 1, 512, LOW) < frame_ms(card, 1, 512, HIGH)
        assert frame_ms(card, 1, 512, LOW) < frame_ms(card, 1, 2048, LOW) < frame_ms(card, 8, 2048, LOW)
        launches = frame_ms(card, 1, 512, replace(LOW, launch_us=2.2)) - frame_ms(card, 1, 512, LOW)
        assert launches == pytest.approx(0.526)


def test_products_of_many_rows_may_take_longer_than_the_weights() -> None:
    small = CARDS[0]
    slow = replace(IDEAL, products=0.1)
    assert frame_ms(small, 1, 0, slow) == pytest.approx(floor_ms(small))
    assert frame_ms(small, 32, 0, slow) > 3 * floor_ms(small)
