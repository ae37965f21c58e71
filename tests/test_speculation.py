"""Drafts change how soon tokens come, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pipeline import cli
from pipeline.bench import lookup as lookup_bench
from pipeline.errors import UsageError
from pipeline.export import exporter
from pipeline.graph import edits as graph
from pipeline.package import onnx_references
from pipeline.package.onnx_references import LAST_LOGITS
from pipeline.runtime import chat, generate, session as sessions, speculation
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.session import Session
from pipeline.runtime.speculation import LONGEST, Counts, Lookup

NEVER = 511  # an end token that the tiny model does not come up with: answers end at their limit
PROMPT = [5, 17, 40, 8, 23, 61, 5, 17, 40]
CONFIG: dict[str, Any] = {
    "model": {"context_length": 64, "vocab_size": 64, "eos_token_id": 3, "decoder": {"filename": "model.onnx"}}
}


def grown(lookup: Lookup) -> Lookup:
    """One whose drafts have been accepted so far."""
    for _ in range(4):
        lookup.learn(LONGEST, LONGEST)
    return lookup


def test_a_draft_is_what_followed_the_longest_suffix_where_it_stood_last() -> None:
    lookup = grown(Lookup([1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 61, 9, 7, 3, 4, 70, 8, 2, 3, 4]))
    assert lookup.propose(2) == [60, 61]  # 2 3 4 stood last before 60; 3 4 did before 70
    lookup.extend([60])
    assert lookup.propose(3) == [61, 9, 7]


def test_what_is_new_has_no_draft() -> None:
    assert Lookup([1, 2, 3]).propose(8) == []
    assert Lookup([1]).propose(8) == []
    assert Lookup([]).propose(8) == []


@pytest.mark.parametrize("known", [1, 2, 3])
def test_short_matches_are_trusted_for_one_token(known: int) -> None:
    lookup = grown(Lookup([7, 8, 9, 20, 21, 22, 23, 30, 31, *[7, 8, 9][3 - known :]]))
    assert lookup.propose(4) == ([20, 21, 22, 23] if known == 3 else [20])


def test_a_sequence_that_goes_round_is_drafted_round_and_round() -> None:
    assert grown(Lookup([1, 2, 3, 1, 2, 3, 1, 2, 3])).propose(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert grown(Lookup([4, 4, 4, 4])).propose(3) == [4, 4, 4]


def test_drafts_grow_while_they_are_accepted_and_shrink_when_not() -> None:
    lookup = Lookup([*range(40), *range(10)])
    first = len(lookup.propose(LONGEST))
    assert 1 < first < LONGEST
    lookup.learn(first, first)
    assert len(lookup.propose(LONGEST)) == min(2 * first + 1, LONGEST)
    lookup.learn(LONGEST, 0)
    lookup.learn(2, 0)
    assert len(lookup.propose(LONGEST)) == 2
    assert len(lookup.propose(1)) == 1
    assert lookup.propose(0) == []


def test_sampling_is_refused() -> None:
    with pytest.raises(UsageError, match="lookup decoding takes the most likely"):
        next(speculation.stream(Session(Path(), None, CONFIG, 1, "cpu"), PROMPT, 4, Sampling(0.5)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": {**CONFIG["model"], "decoder": {"pipeline": []}}}, "made of stages"),
        ({"search": {"num_beams": 2}}, "no beams"),
        ({"search": {"min_length": 8}}, "no least length"),
    ],
)
def test_what_cannot_be_verified_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    onnx.save(onnx.ModelProto(), str(tmp_path / "model.onnx"))
    with pytest.raises(UsageError, match=text):
        next(speculation.stream(Session(tmp_path, None, {**CONFIG, **change}, 1, "cpu"), PROMPT, 4))


def test_repeated_tokens_are_penalized_row_by_row() -> None:
    rows = np.array([[3.0, 2.9, 0.0, -1.0], [3.0, 2.9, 2.8, -1.0], [-1.0, -1.05, -1.1, -1.2]], np.float32)
    kept = rows.copy()
    assert speculation._ranked_first(rows, [0, 0, 1, 2], 1.0) == [0, 0, 0]
    # Known are 0, then 0 and 1, then 0, 1 and 2.
    assert speculation._ranked_first(rows, [0, 0, 1, 2], 1.25) == [1, 2, 3]
    np.testing.assert_array_equal(rows, kept)


def test_a_bench_s_prompts_are_named_texts() -> None:
    found = lookup_bench.prompts()
    assert {"rename", "explain"} < found.keys()
    assert all(len(text) > 50 and "###" not in text for text in found.values())
    assert "def summarize(" in found["rename"]


@pytest.fixture(scope="module", params=["genai", "optimum"])
def package(request: pytest.FixtureRequest, checkpoint_of: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """A tiny model in float32, which picks its tokens without near ties; its head sees several last tokens."""
    checkpoint = checkpoint_of("qwen2")
    folder: Path = tmp_path_factory.mktemp("package")
    exporter.EXPORTERS[request.param](checkpoint, folder, {}, "CPUExecutionProvider", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(checkpoint / name, folder / name)
    prune(folder, LONGEST + 1)
    configure(folder, "model", eos_token_id=NEVER)
    return folder


def configure(folder: Path, section: str, **settings: Any) -> None:
    config = json.loads((folder / "genai_config.json").read_bytes())
    config[section] |= settings
    (folder / "genai_config.json").write_text(json.dumps(config))


def prune(folder: Path, tokens: int) -> None:
    """Let the head see so many last tokens; 0: all."""
    model = graph.load(folder / "model.onnx")
    graph.unprune_head(model)
    if tokens:
        graph.prune_head(model, tokens)
    onnx.save(model, str(folder / "model.onnx"))


def variant(package: Path, folder: Path, tokens: int = LONGEST + 1, **search: Any) -> Session:
    """The package with another head, or other search settings."""
    shutil.copytree(package, folder)
    prune(folder, tokens)
    configure(folder, "search", **search)
    return sessions.open_package(folder, 1)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Converting a tensor to a Python boolean",
    "ignore:Exporting aten..index operator",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


@pytest.fixture(scope="module")
def session(package: Path) -> Session:
    return sessions.open_package(package, 1)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 3, 60])
@pytest.mark.parametrize("prompt", [[7], [7, 9], PROMPT, list(range(30, 60)) * 3])
def test_an_answer_is_the_one_token_by_token_and_takes_fewer_forwards(
    session: Session, prompt: list[int], limit: int
) -> None:
    plain = list(generate.stream(session, prompt, limit))
    counts, none = Counts(), Counts()
    assert list(speculation.stream(session, prompt, limit, counts=counts)) == plain
    assert list(speculation.stream(session, prompt, limit, counts=none, lookup=False)) == plain
    assert (none.forwards, none.drafted, none.accepted) == (limit, 0, 0)
    assert counts.forwards + counts.accepted >= limit
    assert counts.accepted <= counts.drafted
    if prompt == PROMPT and limit == 60:  # the model goes round sooner or later
        assert counts.forwards < 45


@pytest.mark.slow
def test_wrong_drafts_leave_no_trace(session: Session) -> None:
    plain = list(generate.stream(session, PROMPT, 24))
    verifier = speculation.Verifier(generate.Reader(session, len(PROMPT) + 40))
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + 24:
        at = len(ids) - len(PROMPT)
        wrong = [(token + 1) % 64 for token in plain[at : at + 6]]
        found = verifier.verify(ids, [*plain[at : at + 2], *wrong])
        assert found[:2] == plain[at : at + 2]
        ids += found
    assert ids[len(PROMPT) :][:24] == plain


@pytest.mark.slow
def test_answers_end_with_an_end_token_and_with_the_context(package: Path, session: Session) -> None:
    plain = list(generate.stream(session, PROMPT, 30))
    ended = replace(session, config={"model": {**session.config["model"], "eos_token_id": [plain[20]]}})
    assert list(speculation.stream(ended, PROMPT, 30)) == plain[: plain.index(plain[20])]
    long = [5, 17] * ((session.context_length - 6) // 2)
    assert list(speculation.stream(session, long, 99)) == list(generate.stream(session, long, 99))
    with pytest.raises(UsageError, match="limit of 0"):
        next(speculation.stream(session, PROMPT, 0))
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(speculation.stream(session, [], 1))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 2, 4, 40])
def test_heads_that_see_all_tokens_or_few_are_made_use_of(package: Path, tmp_path: Path, tokens: int) -> None:
    opened = variant(package, tmp_path / "package", tokens)
    counts = Counts()
    assert list(speculation.stream(opened, PROMPT, 60, counts=counts)) == list(generate.stream(opened, PROMPT, 60))
    assert counts.accepted > 0


@pytest.mark.slow
def test_a_head_that_sees_the_last_token_only_is_refused(package: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot verify drafts"):
        next(speculation.stream(variant(package, tmp_path / "package", 1), PROMPT, 4))


@pytest.mark.slow
@pytest.mark.parametrize("search", [{"repetition_penalty": 1.3}, {"chunk_size": 4}])
def test_search_settings_of_the_package_hold(package: Path, tmp_path: Path, search: dict[str, Any]) -> None:
    opened = variant(package, tmp_path / "package", **search)
    plain = list(generate.stream(opened, PROMPT, 60))
    assert list(speculation.stream(opened, PROMPT, 60)) == plain
    if "repetition_penalty" in search:
        assert plain != list(generate.stream(sessions.open_package(package, 1), PROMPT, 60))


@pytest.mark.slow
def test_outputs_are_read_without_onnx(package: Path, tmp_path: Path) -> None:
    data = (package / "model.onnx").read_bytes()
    assert onnx_references.outputs(data) == [value.name for value in onnx.load_model_from_string(data).graph.output]
    assert onnx_references.outputs(data)[-1] == LAST_LOGITS
    with pytest.raises(ValueError, match=r"of no field|ends within"):
        onnx_references.outputs(b"\x00no model")


@pytest.mark.slow
def test_the_command_reports_drafts_and_refuses_to_sample(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(package), "--trust", "--raw", "--prompt", "the fox and the dog and the fox", "--json"]
    arguments += ["--threads", "1", "--max-tokens", "40", "--lookup"]
    assert cli.main(arguments) == 0
    *tokens, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    prompt = chat.load(package).encode("the fox and the dog and the fox", special=False)
    opened, counts = sessions.open_package(package, 1), Counts()
    assert [line["token"] for line in tokens] == list(speculation.stream(opened, prompt, 40, counts=counts))
    assert last["lookup"] == vars(counts)
    assert last["tokens"] == len(tokens)
    assert cli.main([*arguments, "--temperature", "0.5"]) == 2
    assert "most likely" in json.loads(capsys.readouterr().out)["what"]


@pytest.mark.slow
def test_the_bench_tells_what_drafts_gain(package: Path, session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    found = lookup_bench.compare(session, PROMPT, 60, 2)
    assert found["lossless"] is True
    assert found["first_difference"] is None
    assert found["tokens"] == 60
    assert found["forwards"] < 45
    assert min(found["plain"], found["lookup"], found["ratio"], found["whole_ratio"]) > 0
    assert lookup_bench.main([str(package / "missing")]) == 9
    assert "genai_config" in capsys.readouterr().err


@pytest.mark.real
def test_on_the_real_package_drafts_change_nothing_and_copying_is_faster() -> None:
    package = Path(__file__).parent.parent / "artifacts" / "qwen2.5-coder-0.5b-instruct-cpu-int4"
    opened, tokenizer = sessions.open_package(package), chat.load(package)
    texts = lookup_bench.prompts()
    assert speculation.independent(opened, tokenizer.encode(texts["proofread"])[: 4 * LONGEST])
    for name in ("rename", "explain"):
        ids = tokenizer.encode_chat([{"role": "user", "content": texts[name]}])
        found = lookup_bench.compare(opened, ids, 160, 2)
        assert found["lossless"] is True
        if name == "rename":
            assert found["first_difference"] is None
            assert found["ratio"] > 1.8
