"""`heartmula play` and `generate --play`: as processes, with small programs in the place of players."""

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from heartmula_client.cli.output import Display
from heartmula_client.responses import Event
from tests.unit.growing_songs import Connection, Service, Song

AUDIO = Random(1).randbytes(300_000)
FINISHED = b"knows its length" + AUDIO[16:]
PATIENCE = 60.0  # seconds; generous, because a busy machine is not a fault
PIPE = asyncio.subprocess.PIPE
Output = tuple[int, bytes, str]  # exit code, standard output, standard error

RECORDS = 'echo "$@" >"$0.words"; exec cat >>"$0.heard"'


class Programs:
    """The only folder on the PATH of the command, and what the players in it have heard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "cat").symlink_to("/bin/cat")
        (folder / "head").symlink_to("/usr/bin/head")

    def add(self, name: str, script: str = RECORDS) -> None:
        """Add a player, a script of the shell."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def heard(self, name: str) -> bytes:
        """All that was played."""
        path = self.folder / f"{name}.heard"
        return path.read_bytes() if path.exists() else b""

    def words(self, name: str) -> str:
        """The arguments of a player."""
        return (self.folder / f"{name}.words").read_text().strip()


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path / "bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service(one=Song(AUDIO, finished=FINISHED)).serve() as service:
        yield service


class Shell:
    """Starts the command line."""

    def __init__(self, service: Service, programs: Programs, folder: Path) -> None:
        self._service, self._programs, self._folder = service, programs, folder

    async def begin(self, *words: str, stdout: int = PIPE) -> asyncio.subprocess.Process:
        env = {"HEARTMULA_URL": self._service.url, "PYTHONPATH": str(Path(__file__).parents[2])}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "heartmula_client",
            *words,
            env=env | {"PATH": str(self._programs.folder)},
            cwd=self._folder,
            stdout=stdout,
            stderr=PIPE,
        )

    async def run(self, *words: str) -> Output:
        return await finish(await self.begin(*words))


@pytest.fixture
def shell(service: Service, programs: Programs, folder: Path) -> Shell:
    return Shell(service, programs, folder)


async def finish(process: asyncio.subprocess.Process) -> Output:
    """Wait for the end of a command."""
    async with asyncio.timeout(PATIENCE):
        out, err = await process.communicate()
    assert "Traceback" not in err.decode()
    assert process.returncode is not None
    return process.returncode, out or b"", err.decode()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_song_is_played_while_it_grows(service: Service, programs: Programs, shell: Shell) -> None:
    programs.add("mpv")
    song = service.songs["one"]
    song.connections = [Connection(status=409, headers={"Retry-After": "0"})]
    playing = await shell.begin("play", "one")
    await until(lambda: bool(song.ranges))
    assert not (programs.folder / "mpv.words").exists()  # a player is started with the first sound
    song.grow(100_000)
    await until(lambda: programs.heard("mpv") == AUDIO[:100_000])
    assert playing.returncode is None
    song.grow(status="completed")
    code, out, err = await finish(playing)
    assert (code, out, programs.heard("mpv")) == (0, b"", AUDIO)
    assert ("writing tokens" in err, programs.words("mpv")) == (True, "--no-video --really-quiet -")
    assert song.queries[0] == {"format": ["flac"]}


async def test_the_first_player_that_is_there_is_taken_or_the_one_that_is_named(
    service: Service, programs: Programs, shell: Shell
) -> None:
    programs.add("ffplay")
    programs.add("play")
    programs.add("sox-like")
    service.songs["one"].grow(status="completed")
    assert (await shell.run("play", "one"))[0] == 0
    assert programs.words("ffplay") == "-nodisp -autoexit -loglevel error -i -"
    assert (await shell.run("play", "one", "--player", "play", "--format", "ogg"))[0] == 0
    assert programs.words("play") == "-q -t ogg -"
    assert (await shell.run("play", "one", "--player", "sox-like --volume '1 2'", "--from", "1.5"))[0] == 0
    assert (programs.words("sox-like"), programs.heard("sox-like")) == ("--volume 1 2", FINISHED)
    assert service.songs["one"].queries[-1] == {"format": ["flac"], "from": ["1.500"]}


