"""A stand-in for the hub's HTTP interface on the loopback: as much of it as pushing and opening a run need."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


class Hub:
    """Repositories: name → file → bytes; ``log`` holds what was asked, ``private`` what is private."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}  # by their sha256
        self.private: dict[str, bool] = {}
        self.log: list[str] = []
        self.address = ""


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content=None, status: int = 200, headers: dict | None = None, raw: bytes | None = None):
        body = json.dumps(content).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer({"error": "not allowed"}, 401)
        return False

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self._body()
        self.hub.log.append(f"POST {path}")
        if not self._allowed():
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.hub.repositories:
                return self._answer({"url": f"{self.hub.address}/{name}", "error": "exists"}, 409)
            self.hub.repositories[name] = {}
            self.hub.private[name] = asked.get("private", asked.get("visibility") == "private")
            return self._answer({"url": f"{self.hub.address}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            kinds = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".onnx")) else "regular",
                }
                for file in files
            ]
            return self._answer({"files": [{**kind, "shouldIgnore": False, "oid": None} for kind in kinds]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": each["oid"],
                    "size": each["size"],
                    "actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}", "header": {}}},
                }
                for each in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").rpartition("/commit/")[0]
            files = self.hub.repositories[name]
            for line in body.decode().splitlines():
                step = json.loads(line)
                value = step["value"]
                if step["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if step["key"] == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
            commit = commit_of(files)
            return self._answer(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"}
            )
        return self._answer({}, 404)

    def do_PUT(self):
        body = self._body()
        self.hub.large[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        if not self._allowed():
            return None
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.hub.repositories:
                return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            files = self.hub.repositories[name]
            if "/tree/" in path:
                listed = [
                    {"type": "file", "path": file, "size": len(content), "oid": commit_of({file: content})}
                    for file, content in files.items()
                ]
                return self._answer(listed)
            siblings = [{"rfilename": file} for file in files]
            return self._answer(
                {
                    "id": name,
                    "sha": commit_of(files),
                    "siblings": siblings,
                    "private": True,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )
        if "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            files, file = self.hub.repositories.get(name, {}), rest.partition("/")[2]
            if file not in files:
                code = "EntryNotFound" if name in self.hub.repositories else "RepoNotFound"
                return self._answer({}, 404, {"X-Error-Code": code})
            headers = {"ETag": f'"{commit_of({file: files[file]})}"', "X-Repo-Commit": commit_of(files)}
            return self._answer(headers=headers, raw=files[file])
        return self._answer({}, 404)


@contextmanager
def served():
    """A hub without anything in it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
