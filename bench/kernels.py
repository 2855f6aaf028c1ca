"""Compare the kernels with the alternatives that a user would pick, on the same work, in one run.

    python bench/kernels.py [--device cpu|cuda] [--rows 1024] [--vocabulary 49152] [--hidden 576] [--gate] ...

The work is GRPO's clipped loss of T response tokens against given old log-probs: `policy_loss` from logits,
`linear_policy_loss` from hidden states and the head, both with gradients, and `linear_logprobs`, forward only. Further
cases have an entropy gradient, a soft cap, or the logits of a real model (SmolLM2's, at responses that it sampled; left
out, with a line that says so, if its weights are missing). `linear_cross_entropy` has ratios and advantages of 1, for
rivals that return only a mean. rivals.py says how each is called and what it lacks.

It prints a table per case: time of each implementation, as a multiple of ours and as a share of the floor, extra memory
above the inputs, and errors against float64 (log-probs: root mean square in nats; gradients: relative to their norm).
Calls are interleaved, with cold caches. An implementation whose gradient is off by more than rounding is not timed. The
floors are measured in the same run: bare matrix products of the same shapes, and a copy of the logits (one read and one
write). The last case is `linear_policy_loss` over several T, with a picture. On two CPU cores it takes at most five
minutes; after --seconds no further table is started.

Rivals, where installed: torch eager, torch.compile, torch's chunked linear_cross_entropy, Liger, TRL,
cut-cross-entropy, quack, verl. A rival that does not run here gets one line that says why. --gate runs the kernels'
tests first and stops if one fails.

Legend: T rows, V vocabulary, D hidden, S sequences.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Call, Cannot, extra_bytes, interleaved, machine, summary, write_json
from responses import sampled
from rivals import (
    ADVANTAGES,
    COPY,
    FLOOR,
    LOGPROBS,
    ON_CROSS_ENTROPY,
    ON_HIDDEN,
    ON_LOGITS,
    ONE_PRODUCT,
    OURS,
    THREE_PRODUCTS,
    Floor,
    Result,
    Rival,
    Work,
    checked,
    imported,
    inputs_of,
    sparse_rivals,
)

from lead_kernels import lead_advantages, linear_logprobs

ROOT = Path(__file__).resolve().parent.parent
SWEEP = (OURS, "torch eager", "Liger fused", FLOOR)
NOT_COMPILED = tuple(r.name for r in ON_HIDDEN if r.name != "torch.compile") + (FLOOR,)
SECOND_DTYPE = (OURS, "torch eager", "torch.compile", "TRL", "cut", FLOOR)
REAL = (OURS, "torch eager", FLOOR)  # for real logits, besides the sparse rivals


def our_logprobs(w: Work, load: Any) -> Any:
    def score(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp = linear_logprobs(h, head, w.targets, temperature=w.temperature, softcap=w.softcap)[0]
        return logp, logp

    return score


@dataclass(frozen=True)
class Operation:
    rivals: tuple[Rival, ...]
    floors: tuple[Floor, ...]  # shares refer to the first one
    from_hidden: bool
    gradients: bool = True


OPERATIONS = {
    "policy_loss": Operation(ON_LOGITS, (COPY,), False),
    "fused_advantages": Operation(ADVANTAGES, (), False),
    "linear_policy_loss": Operation(ON_HIDDEN, (THREE_PRODUCTS,), True),
    "linear_cross_entropy": Operation(ON_CROSS_ENTROPY, (THREE_PRODUCTS,), True),
    "linear_logprobs": Operation((Rival(OURS, our_logprobs), *ON_HIDDEN[1:]), (ONE_PRODUCT,), True, False),
}
OF_THE_HEAD = [name for name, operation in OPERATIONS.items() if operation.from_hidden]


def call_of(w: Work, operation: Operation, rival: Rival) -> Call:
    """Make a call that computes the loss and its gradients and returns a Result."""
    score, originals = rival.make(w, imported), inputs_of(w, rival, operation.from_hidden)
    work = tuple(x.clone() for x in originals) if rival.overwrites else originals

    def forward() -> Result:
        with torch.no_grad():
            return Result(score(*work)[1], ())

    def both() -> Result:
        leaves = [x.detach().requires_grad_(i == 0 or not rival.frozen) for i, x in enumerate(work)]
        loss, logp = score(*leaves)
        loss.backward()
        gradients = [x.grad for x in leaves if x.requires_grad]
        if rival.padded:
            gradients = [g[:, :-1].flatten(0, 1) for g in gradients if g is not None]
        assert all(g is not None for g in gradients)
        return Result(logp, tuple(gradients))  # type: ignore[arg-type]

    run = both if operation.gradients else forward
    if rival.overwrites:
        run.prepare = lambda: [x.copy_(y) for x, y in zip(work, originals, strict=True)]  # type: ignore[attr-defined]
    return run


def errors(got: Result, exact: Result) -> dict[str, float | None]:
    """Errors of a result: of log-probs, root mean square in nats; of gradients, the largest relative to their norm."""
    logp = None
    if got.logp is not None and exact.logp is not None:
        logp = (got.logp.double() - exact.logp).square().mean().sqrt().item()
    pairs = list(zip(got.gradients, exact.gradients, strict=False))  # a frozen head has no gradient
    return {"logp_error": logp, "gradient_error": max((relative(x, y) for x, y in pairs), default=None)}


def relative(x: torch.Tensor, exact: torch.Tensor, rows: int = 256) -> float:
    squares = [(a.double() - b).square().sum() for a, b in zip(x.split(rows), exact.split(rows), strict=True)]
    return (torch.stack(squares).sum().sqrt() / exact.norm()).item()


@dataclass
class Table:
    """Measurement of an operation on a Work: rivals that run here, and in `left_out` a sentence for each other."""

    operation: str
    w: Work
    calls: dict[str, Call] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float | None]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, name: str, why: str) -> None:
        self.left_out.append(f"{name}: {why}")
        print(f"  {self.left_out[-1]}", flush=True)

    def prepare(self, only: tuple[str, ...] = (), extra: Sequence[Rival] = ()) -> None:
        """Call every rival once and keep those whose results are right."""
        o = OPERATIONS[self.operation]
        exact: Result | None = None
        torch.compiler.reset()  # compiles each shape separately, not with dynamic shapes
        for rival in (*o.rivals[:1], *extra, *o.rivals[1:]):
            if only and not rival.name.startswith(only):
                continue
            if missing := (self.w.needs | ({LOGPROBS} if not o.gradients else set())) & set(rival.lacks):
                self.leave_out(rival.name, f"has no {', '.join(sorted(missing))}")
                continue
            try:
                if rival.needs_gpu and self.w.device == "cpu":
                    imported_or_not = imported_reason(rival, o.from_hidden)
                    raise Cannot(imported_or_not or "its kernels need a GPU")
                call = call_of(self.w, o, rival)
                got = call()
            except Cannot as e:
                fits = checked(rival, o.from_hidden)
                self.leave_out(rival.name, "; ".join(filter(None, [f"not measured, {e}", fits])))
                continue
            except Exception as e:  # whatever a rival raises on this machine is listed as the reason
                if rival.name.startswith(OURS):
                    raise
                reason = next(iter(str(e).splitlines()), "")[:90]
                self.leave_out(rival.name, f"cannot do this here ({type(e).__name__}: {reason})")
                continue
            exact = exact or self.w.exact(o.from_hidden)
            off = errors(got, exact)
            del got
            limit = 1e-3 if self.w.dtype == torch.float32 else 3e-2
            if (off["gradient_error"] or 0) > limit and not rival.approximate:
                assert not rival.name.startswith(OURS), f"{rival.name} is off by {off['gradient_error']:.1e}"
                self.leave_out(rival.name, f"not measured, its gradient is off by {100 * off['gradient_error']:.1f} %")  # type: ignore[operator]
                continue
            self.calls[rival.name], self.accuracy[rival.name] = call, off
            self.without[rival.name] = rival.without
        for floor in o.floors:
            self.calls[floor.name] = floor.make(self.w)

    def measure(self, repeats: int, seconds: float = 40.0) -> list[dict[str, Any]]:
        """Time everything that was prepared: at least two turns, then more until about `seconds` are used up."""
        w, o = self.w, OPERATIONS[self.operation]
        times = interleaved(self.calls, repeats, w.device, seconds / len(self.calls))
        T, (V, D) = len(w.targets), w.head.shape
        medians = {name: summary(ms)["median_ms"] for name, ms in times.items()}
        floor_ms = next(ms for name, ms in medians.items() if name.startswith(FLOOR))
        rows = []
        for name, ms in times.items():
            row = {"operation": self.operation, "dtype": str(w.dtype).removeprefix("torch."), "T": T, "V": V, "D": D,
                   "data": w.data, "temperature": w.temperature, "softcap": w.softcap, "entropy_coef": w.entropy_coef,
                   "implementation": name, **summary(ms), "times_ours": medians[name] / medians[OURS],
                   "share_of_floor": floor_ms / medians[name], **self.accuracy.get(name, {}),
                   "extra_bytes": extra_bytes(self.calls[name], w.device),
                   "without": self.without.get(name, "")}  # fmt: skip
            for floor in o.floors:
                if floor.name == name:
                    row |= {"floor_work": floor.work(w), "floor_unit": floor.unit}
            rows.append(row)
        return rows


def imported_reason(rival: Rival, from_hidden: bool) -> str:
    """Why a rival that needs a GPU cannot even be imported here, or ""."""
    try:
        rival.make(Work.make("cpu", torch.float32, 16, 32, 8), imported)
    except Cannot as e:
        return str(e)
    return ""


def measure(operation: str, w: Work, repeats: int, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Measure an operation and return the rows of its table without printing it."""
    t = Table(operation, w)
    t.prepare(only)
    return t.measure(repeats)


