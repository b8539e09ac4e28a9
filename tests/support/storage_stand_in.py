"""A stand-in for the JSON interface of Google Cloud Storage: objects in memory, over HTTP on this machine.

It answers what gcsfs, TensorStore and google-cloud-storage send: buckets, lists, reading of ranges, uploads in one
piece and in several, copies, moves, deletions, batches, and preconditions on generations. An object appears or changes
in one step, as there. No rights are checked, except that `forbidden` buckets refuse everything.
"""

import contextlib
import http.server
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Callable

BUCKET = "bucket"
VARIABLES = (
    "STORAGE_EMULATOR_HOST",
    "TENSORSTORE_GCS_HTTP_URL",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING",
    "GOOGLE_CLOUD_PROJECT",
    "FSSPEC_GCS_TOKEN",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT",
)


class Storage:
    """Buckets of objects.

    before: called with (method, object name) before an object changes; a ConnectionError prevents that, and ends the
    connection.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, tuple[bytes, int]]] = {BUCKET: {}}
        self.forbidden: set[str] = set()
        self.before: Callable[[str, str], object] = lambda method, name: None
        self.requests: list[str] = []
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.generation = 0
        self.lock = threading.RLock()

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects[BUCKET] if name.startswith(prefix))

    def content(self, name: str) -> bytes:
        return self.objects[BUCKET][name][0]

    def copy_to(self, directory, prefix: str) -> None:
        """Writes all objects below a prefix to a directory of this machine."""
        for name in self.names(prefix):
            if not name.endswith("/"):
                path = directory / name.removeprefix(prefix).lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.content(name))


class _Refused(Exception):
    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and content in one piece
    disable_nagle_algorithm = True
    storage: Storage

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _serve(self) -> None:
        body = self._body()
        with self.storage.lock:
            self.storage.requests.append(f"{self.command} {self.path}")
        try:
            status, headers, content = self._answer(self.command, self.path, body)
        except _Refused as error:
            status, headers = error.status, {}
            content = json.dumps({"error": {"code": error.status, "message": str(error)}}).encode()
        self._send(status, headers, content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # TensorStore gives some of its connections up
            self.wfile.write(content)

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urllib.parse.urlsplit(path)
        asked = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query).items()}
        if url.path.startswith("/batch"):
            return self._batch(body)
        if "upload_id" in asked:
            return self._piece(asked["upload_id"], body)
        found = re.fullmatch(r"/(?P<kind>upload/|download/)?storage/v1/b/(?P<bucket>[^/]+)(?P<rest>/.*)?", url.path)
        if not found:
            raise _Refused(404, f"{path}: unknown")
        bucket, rest = found["bucket"], found["rest"] or ""
        if bucket in self.storage.forbidden:
            raise _Refused(403, f"the caller has no storage.objects access to {bucket}")
        if bucket not in self.storage.objects:
            raise _Refused(404, "The specified bucket does not exist.")
        if not rest:
            return _json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "HERE"})
        if found["kind"] == "upload/":
            return self._upload(bucket, asked, body)
        name, *more = map(urllib.parse.unquote, rest.removeprefix("/o").removeprefix("/").split("/"))
        if not name:
            return _json(self._list(bucket, asked))
        if more:  # rewriteTo/b/BUCKET/o/NAME, or moveTo/o/NAME
            with self.storage.lock:
                content, _ = self._get(bucket, name)
                made = self._put(more[2] if more[0] == "rewriteTo" else bucket, more[-1], content, {})
                if more[0] == "moveTo":
                    self._delete(bucket, name)
            return _json({"done": True, "rewriteToken": None, "resource": made} if more[0] == "rewriteTo" else made)
        if method == "DELETE":
            self._delete(bucket, name)
            return 204, {}, b""
        content, generation = self._get(bucket, name)
        if asked.get("alt") == "media":
            return self._range(content, generation, asked)
        return _json(_about(bucket, name, content, generation))

    def _get(self, bucket: str, name: str) -> tuple[bytes, int]:
        with self.storage.lock:
            if name not in self.storage.objects[bucket]:
                raise _Refused(404, f"No such object: {bucket}/{name}")
            return self.storage.objects[bucket][name]

    def _put(self, bucket: str, name: str, content: bytes, asked: dict[str, str]) -> dict:
        self.storage.before("PUT", name)
        with self.storage.lock:
            there = self.storage.objects[bucket]
            before = there[name][1] if name in there else 0
            if int(asked.get("ifGenerationMatch", before)) != before:
                raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
            self.storage.generation += 1
            there[name] = content, self.storage.generation
            return _about(bucket, name, content, self.storage.generation)

    def _delete(self, bucket: str, name: str) -> None:
        self._get(bucket, name)
        self.storage.before("DELETE", name)
        with self.storage.lock:
            self.storage.objects[bucket].pop(name, None)

    def _range(self, content: bytes, generation: int, asked: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if asked.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, b""
        headers = {"Content-Type": "application/octet-stream", "x-goog-generation": str(generation)}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return 200, headers, content
        first = int(found[1]) if found[1] else max(0, len(content) - int(found[2]))
        last = int(found[2]) if found[1] and found[2] else len(content) - 1
        if first >= len(content):
            return 416, headers | {"Content-Range": f"bytes */{len(content)}"}, b""
        part = content[first : last + 1]
        where = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return 206, headers | {"Content-Range": where}, part

    def _list(self, bucket: str, asked: dict[str, str]) -> dict:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        first, end, after = asked.get("startOffset", ""), asked.get("endOffset"), asked.get("pageToken", "")
        with self.storage.lock:
            there = dict(self.storage.objects[bucket])
        items, prefixes = [], set()
        names = (name for name in sorted(there) if name.startswith(prefix) and name > after)
        chosen = [name for name in names if name >= first and (not end or name < end)]
        page = chosen[: int(asked.get("maxResults", 1000))]
        for name in page:
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(_about(bucket, name, *there[name]))
        found: dict = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
        return found | ({"nextPageToken": page[-1]} if len(page) < len(chosen) else {})

    def _upload(self, bucket: str, asked: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        kind = asked["uploadType"]
        if kind == "media":
            return _json(self._put(bucket, asked["name"], body, asked))
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
            _, about, content, _ = re.split(rb"\r?\n?--" + boundary.encode(), body)
            about, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))
            return _json(self._put(bucket, json.loads(about)["name"], content, asked))
        with self.storage.lock:
            number = str(len(self.storage.uploads))
            name = asked.get("name") or json.loads(body)["name"]
            self.storage.uploads[number] = bucket, name, bytearray()
        host, port = self.server.server_address[:2]
        place = f"http://{host}:{port}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
        return 200, {"Location": place}, b"{}"

    def _piece(self, number: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        bucket, name, held = self.storage.uploads[number]
        held += body
        if not self.headers.get("Content-Range", "bytes 0-0/*").endswith("/*"):
            return _json(self._put(bucket, name, bytes(held), {}))
        return 308, {"Range": f"bytes=0-{len(held) - 1}"}, b""

    def _batch(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
        answers = []
        for n, part in enumerate(re.findall(rb"(DELETE) (\S+)", body)):
            try:
                status, _, content = self._answer(part[0].decode(), part[1].decode(), b"")
            except _Refused as error:
                status, content = error.status, str(error).encode()
            head = f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <response-{n}>\r\n\r\n"
            answers.append(f"{head}HTTP/1.1 {status} X\r\n\r\n".encode() + content + b"\r\n")
        content = b"".join(answers) + f"--{boundary}--\r\n".encode()
        return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, content


def _about(bucket: str, name: str, content: bytes, generation: int) -> dict:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(content)),
        "generation": str(generation),
        "updated": "2026-01-31T00:00:00.000Z",
        "timeCreated": "2026-01-31T00:00:00.000Z",
    }


def _json(value: dict) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps(value).encode()


@contextlib.contextmanager
def serving():
    """Serves an empty bucket -> (the storage, the environment in which programs find it)."""
    handler = type("Handler", (_Handler,), {"storage": Storage()})
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield handler.storage, environment(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def environment(port: int) -> dict[str, str]:
    url = f"http://localhost:{port}"
    values = (url, url, "none", "none", "anon", "false")  # the last: or it asks by gRPC what kind of bucket this is
    return os.environ | dict(zip(VARIABLES, values, strict=True))
