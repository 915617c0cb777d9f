"""How much memory a stage needs at least, from the numbers of its models; nothing is loaded for it.

All sizes are bytes of one process, beyond the interpreter with its imports (about half a GiB). Small things are left
out, so that a stage takes more. Measured on a CPU, as the peak of the resident memory: `train` of 92M parameters took
13 to 18 % more than this (bfloat16, float32, recomputed); scoring by 135M took 2 % more, with top-k 36 %; sampling with
the transformers engine 1.2 to 2.2 times as much (perhaps for the attention of all prompts at once; not confirmed).
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4
BYTES = {"float32": FLOAT32, "bfloat16": 2, "float16": 2}
MASTER_STATE = 4 * FLOAT32  # of a trained parameter: master weight, gradient, two moments of AdamW
CHECKPOINT = 3 * FLOAT32  # of a trained parameter on the disk: master weight, two moments
# The numbers that a layer makes of a token, and keeps for the backward pass: about so many times each width.
LAYER_HIDDEN, LAYER_KEYS, LAYER_INTERMEDIATE = 10, 2, 4
HEAD_TOKENS, HEAD_WIDTH = 2048, 4096  # logits of so many tokens and ids exist at once (models/logprobs.py, on a CPU)
HEAD_COPIES = 3  # float32 numbers that exist of each of them
SCORED_TOKENS = 1024  # that are scored at once (engines/transformers.py)
LIKELIEST_TOKENS, LIKELIEST_COPIES = 128, 3  # tokens whose logits of the whole vocabulary exist at once, for top-k
SAMPLED_COPIES = 6  # float32 numbers of each logit while a token is sampled


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that its memory follows from."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int  # width of the feed-forward part
    key_width: int  # of a token's keys in a layer: heads of them times their size
    vocabulary: int

    def weights(self, dtype: str) -> int:
        return self.parameters * BYTES[dtype]

    def cache(self, tokens: int, dtype: str) -> int:
        """Keys and values of so many tokens."""
        return tokens * self.layers * 2 * self.key_width * BYTES[dtype]

    def layer(self, tokens: int, dtype: str) -> int:
        """What one layer makes of so many tokens."""
        widths = LAYER_HIDDEN * self.hidden + LAYER_KEYS * self.key_width + LAYER_INTERMEDIATE * self.intermediate
        return tokens * widths * BYTES[dtype]

    def activations(self, tokens: int, dtype: str, recomputed: bool) -> int:
        """What the backward pass needs of the forward pass of so many tokens.

        Args:
            recomputed: each layer keeps its input alone, and makes the rest again (gradient checkpointing).
        """
        if recomputed:
            return self.layers * tokens * self.hidden * BYTES[dtype] + self.layer(tokens, dtype)
        return self.layers * self.layer(tokens, dtype)

    def head(self, tokens: int) -> int:
        """Logits of a block of these tokens and of the vocabulary, with what is computed from them."""
        return min(tokens, HEAD_TOKENS) * min(self.vocabulary, HEAD_WIDTH) * HEAD_COPIES * FLOAT32


def train_memory(
    student: ModelShape,
    dtype: str,
    tokens: int,
    *,
    recomputed: bool = False,
    adapters: int | None = None,
    shards: int = 1,
) -> int:
    """Of a process of `train`: the model, what AdamW keeps of it in float32, and a micro batch.

    Args:
        dtype: of the products. Those of float32 use the master weights, and need no others.
        tokens: of a micro batch.
        adapters: trained parameters, if they are adapters' alone.
        shards: the processes that each hold a part of the model and of its state (FSDP), which has no other copy.
    """
    copies = 0 if dtype == "float32" or shards > 1 else student.weights(dtype)
    if adapters is None:
        state = copies + student.parameters * MASTER_STATE
    else:  # the frozen model is loaded in float32
        state = max(student.weights("float32"), student.weights(dtype) + adapters * MASTER_STATE)
    return state // shards + student.activations(tokens, dtype, recomputed) + student.head(tokens)


def generate_memory(model: ModelShape, dtype: str, sequences: int, prompt: int, new: int) -> int:
    """Of sampling so many sequences at once, of at most so many tokens of prompt and of response."""
    prefill = model.layer(sequences * prompt, dtype)
    logits = sequences * model.vocabulary * SAMPLED_COPIES * FLOAT32
    return model.weights(dtype) + model.cache(sequences * (prompt + new), dtype) + max(prefill, logits)


def score_memory(model: ModelShape, dtype: str, top_k: bool) -> int:
    """Of scoring by prefill."""
    likeliest = LIKELIEST_TOKENS * model.vocabulary * LIKELIEST_COPIES * FLOAT32 if top_k else 0
    return model.weights(dtype) + model.layer(SCORED_TOKENS, dtype) + max(model.head(SCORED_TOKENS), likeliest)
