"""Test the kernels against fp64: golden vectors of the released code, every loss mode, hard shapes and values."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_kernels import (
    AdvantageOptions,
    Groups,
    LeadAdvantages,
    LossOptions,
    Outcomes,
    Sequences,
    Tokens,
    batch_std,
    lead_advantages,
    linear_logprobs,
    linear_policy_loss,
    loss_weights,
    policy_loss,
)
from lead_kernels._head import add_in_slices_
from lead_kernels._rows import cpu_extension
from lead_kernels.options import Softmax

pytestmark = pytest.mark.quick

# ------------------------------------------------------------------------------------------------------ lead_advantages

# lengths of correct and of wrong responses, options, rewards, advantages: G = 8, computed by the released functions
GOLDEN = {
    "A": ([6000, 8000], [7000, 9000, 9500, 10000, 11000, 12000], {},
          [1.035988, 0.965262] + [-1] * 6, [2.474827, 2.360860] + [-0.512951] * 6),
    "B": ([5000, 5200, 5600, 6000, 6400, 7000, 8000], [9000], {},
          [1.056756, 1.046843, 1.027295, 1.008111, 0.989286, 0.961706, 0.917436, -1],
          [0.278225, 0.269206, 0.251422, 0.233970, 0.216844, 0.191753, 0.151479, -3.699352]),
    "B without AD": ([5000, 5200, 5600, 6000, 6400, 7000, 8000], [9000], {"difficulty": False},
          [1.056756, 1.046843, 1.027295, 1.008111, 0.989286, 0.961706, 0.917436, -1],
          [0.431376, 0.417393, 0.389820, 0.362761, 0.336208, 0.297305, 0.234862, -2.469724]),
    "C": ([5000, 6000, 7000, 8000], [6500, 9000, 9000, 10000], {},
          [1.059815, 1.019554, 0.980821, 0.943561] + [-1] * 4,
          [1.402388, 1.349089, 1.297814, 1.248487] + [-1.324445] * 4),
    "D": (list(range(5000, 9000, 500)), [], {},
          [1.074057, 1.052356, 1.031092, 1.010258, 0.989846, 0.969845, 0.950249, 0.931049],
          [0.704860, 0.495209, 0.289795, 0.088532, -0.337022, -0.936267, -1.523402, -2.098675]),
    "E": ([], list(range(1000, 9000, 1000)), {}, [-1] * 8, [0] * 8),
    "F": ([5000], [1000] * 7, {}, [1] + [-1] * 7, [3.707060] + [-0.228031] * 7),
    "G": ([3000, 4000, 4500, 5000], [6000, 7000, 8000, 9000],
          {"length_gate": 4000, "rate": "positive", "group_filter": "official"},
          [1] * 4 + [-1] * 4, [1.325066] * 4 + [-1.325066] * 4),
}  # fmt: skip


def lead(correct, lengths, group_size, wrong_reward=None, bonus=None, **options) -> LeadAdvantages:
    return lead_advantages(Outcomes(correct, lengths, wrong_reward, bonus), group_size, AdvantageOptions(**options))


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name):
    right, wrong, options, reward, advantage = GOLDEN[name]
    correct = torch.tensor([1] * len(right) + [0] * len(wrong))
    got = lead(correct, torch.tensor(right + wrong), 8, **options)
    torch.testing.assert_close(got.reward, torch.tensor(reward, dtype=torch.float32), atol=2e-6, rtol=0)
    torch.testing.assert_close(got.advantage, torch.tensor(advantage, dtype=torch.float32), atol=4e-6, rtol=0)
    assert got.solve_rate.tolist() == [len(right) / 8] and got.kept.tolist() == [True]


def test_difficulty_weights():
    """w(rho) at 0, 1/8, ..., 1, derived from groups whose normalised advantage is known."""
    expected = [1.499392, 1.497881, 1.492638, 1.474725, 1.416556, 1.255030, 0.950000, 0.644970, 0.483444]
    for n in range(1, 8):
        correct = torch.tensor([1] * n + [0] * (8 - n))
        on, off = (lead(correct, torch.full((8,), 100), 8, difficulty=d).advantage for d in (True, False))
        assert abs(on[0] / off[0] - expected[n]) < 2e-6 and abs(on[-1] / off[-1] - expected[8 - n]) < 2e-6
        weights = [lead(correct, torch.full((8,), 100), 8, difficulty=d).weight.item() for d in (True, False)]
        assert weights == [pytest.approx(expected[n], abs=1e-6), 1]


def test_several_groups_are_independent():
    correct = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1])
    lengths = torch.tensor([5, 9, 7, 6, 14_000, 13_999, 3, 4])
    both = lead(correct, lengths, 4)
    for i in range(2):
        one = lead(correct[4 * i : 4 * i + 4], lengths[4 * i : 4 * i + 4], 4)
        assert torch.equal(both.advantage[4 * i : 4 * i + 4], one.advantage)


def test_lengths_near_14000_keep_their_digits():
    lengths = torch.tensor([14_000, 14_001, 14_002, 14_003])
    got = lead(torch.ones(4), lengths, 4).reward.double()
    z = (lengths.double() - 14_001.5) / (lengths.double().std() + 1e-6)
    torch.testing.assert_close(got, torch.exp(-0.05 * z), atol=1e-7, rtol=0)
    same = lead(torch.ones(4), torch.full((4,), 14_001), 4)
    assert same.reward.tolist() == [1.0] * 4 and same.advantage.tolist() == [0.0] * 4


def test_switches():
    correct, lengths = torch.tensor([1, 1, 1, 1]), torch.tensor([10, 20, 30, 40])
    assert lead(correct, lengths, 4).advantage.min() < 0
    assert lead(correct, lengths, 4, nonnegative_correct=True).advantage.min() == 0
    assert lead(correct, lengths, 4, length_reward=False).advantage.abs().max() == 0
    mixed = torch.tensor([1, 1, 0, 0])
    assert lead(mixed, lengths, 4, length_min_solve_rate=0.6).reward.tolist() == [1, 1, -1, -1]
    assert lead(mixed, lengths, 4, length_min_solve_rate=0.4).reward[0] > 1
    plain = lead(mixed, lengths, 4, length_reward=False, difficulty=False, std="none", wrong_reward=0.0)
    assert plain.advantage.tolist() == [0.5, 0.5, -0.5, -0.5]
    mad = lead(mixed, lengths, 4, length_reward=False, difficulty=False, std="mad")
    torch.testing.assert_close(mad.advantage, torch.tensor([1.0, 1.0, -1.0, -1.0]), atol=1e-5, rtol=0)
    each = lead(mixed, lengths, 4, wrong_reward=torch.tensor([0.0, 0.0, -1.5, 0.0]), length_reward=False)
    assert each.reward.tolist() == [1, 1, -1.5, 0]
    penal = lead(mixed, lengths, 4, bonus=torch.tensor([0.0, -0.5, 0.0, -0.5]), length_reward=False)
    assert penal.reward.tolist() == [1, 0.5, -1, -1.5]
    positive = lead(mixed, lengths, 4, bonus=torch.tensor([0.0, -1.5, 0, 0]), rate="positive")
    assert positive.solve_rate.tolist() == [0.25]
    for filters, outcome, kept in (("official", [0, 0], False), ("official", [1, 1], True), ("uniform", [1, 1], False),
                                   ("uniform", [1, 0], True), ("none", [0, 0], True)):  # fmt: skip
        got = lead(torch.tensor(outcome), torch.tensor([4, 8]), 2, group_filter=filters)
        assert got.kept.tolist() == [kept]
    unshaped = lead(torch.ones(2), torch.tensor([4, 8]), 2, group_filter="official", length_reward=False)
    assert unshaped.kept.tolist() == [False] and unshaped.advantage.tolist() == [0, 0]


def test_a_group_of_one_has_mean_0_and_std_1():
    got = lead(torch.tensor([1, 0]), torch.tensor([10, 10]), 1, difficulty=False)
    assert got.advantage.tolist() == [1, -1]


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_group_sizes_out_of_range(size):
    with pytest.raises(ValueError, match=f"group_size is {size}"):
        lead(torch.ones(4), torch.ones(4), size)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of group_size 3"):
        lead(torch.ones(4), torch.ones(4), 3)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), min_size=2, max_size=40), st.randoms())
@settings(max_examples=100, deadline=None)
def test_permuting_a_group_permutes_its_advantages(members, rng):
    order = list(range(len(members)))
    rng.shuffle(order)

    def run(rows):
        c, n = zip(*rows, strict=True)
        return lead(torch.tensor(c), torch.tensor(n), len(rows), wrong_reward=torch.tensor(-1.0).double())

    a, b = run(members), run([members[i] for i in order])
    torch.testing.assert_close(a.advantage[order], b.advantage, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(a.advantage).all()
    # Shifting and scaling the lengths changes nothing, because the reward depends on z.
    moved = run([(c, 3 * n + 100) for c, n in members])
    torch.testing.assert_close(a.advantage, moved.advantage, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- losses

T, D, V, S = 23, 8, 17, 5
OPTIONS = [
    mode
    for mode in itertools.product(
        ["token", "sequence", "cispo", "sapo"], [0.0, 0.1], ["k1", "k2", "k3"], [None, 1.5], [None, 2.0], [False, True]
    )
    if mode[0] in ("token", "sequence") or mode[3] is None
]


def without_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the plain torch form, as on a machine where csrc was not built."""
    for module in ("_rows", "advantage"):
        monkeypatch.setattr(f"lead_kernels.{module}.cpu_extension", lambda: None)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    return {
        "hidden": 0.6 * draw(T, D), "head": draw(V, D), "bias": draw(V), "targets": torch.randint(V, (T,), generator=g),
        "ids": torch.arange(T) % S, "advantages": draw(S), "weights": draw(S).abs(),
        "behavior": -2 * draw(T).abs(), "reference": -2 * draw(T).abs(),
    }  # fmt: skip


