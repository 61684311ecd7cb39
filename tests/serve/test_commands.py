"""`nanochat serve` and `nanochat chat` as commands: mistakes are one sentence, and a conversation in the terminal."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from nanochat import cli
from nanochat.serve import chat
from nanochat.serve.cli import listen


def mistake(capsys, *words) -> str:
    assert cli.main(list(map(str, words))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_mistakes_of_serve(run, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in mistake(capsys, "serve", run, "--port", port)
    empty = tmp_path / "keys"
    empty.write_text("\n")
    for words, message in (
        ([], "RUN_OR_FILE"),
        ([run, "--port", "70000"], "--port 70000"),
        ([run, "--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        ([run, "--backend", "vllm"], "vllm"),
        ([run, "--parallel", "0"], "--parallel"),
        ([run, "--api-key-file", empty], "has no key"),
        ([run, "--api-key-file", tmp_path / "none"], "cannot be read"),
        ([run, "--alias", "a", "--alias", "b"], "--alias is given 2 times"),
        ([run, "--device", "cuda:77"], "--device cuda:77"),
        ([tmp_path / "nothing", "--port", "0"], "there is no run"),
        ([run, run, "--port", "0", "--backend", "torch"], "two models are called"),
        ([run, "--port", "0", "--context", "100000"], "--context 100000"),
    ):
        assert message in mistake(capsys, "serve", *words)


def test_serve_from_the_command_line_until_it_is_told_to_stop(run, tmp_path):
    """A process of its own: it says where it is, answers, finishes what it is writing at SIGTERM, and is gone."""
    command = [
        sys.executable,
        "-m",
        "nanochat.cli",
        "serve",
        str(run),
        "--port",
        "0",
        "--backend",
        "torch",
        "--alias",
        "me",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = []
        while not lines or not lines[-1].startswith("nanochat is at"):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert "me: " in lines[-2]
        assert "with torch, 4 x 256 tokens, a base model" in lines[-2]
        url = lines[-1].split()[-1]
        assert url.startswith("http://127.0.0.1:")
        end = time.monotonic() + 10
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < end
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "me"
        found: list[str] = []

        def read():
            with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "one", "max_tokens": 150, "stream": True,
                              "logit_bias": {"0": -100}}) as stream:  # fmt: skip
                for line in stream.iter_lines():
                    found.append(line)

        thread = threading.Thread(target=read)
        thread.start()
        while not found:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        thread.join(20)
        assert [line for line in found if line][-1] == "data: [DONE]"
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_a_socket_that_listens():
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def talk(monkeypatch, capsys, run, lines, *options):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert cli.main(["chat", str(run), "--backend", "torch", "--temperature", "0", "--max-tokens", "8", *options]) == 0
    return capsys.readouterr()


def test_a_conversation(run, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "talk.json"
    output = talk(
        monkeypatch, capsys, run,
        ["/regen", "one two three", "/regen", "/system one two", "/temp 0.5", "/temp x", "seven", f"/save {saved}",
         "/save", f"/save {tmp_path}/no/where", "/help", "/quit", "never"],
    )  # fmt: skip
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    answer = messages[2]["content"]
    assert output.out.count(answer) >= 2  # greedy: again the same
    assert messages[-1]["content"] in output.out
    assert "base model" in output.err
    assert "there is no message to answer yet" in output.err
    assert "/temp takes a number" in output.err
    assert "/save takes the name" in output.err
    assert "cannot be written" in " ".join(output.err.split())  # the terminal wraps a long path
    assert "/system TEXT" in output.err
    assert "8 tokens" in output.err
    # alone, the first answer is what a fresh conversation gives
    again = talk(monkeypatch, capsys, run, ["one two three"])
    assert again.out.strip() == answer.strip()


def test_old_messages_leave_when_the_context_is_full(run, monkeypatch, capsys):
    lines = [f"{i} the quick brown fox jumps over the lazy dog" for i in range(20)]
    output = talk(monkeypatch, capsys, run, [*lines, "word " * 400, "/new", "one"])
    assert output.err.count("8 tokens") + output.err.count("tokens/s") >= 20
    assert output.err.count("the message is too long") == 1


def test_an_interrupt_stops_an_answer_and_keeps_it(run, monkeypatch, capsys):
    steps = 0
    step = chat.Scheduler.step

    def interrupted(self):
        nonlocal steps
        steps += 1
        step(self)
        if steps == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat.Scheduler, "step", interrupted)
    output = talk(monkeypatch, capsys, run, ["one two", "three"])
    assert "4 tokens" in output.err
    assert "8 tokens" in output.err


def test_mistakes_of_chat(run, tmp_path, capsys):
    for words, message in (
        ([tmp_path / "none"], "there is no run"),
        ([run, "--top-p", "0"], "--top-p 0"),
        ([run, "--max-tokens", "x"], "--max-tokens"),
        ([run, "--parallel", "2"], "--parallel"),
    ):
        assert message in mistake(capsys, "chat", *words)


@pytest.mark.parametrize(
    ("option", "message"), [("--max-tokens=0", "--max-tokens"), ("--min-p=x", "--min-p"), ("--nope", "--nope")]
)
def test_mistakes_of_generate(run, capsys, option, message):
    assert message in mistake(capsys, "generate", run, option)
