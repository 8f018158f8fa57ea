"""Songs that go on from one another, by the Python client and the command line against a real gateway and workers."""

import json
from pathlib import Path

import pytest
import soundfile

from heartmula_client import AsyncClient, ContinueFrom, Parent, Refused, UnknownSong
from shared.settings import Settings
from tests.integration.flow import open_flow
from tests.integration.gateway_fixtures import running_gateway
from tests.integration.test_client import UNKNOWN, heartmula


async def test_a_song_is_extended_and_shown_in_its_tree(settings: Settings, tmp_path: Path) -> None:
    async with (
        running_gateway(settings, tmp_path) as gateway,
        open_flow(gateway.settings, "tokenizer", "codec") as flow,
    ):
        async with AsyncClient(gateway.base) as client:
            first = (await client.generate("[Verse]\nla la", "pop,piano", max_duration_ms=4000)).job_id
            await flow.ended(first)
            came_from = ContinueFrom(job_id=first, at_ms=2050)
            second = (await client.generate("la", continue_from=came_from, min_new_ms=800, max_duration_ms=5000)).job_id
            await flow.ended(second)
            found = await client.song(second)
            assert found.parent == Parent(job_id=first, at_ms=2000)
            assert (found.request["continue_from"], found.request["min_new_ms"]) == (
                {"job_id": first, "at_ms": 2000},
                800,
            )
            assert (await client.song(first)).children == [second]
            with pytest.raises(UnknownSong):
                await client.generate("la", continue_from=ContinueFrom(job_id=UNKNOWN))
            with pytest.raises(Refused) as late:
                await client.generate("la", continue_from=ContinueFrom(job_id=first), max_duration_ms=4000)
            assert late.value.field == "max_duration_ms"

        words = ["extend", second, "--at", "0:03", "--seconds", "6", "--min-new", "1", "-o", "third.wav"]
        code, out, _ = await heartmula(gateway.base, *words, folder=tmp_path)
        assert (code, out, soundfile.info(tmp_path / "third.wav").duration) == (
            0,
            "third.wav\n",
            pytest.approx(6, abs=0.1),
        )

        async with AsyncClient(gateway.base) as client:
            tree = await client.tree(second)
            third = tree.songs[-1].job_id
            shown = [(song.job_id, song.parent, song.at_ms) for song in tree.songs]
            assert (tree.root, shown) == (first, [(first, None, None), (second, first, 2000), (third, second, 2960)])
            assert (await client.song(third)).request["lyrics"] == "la"  # its parent's
            assert [song.job_id for song in (await client.songs(parent=first)).songs] == [second]
            await client.forget(first)
            assert (await client.song(second)).parent == Parent(job_id=first, at_ms=2000, exists=False)
            assert (await client.tree(third)).root == first

        _, out, _ = await heartmula(gateway.base, "tree", third)
        assert [line.split()[:2] for line in out.splitlines()] == [[first, "gone"], ["└──", second], ["└──", third]]
        _, out, _ = await heartmula(gateway.base, "list", "--parent", second, "--json")
        assert [song["job_id"] for song in json.loads(out)["songs"]] == [third]
        code, _, err = await heartmula(gateway.base, "extend", first, "--no-wait")
        assert (code, "no such song" in err.lower()) == (4, True)
