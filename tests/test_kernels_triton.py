"""Test the Triton kernels without a GPU: under Triton's interpreter against the oracle, and cross-compiled.

The interpreter must be chosen before triton is imported, so one test runs the rest of this file in a separate process.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")

from lead_kernels import (  # noqa: E402
    AdvantageOptions,
    Groups,
    LossOptions,
    Outcomes,
    Sequences,
    Tokens,
    _device,  # noqa: E402
    lead_advantages,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)
from lead_kernels.options import Softmax  # noqa: E402
from lead_kernels.testing import mutants, oracle, resources  # noqa: E402


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
    from lead_kernels import _triton_rows

    oracle.check_advantages(_triton_rows)
    oracle.check_rows(_triton_rows)
    oracle.check_target_logits(_triton_rows)


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_row_kernel_computes_the_advantages_of_lead_advantages_bit_for_bit():
    from lead_kernels import _triton_rows

    oracle.check_fused_advantages(_triton_rows)


def test_the_documents_give_the_number_of_wrong_kernels():
    assert f"{len(mutants.WRONG)} kernels with one plausible mistake each" in DOCUMENT.read_text(encoding="utf-8")


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", mutants.WRONG)
def test_the_oracle_rejects(name: str, tmp_path: Path):
    wrong = mutants.wrong_module(name, tmp_path)
    check = oracle.check_advantages if mutants.WRONG[name][0] == mutants.GROUPS else oracle.check_rows
    if name.startswith("exact logit"):
        check = oracle.check_target_logits
    if name == "rounding error of the shift ignored" and oracle.rounds_twice():
        pytest.skip("lost among the interpreter's own errors")
    with pytest.raises(AssertionError):
        check(wrong)


def case(T: int = 11, V: int = 37, S: int = 4) -> tuple[torch.Tensor, torch.Tensor, Tokens, torch.Tensor]:
    """Make hidden, head, tokens, weights."""
    g = torch.Generator().manual_seed(T)
    hidden, head = torch.randn(T, 8, generator=g), torch.randn(V, 8, generator=g)
    targets, weights = torch.randint(V, (T,), generator=g), torch.rand(S, generator=g)
    return hidden, head, Tokens(targets, torch.arange(T) % S, old=-torch.rand(T, generator=g) - 3), weights


OUTCOMES = Outcomes(torch.tensor([1, 0, 1, 1]), torch.tensor([5, 9, 7, 6]))
GROUPS = Groups(OUTCOMES, 2)


@inside
def test_the_public_functions_run_the_kernels(monkeypatch: pytest.MonkeyPatch):
    from lead_kernels import _triton_rows

    launched = []
    for name in ("policy_rows_triton", "row_stats_triton", "row_gradient_triton_", "lead_advantages_triton"):
        real = getattr(_triton_rows, name)
        monkeypatch.setattr(
            _triton_rows, name, lambda *a, real=real, name=name, **k: (launched.append(name), real(*a, **k))[1]
        )
    hidden, head, tokens, weights = case()
    sequences, ratio, bias = Sequences(weights, GROUPS), LossOptions(ratio="sequence"), torch.linspace(-1, 1, len(head))
    results = []
    for dtype in (torch.float32, torch.float64):  # float64 runs the specification, not Triton
        h, w, b = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, head, bias))
        more: dict = {"softcap": 3.0, "head_bias": b}
        out = linear_policy_loss(h, w, tokens, sequences, ratio, chunk_rows=4, **more)
        (out.loss + linear_logprobs(h, w, tokens.targets, chunk_rows=5, **more)[0].sum()).backward()
        z = (hidden @ head.T).to(dtype, copy=True).requires_grad_()
        direct = policy_loss(z, tokens, sequences, softcap=2.0)
        direct.loss.backward()
        grads = [x.grad for x in (h, w, b, z)]
        assert all(g is not None for g in grads)
        results.append([out.loss.detach(), *grads, direct.loss.detach(), *direct.metrics.values()])
    assert set(launched) == {"policy_rows_triton", "row_stats_triton", "row_gradient_triton_", "lead_advantages_triton"}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=2e-4, rtol=2e-5)


@inside
def test_the_row_kernel_needs_no_launch_for_its_advantages(monkeypatch: pytest.MonkeyPatch):
    from lead_kernels import _triton_rows

    hidden, head, tokens, weights = case()
    apart = Sequences(weights, lead_advantages(*GROUPS).advantage)
    monkeypatch.setattr(_triton_rows, "lead_advantages_triton", lambda *_: pytest.fail("a launch of its own"))
    grads = []
    for sequences in (apart, Sequences(weights, GROUPS)):
        h, w = (x.clone().requires_grad_() for x in (hidden, head))
        linear_policy_loss(h, w, tokens, sequences, chunk_rows=4).loss.backward()
        grads.append((h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_in_place_gives_the_same_gradient_over_the_logits(softcap: float | None):
    hidden, head, tokens, weights = case()
    grads = []
    for inplace in (False, True):
        leaf = (hidden @ head.T).requires_grad_()
        z = leaf * 1.0
        out = policy_loss(z, tokens, Sequences(weights, torch.ones(4)), inplace=inplace, softcap=softcap)
        (2 * out.loss).backward()
        grads.append(leaf.grad)
        if inplace:  # on a GPU the factor 2 is also applied in place
            assert any(torch.equal(f * z.detach(), leaf.grad) for f in (1, 2))
    assert torch.equal(*grads)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_backward_again_gives_the_same_again(factor: float, keep: bool):
    hidden, head, tokens, weights = case()
    common = tokens, Sequences(weights, torch.ones(4))
    h, w = (x.clone().requires_grad_() for x in (hidden, head))
    loss = linear_policy_loss(h, w, *common).loss * factor
    first = torch.autograd.grad(loss, (h, w), retain_graph=keep)
    if keep:
        kept = [g.clone() for g in first]
        for g in first:
            g.zero_()  # a caller may overwrite a gradient
        torch.testing.assert_close(torch.autograd.grad(loss, (h, w)), tuple(kept))
    exact = torch.autograd.grad(linear_policy_loss(h.double(), w.double(), *common).loss * factor, (h, w))
    torch.testing.assert_close(kept if keep else list(first), list(exact), atol=1e-5, rtol=1e-4)


@inside
def test_offsets_past_2_to_the_31():
    """Rows 2^30 elements apart in bf16: 4 GiB of addresses, of which three short rows are touched."""
    V, apart = 300, 2**30
    wide = torch.empty(2 * apart + V, dtype=torch.bfloat16).as_strided((3, V), (apart, 1))
    wide.copy_(torch.randn(3, V))
    common = Tokens(torch.tensor([1, 2, 299]), torch.arange(3)), Sequences(torch.ones(3), torch.ones(3))
    far, near = (
        policy_loss(z, *common, inplace=True) for z in (wide, wide.clone(memory_format=torch.contiguous_format))
    )
    assert torch.equal(far.logprobs, near.logprobs)


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize("mode", [{}, {"ratio": "cispo"}, {"kl": "k2", "kl_coef": 0.3}, {"ratio": "sequence"}])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(mode: dict, softcap: float | None):
    hidden, head, tokens, weights = case(T=6, V=5, S=2)
    h, w, b = (x.double().requires_grad_() for x in (hidden, head, torch.linspace(-1, 1, 5)))
    logp = linear_logprobs(h, w, tokens.targets, softcap=softcap, head_bias=b)[0].detach()
    # CISPO's weight is detached, so its ratio must be exactly 1
    tokens = tokens._replace(behavior=logp, old=None if mode.get("ratio") == "cispo" else logp + 0.05,
                             reference=logp + 0.1 if "kl" in mode else None)  # fmt: skip
    common = tokens, Sequences(weights, torch.tensor([1.0, -0.5])), LossOptions(entropy_coef=0.1, **mode)

    def of_hidden(h, w, b):
        return linear_policy_loss(h, w, *common, chunk_rows=4, softcap=softcap, head_bias=b).loss

    def of_logits(z):
        return policy_loss(z, *common, softcap=softcap).loss

    assert torch.autograd.gradcheck(of_hidden, (h, w, b))
    assert torch.autograd.gradcheck(of_logits, ((h @ w.T + b).detach().requires_grad_(),))


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
def test_activation_checkpointing_around_the_operators():
    from torch.utils.checkpoint import checkpoint

    hidden, head, tokens, weights = case()

    def step(h, w):
        h = (h @ h.new_ones(8, 8)).tanh()
        loss = linear_policy_loss(h, w, tokens, Sequences(weights, torch.ones(4))).loss
        return loss + linear_logprobs(h, w, tokens.targets)[1].mean()

    grads = []
    for f in (step, lambda *a: checkpoint(step, *a, use_reentrant=False)):
        h, w = (x.clone().requires_grad_() for x in (hidden, head))
        f(h, w).backward()
        grads.append((h.grad, w.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize("fused", [False, True])
def test_compile_sees_one_operator(fused: bool):
    hidden, head, tokens, weights = case()
    options, advantage_options = LossOptions(entropy_coef=0.1), AdvantageOptions()
    more: dict = {"softcap": 3.0 if fused else None}

    def step(h, w, b, lengths):
        bias = b if fused else None
        groups = Groups(Outcomes(lengths > 5, lengths), 2, advantage_options)  # torch 2.11 cannot trace the default
        given = groups if fused else lead_advantages(*groups).advantage
        out = linear_policy_loss(h, w, tokens, Sequences(weights, given), options, head_bias=bias, **more)
        logits = policy_loss(h @ w.T, tokens, Sequences(weights, given), options, **more)
        entropy = linear_logprobs(h, w, tokens.targets, head_bias=bias, **more)[1]
        return out.loss + logits.loss + entropy.mean() + out.metrics["entropy"]

    grads = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, head, torch.linspace(-1, 1, len(head))))
        f(h, w, b, torch.tensor([5, 9, 7, 6])).backward()
        grads.append((h.grad, w.grad, b.grad))
        assert (b.grad is not None) == fused
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
@pytest.mark.parametrize("train", [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, None]])
def test_opcheck(train: list):
    hidden, head, tokens, weights = case()
    bias = torch.linspace(-1, 1, len(head))
    h, w, b = (None if t is None else x.clone().requires_grad_(t == 1)
               for x, t in zip((hidden, head, bias), train, strict=True))  # fmt: skip
    z, softmax = (hidden @ head.T).requires_grad_(), Softmax(0.7, 3.0 if train[2] else None)
    ops, options = torch.ops.lead_kernels, LossOptions(importance_cap=1.5, entropy_coef=0.1).encode(softmax)
    for sequences in ((weights, torch.ones(4), []), (weights, *GROUPS.encode())):
        plan = [4, *(t or 0 for t in train), 0]
        torch.library.opcheck(ops.linear_policy_loss.default, (h, w, b, *tokens, *sequences, options, plan))
        torch.library.opcheck(ops.policy_loss.default, (z, *tokens, *sequences, options, True))
    torch.library.opcheck(ops.linear_logprobs.default, (h, w, b, tokens.targets, softmax.encode(), 4, False))
    torch.library.opcheck(ops.lead_advantages.default, GROUPS.encode())


# The committed table has all rows; compiling a few of them again shows that it belongs to these kernels.
TABLE = DOCUMENT.parent / "evidence" / "kernel_resources.md"


def committed() -> list[dict[str, str]]:
    rows = [r.strip("| ").split(" | ") for r in TABLE.read_text(encoding="utf-8").splitlines() if r.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table_has_every_row_without_spills_and_with_wide_loads():
    rows = committed()
    assert [(r["kernel"], r["dtype"], r["target"]) for r in rows] == list(resources.every_row())
    for r in rows:
        assert int(r["spills"]) == 0, r
        if r["kernel"] != "lead_advantages_kernel":
            assert int(r["load_bytes"]) == 16, r
            forward = r["kernel"].startswith(resources.STATISTICS) or r["kernel"] == resources.FORWARD
            assert int(r["store_bytes"]) == 16 or forward, r
            counts = [r[c] for c in ("first", "second", "both")]
            if r["target"] == "gfx942":
                assert set(counts) == {"-"}, r
            else:
                assert float(r["both"]) > 5 and (r["second"] == "0.0") == forward, r


# both looks at a row, for sm_90 in bf16, including loss, exact logits of the targets and advantages of the groups
CEILINGS = {resources.POLICY: 15, resources.ENTROPY: 18, resources.GROUPED: 18}


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("kernel", CEILINGS)
def test_instructions_per_logit(kernel: str):
    made = resources.compiled(kernel, "bf16", "sm_90")
    assert made["spills"] == 0 and made["load_bytes"] == 16 and made["store_bytes"] == 16
    assert [look.writes for look in made["looks"]] == [False, True]
    for look in made["looks"]:
        assert 1.0 <= look.pipes["mufu"] < 1.1 and look.pipes["fma"] >= 2  # shows that these are the loops over logits
        assert look.ahead > 0.4, "a tile is waited for before the one before it is computed"
    assert made["both"] == made["first"] + made["second"] <= CEILINGS[kernel]


def test_a_loop_that_waits_for_its_load_is_seen_as_such():
    loop = """
