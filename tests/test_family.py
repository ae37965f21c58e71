"""`read_shape` reads the sizes of a decoder, and refuses what it cannot vouch for."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import CheckpointError
from pipeline.family import FAMILIES, Experts, Shape, read_shape

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "intermediate_size": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 7,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key not in keys}


def test_a_config_is_read_as_it_is() -> None:
    shape = read_shape(CONFIG, "config.json")
    assert shape == Shape(
        model_type="qwen2",
        layers=2,
        hidden=12,
        intermediate=5,
        heads=3,
        kv_heads=1,
        head_dim=4,
        vocabulary=7,
        context=64,
        tied=True,
    )


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (CONFIG, "head_dim", 4),  # hidden size / attention heads
        (CONFIG | {"head_dim": None}, "head_dim", 4),
        (CONFIG | {"head_dim": 16}, "head_dim", 16),  # need not divide the hidden size
        (CONFIG | {"head_dim": 16, "num_attention_heads": 5}, "heads", 5),
        (CONFIG | QWEN3, "head_dim", 128),  # the default of transformers' Qwen3Config
        (without("num_key_value_heads"), "kv_heads", 3),
        (CONFIG | {"num_key_value_heads": None}, "kv_heads", 3),
        (without("tie_word_embeddings"), "tied", False),
        (without("architectures"), "model_type", "qwen2"),
        (without("max_position_embeddings"), "context", 32768),
    ],
)
def test_defaults_are_those_of_transformers(config: dict[str, Any], field: str, value: object) -> None:
    assert getattr(read_shape(config, "config.json"), field) == value


def test_parameters_are_counted_as_by_hand() -> None:
    shape = read_shape(CONFIG | {"head_dim": 16}, "config.json")
    query, key, value, output = 12 * (3 * 16), 12 * 16, 12 * 16, (3 * 16) * 12
    gate, up, down = 12 * 5, 12 * 5, 5 * 12
    assert shape.body_parameters == 2 * (query + key + value + output + gate + up + down) == 3432
    assert shape.vocabulary_parameters == 7 * 12


@pytest.mark.parametrize(
    ("config", "texts"),
    [
        (CONFIG | {"auto_map": {"AutoModel": "modeling.Mine"}}, ["code of its own", "config.json"]),
        (CONFIG | {"auto_map": None}, ["code of its own"]),
        (CONFIG | {"model_type": "llama"}, ["'llama' is not supported"]),
        (CONFIG | {"architectures": ["Qwen3ForCausalLM"]}, ["['Qwen3ForCausalLM'] of model type 'qwen2'"]),
        (CONFIG | {"architectures": "Qwen2ForCausalLM"}, ["is not supported"]),
        (without("model_type"), ["model type None"]),
        ([CONFIG], ["no JSON object"]),
    ],
)
def test_what_is_no_known_architecture_is_refused(config: Any, texts: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_shape(config, "config.json")
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    if "supported" in caught.value.what:
        assert all(f"{name} ({family.architecture})" in caught.value.fix for name, family in FAMILIES.items())


SIZES = [*(key for key, value in CONFIG.items() if type(value) is int), "head_dim"]
OPTIONAL = {"num_key_value_heads", "head_dim", "max_position_embeddings"}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in SIZES for value in (0, -1, True, False, 2.0, "2")]
    + [(key, None) for key in SIZES if key not in OPTIONAL],
)
def test_a_size_is_a_positive_integer(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_shape(CONFIG | {key: value}, "config.json")
    assert f"{key} is {value!r}" in caught.value.what


def test_all_bad_sizes_are_named_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        read_shape(without("vocab_size") | {"num_hidden_layers": -3}, "config.json")
    assert "num_hidden_layers is -3, vocab_size is None" in caught.value.what


def test_heads_that_do_not_divide_the_hidden_size_need_a_head_dim() -> None:
    with pytest.raises(CheckpointError, match="head_dim is None"):
        read_shape(CONFIG | {"num_attention_heads": 5}, "config.json")


MIXTURE = CONFIG | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_hidden_layers": 6,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 4,
    "shared_expert_intermediate_size": 9,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "norm_topk_prob": False,
}


def test_the_sizes_of_mixtures_are_read_and_counted_as_by_hand() -> None:
    shape = read_shape(MIXTURE, "config.json")
    assert shape.experts == Experts(10, 3, 4, False, 9, 2, (3,))
    assert shape.sparse_layers == (1, 5)
    attention, dense, mixture = 12 * 4 * (2 * 3 + 2 * 1), 3 * 12 * 5, 3 * 12 * (10 * 4 + 9)
    assert shape.body_parameters == 6 * attention + 4 * dense + 2 * mixture
    assert shape.facts()["experts"]["dense_layers"] == [3]
    assert "experts" not in read_shape(CONFIG, "config.json").facts()


def test_the_third_generation_has_no_shared_expert() -> None:
    config = MIXTURE | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
    shape = read_shape({key: value for key, value in config.items() if "sparse_step" not in key}, "config.json")
    assert shape.experts == Experts(10, 3, 4, True, 0, 1, (3,))
    assert shape.sparse_layers == (0, 1, 2, 4, 5)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("num_experts", None, "num_experts is None"),
        ("num_experts", 0, "num_experts is 0"),
        ("moe_intermediate_size", True, "moe_intermediate_size is True"),
        ("shared_expert_intermediate_size", None, "shared_expert_intermediate_size is None"),
        ("decoder_sparse_step", -1, "decoder_sparse_step is -1"),
        ("num_experts_per_tok", 11, "a token goes to 11 of 10 experts"),
        ("mlp_only_layers", [6], "mlp_only_layers is [6], no list of the 6 layers"),
        ("mlp_only_layers", "3", "mlp_only_layers is '3'"),
    ],
)
def test_sizes_of_mixtures_that_make_no_sense_are_named(key: str, value: object, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_shape(MIXTURE | {key: value}, "config.json")
    assert text in caught.value.what
