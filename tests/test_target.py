"""What a target cannot do is refused before anything is fetched, with the line of the recipe and the reason."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from pipeline.builds import plan
from pipeline.errors import RecipeError
from pipeline.facts import recipe, target
from pipeline.facts.scheme import Scheme
from pipeline.facts.target import TARGETS

ROOT = Path(__file__).parent.parent
RECIPES = recipe.find(ROOT / "recipes")
VERSIONS = {name: "1" for stage in plan.STAGES for name in stage.tools}

BASE = """\
checkpoint:
  sources: [{type: hub, repo: a/b, revision: 0123456789012345678901234567890123456789}]
  license: Apache-2.0
  base_model: b
validate: {gates: {mean_kl: 0.1, top1: 0.8, perplexity_ratio: 1.1}}
"""
GATES = "gates: {mean_kl: 0.1, top1: 0.8, perplexity_ratio: 1.1}}"


def write(folder: Path, name: str, text: str) -> Path:
    """A recipe for the target ``name`` (its line 1), with ``text`` from line 2 on."""
    home = folder / "tiny"
    home.mkdir()
    path = home / "r.yaml"
    base = BASE if "validate:" not in text else BASE.partition("validate:")[0]
    path.write_text(f"target: {name}\n{text}\n{base}", encoding="utf-8")
    return path


def scheme(bits: int = 4, block_size: int = 32, symmetric: bool = True) -> str:
    return f"{{bits: {bits}, block_size: {block_size}, symmetric: {str(symmetric).lower()}}}"


def quantized(body: str = "", **more: str) -> str:
    """Section ``quantize`` with one key a line: the algorithm, the body, then ``more``."""
    keys = {"algorithm": "min_error", "body": body or scheme(), **more}
    return "quantize:\n" + "\n".join(f"  {key}: {value}" for key, value in keys.items())


NPU = f"""\
export: {{exporter: static}}
npu: {{soc: sc8380xp, window: 64, cache: 256}}
quantize: {{algorithm: static, body: {scheme(8, -1)}}}
"""
OPENVINO = f"""\
export: {{exporter: openvino}}
quantize:
  algorithm: nncf
  body: {scheme(4, 64)}
  head: {scheme(8, -1)}
  embedding: {scheme(8, -1)}
  options: {{compress_config: {{ratio: 0.4}}}}
