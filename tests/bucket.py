"""A bucket on loopback, spoken to by the S3 protocol, and what was asked of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.storage import Folder

QUIET_S, PATIENCE_S = 0.3, 120.0
LEFT = {"03": "SYN_RECV", "08": "CLOSE_WAIT"}
"""States of a connection that its client has left, or that was not answered yet, as /proc/net/tcp has them."""
KEY_ID, SECRET = "plantedKeyId", "plantedSecret"
"""Stand in every URI of the bucket, and must be found nowhere else."""


@dataclass
class Bucket:
    """A bucket that a server in this process keeps."""

    options: str
    port: int
    client: Any
    """boto3's, for looking at the bucket from the side."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, key and query of each request, in order."""
    answered: int = 0
    read_only: bool = False
    """Whether what would change it is answered 403, as after the right to write has been withdrawn."""

    def uri(self, key: str) -> str:
        """Where a key is, as job files name places."""
        return f"s3://{KEY_ID}:{SECRET}@yard/{key}{self.options}"

    def folder(self, key: str) -> Folder:
        """The same as a folder."""
        return Folder(self.uri(key))

    def puts(self, under: str) -> list[str]:
        """Names of the objects below a key, in the order in which their uploads ended."""
        ends = [key for method, key, query in self.asked if method == "POST" and query.startswith("uploadId=")]
        return [key.rpartition("/")[2] for key in ends if f"/{under}/" in key]

    def settle(self) -> None:
        """Wait until what a killed client had asked for is done: the server finishes it all the same, also what it has
        not read yet."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            before = len(self.asked)
            time.sleep(QUIET_S)
            left = self._left()
            if not left and before == len(self.asked) == self.answered:
                return
            assert time.monotonic() < deadline, f"{len(self.asked)} asked, {self.answered} answered, {left} left"

    def _left(self) -> list[str]:
        """Connections whose client is gone and whose requests may not be done."""
        lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        mine = [line[3] for line in lines if line[1].endswith(f":{self.port:04X}")]
        return [LEFT[state] for state in mine if state in LEFT]


@contextmanager
def serve_bucket() -> Iterator[Bucket]:
    """An empty bucket for the length of the block."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
                          aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET)  # fmt: skip
    client.create_bucket(Bucket="yard")
    bucket = Bucket(f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1", port, client)
    serve: Any = server._server.app.__call__

    def noting(environ: Any, start: Any) -> Any:
        bucket.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]))
        try:
            if bucket.read_only and environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                start("403 Forbidden", [("Content-Length", "0")])
                return [b""]
            return serve(environ, start)
        finally:
            bucket.answered += 1

    server._server.app = noting
    try:
        yield bucket
    finally:
        server.stop()
