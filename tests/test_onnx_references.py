"""The small reader of ONNX files sees whatever the real one sees, and survives files that are none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper

from pipeline.package import onnx_references


def _external(name: str, location: str, **more: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _everywhere() -> onnx.ModelProto:
    """A model with external data in every place where onnx.proto has a tensor."""
    deep = helper.make_graph([], "deep", [], [], [_external("deep", "deep.bin", offset="4", length="16")])
    inner = helper.make_graph(
        [helper.make_node("If", ["c"], ["z"], then_branch=deep, else_branch=deep)], "inner", [], [], []
    )
    nodes = [
        helper.make_node("Constant", [], ["a"], value=_external("attribute", "attribute.bin")),
        helper.make_node("If", ["c"], ["b"], then_branch=inner, else_branch=inner),
        helper.make_node("Many", [], ["d"], domain="x"),
    ]
    nodes[2].attribute.add(name="tensors", type=9).tensors.append(_external("listed", "listed.bin"))
    nodes[2].attribute.add(name="graphs", type=10).graphs.append(deep)
    nodes[2].attribute.add(name="sparse", type=11).sparse_tensor.values.CopyFrom(_external("s", "sparse.bin"))
    nodes[2].attribute.add(name="sparses", type=12).sparse_tensors.add().indices.CopyFrom(_external("i", "index.bin"))
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], [_external("w", "weights.bin", length="16")]))
    model.graph.sparse_initializer.add().values.CopyFrom(_external("sparse initializer", "initializer.bin"))
    function = model.functions.add(name="f", domain="x")
    function.node.add(op_type="Constant").attribute.add(name="value", type=4).t.CopyFrom(_external("f", "function.bin"))
    function.attribute_proto.add(name="default", type=4).t.CopyFrom(_external("default", "default.bin"))
    training = model.training_info.add()
    training.initialization.initializer.append(_external("t", "training.bin"))
    training.algorithm.initializer.append(_external("u", "algorithm.bin"))
    return model


def _seen_by_the_library(message: Message) -> Iterator[tuple[Any, ...]]:
    """External data of all tensors, found by walking every field that the schema declares."""
    if isinstance(message, TensorProto) and message.external_data:
        entries = {entry.key: entry.value for entry in message.external_data}
        length = int(entries["length"]) if "length" in entries else None
        yield message.name, entries.get("location", ""), int(entries.get("offset", "0")), length
    for _, value in message.ListFields():
        items = [value] if isinstance(value, Message) else value if hasattr(value, "__len__") else []
        for item in items:
            if isinstance(item, Message):
                yield from _seen_by_the_library(item)


def _read(data: bytes) -> set[tuple[Any, ...]]:
    return {(entry.tensor, entry.location, entry.offset, entry.length) for entry in onnx_references.read(data)}


def test_every_tensor_that_the_library_sees_is_seen() -> None:
    model = _everywhere()
    wanted = set(_seen_by_the_library(model))
    assert len(wanted) == 11
    assert _read(model.SerializeToString()) == wanted


def test_damage_is_refused_or_read_as_the_library_reads_it() -> None:
    """What is worse than a crash: a file that means one thing to the check and another to the runtime."""
    good = _everywhere().SerializeToString()
    chance = random.Random(0)
    refused = compared = 0
    for _ in range(1500):
        data = bytearray(good[: chance.choice([len(good), chance.randrange(len(good) + 1)])])
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            found = {entry.location for entry in onnx_references.read(bytes(data))}
        except ValueError:
            refused += 1
            continue
        model = onnx.ModelProto()
        try:
            model.ParseFromString(bytes(data))
            seen = {location for _, location, _, _ in _seen_by_the_library(model)}
        except (DecodeError, ValueError):
            continue
        compared += 1
        assert seen <= found
    assert refused > 100
    assert compared > 100


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x3a\x05ab", "ends within a field"),
        (b"\x3a" + b"\xff" * 11, "longer than 10 bytes"),
        (b"\x3b", "wire type 3"),
        (b"\x02\x00", "is of no field"),
        # Field 7 (the graph) plus 2^32: a reader with 32 bits sees the graph.
        (bytes([0xBA, 0x80, 0x80, 0x80, 0x10, 0x00]), "is of no field"),
    ],
)
def test_what_readers_may_take_differently_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        onnx_references.read(data)


def test_nesting_has_a_limit() -> None:
    graph = helper.make_graph([], "g", [], [], [])
    for _ in range(25):
        graph = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)], "g", [], [])
    with pytest.raises(ValueError, match="nested more than"):
        onnx_references.read(helper.make_model(graph).SerializeToString())


def test_a_key_that_stands_twice_is_refused() -> None:
    tensor = _external("w", "weights.bin")
    tensor.external_data.add(key="location", value="../elsewhere")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    with pytest.raises(ValueError, match="'location' twice"):
        onnx_references.read(model.SerializeToString())


PLACES = ["node", "subgraph", "list of subgraphs", "function", "default of a function", "training"]


def _compiled(place: str, location: str) -> onnx.ModelProto:
    """A model with a node that names a compiled binary."""
    node = helper.make_node("EPContext", [], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context=location)
    inner = helper.make_graph([node], "inner", [], [])
    nodes = [node] if place == "node" else []
    if place == "subgraph":
        nodes = [
            helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([], "x", [], []), else_branch=inner)
        ]
    elif place == "list of subgraphs":
        nodes = [helper.make_node("Many", [], ["y"])]
        nodes[0].attribute.add(name="graphs", type=10).graphs.append(inner)
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    if place == "function":
        model.functions.add(name="f", domain="x").node.append(node)
    elif place == "default of a function":
        model.functions.add(name="f", domain="x").attribute_proto.extend(node.attribute)
    elif place == "training":
        model.training_info.add().algorithm.CopyFrom(inner)
    return model


@pytest.mark.parametrize("place", PLACES)
def test_files_that_nodes_name_are_seen_wherever_a_node_can_be(place: str) -> None:
    assert _read(_compiled(place, "prefill_qnn.bin").SerializeToString()) == {
        ("ep_cache_context", "prefill_qnn.bin", 0, None)
    }


def test_of_a_value_that_stands_twice_the_last_is_seen_as_by_the_library() -> None:
    model = _compiled("node", "good.bin")
    data = model.graph.node[0].attribute[-1]
    assert data.name == "ep_cache_context"
    for other in ("worse.bin", "../worst.bin"):
        # Fields of one message may be written in pieces: the pieces are joined, and single values replaced.
        twice = data.SerializeToString() + onnx.AttributeProto(s=other.encode()).SerializeToString()
        read = onnx.AttributeProto.FromString(twice)
        node = onnx.NodeProto(op_type="EPContext").SerializeToString() + _field(5, twice)
        whole = _field(7, _field(1, node))
        assert {location for _, location, _, _ in _read(whole)} == {read.s.decode()} == {other}


def _field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def test_a_binary_inside_the_graph_is_no_file_name() -> None:
    """With ``embed_mode`` 1 the attribute holds the binary itself, which could look like anything."""
    model = _compiled("node", "x")
    next(entry for entry in model.graph.node[0].attribute if entry.name == "ep_cache_context").s = b"\x00\xff/../x"
    ((_, location, _, _),) = _read(model.SerializeToString())
    assert "/" in location


def test_inputs_have_the_types_and_dimensions_that_the_library_sees() -> None:
    given = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, [3, "rank"]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT16, ["rank", 300]),
        helper.make_tensor_value_info("c", TensorProto.INT64, []),
        helper.make_tensor_value_info("d", TensorProto.INT64, None),
    ]
    data = helper.make_model(helper.make_graph([], "g", given, [])).SerializeToString()
    assert onnx_references.inputs(data) == {"a": (1, (3, -1)), "b": (10, (-1, 300)), "c": (7, ()), "d": (7, ())}
    with pytest.raises(ValueError, match=r"not of an ONNX model|of no field|longer than"):
        onnx_references.inputs(b"\xff" * 20)
