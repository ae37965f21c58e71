"""Models that see: their checkpoints, graphs and packages, against PyTorch."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gpu import run, steps_of
from test_replay import script

from pipeline import cli
from pipeline.artifact import GOLDEN, VALIDATION, Artifact
from pipeline.checkpoint import fetch as checkpoint, files as checkpoint_files, reference
from pipeline.errors import CheckpointError, PackageError, RecipeError, StageError, UsageError
from pipeline.export import exporter, fusion_graph
from pipeline.facts import models, multimodal, vision
from pipeline.facts.family import FAMILIES, read_shape
from pipeline.facts.recipe import Gates
from pipeline.facts.scheme import Scheme
from pipeline.facts.vision import Vision
from pipeline.fidelity import pictures
from pipeline.fidelity.pictures import Drawn
from pipeline.graph.external_data import ExternalDataWriter
from pipeline.package import config as package_config, graphs as package_graphs, replay, verify
from pipeline.package.replay import Media
from pipeline.quantization import decoder, media_quantizer
from pipeline.runtime import chat, generate, golden, images, session as sessions
from pipeline.runtime.session import Session
from pipeline.stages import validate

KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
slow = pytest.mark.slow


def _settings(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "config.json").read_bytes())
    return found


def _vision(checkpoint: Path) -> Vision:
    settings = _settings(checkpoint)
    return vision.read_vision(settings, read_shape(settings, "config.json"), "config.json")


def _processor(package: Path) -> dict[str, Any]:
    transforms = json.loads((package / "processor_config.json").read_bytes())["processor"]["transforms"]
    return {key: value for entry in transforms for key, value in entry["operation"].get("attrs", {}).items()}


@pytest.fixture(scope="module")
def package_of(
    vision_checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Maker of what export writes of a checkpoint in float32."""
    import onnx

    @cache
    def made(*checkpoint: Any) -> Path:
        source, folder = vision_checkpoint_of(*checkpoint), tmp_path_factory.mktemp("export")
        onnx.save(exporter.export_native(source, folder, "float32"), str(folder / "model.onnx"))
        for path in (*source.glob("tokenizer*"), *source.glob("chat_template*")):
            shutil.copyfile(path, folder / path.name)
        return folder

    return made


def _asked(session: Session, group: Sequence[Drawn], question: str) -> tuple[list[int], Media | None]:
    content = [*({"type": "image"} for _ in group), {"type": "text", "text": question}]
    prompt = chat.load(session.package).encode_chat([{"role": "user", "content": content}])
    return generate.attach(session, prompt, [images.check(one.png) for one in group])