def specification(x, *, ratio, entropy, kl, dual, cap, level, old, temperature=0.7, softcap=None, biased=False):
    """Compute the loss from its formulas and autograd alone, in fp64."""
    hidden, head, bias = (x[k].clone().requires_grad_() for k in ("hidden", "head", "bias"))
    z = hidden @ head.T + (bias if biased else 0)
    y = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = (y / temperature).log_softmax(-1)
    lp, h = logp.gather(1, x["targets"][:, None])[:, 0], -(logp.exp() * logp).sum(1)
    a, u = x["advantages"][x["ids"]], x["weights"][x["ids"]]
    base = x["behavior"] if old else lp.detach()
    log_r = lp - base
    if ratio == "sequence":
        log_r = torch.stack([log_r[x["ids"] == s].mean() for s in range(S)])[x["ids"]]
    r = log_r.exp()
    if ratio == "cispo":
        loss = -r.clamp(max=1.2).detach() * a * lp
    elif ratio == "sapo":
        tau = torch.where(a > 0, a.new_tensor(1.0), 1.05)
        loss = -4 / tau * torch.sigmoid(tau * (r - 1)) * a
    else:
        loss = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    if dual is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -dual * a), loss)
    if cap is not None:
        log_w = base.detach() - x["behavior"]
        if level == "sequence":
            log_w = torch.stack([log_w[x["ids"] == s].sum() for s in range(S)])[x["ids"]]
        loss = loss * log_w.exp().clamp(max=cap)
    d = x["reference"] - lp
    k = {"k1": -d, "k2": 0.5 * d * d, "k3": d.exp() - 1 - d}[kl]
    total = (u * (loss + 0.1 * k - entropy * h)).sum()
    total.backward()
    return total.detach(), hidden.grad, head.grad, bias.grad


