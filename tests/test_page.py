"""The page of the server: nothing from elsewhere, no text of a model read as markup, and a conversation that works."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "pipeline" / "serve" / "web" / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody loads
HOSTILE = (
    '<script>window.hit=1</script><img src=x onerror="window.hit=2"><svg onload=window.hit=3>'
    "[a](javascript:window.hit=4) <a href=javascript:window.hit=5>b</a> <style>*{display:none}</style></pre></code>"
)


# What is sent.


def _get(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """The answer of the page's routes, without a server: status, headers and body."""
    from starlette.applications import Starlette

    from pipeline.serve.web import page

    sent: list[dict[str, Any]] = []
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Starlette(routes=page.routes())(scope, receive, send))  # type: ignore[arg-type]
    found = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    assert len(dict(found)) == len(found), "a header stands there twice"
    return sent[0]["status"], dict(found), b"".join(message.get("body", b"") for message in sent[1:])


def test_every_file_is_served_under_a_strict_policy() -> None:
    from pipeline.serve.web import page

    bodies = set()
    for path in page.PATHS:
        status, headers, body = _get(path)
        assert status == 200
        assert headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-cache"
        kinds = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
        assert headers["content-type"].partition(";")[0] == kinds[path.partition(".")[2]]
        bodies.add(body)
    assert bodies == {text.encode() for text in FILES.values()}
    assert _get("/", "POST")[0] == 405
    assert _get("/page/page.js")[0] == 404


