"""The Qwen models that are published: one literal table.

Sizes are those of each repository's ``config.json``; the number of parameters is what its publisher states (or what its
files hold), so that a test can hold the one against the other. What could not be held against a published
configuration is named in `Model.unconfirmed`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.facts import sizes
from pipeline.facts.family import Experts, Shape
from pipeline.facts.sizes import Tower

OWNER = "Qwen"

APACHE = "Apache-2.0"
# Licences of the publisher: the first two for any use (with a limit on the number of users), the others for research.
QWEN, TONGYI = "qwen", "tongyi-qianwen"
QWEN_RESEARCH, TONGYI_RESEARCH = "qwen-research", "tongyi-qianwen-research"
COMMERCIAL = (APACHE, QWEN, TONGYI)

# What a model is made for; a model that does more beside it has only what it is the right one for.
STRENGTHS = ("chat", "code", "math", "thinking", "vision", "audio", "embedding", "rerank")

_FIRST = ("zh", "en")
# Qwen2 names 29 languages, Qwen2.5 "over 29": these are the ones of its model card.
_MANY = ("zh", "en", "fr", "es", "pt", "de", "it", "ru", "ja", "ko", "vi", "th", "ar")

_GENERATIONS = {"Qwen-": 0, "Qwen1.5-": 1, "Qwen2-": 2, "Qwen2.5-": 3, "QwQ-": 3, "Qwen3-": 4}


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        name: of its repository.
        released: year and month.
        shape: of its decoder; the model type is the family.
        parameters: as published.
        license: SPDX identifier, or the publisher's name of its own licence.
        strengths: what it is made for, of `STRENGTHS`.
        languages: ISO 639-1 codes of those that its publisher names first.
        spoken: how many languages its publisher claims.
        tower: of a model with an encoder in front.
        headless: whether it ends before the vocabulary, with hidden states.
        also: repositories that have the same sizes.
        unconfirmed: fields of ``shape`` and ``tower`` that were taken from a sibling's configuration.
    """

    name: str
    released: str
    shape: Shape
    parameters: float
    license: str
    strengths: tuple[str, ...]
    languages: tuple[str, ...] = _MANY
    spoken: int = 29
    tower: Tower | None = None
    headless: bool = False
    also: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()

    @property
    def repo(self) -> str:
        """``owner/name``."""
        return f"{OWNER}/{self.name}"

    @property
    def family(self) -> str:
        """``model_type`` in its configuration."""
        return self.shape.model_type

    @property
    def generation(self) -> int:
        """Which of the publisher's generations it is of, counted from 0."""
        return next(number for prefix, number in _GENERATIONS.items() if self.name.startswith(prefix))

    @property
    def computed(self) -> int:
        """The number of parameters that its sizes make."""
        return sizes.parameters(self.shape, self.tower, not self.headless)

    @property
    def active(self) -> int:
        """Parameters that a token goes through."""
        return self.computed - self.shape.body_parameters + self.shape.active_parameters


# Layers, hidden, intermediate, heads, KV heads, vocabulary of Qwen2's and Qwen3's sizes.
def _dense(
    family: str, sizes: tuple[int, int, int, int, int, int], context: int, tied: bool = False, head_dim: int = 128
) -> Shape:
    layers, hidden, intermediate, heads, kv_heads, vocabulary = sizes
    return Shape(family, layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, context, tied)


def _sparse(
    family: str,
    sizes: tuple[int, int, int, int, int],
    experts: Experts,
    context: int,
    vocabulary: int = 151_936,
) -> Shape:
    layers, hidden, intermediate, heads, kv_heads = sizes
    return Shape(family, layers, hidden, intermediate, heads, kv_heads, 128, vocabulary, context, False, experts)


