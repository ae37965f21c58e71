"""The hardware targets: one literal table of what is true of each, and what follows from it.

Every limit is data with its reason beside it; `problems` holds a recipe's export and scheme against a row. Kernels are
those of ONNX Runtime's execution providers, from its sources (1.24 to 1.32).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.facts.scheme import Scheme, WeightScheme

Loc = tuple[str | int, ...]
CPU = "CPUExecutionProvider"
QNN = "QNNExecutionProvider"
EMBEDDING = "model.embed_tokens"  # the path of the embedding, as exporters write it

# `soc_model` of QNN's backend by chip, from onnxruntime-qnn 2.7.0 (QAIRT 2.51); the chip's name as Qualcomm sells it.
SOCS: dict[str, tuple[int, str]] = {
    "sm8350": (30, "Snapdragon 888"),
    "sm8450": (36, "Snapdragon 8 Gen 1"),
    "sm8550": (43, "Snapdragon 8 Gen 2"),
    "sm8650": (57, "Snapdragon 8 Gen 3"),
    "sc8380xp": (60, "Snapdragon X Elite"),
    "sm8750": (69, "Snapdragon 8 Elite"),
    "sm8850": (87, "Snapdragon 8 Elite Gen 5"),
    "sc8480xp": (88, "Snapdragon X2 Elite"),
}


@dataclass(frozen=True)
class Runtime:
    """What a device needs to run a package.

    Attributes:
        package: distribution to install.
        minimum: oldest version of it that packages were made for.
        platforms: systems that it is published for.
        plugin: distribution with the execution provider, where that is one of its own.
        install: what to type, where ``pip install PACKAGE==VERSION`` is not enough.
        newest: last version, where there are no more to come; packages are held to what it loads.
    """

    package: str
    minimum: str
    platforms: str
    newest: str = ""
    plugin: str = ""
    install: str = ""


@dataclass(frozen=True)
class Tolerance:
    """How far a device may be from what was validated, when it is fed the golden answers token by token.

    Attributes:
        top1: least share of golden tokens that it ranks first.
        logprob: largest mean difference of the golden tokens' log-probabilities, in nats.
    """

    top1: float
    logprob: float


@dataclass(frozen=True)
class ExpertKernels:
    """Fused operators for mixtures of experts.

    Attributes:
        whole: whether there is one for float weights (``MoE``).
        bits: widths in bits of the one for quantized weights (``QMoE``).
        zero_points: whether its blocks may be asymmetric.
        unnormalized: whether it takes the router's weights as they are; else those of the chosen experts sum to one.
        multiple: what hidden size and inner size are multiples of.
    """

    whole: bool
    bits: tuple[int, ...] = ()
    zero_points: bool = False
    unnormalized: bool = False
    multiple: int = 1


@dataclass(frozen=True)
class Kernels:
    """Quantized weights that a provider's kernels compute with.

    Attributes:
        block_sizes: for each width in bits, the block sizes.
        zero_points: whether blocks may be asymmetric.
        embedding: which quantized embeddings (``GatherBlockQuantized``) there are: ``any``, ``asymmetric`` or none.
        form: ``nbits`` (``MatMulNBits``), ``qdq`` (``DequantizeLinear`` before ``MatMul``), ``static`` (the same, in
            integers from end to end) or ``openvino`` (its own graphs).
        experts: fused operators for mixtures of experts; without, every expert is computed for every token.
    """

    block_sizes: Mapping[int, tuple[int, ...]]
    zero_points: bool = True
    embedding: str = "any"
    form: str = "nbits"
    experts: ExpertKernels | None = None


@dataclass(frozen=True)
class Target:
    """A kind of hardware that packages are built for.

    Attributes:
        name: as recipes spell it.
        title: what people call it.
        provider: ONNX Runtime execution provider.
        option: the provider's name in ``genai_config.json``; empty for the CPU.
        dtypes: activations between kernels; the first is the default.
        kernels: quantized weights; ``None`` when weights come quantized from elsewhere.
        shapes: ``dynamic`` or ``static``.
        runtime: what a device needs.
        replay: tolerance of the golden replay on the device; devices differ in how they sum and round products.
        max_file: largest file that the runtime reads, in bytes; 0 when there is no such limit.
        max_opset: newest opset that ``runtime.newest`` reads.
        algorithms: what quantizes for it.
        exporters: what writes graphs for it.
        compiled: whether graphs are compiled ahead of time, for one chip.
        isolated: whether graphs and weights are made in an environment of their own (`pipeline.npu.isolated`).
        missing: why it cannot be built; empty when it can.
        draft_tokens: longest draft that its packages verify at once, unless a recipe has another.
        no_adapters: why LoRA adapters cannot be loaded beside the weights; empty when they can.
    """

    name: str
    title: str
    provider: str
    option: str
    dtypes: tuple[str, ...]
    kernels: Kernels | None
    runtime: Runtime
    replay: Tolerance = Tolerance(top1=0.9, logprob=0.15)
    shapes: str = "dynamic"
    max_file: int = 0
    max_opset: int = 0
    algorithms: tuple[str, ...] = ("gptq", "min_error", "rtn", "k_quant", "none")
    exporters: tuple[str, ...] = ("genai", "optimum", "native")
    compiled: bool = False
    isolated: bool = False
    missing: str = ""
    draft_tokens: int = 0
    no_adapters: str = ""


_FINE = (16, 32, 64, 128, 256)
_GPU_BLOCKS = (16, 32, 64, 128)
_GB = 1 << 30
_NPU = Tolerance(top1=0.8, logprob=0.3)  # NPUs round activations between operators
# Read in ONNX Runtime's sources (core/session/lora_adapters.cc): tensors of adapters go nowhere else.
_NOT_MOVED = "ONNX Runtime brings adapters to processors and, through CUDA, to NVIDIA GPUs only"
_NO_SLOTS = "its graphs are compiled as a whole, and take no weights at run time"

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            title="x86-64 and Arm processors",
            provider=CPU,
            option="",
            # Float16 has no kernels of its own here: it would be computed in float32 with a conversion each way.
            dtypes=("float32",),
            kernels=Kernels(
                {4: _FINE, 8: (-1, *_FINE)},
                experts=ExpertKernels(whole=True, bits=(4, 8), zero_points=True, unnormalized=True),
            ),
            runtime=Runtime("onnxruntime-genai", "0.14.1", "Linux, Windows, macOS"),
            algorithms=("gptq", "min_error", "rtn", "k_quant", "dynamic", "w8a8", "none"),
            # Costs a prefill the head of 15 more tokens, and decoding nothing. From a GPU, the runtime would copy these
            # logits to the processor at every token, and could not capture its graph.
            draft_tokens=15,
        ),
        Target(
            name="cuda",
            title="NVIDIA GPUs with CUDA",
            provider="CUDAExecutionProvider",
            option="cuda",
            dtypes=("float16",),
            # Blocks of 256 fail when one token is decoded. Without zero points the gather of releases until 2026 took 0
            # for the middle of the range (onnxruntime issue 31692).
            kernels=Kernels(
                {4: _GPU_BLOCKS, 8: _GPU_BLOCKS},
                embedding="asymmetric",
                # Quantized experts are of a layout of their own there, which no other provider could be validated with.
                experts=ExpertKernels(whole=True, unnormalized=True, multiple=64),
            ),
            runtime=Runtime("onnxruntime-genai-cuda", "0.14.1", "Linux, Windows"),
        ),
        Target(
            name="directml",
            title="GPUs of Windows with DirectX 12",
            provider="DmlExecutionProvider",
            option="dml",
            dtypes=("float16",),
            # The runtime captures the whole graph: one node without a kernel, as the gather from quantized rows is, and
            # the session fails.
            kernels=Kernels({4: _GPU_BLOCKS, 8: _GPU_BLOCKS}, embedding=""),
            runtime=Runtime(
                "onnxruntime-genai-directml",
                "0.14.1",
                "Windows",
                newest="0.14.1",
                # Its own requirement, onnxruntime-directml >= 1.26, was never published.
                install="pip install numpy onnxruntime-directml==1.24.4 && "
                "pip install --no-deps onnxruntime-genai-directml==0.14.1",
            ),
            max_file=4 * _GB,
            max_opset=22,
            no_adapters=_NOT_MOVED,
        ),
        Target(
            name="webgpu",
            title="GPUs through WebGPU",
            provider="WebGpuExecutionProvider",
            option="webgpu",
            dtypes=("float16",),
            kernels=Kernels(
                {4: (32, 64, 128), 8: (32, 64, 128)},
                embedding="asymmetric",
                experts=ExpertKernels(whole=False, bits=(4, 8)),
            ),
            runtime=Runtime("onnxruntime-genai", "0.14.1", "Linux, Windows, macOS", plugin="onnxruntime-ep-webgpu"),
            max_file=2 * _GB,  # of one file in a browser
            no_adapters=_NOT_MOVED,
        ),
        Target(
            name="tensorrt-rtx",
            title="NVIDIA RTX GPUs with TensorRT-RTX",
            provider="NvTensorRTRTXExecutionProvider",
            option="NvTensorRtRtx",
            dtypes=("float16",),
            kernels=Kernels({4: (32, 64, 128)}, zero_points=False, embedding="", form="qdq"),
            algorithms=("gptq", "min_error", "none"),  # Olive's passes write no QDQ form
            runtime=Runtime(
                "onnxruntime-genai-cuda", "0.14.1", "Linux, Windows", plugin="onnxruntime-ep-nv-tensorrt-rtx"
            ),
            no_adapters=_NOT_MOVED,
        ),
        Target(
            name="npu",
            title="NPUs of Qualcomm Snapdragon (HTP)",
            provider=QNN,
            option="qnn",
            dtypes=("uint16",),
            # One scale per channel, or the HTP's own blocks; the embedding is looked up by the processor.
            kernels=Kernels({4: (16, 32, 64), 8: (-1,)}, zero_points=False, embedding="any", form="static"),
            runtime=Runtime(
                "onnxruntime-genai", "0.14.1", "Windows on Arm; Linux for the emulator", plugin="onnxruntime-qnn==2.7.0"
            ),
            replay=_NPU,
            shapes="static",
            max_file=3 * _GB,  # of one context binary: the NPU addresses 32 bits
            algorithms=("static",),
            exporters=("static",),
            compiled=True,
            no_adapters=_NO_SLOTS,
        ),
        Target(
            name="openvino",
            title="NPUs of Intel Core Ultra (OpenVINO)",
            provider="OpenVINOExecutionProvider",
            option="OpenVINO",
            dtypes=("float16",),
            # The NPU's pipeline for language models takes whole channels, or groups that are multiples of 64; Intel's
            # guide has symmetric weights only.
            kernels=Kernels({4: (-1, 64, 128, 256), 8: (-1,)}, zero_points=False, form="openvino"),
            runtime=Runtime("onnxruntime-genai", "0.14.1", "Windows, Linux", plugin="onnxruntime-ep-openvino==1.8.1"),
            replay=_NPU,
            algorithms=("nncf",),
            exporters=("openvino",),
            isolated=True,
            no_adapters=_NO_SLOTS,
        ),
        Target(
            name="vitisai",
            title="NPUs of AMD Ryzen AI",
            provider="VitisAIExecutionProvider",
            option="VitisAI",
            dtypes=("float32",),
            kernels=Kernels({4: (32, 128)}),
            runtime=Runtime("onnxruntime-genai-ryzenai", "1.4", "Windows"),
            replay=_NPU,
            missing="the model generator of Ryzen AI, which writes graphs for this provider, and the provider itself "
            "come with AMD's installer only; the package index has neither",
            no_adapters=_NO_SLOTS,
        ),
    )
}


def problems(target: Target, export: Mapping[str, Any], scheme: Scheme | None) -> Iterator[tuple[Loc, str]]:
    """(location in the recipe, reason) of each thing that the target cannot do.

    Args:
        export: the recipe's section ``export``, with the exporter that writes the graph.
        scheme: of the quantization, when it is well-formed.
    """
    yield from _export_problems(target, export, scheme)
    dtype = export.get("dtype")
    if dtype and dtype not in target.dtypes:
        yield ("export", "dtype"), f"{dtype} is not computed with on {target.name}: {' or '.join(target.dtypes)}"
    if scheme is None:
        return
    if scheme.algorithm not in target.algorithms:
        known = ", ".join(target.algorithms)
        yield ("quantize", "algorithm"), f"{scheme.algorithm} has no kernels on {target.name}; known: {known}"
    kernels = target.kernels
    if kernels is None:
        return
    for loc, weight in scheme.weight_schemes():
        if target.compiled and loc == ("embedding",):
            continue  # it is looked up by the processor
        yield from (((*("quantize", *loc), key), text) for key, text in _weight_problems(target.name, kernels, weight))
    shared = scheme.embedding == "shared"
    rows = scheme.head or scheme.body if shared else scheme.of_weight(EMBEDDING, "embedding")
    if isinstance(rows, WeightScheme):
        if not kernels.embedding:
            yield (
                ("quantize", "embedding"),
                f"{target.name} has no kernel that gathers from quantized rows: use `float`",
            )
        elif kernels.embedding == "asymmetric" and rows.symmetric:
            text = f"rows without zero points are read wrong by some releases on {target.name}: set `symmetric: false`"
            yield ("quantize", "embedding"), text


# Options of the exporter that only one kind of hardware has: name → the targets that do, and why no other.
_ONLY: dict[str, tuple[tuple[str, ...], str]] = {
    "enable_cuda_graph": (("cuda", "tensorrt-rtx"), "it records CUDA graphs"),
    "enable_webgpu_graph": (("webgpu",), "it records WebGPU command buffers"),
    "use_cuda_bf16": (("cuda", "tensorrt-rtx"), "no other provider computes in bfloat16"),
    "use_paged_attention": (("cuda",), "paged attention is a CUDA kernel"),
    "use_webgpu_fp32": (("webgpu",), "other targets have the dtype of their row"),
}


def _export_problems(target: Target, export: Mapping[str, Any], scheme: Scheme | None) -> Iterator[tuple[Loc, str]]:
    options = export.get("options")
    options = options if isinstance(options, Mapping) else {}
    extra = options.get("extra_options")
    for section, given in ((("export", "options"), options), (("export", "options", "extra_options"), extra)):
        for name in given if isinstance(given, Mapping) else ():
            only, why = _ONLY.get(str(name), ((), ""))
            if why and target.name not in only:
                yield (*section, str(name)), f"{name} is for {' and '.join(only)} only: {why}"
            if name == "use_qdq" and scheme and any(weight.bits == 8 for _, weight in scheme.weight_schemes()):
                yield (*section, name), "8-bit weights have no QDQ form in the exporter: use 4 bits, or leave it out"
    opset = options.get("target_opset")
    if target.max_opset and isinstance(opset, int) and opset > target.max_opset:
        text = f"{target.runtime.package} {target.runtime.newest} reads opsets up to {target.max_opset}"
        yield ("export", "options", "target_opset"), text
    exporter = export["exporter"]
    if exporter not in target.exporters:
        known = " or ".join(target.exporters)
        yield ("export", "exporter"), f"{target.name} takes graphs of {known}, {exporter} writes others"
        return
    if exporter in ("static", "openvino", "native") and options:
        yield ("export", "options"), f"exporter {exporter} takes no options: remove `options`"
    if exporter in ("static", "openvino"):
        if export.get("last_token_head") is False:
            yield ("export", "last_token_head"), f"exporter {exporter} always computes the head for the last token only"
        if export.get("draft_tokens"):
            yield ("export", "draft_tokens"), f"exporter {exporter} always computes the head for the last token only"
    elif exporter == "optimum" and "float32" not in target.dtypes:
        yield ("export", "exporter"), f"optimum traces float32 graphs; {target.name} computes in {target.dtypes[0]}"


def file_problem(target: Target, size: int) -> str:
    """Why weights of ``size`` bytes in one file cannot be read on the target; empty when they can."""
    if not target.max_file or size <= target.max_file:
        return ""
    limit = f"{target.runtime.package} reads files up to {target.max_file / 1e9:.1f} GB"
    return f"its weights take about {size / 1e9:.1f} GB, and {limit}"


def _weight_problems(name: str, kernels: Kernels, weight: WeightScheme) -> Iterator[tuple[str, str]]:
    sizes = kernels.block_sizes.get(weight.bits)
    if sizes is None:
        yield "bits", f"{weight.bits}-bit weights have no kernels on {name}"
    elif weight.block_size not in sizes:
        known = ", ".join(map(str, sizes))
        yield "block_size", f"blocks of {weight.block_size} have no {weight.bits}-bit kernel on {name}; known: {known}"
    if not weight.symmetric and not kernels.zero_points:
        yield "symmetric", f"zero points have no kernels on {name}: set `symmetric: true`"
