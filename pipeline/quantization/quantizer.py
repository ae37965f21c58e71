"""From a float32 graph to a quantized one, by Olive passes, and proof that they did what the scheme says."""

from __future__ import annotations

import difflib
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import olive
from pipeline.errors import RecipeError, StageError
from pipeline.facts import expert_forms
from pipeline.facts.scheme import Scheme, WeightScheme
from pipeline.graph import edits as graph
from pipeline.graph.external_data import ExternalDataWriter, stored_bits
from pipeline.quantization import graph_weights

if TYPE_CHECKING:
    from pipeline.artifact import Progress


def quantize(
    source: Path,
    checkpoint: Path,
    out_dir: Path,
    scheme: Scheme,
    progress: Progress,
    form: str = "nbits",
    rotate: bool = False,
    roles: tuple[str, ...] = ("head", "embedding"),
    outside: Sequence[graph.Weight] = (),
) -> dict[str, Any]:
    """Quantize ``source/model.onnx`` into ``out_dir/model.onnx`` and ``model.onnx.data``.

    Args:
        source: directory of the float graph.
        checkpoint: directory of the PyTorch reference, which some algorithms calibrate with.
        scheme: how to quantize it.
        form: of the quantized weights, see `graph_weights.quantize_weights`.
        rotate: whether the graph is of the rotated checkpoint.
        roles: of the weights that the graph must have besides those of the body.
        outside: weights of other graphs that the scheme speaks of, too; they are left to the caller.

    Returns:
        facts: ``bits_per_weight`` (bits stored over weights in the float model), ``weights`` per scheme,
        ``relative_error`` (mean over weights) where known, ``operators``; ``experts``: the errors of single ones.

    Raises:
        RecipeError: a pattern matches no weight, or the pass has no way to quantize a weight.
        StageError: a pass failed, changed the graph's inputs or outputs, or did not do what the scheme says.
    """
    before = graph.load(source / "model.onnx")
    found = graph.weights(before)
    _check_experts(scheme, found)
    wanted = _wanted(scheme, [*found, *outside], roles)
    if outside:
        wanted = {weight.path: wanted[weight.path] for weight in found if weight.path in wanted}
        scheme = scheme.model_copy(update={"embedding": "float"})
    errors: Mapping[str, float] = {}
    if scheme.algorithm in ("gptq", "min_error", "w8a8"):
        calibration = {"checkpoint": str(checkpoint), "rotate": rotate}
        errors = _block_wise(source, calibration, out_dir, scheme, wanted, form, progress)
    else:
        _through_olive(source, out_dir, scheme, wanted, progress)
    after = graph.load(out_dir / "model.onnx")
    if graph.interface(after) != graph.interface(before):
        raise StageError(
            "quantization changed the graph's inputs or outputs",
            why=f"they are now {graph.interface(after)}",
        )
    operators = graph.operators(after)
    _check_quantized(scheme, found, wanted, graph_weights.quantized_schemes(after), operators)
    experts = {weight.path for weight in found if weight.role == "experts"}
    each = {path: error for path, error in errors.items() if path.rpartition(".")[0] in experts}
    errors = {path: error for path, error in errors.items() if path not in each}
    return {
        "bits_per_weight": round(stored_bits(after, out_dir) / sum(weight.size for weight in found), 3),
        "weights": dict(Counter(_label(given) for given in wanted.values())),
        "relative_error": round(sum(errors.values()) / len(errors), 6) if errors else None,
        "operators": operators,
        **({"experts": _expert_errors(each)} if each else {}),
    }


def _expert_errors(each: Mapping[str, float]) -> dict[str, Any]:
    """Of the relative squared errors of single experts the mean and the worst."""
    worst = max(each, key=lambda path: each[path])
    mean = sum(each.values()) / len(each)
    return {"count": len(each), "relative_error": round(mean, 6), "worst": worst, "worst_error": round(each[worst], 6)}


def _label(given: WeightScheme) -> str:
    if given.block_size == -1:
        return f"{given.bits}-bit by channel"
    return f"{given.bits}-bit/{given.block_size}{'' if given.symmetric else ' asymmetric'}"


def _wanted(scheme: Scheme, found: list[graph.Weight], roles: tuple[str, ...]) -> dict[str, WeightScheme]:
    """The scheme of each weight that is to be quantized; a shared embedding is the head's."""
    if not scheme.block_wise:
        return {}
    paths = [weight.path for weight in found]
    for role in roles:
        if role not in {weight.role for weight in found}:
            raise StageError(
                f"the graph's {role} cannot be quantized",
                why=f"no weight of its own is used as {role}: {', '.join(paths)}",
            )
    _check_patterns(scheme, [weight.path for weight in found if weight.role != "router"])
    wanted = {}
    for weight in found:
        given = scheme.of_weight(weight.path, weight.role)
        if given is None or (weight.role == "embedding" and scheme.embedding == "shared"):
            continue
        if weight.role == "embedding" and scheme.algorithm == "k_quant":
            raise RecipeError(
                f"Olive's k_quant pass cannot quantize the embedding {weight.path}",
                where="quantize.overrides",
                fix="let the pattern match projections only, such as model.layers.*",
            )
        wanted[weight.path] = given
    return wanted


