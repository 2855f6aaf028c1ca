"""`python -m lead_kernels.testing resources [--out docs/kernel_resources.md]`: the table in docs; no GPU needed."""

import argparse
from pathlib import Path

from .resources import beside, resource_table


def main() -> None:
    p = argparse.ArgumentParser(description="What the compiler makes of the Triton kernels.")
    p.add_argument("command", choices=["resources"])
    p.add_argument("--out", type=Path, help="a file; default: the terminal")
    p.add_argument("--beside", type=Path, help="what this command wrote under another Triton: its rows that differ")
    a = p.parse_args()
    table = resource_table()
    if a.beside:
        table += beside(table, a.beside.read_text(encoding="utf-8"))
    if a.out:
        a.out.write_text(table, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
