"""What the compiler makes of the Triton kernels: registers, spills, shared memory, widths of loads and stores.

Cross-compiled for TARGETS, no GPU needed, not under Triton's interpreter.
"""

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..options import AdvantageOptions, LossOptions

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "gfx942": ("hip", "gfx942", 64)}  # fmt: skip


class Resources(dict[str, Any]):
    """kernel, dtype, target, block, warps; registers, spills (bytes), shared (bytes), load_bytes, store_bytes."""


def build(
    name: str, dtype: str, target: tuple[str, int | str, int], constants: dict[str, Any], warps: int, fusion: bool
) -> Any:
    """Compile a kernel for a target.

    `constants`: its constexprs, arguments to fix (None: a pointer left out), and records of options.
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
    """LossOptions as a kernel takes them."""
    from .._triton_advantage import in_kernel

    return in_kernel(LossOptions(**options), LossOptions)


def advantage(**options: Any) -> tuple:
    """AdvantageOptions as a kernel takes them."""
    from .._triton_advantage import in_kernel

    return in_kernel(AdvantageOptions(**options), AdvantageOptions)


# The most that a kernel can be asked to do, as the table says.
ALL: dict[str, Any] = {"dual_clip": 3.0, "importance_cap": 2.0, "kl_coef": 0.1}
ALL_GROUPS: dict[str, Any] = {"nonnegative_correct": True, "rate": "positive", "group_filter": "official"}


def compiled(kernel: str, dtype: str, target: str) -> Resources:
    """What the compiler makes of a kernel with its row of the tile table; no GPU needed, not under the interpreter."""
    from .._device import full_tile

    name, backend = kernel.split(",")[0], TARGETS[target][0]
    block, warps = full_tile(backend, 4 if dtype == "fp32" else 2, kernel in CAPPED)
    constants: dict[str, Any] = {"BLOCK": block} | ({} if kernel in CAPPED else {"softcap": None})
    if name == "policy_rows_kernel":
        absent = "advantage_ptr" if kernel == GROUPED else "table_ptr"
        constants |= {
            absent: None,
            "BLOCK_G": 1024,
            "loss_options": loss(**ALL),
            "group_options": advantage(**ALL_GROUPS),
        }
    if name == "lead_advantages_kernel":
        constants, warps = {"BLOCK": 1024, "group_options": advantage(**ALL_GROUPS)}, 4
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
ROW_KERNELS = ("policy_rows_kernel", "row_stats_kernel", "row_gradient_kernel")
CAPPED = tuple(f"{name}, soft cap" for name in ROW_KERNELS)
KERNELS = ("policy_rows_kernel", GROUPED, "row_stats_kernel", "row_gradient_kernel", *CAPPED)


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
        "`groups`: the advantage computed inside, from groups of up to 1,024; `soft cap`: the logits capped. A head's "
        "bias is added by the product, so the kernels are the same with one.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in every_row():
        made = compiled(*row)
        lines.append("| " + " | ".join(str(made[c]) for c in columns) + " |")
    return "\n".join(lines) + "\n"