_QWEN_1_8B = (24, 2048, 5504, 16, 16, 151_936)
_QWEN_7B = (32, 4096, 11008, 32, 32, 151_936)
_QWEN_14B = (40, 5120, 13696, 40, 40, 152_064)
_QWEN_72B = (80, 8192, 24576, 64, 64, 152_064)
_0_5B = (24, 896, 4864, 14, 2, 151_936)
_1_5B = (28, 1536, 8960, 12, 2, 151_936)
_3B = (36, 2048, 11008, 16, 2, 151_936)
_7B = (28, 3584, 18944, 28, 4, 152_064)
_14B = (48, 5120, 13824, 40, 8, 152_064)
_32B = (64, 5120, 27648, 40, 8, 152_064)
_72B = (80, 8192, 29568, 64, 8, 152_064)
_THIRD_0_6B = (28, 1024, 3072, 16, 8, 151_936)
_THIRD_1_7B = (28, 2048, 6144, 16, 8, 151_936)
_THIRD_4B = (36, 2560, 9728, 32, 8, 151_936)
_THIRD_8B = (36, 4096, 12288, 32, 8, 151_936)
_THIRD_14B = (40, 5120, 17408, 40, 8, 151_936)
_THIRD_32B = (64, 5120, 25600, 64, 8, 151_936)
_THIRD_30B_A3B = (48, 2048, 6144, 32, 4), Experts(128, 8, 768, normalized=True)
_THIRD_235B_A22B = (94, 4096, 12288, 64, 4), Experts(128, 8, 1536, normalized=True)

_K, _32K, _40K, _128K, _256K, _1M = 1024, 32_768, 40_960, 131_072, 262_144, 1_010_000
_CHAT, _CODE, _MATH = ("chat",), ("code",), ("math",)
_HYBRID, _THINKS, _SEES = ("chat", "thinking"), ("thinking",), ("vision", "chat")


def _vision_2(out: int) -> Tower:
    return Tower(32, 1280, 5120, 2, 5120, out)


def _vision_2_5(out: int, intermediate: int = 3420) -> Tower:
    return Tower(32, 1280, intermediate, 3, 5120, out)


def _vision_3(out: int, layers: int = 27, hidden: int = 1152, intermediate: int = 4304) -> Tower:
    return Tower(layers, hidden, intermediate, 2, 4 * hidden, out, mergers=4)


_FIRST_MODELS = (
    Model(
        "Qwen-1_8B-Chat",
        "2023-11",
        _dense("qwen", _QWEN_1_8B, 8 * _K),
        1.84e9,
        TONGYI_RESEARCH,
        _CHAT,
        _FIRST,
        2,
        also=("Qwen-1_8B",),
    ),
    Model(
        "Qwen-7B-Chat", "2023-08", _dense("qwen", _QWEN_7B, 8 * _K), 7.72e9, TONGYI, _CHAT, _FIRST, 2, also=("Qwen-7B",)
    ),
    Model(
        "Qwen-14B-Chat",
        "2023-09",
        _dense("qwen", _QWEN_14B, 2 * _K),
        14.2e9,
        TONGYI,
        _CHAT,
        _FIRST,
        2,
        also=("Qwen-14B",),
    ),
    Model(
        "Qwen-72B-Chat",
        "2023-11",
        _dense("qwen", _QWEN_72B, _32K),
        72.3e9,
        TONGYI,
        _CHAT,
        _FIRST,
        2,
        also=("Qwen-72B",),
    ),
)


def _qwen(version: str, size: str, released: str, shape: Shape, parameters: float, license: str) -> Model:  # noqa: A002
    """A chat model and its base of the series 1.5, 2 or 2.5."""
    suffix = "Chat" if version == "Qwen1.5" else "Instruct"
    name = f"{version}-{size}"
    return Model(f"{name}-{suffix}", released, shape, parameters, license, _CHAT, also=(name,))


_SECOND = (
    _qwen(
        "Qwen1.5",
        "0.5B",
        "2024-02",
        _dense("qwen2", (24, 1024, 2816, 16, 16, 151_936), _32K, True, 64),
        0.464e9,
        TONGYI_RESEARCH,
    ),
    _qwen("Qwen1.5", "1.8B", "2024-02", _dense("qwen2", _QWEN_1_8B, _32K), 1.84e9, TONGYI_RESEARCH),
    _qwen(
        "Qwen1.5", "4B", "2024-02", _dense("qwen2", (40, 2560, 6912, 20, 20, 151_936), _32K), 3.95e9, TONGYI_RESEARCH
    ),
    _qwen("Qwen1.5", "7B", "2024-02", _dense("qwen2", _QWEN_7B, _32K), 7.72e9, TONGYI),
    _qwen("Qwen1.5", "14B", "2024-02", _dense("qwen2", _QWEN_14B, _32K), 14.2e9, TONGYI),
    _qwen("Qwen1.5", "32B", "2024-04", _dense("qwen2", (64, 5120, 27392, 40, 8, 152_064), _32K), 32.5e9, TONGYI),
    _qwen("Qwen1.5", "72B", "2024-02", _dense("qwen2", _QWEN_72B, _32K), 72.3e9, TONGYI),
    _qwen("Qwen1.5", "110B", "2024-04", _dense("qwen2", (80, 8192, 49152, 64, 8, 152_064), _32K), 111.2e9, TONGYI),
    _qwen(
        "Qwen1.5",
        "MoE-A2.7B",
        "2024-03",
        _sparse("qwen2_moe", (24, 2048, 5632, 16, 16), Experts(60, 4, 1408, shared_intermediate=5632), _32K),
        14.3e9,
        TONGYI,
    ),
    _qwen("Qwen2", "0.5B", "2024-06", _dense("qwen2", _0_5B, _32K, True, 64), 0.49e9, APACHE),
    _qwen("Qwen2", "1.5B", "2024-06", _dense("qwen2", _1_5B, _32K, True), 1.54e9, APACHE),
    _qwen("Qwen2", "7B", "2024-06", _dense("qwen2", _7B, _32K), 7.62e9, APACHE),
    _qwen("Qwen2", "72B", "2024-06", _dense("qwen2", _72B, _32K), 72.71e9, TONGYI),
    _qwen(
        "Qwen2",
        "57B-A14B",
        "2024-06",
        _sparse("qwen2_moe", (28, 3584, 18944, 28, 4), Experts(64, 8, 2560, shared_intermediate=20480), _32K),
        57.41e9,
        APACHE,
    ),
    _qwen("Qwen2.5", "0.5B", "2024-09", _dense("qwen2", _0_5B, _32K, True, 64), 0.49e9, APACHE),
    _qwen("Qwen2.5", "1.5B", "2024-09", _dense("qwen2", _1_5B, _32K, True), 1.54e9, APACHE),
    _qwen("Qwen2.5", "3B", "2024-09", _dense("qwen2", _3B, _32K, True), 3.09e9, QWEN_RESEARCH),
    _qwen("Qwen2.5", "7B", "2024-09", _dense("qwen2", _7B, _32K), 7.61e9, APACHE),
    _qwen("Qwen2.5", "14B", "2024-09", _dense("qwen2", _14B, _32K), 14.7e9, APACHE),
    _qwen("Qwen2.5", "32B", "2024-09", _dense("qwen2", _32B, _32K), 32.5e9, APACHE),
    _qwen("Qwen2.5", "72B", "2024-09", _dense("qwen2", _72B, _32K), 72.7e9, QWEN),
    Model("Qwen2.5-7B-Instruct-1M", "2025-01", _dense("qwen2", _7B, _1M), 7.61e9, APACHE, _CHAT),
    Model("Qwen2.5-14B-Instruct-1M", "2025-01", _dense("qwen2", _14B, _1M), 14.7e9, APACHE, _CHAT),
    Model("QwQ-32B", "2025-03", _dense("qwen2", _32B, _128K), 32.5e9, APACHE, _THINKS),
)


def _special(
    what: str,
    size: str,
    released: str,
    shape: Shape,
    parameters: float,
    license: str,  # noqa: A002
) -> Model:
    """A model of Qwen2.5 for code or mathematics; both are made for English and Chinese."""
    name = f"Qwen2.5-{what}-{size}"
    strengths = _CODE if what == "Coder" else _MATH
    return Model(f"{name}-Instruct", released, shape, parameters, license, strengths, ("en", "zh"), 2, also=(name,))


