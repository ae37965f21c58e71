"""A package that is not what was built is refused, and nothing of it is loaded before that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline import digest
from pipeline.artifact import CHECKSUMS, GOLDEN, MANIFEST
from pipeline.errors import PackageError, RuntimeMissing
from pipeline.package import contents as package_files, verify
from pipeline.runtime import golden

CONFIG = {
    "model": {
        "type": "qwen2",
        "eos_token_id": [1, 2],
        "vocab_size": 8,
        "context_length": 16,
        "decoder": {
            "session_options": {"log_id": "x", "provider_options": []},
            "filename": "model.onnx",
            "inputs": {"input_ids": "input_ids"},
            "outputs": {"logits": "logits"},
        },
    },
    "search": {"max_length": 16, "temperature": 0.7},
}


def external(name: str, **entries: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(*tensors: TensorProto, nodes: tuple[Any, ...] = ()) -> onnx.ModelProto:
    nodes = nodes or (helper.make_node("Identity", ["w"], ["y"]),)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [output], list(tensors)))


GOOD = {"location": "model.onnx.data", "offset": "0", "length": "16"}


def seal(folder: Path, **changes: Any) -> None:
    """Write manifest and checksums for whatever lies in ``folder``."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in (MANIFEST, CHECKSUMS))
    files = {n: {"size": (folder / n).stat().st_size, "sha256": digest.of_file(folder / n)} for n in names}
    data = {key: {} for key in ("source", "recipe", "steps", "target")}
    data |= {"schema_version": 1, "name": "p", "runtime": {"minimum": "0.14.1"}, "files": files, **changes}
    (folder / MANIFEST).write_text(json.dumps(data))
    sums = {name: entry["sha256"] for name, entry in files.items()} | {MANIFEST: digest.of_file(folder / MANIFEST)}
    (folder / CHECKSUMS).write_bytes(package_files.checksums(sums))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "a package, ünïcode"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model(external("w", **GOOD)).SerializeToString())
    (folder / "model.onnx.data").write_bytes(bytes(range(64)))
    (folder / "genai_config.json").write_text(json.dumps(CONFIG))
    (folder / "LICENSE").write_text("do what you like")
    seal(folder)
    return folder


def test_a_package_as_built_passes(package: Path) -> None:
    assert verify.package(package).data["name"] == "p"


def _flip(folder: Path) -> None:
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


def _link(folder: Path) -> None:
    (folder / "LICENSE").rename(folder.parent / "elsewhere")
    (folder / "LICENSE").symlink_to(folder.parent / "elsewhere")


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one flipped bit": (_flip, "model.onnx.data has changed (sha256)"),
    "a truncated file": (lambda p: os.truncate(p / "model.onnx.data", 63), "model.onnx.data has changed (size)"),
    "an extra file": (lambda p: (p / "extra.so").write_text("x"), "extra.so is not in the manifest"),
    "a hidden file": (lambda p: (p / ".hidden").write_text("x"), ".hidden is not in the manifest"),
    "a folder": (lambda p: (p / "sub").mkdir(), "sub is no regular file"),
    "a missing file": (lambda p: (p / "LICENSE").unlink(), "LICENSE is missing"),
    "a link": (_link, "LICENSE is no regular file"),
    "a pipe": (lambda p: os.mkfifo(p / "pipe"), "pipe is no regular file"),
    "names that differ by case": (lambda p: (p / "license").write_text("x"), "one file where case does not count"),
    "other checksums": (lambda p: (p / CHECKSUMS).write_text("0"), "SHA256SUMS does not agree"),
    "no checksums": (lambda p: (p / CHECKSUMS).unlink(), "SHA256SUMS is missing"),
    "a manifest that is not JSON": (lambda p: (p / MANIFEST).write_text("{"), "cannot be read"),
    "a manifest nested too deep": (lambda p: (p / MANIFEST).write_text("[" * 200_000), "cannot be read"),
    "a newer schema": (lambda p: seal(p, schema_version=2), "schema version 2; this program reads 1"),
    "a name that leaves": (lambda p: seal(p, files={"../x": {"size": 0, "sha256": ""}}), "one flat directory"),
    "no licence": (lambda p: ((p / "LICENSE").unlink(), seal(p)), "has no LICENSE"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "is not a package"),
    "a manifest that is a pipe": (lambda p: _instead(p / MANIFEST, os.mkfifo), "it is no regular file"),
    "a manifest that links to itself": (
        lambda p: _instead(p / MANIFEST, lambda path: path.symlink_to(MANIFEST)),
        "it is no regular file",
    ),
    "a huge manifest": (lambda p: os.truncate(p / MANIFEST, 1 << 40), "it is larger than"),
    "a manifest that says a thing twice": (
        lambda p: (p / MANIFEST).write_text('{"files": {}, ' + (p / MANIFEST).read_text()[1:]),
        "the key 'files' stands twice",
    ),
    "a manifest with an infinite number": (
        lambda p: (p / MANIFEST).write_text('{"x": 1e999, ' + (p / MANIFEST).read_text()[1:]),
        "1e999 is no number",
    ),
    "half a character in the manifest": (lambda p: seal(p, source={"x": "\ud800"}), "cannot be read"),
    "a name for terminals": (lambda p: seal(p, name="\x1b[2J"), "cannot be printed"),
    "a file name for terminals": (lambda p: (p / "\x1b[2J").write_text("x"), "'\\x1b[2J' is not in the manifest"),
    "a line end in a file name": (lambda p: seal(p, files={"a\nb": {"size": 0, "sha256": ""}}), "plain names"),
}


