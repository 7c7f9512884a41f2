"""A server on the loopback interface that imitates the Hub for the real huggingface_hub client.

It serves repositories, commits, large files and downloads, and it can answer chosen requests with a fault.

with LoopbackHub() as hub:
    hub.url, hub.token            # values for HF_ENDPOINT and HF_TOKEN
    hub.files("user/name")        # the files of a branch: {path: bytes}
    hub.fail(number=3, how=500)   # answer the fourth request from now with status 500
                                  # how="cut" closes the connection in the middle of the request
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


class LoopbackHub:
    token, user = "hf_good", "user"

    def __init__(self):
        self.repos: dict[str, dict] = {}  # {"private": bool, "branches": {branch: [commit]}, "pulls": [commit]}
        self.objects: dict[str, bytes] = {}  # large files, by their sha256 hash
        self.requests: list[str] = []
        self.faults: dict[int, int | str] = {}
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, number: int, how: int | str, times: int = 1) -> None:
        for i in range(times):
            self.faults[len(self.requests) + number + i] = how

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        commits = self.repos[repo]["branches"][branch]
        return commits[-1]["files"] if commits else {}

    def commits(self, repo: str, branch: str = "main") -> list[dict]:
        return self.repos[repo]["branches"][branch]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms for the client's acknowledgment of its headers
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def do(self):
        hub = self.hub
        with hub.lock:
            number = len(hub.requests)
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            fault = hub.faults.get(number)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
        elif isinstance(fault, int):
            self.rfile.read(length)
            self.answer(fault, {"error": f"fault {fault}"})
        else:
            body = self.rfile.read(length)
            with hub.lock:
                self.route(path, parse_qs(urlsplit(self.path).query), body)

    do_GET = do_HEAD = do_POST = do_PUT = do  # noqa: N815

    def answer(self, status: int, content=None, **headers):
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def route(self, path: str, query: dict, body: bytes):
        hub = self.hub
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/objects/"):  # upload of a large file; its address is secret, so no token is needed
            oid = path.removeprefix("/objects/")
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer(400, {"error": "another file than was said"})
            hub.objects[oid] = body
            return self.answer(200)
        if path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            try:
                front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
                errors = [] if isinstance(front, dict) and front.get("library_name") else [{"message": "no library_name"}]
            except yaml.YAMLError as error:
                errors = [{"message": str(error)}]
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if not given and self.command in ("POST", "PUT"):
            return self.answer(401, {"error": "Invalid username or password."})
        if given and given != hub.token:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": hub.user, "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|revision|tree)/([^/]+)(?:/.*)?", path):
            return self.of_repo(*found.groups(), query, body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self.of_repo(found[1], "revision", "main", query, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.large_files(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.download(*found.groups())
        return self.answer(404, {"error": f"no such page {path}"})

    def create(self, wanted: dict):
        owner = wanted.get("organization") or self.hub.user
        if owner != self.hub.user:
            return self.answer(403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'})
        repo = f"{owner}/{wanted['name']}"
        about = {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo}
        if repo in self.hub.repos:
            return self.answer(409, about | {"error": "You already created this model repo"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[repo] = {"private": private, "branches": {"main": []}, "pulls": []}
        return self.answer(200, about)

    def of_repo(self, repo: str, what: str, revision: str, query: dict, body: bytes):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        stored = self.hub.repos[repo]
        if what == "branch":
            known = revision in stored["branches"]
            stored["branches"].setdefault(revision, list(stored["branches"]["main"]))
            return self.answer(409 if known else 200, {"error": "Reference already exists"} if known else {})
        if revision not in stored["branches"]:
            commits = [c for branch in stored["branches"].values() for c in branch if c["oid"] == revision]
            if not commits:
                return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            files, oid = commits[0]["files"], revision
        else:
            commits = stored["branches"][revision]
            files, oid = (commits[-1]["files"], commits[-1]["oid"]) if commits else ({}, "0" * 40)
        if what == "preupload":
            wanted = json.loads(body)["files"]
            return self.answer(200, {"files": [self.mode(file["path"], files) for file in wanted]})
        if what == "commit":
            return self.commit(repo, revision, files, bool(query.get("create_pr")), body)
        if what == "tree":
            return self.answer(200, [{"type": "file", "path": p, "size": len(f), "oid": blob(f)} for p, f in files.items()])
        siblings = [{"rfilename": path} for path in files]
        return self.answer(200, {"_id": "1", "id": repo, "modelId": repo, "sha": oid, "private": stored["private"],
                                 "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def mode(self, path: str, files: dict[str, bytes]) -> dict:
        large = path.endswith((".safetensors", ".bin", ".pt", ".png"))
        oid = files.get(path) and (hashlib.sha256(files[path]).hexdigest() if large else blob(files[path]))
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def large_files(self, wanted: dict):
        objects = []
        for file in wanted["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/objects/{file['oid']}", "header": {}}}
            objects.append(file if file["oid"] in self.hub.objects else file | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, revision: str, files: dict[str, bytes], pull: bool, body: bytes):
        files, message = dict(files), ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer(400, {"error": f"{value['path']}: the large file was not uploaded"})
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        stored = self.hub.repos[repo]
        number = sum(map(len, stored["branches"].values())) + len(stored["pulls"])
        oid = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
        new = {"oid": oid, "files": files, "message": message}
        where = stored["pulls"] if pull else stored["branches"][revision]
        where.append(new)
        address = f"{self.hub.url}/{repo}/commit/{oid}"
        pulled = f"{self.hub.url}/{repo}/discussions/{len(stored['pulls'])}" if pull else None
        return self.answer(
            200, {"success": True, "commitUrl": address, "commitOid": oid, "pullRequestUrl": pulled, "hookOutput": ""}
        )

    def download(self, repo: str, revision: str, path: str):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        branches = self.hub.repos[repo]["branches"]
        commits = branches.get(revision) or [c for branch in branches.values() for c in branch if c["oid"] == revision]
        if not commits:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        content = commits[-1]["files"].get(path)
        headers = {"X_Repo_Commit": commits[-1]["oid"]}
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **headers)
        return self.answer(200, content, ETag=f'"{blob(content)}"', **headers)


def blob(content: bytes) -> str:
    """Return the hash that git computes for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
