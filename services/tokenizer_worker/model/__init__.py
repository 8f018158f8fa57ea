"""This project's own implementation of HeartMuLa. It loads the official checkpoints unchanged.

It holds weights and computes; songs, devices and turns are the engine's business.
"""

from services.tokenizer_worker.model.heartmula import HeartMuLa
from services.tokenizer_worker.model.llama import KVCache, spread
from services.tokenizer_worker.model.sampling import Sampler, exponential_noise, frame_seed
from services.tokenizer_worker.model.weights import load_weights

__all__ = ["HeartMuLa", "KVCache", "Sampler", "exponential_noise", "frame_seed", "load_weights", "spread"]
