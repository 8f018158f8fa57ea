"""A simulation of a tokenizer and a codec that share a device by their policies, in virtual time and with no I/O.

Times are seconds. A song whose tokens are made may be listened to: its listener begins to play when the first window is
decoded, plays in real time, and runs dry when the next one is late.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shared.model.codec_windows import CodecWindows
from shared.schema.worker import Role
from shared.worker.turn_policy import Decision, Situation, TurnPolicy
from shared.worker.window_policy import Publish, Windows, decide

STEP = 0.25  # between two decisions
WINDOWS = CodecWindows()
FRAME_SECONDS = 0.08


@dataclass(eq=False)
class SimulatedSong:
    """A song, and its listener if it has one."""

    total: int  # frames
    listened: bool
    made: float = 0.0  # frames
    decoded: int = 0  # windows
    published: int = 0  # windows
    first_sound: float | None = None
    played: float = 0.0  # seconds of music
    dry: float = 0.0  # seconds for which its listener had to wait after the first sound

    @property
    def windows(self) -> int:
        """Windows that the codec makes of the whole song."""
        return WINDOWS.final(self.total - 1) + 1

    @property
    def whole(self) -> int:
        """Windows of which all tokens are made."""
        return self.windows if self.made >= self.total else WINDOWS.final(int(self.made))

    @property
    def playable(self) -> float:
        """Seconds that are decoded."""
        return min(self.decoded * WINDOWS.hop, self.total) * FRAME_SECONDS

    @property
    def dry_in(self) -> float | None:
        """Seconds until its listener runs dry; None where nobody listens, or all is decoded."""
        return self.playable - self.played if self.listened and self.decoded < self.windows else None

    def listen(self, now: float) -> None:
        """Play a step of it."""
        if not self.listened or not self.decoded:
            return
        self.first_sound = now if self.first_sound is None else self.first_sound
        if self.played + STEP <= self.playable:
            self.played += STEP
        elif self.decoded < self.windows:
            self.dry += STEP


@dataclass(frozen=True)
class Load:
    """A song that comes."""

    came: float
    frames: int
    listened: bool


@dataclass(frozen=True)
class Costs:
    """What things take on the simulated device."""

    frame: float  # of all songs in the batch
    window: float
    swap: float  # each move of a model


@dataclass
class Stay:
    """A turn."""

    role: Role
    asked: float  # when its worker began to wait for the device
    began: float  # when it had the device
    working: float  # when its model was there
    away: float = 0.0  # for how long the device was away before, as it counts
    ended: float = 0.0  # when it left its songs
    left: bool = False  # its model has left the device
    paused: bool = False  # songs were


@dataclass
class TwoWorkers:
    """Both workers, each with a policy. Reports of listeners reach them unless `deaf`."""

    policy: TurnPolicy
    costs: Costs
    slots: int = 8
    deaf: bool = False
    now: float = 0.0
    to_make: deque[SimulatedSong] = field(default_factory=deque)
    to_decode: dict[bool, deque[SimulatedSong]] = field(default_factory=lambda: {True: deque(), False: deque()})
    songs: list[SimulatedSong] = field(default_factory=list)
    turns: list[Stay] = field(default_factory=list)
    _asked: dict[Role, float] = field(default_factory=dict)
    _leaving: dict[Role, float] = field(default_factory=lambda: {"tokenizer": 0.0, "codec": 0.0})
    _away: dict[Role, float] = field(default_factory=lambda: {"tokenizer": 0.0, "codec": 0.0})

    def run(self, loads: list[Load], until: float) -> None:
        """Let songs come; go on until a time."""
        coming = deque(sorted(loads, key=lambda load: load.came))
        device = self._device()
        while self.now < until:
            while coming and coming[0].came <= self.now:
                load = coming.popleft()
                self.songs.append(SimulatedSong(load.frames, load.listened))
                self.to_make.append(self.songs[-1])
            self._ask()
            next(device)
            for song in self.songs:
                song.listen(self.now)
            self.now += STEP

    # --- the device

    def _device(self) -> Iterator[None]:
        """Turn after turn; each `next` is a step of time."""
        while True:
            while not self._asked:
                yield
            role = min(self._asked, key=lambda role: self._asked[role])
            turn = Stay(role, self._asked.pop(role), self.now, self.now + self.costs.swap)
            self.turns.append(turn)
            yield from self._until(turn.working)
            turn.away = self._away[role] = self.policy.away(self._leaving[role] + turn.working - turn.asked)
            yield from self._make(turn) if role == "tokenizer" else self._decode(turn)
            turn.ended = self.now
            yield from self._until(self.now + self.costs.swap)
            turn.left, self._leaving[role] = True, self.costs.swap
            self._ask()

    def _until(self, moment: float) -> Iterator[None]:
        while self.now < moment:
            yield

    def _ask(self) -> None:
        holder = self.turns[-1].role if self.turns and not self.turns[-1].left else None
        queued: dict[Role, bool] = {"tokenizer": bool(self.to_make), "codec": any(self.to_decode.values())}
        for role, waits in queued.items():
            if waits and role != holder:
                self._asked.setdefault(role, self.now)

    def _decision(self, turn: Stay, running: int, slots: int, waiting: bool, dry_in: float | None) -> Decision:
        asked = [moment for role, moment in self._asked.items() if role != turn.role]
        return self.policy.decide(
            Situation(
                running=running,
                slots=slots,
                waiting=waiting,
                held=self.now - turn.working,
                wanted=self.now - min(asked) if asked else None,
                dry_in=dry_in,
                away=self._away[turn.role],
            )
        )

    # --- the tokenizer

    def _make(self, turn: Stay) -> Iterator[None]:
        batch: list[SimulatedSong] = []
        while True:
            while (
                decision := self._decision(turn, len(batch), self.slots, bool(self.to_make), self._driest())
            ) is Decision.ADMIT:
                batch.append(self.to_make.popleft())
            if decision is Decision.YIELD:
                break
            yield
            for song in list(batch):
                song.made = min(song.made + STEP / self.costs.frame, song.total)
                if song.made >= song.total:
                    batch.remove(song)
                    self._publish(song)
                else:
                    self._offer(song, Publish.NOW)
        turn.paused = bool(batch)
        for song in reversed(batch):
            self._offer(song, Publish.ON_LEAVING)
            self.to_make.appendleft(song)

    def _driest(self) -> float | None:
        """Of the songs that were published and wait."""
        found = [] if self.deaf else [song.dry_in for song in self.songs if song.published > song.decoded]
        return min((dry_in for dry_in in found if dry_in is not None), default=None)

    def _offer(self, song: SimulatedSong, occasion: Publish) -> None:
        facts = Windows(waiting=song.whole - song.decoded, models_stay=False, dry_in=None if self.deaf else song.dry_in)
        if song.whole > song.published and decide(facts, self._away["tokenizer"]) in (Publish.NOW, occasion):
            self._publish(song)

    def _publish(self, song: SimulatedSong) -> None:
        song.published = song.whole
        lane = self.to_decode[song.listened and not self.deaf]
        if not any(song in waiting for waiting in self.to_decode.values()):
            lane.append(song)

    # --- the codec

    def _decode(self, turn: Stay) -> Iterator[None]:
        song: SimulatedSong | None = None
        while True:
            dry_in, waiting = self._driest_without_tokens(song), any(self.to_decode.values())
            while self._decision(turn, int(song is not None), 1, waiting, dry_in) is Decision.ADMIT:
                song = (self.to_decode[True] or self.to_decode[False]).popleft()
            if song is None or self._decision(turn, 1, 1, False, dry_in) is Decision.YIELD:
                break
            if song.decoded < song.published:
                yield from self._until(self.now + self.costs.window)
                song.decoded += 1
            if song.decoded >= song.published:
                song = None
        turn.paused = song is not None
        if song is not None:
            self.to_decode[song.listened and not self.deaf].appendleft(song)

    def _driest_without_tokens(self, in_hand: SimulatedSong | None) -> float | None:
        """The same of the songs that the codec has begun and that need tokens; None where a listener waits for it."""
        if self.deaf or self.to_decode[True] or (in_hand is not None and in_hand.listened):
            return None
        found = [song.dry_in for song in self.songs if song.decoded and song.decoded >= song.published]
        return min((dry_in for dry_in in found if dry_in is not None), default=None)
