"""`read_shape` reads the sizes of a decoder, and refuses what it cannot vouch for."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import CheckpointError
from pipeline.facts import positions
from pipeline.facts.family import FAMILIES, Experts, Shape, read_shape

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
    attention, dense, routers = 12 * 4 * (2 * 3 + 2 * 1), 3 * 12 * 5, 12 * 10 + 12
    assert shape.body_parameters == 6 * attention + 4 * dense + 2 * (3 * 12 * (10 * 4 + 9) + routers)
    assert shape.active_parameters == 6 * attention + 4 * dense + 2 * (3 * 12 * (3 * 4 + 9) + routers)
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DUAL = {"chunk_size": 48, "local_size": 8, "original_max_position_embeddings": 48}


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({"rope_scaling": None}, 64),
        ({"rope_scaling": {"type": "default"}}, 64),
        ({"rope_scaling": YARN}, 128),  # Qwen3: max_position_embeddings is neither of the two
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64}}, 128),
        ({"rope_scaling": {"type": "yarn", "rope_type": "yarn", "factor": 2.5}}, 160),
        ({"dual_chunk_attention_config": DUAL}, 48),  # plain attention ends where the training did
        ({"dual_chunk_attention_config": DUAL | {"original_max_position_embeddings": 64}}, 64),
        ({"dual_chunk_attention_config": None}, 64),
        ({"use_sliding_window": False, "sliding_window": 16, "layer_types": ["full_attention"] * 2}, 64),
    ],
)
def test_the_context_is_what_is_supported_of_it(change: dict[str, Any], context: int) -> None:
    assert read_shape(CONFIG | change, "config.json").context == context


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *(
            (
                {"rope_scaling": {"rope_type": name, "factor": 2.0}},
                f"rotary embeddings of type {name} are not supported",
            )
            for name in ("linear", "dynamic", "longrope", "llama3", "mrope", "su")
        ),
        ({"rope_scaling": {"factor": 2.0}}, r"type \{'factor': 2.0\} are not supported"),
        ({"rope_scaling": 4.0}, "type 4.0 are not supported"),
        ({"rope_scaling": "yarn"}, "type 'yarn' are not supported"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "type linear and yarn are not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is None"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor is 0.5, no number from 1 to 1024"),
        ({"rope_scaling": YARN | {"factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": YARN | {"factor": True}}, "factor is True"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 32.0}}, "embeddings is 32.0"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast is -1"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate is 'no'"),
        ({"rope_scaling": YARN | {"mscal": 1.0}}, "unknown key mscal"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "transformers does not read them"),
        ({"dual_chunk_attention_config": {"chunk_size": 48}}, "does not say what it was trained for"),
        ({"dual_chunk_attention_config": True}, "does not say what it was trained for"),
        ({"use_sliding_window": True, "sliding_window": 16}, "attends to a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "attends to a sliding window"),
    ],
)
def test_positions_that_are_not_supported_are_refused_by_name(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read_shape(CONFIG | change, "config.json")


@pytest.mark.parametrize("wanted", [None, 49, 64])
def test_a_context_that_needs_dual_chunk_attention_is_refused(wanted: int | None) -> None:
    config = CONFIG | {"dual_chunk_attention_config": DUAL}
    positions.check_context(config, 48, "config.json")
    with pytest.raises(CheckpointError) as caught:
        positions.check_context(config, wanted, "config.json")
    assert f"a context of {wanted or 64} tokens needs dual chunk attention" in caught.value.what
    assert "48 or less" in caught.value.fix
    positions.check_context(CONFIG, wanted, "config.json")
