"""experiments.serve from the command line: its mistakes, and a process that SIGTERM ends."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from small_server import WAIT, until

from experiments import serve
from ppow_jax import cli
from ppow_jax.serving import server

TINY = ["--target=tiny", "--drafter=none", "--dtype=float32"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--context=10"], "--context=10: must be at least 64"),
        ([*TINY, "--port=0", "--context=99999"], "--context=99999: tiny has 2048 positions"),
        ([*TINY, "--speculation=chain"], "--speculation=chain: needs a drafter, but --drafter=none"),
        (["--target=tiny", "--port=0", "--speculation=tree"], "needs a drafter, but --target=tiny has none"),
        (["--datastore=x", "--speculation=chain"], "--datastore=x: --speculation=chain looks nothing up"),
        (["--host="], "--host: must not be empty"),
        (["--host=256.0.0.1"], "--host=256.0.0.1 --port=8000: cannot be used"),
        (["--model_name="], "--model_name: must not be empty"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, part, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(serve.main, serve.Settings, argv=flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("error: ") and part in last


def test_a_port_in_use_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        cli.run(serve.main, serve.Settings, argv=[*TINY, f"--port={taken.getsockname()[1]}"])
    assert ended.value.code == 2 and "cannot be used (Address already in use)" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(SystemExit):
        cli.run(serve.main, serve.Settings, argv=TINY)
    assert "not installed: uvicorn; install them: pip install 'ppow_jax[serve]'" in capsys.readouterr().err


def test_addresses_are_urls():
    with server.bind("127.0.0.1", 0) as bound:
        assert server.address(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.slow
def test_a_process_ends_with_its_answers_at_sigterm():
    command = [sys.executable, "-m", "experiments.serve", *TINY, "--port=0", "--slots=2", "--context=512"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        line = process.stdout.readline()
        found = re.search(r"serving tiny \(ngram, 2 slots\) at (http://127.0.0.1:\d+)/v1, chat at \1/$", line)
        assert found, line + process.stderr.read()
        body = {"prompt": "a", "max_tokens": 500, "temperature": 1, "seed": 1, "n": 2}
        replies: list = []
        url = f"{found[1]}/v1/completions"
        ask = threading.Thread(target=lambda: replies.append(httpx.post(url, json=body, timeout=WAIT)))
        ask.start()
        until(lambda: 'vllm:num_requests_running{model_name="tiny"} 2.0' in httpx.get(f"{found[1]}/metrics").text)
        process.send_signal(signal.SIGTERM)
        ask.join()
        log = process.stderr.read()
        assert process.wait(60) == 0, log
    assert replies[0].status_code == 200 and len(replies[0].json()["choices"]) == 2
    assert "shutting down" in log and "Traceback" not in log
