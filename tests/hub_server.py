"""A hub on the loopback, for the real clients: repositories in folders, served over HTTP, with faults on request.

Use it from another test like this::

    write_task_repositories(folder)                          # the tasks of the hub, made-up sentences
    model.save_pretrained(folder / "models" / "openai-community" / "gpt2")
    with serve(folder) as hub:
        environment = client_environment(hub, home)          # for a subprocess: the clients read it at import
        hub.drops["openai-community/gpt2/model.safetensors"] = 1   # break that file off once, halfway
        subprocess.run([...], env=environment)
        hub.stop()                                           # from here on nothing answers

``folder/models/OWNER/NAME`` and ``folder/datasets/OWNER/NAME`` are repositories.  Each has the branch ``main``;
any commit asked for by its 40 digits is taken to be the state of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
from pyarrow import parquet

ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large")}
"""Names of old: the hub redirects them."""

FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


@dataclass
class Hub:
    """A running hub.

    Attributes
    ----------
    drops : dict of str to float
        How often the transfer of ``OWNER/NAME/PATH`` still breaks off at the middle of the file; ``math.inf``:
        always.
    requests : list of str
        What was asked, such as ``"GET /api/models/gpt2"``.
    """

    folder: Path
    server: ThreadingHTTPServer
    drops: dict[str, float] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    stopped: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def stop(self) -> None:
        """Answer nothing any more, not even on connections that are open."""
        if not self.stopped:
            self.stopped = True
            self.server.shutdown()
            self.server.server_close()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Hub of the repositories in ``folder``, until the block ends."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.hub = Hub(folder, server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield Handler.hub
    finally:
        Handler.hub.stop()


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    """Environment of a Python process whose hub this is, and whose cache lies in ``home``."""
    unset = re.compile(r"HF_.*|HUGGINGFACE_.*|TRANSFORMERS_.*|.*_proxy", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not unset.fullmatch(name)}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.stopped:
            self.close_connection = True
            return
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        asked = API.fullmatch(path) or FILE.fullmatch(path)
        if not asked:
            return self._refuse("EntryNotFound", "Not found")
        if asked["repo"] in ALIASES:
            return self._send(307, headers={"Location": self.path.replace(asked["repo"], ALIASES[asked["repo"]], 1)})
        folder = self.hub.folder / ("datasets" if (asked["kind"] or "").startswith("datasets") else "models")
        repository = folder / asked["repo"]
        revision = asked["revision"] or "main"
        if not repository.is_dir():
            return self._refuse("RepoNotFound", f"Repository {asked['repo']} not found")
        commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else _digest(asked["repo"].encode())
        if revision not in (commit, "main"):
            return self._refuse("RevisionNotFound", f"Invalid rev id: {revision}")
        if asked.re is FILE:
            return self._file(repository, asked["repo"], asked["path"], commit)
        if asked["verb"] in (None, "revision"):
            siblings = [{"rfilename": entry["path"]} for entry in _entries(repository) if entry["type"] == "file"]
            return self._json({"id": asked["repo"], "sha": commit, "private": False, "siblings": siblings, "tags": []})
        if asked["verb"] == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([entry for entry in _entries(repository) if entry["path"] in wanted])
        recursive = "recursive=true" in self.path.lower()
        below = f"{asked['path']}/" if asked["path"] else ""
        inside = [entry for entry in _entries(repository) if str(entry["path"]).startswith(below)]
        if not inside:
            return self._refuse("EntryNotFound", f"{asked['path']} does not exist", commit)
        return self._json([e for e in inside if recursive or "/" not in str(e["path"]).removeprefix(below)])

    def _file(self, repository: Path, repo: str, path: str, commit: str) -> None:
        if not (repository / path).is_file():
            return self._refuse("EntryNotFound", f"{path} does not exist", commit)
        content = (repository / path).read_bytes()
        start, stop = 0, len(content)
        if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(ranged[1]), min(int(ranged[2] or stop) + 1, stop)
        headers = {
            "ETag": f'"{_digest(content)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        cut = stop
        if self.command == "GET" and self.hub.drops.get(f"{repo}/{path}", 0) > 0:
            self.hub.drops[f"{repo}/{path}"] -= 1
            cut = max(start, min(stop, len(content) // 2))
            self.close_connection = True
        self._send(206 if ranged else 200, content[start:stop], headers, sent=cut - start)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._send(404, headers=headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, sent: int | None = None
    ) -> None:
        """Answer whose body ends after ``sent`` bytes, whatever its header says."""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _entries(repository: Path) -> list[dict[str, object]]:
    """Folders and files of a repository as the hub lists them."""
    return [
        {
            "type": "file" if path.is_file() else "directory",
            "path": path.relative_to(repository).as_posix(),
            "oid": _digest(path.read_bytes() if path.is_file() else b""),
            "size": path.stat().st_size if path.is_file() else 0,
        }
        for path in sorted(repository.rglob("*"))
    ]


@dataclass(frozen=True)
class _Layout:
    """Where the hub keeps a task, and the columns it has there."""

    repo: str
    config: str
    split: str
    columns: tuple[str, ...]
    path: str = "{config}/{split}-00000-of-00001.parquet"
    default: bool = False


_SCORES = ("toxicity", "severe_toxicity", "obscene", "threat", "insult", "identity_attack", "sexual_explicit")
_DATA = "data/{split}-00000-of-00001.parquet"
LAYOUTS = {
    "amazon_polarity": _Layout(
        "fancyzhx/amazon_polarity", "amazon_polarity", "test", ("label", "title", "content"), default=True
    ),
    "yelp_polarity": _Layout("fancyzhx/yelp_polarity", "plain_text", "test", ("text", "label")),
    "sst2": _Layout("stanfordnlp/sst2", "default", "train", ("idx", "sentence", "label"), _DATA),
    "imdb": _Layout("stanfordnlp/imdb", "plain_text", "test", ("text", "label")),
    "rotten_tomatoes": _Layout(
        "cornell-movie-review-data/rotten_tomatoes", "default", "train", ("text", "label"), "{split}.parquet"
    ),
    "civil_comments": _Layout("google/civil_comments", "default", "train", ("text", *_SCORES), _DATA),
    "tweeteval_irony": _Layout("cardiffnlp/tweet_eval", "irony", "train", ("text", "label")),
    "tweeteval_hate": _Layout("cardiffnlp/tweet_eval", "hate", "train", ("text", "label")),
    "tweeteval_offensive": _Layout("cardiffnlp/tweet_eval", "offensive", "train", ("text", "label")),
    "cola": _Layout("nyu-mll/glue", "cola", "train", ("sentence", "label", "idx")),
    "mnli": _Layout("nyu-mll/glue", "mnli", "train", ("premise", "hypothesis", "label", "idx")),
    "boolq": _Layout("google/boolq", "default", "train", ("question", "answer", "passage"), _DATA),
}


def write_task_repositories(folder: Path, n_per_class: int = 10) -> None:
    """Data sets of the hub tasks: real names, columns and paths, made-up sentences (see `expected_text`)."""
    for name, layout in LAYOUTS.items():
        repository = folder / "datasets" / layout.repo
        path = layout.path.format(config=layout.config, split=layout.split)
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        rows = [_row(name, layout, i, label) for i in range(n_per_class) for label in (0, 1)]
        rows.append(_row(name, layout, n_per_class, -1))
        columns = {column: [row[column] for row in rows] for column in layout.columns}
        types = {column: pa.float32() for column in _SCORES}
        table = pa.table({column: pa.array(cells, types.get(column)) for column, cells in columns.items()})
        parquet.write_table(table, repository / path)
        card = repository / "README.md"
        before = card.read_text(encoding="utf-8").removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
        card.write_text(
            f"{before}- config_name: {layout.config}\n  data_files:\n  - split: {layout.split}\n    path: {path}\n"
            + ("  default: true\n" if layout.default else "")
            + "---\n",
            encoding="utf-8",
        )


def _row(name: str, layout: _Layout, i: int, label: int) -> dict[str, object]:
    """Row of one class, or of none (-1); its text still has the blemishes of the real ones."""
    verdict = ("poor", "fine", "open")[label]
    text = f"Sample {i}<br />was {verdict} &amp;  done"
    row: dict[str, object] = {"text": text, "sentence": text, "label": label, "idx": 2 * i + label}
    row |= {"title": f"On {i}", "content": f'Was \\"{verdict}\\"\\nand done'}
    row |= dict.fromkeys(_SCORES, 0.9) | {"toxicity": (0.49, 0.5, None)[label]}
    row |= {"premise": f"Sample {i}", "passage": f"Sample {i}", "answer": (False, True, None)[label]}
    row |= {"hypothesis": f"was {verdict} &amp;  done", "question": f"was {verdict} &amp;  done"}
    if name == "mnli":
        row["label"] = (2, 0, 1)[label]  # contradiction, entailment, neutral
    if name == "yelp_polarity":
        row["text"] = f"Sample {i}\\n\\nwas {verdict} &amp; done"
    return row


def expected_text(name: str, i: int, label: int) -> str:
    """Text number ``i`` of a class, as `llvlit.tasks.task.load_task` should give it."""
    verdict = ("poor", "fine")[label]
    if name == "amazon_polarity":
        return f'On {i}: Was "{verdict}" and done'
    return f"Sample {i} was {verdict} & done"
