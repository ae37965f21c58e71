"""Tiny checkpoints that behave like real ones: every file a Qwen checkpoint has, and answers that are not constant.

The logits are peaked (the head follows the embedding of a shifted vocabulary), so that top-1 agreement after
quantization says something; the weights have realistic widths for blocks of 16 and 32.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

VOCABULARY = 512
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK, THOUGHT = "<think>", "</think>"

# Qwen's own pre-tokenization: words, single digits, punctuation, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TRAINING = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on while the fox runs away.",
    "def add(first, second):\n    return first + second\n\n\nfor index in range(10):\n    print(add(index, 1))\n",
    "In the morning the light comes over the hills, and in the evening it goes down behind the sea.",
    "system user assistant tool name arguments description parameters function type object string",
)

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
{{- '# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function else call %}
{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

# As models do that think unless they are told not to: earlier turns lose their thoughts, and an empty block at the end
# of the prompt stands for having thought already.
THINKING_TEMPLATE = (
    CHAT_TEMPLATE.replace(
        "(message.content or '')",
        "((message.content or '').split('</think>')[-1].lstrip('\\n') if message.role == 'assistant'"
        " else message.content or '')",
    ).removesuffix("{% endif %}\n")
    + """\
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
)


def tiny_checkpoint(folder: Path, model_type: str, tied: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint of a few hundred kilobytes into ``folder`` and return it.

    Args:
        folder: created; gets config.json, generation_config.json, model.safetensors and the tokenizer's files.
        model_type: ``qwen2``; ``qwen3`` (whose head_dim is not hidden size / heads, and which can think or not);
            ``qwen2_moe`` (a shared expert, weights as the router gives them, one layer of three without experts) or
            ``qwen3_moe`` (weights normalized).
        tied: whether head and embedding are one matrix.
        seed: two calls with the same seed write the same bytes.
    """
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, thinks=model_type == "qwen3")
    end, end_of_text = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens = {"eos_token_id": end, "pad_token_id": end_of_text, "bos_token_id": end_of_text}
        model = _model(model_type, tied, len(tokenizer), tokens)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, end_of_text], pad_token_id=end_of_text, bos_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(folder)
    return folder


def _model(model_type: str, tied: bool, used: int, tokens: dict[str, int]) -> Any:
    import torch
    import transformers

    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}[model_type]
    config_class, model_class = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForCausalLM"))
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "tie_word_embeddings": tied,
    }
    if model_type.startswith("qwen3"):
        sizes["head_dim"] = 32
    if model_type.endswith("_moe"):
        sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        sizes["norm_topk_prob"] = model_type == "qwen3_moe"
    if model_type == "qwen2_moe":
        sizes |= {"shared_expert_intermediate_size": 96, "num_hidden_layers": 3, "mlp_only_layers": [1]}
    model = model_class(config_class(**sizes, **tokens)).eval()
    fill(model)
    with torch.no_grad():
        if tied:
            # Else a token's own embedding would be the nearest to what it led to, and every answer one token for ever.
            model.model.norm.weight.mul_(torch.randint(0, 2, (64,)) * 2 - 1)
        else:
            point(model, used)
    return model


def fill(model: Any) -> None:
    """Random weights of the sizes that training leaves."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.7, 1.3)
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.1)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0.0, 1.0)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, 4 * parameter.shape[1] ** -0.5)  # routers are as sure as trained ones
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)


def point(model: Any, used: int) -> None:
    """Let each token point at another one: what follows depends on what came, and one token stands out."""
    import torch

    with torch.no_grad():
        pointed = model.get_input_embeddings().weight[torch.randperm(used)]
        model.lm_head.weight.mul_(0.5)
        model.lm_head.weight[:used] += pointed


