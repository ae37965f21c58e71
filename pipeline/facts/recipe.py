"""Recipes: what is built, as one frozen value read from strict YAML.

Everything wrong with a recipe is reported at once, each finding with file, line and the nearest right name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from pipeline.facts import exporters, strict_yaml, target as targets
from pipeline.facts.family import FAMILIES, Experts, Shape
from pipeline.facts.scheme import Frozen, Scheme, Whole
from pipeline.facts.strict_yaml import Document, Finding, Loc, nearest
from pipeline.facts.target import TARGETS, Target
from pipeline.task import GENERATE, TASKS, Task

_DIGEST = r"^[0-9a-f]{64}$"
_REVISION = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEARLY_COMMIT = re.compile(r"[0-9a-fA-F]{12,}")
_REPO = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
_PINNED = r"^[A-Za-z0-9][\w.-]*==[\w.]+$"
_IN_WORDS = {
    _DIGEST: "should be a sha256 (64 hexadecimal digits, lower case)",
    _REVISION: "should be a commit (40 hexadecimal digits, lower case), or a branch or tag until `qwen-onnx lock`",
    _REPO: "should be owner/name",
    _PINNED: "should be a pinned requirement (name==version)",
}
Sha256 = Annotated[str, Field(pattern=_DIGEST)]
# A name becomes file and folder names, and an argument of commands.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Algorithms that have been tried on graphs without a head.
_RETRIEVAL_ALGORITHMS = ("gptq", "min_error", "none")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class HubSource(Frozen):
    """A Hugging Face repository at a commit; with ``file``, one GGUF file of it.

    With a branch or tag for a revision, which moves, the recipe is not locked (`pipeline.builds.lock`).
    """

    type: Literal["hub"]
    repo: Annotated[str, Field(pattern=_REPO)]
    revision: Annotated[str, Field(pattern=_REVISION)]
    file: str | None = None

    @property
    def locked(self) -> bool:
        """Whether the revision is a commit."""
        return _COMMIT.fullmatch(self.revision) is not None


class LocalSource(Frozen):
    """A directory with safetensors, or a GGUF file; relative paths start at the recipe's folder."""

    type: Literal["local"]
    path: Annotated[str, Field(min_length=1)]


class WheelSource(Frozen):
    """A GGUF file cut into members of wheels on the package index, to be joined in the given order."""

    type: Literal["wheels"]
    wheels: Annotated[tuple[Wheel, ...], Field(min_length=1)]


class Wheel(Frozen):
    """One pinned wheel and the member in it."""

    requirement: Annotated[str, Field(pattern=_PINNED)]
    member: Annotated[str, Field(min_length=1)]


Source = Annotated[HubSource | LocalSource | WheelSource, Field(discriminator="type")]


class Checkpoint(Frozen):
    """Where the weights come from.

    Attributes:
        sources: tried in order until one delivers; all must hold identical bytes.
        sha256: digest of the GGUF file, or of the file tree (`pipeline.digest.of_tree`) of a directory;
            may be left out for local sources, whose digest is then taken at every plan.
        size: bytes to fetch, for estimates and as a limit.
        adapter: directory of a LoRA adapter to merge into the weights.
        license, base_model: SPDX identifier and name, for the package's card and notices.
        languages: ISO 639-1 codes for the card.
    """

    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    sha256: Sha256 | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    adapter: str | None = None
    license: Annotated[str, Field(min_length=1)]
    base_model: Annotated[str, Field(min_length=1)]
    languages: tuple[str, ...] = ()


class ExpertSizes(Frozen):
    """Sizes of the mixtures of experts, see `pipeline.facts.family.Experts`."""

    count: Annotated[int, Field(gt=0)]
    per_token: Annotated[int, Field(gt=0)]
    intermediate: Annotated[int, Field(gt=0)]
    normalized: bool = False
    shared_intermediate: Annotated[int, Field(ge=0)] = 0
    sparse_step: Annotated[int, Field(gt=0)] = 1
    dense_layers: tuple[int, ...] = ()


class Architecture(Frozen):
    """Sizes needed to plan before anything is fetched; compared with the checkpoint's own config.json."""

    model_type: str
    layers: Annotated[int, Field(gt=0)]
    hidden: Annotated[int, Field(gt=0)]
    intermediate: Annotated[int, Field(gt=0)]
    heads: Annotated[int, Field(gt=0)]
    kv_heads: Annotated[int, Field(gt=0)]
    head_dim: Annotated[int, Field(gt=0)]
    vocabulary: Annotated[int, Field(gt=0)]
    experts: ExpertSizes | None = None

    @property
    def shape(self) -> Shape:
        """The sizes as those of a model, whose context and tie are not known yet."""
        experts = Experts(**self.experts.model_dump()) if self.experts else None
        return Shape(**self.model_dump(exclude={"experts"}), context=0, tied=False, experts=experts)


