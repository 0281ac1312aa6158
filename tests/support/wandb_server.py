"""A small W&B server on loopback. It hands out the runs of a sweep, takes what runs send, and keeps dashboards."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

PROJECT = {"id": "UHJvamVjdA==", "name": "icl-msr", "entity": {"id": "RW50aXR5", "name": "me"}, "internalId": "UA=="}
PROJECT |= {"__typename": "Project", "entityName": "me", "createdAt": "2026-01-01", "isBenchmark": False, "user": None}
VIEWER = {
    "id": "VXNlcg==",
    "entity": "me",
    "username": "me",
    "name": "me",
    "email": "me@here",
    "flags": "{}",
    "admin": False,
}
VIEWER |= {"teams": {"edges": []}, "apiKeys": {"edges": []}, "photoUrl": None, "deletedAt": None, "signupAt": None}


class Server:
    """What the server knows."""

    def __init__(self) -> None:
        self.url = ""
        self.config = "{}"
        """Of the sweep, as YAML."""
        self.waiting: list[dict[str, Any]] = []
        """Values of the parameters of runs that are not handed out yet."""
        self.given = 0
        self.runs: dict[str, dict[str, Any]] = {}
        """The last config of each run."""
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.offsets: dict[str, list[int]] = {}
        """Positions in the history at which parts of a run began to write."""
        self.ended: dict[str, int] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL query."""
        if "upsertBucket" in query:
            name, known = given["name"], given["name"] in self.runs
            if given.get("config"):
                self.runs[name] = json.loads(given["config"])
            self.runs.setdefault(name, {})
            bucket = {"id": "UnVu", "name": name, "displayName": given.get("displayName"), "description": None}
            bucket |= {"config": given.get("config") or "{}", "sweepName": given.get("sweep"), "project": PROJECT}
            bucket |= {"historyLineCount": len(self.history.get(name, []))}
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if "RunResumeStatus" in query:
            name = given["name"]
            if name not in self.runs:
                return {"model": {**PROJECT, "bucket": None}}
            lines = self.history.get(name, [])
            bucket = {"id": "UnVu", "name": name, "summaryMetrics": "{}", "displayName": name, "config": "{}"}
            bucket |= {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0, "eventsTail": "[]"}
            bucket |= {"historyTail": json.dumps([json.dumps(line) for line in lines[-1:]]), "tags": []}
            return {"model": {**PROJECT, "bucket": {**bucket, "wandbConfig": "{}"}}}
        if "createArtifact(" in query:
            self.artifacts.append(given)
            known = {"id": "QXJ0", "state": "COMMITTED", "artifactSequence": {"id": "U2Vx", "latestArtifact": None}}
            return {"createArtifact": {"artifact": known}}  # as if its files were there already
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in given.get("files", [])]
            return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
        if "agentHeartbeat" in query:
            commands: list[dict[str, Any]] = []
            if not json.loads(given["runState"]):
                commands = [self.next_run()] if self.waiting else [{"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "QWdlbnQ="}}}
        if "upsertSweep" in query:
            self.config = given["config"]
            sweep = {"id": "U3dlZXA=", "name": "sweep1", "project": PROJECT}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if "upsertView" in query:
            self.views.append(given)
            view = {"id": "Vmlldw==", "type": given["type"], "name": "nw-view-v", "displayName": given["displayName"]}
            view |= {"description": "", "project": {**PROJECT, "entityName": "me"}, "spec": given["spec"]}
            view |= {"updatedAt": "2026-01-01T00:00:00", "createdAt": "2026-01-01T00:00:00"}
            return {"upsertView": {"view": view, "inserted": True}}
        if "sweep(" in query or "sweep (" in query:
            sweep = {"id": "U3dlZXA=", "name": "sweep1", "method": "grid", "state": "RUNNING", "config": self.config}
            sweep |= {"description": "", "displayName": "a sweep", "createdAt": "2026-01-01T00:00:00", "runCount": 0}
            sweep |= {"heartbeatAt": None, "updatedAt": None, "earlyStopJobRunning": False, "bestLoss": None}
            sweep |= {"controller": "{}", "scheduler": "{}", "priorSweeps": {"edges": []}}
            pages = {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}}
            return {"project": {**PROJECT, "sweep": {**sweep, "runs": pages}}}
        if "viewer" in query:
            return {"viewer": VIEWER, "serverInfo": {}}
        if "serverInfo" in query:
            return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}
        if "models(" in query:
            pages = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"edges": [{"node": PROJECT}], "pageInfo": pages}}
        if "internalId" in query:
            return {"project": PROJECT}
        return {}

    def next_run(self) -> dict[str, Any]:
        """Return the command of an agent's next run."""
        self.given += 1
        values = {name: {"value": value} for name, value in self.waiting.pop(0).items()}
        program = yaml.safe_load(self.config)["program"]
        return {"type": "run", "run_id": f"run{self.given}", "program": program, "args": values}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Take in a piece of a run's history."""
        if "exitcode" in body:
            self.ended[run] = body["exitcode"]
        part = (body.get("files") or {}).get("wandb-history.jsonl")
        if part:
            lines = self.history.setdefault(run, [])
            if part["offset"] != len(lines) or not lines:
                self.offsets.setdefault(run, []).append(part["offset"])
            lines[part["offset"] :] = [json.loads(line) for line in part["content"]]


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port of this machine inside the context."""
    server, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            answer: dict[str, Any] = {}
            if raw[:1] == b"{":
                body = json.loads(raw)
                with lock:
                    if self.path.endswith("/file_stream"):
                        server.stream(self.path.split("/")[-2], body)
                    elif "query" in body:
                        answer = {"data": server.answer(body["query"], body.get("variables") or {})}
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            listening.shutdown()
