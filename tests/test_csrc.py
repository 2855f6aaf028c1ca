"""Test csrc against the fp64 specification: dtypes, hard shapes and values, threads, instruction sets, builds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lead_kernels import AdvantageOptions, LossOptions, Outcomes
from lead_kernels._rows import cpu_extension, row_gradient_, row_gradient_reference, row_stats, row_stats_reference
from lead_kernels.advantage import lead_advantages_reference
from lead_kernels.options import Softmax
from lead_kernels.policy_loss import for_row_kernel, policy_rows_
from lead_kernels.testing import oracle

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}

if cpu_extension() is None and not shutil.which("c++"):
    pytest.skip("no compiler, no extension", allow_module_level=True)
cpp = torch.ops.lead_kernels_cpu


def rows(shape: tuple[int, int], dtype: torch.dtype, offset: float = 0.0, scale: float = 3.0, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=make) * scale + offset).to(dtype)
    targets = torch.randint(shape[1], shape[:1], generator=make)
    g, h = (torch.randn(shape[0], generator=make).to(wide(dtype)) * 1e-3 for _ in range(2))
    return logits, targets, g, h


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run(logits, targets, g, h, temperature=1.0, softcap=None):
    """Compute statistics and gradient with csrc; the gradient overwrites a copy."""
    stats = cpp.row_stats(logits, targets, temperature, softcap)
    grad = logits.clone()
    cpp.row_gradient_(grad, targets, stats, g, h, temperature, softcap=softcap)
    return stats, grad


def spec(logits, targets, g, h, softmax, dtype):
    z = logits.to(dtype)
    stats = row_stats_reference(z, targets, softmax)
    return stats, row_gradient_reference(z, targets, stats, g.to(dtype), h.to(dtype), softmax)


def compare(logits, targets, g, h, temperature=1.0, softcap=None):
    """Require at most twice the error of torch, or a few roundings where torch happens to be exact."""
    stats, grad = run(logits, targets, g, h, temperature, softcap)
    softmax = Softmax(temperature, softcap)
    exact, exact_grad = spec(logits, targets, g, h, softmax, torch.float64)
    torch_stats, torch_grad = spec(logits, targets, g, h, softmax, wide(logits.dtype))
    # float64: the specification has no more digits than the kernel
    unit = 16 * UNIT[torch.float64] if logits.dtype == torch.float64 else UNIT[torch.float32]
    for name, column in (("max", 0), ("log_norm", 1), ("logprob", 2), ("entropy", 3)):
        error, baseline = ((x[:, column].double() - exact[:, column]).abs() for x in (stats, torch_stats))
        room = 2 * baseline.amax() + 4 * unit * exact[:, column].abs().clamp(min=1)
        assert (error <= room).all(), f"{name}: error {error.amax():.2e}, torch's {baseline.amax():.2e}"
    assert (stats[:, 2] <= 0).all() and (stats[:, 3] >= 0).all()
    error = (grad.double() - exact_grad).abs()
    baseline = (torch_grad.to(logits.dtype).double() - exact_grad).abs().amax(1, keepdim=True)
    if len(baseline) > 1000:  # among so many rows torch is exact in some by chance
        baseline = baseline.clamp(min=baseline.mean())
    tiny = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
    room = 2 * baseline + 2 * UNIT[logits.dtype] * exact_grad.abs() + 8 * unit * exact_grad.abs().amax(1, keepdim=True)
    if logits.dtype == torch.float64:  # and onehot - p cancels where p is nearly 1
        room += unit * (g.abs() + h.abs())[:, None] / temperature
    assert (error <= room + tiny).all(), f"gradient: error {error.amax():.2e}, torch's {baseline.amax():.2e}"


SHAPES = [
    (3, 1),
    (37, 7),
    (5, 31),
    (5, 32),
    (5, 33),
    (4, 4097),
    (4099, 61),
    (3, 49_152),
    (1, 151_936),
    (1, 152_064),
    (2, 152_065),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(dtype, shape):
    compare(*rows(shape, dtype))


@pytest.mark.parametrize("temperature", [0.3, 0.6, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperatures(dtype, temperature):
    compare(*rows((3, 5000), dtype), temperature)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets(dtype, offset):
    compare(*rows((3, 3001), dtype, offset))


@pytest.mark.parametrize("scale, softcap", [(0.1, 50.0), (3.0, 15.0), (20.0, 30.0), (99.0, 3.0), (3.0, 1e4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_caps(dtype, scale, softcap):
    """Caps that hardly bend the logits, bend them, saturate them with ties, or are out of reach."""
    for shape in ((6, 1), (6, 7), (3, 3001)):
        compare(*rows(shape, dtype, scale=scale), 0.7, softcap)


def test_a_soft_cap_keeps_the_digits_of_small_and_of_saturated_logits():
    """tanh is within 2 units in the last place, and its derivative within 8 where tanh rounds to 1."""
    u = torch.cat([torch.linspace(-12, 12, 100_001), torch.logspace(-30, 0, 1000), torch.tensor([0.0, 0.55, 200.0])])
    z = 4 * u[:, None]
    stats = cpp.row_stats(z, torch.zeros(len(u), dtype=torch.int64), 1.0, 4.0)
    exact = 4 * torch.tanh(z[:, 0].double() / 4)
    ulp = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
    assert ((stats[:, 0] - exact).abs() <= 2 * ulp).all()
    # Two equal logits: p is 1/2 whatever their value, so the gradient of the one that is not the target is -g slope /
    # 2.
    pairs = z.expand(-1, 2).contiguous()
    stats = torch.stack([stats[:, 0], torch.full_like(u, 2.0).log(), -torch.full_like(u, 2.0).log(), 0 * u], 1)
    ones, grad = torch.ones_like(u), torch.empty_like(pairs)
    cpp.row_gradient_(pairs, torch.zeros(len(u), dtype=torch.int64), stats, ones, 0 * u, 1.0, grad, 4.0)
    slope = torch.cosh(z.double() / 4) ** -2
    torch.testing.assert_close(grad[:, 1:].double(), -slope / 2, rtol=3e-6, atol=1e-37)
    torch.testing.assert_close(grad[:, :1].double(), slope / 2, rtol=3e-6, atol=1e-37)


def test_capped_logits_of_minus_infinity_have_the_probability_of_minus_the_cap():
    logits = torch.tensor([[-torch.inf, 0.0, torch.inf], [0.0, -torch.inf, torch.nan]])
    ones = torch.ones(2)
    stats, grad = run(logits, torch.tensor([0, 1]), ones, ones, 1.0, 2.0)
    expected = torch.tensor([-2.0, 0.0, 2.0]).log_softmax(0)[0]
    torch.testing.assert_close(stats[0, 2], expected)
    assert grad[0, 0] == 0 and grad[0, 2] == 0 and grad[0].isfinite().all()
    assert stats[1, 2:].isnan().all() and grad[1].isnan().all()


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_rows_move_the_maximum_always_or_never(order):
    logits, targets, g, h = rows((3, 3001), torch.float32, scale=10)
    compare(logits.sort(1, descending=order == "descending").values, targets, g, h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits_have_no_probability_and_no_gradient(dtype):
    logits, targets, g, h = rows((4, 999), dtype)
    masked = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[3] = True  # all except the target
    masked.scatter_(1, targets[:, None], False)
    logits[masked] = -torch.inf
    compare(logits, targets, g, h)
    stats, grad = run(logits, targets, g, h)
    assert (grad[masked] == 0).all()
    assert stats[3, 1:].tolist() == [0, 0, 0] and grad[3].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_far_above_the_rest_and_a_target_far_below(dtype):
    logits, targets, g, h = rows((4, 700), dtype)
    logits[torch.arange(4), (targets + 1) % 700] = torch.finfo(dtype).max
    compare(logits[:2], targets[:2], g[:2], torch.zeros_like(h[:2]))
    stats, grad = run(logits, targets, g, h)
    assert (stats[:, 2] < -1e4).all() and (stats[:, 3] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 40, 698])
def test_a_bad_logit_is_reported_in_its_row_alone(value, column):
    for dtype in DTYPES:
        logits, targets, g, h = rows((3, 699), dtype)
        clean, clean_grad = run(logits, targets, g, h)
        logits[1, column] = value
        stats, grad = run(logits, targets, g, h)
        assert stats[1, 2:].isnan().all() and grad[1].isnan().all()
        assert torch.equal(stats[::2], clean[::2]) and torch.equal(grad[::2], clean_grad[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_logit_is_reported_in_the_shortest_rows(dtype):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[nan, 0, 0], [0, 0, nan], [inf, 0, 0], [-inf, -inf, -inf], [0, 0, 0]], dtype=dtype)
    ones = torch.ones(5, dtype=wide(dtype))
    stats, grad = run(logits, torch.tensor([1, 1, 0, 2, 1]), ones, ones)
    assert stats[:4, 2:].isnan().all() and grad[:4].isnan().all()
    assert stats[4].isfinite().all() and grad[4].isfinite().all()


def test_small_gradients_are_scaled_before_they_are_rounded():
    logits, targets, g, _ = rows((3, 400), torch.float16, scale=0.1)
    stats = cpp.row_stats(logits, targets, 1.0)
    assert (stats[:, 2] < -5).all()
    compare(logits, targets, g * 1e-3, torch.zeros_like(g))
    cpp.row_gradient_(logits, targets, stats, torch.full_like(g, 30.0), torch.zeros_like(g), 1.0)
    assert (logits != 0).all()


def test_a_row_without_gradient_is_zeros_even_where_it_is_not_scaled():
    logits, targets, g, h = rows((3, 100), torch.bfloat16)
    _, grad = run(logits, targets, torch.zeros_like(g), torch.zeros_like(h))
    assert (grad == 0).all()


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_a_target_outside_the_vocabulary_is_an_error_before_anything_is_written(bad):
    logits, targets, g, h = rows((3, 50), torch.float32)
    stats, before = cpp.row_stats(logits, targets, 1.0), logits.clone()
    targets[2] = bad
    with pytest.raises(ValueError, match=f"target {bad} is outside the vocabulary of 50"):
        cpp.row_stats(logits, targets, 1.0)
    with pytest.raises(ValueError, match=f"target {bad} is outside"):
        cpp.row_gradient_(logits, targets, stats, g, h, 1.0)
    assert torch.equal(logits, before)


def test_what_the_kernels_do_not_take_is_refused():
    logits, targets, *_ = rows((3, 50), torch.float32)
    for wrong in (logits.to(torch.int32), logits.T.contiguous().T, logits[0], logits[:, :0]):
        with pytest.raises(ValueError, match="give"):
            cpp.row_stats(wrong, targets, 1.0)
    for wrong in (targets.int(), targets[:2], targets[:, None]):
        with pytest.raises(ValueError, match="give"):
            cpp.row_stats(logits, wrong, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_row_stride_and_nothing_written_beside_the_rows(dtype):
    logits, targets, g, h = rows((5, 71), dtype)
    expected_stats, expected = run(logits, targets, g, h)
    room = torch.full((5, 90), 77.0, dtype=dtype)
    inside = room[:, 8:79]
    inside.copy_(logits)
    stats = cpp.row_stats(inside, targets, 1.0)
    cpp.row_gradient_(inside, targets, stats, g, h, 1.0)
    assert torch.equal(stats, expected_stats) and torch.equal(inside, expected)
    assert (room[:, :8] == 77).all() and (room[:, 79:] == 77).all()
    before, beside = logits.clone(), torch.full((5, 90), 77.0, dtype=dtype)
    cpp.row_gradient_(logits, targets, stats, g, h, 1.0, beside[:, 8:79])
    assert torch.equal(beside, room) and torch.equal(logits, before)
    with pytest.raises(ValueError, match="out is"):
        cpp.row_gradient_(logits, targets, stats, g, h, 1.0, beside)


def test_offsets_past_2_to_the_31():
    """Rows 2^30 apart in bfloat16: 4 GiB of addresses, of which three short rows are touched."""
    near, targets, g, h = rows((3, 300), torch.bfloat16)
    far = torch.empty(2 * 2**30 + 300, dtype=torch.bfloat16).as_strided((3, 300), (2**30, 1))
    far.copy_(near)
    stats = cpp.row_stats(far, targets, 1.0)
    cpp.row_gradient_(far, targets, stats, g, h, 1.0)
    same, grad = run(near, targets, g, h)
    assert torch.equal(stats, same) and torch.equal(far, grad)


def test_no_rows():
    stats, grad = run(*rows((0, 50), torch.float32))
    assert stats.shape == (0, 4) and grad.shape == (0, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run_and_with_any_number_of_threads(dtype):
    case = rows((67, 3001), dtype)
    logits, targets, g, _ = case
    tokens, options = [targets, torch.arange(67) % 4, g, None, None], LossOptions(entropy_coef=0.1)
    numbers = options.encode(Softmax()), options.clip_range
    sequences = torch.ones(4), torch.linspace(-1, 1, 4)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            out = logits.clone()
            made = cpp.policy_rows_(out, tokens, [None, None], *sequences, *numbers, out)
            results.append((*run(*case), *made, out))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_rows_are_shared_out_over_threads():
    code = (
        "import torch, os, lead_kernels._C; torch.set_num_threads(2); z = torch.empty(64, 20_000);"
        "t = torch.tensor([0] * 64); count = lambda: len(os.listdir('/proc/self/task')); before = count();"
        "torch.ops.lead_kernels_cpu.row_stats(z, t, 1.0); print(count() - before)"
    )
    assert python("-c", code).stdout == "1\n"
    assert python("-c", code.replace("(2)", "(1)")).stdout == "0\n"


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | env,
                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_that_this_cpu_has(capability):
    show = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    best = ["default", "avx2", "avx512"].index(python("-c", show).stdout.strip())
    if ["default", "avx2", "avx512"].index(capability) > best:
        pytest.skip(f"this CPU has no {capability}")
    assert python("-c", show, ATEN_CPU_CAPABILITY=capability).stdout.strip() in (capability, "no avx")
    inner = "not instruction_set and not compiler and not without_torch and not shared_out"
    done = python("-m", "pytest", "-q", "-x", "-k", inner, __file__, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


def launchers() -> SimpleNamespace:
    """This CPU's row kernels, under the launcher names that the oracle uses."""

    def policy_rows(logits, tokens, sequences, *rest):
        loss, logp, entropy, metrics = policy_rows_(logits, tokens, for_row_kernel(sequences, logits), *rest)
        return loss, logp, entropy, metrics[2:-2, None]

    def row_gradient(*arguments):
        *most, out, target_logits = arguments if len(arguments) == 8 else (*arguments, None)
        row_gradient_(*most, out=out, target_logits=target_logits)

    return SimpleNamespace(
        policy_rows_triton=policy_rows, row_stats_triton=row_stats, row_gradient_triton_=row_gradient
    )


