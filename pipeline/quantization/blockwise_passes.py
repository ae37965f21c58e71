"""This project's own quantizers as Olive passes, so that they run and are configured like the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from pipeline import olive
from pipeline.facts.scheme import WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter
from pipeline.quantization import blockwise, graph_weights, w8a8
from pipeline.quantization.blockwise import BlockQuantized
from pipeline.quantization.calibration import Hessians


class BlockWiseMinErrorQuantization(Pass):  # type: ignore[misc]
    """Quantize weights block by block with least-squares scales, one weight at a time.

    The relative squared error of each weight is in the result's ``model_attributes["relative_error"]``.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:  # noqa: ARG003
        return {
            "schemes": PassConfigParam(
                type_=dict[str, dict[str, int | bool]],
                required=True,
                description="For each path of a weight its {bits, block_size, symmetric}; others stay as they are.",
            ),
            "accuracy_level": PassConfigParam(
                type_=int, default_value=0, description="MatMulNBits attribute: 0 unset, 1 float32, 4 int8 activations."
            ),
            "share_embedding": PassConfigParam(
                type_=bool,
                default_value=False,
                description="Gather from the quantized head instead of storing the embedding.",
            ),
            "integer": PassConfigParam(
                type_=list[str],
                default_value=[],
                description="Paths of the weights that are multiplied in integers (pipeline.quantization.w8a8).",
            ),
            "form": PassConfigParam(
                type_=str, default_value="nbits", description="nbits (MatMulNBits) or qdq (DequantizeLinear, MatMul)."
            ),
            "progress": PassConfigParam(
                type_=Callable[[float, str], None],
                description="Called after each weight with the fraction done and the path of the weight.",
            ),
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        import onnx

        source, out_dir = Path(model.model_path), Path(output_model_path)
        extra = self._extra(config)
        edited = graph.load(source)
        with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
            kept, integer_errors = w8a8.quantize_projections(
                edited, source.parent, writer, config.integer, config.progress
            )
            errors = graph_weights.quantize_weights(
                edited,
                source.parent,
                writer,
                {path: WeightScheme.model_validate(given) for path, given in config.schemes.items()},
                accuracy_level=config.accuracy_level,
                share_embedding=config.share_embedding,
                form=config.form,
                progress=config.progress,
                kept=kept,
                **extra,
            )
        onnx.save(edited, str(out_dir / "model.onnx"))
        return olive.onnx_model(out_dir, {"relative_error": integer_errors | errors})

    def _extra(self, config: Any) -> dict[str, Any]:  # noqa: ARG002
        """More arguments of `graph_weights.quantize_weights`."""
        return {}


class BlockWiseGptqQuantization(BlockWiseMinErrorQuantization):
    """The same by GPTQ: rounding errors are made up for by what the calibration text shows.

    8-bit weights and the embedding take least-squares scales: the error of the former is small, and the latter is
    looked up, not multiplied with.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return super()._default_config(accelerator_spec) | {
            "checkpoint": PassConfigParam(type_=str, required=True, description="Directory of the PyTorch reference."),
            "calibration_windows": PassConfigParam(
                type_=int, default_value=16, description="Windows of calibration text to read, 512 tokens each."
            ),
            "rotate": PassConfigParam(
                type_=bool, default_value=False, description="Whether the graph is of the rotated checkpoint."
            ),
        }

    def _extra(self, config: Any) -> dict[str, Any]:
        hessians = Hessians(Path(config.checkpoint), config.calibration_windows, config.rotate)

        def quantize(path: str, values: Any, scheme: WeightScheme) -> BlockQuantized:
            made = hessians.quantize(path, values, scheme)
            hessians.replace(path, lambda: blockwise.dequantize(made, scheme.bits, values.shape[1]))
            return made

        return {"quantize": quantize}
