"""Output of the command line without a service, and how it shows the responses of one."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import httpx
import msgspec
import pytest
from click.testing import CliRunner, Result
from rich.console import RenderableType

from heartmula_client.cli.arguments import Time
from heartmula_client.cli.commands import cli
from heartmula_client.cli.output import Display, moment
from heartmula_client.cli.runtime import ExitStatus
from heartmula_client.cli.tables import devices_view, models_of, song_table, songs_table
from heartmula_client.client import AsyncClient
from heartmula_client.errors import Refused, ServiceFault, UnknownSong, error_from
from heartmula_client.responses import Device, Devices, Lease, Queues, Song, Songs, Worker, read_frame

COMMANDS = ["generate", "extend", "tree", "watch", "status", "list", "cancel", "download", "play", "gpu", "models"]


def run(*words: str, **more: str) -> Result:
    return CliRunner(env=more).invoke(cli, words, prog_name="heartmula")


def text(*what: RenderableType) -> str:
    """Render the output as it appears on a terminal."""
    display = Display(json=False)
    with display.results.capture() as capture:
        display.show(*what)
    return capture.get()


def test_help_names_every_command_and_each_has_an_example() -> None:
    help_text = run("--help").output
    assert all(f"\n  {name} " in help_text for name in COMMANDS)
    assert all(f"heartmula {name}" in run(name, "--help").output.partition("Example")[2] for name in COMMANDS)
    assert run("--version").output == f"heartmula, version {version('heartmula-client')}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed(shell: str) -> None:
    assert "heartmula" in run(_HEARTMULA_COMPLETE=f"{shell}_source").output
    at = "wa" if shell == "fish" else "1"
    found = run(_HEARTMULA_COMPLETE=f"{shell}_complete", COMP_WORDS="heartmula wa", COMP_CWORD=at).output
    assert ("watch" in found, "cancel" in found) == (True, False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --lyrics a --lyrics-file -", "either --lyrics or --lyrics-file"),
        ("generate --tags techno", "or --instrumental"),
        ("generate --lyrics a --no-wait -o x.wav", "--output needs --wait"),
        ("generate --lyrics a --format mp3 -o x.wav", "ends with .wav"),
        ("generate --lyrics a --seconds 0", "--seconds"),
        ("generate --lyrics a --not-before soon", "no time such as"),
        ("generate --lyrics a --not-before 24:00", "no time such as"),
        ("generate --lyrics-file /nowhere/song.txt", "No such file"),
        ("generate --lyrics a --play --no-wait", "--play needs --wait"),
        ("generate --lyrics a --play --player x-y", "there is no program x-y"),
        ("generate --lyrics a --player ffplay", "--player needs --play"),
        ("play 1 --player x-y", "there is no program x-y"),
        ("play 1 --player '\"'", "is no command"),
        ("play 1 --player ''", "is no command"),
        ("play 1 --format mp3 -o x.wav", "ends with .wav"),
        ("play 1 -o no/x.wav", "there is no folder no"),
        ("play 1 --from -1", "--from"),
        ("play 1 -o - --player ffplay", "leave --player out"),
        ("--json play 1 -o -", "name a file"),
    ],
)
def test_wrong_usage_is_reported_before_anything_is_sent(words: str, said: str) -> None:
    result = run(*shlex.split(words), HEARTMULA_URL="http://127.0.0.1:1")
    assert (result.exit_code, said in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("words", "zone", "read"),
    [
        ("2026-01-31T22:00", "UTC-1", "2026-01-31T21:00:00+00:00"),  # POSIX: an hour east of Greenwich
        ("2026-01-31T22:00:30+05:30", "UTC-1", "2026-01-31T16:30:30+00:00"),
        ("2026-01-31 22:00Z", "UTC+9", "2026-01-31T22:00:00+00:00"),
    ],
)
def test_a_time_without_a_zone_is_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, words: str, zone: str, read: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert Time().convert(words, None, None) == datetime.fromisoformat(read)
        ahead = Time().convert("22:00", None, None) - datetime.now().astimezone()
        assert timedelta() < ahead <= timedelta(days=1)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_players_are_completed() -> None:
    words = {"COMP_WORDS": "heartmula play 1 --player ff", "COMP_CWORD": "4"}
    assert run(_HEARTMULA_COMPLETE="bash_complete", **words).output.split(",")[-1].strip() == "ffplay"


def test_lyrics_that_are_not_utf_8_are_refused() -> None:
    result = CliRunner().invoke(cli, ["generate", "--lyrics-file", "-"], input=b"\xff\xfe")
    assert (result.exit_code, "not UTF-8" in result.output) == (2, True)


def test_ctrl_c_while_lyrics_are_read_exits_with_130(tmp_path: Path) -> None:
    pipe = tmp_path / "lyrics"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "heartmula_client", "generate", "--lyrics-file", str(pipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with pipe.open("wb", buffering=0) as lyrics:  # which opens when the command opens it
            lyrics.write(bytes(1 << 20))  # more than a pipe holds: returns when the command has begun to read
            while "S" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
                time.sleep(0.01)  # until it sleeps, waiting for more
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, "Traceback" in said) == (ExitStatus.INTERRUPTED, False)


def test_exit_codes_are_those_that_the_help_names() -> None:
    codes = re.findall(r"(?<=[:;] )\d+", " ".join(run("--help").output.partition("Exit codes")[2].split()))
    assert codes == [str(int(code)) for code in ExitStatus]
    assert list(ExitStatus) == [0, 1, 2, 3, 4, 130]


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        AsyncClient(url)


def test_a_title_is_shown_unchanged() -> None:
    song = Song(
        job_id="1", status="completed", progress=100, title="[Verse] :smile:", duration=75.2, playable_seconds=9
    )
    for shown in (text(song_table(song)), text(songs_table(Songs(songs=[song])))):
        assert "[Verse] :smile:" in shown
        assert ("1:15" in shown, "0:09" in shown) == (True, False)
    growing = text(song_table(Song(job_id="1", status="generating", playable_seconds=51.2)))
    assert re.search(r"can be heard +0:51", growing)


def test_the_list_says_for_what_time_a_song_waits() -> None:
    due = "2026-01-31T22:00:00+00:00"
    song = Song(job_id="1", status="queued", not_before=due)
    listed = text(songs_table(Songs(songs=[song])))
    assert f"queued, not before {moment(due)}" in listed
    for over in ({"queue_position": 0}, {"status": "completed"}):
        assert "not before" not in text(songs_table(Songs(songs=[msgspec.structs.replace(song, **over)])))


def test_a_device_is_shown_with_memory_holder_queue_and_problems() -> None:
    worker = Worker(role="codec", instance="c-1", engine="native", model="m", state="working", jobs=["1"], slots=8)
    device = Device(
        id="gpu-1",
        name="A device",
        kind="cuda",
        memory_total=24 * 2**30,
        memory_used=6 * 2**30,
        memory_free=18 * 2**30,
        lease=Lease(role="codec", owner="c-1", phase=3),
        resident=["heartcodec"],
        workers=[worker],
    )
    found = Devices(available=True, gpus=[device], queue=Queues(tokens=4, encode=2), problems=["no tokenizer worker"])
    shown = text(*devices_view(found))
    for words in (
        "6.0 GiB of 24.0 GiB",
        "codec c-1, phase 3",
        "heartcodec",
        "1 of 8 songs",
        "4 for tokens, ? for audio, 2 for the encoder",
    ):
        assert words in shown
    assert "problem: no tokenizer worker" in shown
    assert [(model["role"], model["model"], model["device"]) for model in models_of(found)] == [("codec", "m", "gpu-1")]


def test_frames_of_a_newer_service_are_decoded() -> None:
    snapshot = read_frame(
        b'{"type": "snapshot", "id": "7", "job_id": "1", "status": "queued", "progress": 0, "new": 1}'
    )
    assert (snapshot.kind, snapshot.id, snapshot.status) == ("snapshot", "7", "queued")
    heard = (
        b'{"id": "9", "data": {"kind": "audio", "job_id": "1", "status": "x", "progress": 5, "playable_seconds": 25.6}}'
    )
    assert (read_frame(heard).kind, read_frame(heard).playable_seconds) == ("audio", 25.6)
    data = b'{"kind": "hummed", "job_id": "1", "status": "generating", "progress": 5, "hum": {}}'
    event = read_frame(b'{"id": "8", "type": "heartmula.song.hummed", "time": "now", "data": ' + data + b"}")
    assert (event.kind, event.id, event.time, event.progress) == ("hummed", "8", "now", 5.0)


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (404, b'{"type": "/problems/unknown-job", "title": "T", "detail": "no song"}', UnknownSong, "no song"),
        (429, b'{"type": "/problems/queue-full", "title": "T", "detail": "full"}', Refused, "full"),
        (403, b"<html>", Refused, "answered 403 Forbidden"),
        (502, b'["odd"]', ServiceFault, "answered 502 Bad Gateway"),
        (503, b'{"detail": "\xff"}', ServiceFault, "answered 503"),
    ],
)
def test_every_error_is_described_whether_the_service_or_a_proxy_sent_it(
    status: int, body: bytes, kind: type[Exception], words: str
) -> None:
    answer = httpx.Response(
        status, content=body, headers={"Retry-After": "15"}, request=httpx.Request("GET", "http://host/x")
    )
    error = error_from(answer)
    assert type(error) is kind
    assert words in str(error)
    assert (error.status, error.retry_after) == (status, 15)
