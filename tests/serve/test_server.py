"""What goes wrong: bad requests, keys, limits, connections that break, loading and stopping."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pytest

from nanochat.errors import UserError
from nanochat.serve.app import ServerSettings
from nanochat.serve.models import Settings, load_model
from tests.serve.conftest import serve

HUGE = "1" + "0" * 400


def completion(text: str) -> str:
    return '{"prompt": "a", ' + text + "}"


BAD = {
    "not JSON": ("/v1/completions", "{", 400, None),
    "empty": ("/v1/completions", "", 400, None),
    "a list": ("/v1/completions", "[]", 400, None),
    "deep": ("/v1/completions", "[" * 100_000, 400, None),
    "no prompt": ("/v1/completions", "{}", 400, "prompt"),
    "null prompt": ("/v1/completions", '{"prompt": null}', 400, "prompt"),
    "empty list": ("/v1/completions", '{"prompt": []}', 400, "prompt"),
    "mixed list": ("/v1/completions", '{"prompt": [1, "a"]}', 400, "prompt"),
    "negative token": ("/v1/completions", '{"prompt": [-1]}', 400, "prompt"),
    "unknown token": ("/v1/completions", '{"prompt": [5000]}', 400, None),
    "surrogate": ("/v1/completions", '{"prompt": "\\ud800"}', 400, "prompt"),
    "long prompt": ("/v1/completions", json.dumps({"prompt": "the " * 2000}), 400, "prompt"),
    "temperature": ("/v1/completions", completion('"temperature": -1'), 400, "temperature"),
    "temperature text": ("/v1/completions", completion('"temperature": "1"'), 400, "temperature"),
    "NaN": ("/v1/completions", completion('"temperature": NaN'), 400, "temperature"),
    "huge": ("/v1/completions", completion(f'"max_tokens": {HUGE}'), 400, "max_tokens"),
    "negative": ("/v1/completions", completion('"max_tokens": -1'), 400, "max_tokens"),
    "true": ("/v1/completions", completion('"max_tokens": true'), 400, "max_tokens"),
    "n": ("/v1/completions", completion('"n": 0'), 400, "n"),
    "too many": ("/v1/completions", '{"prompt": ["a","b","c","d","e"], "n": 64}', 400, "n"),
    "top_p": ("/v1/completions", completion('"top_p": 1.5'), 400, "top_p"),
    "stop": ("/v1/completions", completion('"stop": [""]'), 400, "stop"),
    "stream": ("/v1/completions", completion('"stream": 1'), 400, "stream"),
    "bias": ("/v1/completions", completion('"logit_bias": {"x": 1}'), 400, "logit_bias"),
    "bias of no token": ("/v1/completions", completion('"logit_bias": {"99999": 1}'), 400, None),
    "model": ("/v1/completions", completion('"model": "../../etc/passwd"'), 404, "model"),
    "no messages": ("/v1/chat/completions", '{"messages": []}', 400, "messages"),
    "a file": (
        "/v1/chat/completions",
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]}',
        400,
        "messages",
    ),
    "top_logprobs": (
        "/v1/chat/completions", '{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}', 400,
        "top_logprobs",
    ),
    "empty embedding": ("/v1/embeddings", '{"input": [[]]}', 400, "input"),
    "embedding token": ("/v1/embeddings", '{"input": [9999]}', 400, "input"),
    "path": ("/v1/nothing", "{}", 404, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def url(torch_server):
    return torch_server.url


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_openais_errors(url, name):
    path, body, status, param = BAD[name]
    reply = httpx.post(url + path, content=body.encode(), headers={"content-type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].endswith((".", "?"))


def test_other_methods_and_types(url):
    assert httpx.get(f"{url}/v1/completions").status_code == 405
    assert httpx.get(f"{url}/v1/completions").json()["error"]["message"]
    text = httpx.post(f"{url}/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert text.status_code in (400, 415)
    latin = httpx.post(
        f"{url}/v1/completions", content=b'{"prompt": "\xff"}', headers={"content-type": "application/json"}
    )
    assert latin.status_code == 400


def test_unknown_fields_are_ignored_and_truncation_is_on_request(url):
    body = {"prompt": "the " * 2000, "truncate": "left", "max_tokens": 3, "user": "me", "best_of": 1, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body).json()
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["usage"]["prompt_tokens"] == 253


def test_keys(run, tmp_path):
    def load():
        return [load_model(run, Settings("torch", slots=1), name) for name in ("a", "b/c")]

    with serve(load, ServerSettings(keys=[b"first", "schlüssel".encode()], origins=["https://a.example"])) as running:
        models = f"{running.url}/v1/models"
        for header in ({}, {"authorization": "Bearer firs"}, {"authorization": "Basic first"},
                       {"authorization": "Bearer " + "x" * 10_000}):  # fmt: skip
            reply = httpx.get(models, headers=header)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(models, headers={"authorization": "Bearer first"}).status_code == 200
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert httpx.get(running.url).status_code == 200
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="first", max_retries=0)
        assert [model.id for model in client.models.list()] == ["a", "b/c"]
        assert client.completions.create(model="b/c", prompt="one", max_tokens=2).model == "b/c"
        assert client.models.retrieve("b/c").id == "b/c"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="second", max_retries=0).models.list()
        # another page's script may read answers only where it was asked for
        preflight = httpx.options(models, headers={"origin": "https://a.example"})
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in httpx.get(models, headers={"origin": "https://b.example"}).headers
        # a name of somebody's own that leads to this machine
        assert httpx.get(f"{running.url}/health", headers={"host": "evil.example"}).status_code == 403


def test_limits_of_body_queue_and_time(run):
    settings = ServerSettings(max_body=1000, body_timeout=0.3, timeout=1.0, max_waiting=1, grace=0.5)
    with serve(lambda: [load_model(run, Settings("torch", slots=1))], settings) as running:
        url = f"{running.url}/v1/completions"
        slow_down(running, 0.02)
        assert httpx.post(url, json={"prompt": "a" * 2000}).status_code == 413
        chunked = httpx.post(url, content=iter([b"x" * 600, b"x" * 600]))
        assert chunked.status_code == 413
        with socket.create_connection(("127.0.0.1", running.port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in half.recv(200)
        replies: list[httpx.Response] = []
        body = {"prompt": "one two", "max_tokens": 200}
        threads = [threading.Thread(target=lambda: replies.append(httpx.post(url, json=body))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(reply.status_code for reply in replies) == [429, 429, 504, 504]
        assert next(r for r in replies if r.status_code == 429).headers["retry-after"] == "1"
        running.idle()
        with httpx.stream("POST", url, json={**body, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        running.idle()


def slow_down(running, seconds):
    """Make each step of the model take its time, as a large one's would."""
    step = running.engine.scheduler.step

    def slower():
        time.sleep(seconds)
        step()

    running.engine.scheduler.step = slower


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_frees_its_slot_at_once(run, stream):
    with serve(lambda: [load_model(run, Settings("torch", slots=1))], ServerSettings(grace=1.0)) as running:
        slow_down(running, 0.02)
        body = json.dumps({"prompt": "one two", "max_tokens": 200, "stream": stream}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            end = time.monotonic() + 5
            while not running.engine.running:
                assert time.monotonic() < end
                time.sleep(0.005)
        start = time.monotonic()
        running.idle()
        assert time.monotonic() - start < 1.0  # 200 tokens would take four seconds
        assert httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_reader_that_does_not_read_holds_up_nobody(torch_server):
    url = f"{torch_server.url}/v1/completions"
    body = json.dumps({"prompt": "one two", "max_tokens": 200, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    idle = []
    for _ in range(6):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", torch_server.port))
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        idle.append(client)
    reply = httpx.post(url, json={"prompt": "the quick brown", "max_tokens": 8, "temperature": 0}, timeout=60)
    assert reply.json()["choices"][0]["text"].startswith(" fox")
    for client in idle:
        client.close()
    torch_server.idle(30)


def test_a_thousand_idle_connections(torch_server):
    clients = [socket.create_connection(("127.0.0.1", torch_server.port)) for _ in range(1000)]
    try:
        assert httpx.get(f"{torch_server.url}/health", timeout=10).status_code == 200
    finally:
        for client in clients:
            client.close()


def test_a_model_that_fails_gives_500_and_lives_on(run):
    with serve(lambda: [load_model(run, Settings("torch", slots=2))]) as running:
        backend = running.engine.model.backend
        decode = backend.decode
        backend.decode = lambda *_: (_ for _ in ()).throw(RuntimeError("no memory"))
        body = {"prompt": "one two", "max_tokens": 5}
        reply = httpx.post(f"{running.url}/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["message"]) == (500, "no memory")
        backend.decode = decode
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200


def test_loading_is_503_and_a_model_that_cannot_be_loaded_ends_the_server(run):
    go = threading.Event()

    def load():
        go.wait(10)
        return [load_model(run, Settings("torch", slots=1))]

    with serve(load, wait=False) as running:
        for path in ("/health", "/v1/models"):
            reply = httpx.get(running.url + path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading")
        go.set()
        end = time.monotonic() + 5
        while httpx.get(f"{running.url}/health").status_code != 200:
            assert time.monotonic() < end

    def fail():
        raise UserError("no such run.")

    with serve(fail, wait=False) as running:
        running.server.on_failure = lambda: setattr(running.web, "should_exit", True)
        end = time.monotonic() + 5
        while running.server.failure is None:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_running_answers_finish_when_the_server_stops(run):
    texts: list[str] = []
    with serve(lambda: [load_model(run, Settings("torch", slots=1))], ServerSettings(grace=5.0)) as running:
        slow_down(running, 0.01)
        body = {"prompt": "the quick", "max_tokens": 40, "stream": True}

        def read():
            with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as stream:
                texts.extend(stream.iter_lines())

        thread = threading.Thread(target=read)
        thread.start()
        while not running.engine.running:
            time.sleep(0.005)
        running.web.should_exit = True
        thread.join(10)
    assert [line for line in texts if line][-1] == "data: [DONE]"


def test_answers_do_not_mix_under_faults(served):
    """Greedy answers of known prompts, while others leave early or send rubbish."""
    prompts = dict.fromkeys(("the quick", "one two", "die", "over the", "seven", "führt"))

    async def ask(client, prompt):
        body = {"prompt": prompt, "max_tokens": 10, "temperature": 0}
        return (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]

    async def leave(client, prompt):
        body = {"prompt": prompt, "max_tokens": 100, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            async for _ in stream.aiter_lines():
                return

    async def rubbish(client, prompt):
        assert (await client.post("/v1/completions", content=prompt.encode())).status_code in (400, 415)

    async def everything():
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            for prompt in prompts:
                prompts[prompt] = await ask(client, prompt)
            for _ in range(3):
                jobs = [job(client, prompt) for prompt in prompts for job in (ask, leave, rubbish)]
                answers = await asyncio.gather(*jobs)
                assert answers[::3] == list(prompts.values())

    asyncio.run(everything())
    served.idle()
