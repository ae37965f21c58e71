"""Checkpoints that are broken, hostile or unfit are refused by name before anything of them is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import fetch as checkpoint, files as checkpoint_files
from pipeline.errors import CheckpointError
from pipeline.facts.family import read_shape
from pipeline.facts.multimodal import Layout

_CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}


def _quiet(_part: float, _what: str) -> None:
    pass


def _bytes(
    tensors: dict[str, tuple[int, ...]], edit: Callable[[dict[str, Any]], object] = lambda _header: None
) -> bytes:
    """A safetensors file of BF16 zeros, written by hand so that its header can be spoilt."""
    header: dict[str, Any] = {}
    end = 0
    for name, dims in tensors.items():
        size = 2
        for dim in dims:
            size *= dim
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [end, end + size]}
        end += size
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


_TENSORS = dict(checkpoint_files._expected(read_shape(_CONFIG, "here"), Layout()))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_whole(tmp_path / "größe 1" / "checkpoint")


def write_whole(folder: Path) -> Path:
    """A checkpoint that has what is checked, and nothing that could be run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(_bytes(_TENSORS))
    return folder


def _prepare(source: Path, adapter: Path | None = None) -> tuple[Path, dict[str, Any]]:
    out = source.parent / "out"
    out.mkdir()
    return out, checkpoint.prepare(source, adapter, out, _quiet)


def _config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**_CONFIG, **changes}))


def _weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    (folder / "model.safetensors").write_bytes(_bytes(_TENSORS, edit))


def _shards(folder: Path, weight_map: Any) -> None:
    names = list(_TENSORS)
    for number, part in enumerate((names[:3], names[3:]), 1):
        (folder / f"model-{number}.safetensors").write_bytes(_bytes({name: _TENSORS[name] for name in part}))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _sharded(folder: Path) -> None:
    names = list(_TENSORS)
    _shards(folder, {name: f"model-{1 if name in names[:3] else 2}.safetensors" for name in names})


def test_a_whole_checkpoint_is_copied_without_what_does_not_belong_to_it(whole: Path) -> None:
    (whole / "training_args.bin").write_bytes(b"pickle")
    (whole / "modeling.py").write_text("raise SystemExit")
    (whole / ".git").mkdir()
    (whole / "LICENSE").write_text("free")
    out, facts = _prepare(whole)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "LICENSE",
    }
    assert (facts["model_type"], facts["layers"], facts["parameters"]) == ("qwen2", 1, 1128)


def test_a_sharded_checkpoint_is_taken_whole(whole: Path) -> None:
    _sharded(whole)
    out, facts = _prepare(whole)
    assert {path.name for path in out.glob("*.safetensors")} == {"model-1.safetensors", "model-2.safetensors"}
    assert facts["parameters"] == 1128


def _pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _gguf_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


def _cut(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def _long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 63) + b"{}")


def _header(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def _link_out(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "generation_config.json").symlink_to("../secret.json")


def _link_loop(folder: Path) -> None:
    (folder / "vocab.json").symlink_to("vocab.json")
    (folder / "tokenizer.json").unlink()


def _shard_missing(folder: Path) -> None:
    _sharded(folder)
    (folder / "model-2.safetensors").unlink()


def _shard_twice(folder: Path) -> None:
    _sharded(folder)
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")


_NORM = "model.norm.weight"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle only": (_pickle_only, r"no safetensors[\s\S]*pytorch_model.bin: loading a pickle runs its code"),
    "GGUF in a directory": (_gguf_only, r"no safetensors[\s\S]*name the GGUF file itself: .*model-q4.gguf"),
    "auto_map": (lambda folder: _config(folder, auto_map={"AutoModel": "x.Y"}), "code of its own"),
    "auto_map of the tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {}}'),
        r"tokenizer asks for code of its own",
    ),
    "other family": (lambda folder: _config(folder, model_type="llama"), "'llama' is not supported"),
    "quantized already": (lambda folder: _config(folder, quantization_config={"bits": 4}), "quantized already"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config.json cannot be read"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), r"no JSON object"),
    "nested config": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        r"config.json cannot be read[\s\S]*recursion",
    ),
    "huge config": (
        lambda folder: (folder / "config.json").write_text(" " * 16_000_001),
        r"config.json cannot be read[\s\S]*16000001 bytes",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"no tokenizer.json[\s\S]*save_pretrained"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
    "link out": (_link_out, r"a link that leaves its directory[\s\S]*generation_config.json[\s\S]*cp -rL"),
    "link loop": (_link_loop, r"no tokenizer.json"),
    "empty weights": (lambda folder: _cut(folder, 0), r"truncated or damaged[\s\S]*the file has 0"),
    "cut in the header": (lambda folder: _cut(folder, 100), r"truncated or damaged[\s\S]*the file has 100"),
    "cut in the weights": (lambda folder: _cut(folder, -1), r"truncated or damaged[\s\S]*its tensors end at byte"),
    "header of 2^63 bytes": (_long_header, r"claims 9223372036854775808 bytes, the file has 10"),
    "header is no JSON": (lambda folder: _header(folder, b"{{{{"), "header is damaged"),
    "header is a list": (lambda folder: _header(folder, b"[[]]"), "header is damaged"),
    "nested header": (lambda folder: _header(folder, b"[" * 200_000), "header is damaged"),
    "name twice": (lambda folder: _header(folder, b'{"a": {}, "a": {}}'), r"a name appears twice"),
    "offsets beyond": (
        lambda folder: _weights(folder, lambda header: header["lm_head.weight"].update(data_offsets=[528, 10**12])),
        "header is damaged",
    ),
    "offsets overlap": (
        lambda folder: _weights(folder, lambda header: header[_NORM].update(data_offsets=[0, 16])),
        r"model.\S+ does not lie where the tensor before it ends",
    ),
    "negative offset": (
        lambda folder: _weights(folder, lambda header: header[_NORM].update(data_offsets=[-16, 0])),
        "no natural number",
    ),
    "shape of another size": (
        lambda folder: _weights(folder, lambda header: header[_NORM].update(shape=[9])),
        "not the size of its shape",
    ),
    "unknown dtype": (
        lambda folder: _weights(folder, lambda header: header[_NORM].update(dtype="X")),
        "unknown dtype",
    ),
    "integer weights": (
        lambda folder: _weights(folder, lambda header: header[_NORM].update(dtype="I16")),
        r"model.norm.weight is I16, no float",
    ),
    "missing tensor": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            _bytes({name: dims for name, dims in _TENSORS.items() if name != "lm_head.weight"})
        ),
        "lm_head.weight is missing",
    ),
    "other layers than stated": (
        lambda folder: _config(folder, num_hidden_layers=2),
        r"model.layers.1.self_attn.q_proj.weight is missing; [\s\S]* and 9 more",
    ),
    "other width than stated": (
        lambda folder: _config(folder, intermediate_size=17),
        r"mlp.gate_proj.weight has shape \[16, 8\], not \[17, 8\]",
    ),
    "missing shard": (
        _shard_missing,
        r"the shard model-2.safetensors is missing",
    ),
    "shard elsewhere": (
        lambda folder: _shards(folder, {"a": "../model-1.safetensors"}),
        r"names '../model-1.safetensors', which is no safetensors file beside it",
    ),
    "pickled shard": (lambda folder: _shards(folder, {"a": "model-1.bin"}), r"names 'model-1.bin'"),
    "empty index": (lambda folder: _shards(folder, {}), "no weight_map"),
    "tensor in two shards": (
        _shard_twice,
        "two shards have the tensor",
    ),
}


