"""A recipe is refused with everything that is wrong with it, each at its file and line; or it is what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import RecipeError
from pipeline.facts import recipe, strict_yaml
from pipeline.facts.scheme import Scheme

EXPERTS = "{count: 4, per_token: 2, intermediate: 8}"
SCHEME = "{bits: 8, block_size: 32, symmetric: true}"
SIZES = "layers: 1, hidden: 8, intermediate: 8, heads: 1, kv_heads: 1, head_dim: 8, vocabulary: 9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = f"""\
target: cpu
checkpoint:
  sources:
    - type: hub
      repo: Qwen/Tiny
      revision: {COMMIT}
  license: Apache-2.0
  base_model: Qwen/Tiny
quantize:
  algorithm: min_error
  body: {{bits: 4, block_size: 32, symmetric: true}}
validate:
  gates:
    mean_kl: 0.06
    top1: 1
    perplexity_ratio: 1.1
"""
EXTENDS = "extends: _base.yaml\n"


def write(folder: Path, text: str, name: str = "cpu-int4.yaml", base: str = BASE) -> Path:
    """A recipe in a folder of its own, beside the base that it may extend."""
    home = folder / "tiny"
    home.mkdir(exist_ok=True)
    (home / "_base.yaml").write_text(base)
    path = home / name
    path.write_text(text)
    return path


def refusal(path: Path) -> list[str]:
    """The findings of the refusal, with paths relative to the recipe's folder."""
    with pytest.raises(RecipeError) as caught:
        recipe.load(path)
    head, *rows = caught.value.what.replace(f"{path.parent}/", "").split("\n  ")
    assert head == f"{path.name} has {len(rows)} problem{'s' * (len(rows) > 1)}"
    return rows