def text(rows: list[dict[str, Any]]) -> str:
    """Format rows as a table, with the work of the floor and the rate that it reached."""
    lines = [f"{'':34} {'median ms':>10} {'(min to max)':>18} {'x ours':>7} {'of floor':>8} {'MiB':>6} {'log-prob':>8} "
             f"{'gradient':>8}  without"]  # fmt: skip
    for r in rows:
        extra = "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:.0f}"
        spread = f"({r['min_ms']:.1f} to {r['max_ms']:.1f})"
        off = [f"{r[k]:.1e}" if r.get(k) is not None else "-" for k in ("logp_error", "gradient_error")]
        lines.append(f"{r['implementation']:34} {r['median_ms']:10.1f} {spread:>18} {r['times_ours']:7.2f} "
                     f"{100 * r['share_of_floor']:7.0f}% {extra:>6} {off[0]:>8} {off[1]:>8}  "
                     f"{r['without']}")  # fmt: skip
        if work := r.get("floor_work"):
            unit = r["floor_unit"]
            lines.append(f"{'':34} {work / 1e9:.1f} G{unit}, {work / r['median_ms'] / 1e6:.0f} G{unit}/s")
    return "\n".join(line.rstrip() for line in lines)


def picture(rows: list[dict[str, Any]], sweep: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw times of linear_policy_loss as multiples of its floor (left) and extra memory over T (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(1.5, 1))
    rows = sorted(rows, key=lambda r: -r["median_ms"])
    ratios = [1 / r["share_of_floor"] for r in rows]
    colors = ["gray" if r["implementation"].startswith(FLOOR) else "black" if r["implementation"] == OURS else "C0"
              for r in rows]  # fmt: skip
    labels = [r["implementation"].removeprefix(FLOOR) for r in rows]
    left.barh(labels, ratios, color=colors)
    shown = min(max(ratios), 4.0) * 1.12
    for i, ratio in enumerate(ratios):
        beyond = ratio > shown
        left.text(min(ratio, shown) - (0.06 if beyond else -0.02), i, f"{ratio:.2f}", va="center", fontsize=9,
                  ha="right" if beyond else "left", color="white" if beyond else "black")  # fmt: skip
    left.axvline(1, color="gray", linewidth=0.8, linestyle="--")
    left.set(xlim=(0, shown), xlabel=f"time, in three bare products (T {rows[0]['T']})")
    for name in dict.fromkeys(r["implementation"] for r in sweep):
        points = sorted((r for r in sweep if r["implementation"] == name), key=lambda r: r["T"])
        if name.startswith(FLOOR) or any(r["extra_bytes"] is None for r in points):
            continue
        style = {"linewidth": 2.5, "color": "black"} if name == OURS else {"linewidth": 1.4}
        right.plot([r["T"] for r in points], [r["extra_bytes"] / 2**20 for r in points], marker="o", label=name,
                   **style)  # fmt: skip
    right.set(xlabel="T, response tokens", ylabel="extra memory, MiB", ylim=(0, None), xlim=(0, None))
    right.grid(alpha=0.3)
    right.legend(fontsize=9)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Written: {path}")


@dataclass
class Plan:
    """Tables in order of importance, within a time limit."""

    limit_s: float
    repeats: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(
        self, operation: str, w: Work, seconds: float, only: tuple[str, ...] = (), extra: Sequence[Rival] = ()
    ) -> list[dict[str, Any]]:
        title = f"{operation}, {str(w.dtype).removeprefix('torch.')}, T {len(w.targets)}, V {len(w.head)}"
        title += f", D {w.head.shape[1]}" * OPERATIONS[operation].from_hidden + f", {w.settings}"
        spent = time.monotonic() - self.began
        if spent > self.limit_s:
            self.leave_out(f"{title}: left out, {spent:.0f} s are used up (--seconds)")
            return []
        print(f"\n{title}", flush=True)
        t = Table(operation, w)
        t.prepare(only, extra)
        new = t.measure(self.repeats, min(seconds, 0.5 * max(1.0, self.limit_s - spent)))
        print(f"{text(new)}\n{time.monotonic() - self.began:.0f} s", flush=True)
        self.rows += new
        self.left_out += [f"{operation}: {sentence}" for sentence in t.left_out]
        return new

    def leave_out(self, sentence: str) -> None:
        print(f"\n{sentence}", flush=True)
        self.left_out.append(sentence)


def real_work(w: Work, temperature: float, T: int) -> Work:
    """Work on SmolLM2's rows, on the device and in the dtype of `w`. Raises Cannot without the weights."""
    rows = sampled(temperature, T)
    hidden, head, targets = (x.to(w.device) for x in rows)
    return Work.of(hidden.to(w.dtype), head.to(w.dtype), targets, temperature=temperature, data="SmolLM2's")


def main() -> None:
    p = argparse.ArgumentParser(description="Compare the kernels with the alternatives that a user would pick.")
    cuda = torch.cuda.is_available()
    p.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    p.add_argument(
        "--rows", type=int, help="T; default: 1024 on a CPU, half of it in most tables of the head; 8192 on a GPU"
    )
    p.add_argument("--vocabulary", type=int, help="V; default: 49152 on a CPU, 152064 on a GPU")
    p.add_argument("--hidden", type=int, help="D; default: 576 on a CPU, 5120 on a GPU")
    p.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"],
                   help="default: float32 bfloat16 on a CPU, bfloat16 on a GPU")  # fmt: skip
    p.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    p.add_argument(
        "--sweep", nargs="*", type=int, help="further T for the picture; default: --rows, a quarter and an eighth of it"
    )
    p.add_argument("--repeats", type=int, default=5, help="largest number of turns per call")
    p.add_argument("--seconds", type=float, default=240, help="start no further table after this time")
    p.add_argument("--gate", action="store_true", help="run the kernels' tests first and stop if one fails")
    p.add_argument(
        "--out", type=Path, help="JSON, with the picture beside it; default: bench/results/kernels-<device>.json"
    )
    a = p.parse_args()
    cpu = a.device == "cpu"
    T, V = a.rows or (1024 if cpu else 8192), a.vocabulary or (49152 if cpu else 152064)
    D = a.hidden or (576 if cpu else 5120)
    dtypes = [getattr(torch, name) for name in a.dtypes or (["float32", "bfloat16"] if cpu else ["bfloat16"])]
    for value, name in ((V, "--vocabulary"), (D, "--hidden"), (a.repeats, "--repeats"), (a.seconds, "--seconds")):
        if value < 1:
            sys.exit(f"{name} is {value}: give at least 1.")
    for t in (T, *(a.sweep or ())):
        if t < 16 or t % 16:
            sys.exit(f"T is {t}: give multiples of 16, two for each of 8 sequences.")
    if a.gate:
        tests = [str(ROOT / "tests" / f"test_{name}.py") for name in ("kernels", "csrc", "kernels_triton")]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], check=True)
    about = machine(a.device)
    print(f"{about['device']}, torch {torch.__version__}")
    plan = Plan(a.seconds, a.repeats)
    head_rows, first = T // 2 if cpu else T, dtypes[0]
    wanted = set(a.operations)
    slow_half = cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    bars: list[dict[str, Any]] = []
    for dtype in dtypes:
        if "linear_policy_loss" in wanted:
            if dtype != torch.float32 and slow_half:
                plan.leave_out(f"linear_policy_loss, {dtype}: left out, this CPU has no half-precision arithmetic")
            else:
                only = () if dtype == first else SECOND_DTYPE
                rows = plan.add("linear_policy_loss", Work.make(a.device, dtype, head_rows, V, D), 20, only)
                bars = bars or rows
        if "policy_loss" in wanted:
            plan.add("policy_loss", Work.make(a.device, dtype, T, V, D), 10)
    half = Work.make(a.device, first, head_rows, V, D)
    if "linear_policy_loss" in wanted:
        for temperature in (0.5, 1.0):
            try:
                w = real_work(half, temperature, T)
            except Cannot as e:
                plan.leave_out(f"SmolLM2's logits at temperature {temperature:g}: left out, {e}; "
                               "random logits say nothing about sparsity")  # fmt: skip
                continue
            plan.add("linear_policy_loss", w, 12, REAL, sparse_rivals())
    if "linear_cross_entropy" in wanted:
        plan.add("linear_cross_entropy", half.cross_entropy(), 8)
    sweep = list(bars) if "linear_policy_loss" in wanted else []
    if "linear_policy_loss" in wanted:
        for t in a.sweep if a.sweep is not None else [T // k // 16 * 16 for k in (1, 4, 8) if T >= 16 * k]:
            sweep += plan.add("linear_policy_loss", Work.make(a.device, first, t, V, D), 4, SWEEP)
    if "linear_logprobs" in wanted:
        plan.add("linear_logprobs", half, 6)
    for settings in ({"entropy_coef": 0.01}, {"softcap": 30.0}):
        other = half.with_settings(**settings)
        for operation in sorted({"policy_loss", "linear_policy_loss"} & wanted):
            plan.add(operation, other, 4, NOT_COMPILED if operation in OF_THE_HEAD else ())
    if "fused_advantages" in wanted:
        plan.add("fused_advantages", replace(half, advantages=lead_advantages(*half.groups).advantage), 3)
    print(f"\n{time.monotonic() - plan.began:.0f} s")
    out = a.out or RESULTS / f"kernels-{a.device}.json"
    write_json(out, about | {"seconds": round(time.monotonic() - plan.began), "rows": plan.rows, "sweep": sweep,
                             "left_out": plan.left_out})  # fmt: skip
    if bars:
        name = str(first).removeprefix("torch.")
        picture(bars, [r for r in sweep if r["implementation"].startswith(SWEEP)], out.with_suffix(".png"),
                f"linear_policy_loss, {name}, V {V}, D {D}: {about['device']}")  # fmt: skip


if __name__ == "__main__":
    main()
