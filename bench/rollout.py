"""Compare both rollout engines in tokens per second, weight sync with a bare memcpy, and four ways of sharing work.

python bench/rollout.py                 all three parts; speed and sync under torchrun on two ranks
python bench/rollout.py --part idle     only the simulation, which takes seconds

speed   the embedded model and its own responses, of different lengths: both engines on the same prompts, interleaved
sync    a random model of --hidden x --layers: FSDP shards to vLLM, against a copy of as many bytes in the same run
idle    simulated: 8 ranks decode responses of log-normal length, up to 14k tokens. A decode step of a rank
        with b running responses takes 6.2 + 0.29 b ms: the weights of a 14B model in bf16 and b caches of 7,000 tokens
        (48 layers, 8 key-value heads of 128), read at 4.8 TB/s. Idle share: 1 - mean / max of the ranks' times.
"""

import argparse
import heapq
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RANKS, TAIL = 8, 14336


# ----------------------------------------------------------------------------------------------------------- idle share


def step_ms(running: int) -> float:
    return 6.2 + 0.29 * running


class Rank:
    """Clock of one engine: its responses run in parallel, one token per step each, until they reach their lengths."""

    def __init__(self) -> None:
        self.ms, self.steps = 0.0, 0
        self.ends: list[tuple[int, int]] = []  # heap of (step at which a running response ends, its group)

    def add(self, group: int, lengths: list[int]) -> None:
        for n in lengths:
            heapq.heappush(self.ends, (self.steps + n, group))

    def next_end(self) -> float:
        """Return the time at which the next response ends, ms."""
        return self.ms + (self.ends[0][0] - self.steps) * step_ms(len(self.ends))

    def advance(self) -> int:
        """Advance to the end of the next response; return its group."""
        self.ms = self.next_end()
        self.steps, group = heapq.heappop(self.ends)
        return group

    def left(self, ms: float) -> list[tuple[int, int]]:
        """Responses that run at a time before the next end, as (group, tokens left)."""
        steps = self.steps + int((ms - self.ms) / step_ms(len(self.ends))) if self.ends else 0
        return [(group, max(1, end - steps)) for end, group in self.ends]


