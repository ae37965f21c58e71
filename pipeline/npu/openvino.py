"""Intel's NPU through OpenVINO: its own graphs (IR), made in the isolated environment, wrapped for ONNX Runtime.

A package's ``model.onnx`` is one EPContext node that names ``model.xml``; its weights are in ``model.bin``. Only the
OpenVINO execution provider reads that, on any of its devices.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import olive
from pipeline.errors import RuntimeMissing, StageError
from pipeline.facts.scheme import Scheme
from pipeline.facts.target import TARGETS
from pipeline.npu import isolated
from pipeline.package.replay import OPENVINO_ON_CPU, PLUGINS

if TYPE_CHECKING:
    import numpy.typing as npt

INPUTS = ("input_ids", "attention_mask", "position_ids")
# What the runtime is told of such a decoder: it keeps its cache to itself, and is for the NPU and nothing else.
DECODER = {
    "inputs": {name: name for name in INPUTS},
    "outputs": {"logits": "logits"},
    "session_options": {
        "log_id": "onnxruntime-genai",
        "session.disable_cpu_ep_fallback": "1",
        "provider_options": [{"OpenVINO": {"device_type": "NPU", "enable_causallm": "True"}}],
    },
}
_RUNNER = isolated.PINNED.parent / "olive_runner.py"
# OpenVINO and NNCF report home unless a CI runs them, and then take their time to end.
_CHILD = {"CI": "true", "HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "PYTHONPATH": ""}
# Types of constants in an IR, and their bits. Scales are of the float types, and so is what stays unquantized.
_BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8, "f16": 16, "bf16": 16, "f32": 32}


def convert(checkpoint: Path, out_dir: Path) -> None:
    """Write a checkpoint as a float32 IR: ``model.xml`` and ``model.bin``.

    Raises:
        RuntimeMissing: there is no isolated environment.
        StageError: Olive's pass failed, or left something out.
    """
    config = {
        # Its tokenizer would be a graph with operators of a library that packages do not have.
        "extra_args": {"task": "text-generation-with-past", "disable_convert_tokenizer": True},
        "ov_quant_config": {"weight_format": "fp32"},
    }
    _run("openvino", config, {"type": "HfModel", "config": {"model_path": str(checkpoint)}}, out_dir / "ir")
    _take(out_dir / "ir" / "openvino_model", out_dir)


def compress(source: Path, out_dir: Path, scheme: Scheme) -> dict[str, Any]:
    """Quantize the weights of ``source/model.xml`` into ``out_dir``.

    Returns:
        facts: ``bits_per_weight``, and ``weights``: how many there are of each type.

    Raises:
        RuntimeMissing: there is no isolated environment.
        StageError: Olive's pass failed, or did not do what the scheme says.
    """
    assert scheme.body is not None  # `scheme` refuses it
    given = {**scheme.options.get("compress_config", {}), "mode": f"int{scheme.body.bits}_sym"}
    if scheme.body.bits == 4:
        given |= {"group_size": scheme.body.block_size, "backup_mode": "int8_sym"}
    model = {"type": "OpenVINOModel", "config": {"model_path": str(source)}}
    _run("nncf", {"compress_config": given}, model, out_dir / "ir")
    _take(out_dir / "ir" / "model", out_dir)
    shutil.copyfile(source / "model.onnx", out_dir / "model.onnx")
    total = sum(_constants(source / "model.xml").values())
    made = _constants(out_dir / "model.xml")
    _check(made, scheme.body.bits, given.get("ratio", 1.0))
    bits = 8 * (out_dir / "model.bin").stat().st_size / total
    return {"bits_per_weight": round(bits, 3), "weights": dict(made)}


def _take(stem: Path, out_dir: Path) -> None:
    """Move an IR out of the folder that a pass wrote, under the names that packages have."""
    for ending in (".xml", ".bin"):
        path = stem.with_suffix(ending)
        if not path.is_file():
            raise StageError(f"Olive ended without {path.name}", where=str(stem.parent))
        path.replace(out_dir / f"model{ending}")
    shutil.rmtree(stem.parent)


def _constants(path: Path) -> Counter[str]:
    """How many numbers of each type an IR's constants are."""
    counts: Counter[str] = Counter()
    for kind, size in re.findall(r'<data element_type="(\w+)" [^>]*\bsize="(\d+)"', path.read_text(encoding="utf-8")):
        if kind in _BITS:
            counts[kind] += 8 * int(size) // _BITS[kind]
    return counts


