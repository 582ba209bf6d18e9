"""The real hub clients against a hub on the loopback: what loads, what breaks off, and what is not there.

One process does all the asking, since the clients read their settings at import: this file, run as a script.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hub_server import LAYOUTS, Hub, client_environment, expected_text, serve, write_task_repositories

from conftest import byte_tokenizer, tiny_module
from llvlit.engine.models import REVISIONS, load_model, wrap_model
from llvlit.hub import hub_reachable
from llvlit.tasks.sources import HUB_TASKS

AT_ONCE = 5.0
"""Seconds a refusal may take that repeats nothing, on a busy machine."""


@dataclass
class Client:
    """The asking process."""

    process: subprocess.Popen[str]

    def ask(self, function: str, *arguments: object, **options: object) -> dict[str, Any]:
        """What a function of this package returns, or the name and the sentence of what it raises."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([function, arguments, options]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the asking process ended with {self.process.wait()}"
        return json.loads(answer)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    write_task_repositories(folder)
    gpt2 = folder / "models" / "openai-community" / "gpt2"
    tiny_module("gpt2").float().save_pretrained(gpt2)
    byte_tokenizer().save_pretrained(gpt2)
    for name in ("once", "always"):
        shutil.copytree(gpt2, folder / "models" / "torn" / name)
    shutil.copytree(gpt2, folder / "models" / "bare" / "weights", ignore=lambda *_: ["model.safetensors"])
    (folder / "models" / "bare" / "weights" / "pytorch_model.bin").write_bytes(b"a pickle")
    with serve(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with subprocess.Popen(
        [sys.executable, __file__],
        env=client_environment(hub, tmp_path_factory.mktemp("home")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield Client(process)
        process.kill()


@pytest.mark.parametrize("name", LAYOUTS)
def test_task_loads(name: str, hub: Hub, client: Client) -> None:
    task = client.ask("load_task", name)
    expected = {(expected_text(name, i, label), label) for i in range(10) for label in (0, 1)}
    assert set(zip(task["texts"], task["labels"], strict=True)) == expected
    assert len(task["texts"]) == 20
    assert HUB_TASKS[name].revision in task["source"]
    path = f"/datasets/{LAYOUTS[name].repo}/resolve/{HUB_TASKS[name].revision}/"
    assert any(path in request for request in hub.requests)
    assert client.ask("load_task", name)["texts"] == task["texts"], "the order is drawn from a fixed seed"


def test_branch_is_resolved_to_its_commit(client: Client) -> None:
    source = client.ask("load_task", "imdb", revision="main")["source"]
    assert len(source.split("commit ")[1]) == 40
    assert HUB_TASKS["imdb"].revision not in source


def test_model_loads_by_its_old_name_and_again_without_the_hub(hub: Hub, client: Client) -> None:
    first = client.ask("load_model", "gpt2")
    local = load_model(hub.folder / "models" / "openai-community" / "gpt2", device="cpu")
    assert first["fingerprint"] == local.fingerprint == wrap_model(local.module, local.tokenizer).fingerprint
    asked = len(hub.requests)
    assert client.ask("load_model", "gpt2")["fingerprint"] == first["fingerprint"]
    assert len(hub.requests) == asked, "a cached model is loaded without a word to the hub"


def test_models_have_revisions(hub: Hub, client: Client) -> None:
    client.ask("load_model", "gpt2")
    assert any(f"/resolve/{REVISIONS['gpt2']}/config.json" in request for request in hub.requests)
    assert not any("/gpt2/resolve/main/" in request for request in hub.requests)
    expected = client.ask("load_model", "gpt2")["fingerprint"]
    for name, options in (("gpt2@main", {}), ("gpt2", {"revision": "main"}), ("gpt2", {"revision": "2" * 40})):
        assert client.ask("load_model", name, **options)["fingerprint"] == expected
    assert any("/gpt2/resolve/main/" in request for request in hub.requests)
    answer = client.ask("load_model", "gpt2@no-such-tag")
    assert answer["error"] == "ModelError"
    assert re.search("gpt2@no-such-tag.*Revision Not Found for url: .*no-such-tag", answer["message"])


def test_transfer_broken_off_once_goes_on(hub: Hub, client: Client) -> None:
    file = "torn/once/model.safetensors"
    hub.drops[file] = 1
    model = client.ask("load_model", "torn/once")
    assert model["fingerprint"] == client.ask("load_model", "gpt2")["fingerprint"]
    assert hub.drops[file] == 0

    file = f"{LAYOUTS['sst2'].repo}/data/train-00000-of-00001.parquet"
    hub.drops[file] = 1
    assert len(client.ask("load_task", "sst2")["texts"]) == 20
    assert hub.drops[file] == 0


def test_model_broken_off_for_good_is_refused(hub: Hub, client: Client) -> None:
    hub.drops["torn/always/model.safetensors"] = math.inf
    answer = client.ask("load_model", "torn/always")
    assert (answer["error"], "torn/always" in answer["message"]) == ("ModelError", True)
    hub.drops.clear()  # the half that lies in the cache is no model, but the other half fits
    assert client.ask("load_model", "torn/always")["fingerprint"] == client.ask("load_model", "gpt2")["fingerprint"]


def test_task_broken_off_for_good_is_refused(hub: Hub, client: Client) -> None:
    hub.drops["nyu-mll/glue/cola/train-00000-of-00001.parquet"] = math.inf
    answer = client.ask("load_task", "cola")
    assert answer["error"] == "InputError"
    assert "nyu-mll/glue" in answer["message"] and "broke off" in answer["message"]


@pytest.mark.parametrize(
    ("name", "named"),
    [("bare/weights", "not .*have a file named model.safetensors"), ("nobody/nothing", ""), ("nothing", "")],
)
def test_missing_model_is_named_at_once(name: str, named: str, hub: Hub, client: Client) -> None:
    answer = client.ask("load_model", name)
    assert answer["error"] == "ModelError"
    assert re.search(f"{name}.*{named}", answer["message"])
    assert answer["seconds"] < AT_ONCE
    assert not any("commits" in request or "discussions" in request for request in hub.requests), (
        "nobody is asked to convert a pickle"
    )


def test_missing_data_are_named_at_once(hub: Hub, client: Client) -> None:
    data_sets = hub.folder / "datasets"
    shutil.rmtree(data_sets / "stanfordnlp" / "imdb")
    (data_sets / "google" / "civil_comments" / "data" / "train-00000-of-00001.parquet").unlink()
    torn = data_sets / "cardiffnlp" / "tweet_eval" / "hate" / "train-00000-of-00001.parquet"
    torn.write_bytes(torn.read_bytes()[:300])
    for name, revision, named in (
        ("imdb", None, "Repository Not Found for url: .*stanfordnlp/imdb"),
        ("civil_comments", None, "(Unable to find|Entry Not Found).*civil_comments.*data/train-00000-of-00001.parquet"),
        ("tweeteval_hate", None, "cardiffnlp/tweet_eval.*[Pp]arquet"),
        ("yelp_polarity", "no-such-branch", "Revision Not Found for url: .*yelp_polarity/revision/no-such-branch"),
    ):
        answer = client.ask("load_task", name, revision=revision)
        assert answer["error"] == "InputError"
        assert re.search(named, answer["message"])
        assert len(answer["message"]) < 600
        assert answer["seconds"] < AT_ONCE


def test_hub_may_be_exempt_from_the_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (
        ("HF_HUB_OFFLINE", "0"),
        ("HF_ENDPOINT", hub.url),
        ("HTTPS_PROXY", "http://127.0.0.1:9"),  # the port of "discard": nobody listens
        ("no_proxy", ""),
        ("NO_PROXY", ""),
    ):
        monkeypatch.setenv(variable, value)
    assert not hub_reachable()
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    assert hub_reachable()


def test_nothing_answers_once_the_hub_is_gone(hub: Hub, client: Client) -> None:
    known = client.ask("load_model", "gpt2")
    hub.stop()
    assert client.ask("load_model", "gpt2")["fingerprint"] == known["fingerprint"]
    for function, name in (("load_task", "sst2"), ("load_model", "openai-community/other")):
        answer = client.ask(function, name)
        assert "cannot be reached" in answer["message"] and name in answer["message"]
        assert answer["seconds"] < AT_ONCE


def _answer_requests() -> None:
    from llvlit.errors import LlvlitError
    from llvlit.tasks.task import load_task

    answers, sys.stdout = sys.stdout, sys.stderr
    spared, wait = [0.0], time.sleep

    def sleep(seconds: float) -> None:
        """A tenth of the clients' pauses between attempts; the rest is counted as if it had passed."""
        spared.append(0.9 * seconds)
        wait(0.1 * seconds)

    time.sleep = sleep
    for line in sys.stdin:
        function, arguments, options = json.loads(line)
        started = time.monotonic() + sum(spared)
        try:
            if function == "load_task":
                task = load_task(*arguments, **options)
                answer: dict[str, Any] = {"texts": task.texts, "labels": task.labels, "source": task.source}
            else:
                answer = {"fingerprint": load_model(*arguments, device="cpu", **options).fingerprint}
        except LlvlitError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        answer["seconds"] = time.monotonic() + sum(spared) - started
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _answer_requests()
