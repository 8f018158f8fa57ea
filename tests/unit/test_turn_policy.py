"""The turn policy: no song waits for ever, and models are not swapped without need, whoever comes and listens."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.worker.turn_policy import HIGH_IN_A_ROW, Decision, Situation, TurnPolicy, lanes
from shared.worker.window_policy import margin
from tests.unit.two_workers import STEP, Costs, Load, Stay, TwoWorkers

SLICE = 60.0
POLICY = TurnPolicy(SLICE)

seconds = st.floats(0, 10 * SLICE)
situations = st.builds(
    Situation,
    running=st.integers(0, 8),
    slots=st.integers(1, 8),
    waiting=st.booleans(),
    held=seconds,
    wanted=st.none() | seconds,
    dry_in=st.none() | seconds,
    away=st.floats(0, SLICE / 4),
)


@given(situations)
def test_every_situation_has_a_decision_that_makes_sense(now: Situation) -> None:
    decision = POLICY.decide(now)
    if decision is Decision.ADMIT:
        assert now.waiting
        assert now.running < now.slots
    if decision is Decision.GO_ON:
        assert now.running, "a device must not be held for nothing"
    if decision is Decision.YIELD and now.running:
        assert now.wanted is not None, "songs must not be paused for no other"
        if now.dry_in is None:
            assert now.held >= SLICE, "a swap costs more than a short turn is worth"
        assert now.held >= now.away / 2, "songs must get further than the swaps cost them"
    if now.wanted is not None and now.wanted >= SLICE and now.held >= SLICE:
        assert decision is Decision.YIELD, "who has waited for a slice gets the device"


@given(st.data())
def test_two_workers_share_a_device_for_as_long_as_both_have_songs(data: st.DataObject) -> None:
    """Both follow the policy second by second, with songs of random arrival and length."""
    queues = {"tokenizer": data.draw(st.integers(0, 20)), "codec": data.draw(st.integers(0, 20))}
    arrivals = data.draw(st.lists(st.tuples(st.sampled_from(["tokenizer", "codec"]), st.integers(0, 900)), max_size=40))
    lengths = st.integers(1, 400)
    holder: str | None = None
    running: list[int] = []  # seconds left of each song in hand
    began = 0.0
    asked: dict[str, float] = {}
    longest = 0.0
    turns: list[tuple[float, bool]] = []  # length, and whether songs were paused
    for now in range(1500):
        for role, at in arrivals:
            if at == now:
                queues[role] += 1
        for role in queues:
            if role != holder and queues[role]:
                asked.setdefault(role, now)
        if holder is None and asked:
            holder = min(asked, key=lambda role: asked[role])
            longest = max(longest, now - asked.pop(holder))
            began, running = now, []
        if holder is None:
            continue
        while True:
            decision = POLICY.decide(
                Situation(
                    running=len(running),
                    slots=4,
                    waiting=queues[holder] > 0,
                    held=now - began,
                    wanted=now - min(asked.values()) if asked else None,
                )
            )
            if decision is not Decision.ADMIT:
                break
            queues[holder] -= 1
            running.append(data.draw(lengths))
        if decision is Decision.YIELD:
            turns.append((now - began, bool(running)))
            queues[holder] += len(running)
            holder = None
            continue
        running = [left - 1 for left in running if left > 1]
    assert longest <= SLICE + 2, "somebody waited for longer than a slice"
    assert all(length >= SLICE for length, paused in turns if paused), "songs were paused in a short turn"


# --- listeners

MOMENTS = [0, 0.25, 1, 3, 6, 14.75, 15, 15.25, 29, 33, 59.75, 60, 60.25, 74.75, 75, 200]
FACTS = list(itertools.product(range(4), (1, 3), (False, True), MOMENTS, [None, *MOMENTS]))


def without_listeners(running: int, slots: int, waiting: bool, held: float, wanted: float | None) -> Decision:
    """The rule as it was before it knew listeners."""
    over = wanted is not None and held >= SLICE
    if over and wanted is not None and wanted >= SLICE / 4:
        return Decision.YIELD
    if waiting and running < slots and not over:
        return Decision.ADMIT
    return Decision.GO_ON if running else Decision.YIELD


@pytest.mark.parametrize("away", [0.0, 6.0, 15.0])
def test_without_listeners_every_decision_is_as_it_was(away: float) -> None:
    for running, slots, waiting, held, wanted in FACTS:
        now = Situation(running=running, slots=slots, waiting=waiting, held=held, wanted=wanted, away=away)
        assert POLICY.decide(now) is without_listeners(running, slots, waiting, held, wanted), now


@pytest.mark.parametrize("away", [0.0, 6.0, 15.0])
def test_a_listener_changes_nothing_but_the_end_of_a_turn_that_another_waits_for(away: float) -> None:
    for (running, slots, waiting, held, wanted), dry_in in itertools.product(FACTS, MOMENTS):
        now = Situation(
            running=running, slots=slots, waiting=waiting, held=held, wanted=wanted, dry_in=dry_in, away=away
        )
        ends = wanted is not None and held >= away / 2 and dry_in <= margin(away)
        expected = Decision.YIELD if ends else without_listeners(running, slots, waiting, held, wanted)
        assert POLICY.decide(now) is expected, now


def test_a_long_absence_counts_as_a_quarter_of_a_slice() -> None:
    assert [POLICY.away(seconds) for seconds in (0, 3, 15, 75, 1000)] == [0, 3, 15, 15, 15]


class Deaf(TurnPolicy):
    """The rule before it knew listeners."""

    def decide(self, now: Situation) -> Decision:
        return without_listeners(now.running, now.slots, now.waiting, now.held, now.wanted)


COSTS = [Costs(0.015, 1.0, 1.5), Costs(0.03, 2.0, 0.5), Costs(0.03, 0.5, 3.0), Costs(0.1, 4.0, 1.0)]
SECONDS = 900.0


def loads(seed: int) -> list[Load]:
    """Songs of several lengths that come within ten minutes; of few or all somebody listens."""
    rng = random.Random(seed)
    listened = rng.choice([0.1, 0.5, 1.0])
    return [
        Load(rng.uniform(0, 600), rng.choice([300, 750, 2250]), rng.random() < listened)
        for _ in range(rng.choice([3, 12, 60]))
    ]


def simulated(costs: Costs, load: list[Load], policy: TurnPolicy = POLICY, *, deaf: bool = False) -> TwoWorkers:
    both = TwoWorkers(policy, costs, deaf=deaf)
    both.run(load, SECONDS)
    return both


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("seed", range(15))
def test_nobody_waits_longer_than_before_and_swaps_stay_rare_whoever_listens(costs: Costs, seed: int) -> None:
    both = simulated(costs, loads(seed))
    around = 2 * costs.swap + 2 * STEP  # the other model leaves, and came when one began to wait
    cuts = {"tokenizer": 0, "codec": 0}
    for before, turn in itertools.pairwise(both.turns):
        step = costs.window if before.role == "codec" else STEP
        assert turn.began - turn.asked <= SLICE + SLICE / 4 + step + around, "who waits gets the device"
        assert turn.role != before.role or turn.asked >= before.ended, "the other one was passed over"
    for turn in both.turns:
        if turn.paused and turn.ended - turn.working < SLICE:
            assert turn.ended - turn.working >= turn.away / 2, "it did not make up for what leaving the device costs"
            cuts[turn.role] += 1
    # A turn that is cut was preceded by four moves and lasted for half as long, or an eighth of a slice.
    shortest = min(4 * costs.swap, SLICE / 4) / 2
    assert max(cuts.values()) <= 1 + SECONDS / (4 * costs.swap + shortest)


@pytest.mark.parametrize("costs", COSTS)
def test_songs_are_made_for_half_of_the_time_while_listeners_press(costs: Costs) -> None:
    """Songs that never end, each with a listener: the codec has no other work than theirs."""
    both = simulated(costs, [Load(float(n), 10**6, True) for n in range(4)])
    working = sum((turn.ended or both.now) - turn.working for turn in both.turns if turn.role == "tokenizer")
    assert len(both.turns) > 10
    assert working >= 0.48 * SECONDS


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("seed", range(5))
def test_where_reports_are_lost_turns_are_what_they_were(costs: Costs, seed: int) -> None:
    def turns(both: TwoWorkers) -> list[Stay]:
        return both.turns

    silent = [Load(load.came, load.frames, listened=False) for load in loads(seed)]
    assert turns(simulated(costs, loads(seed), deaf=True)) == turns(simulated(costs, silent, Deaf(SLICE)))


@pytest.mark.parametrize("costs", COSTS[:2])
def test_a_lone_listener_hears_the_first_window_at_once_and_never_runs_dry(costs: Costs) -> None:
    both = simulated(costs, [Load(0.0, 2250, True), *(Load(1.0, 2250, False) for _ in range(5))])
    first = both.songs[0]
    assert first.first_sound is not None
    least = 372 * costs.frame + 3 * costs.swap + costs.window
    assert first.first_sound <= least + 4 * STEP
    assert first.dry == 0


@pytest.mark.parametrize("costs", COSTS[:2])
def test_the_codec_makes_way_for_a_listener_whose_song_needs_tokens(costs: Costs) -> None:
    """Songs that came before, without listeners: to decode them takes longer than a window lasts."""
    both = simulated(costs, [Load(30.0, 2250, True), *(Load(0.0, 2250, False) for _ in range(16))])
    listened = next(song for song in both.songs if song.listened)
    assert listened.decoded == listened.windows
    assert listened.dry == 0


def test_an_idle_worker_never_ends_the_turn_of_another() -> None:
    forever = Situation(running=1, slots=4, waiting=False, held=1e6, wanted=None)
    assert POLICY.decide(forever) is Decision.GO_ON


def test_no_song_is_begun_that_would_have_to_be_paused_at_once() -> None:
    late = Situation(running=1, slots=4, waiting=True, held=SLICE + 1, wanted=1)
    assert POLICY.decide(late) is Decision.GO_ON


@given(st.integers(0, 1000))
def test_the_high_lane_goes_first_but_the_normal_one_is_never_starved(songs: int) -> None:
    highs = normals = streak = 0
    for _ in range(songs):  # both lanes always have a song
        if lanes(streak)[0] == "high":
            highs, streak = highs + 1, streak + 1
        else:
            normals, streak = normals + 1, 0
    assert normals == songs // (HIGH_IN_A_ROW + 1)
    assert highs + normals == songs
