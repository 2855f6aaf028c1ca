"""The kernels' oracle, kernels that it must reject, and what the compiler makes of the right ones.

    python -m lead_kernels.testing resources [--out docs/kernel_resources.md]    no GPU needed

`check_rows` and `check_advantages` run a module of Triton launchers (under TRITON_INTERPRET=1 on a CPU, else on a GPU)
against fp64 runs of the plain torch specification on the same rounded inputs: an error of at most twice that of plain
torch in the launcher's own dtype, plus 2e-6. Fresh memory is NaN, so whatever a kernel fails to write is seen.
`WRONG` lists edits of the kernels' source, each of which makes a plausible mistake; `wrong_module` loads one.

Legend: T rows, V vocabulary, S sequences.
"""

import argparse
import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .lead_advantage import GroupTable, lead_advantages_reference, pack_options, unpack_options
from .policy_loss import METRICS, NO_GROUPS, rows_loss
from .rows import row_gradient_reference, row_stats_reference

HERE = Path(__file__).parent
FILES = ("__init__.py", "_device.py", "triton_advantage.py", "triton_rows.py")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer) inside."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def close(
    name: str, got: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, atol: float = 2e-6, rtol: float = 5e-6
) -> None:
    """Raises AssertionError unless `got` is as near to `exact` as twice `base` is; NaN must stand where NaN stands."""
    got, exact, base = (x.detach().double().cpu() for x in (got, exact, base))
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in the wrong places"

    def worst(x: torch.Tensor, forgiven: float) -> float:
        beyond = (x - exact).abs() - forgiven * exact.abs()
        return beyond.nan_to_num(0.0).max().item() if x.numel() else 0.0

    error, allowed = worst(got, rtol), worst(base, 0.0)
    assert error <= 2 * allowed + atol, f"{name}: error {error:.3g}, torch in the same dtype {allowed:.3g}"


# --------------------------------------------------------------------------------------------------------- the oracle

MODES: list[dict[str, Any]] = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4, "entropy_coef": 0.05},
    {"dual_clip": 1.5, "importance_cap": 1.2, "temperature": 0.6},
    {"ratio": "cispo", "importance_cap": 1.2, "importance_mode": "mask", "clip_high": 0.5},
    {"kl": "k1", "kl_coef": 0.1},
    {"kl": "k2", "kl_coef": 0.1, "temperature": 2.0},
    {"kl": "k3", "kl_coef": 0.1, "entropy_coef": -0.02},
    {"ratio": "sequence", "importance_cap": 1.2},
]
GROUP_OPTIONS: list[dict[str, Any]] = [
    {},
    {"length_gate": 5500.0, "rate": "positive", "group_filter": "official"},
    {"std": "none", "difficulty": False},
    {"std": "mad", "nonnegative_correct": True, "length_min_solve_rate": 0.4, "group_filter": "uniform"},
    {"length_reward": False, "midpoint": 0.5},
]


def row_case(seed: int, T: int, V: int, dtype: torch.dtype, mode: dict[str, Any], groups: bool) -> dict[str, Any]:
    """Arguments of `policy_rows_` but for `gradient`; the first sequence has weight 0, the second no advantage."""
    g = torch.Generator().manual_seed(seed)
    S = 6
    ids = torch.arange(T) % S

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    logits = (3 * draw(T, V)).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    options = {"temperature": 1.0, "ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None,
               "importance_cap": None, "importance_mode": "truncate", "kl": "k3", "kl_coef": 0.0,
               "entropy_coef": 0.0} | mode  # fmt: skip
    logp = row_stats_reference(logits, targets, options["temperature"])[:, 2]
    weights, advantages = draw(S).abs() + 0.2, draw(S)
    weights[0], advantages[1] = 0.0, 0.0
    given: Any = advantages
    if groups:
        given = GroupTable(torch.tensor([1, 0, 1, 1, 0, 0]), 1000 * torch.arange(4, 10), 3, {"std": "mad"})
    sequence = options["ratio"] == "sequence"
    return {
        "logits": logits, "targets": targets, "sequence_ids": ids, "weights": weights, "advantages": given,
        "behavior_logprobs": logp + 0.4 * draw(T), "old_logprobs": logp + 0.4 * draw(T),
        "reference_logprobs": logp + 0.4 * draw(T), "sequence_log_ratio": 0.2 * draw(S)[ids] if sequence else None,
        "sequence_importance": 0.2 * draw(S)[ids] if sequence else None, **options,
    }  # fmt: skip


