"""The pages of packages: complete, escaped, self-contained, well-formed, honest about damage, and good in a browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import browser
import pytest
from test_verify import CONFIG, GOOD, external, model

from pipeline import cli, digest
from pipeline.artifact import CHECKSUMS, MANIFEST, VALIDATION, Artifact, Estimate, Step
from pipeline.documents import card, html_report, index, measured, svg
from pipeline.documents.html_report import REPORT
from pipeline.documents.index import INDEX
from pipeline.errors import ResourceError, UsageError
from pipeline.package import contents as package_files, verify
from pipeline.stages import package as stage

# What a model, a recipe or a file name might say to become markup, to break out of it, or to hide.
HOSTILE = (
    '</title></style></svg><script>window.hit=1</script><img src=http://x.invalid/i onerror="window.hit=1">\'"&lt;'
    "{{ 7*7 }}{% raw %}<a href=javascript:window.hit=1>a</a><style>*{display:none}</style>\x00\x1b[31m\u202eevil\ud800"
)
CSS = (html_report._DATA / "report.css").read_text(encoding="utf-8")


def _figures(kl: float) -> dict[str, Any]:
    entry = {"positions": 8, "mean_kl": kl, "p99_kl": 4 * kl, "top1": 0.875, "reference_perplexity": 2.5}
    entry |= {"perplexity": 2.625, "perplexity_ratio": 1.05}
    return {
        **entry,
        "domains": {name: {**entry, "mean_kl": kl * part} for name, part in (("code", 0.5), ("math", 1.5))},
    }


def _validation(kl: float = 0.04) -> dict[str, Any]:
    gates = [
        {"metric": metric, "path": path, "value": value, "bound": bound, "sense": sense, "passed": True}
        for metric, path, value, bound, sense in (
            ("finite", "", 1.0, 1.0, "min"),
            ("mean_kl", "prefill", kl, 0.06, "max"),
            ("p99_kl", "prefill", 4 * kl, 0.801, "max"),
            ("top1", "decode", 0.87512, 0.87011, "min"),
            ("runaway_answers", "decode", 0, 0, "max"),
            ("tokenizer_mismatches", "served", 0, 0, "max"),
            ("a_new_one", "a_new_path", 17.25, 18.5, "max"),
        )
    ]
    ends = {"reference_ended": True, "ended": True}
    return {
        "schema_version": 1,
        "reference": {"checkpoint": "c", "dtype": "float32", "runtime": "torch 2"},
        "candidate": {
            "files": {},
            "runtime": "onnxruntime-genai 0.14.1",
            "target": "cpu",
            "provider": "CPUExecutionProvider",
            "executed_on": "CPUExecutionProvider",
            "device": "the processor",
            "not_executed_on_target": "",
        },
        "text": {"sha256": "t", "windows": 2, "window_tokens": 4},
        "prefill": _figures(kl),
        "decode": _figures(kl * 1.01),
        "last_token_prefill_error": 1e-05,
        "finite": True,
        "greedy": {
            "tokens": 32,
            "agreement": 0.6,
            "answers": [
                {"name": "same", "agreement": 1.0, "first_divergence": None, "reference": "10", "answer": "10", **ends},
                {"name": "parted", "agreement": 0.5, "first_divergence": 5, "reference_ended": False, "ended": True}
                | {"reference": "A function to count sheep", "answer": "A function that counts"},
            ],
        },
        "eos": {"ids": [1, 2], "reference_ids": [1, 2]},
        "tokenizer": {"probes": 19, "runtime": [{"name": "accents", "wanted": [1], "reason": "known"}], "served": []},
        "chat_template": {"conversations": 6, "runtime": [], "served": [{"name": "odd", "error": "it fails"}]},
        "gates": gates,
        "passed": True,
    }


def _fields(name: str, **target: Any) -> dict[str, Any]:
    body = {"bits": 4, "block_size": 32, "symmetric": False}
    known = {"name": "cpu", "title": "processors", "provider": "CPUExecutionProvider", "option": ""}
    return {
        "name": name,
        "base_model": "Qwen/Base",
        "license": "Apache-2.0",
        "languages": ["en", "zh"],
        "sources": [
            {"type": "hub", "repo": "Qwen/Base", "revision": "f" * 40, "file": "model.gguf"},
            {"type": "wheels", "wheels": [{"requirement": "a==1", "member": "b"}]},
        ],
        "sha256": "5" * 64,
        "recipe": {"description": "for tests", "quantize": {"algorithm": "rtn", "body": body}},
        "tools": {"onnx": "1.2.3"},
        "target": {**known, "dtype": "float32", "shapes": "dynamic", **target},
        "runtime": {"name": "onnxruntime-genai", "minimum": "0.14.1", "install": "pip install onnxruntime-genai"},
        "replay": {"top1": 0.9, "logprob": 0.15},
        "generation": {"context_length": None, "do_sample": False, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    }


def _artifact(name: str, folder: Path, facts: dict[str, Any]) -> Artifact:
    files = {path.name: (path.stat().st_size, digest.of_file(path)) for path in folder.iterdir()}
    return Artifact(name, name[0] * 64, "d" * 64, folder, files, facts)


@pytest.fixture
def package_of(tmp_path: Path) -> Callable[..., Path]:
    """Maker of a package, through the stage that makes real ones: ``(name, validation=..., **target) -> folder``."""

    def made(name: str, validation: dict[str, Any] | None = None, **target: Any) -> Path:
        folders = {part: tmp_path / "inputs" / name / part for part in ("checkpoint", "quantize", "validate")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        quantized = folders["quantize"]
        (quantized / "model.onnx").write_bytes(model(external("w", **GOOD)).SerializeToString())
        (quantized / "model.onnx.data").write_bytes(bytes(range(64)))
        (quantized / "genai_config.json").write_text(json.dumps(CONFIG))
        (folders["checkpoint"] / "config.json").write_text("{}")
        facts = {"algorithm": "rtn", "bits_per_weight": 4.625, "weights": {"4-bit/32": 7}, "operators": {"Identity": 1}}
        inputs = {"quantize": _artifact("quantize", quantized, {**facts, "relative_error": 0.008})}
        measured_ = validation or _validation()
        measured_["candidate"]["files"] = {
            name: digest.of_file(quantized / name) for name in ("model.onnx", "model.onnx.data")
        }
        (folders["validate"] / VALIDATION).write_text(json.dumps(measured_))
        (folders["validate"] / "golden.jsonl").write_text("")
        inputs |= {part: _artifact(part, folders[part], {}) for part in ("checkpoint", "validate")}
        out = tmp_path / "packages" / name
        out.mkdir(parents=True)
        step = Step("package", "p" * 64, _fields(name, **target), tuple(inputs), {}, Estimate(0, 0, 0))
        stage.run(step, inputs, out, lambda *_: None)
        return out

    return made


def _manifest(**changes: Any) -> dict[str, Any]:
    fields = _fields("a-package")
    seen = {"validated_on": "CPUExecutionProvider", "validated_device": "the processor", "not_validated_on_target": ""}
    return {
        "schema_version": 1,
        "name": fields["name"],
        "source": {
            **{key: fields[key] for key in ("base_model", "license", "languages", "sha256")},
            "locations": fields["sources"],
        },
        "quantization": {"bits_per_weight": 4.625, "weights": {"4-bit/32": 7}, "operators": {"Identity": 1}},
        "steps": {"checkpoint": {"key": "1" * 64, "digest": "2" * 64}, "package": {"key": "3" * 64}},
        "target": {**fields["target"], **seen},
        "files": {"model.onnx.data": {"size": 1234567, "sha256": "4" * 64}},
        **{key: fields[key] for key in ("recipe", "tools", "runtime", "replay")},
        **changes,
    }


class Page(HTMLParser):
    """A parsed page; anything that is not well-formed fails while it is parsed."""

    VOID = ("meta", "br", "wbr", "img", "link", "input", "hr", "source", "base")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        if "table" in self.open:
            self.tables[-1].append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> means nothing outside of SVG"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("style", "title", "desc"))


def _check(html: str) -> Page:
    """What holds for every page: well-formed, self-contained, and usable without eyes or a mouse."""
    page = Page(html)
    html.encode()  # no lone surrogates
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(tags)
    for name in ("src", "srcset", "style", "data", "action", "xlink:href", "background", "ping"):
        assert page.values(name) == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in page.values("href"):
        assert link.removeprefix("#") in ids or re.fullmatch(r"\./[A-Za-z0-9._~%-]+/report\.html", link), link
    assert set(page.values("aria-labelledby")) <= set(ids)

    style = "".join(data for tag, data in page.texts if tag == "style")
    known = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(entry["content"] for tag, entry in page.tags if entry.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'sha256-{known}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"url\(|@import|expression|https?:", style)

    assert ("html", {"lang": "en"}) in page.tags
    assert all(table[0] == "caption" for table in page.tables)
    assert all(entry.get("scope") in ("col", "row") for tag, entry in page.tags if tag == "th")
    assert all(entry.get("role") == "img" for tag, entry in page.tags if tag == "svg")
    after = {tags[at + 1] for at, tag in enumerate(tags) if tag == "svg"}
    assert after <= {"title"}
    assert all(
        "tabindex" in entry and entry.get("aria-label") for _, entry in page.tags if entry.get("class") == "scroll"
    )
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(right <= left + 1 for left, right in pairwise(levels))
    return page


def test_a_package_has_its_report_sealed_in(package_of: Callable[..., Path]) -> None:
    folder = package_of("whole")
    manifest = verify.package(folder)
    page = _check((folder / REPORT).read_text(encoding="utf-8"))
    assert REPORT in manifest.files
    for name, (_, sha256) in manifest.files.items():
        assert (sha256 in page.text) is (name != REPORT)
    for text in (
        "whole",
        "for tests",
        "Qwen/Base",
        "f" * 40,
        "a==1",
        "5" * 64,
        "4.62",
        "4-bit/32",
        "Identity",
        "0.8 %",
    ):
        assert text in page.text
    for entry in manifest.data["steps"].values():
        assert entry["key"] in page.text
    assert "onnx\n" not in page.text
    assert "1.2.3" in page.text
    assert card.scheme(manifest.data["recipe"]["quantize"]) in page.text
    assert html_report.page(manifest.data, _validation()) == html_report.page(manifest.data, _validation())


def test_every_gate_is_shown_and_a_missed_one_stands_out() -> None:
    validation = _validation()
    page = _check(html_report.page(_manifest(), validation))
    assert page.text.count("✓ pass") == len(validation["gates"])
    assert "7 of 7 gates passed" in page.text
    for gate in validation["gates"]:
        sign = "≤" if gate["sense"] == "max" else "≥"
        assert f"{gate['value']:.4g}{sign} {gate['bound']:g}" in page.text
    assert "a_new_one a_new_path17.25≤ 18.5" in page.text  # a gate of a later version
    validation["gates"][3]["passed"] = False
    page = _check(html_report.page(_manifest(), validation))
    assert page.text.count("✗ FAIL") == 1
    assert "6 of 7 gates passed" in page.text
    assert ("span", {"class": "verdict bad"}) in page.tags


def test_figures_of_both_paths_stand_by_text() -> None:
    validation = _validation(0.04)
    page = _check(html_report.page(_manifest(), validation))
    for path, kl in (("prefill", 0.04), ("decode", 0.0404)):
        for name, value in (("all texts", kl), ("code", kl * 0.5), ("math", kl * 1.5)):
            assert f"{path}{name}8{value:.4f}0.16" in page.text
            assert f"{value:.4f} {path}" in page.text  # in the plot
    assert "gate 0.06" in page.text


def test_answers_stand_side_by_side_and_are_marked_where_they_part() -> None:
    html = html_report.page(_manifest(), _validation())
    page = _check(html)
    marked = [data for tag, data in page.texts if tag == "mark"]
    assert marked == ["marked", "to count sheep", "that counts"]  # at a word, though both begin with a t
    assert "same: identical" in page.text
    assert "parted: same for 5 tokens (50% of the reference’s)" in page.text
    assert "Reference (cut here)" in page.text
    assert page.text.count("A function ") == 2
    assert "odd: no known reason: a miss" in page.text
    assert "18 of 19" in page.text


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ({}, ""),
        (
            {"provider": "CUDAExecutionProvider", "not_validated_on_target": "no NVIDIA driver"},
            "Not executed on CUDAExecutionProvider: no NVIDIA driver.",
        ),
        ({"validated_device": "HTP emulator"}, "Executed on HTP emulator, not on the hardware it is for."),
        ({"validated_device": "a software Vulkan driver"}, "not on the hardware it is for."),
    ],
)
def test_what_did_not_run_on_its_own_hardware_says_so(target: dict[str, str], text: str) -> None:
    manifest = _manifest()
    manifest["target"] |= target
    page = _check(html_report.page(manifest, _validation()))
    assert text in page.text
    assert (("p", {"class": "warning"}) in page.tags) is bool(text)


def test_what_is_missing_is_left_out() -> None:
    manifest, validation = _manifest(), _validation()
    del manifest["quantization"]
    manifest["source"] |= {"languages": [], "locations": [], "sha256": None}
    manifest["recipe"].pop("description")
    del validation["last_token_prefill_error"]
    npu = {"soc": "60", "pad": 7, "placement": {"head": {"QNN": 3}, "prefill": {"QNN": 4}}, "mean_kl": 3e-4}
    validation["npu"] = {**npu, "largest_difference": 0.5, "largest_logit": 20.5}
    page = _check(html_report.page(manifest, validation))
    assert "Compiled for 60 from 7 nodes" in page.text
    assert "Bits a weight" not in page.text
    # Nothing was measured of logits that are not finite.
    for key in ("prefill", "decode", "npu"):
        del validation[key]
    validation |= {"finite": False, "passed": False}
    assert "Mean KL divergence by text" not in _check(html_report.page(manifest, validation)).text


def _poisoned(value: Any, keep: tuple[str, ...] = ("metric", "type", "sense", "algorithm")) -> Any:
    """``value`` with all of its texts hostile."""
    if isinstance(value, dict):
        return {
            key if key in keep or key.isidentifier() else key + HOSTILE: item if key in keep else _poisoned(item, keep)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_poisoned(item, keep) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text() -> None:
    manifest, validation = _poisoned(_manifest()), _poisoned(_validation())
    for entry in validation["gates"]:
        entry["metric"] += HOSTILE
    validation["tokenizer"]["runtime"][0]["name"] = HOSTILE
    page = _check(html_report.page(manifest, validation))
    shown = svg.visible(HOSTILE)
    assert page.text.count(shown) > 30
    assert "␀␛[31m[U+202E]evil[U+D800]" in shown
    assert not set(page.text) & set("\x00\x1b\u202e\ud800")


@pytest.fixture
def folder(package_of: Callable[..., Path]) -> Path:
    """A folder with two packages."""
    package_of("one")
    missing = {"provider": "CUDAExecutionProvider"}
    return package_of("two & <b>", _validation(0.01), **missing).parent


def test_an_index_shows_all_packages_side_by_side(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / ".one.new").mkdir()
    assert index.write(folder) == folder / INDEX
    page = _check((folder / INDEX).read_text(encoding="utf-8"))
    assert "2 packages." in page.text
    assert page.values("href")[1:] == [
        "#package-1",
        "#package-2",
        "./one/report.html",
        "./two%20%26%20%3Cb%3E/report.html",
    ]
    assert "0.0404" in page.text
    assert "0.0101" in page.text
    assert verify.package(folder / "one").digest in page.text
    assert "Size against loss" in page.text
    assert "Damaged" not in page.text
    assert sorted(path.name for path in folder.iterdir()) == [".one.new", INDEX, "notes", "one", "two & <b>"]


def _rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_bytes())
    change(data)
    path.write_text(json.dumps(data))


def _sealed(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = VALIDATION) -> None:
    """Change the validation or the manifest, and make all digests agree again."""
    _rewrite(folder / name, change)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if name == VALIDATION:
        size, sha256 = (folder / VALIDATION).stat().st_size, digest.of_file(folder / VALIDATION)
        manifest["files"][VALIDATION] = {"size": size, "sha256": sha256}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    sums = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    (folder / CHECKSUMS).write_bytes(package_files.checksums({**sums, MANIFEST: digest.of_file(folder / MANIFEST)}))


def _instead(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file gone": (lambda at: (at / "model.onnx").unlink(), "model.onnx is missing"),
    "a file more": (lambda at: (at / "<i>.so").write_text(""), "<i>.so was added"),
    "other weights": (lambda at: (at / "model.onnx.data").write_bytes(b"x"), "model.onnx.data has changed"),
    "a link": (lambda at: _instead(at / "NOTICE", lambda to: to.symlink_to("LICENSE")), "NOTICE is no regular file"),
    "no manifest": (lambda at: (at / MANIFEST).unlink(), "has no manifest.json"),
    "no JSON": (lambda at: (at / MANIFEST).write_text("{"), "cannot be read"),
    "better figures": (
        lambda at: (at / VALIDATION).write_text(
            (at / VALIDATION).read_text().replace('"value": 0.04', '"value": 0.01')
        ),
        "validation.json has changed",
    ),
    "another report": (
        lambda at: (at / REPORT).write_bytes(b"x" * (at / REPORT).stat().st_size),
        "report.html has changed",
    ),
    "another manifest": (
        lambda at: _rewrite(at / MANIFEST, lambda data: data.update(name="x")),
        "SHA256SUMS does not agree",
    ),
    "a configuration that loads code": (
        lambda at: (
            _rewrite(at / "genai_config.json", lambda data: data["model"].update(custom_ops_library="x")),
            _sealed(
                at, lambda data: data["files"].update({"genai_config.json": _entry(at / "genai_config.json")}), MANIFEST
            ),
        ),
        "custom_ops_library",
    ),
    "gates that are none": (lambda at: _sealed(at, lambda data: data.update(gates=7)), "does not follow its schema"),
    "no figures": (lambda at: _sealed(at, lambda data: data.pop("decode")), "does not follow its schema"),
    "figures that are texts": (
        lambda at: _sealed(at, lambda data: data["decode"].update(mean_kl="<script>")),
        "does not follow its schema",
    ),
    "no target": (lambda at: _sealed(at, lambda data: data["target"].clear(), MANIFEST), "does not follow its schema"),
}


def _entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": digest.of_file(path)}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_package_is_named_and_not_shown(folder: Path, case: str) -> None:
    damage, text = DAMAGES[case]
    damage(folder / "one")
    index.write(folder)
    page = _check((folder / INDEX).read_text(encoding="utf-8"))
    assert "1 package, 1 damaged" in page.text
    assert "Damaged: do not use" in page.text
    assert text in page.text
    assert not [link for link in page.values("href") if "one" in link]


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_an_index_is_replaced_at_once_or_not_at_all(
    folder: Path, package_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index.write(folder)
    before = (folder / INDEX).read_bytes()
    package_of("three")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(ResourceError, match=r"index\.html cannot be written"):
            index.write(folder)
    assert (folder / INDEX).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, "one", "three", "two & <b>"]
    with (folder / INDEX).open("rb") as reader:  # who reads it meanwhile gets all of the old one
        index.write(folder)
        assert reader.read() == before
    assert b"3 packages" in (folder / INDEX).read_bytes()
    (folder / INDEX).write_text("my own page")
    with pytest.raises(UsageError, match="was not written by qwen-onnx"):
        index.write(folder)
    assert (folder / INDEX).read_text() == "my own page"


def test_the_command_writes_the_index_or_says_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / INDEX}\n"
    for wrong, text in ((folder / "none", "there is no folder"), (folder / "one", "is a package")):
        assert cli.main(["report", str(wrong)]) == 2
        assert text in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert cli.main(["report", str(folder / "empty")]) == 2
    assert "there are no packages in" in capsys.readouterr().err


def _attribution() -> dict[str, Any]:
    kinds = ("attn.qkv_proj", "mlp.down_proj")
    rows = [
        {"path": f"model.layers.{layer}.{kind}", "layer": layer, "kind": kind, "bits": 4, "block_size": 64}
        | {"bytes": 2_400_000, "kl": 0.001 * (layer + 1) if "mlp" in kind else -1e-6}
        for layer in range(20)
        for kind in kinds
    ]
    rows.append(
        {"path": "lm_head", "layer": None, "kind": "head", "bits": 8, "block_size": 32, "bytes": 9, "kl": 0.0195}
    )
    stages = [{"name": "export", "kl": 1e-8}, {"name": "quantize (weights)", "kl": 0.03}]
    text = {"sha256": "ab", "windows": 4}
    return {"schema_version": 1, "text": text, "total_kl": 0.0393, "rows": rows, "stages": stages}


def _bench() -> dict[str, Any]:
    def subject(name: str, kind: str, speed: float, kl: float | None, ratios: dict[str, float]) -> dict[str, Any]:
        speeds = {"prefill": {"128": 3 * speed, "512": 2 * speed}, "decode": {"16": speed, "512": speed / 2}}
        times = {"time_to_first_token": 0.25, "load": 1.5, "peak_memory": 600_000_000, "bytes": int(4e8 * speed / 40)}
        loss = {"mean_kl": kl, "perplexity_ratio": 1.05 if kl else None}
        return {"name": name, "kind": kind, "version": "1.2", **speeds, **times, **loss, "ratios": ratios}

    subjects = [
        subject("one", "package", 40.0, 0.04, {}),
        subject("llama.cpp", "peer", 32.0, 0.0005, {"decode_512": 1.2512, "load": 0.9}),
        subject("plain-olive", "peer", 30.0, None, {"decode_512": 1.31}),
    ]
    machine = {"processor": "A Processor", "threads": 2, "system": "Linux"}
    absent = [{"name": "torch", "why": "not installed"}]
    return {"schema_version": 1, "machine": machine, "rounds": 5, "subjects": subjects, "absent": absent}


def test_results_beside_a_package_are_shown(folder: Path) -> None:
    (folder / "one.attribution.json").write_text(json.dumps(_attribution()))
    (folder / "one.bench.json").write_text(json.dumps(_bench()))
    index.write(folder)
    page = _check((folder / INDEX).read_text(encoding="utf-8"))
    assert page.text.count("Where the loss comes from") == 1
    assert "Measured on 4 windows." in page.text
    assert "0.2100 (92%)" in page.text  # 0.001 + … + 0.020 nats, of the MLPs
    assert page.text.index("model.layers.19.mlp.down_proj4-bit/642.40.02008.7%") < page.text.index("lm_head8-bit/32")
    assert page.text.count("Speed and size beside others") == 1
    assert "decode after 512, tokens/s20.016.0 (1.25)15.0 (1.31)" in page.text
    assert "size, MB400320300" in page.text
    assert "mean KL, nats a token0.040.0005–" in page.text
    assert "torch: not installed" in page.text
    titles = [data for tag, data in page.texts if tag == "title"]
    assert {"Size against loss", "Decoding speed against loss", "Decode after 512 tokens", "Prefill of 128 tokens"} <= {
        *titles
    }


def test_hostile_results_stay_text(folder: Path) -> None:
    for name, data, keep in (("attribution", _attribution(), ()), ("bench", _bench(), ("kind",))):
        (folder / f"one.{name}.json").write_text(json.dumps(_poisoned(data, keep)))
    index.write(folder)
    page = _check((folder / INDEX).read_text(encoding="utf-8"))
    assert "left out" not in page.text
    assert page.text.count(svg.visible(HOSTILE)) > 20


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data.update(schema_version=2), "schema_version"),
        (lambda data: data.update(rounds="5"), "rounds"),
        (lambda data: data["subjects"][0].update(kind="<script>"), "subjects.0.kind"),
        (lambda data: data["subjects"][0].update(load=math.nan), "NaN"),
        (lambda data: data.pop("absent"), "absent"),
    ],
)
def test_results_that_cannot_be_read_are_named(folder: Path, change: Callable[[Any], Any], text: str) -> None:
    data = _bench()
    change(data)
    path = measured.beside(folder / "one", "bench")
    assert path == folder / "one.bench.json"
    path.write_text(json.dumps(data))
    index.write(folder)
    page = _check((folder / INDEX).read_text(encoding="utf-8"))
    assert "one.bench.json is left out:" in page.text
    assert text in page.text
    assert "Speed and size beside others" not in page.text


def test_the_pareto_front_is_what_nothing_beats() -> None:
    points = [
        svg.Point(x, y, str(at), "") for at, (x, y) in enumerate([(1, 9), (2, 5), (3, 5), (4, 7), (5, 1), (2, 6)])
    ]
    assert [point.mark for point in svg.front(points, more=False)] == ["0", "1", "4"]
    assert [point.mark for point in svg.front(points, more=True)] == ["4"]
    assert [point.mark for point in svg.front(points[:4], more=True)] == ["2", "3"]


def _numbers(markup: str) -> list[float]:
    found = [value for name in ("x", "y", "x1", "y1", "cx", "cy", "width", "height") for value in _values(markup, name)]
    assert found
    return [float(value.removesuffix("%")) for value in found]


def _values(markup: str, name: str) -> list[str]:
    return Page(markup).values(name)


@pytest.mark.parametrize("values", [[], [0.0], [-1.0, 0.0], [1e-300, 1e300], [5.0, 5.0], [1e-9, 3.0, -2.0]])
def test_plots_stay_within_their_bounds_whatever_the_values(values: list[float]) -> None:
    points = [svg.Point(abs(value) % 1e6, value, "m", "n") for value in values]
    plots = [
        svg.bars("t", "d", [svg.Group("g", [svg.Bar(value, "v") for value in values])], 0.5),
        svg.columns("t", "d", values, "u"),
        svg.heat("t", "d", [("row", values), ("gap", [None] * len(values))], "u"),
        svg.scatter("t", "d", points, "x", "y", more=True),
    ]
    for plot in plots:
        assert all(math.isfinite(number) and number >= 0 for number in _numbers(plot))
        assert all(float(x.removesuffix("%")) <= 100 for x in _values(plot, "x") + _values(plot, "cx"))


def test_bars_are_as_long_as_their_values_say() -> None:
    plot = svg.bars("t", "d", [svg.Group("g", [svg.Bar(2.0, "two"), svg.Bar(0.5, "half", "b")])], 4.0)
    widths = [float(width.removesuffix("%")) for width in _values(plot, "width")[1:]]
    assert widths[0] == pytest.approx(4 * widths[1], rel=1e-3)
    line = float(_values(plot, "x1")[0].removesuffix("%"))
    assert line == pytest.approx(2 * widths[0], rel=1e-3)


def test_names_that_are_too_long_for_a_phone_are_cut() -> None:
    plot = svg.bars("t", "d", [svg.Group("x" * 100, [])])
    assert "x" * 43 + "…<" in plot


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_have_contrast_by_day_by_night_and_on_paper() -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what a plot is read from."""
    schemes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", part)) for part in re.findall(r":root \{(.*?)\}", CSS, re.S)
    ]
    assert len(schemes) == 3
    assert len({tuple(sorted(scheme)) for scheme in schemes}) == 1

    def contrast(scheme: dict[str, str], front: str, back: str) -> float:
        high, low = sorted((_luminance(scheme[front]), _luminance(scheme[back])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for scheme in schemes:
        for back in ("page", "card", "mark", "warn-card"):
            assert contrast(scheme, "text", back) >= 4.5
        for front in ("quiet", "link", "good", "bad", "warn"):
            assert contrast(scheme, front, "page") >= 4.5, front
        assert contrast(scheme, "quiet", "card") >= 4.5
        assert contrast(scheme, "warn", "warn-card") >= 4.5
        for front in ("a", "b", "bad"):
            assert contrast(scheme, front, "page") >= 3


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if not browser.BINARY:
        pytest.skip(f"there is no {' or '.join(browser.NAMES)}")
    with browser.start(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def pages(folder: Path) -> list[Path]:
    """A report and an index with everything in them, both with hostile texts."""
    (folder / "one.attribution.json").write_text(json.dumps(_attribution()))
    (folder / "one.bench.json").write_text(json.dumps(_poisoned(_bench(), ("kind",))))
    (folder / "two & <b>" / "model.onnx").unlink()
    index.write(folder)
    hostile = folder / "hostile.html"
    manifest, validation = _poisoned(_manifest()), _poisoned(copy.deepcopy(_validation()))
    hostile.write_text(html_report.page(manifest, validation), encoding="utf-8")
    return [folder / INDEX, folder / "one" / REPORT, hostile]


@pytest.mark.slow
def test_pages_are_good_in_a_browser(chromium: browser.Browser, pages: list[Path]) -> None:
    for page in pages:
        for width in (320, 360, 1280):
            for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")):
                chromium.open(page, width, scheme)
                assert chromium.complaints == []
                assert chromium.evaluate("document.documentElement.scrollWidth") == width
                assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        assert chromium.evaluate("typeof hit") == "undefined"
        assert chromium.evaluate("performance.getEntriesByType('resource').length") == 0
        nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
        for role in ("image", "table", "region"):
            named = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == role]
            assert named
            assert all(named)
        chromium.press("Tab")
        assert chromium.evaluate("document.activeElement.className") == "skip"
        assert chromium.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        chromium.open(page, 700, "dark", media="print")
        assert chromium.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert chromium.evaluate("[...document.querySelectorAll('details pre')].every(pre => pre.checkVisibility())")
        printed = chromium.pdf()
        assert printed.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2


@pytest.mark.slow
def test_the_policy_of_a_page_stops_what_the_escaping_would_miss(chromium: browser.Browser, pages: list[Path]) -> None:
    page = pages[1]
    text = page.read_text(encoding="utf-8")
    added = "<script>window.hit=1</script><img src=x.png onerror='window.hit=2'>"
    added += "<style>body{color:#010203}</style><p id=end></p>"
    page.write_text(text.replace("</body>", f"{added}</body>"), encoding="utf-8")
    chromium.open(page, 800)
    assert chromium.evaluate("document.getElementById('end') !== null")
    assert chromium.evaluate("typeof hit") == "undefined"
    assert chromium.evaluate("getComputedStyle(document.body).color") != "rgb(1, 2, 3)"
    told = "".join(chromium.complaints)
    for directive in ("script-src", "style-src", "img-src"):
        assert directive in told


@pytest.mark.real
def test_the_report_of_the_real_package_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    assert cli.main(["build", "recipes/qwen2.5-coder-0.5b-instruct/cpu-int4.yaml"]) == 0
    package = root / "artifacts" / "qwen2.5-coder-0.5b-instruct-cpu-int4"
    manifest = verify.package(package)
    page = _check((package / REPORT).read_text(encoding="utf-8"))
    validation = json.loads((package / VALIDATION).read_bytes())
    assert f"{len(validation['gates'])} of {len(validation['gates'])} gates passed" in page.text
    assert all(answer["name"] in page.text for answer in validation["greedy"]["answers"])
    assert manifest.data["source"]["sha256"] in page.text
    assert manifest.digest in _check((package.parent / INDEX).read_text(encoding="utf-8")).text
