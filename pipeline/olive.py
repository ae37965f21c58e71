"""Olive, one pass at a time: options checked against the installed pass, failures raised.

Olive's engine logs a failed pass and exits 0, and it ignores options that a pass does not know. Passes are therefore
run directly, and what they say they take is asked of them first.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import graph
from pipeline.errors import RecipeError, RuntimeMissing, StageError
from pipeline.scheme import Scheme, WeightScheme

if TYPE_CHECKING:
    from pipeline.artifact import Progress

PASSES: dict[str, tuple[str, str]] = {
    "genai": ("olive.passes.onnx.model_builder", "ModelBuilder"),
    "optimum": ("olive.passes.onnx.optimum_conversion", "OptimumConversion"),
    "rtn": ("olive.passes.onnx.rtn_quantization", "OnnxBlockWiseRtnQuantization"),
    "k_quant": ("olive.passes.onnx.kquant_quantization", "OnnxKQuantQuantization"),
    "dynamic": ("olive.passes.onnx.quantization", "OnnxDynamicQuantization"),
}

# Options that follow from other parts of a recipe: setting them again could only contradict.
_OURS = {
    "genai": ("precision", "metadata_only", "search"),
    "optimum": ("fp16", "device", "components"),
    "rtn": ("bits", "block_size", "is_symmetric", "accuracy_level", "nodes_to_include", "nodes_to_exclude"),
    "k_quant": ("bits", "block_size", "accuracy_level", "customized_weight_config", "nodes_to_exclude"),
    "dynamic": ("quant_mode",),
}


def _pass_class(name: str) -> Any:
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    module, attribute = PASSES[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise RuntimeMissing("Olive cannot be loaded", why=str(error), fix="pip install '.[build]'") from None


def known_options(name: str) -> list[str]:
    """Options of the installed pass that a recipe may set."""
    from olive.hardware import DEFAULT_CPU_ACCELERATOR

    configured = _pass_class(name)._default_config(DEFAULT_CPU_ACCELERATOR)
    return sorted(option for option in configured if option not in _OURS[name])


def check_options(name: str, options: Mapping[str, Any], where: str) -> None:
    """Refuse options that the installed pass would ignore or reject.

    Raises:
        RecipeError: with all of them, and the nearest right names.
    """
    known = known_options(name) if options else []
    problems = []
    for option in options:
        if option in known:
            continue
        if option in _OURS[name]:
            problems.append(f"`{option}` follows from other keys of the recipe")
            continue
        near = difflib.get_close_matches(option, known, 1, 0.5)
        problems.append(f"unknown option `{option}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    if not problems:
        from olive.hardware import DEFAULT_CPU_ACCELERATOR

        if not options:
            return
        try:
            required = {"precision": "fp32"} if name == "genai" else {}
            _pass_class(name).generate_config(DEFAULT_CPU_ACCELERATOR, {**required, **options}, disable_search=True)
        except Exception as error:  # pydantic's, of whichever version Olive uses
            problems.append(" ".join(str(error).split()))
    if problems:
        rows = "\n".join(f"  {problem}" for problem in problems)
        raise RecipeError(
            f"Olive's {PASSES[name][1]} does not take these options\n{rows}", where=where, fix=f"known: {', '.join(known)}"
        )


def _run(name: str, config: Mapping[str, Any], model: Any, output: Path) -> Any:
    """Run one pass and return Olive's model handler."""
    from olive.passes.olive_pass import create_pass_from_dict

    kind = _pass_class(name)
    try:
        made = create_pass_from_dict(kind, dict(config), disable_search=True).run(model, str(output))
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise StageError(
            f"Olive's {kind.__name__} failed", where=str(dict(config)), why=f"{type(error).__name__}: {error}"
        ) from error
    if made is None:
        raise StageError(f"Olive's {kind.__name__} yielded no model", where=str(dict(config)))
    return made


def export_genai(checkpoint: Path, out_dir: Path, options: Mapping[str, Any]) -> None:
    """Write ``model.onnx``, ``model.onnx.data`` and ``genai_config.json`` (float32) with Olive's ModelBuilder."""
    from olive.model import HfModelHandler

    _run("genai", {"precision": "fp32", **options}, HfModelHandler(str(checkpoint)), out_dir)
    _require(out_dir, "ModelBuilder", ("model.onnx", "genai_config.json"))


