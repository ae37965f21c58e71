"""Qwen 1.0 checkpoints become Qwen2 ones that compute the same, and nothing that comes with them is run."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import QWEN1_CONFIG, tiktoken_file, tiny_qwen1

from pipeline.checkpoint import fetch as checkpoint, files as checkpoint_files, qwen1_tokenizer
from pipeline.errors import CheckpointError
from pipeline.facts.family import Shape, read_shape

BYTES = [bytes([byte]) for byte in range(256)]


def _quiet(_part: float, _what: str) -> None:
    pass


def test_the_configuration_is_read_as_that_of_qwen2() -> None:
    config = QWEN1_CONFIG | {"vocab_size": 1000}
    assert read_shape(config, "config.json") == Shape(
        model_type="qwen2",
        layers=2,
        hidden=64,
        intermediate=128,  # intermediate_size is that of gate and up together
        heads=4,
        kv_heads=4,
        head_dim=16,
        vocabulary=1000,
        context=512,  # seq_length: what lies beyond is scaled in ways that Qwen2 does not know
        tied=False,
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"no_bias": False}, "no_bias is False"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"kv_channels": 32}, "kv_channels is 32, not hidden_size / num_attention_heads"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6'"),
        ({"rotary_emb_base": 10**400}, "rotary_emb_base is 1000"),
        ({"visual": {"heads": 16}}, r"an encoder beside its decoder \(visual\)"),
        ({"audio": {}}, r"an encoder beside its decoder \(audio\)"),
        ({"seq_length": None}, "seq_length is None"),
        ({"seq_length": True}, "seq_length is True"),
        ({"intermediate_size": "256"}, "intermediate_size is '256'"),
        ({"architectures": ["QWenModel"]}, r"code of its own"),
        ({"model_type": "qwen7b"}, r"code of its own"),
    ],
)
def test_a_configuration_that_does_not_convert_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        read_shape(QWEN1_CONFIG | {"vocab_size": 1000} | change, "config.json")


def _lines(*lines: bytes) -> bytes:
    return tiktoken_file(BYTES) + b"".join(line + b"\n" for line in lines)


_HOSTILE_FILES: dict[str, tuple[bytes, str]] = {
    "too large": (b"\n" * 16_000_001, "16000001 bytes; more than 16000000 are not read"),
    "empty": (b"", "no token for 256 bytes"),
    "no rank": (_lines(b"YWI="), "line 257 is no token in base64 and its rank"),
    "no base64": (_lines(b"!!!! 256"), "line 257 is no token in base64"),
    "cut base64": (_lines(b"YWI 256"), "line 257 is no base64"),
    "negative rank": (_lines(b"YWI= -1"), "line 257 is no token"),
    "rank of many digits": (_lines(b"YWI= " + b"9" * 5000), "line 257 is no token"),
    "rank twice": (_lines(b"YWI= 255"), "line 257 has the rank 255 a second time"),
    "gap": (_lines(b"YWI= 257"), "257 tokens, but none of rank 256"),
    "no first rank": (tiktoken_file(BYTES).split(b"\n", 1)[1] + b"AA== 256\n", "none of rank 0"),
    "token twice": (_lines(b"YQ== 256"), "a token appears twice"),
    "a byte is missing": (tiktoken_file(BYTES[:-1]), "no token for 1 bytes, such as"),
    "tokens too long": (_lines(base64.b64encode(b"a" * 20_000) + b" 256"), "too long: up to line 257"),
    "more tokens than ids": (_lines(b"YWI= 256"), "257 tokens and 208 control tokens are more than the model's 464"),
}


@pytest.mark.parametrize(("data", "text"), _HOSTILE_FILES.values(), ids=_HOSTILE_FILES)
def test_a_bad_tiktoken_file_is_refused_by_name(tmp_path: Path, data: bytes, text: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(data)
    vocabulary = 464 if "more than the model" in text else 1000
    with pytest.raises(CheckpointError, match=re.escape(text)) as caught:
        qwen1_tokenizer.read(path, vocabulary)
    assert caught.value.where == str(path)
    assert caught.value.what == "qwen.tiktoken cannot be read"


def test_merges_are_recovered_from_ranks() -> None:
    tokens = [*BYTES, b"in", b"th", b"the", b"he", b"thin", b"thing"]
    assert qwen1_tokenizer.merges(tokens) == [
        (b"i", b"n"),
        (b"t", b"h"),
        (b"th", b"e"),  # not (t, he), though both are tokens: th has the lower rank
        (b"h", b"e"),
        (b"th", b"in"),
        (b"thin", b"g"),
    ]
    with pytest.raises(ValueError, match=r"b'xyz' of rank 256 is not merged"):
        qwen1_tokenizer.merges([*BYTES, b"xyz"])


def test_a_token_that_reads_like_a_control_token_is_refused(tmp_path: Path) -> None:
    text = b"<|im_end|>"
    grown = [text[: index + 1] for index in range(1, len(text))]
    (tmp_path / "qwen.tiktoken").write_bytes(tiktoken_file([*BYTES, *grown]))
    with pytest.raises(CheckpointError, match=r"control token <\|im_end\|> among its tokens"):
        qwen1_tokenizer.write(tmp_path / "qwen.tiktoken", tmp_path, 1000, 512, "<|im_end|>")


def test_the_code_of_a_checkpoint_is_no_part_of_it_and_its_tokenizer_is() -> None:
    assert checkpoint_files.is_part("qwen.tiktoken")
    assert not any(checkpoint_files.is_part(f"{name}_qwen.py") for name in ("modeling", "configuration"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A checkpoint of Qwen 1.0, what it was converted to, and the facts."""
    source = tiny_qwen1(tmp_path_factory.mktemp("qwen1") / "source")
    out = source.parent / "out"
    out.mkdir()
    return source, out, checkpoint.prepare(source, None, out, _quiet)


