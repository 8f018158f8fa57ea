"""Checkpoint folders of the official layout with random weights, which both engines load."""

import json
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from services.codec_worker.encoder.heartencoder import HeartEncoder
from services.codec_worker.encoder.loading import codebook_shapes, stored_shapes
from services.codec_worker.model import HeartCodec
from services.codec_worker.model.loading import places as codec_places
from services.tokenizer_worker.model import HeartMuLa
from services.tokenizer_worker.model.loading import places as lm_places
from shared.model.checkpoint import FLAVORS, Checkpoint, CodecConfig, Flavor, LMConfig, open_checkpoint
from shared.model.encoder_config import CHUNK, EncoderConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "ckpt"
GOLDEN_ENCODER = Path(__file__).parents[1] / "golden" / "encoder" / "ckpt"
DEMO = Path(__file__).parents[2] / "ckpt" / "demo"
TEXT_VOCAB, AUDIO_VOCAB = 128_256, 8_197
SHARD_BYTES = 1 << 30
# Copied over and over: drawing billions of numbers would take longer than the measurement. Not a multiple of any width.
POOL = (1 << 24) - 3
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}  # of dtypes in a safetensors file

MID = (
    Flavor(num_layers=8, num_heads=8, num_kv_heads=2, embed_dim=1024, intermediate_dim=3072, max_seq_len=8192),
    Flavor(num_layers=3, num_heads=8, num_kv_heads=4, embed_dim=1024, intermediate_dim=3072, max_seq_len=2048),
)
LARGE = (FLAVORS["llama-3B"], FLAVORS["llama-300M"])
OFFICIAL_LM = LMConfig(
    version="3B",
    backbone=LARGE[0],
    decoder=LARGE[1],
    text_vocab_size=TEXT_VOCAB,
    audio_vocab_size=AUDIO_VOCAB,
    num_codebooks=8,
    muq_dim=512,
)
CODEC = CodecConfig(
    dim=512,
    codebook_size=8192,
    codebook_dim=32,
    num_quantizers=8,
    attention_head_dim=64,
    in_channels=1024,
    num_attention_heads=24,
    num_layers=24,
    num_layers_2=6,
    out_channels=256,
    sample_rate=48_000,
    num_samples=2,
    upsample_factors=[5, 4, 4, 4, 3],
    upsample_kernel_sizes=[10, 8, 8, 8, 6],
    latent_hidden_dim=128,
    default_kernel_size=7,
    delay_kernel_size=5,
    init_channel=64,
    res_kernel_size=7,
)
ENCODER = EncoderConfig(version="vqv12", chunk_samples=CHUNK)  # what it leaves out has its official value


def golden(folder: Path) -> Checkpoint:
    """The golden checkpoint with its end token out of reach, so that songs last as long as the bench wants."""
    shutil.copytree(GOLDEN, folder, dirs_exist_ok=True)
    checkpoint = open_checkpoint(folder)
    _endless(checkpoint)
    return open_checkpoint(folder)


