"""Packages for Intel's NPU: what a recipe may ask for, and tiny checkpoints, built and run on OpenVINO's CPU device.

The builds need the environment for OpenVINO (`make .venv-openvino`, or QWEN_ONNX_OPENVINO=DIR).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_replay import script

from pipeline import cli, olive
from pipeline.artifact import Artifact
from pipeline.builds import plan, report
from pipeline.builds.store import Store
from pipeline.checkpoint import reference
from pipeline.errors import PackageError, RecipeError, RuntimeMissing, StageError
from pipeline.facts import machine, recipe
from pipeline.facts.scheme import Scheme
from pipeline.facts.target import TARGETS
from pipeline.npu import isolated, openvino
from pipeline.package import config as package_config, graphs as package_graphs, replay, verify
from pipeline.runtime import generate, session as sessions

ROOT = Path(__file__).parent.parent
BASES = ROOT / "recipes" / "_base"
HERE = any((Path(os.environ.get(isolated.VARIABLE) or ROOT / isolated.DEFAULT) / "bin").glob("python*"))
with_tools = pytest.mark.skipif(not HERE, reason=f"there is no environment for OpenVINO: make {isolated.DEFAULT}")
PROVIDER = "OpenVINOExecutionProvider"
CHANNELS = {"bits": 8, "block_size": -1, "symmetric": True}


def written(folder: Path, sections: dict[str, Any], base: str, checkpoint: str = "x") -> Path:
    """A recipe on one line (JSON is YAML), after a base of the repository."""
    path = folder / "tiny" / f"{base}.yaml"
    path.parent.mkdir(parents=True)
    source = {"sources": [{"type": "local", "path": checkpoint}], "license": "Apache-2.0", "base_model": "tiny"}
    extends = os.path.relpath(BASES / f"{base}.yaml", path.parent)
    path.write_text(json.dumps({"extends": extends, "checkpoint": source, **sections}), encoding="utf-8")
    return path


# name: (sections over the base, each finding's key words)
IMPOSSIBLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "groups that the NPU does not take": (
        {"quantize": {"body": {"block_size": 32}}},
        ["blocks of 32 have no 4-bit kernel on openvino; known: -1, 64, 128, 256"],
    ),
    "zero points": ({"quantize": {"body": {"symmetric": False}}}, ["zero points have no kernels on openvino"]),
    "8 bits in blocks": ({"quantize": {"body": {"bits": 8}}}, ["blocks of 64 have no 8-bit kernel"]),
    "a float head": ({"quantize": {"head": None}}, ["nncf quantizes it by channel"]),
    "a float embedding": ({"quantize": {"embedding": "float"}}, ["nncf quantizes it by channel"]),
    "exceptions": ({"quantize": {"exclude": ["*"]}}, ["remove `exclude`"]),
    "another's graphs": ({"export": {"exporter": "genai"}}, ["openvino takes graphs of openvino, genai writes others"]),
    "another's algorithm": (
        {"quantize": {"algorithm": "min_error", "head": None, "embedding": "float"}},
        ["min_error has no kernels on openvino; known: nncf", "min_error takes no options"],
    ),
    "its algorithm elsewhere": (
        {"target": "cuda", "export": {"exporter": "genai"}, "quantize": {"head": CHANNELS}},
        ["nncf has no kernels on cuda", "blocks of -1", "blocks of -1", "rows without zero points"],
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    sections, wanted = IMPOSSIBLE[case]
    with pytest.raises(RecipeError) as caught:
        recipe.load(written(tmp_path, sections, "openvino-int4"))
    found = caught.value.what.splitlines()[1:]
    assert len(found) == len(wanted), found
    for text in wanted:
        assert any(text in finding for finding in found), (text, found)


def test_options_that_nncf_would_need_data_for_are_refused_and_the_bases_are_not() -> None:
    for name in ("openvino-int4", "openvino-int8"):
        document = recipe.strict_yaml.read(BASES / f"{name}.yaml").value
        olive.check_options("nncf", document["quantize"].get("options", {}), name)
    for options, text in (
        ({"compress_config": {"awq": True}}, "unknown option `compress_config.awq`"),
        ({"compress_config": {"ration": 0.5}}, "did you mean `compress_config.ratio`?"),
        ({"ignored_scope": ["x"]}, "`ignored_scope` follows from other keys"),
    ):
        with pytest.raises(RecipeError) as caught:
            olive.check_options("nncf", options, "here")
        assert text in caught.value.what


def test_the_pinned_tools_are_in_the_keys_of_the_steps_that_run_them(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = recipe.load(written(tmp_path, {}, "openvino-int4", str(checkpoint_of("qwen2"))))
    before = {step.stage: step for step in plan.make(loaded)}
    assert before["export"].tools == before["quantize"].tools == isolated.pins()
    assert set(before["validate"].tools) >= {"onnxruntime-genai", "onnxruntime-ep-openvino"}
    assert before["package"].fields["tools"]["nncf"] == isolated.pins()["nncf"]
    other = tmp_path / "pins.txt"
    other.write_text(isolated.PINNED.read_text().replace("\nnncf==", "\nnncf==9"))
    monkeypatch.setattr(isolated, "PINNED", other)
    after = {step.stage: step.key for step in plan.make(loaded)}
    assert after["checkpoint"] == before["checkpoint"].key
    assert all(after[stage] != before[stage].key for stage in after if stage != "checkpoint")


def test_every_tool_is_pinned_once_and_no_host_is_named() -> None:
    lines = [line for line in isolated.PINNED.read_text().splitlines() if not line.startswith("#")]
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert all(version and "+" not in version for _, _, version in (line.partition("==") for line in lines))
    assert set(isolated.TOOLS) <= set(names)


def test_an_environment_that_is_missing_or_another_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "env"
    monkeypatch.setenv(isolated.VARIABLE, str(home))
    with pytest.raises(RuntimeMissing, match=f"no environment for OpenVINO at {home}") as caught:
        isolated.programs()
    assert "`make .venv-openvino`" in caught.value.fix
    assert isolated.VARIABLE in caught.value.fix

    programs, site = home / "bin", home / "lib" / "python3.11" / "site-packages"
    programs.mkdir(parents=True)
    (programs / "python").touch()
    for name, version in isolated.pins().items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {version}{'+cpu' if name == 'torch' else ''}\n")
    assert isolated.programs() == programs
    next(site.glob("nncf*")).joinpath("METADATA").write_text("Name: nncf\nVersion: 1.0\n")
    with pytest.raises(RuntimeMissing, match="is not the pinned environment") as caught:
        isolated.programs()
    assert caught.value.why == f"nncf is 1.0, not {isolated.pins()['nncf']}"


@pytest.mark.slow
def test_a_build_without_the_environment_ends_with_the_exit_code_of_a_missing_runtime(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv(isolated.VARIABLE, str(tmp_path / "none"))
    path = written(tmp_path, {}, "openvino-int8", str(checkpoint_of("qwen2")))
    assert build(path, tmp_path) == RuntimeMissing.exit_code
    assert "there is no environment for OpenVINO" in capfd.readouterr().err


def test_another_device_of_the_same_provider_is_not_taken_for_the_npu() -> None:
    row, found = TARGETS["openvino"], machine.execution(TARGETS["openvino"])
    assert found.missing
    assert machine.elsewhere(row.provider, row.provider, found.missing) == "the NPU"
    assert machine.elsewhere("A", "B", "why") == "A"
    assert not machine.elsewhere("A", "A", "")
    line = next(line for line in report.targets([(row, found)]).splitlines() if line.startswith("openvino"))
    assert line.split()[3] == "INT4/INT8"
    assert " yes         no " in line


CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "the NPU": ({"device_type": "NPU", "enable_causallm": "True"}, True),
    "the processor": ({"device_type": "CPU"}, True),
    "settings of OpenVINO": ({"device_type": "NPU", "load_config": '{"NPU": {"CACHE_DIR": "/tmp"}}'}, False),
    "a cache": ({"cache_dir": "x"}, False),
    "a path": ({"device_type": "../x"}, False),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_options_that_could_name_files_are_refused(case: str) -> None:
    options, good = CONFIGS[case]
    assert package_config._is_provider({"OpenVINO": options}) is good


@pytest.mark.parametrize("spoilt", ["", "no weights", "weights elsewhere", "a graph elsewhere"])
def test_a_graph_and_its_weights_are_files_of_the_package(spoilt: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (tmp_path / "model.xml").write_text("<net/>")
    (tmp_path / "model.bin").write_bytes(b"x")
    shutil.copy(tmp_path / "model.xml", package)
    if spoilt == "weights elsewhere":
        (package / "model.bin").symlink_to(tmp_path / "model.bin")
    elif spoilt != "no weights":
        shutil.copy(tmp_path / "model.bin", package)
    openvino.wrap(package, 8)
    if spoilt == "a graph elsewhere":
        model = onnx.load(str(package / "model.onnx"))
        next(entry for entry in model.graph.node[0].attribute if entry.name == "ep_cache_context").s = b"../model.xml"
        onnx.save(model, str(package / "model.onnx"))
    if not spoilt:
        package_graphs.check_external_data(package)
        return
    with pytest.raises(PackageError, match=r"model\.onnx refers to data that it may not read"):
        package_graphs.check_external_data(package)


@pytest.mark.parametrize(
    ("made", "bits", "ratio", "problem"),
    [
        ({"i8": 1000, "f16": 20}, 8, 1.0, ""),
        ({"i4": 500, "i8": 500, "f16": 20}, 4, 0.5, ""),
        ({"i8": 1000, "f16": 20}, 4, 0.5, "4-bit weights were asked for"),
        ({"i4": 500, "i8": 500}, 8, 1.0, "8-bit weights were asked for"),
        ({"i4": 900, "u8": 100}, 4, 1.0, "zero points"),
        ({"f32": 1000}, 8, 1.0, "floating point"),
    ],
)
def test_weights_that_are_not_what_was_asked_for_are_found_out(
    made: dict[str, int], bits: int, ratio: float, problem: str
) -> None:
    if not problem:
        openvino._check(made, bits, ratio)
        return
    with pytest.raises(StageError, match="not quantized as the scheme says") as caught:
        openvino._check(made, bits, ratio)
    assert problem in caught.value.why


def build(path: Path, folder: Path) -> int:
    return cli.main(["build", str(path), "--store", str(folder / "store"), "--out", str(folder / "out")])


Builds = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def built(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Maker of a package, ``(model_type, base) -> (package, store)``, each once; do not write into it."""

    @cache
    def made(model_type: str, base: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(model_type)
        sections = {
            # A tiny model loses more in 4 bits than a real one.
            "validate": {
                "windows": 4,
                "window_tokens": 48,
                "greedy_tokens": 12,
                "gates": {"mean_kl": 0.4 if "int4" in base else 0.05, "top1": 0.8, "perplexity_ratio": 2},
            },
        }
        assert build(written(folder, sections, base, str(checkpoint_of(model_type))), folder) == 0
        return folder / "out" / f"tiny-{base}", folder / "store"

    return made


def artifact(store: Path, stage: str) -> Artifact:
    return next(entry for entry in Store(store).entries() if entry.stage == stage)


@with_tools
@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "base"), [("qwen2", "openvino-int4"), ("qwen3", "openvino-int8")])
def test_a_package_is_validated_on_its_provider_and_says_that_this_was_not_the_npu(
    model_type: str, base: str, built: Builds
) -> None:
    package, store = built(model_type, base)
    manifest = verify.package(package)
    assert {"model.onnx", "model.xml", "model.bin", "chat_template.jinja"} <= set(manifest.files)
    validation = json.loads((package / "validation.json").read_bytes())
    assert validation["passed"]
    assert validation["candidate"]["executed_on"] == validation["candidate"]["provider"] == PROVIDER
    assert set(validation["candidate"]["files"]) == {"model.onnx", "model.xml", "model.bin"}
    assert "onnxruntime-ep-openvino" in validation["candidate"]["runtime"]
    assert "NOT on the NPU: " in report.validation(validation)
    assert "**not on the NPU**" in (package / "README.md").read_text(encoding="utf-8")
    # What is measured over whole prompts is what the runtime computes.
    assert validation["last_token_prefill_error"] < 1e-4
    config = json.loads((package / "genai_config.json").read_bytes())
    options = config["model"]["decoder"]["session_options"]
    assert options["provider_options"] == [{"OpenVINO": {"device_type": "NPU", "enable_causallm": "True"}}]
    assert options["session.disable_cpu_ep_fallback"] == "1"
    counts = artifact(store, "quantize").facts["weights"]
    assert not {"u4", "u8"} & set(counts)
    assert bool(counts.get("i4")) == ("int4" in base)
    assert counts["i8"] >= 2 * 512 * 64  # head and embedding


