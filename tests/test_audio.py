"""A model that hears, from checkpoint to package, against PyTorch."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_wav import write
from tiny_audio import BINS, change, tiny_audio_checkpoint

from pipeline import cli
from pipeline.artifact import GOLDEN
from pipeline.checkpoint import fetch as checkpoint, reference
from pipeline.errors import CheckpointError, PackageError, StageError, UsageError
from pipeline.export import exporter, fusion_graph
from pipeline.facts import family, models, multimodal
from pipeline.facts.recipe import Gates
from pipeline.facts.scheme import Scheme
from pipeline.fidelity import audio_agreement, media_agreement
from pipeline.graph import edits as graph
from pipeline.package import config as package_config, replay
from pipeline.quantization import media_quantizer
from pipeline.runtime import audio_prompt, audio_tower, chat, generate, mel, session
from pipeline.stages.export import SIDECARS

pytestmark = pytest.mark.slow

SOUNDS = audio_agreement.sounds()
BITS = {"bits": 8, "block_size": 32, "symmetric": True}
SCHEME = {"body": {"bits": 4, "block_size": 16, "symmetric": False}, "head": BITS, "embedding": BITS}
GATES = {"mean_kl": 0.3, "top1": 0.8, "perplexity_ratio": 1.5, "greedy": 0.3}


def _quiet(part: float, what: str) -> None:
    pass


def _asked(opened: session.Session, text: str, clips: list[np.ndarray]) -> tuple[list[int], replay.Media]:
    """The ids of a question with sounds, and what the tower is given."""
    message = {"role": "user", "content": chat.content(text, sounds=len(clips))}
    return _attached(opened, chat.load(opened.package).encode_chat([message]), clips)


def _raw(opened: session.Session, text: str, clips: list[np.ndarray]) -> tuple[list[int], replay.Media]:
    """The same without a chat template."""
    ids = chat.load(opened.package).encode("".join(audio_tower.TOKENS) * len(clips) + text)
    return _attached(opened, ids, clips)


def _attached(opened: session.Session, ids: list[int], clips: list[np.ndarray]) -> tuple[list[int], replay.Media]:
    prompt, media = generate.attach(opened, ids, clips=clips)
    assert media is not None
    return prompt, media


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it is published."""
    return tiny_audio_checkpoint(tmp_path_factory.mktemp("audio") / "source")


@pytest.fixture(scope="module")
def prepared(source: Path) -> Path:
    """The checkpoint as the first stage leaves it."""
    folder = source.parent / "prepared"
    folder.mkdir()
    facts = checkpoint.prepare(source, None, folder, _quiet)
    assert facts["model_type"] == "qwen2_audio"
    assert facts["parameters"] > 139840  # the decoder's
    return folder


@pytest.fixture(scope="module")
def exported(prepared: Path) -> session.Session:
    """Its graphs in float32."""
    import onnx

    folder = prepared.parent / "exported"
    folder.mkdir()
    model = exporter.export_native(prepared, folder, "float32")
    graph.prune_head(model, 4)
    onnx.save(model, str(folder / "model.onnx"))
    for name in SIDECARS:
        if (prepared / name).is_file():
            shutil.copyfile(prepared / name, folder / name)
    return session.open_package(folder, threads=1)


@pytest.fixture(scope="module")
def torch_model(prepared: Path) -> reference.Reference:
    return reference.load(prepared)


