"""The catalogue: its sizes make the numbers of parameters that were published, and the bytes that packages have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from pipeline import cli
from pipeline.builds import plan
from pipeline.commands import arguments
from pipeline.errors import RecipeError, ResourceError, UsageError
from pipeline.facts import estimate, family, models, recipe, sizes
from pipeline.facts.family import FAMILIES, Experts, Family, Shape
from pipeline.facts.models import COMMERCIAL, MODELS, STRENGTHS
from pipeline.facts.scheme import Scheme
from pipeline.facts.target import TARGETS
from pipeline.tuning import catalogue, choose

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CODER = RECIPES / "qwen2.5-coder-0.5b-instruct"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_make_the_published_number_of_parameters(name: str) -> None:
    model = MODELS[name]
    assert model.computed == pytest.approx(model.parameters, rel=0.01)
    assert model.active <= model.computed
    assert set(model.strengths) <= set(STRENGTHS)
    assert model.license in (*COMMERCIAL, models.QWEN_RESEARCH, models.TONGYI_RESEARCH)
    assert model.spoken >= len(model.languages)


def test_every_repository_is_named_once() -> None:
    names = [name.lower() for model in MODELS.values() for name in (model.name, *model.also)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "published"),
    [("Qwen1.5-MoE-A2.7B", 2.7e9), ("Qwen2-57B-A14B", 14.2e9), ("Qwen3-30B-A3B", 3.3e9), ("Qwen3-235B-A22B", 22e9)],
)
def test_a_token_goes_through_so_many_parameters(name: str, published: float) -> None:
    assert catalogue.find(name).active == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("name", "license_"),
    [
        ("Qwen2.5-3B-Instruct", "qwen-research"),
        ("Qwen2.5-Coder-3B", "qwen-research"),
        ("Qwen2.5-VL-3B-Instruct", "qwen-research"),
        ("Qwen2.5-72B", "qwen"),
        ("Qwen2-72B-Instruct", "tongyi-qianwen"),
        ("Qwen1.5-4B-Chat", "tongyi-qianwen-research"),
        ("Qwen1.5-MoE-A2.7B", "tongyi-qianwen"),
        ("Qwen2-57B-A14B", "Apache-2.0"),
        ("Qwen3-235B-A22B", "Apache-2.0"),
    ],
)
def test_licences_that_are_not_the_usual_one(name: str, license_: str) -> None:
    assert catalogue.find(name).license == license_


@pytest.mark.parametrize(
    ("name", "measured"), [("cpu-int4", 399_973_888), ("cpu-int4-large", 459_775_488), ("cuda-int4", 562_794_496)]
)
def test_weights_take_the_bytes_that_built_packages_have(name: str, measured: int) -> None:
    """``model.onnx.data`` of builds with onnxruntime-genai 0.14.1; the checkpoint of these recipes has its own head."""
    loaded = recipe.load(CODER / f"{name}.yaml")
    shape = plan.shape_of(loaded)
    assert shape is not None
    assert estimate.packed(loaded.recipe, shape) == pytest.approx(measured, rel=0.01)


def test_memory_at_run_time_is_what_was_measured() -> None:
    """Peaks of a package of 400 MB on a processor, after prompts of 512 tokens and contexts of 1500, and of 2048."""
    shape = catalogue.find("Qwen2.5-Coder-0.5B").shape
    assert sizes.runtime_bytes(shape, 399_973_888, 2048, 32) == pytest.approx(875e6, rel=0.1)
    assert sizes.runtime_bytes(shape, 399_973_888, 1500, 32) == pytest.approx(769e6, rel=0.1)


def test_the_cache_grows_with_the_context_and_its_heads() -> None:
    shape = catalogue.find("Qwen3-8B").shape
    assert sizes.cache_bytes(shape, 1, 16) == 2 * 36 * 8 * 128 * 2
    assert sizes.cache_bytes(shape, 4096, 32) == 4096 * 2 * sizes.cache_bytes(shape, 1, 16)


TINY = Shape("qwen3_moe", 2, 8, 99, 2, 1, 4, 10, 64, False, Experts(4, 1, 3))
PLAIN = Scheme.model_validate({"algorithm": "none"})


def test_experts_are_counted_wherever_bytes_are() -> None:
    attention, experts, router, vocabulary = 8 * 4 * 6, 4 * 3 * 8 * 3, 8 * 4, 10 * 8
    assert TINY.body_parameters == 2 * (attention + experts + router)
    assert TINY.active_parameters == 2 * (attention + experts // 4 + router)
    assert sizes.float_bytes(TINY) == 4 * (TINY.body_parameters + 2 * vocabulary)
    assert sizes.package_bytes(TINY, PLAIN, 32) == sizes.float_bytes(TINY)
    body = {"bits": 8, "block_size": 16, "symmetric": True}
    scheme = Scheme.model_validate({"algorithm": "min_error", "body": body, "embedding": "shared"})
    # 8 bits and 16 / 16 of a scale; the router stays in 16 bits; one vocabulary matrix instead of two.
    assert sizes.package_bytes(TINY, scheme, 16) == (2 * (attention + experts) + vocabulary) * 9 // 8 + 2 * router * 2


def test_layers_without_a_mixture_and_shared_experts_are_counted() -> None:
    shape = replace(TINY, layers=4, experts=Experts(4, 1, 3, shared_intermediate=5, sparse_step=2, dense_layers=(3,)))
    attention, dense, mixture = 8 * 4 * 6, 3 * 8 * 99, 3 * 8 * (4 * 3 + 5) + 8 * 4 + 8
    assert shape.body_parameters == 4 * attention + 3 * dense + mixture
    assert sizes.largest_layer(shape) == attention + dense
    assert sizes.package_bytes(shape, PLAIN, 32) == sizes.float_bytes(shape)
    for each in (False, True):
        counted = sum(item.count * item.rows * item.columns for item in sizes.weights(shape, each))
        assert counted == shape.body_parameters + 2 * shape.vocabulary_parameters


def test_overrides_of_single_layers_are_counted_layer_by_layer() -> None:
    wide, narrow = ({"bits": bits, "block_size": 16, "symmetric": True} for bits in (8, 4))
    base = {"algorithm": "min_error", "body": narrow}
    plain = sizes.package_bytes(TINY, Scheme.model_validate(base), 16)
    override = {"match": "model.layers.1.attn.o_proj", "scheme": wide}
    more = sizes.package_bytes(TINY, Scheme.model_validate_json(json.dumps(base | {"overrides": [override]})), 16)
    assert more - plain == 8 * 8 * 4 // 8  # of the second layer alone


def test_every_exporter_and_algorithm_has_an_estimate() -> None:
    named, _ = get_args(recipe.Export.model_fields["exporter"].annotation)
    assert set(get_args(named)) == set(estimate.EXPORTING)
    assert set(get_args(Scheme.model_fields["algorithm"].annotation)) == set(estimate.QUANTIZING)


# Of builds on two cores: Qwen2.5-Coder-0.5B by its own recipe, and random weights of the shape of Qwen2.5-7B
# (`tests/large_build.py`). Peak resident memory in GB.
MEASURED = {
    "0.5B": {"checkpoint": 3.93, "export": 3.69, "quantize": 2.20, "validate": 4.75},
    "7B": {"export": 4.72, "quantize": 3.2, "validate": 17.8},
}


@pytest.mark.parametrize("size", MEASURED)
def test_memory_of_steps_is_what_builds_of_two_sizes_took(size: str) -> None:
    if size == "0.5B":
        given = recipe.load(RECIPES / "qwen2.5-coder-0.5b-instruct" / "cpu-int4.yaml").recipe
        shape = catalogue.find("Qwen2.5-Coder-0.5B-Instruct").shape
    else:
        shape = catalogue.find("Qwen2.5-7B-Instruct").shape
        rows = {"bits": 8, "block_size": 128, "symmetric": True}
        given = recipe.Recipe.model_validate(
            {
                "target": "cpu",
                "checkpoint": {
                    "sources": ({"type": "local", "path": "."},),
                    "license": "Apache-2.0",
                    "base_model": "random weights",
                },
                "export": {"exporter": "native"},
                "quantize": {
                    "algorithm": "min_error",
                    "body": {"bits": 4, "block_size": 32, "symmetric": True},
                    "head": rows,
                    "embedding": rows,
                },
                "validate": {"windows": 2, "window_tokens": 64, "gates": {"mean_kl": 1.0, "top1": 0.5}},
            }
        )
    for stage, taken in MEASURED[size].items():
        assert estimate.of(stage, given, shape).memory / 1e9 == pytest.approx(taken, rel=0.25), stage


def test_a_checkpoint_that_is_copied_needs_no_memory_for_its_weights() -> None:
    base = catalogue.base(RECIPES, "cpu", "int4")
    planned = catalogue.planned(catalogue.find("Qwen2.5-72B"), base, exporter="genai")
    steps = dict(planned.steps)
    assert list(steps) == ["checkpoint", "export", "quantize", "validate", "package"]
    assert steps["checkpoint"].memory < 1e9
    assert steps["export"].memory > 1.5 * 4 * 72e9
    assert planned.shards == 37  # as published
    assert planned.memory == 512 << 30
    assert planned.obstacle == ""
    own = catalogue.planned(catalogue.find("Qwen2.5-72B"), base)
    assert dict(own.steps)["export"].memory < 20e9  # it is written weight by weight unless it is told otherwise
    assert own.memory < planned.memory


def test_the_plan_of_a_family_that_is_not_built_says_so_and_counts_its_experts() -> None:
    base = catalogue.base(RECIPES, "cpu", "int4")
    planned = catalogue.planned(catalogue.find("qwen/qwen3-235b-a22b"), base)
    assert planned.shards == 118
    assert dict(planned.steps)["export"].disk > 4 * 235e9
    assert 110e9 < planned.demand.disk < 160e9
    assert ("qwen3_moe" in FAMILIES) == (not planned.obstacle.startswith("family qwen3_moe is not supported"))


def test_another_exporter_has_its_own_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = catalogue.base(RECIPES, "cpu", "int4"), catalogue.find("Qwen3-32B")
    monkeypatch.setitem(estimate.EXPORTING, "optimum", estimate.Pace(0.0, 1, vocabulary=2))
    other = dict(catalogue.planned(model, base, exporter="optimum").steps)["export"]
    assert other.memory == 2 * 4 * model.shape.vocabulary_parameters + 10**9
    with pytest.raises(UsageError, match="no exporter `other`"):
        catalogue.planned(model, base, exporter="other")


@pytest.mark.parametrize("size", [1, 3_800_000_000, 4_000_000_000, 500_000_000_000])
def test_a_machine_is_large_enough_and_not_twice_too_large(size: int) -> None:
    machine = catalogue.machine(size)
    assert 0.9 * machine >= size
    assert machine == 4 << 30 or 0.9 * machine / 2 < size


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: catalogue.find("Qwen3-80B"), "the catalogue has no model Qwen3-80B"),
        (lambda: catalogue.select(task="cooking"), "there is no task `cooking`"),
        (lambda: catalogue.select(family="qwen33"), "there is no family `qwen33`"),
        (lambda: catalogue.select("audio", "qwen3"), "no model of family qwen3 is made for audio"),
        (lambda: catalogue.bases(RECIPES, "gpu"), "unknown target `gpu`"),
        (lambda: catalogue.bases(ROOT / "tests", "cpu"), "there are no bases for cpu"),
        (lambda: catalogue.base(RECIPES, "cpu", "int3"), "cpu has no scheme `int3`"),
    ],
)
def test_words_that_nothing_goes_by_are_refused_with_those_that_are_known(call: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        call()
    assert caught.value.fix


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if not row.missing])
def test_a_choice_fits_and_is_a_recipe(target: str, tmp_path: Path) -> None:
    memory, context = 8_000_000_000, 1024
    chosen = choose.choose(RECIPES, "chat", memory, target, context)
    assert chosen.demand.memory <= memory
    assert chosen.model.license in COMMERCIAL
    assert "chat" in chosen.model.strengths
    assert chosen.path is None
    bases = tmp_path / "recipes" / "_base"
    bases.parent.mkdir()
    bases.symlink_to(RECIPES / "_base")
    path = tmp_path / "recipes" / chosen.model.name.lower() / f"{chosen.base.name}.yaml"
    path.parent.mkdir()
    path.write_text(chosen.text)
    loaded = recipe.load(path)
    assert loaded.recipe.checkpoint.base_model == chosen.model.repo
    assert plan.shape_of(loaded) is not None
    assert estimate.packed(loaded.recipe, chosen.model.shape) == chosen.demand.disk - sizes.FILES
    if TARGETS[target].compiled:
        assert loaded.recipe.npu is not None
        assert loaded.recipe.npu.cache == context


@pytest.mark.parametrize(
    ("task", "memory", "more", "expected"),
    [
        ("code", 2e9, {}, ("Qwen2.5-Coder-1.5B-Instruct", "int4")),
        ("code", 4e9, {}, ("Qwen2.5-Coder-1.5B-Instruct", "int8")),
        ("code", 3.5e9, {"research": True}, ("Qwen2.5-Coder-3B-Instruct", "int4")),
        ("math", 8e9, {}, ("Qwen2.5-Math-7B-Instruct", "int4")),
        ("chat", 16e9, {"family": "qwen2"}, ("Qwen2.5-14B-Instruct", "int4")),
        ("chat", 14e9, {}, ("Qwen3-14B", "int4")),
        ("chat", 7e9, {}, ("Qwen3-4B-Instruct-2507", "int8")),  # not Qwen2.5-7B, which would fit as int4
        ("chat", 90e9, {"family": "qwen2"}, ("Qwen2.5-72B-Instruct", "int8")),  # not Qwen1.5-110B
    ],
)
def test_the_largest_and_newest_that_fits_is_chosen(
    task: str, memory: float, more: dict[str, Any], expected: tuple[str, str]
) -> None:
    chosen = choose.choose(RECIPES, task, int(memory), "cpu", 4096, **more)
    assert (chosen.model.name, chosen.base.scheme) == expected


def test_a_mixture_that_is_chosen_is_a_recipe_with_its_own_scheme_and_exporter(tmp_path: Path) -> None:
    chosen = choose.choose(RECIPES, "chat", 24_000_000_000, "cpu", 4096, "qwen3_moe")
    assert (chosen.model.name, chosen.base.scheme) == ("Qwen3-30B-A3B-Instruct-2507", "moe-int4")
    path = tmp_path / "recipes" / "any" / "cpu-moe-int4.yaml"
    path.parent.mkdir(parents=True)
    (tmp_path / "recipes" / "_base").symlink_to(RECIPES / "_base")
    path.write_text(chosen.text)
    loaded = recipe.load(path)
    shape = plan.shape_of(loaded)
    assert shape is not None
    assert shape.experts == chosen.model.shape.experts
    assert recipe.exporter_of(loaded.recipe, shape) == "native"
    assert plan.family_problems(loaded.recipe, shape) == []


def test_a_head_that_is_another_matrix_leaves_the_embedding_one_of_its_own(tmp_path: Path) -> None:
    chosen = choose.choose(RECIPES, "chat", 12_000_000_000, "cpu", 4096, "qwen3")
    assert (chosen.model.name, chosen.model.shape.tied, chosen.base.scheme) == ("Qwen3-8B", False, "int8")
    path = tmp_path / "recipes" / "any" / "cpu-int8.yaml"
    path.parent.mkdir(parents=True)
    (tmp_path / "recipes" / "_base").symlink_to(RECIPES / "_base")
    path.write_text(chosen.text)
    made = recipe.load(path).recipe.quantize
    assert made.embedding == (made.head or made.body)
    tied = replace(chosen.model, shape=replace(chosen.model.shape, tied=True))
    more = chosen.demand.disk - catalogue.demand_of(tied, chosen.base).disk
    assert more == pytest.approx(chosen.model.shape.vocabulary * chosen.model.shape.hidden * 9 / 8, rel=0.01)
    # Who writes the base's word for it is told before anything is fetched.
    locked = chosen.text.replace("revision: main", f"revision: {'1' * 40}")
    path.write_text("\n".join(line for line in locked.splitlines() if not line.startswith("quantize")))
    with pytest.raises(RecipeError, match="Qwen3-8B cannot share its head with the embedding"):
        plan.make(recipe.load(path))


def test_a_recipe_that_there_is_already_is_named(tmp_path: Path) -> None:
    chosen = choose.choose(RECIPES, "code", 1_000_000_000, "cpu", 4096)
    assert chosen.path == CODER / "cpu-int4.yaml"
    assert chosen.text == ""
    # The one for NPUs has a cache of 1024 slots.
    of_npu = {context: choose.choose(RECIPES, "code", 1_200_000_000, "npu", context) for context in (1024, 2048)}
    assert {choice.model.name for choice in of_npu.values()} == {"Qwen2.5-Coder-0.5B-Instruct"}
    assert of_npu[1024].path == CODER / f"{of_npu[1024].base.name}.yaml"
    assert of_npu[2048].path is None


def test_a_longer_context_needs_more_and_may_be_too_long() -> None:
    short = choose.choose(RECIPES, "code", 3_000_000_000, "cpu", 1024)
    long = choose.choose(RECIPES, "code", 3_000_000_000, "cpu", 32768)
    assert short.model.name == "Qwen2.5-Coder-1.5B-Instruct"
    assert long.model.name == "Qwen2.5-Coder-0.5B-Instruct"  # whose cache is smaller, too
    assert catalogue.demand(short.model, short.base.recipe, 32768).memory > 3_000_000_000
    longest = choose.choose(RECIPES, "chat", 10**11, "cpu", 300_000)
    assert longest.model.name == "Qwen2.5-7B-Instruct-1M"
    with pytest.raises(UsageError, match="this version builds no model for code on cpu") as caught:
        choose.choose(RECIPES, "code", 3_000_000_000, "cpu", 1_000_000)
    assert "reads 32768 tokens" in caught.value.why


def test_what_fits_nothing_gets_the_smallest_and_its_need() -> None:
    with pytest.raises(ResourceError, match=r"no model for code fits 0\.30 GB on cpu") as caught:
        choose.choose(RECIPES, "code", 300_000_000, "cpu", 1024)
    assert "the smallest, Qwen2.5-Coder-0.5B-Instruct as int4, needs 0." in caught.value.why
    wanted = arguments.memory(caught.value.fix.split(",")[0].removeprefix("--memory "))
    assert choose.choose(RECIPES, "code", wanted, "cpu", 1024).model.name == "Qwen2.5-Coder-0.5B-Instruct"


def test_families_are_asked_for_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    base = catalogue.base(RECIPES, "cpu", "int4")
    model = catalogue.find("Qwen-7B")
    monkeypatch.delitem(FAMILIES, "qwen", raising=False)
    assert catalogue.obstacle(model, base).startswith("family qwen is not supported")
    monkeypatch.setitem(family.FAMILIES, "qwen", Family("qwen", "QWenLMHeadModel", ("genai",), "Qwen", "qwen2"))
    assert catalogue.obstacle(model, base) == ""
    monkeypatch.setitem(family.FAMILIES, "qwen", Family("qwen", "QWenLMHeadModel", ("static",), "Qwen", "qwen2"))
    assert catalogue.obstacle(model, base).endswith("static writes others")


def test_what_ends_before_its_vocabulary_is_not_proposed() -> None:
    base = catalogue.base(RECIPES, "cpu", "int4")
    assert "no head" in catalogue.obstacle(catalogue.find("Qwen3-Embedding-0.6B"), base)
    with pytest.raises(UsageError, match="this version builds no model for embedding"):
        choose.choose(RECIPES, "embedding", 10**10, "cpu", 1024)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4_000_000_000), ("4 gb", 4_000_000_000), ("0.5GiB", 1 << 29), ("512MiB", 1 << 29), ("3", 3_000_000_000)],
)
def test_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    assert arguments.memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4TBB", "-1GB", "nan", "0MB", "1e30GB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["choose", "--memory", text])
    assert caught.value.code == 2


def test_models_for_people_and_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--task", "code"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:5] == ["MODEL", "FAMILY", "PARAMETERS", "CONTEXT", "LICENCE"]
    assert [row.split()[0] for row in rows[1:7]] == [model.name for model in catalogue.select("code")]
    assert cli.main(["models", "--family", "qwen3_moe", "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["repo"] for row in told] == [model.repo for model in catalogue.select(family="qwen3_moe")]
    obstacles = {scheme: need["obstacle"] for scheme, need in told[0]["needs"].items()}
    assert {scheme for scheme, text in obstacles.items() if not text} == {"moe-int4", "moe-int8"}
    assert "is for models without mixtures of experts" in obstacles["int4"]
    assert told[0]["shape"]["experts"]["count"] == 128
    assert told[0]["needs"]["int4"]["memory"] > told[0]["needs"]["int4"]["disk"] > 0


def test_the_plan_and_the_choice_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--plan", "Qwen2.5-72B", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["repo"], told["shards"], told["machine"]["memory"]) == ("Qwen/Qwen2.5-72B-Instruct", 37, 128 << 30)
    assert cli.main(["models", "--plan", "Qwen2.5-72B"]) == 0
    assert "a machine with 128 GiB of memory and " in capsys.readouterr().out
    assert cli.main(["choose", "--task", "code", "--memory", "2GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["repo"], told["base"], told["recipe"]) == ("Qwen/Qwen2.5-Coder-1.5B-Instruct", "cpu-int4", None)
    assert cli.main(["choose", "--task", "code", "--memory", "2GB"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(told["text"])
    assert all(line.startswith("#") for line in shown.removesuffix(told["text"]).splitlines())
