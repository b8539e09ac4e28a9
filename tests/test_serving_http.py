"""The endpoint over HTTP: the OpenAI client, streams, errors, many clients at once, clients that go, and the end."""

import asyncio
import contextlib
import functools
import json
import re
import signal
import threading

import httpx
import openai
import pytest
from small_model import MODES
from small_server import NAME, WAIT, patient, serving, until

MODE = "chain"
PROMPTS = ["a", "Once upon a time", "b" * 30, "é€ and more", "zz top", "The end?", "x = 3", "d" * 20]
MESSAGES = [{"role": "system", "content": "b"}, {"role": "user", "content": "Once upon a time"}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 3, "max_tokens": 20}
LONG = {"model": NAME, "prompt": "b", "max_tokens": 480, "temperature": 0.3, "seed": 1}


@pytest.fixture(scope="module")
def server():
    with serving(MODE) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as found:
        yield found


def generated(prompt, max_tokens: int, **settings):
    return patient().generate(prompt, max_new_tokens=max_tokens, speculation=MODES[MODE], **settings)[0]


def free(server) -> bool:
    return server[0]._engine.idle


def metric(address: str, name: str) -> float:
    page = httpx.get(f"{address}/metrics", timeout=WAIT).text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


def test_a_chat_is_that_of_generate(client):
    reply = client.chat.completions.create(model=NAME, messages=MESSAGES, extra_body={"top_k": 9}, **SAMPLED)
    want = generated(patient().chat_prompt(MESSAGES), top_k=9, **SAMPLED)
    (choice,) = reply.choices
    assert (choice.message.content, choice.finish_reason) == (want.text, want.finish_reason)
    assert choice.message.role == "assistant" and reply.object == "chat.completion" and reply.model == NAME
    assert reply.usage.prompt_tokens == len(want.prompt_ids)
    assert reply.usage.completion_tokens == len(want.token_ids)
    assert reply.usage.total_tokens == len(want.prompt_ids) + len(want.token_ids)


def test_completions_have_choices_of_every_prompt(client):
    reply = client.completions.create(model=NAME, prompt=["a", "Once upon a time"], n=2, **SAMPLED)
    asked = [("a", 3), ("a", 4), ("Once upon a time", 3), ("Once upon a time", 4)]
    wants = [generated(prompt, **SAMPLED | {"seed": seed}) for prompt, seed in asked]
    assert [choice.text for choice in reply.choices] == [want.text for want in wants]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.prompt_tokens == 1 + 16
    assert reply.usage.completion_tokens == sum(len(want.token_ids) for want in wants)


def test_prompts_may_be_token_ids_and_answers_stop(client):
    want = generated([98, 99], 20, stop="a", temperature=1.0, seed=5)
    reply = client.completions.create(model=NAME, prompt=[98, 99], max_tokens=20, stop="a", temperature=1.0, seed=5)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (want.text, want.finish_reason)
    short = client.completions.create(model=NAME, prompt="a", max_tokens=1, temperature=0)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1


