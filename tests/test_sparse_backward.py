"""Test the sparse backward: thresholds, lists, gradients, the bound, random draws, dense rows, and seeded mistakes."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lead_kernels import LossOptions, Sequences, Tokens, linear_logprobs, linear_policy_loss
from lead_kernels import _sparse as sparse
from lead_kernels._head import full_reductions, target_logits
from lead_kernels._rows import cpu_extension, row_gradient_reference, row_stats_reference
from lead_kernels._sparse import Sparsity, dense_matrix, edges, sparse_rows_reference
from lead_kernels.options import Softmax

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")
outside = pytest.mark.skipif(INTERPRETED, reason="of the CPU's own backends")
HALF = [torch.bfloat16, torch.float16]


def rows(C: int, V: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0):
    """Make logits [C, V], targets and g."""
    make = torch.Generator().manual_seed(seed)
    logits = (torch.randn(C, V, generator=make) * scale).to(dtype)
    return logits, torch.randint(V, (C,), generator=make), torch.randn(C, generator=make)


def both(logits, targets, g, softmax, s, first_row=0):
    stats = row_stats_reference(logits, targets, softmax)
    return (f(logits, targets, stats, g, softmax, s, first_row) for f in (sparse.sparse_rows, sparse_rows_reference))


@outside
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("softcap", [None, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("C, V, scale", [(5, 1, 1.0), (7, 37, 3.0), (33, 5003, 3.0), (9, 4097, 0.3)])
def test_the_lists_are_those_of_the_specification(C, V, scale, dtype, softcap, seed):
    if cpu_extension() is None:
        pytest.skip("no C++ extension")
    logits, targets, g = rows(C, V, dtype, scale)
    for mass in (1e-3, 0.05, 0.9):
        ours, spec = both(logits, targets, g, Softmax(0.7, softcap), Sparsity(mass, V, seed), 2)
        same = ours.threshold == spec.threshold
        # If the mass below an edge equals the limit up to rounding, the neighbouring edge is as good.
        assert same.float().mean() >= 0.8 and torch.allclose(ours.threshold, spec.threshold, rtol=0.15)
        assert bool((ours.starts.diff()[same] == spec.starts.diff()[same]).all())
        keep = torch.repeat_interleave(same, ours.starts.diff()), torch.repeat_interleave(same, spec.starts.diff())
        columns, values = (
            (x[k] for x, k in zip((a, b), keep, strict=True)) for a, b in zip(ours[1:3], spec[1:3], strict=True)
        )
        assert torch.equal(*columns)
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours.dropped[same], spec.dropped[same], rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(ours.drawn[same], spec.drawn[same], rtol=1e-5, atol=0)


def check_lists(module) -> None:
    """Check the entries of a chunk against their definition, in float64 by plain torch."""
    C, V, T = 12, 400, 0.7
    logits, targets, g = (x.double() if x.is_floating_point() else x for x in rows(C, V, scale=2.0))
    targets[0], targets[1] = logits[0].argmin(), logits[1].argmax()
    g[2] = 0
    stats = row_stats_reference(logits, targets, Softmax(T))
    p = (logits / T).softmax(1)
    others = p.scatter(1, targets[:, None], 0.0)
    exact = g[:, None] / T * (torch.nn.functional.one_hot(targets, V) - p)
    for mass in (1e-3, 0.03):
        found = module.sparse_rows(logits, targets, stats, g, Softmax(T), Sparsity(mass, V))
        matrix = dense_matrix(found, V)
        listed = dense_matrix(found._replace(values=torch.ones_like(found.values)), V) > 0
        for i in range(C):
            columns = found.columns[found.starts[i] : found.starts[i + 1]].tolist()
            assert columns == sorted(set(columns)) and (targets[i] in columns) == (i != 2)
            if i == 2:
                continue
            dropped = others[i][~listed[i]].sum()
            assert dropped <= mass and torch.isclose(dropped, found.dropped[i], rtol=1e-9, atol=1e-12)
            finer = edges(p)
            higher = finer[finer > found.threshold[i]][0]
            assert others[i][others[i] < higher].sum() > mass, "a higher threshold would have done"
            torch.testing.assert_close(matrix[i][listed[i]], exact[i][listed[i]], rtol=1e-9, atol=0)
        least = int(found.starts.diff().median())
        short = module.sparse_rows(logits, targets, stats, g, Softmax(T), Sparsity(mass, least))
        dense = found.starts.diff() > least
        assert torch.equal(short.threshold < 0, dense) and dense.any() and not dense.all()
        assert torch.equal(short.starts.diff(), found.starts.diff().masked_fill(dense, 0))


def check_chance(module) -> None:
    """Check that draws depend on seed, row and column alone, and that their mean over seeds is unbiased."""
    C, V, T, seeds = 6, 300, 1.0, 300
    logits, targets, g = (x.double() if x.is_floating_point() else x for x in rows(C, V, scale=2.0, seed=1))
    logits[1], targets[1], g[1] = logits[0], targets[0], g[0]  # equal rows, whose draws must differ
    stats = row_stats_reference(logits, targets, Softmax(T))
    exact = row_gradient_reference(logits, targets, stats, g, torch.zeros_like(g), Softmax(T))
    plain = dense_matrix(module.sparse_rows(logits, targets, stats, g, Softmax(T), Sparsity(0.2, V)), V)
    total = torch.zeros_like(exact)
    for seed in range(seeds):
        s = Sparsity(0.2, V, seed)
        found = module.sparse_rows(logits, targets, stats, g, Softmax(T), s, 5)
        part = module.sparse_rows(logits[2:], targets[2:], stats[2:], g[2:], Softmax(T), s, 7)
        assert torch.equal(dense_matrix(found, V)[2:], dense_matrix(part, V)), "the draw depends on the chunk"
        total += dense_matrix(found, V)
        assert not torch.equal(*dense_matrix(found, V)[:2])
    below = plain == 0
    assert below.float().mean() > 0.5
    error = ((total / seeds - exact) * below).sum(1) / (g.abs() / T)
    # Each entry adds p (threshold - p) to the variance of one draw.
    threshold = module.sparse_rows(logits, targets, stats, g, Softmax(T), Sparsity(0.2, V)).threshold[:, None]
    p = logits.softmax(1)
    deviation = ((p * (threshold - p) * below).sum(1) / seeds).sqrt()
    assert bool((error.abs() < 5 * deviation).all()) and bool((deviation < 0.02).all())


def check_backward(module) -> None:
    """Check all three gradients of a chunk against the dense ones and the bound, including rows computed densely."""
    C, V, D, T = 10, 120, 8, 0.8
    make = torch.Generator().manual_seed(4)
    hidden, head = (torch.randn(n, D, generator=make, dtype=torch.float64) for n in (C, V))
    hidden[3:5] *= 0.01  # nearly uniform, so they need every column
    logits, targets, g = (
        hidden @ head.T,
        torch.randint(V, (C,), generator=make),
        torch.randn(C, generator=make).double(),
    )
    stats = row_stats_reference(logits, targets, Softmax(T))
    exact = row_gradient_reference(logits, targets, stats, g, torch.zeros_like(g), Softmax(T))
    norm = module.max_row_norm(head)
    assert torch.isclose(norm, head.norm(dim=1).max())
    for mass in (0.02, 0.1):
        for sparse_head in (False, True):
            to = sparse.Gradients(
                torch.full_like(hidden, 7.0), torch.full_like(head, 7.0), torch.full((V,), 7.0).double()
            )
            s = Sparsity(mass, 100)
            found = module.sparse_rows(logits, targets, stats, g, Softmax(T), s)
            dense = found.threshold < 0
            kept = torch.where(dense[:, None], exact, dense_matrix(found, V))
            assert dense.tolist() == [i in (3, 4) for i in range(C)]
            dropped, share, most = module.sparse_backward_(
                logits.clone(), targets, stats, g, hidden, head, Softmax(T), s, to, sparse_head=sparse_head, norm=norm,
                first_row=0,
            )  # fmt: skip
            torch.testing.assert_close(to.hidden, kept @ head)
            torch.testing.assert_close(to.head, (kept if sparse_head else exact).T @ hidden)
            torch.testing.assert_close(to.bias, (kept if sparse_head else exact).sum(0))
            assert to.hidden is not None
            error = (to.hidden - exact @ head).norm(dim=1)
            bound = g.abs() / T * found.dropped * norm
            assert bool((error <= bound + 1e-9).all()) and bool((bound <= most + 1e-12).all()) and 0 < error.max()
            assert torch.isclose(dropped, found.dropped.sum())
            assert torch.isclose(share, (found.starts.diff().double() / V).sum() + dense.sum())
    to = sparse.Gradients(torch.empty_like(hidden), None, None)
    module.sparse_backward_(logits.clone(), targets, stats, g, hidden, head, Softmax(T), Sparsity(0.02, 1), to,
                            sparse_head=False, norm=norm, first_row=0)  # fmt: skip
    torch.testing.assert_close(to.hidden, exact @ head)


CHECKS = (check_lists, check_chance, check_backward)


@outside
@pytest.mark.parametrize("check", CHECKS)
def test_the_specification(check):
    check(sparse)


WRONG = {
    "target dropped": ("keep = (p >= threshold) | at_target", "keep = p >= threshold"),
    "target counted as dropped": ("others = p.masked_fill(at_target, 0.0)", "others = p"),
    "mass exceeded by a bin": ("- 1).clamp(min=0)", ").clamp(max=8 * OCTAVES)"),
    "a threshold that drops less than it may": ("- 1).clamp(min=0)", "- 3).clamp(min=0)"),
    "unsorted list": ("keep.nonzero()[:, 1].int()", "keep.nonzero()[:, 1].int().flip(0)"),
    "temperature forgotten in p": ("(capped(z, softcap) - top) / temperature", "(capped(z, softcap) - top)"),
    "temperature forgotten in the gradient": ("(-g[:, None] / temperature)", "(-g[:, None])"),
    "sign of the target": ("torch.expm1(logprob), value", "-torch.expm1(logprob), value"),
    "one-hot forgotten": ("torch.expm1(logprob), value", "p, value"),
    "drawn entries at their own value": ("torch.where(chosen, threshold, p)", "torch.where(chosen, p, p)"),
    "half of the draws": ("* threshold < p)", "* threshold < 0.5 * p)"),
    "the same draw for every row": ("C, device=device) & 0xFFFFFFFF) ^ key", "C, device=device) * 0) ^ key"),
    "a draw that starts again in every chunk": ("torch.arange(first_row, first_row + C", "torch.arange(0, C"),
    "the same draw for every seed": ("key = mix(torch.tensor(seed & 0xFFFFFFFF", "key = mix(torch.tensor(0 * seed"),
    "rows over the limit kept": ("dense = count > s.most", "dense = count > 10**9"),
    "rows at the limit dense": ("dense = count > s.most", "dense = count >= s.most"),
    "rows over the limit left out": ("to.hidden[dense] = dense_gradient @ head", "pass"),
    "d head of rows over the limit left out": ("dense_backward_(dense_gradient,", "(lambda *_, **__: 0)(0,"),
    "sparse d head unasked": ("if trains_head and not sparse_head:", "if False:"),
    "rows without gradient listed": ("& (g != 0)[:, None]", ""),
    "bound without the norm": ("(entries.dropped + entries.drawn) * norm", "(entries.dropped + entries.drawn)"),
    "bound without the temperature": ("g.abs() / softmax.temperature", "g.abs() * softmax.temperature * 0.5"),
    "largest norm of a column": ("torch.linalg.vector_norm(weight, dim=1", "torch.linalg.vector_norm(weight, dim=0"),
}  # fmt: skip


@outside
@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_rejected(name, tmp_path):
    import importlib.util

    right, wrong = WRONG[name]
    text = Path(sparse.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in _sparse.py"
    (tmp_path / "wrong.py").write_text(
        text.replace(right, wrong)
        .replace("from ._", "from lead_kernels._")
        .replace("from .options", "from lead_kernels.options"),
        encoding="utf-8",
    )
    spec = importlib.util.spec_from_file_location("lead_kernels_wrong_sparse", tmp_path / "wrong.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def accepted(check) -> bool:
        try:
            check(module)
        except AssertionError:
            return False
        return True

    assert not all(accepted(check) for check in CHECKS)


# ------------------------------------------------------------------------------------------- the operators around it


def problem(
    T: int = 70, V: int = 500, D: int = 16, dtype: torch.dtype = torch.float32, scale: float = 1.5, seed: int = 0
):
    make = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, D, generator=make) for n in (T, V))
    ids = torch.arange(T) % 3
    tokens = Tokens(torch.randint(V, (T,), generator=make), ids)
    sequences = Sequences(torch.tensor([0.01, 0.02, 0.0]), torch.tensor([1.0, -0.7, 0.4]))
    return (hidden * scale).to(dtype), head.to(dtype), tokens, sequences


def gradients(o, *, train=("hidden", "head", "bias"), temperature=0.9, bias=True, **more):
    keywords = {k: more.pop(k) for k in ("chunk_rows", "seed", "softcap") if k in more}
    hidden, head, tokens, sequences = problem(**more)
    b = torch.linspace(-1, 1, len(head), dtype=head.dtype) if bias else None
    inputs = {"hidden": hidden, "head": head, "bias": b}
    leaves = {k: x.requires_grad_(k in train) for k, x in inputs.items() if x is not None}
    out = linear_policy_loss(hidden, head, tokens, sequences, o, temperature=temperature, head_bias=b, **keywords)
    out.loss.backward()
    return out, {k: x.grad for k, x in leaves.items() if k in train}


DENSE, SPARSE = LossOptions(), LossOptions(dropped_mass=0.01)


def limit(monkeypatch, share: float) -> None:
    monkeypatch.setattr(sparse, "DENSE_ABOVE", {"cpu": share, "cuda": share})


@outside
@pytest.mark.parametrize("backend", ["C++", "plain torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_gradient_is_within_the_bound(dtype, backend, monkeypatch):
    limit(monkeypatch, 0.9)
    if backend == "plain torch":
        monkeypatch.setattr("lead_kernels._rows.cpu_extension", lambda: None)
        monkeypatch.setattr(sparse, "cpu_extension", lambda: None)
    want, exact = gradients(DENSE, dtype=dtype, chunk_rows=32)
    for options in (SPARSE, replace(SPARSE, sparse_head=True)):
        got, grads = gradients(options, dtype=dtype, chunk_rows=32)
        assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.loss, want.loss)
        torch.testing.assert_close({k: got.metrics[k] for k in want.metrics}, want.metrics)  # sums in another order
        T = len(got.logprobs)
        assert 0 < got.metrics["dropped_mass"] / T <= 0.01 and 0 < got.metrics["column_share"] / T < 0.9
        rounding = 0.0 if dtype != torch.bfloat16 else 2.0**-7 * exact["hidden"].norm(dim=1).max()
        error = (grads["hidden"].double() - exact["hidden"].double()).norm(dim=1).max()
        assert 0 < error <= got.metrics["max_hidden_error"] * (1 + 1e-4) + rounding
        off = max(((grads[k] - exact[k]).norm() / exact[k].norm()).item() for k in ("head", "bias"))
        # For a dense row C++ computes the exponentials once, and twice otherwise.
        near = 1e-6 if dtype == torch.float32 else 1e-3
        assert (off < near) != options.sparse_head
        assert (grads["head"] - exact["head"]).norm() < 0.05 * exact["head"].norm()
        assert (grads["bias"] - exact["bias"]).norm() < 0.05 * exact["bias"].norm()
        alone, frozen = gradients(options, dtype=dtype, chunk_rows=32, train=("hidden",))
        assert torch.equal(frozen["hidden"], grads["hidden"]) and torch.equal(alone.loss, got.loss)


@outside
@pytest.mark.parametrize("sparse_head", [False, True])
def test_the_same_bits_every_time_with_any_number_of_threads(sparse_head, monkeypatch):
    limit(monkeypatch, 0.9)
    threads, runs = torch.get_num_threads(), []
    o = replace(SPARSE, sparse_head=sparse_head, sample_dropped=True)
    try:
        for n in (1, 3, 1):
            torch.set_num_threads(n)
            runs.append(gradients(o, T=130, V=3000, seed=5)[1])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][k], other[k]) for k in other)


@outside
def test_seeds_draw_differently_and_have_no_bias(monkeypatch):
    limit(monkeypatch, 1.0)
    o = LossOptions(dropped_mass=0.3, sample_dropped=True)
    exact = gradients(DENSE)[1]["hidden"]
    plain = gradients(LossOptions(dropped_mass=0.3))[1]["hidden"]
    drawn = torch.stack([gradients(o, seed=seed)[1]["hidden"] for seed in range(150)])
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], gradients(o, seed=2**32)[1]["hidden"])
    assert (drawn.mean(0) - exact).norm() < 0.25 * (plain - exact).norm()
    assert (drawn.mean(0) - exact).abs().max() < 6 * (drawn.std(0) / 150**0.5).max()
    got, grads = gradients(o, seed=3)
    assert (grads["hidden"] - exact).norm(dim=1).max() <= got.metrics["max_hidden_error"] * (1 + 1e-4)


@outside
def test_what_is_computed_densely():
    more: dict
    for more, options in (({"scale": 0.001}, SPARSE), ({}, replace(SPARSE, entropy_coef=0.1))):
        want, exact = gradients(replace(options, dropped_mass=0.0), **more)
        got, grads = gradients(options, **more)
        torch.testing.assert_close(grads, exact)
        T = len(got.logprobs)
        assert [float(got.metrics[k]) for k in sparse.SPARSE_METRICS] == [0.0, T, 0.0]
        assert not set(sparse.SPARSE_METRICS) & set(want.metrics)


@outside
def test_rows_that_are_not_numbers_stay_so():
    hidden, head, tokens, sequences = problem()
    hidden[4] = float("nan")
    grads = []
    for o in (DENSE, SPARSE):
        h = hidden.clone().requires_grad_()
        linear_policy_loss(h, head, tokens, sequences, o).loss.backward()
        grads.append(h.grad)
    assert all(bool(g[4].isnan().all()) for g in grads)
    rest = torch.arange(len(hidden)) != 4
    torch.testing.assert_close(grads[1][rest], grads[0][rest], rtol=0.1, atol=1e-3)
    assert bool((grads[1][tokens.sequence_ids == 2] == 0).all())  # weight 0


@outside
@pytest.mark.filterwarnings("ignore")
def test_the_operator_compiles_and_passes_opcheck():
    hidden, head, tokens, sequences = problem(T=8, V=40, D=4)
    o = replace(SPARSE, sample_dropped=True)
    args = (hidden, head, None, *tokens, *sequences, [], o.encode(Softmax(0.9)), [4, 1, 0, 0, 7])
    torch.library.opcheck(
        torch.ops.lead_kernels.linear_policy_loss, args, test_utils=("test_schema", "test_faketensor")
    )

    def f(h):
        out = linear_policy_loss(h, head, tokens, sequences, o, seed=7)
        return out.loss, out.metrics["column_share"]

    results = []
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        h = hidden.clone().requires_grad_()
        loss, share = call(h)
        loss.backward()
        results.append((h.grad, share))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("values, says", [
    ({"dropped_mass": 1.0}, "dropped_mass is 1.0"),
    ({"dropped_mass": -0.1}, "dropped_mass is -0.1"),
    ({"dropped_mass": 1e-9}, "dropped_mass is 1e-09"),
    ({"dropped_mass": float("nan")}, "dropped_mass is nan"),
    ({"sparse_head": True}, "give dropped_mass above 0"),
    ({"sample_dropped": True}, "give dropped_mass above 0"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        LossOptions(**values)


# ------------------------------------------------------------------------------------------ logits of half precision


@outside
def test_the_sampled_tokens_logit_is_exact_in_half_precision():
    """At |z| of about 25, bf16 rounding is 0.06 nats, most of it from the target's own logit."""
    T, V, D = 600, 2000, 64
    make = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(T, D, generator=make).bfloat16(), (torch.randn(V, D, generator=make) * 0.9).bfloat16()
    logits = hidden.double() @ head.double().T
    targets = (logits + -torch.rand(T, V, generator=make).log().neg().log()).argmax(1)  # sampled tokens
    exact = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert 15 < logits.amax(1).mean() < 35
    ours = linear_logprobs(hidden, head, targets)[0]
    plain = (hidden @ head.T).float().log_softmax(1).gather(1, targets[:, None])[:, 0]
    deviation = [float((x - exact).std()) for x in (ours, plain)]
    assert deviation[0] <= 0.017 < deviation[1]
    sequences = Sequences(torch.ones(1), torch.ones(1))
    tokens = Tokens(targets, torch.zeros(T, dtype=torch.int64))
    assert torch.equal(linear_policy_loss(hidden, head, tokens, sequences).logprobs, ours)
    for x in (
        linear_logprobs(hidden, head, targets, fp32_logits=True)[0],
        linear_policy_loss(hidden, head, tokens, sequences, LossOptions(fp32_logits=True)).logprobs,
    ):
        assert (x - exact).abs().max() < 2e-5


