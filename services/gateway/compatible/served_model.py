"""The model of this installation, as lists of models name it."""

from dataclasses import dataclass

from shared.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class ServedModel:
    """The language model that makes all songs."""

    name: str
    created: int  # seconds since the epoch: when its folder was last changed

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ServedModel":
        """Describe a checkpoint. Raises `OSError`."""
        return cls(checkpoint.lm_path.name, int(checkpoint.lm_path.stat().st_mtime))
