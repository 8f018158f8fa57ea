"""``python -m deploy.store_setup``: create the bucket, its lifecycle rule and two users with their rights in MinIO.

The services use the user `heartmula`, who has all rights in the bucket; `reader` may list and read finished songs, no
recordings. The rule deletes tokens that have not been deleted otherwise; recordings have none, for one that is uploaded
again lives on. Running it again changes nothing.

Variables: S3_ENDPOINT, S3_ROOT_USER, S3_ROOT_PASSWORD, S3_SERVICE_PASSWORD, S3_READER_PASSWORD and HEARTMULA_S3_BUCKET
(default ``heartmula``).
"""

import asyncio
import os
import sys
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.credentials.providers import StaticProvider
from minio.error import MinioAdminException
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from minio.minioadmin import MinioAdmin

from shared.entrypoint import quiet_libraries
from shared.errors import Unavailable
from shared.storage.errors import storage_errors
from shared.waiting import wait_until_available

_PATIENCE = 60.0  # seconds within which the server has to answer
_REFUSALS = dict.fromkeys(
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"), "S3_ROOT_USER and its password"
)
_TOKEN_DAYS = 15  # a record refers to its tokens for a week after its song's end, which may come days after them


def policies(bucket: str) -> dict[str, dict[str, Any]]:
    """Return the S3 policy of each user."""
    name = f"arn:aws:s3:::{bucket}"

    def allow(actions: list[str], resource: str, **condition: Any) -> dict[str, Any]:
        return {"Effect": "Allow", "Action": actions, "Resource": [resource]} | condition

    finished = {"Condition": {"StringLike": {"s3:prefix": ["audio/*"]}}}
    return {
        "heartmula": {
            "Version": "2012-10-17",
            "Statement": [
                allow(["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"], name),
                allow(
                    [
                        *("s3:GetObject", "s3:PutObject", "s3:DeleteObject"),
                        *("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"),
                    ],
                    f"{name}/*",
                ),
            ],
        },
        "reader": {
            "Version": "2012-10-17",
            "Statement": [
                allow(["s3:ListBucket"], name, **finished),
                allow(["s3:GetBucketLocation"], name),
                allow(["s3:GetObject"], f"{name}/audio/*"),
            ],
        },
    }


def prepare(client: Minio, bucket: str) -> None:
    """Create the bucket and its lifecycle rule. Raises the SDK's errors."""
    if not client.bucket_exists(bucket_name=bucket):
        client.make_bucket(bucket_name=bucket)
    rule = Rule(
        rule_id="tokens", status=ENABLED, rule_filter=Filter(prefix="tokens/"), expiration=Expiration(days=_TOKEN_DAYS)
    )
    client.set_bucket_lifecycle(bucket_name=bucket, config=LifecycleConfig(rules=[rule]))


def add_users(admin: MinioAdmin, bucket: str, passwords: dict[str, str]) -> None:
    """Create the users and their policies. Raises the SDK's errors."""
    for user, policy in policies(bucket).items():
        admin.policy_add(user, policy=policy)
        admin.user_add(user, passwords[user])
        admin.policy_set(user, user=user)


def main(patience: float = _PATIENCE) -> int:
    """Set up the store; returns the exit code: 0 done, 1 it does not answer or refuses, 2 a variable is missing."""
    quiet_libraries()
    try:
        endpoint, user, root, service, reader = (
            os.environ[f"S3_{name}"]
            for name in ("ENDPOINT", "ROOT_USER", "ROOT_PASSWORD", "SERVICE_PASSWORD", "READER_PASSWORD")
        )
    except KeyError as error:
        print(f"error: {error.args[0]} is not set", file=sys.stderr)
        return 2
    bucket = os.environ.get("HEARTMULA_S3_BUCKET", "heartmula")
    address, secure = urlsplit(endpoint).netloc, endpoint.startswith("https:")
    pool = urllib3.PoolManager(timeout=10.0, retries=False)
    client = Minio(address, user, root, secure=secure, region="us-east-1", http_client=pool)
    admin = MinioAdmin(
        endpoint=address, credentials=StaticProvider(user, root), region="us-east-1", secure=secure, http_client=pool
    )
    where = f"the object store at {endpoint} (S3_ENDPOINT)"

    def set_up() -> None:
        prepare(client, bucket)
        add_users(admin, bucket, {"heartmula": service, "reader": reader})

    async def attempt() -> None:
        try:
            with storage_errors(where, _REFUSALS):
                await asyncio.to_thread(set_up)
        except MinioAdminException as error:
            raise Unavailable("s3", f"{where} refuses the request: {error}") from error

    try:
        asyncio.run(wait_until_available(where, attempt, patience, lambda sentence: print(sentence, file=sys.stderr)))
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