_SPECIAL = (
    _special("Coder", "0.5B", "2024-11", _dense("qwen2", _0_5B, _32K, True, 64), 0.49e9, APACHE),
    _special("Coder", "1.5B", "2024-09", _dense("qwen2", _1_5B, _32K, True), 1.54e9, APACHE),
    _special("Coder", "3B", "2024-11", _dense("qwen2", _3B, _32K, True), 3.09e9, QWEN_RESEARCH),
    _special("Coder", "7B", "2024-09", _dense("qwen2", _7B, _32K), 7.61e9, APACHE),
    _special("Coder", "14B", "2024-11", _dense("qwen2", _14B, _32K), 14.7e9, APACHE),
    _special("Coder", "32B", "2024-11", _dense("qwen2", _32B, _32K), 32.5e9, APACHE),
    _special("Math", "1.5B", "2024-09", _dense("qwen2", _1_5B, 4 * _K, True), 1.54e9, APACHE),
    _special("Math", "7B", "2024-09", _dense("qwen2", _7B, 4 * _K), 7.61e9, APACHE),
    _special("Math", "72B", "2024-09", _dense("qwen2", _72B, 4 * _K), 72.7e9, QWEN),
)


def _third(size: str, released: str, shape: Shape, parameters: float, strengths: tuple[str, ...], *also: str) -> Model:
    return Model(f"Qwen3-{size}", released, shape, parameters, APACHE, strengths, spoken=119, also=also)


_THIRD = (
    _third("0.6B", "2025-04", _dense("qwen3", _THIRD_0_6B, _40K, True), 0.596e9, _HYBRID, "Qwen3-0.6B-Base"),
    _third("1.7B", "2025-04", _dense("qwen3", _THIRD_1_7B, _40K, True), 1.72e9, _HYBRID, "Qwen3-1.7B-Base"),
    _third("4B", "2025-04", _dense("qwen3", _THIRD_4B, _40K, True), 4.02e9, _HYBRID, "Qwen3-4B-Base"),
    _third("8B", "2025-04", _dense("qwen3", _THIRD_8B, _40K), 8.19e9, _HYBRID, "Qwen3-8B-Base"),
    _third("14B", "2025-04", _dense("qwen3", _THIRD_14B, _40K), 14.8e9, _HYBRID, "Qwen3-14B-Base"),
    _third("32B", "2025-04", _dense("qwen3", _THIRD_32B, _40K), 32.8e9, _HYBRID),
    _third("30B-A3B", "2025-04", _sparse("qwen3_moe", *_THIRD_30B_A3B, _40K), 30.5e9, _HYBRID, "Qwen3-30B-A3B-Base"),
    _third("235B-A22B", "2025-04", _sparse("qwen3_moe", *_THIRD_235B_A22B, _40K), 235e9, _HYBRID),
    _third("4B-Instruct-2507", "2025-08", _dense("qwen3", _THIRD_4B, _256K, True), 4.02e9, _CHAT),
    _third("4B-Thinking-2507", "2025-08", _dense("qwen3", _THIRD_4B, _256K, True), 4.02e9, _THINKS),
    _third("30B-A3B-Instruct-2507", "2025-07", _sparse("qwen3_moe", *_THIRD_30B_A3B, _256K), 30.5e9, _CHAT),
    _third("30B-A3B-Thinking-2507", "2025-07", _sparse("qwen3_moe", *_THIRD_30B_A3B, _256K), 30.5e9, _THINKS),
    _third("235B-A22B-Instruct-2507", "2025-07", _sparse("qwen3_moe", *_THIRD_235B_A22B, _256K), 235e9, _CHAT),
    _third("235B-A22B-Thinking-2507", "2025-07", _sparse("qwen3_moe", *_THIRD_235B_A22B, _256K), 235e9, _THINKS),
)


def _sees(
    name: str,
    released: str,
    shape: Shape,
    tower: Tower,
    parameters: float,
    license: str = APACHE,  # noqa: A002
    unconfirmed: tuple[str, ...] = (),
) -> Model:
    third = name.startswith("Qwen3")
    also = (f"{name}-Thinking",) if third else (name,) if name.startswith("Qwen2-") else ()
    return Model(
        f"{name}-Instruct",
        released,
        shape,
        parameters,
        license,
        _SEES,
        spoken=119 if third else 29,
        tower=tower,
        also=also,
        unconfirmed=unconfirmed,
    )


