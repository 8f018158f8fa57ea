"""The operators of a frame, each one call on CUDA (a Triton kernel) where PyTorch would need several.

Every operator is a `torch.library.custom_op` with a plain path beside it: on the CPU it computes the same in plain
PyTorch, from which the kernels are tested, and on fake tensors it has shapes alone. `launches` tells how many kernels
a call launches on CUDA.

Rows of a batch stand in a `row_table`, so that what changes from frame to frame, and from song to song, is data on the
device and not a shape.
"""

from services.tokenizer_worker.model.kernels.attention import attend, splits_for
from services.tokenizer_worker.model.kernels.int8 import int8_product
from services.tokenizer_worker.model.kernels.noise import noise
from services.tokenizer_worker.model.kernels.norm import add_norm, norm
from services.tokenizer_worker.model.kernels.operators import launches
from services.tokenizer_worker.model.kernels.rope_kv import rope_kv
from services.tokenizer_worker.model.kernels.row_table import HEAD_MULTIPLE, row_table
from services.tokenizer_worker.model.kernels.sampling import sample
from services.tokenizer_worker.model.kernels.swiglu import silu_mul

__all__ = [
    "HEAD_MULTIPLE",
    "add_norm",
    "attend",
    "int8_product",
    "launches",
    "noise",
    "norm",
    "rope_kv",
    "row_table",
    "sample",
    "silu_mul",
    "splits_for",
]
