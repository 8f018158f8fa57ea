"""The device ledger: what does not fit is refused, across processes, and dead processes leave nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.device.ledger import DeviceLedger
from shared.errors import DeviceFull

OTHER = """
import sys, time
from pathlib import Path
from shared.device.ledger import DeviceLedger
ledger = DeviceLedger(Path(sys.argv[1]), "codec.other", 100, way="its way")
ledger.place("heartcodec", 60)
print("placed", flush=True)
sys.stdin.read()
"""


def test_two_models_that_do_not_fit_together_never_meet(tmp_path: Path) -> None:
    ledger = DeviceLedger(tmp_path, "tokenizer.me", 100)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"placed\n"
        with pytest.raises(DeviceFull, match=r"heartmula .* holds heartcodec of codec\.other"):
            ledger.place("heartmula", 50)
        ledger.place("small", 40)
        assert {r.label for r in ledger.residents()} == {"heartcodec", "small"}
        ledger.remove("small")
        other.kill()
    # A process that was killed has closed its account, as a driver frees a dead process's memory.
    ledger.place("heartmula", 50)
    assert [(r.owner, r.label, r.nbytes) for r in ledger.residents()] == [("tokenizer.me", "heartmula", 50)]
    ledger.close()
    assert not list(tmp_path.glob("*.account"))


def test_placing_again_replaces(tmp_path: Path) -> None:
    ledger = DeviceLedger(tmp_path, "tokenizer.me", 100)
    ledger.place("kv-cache", 80)
    ledger.place("kv-cache", 90)
    with pytest.raises(DeviceFull):
        ledger.place("kv-cache", 101)
    assert sum(r.nbytes for r in ledger.residents()) == 90
    ledger.close()


def test_the_journal_keeps_every_move(tmp_path: Path) -> None:
    ledger = DeviceLedger(tmp_path, "tokenizer.me", 100)
    ledger.place("heartmula", 10)
    ledger.place("kv-cache", 5)
    ledger.close()
    moves = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [(m["move"], m["label"], m["bytes"]) for m in moves] == [
        ("place", "heartmula", 10),
        ("place", "kv-cache", 5),
        ("remove", "heartmula", 10),
        ("remove", "kv-cache", 5),
    ]


def test_a_process_books_no_more_than_its_share(tmp_path: Path) -> None:
    ledger = DeviceLedger(tmp_path, "tokenizer.me", 100, 60)
    ledger.place("weights", 40)
    with pytest.raises(DeviceFull, match=r"that tokenizer\.me may use"):
        ledger.place("song", 21)
    ledger.place("song", 20)
    ledger.place("song", 15)  # booked anew
    ledger.remove("weights")
    ledger.place("other", 45)
    ledger.close()


def test_processes_see_each_others_ways_for_as_long_as_they_live(tmp_path: Path) -> None:
    mine = DeviceLedger(tmp_path, "tokenizer.me", 100, way="my way")
    silent = DeviceLedger(tmp_path, "game.1", 100)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert mine.ways() == {"codec.other": "its way", "game.1": ""}
        assert silent.ways() == {"codec.other": "its way", "tokenizer.me": "my way"}
        other.kill()
    assert mine.ways() == {"game.1": ""}, "a killed process still counts"
    mine.close()
    silent.close()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".account", ".way")]


def test_an_account_knows_when_its_file_is_gone(tmp_path: Path) -> None:
    ledger = DeviceLedger(tmp_path / "card", "tokenizer.me", 100)
    assert not ledger.deleted()
    (tmp_path / "card").rename(tmp_path / "moved")
    assert ledger.deleted()
    DeviceLedger(tmp_path / "card", "tokenizer.me", 100)  # another process begins anew
    assert ledger.deleted()