# (what is appended to a valid recipe from line 2 on, each finding as the start and a part of its row)
WRONG: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "unknown key": ("descripton: x", [("cpu-int4.yaml:2: unknown key `descripton`", "did you mean `description`?")]),
    "misspelt extends": ("extend: x", [("cpu-int4.yaml:2: unknown key `extend`", "did you mean `extends`?")]),
    "unknown key unlike any": ("zzz: 1", [("cpu-int4.yaml:2: unknown key `zzz`", "known: adapters, architecture,")]),
    "unknown nested key": (
        "validate:\n  gates:\n    mean_lk: 0.1",
        [("cpu-int4.yaml:4: unknown key `validate.gates.mean_lk`", "did you mean `mean_kl`?")],
    ),
    "unknown key of a scheme": (
        "quantize:\n  body:\n    bitz: 4",
        [("cpu-int4.yaml:4: unknown key `quantize.body.bitz`", "did you mean `bits`?")],
    ),
    "unknown key in a union": (
        f"checkpoint:\n  sources:\n  - type: hub\n    revision: {COMMIT}\n    repoo: a/b",
        [
            ("cpu-int4.yaml:4: missing key `checkpoint.sources[0].repo`", ""),
            ("cpu-int4.yaml:6: unknown key `checkpoint.sources[0].repoo`", "did you mean `repo`?"),
        ],
    ),
    "unknown key below a key named like its union's tag": (
        "checkpoint:\n  sources:\n  - type: wheels\n    wheels:\n    - {requirement: a==1, member: b, membr: c}",
        [("cpu-int4.yaml:6: unknown key `checkpoint.sources[0].wheels[0].membr`", "did you mean `member`?")],
    ),
    "missing key named like its union's tag": (
        "checkpoint:\n  sources:\n  - type: wheels",
        [("cpu-int4.yaml:4: missing key `checkpoint.sources[0].wheels`", "")],
    ),
    "missing key of a list item": (
        "quantize:\n  overrides:\n  - match: x",
        [("cpu-int4.yaml:4: missing key `quantize.overrides[0].scheme`", "")],
    ),
    "unknown member of a union": (
        "checkpoint:\n  sources:\n  - repo: a/b\n    type: hubb",
        [("cpu-int4.yaml:5: `checkpoint.sources[0].type`: should be 'hub' or", "got 'hubb'; did you mean `hub`?")],
    ),
    "unnamed member of a union": (
        "checkpoint: {sources: [{repo: a/b}]}",
        [("cpu-int4.yaml:2: missing key `checkpoint.sources[0].type`", "")],
    ),
    "nearly an embedding": (
        "quantize: {embedding: sharde}",
        [("cpu-int4.yaml:2: `quantize.embedding`: should be 'shared' or 'float'", "did you mean `shared`?")],
    ),
    "embedding's scheme": (
        "quantize:\n  embedding: {bits: 5,\n    block_size: 32, symmetric: true}",
        [("cpu-int4.yaml:3: `quantize.embedding.bits`: should be 4 or 8, got 5", "")],
    ),
    "nearly an algorithm": (
        "quantize: {algorithm: min_eror}",
        [("cpu-int4.yaml:2: `quantize.algorithm`: should be 'gptq', 'min_error'", "did you mean `min_error`?")],
    ),
    "no revision": (
        "checkpoint: {sources: [{type: hub, repo: a/b, revision: -x}]}",
        [("cpu-int4.yaml:2: `checkpoint.sources[0].revision`: should be a commit", "got '-x'")],
    ),
    "an option of pip for a requirement": (
        "checkpoint: {sources: [{type: wheels, wheels: [{requirement: --index-url==x, member: y}]}]}",
        [("cpu-int4.yaml:2: `checkpoint.sources[0].wheels[0].requirement`: should be a pinned requirement", "")],
    ),
    "adapters beside one that is merged": (
        "checkpoint: {adapter: x}\nadapters: {a: {path: a}}",
        [("cpu-int4.yaml:3: one adapter is merged into the checkpoint", "remove `checkpoint.adapter` or `adapters`")],
    ),
    "adapters of a rotated model": (
        "export: {rotate: true}\nadapters: {a: {path: a}}",
        [("cpu-int4.yaml:3: a rotated model computes in another basis", "remove `export.rotate` or `adapters`")],
    ),
    "adapters beside integer products": (
        "adapters: {}\nquantize: {algorithm: w8a8, body: {bits: 8, block_size: -1}}",
        [("cpu-int4.yaml:3: w8a8 multiplies in integers", "there is with gptq, min_error, rtn, k_quant, none")],
    ),
    "adapters where the runtime cannot bring them": (
        "target: webgpu\nadapters: {a: {path: a}}\nquantize: {body: {block_size: 32}}",
        [("cpu-int4.yaml:3: webgpu takes no adapters: ONNX Runtime brings", "Merge one (`checkpoint.adapter`)")],
    ),
    "adapters whose names are no files": (
        "adapters:\n  a/b: {path: a}\n  x.onnx_adapter: {path: a}\n  Legal: {path: a}\n  legal: {path: a}",
        [
            ("cpu-int4.yaml:3: `a/b` cannot be the name of an adapter", "a letter or digit first"),
            ("cpu-int4.yaml:4: `x.onnx_adapter` cannot be the name of an adapter", ""),
            ("cpu-int4.yaml:6: `legal` and `Legal` are one file", ""),
        ],
    ),
    "a misspelt key of an adapter": (
        "adapters:\n  a:\n    pth: x",
        [
            ("cpu-int4.yaml:3: missing key `adapters.a.path`", ""),
            ("cpu-int4.yaml:4: unknown key `adapters.a.pth`", "did"),
        ],
    ),
    "no sources": ("checkpoint: {sources: []}", [("cpu-int4.yaml:2: `checkpoint.sources`: should have at least", "")]),
    "text for an integer": (
        "validate: {windows: '8'}",
        [("cpu-int4.yaml:2: `validate.windows`: should be a valid integer, got '8'", "")],
    ),
    "integer for text": ("description: 7", [("cpu-int4.yaml:2: `description`: should be a valid string", "quote it")]),
    "list for a mapping": ("quantize: [4]", [("cpu-int4.yaml:2: `quantize`: should be a mapping, got a list", "")]),
    "nothing for a mapping": ("quantize:", [("cpu-int4.yaml:2: `quantize`: should be a mapping, got nothing", "")]),
    "booleans for numbers": (
        "quantize: {accuracy_level: true}\nvalidate: {windows: true, gates: {mean_kl: true}}",
        [
            ("cpu-int4.yaml:2: `quantize.accuracy_level`: should be a valid integer, got true", ""),
            ("cpu-int4.yaml:3: `validate.windows`: should be a valid integer, got true", ""),
            ("cpu-int4.yaml:3: `validate.gates.mean_kl`: should be a valid number, got true", ""),
        ],
    ),
    "decimal for an integer": (
        "quantize: {body: {bits: 4.0}}",
        [("cpu-int4.yaml:2: `quantize.body.bits`: should be a valid integer, got 4.0", "")],
    ),
    "numbers that are none": (
        "validate:\n  gates:\n    mean_kl: .nan\n    p99_kl: .inf\n    top1: -.INF\n    perplexity_ratio: 1e999",
        [
            ("cpu-int4.yaml:4: `.nan` is not a finite number", ""),
            ("cpu-int4.yaml:5: `.inf` is not a finite number", ""),
            ("cpu-int4.yaml:6: `-.INF` is not a finite number", ""),
            ("cpu-int4.yaml:7: `1e999` is not a finite number", ""),
        ],
    ),
    "gates out of range": (
        "validate: {gates: {mean_kl: 0, top1: 1.5}}",
        [
            ("cpu-int4.yaml:2: `validate.gates.mean_kl`: should be greater than 0, got 0", ""),
            ("cpu-int4.yaml:2: `validate.gates.top1`: should be less than or equal to 1, got 1.5", ""),
        ],
    ),
    "duplicate key": (
        f"quantize:\n  head: {SCHEME}\n  head: {{bits: 4}}",
        [("cpu-int4.yaml:4: duplicate key `head` (first in line 3)", "")],
    ),
    "duplicate extends": (EXTENDS, [("cpu-int4.yaml:2: duplicate key `extends` (first in line 1)", "")]),
    "key that is a list": ("? [a, b]\n: 1", [("cpu-int4.yaml:2: a key should be a plain word", "")]),
    "code": (
        "description: !!python/object/apply:os.system ['exit 1']",
        [("cpu-int4.yaml:2: tags (`!!python/object/apply:os.system`) are not allowed", "")],
    ),
    "own tag": ("description: !mine x", [("cpu-int4.yaml:2: tags (`!mine`) are not allowed", "")]),
    "merge key": (
        "quantize: &q\n  algorithm: rtn\nexport:\n  <<: *q",
        [
            ("cpu-int4.yaml:2: anchors (`&q`) are not allowed: share with `extends`", ""),
            ("cpu-int4.yaml:5: aliases (`*q`) are not allowed: share with `extends`", ""),
        ],
    ),
    "syntax": ("description: a: b", [("cpu-int4.yaml:2: not YAML: mapping values are not allowed here", "")]),
    "tab": ("quantize:\n\thead: 1", [("cpu-int4.yaml:3: not YAML: found character '\\t'", "")]),
    "control character": ("description: \x01", [("cpu-int4.yaml:2: not YAML: a control character", "")]),
    "no character": (r'description: "\ud83d"', [("cpu-int4.yaml:2: not YAML: half of a surrogate pair", "")]),
    "two documents": ("---\ndescription: x", [("cpu-int4.yaml:2: not YAML: a second document", "")]),
    "nested too deep in a line": ("description: " + "[" * 5000, [("cpu-int4.yaml:2: not YAML: nested deeper", "")]),
    "nested too deep in lines": ("description: " + "[\n" * 50000, [("cpu-int4.yaml:33: not YAML: nested deeper", "")]),
    "unknown target": (
        "target: cpuu",
        [("cpu-int4.yaml:2: unknown target `cpuu`; did you mean `cpu`?", "known: cpu, cuda, directml")],
    ),
    "unknown family": (
        f"architecture: {{{SIZES},\n  model_type: qwen22}}",
        [("cpu-int4.yaml:3: unknown family `qwen22`; did you mean `qwen2`?", "known: qwen2, qwen3")],
    ),
    "experts without sizes": (
        f"architecture:\n  {{{SIZES}, model_type: qwen3_moe}}\nexport: {{exporter: native}}",
        [("cpu-int4.yaml:2: qwen3_moe needs `experts`", "")],
    ),
    "an exporter without experts": (
        f"export: {{exporter: genai}}\narchitecture:\n  {{{SIZES}, model_type: qwen3_moe, experts: {EXPERTS}}}",
        [("cpu-int4.yaml", "genai cannot export qwen3_moe")],
    ),
    "experts of a model that has none": (
        f"architecture:\n  {{{SIZES}, model_type: qwen3,\n  experts: {EXPERTS}}}",
        [("cpu-int4.yaml:4: qwen3 has no `experts`", "")],
    ),
    "bits without kernels": (
        f"target: tensorrt-rtx\nquantize:\n  body: {{bits: 8}}\n  overrides:\n  - match: x\n    scheme: {SCHEME}",
        [
            ("cpu-int4.yaml:4: 8-bit weights have no kernels on tensorrt-rtx", ""),
            ("cpu-int4.yaml:7: 8-bit weights have no kernels on tensorrt-rtx", ""),
        ],
    ),
    "k_quant and symmetric": (
        "quantize:\n  algorithm: k_quant",
        [("_base.yaml:11: k_quant is asymmetric by definition: set `symmetric: false`", "")],
    ),
    "dynamic with body": (
        "quantize:\n  algorithm: dynamic",
        [("_base.yaml:11: algorithm dynamic does not quantize block by block: remove `body`", "")],
    ),
    "block-wise without body": (
        "quantize:\n  body: null",
        [("cpu-int4.yaml:3: algorithm min_error needs `body`", "{bits, block_size, symmetric}")],
    ),
    "remote file without digest": (
        f"checkpoint: {{sources: [{{type: local, path: x}},\n{{type: hub, repo: a/b, revision: {COMMIT}, file: c}}]}}",
        [("cpu-int4.yaml:3: a remote file needs `checkpoint.sha256`", "no mirror needs trust")],
    ),
    "several at once": (
        "target: cpuu\nquantize:\n  body: {bits: 3}\n  algoritm: rtn\ngeneration: {top_k: 0}\ngeneration: {}\n",
        [
            ("cpu-int4.yaml:2: unknown target `cpuu`", ""),
            ("cpu-int4.yaml:4: `quantize.body.bits`: should be 4 or 8, got 3", ""),
            ("cpu-int4.yaml:5: unknown key `quantize.algoritm`; did you mean `algorithm`?", ""),
            ("cpu-int4.yaml:6: `generation.top_k`: should be greater than or equal to 1, got 0", ""),
            ("cpu-int4.yaml:7: duplicate key `generation` (first in line 6)", ""),
        ],
    ),
    "refused YAML and wrong types": (
        "checkpoint:\n  sources: !!set {a}\nvalidate: {windows: 0}\nnot_a_key: 1",
        [
            ("cpu-int4.yaml:3: tags (`!!set`) are not allowed", ""),
            ("cpu-int4.yaml:4: `validate.windows`: should be greater than or equal to 1", ""),
            ("cpu-int4.yaml:5: unknown key `not_a_key`", ""),
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_finding_has_its_line_and_the_right_name_and_nothing_else_is_found(case: str, tmp_path: Path) -> None:
    text, expected = WRONG[case]
    rows = refusal(write(tmp_path, EXTENDS + text))
    assert len(rows) == len(expected), rows
    for row, (start, part) in zip(rows, expected, strict=True):
        assert row.startswith(start)
        assert part in row


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("", "1: a recipe is a mapping of keys to values; this file is empty"),
        ("# only a comment\n", "1: a recipe is a mapping of keys to values; this file is empty"),
        ("- a\n", "1: a recipe is a mapping of keys to values; this file holds a list"),
        ("word\n", "1: a recipe is a mapping of keys to values; this file holds one value"),
        ("extends: []\n", "1: `extends`: should be a file name or a list of file names"),
        ("extends: 3\n", "1: `extends`: should be a file name or a list of file names"),
        (
            "extends:\n- _base.yaml\n- _bse.yaml\n",
            "3: `extends: _bse.yaml`: there is no such file; did you mean `_base.yaml`?",
        ),
        ("extends: cpu-int4.yaml\n", "1: `extends: cpu-int4.yaml`: a recipe cannot extend itself"),
    ],
)
def test_a_file_that_yields_no_mapping_has_one_finding(text: str, row: str, tmp_path: Path) -> None:
    assert refusal(write(tmp_path, text)) == [f"cpu-int4.yaml:{row}"]


