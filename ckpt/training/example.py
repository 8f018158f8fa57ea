"""The song that the documentation shows, with its spectrogram."""

from pathlib import Path

import soundfile
from matplotlib import pyplot

from ckpt.training.listen import log_mel
from ckpt.training.play import Player

TAGS = "pop, piano, happy, medium"
LYRICS = (
    "[Verse]\nWheels that turn without a sound\nwait until a key goes down\n[Chorus]\nSing it loud\nSing it to the end"
)
SEED = 7


def render(folder: Path, audio: Path, picture: Path) -> None:
    """Write the song as Ogg Vorbis, and its mel spectrogram as an image."""
    player = Player(folder)
    sound = player.sound(player.write([(TAGS, LYRICS)], SEED, 500)[0])
    soundfile.write(audio, sound.T, player.rate)
    mel = log_mel(sound.mean(0), player.rate, -60)
    figure, axes = pyplot.subplots(figsize=(10, 3), layout="constrained")
    axes.imshow(mel.T, origin="lower", aspect="auto", extent=(0, sound.shape[1] / player.rate, 0, mel.shape[1]))
    axes.set(xlabel="seconds", ylabel="mel band", title=TAGS)
    figure.savefig(picture, dpi=100)
