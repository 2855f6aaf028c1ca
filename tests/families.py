"""Model families at a small random size: how each is handled, and the table in docs/models.md.

    python tests/families.py > docs/models.md

A family is a model type of transformers with the configuration entries that matter. For a family that is supported,
packed log-probs, loss and gradients must equal those of transformers on each sequence alone.
"""

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lead_fast.config import ModelConfig
from lead_fast.learner.model_check import CPU, alone, check_model, pack_of, packed, quiet, randomize, sequences_of
from lead_fast.learner.packing import make_pack
from lead_fast.learner.policy import Policy
from lead_fast.sft import pack_loss

BASE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model type with the configuration entries that matter, on top of BASE.

    refused: words of the message with which it is refused; empty if it is supported.
    quick: tested in the default run.
    """

    model_type: str
    more: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    quick: bool = False

    def config(self) -> PretrainedConfig:
        with quiet():
            return AutoConfig.for_model(self.model_type, **(BASE | self.more))


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8, "factor": 4.0}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = ["sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 16, "layer_types": SLIDING, "head_dim": 16}
GEMMA2 = WINDOW | {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
          "head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
DEEPSEEK = LATENT | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                     "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1}
BLOCKS = "blocks or its head are not in"
LEAKS = "mix the sequences of a pack"
BOUNDS = "does not pass the bounds of packed sequences"

FAMILIES = {
    "llama": Family("llama"),
    "llama, tied head": Family("llama", {"tie_word_embeddings": True}),
    "llama, biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, yarn": Family("llama", {"rope_parameters": YARN}),
    "llama, dynamic rope": Family("llama", {"rope_parameters": DYNAMIC}, "rope_parameters = dynamic"),
    "qwen2": Family("qwen2", quick=True),
    "qwen2, window": Family("qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": SLIDING}),
    "qwen2_moe": Family("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3": Family("qwen3", {"head_dim": 16}),
    "qwen3_moe": Family("qwen3_moe", EXPERTS | {"head_dim": 16}),
    "mistral": Family("mistral", {"head_dim": 16, "sliding_window": None}),
    "mistral, window": Family("mistral", {"head_dim": 16, "sliding_window": 16}, quick=True),
    "ministral": Family("ministral", {"head_dim": 16, "sliding_window": 16}),
    "mixtral": Family("mixtral", LOCAL),
    "gemma": Family("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": Family("gemma2", GEMMA2, quick=True),
    "gemma2, final cap": Family(
        "gemma2", GEMMA2 | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": None, "sliding_window": 4096}
    ),
    "gemma2, attention cap": Family(
        "gemma2", GEMMA2 | {"final_logit_softcapping": None, "attn_logit_softcapping": 2.0, "sliding_window": 4096}
    ),
    "gemma3_text": Family("gemma3_text", GEMMA2),
    "vaultgemma": Family("vaultgemma", GEMMA2),
    "phi": Family("phi", quick=True),
    "phi3": Family("phi3", {"sliding_window": None}),
    "phi3, window": Family("phi3", {"sliding_window": 16}),
    "phi3, longrope": Family(
        "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16, "sliding_window": None}, "longrope"
    ),
    "phimoe": Family("phimoe", LOCAL),
    "olmo": Family("olmo"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3", {"sliding_window": 16, "layer_types": SLIDING}),
    "olmoe": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": Family("smollm3"),
    "glm": Family("glm", {"head_dim": 16}),
    "glm4": Family("glm4", {"head_dim": 16}),
    "helium": Family("helium", {"head_dim": 16}),
    "seed_oss": Family("seed_oss", {"head_dim": 16}),
    "starcoder2": Family("starcoder2"),
    "arcee": Family("arcee"),
    "apertus": Family("apertus"),
    "ernie4_5": Family("ernie4_5", {"head_dim": 16}),
    "exaone4": Family("exaone4", {"sliding_window": 16, "layer_types": SLIDING}),
    "nanochat": Family("nanochat"),
    "persimmon": Family("persimmon"),
    "diffllama": Family("diffllama"),
    "granite": Family("granite", {"logits_scaling": 8.0, "embedding_multiplier": 4.0, "residual_multiplier": 0.5,
                                  "attention_multiplier": 0.1}, quick=True),  # fmt: skip
    "granitemoe": Family("granitemoe", LOCAL | {"logits_scaling": 8.0, "attention_multiplier": 0.1}),
    "granite_swa, sinks": Family("granite_swa", {"sliding_window": 16, "layer_types": SLIDING}),
    "hyperclovax": Family("hyperclovax", {"logits_scaling": 0.25}),
    "minicpm3": Family("minicpm3", LATENT | {"dim_model_base": 16}),
    "cohere": Family("cohere", {"logit_scale": 0.0625, "tie_word_embeddings": True}, quick=True),
    "cohere2": Family("cohere2", WINDOW | {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "gpt_oss, sinks": Family("gpt_oss", WINDOW | LOCAL, quick=True),
    "deepseek_v3": Family("deepseek_v3", DEEPSEEK),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}, f"{LEAKS}.*layer_types has conv", quick=True),
    "granitemoehybrid": Family("granitemoehybrid", MAMBA | LOCAL | {"layer_types": ["mamba", "attention"],
                               "shared_intermediate_size": 64}, f"{LEAKS}.*layer_types"),  # fmt: skip
    "bamba": Family("bamba", MAMBA | {"attn_layer_indices": [1]}, LEAKS),
    "jamba": Family("jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
                    LEAKS),  # fmt: skip
    "falcon_h1": Family("falcon_h1", MAMBA | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5}, LEAKS),
    "qwen3_next": Family("qwen3_next", EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 32,
                         "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                         "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
                         f"{LEAKS}.*layer_types has linear_attention"),  # fmt: skip
    "recurrent_gemma": Family("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 64}, LEAKS),
    "llama4_text": Family("llama4_text", {"attention_chunk_size": 16, "head_dim": 16, "num_local_experts": 2,
                          "intermediate_size_mlp": 64}, "attention is computed differently"),  # fmt: skip
    "deepseek_v32": Family("deepseek_v32", DEEPSEEK, "cannot run on packed sequences"),
    "nemotron": Family("nemotron", {}, BOUNDS, quick=True),
    "stablelm": Family("stablelm", {}, BOUNDS),
    "gpt2": Family("gpt2", {}, BLOCKS, quick=True),
    "gpt_neox": Family("gpt_neox", {}, BLOCKS),
    "bloom": Family("bloom", {}, BLOCKS),
    "falcon": Family("falcon", {}, BLOCKS),
    "opt": Family("opt", {}, BLOCKS),
    "mamba": Family("mamba", {}, BLOCKS),
}  # fmt: skip


def check(family: Family) -> str:
    """Return the message with which a run refuses the family; empty if it does not."""
    try:
        check_model(family.config(), ModelConfig(path="DIR"), CPU, None)
    except ValueError as e:
        return str(e)
    return ""


def errors(family: Family) -> dict[str, float]:
    """Compute the largest difference of log-probs (nats), and relative differences of SFT's loss and gradient."""
    with quiet():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            family.config(), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        randomize(model, 0)
        sequences = sequences_of(0)
        targets = sum(len(s) - 1 for s in sequences)
        logprobs, loss = alone(model, sequences), torch.zeros(())
        for s in sequences:
            ids = torch.tensor([s])
            logits = model(ids, use_cache=False).logits[0, :-1]
            loss = loss + F.cross_entropy(logits, ids[0, 1:], reduction="sum") / targets
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        policy = Policy(model)
        ours = pack_loss(policy, pack_of(sequences), targets)
        ours.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert grads.keys() == expected.keys(), grads.keys() ^ expected.keys()
        size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
        off = sum(float((grads[n] - g).square().sum()) for n, g in expected.items()) ** 0.5
        prompts, tails = [sequences[0][:20]] * 3, [s[20:] for s in (*sequences[1::2], sequences[0])]
        each = []
        for shared in (False, True):
            model.zero_grad(set_to_none=True)
            pack_loss(policy, make_pack(range(3), prompts, tails, None, CPU, shared=shared), targets).backward()
            each.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return {
            "prompt once or three times": float((each[0] - each[1]).norm() / each[0].norm()),
            "log-probs": float((packed(policy, sequences) - logprobs).abs().max()),
            "loss": abs(ours.item() - loss.item()) / abs(loss.item()),
            "gradient": off / size,
        }


