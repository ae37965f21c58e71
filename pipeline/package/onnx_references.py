"""Which files an ONNX graph refers to, its operators, inputs and outputs, read with the standard library alone.

A package is checked before anything loads it, and where nothing is installed that could: this reads the Protocol
Buffers wire format (https://protobuf.dev/programming-guides/encoding) as far as external data needs (onnx.proto).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# message → field number → message, for every path on which a tensor can lie (field numbers of onnx.proto).
_NESTED: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
}
_EXTERNAL_DATA, _NAME = 13, 8  # fields of TensorProto
_GRAPH, _INPUT, _OUTPUT, _VALUE_NAME = 7, 11, 12, 1  # fields of ModelProto, GraphProto (2), ValueInfoProto
_VALUE_TYPE, _TENSOR_TYPE = 2, 1  # fields of ValueInfoProto, TypeProto
_ELEMENT, _SHAPE, _DIM, _DIM_VALUE = 1, 2, 1, 1  # fields of TypeProto.Tensor (2), TensorShapeProto, its Dimension
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING = 1, 4  # fields of AttributeProto
_OPERATOR, _DOMAIN = 4, 7  # fields of NodeProto
_OPSET, _OPSET_DOMAIN, _OPSET_VERSION = 8, 1, 2  # fields of ModelProto, OperatorSetIdProto
# Attributes of EPContext nodes that name a file which the execution provider reads.
_FILE_ATTRIBUTES = {"ep_cache_context"}
_MAX_DEPTH = 64
_DIGITS = re.compile(r"-?[0-9]{1,20}")


LAST_LOGITS = "last_logits"
"""The output with the logits of more last tokens than one, see `pipeline.graph.edits.prune_head`."""


@dataclass(frozen=True)
class Reference:
    """External data of one tensor: ``length`` bytes (``None``: to the end) at ``offset`` of the file ``location``.

    A compiled binary that a node names counts as such; ``tensor`` is then the attribute's name.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


def read(data: bytes) -> list[Reference]:
    """All external data that the model in ``data`` refers to.

    Raises:
        ValueError: the bytes are no ONNX model, a key of external data stands twice, or an offset or length is no
            number; where parsers might differ in what they read, nothing is read.
    """
    return list(_walk(memoryview(data), "Model", 0))


def outputs(data: bytes) -> list[str]:
    """Names of the outputs of the model in ``data``.

    Raises:
        ValueError: the bytes are no ONNX model.
    """
    names = _inside(memoryview(data), _GRAPH, _OUTPUT, _VALUE_NAME)
    return [bytes(name).decode("utf-8") for name in names]


def inputs(data: bytes) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name → element type (a number of TensorProto.DataType) and dimensions of the inputs of the model in ``data``.

    A dimension that is not fixed is -1.

    Raises:
        ValueError: the bytes are no ONNX model.
    """
    found = {}
    for value in _inside(memoryview(data), _GRAPH, _INPUT):
        names, kinds = _inside(value, _VALUE_NAME), _inside(value, _VALUE_TYPE, _TENSOR_TYPE)
        kind = [_integer(part, _ELEMENT, 0) for part in kinds]
        dims = [_integer(dim, _DIM_VALUE, -1) for part in kinds for dim in _inside(part, _SHAPE, _DIM)]
        found[bytes(names[-1]).decode("utf-8") if names else ""] = (kind[-1] if kind else 0, tuple(dims))
    return found


def operators(data: bytes) -> dict[str, int]:
    """Operator → how many nodes of the model in ``data`` have it, those of subgraphs and functions included.

    Operators of other domains than ONNX's own are named ``domain::Operator``.

    Raises:
        ValueError: the bytes are no ONNX model.
    """
    return dict(Counter(_operators(memoryview(data), "Model", 0)))


def opsets(data: bytes) -> dict[str, int]:
    """Domain → version of the operator sets that the model in ``data`` asks for; ONNX's own is ``ai.onnx``.

    Raises:
        ValueError: the bytes are no ONNX model.
    """
    found = {}
    for part in _inside(memoryview(data), _OPSET):
        names = _inside(part, _OPSET_DOMAIN)
        domain = bytes(names[-1]).decode("utf-8") if names else ""
        found[domain or "ai.onnx"] = _integer(part, _OPSET_VERSION, 0)
    return found


def _operators(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if message == "Node":
        names, domains = _inside(data, _OPERATOR), _inside(data, _DOMAIN)
        name = bytes(names[-1]).decode("utf-8") if names else ""
        domain = bytes(domains[-1]).decode("utf-8") if domains else ""
        yield name if domain in {"", "ai.onnx"} else f"{domain}::{name}"
    for number, value in _fields(data):
        nested = _NESTED[message].get(number)
        if nested in _NESTED and isinstance(value, memoryview):
            yield from _operators(value, nested, depth + 1)


def _integer(data: memoryview, wanted: int, missing: int) -> int:
    """A number field, of which the last one counts."""
    values = [value for field, value in _fields(data) if field == wanted and isinstance(value, int)]
    return values[-1] if values else missing


def _inside(data: memoryview, *wanted: int) -> list[memoryview]:
    """The messages or strings on a path of field numbers."""
    parts = [data]
    for field in wanted:
        parts = [
            value for part in parts for number, value in _fields(part) if number == field and not isinstance(value, int)
        ]
    return parts


def _walk(data: memoryview, message: str, depth: int) -> Iterator[Reference]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if message == "Tensor":
        yield from _tensor(data)
        return
    if message == "Attribute":
        yield from _file(data)
    for number, value in _fields(data):
        nested = _NESTED[message].get(number)
        if nested and isinstance(value, memoryview):
            yield from _walk(value, nested, depth + 1)


def _file(data: memoryview) -> Iterator[Reference]:
    """The file that an attribute names, if it is of those that do."""
    name, value = "", ""
    for number, field in _fields(data):
        if number == _ATTRIBUTE_NAME and isinstance(field, memoryview):
            name = bytes(field).decode("utf-8")
        elif number == _ATTRIBUTE_STRING and isinstance(field, memoryview):
            value = bytes(field).decode("utf-8", "replace")
    if name in _FILE_ATTRIBUTES:
        yield Reference(name, value, 0, None)


def _tensor(data: memoryview) -> Iterator[Reference]:
    name, entries = "", {}
    for number, value in _fields(data):
        if number == _NAME and isinstance(value, memoryview):
            name = bytes(value).decode("utf-8")
        elif number == _EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {key: bytes(text).decode("utf-8") for key, text in _fields(value) if isinstance(text, memoryview)}
            key = pair.get(1, "")
            if key in entries:
                raise ValueError(f"tensor {name!r} names {key!r} twice")
            entries[key] = pair.get(2, "")
    if entries:
        length = _number(entries["length"]) if "length" in entries else None
        yield Reference(name, entries.get("location", ""), _number(entries.get("offset", "0")), length)


def _number(text: str) -> int:
    """Digits alone: int() would also take spaces, underscores and the digits of other scripts."""
    if not _DIGITS.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is no number")
    return int(text)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if not 8 <= tag < 1 << 32:  # other parsers cut a longer tag off and see another field
            raise ValueError(f"the tag at byte {at} is of no field")
        kind = tag & 7
        value: memoryview | int
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = data[at : at + size], at + size
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at} is not of an ONNX model")
        if at > len(data):
            raise ValueError("the file ends within a field")
        yield tag >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file ends within a number")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise ValueError("a number is longer than 10 bytes")