def tiny_qwen1(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint as Qwen 1.0 was published, in bfloat16 and two shards, with code that must never run.

    Args:
        folder: created; gets config.json, the shards and their index, ``qwen.tiktoken`` and generation_config.json.
        changes: other values for config.json.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ranks = tiktoken_ranks(make_tokenizer(folder).backend_tokenizer)
    for path in folder.iterdir():
        path.unlink()
    (folder / "qwen.tiktoken").write_bytes(tiktoken_file(ranks))
    for name in ("modeling_qwen.py", "configuration_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text("raise SystemExit('the code of a checkpoint was run')")
    config = QWEN1_CONFIG | {"vocab_size": len(ranks) + 208 + 20} | changes
    hidden, inner, layers = 64, 128, config["num_hidden_layers"]
    sizes = {"attn.c_attn.weight": (3 * hidden, hidden), "attn.c_attn.bias": (3 * hidden,)}
    sizes |= {"ln_1.weight": (hidden,), "ln_2.weight": (hidden,), "attn.c_proj.weight": (hidden, hidden)}
    sizes |= {"mlp.w1.weight": (inner, hidden), "mlp.w2.weight": (inner, hidden), "mlp.c_proj.weight": (hidden, inner)}
    draw = torch.Generator().manual_seed(seed)
    tensors = {"transformer.wte.weight": torch.randn(config["vocab_size"], hidden, generator=draw)}
    for layer in range(layers):
        for name, dims in sizes.items():
            values = torch.randn(*dims, generator=draw)
            scale = 0.2 if len(dims) == 1 else dims[1] ** -0.5
            shift = 1.0 if name.startswith("ln") else 0.0
            tensors[f"transformer.h.{layer}.{name}"] = values * scale + shift
    tensors["transformer.ln_f.weight"] = 1 + 0.2 * torch.randn(hidden, generator=draw)
    following = torch.randperm(config["vocab_size"], generator=draw)
    noise = torch.randn(config["vocab_size"], hidden, generator=draw)
    tensors["lm_head.weight"] = 0.5 * noise + tensors["transformer.wte.weight"][following]
    tensors["transformer.rotary_emb.inv_freq"] = torch.ones(8)  # old versions of the class stored it
    tensors = {name: values.to(torch.bfloat16).contiguous() for name, values in tensors.items()}
    shards = {name: f"model-0000{2 if 'h.1' in name or 'lm' in name else 1}-of-00002.safetensors" for name in tensors}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    generation = {"chat_format": "chatml", "eos_token_id": len(ranks), "do_sample": True, "top_p": 0.8, "top_k": 0}
    for name, value in {
        "config.json": config,
        "model.safetensors.index.json": {"weight_map": shards},
        "generation_config.json": generation | {"repetition_penalty": 1.1, "max_window_size": 24000},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}},
    }.items():
        (folder / name).write_text(json.dumps(value))
    return folder


QWEN1_CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 256,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 2048,
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "bf16": True,
}


def tiktoken_ranks(backend: Any) -> list[bytes]:
    """The bytes of each token of a byte-level BPE that is no control token, by id."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    assert [index for _, index in vocabulary] == list(range(len(vocabulary)))
    return [bytes(byte_of[character] for character in token) for token, _ in vocabulary]


def tiktoken_file(tokens: list[bytes]) -> bytes:
    """A ``.tiktoken`` file of ``tokens``, whose ranks are their places."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def make_tokenizer(
    folder: Path, thinks: bool = False, more: tuple[str, ...] = (), template: str = CHAT_TEMPLATE
) -> Any:
    """Train a byte-level BPE tokenizer and save it as Qwen's class; any text encodes, for all bytes are in it."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import Qwen2TokenizerFast

    special = [END_OF_TEXT, START, END, *more]
    plain = [THINK, THOUGHT] if thinks else []  # tokens of their own, and no control tokens
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special) - len(plain),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Models that rank answer with one token, yes or no.
    made.train_from_iterator([*_TRAINING, *["yes\nno"] * 20] if thinks else _TRAINING, trainer)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=made,
        additional_special_tokens=special[1:],
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    assert len(tokenizer) <= VOCABULARY
    tokenizer.chat_template = THINKING_TEMPLATE if thinks else template
    tokenizer.save_pretrained(folder)
    return tokenizer
