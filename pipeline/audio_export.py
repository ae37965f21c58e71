"""From a Qwen2-Audio checkpoint to graphs that the runtime can serve: decoder, embedding, audio tower.

onnxruntime-genai 0.14.1 has no type of its own for Qwen2-Audio. Its type ``phi4mm`` runs a vision tower, an audio
tower, an embedding and a decoder one after the other, and takes prepared tensors as well as files: with them, and with
nothing in the vision tower, it computes what Qwen2-Audio is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import audio_graph, audio_tower, decoder_graph, exporter, graph
from pipeline.errors import StageError
from pipeline.external_data import ExternalDataWriter
from pipeline.tensors import Tensors

if TYPE_CHECKING:
    import onnx

NO_VISION = "vision.onnx"
"""What no quantization touches."""


def export(checkpoint: Path, out_dir: Path, dtype: str) -> onnx.ModelProto:
    """Write all graphs but the decoder's, all weights (float32, one in memory at a time) and ``genai_config.json``.

    Returns:
        the decoder's graph, which is not saved yet.

    Raises:
        StageError: the model has something that the graphs have not, or other numbers than float32 are asked for.
        CheckpointError: the weights cannot be read.
    """
    import onnx
    from transformers import AutoConfig

    if dtype != "float32":
        raise StageError("models that hear are exported in float32", why=f"{dtype} was asked for")
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True).text_config
    tensors = Tensors(checkpoint)
    prefix = f"{audio_tower.PREFIX}model"
    settings, _ = exporter.read_settings(checkpoint)
    sizes = audio_tower.read(settings, str(checkpoint / "config.json"))
    with ExternalDataWriter(out_dir / "speech.onnx.data") as writer:
        made = audio_graph.tower(sizes, config.hidden_size, tensors, writer)
    onnx.save(made, str(out_dir / "speech.onnx"))
    onnx.save(audio_graph.no_vision(config.hidden_size), str(out_dir / NO_VISION))
    with ExternalDataWriter(out_dir / "embedding.onnx.data") as writer:
        table = tensors.read(f"{prefix}.embed_tokens.weight").numpy()
        onnx.save(audio_graph.embedding(table, sizes.token, writer), str(out_dir / "embedding.onnx"))
    with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        try:
            model = decoder_graph.write(
                config,
                tensors,
                writer,
                prefix=prefix,
                head=f"{audio_tower.PREFIX}lm_head",
                embedded=decoder_graph.Embedded(),
            )
        except ValueError as error:
            raise StageError("no graph can be written of this checkpoint", why=str(error)) from None
    written = _genai_config(checkpoint, model)
    (out_dir / "genai_config.json").write_text(json.dumps(written, indent=4), encoding="utf-8")
    return model


def _genai_config(checkpoint: Path, model: onnx.ModelProto) -> dict[str, Any]:
    inputs, _ = graph.interface(model)
    made = exporter.genai_config(*exporter.read_settings(checkpoint), inputs)
    made["search"]["past_present_share_buffer"] = True  # attention writes new keys and values into the cache
    images, sounds = "image_features", "audio_features"
    made["model"] |= {
        "vision": _section(NO_VISION, ("pixel_values",), images),
        "speech": _section("speech.onnx", ("audio_embeds", "audio_sizes"), sounds),
        "embedding": _section("embedding.onnx", ("input_ids", images, sounds), "inputs_embeds"),
    }
    return made


def _section(file: str, inputs: tuple[str, ...], output: str) -> dict[str, Any]:
    """One graph beside the decoder; the runtime knows its values by these names, and so do we."""
    return {"filename": file, "inputs": {name: name for name in inputs}, "outputs": {output: output}}
