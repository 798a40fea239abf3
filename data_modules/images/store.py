"""Where shards lie: a folder, or a bucket of S3-compatible storage, which may fail for a while."""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from data_modules.base import say
from data_modules.errors import DataError
from data_modules.files import atomic_path

PATIENCE = 300  # seconds for which storage that fails or does not answer is asked again
INSTALL = 'python -m pip install --editable ".[stream]"'


class Store:
    """Files by name, such as "train/chunk-0-7.bin", in a folder or under ``s3://bucket/path``.

    Keys, region and endpoint of S3 come from the usual variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...).
    What cannot be had is a DataError, but a file that is not there a FileNotFoundError.
    """

    def __init__(self, place: str) -> None:
        self.place, self.is_remote = place.rstrip("/"), place.startswith("s3://")
        self.bucket, _, self._prefix = self.place.removeprefix("s3://").partition("/")

    def path(self, name: str) -> Path:
        """Path of a file in a folder."""
        return Path(self.place, name)

    def read(self, name: str) -> bytes:
        """What a file holds."""
        if not self.is_remote:
            return self.path(name).read_bytes()
        key = self._key(name)
        return self._ask(name, lambda client: client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file, completely or not at all."""
        if self.is_remote:
            key = self._key(name)
            self._ask(name, lambda client: client.put_object(Bucket=self.bucket, Key=key, Body=content))
            return
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def is_empty(self) -> bool:
        """Whether nothing is there."""
        if not self.is_remote:
            return not self.path("").exists() or not any(self.path("").iterdir())
        options = {"Bucket": self.bucket, "Prefix": self._key(""), "MaxKeys": 1}
        return not self._ask("", lambda client: client.list_objects_v2(**options)["KeyCount"])

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")

    def _ask(self, name: str, request: Callable[[Any], Any]) -> Any:
        """Do a request, again and again while what is wrong may pass."""
        client, deadline, waiting = _client(os.getpid()), time.monotonic() + PATIENCE, False
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

        while True:
            try:
                return request(client)
            except ClientError as error:
                code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
                passes, reason = status >= 500 or status in (408, 429), f"{code}: {error.response['Error']['Message']}"
                if code in ("NoSuchKey", "404"):
                    raise FileNotFoundError(name) from error
            except BotoCoreError as error:
                passes, reason = isinstance(error, HTTPClientError | IncompleteReadError), str(error)
            if passes and not waiting:
                waiting = True
                say(f"{self.place} fails ({reason}); it is asked again for {PATIENCE} s")
            if not passes or time.monotonic() > deadline:
                tried = f", also after {PATIENCE} s" if passes else ""
                hint = "look at the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
                raise DataError(f"{self.place} ({client.meta.endpoint_url}) gives no {name}{tried} ({reason}); {hint}")
            time.sleep(1)


@cache
def _client(process: int) -> Any:
    """The client of a process; a forked one needs its own."""
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError as error:
        raise DataError(f"s3:// needs boto3: {INSTALL}") from error
    retries: Any = {"mode": "standard", "total_max_attempts": 3}
    checksums: Any = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    # Not all storage knows Amazon's newer checksums, and shards have their own.
    return Session().client("s3", config=Config(retries=retries, connect_timeout=5, read_timeout=30, **checksums))
