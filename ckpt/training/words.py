"""The demo's tokenizer: it knows a few tags and their synonyms, counts syllables, and numbers the lines.

Tags become one token each, and words that mean nothing to it vanish. Of the lyrics a token a line remains: its number,
so that the language model finds the line after the present one without counting, and its syllables or the name of a
section. All of it is done by regular expressions of the `tokenizers` library: a checkpoint brings its own tokenizer, so
nothing else knows.
"""

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from ckpt.training.music import ENTRIES, GENRES, LONGEST_LINE, MOODS, SECTIONS, TEMPI, TIMBRES

SYNONYMS = {
    "pop": "pop|indie|disco|r&b|soul|country|k-?pop|j-?pop",
    "rock": "rock|metal|punk|grunge|alternative",
    "electronic": "electronic|electronica|edm|techno|house|trance|dance|electro",
    "hip hop": "hip[ -]?hop|rap|trap|lo-?fi",
    "jazz": "jazz|swing|blues|bossa nova|funk",
    "folk": "folk|waltz|acoustic|singer-songwriter|ballad",
    "classical": "classical|baroque|orchestral|opera",
    "ambient": "ambient|new age|meditation|drone",
    "slow": "slow|calm|relaxed|relaxing|peaceful|dreamy|romantic|(?:[4-7]\\d|8[0-4]) ?bpm",
    "medium": "medium|moderate|mid-?tempo|(?:8[5-9]|9\\d|10\\d) ?bpm",
    "fast": "fast|energetic|upbeat|uptempo|(?:1[1-9]\\d|2\\d\\d) ?bpm",
    "piano": "piano|keyboard|keys",
    "guitar": "guitar|ukulele|banjo|harp",
    "strings": "strings|violin|cello|orchestra",
    "organ": "organ|accordion|harmonica|choir",
    "flute": "flute|whistle|recorder|woodwind|clarinet",
    "synthesizer": "synthesizer|synth|synthwave|8-?bit|chiptune",
    "happy": "happy|cheerful|joyful|joy|uplifting|bright|major",
    "sad": "sad|melancholic|melancholy|dark|gloomy|moody|minor",
}
"""What a tag may be called, as a regular expression."""
_KNOWN = (*GENRES, *TEMPI, *TIMBRES, *MOODS)
assert tuple(SYNONYMS) == _KNOWN

_MARKS = {
    "intro": "intro|instrumental intro",
    "verse": "verse|pre-?chorus|rap",
    "chorus": "chorus|refrain|hook|drop",
    "bridge": "bridge|breakdown",
    "solo": "solo|instrumental|interlude|inst|break",
    "outro": "outro|ending|end|coda",
}
BOS, EOS = 0, 1

# Private characters stand for what was understood, until every one of them becomes a token.
_TAG, _SECTION, _COUNT, _NUMBER = 0xE100, 0xE200, 0xE300, 0xE400
_SYLLABLE = "\ue000"
_ENTRIES = [*(chr(_SECTION + n) for n in range(len(SECTIONS))), *(chr(_COUNT + n) for n in range(1, LONGEST_LINE + 1))]
TOKENS = [
    "<s>",
    "</s>",
    *(chr(_TAG + n) for n in range(len(_KNOWN))),
    *(chr(_NUMBER + n) + entry for n in range(ENTRIES) for entry in _ENTRIES),
]
"""The vocabulary, by id."""
_PRIVATE = f"{_SYLLABLE}-\uf8ff"
_IN_TAGS = "(?=[\\s\\S]{0,4100}</tag>\\z)"  # bounded, as all that looks ahead: lyrics may be long and strange
_INSIDE = "[^\\[\\]\\n]{0,60}"  # brackets


def tag_id(tag: str) -> int:
    """Token of a tag that is named as in `music`."""
    return TOKENS.index(chr(_TAG + _KNOWN.index(tag)))


def lyrics_ids(entries: list[str | int]) -> list[int]:
    """The tokens of lyrics, without bos and eos: section names, and syllables a line."""
    first, kinds = len(TOKENS) - ENTRIES * len(_ENTRIES), [*SECTIONS, *range(1, LONGEST_LINE + 1)]
    return [first + number * len(kinds) + kinds.index(entry) for number, entry in enumerate(entries)]