async def test_without_a_player_the_song_is_saved_in_a_file_that_grows(
    service: Service, shell: Shell, folder: Path
) -> None:
    song, path = service.songs["one"], folder / "A song.flac"
    song.title = "A song"
    saving = await shell.begin("play", "one")
    song.grow(100_000)
    await until(lambda: path.exists() and path.read_bytes() == AUDIO[:100_000])
    song.grow(status="completed")
    code, out, err = await finish(saving)
    assert (code, out, "no player was found" in err) == (0, b"A song.flac\n", True)
    assert path.read_bytes() == FINISHED  # as `download` saves it
    code, out, _ = await shell.run("play", "one", "--json")
    assert (code, json.loads(out)["status"], json.loads(out)["path"]) == (0, "completed", "A song-2.flac")
    assert path.read_bytes() == FINISHED  # and was not replaced


async def test_output_saves_the_song_that_is_played(
    service: Service, programs: Programs, shell: Shell, folder: Path
) -> None:
    programs.add("mpv")
    service.songs["one"].grow(status="completed")
    code, out, _ = await shell.run("play", "one", "--output", "mine")
    assert (code, out, programs.heard("mpv")) == (0, b"mine.flac\n", FINISHED)
    assert (folder / "mine.flac").read_bytes() == FINISHED
    # Audio that begins in mid-song is no finished file, whatever its size.
    assert (await shell.run("play", "one", "--output", "mine.mp3", "--from", "1"))[0] == 0
    assert service.songs["one"].queries[-1] == {"format": ["mp3"], "from": ["1.000"]}


async def test_a_file_whose_header_cannot_be_had_is_left_as_it_is(service: Service, shell: Shell, folder: Path) -> None:
    song = service.songs["one"]
    song.grow()
    song.connections = [Connection(), Connection(), Connection(ignores_range=True)]
    saving = await shell.begin("play", "one", "--output", "song.flac")
    await until(lambda: (folder / "song.flac").exists() and (folder / "song.flac").stat().st_size == len(AUDIO))
    song.grow(status="completed")
    code, out, err = await finish(saving)
    assert (code, out, (folder / "song.flac").read_bytes()) == (0, b"song.flac\n", AUDIO)
    assert "its header does not say how long it is" in err


async def test_a_dash_writes_the_audio_to_standard_output(service: Service, programs: Programs, shell: Shell) -> None:
    programs.add("mpv")
    song = service.songs["one"]
    song.grow(100_000)
    playing = await shell.begin("play", "one", "--output", "-")
    assert playing.stdout
    assert await playing.stdout.readexactly(100_000) == AUDIO[:100_000]
    song.grow(status="completed")
    code, out, _ = await finish(playing)
    assert (code, out, programs.heard("mpv")) == (0, AUDIO[100_000:], b"")


async def test_standard_output_may_be_a_file_but_no_terminal(service: Service, shell: Shell, folder: Path) -> None:
    service.songs["one"].grow(status="completed")
    with (folder / "out").open("wb") as file:
        code, _, _ = await finish(await shell.begin("play", "one", "--output", "-", stdout=file.fileno()))
    assert (code, (folder / "out").read_bytes()) == (0, FINISHED)
    ours, theirs = os.openpty()
    code, _, err = await finish(await shell.begin("play", "one", "--output", "-", stdout=theirs))
    assert (code, "a terminal cannot show" in err) == (2, True)
    os.close(theirs)
    os.close(ours)


async def test_a_reader_that_goes_ends_the_command_without_a_word(service: Service, shell: Shell) -> None:
    song = service.songs["one"]
    song.grow(100_000)
    ours, theirs = os.pipe()
    playing = await shell.begin("play", "one", "--output", "-", stdout=theirs)
    os.close(theirs)
    assert await asyncio.to_thread(os.read, ours, 100) == AUDIO[:100]
    os.close(ours)
    song.grow()
    code, _, err = await finish(playing)
    assert (code, "error" in err) == (1, False)


