"""Measure the memory of a training step with 25 million parameters on each rank, in every setting, for test_plan.py.

torchrun --nproc_per_node 2 tests/step_memory.py FILE.json
"""

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lead_fast.cli import load_config
from lead_fast.config import Config
from lead_fast.data.arithmetic import architecture
from lead_fast.learner.loss import Objective, policy_loss
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.packing import make_pack
from lead_fast.learner.policy import Policy, shard
from lead_fast.runtime.ranks import start, stop

LENGTHS = [400, 300, 200, 124]  # tokens of each sequence in a pack
WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1280, "num_attention_heads": 8,
                        "num_key_value_heads": 8, "max_position_embeddings": 16384}  # fmt: skip
SETTINGS = {"none, gathered once": ("none", "false"), "full, resharded": ("full", "true"),
            "selective, resharded": ("selective", "true")}  # fmt: skip


def shape(layers: int) -> Any:
    wide = architecture(8192)
    wide.update(WIDE | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers})
    return wide


def config(checkpointing: str = "full", reshard: str = "true", *args: str) -> Config:
    given = [f"--model.activation_checkpointing={checkpointing}", f"--parallel.reshard={reshard}"]
    return load_config(["--recipe=tiny", *given, *args])


def resident(field: str) -> int:
    """Read a field of this process's memory, in bytes."""
    return next(1024 * int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field + ":"))


def give_back() -> None:
    """Return the memory that malloc keeps to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    ranks = start()
    found = {}
    for name, setting in SETTINGS.items():
        c = config(*setting)
        model = AutoModelForCausalLM.from_config(shape(8), dtype=torch.float32)
        policy = shard(Policy(model), ranks, c.model, c.parallel)
        del model
        optimizer = make_optimizer(policy, c.optim)
        answers = [[7] * (n - 1) for n in LENGTHS]
        logprobs = [[-9.0] * len(a) for a in answers]
        pack = make_pack(range(len(LENGTHS)), [[5, 6]] * len(LENGTHS), answers, logprobs, ranks.device)
        assert pack.lengths == LENGTHS
        o = Objective(torch.ones(len(LENGTHS)), torch.full((len(LENGTHS),), 1e-3))
        for _step in range(2):
            give_back()
            Path("/proc/self/clear_refs").write_text("5")
            for _ in range(2):
                policy_loss(policy, pack, o, c).loss.backward()
            update(policy, optimizer, 1e-6, 1.0)
        top = resident("VmHWM")
        del policy, optimizer, pack, o
        give_back()
        found[name] = top - resident("VmRSS")
    if ranks.main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
