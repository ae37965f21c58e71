"""A Qwen decoder as a graph of ONNX Runtime's fused operators, written one weight at a time.

It is the graph that the genai builder writes of the architectures it knows; this module reads a checkpoint tensor by
tensor, so that a model need not fit into memory, and takes what the builder refuses.

Shapes in this module:
    B: batch, S: tokens of a call, P: tokens in the cache, H: hidden size, A: attention heads, K: key-value heads,
    D: head size, V: vocabulary, L: layers that features are added to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.export import expert_graph
from pipeline.export.expert_graph import Mixture
from pipeline.facts import positions
from pipeline.graph.builder import MICROSOFT, GraphBuilder

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.checkpoint.tensors import Tensors
    from pipeline.graph.external_data import ExternalDataWriter

OPSET = 21
_FLOAT, _INT32 = 1, 6  # of onnx.TensorProto, without the import


@dataclass(frozen=True)
class Sizes:
    """What the graph depends on; ``rotary`` are the ``[D / 2]`` frequencies, ``amplitude`` scales their cosines."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    tied: bool
    rotary: npt.NDArray[np.float32]
    amplitude: float
    mixture: Mixture | None


@dataclass(frozen=True)
class Embedded:
    """A decoder that is given embeddings: what a model that sees or hears makes of its tokens, images and sounds.

    Attributes:
        sections: how many of the ``D / 2`` rotary frequencies turn with a token's place in time, down and across, in
            that order; the decoder then takes ``position_ids``. Empty: it counts positions itself, as of text.
        interleaved: whether the frequencies of the three take turns, as in Qwen3-VL; else each has a run of them.
        layers: ``L``, how many of the first layers have features of an image added to what they return.
    """

    sections: tuple[int, ...] = ()
    interleaved: bool = False
    layers: int = 0

    def axes(self, frequencies: int) -> npt.NDArray[np.int64]:
        """For each rotary frequency the position that it turns with: 0 time, 1 down, 2 across.

        Raises:
            ValueError: the sections are not of so many frequencies.
        """
        if len(self.sections) != 3 or sum(self.sections) != frequencies:
            raise ValueError(f"{frequencies} rotary frequencies are in sections of {list(self.sections)}")
        if not self.interleaved:
            return np.repeat(np.arange(3), self.sections)
        found = np.zeros(frequencies, np.int64)
        for axis in (1, 2):
            found[axis : 3 * self.sections[axis] : 3] = axis
        return found