async def test_ctrl_c_is_seen_while_the_reader_of_standard_output_reads_nothing(service: Service, shell: Shell) -> None:
    service.songs["one"].grow()
    ours, theirs = os.pipe()
    playing = await shell.begin("play", "one", "--output", "-", stdout=theirs)
    os.close(theirs)
    assert await asyncio.to_thread(os.read, ours, 1) == AUDIO[:1]  # it writes, more than a pipe holds
    playing.send_signal(signal.SIGINT)
    code, _, err = await finish(playing)
    assert (code, "heartmula play one" in err) == (130, True)
    os.close(ours)


@pytest.mark.parametrize(("status", "words"), [("failed", "the song failed: a reason"), ("cancelled", "was cancelled")])
async def test_what_there_is_of_a_song_that_fails_is_played_and_the_exit_code_says_so(
    service: Service, programs: Programs, shell: Shell, status: str, words: str
) -> None:
    programs.add("mpv")
    song = service.songs["one"]
    song.error = "a reason"
    song.grow(100_000)
    playing = await shell.begin("play", "one", "--json")
    await until(lambda: programs.heard("mpv") == AUDIO[:100_000])
    song.grow(200_000, status)
    code, out, err = await finish(playing)
    assert (code, programs.heard("mpv"), json.loads(out)["status"]) == (1, AUDIO[:200_000], status)
    assert words in err


async def test_a_song_that_fails_before_its_first_sound_starts_no_player_and_leaves_no_file(
    service: Service, programs: Programs, shell: Shell, folder: Path
) -> None:
    programs.add("mpv")
    service.songs["one"].connections = [Connection(status=409, headers={"Retry-After": "0"})]
    playing = await shell.begin("play", "one", "--output", "song.flac")
    await until(lambda: bool(service.songs["one"].ranges))
    service.songs["one"].connections = [Connection(status=410)]
    service.songs["one"].grow(0, "failed")
    code, out, err = await finish(playing)
    assert (code, out, "the song failed" in err, list(folder.iterdir())) == (1, b"", True, [])
    assert not (programs.folder / "mpv.words").exists()


async def test_a_file_of_a_song_that_fails_is_kept_and_not_given_out_as_the_song(
    service: Service, shell: Shell, folder: Path
) -> None:
    service.songs["one"].grow(100_000, "failed")
    code, out, err = await shell.run("play", "one", "--output", "song.flac")
    assert (code, out, "song.flac holds what there was of it" in err) == (1, b"", True)
    assert (folder / "song.flac").read_bytes() == AUDIO[:100_000]


async def test_a_player_that_fails_is_reported(service: Service, programs: Programs, shell: Shell) -> None:
    programs.add("mpv", "cat >/dev/null; echo no sound card; exit 3")
    service.songs["one"].grow(status="completed")
    code, out, err = await shell.run("play", "one")
    assert (code, out) == (1, b"")
    assert "mpv failed with exit code 3" in err
    assert "no sound card" in err


async def test_the_end_of_the_player_ends_the_command(service: Service, programs: Programs, shell: Shell) -> None:
    programs.add("mpv", 'exec head -c 1000 >"$0.heard"')
    service.songs["one"].grow(200_000)
    code, out, err = await shell.run("play", "one", "--json")
    assert (code, json.loads(out)["status"], programs.heard("mpv")) == (0, "generating", AUDIO[:1000])
    assert "mpv has ended before the song did" in err


async def test_the_end_of_the_player_does_not_end_the_saving(
    service: Service, programs: Programs, shell: Shell, folder: Path
) -> None:
    programs.add("mpv", "exit 0")
    song = service.songs["one"]
    song.grow(200_000)
    playing = await shell.begin("play", "one", "--output", "song.flac")
    assert playing.stderr
    while "has ended" not in (await playing.stderr.readline()).decode():
        pass
    song.grow(status="completed")
    code, out, _ = await finish(playing)
    assert (code, out, (folder / "song.flac").read_bytes()) == (0, b"song.flac\n", FINISHED)


async def test_ctrl_c_stops_the_player(service: Service, programs: Programs, shell: Shell) -> None:
    programs.add("mpv", 'echo $$ >"$0.pid"; exec cat >"$0.heard"')
    service.songs["one"].grow(200_000)
    playing = await shell.begin("play", "one")
    await until(lambda: len(programs.heard("mpv")) == 200_000)
    playing.send_signal(signal.SIGINT)
    code, _, err = await finish(playing)
    assert (code, "goes on without you" in err, "heartmula play one" in err) == (130, True, True)
    assert not Path(f"/proc/{(programs.folder / 'mpv.pid').read_text().strip()}").exists()


