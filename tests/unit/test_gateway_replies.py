"""Reply subjects: the gateway answers NATS clients in their own inboxes, and in no service's."""

import pytest
from prometheus_client import Counter

from services.gateway.api.reply_subjects import ReplySubjects
from shared.errors import ConfigError
from shared.nats.subjects import SERVICES
from shared.settings import Settings

REFUSED = Counter("refused", "Requests that were dropped", registry=None)


def replies(user: str = "gateway", more: str = "") -> ReplySubjects:
    return ReplySubjects(Settings(nats_url=f"nats://{user}:secret@h:1", reply_prefixes=more), REFUSED)


def test_answers_go_to_inboxes_of_clients_alone() -> None:
    found = replies()
    for reply in ("_INBOX.a", "_INBOX.a.b", "_INBOX_client.a", "_INBOX_alice.a", "_R_.a.b"):
        assert found.allowed(reply, "alice"), reply
    for reply in (
        "$KV.JOBS.alice.a",
        "events.alice.a.b",
        "_INBOX",
        "_INBOX.",
        "_INBOX_bob.a",
        "_INBOXalice.a",
        "",
        ".a",
    ):
        assert not found.allowed(reply, "alice"), reply
    assert not found.allowed("_INBOX_None.a")


@pytest.mark.parametrize("name", SERVICES)
def test_no_answer_goes_to_a_service_even_where_a_tenant_or_a_setting_has_its_name(name: str) -> None:
    assert not replies(more=f"_INBOX_{name},_OTHER").allowed(f"_INBOX_{name}.a", name)
    assert replies(more=f"_INBOX_{name},_OTHER").allowed("_OTHER.a", name)


def test_a_gateway_under_another_name_spares_its_own_inbox() -> None:
    assert not replies(user="heart").allowed("_INBOX_heart.a", "heart")
    assert ReplySubjects(Settings(nats_url="nats://h:1"), REFUSED).allowed("_INBOX.a", "heart")


@pytest.mark.parametrize("value", ["$KV", "events", "_A.b", "_A,,_B", "_", "_>"])
def test_a_setting_cannot_open_what_is_no_inbox(value: str) -> None:
    with pytest.raises(ConfigError, match="HEARTMULA_REPLY_PREFIXES"):
        Settings.load({"HEARTMULA_REPLY_PREFIXES": value})