def test_every_missing_key_of_a_recipe_is_named(tmp_path: Path) -> None:
    rows = refusal(write(tmp_path, "description: x\n"))
    assert [row.rpartition(" ")[2] for row in rows] == ["`target`", "`checkpoint`", "`quantize`", "`validate`"]


def test_text_that_is_not_utf8_is_refused_at_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.write_bytes(b"target: cpu\ndescription: \xff\n")
    assert refusal(path) == ["cpu-int4.yaml:2: not UTF-8"]


def test_an_alias_bomb_is_refused_unexpanded(tmp_path: Path) -> None:
    bomb = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    with pytest.raises(RecipeError, match=r"has 79 problems\n") as caught:  # 40 lines with anchors, 39 with aliases
        recipe.load(write(tmp_path, EXTENDS + "\n".join(bomb)))
    assert "cpu-int4.yaml:3: aliases (`*a0`) are not allowed" in caught.value.what
    assert caught.value.what.endswith("\n  … and 39 more")


def test_findings_of_a_base_have_the_base_s_file_and_line_beside_those_of_the_recipe(tmp_path: Path) -> None:
    base = BASE.replace("top1: 1", "top_1: 1").replace("algorithm:", "algorithm: rtn\n  algorithm:")
    rows = refusal(write(tmp_path, EXTENDS + "validate: {windows: 0}\nquantize: {head: !x 1}", base=base))
    assert [re.sub(r"`: .*|`; .*", "`", row) for row in rows] == [
        "_base.yaml:11: duplicate key `algorithm` (first in line 10)",
        "_base.yaml:14: missing key `validate.gates.top1`",
        "_base.yaml:16: unknown key `validate.gates.top_1`",
        "cpu-int4.yaml:2: `validate.windows`",
        "cpu-int4.yaml:3: tags (`!x`) are not allowed: a recipe is plain data",
    ]


