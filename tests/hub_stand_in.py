"""A stand-in for the Hub on this machine: just the routes that create, upload and download use."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve():
    """Run the stand-in; gives its server, with `url`, `created` (id -> private), `messages` and `files`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.messages, server.files = {}, [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            url = {"url": f"{self.server.url}/{name}"}
            if name in self.server.created:
                return self.answer(409, url)
            self.server.created[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self.answer(200, url)
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/.+", self.path):
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **modes} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if found := re.fullmatch(r"/api/models/(.+)/commit/.+", self.path):
            return self.commit(found[1], body)
        return self.answer(404, {"error": self.path})

    def commit(self, name, body):
        repository = self.server.files.setdefault(name, {})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                self.server.messages.append(entry["value"]["summary"])
            elif entry["key"] == "file":
                repository[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "someone", "type": "user", "orgs": []})
        if found := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path):
            content = self.server.files.get(found[1], {}).get(found[2])
            if content is None:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, ETag=tag, X_Repo_Commit=COMMIT)
        if found := re.fullmatch(r"/api/models/(.+)/tree/[^/]+(/.*)?", path):
            files = self.server.files.get(found[1], {})
            rows = [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()]
            return self.answer(200, rows, X_Repo_Commit=COMMIT)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files.get(found[1], {})]
            return self.answer(200, {"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": []})
        return self.answer(404, {"error": path}, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET
