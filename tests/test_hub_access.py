"""A hub that does not answer costs seconds, and one line that names the alternative."""

import http.server
import sys
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from ppow_jax.data import hub_access
from ppow_jax.data.conversations import check_hub_sources, load_conversations
from ppow_jax.errors import UserError
from ppow_jax.evaluation.benchmarks import load_benchmark
from ppow_jax.weights.huggingface import find_directory


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "failure", lambda endpoint: "no such host")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")


def offline(*args, **kwargs):
    assert constants.HF_HUB_OFFLINE, "the hub was asked"
    raise ConnectionError("offline mode is enabled")


REASON = "the hub https://hub.example cannot be reached (no such host), and it was not downloaded before; name a"


def test_data_sets(unreachable, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=offline))
    with pytest.raises(UserError) as error:
        load_conversations("owner/chats")
    assert str(error.value).endswith(f"{REASON} file instead") and "\n" not in str(error.value)
    check_hub_sources("sharegpt,explanations[:3],missing.jsonl,/dev/stdin")  # none of them is the hub's
    with pytest.raises(UserError, match="owner/chats"):
        check_hub_sources("sharegpt,owner/chats[:10]")
    with pytest.raises(UserError) as error:
        load_benchmark("gsm8k")
    text = str(error.value)
    assert REASON in text and "gsm8k.jsonl" in text and text.endswith("(--benchmarks=arithmetic needs no network)")
    assert "\n" not in text and not constants.HF_HUB_OFFLINE  # as before


def test_targets(unreachable, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        find_directory("owner/model")
    assert str(error.value) == f"owner/model: no such directory; {REASON} directory or a .gguf file instead"


def test_copies_are_still_found(unreachable, monkeypatch):
    rows = [{"prompt": "p"}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *args, **kwargs: rows))
    assert load_conversations("owner/chats")[0].user_turns == ("p",)


def test_nothing_is_asked_in_offline_mode(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_access, "failure", lambda endpoint: pytest.fail("asked the hub"))
    with hub_access.offline_if_unreachable() as reason:
        assert reason == ""


class Refuses(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):  # noqa: N802 (the name is the standard library's)
        self.send_error(404)

    def log_message(self, *args):
        pass


def test_any_answer_counts():
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert hub_access.failure(f"http://127.0.0.1:{server.server_port}", wait=30.0) == ""
        port = server.server_port
        server.shutdown()
    assert "refused" in hub_access.failure(f"http://127.0.0.1:{port}/gone", wait=30.0).lower()


def test_silence_ends_in_time(monkeypatch):
    over = threading.Event()

    def silent(*args, **kwargs):
        over.wait()
        raise TimeoutError

    monkeypatch.setattr(hub_access.urllib.request, "urlopen", silent)
    begin = time.monotonic()
    assert hub_access.failure("https://silent.example", wait=0.1) == "no answer within 0.1 s"
    assert time.monotonic() - begin < 30
    over.set()
