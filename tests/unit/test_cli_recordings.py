"""Recordings on the command line: uploads as they are sent, and what is shown, against a scripted service."""

import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from heartmula_client import AsyncClient, ServiceFault, retries
from heartmula_client import recordings as client_recordings
from heartmula_client.cli.commands import cli

CREATED = "2026-11-27T10:00:00Z"
AUDIO = bytes(range(256)) * 5000  # more than one block
FOUND = {"recording_id": "r", "created_at": CREATED, "title": "Humming", "duration": 92.5, "sample_rate": 44100}
ACCEPTED = {"job_id": "b", "status": "queued", "status_url": "", "result_url": "", "events_url": ""}
GONE = {"title": "There is no such thing", "detail": "it is gone"}


class Service(ThreadingHTTPServer):
    """A service that has the recording `r`, which goes through `states` as it is asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.states: list[dict[str, Any]] = [{"status": "ready", "progress": 100}]
        self.failures: list[int] = []  # statuses with which the next uploads are answered
        self.faults: list[bool] = []  # whether the next states are answered with an error instead
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[tuple[dict[str, str], bytes]] = []

    def run(self, *words: str) -> Result:
        """Run the command line against this service."""
        env = {"HEARTMULA_URL": f"http://127.0.0.1:{self.server_port}"}
        return CliRunner(env=env).invoke(cli, words, prog_name="heartmula")

    def state(self) -> dict[str, Any]:
        """The next state of the recording; the last one stays."""
        return FOUND | (self.states.pop(0) if len(self.states) > 1 else self.states[0])


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path))
        path = self.path.partition("?")[0]
        if path == "/recordings":
            self._answer(200, {"recordings": [self.server.state()], "next": "later"})
        elif path == "/recordings/r":
            fault = self.server.faults and self.server.faults.pop(0)
            self._answer(500, {"title": "No"}) if fault else self._answer(200, self.server.state())
        elif path == "/recordings/r/audio":
            self._send(200, AUDIO, {"Content-Disposition": 'attachment; filename="Humming.flac"', "ETag": '"1"'})
        else:
            self._unknown()

    def do_POST(self) -> None:
        self.server.requests.append(("POST", self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append((dict(self.headers), body))
        if self.path == "/generate":
            self._answer(202, ACCEPTED)
        elif self.server.failures:
            self._answer(self.server.failures.pop(0), {"title": "No", "detail": "not now"})
        else:
            self._answer(202, self.server.state())

    def do_DELETE(self) -> None:
        self.server.requests.append(("DELETE", self.path))
        self._answer(200, {}) if self.path == "/recordings/r" else self._unknown()

    def _unknown(self) -> None:
        kind = "unknown-recording" if self.path.startswith("/recordings") else "unknown-job"
        self._answer(404, GONE | {"type": f"/problems/{kind}"})

    def _answer(self, status: int, body: Any) -> None:
        self._send(status, json.dumps(body).encode(), {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Keep silent."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(client_recordings, "INTERVAL", 0)
    monkeypatch.setattr(retries, "MAX_RETRY_WAIT", 0)
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "My tune.wav"
    path.write_bytes(AUDIO)
    return path


def encoding(progress: float) -> dict[str, Any]:
    return {"status": "encoding", "progress": progress}


async def test_each_state_is_told_once_and_a_fault_that_passes_is_not(service: Service) -> None:
    service.states = [encoding(0), encoding(0), encoding(50), {"status": "ready", "progress": 100}]
    service.faults = [False, True, False, True]
    async with AsyncClient(f"http://127.0.0.1:{service.server_port}") as client:
        states = [(state.status, state.progress) async for state in client.watch_recording("r")]
        assert states == [("encoding", 0), ("encoding", 50), ("ready", 100)]
        service.faults = [True]
        with pytest.raises(ServiceFault):
            await anext(client.watch_recording("r"))


@pytest.mark.parametrize("words", [("upload",), ("extend", "--lyrics", "la")])
def test_what_cannot_be_read_twice_is_no_recording(service: Service, tmp_path: Path, words: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)  # so that opening it would not wait
    result = service.run(*words, str(tmp_path / "pipe"))
    os.close(descriptor)
    assert result.exit_code == 2
    assert "save the recording in one first" in result.output
    assert service.requests == []


def test_a_file_is_uploaded_and_waited_for(service: Service, file: Path) -> None:
    service.states = [{"status": "queued"}, encoding(0), encoding(50), {"status": "ready", "progress": 100}]
    result = service.run("upload", str(file))
    assert (result.exit_code, result.stdout) == (0, "r\n")
    assert result.stderr.splitlines() == ["encoding", "ready"]
    assert service.requests == [("POST", "/recordings?title=My+tune"), *[("GET", "/recordings/r")] * 3]
    ((headers, body),) = service.bodies
    assert body == AUDIO
    assert (headers["Content-Length"], "Transfer-Encoding" in headers) == (str(len(AUDIO)), False)
    assert "My tune" not in str(headers)


def test_an_upload_that_is_not_waited_for_is_shown_as_it_is(service: Service, file: Path) -> None:
    service.states = [encoding(0), {"status": "ready"}]
    result = service.run("upload", str(file), "--title", "", "--no-wait", "--json")
    assert (result.exit_code, json.loads(result.stdout)["status"]) == (0, "encoding")
    assert service.requests == [("POST", "/recordings?title=")]


def test_an_upload_whose_answer_was_lost_is_sent_again_from_its_beginning(service: Service, file: Path) -> None:
    service.failures = [503, 502]
    assert service.run("upload", str(file)).exit_code == 0
    assert [body for _, body in service.bodies] == [AUDIO] * 3


def test_a_recording_that_failed_or_was_refused_says_why(service: Service, file: Path) -> None:
    service.states = [encoding(0), {"status": "failed", "error": "the disk is full"}]
    result = service.run("upload", str(file))
    assert (result.exit_code, "the recording failed: the disk is full" in result.stderr) == (1, True)
    service.failures = [415]
    result = service.run("upload", str(file))
    assert (result.exit_code, result.stdout, "No: not now" in result.stderr) == (4, "", True)
    assert service.run("upload", str(file.parent)).exit_code == 2
    assert service.run("upload", "no such file.wav").exit_code == 2


def test_a_song_goes_on_from_a_file_that_is_uploaded_first(service: Service, file: Path) -> None:
    result = service.run("extend", str(file), "--no-wait")
    assert (result.exit_code, "no lyrics" in result.output, service.requests) == (2, True, [])
    service.states = [encoding(0), {"status": "ready"}]
    result = service.run("extend", str(file), "--at", "0:20", "--lyrics", "la", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, "b\n")
    sent = json.loads(service.bodies[-1][1])
    assert (sent["continue_from"], sent["lyrics"]) == ({"recording_id": "r", "at_ms": 20_000}, "la")
    service.states = [{"status": "failed", "error": "no"}]
    assert service.run("extend", str(file), "--lyrics", "la", "--no-wait").exit_code == 1


def test_recordings_are_listed_shown_saved_and_deleted(service: Service, tmp_path: Path) -> None:
    result = service.run("recordings", "--limit", "5", "--status", "ready")
    assert re.search(r"r +ready +100 % +1:32 +\S+ \S+ +Humming", result.stdout)
    assert "more: --cursor later" in result.stderr
    assert service.requests[-1] == ("GET", "/recordings?limit=5&status=ready")
    result = service.run("status", "r")
    assert re.search(r"title +Humming\nstatus +ready", re.sub(" +\n", "\n", result.stdout))
    assert service.run("download", "r", "-o", str(tmp_path / "saved")).exit_code == 0
    assert (tmp_path / "saved.flac").read_bytes() == AUDIO
    result = service.run("delete", "r")
    assert (result.exit_code, service.requests[-1]) == (0, ("DELETE", "/recordings/r"))
    for command in ("status", "delete", "download"):
        result = service.run(command, "x")
        assert (result.exit_code, "no song or recording has this id" in result.output) == (4, True)
