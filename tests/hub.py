"""A model hub on loopback that serves one folder, and what was asked of it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Hub:
    """A hub whose only model, `acme/tiny`, is the content of a folder."""

    folder: Path
    endpoint: str = ""
    commit: str = "1" * 40
    """Where its main branch stands."""
    sent: list[str] = field(default_factory=list)
    """Names of the files that were downloaded, in order."""

    def answer(self, path: str) -> object:
        """What the interface says, as JSON values; None where there is no such thing."""
        if path.startswith(f"/api/models/acme/tiny/tree/{self.commit}"):
            return [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
                for file in sorted(self.folder.iterdir())
            ]
        if path.partition("?")[0] in ("/api/models/acme/tiny", "/api/models/acme/tiny/revision/main"):
            return {"id": "acme/tiny", "sha": self.commit, "siblings": []}
        return None


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    """A hub for the length of the block."""
    hub = Hub(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._reply()

        def do_GET(self) -> None:
            self._reply()

        def _reply(self) -> None:
            _, _, name = self.path.partition("/acme/tiny/resolve/" + hub.commit + "/")
            if name and (hub.folder / name).is_file():
                if self.command == "GET":
                    hub.sent.append(name)
                self._send(200, (hub.folder / name).read_bytes(), etag(hub.folder / name))
                return
            said = hub.answer(self.path)
            self._send(200 if said else 404, json.dumps(said).encode(), "")

        def _send(self, status: int, body: bytes, tag: str) -> None:
            self.send_response(status)
            headers = {"Content-Length": str(len(body)), "Content-Type": "application/json", "ETag": f'"{tag}"'}
            for header, value in (headers | {"X-Repo-Commit": hub.commit}).items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
