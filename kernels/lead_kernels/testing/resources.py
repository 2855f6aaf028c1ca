"""Resources of the compiled Triton kernels: registers, spills, widths of loads and stores, instructions per logit.

Kernels are cross-compiled for TARGETS, without a GPU and not under Triton's interpreter. Instructions are counted in
the machine code, shown by the disassembler in Triton's wheel, of the loops that look at a row: the innermost loops
whose loads are wide and unconditional. The loops of the exact path and those that zero a row, whose loads are masked or
missing, do not count.
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..options import AdvantageOptions, LossOptions

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # fmt: skip


# Unit that runs an instruction; an instruction not listed runs on the integer and logic unit.
PIPES = {
    "fma": ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"),
    "mufu": ("MUFU",),
    "compare": ("FMNMX", "FSETP", "FSEL", "FSET", "FCHK", "FMNMX3"),
    "convert": ("F2FP", "F2F", "I2F", "F2I", "I2FP", "HADD2"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "LDCU"),
    "other": ("SHFL", "BAR", "WARPSYNC", "DEPBAR", "MEMBAR", "NOP", "BRA", "BSSY", "BSYNC", "CALL", "EXIT", "CS2R"),
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}


class Look(NamedTuple):
    """A loop over a row's tiles: instructions per logit by unit, whether it writes, and how far ahead it loads.

    ahead: smallest number of instructions between a load and the first use of its result, as a fraction of the loop's
    body; 0 for a loop that waits for the load it has just issued.
    """

    pipes: dict[str, float]
    writes: bool
    ahead: float

    @property
    def per_logit(self) -> float:
        """Instructions per logit."""
        return sum(self.pipes.values())


class Resources(dict[str, Any]):
    """kernel, dtype, target, block, warps; registers, spills (bytes), shared (bytes), load_bytes, store_bytes.

    For NVIDIA also: first, second: the most instructions per logit of a loop that only reads, and of one that also
    writes; both: their sum; ahead: as in Look; outside: instructions outside all loops; looks: all Looks.
    """


def build(
    name: str, dtype: str, target: tuple[str, int | str, int], constants: dict[str, Any], warps: int, fusion: bool
) -> Any:
    """Compile a kernel for a target.

    `constants`: its constexprs, arguments with a fixed value (None: an absent pointer), and records of options.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .. import _triton_advantage, _triton_rows

    kernel = getattr(_triton_rows, name, None) or getattr(_triton_advantage, name)
    types = {"logits_ptr": "*" + dtype, "grad_ptr": "*" + dtype, "target_ptr": "*i64", "sequence_ptr": "*i64",
             "kept_ptr": "*i8", "stride": "i32", "grad_stride": "i32",
             "x_ptr": "*" + dtype, "n": "i64", "V": "i32", "T": "i32", "S": "i32", "size": "i32"}  # fmt: skip
    signature, attributes, fixed = {}, {}, {}
    for i, arg in enumerate(kernel.arg_names):
        if isinstance(record := constants.get(arg), tuple):  # a record of options
            constant = {(i, j): getattr(x, "value", x) for j, x in enumerate(record) if not isinstance(x, float)}
            fixed |= constant
            signature[arg] = type(record)(*("constexpr" if (i, j) in constant else "fp32" for j in range(len(record))))
            continue
        if arg in constants:
            signature[arg], fixed[(i,)] = "constexpr", constants[arg]
            continue
        signature[arg] = types.get(arg, "*fp32" if arg.endswith("_ptr") else "fp32")
        if arg.endswith("_ptr") or arg in ("stride", "grad_stride", "V"):  # 152,064 and 151,936 are multiples of 16
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def loss(**options: Any) -> tuple:
    """LossOptions in the form that kernels take."""
    from .._triton_advantage import in_kernel

    return in_kernel(LossOptions(**options), LossOptions)


def advantage(**options: Any) -> tuple:
    """AdvantageOptions in the form that kernels take."""
    from .._triton_advantage import in_kernel

    return in_kernel(AdvantageOptions(**options), AdvantageOptions)


# The kernels with all their options on, as the table says.
ALL: dict[str, Any] = {"dual_clip": 3.0, "importance_cap": 2.0, "kl_coef": 0.1}
ALL_GROUPS: dict[str, Any] = {"nonnegative_correct": True, "rate": "positive", "group_filter": "official"}

POLICY = "policy_rows_kernel"
GROUPED, ENTROPY, FORWARD, CAPPED = (f"{POLICY}, {what}" for what in ("groups", "entropy", "forward", "soft cap"))
STATISTICS, GRADIENT = "row_stats_kernel", "row_gradient_kernel"
CAPPED_STATISTICS, CAPPED_GRADIENT = f"{STATISTICS}, soft cap", f"{GRADIENT}, soft cap"
UNPAIRED, UNHINTED = f"{POLICY}, odd rows", f"{POLICY}, no hints"
KERNELS = (POLICY, ENTROPY, GROUPED, FORWARD, CAPPED, STATISTICS, GRADIENT, CAPPED_STATISTICS, CAPPED_GRADIENT)