def _given(group: Sequence[Drawn], seen: Vision, processor: dict[str, Any]) -> dict[str, Any]:
    import torch

    made = [pictures.patches(one.pixels, seen, processor) for one in group]
    pixels, grids = (np.concatenate(parts) for parts in zip(*made, strict=True))
    return {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.from_numpy(grids)}


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_towers_for_every_size(
    kind: str, vision_checkpoint_of: Callable[..., Path], package_of: Callable[..., Path]
) -> None:
    import onnxruntime
    import torch

    seen = _vision(vision_checkpoint_of(kind))
    tower = reference.load(vision_checkpoint_of(kind)).model.model.visual
    path = str(package_of(kind) / "vision.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    # One square, one row, windows that end in the middle, and ones that the picture fills.
    for down, across in ((2, 2), (2, 14), (10, 6), (8, 12), (18, 22), (4, 4)):
        pixels = random.standard_normal((down * across, seen.patch_values)).astype(np.float32)
        grid = np.array([[1, down, across]])
        (found,) = session.run(None, {"pixel_values": pixels, "image_grid_thw": grid})
        with torch.inference_mode():
            wanted = tower(torch.from_numpy(pixels), grid_thw=torch.from_numpy(grid))
        wanted = torch.cat([wanted[0], *wanted[1]], dim=-1) if isinstance(wanted, tuple) else wanted
        assert found.shape == (down * across // 4, seen.feature)
        assert np.abs(found - wanted.numpy()).max() < 2e-5


def test_a_token_of_an_image_that_the_model_writes_has_its_own_embedding(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    with ExternalDataWriter(tmp_path / "embedding.onnx.data") as writer:
        onnx.save(fusion_graph.write(table, 5, 8, writer), str(tmp_path / "embedding.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "embedding.onnx"), providers=["CPUExecutionProvider"])
    ids = np.array([[1, 5, 2, 5, 5]])
    for count in (0, 1, 2, 3, 4):
        features = -1 - np.arange(8 * count, dtype=np.float32).reshape(count, 8)
        (found,) = session.run(None, {"input_ids": ids, "image_features": features})
        wanted = np.pad(table[ids[0]], ((0, 0), (0, 4)))
        wanted[[1, 3, 4][:count]] = features[:3]
        assert np.array_equal(found[0], wanted)


@slow
@pytest.mark.parametrize(
    "checkpoint", [("qwen2_vl",), ("qwen2_5_vl", False, True), ("qwen3_vl",)], ids=lambda case: case[0]
)
def test_answers_about_pictures_are_pytorchs(
    checkpoint: tuple[Any, ...], vision_checkpoint_of: Callable[..., Path], package_of: Callable[..., Path]
) -> None:
    package, source = package_of(*checkpoint), vision_checkpoint_of(*checkpoint)
    session, torch_model = sessions.open_package(package, 1), reference.load(source)
    seen, processor = _vision(source), _processor(package)
    drawn = pictures.draw(seen.patch * seen.merge, processor["min_pixels"], processor["max_pixels"])
    compared = 0
    for group in ([drawn[0]], [drawn[1], drawn[3]], [drawn[2], drawn[2], drawn[0]]):
        prompt, media = _asked(session, group, "What is in this image?")
        given = _given(group, seen, processor)
        assert media is not None
        assert np.array_equal(media.arrays["image_grid_thw"], given["image_grid_thw"].numpy())
        assert np.abs(media.arrays["pixel_values"] - given["pixel_values"].numpy()).max() < 1e-6
        answer, _ = torch_model.greedy(prompt, 64, **given)
        assert list(generate.stream(session, prompt, 64, media=media)) == answer
        wanted = torch_model.logits([*prompt, *answer], **given)[len(prompt) - 1 : -1]
        assert np.abs(generate.answer_logits(session, prompt, answer, media) - wanted).max() < 2e-4
        compared += len(answer)
    assert compared >= 64
    ids = list(range(3, 80))
    assert np.abs(generate.decode_logits(session, ids) - torch_model.logits(ids)).max() < 1e-4


@slow
def test_a_text_goes_on_after_an_answer_about_a_picture(
    vision_checkpoint_of: Callable[..., Path], package_of: Callable[..., Path]
) -> None:
    package, source = package_of("qwen2_5_vl"), vision_checkpoint_of("qwen2_5_vl")
    session, torch_model = sessions.open_package(package, 1), reference.load(source)
    seen, processor = _vision(source), _processor(package)
    drawn = pictures.draw(seen.patch * seen.merge, processor["min_pixels"], processor["max_pixels"])[:1]
    prompt, media = _asked(session, drawn, "What is this?")
    generator = generate.start(session, len(prompt) + 32)
    replay.feed(generator, prompt, media)
    for _ in range(5):
        generator.generate_next_token()
    ids = [int(token) for token in generator.get_sequence(0)]
    generator.rewind_to(len(ids) - 1)
    generator.append_tokens(np.array([ids[-1], 70, 71, 72], np.int32))
    found = np.asarray(generator.get_logits()).reshape(-1)[-session.vocabulary :]
    wanted = torch_model.logits([*ids, 70, 71, 72], **_given(drawn, seen, processor))[-1]
    assert np.abs(found - wanted).max() < 1e-4


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_int4_text_and_int8_tower_stay_close(
    kind: str, vision_checkpoint_of: Callable[..., Path], package_of: Callable[..., Path], tmp_path: Path
) -> None:
    import onnxruntime

    tied = kind == "qwen2_vl"
    package, source = package_of(kind, tied), vision_checkpoint_of(kind, tied)
    body, eight = ({"bits": bits, "block_size": 32, "symmetric": bits == 8} for bits in (4, 8))
    embedding = "shared" if tied else eight
    scheme = Scheme.model_validate(
        {
            "algorithm": "gptq",
            "body": body,
            "head": eight,
            "embedding": embedding,
            "vision": eight,
            "calibration_windows": 2,
        },
    )
    facts = media_quantizer.quantize(package, source, tmp_path, scheme, lambda *_: None)
    assert 8 < facts["vision"]["bits_per_weight"] < 11
    for path in package.iterdir():
        if path.suffix not in (".onnx", ".data"):
            shutil.copyfile(path, tmp_path / path.name)
    assert (tmp_path / "embedding.onnx.data").exists() == (not tied)
    session, torch_model = sessions.open_package(tmp_path, 1), reference.load(source)
    seen, processor = _vision(source), _processor(package)
    drawn = pictures.draw(seen.patch * seen.merge, processor["min_pixels"], processor["max_pixels"])[:1]
    prompt, media = _asked(session, drawn, "What is this?")
    given = _given(drawn, seen, processor)
    answer, _ = torch_model.greedy(prompt, 24, **given)
    wanted = torch_model.logits([*prompt, *answer], **given)[len(prompt) - 1 :]
    found = generate.answer_logits(session, prompt, [*answer, 0], media)
    # So few channels lose much in 4 bits.
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.95
    if not tied:  # where no token stands out
        assert (found.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.8
    gather = onnxruntime.InferenceSession(str(tmp_path / "embedding.onnx"), providers=["CPUExecutionProvider"])
    nothing = np.zeros((0, seen.feature), np.float32)
    (rows,) = gather.run(None, {"input_ids": np.arange(100)[None], "image_features": nothing})
    table = torch_model.model.get_input_embeddings().weight[:100].detach().numpy()
    assert np.abs(rows[0, :, : table.shape[1]] - table).max() < 0.02
    assert not rows[0, :, table.shape[1] :].any()


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_over_the_decoder_is_the_text_models(kind: str, vision_checkpoint_of: Callable[..., Path]) -> None:
    import torch

    checkpoint = vision_checkpoint_of(kind)
    torch_model, walked = reference.load(checkpoint), decoder.Decoder(checkpoint)
    ids = list(range(3, 40))
    with torch.inference_mode():
        hidden = walked.embed(torch.tensor([ids]))
        rotary = walked.rotary(hidden, len(ids))
        for layer in walked.layers():
            mask = torch.full((1, 1, len(ids), len(ids)), -1e9).triu(1)
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        found = torch_model.model.lm_head(walked.last_norm(hidden))[0].numpy()
    assert np.abs(found - torch_model.logits(ids)).max() < 1e-4


@slow
@pytest.mark.parametrize("checkpoint", [("qwen2_5_vl",), ("qwen3_vl", True)], ids=lambda case: case[0])
def test_a_reference_with_its_layers_on_the_disk_is_the_same(
    checkpoint: tuple[Any, ...], vision_checkpoint_of: Callable[..., Path]
) -> None:
    folder = vision_checkpoint_of(*checkpoint)
    whole, streamed = reference.load(folder), reference.load(folder, held_whole=0)
    layers = streamed.model.model.language_model.layers
    assert {str(parameter.device) for parameter in layers.parameters()} == {"meta"}
    prompt = list(range(5, 13))
    assert np.array_equal(streamed.logits(prompt), whole.logits(prompt))
    assert streamed.greedy(prompt, 8) == whole.greedy(prompt, 8)


@slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_lacks_a_weight_of_its_tower_is_refused(
    kind: str, vision_checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(vision_checkpoint_of(kind), tmp_path / "c")
    assert checkpoint_files.check_directory(tmp_path / "c")["model_type"] == kind
    path = tmp_path / "c/model.safetensors"
    found = load_file(path)
    (tower,) = multimodal.in_files(FAMILIES[kind], found).towers
    names = {f"{tower}.{name}" for name, _ in vision.expected(_vision(tmp_path / "c"))}
    assert names == {name for name in found if "visual" in name}
    gone = next(name for name in found if name.endswith("blocks.1.attn.qkv.bias"))
    save_file({name: value for name, value in found.items() if name != gone}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        checkpoint_files.check_directory(tmp_path / "c")
    assert f"{gone} is missing" in refused.value.why


@pytest.mark.parametrize("name", ["Qwen2-VL-7B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen3-VL-8B-Instruct"])
def test_the_sizes_of_towers_are_those_of_the_catalogue(name: str) -> None:
    model = models.MODELS[name]
    width = {"qwen2_5_vl": {"hidden_size": 1280}}.get(model.family, {})  # all else is transformers' default
    out = {"hidden_size" if model.family == "qwen2_vl" else "out_hidden_size": model.shape.hidden}
    assert multimodal.tower({"vision_config": {**width, **out}}, model.shape, "config.json") == model.tower


def _config(**changes: Any) -> dict[str, Any]:
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    tower |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": tower | changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": "two"}, "depth is 'two'"),
        ({"out_hidden_size": 32}, "do not fit a decoder of 64"),
        ({"deepstack_visual_indexes": [0, 1]}, "more than 2 layers"),
        ({"deepstack_visual_indexes": [5]}, "that 2 blocks do not have"),
        ({"deepstack_visual_indexes": 1}, "deepstack_visual_indexes is 1"),
        ({"num_position_embeddings": 63}, "63 positions are no square"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"num_heads": 3}, "3 heads do not share"),
    ],
)
def test_a_tower_that_is_not_written_is_refused(changes: dict[str, Any], said: str) -> None:
    config = _config()
    assert vision.read_vision(config, read_shape(config, "here"), "here").feature == 128
    config = _config(**changes)
    with pytest.raises(CheckpointError) as refused:
        vision.read_vision(config, read_shape(config, "here"), "here")
    assert said in refused.value.why


def _png(width: int, height: int) -> bytes:
    made = Drawn("", "", np.zeros((1, 1, 3), np.uint8)).png
    return made.replace(struct.pack(">II", 1, 1), struct.pack(">II", width, height), 1)


def _segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def _jpeg(width: int = 40, height: int = 30, frame: int = 0xC0) -> bytes:
    """The structure of a JPEG with no picture that could be decoded."""
    start = (
        b"\xff\xd8" + _segment(0xE0, b"JFIF\0") + _segment(frame, struct.pack(">BHHB", 8, height, width, 3) + b"\0" * 9)
    )
    return start + _segment(0xDA, b"\0" * 10) + b"\x12\xff\x00\x34\xff\xd0\x56" + b"\xff\xd9"


def test_pictures_are_looked_at_before_the_runtime_sees_them(tmp_path: Path) -> None:
    for data in (_png(300, 200), _jpeg(300, 200), _jpeg(300, 200, 0xC2)):
        found = images.check(data)
        assert (found.width, found.height) == (300, 200)
    cases = {
        "it is BMP": b"BM" + b"\0" * 60,
        "it is GIF": b"GIF89a" + b"\0" * 60,
        "it is WebP": b"RIFF\0\0\0\0WEBPVP8 ",
        "it is TIFF": b"II*\0" + b"\0" * 60,
        "it is something else": b"",
        "it is cut off": _png(3, 2)[:20],
        "JPEG without a picture": b"\xff\xd8\xff\xd9",
        "it has 0x20 pixels": _png(0, 20),
        "it has 100000x20 pixels": _png(100_000, 20),
        "it has 16000x16000 pixels": _png(16_000, 16_000),
        "more than 200 times": _png(2010, 10),
        "marker 0xd8": _jpeg()[:-2] + b"\xff\xd8\xff\xd9",
        "marker 0xc3": _jpeg(frame=0xC3),
    }
    for said, data in cases.items():
        with pytest.raises(UsageError) as refused:
            images.check(data, "it.png")
        assert said in refused.value.why
        assert refused.value.where == "it.png"
    whole = _jpeg()
    for length in range(2, len(whole)):
        with pytest.raises(UsageError):
            images.check(whole[:length])
    with pytest.raises(UsageError, match="cannot be read"):
        images.load(tmp_path)
    (tmp_path / "large.png").write_bytes(b"")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(UsageError) as refused:
        images.load(tmp_path / "large.png")
    assert "more than" in refused.value.why


@slow
def test_a_prompt_has_a_place_for_each_picture(package_of: Callable[..., Path]) -> None:
    session = sessions.open_package(package_of("qwen3_vl"), 1)
    drawn = pictures.draw(32, 3136, 1_003_520)
    token = session.image_token
    assert token is not None
    shown = [images.check(one.png) for one in drawn[:2]]
    with pytest.raises(UsageError, match="places for 1 images, and 2"):
        generate.attach(session, [5, token, 6], shown)
    with pytest.raises(UsageError, match="places for 1 images, and 0"):
        generate.attach(session, [5, token, 6], [])
    with pytest.raises(UsageError, match="1 tokens of images"):
        generate.check_prompt(session, [5, token, 6])
    with pytest.raises(UsageError, match="padding"):
        generate.check_prompt(session, [5, session.config["model"]["pad_token_id"]])
    broken = shown[0].data[:60] + b"\0\0\0\0" + shown[0].data[64:]
    with pytest.raises(UsageError, match="cannot be decoded"):
        generate.attach(session, [5, token, 6], [images.check(broken)])
    # What a user writes is no placeholder, whatever it looks like.
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    prompt, media = _asked(session, drawn[:1], text)
    assert media is not None
    assert prompt.count(token) == sum(media.tokens) == 40


@slow
def test_a_processor_that_is_not_known_is_not_trusted(package_of: Callable[..., Path], tmp_path: Path) -> None:
    package = shutil.copytree(package_of("qwen2_vl"), tmp_path / "p")
    package_config.check_config(package)
    package_graphs.check_external_data(package)
    path = package / "processor_config.json"
    good = json.loads(path.read_bytes())
    for change in (
        lambda config: config["processor"]["transforms"][0]["operation"].update(type="ReadFile"),
        lambda config: config["processor"]["transforms"][2]["operation"]["attrs"].update(path="/etc"),
        lambda config: config["processor"]["transforms"][2]["operation"]["attrs"].update(width="540"),
        lambda config: config.update(library="x.so"),
    ):
        config = json.loads(json.dumps(good))
        change(config)
        path.write_text(json.dumps(config))
        with pytest.raises(PackageError):
            package_config.check_config(package)
    path.write_text(json.dumps(good))
    config = json.loads((package / "genai_config.json").read_bytes())
    for part, key, value in (
        ("vision", "config_filename", "other.json"),
        ("vision", "filename", "../vision.onnx"),
        ("embedding", "custom_ops_library", "x.so"),
    ):
        changed = json.loads(json.dumps(config))
        changed["model"][part][key] = value
        (package / "genai_config.json").write_text(json.dumps(changed))
        with pytest.raises(PackageError):
            package_config.check_config(package)
    del config["model"]["vision_start_token_id"]
    (package / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError) as refused:
        package_config.check_config(package)
    assert "vision_start_token_id" in refused.value.why


@pytest.fixture(scope="module")
def artifacts(
    vision_checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    """All stages of one recipe; do not write into them."""
    folder, made = tmp_path_factory.mktemp("vision") / "tiny", {}
    folder.mkdir()
    eight = {"bits": 8, "block_size": 64, "symmetric": True}
    body = {"bits": 4, "block_size": 32, "symmetric": False}
    for step in steps_of(
        folder,
        vision_checkpoint_of("qwen2_5_vl"),
        "cpu",
        "min_error",
        export={"exporter": "native"},
        quantize={"body": body, "head": eight, "embedding": eight, "overrides": [], "vision": eight},
        validate={
            "windows": 4,
            "window_tokens": 32,
            "greedy_tokens": 12,
            "gates": {"mean_kl": 0.5, "p99_kl": 5.0, "top1": 0.8, "perplexity_ratio": 1.5},
        },
    ):
        made[step.stage] = run(step, made, folder / step.stage)
    return made


@slow
def test_a_package_is_validated_with_pictures(artifacts: dict[str, Artifact]) -> None:
    report = json.loads((artifacts["validate"].path / VALIDATION).read_bytes())
    assert report["passed"], report["gates"]
    assert {"vision.onnx", "vision.onnx.data", "embedding.onnx", "embedding.onnx.data"} <= set(
        report["candidate"]["files"]
    )
    gates = {gate["metric"]: gate for gate in report["gates"] if gate["path"] == "images"}
    assert set(gates) == {"pixel_error", "feature_cosine", "mean_kl", "top1", "greedy", "chat_template_mismatches"}
    assert gates["pixel_error"]["value"] < 1e-6
    assert 0.99 < gates["feature_cosine"]["value"] < 1
    assert gates["mean_kl"]["value"] > 0
    assert [answer["name"] for answer in report["images"]["answers"]][-1] == "image bars and rings"
    for key, value in (("pixel_error", 0.1), ("feature_cosine", 0.9), ("mean_kl", 0.6), ("top1", 0.7)):
        changed = {**report, "images": {**report["images"], key: value}}
        wanted = Gates.model_validate({"mean_kl": 0.5, "top1": 0.8, "perplexity_ratio": 1.5})
        failed = [gate["metric"] for gate in validate.gates(changed, wanted) if not gate["passed"]]
        assert failed == [key]


@slow
def test_a_package_with_pictures_is_verified_and_replayed(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    package = artifacts["package"].path
    verify.package(package)
    assert golden.replay(package)["top1"] == 1
    shown = [entry for entry in replay.read(package / GOLDEN) if "images" in entry]
    assert [len(entry["images"]) for entry in shown] == [1, 1, 1, 1, 2]
    code, text = script(package)
    assert (code, "PASS" in text) == (0, True), text
    assert "image-text-to-text" in (package / "README.md").read_text(encoding="utf-8")
    assert "image bars and rings" in (package / "report.html").read_text(encoding="utf-8")
    # Other pictures give other answers: what is replayed depends on them.
    copy = shutil.copytree(package, tmp_path / "p")
    entries = [{**entry, "images": shown[0]["images"]} if entry == shown[3] else entry for entry in shown]
    (copy / GOLDEN).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    opened = sessions.open_package(copy, 1)
    with pytest.raises(UsageError):
        generate.check_answer(
            opened, shown[0]["prompt"] + [opened.image_token], [5], replay.media_of(opened.model, shown[0])
        )
    (changed,) = [entry for entry in entries if entry["name"] == shown[3]["name"]]
    assert replay.replay(opened.model, [changed])["identical"] == 0


def _answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[int]:
    assert cli.main(["generate", *arguments, "--json", "--max-tokens", "8", "--trust"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line["token"] for line in lines if "token" in line]


@slow
def test_generate_answers_about_pictures(
    artifacts: dict[str, Artifact],
    checkpoint_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    package = artifacts["package"].path
    paths = []
    for one in pictures.draw(28, 3136, 1_003_520)[1:3]:
        paths.append(tmp_path / f"{one.name}.png")
        paths[-1].write_bytes(one.png)
    entry = next(entry for entry in replay.read(package / GOLDEN) if entry["name"] == "image bars and rings")
    question = "Which colours are in this image?"
    both = [part for path in paths for part in ("--image", str(path))]
    assert _answer(capsys, str(package), *both, "--prompt", question) == entry["tokens"][:8]
    without = _answer(capsys, str(package), "--prompt", question)
    assert without != entry["tokens"][: len(without)]
    (tmp_path / "a.png").write_bytes(b"BM" + b"\0" * 60)
    refused = {
        "it is BMP": [str(package), "--image", str(tmp_path / "a.png")],
        "cannot be read": [str(package), "--image", str(tmp_path / "none.png")],
        "--image does not go with --raw": [str(package), *both, "--raw"],
        "goes with neither --image nor --audio": [str(package), *both, "--lookup"],
    }
    for said, arguments in refused.items():
        assert cli.main(["generate", *arguments, "--prompt", "x", "--trust"]) == UsageError.exit_code
        assert said in capsys.readouterr().err


@slow
def test_a_text_package_takes_no_pictures(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    import onnx

    source = checkpoint_of("qwen2")
    onnx.save(exporter.export_native(source, tmp_path, "float32"), str(tmp_path / "model.onnx"))
    session = sessions.open_package(tmp_path, 1)
    picture = images.check(pictures.draw(28, 3136, 1_003_520)[0].png)
    with pytest.raises(UsageError, match="takes no images"):
        generate.attach(session, [1, 2], [picture])
    assert generate.attach(session, [1, 2], []) == ([1, 2], None)


@slow
def test_what_is_not_made_for_models_that_see_is_refused(
    vision_checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = vision_checkpoint_of("qwen2_5_vl")
    (tmp_path / "cuda").mkdir()
    with pytest.raises(RecipeError, match="takes no models that see"):
        steps_of(tmp_path / "cuda", checkpoint, "cuda", "none", export={"exporter": "genai"})
    (tmp_path / "cpu").mkdir()
    with pytest.raises(RecipeError, match="genai cannot export qwen2_5_vl: use native"):
        steps_of(tmp_path / "cpu", checkpoint, "cpu", "none", export={"exporter": "genai"})
    steps = steps_of(tmp_path / "cpu", checkpoint, "cpu", "none", export={"exporter": "native", "rotate": True})
    made = {"checkpoint": run(steps[0], {}, tmp_path / "checkpoint")}
    with pytest.raises(StageError, match="cannot be rotated"):
        run(steps[1], made, tmp_path / "rotated")


@slow
def test_a_chat_template_in_a_file_of_its_own_is_found(
    vision_checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(vision_checkpoint_of("qwen2_vl"), tmp_path / "source")
    template = (source / "chat_template.jinja").read_text(encoding="utf-8")
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "out").mkdir()
    checkpoint.prepare(source, None, tmp_path / "out", lambda *_: None)
    assert reference.load(tmp_path / "out").tokenizer.chat_template == template
    (tmp_path / "adapter").mkdir()
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        checkpoint_files.check_directory(source)


@slow
def test_a_recipe_is_built_through_the_command_line(
    vision_checkpoint_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny" / "cpu.yaml"
    recipe.parent.mkdir()
    eight = {"bits": 8, "block_size": 32, "symmetric": True}
    value = {
        "target": "cpu",
        "checkpoint": {
            "sources": [{"type": "local", "path": str(vision_checkpoint_of("qwen3_vl", True))}],
            "license": "Apache-2.0",
            "base_model": "tiny",
        },
        "export": {"exporter": "native"},
        "quantize": {"algorithm": "gptq", "body": eight, "embedding": "shared", "calibration_windows": 2},
        "validate": {
            "windows": 4,
            "window_tokens": 32,
            "greedy_tokens": 8,
            "gates": {"mean_kl": 0.1, "top1": 0.9, "perplexity_ratio": 1.1},
        },
    }
    recipe.write_text(json.dumps(value))  # JSON is YAML
    places = "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")
    assert cli.main(["build", str(recipe), *places]) == 0
    package = tmp_path / "out" / "tiny-cpu"
    assert cli.main(["verify", str(package), "--replay"]) == 0
    assert not (package / "embedding.onnx.data").exists()
    assert cli.main(["attribute", str(package), "--store", str(tmp_path / "store")]) == UsageError.exit_code
    assert "models of text alone" in capsys.readouterr().err
    assert (
        cli.main(["tune", str(recipe), "--store", str(tmp_path / "store"), "--max-kl", "0.1"]) == RecipeError.exit_code
    )
    assert "models of text alone" in capsys.readouterr().err
