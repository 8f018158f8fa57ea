"""Routes, fields, problem types, settings, subjects, options and figures are what they were."""

import json
import tomllib
from collections.abc import Coroutine
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from services.gateway.auth.api_keys import Caller, Limits, digest_of_key, read_keys
from services.gateway.keys import main as make_key
from shared.entrypoint import run
from shared.errors import ConfigError, DeviceBroken, Unavailable
from shared.settings import Settings
from tests.compatibility.compare import differences, require_same, without_prose
from tests.compatibility.configuration import ELSEWHERE, ROOT, documented_variables
from tests.compatibility.documents import DOCUMENTS, document

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", DOCUMENTS)
async def test_the_document_has_not_changed(name: str) -> None:
    before = json.loads((DATA / f"{name}.json").read_bytes())
    require_same(before, await document(name), name)


def test_every_setting_is_explained_in_a_table_of_the_documentation() -> None:
    settings = json.loads((DATA / "settings.json").read_bytes()).keys()
    assert not settings - documented_variables()


def test_variables_of_other_programs_are_left_alone_and_unknown_ones_are_refused() -> None:
    assert Settings.load(dict.fromkeys(ELSEWHERE, "x")) == Settings()
    with pytest.raises(ConfigError, match="HEARTMULA_PROT"):
        Settings.load({"HEARTMULA_PROT": "8000"})


@pytest.mark.parametrize(
    "name",
    [
        "deploy.local.__main__",
        "deploy.setup",
        "deploy.store_setup",
        "heartmula_client.__main__",
        "services.codec_worker.__main__",
        "services.gateway.__main__",
        "services.gateway.keys",
        "services.tokenizer_worker.__main__",
    ],
)
def test_programs_start_under_their_documented_names(name: str) -> None:
    assert find_spec(name) is not None


def test_the_command_line_is_installed_as_heartmula() -> None:
    scripts = tomllib.loads((ROOT / "services/client/pyproject.toml").read_text())["project"]["scripts"]
    assert scripts.keys() == {"heartmula"}
    assert callable(resolve_name(scripts["heartmula"]))


def test_a_new_key_is_printed_as_the_file_of_keys_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_key(["new", "alice"]) == 0
    printed = capsys.readouterr()
    (tenant,) = tomllib.loads(printed.out)["tenant"]
    (key,) = [word for word in printed.err.split() if word.startswith("hm_")]
    assert tenant == {"name": "alice", "keys": [digest_of_key(key)]}
    path = tmp_path / "keys.toml"
    path.write_text(printed.out)
    assert read_keys(path) == {digest_of_key(key): Caller("alice", Limits(priority=False))}


@pytest.mark.parametrize("arguments", [[], ["new"], ["new", "a b"], ["old", "alice"], ["new", "alice", "bob"]])
def test_wrong_arguments_for_a_new_key_end_with_2(arguments: list[str]) -> None:
    assert make_key(arguments) == 2


def test_a_file_of_keys_keeps_its_meaning(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[[tenant]]\nname = "alice"\nkeys = ["{"a" * 64}", "{"b" * 64}"]\nsongs_per_minute = 2.5\nburst = 4\n'
        "songs_at_once = 3\nmax_duration_ms = 60000\npriority = true\n"
        f'[[tenant]]\nname = "bob"\nkeys = ["{"c" * 64}"]\n'
    )
    alice = Limits(songs_per_minute=2.5, burst=4, songs_at_once=3, max_duration_ms=60_000, priority=True)
    expected = {"a" * 64: Caller("alice", alice), "b" * 64: Caller("alice", alice)}
    assert read_keys(path) == expected | {"c" * 64: Caller("bob", Limits(priority=False))}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("a setting"), 2),
        (Unavailable("nats", "away"), 1),
        (DeviceBroken("the driver"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_service_ends_with_a_code_that_says_why(
    error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "NATS_URL": "nats://127.0.0.1:1",
        "S3_ENDPOINT": "http://127.0.0.1:1",
        "S3_ACCESS_KEY": "access",
        "S3_SECRET_KEY": "secret",
    }.items():
        monkeypatch.setenv(f"HEARTMULA_{name}", value)

    async def serve(_: Settings) -> None:
        if error is not None:
            raise error

    def step(work: Coroutine[Any, Any, None]) -> None:
        with pytest.raises(StopIteration):
            work.send(None)

    assert run(serve, step) == code


def test_a_service_without_its_servers_ends_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEARTMULA_NATS_URL", raising=False)

    async def serve(_: Settings) -> None: ...

    assert run(serve) == 2


def test_texts_are_left_out_of_a_comparison_and_properties_of_their_names_are_not() -> None:
    schema = {"title": "Song", "description": "words", "properties": {"title": {"type": "string", "title": "Title"}}}
    answer = {"summary": "words", "example": {"lyrics": "la"}, "examples": {"b": {"value": 1}, "a": {"value": 2}}}
    assert without_prose([schema, answer]) == [{"properties": {"title": {"type": "string"}}}, {"examples": ["a", "b"]}]


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"a": [1, {"b": 2}], "c": None}, []),
        ({"c": None, "a": [1, {"b": 2}]}, []),
        ({"a": [1, {"b": 3}], "c": None}, ['["a"][1]["b"] was 2 and is now 3']),
        ({"a": [1], "c": None}, ['["a"] was [1, {"b": 2}] and is now [1]']),
        ({"a": [1, {"b": 2}]}, ['["c"] is gone; it was null']),
        ({"a": [1, {"b": 2}], "c": None, "d": 0}, ['["d"] is new: 0']),
        ({"a": [True, {"b": 2}], "c": None}, ['["a"][0] was 1 and is now true']),
        (7, ['the whole document was {"a": [1, {"b": 2}], "c": null} and is now 7']),
    ],
)
def test_a_difference_names_its_path(new: Any, said: list[str]) -> None:
    assert list(differences({"a": [1, {"b": 2}], "c": None}, new)) == said