def entries_of(ids: list[int]) -> list[str | int]:
    """Inverse of `lyrics_ids`; other tokens are skipped."""
    first, kinds = len(TOKENS) - ENTRIES * len(_ENTRIES), [*SECTIONS, *range(1, LONGEST_LINE + 1)]
    return [kinds[(token - first) % len(kinds)] for token in ids if token >= first]


def says() -> np.ndarray:
    """Fields of each token, as 0 or 1, ``[tokens, fields]``: a line's number and its entry are two fields."""
    fields = [[*token] if len(token) == 2 else [token] for token in TOKENS]
    known = sorted({field for token in fields for field in token})
    return np.array([[field in token for field in known] for token in fields], np.float32)


def _rules() -> list[tuple[str, str]]:
    """Regular expressions and their replacements, in the order in which they apply."""
    rules = [
        (f"(?<![\\w-])(?:{pattern})(?![\\w-]){_IN_TAGS}", chr(_TAG + number))
        for number, pattern in enumerate(SYNONYMS.values())
    ]
    rules += [(f"[^{_PRIVATE}]{_IN_TAGS}", ""), ("</tag>", "")]
    rules += [
        (f"\\[{_INSIDE}\\b(?:{pattern})\\b{_INSIDE}\\]", f"\n{chr(_SECTION + number)}\n")
        for number, pattern in enumerate(_MARKS.values())
    ]
    rules += [("\\[[^\\[\\]\\n]*\\]", "\n")]  # marks of other kinds, and directions
    rules += _syllables()
    rules += [(f"[^\\n{_PRIVATE}]+", "")]
    rules += [(f"{_SYLLABLE}{{12}}(?={_SYLLABLE}{{5}})", 12 * _SYLLABLE + "\n")]  # lines of more than sixteen
    rules += [
        (f"(?<!{_SYLLABLE}){_SYLLABLE}{{{count}}}(?!{_SYLLABLE})", chr(_COUNT + count))
        for count in range(1, LONGEST_LINE + 1)
    ]
    entry = f"[{chr(_SECTION)}-{chr(_NUMBER - 1)}]"
    rules += [("\n+", ""), (f"\\A(?={entry})", chr(_NUMBER))]
    rules += [(f"(?<={chr(_NUMBER + n)}{entry})(?={entry})", chr(_NUMBER + n + 1)) for n in range(ENTRIES - 1)]
    return [*rules, (f"(?<={entry}){entry}+", "")]  # what found no number


def _syllables() -> list[tuple[str, str]]:
    """Rules that find syllables: groups of vowels, and the characters of syllabic scripts."""
    vowel, consonant = "[aeiouy]", "[b-df-hj-np-tv-xz]"
    return [
        ("[\\p{Han}\\p{Hiragana}\\p{Katakana}\\p{Hangul}]", _SYLLABLE),
        ("(?<=[a-z])['’`](?=[a-z])", ""),
        # Mute, as in "time" and "loved", but not in "me", "table" and "wanted".
        (f"(?<={vowel}{consonant}|{vowel}{consonant}[b-df-hj-km-np-tv-xz])e(?![a-z])", ""),
        (f"(?<={vowel}[b-cf-hj-np-sv-xz])ed(?![a-z])", "d"),
        (f"{vowel}+", _SYLLABLE),
        ("[аеёиоуыэюяіїє]|[αεηιουω]+", _SYLLABLE),
        (f"(?<!\\S)[^\\s{_PRIVATE}]*[\\p{{L}}\\d][^\\s{_PRIVATE}]*(?!\\S)", _SYLLABLE),  # words without a vowel
    ]


def build(path: Path) -> None:
    """Write ``tokenizer.json``."""
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, "<s>"))
    replaced = [normalizers.Replace(Regex(pattern), content) for pattern, content in _rules()]
    spoken = normalizers.Replace("é", "ei")  # never mute
    before = [normalizers.NFC(), spoken, normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence([*before, *replaced])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{chr(_NUMBER)}-\uf8ff]?[\\s\\S]"), "isolated")
    tokenizer.save(str(path))