def lm(folder: Path, flavors: tuple[Flavor, Flavor], dtype: torch.dtype) -> Checkpoint:
    """Write a language model with these stacks and the real vocabularies, beside the golden codec."""
    checkpoint = golden(folder)
    config = json.loads((checkpoint.lm_path / "config.json").read_text())
    config |= {"text_vocab_size": TEXT_VOCAB, "audio_vocab_size": AUDIO_VOCAB}
    names = (config["backbone_flavor"], config["decoder_flavor"])
    config["flavors"] = {name: msgspec.to_builtins(flavor) for name, flavor in zip(names, flavors, strict=True)}
    (checkpoint.lm_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    _endless(checkpoint)
    with torch.device("meta"):
        places = lm_places(HeartMuLa(checkpoint.lm, dtype))
    _write(checkpoint.lm_path, ((name, place.shape) for name, place in places.items()), dtype)
    return open_checkpoint(folder)


def codec(folder: Path) -> Checkpoint:
    """Write a codec of the default size in fp32, beside the golden language model."""
    checkpoint = golden(folder)
    config = json.loads((checkpoint.codec_path / "config.json").read_text()) | msgspec.to_builtins(CODEC)
    (checkpoint.codec_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        places = codec_places(HeartCodec(CODEC, torch.float32))
    plain = len(CODEC.upsample_factors) + 1  # from this layer on the scalar decoder has no weight norm
    shapes: list[tuple[str, torch.Size]] = []
    for name, place in places.items():
        layer = name.removeprefix("scalar_model.decoder.").partition(".")[0]
        if layer.isdigit() and int(layer) < plain and place.ndim == 3:
            stem = name.removesuffix("weight") + "parametrizations.weight.original"
            shapes += [(stem + "0", torch.Size((len(place), 1, 1))), (stem + "1", place.shape)]
        else:
            shapes.append((name, place.shape))
    _write(checkpoint.codec_path, shapes, torch.float32)
    return open_checkpoint(folder)


def encoder(folder: Path, config: EncoderConfig = ENCODER, codec: CodecConfig = CODEC) -> Checkpoint:
    """Write an encoder, by default of the official size, in fp32. Of the codec there are only configuration and
    codebooks."""
    checkpoint = golden(folder)
    (checkpoint.codec_path / "config.json").write_bytes(msgspec.json.encode(codec))
    checkpoint.encoder_path.mkdir(exist_ok=True)
    (checkpoint.encoder_path / "config.json").write_bytes(msgspec.json.encode(config))
    with torch.device("meta"):
        model = HeartEncoder(config, codec)
    _write(checkpoint.encoder_path, stored_shapes(model), torch.float32)
    _write(checkpoint.codec_path, codebook_shapes(model), torch.float32)
    return open_checkpoint(folder)


def frame_weights(config: LMConfig) -> int:
    """Number of parameters that a frame reads: backbone and heads once, depth decoder and its projection 7 times."""
    passes = config.num_codebooks - 1
    d, e = config.backbone.embed_dim, config.decoder.embed_dim
    heads = config.audio_vocab_size * (d + passes * e)
    return stack_weights(config.backbone) + heads + passes * (stack_weights(config.decoder) + d * e)


def stack_weights(stack: Flavor) -> int:
    """Number of weights in the matrices of all layers."""
    attention = 2 * stack.embed_dim * stack.head_dim * (stack.num_heads + stack.num_kv_heads)
    return stack.num_layers * (attention + 3 * stack.embed_dim * stack.intermediate_dim)


def _endless(checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "gen_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"audio_eos_id": checkpoint.lm.audio_vocab_size}))


def _write(folder: Path, shapes: Iterable[tuple[str, torch.Size]], dtype: torch.dtype) -> None:
    """Write tensors of these names and shapes in shards. Files are written side by side, without a copy in memory."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    shards: list[list[_Entry]] = [[]]
    weight_map: dict[str, str] = {}
    for name, shape in shapes:
        if sum(entry.nbytes for entry in shards[-1]) >= SHARD_BYTES:
            shards.append([])
        shards[-1].append(_Entry(name, shape, shape.numel() * dtype.itemsize))
        weight_map[name] = f"model-{len(shards):05}.safetensors"
    values = _Values(dtype)
    with ThreadPoolExecutor(len(shards)) as pool:
        for written in [pool.submit(_write_shard, folder / weight_map[s[0].name], s, values) for s in shards]:
            written.result()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@dataclass(frozen=True)
class _Entry:
    """A tensor of a shard."""

    name: str
    shape: torch.Size
    nbytes: int


class _Values:
    """Random values that keep activations near 1: matrices and kernels scaled by inputs, norms and magnitudes 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._drawn = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
        self._pools: dict[float, memoryview] = {}  # one for each scale
        self._lock = threading.Lock()

    def pieces(self, entry: _Entry) -> Iterator[memoryview]:
        """The bytes of a tensor, in order."""
        name, shape = entry.name, entry.shape
        if len(shape) < 2 or name.endswith("original0"):
            value = 0.25 if shape == (1,) else 0.0 if name.endswith("bias") else 1.0
            yield _bytes(torch.full(shape, value, dtype=self.dtype))
            return
        inputs = shape[1] if name == "audio_head" else shape[1:].numel()
        pool = self._pool(1.0 if "embed" in name else inputs**-0.5)
        # From a place of its own on: matrices that are alike add up instead of cancelling out.
        at, left = zlib.crc32(name.encode()) % POOL * self.dtype.itemsize, entry.nbytes
        while left:
            piece = pool[at : at + left]
            yield piece
            at, left = 0, left - len(piece)

    def _pool(self, scale: float) -> memoryview:
        with self._lock:
            if scale not in self._pools:
                self._pools[scale] = _bytes((self._drawn * scale).to(self.dtype))
            return self._pools[scale]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write_shard(path: Path, entries: list[_Entry], values: _Values) -> None:
    """Write a safetensors file: the header's length as 8 bytes, the header as JSON, the tensors' bytes."""
    header, end = {}, 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[values.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header).encode()
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in values.pieces(entry):
                written = 0
                while written < len(piece):  # the system may take less at once
                    written += file.write(piece[written:])


def long_songs(folder: Path) -> Path:
    """The demo checkpoint with the positions of the official models, for engines that use none of its weights."""
    copied = shutil.copytree(DEMO, folder / "long")
    (path,) = copied.glob("HeartMuLa-oss-*/config.json")
    config = json.loads(path.read_text())
    config["flavors"][config["backbone_flavor"]]["max_seq_len"] = FLAVORS["llama-3B"].max_seq_len
    path.write_text(json.dumps(config))
    return copied
