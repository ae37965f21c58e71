"""Tiny checkpoints that behave like real ones: every file a Qwen checkpoint has, and answers that are not constant.

The logits are peaked (the head follows the embedding of a shifted vocabulary), so that top-1 agreement after
quantization says something; the weights have realistic widths for blocks of 16 and 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 512
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

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


def tiny_checkpoint(folder: Path, model_type: str, tied: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint of a few hundred kilobytes into ``folder`` and return it.

    Args:
        folder: created; gets config.json, generation_config.json, model.safetensors and the tokenizer's files.
        model_type: ``qwen2`` or ``qwen3`` (whose head_dim is not hidden size / heads).
        tied: whether head and embedding are one matrix.
        seed: two calls with the same seed write the same bytes.
    """
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
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
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[model_type]
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
    if model_type == "qwen3":
        sizes["head_dim"] = 32
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
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)


def point(model: Any, used: int) -> None:
    """Let each token point at another one: what follows depends on what came, and one token stands out."""
    import torch

    with torch.no_grad():
        pointed = model.get_input_embeddings().weight[torch.randperm(used)]
        model.lm_head.weight.mul_(0.5)
        model.lm_head.weight[:used] += pointed


def make_tokenizer(folder: Path, more: tuple[str, ...] = (), template: str = CHAT_TEMPLATE) -> Any:
    """Train a byte-level BPE tokenizer and save it as Qwen's class; any text encodes, for all bytes are in it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import Qwen2TokenizerFast

    special = [END_OF_TEXT, START, END, *more]
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
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_TRAINING, trainer)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=made,
        additional_special_tokens=special[1:],
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    assert len(tokenizer) <= VOCABULARY
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer
