"""A tiny Qwen2-Audio checkpoint of transformers' own class, with every file that a real one has."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import END, END_OF_TEXT, VOCABULARY, fill, make_tokenizer, point

AUDIO = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
BINS = 16


def tiny_audio_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of about a megabyte into ``folder`` and return it; the same seed writes the same bytes."""
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder, more=AUDIO)
    (folder / "chat_template.jinja").unlink()  # the published checkpoints leave it to the processor
    end, end_of_text, audio = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT, AUDIO[1]])
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    hearing = Qwen2AudioEncoderConfig(
        num_mel_bins=BINS, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, d_model=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2AudioConfig(hearing, text, audio_token_index=audio, pad_token_id=end_of_text, eos_token_id=end)
        model = Qwen2AudioForConditionalGeneration(config).eval()
        fill(model.language_model)
        point(model.language_model, len(tokenizer))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(("audio_tower", "multi_modal")) and parameter.dim() > 1:
                    parameter.normal_(0.0, 0.3)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, end_of_text], pad_token_id=end_of_text, bos_token_id=end_of_text, do_sample=False
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=BINS).save_pretrained(folder)
    return folder


def change(folder: Path, name: str, **settings: object) -> None:
    """Put ``settings`` into a JSON file of a checkpoint."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **settings}), encoding="utf-8")
