"""A hub on this machine: the calls of huggingface_hub that create, commit and download take.

It keeps repositories in memory and writes down every request. Files of any size come inside the
commit, so without Git LFS or Xet. Its answers have the statuses and headers of huggingface.co.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from loopback import serving

TOKEN, READ_ONLY = "hf_test", "hf_read"
LICENCES = ("mit", "apache-2.0", "gemma")


@dataclass
class Repo:
    """Its commits, the last one last, each all files by path."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]]

    @property
    def head(self) -> tuple[str, dict[str, bytes]]:
        return self.commits[-1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = [c for c in self.commits if c[0] == revision]
        return self.head if revision == "main" else found[0] if found else None

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha


@dataclass
class LocalHub:
    """What the server holds, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path)."""
    url: str = ""

    def writes(self) -> list[str]:
        """Paths of the requests that change something."""
        return [path for method, path in self.requests if method in ("POST", "PUT", "DELETE")]

    def files(self, repo: str) -> dict[str, bytes]:
        """The head of a repository."""
        return self.repos[repo].head[1]

    def client_constants(self, cache: Path) -> dict[str, Any]:
        """What the client, which reads its environment at import, is set to in this process."""
        files = "/{repo_id}/resolve/{revision}/{filename}"
        return {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + files,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }

    @contextmanager
    def running(self) -> Iterator["LocalHub"]:
        """Serve on a free port of the loopback."""
        with serving(_Handler, hub=self) as self.url:
            yield self


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def do_GET(self) -> None:
        path = self._path()
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self._who()
        if parts[:2] == ["api", "models"]:
            return self._about("/".join(parts[2:4]), parts[4:])
        return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = self._path()
        parts = path.strip("/").split("/")
        data = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(data)["content"])
        if not self._may_write():
            return self._answer(403, {"error": "You don't have the rights to do this."})
        if path == "/api/repos/create":
            return self._create(json.loads(data))
        repo = "/".join(parts[2:4])
        if repo not in self.hub.repos:
            return self._answer(404, {}, code="RepoNotFound")
        if parts[4] == "preupload":
            return self._modes(repo, json.loads(data)["files"])
        return self._commit(repo, [json.loads(line) for line in data.splitlines()])

    # --- answers ---------------------------------------------------------------------------------

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        return path

    def _token(self) -> str:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        return self._token() == TOKEN

    def _who(self) -> None:
        if self._token() not in (TOKEN, READ_ONLY):
            return self._answer(401, {"error": "Invalid credentials"})
        return self._answer(200, {"type": "user", "name": "tester", "orgs": []})

    def _visible(self, repo: str) -> Repo | None:
        found = self.hub.repos.get(repo)
        return found if found and (self._token() or not found.private) else None

    def _about(self, repo: str, rest: list[str]) -> None:
        found = self._visible(repo)
        if found is None:
            return self._answer(404 if self._token() else 401, {}, code="RepoNotFound")
        commit = found.at(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self._answer(404, {}, code="RevisionNotFound")
        sha, files = commit
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": p, "size": len(d), "oid": _git_oid(d)}
                for p, d in files.items()
            ]
            return self._answer(200, tree)
        siblings = [{"rfilename": path} for path in sorted(files)]
        about = {"id": repo, "sha": sha, "private": found.private, "siblings": siblings}
        return self._answer(200, about)

    def _file(self, repo: str, revision: str, path: str) -> None:
        found = self._visible(repo)
        if found is None:
            return self._answer(404 if self._token() else 401, {}, code="RepoNotFound")
        commit = found.at(revision)
        if commit is None:
            return self._answer(404, {}, code="RevisionNotFound")
        sha, files = commit
        if path not in files:
            return self._answer(404, {}, code="EntryNotFound", sha=sha)
        data = files[path]
        return self._send(200, data, {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": sha})

    def _validate(self, content: str) -> None:
        licence = (yaml.safe_load(content.split("---")[1]) or {}).get("license")
        bad = [] if licence in LICENCES else [{"message": f'"license" must be one of {LICENCES}'}]
        return self._answer(400 if bad else 200, {"errors": bad, "warnings": []})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if repo in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo", **url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        made = Repo(private=private, commits=[])
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repos[repo] = made
        return self._answer(200, url)

    def _modes(self, repo: str, files: list[dict[str, Any]]) -> None:
        there = self.hub.files(repo)
        modes = [
            {
                "path": f["path"],
                "uploadMode": "regular",
                "shouldIgnore": False,
                "oid": _git_oid(there[f["path"]]) if f["path"] in there else None,
            }
            for f in files
        ]
        return self._answer(200, {"files": modes})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        found = self.hub.repos[repo]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, found.head[0]):
            return self._answer(412, {"error": "A commit has happened since."})
        files = dict(found.head[1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        sha = found.commit(files)
        url = f"{self.hub.url}/{repo}/commit/{sha}"
        return self._answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def _answer(self, status: int, content: dict | list, *, code: str = "", sha: str = "") -> None:
        headers = {"Content-Type": "application/json"}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Repo-Commit": sha} if sha else {}
        self._send(status, json.dumps(content).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
