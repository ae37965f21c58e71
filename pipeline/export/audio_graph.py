"""The audio tower of a model that hears, and what stands where its runtime looks for a vision tower.

Shapes in this module:
    C: clips, M: mel bins, F: frames, T: positions (F / 2), D: width of the tower, H: hidden size of the decoder,
    N: tokens of sound of all clips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.graph.builder import MICROSOFT, GraphBuilder

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.checkpoint.tensors import Tensors
    from pipeline.graph.external_data import ExternalDataWriter
    from pipeline.runtime.audio_tower import Tower

OPSET = 21
_EPSILON = 1e-5  # of transformers' layer norms
_FLOAT, _INT32 = 1, 6  # of onnx.TensorProto, without the import


def tower(sizes: Tower, hidden: int, tensors: Tensors, writer: ExternalDataWriter) -> onnx.ModelProto:
    """The tower and the projector: what the decoder is given in place of embeddings.

    Inputs: ``audio_embeds`` float32 ``[C, M, F]``, spectrograms; ``audio_sizes_frames`` int64 ``[C]``, how many frames
    of each are sound. Output: ``audio_features`` float32 ``[N, H]``, the tokens of the first clip, then of the next.
    Frames after a clip's own have no effect, so that F need not be the 3000 that transformers pads to.
    """
    return _Tower(sizes, hidden, tensors, GraphBuilder(writer)).model()


class _Tower:
    """Writes one tower; methods return the names of values."""

    def __init__(self, sizes: Tower, hidden: int, tensors: Tensors, g: GraphBuilder) -> None:
        self.s, self.hidden, self.tensors, self.g = sizes, hidden, tensors, g

    def model(self) -> onnx.ModelProto:
        g, s = self.g, self.s
        x = g.input("audio_embeds", np.float32, ["clips", s.bins, "frames"])
        frames = g.input("audio_sizes_frames", np.int64, ["clips"])
        x = self._convolution(x, "conv1", 1)
        x = self._convolution(x, "conv2", 2)
        x = g.node("Transpose", [x], "/audio_tower/rows", perm=[0, 2, 1])
        table = g.constant("audio_tower.embed_positions.weight", self._values("audio_tower.embed_positions.weight"))
        places = g.node(
            "Slice", [table, g.ints(0), self._length(x, "/audio_tower/length"), g.ints(0)], "/audio_tower/places"
        )
        x = g.node("Add", [x, places], "/audio_tower/placed")
        heard = self._halved(frames, "/audio_tower/heard", 1)
        mask = g.node("Cast", [self._before(x, heard, "/audio_tower/mask")], "/audio_tower/mask/int32", to=_INT32)
        for index in range(s.layers):
            x = self._layer(x, mask, f"audio_tower.layers.{index}")
        columns = g.node("Transpose", [x], "/audio_tower/columns", perm=[0, 2, 1])
        pooled = g.node("AveragePool", [columns], "/audio_tower/avg_pooler", kernel_shape=[2], strides=[2])
        x = g.node("Transpose", [pooled], "/audio_tower/pooled", perm=[0, 2, 1])
        x = self._norm(x, "audio_tower.layer_norm")
        x = self._linear(x, "multi_modal_projector.linear")
        kept = self._before(x, self._halved(heard, "/audio_tower/tokens", 0), "/audio_tower/kept")
        rows = g.node("Reshape", [x, g.ints(-1, self.hidden)], "/audio_tower/features")
        flat = g.node("Reshape", [kept, g.ints(-1)], "/audio_tower/flat")
        g.node("Compress", [rows, flat], "/audio_tower/compress", ["audio_features"], axis=0)
        g.output("audio_features", np.float32, ["tokens", self.hidden])
        return g.model("audio_tower", OPSET)

    def _convolution(self, x: str, module: str, stride: int) -> str:
        path = f"audio_tower.{module}"
        weights = [self.g.constant(f"{path}.{kind}", self._values(f"{path}.{kind}")) for kind in ("weight", "bias")]
        attributes: dict[str, Any] = {"kernel_shape": [3], "strides": [stride], "pads": [1, 1]}
        y = self.g.node("Conv", [x, *weights], _node(path), **attributes)
        return self.g.node("Gelu", [y], f"{_node(path)}/gelu")

    def _layer(self, x: str, mask: str, path: str) -> str:
        g, attention = self.g, f"{path}.self_attn"
        normed = self._norm(x, f"{path}.self_attn_layer_norm")
        projected = [self._linear(normed, f"{attention}.{kind}_proj") for kind in "qkv"]
        mixed = g.node(
            "MultiHeadAttention",
            [*projected, "", mask],
            _node(attention),
            domain=MICROSOFT,
            num_heads=self.s.heads,
            mask_filter_value=float(np.finfo(np.float32).min),
        )
        x = g.node("Add", [x, self._linear(mixed, f"{attention}.out_proj")], f"{_node(attention)}/added")
        inner = self._linear(self._norm(x, f"{path}.final_layer_norm"), f"{path}.fc1")
        inner = g.node("Gelu", [inner], f"{_node(path)}/gelu")
        return g.node("Add", [x, self._linear(inner, f"{path}.fc2")], f"{_node(path)}/added")

    def _norm(self, x: str, path: str) -> str:
        weights = [self.g.constant(f"{path}.{kind}", self._values(f"{path}.{kind}")) for kind in ("weight", "bias")]
        return self.g.node("LayerNormalization", [x, *weights], _node(path), axis=-1, epsilon=_EPSILON)

    def _linear(self, x: str, path: str) -> str:
        weight = self.g.constant(f"{path}.MatMul.weight", self._values(f"{path}.weight").T)
        y = self.g.node("MatMul", [x, weight], _node(path))
        if f"{path}.bias" not in self.tensors:
            return y
        bias = self.g.constant(f"{path}.bias", self._values(f"{path}.bias"))
        return self.g.node("Add", [y, bias], f"{_node(path)}/biased")

    def _length(self, x: str, name: str) -> str:
        """The second dimension of ``x``, int64 ``[1]``."""
        return self.g.node("Shape", [x], name, start=1, end=2)

    def _halved(self, counts: str, name: str, more: int) -> str:
        """``(counts + more) // 2``."""
        g = self.g
        total = g.node("Add", [counts, g.ints(more)], f"{name}/total") if more else counts
        return g.node("Div", [total, g.ints(2)], name)

    def _before(self, x: str, counts: str, name: str) -> str:
        """For each position of ``x`` ``[C, T, …]`` whether it is before its clip's count: bool ``[C, T]``."""
        g = self.g
        zero, one = (g.constant(key, np.array(value)) for key, value in (("zero", 0), ("one", 1)))
        length = g.node("Squeeze", [self._length(x, f"{name}/length")], f"{name}/limit")
        places = g.node("Range", [zero, length, one], f"{name}/places")
        column = g.node("Unsqueeze", [counts, g.ints(1)], f"{name}/column")
        return g.node("Less", [places, column], name)

    def _values(self, name: str) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self.tensors.read(name).numpy()
        return values


def _node(path: str) -> str:
    """Nodes are named after their modules, layers as one word: ``/audio_tower/layers.0/fc1``."""
    return "/" + path.replace(".", "/").replace("/layers/", "/layers.")


def no_vision(hidden: int) -> onnx.ModelProto:
    """What stands where the runtime's type of model has a vision tower: it gives back what it is given."""
    g = GraphBuilder()
    pixels = g.input("pixel_values", np.float32, ["images", hidden])
    g.node("Identity", [pixels], "/vision", ["image_features"])
    g.output("image_features", np.float32, ["images", hidden])
    return g.model("no_vision", OPSET)