def test_an_unreadable_base_hides_neither_the_recipe_s_findings_nor_yields_missing_keys(tmp_path: Path) -> None:
    checkpoint = f"sources: [{{type: hub, repo: a/b, revision: {COMMIT}, file: c}}], license: MIT, base_model: b"
    text = f"{EXTENDS}target: [cpu]\ncheckpoint: {{{checkpoint}}}\n"  # the digest may be in the base
    rows = refusal(write(tmp_path, text, base="target: cpu\nquantize: [\n"))
    assert rows[0].startswith("_base.yaml:3: not YAML: ")
    assert rows[1:] == ["cpu-int4.yaml:2: `target`: should be a valid string, got a list"]


def test_a_cycle_of_bases_is_found_where_it_closes(tmp_path: Path) -> None:
    rows = refusal(write(tmp_path, EXTENDS, base="extends: cpu-int4.yaml\n" + BASE))
    assert rows == ["_base.yaml:1: `extends: cpu-int4.yaml`: a recipe cannot extend itself (through others)"]


def test_a_tower_of_bases_ends_and_each_is_read_once(tmp_path: Path) -> None:
    for level in range(10):  # 30^8 readings, if each were read as often as it is named
        write(tmp_path, f"extends: [{', '.join([f'b{level + 1}.yaml'] * 30)}]", f"b{level}.yaml")
    rows = refusal(tmp_path / "tiny" / "b0.yaml")
    assert rows == [f"b7.yaml:1: `extends: b8.yaml`: more than {strict_yaml.MAX_CHAIN} files extend one another"]


