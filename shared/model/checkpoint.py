"""The official checkpoint layout: its files, the dimensions of the models, and their tensors one by one.

::

    <path>/gen_config.json  tokenizer.json  HeartMuLa-oss-<version>/  HeartCodec-oss/  [HeartCodec-oss-encoder/]

Nothing here imports torch, so the gateway may read dimensions and the tokenizer.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shared.errors import ConfigError
from shared.model.encoder_config import EncoderConfig


class Flavor(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of one Llama stack."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


def _llama(layers: int, heads: int, kv: int, dim: int, ffn: int, positions: int) -> Flavor:
    return Flavor(
        num_layers=layers, num_heads=heads, num_kv_heads=kv, embed_dim=dim, intermediate_dim=ffn, max_seq_len=positions
    )


FLAVORS = {
    "llama-3B": _llama(28, 24, 8, 3072, 8192, 8192),
    "llama-300M": _llama(3, 8, 4, 3072, 8192, 2048),
    "llama-7B": _llama(32, 32, 8, 4096, 14336, 8192),
    "llama-400M": _llama(4, 8, 4, 3072, 8192, 2048),
}


class GenConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`gen_config.json`: the special ids."""

    text_bos_id: int = 128000
    text_eos_id: int = 128001
    audio_eos_id: int = 8193
    empty_id: int = 0


class _LMFile(msgspec.Struct, frozen=True, kw_only=True):
    backbone_flavor: str
    decoder_flavor: str
    text_vocab_size: int
    audio_vocab_size: int
    audio_num_codebooks: int = 8
    muq_dim: int = 512
    flavors: dict[str, Flavor] = {}


class LMConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of the language model."""

    version: str
    backbone: Flavor
    decoder: Flavor
    text_vocab_size: int
    audio_vocab_size: int
    num_codebooks: int
    muq_dim: int


class CodecConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions of HeartCodec, as its `config.json` names them."""

    dim: int
    codebook_size: int
    codebook_dim: int
    num_quantizers: int
    attention_head_dim: int
    in_channels: int
    num_attention_heads: int
    num_layers: int
    num_layers_2: int
    out_channels: int
    sample_rate: int
    num_samples: int
    upsample_factors: list[int]
    upsample_kernel_sizes: list[int]
    latent_hidden_dim: int
    default_kernel_size: int
    delay_kernel_size: int
    init_channel: int
    res_kernel_size: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint folder whose small files have been read. Weights are read by `tensors`."""

    path: Path
    gen: GenConfig
    lm: LMConfig
    lm_path: Path
    codec: CodecConfig
    codec_path: Path
    encoder: EncoderConfig | None  # without it recordings cannot be encoded
    encoder_path: Path
    tokenizer_path: Path


_T = TypeVar("_T")


def _read(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing: HEARTMULA_MODEL_PATH must name a folder laid out as in ckpt/README.md"
        ) from None
    except (msgspec.DecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def open_checkpoint(path: Path, version: str = "") -> Checkpoint:
    """Read the configuration files of the checkpoint folder `path`.

    `version` picks ``HeartMuLa-oss-<version>`` where there are several. Raises `ConfigError` when a file is missing
    or malformed, or when the version is ambiguous. The encoder's folder alone may be absent.
    """
    gen = _read(path / "gen_config.json", GenConfig)
    found = sorted(p.name.removeprefix("HeartMuLa-oss-") for p in path.glob("HeartMuLa-oss-*") if p.is_dir())
    if version and version not in found:
        raise ConfigError(f"HEARTMULA_MODEL_VERSION={version}: {path} has {', '.join(found) or 'no version'}")
    if not version and len(found) != 1:
        what = f"several versions ({', '.join(found)}): set HEARTMULA_MODEL_VERSION" if found else "no HeartMuLa-oss-*"
        raise ConfigError(f"{path} has {what}")
    version = version or found[0]
    lm_path, codec_path = path / f"HeartMuLa-oss-{version}", path / "HeartCodec-oss"
    encoder_path = path / "HeartCodec-oss-encoder"
    raw = _read(lm_path / "config.json", _LMFile)
    known = FLAVORS | raw.flavors
    for flavor in (raw.backbone_flavor, raw.decoder_flavor):
        if flavor not in known:
            raise ConfigError(f"{lm_path / 'config.json'} names an unknown flavor {flavor!r}")
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"{path / 'tokenizer.json'} is missing")
    return Checkpoint(
        path=path,
        gen=gen,
        lm=LMConfig(
            version=version,
            backbone=known[raw.backbone_flavor],
            decoder=known[raw.decoder_flavor],
            text_vocab_size=raw.text_vocab_size,
            audio_vocab_size=raw.audio_vocab_size,
            num_codebooks=raw.audio_num_codebooks,
            muq_dim=raw.muq_dim,
        ),
        lm_path=lm_path,
        codec=_read(codec_path / "config.json", CodecConfig),
        codec_path=codec_path,
        encoder=_encoder(encoder_path) if encoder_path.is_dir() else None,
        encoder_path=encoder_path,
        tokenizer_path=path / "tokenizer.json",
    )


def _encoder(folder: Path) -> EncoderConfig:
    config = folder / "config.json"
    return _read(config if config.is_file() else folder / "encoder_config.json", EncoderConfig)  # as older copies have


def tensors(folder: Path, wanted: re.Pattern[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, torch.Tensor)`` for every tensor in a folder of safetensors files, shard by shard.

    With `wanted` only those are read whose whole names match it.
    With ``model.safetensors.index.json`` only the shards it names are read, else every ``*.safetensors``. A tensor is
    read when it is yielded and belongs to the caller, so a loader that converts and drops each one never holds two
    copies. Raises `ConfigError` for a missing or damaged shard.
    """
    for shard, name in _stored(folder):
        if wanted and not wanted.fullmatch(name):
            continue
        with _opened(shard) as file:
            tensor = file.get_tensor(name)
        yield name, tensor
        del tensor


@dataclass(frozen=True)
class Part:
    """Some rows of a stored tensor."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # the first row
    rows: Any  # torch.Tensor [n, …]


def parts(folder: Path, nbytes: int = 64 * 2**20) -> Iterator[Part]:
    """Yield every tensor as `tensors` does, but large ones some rows at a time, about `nbytes` of them.

    A single embedding is a tenth of a language model. Tensors without dimensions come as one row.
    """
    for shard, name in _stored(folder):
        start, length = 0, 1
        while start < length:
            with _opened(shard) as file:
                whole = file.get_slice(name)
                shape = tuple(whole.get_shape())
                if shape:
                    length = shape[0]
                    count = max(1, nbytes // (4 * math.prod(shape[1:])))
                    rows = whole[start : start + count]
                else:
                    rows = file.get_tensor(name)[None]
            yield Part(name, shape, start, rows)
            start += len(rows)
            del rows


def _stored(folder: Path) -> Iterator[tuple[Path, str]]:
    """The shards of a folder and the names of the tensors in them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ConfigError(f"{index} is not a safetensors index") from None
    else:
        shards = sorted(p.name for p in folder.glob("*.safetensors"))
    if not shards:
        raise ConfigError(f"{folder} holds no safetensors files")
    for shard in shards:
        with _opened(folder / shard) as file:
            names = list(file.keys())
        for name in names:
            yield folder / shard, name


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """Open a safetensors file. It is opened for each read: while it is open, pages that were read stay mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(shard), framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{shard} cannot be read: {error}") from None
