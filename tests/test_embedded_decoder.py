"""The decoder that is given embeddings and positions of three dimensions, against the text models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.checkpoint.tensors import Tensors
from pipeline.export import decoder_graph
from pipeline.export.decoder_graph import Embedded
from pipeline.graph.external_data import ExternalDataWriter

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def _text_model(name: str) -> tuple[Any, Embedded]:
    import transformers

    if name == "Qwen3VL":
        config = transformers.Qwen3VLConfig(
            text_config=SIZES
            | {
                "head_dim": 32,
                "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            }
        ).text_config
        return transformers.Qwen3VLTextModel(config), Embedded((6, 5, 5), interleaved=True, layers=2)
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(text_config=SIZES | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}})
    return getattr(transformers, f"{name}TextModel")(config.text_config), Embedded((2, 3, 3))


def _save(model: Any, folder: Path) -> Any:
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
    head = torch.randn(model.config.vocab_size, model.config.hidden_size) * 0.3
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    return head


def _run(folder: Path, config: Any, embedded: Embedded, feeds: dict[str, np.ndarray], calls: list[slice]) -> np.ndarray:
    """Logits ``[1, S, V]`` of the graph, which is given some of the tokens at each call."""
    import onnx
    import onnxruntime

    with ExternalDataWriter(folder / "model.onnx.data") as writer:
        graph = decoder_graph.write(config, Tensors(folder), writer, embedded=embedded)
    onnx.save(graph, str(folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    past = {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    found = []
    for part in calls:
        given = {
            name: value[..., part, :] if value.ndim == 3 and value.dtype == np.float32 else value[..., part]
            for name, value in feeds.items()
        }
        mask = np.ones((1, part.stop), np.int64)
        logits, *present = session.run(None, {**given, "attention_mask": mask, **past})
        past = dict(zip(past, present, strict=True))
        found.append(logits)
    return np.concatenate(found, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_logits_are_the_text_models(name: str, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model, embedded = _text_model(name)
    head = _save(model.eval(), tmp_path)
    tokens, seen = 24, np.zeros((1, 24), bool)
    seen[0, 4:10] = True
    embeddings = torch.randn(1, tokens, 64)
    positions = torch.randint(0, 40, (3, 1, tokens))
    features = [torch.randn(6, 64) for _ in range(embedded.layers)]
    deep = {"visual_pos_masks": torch.from_numpy(seen), "deepstack_visual_embeds": features} if features else {}
    with torch.no_grad():
        # The first of four rows of positions is the mask's, so that it does not take an image for a packed batch.
        counted = torch.arange(tokens).reshape(1, 1, tokens)
        given = torch.cat([counted, positions])
        hidden = model(inputs_embeds=embeddings, position_ids=given, **deep).last_hidden_state
    wide = np.zeros((1, tokens, 64 * (1 + len(features))), np.float32)
    wide[..., :64] = embeddings.numpy()
    for index, values in enumerate(features):
        wide[seen, 64 * (index + 1) : 64 * (index + 2)] = values.numpy()
    calls = [slice(0, 16), *(slice(index, index + 1) for index in range(16, tokens))]
    model.config.head_dim = getattr(model.config, "head_dim", 16)
    found = _run(tmp_path, model.config, embedded, {"inputs_embeds": wide, "position_ids": positions.numpy()}, calls)
    assert np.abs(found - (hidden @ head.T).numpy()).max() < 1e-4


@pytest.mark.slow
def test_without_sections_positions_are_counted(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen2Model(transformers.Qwen2Config(**SIZES)).eval()
    head = _save(model, tmp_path)
    embeddings = torch.randn(1, 12, 64)
    with torch.no_grad():
        wanted = model(inputs_embeds=embeddings).last_hidden_state @ head.T
    model.config.head_dim = 16
    calls = [slice(0, 9), slice(9, 10), slice(10, 12)]
    found = _run(tmp_path, model.config, Embedded(), {"inputs_embeds": embeddings.numpy()}, calls)
    assert np.abs(found - wanted.numpy()).max() < 1e-4


def test_each_frequency_has_its_axis() -> None:
    assert Embedded((2, 3, 3)).axes(8).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    # The published sections of Qwen3-VL: turns are taken for 60 frequencies, time has the last four.
    published = Embedded((24, 20, 20), interleaved=True).axes(64).tolist()
    assert published == [0, 1, 2] * 20 + [0] * 4
    for wrong in ((2, 3, 4), (4, 4), (8,)):
        with pytest.raises(ValueError, match="sections of"):
            Embedded(wrong).axes(8)
