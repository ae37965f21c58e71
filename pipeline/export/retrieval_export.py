"""From a decoder's graph to one that embeds texts, or scores a query and a document: one call, no cache.

Pooling and normalization are in the graph, so that nobody can get them wrong; texts of a batch may be padded on either
side.

Shapes in this module:
    B: texts, S: tokens of the longest, H: hidden size, L: labels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import StageError
from pipeline.facts.family import read_shape
from pipeline.graph import edits as graph
from pipeline.graph.external_data import read_tensor
from pipeline.package.retrieval_config import CONFIG
from pipeline.runtime import chat
from pipeline.task import Task

if TYPE_CHECKING:
    import onnx

_PREFIX = "/retrieval"
_SMALLEST = 1e-12  # a length that is divided by, as torch.nn.functional.normalize has it


def write_config(task: Task, checkpoint: Path, out_dir: Path) -> dict[str, Any]:
    """Write what running a package needs besides its graph and tokenizer; returns it.

    Raises:
        StageError: the tokenizer has no tokens for the task's labels.
    """
    tokenizer = chat.load(checkpoint)
    shape = read_shape(json.loads((checkpoint / "config.json").read_bytes()), "config.json")
    labels = {label: tokenizer.trusted.token_to_id(label) for label in task.labels}
    if absent := [label for label, token in labels.items() if token is None]:
        raise StageError(
            f"the checkpoint cannot {task.name}",
            where="task",
            why=f"its tokenizer has no token for {' and '.join(absent)}, whose logits are the score",
            fix="use a checkpoint that was trained for it",
        )
    config = {
        "task": task.name,
        "filename": "model.onnx",
        "output": task.output,
        "context_length": shape.context,
        "dimensions": len(labels) or shape.hidden,
        "labels": labels,
        "before": tokenizer.encode(task.before),
        "after": tokenizer.encode(task.after),
        "forms": dict(task.forms),
        "instruction": task.instruction,
    }
    (out_dir / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return config


def pool(model: onnx.ModelProto, folder: Path, output: str, labels: Sequence[int]) -> None:
    """Turn a decoder with a cache into a graph from ``input_ids`` and ``attention_mask`` (``[B, S]``) to one output.

    Args:
        model: as the genai builder writes it, in float32; edited in place. Its external data lies in ``folder``.
        output: the name of the output: with labels their logits ``[B, L]``, else the last hidden state of each text,
            normalized to length 1, ``[B, H]``.
        labels: ids of tokens.

    Raises:
        StageError: the graph is another one.
    """
    head = next((node for node in model.graph.node if "logits" in node.output and node.op_type == "MatMul"), None)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    if head is None or not attention:
        raise StageError("the graph cannot be pooled", why="it has no head, or no attention of the genai builder")
    hidden, weight = head.input
    model.graph.node.remove(head)
    _without_cache(model, attention)
    edit = _Edit(model)
    _take_padding_from_the_left(edit, attention)
    edit.at_the_end()
    position = edit.add("Unsqueeze", [f"{_PREFIX}/last", edit.constant("axis", np.array([1]))], "position")
    last = edit.add("GatherND", [hidden, position], "pooled", batch_dims=1)
    if labels:
        values = read_tensor(next(t for t in model.graph.initializer if t.name == weight), folder)
        rows = edit.constant("rows", np.ascontiguousarray(values[:, list(labels)], np.float32))
        edit.add("Gemm", [last, rows], "labels", output)
    else:
        length = edit.add("ReduceL2", [last, edit.constant("channels", np.array([-1]))], "length", keepdims=1)
        divisor = edit.add("Max", [length, edit.constant("least", np.float32(_SMALLEST))], "divisor")
        edit.add("Div", [last, divisor], "normalized", output)
    _declare(model, output, len(labels) or _hidden(model))
    _drop_unused(model)


def _without_cache(model: onnx.ModelProto, attention: Sequence[onnx.NodeProto]) -> None:
    """Attend to the given tokens alone; the operator takes no cache for an empty one."""
    for node in attention:
        node.input[3] = node.input[4] = ""
    for values in (model.graph.input, model.graph.output):
        for value in [value for value in values if value.name.startswith(("past_key_values.", "present."))]:
            values.remove(value)


class _Edit:
    """Adds nodes at the beginning of a graph, and then at its end; their names and outputs start with a prefix."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._at: int | None = 0

    def at_the_end(self) -> None:
        self._at = None

    def constant(self, name: str, value: Any) -> str:
        import onnx

        full = f"{_PREFIX}/{name}"
        self.model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), full))
        return full

    def add(self, operator: str, inputs: Sequence[str], name: str, output: str = "", **attributes: Any) -> str:
        """Add a node; returns its output, below the prefix unless another name is given."""
        import onnx

        output = output or f"{_PREFIX}/{name}"
        node = onnx.helper.make_node(operator, inputs, [output], name=f"{_PREFIX}/{name}/{operator}", **attributes)
        nodes = self.model.graph.node
        nodes.insert(len(nodes) if self._at is None else self._at, node)
        self._at = None if self._at is None else self._at + 1
        return output


def _take_padding_from_the_left(edit: _Edit, attention: Sequence[onnx.NodeProto]) -> None:
    """Turn each row of ids until it begins with its first token: the attention operator takes padding on the right.

    ``{_PREFIX}/last`` is the place of each row's last token then, ``[B]``; a row without tokens counts as one of one.
    """
    import onnx

    model = edit.model
    readers = [node for node in model.graph.node if "input_ids" in node.input]
    one, axis = edit.constant("one", np.array(1)), edit.constant("tokens", np.array([1]))
    count = edit.add("ReduceSum", ["attention_mask", axis], "count", keepdims=0)
    last = edit.add("Sub", [edit.add("Max", [count, one], "counted"), one], "last")
    seen = edit.add("Cast", [last], "seen", to=onnx.TensorProto.INT32)
    mask = edit.add("Cast", ["attention_mask"], "mask", to=onnx.TensorProto.INT32)
    first = edit.add("ArgMax", [mask], "first", axis=1, keepdims=1)
    size = edit.add("Gather", [edit.add("Shape", ["attention_mask"], "shape"), one], "size", axis=0)
    places = edit.add("Range", [edit.constant("zero", np.array(0)), size, one], "places")
    turned = edit.add("Mod", [edit.add("Add", [places, first], "moved"), size], "turned")
    ids = edit.add("GatherElements", ["input_ids", turned], "ids", axis=1)
    for node in readers:
        node.input[:] = [ids if name == "input_ids" else name for name in node.input]
    for node in attention:
        node.input[5] = seen


def _declare(model: onnx.ModelProto, output: str, columns: int) -> None:
    import onnx

    del model.graph.output[:]
    kind = onnx.TensorProto.FLOAT
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, kind, ["batch_size", columns]))
    for value in model.graph.input:  # without a cache, what is attended to is what is given
        value.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    del model.graph.value_info[:]


def _hidden(model: onnx.ModelProto) -> int:
    return next(weight.columns for weight in graph.weights(model) if weight.role == "embedding")


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes that nothing reads, such as the head of the whole vocabulary."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
