"""The Triton kernels without a GPU: under Triton's interpreter against the oracle, and cross-compiled.

The interpreter must be chosen before triton is imported: one test runs the rest of this file in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")

from lead_kernels import GroupTable, lead_advantages, linear_logprobs, linear_policy_loss, policy_loss, testing  # noqa: E402, I001


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_under_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=env, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert said.returncode == 0 and "passed" in said.stdout, said.stdout[-3000:]


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_oracle_accepts_the_kernels():
    from lead_kernels import triton_rows

    testing.check_advantages(triton_rows)
    testing.check_rows(triton_rows)


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", testing.WRONG)
def test_the_oracle_rejects(name: str, tmp_path: Path):
    wrong = testing.wrong_module(name, tmp_path)
    check = testing.check_advantages if testing.WRONG[name][0] == "triton_advantage.py" else testing.check_rows
    with pytest.raises(AssertionError):
        check(wrong)


def case(T: int = 11, V: int = 37, S: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(T)
    return {
        "hidden": torch.randn(T, 8, generator=g), "head": torch.randn(V, 8, generator=g),
        "targets": torch.randint(V, (T,), generator=g), "sequence_ids": torch.arange(T) % S,
        "weights": torch.rand(S, generator=g), "old_logprobs": -torch.rand(T, generator=g) - 3,
    }  # fmt: skip


@inside
def test_the_public_functions_run_the_kernels(monkeypatch: pytest.MonkeyPatch):
    from lead_kernels import triton_rows

    launched = []
    for name in ("policy_rows_triton", "row_stats_triton", "row_gradient_triton_", "lead_advantages_triton"):
        real = getattr(triton_rows, name)
        monkeypatch.setattr(
            triton_rows, name, lambda *a, real=real, name=name, **k: (launched.append(name), real(*a, **k))[1]
        )
    x = case()
    groups = GroupTable(torch.tensor([1, 0, 1, 1]), torch.tensor([5, 9, 7, 6]), 2)
    common = {k: x[k] for k in ("sequence_ids", "weights", "old_logprobs")}
    results = []
    for dtype in (torch.float32, torch.float64):  # float64 is the specification, not Triton
        h, w = (x[k].to(dtype, copy=True).requires_grad_() for k in ("hidden", "head"))
        out = linear_policy_loss(h, w, x["targets"], advantages=groups, ratio="sequence", chunk_rows=4, **common)
        (out.loss + linear_logprobs(h, w, x["targets"], chunk_rows=5)[0].sum()).backward()
        z = (x["hidden"] @ x["head"].T).to(dtype, copy=True).requires_grad_()
        direct = policy_loss(z, x["targets"], advantages=groups, **common)
        direct.loss.backward()
        assert h.grad is not None and w.grad is not None and z.grad is not None
        results.append([out.loss.detach(), h.grad, w.grad, z.grad, direct.loss.detach(), *direct.metrics.values()])
    assert set(launched) == {"policy_rows_triton", "row_stats_triton", "row_gradient_triton_", "lead_advantages_triton"}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-4, rtol=2e-5)


def test_in_place_gives_the_same_gradient_over_the_logits():
    x = case()
    common = {k: x[k] for k in ("sequence_ids", "weights", "old_logprobs")} | {"advantages": torch.ones(4)}
    grads = []
    for inplace in (False, True):
        leaf = (x["hidden"] @ x["head"].T).requires_grad_()
        z = leaf * 1.0
        out = policy_loss(z, x["targets"], inplace=inplace, **common)
        (2 * out.loss).backward()
        grads.append(leaf.grad)
        if inplace:  # on a GPU the factor 2 is written over them too
            assert any(torch.equal(f * z.detach(), leaf.grad) for f in (1, 2))
    assert torch.equal(*grads)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_backward_again_gives_the_same_again(factor: float, keep: bool):
    x = case()
    common = {k: x[k] for k in ("sequence_ids", "weights", "old_logprobs")} | {"advantages": torch.ones(4)}
    h, w = (x[k].clone().requires_grad_() for k in ("hidden", "head"))
    loss = linear_policy_loss(h, w, x["targets"], **common).loss * factor
    first = torch.autograd.grad(loss, (h, w), retain_graph=keep)
    if keep:
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()  # what a caller does with a gradient is his affair
        torch.testing.assert_close(torch.autograd.grad(loss, (h, w)), tuple(kept))
    exact = torch.autograd.grad(
        linear_policy_loss(h.double(), w.double(), x["targets"], **common).loss * factor, (h, w)
    )
    torch.testing.assert_close(kept if keep else list(first), list(exact), atol=1e-5, rtol=1e-4)


@inside
def test_offsets_past_2_to_the_31():
    """Rows 2^30 apart in bf16: 4 GiB of addresses, of which three short rows are touched."""
    V, apart = 300, 2**30
    wide = torch.empty(2 * apart + V, dtype=torch.bfloat16).as_strided((3, V), (apart, 1))
    wide.copy_(torch.randn(3, V))
    x = {"targets": torch.tensor([1, 2, 299]), "sequence_ids": torch.arange(3), "weights": torch.ones(3)}
    far, near = (
        policy_loss(z, **x, advantages=torch.ones(3), inplace=True)
        for z in (wide, wide.clone(memory_format=torch.contiguous_format))
    )
    assert torch.equal(far.logprobs, near.logprobs)


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize("mode", [{}, {"ratio": "cispo"}, {"kl": "k2", "kl_coef": 0.3}, {"ratio": "sequence"}])
def test_gradcheck(mode: dict):
    x = case(T=6, V=5, S=2)
    h, w = (x[k].double().requires_grad_() for k in ("hidden", "head"))
    logp = linear_logprobs(h, w, x["targets"])[0].detach()
    common = {"sequence_ids": x["sequence_ids"], "weights": x["weights"], "advantages": torch.tensor([1.0, -0.5]),
              "behavior_logprobs": logp, "reference_logprobs": logp + 0.1, "old_logprobs": logp + 0.05,
              "entropy_coef": 0.1} | mode  # fmt: skip
    if "kl" not in mode:
        del common["reference_logprobs"]
    if mode.get("ratio") == "cispo":  # its weight is detached: ratio exactly 1 where it is
        common["old_logprobs"] = None

    def of_hidden(h, w):
        return linear_policy_loss(h, w, x["targets"], chunk_rows=4, **common).loss

    def of_logits(z):
        return policy_loss(z, x["targets"], **common).loss

    assert torch.autograd.gradcheck(of_hidden, (h, w))
    assert torch.autograd.gradcheck(of_logits, ((h @ w.T).detach().requires_grad_(),))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, x["targets"], temperature=0.7), (h, w))


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
def test_activation_checkpointing_around_the_operators():
    from torch.utils.checkpoint import checkpoint

    x = case()
    common = {k: x[k] for k in ("sequence_ids", "weights", "old_logprobs")} | {"advantages": torch.ones(4)}

    def step(h, w):
        h = (h @ h.new_ones(8, 8)).tanh()
        return linear_policy_loss(h, w, x["targets"], **common).loss + linear_logprobs(h, w, x["targets"])[1].mean()

    grads = []
    for f in (step, lambda *a: checkpoint(step, *a, use_reentrant=False)):
        h, w = (x[k].clone().requires_grad_() for k in ("hidden", "head"))
        f(h, w).backward()
        grads.append((h.grad, w.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
def test_compile_sees_one_operator():
    x = case()
    common = {k: x[k] for k in ("sequence_ids", "weights", "old_logprobs")}

    def step(h, w, lengths):
        a = lead_advantages(lengths > 5, lengths, 2).advantage
        out = linear_policy_loss(h, w, x["targets"], advantages=a, entropy_coef=0.1, **common)
        return out.loss + linear_logprobs(h, w, x["targets"])[1].mean() + out.metrics["entropy"]

    grads = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = (x[k].clone().requires_grad_() for k in ("hidden", "head"))
        f(h, w, torch.tensor([5, 9, 7, 6])).backward()
        grads.append((h.grad, w.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize("train", [(True, True), (True, False), (False, True)])
def test_opcheck(train: tuple[bool, bool]):
    x = case()
    h, w = (x[k].clone().requires_grad_(t) for k, t in zip(("hidden", "head"), train, strict=True))
    z = (x["hidden"] @ x["head"].T).requires_grad_()
    a, u, ids, t = torch.ones(4), x["weights"], x["sequence_ids"], x["targets"]
    mode = (0.7, "token", 0.2, 0.2, None, 1.5, "truncate", "token", "k3", 0.0, 0.1)
    per_token = (x["old_logprobs"], None, None)
    torch.library.opcheck(
        torch.ops.lead_kernels.linear_policy_loss.default, (h, w, t, ids, u, a, *per_token, *mode, 4, *train)
    )
    torch.library.opcheck(torch.ops.lead_kernels.linear_logprobs.default, (h, w, t, 0.7, 4))
    groups = (torch.tensor([1, 0, 1, 1]), torch.tensor([5, 9, 7, 6]), None, None, 2)
    options = ([0.05, 1.0, -1.0, 0.4, 1.5, 10.0, 0.75, 1e-6, 0.0, 0.0], [1, 1, 1, 0, 0, 0])
    torch.library.opcheck(torch.ops.lead_kernels.lead_advantages.default, (*groups, *options))
    args = (z, t, ids, u, None, *groups, *options, *per_token, *mode, True)
    torch.library.opcheck(torch.ops.lead_kernels.policy_loss.default, args)


# The committed table has every row; compiling a few of them again shows that it is of these kernels.
TABLE = Path(__file__).parent.parent / "docs" / "kernel_resources.md"


def committed() -> list[dict[str, str]]:
    rows = [r.strip("| ").split(" | ") for r in TABLE.read_text(encoding="utf-8").splitlines() if r.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table_has_every_row_without_spills_and_with_wide_loads():
    rows = committed()
    assert [(r["kernel"], r["dtype"], r["target"]) for r in rows] == list(testing.every_row())
    for r in rows:
        assert int(r["spills"]) == 0, r
        if r["kernel"] != "lead_advantages_kernel":
            assert int(r["load_bytes"]) == 16, r
            assert int(r["store_bytes"]) == 16 or r["kernel"] == "row_stats_kernel", r


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("target", testing.TARGETS)
def test_cross_compiled_again(target: str):
    made = testing.compiled("policy_rows_kernel", "bf16", target)
    assert made["spills"] == 0 and made["load_bytes"] == 16 and made["store_bytes"] == 16


# What the interpreter cannot see: pointers that are absent, and integer arguments of 1, which the compiler takes for
# constants.
OPTIONAL = ("behavior_ptr", "old_ptr", "reference_ptr", "log_ratio_ptr", "importance_ptr")
GROUPS = ("correct_ptr", "length_ptr", "wrong_ptr", "penalty_ptr")
PLAIN = {"LENGTH_REWARD": 0, "DIFFICULTY": 0, "STD": 0, "NONNEGATIVE": 0, "POSITIVE": 0, "FILTER": 0}
FULL = {"LENGTH_REWARD": 1, "DIFFICULTY": 1, "STD": 2, "NONNEGATIVE": 1, "POSITIVE": 1, "FILTER": 2}
SMALL = {"BLOCK": 128, "BLOCK_G": 16, "CISPO": False, "IMPORTANCE": 0, "KL": 0}
VARIANTS = {
    "forward only": ("policy_rows_kernel", SMALL | PLAIN | dict.fromkeys((*GROUPS, *OPTIONAL, "grad_ptr"))),
    "no old log-probs": ("policy_rows_kernel", SMALL | PLAIN | dict.fromkeys(GROUPS + OPTIONAL)),
    "cispo": ("policy_rows_kernel", SMALL | PLAIN | dict.fromkeys(GROUPS) | {"CISPO": True, "IMPORTANCE": 2, "KL": 1}),
    "one row of one": ("policy_rows_kernel", SMALL | PLAIN | dict.fromkeys(GROUPS)
                       | {"V": 1, "stride": 1, "grad_stride": 1, "T": 1, "KL": 2}),
    "groups": ("policy_rows_kernel", SMALL | PLAIN | dict.fromkeys(("advantage_ptr", "wrong_ptr", "penalty_ptr"))),
    "groups of one": ("policy_rows_kernel", SMALL | FULL | {"advantage_ptr": None, "size": 1}),
    "advantages of one": ("lead_advantages_kernel", FULL | {"BLOCK": 16, "size": 1}),
    "advantages": ("lead_advantages_kernel", PLAIN | {"BLOCK": 16, "wrong_ptr": None, "penalty_ptr": None}),
    "statistics of one": ("row_stats_kernel", {"BLOCK": 128, "V": 1, "stride": 1}),
    "scale": ("scale_kernel", {"BLOCK": 4096}),
    "gradient of one": ("row_gradient_kernel", {"BLOCK": 128, "V": 1, "stride": 1}),
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_with_options_absent(name: str):
    kernel, constants = VARIANTS[name]
    made = testing.build(kernel, "bf16", ("cuda", 90, 32), constants, 1, True)
    assert "ld.global" in made.asm["ptx"]
