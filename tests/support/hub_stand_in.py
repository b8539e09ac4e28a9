"""A local stand-in of the Hugging Face hub: its HTTP interface, as far as uploading and downloading a model needs it.

Tokens: "writer" may write to every repository, "reader" to none; others are unknown.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub.utils import close_session


class Hub:
    """Contents of the stand-in. models: name -> files by path; requests: method and path of each, in their order."""

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None  # where every request is to fail with it
        self.url = ""

    def commit(self, name: str) -> str:
        """Its newest commit, which depends on its files."""
        return oid(repr(sorted(self.models[name].items())).encode())[:40]


def oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keeps the tests' output clean."""

    def answer(self, value, status=200, headers=()):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, message, code=""):
        self.answer({"error": message}, status, [("X-Error-Message", message), ("X-Error-Code", code)])

    @property
    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self):
        body, path = self.body(), self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        if path == "/":
            return self.answer(b"")
        if self.hub.status is not None:
            return self.refuse(self.hub.status, "out of order")
        if self.token not in ("writer", "reader", ""):
            return self.refuse(401, "Invalid credentials in Authorization header")
        if self.command == "POST" and not path.startswith("/api/validate") and self.token != "writer":
            return self.refuse(403, "You don't have the rights to write here")
        for method, pattern, act in (
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", lambda body: self.answer({"errors": [], "warnings": []})),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", self.preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/upload/(\w+)", self.upload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", self.commit),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+", self.tree),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            ("(?:GET|HEAD)", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.resolve),
        ):
            found = re.fullmatch(pattern, path)
            if re.fullmatch(method, self.command) and found:
                return act(*found.groups(), *([body] if self.command in ("POST", "PUT") else []))
        return self.refuse(404, f"the stand-in has no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.models:
            return self.answer({"url": f"{self.hub.url}/{name}", "error": "exists"}, 409)
        self.hub.models[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def preupload(self, name, body):
        kinds = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": kinds})

    def batch(self, name, body):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, name, body):
        self.hub.uploads[name] = body
        self.answer(b"")

    def commit(self, name, body):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.models[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.models[name][value["path"]] = self.hub.uploads[value["oid"]]
        made = self.hub.commit(name)
        self.answer({"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"})

    def readable(self, name) -> bool:
        if name not in self.hub.models or (name in self.hub.private and self.token != "writer"):
            self.refuse(404, "Repository not found", "RepoNotFound")
            return False
        if name in self.hub.gated and self.token != "writer":
            self.refuse(403, "Access to this model is restricted", "GatedRepo")
            return False
        return True

    def info(self, name, revision=None):
        if not self.readable(name):
            return None
        if revision not in (None, "main", self.hub.commit(name)):
            return self.refuse(404, "Revision not found", "RevisionNotFound")
        files = [{"rfilename": path} for path in self.hub.models[name]]
        about = {"id": name, "sha": self.hub.commit(name), "siblings": files, "tags": []}
        return self.answer(about | {"private": name in self.hub.private})

    def tree(self, name):
        if not self.readable(name):
            return None
        files = self.hub.models[name].items()
        return self.answer(
            [{"type": "file", "path": path, "size": len(content), "oid": oid(content)[:40]} for path, content in files]
        )

    def resolve(self, name, path):
        if not self.readable(name):
            return None
        content = self.hub.models[name].get(path)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        return self.answer(content, headers=[("ETag", f'"{oid(content)}"'), ("X-Repo-Commit", self.hub.commit(name))])


@contextmanager
def running():
    """A `Hub` that answers at its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def in_place(monkeypatch, directory):
    """A stand-in that huggingface_hub takes for the hub, and a user without a token."""
    with running() as hub:
        set_endpoint(monkeypatch, hub.url)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(directory / "no token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(directory / "cache"))
        close_session()
        yield hub
        close_session()


def set_endpoint(monkeypatch, url: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
