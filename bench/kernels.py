"""The kernels beside everything a user would pick instead, on the same work, in one run.

    python bench/kernels.py [--device cpu|cuda] [--rows 1024] [--vocabulary 49152] [--hidden 576] [--gate] ...

The work is GRPO's clipped loss of T response tokens against given old log-probs: `policy_loss` from logits,
`linear_policy_loss` from hidden states and the head, both with gradients; and `linear_logprobs`, forward only. Every
rival's results are checked against ours first. Calls are interleaved, with cold caches; extra memory is what a call
takes above its inputs. The floors are measured beside them: bare matrix products of the same shapes, and a copy of the
logits, which is one read and one write. Then `linear_policy_loss` again over several T, with a picture, without rivals
that took four times as long.

Rivals, where installed: torch eager, torch.compile, torch's chunked linear_cross_entropy, Liger, TRL,
cut-cross-entropy, quack, verl. --gate runs the kernels' tests first: no green test, no number.

Legend: T rows, V vocabulary, D hidden, S sequences.
"""

import argparse
import contextlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Call, Cannot, extra_bytes, interleaved, machine, summary, write_json

from lead_kernels import (
    Groups,
    Outcomes,
    Sequences,
    Tokens,
    lead_advantages,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)

ROOT = Path(__file__).resolve().parent.parent
OURS, FLOOR = "lead_kernels", "floor: "
CLIP = 0.2


@dataclass
class Work:
    """Inputs of one shape: S sequences of equal length, so that padded rivals have nothing to pad."""

    device: str
    dtype: torch.dtype
    hidden: torch.Tensor  # [T, D]
    head: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [T]
    old: torch.Tensor  # [T]
    advantages: torch.Tensor  # [S]

    @classmethod
    def make(cls, device: str, dtype: torch.dtype, T: int, V: int, D: int, S: int = 8) -> "Work":
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(T, D, generator=g).to(device, dtype)
        head = (torch.randn(V, D, generator=g) / D**0.5).to(device, dtype)
        targets = torch.randint(V, (T,), generator=g).to(device)
        logp = linear_logprobs(hidden, head, targets)[0]
        old = logp + (0.3 * torch.randn(T, generator=g)).to(device)  # some ratios are clipped
        return cls(device, dtype, hidden, head, targets, old, torch.randn(S, generator=g).to(device))

    @property
    def ids(self) -> torch.Tensor:
        T, S = len(self.targets), len(self.advantages)
        return torch.arange(T, device=self.device) * S // T

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.targets, self.ids, old=self.old)

    @property
    def weights(self) -> torch.Tensor:
        T, S = len(self.targets), len(self.advantages)
        return torch.full((S,), 1.0 / T, device=self.device)

    @property
    def groups(self) -> Groups:
        """Outcomes of the S sequences, two groups of them."""
        S = len(self.advantages)
        g = torch.Generator().manual_seed(1)
        lengths = torch.randint(1000, 14_000, (S,), generator=g)
        return Groups(Outcomes(torch.arange(S) % 3 == 0, lengths).table().to(self.device), S // 2)

    def loss(self, logp: torch.Tensor) -> torch.Tensor:
        """The same loss from log-probs, in plain torch."""
        r, a = (logp - self.old).exp(), self.advantages[self.ids]
        return -torch.minimum(r * a, r.clamp(1 - CLIP, 1 + CLIP) * a).sum() / len(self.targets)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (len(self.advantages), -1))


