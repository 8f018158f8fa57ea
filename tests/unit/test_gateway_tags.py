"""Tags as the model was trained on them, however they were written."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.submission.validation import decode_request, normalize_tags
from shared.errors import InvalidRequest
from shared.schema.job import Job


@pytest.mark.parametrize(
    ("sent", "normalized"),
    [
        ("pop, piano", "pop,piano"),
        ("pop,piano,english", "pop,piano,english"),
        (" pop ,\tpiano\n\nenglish\r\n", "pop,piano,english"),
        (",, pop,,piano ,", "pop,piano"),
        ("Pop,piano,pop,PIANO,pop", "Pop,piano"),
        ("hip hop, female vocals", "hip hop,female vocals"),
        ("流行，钢琴、女声", "流行,钢琴,女声"),
        ("<tag>pop, piano</tag>", "<tag>pop,piano</tag>"),
        (" , \n", ""),
        ("", ""),
    ],
)
def test_tags_are_divided_by_a_comma_alone(sent: str, normalized: str) -> None:
    assert normalize_tags(sent) == normalized


@given(st.text(alphabet="aAbİß ,\n\r\t，é"))
def test_normalized_tags_stay_as_they_are_and_lose_no_word(sent: str) -> None:
    normalized = normalize_tags(sent)
    assert normalize_tags(normalized) == normalized
    words = {word.lower() for word in sent.replace(",", " ").replace("，", " ").split()}
    assert {word.lower() for word in normalized.replace(",", " ").split()} == words
    assert ", " not in normalized
    assert len(normalized) <= len(sent)


def test_commas_alone_are_no_tags() -> None:
    with pytest.raises(InvalidRequest, match="both are blank"):
        decode_request(b'{"lyrics": "", "tags": " , ,\\n"}')


def test_a_record_from_before_tags_were_tidied_is_read() -> None:
    old = {"job_id": "a", "tenant": "local", "request": {"lyrics": "la", "tags": "pop, piano"}, "created_at": 1.0}
    job = msgspec.convert(old, Job)
    assert (job.request.tags, job.tags_sent) == ("pop, piano", None)
