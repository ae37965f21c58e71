"""Packages for Qualcomm's NPU: what a recipe may ask for, and builds of tiny checkpoints that the emulator executes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_replay import script

from pipeline import cli
from pipeline.artifact import GOLDEN, Artifact
from pipeline.builds.store import Store
from pipeline.checkpoint.reference import Reference
from pipeline.errors import RecipeError, RuntimeMissing, StageError
from pipeline.facts import recipe
from pipeline.facts.target import QNN
from pipeline.fidelity import npu_agreement
from pipeline.graph import edits as graph
from pipeline.graph.external_data import read_tensor
from pipeline.npu import qnn, static_quantizer
from pipeline.npu.static_export import NPU_STAGES, STAGES
from pipeline.package import onnx_references, replay, verify

ROOT = Path(__file__).parent.parent
BASES = ROOT / "recipes" / "_base"
HERE = sys.platform == "linux" and os.uname().machine == "x86_64"
emulated = pytest.mark.skipif(not HERE, reason="the emulator is in the wheel for Linux on x86-64")

RECIPE: dict[str, Any] = {
    "checkpoint": {"sources": [{"type": "local", "path": "x"}], "license": "Apache-2.0", "base_model": "tiny"},
    "validate": {"gates": {"mean_kl": 0.1, "top1": 0.85, "perplexity_ratio": 1.1}},
}
BODY = {"bits": 8, "block_size": -1, "symmetric": True}


def written(folder: Path, sections: dict[str, Any], base: str = "npu-int8") -> Path:
    """A recipe on one line (JSON is YAML), after a base of the repository."""
    path = folder / "tiny" / f"{base or 'npu'}.yaml"
    path.parent.mkdir(parents=True)
    extends = {"extends": os.path.relpath(BASES / f"{base}.yaml", path.parent)} if base else {}
    path.write_text(json.dumps({**extends, **RECIPE, **sections}), encoding="utf-8")
    return path


# name: (sections over the base, the base, each finding's key words)
IMPOSSIBLE: dict[str, tuple[dict[str, Any], str, list[tuple[str, ...]]]] = {
    "a chip that is misspelt": (
        {"npu": {"soc": "sc8380x"}},
        "npu-int8",
        [("unsupported SoC `sc8380x`", "did you mean `sc8380xp`?", "known: sm8350")],
    ),
    "a chip that there is not": (
        {"npu": {"soc": "exynos"}},
        "npu-int4",
        [("unsupported SoC `exynos`; known: sm8350",)],
    ),
    "a chip for the processor": (
        {"npu": {"soc": "sc8380xp"}},
        "cpu-int4",
        [("cpu is not compiled for a chip: remove `npu`",)],
    ),
    "no chip": (
        {"target": "npu", "export": {"exporter": "static"}, "quantize": {"algorithm": "static", "body": BODY}},
        "",
        [("npu needs `npu`: {soc: …}", "sc8380xp")],
    ),
    "graphs of any shape": (
        {"export": {"exporter": "genai"}},
        "npu-int8",
        [("npu takes graphs of static, genai writes others",)],
    ),
    "zero points": (
        {"quantize": {"body": {"symmetric": False}}},
        "npu-int4",
        [("zero points have no kernels on npu", "set `symmetric: true`")],
    ),
    "a long text": (
        {"validate": {"long_tokens": 512}},
        "npu-int8",
        [("a compiled decoder is not measured on a long text",)],
    ),
    "a cache that windows do not fill": (
        {"npu": {"window": 128, "cache": 192}},
        "npu-int8",
        [("192 slots are no multiple of the window of 128 tokens",)],
    ),
    "GPTQ by channel": (
        {"quantize": {"algorithm": "gptq"}},
        "npu-int8",
        [
            ("gptq has no kernels on npu; known: static",),
            ("whole channels (-1) are for the body of static and w8a8: give a block size",),
        ],
    ),
    "4 bits by channel": ({"quantize": {"body": {"block_size": -1}}}, "npu-int4", [("4-bit kernel on npu", "16, 32")]),
    "8 bits in blocks": (
        {"quantize": {"body": {"block_size": 32}}},
        "npu-int8",
        [("8-bit kernel on npu", "known: -1")],
    ),
    "an embedding shared with the head": (
        {"quantize": {"embedding": "shared"}},
        "npu-int8",
        [("the head is compiled, and cannot be shared",)],
    ),
    "float activations": ({"export": {"dtype": "float16"}}, "npu-int8", [("float16 is not computed with on npu",)]),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_the_npu_cannot_do_is_refused_with_the_reason_and_nothing_else_is(case: str, tmp_path: Path) -> None:
    sections, base, wanted = IMPOSSIBLE[case]
    with pytest.raises(RecipeError) as caught:
        recipe.load(written(tmp_path, sections, base))
    found = caught.value.what.splitlines()[1:]
    assert len(found) == len(wanted), found
    for parts in wanted:
        assert any(all(part in finding for part in parts) for finding in found), (parts, found)


@pytest.mark.parametrize("base", ["npu-int8", "npu-int4"])
def test_the_bases_load_as_they_are(base: str, tmp_path: Path) -> None:
    loaded = recipe.load(written(tmp_path, {}, base)).recipe
    assert loaded.npu
    assert (loaded.target, loaded.npu.soc, loaded.export.exporter) == ("npu", "sc8380xp", "static")


def weight_with_outliers(rows: int, columns: int) -> Any:
    """Rows of very different sizes, each with blocks of very different sizes; one row is nothing."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(rows, columns)) * np.exp(random.normal(0, 1, (rows, 1)))
    weight *= np.repeat(np.exp(random.normal(0, 1, (rows, columns // 16))), 16, axis=1)
    weight[3] = 0
    return weight.astype(np.float32)[:, :, None, None]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_blocks_are_what_the_npu_stores_and_nearer_than_rounding_to_the_largest(size: int) -> None:
    weight = weight_with_outliers(48, 128)
    codes, scales = static_quantizer.blocks(weight, size)
    assert (codes.shape, codes.dtype) == (weight.shape, np.int8)
    assert (scales.shape, scales.dtype) == ((48, 128 // size, 1, 1), np.float32)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert not codes[3].any()
    assert np.isfinite(scales).all()

    parts = weight.reshape(48, -1, size).astype(np.float64)
    unit = np.maximum(np.abs(parts).max(axis=(1, 2)) / (7.5 * 16), 1e-12)[:, None]
    steps = scales[..., 0, 0] / unit
    np.testing.assert_allclose(steps, np.rint(steps), rtol=1e-5)
    assert (np.rint(steps).min(), np.rint(steps).max()) == (1, 16)

    def error(rounded: Any, scale: Any) -> Any:
        return np.square(rounded * scale[..., None] - parts).sum(axis=2)

    found = error(codes.reshape(parts.shape), scales[..., 0, 0].astype(np.float64))
    plain = np.clip(np.ceil(np.abs(parts).max(axis=2) / (7 * unit)), 1, 16) * unit
    simple = error(np.clip(np.rint(parts / plain[..., None]), -8, 7), plain)
    assert (found <= simple * (1 + 1e-5) + 1e-20).all()
    assert found.sum() < 0.95 * simple.sum()


def quantized_cache(scales: tuple[float, float, float], zeros: tuple[int, int, int]) -> onnx.ModelProto:
    """``past`` and ``new`` (an output), joined to ``all``: each with a scale of its own, as calibration finds them."""
    nodes, constants = [], []
    for name, scale, zero in zip(("past", "new", "all"), scales, zeros, strict=True):
        given = (
            numpy_helper.from_array(np.float32(scale), f"{name}_scale"),
            numpy_helper.from_array(np.array(zero, np.uint16), f"{name}_zero_point"),
        )
        constants += given
        source = "new_QuantizeLinear_Input" if name == "new" else name
        ends = [f"{name}_scale", f"{name}_zero_point"]
        nodes.append(helper.make_node("QuantizeLinear", [source, *ends], [f"{name}_quantized"]))
        out = "new" if name == "new" else f"{name}_dequantized"
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_quantized", *ends], [out]))
    nodes.insert(0, helper.make_node("Neg", ["x"], ["new_QuantizeLinear_Input"]))
    nodes.insert(5, helper.make_node("Concat", ["past_dequantized", "new"], ["all"], axis=0))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("past", "x", "new")]
    outputs = [values[2], helper.make_tensor_value_info("all_dequantized", TensorProto.FLOAT, [8])]
    made = helper.make_graph(nodes, "g", values[:2], outputs, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_tensors_that_are_tied_share_a_scale_that_covers_them_all() -> None:
    # Ranges [-1, 3], [-2, 2] and [-0.5, 0.5].
    made = quantized_cache((4 / 65535, 4 / 65535, 1 / 65535), (16384, 32768, 32768))
    static_quantizer._tie(made, ("past", "new", "all"))
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    (scale,) = {float(known[f"{name}_scale"]) for name in ("past", "new", "all")}
    (zero,) = {int(known[f"{name}_zero_point"]) for name in ("past", "new", "all")}
    assert scale == pytest.approx(5 / 65535, rel=1e-4)
    assert zero == pytest.approx(2 / 5 * 65535, abs=1)
    assert all(known[name].dtype == np.uint16 for name in known if name.endswith("_zero_point"))


def test_a_tensor_that_was_not_quantized_is_not_tied_in_silence() -> None:
    with pytest.raises(StageError, match="not all quantized: past, new, other"):
        static_quantizer._tie(quantized_cache((1, 1, 1), (0, 0, 0)), ("past", "new", "other"))


@pytest.mark.slow
def test_a_cache_whose_edges_are_integers_passes_through_unchanged() -> None:
    import onnxruntime

    made = quantized_cache((4 / 65535, 4 / 65535, 1 / 65535), (16384, 32768, 32768))
    static_quantizer._tie(made, ("past", "new", "all"))
    static_quantizer._integer_edges(made, ("past", "new"))
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    past = np.array([0, 7, 30000, 65535], np.uint16)
    new, joined = session.run(None, {"past": past, "x": np.array([0.5, -0.25, 1, 0], np.float32)})
    assert new.dtype == np.uint16
    scale, zero = 5 / 65535, round(2 / 5 * 65535)
    np.testing.assert_allclose((new.astype(float) - zero) * scale, [-0.5, 0.25, -1, 0], atol=scale)
    np.testing.assert_allclose(np.rint(joined / scale + zero), [*past, *new], atol=0.01)


@dataclass(frozen=True)
class Project:
    """A recipe that was built, and what came of it."""

    store: Path
    package: Path

    def artifact(self, stage: str) -> Artifact:
        """The first of ``stage``: with weights apart and weights shared there are two that were compiled."""
        return next(entry for entry in Store(self.store).entries() if entry.stage == stage)

    @property
    def validation(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.package / "validation.json").read_bytes())
        return found


Builds = Callable[..., Project]


@pytest.fixture(scope="module")
def built(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """Maker of a built project, ``(model_type, base, share)``, each once; do not write into it."""
    root = tmp_path_factory.mktemp("npu")

    @cache
    def made(model_type: str, base: str, share: bool) -> Project:
        folder = root / f"{model_type}-{base}-{share}"
        sections = {
            "checkpoint": {
                **RECIPE["checkpoint"],
                "sources": [{"type": "local", "path": str(checkpoint_of(model_type))}],
            },
            # A cache that is shorter than the windows of calibration text.
            "npu": {"window": 64, "cache": 256, "share_weights": share},
            "quantize": {"calibration_windows": 4},
            "validate": {
                "windows": 4,
                "window_tokens": 80,
                "decode_tokens": 8,
                "answers": 2,
                "gates": GATES[base],
            },
        }
        path, store = written(folder, sections, base), root / f"store-{model_type}"
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["build", str(path), "--store", str(store), "--out", str(folder / "out"), "--json"])
        assert code == 0, out.getvalue() + err.getvalue()
        return Project(store, folder / "out" / f"tiny-{base}")

    return lambda model_type, base, share=False: made(model_type, base, share)


# The text is noise to a tiny model, whose perplexity is astronomical.
GATES = {
    "npu-int8": {"mean_kl": 0.01, "top1": 0.95, "perplexity_ratio": 1.2},
    "npu-int4": {"mean_kl": 0.1, "top1": 0.9, "perplexity_ratio": 6.0},
}
BUILDS = [("qwen2", "npu-int8"), ("qwen3", "npu-int4")]
slow = pytest.mark.slow


@slow
@emulated
@pytest.mark.parametrize(("model_type", "base"), BUILDS)
def test_a_package_was_executed_by_the_emulator_as_a_whole_and_says_so(
    model_type: str, base: str, built: Builds
) -> None:
    project = built(model_type, base)
    report = project.validation
    assert report["passed"]
    candidate = report["candidate"]
    assert candidate["provider"] == candidate["executed_on"] == QNN == "QNNExecutionProvider"
    assert (candidate["device"], candidate["not_executed_on_target"]) == ("HTP emulator", "")
    assert report["prefill"]["positions"] == 4 * 72
    assert report["decode"]["positions"] == 4 * 8
    npu = report["npu"]
    assert npu["soc"] == "sc8380xp"
    # What was compiled is one node; what it was compiled from are hundreds: none of either is elsewhere.
    assert set(npu["placement"]) == {*NPU_STAGES, "wide_head"}
    compiled_from = project.artifact("compile").facts["placement"]
    assert set(compiled_from) == set(NPU_STAGES)
    for counts in (*npu["placement"].values(), *compiled_from.values()):
        assert set(counts) == {QNN}
    assert {npu["placement"][name][QNN] for name in NPU_STAGES} == {1}
    assert compiled_from["prefill"][QNN] > 100
    assert compiled_from["prefill"] == compiled_from["decode"]
    assert npu["largest_logit"] > 10
    assert 0 < npu["largest_difference"] < 0.03 * npu["largest_logit"]
    assert npu["mean_kl"] < 0.01
    for path in ("prefill", "decode"):
        assert 0 < report[path]["mean_kl"] <= GATES[base]["mean_kl"]


@slow
@emulated
@pytest.mark.parametrize(("model_type", "base"), BUILDS)
def test_a_package_is_whole_and_its_compiled_stages_are_one_node_each(
    model_type: str, base: str, built: Builds
) -> None:
    package = built(model_type, base).package
    manifest = verify.package(package)
    assert {path.name for path in package.iterdir()} == {*manifest.files, "manifest.json", "SHA256SUMS"}
    assert manifest.data["target"]["soc"] == "sc8380xp"
    assert "onnxruntime-qnn==" in manifest.data["runtime"]["install"]
    pipeline = json.loads((package / "genai_config.json").read_bytes())["model"]["decoder"]["pipeline"][0]
    assert list(pipeline) == list(STAGES)
    for name in STAGES:
        path = package / f"{name}.onnx"
        operators = graph.operators(onnx.load(str(path), load_external_data=False))
        named = {entry.location for entry in onnx_references.read(path.read_bytes())}
        if name in NPU_STAGES:
            assert operators == {"EPContext": 1}
            assert named == {f"{name}_qnn.bin"}
            assert pipeline[name]["session_options"]["session.disable_cpu_ep_fallback"] == "1"
        else:
            assert "EPContext" not in operators
            assert "session_options" not in pipeline[name]
    # Nothing of what was compiled is shipped a second time.
    assert not {"layers.data", "head.data"} & set(manifest.files)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose standard output native libraries can reach."""
    call = f"{code}; import sys; from pipeline import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", call.removeprefix("; "), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        encoding="utf-8",
    )
    assert "Traceback" not in done.stderr
    return done


@slow
@emulated
@pytest.mark.parametrize(("model_type", "base"), BUILDS)
def test_a_replay_in_the_emulator_gives_the_same_answers_and_prints_one_object(
    model_type: str, base: str, built: Builds
) -> None:
    package = built(model_type, base).package
    done = run("verify", str(package), "--replay", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)["replay"]
    assert found["provider"] == "qnn"
    assert found["tokens"] == sum(len(entry["tokens"]) for entry in replay.read(package / GOLDEN)) > 4
    assert found["identical"] == found["prompts"] == 2
    assert found["logprob"] < 1e-3

    code, text = script(package)
    assert code == 0, text
    assert "PASS: this device computes what was validated" in text


@slow
@emulated
def test_weights_are_quantized_as_the_recipe_says(built: Builds) -> None:
    kinds = {"qwen2": TensorProto.INT8, "qwen3": TensorProto.INT4}
    for model_type, base in BUILDS:
        folder = built(model_type, base).artifact("quantize").path
        prefill, decode, head = (graph.load(folder / f"{name}.onnx") for name in NPU_STAGES)
        assert list(prefill.graph.node) == list(decode.graph.node)
        for name, model, kind in (("layers", prefill, kinds[model_type]), ("head", head, TensorProto.INT8)):
            known = {tensor.name: tensor for tensor in model.graph.initializer}
            made_by = {node.output[0]: node for node in model.graph.node}
            products = [node for node in model.graph.node if node.op_type == "Conv"]
            assert len(products) == (14 if name == "layers" else 1)
            for product in products:
                source = made_by[product.input[1]]
                codes, scales = (known[key] for key in source.input[:2])
                assert codes.data_type == kind
                attributes = {entry.name: entry.i for entry in source.attribute}
                rows, columns = codes.dims[:2]
                if kind == TensorProto.INT4:
                    assert attributes == {"axis": 1, "block_size": 16}
                    assert list(scales.dims) == [rows, columns // 16, 1, 1]
                    steps = read_tensor(scales, folder)[..., 0, 0]
                    steps = steps / steps.max(axis=1, keepdims=True) * 16
                    assert steps.min() < 16  # the blocks of a channel have scales of their own
                else:
                    assert list(scales.dims) == [rows]
        edges = {
            value.name: value.type.tensor_type.elem_type for value in (*prefill.graph.input, *prefill.graph.output)
        }
        cached = {kind for name, kind in edges.items() if name.startswith(("past_key_values.", "new."))}
        assert cached == {TensorProto.UINT16}


@slow
@emulated
@pytest.mark.parametrize(("length", "decoded"), [(257, 8), (64, 64), (64, 65)])
def test_windows_that_do_not_fit_the_cache_are_refused_before_they_are_measured(
    length: int, decoded: int, built: Builds, tmp_path: Path
) -> None:
    project = built("qwen2", "npu-int8")
    quantized, compiled = (project.artifact(stage).path for stage in ("quantize", "compile"))
    windows, reference = [("english", [5] * length)], Reference(None, None, ())
    with pytest.raises(StageError, match=f"a window of {length} tokens, of which {decoded} are decoded") as caught:
        npu_agreement.measure(
            reference, compiled, quantized, "sc8380xp", windows, decoded, tmp_path / "s", lambda *_: None
        )
    assert "the cache has 256 slots" in caught.value.why


@slow
@emulated
def test_a_binary_that_was_changed_is_found_out_before_it_is_loaded(built: Builds, tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(built("qwen2", "npu-int8").package, package)
    for name in NPU_STAGES:
        path = package / f"{name}_qnn.bin"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        done = run("verify", str(package), "--replay")
        assert (done.returncode, done.stdout) == (9, "")
        assert f"{path.name} has changed (sha256)" in done.stderr
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    verify.package(package)


@slow
@emulated
def test_no_other_provider_is_offered_what_was_compiled_for_the_npu(built: Builds) -> None:
    package = built("qwen2", "npu-int8").package
    done = run("verify", str(package), "--replay", "--provider", "cpu")
    assert done.returncode == 10
    assert "its graphs are compiled for an NPU: no other provider reads them" in done.stderr
    code, text = script(package, "--cpu")
    assert code == replay.MISSING
    assert "compiled for an NPU" in text


@slow
@emulated
def test_without_the_plugin_it_is_named_with_what_to_install(built: Builds) -> None:
    package = built("qwen2", "npu-int8").package
    done = run("verify", str(package), "--replay", code="import sys; sys.modules['onnxruntime_qnn'] = None")
    assert done.returncode == RuntimeMissing.exit_code
    assert "is for the provider qnn, which is not to be had here" in done.stderr
    assert "pip install onnxruntime-genai==" in done.stderr
    assert "onnxruntime-qnn==" in done.stderr
    code, text = script(package, block=["onnxruntime_qnn"])
    assert code == replay.MISSING
    assert len(text.strip().splitlines()) == 2, text

    code = (
        "import sys\nfrom pathlib import Path\nsys.modules['onnxruntime_qnn'] = None\n"
        "from pipeline.npu import qnn\nfrom pipeline.errors import RuntimeMissing\n"
        "try: qnn.session(Path(sys.argv[1]), qnn.options('sc8380xp'))\nexcept RuntimeMissing as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(package / "head.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "onnxruntime-qnn cannot be loaded" in done.stdout
    assert "next: pip install onnxruntime-qnn==" in done.stdout


@slow
@emulated
def test_shared_weights_are_stored_once_and_never_loaded_where_the_emulator_would_crash(built: Builds) -> None:
    apart, shared = (built("qwen2", "npu-int8", share) for share in (False, True))
    assert shared.validation["passed"]
    files = set(verify.package(shared.package).files)
    binaries = {name for name in files if name.endswith(".bin")}
    assert len(binaries) == 2
    assert "head_qnn.bin" in binaries
    named = {
        name: {entry.location for entry in onnx_references.read((shared.package / f"{name}.onnx").read_bytes())}
        for name in ("prefill", "decode")
    }
    assert named["prefill"] == named["decode"] == binaries - {"head_qnn.bin"}
    size, other = (sum(path.stat().st_size for path in project.package.glob("*.bin")) for project in (shared, apart))
    assert size < 0.85 * other
    assert set(json.loads((shared.package / "manifest.json").read_bytes())["files"]) == files

    done = run("verify", str(shared.package), "--replay")
    assert done.returncode == RuntimeMissing.exit_code  # and not a signal
    assert "share one binary, which the emulator cannot load" in done.stderr
    done = run("generate", str(shared.package), "--prompt", "x")
    assert done.returncode == RuntimeMissing.exit_code
    code, text = script(shared.package)
    assert code == replay.MISSING
    assert "share one binary" in text


def one_node(operator: str, kind: int = TensorProto.FLOAT, out: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """``Relu``, which the NPU has, and behind it another operator."""
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node(operator, ["h"], ["y"], name="last")]
    x, y = helper.make_tensor_value_info("x", kind, [4, 4]), helper.make_tensor_value_info("y", out, None)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[opset], ir_version=10)


@slow
@emulated
@pytest.mark.parametrize(("operator", "out"), [("Det", TensorProto.FLOAT), ("NonZero", TensorProto.INT64)])
def test_a_node_that_the_npu_does_not_have_is_refused_and_does_not_go_to_the_processor(
    operator: str, out: int, tmp_path: Path
) -> None:
    onnx.save(one_node("Sigmoid"), str(tmp_path / "good.onnx"))
    opened = qnn.session(tmp_path / "good.onnx", qnn.options("sc8380xp"))
    assert set(qnn.placement(opened)) == {QNN}
    onnx.save(one_node(operator, out=out), str(tmp_path / "bad.onnx"))
    with pytest.raises(StageError, match=r"bad\.onnx cannot run on the NPU as a whole") as caught:
        qnn.session(tmp_path / "bad.onnx", qnn.options("sc8380xp"), severity=4)
    assert "fallback to CPU EP has been explicitly disabled" in caught.value.why
    with pytest.raises(StageError, match="cannot run on the NPU"):
        qnn.compile_graphs({"good": tmp_path / "good.onnx", "bad": tmp_path / "bad.onnx"}, tmp_path / "out", "sm8750")


COMPILED: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "is not one compiled graph"),
    "a node beside it": (
        [helper.make_node("EPContext", [], ["x"], ep_cache_context="a.bin"), helper.make_node("Relu", ["x"], ["y"])],
        "is not one compiled graph",
    ),
    "two of them": (
        [helper.make_node("EPContext", [], [name], ep_cache_context="a.bin") for name in "xy"],
        "is not one compiled graph",
    ),
    "no binary": ([helper.make_node("EPContext", [], ["x"])], "is not one compiled graph"),
    "a binary that was not written": (
        [helper.make_node("EPContext", [], ["x"], ep_cache_context="lost.bin")],
        "names lost.bin, which the compiler did not write",
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_what_the_compiler_left_out_is_noticed(case: str, tmp_path: Path) -> None:
    nodes, text = COMPILED[case]
    (tmp_path / "a.bin").write_bytes(b"x")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [])), str(tmp_path / "prefill.onnx"))
    with pytest.raises(StageError, match=text):
        qnn._check_compiled(tmp_path / "prefill.onnx")
    with pytest.raises(StageError, match=r"the compiler wrote no decode\.onnx"):
        qnn._check_compiled(tmp_path / "decode.onnx")