# OpenVINO's pipeline for language models on the NPU, with the processor in place of each part that would be compiled.
ON_NPU = """
import json, sys
import numpy, openvino
options = {"NPU_USE_NPUW": "YES", "NPUW_LLM": "YES", "NPUW_DEVICES": "CPU", "NPUW_ONLINE_PIPELINE": "NONE",
           "NPUW_LLM_MAX_PROMPT_LEN": "256", "NPUW_LLM_MIN_RESPONSE_LEN": "64"}
model = openvino.Core().compile_model(sys.argv[1] + "/model.xml", "NPU", options)
for line in open(sys.argv[1] + "/golden.jsonl", encoding="utf-8"):
    entry = json.loads(line)
    ids, request, begin = entry["prompt"], model.create_infer_request(), 0
    prompt = len(ids)
    for _ in entry["tokens"] if prompt <= 256 else ():
        feed = {"input_ids": numpy.array([ids[begin:]]), "attention_mask": numpy.ones((1, len(ids)), numpy.int64),
                "position_ids": numpy.arange(begin, len(ids))[None], "beam_idx": numpy.zeros(1, numpy.int32)}
        begin = len(ids)
        ids.append(int(request.infer(feed)["logits"][0, -1].argmax()))
    print(json.dumps([ids[prompt:], entry["tokens"]]))
"""