.L_x_1:
        /*0010*/                   {load} ;
        /*0020*/                   FFMA R9, R8, R2, R3 ;
        /*0030*/                   FADD R10, R10, R9 ;
        /*0040*/                   FADD R11, R10, {used} ;
        /*0050*/              @P0  BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""
    for used, ahead in (("R7", 0.6), ("R9", 1.0)):
        (look,) = resources.looks(loop.format(load="LDG.E.128 R4, desc[UR4][R2.64]", used=used), itemsize=2)
        assert look.ahead == ahead and look.per_logit == 5 / 8 and look.pipes["fma"] == 3 / 8 and not look.writes
    assert not resources.looks(loop.format(load="@!P1 LDG.E.128 R4, desc[UR4][R2.64]", used="R7"), itemsize=2)


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("target", resources.TARGETS)
def test_cross_compiled_again(target: str):
    made = resources.compiled(resources.ENTROPY, "fp16", target)
    assert made["load_bytes"] == 16 and made["store_bytes"] == 16
    assert made["spills"] == 0 or target == "gfx942"  # the compiler for gfx942 spills a few bytes in fp16


@pytest.mark.skipif(INTERPRETED, reason="one process is enough")
def test_chunks_fill_whole_waves_of_a_device_that_the_table_knows():
    budget, row_bytes = 2 << 30, 2 * 152_064

    def chunk(rows: int, hidden: int, processors: int = 132, row_bytes: int = row_bytes) -> int:
        return _device.chunk_rows(rows, hidden, row_bytes, budget, processors)

    assert [chunk(30_000, D) for D in (5120, 3584, 1536)] == [8448, 8448, 8448]
    assert [chunk(30_000, D, row_bytes=2 * row_bytes) for D in (5120, 3584, 1536)] == [4224, 3456, 2816]
    for processors, waves in _device.WAVES.items():
        for hidden, rows in waves.items():
            assert rows % 128 == 0 and rows // 128 * (hidden // 256) % processors == 0
            assert _device.MOST_ROWS % rows == 0
    assert chunk(7000, 5120) == 7000 and chunk(8000, 5120) == 8000  # one chunk
    for processors in (0, 108, 132, 160):
        for rows in (0, 1, 127, 7100, 14_123, 65_537):
            step = chunk(rows, 4096, processors)
            assert 1 <= step <= max(1, rows) and step * row_bytes <= budget
            if processors and step < rows:
                assert step % 128 == 0
    assert chunk(10, 5120, row_bytes=budget) == 1