@pytest.mark.parametrize(("spoil", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_checkpoint_is_refused_by_name(whole: Path, spoil: Callable[[Path], object], text: str) -> None:
    spoil(whole)
    with pytest.raises(CheckpointError, match=text) as caught:
        _prepare(whole)
    assert str(whole) in caught.value.where
    assert list((whole.parent / "out").iterdir()) == []


def test_what_is_neither_gguf_nor_directory_is_refused(whole: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a GGUF file[\s\S]*correct the source"):
        _prepare(whole / "model.safetensors")


_LORA = {"peft_type": "LORA"}


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "no adapter_model.safetensors"),
        (
            {"adapter_model.bin": b"x", "adapter_config.json": b"{}"},
            r"adapter_model.bin: loading a pickle runs its code",
        ),
        ({"adapter_model.safetensors": _bytes({})}, r"adapter_config.json cannot be read"),
        ({"adapter_model.safetensors": _bytes({}), "adapter_config.json": b'{"peft_type": "IA3"}'}, "'IA3', not LORA"),
        ({"adapter_model.safetensors": b"cut", "adapter_config.json": json.dumps(_LORA).encode()}, "truncated"),
    ],
)
def test_a_bad_adapter_is_refused_before_the_checkpoint_is_touched(
    whole: Path, tmp_path: Path, files: dict[str, bytes], text: str
) -> None:
    (tmp_path / "adapter").mkdir()
    for name, content in files.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        _prepare(whole, tmp_path / "adapter")
    assert list((whole.parent / "out").iterdir()) == []


def _adapter(base: Path, folder: Path, zero: bool = False) -> Any:
    """Save a random LoRA adapter of ``base``, and return peft's own model of the two."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name and not zero:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tied"), [("qwen2", False), ("qwen3", True)])
def test_a_merged_adapter_gives_the_logits_of_peft(tmp_path: Path, model_type: str, tied: bool) -> None:
    import torch
    from tiny import tiny_checkpoint
    from transformers import AutoModelForCausalLM

    base = tiny_checkpoint(tmp_path / "base", model_type, tied)
    wrapped = _adapter(base, tmp_path / "adapter")
    out, facts = _prepare(base, tmp_path / "adapter")
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected = wrapped(ids).logits
        got = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1
    assert facts["model_type"] == model_type
    assert not (out / "adapter_config.json").exists()
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    before, after = (json.loads((path / "generation_config.json").read_bytes()) for path in (base, out))
    assert after["eos_token_id"] == before["eos_token_id"]


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    from tiny import tiny_checkpoint

    base = tiny_checkpoint(tmp_path / "base", "qwen2")
    _adapter(tiny_checkpoint(tmp_path / "other", "qwen3"), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"does not fit[\s\S]*trained on"):
        _prepare(base, tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # peft goes on after it
@pytest.mark.parametrize("kind", ["of a deeper base", "of a shallower base", "without effect"])
def test_an_adapter_that_would_apply_in_part_or_not_at_all_is_refused(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file
    from tiny import tiny_checkpoint

    base = tiny_checkpoint(tmp_path / "base", "qwen2")
    _adapter(base, tmp_path / "adapter", zero=kind == "without effect")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    if kind == "of a deeper base":
        tensors |= {name.replace("layers.1", "layers.2"): value.clone() for name, value in tensors.items()}
    if kind == "of a shallower base":
        tensors = {name: value for name, value in tensors.items() if "layers.1" not in name}
    save_file(tensors, path)
    expected = "changes nothing" if kind == "without effect" else "does not fit the checkpoint"
    with pytest.raises(CheckpointError, match=expected):
        _prepare(base, tmp_path / "adapter")