def _check_experts(scheme: Scheme, found: list[graph.Weight]) -> None:
    """Refuse what would leave experts in float or quantize routers; so does `pipeline.builds.plan` where it can."""
    roles = {weight.role for weight in found}
    if ("experts" in roles and scheme.algorithm not in expert_forms.ALGORITHMS) or (
        "router" in roles and scheme.algorithm == "dynamic"
    ):
        raise RecipeError(
            f"algorithm {scheme.algorithm} cannot quantize a mixture of experts",
            where="quantize.algorithm",
            fix="use gptq or min_error",
        )


def _check_patterns(scheme: Scheme, paths: list[str]) -> None:
    """A pattern that matches nothing is a misspelt pattern."""
    for pattern in (*scheme.exclude, *(override.match for override in scheme.overrides)):
        if not any(fnmatchcase(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, 1, 0.3)
            raise RecipeError(
                f"no weight matches `{pattern}`",
                where="quantize.exclude, quantize.overrides",
                fix=f"weights are named like {near[0] if near else paths[0]}",
            )


def _check_quantized(
    scheme: Scheme,
    found: list[graph.Weight],
    wanted: Mapping[str, WeightScheme],
    made: Mapping[str, WeightScheme],
    operators: Mapping[str, int],
) -> None:
    """Compare the graph, weight by weight, with what was asked for."""
    expected = {path: given for path, given in wanted.items() if given.block_size != -1}
    if (products := operators.get("MatMulIntegerToFloat", 0)) != len(wanted) - len(expected):
        raise StageError(f"{products} weights are multiplied in integers, not {len(wanted) - len(expected)}")
    if scheme.block_wise and scheme.embedding == "shared":
        role = {weight.role: weight.path for weight in found}
        expected[role["embedding"]] = expected[role["head"]]
    wrong = [
        f"{path} is {_label(made[path]) if path in made else 'float'}, "
        f"not {_label(expected[path]) if path in expected else 'float'}"
        for path in sorted({*made, *expected})
        if made.get(path) != expected.get(path)
    ]
    if wrong:
        raise StageError(
            f"{len(wrong)} weights were not quantized as the scheme says",
            why="; ".join(wrong[:5]) + ("; …" if len(wrong) > 5 else ""),
        )
    if scheme.algorithm == "dynamic" and not operators.get("MatMulInteger"):
        raise StageError("the dynamic pass quantized nothing", why=f"operators of the result: {dict(operators)}")


def _block_wise(
    source: Path,
    calibration: Mapping[str, Any],
    out_dir: Path,
    scheme: Scheme,
    wanted: Mapping[str, WeightScheme],
    form: str,
    progress: Progress,
) -> Mapping[str, float]:
    """Our own passes; returns the relative squared error of each weight."""
    config: dict[str, Any] = {
        "schemes": {path: given.model_dump() for path, given in wanted.items() if given.block_size != -1},
        "integer": [path for path, given in wanted.items() if given.block_size == -1],
        "accuracy_level": scheme.accuracy_level,
        "share_embedding": scheme.embedding == "shared",
        "form": form,
        "progress": progress,
    }
    if scheme.algorithm == "gptq":
        config |= {**calibration, "calibration_windows": scheme.calibration_windows}
    made = olive.run_pass(scheme.algorithm, config, olive.onnx_model(source), out_dir)
    olive.require(out_dir, scheme.algorithm, "model.onnx", "model.onnx.data")
    errors: Mapping[str, float] = made.model_attributes["relative_error"]
    return errors


def _through_olive(
    source: Path, out_dir: Path, scheme: Scheme, wanted: Mapping[str, WeightScheme], progress: Progress
) -> None:
    """Olive's own passes, then the repairs they need: output names, one data file, the shared embedding."""
    import onnx

    before = graph.load(source / "model.onnx")
    found = graph.weights(before)
    node_of = {weight.path: before.graph.node[weight.node].name for weight in found}
    configs = _pass_configs(scheme, wanted, node_of)
    here = source
    scratch = [out_dir / f"pass{index}" for index in range(len(configs))]
    for index, (config, folder) in enumerate(zip(configs, scratch, strict=True)):
        progress(index / len(configs), f"Olive pass {olive.PASSES[scheme.algorithm].name}")
        folder.mkdir()
        made = olive.run_pass(scheme.algorithm, config, olive.onnx_model(here), folder)
        path = Path(made.model_path)
        if path.resolve() != (folder / "model.onnx").resolve():
            raise StageError(f"Olive wrote {path}", why=f"{folder / 'model.onnx'} was expected")
        if index:
            shutil.rmtree(here)
        here = folder
    model = graph.load(here / "model.onnx")
    graph.restore_outputs(model, graph.interface(before)[1])
    role = {weight.role: weight for weight in found}
    share = (role["head"], role["embedding"]) if scheme.embedding == "shared" else None
    with ExternalDataWriter(out_dir / "model.onnx.data") as writer:
        graph_weights.repack(model, here, writer, share)
    onnx.save(model, str(out_dir / "model.onnx"))
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)


def _pass_configs(
    scheme: Scheme, wanted: Mapping[str, WeightScheme], node_of: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The settings of each run of the pass; ``node_of`` gives the node of each weight's path."""
    common = {**scheme.options, "save_as_external_data": True, "external_data_name": "model.onnx.data"}
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
    # The RTN pass knows one scheme at a time.
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
