"""The object store: S3 through the `minio` SDK in its own threads."""

import asyncio
import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

from shared.causes import address
from shared.errors import ConfigError, ObjectError, Unavailable
from shared.settings import Settings
from shared.storage.errors import storage_errors
from shared.write_failures import write_failed

THREADS = 8
PROBES = "probe/"  # what lies there proves that the store takes writes, and has no other use
# Each is in a folder of its own: SeaweedFS spreads folders over eight databases by a hash of their names, and the
# databases fail one by one. 64 keys left one of them out in a bucket called "heartmula".
PROBE_KEYS = tuple(f"{PROBES}{number}/write" for number in range(256))
_PROBE_BYTES = bytes(4096)  # less may fit into the last block of a file on a disk that is full
_RECENT = 30.0  # seconds for which a failed write counts; a worker that insists on one tries it again before that
_T = TypeVar("_T")
_PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class Stat:
    """What the store knows of an object."""

    size: int  # bytes
    etag: str
    content_type: str


@dataclass(frozen=True)
class StoredObject:
    """An object in a listing."""

    key: str
    modified: float  # seconds since the epoch, by the store's clock
    size: int  # bytes


class ObjectStore:
    """One bucket. Methods raise `ObjectError` for a missing object and `Unavailable` when the store does not answer."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self.where = f"the object store at {address(settings.s3_endpoint)} (HEARTMULA_S3_ENDPOINT)"  # for people
        self._region = settings.s3_region
        again = urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[500, 502, 503, 504])
        self._client = _client(settings, urllib3.Timeout(connect=3, read=30), again)
        # Looks at whether the store is there are repeated: none keeps a thread for long.
        self._probe = _client(settings, urllib3.Timeout(total=_PROBE_SECONDS), False)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")
        self._failed: dict[str, tuple[float, str]] = {}  # writes that failed and did not succeed since: when, and why
        self.written_at: float | None = None  # when a write succeeded last (monotonic)

    def close(self) -> None:
        """End the threads; requests that are under way are finished."""
        self._threads.shutdown(wait=False)

    async def ensure_bucket(self) -> None:
        """Create the bucket unless it exists. Raises `ConfigError` for a name that no bucket can have."""

        def ensure() -> None:
            if not self._probe.bucket_exists(bucket_name=self.bucket):
                try:
                    self._probe.make_bucket(bucket_name=self.bucket, location=self._region)
                except S3Error as error:
                    if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                        raise

        try:
            await self._run(ensure)
        except ValueError as error:
            raise ConfigError(f"HEARTMULA_S3_BUCKET: {error}") from None

    async def ping(self) -> None:
        """Raise `Unavailable` unless the bucket can be reached."""
        if not await self._run(lambda: self._probe.bucket_exists(bucket_name=self.bucket)):
            raise Unavailable("s3", f"{self.where} has no bucket {self.bucket}")

    @property
    def trouble(self) -> str | None:
        """Why a write failed that has not succeeded since, within the last half minute; None where all succeed."""
        now = time.monotonic()
        self._failed = {key: found for key, found in self._failed.items() if now - found[0] < _RECENT}
        return max(self._failed.values())[1] if self._failed else None

    async def prove_writing(self) -> None:
        """Write where a probe failed last, else under one of many keys. Raises `Unavailable`."""
        failed = [key for key in self._failed if key.startswith(PROBES)]
        for key in failed or [random.choice(PROBE_KEYS)]:
            await self.put(key, _PROBE_BYTES)

    async def put(self, key: str, data: bytes, content_type: str = "application/octet-stream") -> None:
        """Store bytes."""
        await self._write(
            key,
            lambda: self._client.put_object(
                bucket_name=self.bucket,
                object_name=key,
                data=io.BytesIO(data),
                length=len(data),
                content_type=content_type,
            ),
        )

    async def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Store a file."""
        await self._write(
            key,
            lambda: self._client.fput_object(
                bucket_name=self.bucket, object_name=key, file_path=str(path), content_type=content_type
            ),
        )

    async def get(self, key: str, offset: int = 0, length: int = 0) -> bytes:
        """Read a whole object, or up to `length` bytes of it from `offset`."""

        def read() -> bytes:
            response = self._client.get_object(bucket_name=self.bucket, object_name=key, offset=offset, length=length)
            try:
                return bytes(response.read())
            finally:
                response.close()
                response.release_conn()

        return await self._run(read)

    async def stat(self, key: str) -> Stat:
        """Size, ETag and content type of an object."""
        found = await self._run(lambda: self._client.stat_object(bucket_name=self.bucket, object_name=key))
        return Stat(int(found.size or 0), str(found.etag or ""), str(found.content_type or "application/octet-stream"))

    async def open(self, key: str, offset: int = 0, length: int = 0, block: int = 256 * 1024) -> "ObjectReader":
        """Open an object, or `length` bytes of it from `offset`, to be read block by block."""
        response = await self._run(
            lambda: self._client.get_object(bucket_name=self.bucket, object_name=key, offset=offset, length=length)
        )
        return ObjectReader(self, response, block)

    async def list(self, prefix: str) -> Sequence[StoredObject]:
        """Every object whose key begins with `prefix`."""

        def read() -> Sequence[StoredObject]:
            found = self._client.list_objects(bucket_name=self.bucket, prefix=prefix, recursive=True)
            return [
                StoredObject(str(item.object_name), item.last_modified.timestamp(), int(item.size or 0))
                for item in found
                if item.last_modified is not None
            ]

        return await self._run(read)

    async def delete(self, prefix: str) -> None:
        """Delete every object whose key begins with `prefix`."""

        def delete() -> None:
            found = self._client.list_objects(bucket_name=self.bucket, prefix=prefix, recursive=True)
            names = (DeleteObject(str(item.object_name)) for item in found)
            for error in self._client.remove_objects(bucket_name=self.bucket, delete_object_list=names):
                raise ObjectError(f"{error.name} could not be deleted: {error.message}")

        with _count_failures():
            await self._run(delete)

    async def delete_one(self, key: str) -> None:
        """Delete one object; one that is gone already is fine."""
        with _count_failures():
            await self._run(lambda: self._client.remove_object(bucket_name=self.bucket, object_name=key))

    async def _write(self, key: str, call: Callable[[], object]) -> None:
        try:
            with _count_failures():
                await self._run(call)
        except Unavailable as error:
            self._failed[key] = time.monotonic(), str(error)
            raise
        self._failed.pop(key, None)
        self.written_at = time.monotonic()

    async def _run(self, call: Callable[[], _T]) -> _T:
        with storage_errors(self.where):
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _client(settings: Settings, timeout: urllib3.Timeout, retries: urllib3.Retry | Literal[False]) -> Minio:
    url = urlsplit(settings.s3_endpoint)
    return Minio(
        endpoint=url.netloc,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key,
        secure=url.scheme == "https",
        region=settings.s3_region,  # without it the client asks the network first
        http_client=urllib3.PoolManager(maxsize=THREADS, timeout=timeout, retries=retries),
    )


@contextmanager
def _count_failures() -> Iterator[None]:
    try:
        yield
    except Unavailable:
        write_failed("s3")
        raise


class ObjectReader:
    """An open object, read in blocks: ``async for block in reader``. Close it when leaving early."""

    def __init__(self, store: ObjectStore, response: urllib3.BaseHTTPResponse, block: int) -> None:
        self._store = store
        self._response = response
        self._blocks: Iterator[bytes] = response.stream(block)

    def __aiter__(self) -> "ObjectReader":
        return self

    async def __anext__(self) -> bytes:
        block = await self._store._run(lambda: next(self._blocks, None))
        if block is None:
            raise StopAsyncIteration
        return block

    def close(self) -> None:
        """Give the connection back."""
        self._response.close()
        self._response.release_conn()