def compiled(kernel: str, dtype: str, target: str) -> Resources:
    """Compile a kernel with its tile and return its Resources; no GPU needed, not under the interpreter."""
    from .._device import full_tile

    name, backend = kernel.split(",")[0], TARGETS[target][0]
    capped, gradient, itemsize = "soft cap" in kernel, kernel != FORWARD and name != STATISTICS, int(dtype[2:]) // 8
    block, warps = full_tile(backend, itemsize, capped, gradient)
    constants: dict[str, Any] = {"BLOCK": block, "PAIRS": dtype == "bf16" and kernel != UNPAIRED}
    constants |= {} if capped else {"softcap": None}
    if name == POLICY:
        constants |= {
            "advantage_ptr" if kernel == GROUPED else "table_ptr": None,
            "BLOCK_G": 1024,
            "ENTROPY": kernel in (ENTROPY, GROUPED, CAPPED),
            "HINTS": kernel != UNHINTED,
            "loss_options": loss(**ALL),
            "group_options": advantage(**ALL_GROUPS),
        } | ({} if gradient else {"grad_ptr": None})
    if name == "lead_advantages_kernel":
        constants, warps = {"BLOCK": 1024, "group_options": advantage(**ALL_GROUPS)}, 4
    made = build(name, dtype, TARGETS[target], constants, warps, name != "lead_advantages_kernel")
    out = Resources(kernel=kernel, dtype=dtype, target=target, block=constants["BLOCK"], warps=warps)
    out |= {"shared": made.metadata.shared}
    out |= _nvidia(made.asm, itemsize) if backend == "cuda" else _amd(made.asm)
    return out


