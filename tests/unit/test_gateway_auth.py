"""The key file, token buckets and quotas."""

import math
from pathlib import Path
from typing import cast

import pytest

from services.gateway.auth.api_keys import ApiKeys, Caller, digest_of_key, read_keys
from services.gateway.auth.quota import Quotas
from services.gateway.auth.token_bucket import TokenBucket
from services.gateway.errors import ApiError
from services.gateway.keys import main
from services.gateway.songs.index import SongIndex
from shared.errors import ConfigError

DIGEST = digest_of_key("a key")


def test_a_bucket_holds_its_burst_and_fills_at_its_rate() -> None:
    bucket = TokenBucket(room=3, a_second=0.5, left=3, at=100)
    assert [bucket.take(1, 100) for _ in range(4)] == [0, 0, 0, 2]
    assert bucket.take(1, 101) == 1
    assert bucket.take(1, 102) == 0
    assert bucket.take(3, 1000) == 0  # never more than its room
    assert bucket.take(1, 1000) == 2
    assert bucket.take(4, 9999) == math.inf


def test_a_bucket_takes_all_or_nothing() -> None:
    bucket = TokenBucket(room=4, a_second=1, left=2, at=0)
    assert bucket.take(3, 0) == 1
    assert bucket.take(2, 0) == 0
    bucket.give_back(9)
    assert bucket.left == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[tenant]", "keys.toml"),
        ('[[tenant]]\nname = "a.b"\nkeys = []', "letters, digits"),
        ('[[tenant]]\nname = "*"\nkeys = []', "letters, digits"),
        (f'[[tenant]]\nname = "a"\nkeys = ["{DIGEST[:-1]}"]', "SHA-256"),
        (f'[[tenant]]\nname = "a"\nkeys = ["{DIGEST}", "{DIGEST}"]', "twice"),
        ('[[tenant]]\nname = "a"\nkeys = []\n' * 2, "two tenants a"),
        ('[[tenant]]\nname = "a"\nkeys = []\nsongs_per_minute = 0', "songs_per_minute"),
        ('[[tenant]]\nname = "a"\nkeys = []\nburst = 3', "needs songs_per_minute"),
        ('[[tenant]]\nname = "a"\nkeys = []\nsongs_a_minute = 3', "songs_a_minute"),
    ],
)
def test_an_error_in_the_key_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert words in str(refused.value)
    assert "HEARTMULA_API_KEYS" in str(refused.value)
    with pytest.raises(ConfigError):
        read_keys(tmp_path / "none.toml")


def test_a_new_key_opens_what_its_entry_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "alice"]) == 0
    printed = capsys.readouterr()
    key = next(line.strip() for line in printed.err.splitlines() if line.startswith("  "))
    (tmp_path / "keys.toml").write_text(printed.out)
    callers = read_keys(tmp_path / "keys.toml")
    assert callers[digest_of_key(key)].tenant == "alice"
    assert not callers[digest_of_key(key)].limits.priority
    assert key not in printed.out
    assert main(["new", "a.b"]) == 2


def test_texts_are_measured_for_each_client_and_each_tenant_at_a_rate(tmp_path: Path) -> None:
    now = [0.0]
    file = tmp_path / "keys.toml"
    file.write_text(f'[[tenant]]\nname = "a"\nkeys = ["{DIGEST}"]\n')
    none = cast("SongIndex", None)  # nothing is looked up

    def refused(quotas: Quotas, tenant: str, address: str, count: int) -> int:
        found = []
        for _ in range(count):
            try:
                quotas.take_text(Caller(tenant), address)
            except ApiError as refusal:
                found.append((refusal.status, refusal.kind, refusal.headers["Retry-After"]))
        assert set(found) <= {(429, "too-many-requests", "1")}
        return len(found)

    open_to_all = Quotas(ApiKeys(None), none, lambda: now[0])
    assert refused(open_to_all, "local", "10.0.0.1", 30) == 10
    assert refused(open_to_all, "local", "10.0.0.2", 30) == 10
    now[0] += 1
    assert refused(open_to_all, "local", "10.0.0.1", 5) == 1
    for number in range(2_000):  # addresses are cheap, memory is not
        refused(open_to_all, "local", f"client {number}", 1)
    assert len(open_to_all._texts) == 1_000
    with_keys = Quotas(ApiKeys(file), none, lambda: now[0])
    assert refused(with_keys, "a", "10.0.0.1", 15) == 0
    assert refused(with_keys, "a", "10.0.0.2", 15) == 10
    assert refused(with_keys, "b", "10.0.0.2", 15) == 0
