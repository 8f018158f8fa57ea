"""The client's package has types of its own. They are held against the service's here, so that none is forgotten."""

import inspect
from typing import Any, get_args

import msgspec
import pytest

from heartmula_client import AsyncClient, Client, responses, schema
from heartmula_client.responses import read_frame
from services.gateway.monitoring import devices, health
from services.gateway.recordings.status import RecordingBody, RecordingsBody, RecordingStatus
from services.gateway.songs.status import ParentBody, SongsBody, StatusBody
from services.gateway.songs.status import Song as SongBody
from services.gateway.songs.tree import TreeBody, TreeRecording, TreeSong
from services.gateway.submission.accepted import AcceptedBody
from shared.schema import base, event, job, request

LEFT_OUT = {
    "audio_url",  # for which the client has a method
    "peaks_url",  # what a page draws, and the next ones what an operator looks for
    "fence",
    "memory",
    "notes",
    "plan",
}
BODIES: list[tuple[type[msgspec.Struct], type[msgspec.Struct]]] = [
    (AcceptedBody, responses.Accepted),
    (StatusBody, responses.Song),
    (SongBody, responses.Song),
    (SongsBody, responses.Songs),
    (ParentBody, responses.Parent),
    (TreeBody, responses.Tree),
    (TreeSong, responses.Version),
    (TreeRecording, responses.TreeRecording),
    (RecordingBody, responses.Recording),
    (RecordingsBody, responses.Recordings),
    (devices.GpusBody, responses.Devices),
    (devices.GpuBody, responses.Device),
    (devices.WorkerBody, responses.Worker),
    (devices.LeaseBody, responses.Lease),
    (devices.WaitingBody, responses.Waiting),
    (health.HealthBody, responses.Health),
    (health.QueueDepth, responses.Queues),
    (health.Server, responses.Server),
]


def test_names_that_requests_and_answers_carry_are_the_services() -> None:
    for theirs, ours in [
        (job.Status, schema.Status),
        (RecordingStatus, schema.RecordingStatus),
        (request.AudioFormat, schema.AudioFormat),
        (request.Priority, schema.Priority),
        (request.WebhookEvent, schema.WebhookEvent),
    ]:
        assert get_args(ours) == get_args(theirs)
    assert schema.ENDED == job.ENDED
    assert schema.JOB_ID == base.JOB_ID


def test_generate_takes_what_a_request_may_have() -> None:
    parameters = inspect.signature(AsyncClient.generate).parameters.keys() - {"self", "key"}
    assert parameters == set(request.GenerateRequest.__struct_fields__)
    assert schema.ContinueFrom.__struct_fields__ == request.ContinueFrom.__struct_fields__


@pytest.mark.parametrize(("theirs", "ours"), BODIES, ids=lambda kind: kind.__name__)
def test_an_answer_is_read_with_all_of_its_fields(theirs: type[msgspec.Struct], ours: type[msgspec.Struct]) -> None:
    assert set(theirs.__struct_fields__) - LEFT_OUT <= set(ours.__struct_fields__)
    optional = {field.name for field in msgspec.structs.fields(ours) if not field.required}
    always = {field.name for field in msgspec.structs.fields(theirs) if field.required}
    assert set(ours.__struct_fields__) - optional <= always


SAMPLES: dict[str, Any] = {
    "job_id": "2f0c",
    "status": "generating",
    "progress": 12.5,
    "stage": "generating",
    "result_url": "/generate/2f0c/result",
    "not_before": "2026-11-23T01:04:00.000Z",
    "eta": "2026-11-23T01:04:17.517Z",
    "error": "no",
    "format": "mp3",
}


@pytest.mark.parametrize("kind", get_args(event.AnyEvent), ids=lambda kind: kind.__name__)
def test_an_event_is_read_with_all_of_its_fields(kind: type[event.AnyEvent]) -> None:
    values = {name: SAMPLES.get(name, 3) for name in kind.__struct_fields__}
    sent = event.cloud_event(kind(**values), "17")
    read = msgspec.to_builtins(read_frame(msgspec.json.encode(sent)))
    assert read == values | {"kind": kind.__struct_config__.tag, "id": "17", "time": sent.time}


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        found = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(method) for name, method in found if not name.startswith("_")}

    awaited, waiting = methods(AsyncClient), methods(Client)
    assert awaited.pop("aclose").parameters.keys() == waiting.pop("close").parameters.keys()
    assert {name: each.parameters for name, each in waiting.items()} == {
        name: each.parameters for name, each in awaited.items()
    }