def arguments(x, *, ratio, entropy, kl, dual, cap, level, old):
    """Arguments of the losses after logits, or after hidden and head, and their keywords."""
    tokens = Tokens(x["targets"], x["ids"], x["behavior"], x["behavior"] if old else None, x["reference"])
    options = LossOptions(
        ratio=ratio, dual_clip=dual, importance_cap=cap, importance_level=level, kl=kl, kl_coef=0.1,
        entropy_coef=entropy,
    )  # fmt: skip
    return tokens, Sequences(x["weights"], x["advantages"]), options


HOT = {"temperature": 0.7}


# options, ratio, advantage, loss, its derivative with respect to the log-prob log 0.5 = -0.693147; computed by hand
BY_HAND = [
    ({}, 1.5, 2.0, -2.4, 0.0),  # clipped: -1.2 x 2
    ({}, 1.5, -2.0, 3.0, 3.0),
    ({}, 0.5, 2.0, -1.0, -1.0),
    ({}, 0.5, -2.0, 1.6, 0.0),  # clipped: 0.8 x 2
    ({"clip_low": 0.6, "clip_high": 0.4}, 0.5, -2.0, 1.0, 1.0),
    ({"clip_low": 0.6, "clip_high": 0.4}, 1.5, 2.0, -2.8, 0.0),
    ({"dual_clip": 4.0}, 5.0, -2.0, 8.0, 0.0),
    ({"delta": 4.0}, 5.0, -2.0, 8.0, 0.0),  # min(5, 4) x 2
    ({"delta": 4.0}, 3.0, -2.0, 6.0, 6.0),
    ({"delta": 4.0}, 5.0, 2.0, -2.4, 0.0),
    ({"ratio": "cispo"}, 0.5, -2.0, -0.693147, 1.0),  # no lower bound: 0.5 x 2 x log 0.5
    ({"ratio": "cispo"}, 1.5, 2.0, 1.663553, -2.4),  # the upper bound is a weight of 1.2
    ({"ratio": "cispo", "clip_low": 0.2}, 0.5, -2.0, -1.109035, 1.6),  # with a lower bound: 0.8 x 2 x log 0.5
    ({"ratio": "cispo", "clip_high": 4.0}, 1.5, 2.0, 2.079442, -3.0),
    ({"ratio": "sapo"}, 1.0, 2.0, -4.0, -2.0),  # at ratio 1 the same derivative as GRPO
    ({"ratio": "sapo"}, 1.0, -2.0, 3.809524, 2.0),  # 4 / 1.05
    ({"ratio": "sapo"}, 2.0, 2.0, -5.848469, -3.145791),  # sigmoid(1) = 0.731059; 0.731059 x 0.268941 x 4 x 2 x 2
    ({"ratio": "sapo"}, 0.5, -2.0, 2.831877, 0.934140),  # sigmoid(-0.525) = 0.371684
]


def run_ratio(options: LossOptions, log_r: float, advantage: float, dtype=torch.float64) -> tuple[float, float]:
    """Compute loss and d loss / d log-prob of one row with log-prob log 0.5 and the given ratio."""
    logits = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    old = torch.tensor([0.5], dtype=torch.float64).log() - log_r
    zero = torch.zeros(1, dtype=torch.int64)
    tokens, sequences = Tokens(zero, zero, old, old), Sequences(torch.ones(1), torch.tensor([advantage]))
    out = policy_loss(logits, tokens, sequences, options)
    out.loss.backward()
    assert logits.grad is not None
    return out.loss.item(), 2 * logits.grad[0, 0].item()  # d logp / d z is 1 - p


@pytest.mark.parametrize("options, r, a, loss, slope", BY_HAND)
def test_ratio_modes_give_what_was_worked_out_by_hand(options, r, a, loss, slope):
    assert run_ratio(LossOptions(**options), math.log(r), a) == (
        pytest.approx(loss, abs=1e-6),
        pytest.approx(slope, abs=1e-6),
    )


def test_delta_is_a_dual_clip():
    for log_r, a in itertools.product(torch.linspace(-2, 3, 21).tolist(), (-1.5, 0.0, 0.5)):
        one, other = (run_ratio(LossOptions(**{name: 2.5}), log_r, a) for name in ("delta", "dual_clip"))
        assert one == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize("backend", ["C++", "plain torch"])
@pytest.mark.parametrize("options", [
    {}, {"dual_clip": 1.5}, {"delta": 1.5}, {"ratio": "cispo"}, {"ratio": "sapo"}, {"ratio": "sequence"},
    {"importance_cap": 1.5, "importance_mode": "mask"}, {"kl_coef": 0.1}, {"entropy_coef": 0.1},
], ids=str)  # fmt: skip
def test_an_advantage_of_nan_gives_a_gradient_of_nan_in_its_rows_alone(options, backend, monkeypatch):
    """Ratios are below, within and above the clip, and past the cap on their logarithm."""
    if backend == "plain torch":
        without_cpp(monkeypatch)
    log_r = torch.tensor([-3.0, 0.0, 0.5, 1.0, 30.0]).repeat(2)
    logits = torch.randn(10, 7, generator=torch.Generator().manual_seed(3))
    targets, ids = torch.arange(10) % 7, torch.arange(10) // 5
    logp = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    tokens = Tokens(targets, ids, logp - 2, logp - log_r, logp)
    for dtype in (torch.float32, torch.bfloat16):
        z = logits.to(dtype, copy=True).requires_grad_()
        sequences = Sequences(torch.ones(2), torch.tensor([torch.nan, -1.0]))
        out = policy_loss(z, tokens, sequences, LossOptions(**options))
        out.loss.backward()
        assert out.loss.isnan() and z.grad[:5].isnan().all() and z.grad[5:].isfinite().all()


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_estimators_of_the_kl_divergence_have_the_documented_gradients_in_expectation(kl):
    """The expectation is exact: one row per token of the vocabulary, weighted by its probability."""
    g = torch.Generator().manual_seed(8)
    policy, reference = torch.randn(2, 9, dtype=torch.float64, generator=g).log_softmax(1)
    z = policy.clone().requires_grad_()
    every = torch.arange(9)
    tokens = Tokens(every, every, reference=reference)
    sequences = Sequences(policy.exp(), torch.zeros(9, dtype=torch.float64))
    out = policy_loss(z.expand(9, 9), tokens, sequences, LossOptions(kl=kl, kl_coef=1.0))
    out.loss.backward()
    z2 = policy.clone().requires_grad_()
    p = z2.log_softmax(0)
    divergence = {
        "k1": 0 * z2.sum(),
        "k2": (p.exp() * (p - reference)).sum(),
        "k3": (reference.exp() * (reference - p)).sum(),
    }
    divergence[kl].backward()
    torch.testing.assert_close(z.grad, z2.grad, atol=1e-12, rtol=1e-10)


