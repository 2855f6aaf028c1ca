"""The kernels beside what a user would write instead, on the same work, timed side by side in one run.

    python bench/kernels.py [--device cpu|cuda] [--rows 512] [--vocabulary 49152] [--hidden 576] [--gate] [--out FILE]

Work: GRPO's clipped loss against given old log-probs, with the gradient; results are checked equal before anything is
timed. Rivals: torch eager (head, log_softmax, gather, loss, autograd), the same under torch.compile where it compiles,
and the floor, three bare matrix products. Interleaved, cold caches (a buffer larger than the last-level cache is
written between calls), median and spread; every time is also given as a ratio to ours. --gate runs the kernels' tests
first.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lead_kernels import linear_policy_loss, policy_loss

ROOT = Path(__file__).resolve().parent.parent


def eager_loss(logits: torch.Tensor, targets, old, advantage_T, weight: float) -> torch.Tensor:
    logp = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    r = (logp - old).exp()
    return -(weight * torch.minimum(r * advantage_T, r.clamp(0.8, 1.2) * advantage_T)).sum()


def cases(a: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """For each operation, what to time: name -> a call that returns the gradients it made."""
    g = torch.Generator().manual_seed(0)
    T, V, D, S = a.rows, a.vocabulary, a.hidden, 8
    hidden = torch.randn(T, D, generator=g).to(a.device, dtype)
    head = (torch.randn(V, D, generator=g) / D**0.5).to(a.device, dtype)
    targets = torch.randint(V, (T,), generator=g).to(a.device)
    old = (-12 * torch.rand(T, generator=g)).to(a.device)
    advantages = torch.randn(S, generator=g).to(a.device)
    ids = (torch.arange(T) * S // T).to(a.device)
    logits = (hidden @ head.T).detach()
    weight, advantage_T = 1.0 / T, advantages[ids]
    ours = {"sequence_ids": ids, "weights": torch.full((S,), weight, device=a.device), "advantages": advantages,
            "old_logprobs": old}  # fmt: skip
    compiled = torch.compile(eager_loss)

    def on_logits(loss: Callable) -> Callable:
        def run() -> tuple[torch.Tensor, ...]:
            x = logits.detach().requires_grad_()
            loss(x).backward()
            assert x.grad is not None
            return (x.grad,)

        return run

    def on_hidden(loss: Callable) -> Callable:
        def run() -> tuple[torch.Tensor, ...]:
            h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
            loss(h, w).backward()
            assert h.grad is not None and w.grad is not None
            return h.grad, w.grad

        return run

    def three_products() -> tuple[torch.Tensor, ...]:
        z = hidden @ head.T
        return z @ head, z.T @ hidden

    return {
        "policy_loss": {
            "lead_kernels": on_logits(lambda x: policy_loss(x, targets, **ours).loss),
            "torch eager": on_logits(lambda x: eager_loss(x, targets, old, advantage_T, weight)),
            "torch.compile": on_logits(lambda x: compiled(x, targets, old, advantage_T, weight)),
        },
        "linear_policy_loss": {
            "lead_kernels": on_hidden(lambda h, w: linear_policy_loss(h, w, targets, **ours).loss),
            "torch eager": on_hidden(lambda h, w: eager_loss(h @ w.T, targets, old, advantage_T, weight)),
            "torch.compile": on_hidden(lambda h, w: compiled(h @ w.T, targets, old, advantage_T, weight)),
            "three bare products (floor)": three_products,
        },
    }


def measure(calls: dict[str, Callable], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every call, interleaved, each after the caches were overwritten."""
    flush = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            flush.add_(1)
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    p = argparse.ArgumentParser(description="The kernels beside what a user would write instead.")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--rows", type=int, help="T; 512 on a CPU, 8192 on a GPU")
    p.add_argument("--vocabulary", type=int, help="V; 49152 on a CPU, 152064 on a GPU")
    p.add_argument("--hidden", type=int, help="D; 576 on a CPU, 5120 on a GPU")
    p.add_argument("--dtypes", nargs="+", help="float32 bfloat16; a CPU's default is float32, a GPU's bfloat16")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--gate", action="store_true", help="run the kernels' tests first; no green test, no number")
    p.add_argument("--out", type=Path, default=None, help="JSON; bench/results/kernels-<device>.json")
    a = p.parse_args()
    cpu = a.device == "cpu"
    a.rows, a.vocabulary = a.rows or (512 if cpu else 8192), a.vocabulary or (49152 if cpu else 152064)
    a.hidden, a.dtypes = a.hidden or (576 if cpu else 5120), a.dtypes or (["float32"] if cpu else ["bfloat16"])
    if a.gate:
        subprocess.run([sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "test_kernels.py")], check=True)
    rows = []
    for name in a.dtypes:
        dtype = getattr(torch, name)
        for operation, calls in cases(a, dtype).items():
            usable: dict[str, Callable] = {}
            expected = None
            for rival, call in calls.items():
                try:
                    got = call()
                except Exception as e:  # a rival that cannot do the work is listed as such
                    print(f"{operation} {name}: {rival} cannot run here ({type(e).__name__})")
                    continue
                expected = expected or got
                if "floor" not in rival:
                    for x, y in zip(expected, got, strict=True):
                        difference = ((x.float() - y.float()).norm() / x.float().norm()).item()
                        assert difference < 2e-2, f"{rival} computes something else: {difference}"
                usable[rival] = call
            times = measure(usable, a.repeats, a.device)
            mine = statistics.median(times["lead_kernels"])
            for rival, ms in times.items():
                median = statistics.median(ms)
                rows.append({"operation": operation, "dtype": name, "rows": a.rows, "vocabulary": a.vocabulary,
                             "hidden": a.hidden, "implementation": rival, "median_ms": median, "min_ms": min(ms),
                             "max_ms": max(ms), "times_ours": median / mine})  # fmt: skip
                print(f"{operation:20} {name:9} {rival:28} {median:9.1f} ms ({min(ms):.1f} to {max(ms):.1f})"
                      f"   {median / mine:5.2f} x ours", flush=True)  # fmt: skip
    device = torch.cuda.get_device_name() if not cpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    out = a.out or ROOT / "bench" / "results" / f"kernels-{a.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": device, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                               "capability": torch.backends.cpu.get_cpu_capability(),
                               "command": "python bench/kernels.py " + " ".join(sys.argv[1:]), "rows": rows},
                              indent=1))  # fmt: skip
    print(f"Written: {out}")


if __name__ == "__main__":
    main()
