"""Run vLLM through generation, sleep, sync and wake beside a trainer of `tiny`; write observations as JSON.

torchrun --nproc_per_node 1 tests/device/engine_job.py FILE.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lead_fast.cli import load_config
from lead_fast.data.prompts import tokenize_prompts
from lead_fast.data.read import load_problems
from lead_fast.learner.model import load_tokenizer
from lead_fast.learner.optimizer import make_optimizer, update
from lead_fast.learner.packing import make_pack
from lead_fast.learner.policy import load_policy
from lead_fast.rollout.engine import Sampling, Work
from lead_fast.rollout.sync import canary, publish
from lead_fast.rollout.vllm_engine import VllmEngine
from lead_fast.runtime.ranks import start, stop


def main() -> None:
    ranks = start()
    c = load_config(["--data.instruction=", "--data.max_prompt_tokens=128", "--rollout.max_tokens=64",
                     "--rollout.engine=vllm", "--rollout.batch_size=8", "--rollout.gpu_memory=0.3",
                     "--optim.lr=3e-3"])  # fmt: skip
    tokenizer = load_tokenizer(c.model)
    problems = load_problems("arithmetic:test?n=8&seed=5", split="test")
    _, prompts = tokenize_prompts(problems, tokenizer, instruction="", max_prompt_tokens=128)
    policy = load_policy(c.model, c.parallel, ranks)
    optimizer = make_optimizer(policy, c.optim)

    def used() -> int:
        """Bytes of the GPU in use by all processes; 0 on a CPU."""
        if ranks.device.type == "cpu":
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def addresses() -> list[int]:
        return engine.llm.apply_model(lambda model: [p.data_ptr() for p in model.parameters()])[0]

    def generate() -> list[list[int]]:
        groups = engine.generate(Work(prompts, 2, list(range(len(prompts)))), Sampling(32, 0.0))
        return [r.token_ids for i in sorted(groups) for r in groups[i]]

    def optimiser_step() -> None:
        pack = make_pack(range(4), prompts[:4], [[5 + i, 9, 30, 7] for i in range(4)], None, ranks.device)

        def loss(h: torch.Tensor, head: Any) -> torch.Tensor:
            return -(h @ head.weight.T).float().log_softmax(-1).gather(1, pack.targets_R[:, None]).mean()

        policy(pack, loss).backward()
        assert update(policy, optimizer, c.optim.lr, 1.0) > 0

    out: dict[str, Any] = {"device": ranks.device.type, "trainer_bytes": used()}
    engine = VllmEngine(c, tokenizer, ranks)
    out["sync"] = publish(policy, engine, 0, c, ranks)
    out["canary"] = canary(policy, engine, prompts[0], c, ranks)
    before, at = generate(), addresses()
    out["awake_bytes"], began = used(), time.perf_counter()
    engine.sleep()
    out["sleep_s"], out["asleep_bytes"] = time.perf_counter() - began, used()

    stages: list[tuple[Any, int]] = []
    wake_up = engine.llm.wake_up

    def watched(tags: Any = None) -> Any:
        result = wake_up(tags=tags)
        stages.append((tags, used()))
        return result

    engine.llm.wake_up = watched
    optimiser_step()
    out["sync_and_wake"] = publish(policy, engine, 1, c, ranks)
    engine.wake()
    out["stages"], out["in_place"] = stages, addresses() == at
    out["canary_again"] = canary(policy, engine, prompts[0], c, ranks)
    out["moved"] = generate() != before
    optimiser_step()
    try:
        canary(policy, engine, prompts[0], c, ranks)
    except ValueError as e:
        out["stale"] = str(e)
    Path(sys.argv[1]).write_text(json.dumps(out))
    stop()


if __name__ == "__main__":
    main()
