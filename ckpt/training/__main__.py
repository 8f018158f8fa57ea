"""``python -m ckpt.training train``, ``evaluate`` or ``example``; see docs/demo.md."""

from pathlib import Path

import click

DEMO, STATES = Path("ckpt/demo"), Path("data/training")
TAGS = "pop, piano, happy, medium"
LYRICS = (
    "[Verse]\nWheels that turn without a sound\nwait until a key goes down\n[Chorus]\nSing it loud\nSing it to the end"
)
SEED = 7


@click.group()
def main() -> None:
    """Make, measure and play the demo checkpoint."""


@main.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--share", default=1.0, show_default=True, help="of the steps, to try things out")
@click.option("--out", type=click.Path(path_type=Path), default=DEMO, show_default=True)
@click.option("--states", type=click.Path(path_type=Path), default=STATES, show_default=True, help="to go on from")
@click.option("--only-encoder", is_flag=True, help="train only the encoder, for the codec that is in `--out`")
def train(seed: int, share: float, out: Path, states: Path, only_encoder: bool) -> None:
    """Train the networks and write the checkpoint. After an interruption the next call continues it."""
    from ckpt.training import codec, encoder, export, language

    states.mkdir(parents=True, exist_ok=True)
    if not only_encoder:
        words = language.train(round(share * language.STEPS), states / f"language-{seed}-{share:g}.pt", seed)
        sound = codec.train(round(share * codec.TRAINED_STEPS), states / f"codec-{seed}-{share:g}.pt", seed)
        codec.fold(sound)
        export.write(out, words, sound)
    heard = encoder.train(share, states / f"encoder-{seed}-{share:g}.pt", seed, out)
    export.write_encoder(out, heard)
    for finished in states.glob(f"*-{seed}-{share:g}*.pt"):  # or the next run would have nothing left to do
        finished.unlink()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    click.echo(f"{out}: {size / 1e6:.1f} MB")


@main.command()
@click.option("--ckpt", type=click.Path(path_type=Path, exists=True), default=DEMO, show_default=True)
@click.option("--songs", default=30, show_default=True)
@click.option("--learnt", default=500, show_default=True, help="synthesised songs that the listener learns from")
@click.option("--seed", default=1_000_000, show_default=True)
@click.option("--only-encoder", is_flag=True, help="measure the encoder alone")
def evaluate(ckpt: Path, songs: int, learnt: int, seed: int, only_encoder: bool) -> None:
    """Print how near the sound is to the synthesiser's, how often tags and lyrics are followed, and what is read in
    recordings."""
    from ckpt.training import evaluate as networks
    from ckpt.training import recordings

    if not only_encoder:
        networks.evaluate(ckpt, count=songs, learnt=learnt, seed=seed)
    recordings.evaluate(ckpt, count=songs, learnt=learnt, seed=seed)


@main.command()
@click.option("--ckpt", type=click.Path(path_type=Path, exists=True), default=DEMO, show_default=True)
@click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
def example(ckpt: Path, docs: Path) -> None:
    """Let the checkpoint make one song, as a service would, and draw its mel spectrogram."""
    import soundfile
    from matplotlib import pyplot

    from ckpt.training.listen import log_mel
    from ckpt.training.play import Player

    player = Player(ckpt)
    sound = player.sound(player.write([(TAGS, LYRICS)], SEED, 500)[0])
    soundfile.write(docs / "example.ogg", sound.T, player.rate)
    mel = log_mel(sound.mean(0), player.rate)
    figure, axes = pyplot.subplots(figsize=(10, 3), layout="constrained")
    axes.imshow(mel.T, origin="lower", aspect="auto", extent=(0, sound.shape[1] / player.rate, 0, mel.shape[1]))
    axes.set(xlabel="seconds", ylabel="mel band", title=TAGS)
    figure.savefig(docs / "images/example.png", dpi=100)


if __name__ == "__main__":
    main()