def simulate(groups: list[list[int]], capacity: int, policy: str, want: int) -> tuple[list[float], list[list[int]]]:
    """Return milliseconds per rank, and the tokens left in the groups that were cut off. Policies:

    lock step       each rank has its own prompts, and starts the next full batch when the last response has ended
    fixed shares    each rank has its own prompts, and starts the next as soon as it has room
    shared counter  each rank takes the next of all prompts as soon as it has room (lead_fast.rollout)
    early cut       the same, but all stop once `want` groups are complete (rollout.extra_problems)
    """
    ranks = [Rank() for _ in range(RANKS)]
    n = max(map(len, groups))
    room = max(n, min(capacity, -(-len(groups) // RANKS) * n))
    every = list(enumerate(groups))
    shared = policy in ("shared counter", "early cut")
    queues = [every] * RANKS if shared else [every[r::RANKS] for r in range(RANKS)]
    to_come = [len(lengths) for lengths in groups]
    turn = ranks  # ranks that may have room: all at first, then the one whose response has just ended
    while True:
        for rank in turn:
            queue = queues[ranks.index(rank)]
            if policy != "lock step" or not rank.ends:
                while queue and len(rank.ends) + len(queue[0][1]) <= room:
                    rank.add(*queue.pop(0))
        busy = [rank for rank in ranks if rank.ends]
        if not busy:
            return [rank.ms for rank in ranks], []
        turn = [min(busy, key=Rank.next_end)]
        to_come[turn[0].advance()] -= 1
        if policy == "early cut" and to_come.count(0) == want:
            now = turn[0].ms
            cut: dict[int, list[int]] = dict(every)
            for rank in ranks:
                for group, tokens in rank.left(now):
                    cut.setdefault(group, []).append(tokens)
            return [now if rank.ends else rank.ms for rank in ranks], [cut[g] for g in sorted(cut)]


def idle(repeats: int, steps: int = 4) -> list[dict]:
    rows = []
    for problems, capacity in ((32, 32), (32, 16), (128, 64), (128, 16)):
        for policy in ("lock step", "fixed shares", "shared counter", "early cut"):
            shares, seconds = [], []
            asked = problems + problems // 4 if policy == "early cut" else problems
            for seed in range(repeats):
                rng = np.random.default_rng(seed)
                waiting: list[list[int]] = []
                for _ in range(steps):
                    hard = rng.normal(8.3, 0.5, (asked - len(waiting), 1))  # a hard problem's responses are all long
                    new = np.exp(rng.normal(hard, 0.5, (len(hard), 8))).clip(16, TAIL).astype(int).tolist()
                    ms, waiting = simulate(waiting + new, capacity, policy, problems)
                    shares.append(1 - statistics.mean(ms) / max(ms))
                    seconds.append(max(ms) / 1e3)
            rows.append({"problems": problems, "asked": asked, "batch_size": capacity, "policy": policy,
                         "runs": repeats, "steps": steps, "idle_share": statistics.mean(shares),
                         "seconds_per_step": statistics.mean(seconds)})  # fmt: skip
            print(
                f"{problems:4} problems x 8, {capacity:3} at once per rank   {policy:15}"
                f"   idle {100 * rows[-1]['idle_share']:5.1f} %   {rows[-1]['seconds_per_step']:7.1f} s per step",
                flush=True,
            )
    return rows


# ------------------------------------------------------------------------------------------------------ speed and sync


def speed(a: argparse.Namespace) -> list[dict]:
    """Measure tokens per second of both engines, on prompts of this rank alone so that ranks do not wait."""
    from lead_fast.cli import load_config
    from lead_fast.data.prompts import tokenize_prompts
    from lead_fast.data.read import load_problems
    from lead_fast.learner.model import load_tokenizer
    from lead_fast.rollout.engine import Sampling, Work
    from lead_fast.rollout.transformers_engine import TransformersEngine
    from lead_fast.rollout.vllm_engine import VllmEngine
    from lead_fast.runtime.ranks import start

    ranks = start()
    c = load_config(["--rollout.engine=vllm", f"--model={a.model}", f"--rollout.batch_size={a.batch}"])
    tokenizer = load_tokenizer(c.model)
    problems = load_problems(f"arithmetic:train?n={a.problems}&seed=7", split="train")
    _, prompts = tokenize_prompts(problems, tokenizer, instruction="", max_prompt_tokens=128)
    engines = {"transformers": TransformersEngine(c, tokenizer, ranks), "vllm": VllmEngine(c, tokenizer, ranks)}
    seen: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(a.repeats + 1):
        for name, engine in engines.items():
            ranks.barrier()
            began = time.perf_counter()
            groups = engine.generate(Work(prompts, 8, list(range(len(prompts)))), Sampling(128))
            tokens = sum(len(r.token_ids) for g in groups.values() for r in g)
            if repeat:  # the first warms up
                seen[name].append(tokens / (time.perf_counter() - began))
    ours = statistics.median(seen["transformers"])
    rows = []
    for name, values in seen.items():
        median = statistics.median(values)
        rows.append({"engine": name, "model": a.model, "dtype": c.model.dtype, "ranks": ranks.world,
                     "problems": len(prompts), "batch_size": a.batch, "tokens_per_s_per_rank": median,
                     "min": min(values), "max": max(values), "times_transformers": median / ours})  # fmt: skip
        if ranks.main:
            print(f"{name:13} {median:8.0f} tokens/s per rank ({min(values):.0f} to {max(values):.0f})"
                  f"   {median / ours:5.2f} x transformers", flush=True)  # fmt: skip
    return rows


def random_model(folder: Path, hidden: int, layers: int) -> None:
    """Make a Qwen2 with random weights and the embedded model's tokenizer; the first rank saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lead_fast.learner.model import EMBEDDED

    config = AutoConfig.from_pretrained(EMBEDDED["tiny"])
    config.update({"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
                   "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": 32768,
                   "layer_types": ["full_attention"] * layers})  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED["tiny"]).save_pretrained(folder)


def sync_times(a: argparse.Namespace) -> list[dict]:
    """Time sync by bucket size, interleaved with a copy, an all-gather and checksums of as many bytes."""
    from lead_fast.cli import load_config
    from lead_fast.learner.model import load_tokenizer
    from lead_fast.learner.policy import load_policy
    from lead_fast.learner.weights import all_gather
    from lead_fast.rollout.engine import fingerprint
    from lead_fast.rollout.sync import publish
    from lead_fast.rollout.vllm_engine import VllmEngine
    from lead_fast.runtime.ranks import start

    ranks = start()
    folder = Path(ranks.gather_objects(tempfile.mkdtemp() if ranks.main else None)[0])
    if ranks.main:
        random_model(folder, a.hidden, a.layers)
    ranks.barrier()
    base = ["--rollout.engine=vllm", f"--model={folder}", "--model.dtype=float32"]
    configs = {mib: load_config([*base, f"--rollout.sync_bucket_mib={mib}"]) for mib in (1, 64, 1024)}
    c = configs[1024]
    policy = load_policy(c.model, c.parallel, ranks)
    engine = VllmEngine(c, load_tokenizer(c.model), ranks)
    size = int(publish(policy, engine, 0, c, ranks)["sync_bytes"])
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    shard, gathered = torch.ones(size // 4 // ranks.world), torch.zeros(size // 4 // ranks.world * ranks.world)
    held = [torch.ones(size // 4 // 16) for _ in range(16)]
    bare = {
        "memcpy": lambda: target.copy_(source),
        "bare all-gather": lambda: all_gather(gathered, shard),
        "checksums of one side": lambda: fingerprint(held),
    }
    seen: dict[str, list[float]] = {
        **{name: [] for name in bare},
        **{f"sync, buckets of {mib} MiB": [] for mib in configs},
    }
    for _ in range(a.repeats):
        for name, call in bare.items():
            ranks.barrier()
            began = time.perf_counter()
            call()
            seen[name].append(time.perf_counter() - began)
        for mib, config in configs.items():
            ranks.barrier()
            seen[f"sync, buckets of {mib} MiB"].append(publish(policy, engine, 0, config, ranks)["sync_s"])
    floor = statistics.median(seen["memcpy"])
    rows = []
    for name, seconds in seen.items():
        median = statistics.median(seconds)
        rows.append({"what": name, "ranks": ranks.world, "bytes": size, "seconds": median, "min_s": min(seconds),
                     "max_s": max(seconds), "gb_per_s": size / median / 1e9,
                     "times_memcpy": median / floor})  # fmt: skip
        if ranks.main:
            print(f"{name:26} {1e3 * median:9.1f} ms for {size / 1e6:.0f} MB   {size / median / 1e9:6.2f} GB/s"
                  f"   {median / floor:5.1f} x memcpy", flush=True)  # fmt: skip
    return rows


PARTS = {"speed": speed, "sync": sync_times, "idle": lambda a: idle(20)}


def main() -> None:
    p = argparse.ArgumentParser(
        description="Compare rollout engines, weight sync with memcpy, and ways of sharing work."
    )
    p.add_argument(
        "--part", choices=list(PARTS), help="run only this part, in this process (under torchrun on several ranks)"
    )
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--model", default="tiny")
    p.add_argument("--problems", type=int, default=32)
    p.add_argument("--batch", type=int, default=128, help="responses in parallel")
    p.add_argument("--hidden", type=int, default=768)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "rollout-cpu.json")
    a = p.parse_args()
    if a.part:
        rows = PARTS[a.part](a)
        if path := os.environ.get("BENCH_ROWS"):
            if os.environ.get("RANK", "0") == "0":
                Path(path).write_text(json.dumps(rows))
        if a.part != "idle":
            from lead_fast.runtime.ranks import stop

            stop()
        return
    parts = {}
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "BENCH_ROWS": f"{folder}/rows.json", "OMP_NUM_THREADS": "1"}
            here = [str(Path(__file__).resolve()), "--part", part, *sys.argv[1:]]
            ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={a.ranks}"]
            subprocess.run([sys.executable, *(ranks if part != "idle" else []), *here], env=env, check=True)
            parts[part] = json.loads(Path(env["BENCH_ROWS"]).read_text())
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps({"device": f"{platform.machine()}, {os.cpu_count()} cores",
                                 "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                                 "command": "python bench/rollout.py " + " ".join(sys.argv[1:]), **parts},
                                indent=1))  # fmt: skip
    print(f"Written: {a.out}")


if __name__ == "__main__":
    main()