def specification(case: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """loss, log-probs, entropy, metrics, gradient by the plain torch form in float64 or float32."""

    c = dict(case)
    logits, targets, temperature = c.pop("logits"), c.pop("targets"), c.pop("temperature")
    given, ids = c.pop("advantages"), c.pop("sequence_ids")
    if isinstance(given, GroupTable):
        _, _, wrong, penalty, _, floats, ints = given.packed()
        given = lead_advantages_reference(
            given.correct, given.lengths, given.group_size, **unpack_options(wrong, penalty, floats, ints)
        ).advantage

    def cast(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(dtype)

    stats = row_stats_reference(logits.to(dtype), targets, temperature)
    weights = c.pop("weights").to(dtype)
    rows = rows_loss(
        stats[:, 2], stats[:, 3], given.to(dtype)[ids], weights[ids], behavior_T=cast(c.pop("behavior_logprobs")),
        old_T=cast(c.pop("old_logprobs")), reference_T=cast(c.pop("reference_logprobs")),
        sequence_ratio_T=cast(c.pop("sequence_log_ratio")), importance_T=cast(c.pop("sequence_importance")), **c,
    )  # fmt: skip
    grad = row_gradient_reference(
        logits.to(dtype), targets, stats, rows.grad_logprob_T, rows.grad_entropy_T, temperature
    )
    metrics = torch.stack([rows.metrics[k].to(dtype) for k in METRICS])
    return rows.loss_T, stats[:, 2], stats[:, 3], metrics, grad


def launch(kernels: ModuleType, case: dict[str, Any], in_place: bool, device: str) -> tuple[torch.Tensor, ...]:
    """What the launchers of `kernels` make of a case: loss, log-probs, entropy, sums, gradient."""

    def to(x: Any) -> Any:
        return x.to(device) if isinstance(x, torch.Tensor) else x

    c = {k: to(v) for k, v in case.items()}
    table = isinstance(c["advantages"], GroupTable)
    logits = c.pop("logits").clone()
    with poisoned_memory():
        gradient = logits if in_place else torch.empty_like(logits)
        given = c.pop("advantages")
        out = kernels.policy_rows_triton(
            logits, c.pop("targets"), c.pop("sequence_ids"), c.pop("weights"), None if table else given,
            tuple(to(x) for x in given.packed()) if table else NO_GROUPS, behavior_T=c.pop("behavior_logprobs"),
            old_T=c.pop("old_logprobs"), reference_T=c.pop("reference_logprobs"),
            sequence_ratio_T=c.pop("sequence_log_ratio"), importance_T=c.pop("sequence_importance"),
            gradient=gradient, **c,
        )  # fmt: skip
    return *out, gradient


def check_rows(kernels: ModuleType, device: str = "cpu", cases: Iterator[dict[str, Any]] | None = None) -> None:
    """Raises AssertionError if a launcher of `kernels` is further from fp64 than twice plain torch."""
    for i, case in enumerate(cases or row_cases()):
        logits = case["logits"]
        exact, base = specification(case, torch.float64), specification(case, torch.float32)
        loss, logp, entropy, sums, grad = launch(kernels, case, bool(i % 2), device)
        rounding = torch.finfo(logits.dtype).eps * exact[4].nan_to_num(0.0).abs().max().item() if logits.numel() else 0
        assert not (logp > 0).any(), "a log-prob above 0"
        close("log-probs", logp, exact[1], base[1])
        close("entropy", entropy, exact[2], base[2])
        close("loss", loss, exact[0], base[0], 1e-5)
        close("gradient", grad, exact[4], base[4], 5e-6 + rounding)
        close("metrics", sums.sum(1), exact[3][2:10], base[3][2:10], 2e-5 * max(1, logits.shape[0]))
        if i < 3:
            again = launch(kernels, case, not i % 2, device)
            for one, other in zip((loss, logp, entropy, sums, grad), again, strict=True):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), "in place and not, or twice, differ"
    check_halves(kernels, device)


def row_cases() -> Iterator[dict[str, Any]]:
    """Every mode, dtypes, vocabularies around the tile's edges, offsets, masked logits, a NaN row."""
    for V, dtype in ((1, torch.float32), (7, torch.bfloat16), (9001, torch.float32), (20_001, torch.bfloat16)):
        yield row_case(V, 3, V, dtype, {"entropy_coef": 0.1, "temperature": 0.3}, groups=False)
    for i, mode in enumerate(MODES):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        yield row_case(i, 13, 500, dtype, mode, groups=i % 2 == 1)
    for offset in (1e4, -1e4):
        case = row_case(3, 7, 600, torch.float32, {"entropy_coef": 0.1}, groups=False)
        yield case | {"logits": case["logits"] + offset}
    case = row_case(4, 7, 9000, torch.float32, {"entropy_coef": 0.1}, groups=False)
    logits = case["logits"]
    logits[0, :8500] = -torch.inf  # whole tiles of -inf, the target among the rest
    case["targets"][0] = 8600
    logits[1], logits[1, 5] = -torch.inf, 0.0  # one possible token
    case["targets"][1] = 5
    logits[2, 77] = torch.nan
    logits[3, 99] = 1e30
    case["targets"][3] = 99
    yield case
    yield row_case(5, 1, 33, torch.float32, {}, groups=True)
    yield row_case(6, 0, 33, torch.float32, {}, groups=False)


def check_halves(kernels: ModuleType, device: str = "cpu") -> None:
    """The kernels of linear_logprobs, with rows further apart than they are long."""
    for V, dtype in ((1, torch.float32), (300, torch.bfloat16), (5000, torch.float32)):
        g = torch.Generator().manual_seed(V)
        wide = (3 * torch.randn(6, V + 40, generator=g)).to(dtype).to(device)
        logits = wide[:, 8 : 8 + V]
        beside = wide[:, 8 + V :].clone()
        targets = torch.randint(V, (6,), generator=g)
        u, h = torch.randn(2, 6, generator=g)
        cpu = logits.cpu().clone()
        exact, base = (row_stats_reference(cpu.to(t), targets, 0.7) for t in (torch.float64, torch.float32))
        with poisoned_memory():
            stats = kernels.row_stats_triton(logits, targets.to(device), 0.7)
        close("statistics", stats, exact, base)
        exact_grad = row_gradient_reference(cpu.double(), targets, exact, u.double(), h.double(), 0.7)
        base_grad = row_gradient_reference(cpu.float(), targets, base, u, h, 0.7)
        kernels.row_gradient_triton_(logits, targets.to(device), stats, u.to(device), h.to(device), 0.7, logits)
        close("gradient", logits, exact_grad, base_grad, 5e-6 + torch.finfo(dtype).eps * exact_grad.abs().max().item())
        assert torch.equal(wide[:, 8 + V :], beside), "written past the end of a row"


def check_advantages(kernels: ModuleType, device: str = "cpu") -> None:
    """Raises AssertionError if `lead_advantages_triton` differs from the specification in fp64."""
    for seed, (options, size) in enumerate(itertools.product(GROUP_OPTIONS, (1, 8, 37))):
        g = torch.Generator().manual_seed(seed)
        correct = torch.rand(3 * size, generator=g) < 0.5
        correct[:size] = seed % 3 == 0
        lengths = torch.randint(13_990, 14_010, (3 * size,), generator=g)
        lengths[size : 2 * size] = torch.randint(1, 20_000, (size,), generator=g)
        wrong = torch.where(torch.rand(3 * size, generator=g) < 0.3, -2.0, -1.0)
        penalty = -torch.rand(3 * size, generator=g) if seed % 2 else None
        each, extra, floats, ints = pack_options(wrong_reward=wrong, penalty=penalty, **options)
        assert each is not None
        exact = lead_advantages_reference(correct, lengths, size, **unpack_options(each.double(), extra, floats, ints))
        base = lead_advantages_reference(correct, lengths, size, **unpack_options(each, extra, floats, ints))
        with poisoned_memory():
            got = kernels.lead_advantages_triton(
                correct.to(device), lengths.to(device), wrong.to(device),
                None if penalty is None else penalty.to(device), size, floats, ints,
            )  # fmt: skip
        for name, a, b, c in zip(("reward", "advantage", "solve rate"), got, exact, base, strict=False):
            close(name, a, b, c, 1e-5)
        assert torch.equal(got[3].cpu(), exact.kept), "kept"


# -------------------------------------------------------------------------------- kernels that the oracle must reject

ROWS, GROUPS = "triton_rows.py", "triton_advantage.py"

# what is wrong -> (file, what the right one says, what the wrong one says)
WRONG: dict[str, tuple[str, str, str]] = {
    "log-prob of the column before": (
        ROWS,
        "row_ptr + target, mask=inside",
        "row_ptr + tl.maximum(target - 1, 0), mask=inside",
    ),
    "one-hot a column late": (
        ROWS,
        "at == target, g",
        "at == target + 1, g",
    ),
    "no temperature in the sum": (
        ROWS,
        "x = (z - higher) * inverse",
        "x = z - higher",
    ),
    "no temperature in the gradient": (
        ROWS,
        "(d * inverse)",
        "d",
    ),
    "tail not masked": (
        ROWS,
        "other=-inf)",
        "other=0.0)",
    ),
    "sums kept when the maximum moves": (
        ROWS,
        "keep = tl.exp(-shift)",
        "keep = 1.0",
    ),
    "entropy not shifted when the maximum moves": (
        ROWS,
        "dot_B - shift * sum_B",
        "dot_B",
    ),
    "half-precision accumulation": (
        ROWS,
        "sum_B = sum_B * keep + e",
        "sum_B = (sum_B * keep + e).to(tl.float16).to(tl.float32)",
    ),
    "sign of the entropy gradient": (
        ROWS,
        "-g - h * inner",
        "-g + h * inner",
    ),
    "gradient rounded before it is scaled": (
        ROWS,
        "(d * inverse).to(out",
        "(((d * 1e-6).to(out_ptr.dtype.element_ty)).to(tl.float32) * 1e6 * inverse).to(out",
    ),
    "rows without gradient left as they were": (
        ROWS,
        "tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < V)",
        "tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < 0)",
    ),
    "clip bounds exchanged": (
        ROWS,
        "1 - clip_low, 1 + clip_high",
        "1 - clip_high, 1 + clip_low",
    ),
    "gradient through a clipped ratio": (
        ROWS,
        "(a > 0) & (above == 0)",
        "(a > 0) & (above == above)",
    ),
    "dual clip on good answers": (
        ROWS,
        "dual = (a < 0)",
        "dual = (a > 0)",
    ),
    "importance weight on the loss alone": (
        ROWS,
        "g = g * w",
        "g = g * 1.0",
    ),
    "mask taken for truncation": (
        ROWS,
        "if IMPORTANCE == 1 else 0.0",
        "if IMPORTANCE >= 1 else 0.0",
    ),
    "sign of the k3 gradient": (
        ROWS,
        "1 - tl.where(far, 0.0, e)",
        "tl.where(far, 0.0, e) - 1",
    ),
    "weight of the first sequence for all": (
        ROWS,
        "weight_ptr + sequence",
        "weight_ptr + 0 * sequence",
    ),
    "next member's advantage": (
        ROWS,
        "cols == sequence - first",
        "cols == (sequence - first + 1) % size",
    ),
    "w(rho) and w(1 - rho) exchanged": (
        GROUPS,
        "advantage > 0, above, below",
        "advantage > 0, below, above",
    ),
    "variance over n": (
        GROUPS,
        "0), count - 1)) + eps",
        "0), count)) + eps",
    ),
    "wrong answers' lengths in the spread": (
        GROUPS,
        "(moved - mean) * one, 0.0",
        "tl.where(member, moved - mean, 0.0), 0.0",
    ),
    "fp32 sum of squared lengths": (
        GROUPS,
        "tl.sum(off * off, 0), tl.maximum(n - 1, 1.0)",
        "tl.sum(length * length * one, 0) - n * (mean + shortest) * (mean + shortest), tl.maximum(n - 1, 1.0)",
    ),
    "length gate the wrong way": (
        GROUPS,
        "<= length_gate",
        "> length_gate",
    ),
    "correct answers' floor for all": (
        GROUPS,
        "right & (advantage < 0)",
        "(advantage < 0)",
    ),
}


def wrong_module(name: str, folder: Path) -> ModuleType:
    """The launchers with the mistake `name`, written to and loaded from `folder`; name '' : none."""
    package = "wrong_" + re.sub(r"\W", "_", name)
    at = folder / package
    at.mkdir()
    for file in FILES:
        text = "" if file == "__init__.py" else (HERE / file).read_text(encoding="utf-8")
        if name and WRONG[name][0] == file:
            _, right, wrong = WRONG[name]
            assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
            text = text.replace(right, wrong)
        (at / file).write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(package + ".triton_rows")
    finally:
        sys.path.remove(str(folder))


# ------------------------------------------------------------------------------------ what the compiler makes of them

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # fmt: skip


class Resources(dict[str, Any]):
    """kernel, dtype, target, block, warps; registers, spills (bytes), shared (bytes), load_bytes, store_bytes."""


def build(
    name: str, dtype: str, target: tuple[str, int | str, int], constants: dict[str, Any], warps: int, fusion: bool
) -> Any:
    """Compile a kernel for a target. `constants`: its constexprs, and arguments to fix (None: a pointer left out)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import triton_advantage, triton_rows

    kernel = getattr(triton_rows, name, None) or getattr(triton_advantage, name)
    types = {"logits_ptr": "*" + dtype, "grad_ptr": "*" + dtype, "target_ptr": "*i64", "sequence_ptr": "*i64",
             "correct_ptr": "*i1", "length_ptr": "*i64", "kept_ptr": "*i8", "stride": "i32", "grad_stride": "i32",
             "x_ptr": "*" + dtype, "n": "i64", "V": "i32", "T": "i32", "S": "i32", "size": "i32"}  # fmt: skip
    signature, attributes, fixed = {}, {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if arg in constants:
            signature[arg], fixed[(i,)] = "constexpr", constants[arg]
            continue
        signature[arg] = types.get(arg, "*fp32" if arg.endswith("_ptr") else "fp32")
        if arg.endswith("_ptr") or arg in ("stride", "grad_stride", "V"):  # 152,064 and 151,936 are multiples of 16
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def compiled(kernel: str, dtype: str, target: str) -> Resources:
    """What the compiler makes of a kernel with its row of the tile table; no GPU needed, not under the interpreter."""
    from ._device import TILES

    name, backend = kernel.split(",")[0], TARGETS[target][0]
    block, warps = TILES[backend][4 if dtype == "fp32" else 2]
    constants: dict[str, Any] = {"BLOCK": block}
    groups = {"LENGTH_REWARD": 1, "DIFFICULTY": 1, "STD": 1, "NONNEGATIVE": 1, "POSITIVE": 1, "FILTER": 1}
    if name == "policy_rows_kernel":
        absent = ("advantage_ptr",) if kernel == GROUPED else ("correct_ptr", "length_ptr", "wrong_ptr", "penalty_ptr")
        constants |= groups | dict.fromkeys(absent) | {"CISPO": False, "IMPORTANCE": 1, "KL": 3, "BLOCK_G": 1024}
    if name == "lead_advantages_kernel":
        constants, warps = groups | {"BLOCK": 1024}, 4
    made = build(name, dtype, TARGETS[target], constants, warps, name != "lead_advantages_kernel")
    out = Resources(kernel=kernel, dtype=dtype, target=target, block=constants["BLOCK"], warps=warps)
    out |= {"shared": made.metadata.shared} | (_nvidia(made.asm) if backend == "cuda" else _amd(made.asm))
    return out


def _nvidia(asm: Any) -> dict[str, int]:
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(asm["cubin"])
        f.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True
        ).stdout

    def number(what: str) -> int:
        return int(re.search(rf"\b{what}:(\d+)", said).group(1))  # type: ignore[union-attr]

    def widest(op: str) -> int:
        found = re.findall(rf"\b{op}\.global\S*?(?:\.v(\d))?\.b(\d+)", asm["ptx"])
        return max(int(n or 1) * int(bits) // 8 for n, bits in found)

    return {"registers": number("REG"), "spills": number("STACK") + number("LOCAL"),
            "load_bytes": widest("ld"), "store_bytes": widest("st")}  # fmt: skip


def _amd(asm: Any) -> dict[str, int]:
    text = asm["amdgcn"]

    def number(what: str) -> int:
        return int(re.search(rf"\.{what}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    width = {
        op: max(
            4 * int(n or 1) for n in re.findall(rf"(?:global|buffer)_{op}_(?:dword(?:x(\d))?|u?short|u?byte)\b", text)
        )
        for op in ("load", "store")
    }
    return {"registers": number("vgpr_count"), "spills": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
            "load_bytes": width["load"],
            "store_bytes": width["store"]}  # fmt: skip


GROUPED = "policy_rows_kernel, groups"
KERNELS = ("policy_rows_kernel", GROUPED, "row_stats_kernel", "row_gradient_kernel")


def every_row() -> Iterator[tuple[str, str, str]]:
    """kernel, dtype, target of every row of the table."""
    for target in TARGETS:
        for kernel, dtype in itertools.product(KERNELS, ("bf16", "fp16", "fp32")):
            yield kernel, dtype, target
        yield "lead_advantages_kernel", "fp32", target


def resource_table() -> str:
    import triton

    columns = ("kernel", "dtype", "target", "block", "warps", "registers", "spills", "shared", "load_bytes",
               "store_bytes")  # fmt: skip
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Triton {triton.__version__}, cross-compiled without a GPU by `python -m lead_kernels.testing resources`; "
        "nothing here was run or timed on one. Registers are a thread's; spills and shared memory in bytes; loads and "
        "stores are the widest of the kernel, in bytes a thread. policy_rows_kernel is compiled with all its options; "
        "`groups`: the advantage computed inside, from groups of up to 1,024.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in every_row():
        made = compiled(*row)
        lines.append("| " + " | ".join(str(made[c]) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description="What the compiler makes of the Triton kernels.")
    p.add_argument("command", choices=["resources"])
    p.add_argument("--out", type=Path, help="a file; default: the terminal")
    a = p.parse_args()
    table = resource_table()
    if a.out:
        a.out.write_text(table, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
