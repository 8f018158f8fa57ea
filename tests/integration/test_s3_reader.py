"""The embedded store's second user, who may read finished songs and nothing else, through an S3 client."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from deploy.local.credentials import load_credentials
from deploy.local.servers.embedded import Reader, S3Server, free_port
from shared.settings import Settings
from shared.storage.keys import audio_key, tokens_key
from shared.storage.objects import ObjectStore

BUCKET = "heartmula"
SONG, TOKENS = audio_key("a-song", 1, "flac"), tokens_key("a-song", 1)


def client(server: S3Server, access_key: str, secret_key: str) -> Any:
    """Create an S3 client of ``boto3`` for a user."""
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, proxies={}),
    )


@pytest.fixture(scope="module")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[S3Server, ObjectStore]]:
    folder = tmp_path_factory.mktemp("s3-reader")
    known = load_credentials(folder)
    reader = Reader(known.s3_reader_access_key, known.s3_reader_secret_key, BUCKET)
    port = free_port(S3Server.ports)
    server = S3Server(folder, port, known.s3_access_key, known.s3_secret_key, reader=reader)
    await server.start()
    ours = ObjectStore(
        Settings(
            s3_endpoint=server.url, s3_access_key=server.access_key, s3_secret_key=server.secret_key, s3_bucket=BUCKET
        )
    )
    await ours.ensure_bucket()
    for key in (SONG, TOKENS, "audiobook/1"):
        await ours.put(key, b"la la la", "audio/flac")
    yield server, ours
    ours.close()
    await server.stop()


@pytest.fixture
def reader(store: tuple[S3Server, ObjectStore]) -> Any:
    known = store[0].reader
    assert known is not None
    return client(store[0], known.access_key, known.secret_key)


async def test_a_finished_song_is_listed_and_fetched(reader: Any) -> None:
    listed = await asyncio.to_thread(reader.list_objects_v2, Bucket=BUCKET, Prefix="audio/a-song/")
    assert [found["Key"] for found in listed["Contents"]] == [SONG]
    answer = await asyncio.to_thread(reader.get_object, Bucket=BUCKET, Key=SONG, Range="bytes=3-4")
    assert answer["Body"].read() == b"la"
    assert (await asyncio.to_thread(reader.head_object, Bucket=BUCKET, Key=SONG))["ContentType"] == "audio/flac"


@pytest.mark.parametrize(
    ("call", "values"),
    [
        ("get_object", {"Key": TOKENS}),
        ("head_object", {"Key": TOKENS}),
        ("get_object", {"Key": f"audio/../{TOKENS}"}),
        ("get_object", {"Key": "audiobook/1"}),
        ("list_objects_v2", {}),
        ("list_objects_v2", {"Prefix": "tokens/"}),
        ("list_object_versions", {"Prefix": "tokens/"}),
        ("put_object", {"Key": SONG, "Body": b"mine"}),
        ("put_object", {"Key": "audio/new", "Body": b"mine"}),
        ("put_object_tagging", {"Key": SONG, "Tagging": {"TagSet": [{"Key": "a", "Value": "b"}]}}),
        ("put_object_acl", {"Key": SONG, "ACL": "public-read"}),
        ("copy_object", {"Key": "audio/new", "CopySource": f"{BUCKET}/{SONG}"}),
        ("create_multipart_upload", {"Key": "audio/new"}),
        ("delete_object", {"Key": SONG}),
        ("delete_object", {"Key": TOKENS}),
        ("delete_bucket", {}),
        ("put_bucket_policy", {"Policy": json.dumps({"Version": "2012-10-17", "Statement": []})}),
    ],
)
async def test_a_reader_is_refused_everything_else(reader: Any, call: str, values: dict[str, Any]) -> None:
    with pytest.raises(ClientError) as refused:
        await asyncio.to_thread(getattr(reader, call), Bucket=BUCKET, **values)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403)


async def test_a_reader_cannot_delete_many_objects_at_once_either(
    reader: Any, store: tuple[S3Server, ObjectStore]
) -> None:
    delete = {"Objects": [{"Key": SONG}, {"Key": TOKENS}]}
    answer = await asyncio.to_thread(reader.delete_objects, Bucket=BUCKET, Delete=delete)
    assert {error["Code"] for error in answer["Errors"]} == {"AccessDenied"}
    assert await store[1].get(SONG) == await store[1].get(TOKENS) == b"la la la"


async def test_the_keys_of_the_reader_are_readable_by_their_owner_only(store: tuple[S3Server, ObjectStore]) -> None:
    for name in ("credentials.json", "s3.json"):
        assert stat.S_IMODE((store[0].data_dir / name).stat().st_mode) == 0o600


async def test_credentials_of_an_older_version_are_kept_and_completed(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    older = {"nats_operator_password": "p", "s3_access_key": "a", "s3_secret_key": "s"}
    path.write_text(json.dumps(older))
    found = load_credentials(tmp_path)
    assert json.loads(path.read_text()).items() >= older.items()
    assert found.s3_reader_secret_key
    assert load_credentials(tmp_path) == found
