"""The graph that turns tokens and image features into what the decoder of a Qwen-VL model is given.

Shapes in this module:
    B: batch, S: tokens of a call, H: the decoder's hidden size, R: features, F: channels of a feature, a multiple of H.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.graph_builder import GraphBuilder

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.external_data import ExternalDataWriter

OPSET = 21
_INT64 = 7  # onnx.TensorProto.INT64, without the import


def write(table: npt.NDArray[Any], image_token: int, feature: int, writer: ExternalDataWriter) -> onnx.ModelProto:
    """Embeddings of tokens in float32, and features in their order where the image's tokens are.

    Inputs: ``input_ids`` int64 ``[B, S]``; ``image_features`` ``[R, F]``, where ``R`` may be 0. Output:
    ``inputs_embeds`` ``[B, S, F]``: zeros behind the ``H`` values of a text's token. A token of an image for which no
    feature is left, because the model itself has written it, has its own embedding.

    Args:
        table: the embedding ``[vocabulary, H]``.
        image_token: id of the token that stands for a feature.
        feature: ``F``.
    """
    g, name = GraphBuilder(writer), "/fusion"
    ids = g.input("input_ids", np.int64, ["batch_size", "sequence_length"])
    features = g.input("image_features", np.float32, ["num_features", feature])
    embedded = g.node("Gather", [g.constant("model.embed_tokens.weight", table), ids], "/model/embed_tokens")
    if rest := feature - table.shape[1]:
        ends = g.constant(f"{name}/ends", np.array([0, 0, 0, 0, 0, rest]))
        embedded = g.node("Pad", [embedded, ends], f"{name}/widened")
    token = g.constant(f"{name}/image_token", np.array(image_token))
    seen = g.node("Equal", [ids, token], f"{name}/seen")
    flat = g.node("Cast", [g.node("Reshape", [seen, g.ints(-1)], f"{name}/flat")], f"{name}/numbers", to=_INT64)
    zero = g.constant(f"{name}/zero", np.array(0))
    shape = g.node("Shape", [ids], f"{name}/shape")
    order = g.node("Reshape", [g.node("CumSum", [flat, zero], f"{name}/order"), shape], f"{name}/ordered")
    count = g.node("Shape", [features], f"{name}/count", end=1)
    taken = g.node("And", [seen, g.node("LessOrEqual", [order, count], f"{name}/left")], f"{name}/taken")
    # A row of zeros goes before the features, so that there is a row for every token, even where no image is.
    blank = g.node("ConstantOfShape", [g.ints(1, feature)], f"{name}/blank")
    rows = g.node("Concat", [blank, features], f"{name}/rows", axis=0)
    row = g.node("Where", [taken, order, zero], f"{name}/row")
    found = g.node("Gather", [rows, row], f"{name}/found")
    where = g.node("Unsqueeze", [taken, g.ints(-1)], f"{name}/where")
    g.node("Where", [where, found, embedded], f"{name}/embeddings", ["inputs_embeds"])
    g.output("inputs_embeds", np.float32, ["batch_size", "sequence_length", feature])
    return g.model("embedding", OPSET)