def test_streams_are_the_same_text_and_tell_who_proposed_it(client):
    want = generated(patient().chat_prompt(MESSAGES), **SAMPLED)
    how = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": {"ppow": True}}
    chunks = list(client.chat.completions.create(model=NAME, messages=MESSAGES, **SAMPLED, **how))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == want.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == [want.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(want.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1
    told = [chunk.model_extra["ppow"] for chunk in chunks if "ppow" in chunk.model_extra]
    pieces = [piece for news in told for piece in news["pieces"]]
    assert "".join(text for text, _ in pieces) == want.text
    assert {source for _, source in pieces} == set(want.sources) == {"target", "drafter"}
    assert told[-1]["accepted"] == {"drafter": want.stats.num_accepted_draft_tokens, "ngram": 0, "both": 0}
    assert told[-1]["drafted"] == {"drafter": want.stats.num_draft_tokens, "ngram": 0, "both": 0}
    assert told[-1]["tokens"] == len(want.token_ids) and told[-1]["tokens_per_second"] > 0
    assert told[-1]["tau"] == pytest.approx(want.stats.mean_acceptance_length, abs=1e-3)
    plain = list(client.completions.create(model=NAME, prompt="a", stream=True, n=2, **SAMPLED))
    assert not any("ppow" in chunk.model_extra for chunk in plain)
    for n in (0, 1):
        text = "".join(chunk.choices[0].text for chunk in plain if chunk.choices[0].index == n)
        assert text == generated("a", **SAMPLED | {"seed": 3 + n}).text


def test_a_whole_answer_tells_its_pieces_too(server):
    body = {"model": NAME, "prompt": "a", "ppow": True} | SAMPLED
    reply = httpx.post(f"{server[1]}/v1/completions", json=body, timeout=WAIT).json()
    (told,) = reply["ppow"]
    assert "".join(text for text, _ in told["pieces"]) == reply["choices"][0]["text"]


def test_models_and_health(client, server):
    (found,) = client.models.list().data
    assert found.id == NAME and found.model_extra["max_model_len"] == 512
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")
    assert httpx.get(f"{server[1]}/health", timeout=WAIT).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "part"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, None, "not JSON"),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400, None, "surrogate"),
        ("POST", "/v1/completions", b'{"prompt": "a", "\\ud800": 1}', 400, None, "not a field"),
        ("POST", "/v1/completions", b'{"prompt": [[300]]}', 400, None, "0..258"),
        ("POST", "/v1/completions", b'{"prompt": [99999999999999999999]}', 400, None, "0..258"),
        ("POST", "/v1/completions", b'{"prompt": ""}', 400, None, "no tokens"),
        ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 600}', 400, "context_length_exceeded", "512"),
        ("POST", "/v1/completions", b'{"prompt": "a", "stop": "<|im_end|>x"}', 400, None, "special token"),
        ("POST", "/v1/completions", b'{"prompt": "a", "n": 64, "model": "x"}', 404, "model_not_found", "'x'"),
        ("POST", "/v1/completions", json.dumps({"prompt": ["a"] * 99}).encode(), 400, None, "99 answers"),
        ("POST", "/v1/completions", b" " * (9 << 20), 413, None, "bytes"),
        ("GET", "/v1/completions", None, 405, None, "Method Not Allowed"),
        ("GET", "/v2", None, 404, None, "Not Found"),
    ],
)  # fmt: skip
def test_errors_have_the_form_of_the_api(server, method, path, body, status, code, part):
    reply = httpx.request(method, f"{server[1]}{path}", content=body, timeout=WAIT)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code) and part in error["message"]
    assert error["type"] == "invalid_request_error" and "param" in error


def test_a_long_prompt_is_refused_before_it_is_read(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "a" * 600}])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


def test_a_full_queue_is_told(server):
    """Four in slots, one waits, one more is refused, with the seconds after which to try again."""
    with serving(MODE, queue=1) as (found, address), contextlib.ExitStack() as stack:
        url = f"{address}/v1/completions"
        streams = [
            stack.enter_context(httpx.stream("POST", url, json=LONG | {"stream": True}, timeout=WAIT)) for _ in range(5)
        ]
        assert [stream.status_code for stream in streams] == [200] * 5
        until(lambda: len(found._engine._running) == 4)
        reply = httpx.post(url, json=LONG, timeout=WAIT)
        assert reply.status_code == 429 and int(reply.headers["Retry-After"]) >= 1
        assert reply.json()["error"]["code"] == "queue_full"
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError):
                client.completions.create(**LONG)
        for stream in streams:
            stream.close()
        until(lambda: found._engine.idle)
        assert metric(address, "ppow:request_error_total") >= 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(server, stream):
    cancelled = metric(server[1], "ppow:request_error_total")
    with httpx.Client(timeout=httpx.Timeout(WAIT, read=0.5)) as client, contextlib.suppress(httpx.ReadTimeout):
        with client.stream("POST", f"{server[1]}/v1/completions", json=LONG | {"n": 3, "stream": stream}) as reply:
            next(reply.iter_lines(), None)
    until(lambda: free(server))
    assert metric(server[1], "ppow:request_error_total") >= cancelled
    assert not server[0]._engine.machine.live_B.any()


def test_a_request_that_takes_too_long_ends_with_an_error():
    with serving(MODE, seconds=0.01) as (_, address):
        reply = httpx.post(f"{address}/v1/completions", json=LONG | {"n": 3}, timeout=WAIT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "time_limit")
        with httpx.stream("POST", f"{address}/v1/completions", json=LONG | {"stream": True}, timeout=WAIT) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "time_limit"
        assert lines[-1] == "data: [DONE]"