@with_tools
@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "base"), [("qwen2", "openvino-int4"), ("qwen3", "openvino-int8")])
def test_the_npus_own_pipeline_takes_the_graph_and_gives_the_golden_answers(
    model_type: str, base: str, built: Builds
) -> None:
    """Fixed shapes, prefill and decode apart, weights unpacked by the NPU's own code; all but Intel's compiler."""
    package, _ = built(model_type, base)
    command = [str(isolated.programs() / "python"), "-c", ON_NPU, str(package)]
    environment = {**os.environ, "CI": "true"}  # else OpenVINO reports home
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    asked = [(found, wanted) for found, wanted in answers if found]
    assert len(asked) >= 4
    for found, wanted in asked:
        assert found == wanted


@with_tools
@pytest.mark.slow
def test_the_float_graph_is_the_checkpoint(built: Builds, checkpoint_of: Callable[..., Path]) -> None:
    _, store = built("qwen3", "openvino-int8")
    exported, model = artifact(store, "export"), reference.load(checkpoint_of("qwen3"))
    ids = model.tokenizer("In the morning the light comes over the hills, 你好 def add(first):")["input_ids"]
    wanted = model.logits(ids)
    session = sessions.open_package(exported.path, provider="cpu")
    for _ in range(2):  # one after the other: each begins with an empty cache
        np.testing.assert_allclose(openvino.prompt_logits(exported.path, ids), wanted, atol=1e-3)
        np.testing.assert_allclose(generate.decode_logits(session, ids), wanted, atol=0.03)  # its cache is float16
    assert list(generate.stream(session, ids, 16)) == model.greedy(ids, 16)[0]


