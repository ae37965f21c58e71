"""From a LoRA adapter as peft saves it to the file that ONNX Runtime loads beside a graph with slots.

peft itself says which tensors belong to the adapter and how each product is scaled: the adapter is put into a skeleton
of the base model, which has shapes and no values.

Shapes in this module:
    I, O: inputs and outputs of a projection, R: rank.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import digest, files
from pipeline.checkpoint import files as checkpoint_files
from pipeline.errors import CheckpointError, ResourceError
from pipeline.lora import files as lora_files
from pipeline.package import adapter_files
from pipeline.package.adapter_files import DESCRIPTION, PARTS, Described, Slot, tensor_name

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_PREFIX = "base_model.model."
_PACKED = "qkv_proj"
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Product:
    """What an adapter adds to a projection's result: ``(x @ first) @ second``, scaled; ``[I, R]`` and ``[R, O]``."""

    first: Floats
    second: Floats


def convert(
    adapter: Path, package: Path, known: Mapping[str, Slot], file: Path, name: str, base: str, license_id: str = ""
) -> Described:
    """Write ``file`` (``NAME.onnx_adapter``) and its description beside it, each all at once.

    Args:
        adapter: directory that peft saved.
        package: directory with the base model's ``config.json``.
        known: the slots of the graph.
        name: how the adapter is called.
        base: digest of the checkpoint that the graph was made from.

    Raises:
        CheckpointError: the adapter cannot be kept apart, does not fit the model, or changes nothing.
        ResourceError: the file cannot be written.
    """
    lora_files.check(adapter)
    products = read(adapter, package)
    tensors = fill(products, known, _widths(package, products), adapter)
    _write(tensors, file)
    ranks = {
        slot: tensors[tensor_name(slot, PARTS[1])].shape[0] for slot in known if tensor_name(slot, PARTS[1]) in tensors
    }
    described = Described(
        name=name,
        sha256=digest.of_file(file),
        base=base,
        ranks=ranks,
        source=lora_files.identity(adapter),
        trained_on=lora_files.trained_on(adapter),
        license=license_id,
    )
    adapter_files.check_tensors(file, described, known)
    files.publish(file.with_name(file.name + DESCRIPTION), adapter_files.description(described))
    return described


def read(adapter: Path, package: Path) -> dict[str, Product]:
    """The products of an adapter by module name, in float32.

    Raises:
        CheckpointError: its tensors are not those that its settings ask for on this model, have values that are no
            numbers, or all of it is zero.
    """
    from safetensors.torch import load_file

    wanted, scales = _expected(adapter, package)
    given = load_file(adapter / checkpoint_files.ADAPTER_FILES[0])
    if other := sorted(given.keys() ^ wanted.keys()):
        whose = "is not what its settings ask for" if other[0] in given else "is missing"
        raise _misfit(
            adapter, f"{len(other)} tensors differ from those of the base model, such as {other[0]}, which {whose}"
        )
    for key, dims in wanted.items():
        if tuple(given[key].shape) != dims:
            raise _misfit(adapter, f"{key} has shape {list(given[key].shape)}, the base model asks for {list(dims)}")
        if not bool(given[key].isfinite().all()):
            raise CheckpointError("the adapter has values that are no numbers", where=str(adapter), why=key)
    products = {}
    for module, scale in scales.items():
        first, second = (given[f"{_PREFIX}{module}.{part}.weight"].double().numpy().T for part in PARTS)
        products[module] = Product(first.astype(np.float32), (second * scale).astype(np.float32))
    if not any(product.second.any() for product in products.values()):
        raise CheckpointError(
            "the adapter changes nothing",
            where=str(adapter),
            why="all of its lora_B are zero",
            fix="train it, or drop it",
        )
    return products


