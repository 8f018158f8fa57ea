"""What a song's audio is written as: one of our four formats, or what other services' APIs name."""

from dataclasses import dataclass
from typing import Literal, get_args

from shared.schema.request import AudioFormat

Codec = Literal["flac", "wav", "mp3", "ogg", "opus", "pcm", "ulaw", "alaw"]

CONTENT_TYPES: dict[AudioFormat, str] = {
    "flac": "audio/flac",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
}
MP3_BIT_RATES: dict[int, tuple[int, ...]] = {  # kbit/s, by the sample rate in Hz: ISO 11172-3, 13818-3, MPEG 2.5
    **dict.fromkeys((8000, 11025, 12000), (8, 16, 24, 32, 40, 48, 56, 64)),
    **dict.fromkeys((16000, 22050, 24000), (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)),
    **dict.fromkeys((32000, 44100, 48000), (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)),
}
OPUS_SAMPLE_RATES = (8000, 12000, 16000, 24000, 48000)  # Hz; RFC 6716
OPUS_BIT_RATES = (6, 256)  # kbit/s a channel, at least and at most
PCM_SAMPLE_RATES = (8000, 48000)  # Hz, at least and at most


@dataclass(frozen=True)
class Form:
    """A codec, and how a song is changed for it.

    Either one of our formats with nothing else, the song as it is: `plain`. Or with a sample rate, to which the song
    is resampled:

    - `mp3` at 8 to 48 kHz; with a bit rate that is constant, without one it varies as in the plain format;
    - `opus` in Ogg, at 8, 12, 16, 24 or 48 kHz. Its bit rate is that of the audio on average: pages add 2 to 3 kbit/s,
      and a quiet or simple song needs less. Without one it is about 125 kbit/s for two channels at 48 kHz;
    - `pcm`: samples alone, 16-bit signed little-endian, at 8 to 48 kHz, channels in turn;
    - `ulaw` and `alaw`: bytes of ITU-T G.711 alone, at 8 kHz, one channel.

    Raises `ValueError`, with what to change, for anything else.
    """

    codec: Codec
    sample_rate: int | None = None  # Hz; None: the song's
    bit_rate: int | None = None  # kbit/s
    channels: Literal[1, 2] = 2  # 1: the mean of both

    def __post_init__(self) -> None:
        if self.codec not in get_args(Codec):
            raise ValueError(f"there is no codec {self.codec}; take one of {', '.join(get_args(Codec))}")
        if self.channels not in (1, 2):
            raise ValueError("audio has 1 or 2 channels")
        match self.codec:
            case "flac" | "wav" | "ogg":
                self._check_plain()
            case "mp3":
                self._check_mp3()
            case "opus":
                self._check_opus()
            case "pcm":
                self._check_pcm()
            case "ulaw" | "alaw":
                if (self.sample_rate, self.bit_rate, self.channels) != (8000, None, 1):
                    raise ValueError(f"{self.codec} has 8000 Hz, one channel and no other bit rate than 64 kbit/s")

    def _check_plain(self) -> None:
        if (self.sample_rate, self.bit_rate, self.channels) != (None, None, 2):
            raise ValueError(f"{self.codec} has the song's sample rate, two channels and no bit rate to choose")

    def _check_mp3(self) -> None:
        if self.sample_rate is None:
            if self.bit_rate is not None or self.channels != 2:
                raise ValueError("mp3 with a bit rate or with one channel needs a sample rate")
            return
        if self.sample_rate not in MP3_BIT_RATES:
            raise ValueError(f"mp3 has no sample rate of {self.sample_rate} Hz; take one of {_listed(MP3_BIT_RATES)}")
        possible = MP3_BIT_RATES[self.sample_rate]
        if self.bit_rate is not None and self.bit_rate not in possible:
            raise ValueError(f"mp3 at {self.sample_rate} Hz has a bit rate of {_listed(possible)} kbit/s")

    def _check_opus(self) -> None:
        if self.sample_rate not in OPUS_SAMPLE_RATES:
            raise ValueError(f"opus needs a sample rate of {_listed(OPUS_SAMPLE_RATES)} Hz")
        least, most = (bound * self.channels for bound in OPUS_BIT_RATES)
        if self.bit_rate is not None and not least <= self.bit_rate <= most:
            raise ValueError(f"opus of {self.channels} channel(s) has a bit rate of {least} to {most} kbit/s")

    def _check_pcm(self) -> None:
        least, most = PCM_SAMPLE_RATES
        if self.sample_rate is None or not least <= self.sample_rate <= most:
            raise ValueError(f"pcm needs a sample rate of {least} to {most} Hz")
        if self.bit_rate is not None:
            raise ValueError("pcm has no bit rate to choose")

    @property
    def audio_format(self) -> AudioFormat | None:
        """Which of our formats this is; None where the song is changed for it, or the codec is another one."""
        if self.sample_rate is not None or self.codec not in CONTENT_TYPES:
            return None
        return self.codec

    @property
    def content_type(self) -> str:
        """The media type. Samples alone name their rate and channels in it: nothing in the audio does."""
        match self.codec:
            case "opus":
                return "audio/ogg; codecs=opus"
            case "pcm":
                return f"audio/pcm; rate={self.sample_rate}; channels={self.channels}"
            case "ulaw":
                return "audio/PCMU"
            case "alaw":
                return "audio/PCMA"
        return CONTENT_TYPES[self.codec]

    @property
    def suffix(self) -> str:
        """How the name of a file ends, without a dot."""
        return self.codec

    def __str__(self) -> str:
        """A name that no other form has, as `mp3`, `mp3_44100_128` or `pcm_16000_mono`."""
        named = [self.codec, self.sample_rate, self.bit_rate, "mono" if self.channels == 1 else None]
        return "_".join(str(each) for each in named if each is not None)


def plain(audio_format: AudioFormat) -> Form:
    """One of our formats, with the song as it is."""
    return Form(audio_format)


def _listed(numbers: "dict[int, tuple[int, ...]] | tuple[int, ...]") -> str:
    *some, last = numbers
    return f"{', '.join(map(str, some))} or {last}"