@with_tools
@pytest.mark.slow
def test_a_machine_without_the_npu_says_so_and_can_still_check_the_package(built: Builds, capfd: Any) -> None:
    package, _ = built("qwen2", "openvino-int4")
    if cli.main(["verify", str(package), "--replay"]) == 0:
        pytest.skip("this machine has the NPU")
    assert "is for the provider OpenVINO, which is not to be had here" in capfd.readouterr().err
    assert cli.main(["verify", str(package), "--replay", "--provider", "cpu"]) == 0
    assert "100.0% of" in capfd.readouterr().out
    assert script(package)[0] == replay.MISSING
    code, text = script(package, "--cpu")
    assert code == 0, text
    code, text = script(package, "--cpu", block=["onnxruntime_ep_openvino"])
    assert code == replay.MISSING
    without = (
        "import sys; sys.modules['onnxruntime_ep_openvino'] = None\n"
        "from pipeline import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", without, "verify", str(package), "--replay", "--provider", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == RuntimeMissing.exit_code
    assert "by OpenVINO alone, which is not to be had here" in done.stderr
    assert "onnxruntime-ep-openvino==1.8.1" in done.stderr


@with_tools
@pytest.mark.slow
def test_a_pass_that_fails_in_the_environment_says_why_and_tells_no_secret(
    built: Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    _, store = built("qwen2", "openvino-int4")
    monkeypatch.setenv("HF_TOKEN", "do-not-tell")
    body = {"bits": 4, "block_size": 64, "symmetric": True}
    options = {"compress_config": {"ratio": 5}}
    scheme = Scheme.model_validate(
        {"algorithm": "nncf", "body": body, "head": CHANNELS, "embedding": CHANNELS, "options": options}
    )
    with pytest.raises(StageError, match="OpenVINOWeightCompression failed") as caught:
        openvino.compress(artifact(store, "export").path, tmp_path, scheme)
    assert "ratio" in caught.value.why
    shown = capfd.readouterr()
    assert "Traceback" in shown.err
    assert "do-not-tell" not in shown.err + shown.out


@pytest.mark.slow
def test_a_graph_that_is_not_there_is_no_missing_runtime(tmp_path: Path) -> None:
    """A damaged package is not blamed on the machine."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["x"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [out])), str(tmp_path / "other.onnx"))
    config = {
        "model": {
            "type": "qwen2",
            "context_length": 64,
            "vocab_size": 8,
            "eos_token_id": 1,
            "decoder": {**openvino.DECODER, "filename": "model.onnx"},
        },
        "search": {},
    }
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="cannot be loaded"):
        sessions.open_package(tmp_path, provider="cpu")
