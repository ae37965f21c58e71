"""Render a chat template that nobody has to trust, in a process of its own.

Jinja's sandbox keeps a template from the interpreter, not from looping for ever or doubling a string until memory is
gone; nothing inside one process can. So this file runs as a script with limits on time and memory: it imports nothing
of this package, reads one JSON object from standard input and writes one to standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# An ordinary conversation takes milliseconds and a few megabytes.
SECONDS = 2
MEMORY = 1 << 30
OUTPUT = 32 << 20
_START = 60  # seconds until a busy machine must have started the script and come to an end


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that ``template`` makes of ``variables`` (JSON values).

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: the template fails, reaches for what the sandbox forbids, or needs too much time or memory;
            or a variable is no JSON value.
    """
    return str(_ask({"template": template, "variables": variables})["text"])


def names(template: str) -> frozenset[str]:
    """The variables that ``template`` reads and does not set itself; raises as `render` does."""
    return frozenset(_ask({"template": template})["names"])


def _ask(job: Mapping[str, Any]) -> dict[str, Any]:
    """What this file, run as a script, answers to a job."""
    try:
        text = json.dumps(job)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=_START, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it takes more than {_START} seconds") from None
    answer: dict[str, Any]
    try:
        answer = json.loads(done.stdout)
    except ValueError:  # the system ended the script
        raise ValueError(f"it takes more than {SECONDS} seconds or {MEMORY >> 20} MiB of memory") from None
    if "missing" in answer:
        raise ImportError(answer["missing"])
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def _limit() -> None:
    """Let the system end this process; where it has no such limits (Windows), the caller's time limit remains."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(usage.ru_utime + usage.ru_stime) + 1 + SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
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
    sys.stdout.write(json.dumps(_answer(json.loads(sys.stdin.buffer.read()))))
