"""An event loop in a thread of its own, in which code without asyncio runs coroutines and asynchronous generators."""

import asyncio
import atexit
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


class BackgroundLoop:
    """An event loop in a daemon thread. Any number of threads may use it at once."""

    def __init__(self, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """`at_end` is run last, when all else has ended."""
        self._lock = threading.RLock()  # reentrant: garbage collection may end a generator anywhere
        self._closed = False
        self._iterated: set[AsyncGenerator[Any, None]] = set()  # not ended yet
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()  # here, so that an error is the caller's: it takes open files
        self._thread = threading.Thread(target=self._run, args=(at_end,), name="heartmula-client", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before the interpreter freezes the thread, for which a generator would wait

    def _run(self, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live(at_end))

    async def _live(self, at_end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await self._stop.wait()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        # Each closes the generators within it. asyncio.run would close all of them at once, which fails.
        await asyncio.gather(*(items.aclose() for items in self._iterated), return_exceptions=True)
        await at_end()

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine to its end. If the wait is interrupted, by Ctrl-C for example, the coroutine is cancelled.

        Raises what it raises, and `RuntimeError` where the loop is closed or is the caller's own.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of the client cannot use the client: it would wait for itself")
        with self._lock:
            if not self._open:
                raise RuntimeError("the client is closed")
            future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise RuntimeError("the client is closed") from None
        finally:
            future.cancel()

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yield what an asynchronous generator yields. It is closed with this one, and then releases its connection."""
        turn = asyncio.Lock()  # an interrupted step ends before the generator is closed

        async def step() -> T:
            async with turn:
                return await anext(items, _END)

        async def close() -> None:
            async with turn:
                await items.aclose()
            self._iterated.discard(items)

        self._iterated.add(items)
        try:
            while (item := self.run(step)) is not _END:
                yield item
        finally:
            if not self._open:
                pass  # `close` has closed it
            elif threading.current_thread() is self._thread:  # garbage collection there: it cannot wait for itself
                self._loop.create_task(close())
            else:
                self.run(close)

    @property
    def _open(self) -> bool:
        return not self._closed and self._thread.is_alive()  # a forked process has no threads of its parent

    def close(self) -> None:
        """Cancel what runs, and end the thread. It may be called again."""
        atexit.unregister(self.close)
        with self._lock:
            if not self._open:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