def test_every_mode_equals_its_formula_with_gradients():
    for seed, (ratio, entropy, kl, dual, cap, old) in enumerate(OPTIONS):
        x = inputs(seed)
        mode = {"ratio": ratio, "entropy": entropy, "kl": kl, "dual": dual, "cap": cap, "old": old,
                "level": "sequence" if ratio == "sequence" or seed % 2 else "token"}  # fmt: skip
        biased, capped = seed // 4 % 2 == 0, HOT | {"softcap": 2.0 if seed // 2 % 2 == 0 else None}
        loss, *expected = specification(x, **mode, **capped, biased=biased)
        for rows in (None, 7):
            hidden, head, bias = (x[k].clone().requires_grad_() for k in ("hidden", "head", "bias"))
            head_bias = bias if biased else None
            common = dict(chunk_rows=rows, head_bias=head_bias) | capped
            out = linear_policy_loss(hidden, head, *arguments(x, **mode), **common)
            (3 * out.loss).backward()
            torch.testing.assert_close(out.loss.detach(), loss, atol=1e-12, rtol=1e-10)
            for got, exact in zip((hidden.grad, head.grad, bias.grad), expected, strict=True):
                assert (got is None) == (exact is None)
                if exact is not None:
                    torch.testing.assert_close(got, 3 * exact, atol=1e-10, rtol=1e-9)
        logits = (x["hidden"] @ x["head"].T + (x["bias"] if biased else 0)).requires_grad_()
        again = policy_loss(logits, *arguments(x, **mode), **capped)
        again.loss.backward()
        torch.testing.assert_close(again.loss.detach(), loss, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(logits.grad @ x["head"], expected[0], atol=1e-10, rtol=1e-9)


def test_a_sequence_ratio_refuses_a_token_weight():
    x = inputs()
    mode = dict(ratio="sequence", entropy=0.0, kl="k3", dual=None, cap=2.0, level="token", old=True)
    with pytest.raises(ValueError, match="importance_level is 'token'"):
        linear_policy_loss(x["hidden"], x["head"], *arguments(x, **mode), **HOT)


BASIC = dict(ratio="token", entropy=0.05, kl="k3", dual=None, cap=None, level="token", old=True)


@pytest.mark.parametrize("train", ["hidden", "head", "bias"])
def test_gradient_for_one_alone(train):
    x = inputs()
    _, *expected = specification(x, **BASIC, softcap=1.5, biased=True)
    given = {k: x[k].clone().requires_grad_(k == train) for k in ("hidden", "head", "bias")}
    hidden, head, bias = given.values()
    common = dict(softcap=1.5, head_bias=bias, **HOT)
    linear_policy_loss(hidden, head, *arguments(x, **BASIC), **common).loss.backward()
    for (name, tensor), exact in zip(given.items(), expected, strict=True):
        if name == train:
            torch.testing.assert_close(tensor.grad, exact, atol=1e-10, rtol=1e-9)
        else:
            assert tensor.grad is None
    linear_logprobs(hidden, head, x["targets"], **common)[0].sum().backward()
    assert [t.grad is not None for t in given.values()] == [k == train for k in given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 1003])
@pytest.mark.parametrize("offset, softcap", [(0.0, None), (1e4, None), (0.0, 6.0)])
def test_half_precision_is_as_good_as_torch_from_the_same_rounded_logits(dtype, vocabulary, offset, softcap):
    if offset and dtype == torch.float16:
        pytest.skip("1e4 with differences below 8 is not representable in fp16")
    g = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(37, vocabulary, generator=g) + offset).to(dtype)
    targets = torch.randint(vocabulary, (37,), generator=g)
    ids = torch.zeros(37, dtype=torch.int32)  # any integer type is accepted
    common = Tokens(targets, ids), Sequences(torch.ones(1), torch.ones(1)), LossOptions(entropy_coef=0.1)

    def run(x):
        x = x.clone().requires_grad_()
        out = policy_loss(x, *common, softcap=softcap)
        out.loss.backward()
        return out.logprobs.double(), x.grad.double()

    logp, grad = run(logits)
    exact_logp, exact_grad = run(logits.double())
    y = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    base = y.log_softmax(-1).gather(1, targets[:, None])[:, 0].double()
    assert (logp <= 0).all()
    assert (logp - exact_logp).abs().max() <= 2 * (base - exact_logp).abs().max() + 1e-7
    assert (grad - exact_grad).abs().max() <= 2 * torch.finfo(dtype).eps * exact_grad.abs().max() + 2e-6


def test_hard_rows():
    inf = float("inf")
    logits = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, 0.0], [80.0, -80.0, 0.0], [float("nan"), 0.0, 0.0]])
    logits.requires_grad_()
    out = policy_loss(logits, Tokens(torch.tensor([0, 2, 0, 1]), torch.arange(4)),
                      Sequences(torch.ones(4), torch.ones(4)), LossOptions(entropy_coef=0.1))  # fmt: skip
    out.loss.backward()
    assert torch.isfinite(logits.grad[:3]).all() and torch.isfinite(out.logprobs[:3]).all()
    assert torch.isnan(out.logprobs[3]) and out.logprobs[1] == 0 and (out.entropy[:3] >= 0).all()
    assert logits.grad[0, 1] == 0


