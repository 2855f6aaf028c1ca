"""Test the kernels on every device against the oracle: all dtypes and options, poisoned memory, targets out of range.

On a CPU the kernels are those of csrc; tests/test_kernels_triton.py runs Triton's under its interpreter.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import ROOT, constraints, python

from lead_kernels import Groups, LossOptions, Sequences, Tokens, _head, linear_logprobs, linear_policy_loss
from lead_kernels._rows import row_gradient_, row_stats
from lead_kernels.policy_loss import METRICS, RowMetrics, for_row_kernel, policy_rows_
from lead_kernels.testing import mutants, oracle, resources

sys.path.append(str(ROOT / "bench"))
from harness import extra_bytes  # noqa: E402

pytestmark = pytest.mark.quick

OVER_HIDDEN = ("linear_policy_loss", "linear_logprobs")


# ------------------------------------------------------------------------------------------------------- the row kernel


def policy_rows(logits: torch.Tensor, tokens: Tokens, sequences: Sequences, *rest: Any) -> tuple[torch.Tensor, ...]:
    """`policy_rows_` with the signature by which the oracle calls a launcher; sums of each metric as [8, 1]."""
    loss_T, logprob_T, entropy_T, metrics = policy_rows_(logits, tokens, for_row_kernel(sequences, logits), *rest)
    first = METRICS.index(RowMetrics._fields[0])
    return loss_T, logprob_T, entropy_T, metrics[first : first + len(RowMetrics._fields), None]


def advantages(table: torch.Tensor, size: int, options: Any) -> tuple[torch.Tensor, ...]:
    return torch.ops.lead_kernels.lead_advantages(*Groups(table, size, options).encode())


def chosen(**instead: Any) -> Any:
    """The kernels that run on a tensor's device, under the launcher names that the oracle uses."""
    names = {"policy_rows_triton": policy_rows, "row_stats_triton": row_stats, "row_gradient_triton_": row_gradient_,
             "lead_advantages_triton": advantages}  # fmt: skip
    return SimpleNamespace(**names | instead)


@pytest.mark.parametrize("check", [oracle.check_rows, oracle.check_advantages, oracle.check_fused_advantages])
def test_the_oracle_accepts_the_devices_kernels(check, device):
    check(chosen(), device.type)


def one_hot_a_column_late(logits, tokens, sequences, terms, options, softmax, gradient, *exact):
    out = policy_rows(logits, tokens, sequences, terms, options, softmax, gradient, *exact)
    gradient.copy_(gradient.roll(1, 1))
    return out


def rows_without_gradient_left_as_they_were(logits, tokens, sequences, terms, options, softmax, gradient, *exact):
    written = torch.empty_like(gradient)
    out = policy_rows(logits.clone(), tokens, sequences, terms, options, softmax, written, *exact)
    live = sequences.weights[tokens.sequence_ids.long()] != 0
    gradient[live] = written[live]
    return out


@pytest.mark.parametrize("wrong", [one_hot_a_column_late, rows_without_gradient_left_as_they_were])
def test_a_sabotaged_kernel_fails(wrong, device):
    with pytest.raises(AssertionError):
        oracle.check_rows(chosen(policy_rows_triton=wrong), device.type)


@pytest.mark.parametrize("name", ["one-hot a column late", "w(rho) and w(1 - rho) exchanged"])
def test_a_sabotaged_triton_kernel_fails_on_a_gpu(name, gpu, tmp_path: Path):
    """One mistake per file of Triton kernels; tests/test_kernels_triton.py runs all under the interpreter."""
    assert name in mutants.WRONG
    check = oracle.check_advantages if mutants.WRONG[name][0] == mutants.GROUPS else oracle.check_rows
    with pytest.raises(AssertionError):
        check(mutants.wrong_module(name, tmp_path), gpu.type)


OUT_OF_RANGE = """
import sys, torch
from lead_kernels import Sequences, Tokens, linear_logprobs, linear_policy_loss, policy_loss
device = torch.device(sys.argv[1])
one = torch.ones(1, device=device)
targets = torch.tensor([3, int(sys.argv[2])], device=device)
hidden, head = torch.ones(2, 8, device=device), torch.ones(17, 8, device=device)
given = Tokens(targets, torch.zeros_like(targets)), Sequences(one, one)
calls = {"policy_loss": lambda: policy_loss(hidden @ head.T, *given),
         "linear_policy_loss": lambda: linear_policy_loss(hidden, head, *given),
         "linear_logprobs": lambda: linear_logprobs(hidden, head, targets)}
try:
    calls[sys.argv[3]]()
    torch.cuda.synchronize()
except RuntimeError as e:
    print(f"{sys.argv[3]}: {e}", flush=True)
"""


@pytest.mark.parametrize("function", ["policy_loss", *OVER_HIDDEN])
@pytest.mark.parametrize("target", [-1, 17])
def test_a_target_out_of_range_stops_a_gpu(function, target, gpu):
    """A device-side assertion fails asynchronously; tests/test_kernels.py tests the message on a CPU."""
    done = python("-c", OUT_OF_RANGE, gpu.type, str(target), function)
    assert function in done.stdout, done.stderr[-2000:]
    assert "outside the vocabulary of 17" in done.stderr + done.stdout or "device-side assert" in done.stdout