HEADER = """# Which models train

The trainer computes a model as transformers does, up to rounding, or refuses it with one sentence before its weights are loaded. Every run checks this on a small random copy of the model: it compares the trainer on packed sequences with transformers on each sequence alone (`learner/model_check.py`). A model that is not in the table below is checked in the same way. If no small copy of a model can be made, `--model.unchecked` trains it without the check.

Every family may have a bias of the head, scales and soft caps of the logits (`learner/head.py`), sliding windows per layer, and a scale of attention. On a GPU in bfloat16, soft-capped attention needs flash-attn; on a GPU, attention sinks need `--model.dtype=float32`.

This page is generated by `python tests/families.py`, with random weights in float32. The columns show the largest difference of a log-prob from that of transformers, in nats, and the relative differences of SFT's loss and gradient.

| family | outcome | log-probs | loss | gradient | why refused |
|---|---|---|---|---|---|"""  # noqa: E501


def main() -> None:
    warnings.filterwarnings("ignore")
    print(HEADER)
    for name, family in FAMILIES.items():
        if sentence := check(family):
            print(f"| {name} | refused | | | | {sentence.partition(' (DIR) ')[2].partition('; give ')[0]} |")
        else:
            e = errors(family)
            print(f"| {name} | applied | {e['log-probs']:.0e} | {e['loss']:.0e} | {e['gradient']:.0e} | |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
