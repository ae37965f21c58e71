"""The vision tower of a Qwen-VL model as a graph, written one weight at a time.

It takes one picture of any size. Which patch is where, and which patches see one another, is computed in the graph from
the picture's height and width.

Shapes in this module:
    N: patches of the picture, C: channels inside the tower, D: head size, R: squares of patches, each one feature,
    F: channels of a feature, W: windows, L: places in a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.facts.vision import Vision, merger_names
from pipeline.graph.builder import MICROSOFT, GraphBuilder

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from pipeline.checkpoint.tensors import Tensors
    from pipeline.graph.external_data import ExternalDataWriter

OPSET = 21
_EPSILON = 1e-6  # of every norm, in transformers
_BASE = 10000.0  # of the rotary frequencies
_FLOAT, _INT32, _INT64 = 1, 6, 7  # of onnx.TensorProto, without the import


def write(vision: Vision, tensors: Tensors, writer: ExternalDataWriter, prefix: str) -> onnx.ModelProto:
    """The whole tower.

    Inputs: ``pixel_values`` float32 ``[N, 1176]`` (of a patch all channels, frames, rows and columns; squares of
    patches one after the other), ``image_grid_thw`` int64 ``[1, 3]``: 1, and patches down and across. Output:
    ``image_features`` float32 ``[R, F]``.

    Args:
        vision: its sizes.
        tensors: of the checkpoint.
        writer: takes the weights.
        prefix: of the tower's tensors.
    """
    return _Writer(vision, tensors, GraphBuilder(writer), prefix).model()


class _Writer:
    """Writes one tower; methods return the names of values."""

    def __init__(self, vision: Vision, tensors: Tensors, g: GraphBuilder, prefix: str) -> None:
        self.v, self.tensors, self.g, self.prefix = vision, tensors, g, prefix

    def model(self) -> onnx.ModelProto:
        g, v = self.g, self.v
        pixels = g.input("pixel_values", np.float32, ["num_patches", v.patch_values])
        grid = g.input("image_grid_thw", np.int64, [1, 3])
        squares = [
            self._floor(g.node("Gather", [grid, g.ints(index)], f"/visual/{name}", axis=1), v.merge, f"/visual/{name}")
            for index, name in ((1, "down"), (2, "across"))
        ]
        squares = [g.node("Reshape", [value, g.ints(1)], f"{value}/one") for value in squares]
        count = g.node("Shape", [pixels], "/visual/count", end=1)
        rows = self._range(count, "/visual/rows")
        places = self._places(rows, squares)
        tables = [g.node("Unsqueeze", [rows, g.ints(0)], "/visual/all"), *self._rotary_tables(places)]
        x = self._linear(pixels, "patch_embed.proj")
        if v.positions:
            x = g.node("Add", [x, self._learned_positions(places, squares)], "/visual/positioned")
        windows = self._windows(rows, squares) if v.window else None
        features = []
        for index in range(v.depth):
            x = self._block(x, index, None if index in v.whole else windows, tables)
            if index in v.deepstack:
                features.append(self._merger(x, f"deepstack_merger_list.{v.deepstack.index(index)}", whole=True))
        features.insert(0, self._merger(x, "merger", whole=False))
        g.node("Concat", features, "/visual/features", ["image_features"], axis=-1)
        g.output("image_features", np.float32, ["num_features", v.feature])
        return g.model("vision", OPSET)

    def _places(self, rows: str, squares: list[str]) -> list[str]:
        """How far down and across each patch is, int64 ``[N]``: they come square by square."""
        g, v, name = self.g, self.v, "/visual/places"
        square, inside = self._split(rows, v.merged, f"{name}/square")
        found = []
        for whole, part, key in zip(
            self._split(square, squares[1], f"{name}/block"),
            self._split(inside, v.merge, f"{name}/inside"),
            ("down", "across"),
            strict=True,
        ):
            start = g.node("Mul", [whole, g.ints(v.merge)], f"{name}/{key}/start")
            found.append(g.node("Add", [start, part], f"{name}/{key}"))
        return found

    def _rotary_tables(self, places: list[str]) -> list[str]:
        """Cosines and sines ``[N, D / 2]``: half of the frequencies turn with the row, half with the column."""
        g, name, size = self.g, "/visual/rotary", self.v.width // self.v.heads // 2
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        frequencies = g.constant(f"{name}/frequencies", np.float32(1) / np.float32(_BASE) ** exponents[None])
        angles = []
        for place, key in zip(places, ("down", "across"), strict=True):
            column = g.node("Unsqueeze", [self._float(place, f"{name}/{key}"), g.ints(1)], f"{name}/{key}/column")
            angles.append(g.node("Mul", [column, frequencies], f"{name}/{key}/angles"))
        both = g.node("Concat", angles, f"{name}/angles", axis=-1)
        return [g.node(function, [both], f"{name}/{function.lower()}") for function in ("Cos", "Sin")]

    def _learned_positions(self, places: list[str], squares: list[str]) -> str:
        """``[N, C]``, between the four nearest of the grid of learned ones (bilinear), which spans the picture."""
        g, v, name = self.g, self.v, "/visual/pos_embed"
        last = g.constant(f"{name}/last", np.array([v.positions - 1], np.int64))
        ends, parts = [], []
        for place, square, key in zip(places, squares, ("down", "across"), strict=True):
            path = f"{name}/{key}"
            steps = g.node(
                "Sub", [g.node("Mul", [square, g.ints(v.merge)], f"{path}/size"), g.ints(1)], f"{path}/steps"
            )
            top = self._float(g.node("Mul", [place, last], f"{path}/scaled"), f"{path}/scaled")
            at = g.node("Div", [top, self._float(steps, f"{path}/steps")], f"{path}/at")
            low = g.node("Floor", [at], f"{path}/low")
            parts.append(g.node("Unsqueeze", [g.node("Sub", [at, low], f"{path}/part"), g.ints(1)], f"{path}/weight"))
            first = g.node("Cast", [low], f"{path}/first", to=_INT64)
            after = g.node("Min", [g.node("Add", [first, g.ints(1)], f"{path}/next"), last], f"{path}/after")
            ends.append((first, after))
        table = g.constant("visual.pos_embed.weight", self._values("pos_embed.weight"))
        across = []
        for index, row in enumerate(ends[0]):
            start = g.node("Mul", [row, g.ints(v.positions)], f"{name}/row{index}")
            cells = [
                g.node(
                    "Gather",
                    [table, g.node("Add", [start, column], f"{name}/{index}{other}")],
                    f"{name}/at{index}{other}",
                )
                for other, column in enumerate(ends[1])
            ]
            across.append(self._between(cells, parts[1], f"{name}/across{index}"))
        return self._between(across, parts[0], f"{name}/down")

    def _between(self, ends: list[str], part: str, name: str) -> str:
        """The first of ``ends`` where ``part`` is 0, the second where it is 1."""
        g, (first, second) = self.g, ends
        way = g.node("Mul", [g.node("Sub", [second, first], f"{name}/way"), part], f"{name}/gone")
        return g.node("Add", [first, way], name)

    def _windows(self, rows: str, squares: list[str]) -> tuple[str, str, str]:
        """Which patches see one another.

        Returns:
            the patch at each place of all windows, int64 ``[W L]`` (any, where the picture has ended); which places
            are filled, int32 ``[W, L]``; and where each patch has gone, int64 ``[N]``.
        """
        g, v, name = self.g, self.v, "/visual/windows"
        size = v.window**2 * v.merged
        down, across = (
            self._floor(g.node("Add", [square, g.ints(v.window - 1)], f"{name}/{key}/up"), v.window, f"{name}/{key}")
            for square, key in zip(squares, ("down", "across"), strict=True)
        )
        count = g.node("Mul", [g.node("Mul", [down, across], f"{name}/count"), g.ints(size)], f"{name}/places")
        window, place = self._split(self._range(count, f"{name}/range"), size, f"{name}/window")
        cell, inside = self._split(place, v.merged, f"{name}/cell")
        at, filled = [], []
        for start, step, square, key in zip(
            self._split(window, across, f"{name}/start"),
            self._split(cell, v.window, f"{name}/step"),
            squares,
            ("down", "across"),
            strict=True,
        ):
            first = g.node("Mul", [start, g.ints(v.window)], f"{name}/{key}/first")
            at.append(g.node("Add", [first, step], f"{name}/{key}/at"))
            filled.append(g.node("Less", [at[-1], square], f"{name}/{key}/inside"))
        both = g.node("And", filled, f"{name}/both")
        row = self._joined(
            self._joined(at[0], squares[1], at[1], f"{name}/square"), g.ints(v.merged), inside, f"{name}/row"
        )
        row = g.node("Where", [both, row, g.ints(0)], f"{name}/some")
        shaped = g.node("Reshape", [both, g.ints(-1, size)], f"{name}/filled")
        mask = g.node("Cast", [shaped], f"{name}/mask", to=_INT32)
        square, inside = self._split(rows, v.merged, f"{name}/back")
        pairs = [
            self._split(value, v.window, f"{name}/back/{key}")
            for value, key in zip(self._split(square, squares[1], f"{name}/back/at"), ("down", "across"), strict=True)
        ]
        window = self._joined(pairs[0][0], across, pairs[1][0], f"{name}/back/window")
        cell = self._joined(pairs[0][1], g.ints(v.window), pairs[1][1], f"{name}/back/cell")
        place = self._joined(cell, g.ints(v.merged), inside, f"{name}/back/place")
        gone = self._joined(window, g.ints(size), place, f"{name}/gone")
        return row, mask, gone

    def _block(self, x: str, index: int, seen: tuple[str, str, str] | None, tables: list[str]) -> str:
        g, path = self.g, f"blocks.{index}"
        name = f"/visual/{path}"
        attended = self._attention(self._norm(x, f"{path}.norm1"), f"{path}.attn", seen, tables)
        x = g.node("Add", [x, attended], f"{name}/attended")
        return g.node("Add", [x, self._mlp(self._norm(x, f"{path}.norm2"), f"{path}.mlp")], f"{name}/added")

    def _attention(self, normed: str, path: str, seen: tuple[str, str, str] | None, tables: list[str]) -> str:
        """Of all patches, or of those that ``seen`` (`_windows`) puts into the same window."""
        g, v = self.g, self.v
        name = f"/visual/{path}"
        joined = g.node("Unsqueeze", [self._linear(normed, f"{path}.qkv"), g.ints(0)], f"{name}/joined")
        parts = [f"{name}/{kind}" for kind in "qkv"]
        g.node("Split", [joined, g.ints(*[v.width] * 3)], f"{name}/split", parts, axis=-1)
        parts[:2] = (
            g.node("RotaryEmbedding", [part, *tables], f"{part}_rotary", domain=MICROSOFT) for part in parts[:2]
        )
        if seen:
            patches, mask, gone = seen
            shape = g.ints(-1, v.window**2 * v.merged, v.width)
            parts = [
                g.node(
                    "Reshape", [g.node("Gather", [part, patches], f"{part}/places", axis=1), shape], f"{part}/windows"
                )
                for part in parts
            ]
            parts += ["", mask]
        mixed = g.node(
            "MultiHeadAttention",
            parts,
            f"{name}/mixed",
            domain=MICROSOFT,
            num_heads=v.heads,
            mask_filter_value=-1e9,
        )
        flat = g.node("Reshape", [mixed, g.ints(-1, v.width)], f"{name}/flat")
        if seen:
            flat = g.node("Gather", [flat, gone], f"{name}/back")
        return self._linear(flat, f"{path}.proj")

    def _mlp(self, normed: str, path: str) -> str:
        g, name = self.g, f"/visual/{path}"
        if self.v.kind == "qwen2_5_vl":
            gate, up = (self._linear(normed, f"{path}.{kind}_proj") for kind in ("gate", "up"))
            gate = g.node("Mul", [gate, g.node("Sigmoid", [gate], f"{name}/sigmoid")], f"{name}/silu")
            return self._linear(g.node("Mul", [gate, up], f"{name}/gated"), f"{path}.down_proj")
        first, last = ("fc1", "fc2") if self.v.kind == "qwen2_vl" else ("linear_fc1", "linear_fc2")
        inner = self._linear(normed, f"{path}.{first}")
        if self.v.kind == "qwen2_vl":
            inner = g.node("QuickGelu", [inner], f"{name}/gelu", domain=MICROSOFT, alpha=1.702)
        else:
            inner = g.node("Gelu", [inner], f"{name}/gelu", approximate="tanh")
        return self._linear(inner, f"{path}.{last}")

    def _merger(self, x: str, path: str, whole: bool) -> str:
        """Features ``[R, H]`` of squares of patches, which are normed as a ``whole`` or patch by patch."""
        g, name = self.g, f"/visual/{path}"
        norm, first, last = merger_names(self.v.kind)
        shape = g.ints(-1, self.v.width * self.v.merged)
        if whole:
            x = self._norm(g.node("Reshape", [x, shape], f"{name}/squares"), f"{path}.{norm}")
        else:
            x = g.node("Reshape", [self._norm(x, f"{path}.{norm}"), shape], f"{name}/squares")
        inner = g.node("Gelu", [self._linear(x, f"{path}.{first}")], f"{name}/gelu")
        return self._linear(inner, f"{path}.{last}")

    def _linear(self, x: str, path: str) -> str:
        g, name = self.g, f"/visual/{path}"
        weight = self._values(f"{path}.weight")
        constant = g.constant(f"visual.{path}.MatMul.weight", weight.reshape(len(weight), -1).T)
        y = g.node("MatMul", [x, constant], name)
        if f"{self.prefix}.{path}.bias" not in self.tensors:
            return y
        return g.node("Add", [y, g.constant(f"visual.{path}.bias", self._values(f"{path}.bias"))], f"{name}/biased")

    def _norm(self, x: str, path: str) -> str:
        g, name = self.g, f"/visual/{path}"
        parts = ("weight",) if self.v.kind == "qwen2_5_vl" else ("weight", "bias")
        constants = [g.constant(f"visual.{path}.{part}", self._values(f"{path}.{part}")) for part in parts]
        kind = "SimplifiedLayerNormalization" if len(parts) == 1 else "LayerNormalization"
        return g.node(kind, [x, *constants], name, axis=-1, epsilon=_EPSILON)

    def _range(self, count: str, name: str) -> str:
        """The numbers below ``count`` (``[1]``)."""
        g = self.g
        zero, one = (g.constant(f"/visual/{key}", np.array(value)) for key, value in (("zero", 0), ("step", 1)))
        return g.node("Range", [zero, g.node("Squeeze", [count], f"{name}/count"), one], name)

    def _split(self, values: str, by: int | str, name: str) -> tuple[str, str]:
        """Whole parts and remainders of a division; nothing is negative."""
        divisor = self.g.ints(by) if isinstance(by, int) else by
        whole = self._floor(values, divisor, name)
        return whole, self.g.node("Mod", [values, divisor], f"{name}/rest")

    def _floor(self, values: str, by: int | str, name: str) -> str:
        return self.g.node("Div", [values, self.g.ints(by) if isinstance(by, int) else by], f"{name}/whole")

    def _joined(self, whole: str, by: str, rest: str, name: str) -> str:
        """What `_split` has split."""
        return self.g.node("Add", [self.g.node("Mul", [whole, by], f"{name}/start"), rest], name)

    def _float(self, values: str, name: str) -> str:
        return self.g.node("Cast", [values], f"{name}/float", to=_FLOAT)

    def _values(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self.tensors.read(f"{self.prefix}.{name}").numpy()
        return values
