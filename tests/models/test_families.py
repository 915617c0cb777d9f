"""Log-probs, samples and saved students of many architectures against a plain forward pass.

A new family joins with one line in FAMILIES: what its config needs besides SHAPE. Run as a script
(PYTHONPATH=.:tests python tests/models/test_families.py), this prints the table of all families; with names, of those.

Each has random weights, spread so that mistakes show, buffers that are not what a new model has, windows and chunks
shorter than the prompts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers.tiny import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.engines.base import GenerateRequest, ScoreRequest
from dpkd_offline.engines.transformers import TransformersEngine
from dpkd_offline.models.batch import PromptAndResponse, pair_batch
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model, save_student
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.student import Student

VOCABULARY = 400
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HEADS = {"head_dim": 16}
GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
WINDOW = {"sliding_window": 16}
STATE = {"state_size": 8, "num_hidden_layers": 3, "hidden_size": 64}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**HEADS, **EXPERTS, **WINDOW, "num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "biogpt": {},
    "bloom": {"n_layer": 3, "n_head": 4, "hidden_size": 64},
    "codegen": {**GPT, "rotary_dim": 8},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, **WINDOW, "head_dim": 16},
    "ctrl": {"n_embd": 64, "n_layer": 3, "n_head": 4, "dff": 96, "n_positions": 256},
    "deepseek_v2": {**ROUTED, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**ROUTED, **LATENT},
    "diffllama": {},
    "dots1": ROUTED,
    "ernie4_5": HEADS,
    "exaone4": {**WINDOW, "sliding_window_pattern": 2},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon_h1": {**MAMBA, **HEADS, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "key_multiplier": 0.7},
    "falcon_mamba": STATE,
    "gemma": HEADS,
    "gemma2": {**HEADS, **WINDOW, "query_pre_attn_scalar": 16, "final_logit_softcapping": 10.0},
    "gemma3_text": {
        **HEADS,
        **WINDOW,
        "query_pre_attn_scalar": 16,
        "sliding_window_pattern": 2,
        "eos_token_id": [1, 106],
    },
    "gemma3": {
        "text_config": {**SHAPE, **HEADS, **WINDOW, "vocab_size": VOCABULARY, "sliding_window_pattern": 2},
        "vision_config": {**SHAPE, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        "image_token_index": 399,
        "mm_tokens_per_image": 4,
    },
    "glm": HEADS,
    "glm4": HEADS,
    "glm4_moe": {**ROUTED, **HEADS},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {},
    "gpt_oss": {**HEADS, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {**EXPERTS, "logits_scaling": 4.0},
    "granitemoehybrid": {
        **MAMBA,
        **EXPERTS,
        "logits_scaling": 4.0,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "hyperclovax": {"logits_scaling": 0.5},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "lfm2": {"full_attn_idxs": [1, 3], "block_auto_adjust_ff_dim": False},
    "llama": {},
    "llama, dynamic positions": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "llama, long positions": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "llama4_text": {
        **HEADS,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 1, 1, 0],
        "interleave_moe_layer_step": 2,
    },
    "mamba": STATE,
    "mamba2": {**STATE, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minicpm3": LATENT,
    "minimax": {**EXPERTS, **HEADS, "block_size": 8},
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "modernbert-decoder": {"local_attention": 16, "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 1},
    "mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 256},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phimoe": EXPERTS,
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3": {**HEADS, "tie_word_embeddings": True},
    "qwen3_5_text": {**HEADS, **LINEAR, "full_attention_interval": 2},
    "qwen3_moe": {**EXPERTS, **HEADS},
    "qwen3_next": {**EXPERTS, **HEADS, **LINEAR, "shared_expert_intermediate_size": 48, "full_attention_interval": 2},
    "recurrent_gemma": {
        **HEADS,
        "lru_width": 64,
        "attention_window_size": 16,
        "logits_soft_cap": 10.0,
        "num_hidden_layers": 3,
    },
    "rwkv": {"attention_hidden_size": 64, "context_length": 256},
    "seed_oss": HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
    "vaultgemma": {**HEADS, **WINDOW, "query_pre_attn_scalar": 16, "final_logit_softcapping": 10.0},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4},
    "zamba2": {
        **MAMBA,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
        "adapter_rank": 8,
        "chunk_size": 8,
    },
}
# What is done to the last hidden states before the head, blocks that see their own end, positions that turn.
REFUSED = {"bert", "llama, long positions", "minimax", "modernbert-decoder"}
SHARING = {
    "deepseek_v3",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
}
TRAINING = TrainConfig(dataset=Path("dataset"), student="student", output=Path("output"), dtype="float32")
OWN_SHAPE = {"n_embd", "n_layer", "d_model", "num_layers"}  # of families that call their sizes otherwise


@dataclass(frozen=True)
class Outcome:
    """What a family gives, in nats a token: how far each lies from one plain float32 forward pass per sequence."""

    shared: bool
    scores: float
    samples: float
    saved: float  # by the student as it is saved and loaded again


def build(family: str, folder: Path) -> None:
    settings = FAMILIES[family]
    shape = {} if OWN_SHAPE & set(settings) else SHAPE
    ids = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.partition(",")[0], **(shape | ids | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "conv1d" not in name:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
        for name in model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
            buffer = model.get_buffer(name)
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) * 2 + 0.3)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


@cache
def _tokenizer() -> Any:
    return build_tokenizer(chat=False)


@torch.no_grad()
def plain(model: PreTrainedModel, items: list[PromptAndResponse]) -> list[list[float]]:
    found = []
    for prompt, response in items:
        logps = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
        found.append([logps[len(prompt) - 1 + n, token].item() for n, token in enumerate(response)])
    return found


def gap(expected: list[list[float]], actual: list[list[float]]) -> float:
    pairs = zip(expected, actual, strict=True)
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def outcome(family: str, root: Path) -> Outcome:
    """Raises UnavailableError for a family that is refused, as it is before anything is sampled."""
    folder, out = root / "model", root / "out"
    build(family, folder)
    info = ModelInfo(str(folder))
    ids = torch.randint(5, VOCABULARY, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [ids[:40], ids[40:45], ids[45:68], ids[68:73]]
    engine = TransformersEngine(info, ModelOptions(engine="transformers", dtype="float32", batch_size=4))
    requests = [GenerateRequest((0, n), prompt, seed=n) for n, prompt in enumerate(prompts)]
    sampled = dict(engine.generate([requests], SamplingOptions(max_new_tokens=12)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    items = [(prompt, sampled[0, n].response_ids) for n, prompt in enumerate(prompts)]
    samples = gap(plain(model, items), [sampled[0, n].logps for n in range(len(prompts))])

    both = [(prompt, [response, ids[100 + n : 130 + 3 * n]]) for n, (prompt, response) in enumerate(items)]
    each = [(prompt, response) for prompt, responses in both for response in responses]
    expected = plain(model, each)
    scored = dict(engine.score([[ScoreRequest((0, n), x, ys) for n, (x, ys) in enumerate(both)]]))
    scores = gap(expected, [score.logps for n in range(len(both)) for score in scored[0, n]])

    student = Student(load_model(str(folder), "float32"))
    batch = pair_batch(both, student.shares)
    logps, _ = student(batch, batch.targets[:, None])
    logps.sum().backward()
    scores = max(scores, gap(expected, [part.tolist() for part in logps[:, 0].split(batch.lengths.tolist())]))
    saved, weights = student.to_save(TRAINING, Processes())
    save_student(saved, info.tokenizer, out, "", weights)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    return Outcome(student.shares, scores, samples, gap(expected, plain(again, each)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_right_or_refused(family: str, tmp_path: Path) -> None:
    try:
        result = outcome(family, tmp_path)
    except UnavailableError as error:
        assert family in REFUSED and "\n" not in str(error)
        return
    assert family not in REFUSED
    assert result.shared or family not in SHARING
    assert max(result.scores, result.samples, result.saved) < 1e-3, result


def row(family: str) -> list[str]:
    """Of the table of families."""
    with TemporaryDirectory() as root:
        try:
            result = outcome(family, Path(root))
        except UnavailableError as error:
            return [family, f"refused: {str(error).partition(': ')[2]}", "", "", ""]
        gaps = [f"{number:.0e}" for number in (result.scores, result.samples, result.saved)]
        return [family, "yes" if result.shared else "no", *gaps]


if __name__ == "__main__":
    titles = ["family", "shares prompts", "gap of scores", "of sampling", "of the saved student"]
    print(markdown_table(titles, [row(family) for family in sys.argv[1:] or FAMILIES]))
