"""Build a checkpoint of the shape of Qwen2.5-7B to INT4, to see what memory it takes.

The weights are random, so that nothing has to be fetched: `python tests/large_build.py CHECKPOINT WORK`, where
CHECKPOINT is any Qwen checkpoint with a tokenizer of Qwen's vocabulary, and WORK a folder on a disk with 80 GB free.
Prints what each step took; what the answers are worth is not the point.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml

from pipeline import cli

# The config.json of Qwen/Qwen2.5-7B-Instruct.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_LAYERS_A_SHARD = 7


def checkpoint(folder: Path, tokenizer: Path) -> None:
    """Write random bfloat16 weights in shards, with the tokenizer of another checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for path in tokenizer.glob("*"):
        if path.suffix in (".json", ".jinja", ".txt") and path.name not in (
            "config.json",
            "model.safetensors.index.json",
        ):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 512
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    ends = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "lm_head.weight": (CONFIG["vocab_size"], hidden),
    }
    shards = [ends | {"model.norm.weight": (hidden,)}]
    for start in range(0, CONFIG["num_hidden_layers"], _LAYERS_A_SHARD):
        span = range(start, min(start + _LAYERS_A_SHARD, CONFIG["num_hidden_layers"]))
        shards.append({f"model.layers.{index}.{name}": dims for index in span for name, dims in layer.items()})
    generator, where = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = {}
        for name, dims in names.items():
            made = torch.empty(dims, dtype=torch.bfloat16).normal_(generator=generator).mul_(0.02)
            values[name] = made.fill_(1.0) if name.endswith("norm.weight") else made
            where[name] = file
        save_file(values, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def main(tokenizer: str, work: str) -> int:
    source, recipe = Path(work) / "checkpoint", Path(work) / "qwen2.5-7b-shaped" / "cpu-int4.yaml"
    if not source.exists():
        checkpoint(source, Path(tokenizer))
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(
        yaml.safe_dump(
            {
                "target": "cpu",
                "checkpoint": {
                    "sources": [{"type": "local", "path": str(source.resolve())}],
                    "license": "Apache-2.0",
                    "base_model": "random weights",
                },
                "export": {"exporter": "native"},
                "quantize": {
                    "algorithm": "min_error",
                    "body": {"bits": 4, "block_size": 32, "symmetric": True},
                    "head": {"bits": 8, "block_size": 128, "symmetric": True},
                    "embedding": {"bits": 8, "block_size": 128, "symmetric": True},
                },
                "validate": {
                    "windows": 2,
                    "window_tokens": 64,
                    "greedy_tokens": 4,
                    "answers": 1,
                    "gates": {"mean_kl": 5.0, "top1": 0.0, "perplexity_ratio": 5.0, "runaway": 9},
                },
            }
        )
    )
    code = cli.main(["build", str(recipe), "--store", f"{work}/store", "--out", f"{work}/out"])
    for path in sorted(Path(work).glob("store/*/*/artifact.json")):
        facts = json.loads(path.read_bytes())
        print(f"{facts['stage']:<11}{facts['seconds']:8.0f} s  peak {facts['peak_memory'] / 2**30:5.2f} GiB")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
