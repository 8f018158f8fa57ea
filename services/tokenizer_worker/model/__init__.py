"""This project's own implementation of HeartMuLa. It loads the official checkpoints unchanged.

It holds weights and computes; songs, devices and turns are the engine's business.
"""

from services.tokenizer_worker.model.heartmula import BatchTensors, HeartMuLa
from services.tokenizer_worker.model.kernels.noise import counter
from services.tokenizer_worker.model.llama import KVCache
from services.tokenizer_worker.model.loading import load_weights
from services.tokenizer_worker.model.sampling import Sampler

__all__ = ["BatchTensors", "HeartMuLa", "KVCache", "Sampler", "counter", "load_weights"]