def test_a_missing_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, EXTENDS)
    for wrong in (path.with_name("cpu-int5.yaml"), path.with_suffix(""), path.parent.parent / "tinny" / path.name):
        with pytest.raises(RecipeError) as caught:
            recipe.load(wrong)
        assert caught.value.what == f"there is no recipe {wrong}"
        assert caught.value.fix == f"did you mean `{path}`?"


def test_a_large_file_is_refused_also_as_a_base(tmp_path: Path) -> None:
    large = BASE + "#" * strict_yaml.MAX_BYTES
    with pytest.raises(RecipeError, match=r"_base\.yaml is larger than \d+ bytes"):
        recipe.load(write(tmp_path, EXTENDS, base=large).with_name("_base.yaml"))
    assert "is larger than" in refusal(write(tmp_path, EXTENDS, base=large))[0]


@pytest.mark.parametrize("name", ["cpu int4.yaml", "cpu;int4.yaml", "größe.yaml"])
def test_a_name_that_is_no_safe_file_name_is_refused(name: str, tmp_path: Path) -> None:
    (row,) = refusal(write(tmp_path, EXTENDS, name))
    assert f"name `tiny-{Path(name).stem}`" in row
    assert "may hold only letters, digits and" in row


def test_a_recipe_is_named_after_its_folder_however_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, EXTENDS)
    monkeypatch.chdir(path.parent)
    assert {recipe.load(given).name for given in (path, Path(path.name), Path("../tiny") / path.name)} == {
        "tiny-cpu-int4"
    }