@pytest.mark.parametrize("target", [-1, 17, 10**12])
def test_targets_out_of_range_are_an_error(target):
    x = inputs()
    x["targets"][3] = target
    with pytest.raises(ValueError, match=f"target {target} is outside the vocabulary of 17"):
        linear_policy_loss(x["hidden"], x["head"], *arguments(x, **BASIC), **HOT)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        linear_logprobs(x["hidden"], x["head"], x["targets"])


@pytest.mark.parametrize("at", [-1, S, 10**6])
def test_sequence_ids_out_of_range_are_an_error(at, monkeypatch):
    for plain in (False, True):
        if plain:
            without_cpp(monkeypatch)
        x = inputs()
        x["ids"][3] = at
        for inplace in (False, True):
            with pytest.raises(ValueError, match=f"sequence id {at} is outside the number of sequences, {S}"):
                policy_loss(x["hidden"] @ x["head"].T, *arguments(x, **BASIC), inplace=inplace)
        with pytest.raises(ValueError, match=f"sequence id {at} is outside"):
            linear_policy_loss(x["hidden"], x["head"], *arguments(x, **BASIC))


MISFITS = [
    ({"targets": torch.zeros(T, dtype=torch.int32)}, {}, "targets are torch.int32 .23.: give int64 .23."),
    ({"targets": torch.zeros(T - 1, dtype=torch.int64)}, {}, "targets are torch.int64 .22."),
    ({"sequence_ids": torch.zeros(T)}, {}, "sequence_ids are torch.float32 .23.: give integers"),
    ({"sequence_ids": torch.zeros(T, dtype=torch.bool)}, {}, "sequence_ids are torch.bool"),
    ({"sequence_ids": torch.zeros(1, dtype=torch.int64)}, {}, "sequence_ids are torch.int64 .1."),
    ({"old": torch.zeros(T + 1)}, {}, "old is torch.float32 .24.: give floats .23."),
    ({"behavior": torch.zeros(T, 1)}, {}, "behavior is torch.float32 .23, 1."),
    ({"reference": torch.zeros(T, dtype=torch.int64)}, {}, "reference is torch.int64"),
    ({"reference": None}, {"kl_coef": 0.1}, "kl_coef is 0.1 without reference log-probs"),
    ({"behavior": None}, {"importance_cap": 2.0}, "importance_cap is 2.0 without the log-probs"),
]


@pytest.mark.parametrize(
    "wrong, options, says", MISFITS, ids=lambda x: next(iter(x), "") if isinstance(x, dict) else ""
)
def test_tokens_that_do_not_fit_are_refused_by_every_function(wrong, options, says):
    x = inputs()
    tokens, sequences, _ = arguments(x, **BASIC)
    common = tokens._replace(**wrong), sequences, LossOptions(**options)
    calls = [
        lambda: policy_loss(x["hidden"] @ x["head"].T, *common),
        lambda: policy_loss(x["hidden"] @ x["head"].T, *common, inplace=True),
        lambda: linear_policy_loss(x["hidden"], x["head"], *common),
    ]
    if "targets" in wrong:
        calls.append(lambda: linear_logprobs(x["hidden"], x["head"], wrong["targets"]))
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call()


