"""What a Qwen2-Audio package has beside its decoder: the audio tower and the embedding.

onnxruntime-genai 0.14.1 has no type of its own for Qwen2-Audio. Its type ``phi4mm`` runs a vision tower, an audio
tower, an embedding and a decoder one after the other, and takes prepared tensors as well as files: with them, and with
nothing in the vision tower, it computes what Qwen2-Audio is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.tensors import Tensors
from pipeline.export import audio_graph, fusion_graph
from pipeline.facts.multimodal import Layout
from pipeline.graph.external_data import ExternalDataWriter
from pipeline.runtime.audio_tower import Tower

_VISION = "vision.onnx"
_IMAGES, _SOUNDS = "image_features", "audio_features"


def write(out_dir: Path, tower: Tower, hidden: int, tensors: Tensors, layout: Layout) -> None:
    """Write ``speech.onnx`` and ``embedding.onnx``, float32 with their data, and ``vision.onnx``.

    Args:
        hidden: size of the decoder.
        layout: of ``tensors``.
    """
    import onnx

    with ExternalDataWriter(out_dir / "speech.onnx.data") as writer:
        made = audio_graph.tower(tower, hidden, tensors, writer)
    onnx.save(made, str(out_dir / "speech.onnx"))
    onnx.save(audio_graph.no_vision(hidden), str(out_dir / _VISION))
    with ExternalDataWriter(out_dir / "embedding.onnx.data") as writer:
        table = tensors.read(f"{layout.text}.embed_tokens.weight").numpy()
        made = fusion_graph.write(table, tower.token, hidden, writer, _SOUNDS, (_IMAGES,))
    onnx.save(made, str(out_dir / "embedding.onnx"))


def configure(model: dict[str, Any]) -> None:
    """Complete the section ``model`` of a ``genai_config.json`` in place."""
    model |= {
        "vision": _section(_VISION, ("pixel_values",), _IMAGES),
        "speech": _section("speech.onnx", ("audio_embeds", "audio_sizes"), _SOUNDS),
        "embedding": _section("embedding.onnx", ("input_ids", _IMAGES, _SOUNDS), "inputs_embeds"),
    }


def _section(file: str, inputs: tuple[str, ...], output: str) -> dict[str, Any]:
    """One graph beside the decoder; the runtime knows its values by these names, and so do we."""
    return {"filename": file, "inputs": {name: name for name in inputs}, "outputs": {output: output}}