def _float(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {
        name: values.float().numpy()
        for path in folder.glob("*.safetensors")
        for name, values in load_file(path).items()
    }


class Reference:
    """Qwen 1.0 in numpy, written from the paper (Bai et al., 2023) and the published class; no cache, one sequence."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_bytes())
        self.weights = _float(folder)

    def logits(self, ids: list[int]) -> np.ndarray:
        w, c = self.weights, self.config
        assert len(ids) <= c["seq_length"]
        x = w["transformer.wte.weight"][ids]
        for layer in range(c["num_hidden_layers"]):
            part = {name.split(".", 3)[3]: v for name, v in w.items() if name.startswith(f"transformer.h.{layer}.")}
            x = x + self.attention(self.norm(x, part["ln_1.weight"]), part)
            y = self.norm(x, part["ln_2.weight"])
            first, second = y @ part["mlp.w1.weight"].T, y @ part["mlp.w2.weight"].T
            x = x + (first * second / (1 + np.exp(-second))) @ part["mlp.c_proj.weight"].T
        return self.norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + np.float32(self.config["layer_norm_epsilon"])) * weight

    def attention(self, x: np.ndarray, part: dict[str, np.ndarray]) -> np.ndarray:
        size, count = self.config["kv_channels"], self.config["num_attention_heads"]
        fused = x @ part["attn.c_attn.weight"].T + part["attn.c_attn.bias"]
        query, key, value = (half.reshape(len(x), count, size).swapaxes(0, 1) for half in np.split(fused, 3, axis=1))
        frequencies = 1.0 / self.config["rotary_emb_base"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
        angles = np.arange(len(x), dtype=np.float32)[:, None] * np.tile(frequencies, 2).astype(np.float32)
        query, key = (
            h * np.cos(angles) + np.concatenate([-h[..., size // 2 :], h[..., : size // 2]], -1) * np.sin(angles)
            for h in (query, key)
        )
        scores = query @ key.swapaxes(1, 2) / np.float32(np.sqrt(size))
        scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        return mixed.swapaxes(0, 1).reshape(len(x), -1) @ part["attn.c_proj.weight"].T


@pytest.mark.slow
def test_a_converted_checkpoint_computes_the_same(converted: tuple[Path, Path, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source, out, facts = converted
    wanted = Reference(source)
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert not any(report.values()), report
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 400, 100)]
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0].numpy()
    expected = wanted.logits(ids)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()

    answer = model.generate(
        torch.tensor([ids[:9]]),
        max_new_tokens=70,
        do_sample=False,
        eos_token_id=-1,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
    )
    greedy = ids[:9]
    for _ in range(70):
        greedy.append(int(wanted.logits(greedy)[-1].argmax()))
    assert answer[0].tolist() == greedy
    assert len(set(greedy[9:])) > 30  # or it would say little
    assert (facts["model_type"], facts["context"], facts["source"]) == ("qwen2", 512, "Qwen 1.0")


@pytest.mark.slow
def test_shards_and_bytes_are_kept(converted: tuple[Path, Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    source, out, _ = converted
    names = [path.name for path in sorted(source.glob("*.safetensors"))]
    assert names == [path.name for path in sorted(out.glob("*.safetensors"))] != []
    assert not list(out.glob("*.py"))
    index = json.loads((out / "model.safetensors.index.json").read_bytes())["weight_map"]
    for name in names:
        before, after = load_file(source / name), load_file(out / name)
        assert {tensor for tensor, file in index.items() if file == name} == set(after)
        assert {value.dtype for value in after.values()} == {value.dtype for value in before.values()}
    assert not any("inv_freq" in tensor for tensor in index)
    fused = load_file(source / names[0])["transformer.h.0.attn.c_attn.weight"]
    first = load_file(out / names[0])
    parts = [first[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert all(part.equal(fused[64 * at : 64 * (at + 1)]) for at, part in enumerate(parts))


@pytest.mark.slow
def test_the_tokenizer_gives_the_ids_of_its_ranks(
    converted: tuple[Path, Path, dict[str, Any]], checkpoint_of: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    from pipeline.facts import texts

    _, out, _ = converted
    found = AutoTokenizer.from_pretrained(out)
    origin = AutoTokenizer.from_pretrained(checkpoint_of("qwen2"))  # the BPE that the ranks were taken from
    base = len(origin.backend_tokenizer.get_vocab(with_added_tokens=False))
    probes = {name: text for name, text in texts.TOKENIZER_PROBES.items() if "<|" not in text}
    for text in [*probes.values(), *texts.EVALUATION.read().values()]:
        assert found(text)["input_ids"] == origin(text)["input_ids"]
        assert found.decode(found(text)["input_ids"]) == origin.decode(origin(text)["input_ids"])
    assert found.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [base, base + 1, base + 2]
    assert found.convert_tokens_to_ids(["<|extra_0|>", "<|extra_204|>"]) == [base + 3, base + 207]
    assert found("<|im_end|><|extra_7|>")["input_ids"] == [base + 2, base + 10]
    assert (found.eos_token, found.pad_token, found.model_max_length) == ("<|im_end|>", "<|endoftext|>", 512)
    generation = json.loads((out / "generation_config.json").read_bytes())
    assert generation == {
        "eos_token_id": [base + 2, base],
        "pad_token_id": base,
        "do_sample": True,
        "repetition_penalty": 1.1,
        "top_p": 0.8,
        "top_k": 0,
    }


def _make_context(query: str, history: list[tuple[str, str]], system: str) -> str:
    """What the published make_context renders."""
    turns = [("system", system)]
    for asked, answered in history:
        turns += [("user", asked), ("assistant", answered)]
    turns += [("user", query)]
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns) + "\n<|im_start|>assistant\n"


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "You answer in rhymes.", ""])
def test_the_chat_template_is_make_context(converted: tuple[Path, Path, dict[str, Any]], system: str | None) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    messages += [{"role": "user", "content": " Who are\nyou? "}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    default = "You are a helpful assistant." if system is None else system
    assert text == _make_context(" Who are\nyou? ", [("Hello", "Hi.")], default)


def _other_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = next(folder.glob("*-00001-*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"transformer.h.0.mlp.w1.bias": tensors["transformer.ln_f.weight"].clone()}, path)


_BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (lambda folder: (folder / "qwen.tiktoken").unlink(), r"qwen.tiktoken cannot be read"),
    "missing shard": (
        lambda folder: next(folder.glob("*-00002-*.safetensors")).unlink(),
        r"the shard model-00002-of-00002.safetensors is missing",
    ),
    "damaged shard": (
        lambda folder: next(folder.glob("*-00002-*.safetensors")).write_bytes(b"\0" * 64),
        r"truncated or damaged",
    ),
    "another width": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_bytes()) | {"intermediate_size": 200})
        ),
        r"mlp.w1.weight has shape \[128, 64\], not \[100, 64\]",
    ),
    "a bias more": (_other_tensor, r"1 tensors that Qwen2 has no place for, such as transformer.h.0.mlp.w1.bias"),
    "quantized": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_bytes()) | {"quantization_config": {"bits": 4}})
        ),
        r"quantized already",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("spoil", "text"), _BAD.values(), ids=_BAD)
def test_a_bad_checkpoint_is_refused_before_anything_is_written(
    converted: tuple[Path, Path, dict[str, Any]], tmp_path: Path, spoil: Callable[[Path], object], text: str
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(converted[0], folder)
    spoil(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=text):
        checkpoint.prepare(folder, None, tmp_path / "out", _quiet)
    assert list((tmp_path / "out").iterdir()) == []