def test_metrics_count_under_the_names_of_vllm(server, client):
    names = ["prompt_tokens", "generation_tokens", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"]
    names += ["spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos", "request_success"]
    sources = [f"ppow:spec_decode_num_{kind}_tokens_by_source_total" for kind in ("draft", "accepted")]
    until(lambda: free(server))
    before = {name: metric(server[1], f"vllm:{name}_total") for name in names}
    client.completions.create(model=NAME, prompt="Once upon a time", **SAMPLED)
    want = generated("Once upon a time", **SAMPLED)
    new = {name: metric(server[1], f"vllm:{name}_total") - before[name] for name in names}
    accepted, stats = want.stats.num_accepted_draft_tokens, want.stats
    assert list(new.values()) == [16, 20, stats.num_spec_steps, stats.num_draft_tokens, accepted, accepted, 1]
    page = httpx.get(f"{server[1]}/metrics", timeout=WAIT)
    assert page.headers["content-type"].startswith("text/plain")
    for name, total in zip(sources, ("draft", "accepted"), strict=True):
        label = f'{{model_name="{NAME}",source="drafter"}}'
        assert metric(server[1], name) == metric(server[1], f"vllm:spec_decode_num_{total}_tokens_total") > 0
        assert f"{name}{label} {metric(server[1], name)}" in page.text  # all of it by the drafter
    assert 'finished_reason="length"' in page.text and f'model_name="{NAME}",position="1"' in page.text
    for name in ("time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"):
        assert metric(server[1], f"vllm:{name}") > 0
    assert metric(server[1], "vllm:num_requests_running") == metric(server[1], "vllm:num_requests_waiting") == 0


@functools.cache
def wanted(i: int):
    prompt, settings = asked(i)
    return generated(prompt, **settings)


def asked(i: int):
    """One of 24 requests of mixed sizes."""
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}]
    return PROMPTS[i % 8], {"max_tokens": 3 + i, "seed": i} | kinds[i // 8]


@pytest.mark.full
def test_two_hundred_clients_of_which_a_third_go():
    """Every third client goes after its first chunk; the others get the answers of `generate`."""

    async def one(client: openai.AsyncOpenAI, i: int) -> tuple[str, str] | None:
        prompt, settings = asked(i % 24)
        if i % 3:
            reply = await client.completions.create(model=NAME, prompt=prompt, **settings)
            return reply.choices[0].text, reply.choices[0].finish_reason
        long = settings | {"max_tokens": 400, "temperature": 0.3}
        stream = await client.completions.create(model=NAME, prompt=prompt, stream=True, **long)
        async for _ in stream:
            break
        await stream.close()
        return None

    async def everything(address: str) -> list:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=WAIT) as client:
            return await asyncio.gather(*(one(client, i) for i in range(200)))

    with serving(MODE, queue=200) as (found, address):
        replies = asyncio.run(everything(address))
        until(lambda: found._engine.idle)
        assert metric(address, "vllm:request_success_total") >= 133
    for i, reply in enumerate(replies):
        if i % 3:
            assert reply == (wanted(i % 24).text, wanted(i % 24).finish_reason), i


def test_the_end_waits_for_answers_and_refuses_new_requests():
    replies: list = []
    with serving(MODE) as (found, address):
        url = f"{address}/v1/completions"
        ask = threading.Thread(target=lambda: replies.append(httpx.post(url, json=LONG | {"n": 4}, timeout=WAIT)))
        with httpx.Client(timeout=WAIT) as kept:
            kept.get(f"{address}/health")
            ask.start()
            until(lambda: found._engine._running)
            found.handle_exit(signal.SIGTERM, None)
            late = kept.post(url, json=LONG)
            assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
            assert "Retry-After" in late.headers
            assert kept.get(f"{address}/health").status_code == 503
        ask.join()
        until(lambda: found.should_exit)
    assert replies[0].status_code == 200
    texts = [choice["text"] for choice in replies[0].json()["choices"]]
    assert texts[1] == generated("b", 480, temperature=0.3, seed=2).text and len(texts) == 4


def test_the_end_comes_after_its_limit():
    with serving(MODE, drain=0.0) as (found, address):
        replies: list = []
        url = f"{address}/v1/completions"
        ask = threading.Thread(target=lambda: replies.append(httpx.post(url, json=LONG | {"n": 20}, timeout=WAIT)))
        ask.start()
        until(lambda: found._engine._running)
        found.handle_exit(signal.SIGTERM, None)
        ask.join()
        assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "shutting_down")


def test_the_chat_page_needs_nothing_from_elsewhere(server):
    reply = httpx.get(f"{server[1]}/", timeout=WAIT)
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|href=|@import|url\(", reply.text)
    for name in ("tau", "speed", "tokens", "form", "prompt", "chat"):
        assert f'id="{name}"' in reply.text