def test_a_recipe_wins_over_its_bases_key_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, "quantize: {body: {bits: 8, block_size: 64}}\ncheckpoint: {languages: [en, no]}", "_eight.yaml")
    child = (
        "quantize: {body: {block_size: 16}}\ncheckpoint: {sources: [{type: local, path: 2026-01-31}], languages: [zh]}"
    )
    loaded = recipe.load(write(tmp_path, f"extends: [_base.yaml, _eight.yaml]\n{child}"))
    body = loaded.recipe.quantize.body
    assert body is not None
    assert body.model_dump() == {"bits": 8, "block_size": 16, "symmetric": True}
    assert loaded.recipe.checkpoint.languages == ("zh",)
    assert loaded.recipe.checkpoint.sources == (recipe.LocalSource(type="local", path="2026-01-31"),)
    assert loaded.recipe.validation.gates == recipe.Gates(mean_kl=0.06, top1=1, perplexity_ratio=1.1)
    assert "extends" not in loaded.resolved


def test_places_of_a_replaced_list_do_not_haunt_the_new_one(tmp_path: Path) -> None:
    rows = refusal(write(tmp_path, EXTENDS + "checkpoint:\n  sources:\n  - type: hub\n    repo: a/b\n"))
    assert rows == ["cpu-int4.yaml:4: missing key `checkpoint.sources[0].revision`"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("12:30", "12:30"),
        ("2026-01-31", "2026-01-31"),
        ("1_000", "1_000"),
        ("'7'", "7"),
        ("0" * 40, "0" * 40),
        ("010", 10),
        ("0x1f", 31),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("True", True),
        ("~", None),
        ("|\n  1\n", "1\n"),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object, tmp_path: Path) -> None:
    got = strict_yaml.read(write(tmp_path, f"key: {text}")).value["key"]
    assert (type(got), got) == (type(value), value)


def test_find_lists_recipes_but_not_bases(tmp_path: Path) -> None:
    path = write(tmp_path, EXTENDS)
    (tmp_path / "_base").mkdir()
    (tmp_path / "_base" / "cpu.yaml").touch()
    assert recipe.find(tmp_path) == [path]


def scheme(bits: int) -> dict[str, Any]:
    return {"bits": bits, "block_size": 32, "symmetric": True}


FULL: dict[str, Any] = {
    "algorithm": "min_error",
    "body": scheme(4),
    "head": scheme(8),
    "overrides": [
        {"match": "*.down_proj", "scheme": scheme(8) | {"block_size": 64}},
        {"match": "model.layers.0.*", "scheme": scheme(8) | {"block_size": 128}},
    ],
    "exclude": ["*.layers.9.*"],
}


@pytest.mark.parametrize(
    ("embedding", "path", "role", "bits_and_block"),
    [
        ("float", "model.layers.1.mlp.up_proj", "body", (4, 32)),
        ("float", "model.layers.1.mlp.down_proj", "body", (8, 64)),
        ("float", "model.layers.0.mlp.down_proj", "body", (8, 128)),  # both match: the last wins
        ("float", "model.layers.9.mlp.down_proj", "body", None),  # exclusion wins over overrides
        ("float", "lm_head", "head", (8, 32)),
        ("float", "model.embed_tokens", "embedding", None),
        ("shared", "model.embed_tokens", "embedding", None),
        (scheme(4), "model.embed_tokens", "embedding", (4, 32)),
    ],
)
def test_the_scheme_of_a_weight(embedding: Any, path: str, role: str, bits_and_block: tuple[int, int] | None) -> None:
    given = Scheme.model_validate_json(json.dumps(FULL | {"embedding": embedding})).of_weight(path, role)
    assert (given and (given.bits, given.block_size)) == bits_and_block


def test_a_head_without_a_scheme_of_its_own_has_the_body_s() -> None:
    given = Scheme.model_validate_json(json.dumps({"algorithm": "rtn", "body": scheme(4)}))
    assert given.of_weight("lm_head", "head") == given.body


