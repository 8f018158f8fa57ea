"""Requests against the limits of the model."""

import asyncio
import threading
from typing import cast

from services.gateway.errors import ApiError
from services.gateway.submission.validation import FitRequest, ModelLimits
from shared.model.prompt import Prompt, Prompter
from shared.schema.request import GenerateRequest


class Slow:
    """A tokenizer that works until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.seen: list[str] = []
        self.at_once = self.most_at_once = 0

    def encode(self, tags: str, lyrics: str) -> Prompt:
        """Every text is one token."""
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.seen.append(tags)
        self.go_on.wait()
        self.at_once -= 1
        return Prompt((1,), (1,))

    def longest_ms(self, prompt: Prompt) -> int:
        """Return the same limit for every text."""
        return 80_000


async def test_one_text_is_tokenized_at_a_time_and_few_wait_to_be_measured() -> None:
    prompter = Slow()
    limits = ModelLimits(cast("Prompter", prompter))
    texts = [asyncio.create_task(limits.measure(FitRequest(lyrics="la", tags="pop, piano"))) for _ in range(10)]
    songs = [asyncio.create_task(limits.complete(GenerateRequest(lyrics="la", tags="rock, bass"))) for _ in range(3)]
    while not prompter.seen:
        await asyncio.sleep(0)
    refused = [text for text in texts if text.done()]
    prompter.go_on.set()
    found = await asyncio.gather(*texts, return_exceptions=True)
    assert [isinstance(text, ApiError) and text.status == 429 for text in found] == [False] * 4 + [True] * 6
    assert len(refused) == 6
    assert [(await song).tags for song in songs] == ["rock,bass"] * 3
    assert prompter.most_at_once == 1
    assert prompter.seen == ["pop,piano"] * 4 + ["rock,bass"] * 3
