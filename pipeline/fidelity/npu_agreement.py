"""How a compiled decoder agrees with its reference, executed on the NPU or its emulator with no way to the processor.

The same graphs run beside it on the processor, uncompiled: what compiling changed is the difference of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkpoint.reference import Reference
from pipeline.errors import StageError
from pipeline.fidelity import metrics
from pipeline.fidelity.agreement import Tally
from pipeline.graph import edits as graph
from pipeline.npu import qnn, static_decoder, static_session
from pipeline.npu.static_export import NPU_STAGES, STAGES
from pipeline.npu.static_session import Stages

Windows = Sequence[tuple[str, Sequence[int]]]


def measure(
    reference: Reference,
    compiled: Path,
    quantized: Path,
    soc: str,
    windows: Windows,
    decoded: int,
    scratch: Path,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Figures of the prefill and the decode path, and how far the NPU is from the processor.

    Args:
        compiled: folder of the compiled stages.
        quantized: folder of the same stages before they were compiled.
        soc: the chip that they are compiled for.
        windows: (domain, token ids) of each text.
        decoded: how many tokens at the end of each window take the decode path.
        scratch: a folder for a head that takes as many rows as prefill does; weights and scales are the head's.

    Returns:
        ``prefill``, ``decode`` (`pipeline.fidelity.agreement.Tally.figures`, with ``domains``), and ``npu``:
        ``placement`` (nodes by provider, of each stage), ``largest_difference`` and ``mean_kl`` of its logits to the
        processor's, ``largest_logit``.

    Raises:
        ValueError: logits have NaN or infinite values.
        StageError: a node cannot run on the NPU, or a window does not fit the cache.
    """
    processor = _open(quantized, quantized, None)
    _check_windows(processor, windows, decoded)
    npu, placement = _on_npu(compiled, quantized, soc, scratch, processor.window)
    prefill, decode = Tally(), Tally()
    largest = magnitude = 0.0
    divergence: list[Any] = []
    for index, (domain, ids) in enumerate(windows):
        progress(index / len(windows), f"window {index + 1} of {len(windows)} ({domain}), emulated")
        wanted = metrics.log_softmax(reference.logits(ids))
        cut = len(ids) - decoded
        found, other = _logits(npu, ids, cut, "wide_head"), _logits(processor, ids, cut, "head")
        prefill.add(domain, wanted[:cut], found[:cut], ids[:cut])
        if decoded:
            decode.add(domain, wanted[cut:], found[cut:], ids[cut:])
        largest = max(largest, float(np.abs(found - other).max()))
        magnitude = max(magnitude, float(np.abs(other).max()))
        divergence.append(metrics.kl_divergence(metrics.log_softmax(other), metrics.log_softmax(found)))
    tallies = {"prefill": prefill, "decode": decode}
    figures = {
        path: {**tally.figures(), "domains": {domain: tally.figures(domain) for domain in tally.domains}}
        for path, tally in tallies.items()
        if tally.domains
    }
    facts = {
        "soc": soc,
        "pad": reference.model.config.vocab_size - 1,
        "placement": placement,
        "largest_difference": round(largest, 5),
        "largest_logit": round(magnitude, 3),
        "mean_kl": round(float(np.concatenate(divergence).mean()), 7),
    }
    return {**figures, "npu": facts}


def _check_windows(stages: Stages, windows: Windows, decoded: int) -> None:
    slots = next(iter(stages.cache().values())).shape[2]
    for length in {len(ids) for _, ids in windows}:
        if not decoded < length <= slots:
            raise StageError(
                f"a window of {length} tokens, of which {decoded} are decoded, cannot be measured",
                where="validate.window_tokens, validate.decode_tokens",
                why=f"the cache has {slots} slots, and prefill takes at least one token",
                fix="ask for shorter windows, or for a larger npu.cache",
            )


def _open(folder: Path, quantized: Path, npu: Any) -> Stages:
    """All stages on the processor, or those of ``npu`` and the rest there."""
    sessions = dict(npu or {})
    for name in STAGES:
        if name not in sessions:
            sessions[name] = static_session.on_processor(folder / f"{name}.onnx")
    shape = graph.load(quantized / "prefill.onnx").graph.input[0].type.tensor_type.shape
    # Any id does for rows that nobody looks at.
    return Stages(sessions, window=shape.dim[1].dim_value, pad=0)


def _on_npu(
    compiled: Path, quantized: Path, soc: str, scratch: Path, window: int
) -> tuple[Stages, dict[str, dict[str, int]]]:
    """The compiled stages, and where the nodes that they were compiled from are."""
    import onnx

    scratch.mkdir()
    wide = static_decoder.with_tokens(graph.load(quantized / "head.onnx"), window)
    onnx.save(wide, str(scratch / "wide_head.onnx"))
    static_session.link(quantized / "head.data", scratch / "head.data")
    sessions = {name: qnn.session(compiled / f"{name}.onnx", qnn.options(soc)) for name in NPU_STAGES}
    sessions["wide_head"] = qnn.session(scratch / "wide_head.onnx", qnn.options(soc))
    placement = {name: qnn.placement(session) for name, session in sessions.items()}
    return _open(compiled, quantized, sessions), placement


def _logits(stages: Stages, ids: Sequence[int], cut: int, head: str) -> Any:
    """Logits ``[n, V]``: of the first ``cut`` tokens by prefill, of the others one by one."""
    hidden, cache = stages.prefill(ids[:cut])
    parts = [stages.logits(hidden, head)]
    for slot in range(cut, len(ids)):
        parts.append(stages.logits(stages.call("decode", [ids[slot]], slot, cache)))
    return np.concatenate(parts)