@pytest.mark.parametrize("backend", ["C++", "plain torch"])
def test_the_oracle_of_the_triton_kernels_accepts_these(backend, monkeypatch):
    if backend == "plain torch":
        monkeypatch.setattr("lead_kernels._rows.cpu_extension", lambda: None)
    kernels = launchers()
    oracle.check_rows(kernels)
    oracle.check_target_logits(kernels)


def one_call(dtype: torch.dtype, **given: torch.Tensor | None) -> list:
    """Make arguments of `cpp.policy_rows_` for 3 rows of 2 sequences."""
    logits, targets, g, _ = rows((3, 50), dtype)
    tokens = {"targets": targets, "ids": torch.tensor([0, 1, 1]), "behavior": g, "old": None, "reference": None} | given
    options = LossOptions(entropy_coef=0.1)
    numbers = options.encode(Softmax()), options.clip_range
    return [logits, list(tokens.values()), [None, None], torch.ones(2), torch.tensor([1.0, -2.0]), *numbers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_one_go_have_the_log_probs_and_the_gradient_of_the_two_halves(dtype):
    """Bit for bit, except the gradient, whose two forms each round the same product of the same exponential."""
    call = one_call(dtype)
    logits, (targets, *_), out = call[0], call[1], torch.empty_like(call[0])
    loss, logprob, entropy, metrics = cpp.policy_rows_(*call, out)
    stats = cpp.row_stats(logits, targets, 1.0)
    assert torch.equal(logprob, stats[:, 2]) and torch.equal(entropy, stats[:, 3])
    assert loss.dtype == wide(dtype) and metrics.shape == (8, 3)
    g, h = -torch.tensor([1.0, -2.0, -2.0], dtype=wide(dtype)), torch.full((3,), -0.1, dtype=wide(dtype))
    halves = logits.clone()
    cpp.row_gradient_(halves, targets, stats, g, h, 1.0)
    torch.testing.assert_close(out, halves, rtol=4 * UNIT[dtype], atol=1e-7)
    forward = cpp.policy_rows_(*call)
    before = logits.clone()
    assert all(torch.equal(a, b) for a, b in zip(forward, (loss, logprob, entropy, metrics), strict=True))
    assert torch.equal(logits, before)
    cpp.policy_rows_(*call, logits)
    assert torch.equal(logits, out)


def test_what_the_rows_in_one_go_do_not_take_is_refused():
    for given, says in (
        ({"ids": torch.tensor([0, 1, 2])}, "sequence id 2 is outside the number of sequences, 2"),
        ({"ids": torch.tensor([0, 1])}, "sequence ids are"),
        ({"targets": torch.tensor([0, 1, 50])}, "target 50 is outside the vocabulary of 50"),
        ({"old": torch.zeros(2)}, "old is .*: give .3"),
    ):
        with pytest.raises(ValueError, match=says):
            cpp.policy_rows_(*one_call(torch.float32, **given))
    *call, options, clip_range = one_call(torch.float32)
    with pytest.raises(ValueError, match="14 options and 2 bounds"):
        cpp.policy_rows_(*call, options[:14], clip_range)
    with pytest.raises(ValueError, match="out is"):
        cpp.policy_rows_(*call, options, clip_range, torch.empty(3, 49))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bits_of_nan_are_lost(dtype):
    """Quiet and signalling NaN of both signs and any payload, in the lanes of a vector and past the last vector."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = torch.tensor(torch.inf, dtype=dtype).view(integers).item()
    most = torch.iinfo(integers).max
    for bits in (infinity + 1, most, infinity + (most - infinity) // 2 + 1, -1, -most + infinity):
        for column in (3, 130):
            logits, targets, g, h = rows((2, 135), dtype)
            logits.view(integers)[1, column] = bits
            assert logits[1].isnan().sum() == 1
            targets[1] = 7
            for softcap in (None, 5.0):
                stats, grad = run(logits, targets, g, h, softcap=softcap)
                assert stats[1, 2:].isnan().all() and grad[1].isnan().all()
                assert stats[0].isfinite().all() and grad[0].isfinite().all()
                out, tokens = torch.empty_like(logits), [targets, torch.zeros_like(targets), None, None, None]
                numbers = LossOptions().encode(Softmax(softcap=softcap)), LossOptions().clip_range
                cpp.policy_rows_(logits, tokens, [None, None], torch.ones(1), torch.ones(1), *numbers, out)
                assert out[1].isnan().all() and out[0].isfinite().all()


def test_exact_logits_of_the_targets_are_refused_in_another_dtype_or_size():
    logits, targets, g, h = rows((3, 50), torch.bfloat16)
    stats = cpp.row_stats(logits, targets, 1.0)
    for wrong in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="target_logits are .*: give contiguous"):
            cpp.row_stats(logits, targets, 1.0, None, wrong)
        with pytest.raises(ValueError, match="target_logits are .*: give contiguous"):
            cpp.row_gradient_(logits, targets, stats, g, h, 1.0, None, None, wrong)


# ------------------------------------------------------------------------------------------------------ lead_advantages

OPTIONS = [
    {},
    {"alpha": 0.2, "weight_low": 0.1, "weight_high": 2.0, "slope": 3.0, "midpoint": 0.4},
    {"length_reward": False},
    {"difficulty": False},
    {"std": "none"},
    {"std": "mad", "eps": 1e-3},
    {"length_gate": 4000.0},
    {"length_min_solve_rate": 0.5},
    {"nonnegative_correct": True},
    {"rate": "positive", "group_filter": "official"},
    {"group_filter": "uniform"},
    {"baseline": "length"},
    {"std": "batch", "batch_std": 0.3, "baseline": "length"},
    {"length_advantage": 0.4, "length_reward": False, "length_min_solve_rate": 0.3},
    {"length_advantage": 0.4, "length_gate": 4000.0, "std": "mad"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")
@pytest.mark.parametrize("group", [1, 2, 3, 8, 64])
def test_advantages(options, group):
    make = torch.Generator().manual_seed(group)
    n = 12 * group
    correct = torch.rand(n, generator=make) < torch.linspace(0, 1, 12).repeat_interleave(group)
    lengths = torch.randint(1000, 14_000, (n,), generator=make)
    lengths[:group] = 500
    wrong = torch.where(torch.rand(n, generator=make) < 0.2, 0.5, -1.0).double()
    penalty = -torch.rand(n, generator=make).double()
    o = AdvantageOptions(**options)
    for extra in (None, penalty):
        table = Outcomes(correct, lengths, wrong, extra).table()
        want = lead_advantages_reference(table, group, o)
        got = cpp.lead_advantages(table, group, o.encode())
        for ours, specified in zip(got, want, strict=True):
            torch.testing.assert_close(ours, specified, atol=1e-6, rtol=1e-6)


def test_advantages_refuse_what_does_not_fit():
    table, encoded = torch.zeros(6, 4), AdvantageOptions().encode()
    for args, says in (((table, 4, encoded), "multiple of the group size 4"), ((table[:, :3], 3, encoded), "give .S"),
                       ((table, 3, encoded[:-1]), "16 options: .*, 17")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            cpp.lead_advantages(*args)


# ------------------------------------------------------------------------------------------------------------ the build


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess:
    return python("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp",
                  str(tmp_path / "temp"), **env)  # fmt: skip


def test_without_a_compiler_one_sentence_and_no_failure(tmp_path):
    done = build(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("built without its C++ kernels: there is no C++ compiler") == 1


def test_without_torch_one_sentence_and_no_failure(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    done = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("built without its C++ kernels: this environment has no torch") == 1


def test_a_compiler_that_fails_costs_the_extension_only(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$*" in *-c*) exit 1;; esac\nexec c++ "$@"\n')
    broken.chmod(0o755)
    done = build(tmp_path, CXX=str(broken), CC=str(broken))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("built without its C++ kernels: compiling failed") == 1