def _instead(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_named(package: Path, case: str) -> None:
    tamper, text = TAMPERED[case]
    tamper(package)
    with pytest.raises(PackageError) as caught:
        verify.package(package)
    assert text in str(caught.value)


def test_hard_links_are_files_like_others(package: Path) -> None:
    os.link(package / "model.onnx.data", package.parent / "elsewhere")
    verify.package(package)


DECODER = CONFIG["model"]["decoder"]  # type: ignore[index]
HOSTILE_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "native code": ({"custom_ops_library": "evil.so"}, "unknown key `model.decoder.custom_ops_library`"),
    "native code in a session": (
        {"session_options": {"custom_ops_library": "evil.so"}},
        "unknown key `model.decoder.session_options.custom_ops_library`",
    ),
    "a provider's library": (
        {"session_options": {"provider_options": [{"QNN": {"backend_path": "evil.so"}}]}},
        "`model.decoder.session_options.provider_options` names providers or options",
    ),
    "a file elsewhere": ({"filename": "../model.onnx"}, "`model.decoder.filename` leaves the package"),
    "an absolute file": ({"filename": "/model.onnx"}, "`model.decoder.filename` leaves the package"),
    "a flag for a number": ({"head_size": True}, "`model.decoder.head_size` has the wrong type"),
    "a graph under another name": ({"filename": "model.onnx.data"}, "`model.decoder.filename` does not end in .onnx"),
    "a provider": (
        {"session_options": {"ep_library_path": "evil.so"}},
        "unknown key `model.decoder.session_options.ep_library_path`",
    ),
    "settings of the prefill": (
        {"run_options": {"custom_ops_library": "evil.so"}},
        "unknown key `model.decoder.run_options`",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_configuration_that_is_not_trusted_is_refused(package: Path, case: str) -> None:
    changes, text = HOSTILE_CONFIGS[case]
    config = {**CONFIG, "model": {**CONFIG["model"], "decoder": {**DECODER, **changes}}}  # type: ignore[dict-item]
    (package / "genai_config.json").write_text(json.dumps(config))
    seal(package)
    with pytest.raises(PackageError) as caught:
        verify.package(package)
    assert text in str(caught.value)


STAGE = {"filename": "model.onnx", "inputs": ["x"], "outputs": ["y"]}
QNN_OPTIONS = {
    "backend_type": "htp",
    "soc_model": "60",
    "htp_performance_mode": "burst",
    "htp_graph_finalization_optimization_mode": "3",
    "enable_block_quant_weight_optimization": "1",
}
WINDOWS = {"window_size": 64, "pad_value": 0, "alignment": "left", "slide_key_value_cache": False}


def on_npu(options: Any, **settings: Any) -> dict[str, Any]:
    return {**STAGE, "session_options": {"provider_options": [{"qnn": options}], **settings}}


def with_decoder(package: Path, decoder: dict[str, Any], kind: str = "decoder-pipeline") -> Path:
    config = {**CONFIG, "model": {**CONFIG["model"], "type": kind, "pad_token_id": 7, "decoder": decoder}}  # type: ignore[dict-item]
    (package / "genai_config.json").write_text(json.dumps(config))
    seal(package)
    return package


def pipeline_of(*groups: Any, **more: Any) -> dict[str, Any]:
    decoder = {key: value for key, value in DECODER.items() if key != "filename"}  # type: ignore[union-attr]
    return {**decoder, "pipeline": list(groups), **more}


def test_a_pipeline_of_stages_passes(package: Path) -> None:
    first = {**STAGE, "run_on_token_gen": False, "run_on_prompt": True}
    second = {**on_npu(QNN_OPTIONS, log_id="x", **{"session.disable_cpu_ep_fallback": "1"}), "is_lm_head": True}
    verify.package(with_decoder(package, pipeline_of({"front": first, "head": second}, sliding_window=WINDOWS)))
    verify.package(with_decoder(package, pipeline_of({"front": first}, {"head": second}, sliding_window=WINDOWS)))


def test_a_pipeline_names_what_it_fills_up_windows_with(package: Path) -> None:
    folder = with_decoder(package, pipeline_of({"front": STAGE}, sliding_window=WINDOWS))
    config = json.loads((folder / "genai_config.json").read_bytes())
    del config["model"]["pad_token_id"]
    (folder / "genai_config.json").write_text(json.dumps(config))
    seal(folder)
    with pytest.raises(PackageError) as caught:
        verify.package(folder)
    assert caught.value.why == "`model.pad_token_id` is missing"


# name: (the decoder, what is said)
HOSTILE_PIPELINES: dict[str, tuple[dict[str, Any], str]] = {
    "a library of the backend": (
        pipeline_of({"head": on_npu({**QNN_OPTIONS, "backend_path": "libQnnHtp.so"})}),
        "`model.decoder.pipeline.head.session_options.provider_options` names providers or options",
    ),
    "a library of the backend for all stages": (
        pipeline_of({"head": STAGE}, session_options=on_npu({"backend_path": "QnnHtp.dll"})["session_options"]),
        "`model.decoder.session_options.provider_options` names providers or options",
    ),
    "a path as the kind of backend": (
        pipeline_of({"head": on_npu({"backend_type": "../evil.so"})}),
        "provider_options` names providers or options",
    ),
    "a package of operators": (
        pipeline_of({"head": on_npu({"op_packages": "evil"})}),
        "provider_options` names providers or options",
    ),
    "a file to write to": (
        pipeline_of({"head": on_npu({"profiling_file_path": "x"})}),
        "provider_options` names providers or options",
    ),
    "the provider under another name": (
        pipeline_of({"head": {**STAGE, "session_options": {"provider_options": [{"QNN": QNN_OPTIONS}]}}}),
        "provider_options` names providers or options",
    ),
    "a provider's library": (
        pipeline_of({"head": on_npu(QNN_OPTIONS, ep_library_path="evil.so")}),
        "unknown key `model.decoder.pipeline.head.session_options.ep_library_path`",
    ),
    "a library of operators": (
        pipeline_of({"front": STAGE, "head": on_npu(QNN_OPTIONS, custom_ops_library="evil.so")}),
        "unknown key `model.decoder.pipeline.head.session_options.custom_ops_library`",
    ),
    "a library of operators in a second group": (
        pipeline_of({"front": STAGE}, {"head": {**STAGE, "custom_ops_library": "evil.so"}}),
        "unknown key `model.decoder.pipeline.head.custom_ops_library`",
    ),
    "a file to write the compiled graph to": (
        pipeline_of({"head": on_npu(QNN_OPTIONS, **{"ep.context_file_path": "x.onnx"})}),
        "unknown key `model.decoder.pipeline.head.session_options.ep.context_file_path`",
    ),
    "a stage of a file elsewhere": (
        pipeline_of({"head": {**STAGE, "filename": "../head.onnx"}}),
        "`model.decoder.pipeline.head.filename` leaves the package",
    ),
    "a stage of an absolute file": (
        pipeline_of({"head": {**STAGE, "filename": "/head.onnx"}}),
        "`model.decoder.pipeline.head.filename` leaves the package",
    ),
    "a stage whose data would not be checked": (
        pipeline_of({"head": {**STAGE, "filename": "head.bin"}}),
        "`model.decoder.pipeline.head.filename` does not end in .onnx",
    ),
    "options of a run": (
        pipeline_of({"head": {**STAGE, "run_options": {"x": "y"}}}),
        "unknown key `model.decoder.pipeline.head.run_options`",
    ),
    "stages that are not in a list": (
        {**pipeline_of(), "pipeline": {"head": STAGE}},
        "`model.decoder.pipeline` is no list",
    ),
    "a stage that is text": (pipeline_of({"head": "x"}), "`model.decoder.pipeline.head` is no object"),
    "a group that is text": (pipeline_of("x"), "is no object"),
    "inputs that are no names": (
        pipeline_of({"head": {**STAGE, "inputs": ["../x"]}}),
        "`model.decoder.pipeline.head.inputs` is no list of names",
    ),
    "an unknown key of windows": (
        pipeline_of({"head": STAGE}, sliding_window={**WINDOWS, "layers": [0]}),
        "unknown key `model.decoder.sliding_window.layers`",
    ),
    "a window that is a flag": (
        pipeline_of({"head": STAGE}, sliding_window={**WINDOWS, "window_size": True}),
        "`model.decoder.sliding_window.window_size` has the wrong type",
    ),
    "windows that are a number": (
        pipeline_of({"head": STAGE}, sliding_window=64),
        "`model.decoder.sliding_window` is no object",
    ),
    "a window of nothing": (
        pipeline_of({"head": STAGE}, sliding_window={**WINDOWS, "window_size": 0}),
        "window_size",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_PIPELINES)
def test_a_pipeline_that_is_not_trusted_is_refused(package: Path, case: str) -> None:
    decoder, text = HOSTILE_PIPELINES[case]
    with pytest.raises(PackageError) as caught:
        verify.package(with_decoder(package, decoder))
    assert text in str(caught.value)


ODD_CONFIGS = {
    # Python keeps the last of two equal keys; the runtime obeys them one after another, and loads the library.
    "a key that stands twice": (
        '{"model": {"decoder": {"session_options": {"custom_ops_library": "e.so"}, "session_options": {}}}}',
        "the key 'session_options' stands twice",
    ),
    "not UTF-8": ('{"model": {"type": "\xe9"}}'.encode("utf-16"), "cannot be read"),
    "nested deep": ('{"model":' * 200_000, "cannot be read"),
    "nothing in it": ('{"model": {}}', "`model.context_length` is missing"),
    "a list": ("[]", "`the file` is no object"),
    "end tokens that are no numbers": ('{"model": {"eos_token_id": ["x"]}}', "is no list of whole numbers"),
}


@pytest.mark.parametrize("case", ODD_CONFIGS)
def test_a_configuration_that_parsers_may_read_differently_is_refused(package: Path, case: str) -> None:
    data, text = ODD_CONFIGS[case]
    (package / "genai_config.json").write_bytes(data if isinstance(data, bytes) else data.encode())
    seal(package)
    with pytest.raises(PackageError) as caught:
        verify.package(package)
    assert text in str(caught.value)


HOSTILE_DATA = {
    "the folder above": ({**GOOD, "location": "../x"}, "no file name of the package"),
    "an absolute path": ({**GOOD, "location": "/etc/passwd"}, "no file name of the package"),
    "a detour": ({**GOOD, "location": "a/../../b"}, "no file name of the package"),
    "a missing file": ({**GOOD, "location": "other"}, "no regular file of the package"),
    "a negative offset": ({**GOOD, "offset": "-8"}, "bytes -8 to 8"),
    "an offset in other digits": ({**GOOD, "offset": "1_0"}, "is not an ONNX model"),
    "a huge length": ({**GOOD, "length": "1000000000000"}, "which has 64"),
    "an offset that is no number": ({**GOOD, "offset": "x"}, "is not an ONNX model"),
}


@pytest.mark.parametrize("case", HOSTILE_DATA)
@pytest.mark.parametrize("place", ["initializer", "attribute", "subgraph", "sparse"])
def test_external_data_stays_inside(package: Path, case: str, place: str) -> None:
    entries, text = HOSTILE_DATA[case]
    bad = external("bad", **entries)
    if place == "initializer":
        made = model(bad)
    elif place == "attribute":
        made = model(nodes=(helper.make_node("Constant", [], ["y"], value=bad),))
    elif place == "subgraph":
        inner = helper.make_graph([], "inner", [], [], [bad])
        made = model(nodes=(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),))
    else:
        made = model()
        made.graph.sparse_initializer.add().values.CopyFrom(bad)
    (package / "model.onnx").write_bytes(made.SerializeToString())
    seal(package)
    with pytest.raises(PackageError) as caught:
        verify.package(package)
    assert text in str(caught.value)


def compiled(location: str | bytes, place: str) -> onnx.ModelProto:
    """A graph whose compiled part lies in a file of its own."""
    context = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context=location)
    if place == "subgraph":
        inner = helper.make_graph([context], "inner", [], [])
        context = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    made = model(nodes=(context,))
    if place == "function":
        del made.graph.node[:]
        made.functions.add(name="f", domain="x").node.append(context)
    return made


def test_a_compiled_graph_with_its_binary_passes(package: Path) -> None:
    (package / "head.onnx").write_bytes(compiled("head_qnn.bin", "node").SerializeToString())
    (package / "head_qnn.bin").write_bytes(b"x")
    seal(package)
    verify.package(package)


HOSTILE_BINARIES: dict[str, tuple[str | bytes, str]] = {
    "the folder above": ("../head_qnn.bin", "no file name of the package"),
    "an absolute path": ("/tmp/head_qnn.bin", "no file name of the package"),
    "a path of Windows": ("..\\head_qnn.bin", "no file name of the package"),
    "a detour": ("a/../../head_qnn.bin", "no file name of the package"),
    "a missing file": ("lost.bin", "no regular file of the package"),
    "the folder itself": (".", "no file name of the package"),
    "no name": ("", "no file name of the package"),
    "a name that is cut at a zero": (b"head_qnn.bin\0x", "no file name of the package"),
    "a binary in place of a name": (b"\xff\xfe\x7fELF", "no regular file of the package"),
}


@pytest.mark.parametrize("place", ["node", "subgraph", "function"])
@pytest.mark.parametrize("case", HOSTILE_BINARIES)
def test_compiled_binaries_stay_inside(package: Path, case: str, place: str) -> None:
    location, text = HOSTILE_BINARIES[case]
    (package / "head_qnn.bin").write_bytes(b"x")
    (package.parent / "head_qnn.bin").write_bytes(b"x")
    (package / "head.onnx").write_bytes(compiled(location, place).SerializeToString())
    seal(package)
    with pytest.raises(PackageError, match=r"head\.onnx refers to data that it may not read") as caught:
        verify.package(package)
    assert text in caught.value.why


def test_nothing_is_loaded_before_the_checks_are_through(package: Path) -> None:
    blocked = "import sys; sys.modules.update({n: None for n in ('onnx', 'onnxruntime', 'onnxruntime_genai', 'numpy')})"
    call = f"{blocked}; from pipeline.cli import main; sys.exit(main(['verify', sys.argv[1]]))"
    done = subprocess.run([sys.executable, "-c", call, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _flip(package)
    done = subprocess.run([sys.executable, "-c", call, str(package)], capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert "Traceback" not in done.stderr


def test_a_runtime_that_is_too_old_is_named(package: Path) -> None:
    seal(package, runtime={"minimum": "999.1"})
    with pytest.raises(RuntimeMissing, match="too old"):
        verify.check_runtime(verify.package(package))


def test_a_runtime_that_is_absent_is_named() -> None:
    """Without site-packages nothing is installed: even then a package can be checked, and what is missing is said."""
    code = (
        "from pipeline import artifact\nfrom pipeline.errors import RuntimeMissing\n"
        "from pipeline.package import verify\n"
        "try: verify.check_runtime(artifact.Manifest({'runtime': {}}))\nexcept RuntimeMissing as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    assert "onnxruntime-genai is not installed" in done.stdout


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": [1]}', '{"prompt": [1], "tokens": []}', "[" * 100_000])
def test_a_transcript_that_is_none_is_refused_before_the_model_is_loaded(package: Path, line: str) -> None:
    (package / GOLDEN).write_text(line)
    with pytest.raises(PackageError, match=r"golden\.jsonl cannot be read"):
        golden.replay(package)
