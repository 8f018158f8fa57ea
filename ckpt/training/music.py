"""Material of the demo's songs: tempi, genres, timbres, keys, and the parts of a song."""

from dataclasses import dataclass

TEMPI = {"slow": 10, "medium": 8, "fast": 6}
"""Frames of 80 ms a beat: 75, 94 and 125 beats a minute."""

TIMBRES = ("piano", "guitar", "strings", "organ", "flute", "synthesizer")
MOODS = ("happy", "sad")
SECTIONS = ("intro", "verse", "chorus", "bridge", "solo", "outro")
KEYS = ((0, "happy"), (2, "happy"), (5, "happy"), (7, "happy"), (9, "sad"), (0, "sad"), (2, "sad"), (4, "sad"))
"""Tonic as a pitch class (0 is C), and the mood: major keys are happy, minor ones sad."""

LONGEST_LINE = 16  # syllables; longer lines become several
ENTRIES = 40  # lines and section marks of one song


@dataclass(frozen=True)
class Genre:
    """A genre: the accompaniment of a melody. Numbers are slots of a bar: eighths, two a beat."""

    beats: int  # a bar
    kick: tuple[int, ...]
    snare: tuple[int, ...]
    hat: tuple[int, ...]
    chords: tuple[int, ...]  # where they are struck; empty: broken, a tone a slot
    bass: dict[int, int]  # slot → semitones above the root
    swing: bool = False  # the second eighth of a beat comes late
    tempi: tuple[int, ...] = (1, 1, 1)  # how likely each is where no tag names one

    @property
    def slots(self) -> int:
        """Number of eighths a bar."""
        return 2 * self.beats


_EVERY = tuple(range(8))
GENRES = {
    "pop": Genre(4, (0, 3, 4), (2, 6), _EVERY, (0, 3, 6), {0: 0, 3: 0, 4: 7, 6: 0}, tempi=(0, 2, 1)),
    "rock": Genre(4, (0, 4, 5), (2, 6), _EVERY, (0, 2, 4, 6), dict.fromkeys(range(8), 0), tempi=(0, 1, 2)),
    "electronic": Genre(
        4, (0, 2, 4, 6), (), (1, 3, 5, 7), (1, 3, 5, 7), dict.fromkeys((1, 3, 5, 7), 0), tempi=(0, 0, 1)
    ),
    "hip hop": Genre(4, (0, 3, 7), (4,), _EVERY, (0,), {0: 0, 3: 0, 7: 12}, tempi=(1, 2, 0)),
    "jazz": Genre(4, (), (), (0, 2, 3, 4, 6, 7), (0, 3), {0: 0, 2: 4, 4: 7, 6: 9}, swing=True, tempi=(0, 1, 1)),
    "folk": Genre(3, (), (), (), (2, 4), {0: 0}, tempi=(0, 1, 1)),
    "classical": Genre(4, (), (), (), (), {0: 0, 4: 7}),
    "ambient": Genre(4, (), (), (), (0,), {0: 0}, tempi=(2, 1, 0)),
}


@dataclass(frozen=True)
class Style:
    """The choices that tags make, as indices of `TEMPI`, `GENRES`, `TIMBRES` and `KEYS`."""

    tempo: int
    genre: int
    timbre: int
    key: int

    @property
    def frames_a_beat(self) -> int:
        return tuple(TEMPI.values())[self.tempo]

    @property
    def grammar(self) -> Genre:
        """Entry of `GENRES` for this style."""
        return tuple(GENRES.values())[self.genre]

    @property
    def bar(self) -> int:
        """Number of frames a bar."""
        return self.frames_a_beat * self.grammar.beats

    def slot_frames(self) -> list[int]:
        """The frame within a bar at which each slot begins."""
        beat = self.frames_a_beat
        late = round(beat * 2 / 3) if self.grammar.swing else beat // 2
        return [slot // 2 * beat + slot % 2 * late for slot in range(self.grammar.slots)]


@dataclass(frozen=True)
class Part:
    """A part of a song: the bars for one entry of the lyrics."""

    kind: str  # "line", "break", "instrumental" or "end"
    section: int  # of `SECTIONS`
    entry: int  # counts the song's parts
    syllables: int = 0  # of a line

    @property
    def bars(self) -> int:
        """A line has a bar for every four syllables."""
        return {"line": -(-self.syllables // 4), "break": 1, "instrumental": 2, "end": 1}[self.kind]


PHRASES = [("line", n, bar) for n in range(1, LONGEST_LINE + 1) for bar in range(Part("line", 0, 0, n).bars)]
PHRASES += [("break", 0, 0), ("instrumental", 0, 0), ("instrumental", 0, 1), ("end", 0, 0)]
"""Everything that a bar can be: the kind of its part, how many syllables, and which bar of the part."""


def parts(entries: list[str | int]) -> list[Part]:
    """The parts of a song whose lyrics are section names and syllables a line; without any, it is instrumental."""
    section, found = "verse", []
    for number, entry in enumerate(entries or ["intro", "solo", "solo", "solo", "outro"]):
        if isinstance(entry, int):
            found.append(Part("line", SECTIONS.index(section), number, entry))
        else:
            section = entry
            kind = "instrumental" if section in ("intro", "solo", "outro") else "break"
            found.append(Part(kind, SECTIONS.index(section), number))
    return [*found, Part("end", SECTIONS.index("outro"), len(found))]
