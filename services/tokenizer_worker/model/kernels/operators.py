"""Registration of the operators, and what each of them launches."""

from collections.abc import Callable
from typing import Any

from torch._library.custom_ops import CustomOpDef

_LAUNCHES: dict[str, Callable[..., int]] = {}


def declare_launches(operator: CustomOpDef, count: Callable[..., int]) -> None:
    """Declare how many kernels a call launches on CUDA; `count` takes the operator's arguments."""
    _LAUNCHES[operator._qualname] = count


def launches(name: str, *arguments: Any, **options: Any) -> int:
    """Kernels that a call of the operator ``heartmula::…`` launches on CUDA. Raises `KeyError` for other operators."""
    return _LAUNCHES[name](*arguments, **options)
