"""Which exporter a recipe gets that names none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.facts import exporters
from pipeline.facts.family import Shape
from pipeline.facts.target import TARGETS
from pipeline.tuning import catalogue


def _shape(name: str) -> Shape:
    return catalogue.find(name).shape


@pytest.mark.parametrize(
    ("model", "target", "expected"),
    [
        ("Qwen2.5-0.5B", "cpu", "genai"),
        ("Qwen2.5-1.5B", "cpu", "genai"),  # 7.1 GB in float32
        ("Qwen2.5-3B", "cpu", "native"),
        ("Qwen2.5-3B", "cuda", "native"),
        ("Qwen2.5-0.5B", "npu", "static"),
        ("Qwen3-32B", "npu", "static"),
        ("Qwen3-32B", "openvino", "openvino"),
        ("Qwen3-30B-A3B", "cpu", "native"),
        ("Qwen3-30B-A3B", "npu", "native"),  # which the target refuses by name
        ("Qwen2.5-VL-3B-Instruct", "cpu", "native"),
    ],
)
def test_family_size_and_target_decide(model: str, target: str, expected: str) -> None:
    assert exporters.resolve(None, TARGETS[target], _shape(model)) == expected


@pytest.mark.parametrize(("target", "expected"), [("cpu", "genai"), ("npu", "static"), ("openvino", "openvino")])
def test_of_a_model_that_is_not_known_yet_the_target_decides(target: str, expected: str) -> None:
    assert exporters.resolve(None, TARGETS[target], None) == expected


def test_of_a_family_that_nothing_is_known_of_the_target_decides() -> None:
    assert exporters.resolve(None, TARGETS["cpu"], replace(_shape("Qwen2.5-3B"), model_type="qwen9")) == "genai"


def test_what_our_own_exporter_cannot_write_stays_with_the_genai_one() -> None:
    shape = _shape("Qwen2.5-7B")
    assert exporters.resolve(None, TARGETS["cpu"], shape, options=True) == "genai"
    assert exporters.resolve(None, TARGETS["cpu"], shape, generates=False) == "genai"


@pytest.mark.parametrize("wanted", ["genai", "optimum", "native", "static"])
@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen3-32B", "Qwen3-30B-A3B"])
def test_what_a_recipe_says_is_kept(wanted: str, model: str) -> None:
    assert exporters.resolve(wanted, TARGETS["cpu"], _shape(model)) == wanted
