"""``python -m deploy.local.demo``: ask the running stack for a song, watch it being made, save it here."""

import json
import mimetypes
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from shared.errors import ConfigError
from shared.settings import Settings

SONG = {
    "lyrics": "[Verse]\nHello world\n[Chorus]\nLa la la",
    "tags": "pop,piano,english",
    "max_duration_ms": 20_000,
}
_ENDED = ("completed", "failed", "cancelled")
_BAR = 40  # characters

# The stack is on this machine or beside it: a proxy from the environment is not asked.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def _json(request: str | urllib.request.Request) -> dict[str, Any]:
    with _open(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def _states(base: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every state of the song until it ended: pushed over the websocket, asked for when there is none."""
    try:
        with connect("ws" + urljoin(base, job["events_url"]).removeprefix("http"), proxy=None, max_size=None) as events:
            for frame in events:
                state = json.loads(frame)
                state = state.get("data", state)  # the first frame is a snapshot, the others are CloudEvents
                yield state
                if state.get("status") in _ENDED:
                    return
    except (OSError, WebSocketException, KeyError):
        print("\nno live events, asking once a second instead", file=sys.stderr)
    while True:
        state = _json(urljoin(base, job["status_url"]))
        yield state
        if state["status"] in _ENDED:
            return
        time.sleep(1)


def _follow(base: str, job: dict[str, Any]) -> str:
    """Show the progress; return the status that the song ended with."""
    status, progress = str(job["status"]), 0.0
    for state in _states(base, job):
        before = status, int(progress)
        status, progress = state.get("status") or status, state.get("progress") or progress
        done = round(_BAR * progress / 100)
        line = f"[{'#' * done}{'.' * (_BAR - done)}] {progress:3.0f} % {status:<10}"
        if sys.stdout.isatty():
            print(f"\r{line}", end="", flush=True)
        elif (status, int(progress)) != before:
            print(line, flush=True)
    if sys.stdout.isatty():
        print()
    return status


def _save(base: str, job: dict[str, Any]) -> Path:
    """Write the song into the current folder, never over another file."""
    with _open(urljoin(base, job["result_url"]), timeout=60) as response:
        headers: Message = response.headers
        ending = mimetypes.guess_extension(headers.get_content_type()) or ".audio"
        fallback = Path(f"{job['job_id']}{ending}")
        path = Path(Path(headers.get_filename() or fallback).name)
        if path.exists():
            path = path.with_stem(f"{path.stem}-{job['job_id']}")
        with path.open("xb") as file:
            while block := response.read(1 << 16):
                file.write(block)
    return path


def make_song(base: str) -> int:
    """Submit the song to the stack at `base`, follow it, save it; 0 when it was saved."""
    body = json.dumps(SONG).encode()
    try:
        job = _json(urllib.request.Request(f"{base}/generate", body, {"Content-Type": "application/json"}))
        print(f"song {job['job_id']}")
        status = _follow(base, job)
        if status != "completed":
            why = _json(urljoin(base, job["status_url"])).get("error") or "see the log of the stack"
            print(f"the song {status}: {why}", file=sys.stderr)
            return 1
        path = _save(base, job)
    except urllib.error.HTTPError as error:
        print(f"{base} refused with {error.code}: {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"no stack answers at {base} ({error}): start one with `make run`", file=sys.stderr)
        return 1
    print(f"saved {path.absolute()} ({path.stat().st_size:,} bytes)")
    return 0


def main() -> int:
    """Make the song with the stack that the environment's settings describe."""
    try:
        settings = Settings.load()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    try:
        return make_song(f"http://{f'[{host}]' if ':' in host else host}:{settings.port}")
    except KeyboardInterrupt:
        print("\nno longer watching; the song goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
