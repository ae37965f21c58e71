"""How the cost of GPTQ grows with the width of a model: ``python tests/gptq_scaling.py``.

Two decoders of random weights, a few layers of the widths of Qwen2.5-0.5B and of Qwen2.5-1.5B, are calibrated and
quantized in processes of their own, in turn; printed are the seconds for a million weights and the peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WIDTHS = {"0.5B": (896, 4864, 14, 2), "1.5B": (1536, 8960, 12, 2)}
LAYERS, WINDOWS, ROUNDS = 3, 8, 2


def write(folder: Path, name: str) -> None:
    """A checkpoint with the tokenizer of the tests."""
    import torch
    from tiny import tiny_checkpoint
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tiny_checkpoint(folder, "qwen2")
    hidden, intermediate, heads, kv_heads = WIDTHS[name]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def quantize(folder: Path) -> dict[str, float]:
    """Seconds for a million weights, and the peak memory in GB."""
    from pipeline import bench_loop
    from pipeline.quantization import blockwise, calibration, decoder, gptq

    walk = calibration.Hessians(folder, WINDOWS)
    weights = dict(decoder.tensors(folder))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    begin, count = time.perf_counter(), 0
    for layer in range(LAYERS):
        for name in names:
            path = f"model.layers.{layer}.{name}"
            values = weights[f"{path}.weight"].numpy()
            made = gptq.quantize(values, walk.factor(path), 4, 32, False)
            walk.replace(path, lambda made=made, values=values: blockwise.dequantize(made, 4, values.shape[1]))
            count += values.size
    seconds = time.perf_counter() - begin
    peak = bench_loop.peak_memory() / 1e9
    return {"weights": count / 1e6, "seconds_per_million": seconds / count * 1e6, "peak_gb": peak}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(quantize(Path(sys.argv[1]))))
        return
    with tempfile.TemporaryDirectory() as kept:
        for name in WIDTHS:
            write(Path(kept) / name, name)
        for _ in range(ROUNDS):
            for name in WIDTHS:
                command = [sys.executable, __file__, str(Path(kept) / name)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
