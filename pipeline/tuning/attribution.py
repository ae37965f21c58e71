"""Where a package loses what it loses: by weight, and by the runtime's arithmetic.

Each quantized weight is read back from the package and put into the reference alone; then all of them at once; then the
package itself runs. All on the same held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artifact import VALIDATION
from pipeline.bench import peers
from pipeline.builds.store import Store
from pipeline.checkpoint import reference
from pipeline.errors import StageError, UsageError
from pipeline.facts import texts
from pipeline.fidelity import metrics
from pipeline.graph import edits as graph
from pipeline.graph.external_data import read_tensor
from pipeline.quantization import blockwise, decoder
from pipeline.quantization.media_quantizer import EMBEDDING, TOWERS
from pipeline.runtime import generate, session
from pipeline.tuning import sensitivity

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.artifact import Progress

SCHEMA_VERSION = 1
_WINDOWS, _TOKENS = 4, 64


def attribute(package: Path, store: Store, progress: Progress) -> dict[str, Any]:
    """The content of ``NAME.attribution.json`` (`pipeline.documents.measured.Attribution`); losses in nats.

    Args:
        package: a verified package whose weights are block-quantized (``MatMulNBits``).
        store: holds the checkpoint that it was built from.

    Raises:
        UsageError: the store has not the checkpoint, or the package has no such weights.
        StageError: the evaluation text is too short for the tokenizer.
    """
    if (package / TOWERS["vision"]).is_file() and not (package / TOWERS["audio"]).is_file():
        raise UsageError(
            f"the losses of {package} cannot be told apart", why="that is done for models of text alone, and it sees"
        )
    # The decoder's, and an embedding's that has a graph of its own.
    models = [graph.load(package / name) for name in ("model.onnx", EMBEDDING) if (package / name).is_file()]
    initializers = {tensor.name: tensor for model in models for tensor in model.graph.initializer}
    nodes = {
        graph.path_of(node, node.input[0]): node
        for model in models
        for node in model.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
    }
    if any(node.op_type in ("MoE", "QMoE") for model in models for node in model.graph.node):
        raise UsageError(
            f"the losses of {package} are not told apart",
            why="its experts are one operator, and not measured one by one",
            fix=f"{VALIDATION} says what single experts lose",
        )
    if not nodes:
        raise UsageError(f"{package} has no block-quantized weights", why="there is nothing to tell apart")
    weights = {path: _Stored(node, initializers, package) for path, node in nodes.items()}
    try:
        checkpoint = peers.reference(package, store)
    except peers.Absent as reason:
        raise UsageError("there is nothing to measure the loss against", why=str(reason)) from None
    loaded = reference.load(checkpoint.path)
    ids = _windows(loaded.tokenizer)
    values: dict[str, Callable[[], npt.NDArray[np.float32]]] = {
        path: partial(_Stored.values, weight) for path, weight in weights.items()
    }
    alone = sensitivity.measure(loaded, values, ids, lambda part, path: progress(0.9 * part, path))
    progress(0.9, "all weights at once")
    wanted = sensitivity.log_probabilities(loaded, ids)
    sensitivity.replace(loaded, values)
    together = _divergence(wanted, sensitivity.log_probabilities(loaded, ids))
    progress(0.95, "the package itself")
    opened = session.open_package(package)
    found = np.concatenate([metrics.log_softmax(generate.decode_logits(opened, row)) for row in ids])
    total = _divergence(wanted, found)
    return {
        "schema_version": SCHEMA_VERSION,
        "text": {"sha256": texts.EVALUATION.sha256, "windows": len(ids), "window_tokens": _TOKENS},
        "total_kl": total,
        "stages": [
            {"name": "weights", "kl": together},
            {"name": "arithmetic of the runtime", "kl": total - together},
        ],
        "rows": [
            {
                "path": path,
                "layer": decoder.layer_of(path),
                "kind": weight.kind(path),
                "bits": weight.bits,
                "block_size": weight.block_size,
                "bytes": weight.size,
                "kl": alone[path],
            }
            for path, weight in weights.items()
        ],
    }


class _Stored:
    """A quantized weight of a package."""

    def __init__(self, node: onnx.NodeProto, initializers: dict[str, onnx.TensorProto], package: Path) -> None:
        given = {attribute.name: attribute.i for attribute in node.attribute}
        self.bits, self.block_size = given["bits"], given["block_size"]
        gathered = node.op_type == "GatherBlockQuantized"
        names = [node.input[0], *node.input[2:]] if gathered else node.input[1:]
        self._parts = [initializers[name] for name in names]
        self._package = package
        self._columns = given.get("K", 0)
        self._role = "embedding" if gathered else ""

    @property
    def size(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(int(read_tensor(part, self._package).nbytes) for part in self._parts)

    def kind(self, path: str) -> str:
        """``mlp.down_proj``, ``head``, ``embedding``."""
        if self._role:
            return self._role
        return "head" if decoder.layer_of(path) is None else ".".join(path.split(".")[-2:])

    def values(self) -> npt.NDArray[np.float32]:
        """What the kernels compute with, ``[N, K]``."""
        packed, scale, *zero = (read_tensor(part, self._package) for part in self._parts)
        rows = len(packed)
        blocks = packed.reshape(rows, -1, self.block_size * self.bits // 8)
        groups = blocks.shape[1]
        stored = blockwise.BlockQuantized(
            blocks, scale.reshape(rows, groups), zero[0].reshape(rows, -1) if zero else None, 0.0
        )
        return blockwise.dequantize(stored, self.bits, self._columns or groups * self.block_size)


def _divergence(wanted: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> float:
    return float(metrics.kl_divergence(wanted, found).mean())


def _windows(tokenizer: Any) -> list[list[int]]:
    corpus = texts.EVALUATION.read()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:_TOKENS] for text in corpus.values()]
    rows = [row for row in rows if len(row) == _TOKENS][:_WINDOWS]
    if not rows:
        raise StageError(f"the evaluation text is too short for a window of {_TOKENS} tokens of this tokenizer")
    return rows