def _inputs(prepared: Path, clips: list[np.ndarray]) -> dict[str, Any]:
    """What transformers' model is given beside the ids: spectrograms of 30 s by its own extractor."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(prepared)
    given = extractor(clips, sampling_rate=mel.SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
    return {"input_features": given["input_features"], "feature_attention_mask": given["attention_mask"]}


def test_spectrograms_are_transformers(prepared: Path) -> None:
    from transformers import WhisperFeatureExtractor

    noise = np.random.default_rng(1).normal(0.0, 0.2, mel.SAMPLES).astype(np.float32)
    for bins in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=bins)
        for samples in (321, 16000, 37123, mel.SAMPLES - 90, mel.SAMPLES):
            wanted = extractor(noise[:samples], sampling_rate=mel.SAMPLE_RATE, return_attention_mask=True)
            found = mel.log_mel(noise[:samples], bins)
            assert wanted["attention_mask"].sum() == mel.frames_of(samples)
            assert np.abs(found - wanted["input_features"][0][:, : found.shape[1]]).max() < 1e-4


def test_answers_on_sounds_are_pytorchs(
    prepared: Path, exported: session.Session, torch_model: reference.Reference
) -> None:
    # The second is much shorter than the first, and the third as short as can be.
    clips = [SOUNDS["knocks"], SOUNDS["chirp"][:5000], SOUNDS["notes"][:321]]
    prompt, media = _asked(exported, "What do you hear?", clips)
    given = _inputs(prepared, clips)
    answer, _ = torch_model.greedy(prompt, 72, **given)
    assert len(answer) >= 64
    assert len(set(answer)) > 8  # it goes round, but not on one spot
    assert list(generate.stream(exported, prompt, 72, media=media))[: len(answer)] == answer
    whole = [*prompt, *answer]
    wanted = torch_model.logits(whole, **_inputs(prepared, clips))[len(prompt) - 1 :]
    assert np.abs(generate.answer_logits(exported, prompt, [*answer, 0], media) - wanted).max() < 2e-4
    # It listens: another sound is answered otherwise.
    other, sound = _asked(exported, "What do you hear?", [SOUNDS["notes"]])
    assert list(generate.stream(exported, other, 72, media=sound)) != answer


def test_thirty_seconds_are_heard_to_the_end(
    prepared: Path, exported: session.Session, torch_model: reference.Reference
) -> None:
    clip = np.random.default_rng(2).normal(0.0, 0.2, mel.SAMPLES).astype(np.float32)
    tower = audio_prompt.read_tower(exported.package)
    prompt, media = _raw(exported, "hello", [clip])
    assert prompt.count(tower.token) == 750
    wanted = torch_model.logits(prompt, **_inputs(prepared, [clip]))[-1]
    assert np.abs(generate.answer_logits(exported, prompt, [0], media)[0] - wanted).max() < 2e-4


def test_text_alone_is_pytorchs(exported: session.Session, torch_model: reference.Reference) -> None:
    ids = list(range(7, 70))
    wanted = torch_model.logits(ids)
    assert np.abs(generate.decode_logits(exported, ids) - wanted).max() < 1e-4
    assert np.abs(generate.prefill_logits(exported, ids)[-1] - wanted[-1]).max() < 1e-4


def test_a_token_of_sound_that_the_model_writes_is_a_word(
    prepared: Path, exported: session.Session, torch_model: reference.Reference
) -> None:
    import torch

    tower = audio_prompt.read_tower(exported.package)
    prompt, media = _raw(exported, "hello", [SOUNDS["chirp"]])
    given = _inputs(prepared, [SOUNDS["chirp"]])
    with torch.inference_mode():
        cache = torch_model.model(torch.tensor([prompt]), **given, use_cache=True).past_key_values
        wanted = torch_model.model(torch.tensor([[tower.token]]), past_key_values=cache).logits[0, -1].numpy()
    found = generate.answer_logits(exported, prompt, [tower.token, 0], media)
    assert np.abs(found[-1] - wanted).max() < 2e-4


def test_tokens_of_sound_without_sounds_are_words(tmp_path: Path) -> None:
    import onnxruntime

    from pipeline.graph.external_data import ExternalDataWriter

    table = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    with ExternalDataWriter(tmp_path / "embedding.onnx.data") as writer:
        model = fusion_graph.write(table, 5, 8, writer, "audio_features", ("image_features",))
    opened = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    features = np.arange(16, dtype=np.float32).reshape(2, 8)
    ids = np.array([[5, 1, 5, 2], [5, 0, 3, 3]])
    for rows in (2, 0):
        given = {"input_ids": ids, "audio_features": features[:rows], "image_features": np.zeros((0, 8), np.float32)}
        found = opened.run(None, given)[0]
        wanted = table[ids]
        wanted[ids == 5] = [*features[:rows], *[table[5]] * (3 - rows)]
        assert np.array_equal(found, wanted)


def test_int4_is_within_its_gates_and_replays(
    prepared: Path, exported: session.Session, torch_model: reference.Reference, tmp_path: Path
) -> None:
    scheme = Scheme.model_validate({"algorithm": "min_error", **SCHEME})
    facts = media_quantizer.quantize(exported.package, prepared, tmp_path, scheme, _quiet)
    assert facts["weights"] == {"4-bit/16 asymmetric": 10, "8-bit/32": 1}
    assert graph.operators(graph.load(tmp_path / "embedding.onnx"))["GatherBlockQuantized"] == 1
    for path in exported.package.iterdir():
        if not (tmp_path / path.name).exists():
            shutil.copyfile(path, tmp_path / path.name)
    assert (tmp_path / "speech.onnx.data").read_bytes() == (exported.package / "speech.onnx.data").read_bytes()
    opened = session.open_package(tmp_path, threads=1)
    found, golden = audio_agreement.measure(torch_model, opened, prepared, 12, _quiet)
    assert all(entry["prompt_agrees"] for entry in found["answers"])
    assert found["mean_kl"] > 0
    assert found["tower"] == "float32"
    gates = media_agreement.gates(found, audio_agreement.bounds(found), "audio", Gates(**GATES))
    assert len(gates) == 6
    assert [gate["metric"] for gate in gates if not gate["passed"]] == []
    (tmp_path / GOLDEN).write_text("".join(json.dumps(entry) + "\n" for entry in golden), encoding="utf-8")
    result = replay.replay(opened.model, replay.read(tmp_path / GOLDEN))
    assert result["identical"] == len(audio_agreement.QUESTIONS)
    assert result["logprob"] < 1e-3


def test_the_tower_is_quantized_where_it_has_a_scheme(
    prepared: Path, exported: session.Session, torch_model: reference.Reference, tmp_path: Path
) -> None:
    scheme = Scheme.model_validate({"algorithm": "min_error", **SCHEME, "audio": BITS})
    facts = media_quantizer.quantize(exported.package, prepared, tmp_path, scheme, _quiet)
    assert (tmp_path / "speech.onnx.data").stat().st_size < (exported.package / "speech.onnx.data").stat().st_size
    assert facts["audio"]["relative_error"] < 1e-4
    for path in exported.package.iterdir():
        if not (tmp_path / path.name).exists():
            shutil.copyfile(path, tmp_path / path.name)
    found, _ = audio_agreement.measure(torch_model, session.open_package(tmp_path, threads=1), prepared, 4, _quiet)
    assert found["tower"] == "quantized"
    assert audio_agreement.QUANTIZED_COSINE < found["feature_cosine"] < 0.999999


def test_golden_sounds_that_do_not_fit_are_refused(exported: session.Session) -> None:
    tower = audio_prompt.read_tower(exported.package)
    prompt, media = _raw(exported, "a", [SOUNDS["chirp"]])
    audio_prompt.check(media.arrays, prompt, tower)
    changes: dict[str, tuple[str, Any]] = {
        "shape": ("audio_embeds", media.arrays["audio_embeds"][:, :3]),
        "one size": ("audio_sizes", np.array([1, 2])),
        "are sound": ("audio_sizes_frames", np.array([10**6])),
        "not heard as": ("audio_sizes", np.array([10**9])),
    }
    for said, (name, values) in changes.items():
        with pytest.raises(ValueError, match=said):
            audio_prompt.check({**media.arrays, name: values}, prompt, tower)
    with pytest.raises(ValueError, match="tokens of sound"):
        audio_prompt.check(media.arrays, prompt[2:], tower)
    with pytest.raises(UsageError, match="sounds do not fit the prompt"):
        generate.check_answer(exported, prompt[2:], [5], media)
    pixels = {"pixel_values": np.zeros((4, 1176), np.float32)}
    with pytest.raises(UsageError, match="takes no images"):
        generate.check_answer(exported, prompt, [5], replay.Media(pixels, (1,)))
    packed = replay.pack(media.arrays)
    assert np.array_equal(replay.unpack(packed)["audio_embeds"], media.arrays["audio_embeds"])
    bad = [{"input_ids": packed["audio_sizes"]}, {"audio_sizes": packed["audio_embeds"]}]
    bad += [{"audio_sizes": {**packed["audio_sizes"], "data": base64.b64encode(bytes(7)).decode()}}]
    for sounds in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - numpy's own words
            replay.unpack(sounds)


def test_the_default_template_is_the_published_format(source: Path, prepared: Path) -> None:
    from transformers import AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor

    tokenizer = AutoTokenizer.from_pretrained(source)
    published = Qwen2AudioProcessor(WhisperFeatureExtractor.from_pretrained(source), tokenizer)
    own = (prepared / "chat_template.jinja").read_text(encoding="utf-8")
    text: Callable[[str], dict[str, str]] = lambda words: {"type": "text", "text": words}  # noqa: E731
    talk = [
        {"role": "user", "content": chat.content("First?", sounds=2)},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [text("Then"), {"type": "audio", "audio_url": "x"}, text("this")]},
    ]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk], [{"role": "user", "content": "Hi"}]):
        wanted = published.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat.render(own, messages) == wanted


def test_words_of_users_are_no_sounds(exported: session.Session) -> None:
    tower = audio_prompt.read_tower(exported.package)
    prompt, media = _asked(exported, "a <|AUDIO|> b", [SOUNDS["chirp"]])
    assert prompt.count(tower.token) == sum(media.tokens) == 25
    with pytest.raises(UsageError, match="places for 1 sounds, and 2 are given"):
        _attached(exported, [tower.token], [SOUNDS["chirp"], SOUNDS["notes"]])


Change = Callable[[Path], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "no extractor": (lambda path: (path / "preprocessor_config.json").unlink(), "no preprocessor_config.json"),
    "other windows": (lambda path: change(path, "preprocessor_config.json", n_fft=512), "n_fft is 512, not 400"),
    "other bins": (
        lambda path: change(path, "preprocessor_config.json", feature_size=80),
        "feature_size is 80, not 16",
    ),
    "dithered": (lambda path: change(path, "preprocessor_config.json", dither=0.1), "dither is set"),
    "other length": (lambda path: change(path, "config.json", audio_config=_audio(max_source_positions=750)), "is 750"),
    "other activation": (
        lambda path: change(path, "config.json", audio_config=_audio(activation_function="relu")),
        "relu",
    ),
    "heads": (
        lambda path: change(path, "config.json", audio_config=_audio(encoder_attention_heads=3)),
        "do not divide",
    ),
    "a size": (lambda path: change(path, "config.json", audio_config=_audio(d_model="32")), "d_model is '32'"),
    "no object": (lambda path: change(path, "config.json", audio_config=[]), "no object"),
    "token": (lambda path: change(path, "config.json", audio_token_index=-1), "audio_token_index is -1"),
    "other decoder": (lambda path: change(path, "config.json", text_config={"model_type": "llama"}), "'llama'"),
    "layers": (lambda path: change(path, "config.json", audio_config=_audio(encoder_layers=3)), "layers.2"),
    "template": (lambda path: (path / "chat_template.jinja").write_text("{{ messages }}"), "no place for sounds"),
}


def _audio(**settings: Any) -> dict[str, Any]:
    sizes = {"num_mel_bins": BINS, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    return {**sizes, "d_model": 32, **settings}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(name: str, source: Path, tmp_path: Path) -> None:
    breaking, said = BROKEN[name]
    folder, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source, folder)
    out.mkdir()
    breaking(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.prepare(folder, None, out, _quiet)
    assert said in str(caught.value)


def test_the_sizes_of_the_published_checkpoint() -> None:
    """Its config.json leaves most to transformers."""
    text = {"intermediate_size": 11008, "max_position_embeddings": 8192, "model_type": "qwen2", "vocab_size": 156032}
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": {"num_mel_bins": 128, "encoder_layers": 32, "d_model": 1280, "max_source_positions": 1500},
        "text_config": text,
    }
    shape = family.read_shape(config, "config.json")
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (32, 4096, 32, 32, 128)
    assert (shape.intermediate, shape.vocabulary, shape.context, shape.tied) == (11008, 156032, 8192, False)
    assert multimodal.tower(config, shape, "config.json") == models.MODELS["Qwen2-Audio-7B-Instruct"].tower


def test_what_it_has_not_is_refused(source: Path, exported: session.Session, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="float32"):
        exporter.export_native(source, tmp_path, "float16")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(CheckpointError):
        checkpoint.prepare(source, adapter, tmp_path, _quiet)
    with pytest.raises(UsageError, match="does not hear"):
        audio_prompt.read_tower(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(PackageError, match="cannot be read"):
        audio_prompt.read_tower(tmp_path)
    with pytest.raises(UsageError, match="places for 0 sounds"):
        _attached(exported, [1, 2], [SOUNDS["chirp"]])


def test_the_configuration_of_towers_is_checked(exported: session.Session, tmp_path: Path) -> None:
    config = json.loads((exported.package / "genai_config.json").read_bytes())
    path = tmp_path / "genai_config.json"
    path.write_text(json.dumps(config))
    package_config.check_config(tmp_path)
    for key, value in (("config_filename", "x.json"), ("filename", "../a.onnx"), ("filename", "a.bin")):
        broken = json.loads(json.dumps(config))
        broken["model"]["speech"][key] = value
        path.write_text(json.dumps(broken))
        with pytest.raises(PackageError, match="does not trust") as caught:
            package_config.check_config(tmp_path)
        assert f"model.speech.{key}" in caught.value.why


def test_a_build_and_its_package(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "tiny" / "cpu.yaml"
    recipe.parent.mkdir()
    spec = {
        "target": "cpu",
        "checkpoint": {
            "sources": [{"type": "local", "path": str(source)}],
            "license": "Apache-2.0",
            "base_model": "tiny",
        },
        "export": {"exporter": "native"},
        "quantize": {"algorithm": "gptq", **SCHEME},
        "validate": {"windows": 4, "window_tokens": 32, "greedy_tokens": 8, "gates": GATES},
    }
    recipe.write_text(json.dumps(spec))  # which is YAML, and without aliases
    out = tmp_path / "out"
    assert cli.main(["build", str(recipe), "--store", str(tmp_path / "store"), "--out", str(out)]) == 0
    package = out / "tiny-cpu"
    validation = json.loads((package / "validation.json").read_bytes())
    assert validation["audio"]["feature_cosine"] > audio_agreement.COSINE
    assert "## Sounds" in (package / "README.md").read_text(encoding="utf-8")
    assert cli.main(["verify", str(package), "--replay"]) == 0
    assert "9 of 9 answers identical" in capfd.readouterr().out
    first, second = write(tmp_path / "a.wav", SOUNDS["chirp"]), write(tmp_path / "b.wav", SOUNDS["notes"])
    ask = ["generate", str(package), "--prompt", "hello", "--max-tokens", "9", "--json", "--audio", str(first)]
    assert cli.main(ask) == 0
    one = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert cli.main([*ask, "--audio", str(second), "--trust"]) == 0
    two = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert two["prompt_tokens"] > one["prompt_tokens"] > 25
    assert cli.main([*ask, "--raw", "--trust"]) == 0
    assert cli.main([*ask, "--lookup", "--trust"]) == UsageError.exit_code
    assert cli.main([*ask, "--audio", str(recipe), "--trust"]) == UsageError.exit_code
