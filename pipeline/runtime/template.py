"""Render a chat template that nobody has to trust, in a process of its own.

Jinja's sandbox keeps a template from the interpreter, not from looping for ever or doubling a string until memory is
gone; nothing inside one process can. So this file runs as a script with limits on time and memory: it imports nothing
of this package, and for each JSON object, a line of standard input, writes one to standard output.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

# An ordinary conversation takes milliseconds and a few megabytes.
SECONDS = 2
MEMORY = 1 << 30
OUTPUT = 32 << 20
_PATIENCE = 60  # seconds until a busy machine must have started the script and come to an end


class Renderer:
    """Renders templates in one process, which is started when the first one comes and again after one that broke it.

    Safe to use from several threads, which wait for one another.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text that ``template`` makes of ``variables`` (JSON values).

        Raises:
            ImportError: jinja2 is not installed.
            ValueError: the template fails, reaches for what the sandbox forbids, or needs too much time or memory;
                or a variable is no JSON value.
        """
        return str(self._ask({"template": template, "variables": variables})["text"])

    def names(self, template: str) -> frozenset[str]:
        """The variables that ``template`` reads and does not set itself; raises as `render` does."""
        return frozenset(self._ask({"template": template})["names"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """What the process answers to a job."""
        try:
            text = json.dumps(job)
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        with self._lock:
            line = self._line(text)
            if not line:  # the system has ended it
                self._end()
                raise ValueError(f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MiB of memory")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise ImportError(answer["missing"])
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def _line(self, job: str) -> str:
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-P", __file__]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdin
        assert self._process.stdout
        watch = threading.Timer(_PATIENCE, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except OSError:
            return ""
        finally:
            watch.cancel()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def render(template: str, variables: Mapping[str, Any]) -> str:
    """What `Renderer.render` returns and raises, in a process of its own."""
    with contextlib.closing(Renderer()) as renderer:
        return renderer.render(template, variables)


def names(template: str) -> frozenset[str]:
    """What `Renderer.names` returns and raises, in a process of its own."""
    with contextlib.closing(Renderer()) as renderer:
        return renderer.names(template)


def _limit() -> None:
    """Let the system end this process; where it has no such limits (Windows), the caller's time limit remains.

    Of the processor it has `SECONDS` from now on; a next job is given as many again.
    """
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + 1 + SECONDS
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (OSError, ValueError):  # macOS knows the limit and refuses to set it
        return


def _environment() -> Any:
    from datetime import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # The settings are those of transformers' apply_chat_template, so that both render alike.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _rendered(template: str, variables: Mapping[str, Any]) -> str:
    text: str = _environment().from_string(template).render(**variables)
    if len(text) > OUTPUT:
        raise ValueError(f"its text is longer than {OUTPUT >> 20} million characters")
    return text


def _names(template: str) -> list[str]:
    from jinja2 import meta

    environment = _environment()
    return sorted(meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals))


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    try:
        import jinja2  # noqa: F401 - before the limits: loading it is not the template's time
    except ImportError as error:
        return {"missing": str(error)}
    _limit()
    try:
        if "variables" not in job:
            return {"names": _names(job["template"])}
        return {"text": _rendered(job["template"], job["variables"])}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it is nested or calls itself too deep"}
    except Exception as error:  # a template can fail with any exception, all of them its own
        return {"error": str(error) or type(error).__name__}


if __name__ == "__main__":
    for job in sys.stdin.buffer:
        sys.stdout.write(json.dumps(_answer(json.loads(job))) + "\n")
        sys.stdout.flush()