def sizes_of(config: Any) -> Sizes:
    """The sizes of a transformers text configuration.

    Raises:
        ValueError: the model has something that this module does not write.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError("a layer has sliding-window attention")
    if getattr(config, "use_sliding_window", False) and not getattr(config, "layer_types", None):
        raise ValueError("layers have sliding-window attention")
    if config.hidden_act != "silu":
        raise ValueError(f"the activation is {config.hidden_act}")
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "default" if kind == "mrope" else kind
    if kind not in ROPE_INIT_FUNCTIONS or kind in ("dynamic", "longrope"):
        raise ValueError(f"rotary embeddings of type {kind} depend on the length of the text")
    frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return Sizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        context=positions.read(config.to_dict(), config.max_position_embeddings, "config.json").context,
        epsilon=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        rotary=frequencies.float().numpy(),
        amplitude=float(amplitude),
        mixture=expert_graph.mixture_of(config),
    )


def write(
    config: Any,
    tensors: Tensors,
    writer: ExternalDataWriter,
    dtype: type = np.float32,
    prefix: str = "model",
    head: str = "lm_head",
    embedded: Embedded | None = None,
    fused_experts: bool = True,
) -> onnx.ModelProto:
    """The whole decoder.

    Inputs: ``input_ids`` and ``attention_mask`` int64 ``[B, S]`` and ``[B, P + S]``; ``past_key_values.N.key`` and
    ``.value`` ``[B, K, P, D]``, keys rotated. Outputs: ``logits`` ``[B, S, V]``; ``present.N.key`` and ``.value``.

    With ``embedded``, ``inputs_embeds`` ``[B, S, (1 + L) H]`` instead of ``input_ids``: embeddings, then what each of
    the first ``L`` layers has added. With sections also ``position_ids`` int64 ``[3, B, S]``.

    Args:
        config: transformers' configuration of the text model.
        tensors: of the checkpoint, by their names in transformers.
        writer: takes the weights.
        dtype: of weights and activations: float32 or float16.
        prefix: of the decoder's own tensors.
        head: the module of the head, where it is not the embedding.
        embedded: the decoder is given embeddings.
        fused_experts: whether a mixture of experts is one operator, see `pipeline.export.expert_graph`.

    Raises:
        ValueError: the model has something that this module does not write.
    """
    return _Writer(
        sizes_of(config), tensors, GraphBuilder(writer), dtype, prefix, head, embedded, fused_experts
    ).model()


class _Writer:
    """Writes one decoder; methods return the names of values."""

    def __init__(
        self,
        sizes: Sizes,
        tensors: Tensors,
        g: GraphBuilder,
        dtype: type,
        prefix: str,
        head: str,
        embedded: Embedded | None,
        fused_experts: bool,
    ) -> None:
        self.s, self.tensors, self.g, self.dtype, self.prefix = sizes, tensors, g, dtype, prefix
        self.head, self.embedded, self.fused_experts = head, embedded, fused_experts

    def model(self) -> onnx.ModelProto:
        g, s = self.g, self.s
        x, *features = self._embeddings()
        mask = g.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])
        lengths = self._lengths(mask)
        rotary = self._rotary_of_positions() if self._has_positions else self._rotary_tables()
        added = ""
        for index in range(s.layers):
            path, name = f"{self.prefix}.layers.{index}", f"/model/layers.{index}"
            normed, x = self._norm(x, added, f"{path}.input_layernorm", f"{name}/input_layernorm")
            attended = self._attention(normed, index, lengths, rotary)
            normed, x = self._norm(x, attended, f"{path}.post_attention_layernorm", f"{name}/post_attention_layernorm")
            mixed = s.mixture is not None and index in s.mixture.layers
            added = (self._mixture if mixed else self._mlp)(normed, f"{path}.mlp", f"{name}/mlp")
            if index < len(features):
                added = g.node("Add", [added, features[index]], f"{name}/features")
        normed, _ = self._norm(x, added, f"{self.prefix}.norm", "/model/norm")
        head = f"{self.prefix}.embed_tokens" if s.tied else self.head
        weight = g.constant("lm_head.MatMul.weight", self._values(f"{head}.weight").T)
        g.node("MatMul", [normed, weight], "/lm_head", ["logits"])
        g.output("logits", self.dtype, ["batch_size", "sequence_length", s.vocabulary])
        for index in range(s.layers):
            for kind in ("key", "value"):
                shape: list[int | str] = ["batch_size", s.kv_heads, "total_sequence_length", s.head_dim]
                g.output(f"present.{index}.{kind}", self.dtype, shape)
        return g.model("decoder", OPSET)

    @property
    def _has_positions(self) -> bool:
        return self.embedded is not None and bool(self.embedded.sections)

    def _embeddings(self) -> list[str]:
        """The embeddings ``[B, S, H]``, and what is added to the results of the first layers, ``[B, S, H]`` each."""
        g, hidden = self.g, self.s.hidden
        rows: list[int | str] = ["batch_size", "sequence_length"]
        if self.embedded is None:
            ids = g.input("input_ids", np.int64, rows)
            table = g.constant("model.embed_tokens.weight", self._values(f"{self.prefix}.embed_tokens.weight"))
            return [g.node("Gather", [table, ids], "/model/embed_tokens")]
        count = 1 + self.embedded.layers
        if count > self.s.layers:
            raise ValueError(f"{self.embedded.layers} of {self.s.layers} layers have features added")
        given = g.input("inputs_embeds", self.dtype, [*rows, count * hidden])
        if count == 1:
            return [given]
        name = "/model/inputs_embeds"
        parts = [name, *(f"/model/layers.{index}/added" for index in range(count - 1))]
        g.node("Split", [given, g.ints(*[hidden] * count)], name, parts, axis=-1)
        return parts

    def _lengths(self, mask: str) -> list[str]:
        """The int32 inputs of attention: tokens of each row less one ``[B]``, and of the longest."""
        g, name = self.g, "/model/lengths"
        count = g.node("ReduceSum", [mask, g.ints(1)], f"{name}/count", keepdims=0)
        last = g.node("Sub", [count, g.ints(1)], f"{name}/last")
        longest = g.node(
            "Gather", [g.node("Shape", [mask], f"{name}/shape"), g.constant("one", np.array(1))], f"{name}/longest"
        )
        return [g.node("Cast", [value], f"{value}/int32", to=_INT32) for value in (last, longest)]

    def _rotary_tables(self) -> list[str]:
        """Cosines and sines ``[context, D / 2]``, which the runtime computes when it loads the model."""
        g, name = self.g, "/model/rotary"
        bounds = [
            g.constant(f"{name}/{key}", np.array(value, np.float32))
            for key, value in (("start", 0), ("limit", self.s.context), ("delta", 1))
        ]
        positions = g.node("Range", bounds, f"{name}/positions")
        column = g.node("Unsqueeze", [positions, g.ints(1)], f"{name}/column")
        angles = g.node("Mul", [column, self._frequencies()], f"{name}/angles")
        return self._cosines_and_sines(angles)

    def _rotary_of_positions(self) -> list[str]:
        """The int64 row ``[B, S]`` of each token in the tables, and the tables: cosines, sines ``[B S, D / 2]``."""
        assert self.embedded is not None
        g, name = self.g, "/model/rotary"
        axes = g.constant(f"{name}/axes", self.embedded.axes(len(self.s.rotary)))
        given = g.input("position_ids", np.int64, [3, "batch_size", "sequence_length"])
        last = g.node("Transpose", [given], f"{name}/last", perm=[1, 2, 0])
        flat = g.node("Reshape", [last, g.ints(-1, 3)], f"{name}/flat")
        positions = g.node("Cast", [flat], f"{name}/positions", to=_FLOAT)
        turned = g.node("Gather", [positions, axes], f"{name}/turned", axis=-1)
        angles = g.node("Mul", [turned, self._frequencies()], f"{name}/angles")
        shape = g.node("Shape", [given], f"{name}/shape", start=1)
        count = g.node("ReduceProd", [shape], f"{name}/count", keepdims=0)
        zero, one = (g.constant(f"{name}/{key}", np.array(value)) for key, value in (("zero", 0), ("one", 1)))
        rows = g.node("Reshape", [g.node("Range", [zero, count, one], f"{name}/range"), shape], f"{name}/rows")
        return [rows, *self._cosines_and_sines(angles)]

    def _frequencies(self) -> str:
        return self.g.constant("/model/rotary/frequencies", self.s.rotary[None])

    def _cosines_and_sines(self, angles: str) -> list[str]:
        g, name = self.g, "/model/rotary"
        tables = [g.node(function, [angles], f"{name}/{function.lower()}") for function in ("Cos", "Sin")]
        if self.s.amplitude != 1.0:
            amplitude = g.constant(f"{name}/amplitude", np.array(self.s.amplitude, np.float32))
            tables = [g.node("Mul", [table, amplitude], f"{table}/scaled") for table in tables]
        return [self._cast(table, f"{key}_cache") for table, key in zip(tables, ("cos", "sin"), strict=True)]

    def _attention(self, normed: str, index: int, lengths: list[str], rotary: list[str]) -> str:
        g, s = self.g, self.s
        path, name = f"{self.prefix}.layers.{index}.self_attn", f"/model/layers.{index}/attn"
        projected = self._linear(normed, [f"{path}.{kind}_proj" for kind in "qkv"], f"{name}/qkv_proj")
        queries, keys, values = projected, "", ""
        normed_heads = f"{path}.q_norm.weight" in self.tensors
        if normed_heads or self._has_positions:
            widths = [s.heads * s.head_dim, *[s.kv_heads * s.head_dim] * 2]
            queries, keys, values = parts = [f"{name}/{kind}" for kind in "qkv"]
            g.node("Split", [projected, g.ints(*widths)], f"{name}/split", parts, axis=-1)
            if normed_heads:
                queries, keys = (
                    self._normed_heads(part, f"{path}.{kind}_norm", width, f"{name}/{kind}_norm")
                    for part, kind, width in zip(parts, "qk", widths, strict=False)
                )
        if self._has_positions:
            queries, keys = (
                g.node("RotaryEmbedding", [part, *rotary], f"{name}/{kind}_rotary", domain=MICROSOFT)
                for part, kind in ((queries, "q"), (keys, "k"))
            )
        past = [
            g.input(
                f"past_key_values.{index}.{kind}",
                self.dtype,
                ["batch_size", s.kv_heads, "past_sequence_length", s.head_dim],
            )
            for kind in ("key", "value")
        ]
        mixed = g.node(
            "GroupQueryAttention",
            [queries, keys, values, *past, *lengths, *([] if self._has_positions else rotary)],
            name,
            [f"{name}/mixed", f"present.{index}.key", f"present.{index}.value"],
            domain=MICROSOFT,
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            scale=s.head_dim**-0.5,
            do_rotary=int(not self._has_positions),
        )
        return self._linear(mixed, [f"{path}.o_proj"], f"{name}/o_proj")

    def _normed_heads(self, x: str, path: str, width: int, name: str) -> str:
        """``[B, S, heads * D]`` with each head normalized."""
        g = self.g
        rows = g.node("Reshape", [x, g.ints(0, -1, self.s.head_dim)], f"{name}/heads")
        normed, _ = self._norm(rows, "", path, name)
        return g.node("Reshape", [normed, g.ints(0, -1, width)], f"{name}/rows")

    def _mlp(self, normed: str, path: str, name: str) -> str:
        gate, up = (self._linear(normed, [f"{path}.{kind}_proj"], f"{name}/{kind}_proj") for kind in ("gate", "up"))
        return self._linear(self._gated(gate, up, name), [f"{path}.down_proj"], f"{name}/down_proj")

    def _mixture(self, normed: str, path: str, name: str) -> str:
        g, mixture = self.g, self.s.mixture
        assert mixture is not None
        shared = ""
        if mixture.shared:
            shared = self._mlp(normed, f"{path}.shared_expert", f"{name}/shared_expert")
            gate = self._linear(normed, [f"{path}.shared_expert_gate"], f"{name}/shared_expert_gate")
            shared = g.node("Mul", [shared, g.node("Sigmoid", [gate], f"{gate}/sigmoid")], f"{name}/shared")
        logits = self._linear(normed, [f"{path}.gate"], f"{name}/gate")
        given = (g, mixture, normed, logits, f"{path}.experts", f"{name}/experts")
        if self.fused_experts:
            y = expert_graph.fused(*given, self._values, self.dtype)
        else:
            y = expert_graph.dense(*given, self._mlp, self.dtype)
        return g.node("Add", [y, shared], f"{name}/sum") if shared else y

    def _gated(self, gate: str, up: str, name: str) -> str:
        g = self.g
        gate = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{name}/sigmoid")], f"{name}/silu")
        return g.node("Mul", [gate, up], f"{name}/gated")

    def _linear(self, x: str, paths: list[str], name: str) -> str:
        """``x`` times the weights of the modules at ``paths``, side by side, plus their biases if they have any."""
        weight = np.concatenate([self._values(f"{path}.weight") for path in paths])
        constant = self.g.constant(f"{name[1:].replace('/', '.')}.MatMul.weight", weight.T)
        y = self.g.node("MatMul", [x, constant], name)
        if f"{paths[0]}.bias" not in self.tensors:
            return y
        bias = np.concatenate([self._values(f"{path}.bias") for path in paths])
        constant = self.g.constant(f"{name[1:].replace('/', '.')}.Add.bias", bias)
        return self.g.node("Add", [y, constant], f"{name}/biased")

    def _norm(self, x: str, added: str, path: str, name: str) -> tuple[str, str]:
        """The RMS norm of ``x + added``, and that sum; of ``x`` where nothing is added."""
        gain = self.g.constant(f"{name[1:].replace('/', '.')}.weight", self._values(f"{path}.weight"))
        if not added:
            normed = self.g.node(
                "SimplifiedLayerNormalization", [x, gain], name, axis=-1, epsilon=self.s.epsilon, stash_type=1
            )
            return normed, x
        total = f"{name}/sum"
        normed = self.g.node(
            "SkipSimplifiedLayerNormalization",
            [x, added, gain],
            name,
            [name, "", "", total],
            domain=MICROSOFT,
            epsilon=self.s.epsilon,
        )
        return normed, total

    def _cast(self, x: str, name: str) -> str:
        import onnx

        return self.g.node("Cast", [x], name, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))

    def _values(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self.tensors.read(name).numpy().astype(self.dtype, copy=False)
        return values
