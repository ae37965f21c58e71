"""What a package is for: to generate text, to embed texts, or to rank documents for a query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GENERATE, EMBED, RERANK = "generate", "embed", "rerank"

_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Task:
    """A task and what follows from it.

    Attributes:
        name: as recipes spell it.
        tag: what model hubs call it.
        roles: of the weights that its graph has besides the body.
        required, optional: its gates, fields of `pipeline.facts.recipe.Gates`.
        output: name and kind of the graph's output; a generating graph has the runtime's own.
        labels: tokens whose logits are the result; without any it is the normalized hidden state.
        before, after: what stands around each text, control tokens included.
        forms: how texts are put together, by name.
        instruction: what takes the place of ``{instruction}`` unless a caller has another.
        tolerance: of the golden replay, see `pipeline.package.retrieval_replay.verdict`.
    """

    name: str
    tag: str
    roles: tuple[str, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    output: str = ""
    labels: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    forms: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""
    tolerance: Mapping[str, float] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether packages are run by onnxruntime-genai; all others need onnxruntime alone."""
        return self.name == GENERATE


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            GENERATE,
            "text-generation",
            roles=("head", "embedding"),
            required=("mean_kl", "top1", "perplexity_ratio"),
            optional=("p99_kl", "greedy", "runaway", "routing", "expert_error"),
        ),
        # Texts and tokens around them are those that the model cards of Qwen3-Embedding and Qwen3-Reranker give.
        Task(
            EMBED,
            "feature-extraction",
            roles=("embedding",),
            required=("cosine",),
            optional=("min_cosine", "ranking"),
            output="sentence_embedding",
            after="<|endoftext|>",
            forms={"document": "{document}", "query": "Instruct: {instruction}\nQuery:{query}"},
            instruction=_INSTRUCTION,
            tolerance={"cosine": 0.99},
        ),
        Task(
            RERANK,
            "text-ranking",
            roles=("embedding",),
            required=("score_error",),
            optional=("ranking",),
            output="logits",
            labels=("no", "yes"),
            before=(
                "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
                'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            ),
            after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            forms={"pair": "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"},
            instruction=_INSTRUCTION,
            tolerance={"score": 0.05},
        ),
    )
}
