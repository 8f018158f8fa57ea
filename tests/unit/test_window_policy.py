"""When the windows of a song that is being made are published: exhaustively, for every kind of facts."""

import itertools

import pytest

from shared.model.codec_windows import CodecWindows, windows_of
from shared.settings import Settings
from shared.worker.window_policy import Publish, Windows, decide, margin

AWAY = [0.0, 0.5, 7.0, 15.0]
DRY_IN = [0.0, 1.0, 3.0, 3.01, 4.0, 17.0, 17.01, 33.0, 33.01, 500.0]


@pytest.mark.parametrize(("waiting", "stay", "away"), list(itertools.product(range(-1, 4), (False, True), AWAY)))
def test_every_kind_of_facts_has_its_decision(waiting: int, stay: bool, away: float) -> None:
    def decision(dry_in: float | None) -> Publish:
        return decide(Windows(waiting=waiting, models_stay=stay, dry_in=dry_in), away)

    expected: dict[float | None, Publish]
    if waiting <= 0:  # the codec may have decoded more than is saved: tokens were lost and are made again
        expected = dict.fromkeys([None, *DRY_IN], Publish.NOT_YET)
    elif stay:
        expected = dict.fromkeys([None, *DRY_IN], Publish.NOW)
    else:
        expected = {None: Publish.NOT_YET}
        for dry_in in DRY_IN:
            expected[dry_in] = Publish.NOW if dry_in <= 2 * away + 3 else Publish.ON_LEAVING
    assert {dry_in: decision(dry_in) for dry_in in expected} == expected


def test_the_margin_grows_with_what_a_handover_takes() -> None:
    assert [margin(away) for away in AWAY] == [3.0, 4.0, 17.0, 33.0]


@pytest.mark.parametrize("windows", [CodecWindows(), CodecWindows(50, 25), CodecWindows(10, 10), CodecWindows(7, 1)])
def test_a_window_is_final_when_its_last_code_is_there(windows: CodecWindows) -> None:
    for frames in range(4 * windows.length):
        whole = [n for n in range(5000) if n * windows.hop + windows.length <= frames]
        assert windows.final(frames) == len(whole)


def test_the_windows_are_those_of_the_engine() -> None:
    assert windows_of(Settings(engine="native", trivial_window=(9, 8))) == CodecWindows(372, 320)
    assert windows_of(Settings(engine="trivial", trivial_window=(9, 8))) == CodecWindows(9, 8)
    assert windows_of(Settings(engine="heartlib")) is None
