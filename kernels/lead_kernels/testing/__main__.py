"""`python -m lead_kernels.testing resources [--out docs/evidence/kernel_resources.md]`: that table; no GPU needed."""

import argparse
from pathlib import Path

from .resources import beside, resource_table


def main() -> None:
    p = argparse.ArgumentParser(description="What the compiler makes of the Triton kernels.")
    p.add_argument("command", choices=["resources"])
    p.add_argument("--out", type=Path, help="a file; default: the terminal")
    p.add_argument("--beside", type=Path, nargs="+", default=[], metavar="FILE",
                   help="what this command wrote under other versions of Triton: their rows that differ")  # fmt: skip
    a = p.parse_args()
    ours = resource_table()
    table = ours + "".join(beside(ours, other.read_text(encoding="utf-8")) for other in a.beside)
    if a.out:
        a.out.write_text(table, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