class Export(Frozen):
    """How the graph is written.

    Attributes:
        exporter: ``genai`` (Olive's ModelBuilder), ``optimum`` (Olive with optimum-onnx), ``native`` (ours: any size, a
            weight in memory at a time), ``static`` (ours: graphs of fixed shapes for NPUs), or ``openvino`` (Olive with
            optimum-intel: OpenVINO's own graphs); what suits model and target when left out
            (`pipeline.facts.exporters`).
        dtype: of the activations between kernels; the target's first one when left out.
        rotate: express the residual stream in a basis without outliers first (`pipeline.quantization.rotation`): the
            same function, easier to quantize.
        last_token_head: compute the head for the last token of a prompt only.
        draft_tokens: and for so many tokens before it, which lets a draft of that length be verified in one forward
            (`pipeline.runtime.speculation`); the target's own number when left out.
        experts: ``fused`` (a mixture of experts is one operator) or ``dense`` (plain operators: every expert for every
            token); ``fused`` where the target and the scheme can, when left out.
        options: more options of the Olive pass, checked against the installed pass.
    """

    exporter: Literal["genai", "optimum", "native", "static", "openvino"] | None = None
    dtype: Literal["float32", "float16", "uint16"] | None = None
    rotate: bool = False
    last_token_head: bool = True
    draft_tokens: Annotated[int, Field(ge=0, le=127)] | None = None
    experts: Literal["fused", "dense"] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class Npu(Frozen):
    """What a compiled package is made for.

    Attributes:
        soc: the chip, a key of `pipeline.facts.target.SOCS`.
        window: tokens that a prefill call takes.
        cache: slots of the key-value cache: the context length.
        share_weights: ship one binary in which prefill and decode share their weights. The emulator cannot load it:
            what is executed here are two binaries of the same graphs.
    """

    soc: str
    window: Annotated[Literal[16, 32, 64, 128], Whole] = 64
    cache: Annotated[int, Field(ge=128, le=8192)] = 1024
    share_weights: bool = False


class Adapter(Frozen):
    """A LoRA adapter that is kept apart from the weights.

    Attributes:
        path: directory that peft saved; relative paths start at the recipe's folder.
        license: SPDX identifier, where it is not the checkpoint's.
    """

    path: Annotated[str, Field(min_length=1)]
    license: Annotated[str, Field(min_length=1)] | None = None


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Gates(Frozen):
    """What a package must reach, as `pipeline.fidelity.metrics` defines it; `pipeline.task` says which a task has.

    Attributes:
        mean_kl, p99_kl: upper bounds in nats.
        top1: lower bound of top-1 agreement.
        perplexity_ratio: upper bound of perplexity(package) / perplexity(reference).
        greedy: lower bound of the share of greedy tokens before the first divergence.
        runaway: how many answers may run on where the reference's end. A model that has lost its end token does so in
            all; one of 4 bits may, at a near tie, take another path in one, and repeat itself there.
        cosine, min_cosine: lower bounds of the cosine of a vector with the reference's, on average and of the worst.
        score_error: upper bound of the difference of a score, in [0, 1], from the reference's.
        ranking: lower bound of the share of pairs of documents that both put in the same order.
    """

    mean_kl: Positive | None = None
    p99_kl: Positive | None = None
    top1: Share | None = None
    perplexity_ratio: Positive | None = None
    greedy: Share = 0.0
    runaway: Annotated[int, Field(ge=0)] = 0
    routing: Share = 0.0
    expert_error: Positive = 0.1
    cosine: Share | None = None
    min_cosine: Share | None = None
    score_error: Share | None = None
    ranking: Share | None = None


class Validate(Frozen):
    """What is measured: held-out windows of tokens, greedy answers, and the gates.

    Attributes:
        decode_tokens: how many tokens of each window take the decode path; all when left out.
        long_tokens: length of a text more, whose end is compared (`pipeline.fidelity.long_context`); none when left
            out.
        greedy_tokens: length of the greedy answers.
        answers: how many conversations are answered; all when left out.
    """

    windows: Annotated[int, Field(ge=1, le=64)] = 8
    window_tokens: Annotated[int, Field(ge=16, le=2048)] = 256
    decode_tokens: Annotated[int, Field(ge=2)] | None = None
    long_tokens: Annotated[int, Field(ge=128, le=1 << 20)] | None = None
    greedy_tokens: Annotated[int, Field(ge=1, le=256)] = 32
    answers: Annotated[int, Field(ge=1)] | None = None
    gates: Gates