_VISION = (
    _sees("Qwen2-VL-2B", "2024-08", _dense("qwen2_vl", _1_5B, _32K, True), _vision_2(1536), 2.21e9),
    _sees("Qwen2-VL-7B", "2024-08", _dense("qwen2_vl", _7B, _32K), _vision_2(3584), 8.29e9),
    _sees("Qwen2-VL-72B", "2024-09", _dense("qwen2_vl", _72B, _32K), _vision_2(8192), 73.4e9, TONGYI, ("license",)),
    _sees(
        "Qwen2.5-VL-3B", "2025-01", _dense("qwen2_5_vl", _3B, 128_000, True), _vision_2_5(2048), 3.75e9, QWEN_RESEARCH
    ),
    _sees("Qwen2.5-VL-7B", "2025-01", _dense("qwen2_5_vl", _7B, 128_000), _vision_2_5(3584), 8.29e9),
    _sees(
        "Qwen2.5-VL-32B",
        "2025-03",
        _dense("qwen2_5_vl", _32B, 128_000),
        _vision_2_5(5120, 3456),
        33.5e9,
        unconfirmed=("tower.intermediate",),
    ),
    _sees("Qwen2.5-VL-72B", "2025-01", _dense("qwen2_5_vl", _72B, 128_000), _vision_2_5(8192, 3456), 73.4e9, QWEN),
    _sees(
        "Qwen3-VL-2B", "2025-10", _dense("qwen3_vl", _THIRD_1_7B, _256K, True), _vision_3(2048, 24, 1024, 4096), 2.13e9
    ),
    _sees(
        "Qwen3-VL-4B", "2025-10", _dense("qwen3_vl", _THIRD_4B, _256K, True), _vision_3(2560, 24, 1024, 4096), 4.44e9
    ),
    _sees("Qwen3-VL-8B", "2025-10", _dense("qwen3_vl", _THIRD_8B, _256K), _vision_3(4096), 8.77e9),
    _sees("Qwen3-VL-32B", "2025-10", _dense("qwen3_vl", _THIRD_32B, _256K), _vision_3(5120), 33.4e9),
    _sees("Qwen3-VL-30B-A3B", "2025-10", _sparse("qwen3_vl_moe", *_THIRD_30B_A3B, _256K), _vision_3(2048), 31.1e9),
    _sees(
        "Qwen3-VL-235B-A22B",
        "2025-09",
        _sparse("qwen3_vl_moe", *_THIRD_235B_A22B, _256K),
        _vision_3(4096),
        235.7e9,
        unconfirmed=("tower",),
    ),
)

_AUDIO = (
    Model(
        "Qwen2-Audio-7B-Instruct",
        "2024-08",
        _dense("qwen2_audio", (32, 4096, 11008, 32, 32, 156_032), 8 * _K),
        8.4e9,
        APACHE,
        ("audio", "chat"),
        _FIRST,
        8,
        tower=Tower(32, 1280, 5120, 2, 1280, 4096, square=False),
        also=("Qwen2-Audio-7B",),
    ),
)


def _text(what: str, size: str, sizes: tuple[int, int, int, int, int, int], vocabulary: int, tied: bool) -> Model:
    """A model of the Qwen3 embedding series: of hidden states, or of the answer yes or no."""
    embeds = what == "Embedding"
    name = f"Qwen3-{what}-{size}"
    known = embeds or size == "0.6B"
    published = {"0.6B": 0.596e9, "4B": 4.02e9, "8B": 7.57e9 if embeds else 8.19e9}
    return Model(
        name,
        "2025-06",
        _dense("qwen3", (*sizes[:5], vocabulary), _32K, tied),
        published[size],
        APACHE,
        ("embedding",) if embeds else ("rerank",),
        spoken=100,
        headless=embeds,
        unconfirmed=() if known else ("vocabulary",),
    )


_TEXTS = tuple(
    _text(what, size, shape, vocabulary, size != "8B")
    for what in ("Embedding", "Reranker")
    for size, shape, vocabulary in (
        ("0.6B", _THIRD_0_6B, 151_669),
        ("4B", _THIRD_4B, 151_665),
        ("8B", _THIRD_8B, 151_665),
    )
)


def published(repo: str) -> Model | None:
    """The model of a repository of the publisher (``owner/name``); ``None`` where the table has none."""
    owner, _, name = repo.partition("/")
    return MODELS.get(name) if owner == OWNER else None


MODELS: dict[str, Model] = {
    model.name: model for model in (*_FIRST_MODELS, *_SECOND, *_SPECIAL, *_THIRD, *_VISION, *_AUDIO, *_TEXTS)
}
