"""Static stages compute what PyTorch computes, whatever a prompt's length; what they cannot compute is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from pipeline.checkpoint import reference as references
from pipeline.errors import StageError, UsageError
from pipeline.fidelity import metrics
from pipeline.graph import edits as graph
from pipeline.npu import static_decoder, static_export, static_session
from pipeline.npu.static_session import Stages
from pipeline.package import replay
from pipeline.quantization import rotation
from pipeline.runtime import generate, session as sessions
from pipeline.runtime.session import Session

if TYPE_CHECKING:
    from pipeline.checkpoint.reference import Reference

pytestmark = pytest.mark.slow

WINDOW, CACHE, PAD = 16, 128, 511
# One token, one window and its neighbours, several windows.
LENGTHS = (1, 2, 16, 17, 33, 40)
KINDS = [
    pytest.param(model_type, tied, rotated, id=f"{model_type}{'-tied' * tied}{'-rotated' * rotated}")
    for model_type in ("qwen2", "qwen3")
    for tied in (False, True)
    for rotated in (False, True)
]
Exports = Callable[..., Path]


def ids_of(count: int, seed: int) -> list[int]:
    """Random ids that end no answer: what a model would not say shows errors best."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, 440, count)]


@pytest.fixture(scope="module")
def torch_model(checkpoint_of: Callable[..., Path]) -> Callable[..., Reference]:
    return cache(lambda model_type, tied=False: references.load(checkpoint_of(model_type, tied)))


