"""Storage of tensors: initializers that lie in a file beside the model.

Weights are read one at a time as memory maps and written one at a time, so that peak memory is bounded by the
largest weight and not by the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

# ONNX Runtime maps external data from the file; on a page boundary it needs no copy.
ALIGNMENT = 4096

# Smaller tensors stay inside the model file, where shape inference can see them.
INLINE_BYTES = 1024


def read_tensor(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[Any]:
    """The values of an initializer, as a read-only memory map where they are external data."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        inline: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        return inline
    external = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = folder / external["location"], int(external.get("offset", 0))
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two in a byte: numpy has no such type
        packed = np.fromfile(path, np.uint8, int(external["length"]), offset=offset)
        whole = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=packed.tobytes())
        unpacked: npt.NDArray[Any] = onnx.numpy_helper.to_array(whole)
        return unpacked
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(path, dtype, "r", offset=offset, shape=tuple(tensor.dims))


class ExternalDataWriter:
    """Writes initializers one after the other into a single external-data file.

    Two runs over the same tensors write the same bytes: padding is zero, the order is the caller's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def __enter__(self) -> ExternalDataWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(
        self,
        name: str,
        values: npt.NDArray[Any],
        data_type: int | None = None,
        dims: Sequence[int] | None = None,
    ) -> onnx.TensorProto:
        """Append ``values`` and return the initializer that refers to them (inline when it is tiny).

        Args:
            data_type, dims: where they are not the array's, as for 4-bit values packed in bytes.
        """
        import onnx

        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype) if data_type is None else data_type
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=values.shape if dims is None else dims)
        if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) and dims is None:
            values = np.frombuffer(onnx.numpy_helper.from_array(values, name).raw_data, np.uint8)
        if values.nbytes < INLINE_BYTES:
            tensor.raw_data = np.ascontiguousarray(values).tobytes()
            return tensor
        offset = self._align()
        np.ascontiguousarray(values).tofile(self._file)
        return self._refer(tensor, offset, values.nbytes)

    def write_parts(
        self, name: str, dtype: npt.DTypeLike, dims: Sequence[int], parts: Iterable[npt.NDArray[Any]]
    ) -> onnx.TensorProto:
        """The same of a tensor that is too large for memory: its ``parts``, one after the other.

        Raises:
            ValueError: the parts do not fill ``dims``.
        """
        import onnx

        wanted = math.prod(dims) * np.dtype(dtype).itemsize
        if wanted < INLINE_BYTES:
            return self.write(name, np.concatenate([part.reshape(-1) for part in parts]).reshape(dims))
        tensor = onnx.TensorProto(name=name, data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims=dims)
        offset = self._align()
        for part in parts:
            np.ascontiguousarray(part, dtype).tofile(self._file)
        if (written := self._file.tell() - offset) != wanted:
            raise ValueError(f"the parts of {name} have {written} bytes, not {wanted}")
        return self._refer(tensor, offset, wanted)

    def _align(self) -> int:
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        return self._file.tell()

    def _refer(self, tensor: onnx.TensorProto, offset: int, length: int) -> onnx.TensorProto:
        import onnx

        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self._path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def footprint(nbytes: int) -> int:
    """Bytes that a tensor of ``nbytes`` takes in the external-data file."""
    return 0 if nbytes < INLINE_BYTES else -(-nbytes // ALIGNMENT) * ALIGNMENT


def stored_bits(model: onnx.ModelProto, folder: Path) -> int:
    """Bits of all weights as stored, shared bytes counted once."""
    import onnx

    extents: set[tuple[str, int, int]] = set()
    inline = 0
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            length = int(entry.get("length", (folder / entry["location"]).stat().st_size))
            extents.add((entry["location"], int(entry.get("offset", 0)), length))
        else:
            inline += tensor.ByteSize()
    return 8 * (inline + sum(length for _, _, length in extents))