class Generation(Frozen):
    """Default search options of the package (genai's ``search`` section)."""

    context_length: Annotated[int, Field(ge=64)] | None = None
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=5)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.8
    top_k: Annotated[int, Field(ge=1)] = 20


class Objective(Frozen):
    """What `qwen-onnx tune` looks for; building the recipe does not depend on it.

    Attributes:
        max_kl: the smallest scheme that loses at most so many nats a token.
        max_bytes: of all weights, head and embedding included.
        min_decode_ratio: how fast a token is multiplied with the weights, against the fastest scheme of each weight.
    """

    max_kl: Positive | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    min_decode_ratio: Annotated[float, Field(gt=0, le=1)] | None = None


class Recipe(Frozen):
    """What is built: one checkpoint, one export, one scheme, one target, one set of gates.

    ``task`` is what the package is for: to generate text, to embed texts, or to rank documents for a query.

    ``adapters`` are LoRA adapters by name, each a file of the package that is loaded at run time; an empty mapping
    makes a package that takes some later.
    """

    description: str = ""
    task: Literal["generate", "embed", "rerank"] = "generate"
    target: str
    checkpoint: Checkpoint
    architecture: Architecture | None = None
    export: Export = Export()
    npu: Npu | None = None
    quantize: Scheme
    adapters: dict[str, Adapter] | None = None
    validation: Annotated[Validate, Field(alias="validate")]
    generation: Generation = Generation()
    objective: Objective = Objective()


WheelSource.model_rebuild()


def exporter_of(recipe: Recipe, shape: Shape | None) -> str:
    """The exporter that writes a recipe's graph, of a model of that shape (``None`` when it is not known yet)."""
    export, task = recipe.export, TASKS[recipe.task]
    return exporters.resolve(export.exporter, TARGETS[recipe.target], shape, bool(export.options), task.generates)


@dataclass(frozen=True)
class Loaded:
    """A recipe with its name (``<model>-<target>-<scheme>``), its file and the resolved YAML value."""

    name: str
    path: Path
    recipe: Recipe
    resolved: dict[str, Any]


def load(path: Path) -> Loaded:
    """Read ``path`` and what it extends, merge, and check everything.

    Raises:
        RecipeError: with all findings, one a line.
    """
    document = strict_yaml.read(path)
    findings = [*document.findings]
    name = f"{path.parent.resolve().name}-{path.stem}"
    if not _NAME.fullmatch(name):
        text = f"the recipe's name `{name}`, from its folder and file, may hold only letters, digits and `.`, `_`, `-`"
        findings.append(Finding(document.place(()), text))
    try:
        recipe = Recipe.model_validate_json(json.dumps(document.value))
    except ValidationError as error:
        findings += [_explain(item, document) for item in error.errors() if _is_own_fault(item, document)]
    findings += [Finding(document.place(loc), text) for loc, text in _gate_findings(document)]
    if not document.refused:  # what could not be read may be what resolves a contradiction
        findings += [Finding(document.place(loc), text) for loc, text in _contradictions(document.value)]
    if findings:
        raise strict_yaml.error(findings, path, fix="`qwen-onnx recipe schema` lists all keys")
    return Loaded(name, path, recipe, document.value)


def read(value: dict[str, Any], where: Path) -> Recipe:
    """The recipe that plain values make, checked like a file's.

    Args:
        where: a file to name in errors, such as the base that most of the value is from.

    Raises:
        RecipeError: with all findings, one a line.
    """
    document = Document(where, value)
    findings = [Finding(document.place(loc), text) for loc, text in _contradictions(value)]
    try:
        recipe = Recipe.model_validate_json(json.dumps(value))
    except ValidationError as error:
        findings += [_explain(item, document) for item in error.errors()]
    if findings:
        raise strict_yaml.error(findings, where, fix="")
    return recipe


