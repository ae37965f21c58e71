"""GGUF files: a good one becomes the checkpoint it was made from; a bad one ends with an error, soon."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import fetch as checkpoint, gguf
from pipeline.errors import CheckpointError

pytestmark = pytest.mark.slow

_CONTROL, _NORMAL, _UNUSED = 3, 1, 5
_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _quiet(_part: float, _what: str) -> None:
    pass


def _gguf_name(name: str) -> str:
    for ours, theirs in {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.items():
        name = name.replace(ours, theirs)
    for ours, theirs in _TENSORS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace("model.layers.", "blk.")


def _write(base: Path, path: Path, quantized: bool = False, without: str = "", **changes: Any) -> Path:
    """Write the checkpoint in ``base`` as GGUF, as llama.cpp's converter lays it out.

    Args:
        quantized: matrices as Q8_0.
        without: a tensor to leave out.
        changes: metadata by its last name; ``None`` leaves it out.
    """
    import gguf as library
    from safetensors.numpy import load_file

    config = json.loads((base / "config.json").read_bytes())
    tokenizer = json.loads((base / "tokenizer.json").read_bytes())
    ids = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    tokens = [f"[PAD{number}]" for number in range(config["vocab_size"])]
    kinds = [_UNUSED] * len(tokens)
    for token, number in ids.items():
        tokens[number] = token
        kinds[number] = _NORMAL if token in tokenizer["model"]["vocab"] and not token.startswith("<|") else _CONTROL
    architecture = config["model_type"]
    writer = library.GGUFWriter(path, architecture)
    values: dict[str, Callable[[], None]] = {
        "context_length": lambda: writer.add_context_length(config["max_position_embeddings"]),
        "embedding_length": lambda: writer.add_embedding_length(config["hidden_size"]),
        "block_count": lambda: writer.add_block_count(config["num_hidden_layers"]),
        "feed_forward_length": lambda: writer.add_feed_forward_length(config["intermediate_size"]),
        "head_count": lambda: writer.add_head_count(config["num_attention_heads"]),
        "head_count_kv": lambda: writer.add_head_count_kv(config["num_key_value_heads"]),
        "key_length": lambda: writer.add_key_length(
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        ),
        "rope": lambda: writer.add_rope_freq_base(config["rope_theta"]),
        "scaling": lambda: _scale(writer, changes.get("scaling", "")),
        "rms": lambda: writer.add_layer_norm_rms_eps(config["rms_norm_eps"]),
        "model": lambda: writer.add_tokenizer_model(changes.get("model", "gpt2")),
        "tokens": lambda: writer.add_token_list(changes.get("tokens", tokens)),
        "merges": lambda: writer.add_token_merges(
            [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
        ),
        "token_type": lambda: writer.add_token_types(changes.get("token_type", kinds)),
        "eos": lambda: writer.add_eos_token_id(changes.get("eos", ids["<|im_end|>"])),
        "pad": lambda: writer.add_pad_token_id(ids["<|endoftext|>"]),
        "template": lambda: writer.add_chat_template((base / "chat_template.jinja").read_text()),
    }
    for name, add in values.items():
        if name not in changes or changes[name] is not None:
            add()
    for name, value in load_file(base / "model.safetensors").items():
        if quantized and value.ndim == 2:
            q8 = library.GGMLQuantizationType.Q8_0
            writer.add_tensor(_gguf_name(name), library.quants.quantize(value, q8), raw_dtype=q8)
        elif name != without:
            writer.add_tensor(_gguf_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _scale(writer: Any, kind: str) -> None:
    import gguf as library

    if kind:
        writer.add_rope_scaling_type(library.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)


def _tiny(folder: Path, model_type: str = "qwen2", tied: bool = False) -> Path:
    from tiny import tiny_checkpoint

    return tiny_checkpoint(folder, model_type, tied)


def _prepare(source: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    return checkpoint.prepare(source, None, out, _quiet)


@pytest.mark.parametrize(
    ("model_type", "tied", "quantized"), [("qwen2", False, False), ("qwen2", True, True), ("qwen3", False, False)]
)
def test_a_gguf_file_becomes_the_checkpoint_it_was_made_from(
    tmp_path: Path, model_type: str, tied: bool, quantized: bool
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, out = _tiny(tmp_path / "base", model_type, tied), tmp_path / "out größe"
    source = _write(base, tmp_path / "the model.gguf", quantized)
    (tmp_path / "adapter_config.json").write_text("{}")  # what lies beside the file is none of its business
    facts = _prepare(source, out)
    assert (facts["source"], facts["model_type"], facts["tied"]) == ("gguf", model_type, tied)
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (base, out))
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        expected, got = before(ids).logits, after(ids).logits
    if quantized:  # Q8_0 keeps a 254th of a block's largest weight
        assert (got - expected).abs().max() < 0.02 * expected.abs().max()
        assert (got.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.float32}

    old, new = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(out)
    for text in (
        "def add(first, second):\n    return 12345",
        "größe 模型\u00a0 \r\n\n x",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert new(text)["input_ids"] == old(text)["input_ids"]
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert new.convert_tokens_to_ids(token) == old.convert_tokens_to_ids(token)
    assert new.decode(new("<|im_start|>x<|im_end|>")["input_ids"], skip_special_tokens=True) == "x"
    assert new.chat_template == old.chat_template
    assert (new.eos_token, new.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ends = [new.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert after.generation_config.eos_token_id == ends
    assert {path.suffix for path in out.iterdir()} <= {".json", ".jinja", ".safetensors", ".txt"}


def test_scaled_frequencies_are_those_of_the_gguf_file(tmp_path: Path) -> None:
    base = _tiny(tmp_path / "base")
    facts = _prepare(_write(base, tmp_path / "model.gguf", scaling="yarn"), tmp_path / "out")
    assert facts["context"] == 4 * 128
    scaling = json.loads((tmp_path / "out" / "config.json").read_bytes())["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"], scaling["original_max_position_embeddings"]) == ("yarn", 4.0, 128)
    with pytest.raises(CheckpointError, match="rotary embeddings of type linear are not supported"):
        _prepare(_write(base, tmp_path / "linear.gguf", scaling="linear"), tmp_path / "other")


@pytest.mark.parametrize(
    ("without", "changes", "text"),
    [
        ("model.layers.1.mlp.up_proj.weight", {}, "lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
        ("", {"tokens": None}, "no tokenizer.ggml.tokens"),
        ("", {"merges": None}, "no tokenizer.ggml.merges"),
        ("", {"token_type": [1, 1]}, "512 tokens, but 2 token types"),
        ("", {"eos": 512}, "tokenizer.ggml.eos_token_id is 512, but there are 512 tokens"),
        ("", {"eos": None}, "no tokenizer.ggml.eos_token_id"),
        ("", {"model": "llama"}, "not of Qwen's kind"),
        ("", {"context_length": None}, "no qwen2.context_length"),
    ],
)
def test_what_a_gguf_file_lacks_is_named(tmp_path: Path, without: str, changes: dict[str, Any], text: str) -> None:
    source = _write(_tiny(tmp_path / "base"), tmp_path / "model.gguf", without=without, **changes)
    with pytest.raises(CheckpointError, match=text) as caught:
        _prepare(source, tmp_path / "out")
    assert caught.value.where == str(source)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _head(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs)


def _pair(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _tensor(dims: tuple[int, ...], kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    rank = struct.pack("<I", len(dims) if count is None else count)
    return _text("token_embd.weight") + rank + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


_QWEN2 = _pair("general.architecture", 8, _text("qwen2"))
_UINT8, _UINT32, _STRING, _ARRAY = 0, 4, 8, 9
HOSTILE = {
    "other magic": (b"PK\3\4" + bytes(40), "not a GGUF file"),
    "magic only": (b"GGUF", "claims 4 bytes more"),
    "other version": (_head(version=9), "GGUF version 9"),
    "other byte order": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "GGUF version"),
    "other architecture": (_head(0, 1) + _pair("general.architecture", 8, _text("llama")), "'llama' is not supported"),
    "2^64 - 1 pairs": (_head(0, 2**64 - 1), "claims 18446744073709551615 metadata"),
    "2^63 tensors": (_head(2**63, 0), "claims 9223372036854775808 tensors"),
    "name of 2^63 bytes": (_head(0, 1) + struct.pack("<Q", 2**63) + bytes(16), "claims 9223372036854775808 bytes"),
    "string of 2^63 bytes": (_head(0, 1) + _pair("a", _STRING, struct.pack("<Q", 2**63)), "claims 92233720368547758"),
    # 43 bytes that keep gguf's own reader busy for ever: an array without items in the file.
    "array of 2^63": (
        _head(0, 1) + _pair("abc", _ARRAY, struct.pack("<IQ", _UINT8, 2**63))[:-4] + b"\0\0\0\x7f",
        "claims",
    ),
    "strings 2^63": (_head(0, 1) + _pair("a", _ARRAY, struct.pack("<IQ", _STRING, 2**63)), "claims"),
    "arrays of arrays": (_head(0, 1) + _pair("a", _ARRAY, struct.pack("<IQ", _ARRAY, 1)), "array of unknown type 9"),
    "unknown type": (_head(0, 1) + _pair("a", 99, b""), "value of unknown type 99"),
    "alignment 0": (
        _head(0, 2) + _QWEN2 + _pair("general.alignment", _UINT32, bytes(4)),
        "alignment of 0 bytes",
    ),
    "tensor of rank 2^32 - 1": (_head(1, 1) + _QWEN2 + _tensor((1,) * 9, count=2**32 - 1), "unknown type or shape"),
    "tensor of 2^64 weights": (_head(1, 1) + _QWEN2 + _tensor((2**32, 2**32)), "it is truncated"),
    "tensor beyond the end": (_head(1, 1) + _QWEN2 + _tensor((32,), offset=2**62), "it is truncated"),
    "tensor of unknown type": (_head(1, 1) + _QWEN2 + _tensor((32,), kind=999), "unknown type or shape"),
}


@pytest.mark.parametrize(("content", "text"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as caught:
        _prepare(tmp_path / "model.gguf", tmp_path / "out")
    assert caught.value.where == str(tmp_path / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("left", [0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, left: float) -> None:
    source = _write(_tiny(tmp_path / "base"), tmp_path / "model.gguf")
    content = source.read_bytes()
    source.write_bytes(content[: int(left * len(content))])
    with pytest.raises(CheckpointError, match=r"claims|truncated"):
        _prepare(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (gguf.Limits(1, 8_000_000_000), "more than 1 s of processor time"),
        (gguf.Limits(60, 100_000_000), ""),  # each library words its want of memory in its own way
    ],
)
def test_a_parser_that_wants_more_than_its_limits_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: gguf.Limits, text: str
) -> None:
    source = _write(_tiny(tmp_path / "base"), tmp_path / "model.gguf")  # good, so that only the limits can refuse it
    monkeypatch.setattr(gguf, "METADATA", limits)
    with pytest.raises(CheckpointError, match=rf"tokenizer cannot be read[\s\S]*{text}"):
        _prepare(source, tmp_path / "out")
