"""The client for code without asyncio: each method is that of `AsyncClient`, run in a background event loop."""

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from heartmula_client.background_loop import BackgroundLoop
from heartmula_client.client import AsyncClient
from heartmula_client.connection import DEFAULT_URL

P = ParamSpec("P")
T = TypeVar("T")


def _returning(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """Give the method that waits for the result of an asynchronous one."""

    @functools.wraps(method)
    def call(self: "Client", /, *args: P.args, **options: P.kwargs) -> T:
        return self._background.run(lambda: method(self._client, *args, **options))

    return call


def _yielding(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate["Client", P], Generator[T, None, None]]:
    """Give the method that yields what an asynchronous one yields."""

    @functools.wraps(method)
    def call(self: "Client", /, *args: P.args, **options: P.kwargs) -> Generator[T, None, None]:
        return self._background.iterate(method(self._client, *args, **options))

    return call


class Client:
    """Client of the service at `url`, used in ``with`` or closed with `close`. Several threads may share it.

    Its methods are those of `AsyncClient`: they raise the same errors, and repeat and resume in the same way. They also
    work where an event loop runs, and block it. Callbacks such as `on_progress` are called in another thread, and
    cannot use the client. Ending an iteration early, and Ctrl-C, release the connection. A forked process needs a
    client of its own.
    """

    def __init__(self, url: str = DEFAULT_URL, key: str | None = None) -> None:
        """`key` is the API key, where the service needs one. Raises `ValueError` for an invalid URL or key."""
        self._client = AsyncClient(url, key)
        self._background = BackgroundLoop(at_end=self._client.aclose)

    @property
    def url(self) -> str:
        """The address of the service."""
        return self._client.url

    def __enter__(self) -> Self:
        """Return the client. Nothing is sent yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections. Calls of other threads that wait are ended with `RuntimeError`."""
        self._background.close()

    generate = _returning(AsyncClient.generate)
    status = _returning(AsyncClient.status)
    song = _returning(AsyncClient.song)
    songs = _returning(AsyncClient.songs)
    tree = _returning(AsyncClient.tree)
    watch = _yielding(AsyncClient.watch)
    stream = _yielding(AsyncClient.stream)
    download = _returning(AsyncClient.download)
    finish_file = _returning(AsyncClient.finish_file)
    cancel = _returning(AsyncClient.cancel)
    forget = _returning(AsyncClient.forget)

    upload = _returning(AsyncClient.upload)
    recording = _returning(AsyncClient.recording)
    recordings = _returning(AsyncClient.recordings)
    watch_recording = _yielding(AsyncClient.watch_recording)
    download_recording = _returning(AsyncClient.download_recording)
    delete_recording = _returning(AsyncClient.delete_recording)

    gpus = _returning(AsyncClient.gpus)
    health = _returning(AsyncClient.health)