def find(folder: Path) -> list[Path]:
    """All recipe files below ``folder``; files and folders that start with an underscore are bases."""
    return sorted(
        path
        for path in folder.rglob("*.yaml")
        if not any(part.startswith("_") for part in path.relative_to(folder).parts)
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors: nothing is required, since bases may supply it."""
    schema = Recipe.model_json_schema(by_alias=True)
    for definition in (schema, *schema["$defs"].values()):
        definition.pop("required", None)
    name = {"type": "string", "minLength": 1}
    schema["properties"]["extends"] = {
        "description": "recipes to start from, relative to this file; later ones win",
        "anyOf": [name, {"type": "array", "items": name, "minItems": 1}],
    }
    return schema


def _is_own_fault(item: Any, document: Document) -> bool:
    """Whether a type error is more than the consequence of another finding: of refused YAML, or of bad list items."""
    if item["type"] == "missing" and () in document.refused:
        return False
    if item["type"] == "too_short" and item["input"]:
        return False
    loc = _without_tags(item, document.value)
    return not any(loc[: len(bad)] == bad[: len(loc)] for bad in document.refused if bad)


def _explain(item: Any, document: Document) -> Finding:
    """A pydantic error in the words of the file."""
    loc, kind, got = _without_tags(item, document.value), item["type"], item["input"]
    context = item.get("ctx", {})
    if kind.startswith("union_tag"):
        loc = (*loc, str(context["discriminator"]).strip("'"))
        kind = "missing" if kind == "union_tag_not_found" else "literal_error"
        got, context = context.get("tag"), {"expected": str(context.get("expected_tags", "")).replace(", ", " or ")}
    place, key = document.place(loc), _spelled(loc)
    if kind == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        hint = nearest(str(loc[-1]), known) or f"; known: {', '.join(sorted(known))}"
        return Finding(place, f"unknown key `{key}`{hint}")
    if kind == "missing":
        return Finding(place, f"missing key `{key}`")
    message, hint = item["msg"].replace("Input should", "should"), ""
    message = message.replace("an object", "a mapping").replace("a valid array", "a list")
    if kind == "too_short":
        message = "should have at least one item"
    elif kind == "string_pattern_mismatch":
        message = _IN_WORDS[context["pattern"]]
    elif kind == "literal_error":
        message = f"should be {context['expected']}"
        hint = nearest(str(got), re.findall(r"'([^']*)'", context["expected"]))
    elif kind == "string_type" and isinstance(got, bool | int | float):
        hint = "; quote it to make it text"
    return Finding(place, f"`{key}`: {message}, got {_shown(got)}{hint}")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _spelled(loc: Loc) -> str:
    """``checkpoint.sources[0].repo``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _without_tags(item: Any, value: Any) -> Loc:
    """The location of a pydantic error in the file: without the words that name members of unions."""
    loc: Loc = ()
    for index, part in enumerate(item["loc"]):
        inside: dict[Any, Any] = dict(enumerate(value)) if isinstance(value, list) else value
        inside = inside if isinstance(inside, dict) else {}
        if part in inside:
            value = inside[part]
        elif item["type"] != "missing" or index < len(item["loc"]) - 1:
            continue
        loc = (*loc, part)
    return loc


def _known_keys(loc: Sequence[str | int]) -> list[str]:
    """The keys that `Recipe` knows at the location of a pydantic error."""
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        if len(models) > 1 and isinstance(part, str):  # the tag of a union's member
            models = [model for model in models if part in get_args(model.model_fields["type"].annotation)]
            continue
        fields = [field for name, field in models[0].model_fields.items() if part in (name, field.alias)]
        models = list(_models_in(fields[0].annotation)) if fields else models
    names = [field.alias or name for model in models for name, field in model.model_fields.items()]
    return names if loc else [*names, "extends"]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


_Model = TypeVar("_Model", bound=BaseModel)


def _typed(kind: type[_Model], value: Any) -> _Model | None:
    try:
        return kind.model_validate_json(json.dumps(value))
    except ValidationError:
        return None


def _contradictions(value: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Combinations that are impossible, among the sections that are well-typed."""
    target = TARGETS.get(str(value.get("target")))
    if target is None and isinstance(value.get("target"), str):
        yield ("target",), f"unknown target{_choice(value['target'], list(TARGETS))}"
    if scheme := _typed(Scheme, value.get("quantize")):
        for loc, reason in scheme.problems():
            yield ("quantize", *loc), reason
    if target:
        yield from targets.problems(target, _export_section(value, target), scheme)
        yield from _npu_contradictions(target, value.get("npu"))
        yield from _window_contradictions(value)
    if (task := TASKS.get(str(value.get("task", GENERATE)))) and not task.generates:
        yield from _retrieval_contradictions(task, value, scheme)
    yield from _adapter_contradictions(value, target, scheme)
    if checkpoint := _typed(Checkpoint, value.get("checkpoint")):
        yield from _revision_contradictions(checkpoint)
    if checkpoint and checkpoint.sha256 is None:
        for index, source in enumerate(checkpoint.sources):
            if source.type == "wheels" or (source.type == "hub" and source.file and source.locked):
                text = "a remote file needs `checkpoint.sha256`: the digest decides, so that no mirror needs trust"
                yield ("checkpoint", "sources", index), text
    if architecture := _typed(Architecture, value.get("architecture")):
        yield from _family_contradictions(architecture, _typed(Export, value.get("export", {})), target)


def _export_section(value: dict[str, Any], target: Target) -> dict[str, Any]:
    """The section ``export`` with the exporter that writes the graph, as far as it is known from sizes told here."""
    section = value.get("export")
    section = section if isinstance(section, dict) else {}
    architecture = _typed(Architecture, value.get("architecture"))
    shape = architecture.shape if architecture else None
    generates = value.get("task", GENERATE) == GENERATE
    options = bool(section.get("options"))
    return {**section, "exporter": exporters.resolve(section.get("exporter"), target, shape, options, generates)}


def _family_contradictions(
    architecture: Architecture, export: Export | None, target: Target | None
) -> Iterator[tuple[Loc, str]]:
    family = FAMILIES.get(architecture.model_type)
    if family is None:
        yield ("architecture", "model_type"), f"unknown family{_choice(architecture.model_type, list(FAMILIES))}"
        return
    if export and export.exporter and export.exporter not in family.exporters:
        text = f"{export.exporter} cannot export {family.model_type}: use {' or '.join(family.exporters)}"
        yield ("export", "exporter"), text
    if family.experts != (architecture.experts is not None):
        text = "needs `experts`: {count, per_token, intermediate, …}" if family.experts else "has no `experts`"
        yield ("architecture", "experts"), f"{family.model_type} {text}"
    if family.multimodal and target and target.provider != targets.CPU:
        yield ("target",), f"{target.name} takes no models that see or hear, such as {family.model_type}: use cpu"


def _revision_contradictions(checkpoint: Checkpoint) -> Iterator[tuple[Loc, str]]:
    """Revisions that are a commit with a slip of the pen: as a branch they would be looked for, and not be found."""
    for index, source in enumerate(checkpoint.sources):
        if source.type == "hub" and not source.locked and _NEARLY_COMMIT.fullmatch(source.revision):
            text = f"`revision`: should be a whole commit, 40 hexadecimal digits in lower case, got {source.revision!r}"
            yield ("checkpoint", "sources", index, "revision"), text


# Forms whose projections are products of floats beside which another one can be computed.
_WITH_SLOTS = ("gptq", "min_error", "rtn", "k_quant", "none")


def _adapter_name_problems(adapters: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Names that cannot be files of a package."""
    seen: dict[str, str] = {}
    for name in adapters:
        if not _ADAPTER_NAME.fullmatch(name) or name.endswith(".onnx_adapter"):
            text = "it becomes a file name: up to 64 letters, digits and `.`, `_`, `-`, a letter or digit first"
            yield ("adapters", name), f"`{name}` cannot be the name of an adapter: {text}"
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            yield ("adapters", name), f"`{name}` and `{other}` are one file where case does not count"


def _adapter_contradictions(
    value: dict[str, Any], target: Target | None, scheme: Scheme | None
) -> Iterator[tuple[Loc, str]]:
    """What forbids to keep adapters apart from the weights."""
    if not isinstance(value.get("adapters"), dict):
        return
    yield from _adapter_name_problems(value["adapters"])
    checkpoint, export = _typed(Checkpoint, value.get("checkpoint")), _typed(Export, value.get("export", {}))
    if checkpoint and checkpoint.adapter:
        text = "one adapter is merged into the checkpoint, and those kept apart were trained without it"
        yield ("adapters",), f"{text}: remove `checkpoint.adapter` or `adapters`"
    if export and export.rotate:
        text = "a rotated model computes in another basis than its adapters, which would be wrong without a word"
        yield ("adapters",), f"{text}: remove `export.rotate` or `adapters`"
    extra = export.options.get("extra_options") if export else None
    if isinstance(extra, dict) and extra.get("enable_cuda_graph"):
        yield ("adapters",), "a CUDA graph repeats what was recorded, whatever the adapter: remove `enable_cuda_graph`"
    if target and target.no_adapters:
        yield ("adapters",), f"{target.name} takes no adapters: {target.no_adapters}. Merge one (`checkpoint.adapter`)"
    elif scheme and scheme.algorithm not in _WITH_SLOTS:
        text = f"{scheme.algorithm} multiplies in integers, beside which there is no place for adapters"
        yield ("quantize", "algorithm"), f"{text}; there is with {', '.join(_WITH_SLOTS)}"


def _npu_contradictions(target: Target, section: Any) -> Iterator[tuple[Loc, str]]:
    if target.compiled and section is None:
        yield ("target",), f"{target.name} needs `npu`: {{soc: …}}; known: {', '.join(targets.SOCS)}"
    elif section is not None and not target.compiled:
        yield ("npu",), f"{target.name} is not compiled for a chip: remove `npu`"
    elif npu := _typed(Npu, section):
        if npu.soc not in targets.SOCS:
            yield ("npu", "soc"), f"unsupported SoC{_choice(npu.soc, list(targets.SOCS))}"
        if npu.cache % npu.window:
            yield ("npu", "cache"), f"{npu.cache} slots are no multiple of the window of {npu.window} tokens"


def _window_contradictions(value: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Windows of text that the cache of a compiled decoder cannot hold, or that leave nothing to prefill."""
    npu, spec = _typed(Npu, value.get("npu")), _typed(Validate, value.get("validate"))
    if npu is None or spec is None:
        return
    if spec.long_tokens:
        yield ("validate", "long_tokens"), "a compiled decoder is not measured on a long text: remove it"
    if spec.window_tokens > npu.cache:
        yield ("validate", "window_tokens"), f"{spec.window_tokens} tokens do not fit the cache of {npu.cache} slots"
    if (spec.decode_tokens or 0) >= spec.window_tokens:
        text = f"it must be less than the window of {spec.window_tokens} tokens, whose rest is prefilled"
        yield ("validate", "decode_tokens"), text


def _gate_findings(document: Document) -> Iterator[tuple[Loc, str]]:
    """Gates that the recipe's task needs, and gates of other tasks; what could not be read may be either."""
    task, section = TASKS.get(str(document.value.get("task", GENERATE))), document.value.get("validate")
    gates = section.get("gates") if isinstance(section, dict) else None
    unread = any(bad == ("validate", "gates")[: len(bad)] or bad == ("task",) for bad in document.refused)
    if task is None or not isinstance(gates, dict) or unread:
        return
    for name in task.required:
        loc = ("validate", "gates", name)
        if gates.get(name) is None and loc not in document.refused:
            yield loc, f"missing key `validate.gates.{name}`"
    known = (*task.required, *task.optional)
    for name, bound in gates.items():
        if name in Gates.model_fields and name not in known and bound is not None:
            yield ("validate", "gates", name), f"`{name}` is no gate of task {task.name}; those are {', '.join(known)}"


def _retrieval_contradictions(task: Task, value: dict[str, Any], scheme: Scheme | None) -> Iterator[tuple[Loc, str]]:
    """What packages that generate nothing have no use for, or cannot be made with."""
    export = _typed(Export, value.get("export", {}))
    if value.get("target") in TARGETS and value["target"] != "cpu":
        yield ("target",), f"packages that {task.name} are made for target cpu only, not for {value['target']}"
    if export and export.exporter not in (None, "genai"):
        yield ("export", "exporter"), f"a graph that can {task.name} is made from the genai exporter's"
    if export and export.draft_tokens:
        yield ("export", "draft_tokens"), f"drafts are for generation: a package that can {task.name} has none"
    if export and export.rotate and not task.labels:
        yield ("export", "rotate"), "vectors would be turned too, and not compare with those of the original model"
    if scheme is None:
        return
    if scheme.algorithm not in _RETRIEVAL_ALGORITHMS:
        known = ", ".join(_RETRIEVAL_ALGORITHMS)
        yield ("quantize", "algorithm"), f"task {task.name} takes {known}, not {scheme.algorithm}"
    if scheme.head:
        yield ("quantize", "head"), f"a package that can {task.name} has no head to quantize: remove `head`"
    if scheme.embedding == "shared":
        yield ("quantize", "embedding"), "there is no head to share with: use `float` or a scheme"


def _choice(word: str, known: list[str]) -> str:
    return f" `{word}`{nearest(word, known)}; known: {', '.join(known)}"