@outside
@pytest.mark.parametrize("dtype", HALF)
def test_the_exact_logit_has_bias_and_cap(dtype):
    hidden, head, tokens, _ = problem(T=9, V=30, dtype=dtype)
    bias = torch.linspace(-2, 2, 30).to(dtype)
    z = hidden.double() @ head.double().T + bias.double()
    exact = target_logits(hidden, head, bias, tokens.targets)
    assert exact is not None
    torch.testing.assert_close(exact.double(), z.gather(1, tokens.targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert target_logits(hidden.float(), head.float(), bias.float(), tokens.targets) is None
    got = linear_logprobs(hidden, head, tokens.targets, head_bias=bias, softcap=4.0, temperature=0.7)[0]
    want = (4 * torch.tanh(z / 4) / 0.7).log_softmax(1).gather(1, tokens.targets[:, None])[:, 0]
    assert (got - want).abs().max() < 0.03


@outside
def test_fp32_logits_have_gradients_of_the_inputs_dtype():
    want = gradients(DENSE, dtype=torch.float64)[1]
    for o in (LossOptions(fp32_logits=True), replace(SPARSE, fp32_logits=True, dropped_mass=1e-4)):
        _, grads = gradients(o, dtype=torch.bfloat16)
        for k, g in grads.items():
            assert g.dtype == torch.bfloat16 and (g - want[k]).norm() < 0.03 * want[k].norm()
    for fp32, least in ((False, 0.0), (True, 0.0)):
        hidden, head, tokens, _ = problem(dtype=torch.bfloat16)
        h = hidden.requires_grad_()
        linear_logprobs(h, head, tokens.targets, fp32_logits=fp32)[0].sum().backward()
        assert h.grad is not None and h.grad.dtype == torch.bfloat16 and h.grad.norm() > least


SWITCHES = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def test_reductions_are_in_full_precision_inside_and_put_back(monkeypatch):
    cublas = torch.backends.cuda.matmul
    seen = []
    for module in (sys.modules["lead_kernels.linear_logprobs"], sys.modules["lead_kernels.linear_policy_loss"]):

        def logits_of(*arguments, real=module.logits_of):
            seen.append([getattr(cublas, s) for s in SWITCHES])
            return real(*arguments)

        monkeypatch.setattr(module, "logits_of", logits_of)
    before = [getattr(cublas, s) for s in SWITCHES]
    try:
        for values in ([True, True, False], [False, True, False], [(False, False), True, False]):
            for s, v in zip(SWITCHES, values, strict=True):
                setattr(cublas, s, v)
            state = [(getattr(cublas, s), getattr(cublas, s + "_split_k", None)) for s in SWITCHES]
            hidden, head, tokens, sequences = problem(T=4, V=9, D=4)
            hidden.requires_grad_()
            linear_policy_loss(hidden, head, tokens, sequences).loss.backward()
            linear_logprobs(hidden, head, tokens.targets)[0].sum().backward()
            with pytest.raises(ValueError, match="target"):
                linear_logprobs(hidden, head, tokens.targets + 100)
            assert [(getattr(cublas, s), getattr(cublas, s + "_split_k", None)) for s in SWITCHES] == state
    finally:
        for s, v in zip(SWITCHES, before, strict=True):
            setattr(cublas, s, v)
    assert len(seen) == 9 and not any(any(x) for x in seen)
    with full_reductions():
        assert not any(getattr(cublas, s) for s in SWITCHES)
    assert [getattr(cublas, s) for s in SWITCHES] == before


# --------------------------------------------------------------------------------------------------------------- Triton


@outside
@pytest.mark.parametrize("tests", ["not mistakes", pytest.param("mistakes", marks=pytest.mark.slow)])
def test_under_the_interpreter(tests):
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        f"triton and {tests}",
        __file__,
    ]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert said.returncode == 0 and "passed" in said.stdout, said.stdout[-3000:]


def chunk(dtype: torch.dtype, C: int = 150, V: int = 300, D: int = 24):
    """Make a chunk's inputs, and its gradient [C, V] with the p from which it follows, in the kernel's precision."""
    make = torch.Generator().manual_seed(2)
    hidden, head = (torch.randn(n, D, generator=make).to(dtype) for n in (C, V))
    targets, g = torch.randint(V, (C,), generator=make), torch.randn(C, generator=make)
    g[7] = 0
    logits = (hidden @ head.T).float()
    stats = row_stats_reference(logits, targets, Softmax(0.5))
    gradient = row_gradient_reference(logits, targets, stats, g, torch.zeros_like(g), Softmax(0.5)).to(dtype)
    return hidden, head, targets, g, stats[:, 2].contiguous(), (logits / 0.5).softmax(1), gradient


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "dtype, mass, seed", [(torch.float32, 1e-3, 11), (torch.float32, 0.02, None), (torch.bfloat16, 0.02, None)]
)
def test_triton_lists_and_products(dtype, mass, seed):
    from lead_kernels._triton_sparse import ROWS, TILE, chunk_of, lists_of, product_

    hidden, head, targets, g, logprob, p, gradient = chunk(dtype)
    (C, V), at = gradient.shape, targets[:, None]
    c = chunk_of(gradient, targets, logprob, Sparsity(mass, V, seed), 3)
    read = gradient.abs().float() * c.inverse[:, None]  # p as a kernel computes it
    true, others = (x.scatter(1, at, 0.0) for x in (p, read))
    dropped = (true * (others < c.threshold[:, None])).sum(1)
    live = g != 0
    assert bool((dropped <= mass * 1.001)[live].all())
    # One more bin, counted at its upper edge (an eighth above the lower one, plus the slack), would exceed the mass.
    more = torch.tensor([(others[i] * (others[i] < 1.126 * c.threshold[i])).sum() for i in range(C)])
    assert bool(((more > mass / 1.15) | (c.threshold == 1.0))[live].all())
    kept = (others >= c.threshold[:, None]).scatter(1, at, True) & live[:, None]
    if seed is not None:
        u = sparse.uniform(seed, 3, p.shape, p.device)
        kept |= (u * c.threshold[:, None] < others) & live[:, None]
    kept[7] = torch.nn.functional.one_hot(targets[7], V) > 0
    rows, columns = lists_of(c, False), lists_of(c, True)
    for lists, needed, size in ((rows, kept, ROWS), (columns, kept.T, TILE)):
        for i, n in enumerate(lists.lengths):
            listed = lists.lists[lists.starts[i] : lists.starts[i + 1]]
            want = needed[i * size : (i + 1) * size].any(0).nonzero()[:, 0]
            assert torch.equal(listed, want) and n == len(want)
    block = torch.arange(C) // ROWS
    listed = torch.zeros(len(rows.lengths), V, dtype=torch.bool)
    for i in range(len(rows.lengths)):
        listed[i, rows.lists[rows.starts[i] : rows.starts[i + 1]]] = True
    out, total = torch.full_like(hidden, 7.0), torch.ones(V, hidden.shape[1])
    product_(out, c, rows, head, False)
    product_(total, c, columns, hidden, True)
    if seed is None:
        want = (gradient.float() * listed[block]) @ head.float()
        torch.testing.assert_close(out.float(), want, rtol=2**-6 if dtype != torch.float32 else 1e-4, atol=1e-4)
        error = (total - 1 - gradient.float().T @ hidden.float()).norm() / total.norm()
        assert error < 0.05
        least = (gradient.float() @ head.float() - want).norm(dim=1)
        scale = torch.where(c.inverse > 0, 1 / c.inverse, 0.0)
        assert bool((least <= scale * rows.dropped * head.float().norm(dim=1).max() + 1e-5).all())
        assert bool((rows.dropped[live] <= mass * 1.02).all())


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sparse_head", [False, True])
def test_triton_backward(sparse_head, monkeypatch):
    """Checks the operator, with a block of rows over the limit, against plain torch within the bound."""
    limit(monkeypatch, 0.5)
    o = replace(SPARSE, sparse_head=sparse_head, dropped_mass=0.02)
    more = {
        "T": 140,
        "V": 400,
        "D": 20,
        "chunk_rows": 140,
        "temperature": 0.4,
        "bias": False,
        "train": ("hidden", "head"),
    }
    want, exact = gradients(DENSE, dtype=torch.float64, **more)  # computed by plain torch
    exact = {k: x.float() for k, x in exact.items()}
    if not sparse_head:
        limit(monkeypatch, 1 / 400)
        got, grads = gradients(o, **more)
        torch.testing.assert_close(grads["hidden"], exact["hidden"], rtol=1e-4, atol=1e-6)
        assert got.metrics["column_share"] == 140 and got.metrics["dropped_mass"] == 0
        limit(monkeypatch, 0.5)
    got, grads = gradients(o, **more)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-6)
    assert 0 < got.metrics["dropped_mass"] / 140 <= 0.02 and 0 < got.metrics["column_share"] / 140 < 1
    error = (grads["hidden"] - exact["hidden"]).norm(dim=1).max()
    assert 1e-6 < error <= got.metrics["max_hidden_error"] * 1.01
    error = (grads["head"] - exact["head"]).norm() / exact["head"].norm()
    assert 1e-5 < error < 0.1 if sparse_head else error < 1e-5
    if sparse_head:
        again = gradients(o, **more)[1]
        assert all(torch.equal(again[k], grads[k]) for k in grads)


