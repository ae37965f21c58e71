"""The graph that turns tokens and features of images or sounds into what the decoder is given.

Shapes in this module:
    B: batch, S: tokens of a call, H: the decoder's hidden size, R: features, F: channels of a feature, a multiple of H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.graph.builder import GraphBuilder

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.graph.external_data import ExternalDataWriter

OPSET = 21
_INT64 = 7  # onnx.TensorProto.INT64, without the import


def write(
    table: npt.NDArray[Any],
    token: int,
    feature: int,
    writer: ExternalDataWriter,
    name: str = "image_features",
    unread: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """Embeddings of tokens in float32, and features in their order where the tokens are that stand for them.

    Inputs: ``input_ids`` int64 ``[B, S]``; features ``[R, F]``, where ``R`` may be 0. Output: ``inputs_embeds``
    ``[B, S, F]``: zeros behind the ``H`` values of a text's token. A token for which no feature is left, because the
    model itself has written it, has its own embedding.

    Args:
        table: the embedding ``[vocabulary, H]``.
        token: id of the token that stands for a feature.
        feature: ``F``.
        name: of the features.
        unread: names of other features that the runtime gives, and of which there are none.
    """
    g, path = GraphBuilder(writer), "/fusion"
    ids = g.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    features = g.input(name, np.float32, ["num_features", feature])
    for other in unread:
        g.input(other, np.float32, [f"num_{other}", feature])
    embedded = g.node("Gather", [g.constant("model.embed_tokens.weight", table), ids], "/model/embed_tokens")
    if rest := feature - table.shape[1]:
        ends = g.constant(f"{path}/ends", np.array([0, 0, 0, 0, 0, rest]))
        embedded = g.node("Pad", [embedded, ends], f"{path}/widened")
    wanted = g.constant(f"{path}/token", np.array(token))
    seen = g.node("Equal", [ids, wanted], f"{path}/seen")
    flat = g.node("Cast", [g.node("Reshape", [seen, g.ints(-1)], f"{path}/flat")], f"{path}/numbers", to=_INT64)
    zero = g.constant(f"{path}/zero", np.array(0))
    shape = g.node("Shape", [ids], f"{path}/shape")
    order = g.node("Reshape", [g.node("CumSum", [flat, zero], f"{path}/order"), shape], f"{path}/ordered")
    count = g.node("Shape", [features], f"{path}/count", end=1)
    taken = g.node("And", [seen, g.node("LessOrEqual", [order, count], f"{path}/left")], f"{path}/taken")
    # A row of zeros goes before the features, so that there is a row for every token, even where no image is.
    blank = g.node("ConstantOfShape", [g.ints(1, feature)], f"{path}/blank")
    rows = g.node("Concat", [blank, features], f"{path}/rows", axis=0)
    row = g.node("Where", [taken, order, zero], f"{path}/row")
    found = g.node("Gather", [rows, row], f"{path}/found")
    where = g.node("Unsqueeze", [taken, g.ints(-1)], f"{path}/where")
    g.node("Where", [where, found, embedded], f"{path}/embeddings", ["inputs_embeds"])
    g.output("inputs_embeds", np.float32, ["batch_size", "sequence_length", feature])
    return g.model("embedding", OPSET)
