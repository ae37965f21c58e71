"""What is true of Qwen2-Audio's audio tower: its sizes and weights, and the sound that it expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.runtime import mel

MODEL_TYPE = "qwen2_audio"
PREFIX = "language_model."  # of the decoder's tensors in a checkpoint
PREPROCESSOR = "preprocessor_config.json"
TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
# Our field → its key in `audio_config`, and what transformers takes where that is silent.
_SIZES = {
    "layers": ("encoder_layers", 32),
    "width": ("d_model", 1280),
    "heads": ("encoder_attention_heads", 20),
    "intermediate": ("encoder_ffn_dim", 5120),
    "bins": ("num_mel_bins", 128),
    "positions": ("max_source_positions", 1500),
}
_TOKEN = 151646
_EXTRACTOR = {"sampling_rate": mel.SAMPLE_RATE, "n_fft": mel.WINDOW, "hop_length": mel.HOP, "chunk_length": mel.SECONDS}


@dataclass(frozen=True)
class Tower:
    """The sizes of the tower; ``token`` is the id that stands for a token of sound in a prompt."""

    layers: int
    width: int
    heads: int
    intermediate: int
    bins: int
    positions: int
    token: int

    def expected(self, hidden: int) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight that transformers' class needs beside the decoder's.

        Args:
            hidden: size of the decoder.
        """
        tower, width = "audio_tower", self.width
        yield f"{tower}.conv1.weight", (width, self.bins, 3)
        yield f"{tower}.conv2.weight", (width, width, 3)
        yield f"{tower}.conv1.bias", (width,)
        yield f"{tower}.conv2.bias", (width,)
        yield f"{tower}.embed_positions.weight", (self.positions, width)
        for layer in range(self.layers):
            path = f"{tower}.layers.{layer}"
            for name in "qkv":
                yield f"{path}.self_attn.{name}_proj.weight", (width, width)
            yield f"{path}.self_attn.out_proj.weight", (width, width)
            for name in ("q_proj", "v_proj", "out_proj"):  # keys have no bias
                yield f"{path}.self_attn.{name}.bias", (width,)
            yield f"{path}.fc1.weight", (self.intermediate, width)
            yield f"{path}.fc1.bias", (self.intermediate,)
            yield f"{path}.fc2.weight", (width, self.intermediate)
            yield f"{path}.fc2.bias", (width,)
            for name in ("self_attn_layer_norm", "final_layer_norm"):
                yield f"{path}.{name}.weight", (width,)
                yield f"{path}.{name}.bias", (width,)
        yield f"{tower}.layer_norm.weight", (width,)
        yield f"{tower}.layer_norm.bias", (width,)
        yield "multi_modal_projector.linear.weight", (hidden, width)
        yield "multi_modal_projector.linear.bias", (hidden,)


def read(config: Mapping[str, Any], where: str) -> Tower:
    """The tower that a ``config.json`` describes.

    Raises:
        CheckpointError: a size is no positive integer, or the tower is of another kind.
    """
    given = config.get("audio_config", {})
    if not isinstance(given, Mapping):
        raise CheckpointError("config.json has an audio_config that is no object", where=where)
    sizes = {name: given.get(key, usual) for name, (key, usual) in _SIZES.items()}
    token = config.get("audio_token_index", config.get("audio_token_id", _TOKEN))
    bad = [f"{_SIZES[name][0]} is {value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
    bad += [f"audio_token_index is {token!r}"] if type(token) is not int or token < 0 else []
    if bad:
        raise CheckpointError(
            f"config.json has no positive integer for a size of the tower: {', '.join(bad)}", where=where
        )
    found = Tower(**sizes, token=token)
    if found.positions * 2 != mel.FRAMES:
        bad.append(f"max_source_positions is {found.positions}, not {mel.FRAMES // 2}")
    if found.width % found.heads:
        bad.append(f"{found.heads} heads do not divide d_model {found.width}")
    if (kind := given.get("activation_function", "gelu")) != "gelu":
        bad.append(f"activation_function is {kind!r}, not gelu")
    if bad:
        raise CheckpointError("the audio tower is of a kind that is not supported", where=where, why="; ".join(bad))
    return found


def check_extractor(settings: Mapping[str, Any], tower: Tower, where: str) -> None:
    """Refuse a ``preprocessor_config.json`` that wants sound prepared in another way than `pipeline.runtime.mel` does.

    Raises:
        CheckpointError: naming every setting that differs.
    """
    wanted = {**_EXTRACTOR, "feature_size": tower.bins}
    usual = {**_EXTRACTOR, "feature_size": 80}  # of transformers' class
    wrong = [
        f"{key} is {settings.get(key, usual[key])!r}, not {value}"
        for key, value in wanted.items()
        if settings.get(key, usual[key]) != value
    ]
    wrong += [f"{key} is set" for key in ("do_normalize", "dither") if settings.get(key)]
    if wrong:
        raise CheckpointError(
            "the checkpoint's sound is prepared in a way that is not supported", where=where, why="; ".join(wrong)
        )
