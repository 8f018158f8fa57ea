"""``heartmula extend`` and ``tree``: what is sent to a scripted service, and what is shown of its answers."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from heartmula_client.cli.commands import cli
from heartmula_client.cli.output import Display
from heartmula_client.cli.tables import song_table, tree_view
from heartmula_client.responses import Parent, Song, Tree, TreeRecording, Version

PARENT = {"job_id": "a", "status": "completed", "request": {"lyrics": "[Verse]\nold", "tags": "pop,piano"}}
WORDLESS = {
    "job_id": "i",
    "status": "completed",
    "request": {"lyrics": "[Intro]", "tags": "jazz,instrumental", "instrumental": True},
}
ACCEPTED = {"job_id": "b", "status": "queued", "status_url": "", "result_url": "", "events_url": ""}
TREE = Tree(
    root="a",
    songs=[
        Version(job_id="a", parent="gone", title="[Verse] :smile:", status="completed"),
        Version(job_id="c", parent="b", at_ms=72_000, status="queued"),
        Version(job_id="b", parent="a", at_ms=64_000, status="completed"),
    ],
)


class Service(ThreadingHTTPServer):
    """Answers with one song, accepts another, and keeps what was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sent: list[dict[str, Any]] = []
        self.asked: list[str] = []

    def run(self, *words: str) -> Result:
        """Run the command line against this service."""
        env = {"HEARTMULA_URL": f"http://127.0.0.1:{self.server_port}"}
        return CliRunner(env=env).invoke(cli, words, prog_name="heartmula")


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        """A song whose id is `a`, one without words, `i`, a recording whose id is `r`, and no other."""
        self.server.asked.append(self.path)
        if self.path == "/generate/a":
            self._answer(200, PARENT)
        elif self.path == "/generate/i":
            self._answer(200, WORDLESS)
        elif self.path == "/recordings/r":
            self._answer(200, {"recording_id": "r", "status": "ready"})
        else:
            kind = "unknown-recording" if self.path.startswith("/recordings") else "unknown-job"
            self._answer(404, {"type": f"/problems/{kind}", "title": "There is no such thing", "detail": "it is gone"})

    def do_POST(self) -> None:
        """Accept a song."""
        self.server.sent.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._answer(202, ACCEPTED)

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep silent."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_lyrics_and_tags_are_those_of_the_other_song_unless_given(service: Service) -> None:
    result = service.run("extend", "a", "--at", "1:04", "--no-wait")
    assert (result.exit_code, result.output) == (0, "b\n")
    came_from = {"job_id": "a", "at_ms": 64_000}
    assert service.sent.pop() == {"lyrics": "[Verse]\nold", "tags": "pop,piano", "continue_from": came_from}

    result = service.run(
        "extend", "a", "--lyrics", "new", "--min-new", "2.5", "--seconds", "150", "--no-wait", "--json"
    )
    assert json.loads(result.output)["job_id"] == "b"
    (sent,) = service.sent
    assert (sent["lyrics"], sent["tags"]) == ("new", "pop,piano")
    assert (sent["continue_from"], sent["min_new_ms"]) == ({"job_id": "a"}, 2500)
    assert (sent["max_duration_ms"], "seed" in sent) == (150_000, False)


def test_a_song_without_words_goes_on_without_words_unless_lyrics_are_given(service: Service) -> None:
    service.run("extend", "i", "--no-wait")
    sent = service.sent.pop()
    assert (sent["lyrics"], sent["tags"], sent.get("instrumental")) == ("[Intro]", "jazz,instrumental", True)
    service.run("extend", "i", "--lyrics", "la", "--no-wait")
    assert "instrumental" not in service.sent.pop()


def test_a_song_that_is_gone_is_named_before_anything_is_requested(service: Service) -> None:
    result = service.run("extend", "gone", "--no-wait")
    assert (result.exit_code, "no song or recording has this id" in result.output, service.sent) == (4, True, [])
    assert service.asked == ["/generate/gone", "/recordings/gone"]


