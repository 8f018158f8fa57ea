"""CUDA graphs: work that does not change is recorded once and replayed.

A frame is some 2,000 small kernels. Launching them one by one from Python takes longer than computing them.
"""

import logging
import time
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Records work without doing it, and returns how to do it again. Raises `RuntimeError` where that cannot be."""

_FIRST = 2  # times that work is done unrecorded: it allocates, and many batches do not last longer


def cuda_graph(work: Work) -> Work:
    """A `Recorder` on the current CUDA device. What `work` allocates stays allocated as long as the recording lives."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use CUDA meanwhile without becoming part of this graph.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class Recording:
    """Repeats work: unrecorded at first, then by replaying a recording while its shapes stay the same."""

    possible = True  # until recording has failed in this process; then everything goes on unrecorded
    announced = False

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._shapes: object = None
        self._times = 0
        self._play: Work | None = None

    def run(self, work: Work, shapes: object) -> None:
        """Run `work`. Its shapes and addresses have not changed if `shapes` are equal to those of the last call."""
        if shapes != self._shapes:
            self.forget()
            self._shapes = shapes
        if self._play is None and self._recorder is not None and Recording.possible and self._times >= _FIRST:
            self._play = self._record(self._recorder, work)
        (self._play or work)()
        self._times += 1

    def forget(self) -> None:
        """Drop the recording; the next work starts a new one."""
        if self._play is not None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # a graph must not go while it is played
        self._shapes, self._times, self._play = None, 0, None

    @staticmethod
    def _record(recorder: Recorder, work: Work) -> Work | None:
        began = time.monotonic()
        try:
            play = recorder(work)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            Recording.possible = False
            log.warning("frames cannot be recorded as a CUDA graph, and will be slower: %s", error)
            return None
        level = logging.DEBUG if Recording.announced else logging.INFO
        Recording.announced = True
        log.log(level, "a frame was recorded as a CUDA graph in %.0f ms", (time.monotonic() - began) * 1000)
        return play
