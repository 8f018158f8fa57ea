"""Unreadable messages in the queues stop no worker, and affect no song but their own."""

import msgspec

from shared.nats.subjects import FAULTS, TENANT, TOK, job_subject
from shared.schema.job import DecodeJob, TokenJob
from shared.settings import Settings
from tests.integration.flow import Flow, open_flow
from tests.integration.gateway_fixtures import eventually
from tests.integration.test_nats_junk import DEEP, JUNK


async def test_unreadable_messages_stop_no_worker(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        # A song that is in no queue: no worker may touch it, whatever messages say.
        victim = await flow.submit(1)
        job = await flow.jobs.get(victim)
        assert job is not None
        await flow.js.purge_stream(TOK)
        await flow.store.put(f"tokens/{victim}/1.safetensors", b"x")
        await flow.store.put("audio/other/1.flac", b"x")
        expected = await junk_for(flow, victim)
        workers = [await flow.worker("tokenizer"), await flow.worker("codec")]

        async def put_aside() -> bool:
            info = await flow.js.stream_info(FAULTS, subjects_filter="dead.>")
            return sum((info.state.subjects or {}).values()) >= expected

        await eventually(put_aside, "not every message was put aside")
        made = await flow.ended(await flow.submit(1))
        assert made.status == "completed", made.error
        assert [worker.returncode for worker in workers] == [None, None]
        assert await flow.jobs.get(victim) == job
        assert {f"tokens/{victim}/1.safetensors", "audio/other/1.flac"} <= set(await flow.keys())


async def junk_for(flow: Flow, victim: str) -> int:
    """Fill both queues with unreadable messages, some of which name another song; returns their number."""
    count = 0

    async def put(subject: str, data: bytes | TokenJob | DecodeJob) -> None:
        nonlocal count
        await flow.js.publish(subject, data if isinstance(data, bytes) else msgspec.json.encode(data))
        count += 1

    def decode_job(job_id: str, key: str) -> DecodeJob:
        return DecodeJob(job_id=job_id, tenant=TENANT, tokens_key=key, first_frame=0, frames=1, last=True)

    for number, junk in enumerate(JUNK):
        await put(f"jobs.tok.high.junk-{number}", junk)
        await put(f"jobs.dec.junk-{number}", junk)
    own = f"tokens/{victim}/1.safetensors"
    for name in (victim, "*", ">"):
        await put(f"jobs.tok.normal.of-{name}", TokenJob(job_id=name, tenant=TENANT))
        await put(f"jobs.dec.of-{name}", decode_job(name, own))
    # A literal `>` the server never delivers to any consumer.
    await put("jobs.tok.normal.*", TokenJob(job_id="*", tenant=TENANT))
    await put("jobs.dec.*", decode_job("*", own))
    await put("jobs.tok.normal.tenant", TokenJob(job_id="tenant", tenant="*"))
    for number, key in enumerate((own, "audio/other/1.flac", f"tokens/key-2/../{victim}/1.safetensors", "")):
        await put(f"jobs.dec.key-{number}", decode_job(f"key-{number}", key))
    return count


async def test_a_song_whose_record_cannot_be_read_waits_and_stops_no_other(settings: Settings) -> None:
    async with open_flow(settings) as flow:
        spoilt = await flow.submit(1)
        await flow.js.publish(job_subject(TENANT, spoilt), DEEP)
        worker = await flow.worker("tokenizer")
        await flow.worker("codec")
        assert (await flow.ended(await flow.submit(1))).status == "completed"
        assert worker.returncode is None

        async def left() -> bool:
            return (await flow.js.stream_info(TOK)).state.messages == 1

        await eventually(left, "the message of the other song is gone, or that of the good one still there")