# What the interpreter cannot test: absent pointers, and integer arguments of 1, which the compiler treats as constants.
OPTIONAL = dict.fromkeys(
    ("target_logit_ptr", "behavior_ptr", "old_ptr", "reference_ptr", "log_ratio_ptr", "importance_ptr")
)
GIVEN, FUSED = {"table_ptr": None}, {"advantage_ptr": None}  # advantages, or outcomes
ONE = {"V": 1, "stride": 1, "grad_stride": 1, "T": 1}
UNCAPPED, UNPAIRED = {"softcap": None}, {"PAIRS": False}


def variant(loss: dict | None = None, groups: dict | None = None, **constants) -> dict:
    options = {"loss_options": resources.loss(**(loss or {})), "group_options": resources.advantage(**(groups or {}))}
    return {"BLOCK": 128, "BLOCK_G": 16, "ENTROPY": False, "HINTS": True} | UNPAIRED | UNCAPPED | options | constants


PLAIN = {"length_reward": False, "difficulty": False, "std": "none"}
FULL = {"std": "mad", "nonnegative_correct": True, "rate": "positive", "group_filter": "uniform"}
VARIANTS = {
    "soft cap": ("policy_rows_kernel", {k: v for k, v in variant(**GIVEN, **ONE).items() if k != "softcap"}),
    "soft cap, statistics": ("row_stats_kernel", {"BLOCK": 128} | UNPAIRED),
    "soft cap, gradient": ("row_gradient_kernel", {"BLOCK": 128} | UNPAIRED),
    "forward only": ("policy_rows_kernel", variant(**GIVEN, **OPTIONAL, grad_ptr=None)),
    "no old log-probs": ("policy_rows_kernel", variant(**GIVEN, **OPTIONAL)),
    "cispo": ("policy_rows_kernel", variant({"ratio": "cispo", "importance_cap": 2.0, "importance_mode": "mask",
                                             "kl": "k1"}, **GIVEN)),
    "one row of one": ("policy_rows_kernel", variant({"kl": "k2", "dual_clip": 3.0}, **GIVEN, **ONE)),
    "sapo": ("policy_rows_kernel", variant({"ratio": "sapo"}, **GIVEN)),
    "delta": ("policy_rows_kernel", variant({"delta": 3.0}, **GIVEN)),
    "pairs and the entropy's gradient": ("policy_rows_kernel", variant(**GIVEN, PAIRS=True, ENTROPY=True)),
    "groups": ("policy_rows_kernel", variant({}, PLAIN, **FUSED)),
    "groups of one": ("policy_rows_kernel", variant({}, FULL, **FUSED, size=1)),
    "advantages of one": ("lead_advantages_kernel", variant({}, FULL, BLOCK=16, size=1)),
    "advantages": ("lead_advantages_kernel", variant({}, PLAIN, BLOCK=16)),
    "statistics of one": ("row_stats_kernel", {"BLOCK": 128, "V": 1, "stride": 1, "target_logit_ptr": None}
                          | UNPAIRED | UNCAPPED),
    "scale": ("scale_kernel", {"BLOCK": 4096}),
    "gradient of one": ("row_gradient_kernel", {"BLOCK": 128, "V": 1, "stride": 1} | UNPAIRED | UNCAPPED),
}  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_with_options_absent(name: str):
    kernel, constants = VARIANTS[name]
    made = resources.build(kernel, "bf16", ("cuda", 90, 32), constants, 1, True)
    assert "ld.global" in made.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="needs the compiler")
@pytest.mark.parametrize("groups", [resources.ALL_GROUPS, {"std": "mad", "length_gate": 4000}])
def test_the_compiler_has_no_product_of_a_groups_advantages_to_fuse(groups: dict, tmp_path: Path):
    """The arithmetic is the same with fused multiply-adds (row kernel) and without (lead_advantages).

    `total` makes sums independent of the number of warps, which the interpreter cannot show either.
    """
    import triton

    disassemble = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not disassemble.exists():
        pytest.skip("this Triton has no disassembler")
    counts = []
    for fusion in (True, False):
        constants = variant({}, groups, BLOCK=64)
        made = resources.build("lead_advantages_kernel", "fp32", ("cuda", 90, 32), constants, 4, fusion)
        (tmp_path / "a.cubin").write_bytes(made.asm["cubin"])
        said = subprocess.run([disassemble, "-c", tmp_path / "a.cubin"], capture_output=True, text=True, check=True)
        counts.append(Counter(re.findall(r"\b(FFMA|FADD|FMUL|MUFU)\b", said.stdout)))
    assert counts[0] == counts[1] and counts[0]["FADD"] > 0
