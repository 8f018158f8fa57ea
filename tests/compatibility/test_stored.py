"""What was written before is read to equal values, and the same values are written as the same bytes."""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from shared.schema.event import AnyEvent
from shared.schema.job import Status
from tests.compatibility.compare import require_same
from tests.compatibility.stored import EVENTS, LEASE_VIEW, RECORDS, STORED, TOKEN_FILES, derived, lease_view

DATA = Path(__file__).parent / "data"
WRITTEN: dict[str, str] = json.loads((DATA / "stored.json").read_bytes())


def test_every_example_has_been_written() -> None:
    assert WRITTEN.keys() == STORED.keys()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_was_stored_is_read(name: str) -> None:
    found, expected = STORED[name].read(WRITTEN[name].encode()), STORED[name].value
    require_same(msgspec.to_builtins(expected), msgspec.to_builtins(found), f"what is read as {name!r}")
    assert found == expected


@pytest.mark.parametrize("name", [name for name, item in STORED.items() if not item.earlier])
def test_the_same_value_is_stored_as_the_same_bytes(name: str) -> None:
    written = STORED[name].write(STORED[name].value).decode()
    require_same(_parsed(WRITTEN[name]), _parsed(written), f"what is stored as {name!r}")
    assert written == WRITTEN[name]


def _parsed(text: str) -> Any:
    """The JSON of a text, so that a difference has a path; the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_a_file_of_tokens_is_read_and_written_as_before(name: str) -> None:
    data = (DATA / name).read_bytes()
    assert TOKEN_FILES[name].read(data) == TOKEN_FILES[name].value
    header, codes = _parts(TOKEN_FILES[name].write(TOKEN_FILES[name].value))
    require_same(_parts(data)[0], header, f"the header of {name}")
    assert codes == _parts(data)[1]


def _parts(data: bytes) -> tuple[Any, bytes]:
    """Header and body of a safetensors file; the library writes members of the header in any order."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_a_lease_is_seen_by_others_as_before() -> None:
    assert lease_view(WRITTEN["lease: held"].encode()) == LEASE_VIEW


def test_ids_digests_and_signatures_have_not_changed() -> None:
    require_same(json.loads((DATA / "derived.json").read_bytes()), derived(), "what follows from a key or a request")


def test_every_kind_of_event_and_every_state_of_a_song_has_an_example() -> None:
    assert {type(event) for event in EVENTS.values()} == set(get_args(AnyEvent))
    assert {job.status for job in RECORDS.values()} == set(get_args(Status))
