"""Where shards lie: a folder, or a bucket of S3-compatible storage, which may fail for a while."""

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
        self._has_answered = False  # once; before, what cannot be reached is a mistake in the address

    def path(self, name: str) -> Path:
        """Path of a file in a folder."""
        return Path(self.place, name)

    def read(self, name: str) -> bytes:
        """What a file holds."""
        if not self.is_remote:
            return self.path(name).read_bytes()
        return self._ask(name, lambda client, key: client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file, completely or not at all."""
        if self.is_remote:
            self._ask(name, lambda client, key: client.put_object(Bucket=self.bucket, Key=key, Body=content))
            return
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def is_empty(self) -> bool:
        """Whether nothing is there."""
        if not self.is_remote:
            return not self.path("").exists() or not any(self.path("").iterdir())
        options: Any = {"Bucket": self.bucket, "MaxKeys": 1}
        return not self._ask("", lambda client, key: client.list_objects_v2(Prefix=key, **options)["KeyCount"])

    def _ask(self, name: str, request: Callable[[Any, str], Any]) -> Any:
        """Do a request for a file's key, again and again while what is wrong may pass."""
        client, deadline, waiting = _client(), time.monotonic() + PATIENCE, False
        from botocore import exceptions as wrong

        while True:
            try:
                content = request(client, f"{self._prefix}/{name}".lstrip("/"))
                self._has_answered = True
                return content
            except wrong.ClientError as error:
                status, reason = error.response["ResponseMetadata"]["HTTPStatusCode"], error
                if error.response["Error"]["Code"] == "NoSuchKey":
                    raise FileNotFoundError(name) from error
                passes = status >= 500 or status in (408, 429)
            except wrong.BotoCoreError as error:
                passes, reason = isinstance(error, wrong.HTTPClientError | wrong.IncompleteReadError), error
                passes |= self._has_answered and isinstance(error, wrong.ConnectionError)
            if passes and not waiting:
                waiting = True
                say(f"{self.place} fails ({reason}); it is asked again for {PATIENCE} s")
            if not passes or time.monotonic() > deadline:
                hint = "look at the bucket's name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
                raise DataError(f"{self.place} ({client.meta.endpoint_url}) gives no {name} ({reason}); {hint}")
            time.sleep(1)


@cache
def _client() -> Any:
    try:
        from boto3.session import Session
        from botocore.config import Config
    except ImportError as error:
        raise DataError(f"s3:// needs boto3: {INSTALL}") from error
    checksums: Any = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    # Not all storage knows Amazon's newer checksums, and shards have their own.
    return Session().client("s3", config=Config(connect_timeout=5, read_timeout=30, **checksums))
