"""The files of `deploy/` say what the command takes, agree with one another, and the load test sees what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_server import KEY, serving

from pipeline import cli
from pipeline.commands import serve as serve_commands
from pipeline.serve.web import security

DEPLOY = Path(__file__).parents[1] / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
SERVICE = DEPLOY / "qwen-onnx.service"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("load_test", DEPLOY / "load_test.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["load_test"] = module
    spec.loader.exec_module(module)
    return module


load_test = loaded()


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """What the command understands, which ends the test where it does not."""
    return cli._parser().parse_args(list(arguments))


def instruction(name: str) -> list[str]:
    """The last instruction of a kind in the Dockerfile, which is in exec form."""
    found: list[str] = json.loads(re.findall(rf"^\s*{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])
    return found


def unit() -> dict[str, list[str]]:
    """The settings of the unit, each with all its values."""
    text = SERVICE.read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["qwen"]
    return found


def image() -> argparse.Namespace:
    """How the image starts as it is."""
    command = instruction("ENTRYPOINT")
    assert command[0] == "qwen-onnx"
    return options_of([*command[1:], *re.findall(r'"([^"]*)"', DOCKERFILE.rsplit("\nCMD ", 1)[1])])


def composed() -> argparse.Namespace:
    return options_of([*instruction("ENTRYPOINT")[1:], *service()["command"]])


def started() -> argparse.Namespace:
    """How the unit starts it, with the folder of the credentials filled in."""
    (line,) = unit()["ExecStart"]
    return options_of(shlex.split(line.replace("%d", "/run/credentials"))[1:])


@pytest.mark.parametrize("start", [image, composed, started])
def test_the_command_takes_its_options(start: Callable[[], argparse.Namespace]) -> None:
    options = start()
    assert options.command is serve_commands.serve
    assert options.port == 8000
    assert options.drain_seconds == 30
    assert options.packages[0].startswith("qwen=/")
    assert not options.allow_public_without_key
    assert not options.trust


def test_the_ports_agree() -> None:
    port = str(image().port)
    assert re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE) == [port]
    assert f"http://127.0.0.1:{port}/health" in DOCKERFILE
    assert service()["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_who_is_reached_from_elsewhere_has_keys() -> None:
    assert image().host == "0.0.0.0"
    assert service()["environment"].keys() == {security.VARIABLE}
    assert service()["environment"][security.VARIABLE].startswith(f"${{{security.VARIABLE}:?")
    assert started().api_keys == Path("/run/credentials/api-keys")
    assert unit()["LoadCredential"] == ["api-keys:/etc/qwen-onnx/api-keys"]


def test_there_is_time_to_drain() -> None:
    assert float(unit()["TimeoutStopSec"][0]) > started().drain_seconds + 5
    assert float(service()["stop_grace_period"].removesuffix("s")) > composed().drain_seconds + 5
    assert unit()["KillMode"] == ["mixed"], "the models' processes must not get the signal"


def test_the_package_is_where_the_image_looks_for_it() -> None:
    (volume,) = service()["volumes"]
    assert volume["target"] == "/package"
    assert volume["read_only"] is True
    assert image().packages == composed().packages == ["qwen=/package"]


def test_the_image_is_lean_and_its_user_is_nobody() -> None:
    final = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final, re.MULTILINE)
    assert not re.search(r"apt-get|gcc|pip( \S+)* install", final)
    assert "pip uninstall" in final
    assert "--constraint constraints.txt" in DOCKERFILE
    assert service()["read_only"] is True
    assert service()["cap_drop"] == ["ALL"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = SERVICE.read_text(encoding="utf-8").replace(
        "ExecStart=/opt/qwen-onnx/bin/qwen-onnx", f"ExecStart={sys.executable}"
    )
    (tmp_path / SERVICE.name).write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", str(tmp_path / SERVICE.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert SERVICE.name not in done.stderr
    assert done.returncode == 0


# The health check of the image


@pytest.mark.slow
def test_the_health_check_tells_a_server_from_none(tiny_package: Path) -> None:
    check = re.findall(r'CMD (\["python".*\])$', DOCKERFILE, re.MULTILINE)
    command = json.loads(check[0])
    with serving(tiny_package) as server:
        command[2] = command[2].replace(":8000", f":{server.port}")
        assert subprocess.run([sys.executable, *command[1:]], timeout=30, check=False).returncode == 0
    assert subprocess.run([sys.executable, *command[1:]], capture_output=True, timeout=30, check=False).returncode != 0


# The load test


def answer(prompt: int, text: str, number: int, **more: Any) -> Any:
    return load_test.Answer(prompt, text, (f"chat-{number}",) * 3, **more)


def test_recorded_answers_that_are_right_pass() -> None:
    found = load_test.check(["a", "b"], [answer(index % 2, "ab"[index % 2], index) for index in range(6)])
    assert found == load_test.Verdict((), ())


def test_mixed_answers_are_noticed() -> None:
    swapped = [answer(0, "b", 0), answer(1, "a", 1)]
    assert len(load_test.check(["a", "b"], swapped).mixed) == 2
    assert "is that of prompt 1" in load_test.check(["a", "b"], swapped).mixed[0]
    assert "is that of no prompt" in load_test.check(["a", "b"], [answer(0, "ab", 0)]).mixed[0]
    chunks = load_test.Answer(0, "a", ("chat-1", "chat-2"))
    assert "2 answers" in load_test.check(["a", "b"], [chunks]).mixed[0]
    assert "as request 0 has" in load_test.check(["a", "b"], [answer(0, "a", 7), answer(1, "b", 7)]).mixed[0]


def test_lost_answers_are_noticed_and_refused_ones_are_not_lost() -> None:
    ended, refused = answer(0, "", 0, problem="it ended"), answer(0, "", 1, problem="busy", refused=True)
    assert load_test.check(["a", "b"], [ended, refused]) == load_test.Verdict(("request 0 (prompt 0): it ended",), ())


def test_the_slope_is_that_of_the_line() -> None:
    assert load_test.slope([(index, 5 + 3 * index) for index in range(9)]) == pytest.approx(3)
    assert load_test.slope([(1, 1), (1, 2), (2, 3)]) is None


@pytest.mark.parametrize(
    ("url", "anywhere", "good"),
    [
        ("http://127.0.0.1:8000", False, True),
        ("http://[::1]:8000", False, True),
        ("http://localhost:8000", False, True),
        ("http://example.org", False, False),
        ("http://127.0.0.1.example.org", False, False),
        ("http://localhost@10.0.0.1", False, False),
        ("http://10.0.0.1", True, True),
        ("file:///etc/passwd", True, False),
        ("127.0.0.1:8000", True, False),
    ],
)
def test_other_machines_are_left_alone(url: str, anywhere: bool, good: bool) -> None:
    if good:
        load_test.check_url(url, anywhere)
    else:
        with pytest.raises(load_test.Unusable):
            load_test.check_url(url, anywhere)


def test_numbers_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--clients=0", "--clients=1001", "--requests=100001", "--seconds=3601", "--max-tokens=0"):
        with pytest.raises(SystemExit):
            load_test.main(["http://127.0.0.1:1", option])
    assert "is not within 1 and 3600" in capsys.readouterr().err
    assert load_test.main(["http://10.1.2.3:8000"]) == load_test.main(["http://127.0.0.1:1"]) == 2


class _Wrong(BaseHTTPRequestHandler):
    """A server that makes mistakes once all prompts have been asked alone."""

    protocol_version = "HTTP/1.1"
    fault, asked, lock = "", 0, threading.Lock()

    def do_GET(self) -> None:
        bodies = {"/v1/models": json.dumps({"data": [{"id": "wrong"}]}), "/metrics": "", "/health": "{}"}
        self._send(200, bodies[self.path])

    def do_POST(self) -> None:
        kind = type(self)
        with self.lock:
            kind.asked += 1
            number = kind.asked
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][0]["content"].rpartition("\n")[2]
        wrong = number > 8 and number % 5 == 0
        if wrong and self.fault == "busy":
            self._send(503, "{}", {"retry-after": "0"})
            return
        if wrong and self.fault == "mixed":
            text = load_test.prompts(8)[3].rpartition("\n")[2] if number % 10 else "nonsense"
        chunk = {"id": f"chat-{number}", "choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
        end = "" if wrong and self.fault == "lost" else "data: [DONE]\n\n"
        self._send(200, f"data: {json.dumps(chunk)}\n\n{end}")

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def wrong(fault: str) -> Iterator[str]:
    kind = type("Wrong", (_Wrong,), {"fault": fault, "asked": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("fault", "code"), [("", 0), ("busy", 0), ("mixed", 1), ("lost", 1)])
def test_a_server_with_a_fault_is_found_out(fault: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with wrong(fault) as url:
        assert load_test.main([url, "--clients", "3", "--requests", "30", "--prefill", "0", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert bool(report["mixed"]) == (fault == "mixed")
    assert bool(report["lost"]) == (fault == "lost")
    assert bool(report["retry_after"]["honoured"]) == (fault == "busy")
    assert report["requests"]["made"] == 30


@pytest.mark.slow
def test_the_real_server_loses_and_mixes_nothing(tiny_package: Path, tmp_path: Path) -> None:
    """More clients than the queue holds, so that some are told to wait.

    What the tiny model says depends on the last token alone, so that its prompts have to end with their markers.
    """
    package = tmp_path / "tiny"
    shutil.copytree(tiny_package, package)
    (package / "chat_template.jinja").write_text("{{ messages[-1].content }}", encoding="utf-8")
    keys = {security.VARIABLE: f"load:{KEY}"}
    options = "--clients 16 --requests 40 --max-tokens 8 --prefill 200 --seconds 60 --json"
    with serving(package, "--queue", "1", "--parallel", "1", environment=keys) as server:
        done = subprocess.run(
            [sys.executable, str(DEPLOY / "load_test.py"), server.url, *shlex.split(options)],
            env={security.VARIABLE: f"load:{KEY}"},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["requests"]["answered"] == 40
    assert report["statuses"]["200"] == 40
    assert report["statuses"]["503"] == report["retry_after"]["honoured"] > 0
    assert report["retry_after"]["not_told"] == 0
    assert report["memory"].keys() == {"server", "tiny"}
    assert report["health"]["statuses"].keys() == report["prefill"]["health"]["statuses"].keys() == {"200"}
    assert report["prefill"]["tokens"] > 100
