"""Rotate a decoder so that its activations have no outliers: the same function in another basis.

RMSNorm without gains commutes with rotations, so that the residual stream may be expressed in any orthonormal basis
(QuaRot, SpinQuant). In a random one the few large channels of a language model are spread evenly over all channels,
and 8-bit activations lose next to nothing.

Shapes in this module:
    H: hidden size, D: size of an attention head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Linear modules of a block that write to the residual stream; all others of its MLP (experts, routers) read it.
_WRITERS = ("down_proj", "o_proj")


def rotate(model: Any, seed: int = 0) -> None:
    """Rotate a Qwen2 or Qwen3 ``ForCausalLM`` (dense or MoE) in place; its logits stay the same.

    The gains of the norms move into the linear layers that follow, the residual stream is rotated by one matrix
    ``[H, H]``, and the values of each key-value head by another ``[D, D]``. Tied embeddings become two matrices: the
    head takes up the last norm's gain. The norms of queries and keys (Qwen3) lie inside the heads and are not touched.

    Args:
        model: float32 weights; the arithmetic is done in float64, one weight at a time.
        seed: of the random signs.

    Raises:
        ValueError: a module of the model is none that this function knows.
    """
    import torch

    decoder = model.model
    generator = torch.Generator().manual_seed(seed)
    stream = orthogonal(model.config.hidden_size, generator)
    with torch.no_grad():
        _untie(model)
        decoder.embed_tokens.weight.copy_(_times(decoder.embed_tokens.weight, stream))
        for layer in decoder.layers:
            attention = layer.self_attn
            _check(layer)
            for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
                _read(reader, layer.input_layernorm.weight, stream)
            for name, linear in _linears(layer.mlp):
                if not name.endswith(_WRITERS):
                    _read(linear, layer.post_attention_layernorm.weight, stream)
                else:
                    _write(linear, stream)
            _write(attention.o_proj, stream)
            _rotate_values(attention, orthogonal(attention.head_dim, generator))
            layer.input_layernorm.weight.fill_(1.0)
            layer.post_attention_layernorm.weight.fill_(1.0)
        _read(model.lm_head, decoder.norm.weight, stream)
        decoder.norm.weight.fill_(1.0)


def orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix ``[size, size]`` float64 whose entries are all of similar magnitude.

    Random signs times the Kronecker product of a Hadamard matrix (the power of two in ``size``) and a Hartley matrix
    (the odd rest): no entry exceeds ``sqrt(2 / size)``, which no Gaussian random matrix reaches.
    """
    import torch

    odd = size // (size & -size)
    steps = torch.arange(odd, dtype=torch.float64)
    angle = 2 * math.pi / odd * torch.outer(steps, steps)
    matrix = (angle.cos() + angle.sin()) / math.sqrt(odd)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


def _untie(model: Any) -> None:
    import torch

    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _check(layer: Any) -> None:
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    found = {name for name, _ in layer.named_children()}
    if found != known:
        raise ValueError(f"a decoder layer has the modules {sorted(found)}, not {sorted(known)}")


def _linears(block: Any) -> Iterator[tuple[str, Any]]:
    import torch

    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield name, module
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(f"the MLP's module {name} has parameters but is no Linear")


def _read(linear: Any, gain: torch.Tensor, stream: torch.Tensor) -> None:
    """``W diag(gain) Q``: the layer reads the rotated stream behind a norm without gain."""
    linear.weight.copy_(_times(linear.weight.double() * gain.double(), stream))


def _write(linear: Any, stream: torch.Tensor) -> None:
    """``Qᵀ W``, ``Qᵀ b``: the layer writes to the rotated stream."""
    linear.weight.copy_(stream.t() @ linear.weight.double())
    if linear.bias is not None:
        linear.bias.copy_(stream.t() @ linear.bias.double())


def _rotate_values(attention: Any, rotation: torch.Tensor) -> None:
    """Attention mixes the values of a head over positions, channel by channel: a rotation passes through."""
    size = attention.head_dim
    values, out = attention.v_proj, attention.o_proj
    heads = values.weight.double().view(-1, size, values.in_features)
    values.weight.copy_((rotation.t() @ heads).view_as(values.weight))
    if values.bias is not None:
        values.bias.copy_((values.bias.double().view(-1, size) @ rotation).view(-1))
    out.weight.copy_((out.weight.double().view(out.out_features, -1, size) @ rotation).view_as(out.weight))


def _times(weight: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """``weight @ rotation`` (``[N, H]``), some rows at a time: an embedding in float64 is large."""
    import torch

    return torch.cat([(part.double() @ rotation).float() for part in weight.split(16384)])
