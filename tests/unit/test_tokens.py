"""Token files: tensors survive a round trip through the store, and damage is detected."""

import numpy as np
import pytest

from shared.errors import ObjectError
from shared.storage.token_file import TokenMeta, pack, unpack

META = TokenMeta(job_id="song", model="m", seed=5, first_frame=3)
CODES = np.arange(8 * 50, dtype=np.int16).reshape(8, 50)


def test_round_trip_of_a_transposed_array() -> None:
    codes, meta = unpack(pack(np.ascontiguousarray(CODES.T).T, META), "song")
    assert np.array_equal(codes, CODES)
    assert meta == META


@pytest.mark.parametrize("bit", [0x01, 0x10, 0x20])
def test_a_flipped_bit_is_noticed_anywhere(bit: int) -> None:
    good = pack(CODES, META)
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= bit
        with pytest.raises(ObjectError):
            unpack(bytes(data), "song")


@pytest.mark.parametrize("length", [0, 4, 100, -2])
def test_a_truncated_file_is_noticed(length: int) -> None:
    with pytest.raises(ObjectError):
        unpack(pack(CODES, META)[:length], "song")


def test_another_songs_tokens_are_refused() -> None:
    with pytest.raises(ObjectError, match="another song"):
        unpack(pack(CODES, META), "other")