def test_matrices_options_and_chunks_that_do_not_fit_are_refused():
    x = inputs()
    common = arguments(x, **BASIC)
    hidden, head = x["hidden"], x["head"]
    for logits in (hidden[0], torch.zeros(T, V, dtype=torch.int64), torch.zeros(T, 0)):
        with pytest.raises(ValueError, match="logits are"):
            policy_loss(logits, *common)
    for h, w, says in ((hidden[:, 1:], head, "give .T, D. and .V, D."), (hidden.float(), head, "one float dtype"),
                       (hidden.long(), head.long(), "one float dtype"), (hidden, head[:0], "V above 0")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            linear_policy_loss(h, w, *common)
        with pytest.raises(ValueError, match=says):
            linear_logprobs(h, w, x["targets"])
    with pytest.raises(ValueError, match="chunk_rows is -1: give 1 or more"):
        linear_policy_loss(hidden, head, *common, chunk_rows=-1)
    with pytest.raises(ValueError, match="options are of type AdvantageOptions: give LossOptions"):
        linear_policy_loss(hidden, head, *common[:2], AdvantageOptions())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised by torch.func.jvp
def test_second_and_forward_mode_derivatives_are_errors():
    x = inputs()
    h, w = (x[k].clone().requires_grad_() for k in ("hidden", "head"))
    common = arguments(x, **BASIC)
    functions = [
        lambda h: linear_policy_loss(h, w, *common).loss,
        lambda h: policy_loss(h @ w.T, *common).loss,
        lambda h: linear_logprobs(h, w, x["targets"])[0].sum(),
    ]
    for f in functions:
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            # the square is twice differentiable, so a missing second derivative would only be a missing term of the sum
            (first,) = torch.autograd.grad(f(h) + h.square().sum(), h, create_graph=True)
            torch.autograd.grad(first.sum(), h)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            torch.func.jvp(f, (h.detach(),), (torch.ones_like(h),))


def test_no_rows_at_all():
    hidden, head = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    out = linear_policy_loss(hidden, head, Tokens(none, none), Sequences(torch.ones(1), torch.ones(1)))
    out.loss.backward()
    assert out.loss == 0 and head.grad.abs().max() == 0 and out.metrics["tokens"] == 0


def test_strided_hidden_and_the_same_bits_every_time():
    x = inputs()
    wide = torch.zeros(T, 2 * D, dtype=torch.float64)
    wide[:, ::2] = x["hidden"]
    runs = []
    for hidden in (x["hidden"].clone(), wide[:, ::2], x["hidden"].clone()):
        h, w = hidden.detach().requires_grad_(), x["head"].clone().requires_grad_()
        linear_policy_loss(h, w, *arguments(x, **BASIC), chunk_rows=5, **HOT).loss.backward()
        runs.append((h.grad, w.grad))
    assert torch.equal(runs[0][0], runs[2][0]) and torch.equal(runs[0][1], runs[2][1])
    torch.testing.assert_close(runs[0], runs[1])


def test_an_older_torch_adds_products_in_slices(monkeypatch: pytest.MonkeyPatch):
    """torch.mm(out_dtype=...) needs a GPU; here a float32 product replaces it."""
    real, sizes = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        sizes.append(len(a))
        return real(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    g = torch.Generator().manual_seed(3)
    total = torch.full((2100, 1 << 15), torch.nan)  # two slices, of 2,048 rows and fewer
    parts = [(torch.randn(2100, 4, generator=g).bfloat16(), torch.randn(4, 1 << 15, generator=g).bfloat16())] * 2
    for i, (a, b) in enumerate(parts):
        add_in_slices_(total, a, b, first=i == 0)
    expected = sum(a.float() @ b.float() for a, b in parts)
    assert torch.allclose(total, expected, rtol=1e-6, atol=1e-6) and sizes == [2048, 52] * 2


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_linear_logprobs_with_gradients(softcap):
    x = inputs()
    trained = [x[k].clone().requires_grad_() for k in ("hidden", "head", "bias")]

    def run(h, w, b):
        return linear_logprobs(h, w, x["targets"], temperature=0.7, softcap=softcap, head_bias=b, chunk_rows=5)

    assert torch.autograd.gradcheck(run, trained)
    z = x["hidden"] @ x["head"].T + x["bias"]
    logp = ((z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7).log_softmax(-1)
    torch.testing.assert_close(run(*trained)[0].detach(), logp.gather(1, x["targets"][:, None])[:, 0])
    torch.testing.assert_close(run(*trained)[1].detach(), -(logp.exp() * logp).sum(1))


def test_a_bias_is_added_before_the_logits_are_rounded_and_its_gradient_is_summed_in_float32():
    """4,000 rows of equal gradients in bfloat16: a running sum in bfloat16 would stall at 256 of them."""
    x, rows = inputs(), 4000
    hidden, head = torch.zeros(rows, D, dtype=torch.bfloat16), x["head"].bfloat16()
    bias = x["bias"].bfloat16().requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64)
    runs = []
    for _ in range(2):
        bias.grad = None
        logp, _ = linear_logprobs(hidden, head, targets, head_bias=bias, chunk_rows=700)
        logp.sum().backward()
        runs.append(bias.grad.clone())
    assert torch.equal(*runs)
    exact = rows * (torch.nn.functional.one_hot(torch.tensor(0), V) - bias.detach().double().softmax(0))
    torch.testing.assert_close(runs[0].double(), exact, rtol=2**-7, atol=0)
    logits = torch.nn.functional.linear(x["hidden"].bfloat16(), head, bias.detach()).float()
    at = x["targets"][:, None]  # the target's own logit is not rounded
    exact = torch.nn.functional.linear(x["hidden"].bfloat16().float(), head.float(), bias.detach().float()).gather(
        1, at
    )
    linear = logits.scatter(1, at, exact).log_softmax(-1)
    logp, _ = linear_logprobs(x["hidden"].bfloat16(), head, x["targets"], head_bias=bias.detach())
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # otherwise the product is computed in float32, with more digits
        torch.testing.assert_close(logp, linear.gather(1, at)[:, 0])


def test_multipliers_of_the_logits_are_folded_into_temperature_and_cap():
    x = inputs()
    z = x["hidden"] @ x["head"].T
    for before, after, cap in ((0.25, 1.0, 2.0), (1.0, 3.0, 2.0), (0.5, 1.5, 4.0)):
        logp = (after * cap * torch.tanh(before * z / cap) / 0.7).log_softmax(-1).gather(1, x["targets"][:, None])[:, 0]
        folded = dict(softcap=cap / before, temperature=0.7 / (after * before))
        torch.testing.assert_close(linear_logprobs(x["hidden"], x["head"], x["targets"], **folded)[0], logp)


@pytest.mark.parametrize("bias", [torch.zeros(V + 1), torch.zeros(V, 1), torch.zeros(V, dtype=torch.float64)], ids=str)
def test_a_bias_that_does_not_fit_is_refused(bias):
    x = {k: v.float() if v.is_floating_point() else v for k, v in inputs().items()}
    for call in (
        lambda: linear_logprobs(x["hidden"], x["head"], x["targets"], head_bias=bias),
        lambda: linear_policy_loss(x["hidden"], x["head"], *arguments(x, **BASIC), head_bias=bias),
    ):
        with pytest.raises(ValueError, match=r"head_bias is .* give \[V\] in the head's dtype"):
            call()


def test_loss_weights_make_the_means_they_name():
    lengths = torch.tensor([2.0, 6.0])
    per_token = torch.tensor([1.0] * 2 + [3.0] * 6)
    owner = torch.tensor([0] * 2 + [1] * 6)

    def mean(kind, **kw):
        return (loss_weights(lengths, kind, n_sequences=2, n_tokens=8, **kw)[owner] * per_token).sum().item()

    assert mean("response") == pytest.approx(2.0) and mean("token") == pytest.approx(2.5)
    assert mean("constant", constant=10) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="constant is None"):
        mean("constant")


def test_metrics_add_up_over_cuts():
    x = inputs()
    mode = arguments(x, **{**BASIC, "cap": 1.5})
    uncut = linear_policy_loss(x["hidden"], x["head"], *mode, **HOT).metrics
    cut = linear_policy_loss(x["hidden"], x["head"], *mode, chunk_rows=4, **HOT).metrics
    for k in uncut:
        torch.testing.assert_close(uncut[k].double(), cut[k].double())
    assert uncut["tokens"] == T and uncut["importance_truncated"] == 0 and uncut["max_logprob"] <= 0
    lp = linear_logprobs(x["hidden"], x["head"], x["targets"], temperature=0.7)[0]
    r, a = (lp - x["behavior"]).exp(), x["advantages"][x["ids"]]
    assert uncut["clip_high"] == ((r > 1.2) & (a > 0)).sum() and uncut["clip_low"] == ((r < 0.8) & (a < 0)).sum()
    assert uncut["max_logprob_diff"] == (lp - x["behavior"]).abs().max()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 300), st.integers(1, 6), st.integers(1, 50), st.randoms(use_true_random=False)
)
def test_any_shape_and_any_chunk_equals_torch(T, V, S, chunk, rng):
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    hidden, head = torch.randn(T, 5, generator=g), torch.randn(V, 5, generator=g)
    targets, ids = torch.randint(V, (T,), generator=g), torch.randint(S, (T,), generator=g)
    weights, advantages = torch.rand(S, generator=g), torch.randn(S, generator=g)
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logp = (h.double() @ w.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    loss = -(weights[ids] * advantages[ids] * (logp - logp.detach()).exp()).sum()
    exact = torch.autograd.grad(loss, (h, w))
    out = linear_policy_loss(h, w, Tokens(targets, ids), Sequences(weights, advantages), chunk_rows=chunk)
    torch.testing.assert_close(out.loss, loss.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.logprobs, logp.detach().float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (h, w)), exact, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------ advantages from the groups' outcomes, options


@pytest.mark.parametrize("backend", ["C++", "plain torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"rate": "positive", "group_filter": "official"}, {"std": "mad", "nonnegative_correct": True}]
)
def test_outcomes_give_the_bits_of_advantages_computed_beforehand(backend, dtype, options, monkeypatch):
    """On a CPU; test_kernels_triton.py tests the same for Triton's row kernel."""
    if backend == "plain torch":
        without_cpp(monkeypatch)
    elif cpu_extension() is None:
        pytest.skip("the extension is not built")
    x, g = inputs(), torch.Generator().manual_seed(5)
    outcomes = Outcomes(torch.tensor([1, 0, 1, 1, 0, 0]), torch.randint(1, 14_000, (6,), generator=g),
                     -torch.rand(6, generator=g), -torch.rand(6, generator=g))  # fmt: skip
    before = lead_advantages(outcomes, 3, AdvantageOptions(**options)).advantage
    tokens = Tokens(x["targets"], torch.arange(T) % 6, x["behavior"], x["behavior"], x["reference"])
    weights = torch.tensor([0.2, 0.0, 0.3, 0.1, 0.4, 0.5])
    results = []
    for given_ in (before, Groups(outcomes, 3, AdvantageOptions(**options)),
                   Groups(outcomes.table(), 3, AdvantageOptions(**options))):  # fmt: skip
        hidden, head = (x[k].to(dtype, copy=True).requires_grad_() for k in ("hidden", "head"))
        out = linear_policy_loss(hidden, head, tokens, Sequences(weights, given_), chunk_rows=5)
        logits = (x["hidden"] @ x["head"].T).to(dtype, copy=True).requires_grad_()
        direct = policy_loss(logits, tokens, Sequences(weights, given_))
        (out.loss + direct.loss).backward()
        results.append([out.loss, direct.loss, hidden.grad, head.grad, logits.grad, *out.metrics.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # A row with ratio 1 and weight 1 in each sequence: its loss is minus the advantage.
    one = Tokens(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    for i in range(6):
        at = one._replace(sequence_ids=torch.tensor([i]))
        loss = policy_loss(
            torch.zeros(1, 3), at, Sequences(torch.ones(6), Groups(outcomes, 3, AdvantageOptions(**options)))
        )
        assert torch.equal(-loss.loss, before[i])


EVERY_LOSS = [
    LossOptions("sequence", 0.1, 0.3, 2.5, None, 2.0, 3.0, 1.5, "mask", "sequence", "k2", 0.25, -0.5),
    LossOptions(delta=3.5),
    LossOptions(dropped_mass=0.125, sparse_head=True, sample_dropped=True, fp32_logits=True),
]
EVERY_ADVANTAGE = AdvantageOptions(False, 0.5, False, 0.25, 2.0, 3.0, 0.5, 1e-3, "mad", 4000, 0.125, True, "positive",
                                   "uniform", "length", 0.5, 2.0)  # fmt: skip


def test_options_survive_their_list_of_numbers():
    for options in (LossOptions(), *EVERY_LOSS):
        for softmax in (Softmax(0.75), Softmax(1.5, 30.0)):
            assert LossOptions.decode(options.encode(softmax)) == (options, softmax)
    for options in (AdvantageOptions(), EVERY_ADVANTAGE):
        assert AdvantageOptions.decode(options.encode()) == options
        groups = Groups.decode(*Groups(torch.zeros(6, 4), 3, options).encode())
        assert groups[1:] == (3, options)
    for every, default in ((EVERY_LOSS, LossOptions()), ([EVERY_ADVANTAGE], AdvantageOptions())):
        names = [f.name for f in dataclasses.fields(default)]
        same = [name for name in names if all(getattr(o, name) == getattr(default, name) for o in every)]
        assert not same, f"no other value of {same} is tried"


def test_a_subclass_with_further_fields_travels_as_the_options_it_inherits():
    @dataclasses.dataclass(frozen=True)
    class Section(LossOptions):
        mean: str = "token"

    assert LossOptions.decode(Section(kl_coef=0.5).encode(Softmax())) == (LossOptions(kl_coef=0.5), Softmax())


WRONG_VALUES = [
    (LossOptions, {"ratio": "tokens"}, "ratio is 'tokens': give one of token, sequence, cispo, sapo."),
    (LossOptions, {"clip_low": -0.1}, "clip_low is -0.1: give 0 or more."),
    (LossOptions, {"clip_high": float("nan")}, "clip_high is nan: give a finite number."),
    (LossOptions, {"dual_clip": 1.0}, "dual_clip is 1.0: give a value above 1."),
    (LossOptions, {"importance_cap": 0.0}, "importance_cap is 0.0: give a value above 0."),
    (LossOptions, {"sapo_negative": 0.0}, "sapo_negative is 0.0: give a value above 0."),
    (
        LossOptions,
        {"ratio": "cispo", "dual_clip": 3.0},
        "ratio is 'cispo' with dual_clip 3.0, which bounds nothing there: leave dual_clip out, or give ratio=token.",
    ),
    (
        LossOptions,
        {"ratio": "sapo", "clip_low": 0.2},
        "ratio is 'sapo' with clip_low 0.2, which bounds nothing there: leave clip_low out, or give ratio=token.",
    ),
    (
        LossOptions,
        {"dual_clip": 3.0, "delta": 4.0},
        "Both delta (4.0) and dual_clip (3.0) bound the loss of negative advantages: give one of them.",
    ),
    (LossOptions, {"delta": 1.0}, "delta is 1.0: give a value above 1."),
    (LossOptions, {"delta": 1.1}, "delta is 1.1: give 1.2, which is 1 + clip_high, or more."),
    (
        LossOptions,
        {"delta": 1.3, "clip_high": 0.5},
        "delta 1.3 is below 1 + clip_high, so it would clip where clip_high does not: give 1.5 or more.",
    ),
    (AdvantageOptions, {"std": "max"}, "std is 'max': give one of sample, none, mad, batch."),
    (AdvantageOptions, {"length_gate": -1}, "length_gate is -1: give 0 (off) or more."),
    (AdvantageOptions, {"length_min_solve_rate": 2}, "length_min_solve_rate is 2: give a share between 0 and 1."),
    (AdvantageOptions, {"slope": float("inf")}, "slope is inf: give a finite number."),
]


@pytest.mark.parametrize(
    "record, values, says", WRONG_VALUES, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_a_wrong_value_is_named_with_a_remedy(record, values, says):
    with pytest.raises(ValueError) as e:
        record(**values)
    assert str(e.value) == says


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_a_temperature_or_a_cap_out_of_range_is_refused(name, value):
    x = inputs()
    given, z = {name: value}, x["hidden"] @ x["head"].T
    for call in (
        lambda: linear_policy_loss(x["hidden"], x["head"], *arguments(x, **BASIC), **given),
        lambda: policy_loss(z, *arguments(x, **BASIC), **given),
        lambda: policy_loss(z, *arguments(x, **BASIC), inplace=True, **given),
        lambda: linear_logprobs(x["hidden"], x["head"], x["targets"], **given),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}: give a finite value above 0"):
            call()


def test_shapes_of_outcomes_and_sequences_that_do_not_fit():
    with pytest.raises(ValueError, match=r"bonus is \[3\]"):
        Outcomes(torch.ones(4), torch.ones(4), bonus=torch.ones(3)).table()
    with pytest.raises(ValueError, match=r"lengths \[3\]"):
        Outcomes(torch.ones(4), torch.ones(3)).table()
    x = inputs()
    tokens, (weights, advantages), options = arguments(x, **BASIC)
    for wrong in (Sequences(weights, advantages[:-1]), Sequences(weights, Groups(torch.zeros(4, 4), 2))):
        with pytest.raises(ValueError, match="one weight and one advantage for each sequence"):
            linear_policy_loss(x["hidden"], x["head"], tokens, wrong, options)


def test_no_operator_takes_more_than_13_parameters():
    for name in ("lead_advantages", "policy_loss", "linear_policy_loss", "linear_logprobs", "linear_logprobs_backward"):
        schema = getattr(torch.ops.lead_kernels, name).default._schema
        assert len(schema.arguments) <= 13, schema


def test_switches_by_hand():
    """One group with 100, 200, 300 tokens correct (z = -1, 0, 1) and 400 wrong, one all correct with equal lengths."""
    correct, lengths = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1]), torch.tensor([100, 200, 300, 400, 50, 50, 50, 50])
    outcomes = Outcomes(correct, lengths, torch.zeros(8))
    plain = AdvantageOptions(length_reward=False, difficulty=False, std="none", eps=1e-12)

    def of(**options):
        return lead_advantages(outcomes, 4, dataclasses.replace(plain, **options)).advantage.tolist()

    # mean 3/4; a length advantage of 0.4 and a solve rate of 3/4 add 0.3 x (1, 0, -1)
    assert of() == pytest.approx([0.25, 0.25, 0.25, -0.75, 0, 0, 0, 0])
    assert of(length_advantage=0.4) == pytest.approx([0.55, 0.25, -0.05, -0.75, 0, 0, 0, 0])
    # weighted by length: (100 + 200 + 300) / 1000; the standard deviation is about the mean, 1/2
    assert of(baseline="length") == pytest.approx([0.4, 0.4, 0.4, -0.6, 0, 0, 0, 0])
    assert of(baseline="length", std="sample") == pytest.approx([0.8, 0.8, 0.8, -1.2, 0, 0, 0, 0])
    # over the batch: squares 3/16 + 9/16, over 7
    batch = batch_std(outcomes, 4, dataclasses.replace(plain, std="batch"))
    assert batch == pytest.approx((0.75 / 7) ** 0.5)
    ours = of(std="batch", batch_std=batch)
    assert ours == pytest.approx([0.25 / batch] * 3 + [-0.75 / batch] + [0] * 4)
    # the length advantage comes after the normalisation and before the difficulty weight
    w, rest = (0.4 + 1.1 / (1 + math.exp(10 * (rho - 0.75))) for rho in (0.75, 0.25))
    every = of(std="batch", batch_std=batch, length_advantage=0.4, difficulty=True)
    expected = [(0.25 / batch + 0.3) * w, 0.25 / batch * w, (0.25 / batch - 0.3) * w, -0.75 / batch * rest]
    assert every[:4] == pytest.approx(expected) and every[4:] == [0] * 4