@pytest.fixture(scope="module")
def exported(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Maker of float stages, ``(model_type, tied, rotated) -> folder``, each made once; do not write into it."""

    @cache
    def made(model_type: str, tied: bool = False, rotated: bool = False) -> Path:
        loaded = references.load(checkpoint_of(model_type, tied))
        if rotated:
            rotation.rotate(loaded.model)
        folder = tmp_path_factory.mktemp("static")
        return written(loaded, folder)

    return made


def written(loaded: Reference, folder: Path) -> Path:
    config = static_export.export(loaded, folder, WINDOW, CACHE)
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def stages_of(folder: Path, pad: int = PAD) -> Stages:
    opened = {name: static_session.on_processor(folder / f"{name}.onnx") for name in static_export.STAGES}
    return Stages(opened, WINDOW, pad)


def rows_of(stages: Stages, ids: Sequence[int], cut: int) -> Any:
    """Logits ``[n, V]``: of the first ``cut`` ids by windows, of the others one by one."""
    hidden, kept = stages.prefill(ids[:cut])
    decoded = [stages.call("decode", [ids[slot]], slot, kept) for slot in range(cut, len(ids))]
    return stages.logits(np.concatenate([hidden, *decoded]))


@pytest.mark.parametrize(("model_type", "tied", "rotated"), KINDS)
def test_the_runtime_computes_what_pytorch_computes(
    model_type: str, tied: bool, rotated: bool, exported: Exports, torch_model: Callable[..., Reference]
) -> None:
    opened = sessions.open_package(exported(model_type, tied, rotated))
    assert (opened.window, opened.context_length, opened.provider) == (WINDOW, CACHE, "cpu")
    for length in LENGTHS:
        prompt, tokens = ids_of(length, length), ids_of(12, length + 1000)
        first, logprobs = replay.scores(opened.model, prompt, tokens, opened.window)
        logits = torch_model(model_type, tied).logits(prompt + tokens)[length - 1 : -1]
        assert first == logits.argmax(axis=1).tolist()
        wanted = metrics.log_softmax(logits)[np.arange(len(tokens)), tokens]
        assert wanted.min() < -5
        np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-3, err_msg=f"a prompt of {length} tokens")


@pytest.mark.parametrize(("model_type", "tied", "rotated"), KINDS)
def test_every_row_of_both_paths_is_pytorch_s_and_sees_no_padding(
    model_type: str, tied: bool, rotated: bool, exported: Exports, torch_model: Callable[..., Reference]
) -> None:
    folder, ids = exported(model_type, tied, rotated), ids_of(56, 7)
    wanted = torch_model(model_type, tied).logits(ids)
    found = rows_of(stages_of(folder), ids, 40)  # eight slots are padded, and then decoded over
    assert found.shape == wanted.shape == (56, 512)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(rows_of(stages_of(folder, pad=3), ids, 40), found)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_answers_are_pytorch_s_up_to_the_last_slot(
    model_type: str, exported: Exports, torch_model: Callable[..., Reference]
) -> None:
    opened, wanted = sessions.open_package(exported(model_type)), torch_model(model_type)
    endless = replace(opened, config={"model": {**opened.config["model"], "eos_token_id": []}})
    unending = replace(wanted, eos=())
    for length, seed in ((97, 1), (111, 2), (112, 3)):
        prompt = ids_of(length, seed)
        assert opened.padded(length) == 112
        assert generate.room(opened, length, 1000) == 16
        answer = list(generate.stream(endless, prompt, 1000))
        assert len(set(answer)) > 3
        assert answer == unending.greedy(prompt, 16)[0]


@pytest.mark.parametrize("length", [113, 127, 128, 129, 1000])
def test_a_prompt_whose_windows_fill_the_context_is_refused_before_the_runtime_sees_it(
    length: int, exported: Exports
) -> None:
    """The runtime would end the process."""
    opened = sessions.open_package(exported("qwen2"))
    with pytest.raises(UsageError, match=f"the prompt has {length} tokens; the context holds 128"):
        list(generate.stream(opened, ids_of(length, 1), 1))


def test_a_context_that_a_recipe_shortened_ends_where_it_says(exported: Exports) -> None:
    opened = sessions.open_package(exported("qwen2"))
    short = replace(opened, config={"model": {**opened.config["model"], "context_length": 100, "eos_token_id": []}})
    assert len(list(generate.stream(short, ids_of(90, 1), 1000))) == 4
    with pytest.raises(UsageError, match="the context holds 100"):
        generate.check_prompt(short, ids_of(97, 1))


@pytest.mark.parametrize("place", [0, 7, 16, 19])
def test_the_id_that_fills_up_windows_is_refused_in_a_prompt(place: int, exported: Exports) -> None:
    """The runtime would take it for the end of the prompt, and compute something else without a word."""
    opened = sessions.open_package(exported("qwen2"))
    prompt = ids_of(20, 1)
    generate.check_prompt(opened, prompt)
    prompt[place] = opened.config["model"]["pad_token_id"]
    with pytest.raises(UsageError, match="the id that the runtime fills up windows with"):
        list(generate.stream(opened, prompt, 1))


def dynamic(opened: Session) -> Session:
    decoder = {key: value for key, value in opened.config["model"]["decoder"].items() if key != "sliding_window"}
    return replace(opened, config={"model": {**opened.config["model"], "decoder": decoder}})


def test_models_without_windows_take_that_id_and_pad_nothing(exported: Exports) -> None:
    opened = dynamic(sessions.open_package(exported("qwen2")))
    generate.check_prompt(opened, [PAD])
    assert (opened.window, opened.padded(17)) == (1, 17)


@pytest.mark.parametrize("name", ["prefill", "head"])
def test_another_number_of_tokens_changes_declared_shapes_only(name: str, exported: Exports) -> None:
    folder = exported("qwen3")
    wide = graph.load(folder / f"{name}.onnx")
    width = WINDOW if name == "prefill" else 1
    other = static_decoder.with_tokens(wide, 5)
    assert static_decoder.with_tokens(other, width) == wide
    changed = {}
    for before, after in zip(
        (*wide.graph.input, *wide.graph.output), (*other.graph.input, *other.graph.output), strict=True
    ):
        dims = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (before, after)]
        after.type.tensor_type.shape.CopyFrom(before.type.tensor_type.shape)
        assert before == after
        assert 5 in dims[1] or before.name.startswith("past_key_values.")
        changed[before.name] = [pair for pair in zip(*dims, strict=True) if len(set(pair)) > 1]
    assert other == wide
    assert changed.pop("mask", None) == ([(WINDOW, 5), (CACHE + WINDOW, CACHE + 5)] if name == "prefill" else None)
    for value, pairs in changed.items():
        assert pairs == ([] if value.startswith("past_key_values.") else [(width, 5)])


def test_prefill_and_decode_are_one_graph_over_one_file(exported: Exports) -> None:
    folder = exported("qwen2")
    prefill, decode = (graph.load(folder / f"{name}.onnx") for name in ("prefill", "decode"))
    assert static_decoder.with_tokens(prefill, 1) == decode
    held = {entry.value for tensor in prefill.graph.initializer for entry in tensor.external_data[:1]}
    assert held == {"layers.data"}
    for name in static_export.STAGES:
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)


def changed(loaded: Reference, **settings: Any) -> Reference:
    """A model of the same class with fresh weights and other settings."""
    config = type(loaded.model.config)(**{**loaded.model.config.to_dict(), "layer_types": None, **settings})
    model = type(loaded.model)(config).eval()
    model.generation_config = loaded.model.generation_config
    return replace(loaded, model=model)


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "attention in a sliding window": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "a layer has sliding-window attention",
    ),
    "YaRN": ({"rope_scaling": {"rope_type": "yarn", **YARN}}, "rotary embeddings are scaled: .*yarn"),
    "YaRN as older files spell it": ({"rope_scaling": {"type": "yarn", **YARN}}, "rotary embeddings are scaled"),
    "linear scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary embeddings are scaled"),
    "another activation": ({"hidden_act": "gelu"}, "the activation is gelu"),
    "no id to spare": ({"vocab_size": 449}, "the vocabulary's last id, 448, is a token"),
}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graphs_have_not_is_refused_before_anything_is_written(
    case: str, model_type: str, torch_model: Callable[..., Reference], tmp_path: Path
) -> None:
    settings, reason = REFUSED[case]
    loaded = torch_model(model_type)
    if "vocab_size" in settings:
        settings = {"vocab_size": len(loaded.tokenizer)}
        reason = re.sub(r"\d+", str(len(loaded.tokenizer) - 1), reason)
    with pytest.raises(StageError, match="no static graphs can be written of this checkpoint") as caught:
        static_export.export(changed(loaded, **settings), tmp_path, WINDOW, CACHE)
    assert re.search(reason, caught.value.why)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_windows_do_not_fill_is_refused(torch_model: Callable[..., Reference], tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        static_export.export(torch_model("qwen2"), tmp_path, 16, 120)
    assert "a cache of 120 slots is no multiple of the window of 16 tokens" in caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_biases_of_all_projections_of_attention_are_in_the_graph(
    torch_model: Callable[..., Reference], tmp_path: Path
) -> None:
    import torch

    loaded = changed(torch_model("qwen3"), attention_bias=True)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            parameter.normal_(0.0, 1.0 if name.endswith("bias") else 0.2)
    ids = ids_of(24, 3)
    found = rows_of(stages_of(written(loaded, tmp_path)), ids, 20)
    np.testing.assert_allclose(found, loaded.logits(ids), rtol=0, atol=1e-3)


@pytest.mark.parametrize("length", [90, 112])
def test_an_answer_that_reached_the_end_of_the_context_can_be_replayed(
    length: int, exported: Exports, torch_model: Callable[..., Reference]
) -> None:
    opened, prompt = sessions.open_package(exported("qwen2")), ids_of(length, 5)
    tokens = ids_of(generate.room(opened, length, 1000), 6)
    _, logprobs = replay.scores(opened.model, prompt, tokens, opened.window)
    rows = metrics.log_softmax(torch_model("qwen2").logits(prompt + tokens))[length - 1 : -1]
    np.testing.assert_allclose(logprobs, rows[np.arange(len(tokens)), tokens], rtol=0, atol=1e-3)