EVERYTHING = f"""\
extends: _base.yaml
description: with every key
checkpoint:
  sources:
    - {{type: hub, repo: Qwen/Tiny, revision: {COMMIT}, file: a.gguf}}
    - {{type: wheels, wheels: [{{requirement: a==1.0, member: b/c.bin}}]}}
    - {{type: local, path: ../a.gguf}}
  sha256: {"0" * 64}
  size: 100
  adapter: lora
  languages: [en]
architecture:
  {{model_type: qwen3, {SIZES}}}
export:
  {{exporter: optimum, dtype: float32, rotate: true, last_token_head: false, draft_tokens: 7, options: {{a: [1]}}}}
quantize:
  algorithm: rtn
  head: {SCHEME}
  embedding: {SCHEME}
  vision: {SCHEME}
  audio: float
  overrides: [{{match: "*.v_proj", scheme: {SCHEME}}}]
  exclude: ["*.q_proj"]
  calibration_windows: 8
  accuracy_level: 1
  options: {{b: 1}}
validate:
  windows: 1
  window_tokens: 16
  decode_tokens: 8
  long_tokens: 128
  greedy_tokens: 1
  answers: 1
  gates: {{p99_kl: 1, greedy: 0.5, runaway: 1}}
generation: {{context_length: 64, do_sample: true, temperature: 1, top_p: 1, top_k: 1}}
objective: {{max_kl: 0.1, max_bytes: 1000, min_decode_ratio: 0.5}}
"""

COMPILED = """\
extends: _base.yaml
target: npu
export: {exporter: static}
npu: {soc: sc8380xp, window: 32, cache: 256, share_weights: true}
quantize: {algorithm: static, body: {bits: 8, block_size: -1}}
"""

MIXTURE = f"""\
extends: _base.yaml
architecture:
  {{model_type: qwen2_moe, {SIZES}, experts: {{count: 8, per_token: 2, intermediate: 32, normalized: true,
    shared_intermediate: 48, sparse_step: 1, dense_layers: [0]}}}}
export: {{exporter: native, experts: dense}}
validate: {{gates: {{routing: 0.9, expert_error: 0.05}}}}
"""
# Gates set to nothing are the base's, which are of generation.
OTHER_GATES = "mean_kl: null, top1: null, perplexity_ratio: null"
EMBEDDING = f"""\
extends: _base.yaml
task: embed
validate: {{gates: {{{OTHER_GATES}, cosine: 0.999, min_cosine: 0.99, ranking: 0.9}}}}
"""
RANKING = EMBEDDING.replace("embed", "rerank").replace("cosine: 0.999, min_cosine: 0.99", "score_error: 0.1")


ADAPTED = """\
extends: _base.yaml
adapters: {billing: {path: ../billing, license: MIT}, legal: {path: legal}}
"""


def accepts(schema: dict[str, Any], value: Any, definitions: dict[str, Any]) -> bool:
    """The part of JSON schema that ours uses (no validator is installed)."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return any(accepts(choice, value, definitions) for choice in choices)
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, dict) and "properties" in schema:
        return all(
            key in schema["properties"] and accepts(schema["properties"][key], item, definitions)
            for key, item in value.items()
        ) and set(schema.get("required", ())) <= set(value)
    return all(accepts(schema["items"], item, definitions) for item in value) if isinstance(value, list) else True


def test_the_json_schema_knows_every_key_that_loads_and_no_other(tmp_path: Path) -> None:
    schema = recipe.json_schema()
    path = write(tmp_path, EVERYTHING)
    resolved = recipe.load(path).resolved
    compiled = recipe.load(write(tmp_path, COMPILED, "npu-int8.yaml")).resolved
    embedding, ranking, adapted, mixture = (
        recipe.load(write(tmp_path, text)).resolved for text in (EMBEDDING, RANKING, ADAPTED, MIXTURE)
    )
    given = {**resolved, **compiled, **embedding, **adapted}
    assert {name for name in schema["properties"] if name not in given} == {"extends"}
    for value in (compiled, embedding, ranking, adapted, mixture):
        assert accepts(schema, value, schema["$defs"])
    used = set(re.findall(r"(\w+):", EVERYTHING + BASE + COMPILED + EMBEDDING + RANKING + ADAPTED + MIXTURE))
    named = {name for part in (schema, *schema["$defs"].values()) for name in part["properties"]}
    assert named <= used
    assert accepts(schema, resolved, schema["$defs"])
    for fragment in ({"extends": "a"}, {"extends": ["a", "b"]}, {"quantize": {"body": {"bits": 8}}}):
        assert accepts(schema, fragment, schema["$defs"])
    for wrong in (
        {"extends": 1},
        {"targt": "cpu"},
        {"quantize": {"body": {"bitz": 4}}},
        {"quantize": {"embedding": "sharde"}},
        {"checkpoint": {"sources": [{"type": "hub", "path": "x"}]}},
        {"validate": {"gates": {"top1": "1"}}},
    ):
        assert not accepts(schema, wrong, schema["$defs"])