def _check(made: Mapping[str, int], bits: int, ratio: float) -> None:
    """That weights are quantized, without zero points, and as many of them to ``bits`` as asked for."""
    total = made.get("i4", 0) + made.get("i8", 0)
    problem = ""
    if made.get("u4") or made.get("u8"):
        problem = "some have zero points"
    elif sum(made.get(kind, 0) for kind in ("f16", "bf16", "f32")) > total / 8:  # scales and norms are fewer
        problem = "some are left in floating point"
    elif (bits == 4) != bool(made.get("i4")) or (ratio < 1.0 and not made.get("i8")):
        problem = f"{bits}-bit weights were asked for, with a ratio of {ratio:g}"
    if problem:
        raise StageError("weights were not quantized as the scheme says", why=f"{problem}: {dict(made)}")


def _run(name: str, config: dict[str, Any], model: dict[str, Any], out_dir: Path) -> None:
    """Run one of Olive's passes in the isolated environment.

    Raises:
        RuntimeMissing: there is none.
        StageError: the pass failed.
    """
    programs = isolated.programs()
    kind = olive.pass_class(name)
    from olive.model import ModelConfig
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.systems.python_environment import PythonEnvironmentSystem

    system = PythonEnvironmentSystem(str(programs), environment_variables=_CHILD)
    system.pass_runner_path = _RUNNER
    made = create_pass_from_dict(kind, config, disable_search=True)
    try:
        with _unlogged():
            system.run_pass(made, ModelConfig.model_validate(model), str(out_dir))
    except subprocess.CalledProcessError as error:
        text = (error.stderr or b"").decode("utf-8", "replace").strip()
        print(text, file=sys.stderr)  # for the log of the step
        why = text.splitlines()[-1] if text else f"it ended with exit code {error.returncode}"
        raise StageError(f"Olive's {kind.__name__} failed", where=str(programs), why=why) from None


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """When a child fails, Olive logs its whole environment: that may hold secrets."""
    logger = logging.getLogger("olive.common.utils")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def wrap(out_dir: Path, vocabulary: int) -> None:
    """Write ``model.onnx``: one node that hands everything to ``model.xml``, which keeps its cache to itself."""
    import onnx
    from onnx import TensorProto, helper

    lengths = {"input_ids": "sequence", "attention_mask": "total", "position_ids": "sequence"}
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", lengths[name]]) for name in INPUTS]
    inputs.append(helper.make_tensor_value_info("beam_idx", TensorProto.INT32, ["batch"]))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary])
    node = helper.make_node(
        "EPContext",
        [value.name for value in inputs],
        ["logits"],
        name="openvino",
        domain="com.microsoft",
        source=TARGETS["openvino"].provider,
        ep_cache_context="model.xml",
        ep_sdk_version=isolated.pins()["openvino"],
        embed_mode=0,
        main_context=1,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "openvino", inputs, [logits])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(out_dir / "model.onnx"))


def prompt_logits(package: Path, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logits ``[T, V]`` float32 after each of ``ids`` (``[T]``), fed at once to OpenVINO's CPU device in float32.

    The runtime of packages gives those of the last token only. The cache inside the graph cannot be emptied, so that
    each call has a session of its own.

    Raises:
        RuntimeMissing: the execution provider is not installed, or offers no such device here.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options = {"enable_causallm": "False", "load_config": OPENVINO_ON_CPU["load_config"]}
    settings.add_provider_for_devices([_processor()], options)
    session = onnxruntime.InferenceSession(str(package / "model.onnx"), settings)
    count = len(ids)
    feed = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    logits: npt.NDArray[np.float32] = session.run(["logits"], feed)[0][0]
    return logits


def _processor() -> Any:
    """OpenVINO's CPU device, as ONNX Runtime lists it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    name, module = PLUGINS["OpenVINO"]
    fix = f"pip install {TARGETS['openvino'].runtime.plugin}"
    if not any(device.ep_name == name for device in onnxruntime.get_ep_devices()):
        try:
            library = __import__(module).get_library_path()
            onnxruntime.register_execution_provider_library(name, str(library))
        except Exception as error:  # the binding has several classes of its own
            why = str(error).split("\n")[0]
            raise RuntimeMissing("OpenVINO's execution provider cannot be loaded", why=why, fix=fix) from None
    for device in onnxruntime.get_ep_devices():
        if device.ep_name == name and device.ep_metadata.get("ov_device") == "CPU":
            return device
    raise RuntimeMissing(
        "OpenVINO offers no CPU device here", why="a package is not shipped unless it was validated", fix=fix
    )
