"""The server over real sockets, with a tiny model in the real engine: what clients get, and what attackers do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipeline import cli
from pipeline.errors import UsageError
from pipeline.serve.refusals import Forbidden, RateLimited, Unauthorized
from pipeline.serve.web import security
from pipeline.serve.web.server import Place, check_place, listening

ROOT = Path(__file__).parents[1]
KEY, OTHER = "an-api-key-for-tests-1", "an-api-key-for-tests-2"
ASKED = [{"role": "user", "content": "The quick brown fox"}]
BIND = "0.0.0.0"


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    model: str
    lines: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **{"headers": self.headers, **options})

    def chat(self, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": ASKED, "max_tokens": 8, "temperature": 0, **more}

    def metric(self, name: str) -> float:
        text = httpx.get(self.url + "/metrics", headers=self.headers, timeout=60).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def calm(self, seconds: float = 20) -> bool:
        """Whether nothing runs and nothing waits any more."""
        return eventually(
            lambda: self.metric("qwen_onnx_running") + self.metric("qwen_onnx_queue_length") == 0, seconds
        )


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def serving(
    package: Path, *options: str, environment: dict[str, str] | None = None, name: str = "tiny"
) -> Iterator[Server]:
    command = [sys.executable, "-m", "pipeline", "serve", f"{name}={package}", "--trust", "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--threads", "1", "--log-format", "json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout
    assert process.stderr
    try:
        first = json.loads(process.stdout.readline())
        assert first["event"] == "listening"
        server = Server(process, first["url"], first["models"][0])
        errors = process.stderr

        def collect() -> None:
            server.lines.extend(errors)

        reader = threading.Thread(target=collect, daemon=True)
        reader.start()
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        if "reader" in locals():
            reader.join(10)
        process.stderr.close()


@pytest.fixture(scope="module")
def server(tiny_package: Path) -> Iterator[Server]:
    with serving(tiny_package, "--max-body", "1MB") as started:
        yield started


@pytest.fixture(scope="module")
def guarded(tiny_package: Path) -> Iterator[Server]:
    limits = ("--requests-per-minute", "12", "--max-prompt-tokens", "40", "--max-tokens", "16")
    keys = {security.VARIABLE: f"one:{KEY},two:{OTHER}"}
    with serving(tiny_package, *limits, "--cors", "https://app.example", "--queue", "16", environment=keys) as started:
        yield started


def key(name: str = KEY) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


# Answers


@pytest.mark.slow
def test_the_official_client_is_answered(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        whole = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=12, temperature=0)
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=ASKED,
                max_tokens=12,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens  # cached ones differ
        plain = client.completions.create(model="tiny", prompt="The quick", max_tokens=5, temperature=0, logprobs=1)
        assert plain.usage.completion_tokens <= 5
        with pytest.raises(openai.NotFoundError, match="there is no model `other`"):
            client.chat.completions.create(model="other", messages=ASKED)
        with pytest.raises(openai.BadRequestError, match="temprature"):
            client.chat.completions.create(model="tiny", messages=ASKED, extra_body={"temprature": 1})


@pytest.mark.slow
def test_routes_beside_the_answers(server: Server) -> None:
    found = httpx.get(server.url + "/health").json()
    assert (found["status"], found["reasons"]) == ("ok", [])
    assert found["models"]["tiny"]["state"] == "ready"
    assert httpx.get(server.url + "/ready").status_code == httpx.head(server.url + "/health").status_code == 200
    ids = server.post("/tokenize", {"content": "fox<|im_end|>"}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == "fox<|im_end|>"
    assert len(ids) > 2  # what a user types is never a control token
    assert httpx.get(server.url + "/").headers["content-type"].startswith("text/html")
    document = httpx.get(server.url + "/openapi.json").json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert {"200", "400", "401", "413", "429", "503"} <= set(chat["responses"])
    assert set(_references(document)) <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


@pytest.mark.slow
def test_no_request_that_the_document_allows_makes_the_server_fail(server: Server) -> None:
    pytest.importorskip("schemathesis")
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", "--no-color"]
    checks = ["--checks", "not_a_server_error,status_code_conformance", "--phases", "fuzzing", "--max-examples", "4"]
    done = subprocess.run([*command, *checks, "--seed", "1"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    for item in value if isinstance(value, list) else []:
        yield from _references(item)


@pytest.mark.slow
def test_what_is_counted(server: Server) -> None:
    before = server.metric("qwen_onnx_generated_tokens_total")
    usage = server.post("/v1/chat/completions", server.chat()).json()["usage"]
    assert server.metric("qwen_onnx_generated_tokens_total") >= before + usage["completion_tokens"]
    assert server.metric('qwen_onnx_requests_total{endpoint="/v1/chat/completions",status="200"}') >= 1
    assert server.metric("qwen_onnx_time_to_first_token_seconds_count") >= 1
    assert server.metric('qwen_onnx_memory_bytes{process="tiny"}') > 1 << 20
    assert server.metric('qwen_onnx_model_state{model="tiny",state="ready"}') == 1


# Refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        (b"", "invalid_value", "no JSON"),
        (b"{", "invalid_value", "no JSON"),
        (b"[]", "invalid_value", "no JSON object"),
        (b'{"model": "tiny", "temperature": NaN}', "invalid_value", "not finite"),
        (b'{"model": "tiny", "temperature": 1e999}', "invalid_value", "not finite"),
        (b'{"model": "tiny", "model": "tiny"}', "invalid_value", "twice"),
        (b'{"model": "\\ud800"}', "invalid_value", "surrogates"),
        (b'{"model": "\xff"}', "invalid_value", "not UTF-8"),
        (b"[" * 100_000, "invalid_value", "nested too deep"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "invalid_value", "nested too deep"),
        (b'{"n": ' + b"1" * 5000 + b"}", "invalid_value", "no JSON"),
        (b'{"model": "tiny", "messages": []}', "invalid_value", "messages"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 1000000}', "invalid_value", "`n`"),
        (b'{"model": "x", "messages": [{"role": "user", "content": "x"}]}', "model_not_found", "no model `x`"),
    ],
)
def test_bad_requests_are_told_in_openais_form(server: Server, body: bytes, code: str, text: str) -> None:
    found = httpx.post(
        server.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert found.status_code == (404 if code == "model_not_found" else 400)
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert text in error["message"]


@pytest.mark.slow
def test_prompts_beyond_the_context_are_refused(server: Server) -> None:
    long = [{"role": "user", "content": "fox " * 2000}]
    found = server.post("/v1/chat/completions", server.chat(messages=long))
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
    found = server.post("/v1/completions", {"model": "tiny", "prompt": ""})
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.slow
def test_paths_methods_types_and_hosts(server: Server) -> None:
    for path, method, status, code in (
        ("/nowhere", "GET", 404, "not_found"),
        ("/v1/chat/completions", "GET", 405, "method_not_allowed"),
        ("/v1/models/x", "GET", 404, "model_not_found"),
    ):
        found = httpx.request(method, server.url + path)
        assert (found.status_code, found.json()["error"]["code"]) == (status, code)
        assert found.headers["x-content-type-options"] == "nosniff"
    found = httpx.post(server.url + "/v1/chat/completions", content=json.dumps(server.chat()))
    assert (found.status_code, "application/json" in found.json()["error"]["message"]) == (400, True)
    evil = httpx.get(server.url + "/v1/models", headers={"host": "evil.example"})
    assert (evil.status_code, evil.json()["error"]["code"]) == (403, "forbidden_host")
    assert httpx.get(server.url + "/v1/models", headers={"host": "localhost:1"}).status_code == 200


@pytest.mark.slow
def test_large_bodies_are_refused_while_they_come(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2_000_000}}
    found = server.post("/v1/chat/completions", server.chat(messages=[{"role": "user", "content": [image]}]))
    assert (found.status_code, found.json()["error"]["code"]) == (413, "request_too_large")
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sent:  # no length is told in advance
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        sent.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(20):
            sent.sendall(chunk)
        assert b" 413 " in sent.recv(200)


@pytest.mark.slow
def test_what_is_no_http_gets_an_error_of_the_same_form(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sent:
        sent.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        head, _, body = sent.makefile("rb").read().partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert json.loads(body)["error"]["code"] == "bad_request"


# Protection


@pytest.mark.slow
def test_keys_limits_and_origins(guarded: Server) -> None:
    for headers in ({}, key("wrong"), {"authorization": f"Basic {KEY}"}, {"x-api-key": KEY + "x"}):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            found = httpx.get(guarded.url + path, headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/tokenize", "/v1/chat/completions", "/nowhere"):
            assert guarded.post(path, {}, headers=headers).status_code == 401
    assert httpx.get(guarded.url + "/health").json() == {"status": "ok", "reasons": [], "models": {}}
    assert "tiny" in httpx.get(guarded.url + "/health", headers=key()).json()["models"]
    assert httpx.get(guarded.url + "/v1/models", headers={"x-api-key": OTHER}).status_code == 200
    assert httpx.get(guarded.url + "/").status_code == 200

    found = guarded.post("/v1/chat/completions", guarded.chat(max_tokens=17), headers=key(OTHER))
    assert (found.status_code, found.json()["error"]["param"]) == (400, "max_tokens")
    long = [{"role": "user", "content": "fox " * 40}]
    found = guarded.post("/v1/chat/completions", guarded.chat(messages=long), headers=key(OTHER))
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
    body = {"model": "tiny", "messages": ASKED, "temperature": 0}
    found = guarded.post("/v1/chat/completions", body, headers=key(OTHER))
    assert found.json()["usage"]["completion_tokens"] <= 16

    page = {"origin": "https://app.example", "access-control-request-method": "POST"}
    allowed = httpx.options(guarded.url + "/v1/chat/completions", headers=page)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    other = httpx.options(guarded.url + "/v1/chat/completions", headers={**page, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers

    statuses = [guarded.post("/tokenize", {"content": "x"}, headers=key()).status_code for _ in range(13)]
    assert statuses == [200] * 12 + [429]
    refused = guarded.post("/tokenize", {"content": "x"}, headers=key())
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert guarded.post("/tokenize", {"content": "x"}, headers=key(OTHER)).status_code == 200


@pytest.mark.slow
def test_logs_have_ids_and_no_contents(tiny_package: Path) -> None:
    with serving(tiny_package) as started:
        secret = "xylophone-of-the-user"
        asked = [{"role": "user", "content": secret}]
        found = started.post("/v1/chat/completions", started.chat(messages=asked), headers={"x-request-id": "mine.1"})
        assert found.headers["x-request-id"] == "mine.1"
        made = started.post(f"/{secret}", {}, headers={"x-request-id": "bad id!"})
        assert made.headers["x-request-id"].startswith("req-")
        assert eventually(lambda: len(started.lines) >= 2, 10)
    assert secret not in "".join(started.lines)
    line = json.loads(started.lines[0])
    assert (line["id"], line["model"], line["endpoint"]) == ("mine.1", "tiny", "/v1/chat/completions")
    assert (line["status"], len(line["body"])) == (200, 16)


# Clients that leave, wait, or are many


def asking(server: Server, body: dict[str, Any]) -> socket.socket:
    """A request that was sent, of whose answer nothing has been read."""
    data = json.dumps(body).encode()
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(30)
    made.connect(("127.0.0.1", server.port))
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "".join(f"{line}\r\n" for line in (*lines, *map(": ".join, server.headers.items())))
    made.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return made


LONG = {"max_tokens": 400, "logit_bias": {"509": -100, "510": -100, "511": -100}}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_a_client_that_has_gone_frees_its_place(server: Server, stream: bool, half: bool) -> None:
    before = server.metric("qwen_onnx_model_cancelled_total")
    with asking(server, server.chat(stream=stream, n=8, **LONG)) as made:
        assert eventually(lambda: server.metric("qwen_onnx_running") > 0, 10)
        if half:
            made.shutdown(socket.SHUT_WR)
        else:
            made.close()
        assert server.calm(10)
    assert server.metric("qwen_onnx_model_cancelled_total") > before
    assert server.post("/v1/chat/completions", server.chat()).status_code == 200


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_cut_off(tiny_package: Path) -> None:
    # Every event has the name: the system keeps 4 MB of what nobody reads, and 9 are sent.
    with serving(tiny_package, "--write-seconds", "0.5", name=2000 * "n") as started:
        asked = started.chat(stream=True, n=8, logprobs=True, top_logprobs=20, **LONG)
        with asking(started, asked):
            assert eventually(lambda: started.metric("qwen_onnx_running") > 0, 10)
            assert started.calm(30)
        assert started.metric("qwen_onnx_model_cancelled_total") > 0
        assert started.post("/v1/chat/completions", started.chat()).status_code == 200


@pytest.mark.slow
def test_many_clients_lose_nothing(tiny_package: Path) -> None:
    """64 at once against a queue of 16: each is answered as alone, or told to come again."""
    with serving(tiny_package, "--queue", "16") as started:
        words = ["fox", "dog", "light", "sea"]

        def ask(number: int) -> httpx.Response:
            return started.post("/v1/completions", {**body(number), "max_tokens": 24})

        def body(number: int) -> dict[str, Any]:
            return {"model": "tiny", "prompt": f"The {words[number % 4]} runs", "temperature": 0}

        alone = [ask(number).json()["choices"][0]["text"] for number in range(4)]
        with ThreadPoolExecutor(64) as pool:
            found = list(pool.map(ask, range(64)))
        assert {answer.status_code for answer in found} <= {200, 503}
        good = [(number, answer) for number, answer in enumerate(found) if answer.status_code == 200]
        assert len(good) >= 16
        assert [answer.json()["choices"][0]["text"] for _, answer in good] == [alone[number % 4] for number, _ in good]
        for answer in found:
            if answer.status_code == 503:
                assert answer.json()["error"]["code"] == "overloaded"
                assert int(answer.headers["retry-after"]) >= 1
        assert started.calm()


@pytest.mark.slow
def test_a_killed_model_is_told_and_comes_back(tiny_package: Path) -> None:
    import psutil

    with serving(tiny_package) as started:
        (worker,) = psutil.Process(started.process.pid).children()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(started.post, "/v1/chat/completions", started.chat(n=8, **LONG))
            assert eventually(lambda: started.metric("qwen_onnx_running") > 0, 10)
            worker.kill()
            failed = running.result(30)
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "unavailable")
        told = httpx.get(started.url + "/health")
        assert (told.status_code, told.json()["status"]) == (503, "restarting")
        assert "signal 9" in told.json()["reasons"][0]
        assert started.post("/v1/chat/completions", started.chat()).status_code == 200
        assert httpx.get(started.url + "/health").status_code == 200
        assert started.metric("qwen_onnx_model_restarts_total") == 1


@pytest.mark.slow
def test_a_stop_lets_streams_end_and_exits_with_0(tiny_package: Path) -> None:
    with serving(tiny_package) as started:
        begun = threading.Event()

        def read() -> str:
            with httpx.stream(
                "POST", started.url + "/v1/chat/completions", json=started.chat(stream=True, **LONG), timeout=60
            ) as answer:
                text = ""
                for piece in answer.iter_text():
                    text += piece
                    begun.set()
                return text

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            assert begun.wait(30)
            started.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: not reachable(started.port), 5)
            text = reading.result(60)
        assert text.rstrip().endswith("data: [DONE]")
        assert '"finish_reason":"' in text
        assert started.process.wait(30) == 0


def reachable(number: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", number), timeout=2):
        return True
    return False


# Parts


def test_keys_are_read_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\nalice:{KEY}\n{OTHER}\n")
    path.chmod(0o640)
    keys = security.read_keys(path)
    assert [entry.name for entry in keys] == ["alice", "key-4"]
    assert security.admitted(keys, key()) == "alice"
    assert security.admitted(keys, {"x-api-key": OTHER}) == "key-4"
    assert KEY not in repr(keys)
    for headers in ({}, key("nobody"), key(""), {"authorization": KEY}):
        with pytest.raises(Unauthorized):
            security.admitted(keys, headers)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="every user of this machine may read"):
        security.read_keys(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no keys"),
        ("short", "fewer than 16"),
        (f"a b:{KEY}", "its name"),
        ("a key with some spaces in it", "no header takes"),
        (f"{KEY}\nagain:{KEY}", "twice"),
    ],
)
def test_bad_keys_are_refused_without_being_shown(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError, match=problem) as caught:
        security.read_keys(path)
    assert KEY not in str(caught.value)


def test_a_minute_moves_and_debts_are_kept() -> None:
    now = 0.0
    budgets = security.Budgets(2, 100, lambda: now)
    budgets.take("a")
    now = 30.0
    budgets.take("a")
    with pytest.raises(RateLimited, match="2 requests") as caught:
        budgets.take("a")
    assert caught.value.retry_after == 30.0
    budgets.take("b")
    now = 61.0
    budgets.take("a")
    budgets.spend("b", 250)
    with pytest.raises(RateLimited, match="100 tokens") as caught:
        budgets.take("b")
    assert caught.value.retry_after == 60.0
    now = 122.0
    budgets.take("b")


@pytest.mark.parametrize("given", ["evil.example", "", "127.0.0.1.evil.example", "[::2]:80", "localhost.evil:8000"])
def test_other_names_are_refused(given: str) -> None:
    with pytest.raises(Forbidden):
        security.check_host(("127.0.0.1", "localhost", "[::1]"), given)
    security.check_host((), given)


@pytest.mark.parametrize("given", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_own_names_are_taken(given: str) -> None:
    security.check_host(("127.0.0.1", "localhost", "[::1]"), given)


def test_a_public_address_needs_keys_or_a_word() -> None:
    for host in (BIND, "192.0.2.1", "::", "example.org"):
        with pytest.raises(UsageError, match="no API keys"):
            check_place(Place(host), keys=False)
        check_place(Place(host), keys=True)
        check_place(Place(host, public=True), keys=False)
    for host in ("127.0.0.1", "127.3.2.1", "localhost", "::1", "[::1]"):
        check_place(Place(host), keys=False)


def test_a_port_in_use_is_told() -> None:
    with (
        listening(Place(port=0)) as bound,
        pytest.raises(UsageError, match="another program does"),
        listening(Place(port=bound.getsockname()[1])),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere"], 9, "there is no package directory nowhere"),
        (["nowhere", "--api-keys", "missing"], 2, "the keys in missing cannot be read"),
        (["nowhere", "--host", BIND], 2, "no API keys"),
        (["nowhere", "--cors", "*"], 2, "is no origin"),
        (["nowhere", "--queue", "0"], 2, "--queue 0 is not positive"),
        (["a/b=nowhere"], 2, "cannot be the name of a model"),
    ],
)
def test_what_cannot_be_served_has_its_exit_code(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments, "--port", "0"]) == code
    assert text in capsys.readouterr().err


def test_help_does_not_wait_for_the_libraries_of_the_server() -> None:
    code = "import sys, pipeline.cli; print([n for n in ('fastapi', 'uvicorn', 'structlog') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_silence_in_a_stream_is_filled_and_failures_are_its_last_event() -> None:
    from pydantic import BaseModel

    from pipeline.serve.refusals import Unavailable
    from pipeline.serve.web.sse import Source

    class Chunk(BaseModel):
        text: str

    closed = []

    async def chunks() -> Any:
        try:
            yield Chunk(text="a")
            await asyncio.sleep(0.3)
            raise Unavailable("it has ended")
        finally:
            closed.append(True)

    async def read() -> list[bytes]:
        source = Source(chunks())
        await source.open()
        found = []
        while (data := await source.next(0.1)) is not None:
            found.append(data)
        await source.aclose()
        return found

    found = asyncio.run(read())
    assert found[0] == b'data: {"text":"a"}\n\n'
    assert found[1].startswith(b": ")
    assert b'"code": "unavailable"' in found[-2]
    assert found[-1] == b"data: [DONE]\n\n"
    assert closed == [True]
