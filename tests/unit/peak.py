"""How much memory the tensors of a device take at once while code runs, with or without values in them."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations give, for as long as a tensor of Python uses them.

    What an operation takes for itself and gives back is not seen.
    """

    def __init__(self, device: str, *, beside: Tensor) -> None:
        """Count all but the storage of the tensor `beside`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._users = {beside.untyped_storage()._cdata: 1}  # tensors by storage
        self._now = 0
        self.bytes = 0
        """The peak since `begin`."""

    def begin(self) -> None:
        """Begin a new peak with what is alive now."""
        self.bytes = self._now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                self._count(tensor)
        self.bytes = max(self.bytes, self._now)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._users:
            self._now += nbytes
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._now -= nbytes
