"""Which audio format a file holds, by its bytes: neither its name nor a content type is believed."""

import io

from shared.schema.request import AudioFormat

_HEAD = 16 * 1024  # bytes in which the first frames of an MP3 must be; there is padding before them in some
_MOST_TAGS = 8  # ID3 tags in a row
_TAG_HEAD = 10  # bytes
_MP3_FRAMES = 3  # frames in a row that make an MP3: a single sync word stands in any kind of file
# Of a frame header of layer III, ISO 11172-3 section 2.4.1.3 and 13818-3; by the version's two bits.
_MPEG_1, _MPEG_2, _MPEG_2_5 = 3, 2, 0
_LAYER_3 = 1
_KBIT_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBIT_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {_MPEG_1: (44100, 48000, 32000), _MPEG_2: (22050, 24000, 16000), _MPEG_2_5: (11025, 12000, 8000)}


def sniff(file: io.RawIOBase | io.BufferedIOBase) -> AudioFormat | None:
    """The format of a file that can be sought in, None for anything but FLAC, WAV, MP3 and Ogg.

    It says which decoder to ask, and no more: whether there is audio, the decoder finds out.
    """
    file.seek(_after_tags(file))
    head = file.read(_HEAD)
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return "wav"
    if head.startswith(b"OggS"):
        return "ogg"
    return "mp3" if _has_mp3_frames(head) else None


def _after_tags(file: io.RawIOBase | io.BufferedIOBase) -> int:
    """Where the ID3v2 tags end (id3.org, ID3v2.4 section 3.1), which stand before MP3, and before FLAC of some."""
    at = 0
    for _ in range(_MOST_TAGS):
        file.seek(at)
        head = file.read(_TAG_HEAD)
        if len(head) < _TAG_HEAD or not head.startswith(b"ID3") or max(head[6:]) > 127:
            break
        footer = _TAG_HEAD if head[5] & 0x10 else 0
        at += _TAG_HEAD + footer + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    return at


def _has_mp3_frames(head: bytes) -> bool:
    at = head.find(b"\xff")
    while at >= 0:
        frames, here = 0, at
        while size := _mp3_frame_size(head[here : here + 4]):
            frames, here = frames + 1, here + size
            if frames == _MP3_FRAMES or (here >= len(head) and frames > 1):
                return True
        at = head.find(b"\xff", at + 1)
    return False


def _mp3_frame_size(header: bytes) -> int:
    """Bytes of the frame that begins with these four; 0 where none does, or its size is not given."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return 0
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
    rate, bit_rate = header[2] >> 2 & 3, header[2] >> 4
    if layer != _LAYER_3 or version not in _RATES or rate == 3 or bit_rate in (0, 15):
        return 0
    kbit, samples = (_KBIT_1, 1152) if version == _MPEG_1 else (_KBIT_2, 576)
    return samples // 8 * kbit[bit_rate] * 1000 // _RATES[version][rate] + (header[2] >> 1 & 1)