def eager_logp(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def imported(module: str, name: str) -> Any:
    """An attribute of a rival's module; Cannot says why there is none."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return getattr(__import__(module, fromlist=[name]), name)
    except ModuleNotFoundError as e:
        raise Cannot(f"{e.name} is not installed") from e
    except (ImportError, RuntimeError, OSError, AttributeError) as e:
        raise Cannot(str(e).splitlines()[0]) from e


def needs_gpu(w: Work) -> None:
    if w.device == "cpu":
        raise Cannot("its kernels need a GPU")


# ------------------------------------------------------------------------------- rivals: a call that returns gradients


def on_logits(w: Work, loss: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    logits = w.hidden @ w.head.T

    def run() -> tuple[torch.Tensor, ...]:
        x = logits.detach().requires_grad_()
        loss(x).backward()
        assert x.grad is not None
        return (x.grad,)

    return run


def policy_loss_calls(w: Work) -> Iterator[tuple[str, Callable[[], Call]]]:
    def ours() -> Call:
        tokens, sequences = w.tokens, Sequences(w.weights, w.advantages)
        return on_logits(w, lambda x: policy_loss(x, tokens, sequences).loss)

    def in_place() -> Call:
        logits, tokens, sequences = w.hidden @ w.head.T, w.tokens, Sequences(w.weights, w.advantages)
        work = logits.clone()

        def run() -> tuple[torch.Tensor, ...]:
            x = work.detach().requires_grad_()
            policy_loss(x, tokens, sequences, inplace=True).loss.backward()
            return (x.grad,)  # type: ignore[return-value]

        run.prepare = lambda: work.copy_(logits)  # type: ignore[attr-defined]
        return run

    def eager() -> Call:
        return on_logits(w, lambda x: w.loss(eager_logp(x, w.targets)))

    def compiled() -> Call:
        f = torch.compile(eager_logp)
        return on_logits(w, lambda x: w.loss(f(x, w.targets)))

    def trl() -> Call:
        f = imported("trl.trainer.utils", "selective_log_softmax")
        return on_logits(w, lambda x: w.loss(f(x, w.targets)))

    def liger() -> Call:
        f = imported("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
        needs_gpu(w)
        # It takes [B, L + 1, V] and ignores the last position.
        logits = torch.nn.functional.pad(w.padded(w.hidden @ w.head.T), (0, 0, 0, 1))
        ids, old = w.padded(w.targets), w.padded(w.old)

        def run() -> tuple[torch.Tensor, ...]:
            x = logits.detach().requires_grad_()
            f(x, old, None, ids, w.advantages, beta=0.0, eps_low=CLIP, eps_high=CLIP, inplace=True)[0].mean().backward()
            assert x.grad is not None
            return (x.grad[:, :-1].reshape(-1, x.shape[-1]),)

        return run

    def quack() -> Call:
        imported("quack.cross_entropy", "cross_entropy")
        needs_gpu(w)
        f = imported("quack.cross_entropy", "cross_entropy")
        return on_logits(w, lambda x: w.loss(-f(x, w.targets, reduction="none")))

    def copy() -> Call:
        logits = w.hidden @ w.head.T
        to = torch.empty_like(logits)
        return lambda: to.copy_(logits)

    yield from {OURS: ours, OURS + ", in place": in_place, "torch eager": eager, "torch.compile": compiled,
                "TRL selective_log_softmax": trl,
                "Liger triton_grpo_loss": liger, "quack cross_entropy": quack,
                FLOOR + "a copy of the logits": copy}.items()  # fmt: skip


def on_hidden(w: Work, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Call:
    def run() -> tuple[torch.Tensor, ...]:
        h, head = w.hidden.detach().requires_grad_(), w.head.detach().requires_grad_()
        loss(h, head).backward()
        assert h.grad is not None and head.grad is not None
        return h.grad, head.grad

    return run


def linear_logp(w: Work) -> Iterator[tuple[str, Callable[[], Callable]]]:
    """Rivals' ways from hidden states and head to log-probs, differentiable."""

    def eager() -> Callable:
        return lambda h, head: eager_logp(h @ head.T, w.targets)

    def compiled() -> Callable:
        f = torch.compile(lambda h, head, t: eager_logp(h @ head.T, t))
        return lambda h, head: f(h, head, w.targets)

    def chunked_cross_entropy() -> Callable:
        options = imported("torch.nn", "LinearCrossEntropyOptions")()
        f = imported("torch.nn.functional", "linear_cross_entropy")
        return lambda h, head: -f(h, head, w.targets, reduction="none", options=options).float()

    def trl() -> Callable:
        f = imported("trl.trainer.utils", "selective_log_softmax")
        return lambda h, head: f(h @ head.T, w.targets)

    def trl_fused() -> Callable:
        f = imported("trl.trainer.utils", "_ChunkedLogProbFunction")
        chunk = imported("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
        return lambda h, head: f.apply(h, head, None, w.targets, 1.0, chunk, None, 1.0, ("log_probs",))[0]

    def cce() -> Callable:
        f = imported("cut_cross_entropy", "linear_cross_entropy")
        impl = "torch_compile" if w.device == "cpu" else "cce"
        return lambda h, head: -f(h, head, w.targets, reduction="none", impl=impl).float()

    def verl() -> Callable:
        f = imported("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
        needs_gpu(w)
        return lambda h, head: f(h, head, w.targets, 1.0)[0]

    yield from {"torch eager": eager, "torch.compile": compiled, "torch linear_cross_entropy": chunked_cross_entropy,
                "TRL selective_log_softmax": trl, "TRL fused head": trl_fused, "cut-cross-entropy": cce,
                "verl linear_cross_entropy": verl}.items()  # fmt: skip


def linear_policy_loss_calls(w: Work) -> Iterator[tuple[str, Callable[[], Call]]]:
    def ours() -> Call:
        tokens, sequences = w.tokens, Sequences(w.weights, w.advantages)
        return on_hidden(w, lambda h, head: linear_policy_loss(h, head, tokens, sequences).loss)

    def liger() -> Call:
        make = imported("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
        f = make(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo")
        ids, old = w.padded(w.targets), w.padded(w.old)
        mask = torch.ones_like(old)

        def loss(h: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            return f(w.padded(h), head, ids, mask, w.advantages, old_per_token_logps=old)[0]

        return on_hidden(w, loss)

    def products() -> Call:
        def run() -> tuple[torch.Tensor, ...]:
            z = w.hidden @ w.head.T
            return z @ w.head, z.T @ w.hidden

        return run

    def rival(make: Callable[[], Callable]) -> Callable[[], Call]:
        def call() -> Call:
            logp = make()
            return on_hidden(w, lambda h, head: w.loss(logp(h, head)))

        return call

    yield OURS, ours
    for name, make in linear_logp(w):
        yield name, rival(make)
    yield "Liger fused linear GRPO", liger
    yield FLOOR + "three bare products", products


def linear_logprobs_calls(w: Work) -> Iterator[tuple[str, Callable[[], Call]]]:
    def forward(logp: Callable) -> Call:
        def run() -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                return (logp(w.hidden, w.head),)

        return run

    yield OURS, lambda: forward(lambda h, head: linear_logprobs(h, head, w.targets)[0])
    for name, make in linear_logp(w):
        yield name, lambda make=make: forward(make())
    yield FLOOR + "one bare product", lambda: lambda: (w.hidden @ w.head.T,)


def fused_advantages_calls(w: Work) -> Iterator[tuple[str, Callable[[], Call]]]:
    """`policy_loss` from the groups' outcomes, which is what a run executes, beside a launch of its own for them."""

    def fused() -> Call:
        tokens, sequences = w.tokens, Sequences(w.weights, w.groups)
        return on_logits(w, lambda x: policy_loss(x, tokens, sequences).loss)

    def apart() -> Call:
        tokens, weights, groups = w.tokens, w.weights, w.groups

        def loss(x: torch.Tensor) -> torch.Tensor:
            return policy_loss(x, tokens, Sequences(weights, lead_advantages(*groups).advantage)).loss

        return on_logits(w, loss)

    def given() -> Call:
        tokens, sequences = w.tokens, Sequences(w.weights, lead_advantages(*w.groups).advantage)
        return on_logits(w, lambda x: policy_loss(x, tokens, sequences).loss)

    yield OURS, fused
    yield "a launch of its own", apart
    yield FLOOR + "advantages given", given


OPERATIONS = {"policy_loss": policy_loss_calls, "fused_advantages": fused_advantages_calls,
              "linear_policy_loss": linear_policy_loss_calls,
              "linear_logprobs": linear_logprobs_calls}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the benchmark


def prepared(operation: str, w: Work, only: tuple[str, ...] = ()) -> dict[str, Call]:
    """What runs here and computes the same; what does not is listed with its reason."""
    calls: dict[str, Call] = {}
    expected: tuple[torch.Tensor, ...] = ()
    for name, make in OPERATIONS[operation](w):
        if only and not name.startswith(only):
            continue
        try:
            call = make()
            got = call()
        except Cannot as e:
            print(f"  {name}: not measured, {e}")
            continue
        except Exception as e:  # whatever a rival raises on this machine is the reason it is listed with
            print(f"  {name}: cannot do this here ({type(e).__name__}: {str(e).splitlines()[0][:90]})")
            continue
        expected = expected or tuple(x.clone() for x in got)
        if not name.startswith(FLOOR):
            off = max(
                ((x.double() - y.double()).norm() / x.double().norm()).item()
                for x, y in zip(expected, got, strict=True)
            )
            if off > (1e-3 if w.dtype == torch.float32 else 3e-2):
                assert name != "torch eager", f"{OURS} and torch eager differ by {off:.1e}"
                print(f"  {name}: not measured, its results differ by {100 * off:.0f} % in this dtype")
                continue
        calls[name] = call
    return calls


def measure(operation: str, w: Work, repeats: int, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    calls = prepared(operation, w, only)
    times = interleaved(calls, repeats, w.device)
    T, V, D = len(w.targets), *w.head.shape
    ours_ms = summary(times[OURS])["median_ms"]
    rows = []
    for name, ms in times.items():
        row = {"operation": operation, "dtype": str(w.dtype).removeprefix("torch."), "T": T, "V": V, "D": D,
               "implementation": name, **summary(ms), "extra_bytes": extra_bytes(calls[name], w.device)}  # fmt: skip
        row["times_ours"] = row["median_ms"] / ours_ms
        rows.append(row)
    floor = next(r for r in rows if r["implementation"].startswith(FLOOR))
    for row in rows:
        row["share_of_floor"] = floor["median_ms"] / row["median_ms"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'':30} {'median ms':>10} {'(min to max)':>20} {'x ours':>7} {'floor share':>12} {'extra MiB':>10}"
    lines = [head]
    for r in rows:
        extra = "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:.0f}"
        spread = f"({r['min_ms']:.1f} to {r['max_ms']:.1f})"
        lines.append(f"{r['implementation']:30} {r['median_ms']:10.1f} {spread:>20} {r['times_ours']:7.2f} "
                     f"{100 * r['share_of_floor']:11.0f}% {extra:>10}")  # fmt: skip
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time and extra memory of linear_policy_loss over T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    for name in names:
        points = sorted((r for r in rows if r["implementation"] == name), key=lambda r: r["T"])
        style = {"linewidth": 2.5, "color": "black"} if name == OURS else {"linewidth": 1.2}
        style |= {"linestyle": "--", "color": "gray"} if name.startswith(FLOOR) else {}
        x = [r["T"] for r in points]
        axes[0].plot(x, [r["median_ms"] / 1e3 for r in points], marker="o", markersize=4, label=name, **style)
        if all(r["extra_bytes"] is not None for r in points):
            axes[1].plot(x, [r["extra_bytes"] / 2**30 for r in points], marker="o", markersize=4, label=name, **style)
    for axis, label in zip(axes, ("seconds, forward + backward", "extra memory, GiB"), strict=True):
        axis.set(xlabel="T, response tokens", ylabel=label, ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"Written: {path}")


def main() -> None:
    p = argparse.ArgumentParser(description="The kernels beside what a user would pick instead.")
    cuda = torch.cuda.is_available()
    p.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--rows", type=int, help="T; 1024 on a CPU, 8192 on a GPU")
    p.add_argument("--vocabulary", type=int, help="V; 49152 on a CPU, 152064 on a GPU")
    p.add_argument("--hidden", type=int, help="D; 576 on a CPU, 5120 on a GPU")
    p.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"],
                   help="default: float32 bfloat16 on a CPU, bfloat16 on a GPU")  # fmt: skip
    p.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    p.add_argument("--sweep", nargs="*", type=int, help="further T for the picture; default: an eighth to twice --rows")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--gate", action="store_true", help="run the kernels' tests first; no green test, no number")
    p.add_argument("--out", type=Path, help="JSON, the picture beside it; bench/results/kernels-<device>.json")
    a = p.parse_args()
    cpu = a.device == "cpu"
    T, V = a.rows or (1024 if cpu else 8192), a.vocabulary or (49152 if cpu else 152064)
    D = a.hidden or (576 if cpu else 5120)
    dtypes = a.dtypes or (["float32", "bfloat16"] if cpu else ["bfloat16"])
    for value, name in ((V, "--vocabulary"), (D, "--hidden"), (a.repeats, "--repeats")):
        if value < 1:
            sys.exit(f"{name} is {value}: give at least 1.")
    for t in (T, *(a.sweep or ())):
        if t < 1 or t % 8:
            sys.exit(f"T is {t}: give multiples of 8, the number of sequences.")
    if a.gate:
        tests = [str(ROOT / "tests" / f"test_{name}.py") for name in ("kernels", "csrc", "kernels_triton")]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], check=True)
    about = machine(a.device)
    print(f"{about['device']}, torch {torch.__version__}")
    rows = []
    slow_half = cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for name in dtypes:
        for operation in a.operations:
            if operation.startswith("linear") and name != "float32" and slow_half:
                print(f"\n{operation}, {name}: left out, this CPU has no half-precision arithmetic")
                continue
            print(f"\n{operation}, {name}, T {T}, V {V}" + (f", D {D}" if operation.startswith("linear") else ""))
            w = Work.make(a.device, getattr(torch, name), T, V, D)
            rows += (new := measure(operation, w, a.repeats))
            print(table(new), flush=True)
    sweep: list[dict[str, Any]] = []
    if "linear_policy_loss" in a.operations:
        only = (OURS, "torch eager", "torch.compile", "Liger", "torch linear", FLOOR)
        done = [r for r in rows if r["operation"] == "linear_policy_loss" and r["dtype"] == dtypes[0]]
        only = tuple(n for n in only if all(r["times_ours"] < 4 for r in done if r["implementation"].startswith(n)))
        sweep = [r for r in done if r["implementation"].startswith(only)]
        for t in a.sweep if a.sweep is not None else [T * k // 64 * 8 for k in (1, 2, 4, 16) if T >= 64]:
            print(f"\nlinear_policy_loss, {dtypes[0]}, T {t}, V {V}, D {D}")
            w = Work.make(a.device, getattr(torch, dtypes[0]), t, V, D)
            sweep += (new := measure("linear_policy_loss", w, a.repeats, only))
            print(table(new), flush=True)
    out = a.out or RESULTS / f"kernels-{a.device}.json"
    write_json(out, about | {"rows": rows, "sweep": sweep})
    if sweep:
        picture(sweep, out.with_suffix(".png"), f"linear_policy_loss, {dtypes[0]}, V {V}, D {D}: {about['device']}")


if __name__ == "__main__":
    main()