def export_optimum(checkpoint: Path, out_dir: Path, options: Mapping[str, Any]) -> None:
    """Write ``model.onnx`` with its data (float32) with Olive's OptimumConversion, and a ``genai_config.json``."""
    from olive.model import HfModelHandler

    extra = {"task": "text-generation-with-past", "do_validation": False, **options.get("extra_args", {})}
    config = {"target_opset": 18, **options, "extra_args": extra}
    _run("optimum", config, HfModelHandler(str(checkpoint)), out_dir)
    _require(out_dir, "OptimumConversion", ("model.onnx",))
    inputs, _ = graph.interface(graph.load(out_dir / "model.onnx"))
    settings = json.loads((checkpoint / "config.json").read_bytes())
    generation_path = checkpoint / "generation_config.json"
    generation = json.loads(generation_path.read_bytes()) if generation_path.is_file() else {}
    text = json.dumps(_genai_config(settings, generation, inputs), indent=4)
    (out_dir / "genai_config.json").write_text(text, encoding="utf-8")


def _genai_config(settings: Mapping[str, Any], generation: Mapping[str, Any], inputs: tuple[str, ...]) -> dict[str, Any]:
    """A ``genai_config.json`` for a decoder with separate past and present caches, as optimum writes it."""
    eos = generation.get("eos_token_id", settings.get("eos_token_id"))
    pad = generation.get("pad_token_id", settings.get("pad_token_id"))
    heads = settings["num_attention_heads"]
    named = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    past = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    context = settings["max_position_embeddings"]
    return {
        "model": {
            "bos_token_id": settings.get("bos_token_id") or (eos[-1] if isinstance(eos, list) else eos),
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": settings.get("head_dim") or settings["hidden_size"] // heads,
                "hidden_size": settings["hidden_size"],
                "inputs": {**named, **past},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": heads,
                "num_hidden_layers": settings["num_hidden_layers"],
                "num_key_value_heads": settings.get("num_key_value_heads") or heads,
            },
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
            "type": settings["model_type"],
            "vocab_size": settings["vocab_size"],
        },
        # Past and present are different tensors in this graph, so the runtime must not make them one buffer.
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }


