"""The turn policy: no song waits for ever, and models are not swapped without need, whenever songs arrive."""

from hypothesis import given
from hypothesis import strategies as st

from shared.worker.turn_policy import HIGH_IN_A_ROW, Decision, Situation, TurnPolicy, lanes

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
        assert now.held >= SLICE, "a swap costs more than a short turn is worth"
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