def test_a_browser_that_has_a_file_is_not_sent_it_again() -> None:
    tag = _get("/page.js")[1]["etag"]
    assert tag != _get("/page.css")[1]["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        status, headers, body = _get("/page.js", if_none_match=known)
        assert (status, body) == (304, b"")
        assert headers["etag"] == tag
        assert "content-security-policy" in headers
    for known in ('"other"', "", tag.strip('"')):
        assert _get("/page.js", if_none_match=known)[0] == 200


def test_the_files_are_part_of_an_installation() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["pipeline"]
    assert len(FILES) >= 8
    for name in FILES:
        assert any(fnmatch.fnmatch(f"serve/web/page/{name}", pattern) for pattern in patterns)


# What the files hold.


class _Markup(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self._tag = ""
        self.feed(FILES["index.html"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._tag = tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inside.append(data)


def test_nothing_is_loaded_from_elsewhere() -> None:
    for name, text in FILES.items():
        assert not re.search(r"\b(?:https?|wss?|ftp):", text.replace(NAMESPACE, "")), name
        assert not re.search(r"""["'(]//\w""", text), name
    assert not re.search(r"url\(|@import|@font-face", FILES["page.css"])
    loads = [value for _, given in _Markup().tags for key, value in given.items() if key in ("src", "href")]
    assert sorted(map(str, loads)) == ["#question", "page.css", "page.js", "page.svg"]
    for name, text in SCRIPTS.items():
        for module in re.findall(r"""\b(?:from|import)\s*\(?\s*["'](.*?)["']""", text):
            assert module.removeprefix("./") in SCRIPTS, name


def test_markup_has_no_scripts_styles_or_handlers_of_its_own() -> None:
    markup = _Markup()
    assert "".join(markup.inside).strip() == ""
    assert "style" not in {tag for tag, _ in markup.tags}
    names = {name for _, given in markup.tags for name in given}
    assert not {name for name in names if name in {"style", "action"} or name.startswith("on")}


@pytest.mark.parametrize(
    "pattern",
    [
        r"inner(HTML|Text)|outerHTML|insertAdjacent|setHTML|createContextualFragment|DOMParser",  # text read as markup
        r"document\.write|\beval\b|\bFunction\s*\(|setTimeout\(\s*[\"'`]",  # text read as a script
        r"\blocalStorage\b|\bindexedDB\b|document\.cookie|serviceWorker",  # what outlives the tab
        r"\.href\b|\bwindow\.open\b|\blocation\b|XMLHttpRequest|WebSocket|EventSource|sendBeacon",  # other ways out
    ],
)
def test_scripts_keep_away_from(pattern: str) -> None:
    for name, text in SCRIPTS.items():
        assert not re.search(pattern, text), name


def test_one_module_speaks_to_the_server() -> None:
    assert {name for name, text in SCRIPTS.items() if re.search(r"\bfetch\(", text)} == {"page-client.js"}
    assert re.findall(r"request\(\"(.*?)\"", FILES["page-client.js"]) == ["v1/models", "v1/chat/completions"]


# In a browser.


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.BINARY is None:
        pytest.skip("no Chromium on PATH")
    with browser.start(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def bare() -> Iterator[str]:
    """The address of the page alone: there is no API behind it."""
    import uvicorn
    from starlette.applications import Starlette

    from pipeline.serve.web import page

    application = Starlette(routes=page.routes())
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


def _run(chromium: browser.Browser, script: str) -> Any:
    """The value that a script returns, which has the page's modules at hand."""
    modules = ("client", "element", "markdown", "turns", "view")
    imports = "".join(f"const {name} = await import('/page-{name}.js');" for name in modules)
    return chromium.evaluate(f"(async () => {{ {imports} {script} }})()")


MARKED = [
    ("plain", "<p>plain</p>"),
    ("two\nlines", "<p>two\nlines</p>"),
    ("**bold** and *italic* and ~~gone~~", "<p><strong>bold</strong> and <em>italic</em> and <s>gone</s></p>"),
    ("***both***", "<p><strong><em>both</em></strong></p>"),
    ("2 * 3 * 4 snake_case_name **open", "<p>2 * 3 * 4 snake_case_name **open</p>"),
    ("`a * b` ``c ` d`` `open", "<p><code>a * b</code> <code>c ` d</code> `open</p>"),
    (r"\*no\* \(x\)", r"<p>*no* \(x\)</p>"),
    ("# One\n###### Six", "<h3>One</h3><h6>Six</h6>"),
    ("- a\n- b\n  - c\n\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    ("Steps:\n1. a\n\n   more", "<p>Steps:</p><ol><li>a<p>more</p></li></ol>"),
    ("> said\n> so", "<blockquote><p>said\nso</p></blockquote>"),
    ("---", "<hr>"),
    ("[text](javascript:alert(1))", "<p>[text](javascript:alert(1))</p>"),
    ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
]


@pytest.mark.slow
def test_marks_become_elements(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 800)
    shown = _run(
        chromium,
        f"return {json.dumps([text for text, _ in MARKED])}.map(text =>"
        "markdown.blocksOf(text).map(block => markdown.render(block).outerHTML).join(''))",
    )
    assert shown == [wanted for _, wanted in MARKED]
    code = _run(
        chromium,
        r"const node = markdown.render(markdown.blocksOf('```py\nif a:\n\n    b < c\n```\nafter')[0]);"
        "return [node.querySelector('.code-head').firstChild.data, node.querySelector('code').textContent]",
    )
    assert code == ["py", "if a:\n\n    b < c"]
    table = _run(
        chromium,
        r"const node = markdown.render(markdown.blocksOf('|a|b|\n|-|:-:|\n|1|`2`|\n|3|')[0]);"
        "return [...node.querySelectorAll('tr')].map(row => [...row.children].map(cell => cell.innerHTML))",
    )
    assert table == [["a", "b"], ["1", "<code>2</code>"], ["3", ""]]


@pytest.mark.slow
def test_text_that_grows_ends_as_text_that_was_there_at_once(chromium: browser.Browser, bare: str) -> None:
    """And what is complete keeps its elements, so that a selection or a place in a code block is not lost."""
    text = "# T\n\nPara **bold**\n\n```py\nx = 1\n\ny = 2\n```\n\n- a\n  - b\n\n- c\n\n"
    text += "|a|b|\n|-|-|\n|1|2|\n\n> q\n\nEnd *it*."
    chromium.open(bare, 800)
    same, kept, spoken = _run(
        chromium,
        f"""
        const text = {json.dumps(text)};
        const [grown, whole] = [new view.Growing(), new view.Growing()];
        let heading, code, kept = true;
        const spoken = [];
        for (let end = 1; end <= text.length; end += 1) {{
            grown.show(text.slice(0, end));
            if (text.slice(0, end).includes('Para')) kept &&= (heading ??= grown.node.children[0]).isConnected !== null
                && heading === grown.node.children[0];
            if (text.slice(0, end).includes('x =')) kept &&= (code ??= grown.node.querySelector('.code'))
                === grown.node.querySelector('.code');
            spoken.push(...grown.spoken(spoken.length, end === text.length));
        }}
        whole.show(text);
        return [grown.node.innerHTML === whole.node.innerHTML, kept, spoken];
        """,
    )
    assert same
    assert kept
    assert spoken[0] == "T"
    assert "Para bold" in spoken
    assert "x = 1\n\ny = 2" in spoken
    assert spoken[-1] == "End it."


@pytest.mark.slow
def test_no_text_takes_long_to_lay_out(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 800)
    times = _run(
        chromium,
        """
        const size = 60000;
        const texts = ['**a ', '*a ', '~~a', '`', '` `` ', '|a', '|-', '- ', '> ', '>', '# ', '\\\\', '*', '[',
            '1. a\\n', '- a\\n\\n', '- a\\n\\n\\n\\n', '```\\n', ' ', '* * ', '-\\n', 'a\\n|-|\\n', '  - a\\n'];
        return texts.map(text => {
            const begun = performance.now();
            new view.Growing().show(text.repeat(size / text.length));
            return [text, performance.now() - begun];
        });
        """,
    )
    assert max(times, key=lambda entry: entry[1])[1] < 6000, times
    deep = _run(
        chromium,
        r"""
        const deep = Array.from({length: 300}, (_, index) => ' '.repeat(2 * index) + '- a').join('\n');
        const grown = new view.Growing();
        grown.show(deep + '\n\n' + '> '.repeat(3000) + 'b\n\n' + '**_*~~'.repeat(3000));
        return grown.node.textContent.length;
        """,
    )
    assert deep > 300


@pytest.mark.slow
def test_text_of_a_model_is_never_markup(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 1000)
    chromium.wait("document.querySelector('#trouble .error')")  # there is no API behind the page
    before = len(chromium.complaints)
    found = _run(
        chromium,
        f"""
        const text = {json.dumps(HOSTILE)};
        const marked = `${{text}}\\n\\n**${{text}}**\\n\\n- ${{text}}\\n\\n|${{text}}|b|\\n|-|-|\\n|`
            + `\\`${{text}}\\`|c|\\n\\n`
            + `\\`\\`\\`${{text.replaceAll('`', '')}}\\n${{text}}\\n\\`\\`\\`\\n\\n# ${{text}}\\n\\n> ${{text}}\\n`;
        const answer = turns.answer(text);
        const call = {{index: 0, id: text, function: {{name: text, arguments: JSON.stringify({{[text]: text}})}}}};
        turns.add(answer, {{choices: [{{delta: {{reasoning_content: text, content: marked, tool_calls: [call]}}}}]}},
            1);
        turns.add(answer, {{choices: [{{delta: {{}}, finish_reason: 'tool_calls'}}]}}, 2);
        answer.error = new client.Refusal(text, {{status: 500, code: text}});
        answer.running = false;
        const all = [turns.question(text), answer, turns.result({{id: 'other', name: text}}, text)];
        const place = document.getElementById('turns');
        for (const turn of all) {{
            const shown = view.turnView(turn);
            place.append(shown.node);
            shown.update(all);
        }}
        const kinds = new Set([...place.querySelectorAll('*')].map(node => node.localName));
        const names = new Set([...place.querySelectorAll('*')].flatMap(node => node.getAttributeNames()));
        return [[...kinds].sort(), [...names].sort(), place.textContent.split('window.hit=2').length];
        """,
    )
    kinds, names, count = found
    allowed = "article blockquote button code details div h2 h3 label li p pre section span strong summary table tbody"
    assert set(kinds) <= {*allowed.split(), "td", "textarea", "th", "thead", "tr", "ul"}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style")]
    assert count > 15
    chromium.evaluate("new Promise(done => setTimeout(done, 200))")
    assert chromium.evaluate("typeof hit") == "undefined"
    assert chromium.complaints[before:] == []


@pytest.mark.slow
def test_the_policy_stops_what_the_page_would_miss(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 800)
    chromium.evaluate(f"document.getElementById('about').innerHTML = {json.dumps(HOSTILE)}")
    chromium.evaluate("new Promise(done => setTimeout(done, 200))")
    assert chromium.evaluate("typeof hit") == "undefined"
    assert chromium.evaluate("getComputedStyle(document.body).display") != "none"
    assert chromium.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    told = "".join(chromium.complaints)
    for directive in ("script-src", "style-src", "connect-src"):
        assert directive in told


@pytest.mark.slow
def test_events_are_the_same_wherever_the_bytes_are_cut(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 800)
    events = (
        ': ping\r\n\r\ndata: {"a": "é你👩"}\n\ndata:two\ndata: lines\r\r: x\nevent: e\r\ndata: [DONE]\r\n\r\ndata: half'
    )
    found = _run(
        chromium,
        f"""
        const bytes = new TextEncoder().encode({json.dumps(events)});
        const streamed = (parts) => new ReadableStream({{
            start(sink) {{ parts.forEach(part => sink.enqueue(part)); sink.close(); }}
        }});
        const read = async (parts) => {{
            const all = [];
            for await (const data of client.messages(streamed(parts))) all.push(data);
            return JSON.stringify(all);
        }};
        const seen = new Set([await read([...bytes].map(byte => Uint8Array.of(byte)))]);
        for (let cut = 0; cut <= bytes.length; cut += 1) seen.add(await read([bytes.slice(0, cut), bytes.slice(cut)]));
        return [...seen];
        """,
    )
    assert [json.loads(entry) for entry in found] == [['{"a": "é你👩"}', "two\nlines", "[DONE]"]]


@pytest.mark.slow
def test_a_conversation_is_sent_as_the_api_takes_it(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 800)
    sent, waiting, later, cut = _run(
        chromium,
        """
        const answer = turns.answer('m');
        const chunk = (delta, finish_reason = null) => ({choices: [{index: 0, delta, finish_reason}]});
        const call = (index, given, more = {}) => ({tool_calls: [{index, function: {arguments: given}, ...more}]});
        for (const part of ['I ', 'think']) turns.add(answer, chunk({reasoning_content: part}), 1);
        turns.add(answer, chunk({tool_calls: [{index: 0, id: 'a', function: {name: 'f', arguments: ''}}]}), 2);
        turns.add(answer, chunk(call(0, '{"x"')), 2);
        turns.add(answer, chunk({tool_calls: [{index: 1, id: 'b', function: {name: 'g', arguments: '{}'}}]}), 2);
        turns.add(answer, chunk(call(0, ':1}')), 2);
        const half = turns.messagesOf('', [answer]);
        turns.add(answer, chunk({}, 'tool_calls'), 3);
        answer.running = false;
        const failed = {...turns.answer('m'), running: false, error: new Error('e')};
        const all = [turns.question('q', ['data:image/png;base64,AA==']), failed, answer];
        const before = turns.openCalls(all);
        const [first] = before;
        all.push(turns.result(first, '1'));
        const after = turns.openCalls(all);
        return [turns.messagesOf('be brief', all), before.map(({id}) => id), after.map(({id}) => id), half];
        """,
    )
    assert sent == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "text", "text": "q"},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I think",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
                {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
    ]
    assert (waiting, later) == (["a", "b"], ["b"])
    assert cut == []


@pytest.mark.slow
def test_figures_are_those_of_the_server(chromium: browser.Browser, bare: str) -> None:
    chromium.open(bare, 800)
    figures = _run(
        chromium,
        """
        const usage = {prompt_tokens: 1510, completion_tokens: 101, prompt_tokens_details: {cached_tokens: 1204},
            completion_tokens_details: {reasoning_tokens: 40}};
        return [turns.figures({usage, first: 0.25, last: 10.25}), turns.figures({usage: null, first: null, last: null}),
            turns.figures({usage: {prompt_tokens: 3, completion_tokens: 1}, first: 12.3, last: 12.3})];
        """,
    )
    assert figures == [
        [
            "101 tokens",
            "40 of them thoughts",
            "10.0 tokens/s",
            "first token after 0.25 s",
            "prompt 1,510 tokens, 1,204 cached",
        ],
        [],
        ["1 token", "first token after 12 s", "prompt 3 tokens"],
    ]


@pytest.mark.slow
def test_the_page_is_good_in_a_browser(chromium: browser.Browser, bare: str) -> None:
    for width in (320, 360, 1280):
        for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")):
            chromium.open(bare, width, scheme)
            chromium.wait("document.querySelector('#trouble .error')")  # there is no API behind the page
            for settings in ("true", "false"):
                assert chromium.evaluate("document.documentElement.scrollWidth") == width
                assert chromium.evaluate("document.documentElement.scrollHeight") == 800
                assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == paper
                if chromium.evaluate("document.getElementById('toggle').ariaExpanded") != settings:
                    chromium.evaluate("document.getElementById('toggle').click()")
    assert "404" in chromium.evaluate("document.querySelector('#trouble .error').textContent")
    origins = chromium.evaluate(
        "performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin + '/')"
    )
    assert set(origins) == {bare}
    chromium.evaluate(
        "document.getElementById('toggle').ariaExpanded === 'true' || document.getElementById('toggle').click()"
    )
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    for role in ("textbox", "combobox", "button", "spinbutton", "main", "complementary"):
        named = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == role]
        assert named
        assert all(named), role
    chromium.open(bare, 800)
    chromium.evaluate("document.getElementById('toggle').focus()")  # all that is before it is disabled without an API
    chromium.press("Shift+Tab")
    assert chromium.evaluate("document.activeElement.className") == "skip"
    assert chromium.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    chromium.open(bare, 700, "dark", media="print")
    assert chromium.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not chromium.evaluate("document.getElementById('composer').checkVisibility()")
    assert chromium.pdf().startswith(b"%PDF")


# With the server.

KEY = "a-key-for-the-tests-of-the-page"


@pytest.fixture(scope="module")
def served(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real server, with a tiny model that can think or not; it asks for `KEY`."""
    if browser.BINARY is None:
        pytest.skip("no Chromium on PATH")
    from pipeline.export import exporter

    checkpoint = checkpoint_of("qwen3")
    folder = tmp_path_factory.mktemp("served") / "tiny"
    folder.mkdir()
    exporter.export_genai(checkpoint, folder, {}, "CPUExecutionProvider", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint / name, folder / name)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log = folder.parent / "log"
    command = [sys.executable, "-m", "pipeline", "serve", str(folder), "--trust", "--port", str(port)]
    environment = {**os.environ, "QWEN_ONNX_API_KEYS": KEY, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
    try:
        address = f"http://127.0.0.1:{port}/"
        end = time.monotonic() + 120
        while not _is_ready(address):
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


DONE = "document.getElementById('stop').hidden"


def _ask(chromium: browser.Browser, text: str) -> None:
    chromium.evaluate("document.getElementById('question').focus()")
    chromium.type(text)
    chromium.press("Enter")


def _set(chromium: browser.Browser, **fields: str) -> None:
    for name, value in fields.items():
        chromium.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}")


@pytest.mark.slow
def test_a_conversation_with_the_server(chromium: browser.Browser, served: str) -> None:
    chromium.open(served, 1280)
    chromium.wait("document.getElementById('ask-key').open")  # the server asks for a key, and so does the page
    chromium.type("not-the-key-of-this-server")
    chromium.press("Enter")
    chromium.wait("document.getElementById('key-fault').textContent")
    chromium.type(KEY)
    chromium.press("Enter")
    chromium.wait("!document.getElementById('model').disabled")
    assert chromium.evaluate("document.getElementById('model').value") == "tiny"
    assert chromium.evaluate("Object.values(sessionStorage).length") == 1
    before = len(chromium.complaints)

    _set(chromium, max_tokens="12", temperature="0", enable_thinking="false")
    _ask(chromium, f"the fox {HOSTILE}")
    chromium.wait(f"{DONE} && document.querySelector('.figures').textContent")
    figures = chromium.evaluate("document.querySelector('.figures').textContent")
    assert re.search(r"\d+ tokens?.*first token after .* s.*prompt \d+ tokens", figures)
    assert HOSTILE in chromium.evaluate("document.querySelector('.user .plain').textContent")
    first = chromium.evaluate("document.querySelector('.assistant .text').textContent")
    copy = ".user [data-act=copy]"
    chromium.click(copy)
    chromium.wait(f"document.querySelector('{copy}').textContent !== 'Copy'")
    assert chromium.evaluate(f"document.querySelector('{copy}').textContent") == "Copied"
    chromium.evaluate("document.querySelector('[data-act=again]').click()")
    chromium.wait(f"{DONE} && document.querySelector('.figures').textContent")
    assert chromium.evaluate("document.querySelectorAll('.turn').length") == 2
    assert chromium.evaluate("document.querySelector('.assistant .text').textContent") == first

    chromium.evaluate("document.querySelector('[data-act=edit]').click()")
    chromium.evaluate("document.querySelector('.editing textarea').value = ''")
    chromium.type("the dog sleeps")
    chromium.press("Enter")
    chromium.wait(f"{DONE} && document.querySelector('.figures').textContent")
    assert chromium.evaluate("document.querySelectorAll('.turn').length") == 2
    assert chromium.evaluate("document.querySelector('.user .plain').textContent") == "the dog sleeps"

    chromium.press("Shift+Enter")
    assert chromium.evaluate("document.querySelectorAll('.turn').length") == 2
    assert chromium.evaluate("document.getElementById('question').value") == "\n"
    chromium.evaluate("document.getElementById('clear').click()")
    assert chromium.evaluate("document.querySelectorAll('.turn').length") == 0
    chromium.evaluate("document.querySelector('#notice button').click()")
    assert chromium.evaluate("document.querySelectorAll('.turn').length") == 2
    assert chromium.evaluate("typeof hit") == "undefined"
    assert chromium.complaints[before:] == []


@pytest.mark.slow
def test_what_the_server_refuses_is_told_in_its_words(chromium: browser.Browser, served: str) -> None:
    chromium.open(served, 1280)
    chromium.wait("document.getElementById('ask-key').open || !document.getElementById('model').disabled")
    if chromium.evaluate("document.getElementById('ask-key').open"):
        chromium.type(KEY)
        chromium.press("Enter")
        chromium.wait("!document.getElementById('model').disabled")
    _ask(chromium, "word " * 2000)  # the context is smaller
    chromium.wait(f"{DONE} && document.querySelector('.assistant .error')")
    told = chromium.evaluate("document.querySelector('.assistant .error').innerText")
    assert "tokens" in told
    assert "Status 400, context_length_exceeded" in told
    _set(chromium, tools="{not json")
    _ask(chromium, "the fox")
    assert chromium.evaluate("document.querySelectorAll('.turn').length") == 2  # it was not sent
    assert chromium.evaluate("document.activeElement.id") == "tools"
    assert "not JSON" in chromium.evaluate("document.getElementById('tools-fault').textContent")
    assert chromium.evaluate("document.getElementById('question').value") == "the fox"


@pytest.mark.slow
def test_an_answer_is_stopped(chromium: browser.Browser, served: str) -> None:
    chromium.open(served, 1280)
    chromium.wait("document.getElementById('ask-key').open || !document.getElementById('model').disabled")
    if chromium.evaluate("document.getElementById('ask-key').open"):
        chromium.type(KEY)
        chromium.press("Enter")
        chromium.wait("!document.getElementById('model').disabled")
    _ask(chromium, "In the morning")
    chromium.evaluate(
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))"
    )  # at once: a tiny model is done in no time
    chromium.wait(DONE)
    _ask(chromium, "In the evening")
    chromium.wait(f"{DONE} && document.querySelectorAll('.assistant').length === 2")
    chromium.wait("document.querySelectorAll('.assistant')[1].querySelector('.figures').textContent")


@pytest.mark.slow
def test_a_picture_for_a_model_that_does_not_see_is_not_taken(chromium: browser.Browser, served: str) -> None:
    chromium.open(served, 1280)
    chromium.wait("document.getElementById('ask-key').open || !document.getElementById('model').disabled")
    if chromium.evaluate("document.getElementById('ask-key').open"):
        chromium.type(KEY)
        chromium.press("Enter")
        chromium.wait("!document.getElementById('model').disabled")
    picture = base64.b64encode(chromium.screenshot()).decode()
    chromium.evaluate(
        f"""(() => {{
        const bytes = Uint8Array.from(atob('{picture}'), sign => sign.charCodeAt(0));
        const carried = new DataTransfer();
        carried.items.add(new File([bytes], 'a.png', {{type: 'image/png'}}));
        const question = document.getElementById('question');
        question.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: carried, bubbles: true}}));
        }})()"""
    )
    chromium.wait("document.getElementById('notice').textContent")
    assert "does not see" in chromium.evaluate("document.getElementById('notice').textContent")
    assert chromium.evaluate("document.getElementById('attached').hidden")
