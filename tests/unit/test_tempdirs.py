"""Temporary folders of killed workers are removed; those of living ones stay."""

import os
from pathlib import Path

from shared.storage.tempdirs import clear_scratch, scratch_folder


def test_only_folders_that_no_process_uses_are_removed(tmp_path: Path) -> None:
    clear_scratch(tmp_path / "not there yet")
    left, young = tmp_path / "song-left", tmp_path / "song-young"
    for folder in (left, young):
        folder.mkdir()
        (folder / "audio.flac").write_bytes(b"half a song")
    with scratch_folder(tmp_path) as used:
        (used / "audio.flac").write_bytes(b"half a song")
        for folder in (left, used):
            os.utime(folder, (0, 0))
        clear_scratch(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([used, young])
    assert list(tmp_path.iterdir()) == [young]