def _require(folder: Path, name: str, files: tuple[str, ...]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise StageError(f"Olive's {name} ended without {', '.join(missing)}", where=str(folder))


def quantize(source: Path, out_dir: Path, scheme: Scheme, progress: Progress) -> dict[str, Any]:
    """Quantize ``source/model.onnx`` into ``out_dir/model.onnx`` and ``model.onnx.data``.

    Returns:
        facts: ``bits_per_weight`` (bits stored over weights in the float model), ``weights`` per scheme,
        ``relative_error`` where known, ``operators``.

    Raises:
        StageError: a pass failed, changed the graph's inputs or outputs, or left a weight as it was.
    """
    before = graph.load(source / "model.onnx")
    found = graph.weights(before)
    weight_count = sum(weight.size for weight in found)
    wanted = {weight.path: given for weight in found if (given := scheme.of_weight(weight.path, weight.role))}
    _check_patterns(scheme, [weight.path for weight in found])
    errors: dict[str, float] = {}
    if scheme.algorithm == "min_error":
        errors = _min_error(before, source, out_dir, scheme, wanted, progress)
    else:
        _through_olive(before, found, source, out_dir, scheme, wanted, progress)
    after = graph.load(out_dir / "model.onnx")
    if graph.interface(after) != graph.interface(graph.load(source / "model.onnx")):
        raise StageError(
            "quantization changed the graph's inputs or outputs",
            why=f"they are now {graph.interface(after)}",
        )
    operators = graph.operators(after)
    _check_quantized(scheme, wanted, operators)
    counts: dict[str, int] = {}
    for given in wanted.values():
        label = f"{given.bits}-bit/{given.block_size}{'' if given.symmetric else ' asymmetric'}"
        counts[label] = counts.get(label, 0) + 1
    return {
        "bits_per_weight": round(graph.stored_bits(after, out_dir) / weight_count, 3),
        "weights": counts,
        "relative_error": round(sum(errors.values()) / len(errors), 6) if errors else None,
        "operators": operators,
    }


def _check_patterns(scheme: Scheme, paths: list[str]) -> None:
    """A pattern that matches nothing is a misspelt pattern."""
    from fnmatch import filter as matching

    for pattern in (*scheme.exclude, *(override.match for override in scheme.overrides)):
        if not matching(paths, pattern):
            near = difflib.get_close_matches(pattern, paths, 1, 0.3)
            raise RecipeError(
                f"no weight matches `{pattern}`",
                where="quantize.exclude, quantize.overrides",
                fix=f"weights are named like {near[0] if near else paths[0]}",
            )


def _check_quantized(scheme: Scheme, wanted: Mapping[str, WeightScheme], operators: Mapping[str, int]) -> None:
    if scheme.block_wise:
        made = operators.get("MatMulNBits", 0) + operators.get("GatherBlockQuantized", 0)
        expected = len(wanted) + (scheme.embedding == "shared")
        if made != expected:
            raise StageError(
                f"{made} weights were quantized, not {expected}", why=f"operators of the result: {dict(operators)}"
            )
    elif scheme.algorithm == "dynamic" and not operators.get("MatMulInteger"):
        raise StageError("the dynamic pass quantized nothing", why=f"operators of the result: {dict(operators)}")


def _min_error(
    model: Any,
    source: Path,
    out_dir: Path,
    scheme: Scheme,
    wanted: dict[str, WeightScheme],
    progress: Progress,
) -> dict[str, float]:
    """This project's own quantization, run as an Olive pass like the others."""
    from olive.model import ONNXModelHandler
    from olive.passes import Pass
    from olive.passes.olive_pass import create_pass_from_dict

    errors: dict[str, float] = {}

    class BlockWiseMinErrorQuantization(Pass):  # type: ignore[misc]
        """Least-squares scales for every block, streamed weight by weight."""

        @classmethod
        def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:  # noqa: ARG003
            return {}

        def _run_for_config(self, handler: Any, config: Any, output_model_path: str) -> Any:  # noqa: ARG002
            import onnx

            path = Path(output_model_path)
            with graph.ExternalDataWriter(path / "model.onnx.data") as writer:
                errors.update(
                    graph.quantize_weights(
                        model,
                        source,
                        writer,
                        wanted,
                        scheme.accuracy_level,
                        scheme.embedding == "shared",
                        lambda done, total, name: progress(done / total, name),
                    )
                )
            onnx.save(model, str(path / "model.onnx"))
            return ONNXModelHandler(str(path), onnx_file_name="model.onnx")

    handler = ONNXModelHandler(str(source), onnx_file_name="model.onnx")
    create_pass_from_dict(BlockWiseMinErrorQuantization, {}, disable_search=True).run(handler, str(out_dir))
    _require(out_dir, "BlockWiseMinErrorQuantization", ("model.onnx", "model.onnx.data"))
    return errors


def _through_olive(
    before: Any,
    found: list[graph.Weight],
    source: Path,
    out_dir: Path,
    scheme: Scheme,
    wanted: dict[str, WeightScheme],
    progress: Progress,
) -> None:
    """Olive's own passes, then the repairs they need: output names, one data file, the shared embedding."""
    import onnx
    from olive.model import ONNXModelHandler

    node_of = {weight.path: before.graph.node[weight.node].name for weight in found}
    configs = _pass_configs(scheme, wanted, node_of)
    here = source
    scratch = [out_dir / f"pass{index}" for index in range(len(configs))]
    for index, (config, folder) in enumerate(zip(configs, scratch, strict=True)):
        progress(index / len(configs), f"Olive pass {PASSES[scheme.algorithm][1]}")
        folder.mkdir()
        made = _run(scheme.algorithm, config, ONNXModelHandler(str(here), onnx_file_name="model.onnx"), folder)
        path = Path(made.model_path)
        if path.parent != folder or path.name != "model.onnx":
            raise StageError(f"Olive wrote {path}", why=f"{folder / 'model.onnx'} was expected")
        if index:
            shutil.rmtree(here)
        here = folder
    model = graph.load(here / "model.onnx")
    graph.restore_outputs(model, graph.interface(before)[1])
    role = {weight.role: weight for weight in found}
    share = (role["head"], role["embedding"]) if scheme.embedding == "shared" and len(role) == 3 else None
    with graph.ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        graph.repack(model, here, writer, share)
    onnx.save(model, str(out_dir / "model.onnx"))
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)


def _pass_configs(
    scheme: Scheme, wanted: Mapping[str, WeightScheme], node_of: Mapping[str, str]
) -> list[dict[str, Any]]:
    common = {"save_as_external_data": True, "external_data_name": "model.onnx.data", **scheme.options}
    if scheme.algorithm == "none":
        return []
    if scheme.algorithm == "dynamic":
        return [common]
    common["accuracy_level"] = scheme.accuracy_level
    if scheme.algorithm == "k_quant":
        assert scheme.body is not None
        custom = {node_of[path]: {"bits": given.bits, "group_size": given.block_size} for path, given in wanted.items()}
        rest = [node for path, node in node_of.items() if path not in wanted]
        body = {"bits": scheme.body.bits, "block_size": scheme.body.block_size}
        return [{**common, **body, "customized_weight_config": custom, "nodes_to_exclude": rest}]
    groups: dict[WeightScheme, list[str]] = {}
    for path, given in wanted.items():
        groups.setdefault(given, []).append(node_of[path])
    return [
        {
            **common,
            "bits": given.bits,
            "block_size": given.block_size,
            "is_symmetric": given.symmetric,
            "nodes_to_include": nodes,
        }
        for given, nodes in groups.items()
    ]
