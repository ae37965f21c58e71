"""How much each weight loses: the divergence of the model in which that weight alone is another.

What precedes a weight's layer is computed once: each layer's inputs are kept, and the walk starts there.

Shapes in this module:
    W: windows, T: tokens of each, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.quantization import decoder

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from pipeline.artifact import Progress
    from pipeline.checkpoint.reference import Reference

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
# A weight's values, ``[N, K]`` float32; fused projections have their rows one after the other.
Values = Callable[[], "npt.NDArray[np.float32]"]


def measure(
    reference: Reference,
    weights: Mapping[str, Values],
    ids: Sequence[Sequence[int]],
    progress: Progress,
    shared: bool = False,
    likeliest: int = 0,
) -> dict[str, float]:
    """Mean KL divergence (nats a token) of the reference from itself with one weight replaced, for each weight.

    Args:
        reference: is as it was when this returns.
        weights: by path, as the exporters write them (``model.layers.3.mlp.down_proj``).
        ids: ``[W, T]`` token ids.
        progress: called after each weight, with its path.
        shared: whether the embedding is gathered from the head.
        likeliest: tell only so many of each position's likeliest tokens apart (all positions' together): the rest of
            the vocabulary hardly counts, and is most of the work. All of it counts when left out.

    Raises:
        StageError: the model has no such weight.
    """
    import torch

    model = reference.text
    body = model.model
    given = torch.tensor([list(row) for row in ids])
    found: dict[str, float] = {}
    with torch.inference_mode():
        states = _states(body, given)
        wanted = _log_probabilities(model, states[-1])
        told = wanted.topk(likeliest).indices.unique() if likeliest else None
        wanted = wanted if told is None else _log_probabilities(model, states[-1], told)
        share = wanted.exp()

        def divergence(start: int, hidden: torch.Tensor) -> float:
            rotary = _rotary(body, hidden)
            for layer in body.layers[start:]:
                hidden = _apply(layer, hidden, rotary)
            # As `pipeline.fidelity.metrics.kl_divergence` computes it, but here all cores do.
            other = _log_probabilities(model, hidden, told)
            return float((share * torch.sub(wanted, other, out=other)).sum(1, dtype=torch.float64).mean())

        for done, (path, values) in enumerate(weights.items()):
            index = decoder.layer_of(path)
            modules = _modules(model, path)
            both = shared and path == HEAD
            kept = [module.weight for module in (*modules, *([body.embed_tokens] if both else []))]
            _replace(modules, values())
            if both:
                modules.append(body.embed_tokens)
                body.embed_tokens.weight = model.lm_head.weight
            if path == EMBEDDING or both:
                found[path] = divergence(0, body.embed_tokens(given))
            else:
                start = len(body.layers) if index is None else index
                found[path] = divergence(start, states[start])
            for module, weight in zip(modules, kept, strict=True):
                module.weight = weight
            progress((done + 1) / len(weights), path)
    return found


def replace(reference: Reference, weights: Mapping[str, Values]) -> None:
    """Put all of ``weights`` into the reference at once, for good."""
    for path, values in weights.items():
        modules = _modules(reference.text, path)
        _replace(modules, values())


def log_probabilities(reference: Reference, ids: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Of every token after every other, ``[W * T, V]`` float32."""
    import torch

    with torch.inference_mode():
        given = torch.tensor([list(row) for row in ids])
        model = reference.text
        found: npt.NDArray[np.float32] = _log_probabilities(model, _states(model.model, given)[-1]).numpy()
        return found


def _states(body: Any, ids: Any) -> list[Any]:
    """The input ``[W, T, H]`` of each layer, and what the last one gives."""
    hidden = body.embed_tokens(ids)
    states = [hidden]
    rotary = _rotary(body, hidden)
    for layer in body.layers:
        states.append(_apply(layer, states[-1], rotary))
    return states


def _rotary(body: Any, hidden: Any) -> Any:
    import torch

    return body.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])


def _apply(layer: Any, hidden: Any, rotary: Any) -> Any:
    out = layer(hidden, position_embeddings=rotary)
    return out[0] if isinstance(out, tuple) else out


def _log_probabilities(model: Any, hidden: Any, told: torch.Tensor | None = None) -> torch.Tensor:
    """Of every token of the vocabulary, or of those ``told`` among themselves."""
    import torch

    rows = model.model.norm(hidden).flatten(0, 1)
    logits = model.lm_head(rows) if told is None else rows @ model.lm_head.weight[told].t()
    return torch.log_softmax(logits.float(), -1)


def _modules(model: Any, path: str) -> list[Any]:
    if path == HEAD:
        return [model.lm_head]
    if path == EMBEDDING:
        return [model.model.embed_tokens]
    index = decoder.layer_of(path)
    assert index is not None  # graphs have no other weights
    return decoder.projections(model.model.layers[index], path)


def _replace(modules: Sequence[Any], values: npt.NDArray[np.float32]) -> None:
    import torch

    parts = torch.from_numpy(np.array(values, np.float32)).split([len(module.weight) for module in modules])
    for module, part in zip(modules, parts, strict=True):
        # Another parameter, not other data of the same: embedding and head may share theirs.
        module.weight = torch.nn.Parameter(part, requires_grad=False)
