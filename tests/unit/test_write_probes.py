"""Write probes of the object store, which have to meet a fault of any part of the embedded one."""

import hashlib

import pytest

from shared.storage.objects import PROBE_KEYS

DATABASES = 8  # of SeaweedFS's filer, `leveldb2`; a folder is in the one that the last byte of its MD5 digest names


@pytest.mark.parametrize("bucket", ["heartmula", "songs", "music-2", "a-bucket-with-a-long-name"])
def test_probes_reach_every_database_of_the_embedded_store(bucket: str) -> None:
    folders = [f"/buckets/{bucket}/{key.rpartition('/')[0]}" for key in PROBE_KEYS]
    reached = {hashlib.md5(folder.encode()).digest()[-1] % DATABASES for folder in folders}
    assert reached == set(range(DATABASES))
