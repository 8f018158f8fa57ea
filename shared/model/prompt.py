"""Lyrics and tags as prompt token ids, and the limits that follow from the model. Without torch, for the gateway."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from shared.errors import InvalidRequest
from shared.frames import milliseconds_of
from shared.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Prompt:
    """Token ids of one song. The model sees tags, one MuQ slot, lyrics, one position each."""

    tags: tuple[int, ...]
    lyrics: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions that the prompt takes, the MuQ slot included."""
        return len(self.tags) + 1 + len(self.lyrics)


class Prompter:
    """Turns text into `Prompt`s with a checkpoint's tokenizer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_path))
        self._gen = checkpoint.gen
        self._positions = checkpoint.lm.backbone.max_seq_len
        self._vocab = checkpoint.lm.text_vocab_size

    def encode(self, tags: str, lyrics: str) -> Prompt:
        """Lower-case, wrap tags as ``<tag>…</tag>``, add bos and eos where absent (HeartMuLa's own pre-processing)."""
        tags = tags.lower()
        if not tags.startswith("<tag>"):
            tags = f"<tag>{tags}"
        if not tags.endswith("</tag>"):
            tags = f"{tags}</tag>"
        return Prompt(self._ids(tags, "tags"), self._ids(lyrics.lower(), "lyrics"))

    def _ids(self, text: str, field: str) -> tuple[int, ...]:
        ids: list[int] = self._tokenizer.encode(text).ids
        if not ids or ids[0] != self._gen.text_bos_id:
            ids = [self._gen.text_bos_id, *ids]
        if ids[-1] != self._gen.text_eos_id:
            ids = [*ids, self._gen.text_eos_id]
        if max(ids) >= self._vocab:
            raise InvalidRequest(field, "holds a character that this model's vocabulary does not know")
        return tuple(ids)

    def longest_ms(self, prompt: Prompt) -> int:
        """The longest song in milliseconds that fits the model's positions beside this prompt; may be ≤ 0."""
        return milliseconds_of(self._positions - prompt.length)