def tool(name: str, binary: bytes, *options: str) -> str:
    """Run cuobjdump or nvdisasm of Triton's wheel on a cubin and return the output."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(binary)
        f.flush()
        program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([program, *options, f.name], capture_output=True, text=True, check=True).stdout


def instructions(disassembly: str) -> tuple[list[str], list[tuple[int, int]], int]:
    """Return all instructions, the first and last index of each innermost loop, and the number outside all loops."""
    listed: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(listed)
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            listed.append(instruction[1].strip())
            back = re.search(r"\bBRA\S*\s.*?`\((\.L\w+)\)", listed[-1])
            if back and labels.get(back[1], len(listed)) < len(listed) - 1:
                loops.append((labels[back[1]], len(listed) - 1))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    inside = {i for a, b in inner for i in range(a, b + 1)}
    return listed, inner, sum(i not in inside and not text.startswith("NOP") for i, text in enumerate(listed))


def looks(disassembly: str, itemsize: int) -> list[Look]:
    """Find the loops of a kernel that look at a row of logits of `itemsize` bytes."""
    listed, loops, _ = instructions(disassembly)
    found = []
    for first, last in loops:
        body = listed[first : last + 1]
        loads = [i for i, text in enumerate(body) if re.match(r"LDG\.\S*128\b", text)]
        if not loads or any(re.match(r"@\S+ LDG", text) for text in body):
            continue
        logits = 16 * len(loads) / itemsize
        opcodes = (re.sub(r"^@\S+\s+", "", text).split()[0].split(".")[0] for text in body)
        pipes = Counter(PIPE_OF.get(name, "other" if name.startswith("U") else "integer") for name in opcodes)
        found.append(
            Look(
                {pipe: n / logits for pipe, n in pipes.items()},
                any("STG" in text for text in body),
                min(uses_after(body, i) for i in loads) / len(body),
            )
        )
    return found


def uses_after(body: list[str], load: int) -> int:
    """Count instructions of a loop between a 16-byte load and the first use of one of the four registers it fills."""
    target = int(re.search(r"\bR(\d+)", body[load])[1])  # type: ignore[index]
    filled = {f"R{target + k}" for k in range(4)}
    for distance in range(1, len(body)):
        text = body[(load + distance) % len(body)]
        operands = text.split(None, 1 if not text.startswith("@") else 2)[-1]
        stores = "STG" in text or "STS" in text
        read = operands if stores else operands.partition(",")[2]
        if filled & set(re.findall(r"\bR\d+", read)):
            return distance
    return len(body)


def _nvidia(asm: Any, itemsize: int) -> dict[str, Any]:
    usage = tool("cuobjdump", asm["cubin"], "--dump-resource-usage")

    def number(what: str) -> int:
        return int(re.search(rf"\b{what}:(\d+)", usage).group(1))  # type: ignore[union-attr]

    def widest(op: str) -> int:
        widths = re.findall(rf"\b{op}\.global\S*?(?:\.v(\d))?\.b(\d+)", asm["ptx"])
        return max(int(n or 1) * int(bits) // 8 for n, bits in widths)

    disassembly = tool("nvdisasm", asm["cubin"], "-c")
    every = looks(disassembly, itemsize)
    most = [max((x for x in every if x.writes is w), key=lambda x: x.per_logit, default=None) for w in (False, True)]
    given = [x for x in most if x is not None]
    pipes = {pipe: sum(x.pipes.get(pipe, 0.0) for x in given) for pipe in ("fma", "mufu", "integer", "compare")}
    out = {"registers": number("REG"), "spills": number("STACK") + number("LOCAL"), "load_bytes": widest("ld"),
           "store_bytes": widest("st"), "outside": instructions(disassembly)[2], "looks": every}  # fmt: skip
    if given:
        both = sum(x.per_logit for x in given)
        first, second = (x.per_logit if x else 0.0 for x in most)
        out |= {"first": first, "second": second, "both": both} | pipes
        out |= {"rest": both - sum(pipes.values()), "ahead": min(x.ahead for x in given)}
    return out


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


def every_row() -> Iterator[tuple[str, str, str]]:
    """Kernel, dtype and target of every row of the table: all for sm_90, elsewhere those that decided a tile."""
    for target in TARGETS:
        for kernel, dtype in itertools.product(KERNELS, ("bf16", "fp16", "fp32")):
            of_a_tile = kernel in (ENTROPY, FORWARD, CAPPED) and dtype != "fp16"
            if target == "sm_90" or of_a_tile or (kernel in (GROUPED, STATISTICS, GRADIENT) and dtype == "bf16"):
                yield kernel, dtype, target
        if target == "sm_90":
            yield UNPAIRED, "bf16", target
            yield UNHINTED, "bf16", target
        yield "lead_advantages_kernel", "fp32", target


# columns of the table after kernel, dtype and target
COLUMNS = ("block", "warps", "registers", "spills", "shared", "load_bytes", "store_bytes", "first", "second", "both",
           "fma", "mufu", "integer", "compare", "rest", "ahead", "outside")  # fmt: skip
COMPARED = COLUMNS[: COLUMNS.index("both") + 1]  # those compared with another Triton's table


def resource_table() -> str:
    """Compile every kernel of docs/evidence/kernel_resources.md and format that table."""
    import triton

    def cell(x: Any) -> str:
        return "-" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x)

    columns = ("kernel", "dtype", "target", *COLUMNS)
    lines = [
        "# What the compiler makes of the Triton kernels",
        "",
        f"Triton {triton.__version__}, cross-compiled without a GPU by `python -m lead_kernels.testing resources`; "
        "nothing here was run or timed on one. Registers are a thread's; spills and shared memory in bytes; loads and "
        "stores are the widest of the kernel, in bytes a thread.",
        "",
        "`first`, `second`, `both`: instructions per logit of the loops that look at a row for its sums and for its "
        "gradient, counted in the machine code (NVIDIA); then both by the unit that runs them; `rest`: conversions, "
        "loads, stores, branches, addresses in uniform registers. `ahead`: how much of a loop's body stands between a "
        "tile's load and its first use; 1.0 is a whole tile ahead. `outside`: instructions outside all loops, both "
        "sides of each branch; a row's loss, its group's advantages, its last full tile and the rest after it, which "
        "every thread runs at most once per row. policy_rows_kernel is compiled with all its options "
        "and with exact logits of the targets; alone it has no gradient of the entropy, and one with `entropy`, "
        "`groups` (the advantage computed inside, from groups of up to 1,024) and `soft cap` (the logits capped); "
        "`forward` writes no gradient; `no hints`: the cache is not told to keep a row until the second look and to "
        "drop it then; `odd rows`: bf16 rows of odd length, whose logits are not read in pairs. A "
        "head's bias is added by the product, so the kernels are the same with one.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in every_row():
        made = compiled(*row)
        lines.append("| " + " | ".join(cell(made.get(c)) for c in columns) + " |")
    return "\n".join(lines) + "\n"


def rows_of(table: str) -> dict[tuple[str, ...], list[str]]:
    """Map kernel, dtype and target of every row of a table to its other cells."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {tuple(c[:3]): c[3:] for c in cells if not set("".join(c)) <= set("- ")}


def beside(table: str, other: str) -> str:
    """Format a section on the same kernels under another Triton: a list of its rows that differ from those of `table`.

    Raises:
        ValueError: the tables are of the same Triton, or not of the same kernels.
    """
    versions = [found[1] if (found := re.search(r"Triton (\S+),", text)) else "unknown" for text in (table, other)]
    ours, theirs = rows_of(table), rows_of(other)
    if versions[0] == versions[1] or ours.keys() != theirs.keys():
        raise ValueError(f"The tables are of Triton {versions[0]} with {len(ours)} rows and {versions[1]} with "
                         f"{len(theirs)}: give a table of another Triton with the same kernels.")  # fmt: skip
    names = ours.pop(("kernel", "dtype", "target"))
    lines = [
        f"\n## Triton {versions[1]}: rows that differ\n",
        f"In brackets Triton {versions[0]}'s; of the columns up to `both`, what no row names is the same.\n",
    ]
    for key, cells in ours.items():
        changed = [
            f"{name} {b} ({a})"
            for name, a, b in zip(names, cells, theirs[key], strict=True)
            if a != b and name in COMPARED
        ]
        lines += [f"- {', '.join(key)}: {', '.join(changed)}"] if changed else []
    return "\n".join(lines) + "\n"