"""


# name: (target, the recipe from line 2 on, the line that is wrong, parts of the finding)
IMPOSSIBLE: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "float16 on the processor": (
        "cpu",
        f"export:\n  dtype: float16\n{quantized()}",
        3,
        ("float16", "cpu", "float32"),
    ),
    "float32 on a GPU": ("cuda", f"export:\n  dtype: float32\n{quantized()}", 3, ("float32", "cuda", "float16")),
    "8 bits in QDQ form": (
        "cuda",
        f"export:\n  options:\n    extra_options:\n      use_qdq: true\n{quantized(scheme(8))}",
        5,
        ("8-bit weights have no QDQ form", "use 4 bits"),
    ),
    "paged attention off CUDA": (
        "directml",
        f"export:\n  options:\n    extra_options: {{use_paged_attention: true}}\n{quantized()}",
        4,
        ("use_paged_attention is for cuda only", "CUDA kernel"),
    ),
    "an option of CUDA at the top level": (
        "cpu",
        f"export:\n  options:\n    use_paged_attention: true\n{quantized()}",
        4,
        ("use_paged_attention is for cuda only",),
    ),
    "CUDA graphs on DirectML": (
        "directml",
        f"export:\n  options:\n    extra_options:\n      enable_cuda_graph: true\n{quantized()}",
        5,
        ("enable_cuda_graph is for cuda and tensorrt-rtx only", "CUDA graphs"),
    ),
    "WebGPU graphs on CUDA": (
        "cuda",
        f"export:\n  options:\n    extra_options:\n      enable_webgpu_graph: true\n{quantized()}",
        5,
        ("enable_webgpu_graph is for webgpu only",),
    ),
    "blocks of 256 on CUDA": (
        "cuda",
        quantized("\n    bits: 4\n    block_size: 256\n    symmetric: false"),
        6,
        ("blocks of 256", "cuda", "known: 16, 32, 64, 128"),
    ),
    "such blocks in an override": (
        "cuda",
        quantized(overrides=f"\n    - match: '*.down_proj'\n      scheme: {scheme(8, 256)}"),
        7,
        ("blocks of 256 have no 8-bit kernel on cuda",),
    ),
    "zero points in TensorRT-RTX": (
        "tensorrt-rtx",
        quantized("\n    bits: 4\n    block_size: 32\n    symmetric: false"),
        7,
        ("zero points", "tensorrt-rtx", "`symmetric: true`"),
    ),
    "8 bits in TensorRT-RTX": ("tensorrt-rtx", quantized(scheme(8)), 4, ("8-bit weights", "tensorrt-rtx")),
    "a quantized embedding on DirectML": (
        "directml",
        quantized(embedding=scheme(4, 32, False)),
        5,
        ("directml", "gathers from quantized rows", "`float`"),
    ),
    "a shared embedding on DirectML": ("directml", quantized(embedding="shared"), 5, ("directml", "`float`")),
    "a symmetric quantized embedding on CUDA": (
        "cuda",
        quantized(embedding=scheme(4, 32, True)),
        5,
        ("without zero points", "cuda", "`symmetric: false`"),
    ),
    "an embedding shared with a symmetric head": (
        "cuda",
        quantized(scheme(4, 32, False), head=scheme(8, 32, True), embedding="shared"),
        6,
        ("without zero points", "cuda"),
    ),
    "an opset that the last DirectML does not read": (
        "directml",
        f"export:\n  options:\n    target_opset: 23\n{quantized()}",
        4,
        ("onnxruntime-genai-directml", "opsets up to 22"),
    ),
    "a float32 exporter for CUDA": (
        "cuda",
        f"export:\n  exporter: optimum\n{quantized()}",
        3,
        ("optimum traces float32 graphs", "cuda computes in float16"),
    ),
    "a window of text that the cache cannot hold": (
        "npu",
        NPU + "validate: {window_tokens: 512, " + GATES,
        5,
        ("512 tokens", "cache of 256 slots"),
    ),
    "more decoded tokens than a window has": (
        "npu",
        NPU + "validate: {window_tokens: 128, decode_tokens: 128, " + GATES,
        5,
        ("less than the window of 128",),
    ),
    "options of an exporter that has none": (
        "npu",
        NPU.replace("exporter: static", "exporter: static, options: {target_opset: 21}"),
        2,
        ("exporter static takes no options",),
    ),
    "the head for all tokens in a static graph": (
        "npu",
        NPU.replace("exporter: static", "exporter: static, last_token_head: false"),
        2,
        ("for the last token only",),
    ),
    "drafts for a static graph": (
        "npu",
        NPU.replace("exporter: static", "exporter: static, draft_tokens: 7"),
        2,
        ("for the last token only",),
    ),
    "more than all projections in 4 bits": (
        "openvino",
        OPENVINO.replace("ratio: 0.4", "ratio: 1.5"),
        8,
        ("at most 1, got 1.5",),
    ),
    "dynamic quantization on CUDA": (
        "cuda",
        "quantize:\n  algorithm: dynamic",
        3,
        ("dynamic has no kernels on cuda", "known: gptq"),
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_combination_is_refused_at_its_line_with_the_reason(case: str, tmp_path: Path) -> None:
    name, text, line, parts = IMPOSSIBLE[case]
    path = write(tmp_path, name, text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    (finding,) = caught.value.what.splitlines()[1:]  # and nothing else is wrong with it
    assert finding.strip().startswith(f"{path}:{line}: ")
    for part in parts:
        assert part in finding


def test_all_that_a_target_cannot_do_is_told_at_once(tmp_path: Path) -> None:
    text = f"export: {{dtype: float32, exporter: optimum}}\n{quantized(scheme(8, 256, False), embedding='shared')}"
    with pytest.raises(RecipeError) as caught:
        recipe.load(write(tmp_path, "tensorrt-rtx", text))
    assert [line.partition(".yaml:")[2][:2] for line in caught.value.what.splitlines()[1:]] == [
        "2:",
        "2:",
        "5:",
        "5:",
        "6:",
    ]


# What kernels of each target do, so that the limits above are no wider than they must be.
POSSIBLE: dict[str, tuple[str, str]] = {
    "8-bit blocks of 256 and a shared embedding": ("cpu", quantized(scheme(8, 256), embedding="shared")),
    "dynamic quantization after optimum": ("cpu", "export: {exporter: optimum}\nquantize: {algorithm: dynamic}"),
    "paged attention, 8 bits and a gathered embedding": (
        "cuda",
        "export: {dtype: float16, options: {extra_options: {use_paged_attention: true}}}\n"
        + quantized(scheme(8, 128), embedding=scheme(4, 32, False)),
    ),
    "the newest opset that is read": ("directml", f"export: {{options: {{target_opset: 22}}}}\n{quantized(scheme(8))}"),
    "a recorded graph and a shared asymmetric head": (
        "webgpu",
        "export: {options: {extra_options: {enable_webgpu_graph: true}}}\n"
        + quantized(head=scheme(8, 32, False), embedding="shared"),
    ),
    "symmetric 4 bits in QDQ form": (
        "tensorrt-rtx",
        f"export: {{options: {{extra_options: {{use_qdq: true}}}}}}\n{quantized(scheme(4, 128))}",
    ),
    "float16 weights": ("tensorrt-rtx", "quantize: {algorithm: none}"),
}


@pytest.mark.parametrize("case", POSSIBLE)
def test_a_possible_combination_is_planned(case: str, tmp_path: Path) -> None:
    name, text = POSSIBLE[case]
    loaded = recipe.load(write(tmp_path, name, text))
    steps = {step.stage: step for step in plan.make(loaded, VERSIONS)}
    row = TARGETS[name]
    assert steps["export"].fields["dtype"] == row.dtypes[0]
    assert steps["export"].fields["provider"] == row.provider
    assert steps["package"].fields["target"]["name"] == name
    assert row.runtime.package in steps["package"].fields["runtime"]["install"]


# Qwen2.5-14B and 7B, whose weights are too large for one file: float16 of 7B for both, 4 bits of 14B for both.
SIZES = {
    "7b": "{model_type: qwen2, layers: 28, hidden: 3584, intermediate: 18944, heads: 28, kv_heads: 4, head_dim: 128, "
    "vocabulary: 152064}",
    "14b": "{model_type: qwen2, layers: 48, hidden: 5120, intermediate: 13824, heads: 40, kv_heads: 8, head_dim: 128, "
    "vocabulary: 152064}",
}


@pytest.mark.parametrize("name", ["directml", "webgpu"])
@pytest.mark.parametrize(("size", "scheme_text"), [("7b", "quantize: {algorithm: none}"), ("14b", quantized())])
def test_weights_that_the_runtime_cannot_read_are_refused_before_they_are_fetched(
    name: str, size: str, scheme_text: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name, f"{scheme_text}\narchitecture: {SIZES[size]}")
    loaded = recipe.load(path)
    with pytest.raises(RecipeError, match=f"too large for {name}") as caught:
        plan.make(loaded, VERSIONS)
    assert TARGETS[name].runtime.package in caught.value.why
    assert f"files up to {TARGETS[name].max_file / 1e9:.1f} GB" in caught.value.why
    assert caught.value.where == str(path)
    cuda = path.with_name("cuda.yaml")
    cuda.write_text(path.read_text(encoding="utf-8").replace(f"target: {name}", "target: cuda"), encoding="utf-8")
    assert plan.make(recipe.load(cuda), VERSIONS)  # which has no such limit


def test_a_file_of_the_largest_size_is_read() -> None:
    row = replace(TARGETS["cuda"], max_file=1000)
    assert target.file_problem(row, 1000) == ""
    assert target.file_problem(row, 1001)
    assert target.file_problem(replace(row, max_file=0), 1 << 50) == ""


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_on_every_target_plans_or_is_refused_for_the_target(path: Path, name: str, tmp_path: Path) -> None:
    """No weights are at hand: what is told comes from tables alone."""
    derived = tmp_path / "derived" / "r.yaml"
    derived.parent.mkdir()
    derived.write_text(f"extends: {os.path.relpath(path, derived.parent)}\ntarget: {name}\n", encoding="utf-8")
    row, own = TARGETS[name], recipe.load(path).recipe.target == name
    said, steps = "", []
    try:
        steps = plan.make(recipe.load(derived), VERSIONS)
    except RecipeError as error:
        said = str(error)
        findings = error.what.replace(str(derived), "").splitlines()[1:] or [error.what]
        refused_for = [name in finding for finding in findings if not re.fullmatch(r"\s*… and \d+ more", finding)]
    if not said:
        expected = [s.name for s in plan.STAGES if not s.adapted and (row.compiled or not s.compiled)]
        assert [step.stage for step in steps] == expected
        assert steps[-1].fields["target"]["provider"] == row.provider
        return
    assert all(refused_for)
    if own:
        assert row.missing
        assert row.missing in said


def test_some_recipes_plan_on_targets_that_they_were_not_written_for(tmp_path: Path) -> None:
    """Else the test above could pass because nothing ever plans, or nothing is ever refused."""
    planned: set[tuple[str, str]] = set()
    for index, path in enumerate(RECIPES):
        for name in TARGETS:
            derived = tmp_path / f"r{index}" / f"{name}.yaml"
            derived.parent.mkdir(exist_ok=True)
            derived.write_text(f"extends: {os.path.relpath(path, derived.parent)}\ntarget: {name}\n", encoding="utf-8")
            try:
                plan.make(recipe.load(derived), VERSIONS)
            except RecipeError:
                continue
            planned.add((str(path), name))
    own = {(str(path), recipe.load(path).recipe.target) for path in RECIPES}
    buildable = {(path, name) for path, name in own if not TARGETS[name].missing}
    assert buildable < planned
    assert len(planned) < len(RECIPES) * len(TARGETS)


# What was found to slip through; a mark goes with its cause.
SLIPS = {
    "an override that quantizes the embedding": (
        "directml",
        quantized(overrides=f"\n    - match: model.embed_tokens\n      scheme: {scheme(4, 32, False)}"),
    ),
    "a pass of Olive that writes no DequantizeLinear": ("tensorrt-rtx", quantized(algorithm="rtn")),
}


@pytest.mark.parametrize("case", SLIPS)
def test_what_a_target_has_no_kernel_for_does_not_slip_through(case: str, tmp_path: Path) -> None:
    name, text = SLIPS[case]
    with pytest.raises(RecipeError, match=name):
        recipe.load(write(tmp_path, name, text))


def test_a_target_that_lacks_something_is_refused_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "cuda", replace(TARGETS["cuda"], missing="a compiler that nobody may download"))
    loaded = recipe.load(write(tmp_path, "cuda", quantized()))
    with pytest.raises(RecipeError, match="target cuda cannot be built") as caught:
        plan.make(loaded, VERSIONS)
    assert caught.value.why == "a compiler that nobody may download"
    assert "qwen-onnx targets" in caught.value.fix


def test_the_table_is_sound() -> None:
    assert all(name == row.name for name, row in TARGETS.items())
    assert len({row.title for row in TARGETS.values()}) == len(TARGETS)
    known = set(get_args(Scheme.model_fields["algorithm"].annotation))
    for row in TARGETS.values():
        assert row.dtypes
        assert row.shapes in ("dynamic", "static")
        assert set(row.algorithms) <= known
        assert 0 < row.replay.top1 <= 1
        assert 0 < row.replay.logprob <= 1
        assert row.max_file >= 0
        assert row.runtime.package
        assert bool(row.max_opset) <= bool(row.runtime.newest)  # the limit is that version's
        if row.kernels:
            assert row.kernels.form in ("nbits", "qdq", "static", "openvino")
            assert row.kernels.embedding in ("any", "asymmetric", "")
            assert all(sizes and list(sizes) == sorted(sizes) for sizes in row.kernels.block_sizes.values())
    assert {recipe.load(path).recipe.target for path in RECIPES} == set(TARGETS)