def test_the_table_of_resources_is_of_the_cpu_sets_triton_and_names_what_differs_under_the_cuda_sets():
    text = (ROOT / "docs" / "evidence" / "kernel_resources.md").read_text(encoding="utf-8")
    here, there = (constraints(name)["triton"] for name in ("constraints.txt", "constraints-cuda.txt"))
    table, _, differing = text.partition(f"\n## Triton {there}: rows that differ\n")
    assert f"Triton {here}, cross-compiled" in table and differing.count("\n- ") > 5
    spilled = [row for row in differing.split("\n- ") if "spills" in row]
    assert all("gfx942" in row or row.startswith("row_gradient_kernel") for row in spilled), spilled
    changed = table.replace(f"Triton {here}", f"Triton {there}").replace("| 126 | 0 |", "| 127 | 0 |")
    assert "registers 127 (126)" in resources.beside(table, changed)
    with pytest.raises(ValueError, match="give a table of another Triton with the same kernels"):
        resources.beside(table, table)


# ------------------------------------------------------------------------------------------------------------- the head


def head_case(device: torch.device, dtype: torch.dtype, T: int, D: int, V: int) -> tuple[torch.Tensor, ...]:
    """Make hidden, head and the rest of a case in which all contributions to d(head) have one sign."""
    g = torch.Generator().manual_seed(T)
    hidden, head = torch.rand(T, D, generator=g), torch.randn(V, D, generator=g) / D
    targets, advantages = torch.randint(V, (T,), generator=g), torch.rand(4, generator=g) + 0.5
    return tuple(x.to(device, dtype if x.dim() == 2 else None) for x in (hidden, head, targets, advantages))


def gradients(case: tuple[torch.Tensor, ...], rows: int | None, loss: str) -> list[torch.Tensor]:
    hidden, head, targets, given = case
    h, w = (x.detach().requires_grad_() for x in (hidden, head))
    ids = torch.arange(len(targets), device=h.device) % len(given)
    if loss == "linear_policy_loss":
        tokens, weights = Tokens(targets, ids), torch.ones_like(given)
        linear_policy_loss(h, w, tokens, Sequences(weights, given), LossOptions(), chunk_rows=rows).loss.backward()
    else:
        logprobs, _ = linear_logprobs(h, w, targets, chunk_rows=rows)
        (-logprobs * given.to(logprobs.dtype)[ids]).sum().backward()
    return [x.grad for x in (h, w) if x.grad is not None]


def relative(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("loss", OVER_HIDDEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_over_many_chunks_are_added_in_float32(loss, dtype, device, monkeypatch):
    case = head_case(device, dtype, 512, 64, 96)
    exact = gradients(tuple(x.double() if x.is_floating_point() else x for x in case), None, loss)
    rounding = torch.finfo(dtype).eps / 2
    once, often = (relative(gradients(case, rows, loss), exact) for rows in (512, 4))
    assert len(once) == 2 and max(once) < 3 * rounding
    assert often[1] < 1.2 * once[1] + 0.1 * rounding, "d(head) lost digits between the chunks"
    for name in OVER_HIDDEN:  # the package's attributes of these names are functions, not modules
        monkeypatch.setattr(importlib.import_module(f"lead_kernels.{name}"), "accumulate", lambda *_: dtype)
    rounded = relative(gradients(case, 4, loss), exact)
    assert rounded[1] > 2 * often[1], "adding in half precision would not be noticed"


@pytest.mark.parametrize("add", [_head.add_product_, _head.add_in_slices_])
def test_a_product_is_added_to_float32_inside_the_product_on_a_gpu(add, gpu):
    g = torch.Generator().manual_seed(1)
    parts = [(torch.randn(3000, 64, generator=g).bfloat16(), torch.randn(64, 40_000, generator=g).bfloat16())
             for _ in range(2)]  # fmt: skip
    total = torch.full((3000, 40_000), torch.nan, device=gpu)
    for i, (a, b) in enumerate(parts):
        add(total, a.to(gpu), b.to(gpu), i == 0)
    exact = sum(a.double() @ b.double() for a, b in parts)
    assert ((total.cpu().double() - exact).abs().max() / exact.abs().max()).item() < 1e-6


def test_head_and_loss_hold_a_chunk_of_logits_and_never_all(device):
    T, D, V = (4096, 64, 32768) if device.type == "cpu" else (32768, 256, 152064)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    case = head_case(device, dtype, T, D, V)
    every = T * V * case[0].element_size()
    chunk = _head.CHUNK_BYTES[device.type]
    kept = V * D * (4 + 2 * case[0].element_size()) + 2 * T * D * case[0].element_size()  # d(head) in fp32, gradients
    gradients(case, None, "linear_policy_loss")  # a first call loads and compiles, which must not count

    def extra(rows: int | None) -> int:
        taken = extra_bytes(lambda: gradients(case, rows, "linear_policy_loss"), device.type)
        if taken is None:
            pytest.skip("the peak of memory cannot be read here")
        return taken

    room = 1.1 * chunk + 1.1 * kept + (32 << 20)
    assert room < 0.7 * every
    assert extra(None) < room, "more than a chunk of logits is held"
    assert extra(T) > 0.9 * every > room, "all logits at once would not be noticed"