def _skeleton(package: Path) -> Any:
    """The base model without values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(package, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the base model is not known", where=str(package / "config.json"), why=str(error)
        ) from None


def _expected(adapter: Path, package: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """The shape of each tensor that the adapter's settings ask for on this model, and the scale of each module."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    try:
        config = LoraConfig.from_pretrained(str(adapter), local_files_only=True)
        config.init_lora_weights, config.base_model_name_or_path = False, None  # no values; no words about the name
        wrapped = get_peft_model(_skeleton(package), config, low_cpu_mem_usage=True)
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise _misfit(adapter, str(error)[:500]) from error
    scales = {
        name.removeprefix(_PREFIX): float(module.scaling["default"])
        for name, module in wrapped.named_modules()
        if isinstance(module, LoraLayer)
    }
    return {name: tuple(value.shape) for name, value in tensors.items()}, scales


def _widths(package: Path, products: Mapping[str, Product]) -> dict[str, int]:
    """Outputs of the projections that an exporter may have packed into one: of those without a product, too."""
    modules = {module.rpartition(".")[0] for module in products if module.endswith(_QKV)}
    model = _skeleton(package)
    return {f"{stem}.{name}": model.get_submodule(f"{stem}.{name}").out_features for stem in modules for name in _QKV}


def fill(
    products: Mapping[str, Product], known: Mapping[str, Slot], widths: Mapping[str, int], adapter: Path
) -> dict[str, npt.NDArray[Any]]:
    """The tensors of the adapter's file, by their names in the graph.

    The products of packed projections become one: their ``A`` side by side, their ``B`` on a diagonal of blocks.

    Args:
        widths: outputs of each ``q_proj``, ``k_proj`` and ``v_proj`` that may be packed.
        adapter: for errors.

    Raises:
        CheckpointError: a product has no slot of its shape, or is too large for the graph's type.
    """
    left, tensors = dict(products), {}
    for name, slot in known.items():
        if name.endswith(f".{_PACKED}"):
            stem = name.removesuffix(_PACKED)
            product = _packed([(f"{stem}{part}", left.pop(f"{stem}{part}", None)) for part in _QKV], widths)
        else:
            product = left.pop(name, None)
        if product is None:
            continue
        if (product.first.shape[0], product.second.shape[1]) != (slot.inputs, slot.outputs):
            shape = f"{product.first.shape[0]} inputs and {product.second.shape[1]} outputs"
            raise _misfit(adapter, f"{name} has {shape}, its slot {slot.inputs} and {slot.outputs}")
        for part, values in zip(PARTS, (product.first, product.second), strict=True):
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(values, slot.dtype)
            if not np.isfinite(stored).all():
                raise _misfit(adapter, f"{part} of {name} has values that are too large for {slot.dtype}")
            tensors[tensor_name(name, part)] = stored
    if left:
        raise _misfit(adapter, f"the graph has no slot for {len(left)} of its modules, such as {min(left)}")
    return tensors


def _packed(parts: list[tuple[str, Product | None]], widths: Mapping[str, int]) -> Product | None:
    found = [(name, product) for name, product in parts if product is not None]
    if not found:
        return None
    first = np.concatenate([product.first for _, product in found], axis=1)
    second = np.zeros((first.shape[1], sum(widths[name] for name, _ in parts)), np.float32)
    row = column = 0
    for name, product in parts:
        if product is not None:
            rank = len(product.second)
            second[row : row + rank, column : column + widths[name]] = product.second
            row += rank
        column += widths[name]
    return Product(first, second)


def _write(tensors: Mapping[str, npt.NDArray[Any]], file: Path) -> None:
    """Runtimes map the file into memory while they use it: it is never written in place."""
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
    adapter.set_parameters(values)
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            adapter.export_adapter(str(temporary.resolve()))
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"{file} cannot be written", why=str(error).splitlines()[0], fix="free some space, or give another place"
        ) from None


def _misfit(adapter: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "the adapter does not fit the base model",
        where=str(adapter),
        why=why,
        fix="use the model that the adapter was trained on (base_model_name_or_path in adapter_config.json)",
    )