async def test_ctrl_c_ends_a_player_that_does_not_listen_to_it(
    service: Service, programs: Programs, shell: Shell
) -> None:
    programs.add("mpv", 'trap "" TERM INT; echo $$ >"$0.pid"; cat >"$0.heard"; exec /bin/sleep 60')
    service.songs["one"].grow(status="completed")
    playing = await shell.begin("play", "one")
    await until(lambda: programs.heard("mpv") == FINISHED)
    playing.send_signal(signal.SIGINT)
    assert (await finish(playing))[0] == 130
    assert not Path(f"/proc/{(programs.folder / 'mpv.pid').read_text().strip()}").exists()


async def test_what_was_received_is_played_when_the_service_goes_wrong(
    service: Service, programs: Programs, shell: Shell, folder: Path
) -> None:
    programs.add("mpv", 'cat >"$0.heard"; echo >"$0.done"')
    service.songs["one"].made = 100_000
    service.songs["one"].connections = [Connection(cut=100_000), Connection(status=500)]
    code, _, err = await shell.run("play", "one", "--output", "song.flac")
    assert (code, programs.heard("mpv"), "song.flac holds what was received of it" in err) == (3, AUDIO[:100_000], True)
    assert (folder / "song.flac").read_bytes() == AUDIO[:100_000]
    assert (programs.folder / "mpv.done").exists()  # it ended by itself


async def test_an_unknown_song_is_refused(shell: Shell) -> None:
    code, out, err = await shell.run("play", "two", "--json")
    assert (code, json.loads(out)["error"]["detail"], "no song has this id" in err) == (4, "no song has this id", True)


async def test_a_song_is_requested_and_played(service: Service, programs: Programs, shell: Shell, folder: Path) -> None:
    programs.add("mpv")
    service.accepted = ["one"]
    playing = await shell.begin("generate", "--lyrics", "la", "--play")
    service.songs["one"].grow(100_000)
    await until(lambda: programs.heard("mpv") == AUDIO[:100_000])
    service.songs["one"].grow(status="completed")
    code, out, err = await finish(playing)
    assert (code, out, err.splitlines()[0], programs.heard("mpv")) == (0, b"", "song one", AUDIO)
    assert list(folder.iterdir()) == []
    assert "webhook_events" not in service.requested[0]


async def test_variants_are_played_in_turn_and_saved_in_the_folder(
    service: Service, programs: Programs, shell: Shell, folder: Path
) -> None:
    programs.add("mpv", 'cat >>"$0.heard"')
    service.accepted = ["one", "two"]
    service.songs["two"] = Song(AUDIO[:5000], made=5000, status="failed")
    service.songs["one"].grow(status="completed")
    words = [
        "generate",
        "--lyrics",
        "la",
        "--variants",
        "2",
        "--play",
        "--format",
        "mp3",
        "--output",
        ".",
        "--webhook-events",
        "audio",
    ]
    code, out, err = await shell.run(*words)
    assert (code, programs.heard("mpv")) == (1, FINISHED + AUDIO[:5000])
    assert (out, "the song failed" in err, service.requested[0]["format"]) == (b"1.flac\n", True, "mp3")
    assert sorted(each.name for each in folder.iterdir()) == ["1-2.flac", "1.flac"]
    assert service.requested[0]["webhook_events"] == ["audio"]
    assert service.songs["two"].queries == [{"format": ["mp3"]}]


def test_how_much_can_be_heard_is_shown() -> None:
    display = Display(json=False)
    display.notes = Console(force_terminal=True, width=100, record=True)
    with display.song_bars(1) as (bar,):
        bar.update(Event(kind="audio", job_id="1", status="generating", progress=5, playable_seconds=51.2))
        bar.update(Event(kind="progress", job_id="1", status="generating", progress=6))
    assert "writing tokens" in (shown := display.notes.export_text())
    assert "0:51 can be heard" in shown