@pytest.mark.parametrize("name", ["missing.wav", "takes/missing", "~/missing.wav", "."])
def test_a_file_that_is_not_there_is_not_taken_for_an_id(service: Service, name: str) -> None:
    result = service.run("extend", name, "--lyrics", "la")
    assert result.exit_code == 2
    assert f"{name!r} is neither a file that is there nor an id" in result.output
    assert not service.asked
    assert not service.sent


@pytest.mark.parametrize("words", [["r"], ["r", "--recording"]])
def test_a_recording_is_found_by_its_id_and_needs_lyrics(service: Service, words: list[str]) -> None:
    result = service.run("extend", *words, "--no-wait")
    assert (result.exit_code, "no lyrics" in result.output, service.sent) == (2, True, [])
    service.asked.clear()
    assert service.run("extend", *words, "--lyrics", "la", "--at", "9", "--no-wait").exit_code == 0
    assert service.sent == [{"lyrics": "la", "tags": "", "continue_from": {"recording_id": "r", "at_ms": 9000}}]
    assert bool(service.asked) == (words == ["r"])


@pytest.mark.parametrize(
    ("words", "milliseconds"),
    [
        ("1:04", 64_000),
        ("64", 64_000),
        ("64.5s", 64_500),
        ("0:01.08", 1080),
        ("1:02:03.250", 3_723_250),
        ("75", 75_000),
    ],
)
def test_a_moment_has_the_forms_in_which_people_write_it(service: Service, words: str, milliseconds: int) -> None:
    service.run("extend", "a", "--at", words, "--no-wait")
    assert service.sent[-1]["continue_from"]["at_ms"] == milliseconds


@pytest.mark.parametrize("words", ["", "1:64", "1:60:00", "-3", "1:", ":04", "1m4s", "1e2", "nan", "64,5"])
def test_what_is_no_moment_is_refused_with_an_example(service: Service, words: str) -> None:
    result = service.run("extend", "a", f"--at={words}", "--no-wait")
    assert (result.exit_code, service.sent) == (2, [])
    assert re.search("no time such as 1:04|more than 59", result.output)


def text(*what: Any) -> str:
    """Render the output as it appears on a terminal."""
    display = Display(json=False)
    with display.results.capture() as capture:
        display.show(*what)
    return capture.get()


def test_a_tree_shows_who_goes_on_from_whom_and_when() -> None:
    lines = [line.rstrip() for line in text(tree_view(TREE, "b")).splitlines()]
    assert lines == ["a  completed  [Verse] :smile:", "└── b  from 1:04  completed  <", "    └── c  from 1:12  queued"]


def test_the_root_of_a_tree_may_be_gone() -> None:
    found = Tree(root="a", songs=TREE.songs[1:])
    assert text(tree_view(found, "c")).splitlines()[0].rstrip() == "a  gone"
    assert "└── b" in text(tree_view(found, "c"))


def test_the_root_of_a_tree_may_be_a_recording() -> None:
    found = Tree(root="a", recording=TreeRecording(recording_id="a", title="Humming"), songs=TREE.songs[1:])
    shown = text(tree_view(found, "c"))
    assert shown.splitlines()[0].rstrip() == "a  recording  Humming"
    assert "└── b" in shown


def test_a_song_names_its_parent_and_its_versions() -> None:
    parent = Parent(job_id="a", at_ms=64_000, exists=False)
    shown = text(song_table(Song(job_id="b", status="completed", parent=parent, children=["c", "d"])))
    assert re.search(r"goes on from +a \(gone\) at 1:04", shown)
    assert re.search(r"versions of it +c, d", shown)
    shown = text(song_table(Song(job_id="b", status="queued", parent=Parent(recording_id="r", at_ms=9000))))
    assert re.search(r"goes on from +recording r at 0:09", shown)
