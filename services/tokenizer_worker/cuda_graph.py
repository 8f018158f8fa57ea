"""CUDA graphs: work that does not change is recorded once and replayed.

A frame is some 530 small kernels. Launching them one by one from Python takes longer than computing them.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

import torch

from shared.model.weights import TRITON_ERROR, memory_ran_out

log = logging.getLogger(__name__)

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""Records work without doing it, and returns how to do it again. Raises what torch raises where that cannot be."""

# cudaErrorStreamCapture…: the work does something that a graph cannot hold. The device is as it was.
_CAPTURE_ERRORS = range(900, 909)
_PATIENCE = 50  # frames until a recording is tried again for which there was no memory


class GraphRecorder:
    """A `Recorder` on the current CUDA device. Its graphs share the memory for what they compute on the way.

    So none may be replayed while another one is, and nothing that they leave there may be used later.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile without becoming part of this graph.
        with (
            _state_restored(self._pool),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay


@contextlib.contextmanager
def _state_restored(pool: "tuple[int, int]") -> Iterator[None]:
    """Undo what a capture leaves behind when its end fails: its stream is current, and it takes all allocations."""
    stream = torch.cuda.current_stream()
    try:
        yield
    except Exception:
        torch.cuda.set_stream(stream)
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError):  # where the capture has done it
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)  # the reference of the capture that did not end
        raise


class Recording:
    """Repeats work that never changes its shapes and addresses: at first as it is, then from a recording."""

    possible = True  # until recording has failed in this process; then everything goes on unrecorded
    announced = False

    def __init__(self, work: Work, recorder: Recorder | None) -> None:
        self._work, self._recorder = work, recorder
        self._ran = False  # as it is: that allocates, and compiles kernels
        self._wait = 0  # frames
        self._play: Work | None = None

    def run(self) -> None:
        """Run the work once. Raises what it raises; running it again is allowed then."""
        if self._play is None and self._recorder is not None and Recording.possible and self._ran:
            if self._wait == 0:
                self._play = self._record(self._recorder)
            else:
                self._wait -= 1
        (self._play or self._work)()
        self._ran = True

    def _record(self, recorder: Recorder) -> Work | None:
        began = time.monotonic()
        try:
            play = recorder(self._work)
        except RuntimeError as error:
            causes = list(_causes(error))  # the end of a capture fails as well, and hides why
            if any(memory_ran_out(cause) for cause in causes):
                self._wait = _PATIENCE  # the work itself may fit
                return None
            if not all(map(_only_not_recordable, causes)):
                raise
            Recording.possible = False
            log.warning("frames cannot be recorded as a CUDA graph, and will be slower: %s", causes[-1])
            return None
        level = logging.DEBUG if Recording.announced else logging.INFO
        Recording.announced = True
        log.log(level, "a frame was recorded as a CUDA graph in %.0f ms", (time.monotonic() - began) * 1000)
        return play


def _causes(error: BaseException | None) -> Iterator[Exception]:
    """An error and those during whose handling it was raised, the first one last."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__


def _only_not_recordable(error: Exception) -> bool:
    """Whether the device is sound, and the work is only nothing that can be recorded."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) in _CAPTURE_ERRORS
    return TRITON_ERROR not in str(error) or "captur" in str(error)