def triton_mistakes(folder: Path, right: str, wrong: str):
    import importlib.util

    from lead_kernels import _triton_sparse

    text = Path(_triton_sparse.__file__).read_text(encoding="utf-8")
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in _triton_sparse.py"
    text = text.replace(right, wrong).replace("from ._sparse", "from lead_kernels._sparse")
    (folder / "wrong.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("lead_kernels_wrong_triton_sparse", folder / "wrong.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRONG_TRITON = {
    "target dropped": ("| is_target | (d != d)", "& (is_target == 0)"),
    "bins by their lower edges": ("((at + FIRST_BIN + 1) << 20)", "((at + FIRST_BIN - 3) << 20)"),
    "lists without their last tile": ("at = start + tl.program_id(1) * W +", "at = start +"),
    "rows of the head not gathered": ("x_ptr + index[:, None] * x_stride", "x_ptr + at[:, None] * x_stride"),
    "d head not added to": ("total += tl.load(to, mask=mask, other=0.0)", "total += 0.0"),
    "draw without the first row": ("mix((first_row + rows)", "mix((0 * first_row + rows)"),
}  # fmt: skip


@inside
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", WRONG_TRITON)
def test_triton_mistakes_are_rejected(name, tmp_path, monkeypatch):
    from lead_kernels import _triton_sparse

    wrong = triton_mistakes(tmp_path, *WRONG_TRITON[name])
    for attribute in ("chunk_of", "lists_of", "product_"):
        monkeypatch.setattr(_triton_sparse, attribute, getattr(wrong, attribute))
    seed = 11 if "draw" in name else None
    with pytest.raises(AssertionError):
        test_triton_lists_and_products(torch.float32, 0.02, seed)


@outside
@pytest.mark.parametrize("kernel", ["threshold_rows", "needed", "pack", "gather_product"])
def test_triton_kernels_compile_without_spills(kernel):
    pytest.importorskip("triton")
    for by_column in (False, True):
        made = compiled_sparse(kernel, "bf16", by_column)
        assert made["spills"] == 0 and made["registers"] <= 255
        if kernel == "gather_product":
            assert made["load_bytes"] == 16 and made["shared"] <= 227 << 10 and "mma" in made["text"]


def compiled_sparse(kernel: str, dtype: str, by_column: bool) -> dict:
    """Return registers, spills (bytes), shared memory (bytes) and widest load of a sparse backward kernel on sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lead_kernels import _triton_sparse
    from lead_kernels.testing.resources import tool

    function = getattr(_triton_sparse, kernel)
    constants = {
        "R": 128,
        "W": 128,
        "K": 32,
        "BINS_": 512,
        "BLOCK": 2048,
        "SAMPLE": False,
        "WIDE": False,
        "BY_COLUMN": by_column,
        "ADD": by_column,
    }
    types = {"grad_ptr": "*" + dtype, "packed_ptr": "*" + dtype, "x_ptr": "*" + dtype, "target_ptr": "*i64",
             "start_ptr": "*i64", "list_ptr": "*i64", "flag_ptr": "*i8", "mass": "fp32",
             "out_ptr": "*fp32" if by_column else "*" + dtype}  # fmt: skip
    signature, fixed, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            if name.endswith("_ptr") or "stride" in name or name in ("V", "D"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=fixed, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    usage = tool("cuobjdump", made.asm["cubin"], "--dump-resource-usage")
    registers, stack, local = (int(re.findall(rf"\b{x}:(\d+)", usage)[0]) for x in ("REG", "STACK", "LOCAL"))
    widths = re.findall(
        r"(?:ld\.global|cp\.async)\S*?(?:\.v(\d))?\.b(\d+)|cp\.async\S* \[[^\]]*\], \[[^\]]*\], 0x(\w+)",
        made.asm["ptx"],
    )
    widest = max(int(b, 16) if b else int(n or 1) * int(bits) // 8 for n, bits, b in widths)
    return {"registers": registers, "spills": stack + local, "load_bytes": widest, "shared": made.metadata.shared,
            "text": made.asm["ptx"]}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the trainer


@outside
@pytest.mark.slow
def test_a_run_with_a_frozen_head_and_dropped_mass_reports_both_and_resumes(tmp_path):
    from jobs import python, records, small, succeeded, torchrun, weights

    out = tmp_path / "run"
    sparse_run = [*small(tmp_path, f"--output={out}"), "--loss.dropped_mass=0.01", "--model.freeze_head=true"]
    succeeded(torchrun(2, "-m", "lead_fast.train", *sparse_run, "--steps=3"))
    succeeded(torchrun(2, "-m", "lead_fast.train", *sparse_run, "--steps=4", "--resume"))
    steps = records(out, "train")
    assert len(steps) == 4
    for r in steps:
        assert 0 <= r["dropped_mass"] <= 0.01 and 0 < r["column_share"] <= 1 and r["max_hidden_error"] >= 0
    assert any(r["dropped_mass"] > 0 and r["grad_norm"] > 0 for r in steps)
    from safetensors.torch import load_file

    from lead_fast.learner.model import resolve

    before, after = load_file(Path(resolve("tiny")) / "model.safetensors"), weights(out)
    frozen = {k for k in after if torch.equal(after[k].float(), before[k].to(after[k].dtype).float())}
    assert frozen == {"model.embed_tokens.weight"}  # tied: head and embedding share one weight
    for more, says in (
        (["--loss.dropped_mass=1e-9"], "dropped_mass is 1e-09"),
        (["--loss.entropy_coef=0.1"], "loss.entropy_coef 0.1"),
        (["--loss.sparse_head=true"], "loss.sparse_head is true with model.freeze_head"),
    ):
        refused = python("-m", "lead_fast.train", *sparse_run, *more)
        assert refused.returncode and says in refused.stdout + refused.stderr, (refused.stdout + refused.stderr)[-2000:]
