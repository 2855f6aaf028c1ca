"""Write the table of docs/evidence/kernel_resources.md; no GPU needed.

    python -m lead_kernels.testing resources [--out docs/evidence/kernel_resources.md] [--beside FILE ...]

Without --out the table is printed.
"""

import argparse
from pathlib import Path

from .resources import beside, resource_table


def main() -> None:
    p = argparse.ArgumentParser(description="Resources of the compiled Triton kernels; no GPU needed.")
    p.add_argument("command", choices=["resources"])
    p.add_argument("--out", type=Path, help="file to write; default: print the table")
    p.add_argument("--beside", type=Path, nargs="+", default=[], metavar="FILE",
                   help="tables made under other versions of Triton: add their rows that differ")  # fmt: skip
    a = p.parse_args()
    ours = resource_table()
    table = ours + "".join(beside(ours, other.read_text(encoding="utf-8")) for other in a.beside)
    if a.out:
        a.out.write_text(table, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
