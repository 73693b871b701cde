"A stand-in of the Hugging Face hub: what its own client needs to make, fill and read a repository."

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
NAME = r"(?P<name>[\w-]+/[\w.-]+)"


class Repository:
    "Commits, each with its files: large ones by their hash, as git lfs has them."

    def __init__(self, private):
        self.private, self.commits, self.branch = private, {}, ""

    def commit(self, files: dict):
        text = json.dumps(sorted((n, hashlib.sha256(d).hexdigest()) for n, d in files.items()))
        self.branch = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.branch] = files

    def at(self, revision):
        return self.branch if revision == "main" else revision


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, value=None, headers=None, data=None):
        data = json.dumps(value or {}).encode() if data is None else data
        self.send_response(code)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def may_see(self, repository):
        return not repository.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def act(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.server.seen.append((self.command, path))
        writes = self.command in ("POST", "PUT") and "/objects/" not in path
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, dict(error="Invalid username or password."))
        for method, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                return handle(self, body, **found.groupdict())
        self.answer(404, dict(error=f"no route {path}"), {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = act

    def repository(self, name):
        found = self.server.repositories.get(name)
        if found and self.may_see(found):
            return found
        self.answer(404, dict(error="Repository not found"), {"X-Error-Code": "RepoNotFound"})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.server.address}/{name}"
        if name in self.server.repositories:
            return self.answer(409, dict(error="You already created this model repo", url=url))
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private)
        self.answer(200, dict(url=url, name=name))

    def preupload(self, body, name, revision):
        files = json.loads(body)["files"]
        modes = [
            dict(
                path=f["path"],
                uploadMode="lfs" if f["path"].endswith(".safetensors") else "regular",
                shouldIgnore=False,
            )
            for f in files
        ]
        self.answer(200, dict(files=modes))

    def batch(self, body, name):
        objects = []
        for given in json.loads(body)["objects"]:
            upload = dict(href=f"{self.server.address}/objects/{given['oid']}")
            objects.append(given | dict(authenticated=True, actions=dict(upload=upload)))
        self.answer(200, dict(transfer="basic", objects=objects))

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer(200)

    def commit(self, body, name, revision):
        if (repository := self.repository(name)) is None:
            return
        files = dict(repository.commits.get(repository.branch, {}))
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
        repository.commit(files)
        url = f"{self.server.address}/{name}/commit/{repository.branch}"
        self.answer(200, dict(success=True, commitOid=repository.branch, commitUrl=url))

    def info(self, body, name, revision="main"):
        if (repository := self.repository(name)) is None:
            return
        sha = repository.at(revision)
        if repository.commits and sha not in repository.commits:
            return self.answer(404, dict(error="x"), {"X-Error-Code": "RevisionNotFound"})
        siblings = [dict(rfilename=path) for path in repository.commits.get(sha, {})]
        facts = dict(id=name, modelId=name, sha=sha, private=repository.private, tags=[])
        self.answer(200, facts | dict(siblings=siblings, downloads=0, likes=0))

    def tree(self, body, name, revision):
        if (repository := self.repository(name)) is None:
            return
        files = repository.commits[repository.at(revision)]
        rows = [
            dict(type="file", path=path, size=len(data), oid=hashlib.sha1(data).hexdigest())
            for path, data in files.items()
        ]
        self.answer(200, rows)

    def resolve(self, body, name, revision, path):
        if (repository := self.repository(name)) is None:
            return
        sha = repository.at(revision)
        data = repository.commits.get(sha, {}).get(path)
        if data is None:
            code = "EntryNotFound" if sha in repository.commits else "RevisionNotFound"
            return self.answer(404, dict(error="x"), {"X-Error-Code": code})
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, headers={"ETag": tag, "X-Repo-Commit": sha}, data=data)


ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    (
        "POST",
        "/api/validate-yaml",
        lambda self, body: self.answer(200, dict(errors=[], warnings=[])),
    ),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/objects/(?P<oid>\w+)", Handler.put),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/(?P<revision>[^/]+)(?:/.*)?", Handler.tree),
    ("GET", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def hub():
    "A hub on a free port; `address`, `repositories` and what it has `seen` are to be looked at."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.objects, server.seen = {}, {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
