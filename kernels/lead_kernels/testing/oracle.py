"""Oracle for the kernels: Triton launchers against fp64 runs of the plain torch specification.

`check_rows` and `check_advantages` run a module of Triton launchers (under TRITON_INTERPRET=1 on a CPU, else on a GPU)
and the plain torch specification in fp64 on the same rounded inputs. They accept an error of at most twice that of
plain torch in the launcher's own dtype, plus 2e-6. Fresh memory is filled with NaN, so anything that a kernel fails to
write is noticed. `check_fused_advantages` requires that the advantages that the row kernel computes itself equal those
of a separate launch bit for bit. The oracle itself is tested: it must reject every kernel of mutants.py.

Legend: T rows, V vocabulary, S sequences.
"""

import importlib
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .._rows import RowStats, row_gradient_reference, row_stats_reference
from ..advantage import lead_advantages_reference
from ..options import AdvantageOptions, LossOptions, Softmax
from ..policy_loss import rows_loss
from ..records import Groups, LeadAdvantages, Outcomes, RowMetrics, Sequences, SequenceTerms, Tokens


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which torch.empty returns memory filled with NaN (or with the largest integer)."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def close(
    name: str, got: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, atol: float = 2e-6, rtol: float = 5e-6
) -> None:
    """Raise AssertionError unless the error of `got` is at most twice that of `base`, with NaN in the same places."""
    got, exact, base = (x.detach().double().cpu() for x in (got, exact, base))
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in the wrong places"

    def worst(x: torch.Tensor, forgiven: float) -> float:
        beyond = (x - exact).abs() - forgiven * exact.abs()
        return beyond.nan_to_num(0.0).max().item() if x.numel() else 0.0

    error, allowed = worst(got, rtol), worst(base, 0.0)
    assert error <= 2 * allowed + atol, f"{name}: error {error:.3g}, torch in the same dtype {allowed:.3g}"


MODES: list[LossOptions] = [
    LossOptions(),
    LossOptions(clip_low=0.1, clip_high=0.4, entropy_coef=0.05),
    LossOptions(dual_clip=1.5, importance_cap=1.2),
    LossOptions(ratio="cispo", importance_cap=1.2, importance_mode="mask", clip_high=0.5),
    LossOptions(kl="k1", kl_coef=0.1),
    LossOptions(kl="k2", kl_coef=0.1),
    LossOptions(kl="k3", kl_coef=0.1, entropy_coef=-0.02),
    LossOptions(ratio="sequence", importance_cap=1.2, importance_level="sequence"),
    LossOptions(ratio="cispo", clip_low=0.3),
    LossOptions(ratio="sapo", sapo_positive=0.7, sapo_negative=2.5, kl_coef=0.05),
    LossOptions(delta=1.3, clip_high=0.1, importance_cap=1.2),
    LossOptions(ratio="sequence", delta=1.2, entropy_coef=0.03),
]
# options for the modes that are not run with the defaults
SOFTMAX = {2: Softmax(0.6), 3: Softmax(0.7, 4.0), 5: Softmax(2.0), 6: Softmax(1.3, 2.0), 7: Softmax(1.0, 30.0)}
# scale of the logits, soft cap, dtype: the cap hardly bends the logits, bends them, saturates, saturates with ties
CAPPED = [
    (0.5, 1e4, torch.float32),
    (3.0, 15.0, torch.bfloat16),
    (20.0, 30.0, torch.float32),
    (99.0, 3.0, torch.float16),
]
GROUP_OPTIONS: list[AdvantageOptions] = [
    AdvantageOptions(),
    AdvantageOptions(length_gate=5500, rate="positive", group_filter="official"),
    AdvantageOptions(std="none", difficulty=False),
    AdvantageOptions(std="mad", nonnegative_correct=True, length_min_solve_rate=0.4, group_filter="uniform"),
    AdvantageOptions(length_reward=False, midpoint=0.5),
    AdvantageOptions(std="batch", batch_std=0.7, baseline="length", length_advantage=0.3),
    AdvantageOptions(length_reward=False, length_advantage=0.2, length_gate=5500, length_min_solve_rate=0.3),
]


class Case(NamedTuple):
    """Arguments of `policy_rows_` except `gradient`."""

    logits: torch.Tensor
    tokens: Tokens
    sequences: Sequences
    terms: SequenceTerms
    options: LossOptions
    softmax: Softmax
    target_logits: torch.Tensor | None = None


def row_case(
    seed: int, T: int, V: int, dtype: torch.dtype, options: LossOptions, softmax: Softmax, groups: bool
) -> Case:
    """Make a case of T rows in 6 sequences; the first has weight 0, the second advantage 0."""
    g = torch.Generator().manual_seed(seed)
    S = 6
    ids = torch.arange(T) % S

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    logits = (3 * draw(T, V)).to(dtype)
    targets = torch.randint(V, (T,), generator=g)
    logp = RowStats(*row_stats_reference(logits, targets, softmax).unbind(1)).logprob
    weights, advantages = draw(S).abs() + 0.2, draw(S)
    weights[0], advantages[1] = 0.0, 0.0
    given: torch.Tensor | Groups = advantages
    if groups:
        outcomes = Outcomes(torch.tensor([1, 0, 1, 1, 0, 0]), 1000 * torch.arange(4, 10))
        given = Groups(outcomes.table(), 3, AdvantageOptions(std="mad"))
    tokens = Tokens(targets, ids, *(logp + 0.4 * draw(T) for _ in range(3)))
    by_sequence = options.ratio == "sequence"
    terms = SequenceTerms(*((0.2 * draw(S)[ids] if by_sequence else None) for _ in range(2)))
    return Case(logits, tokens, Sequences(weights, given), terms, options, softmax)


def far_case(case: Case) -> Case:
    """Make a case of ratios around every bound and past the log-ratio's cap, with advantages of every sign and NaN."""
    logp = RowStats(*row_stats_reference(case.logits, case.tokens.targets, case.softmax).unbind(1)).logprob
    log_r = torch.tensor([-3.0, 0.6, 1.5, 25.0]).repeat_interleave(6)
    advantages = torch.tensor([1.0, -1.0, torch.nan, -0.5, 0.5, 0.0])
    case.sequences.weights[0] = 0.3
    terms = case.terms if case.terms.log_ratio is None else case.terms._replace(log_ratio=log_r)
    return case._replace(
        tokens=case.tokens._replace(old=logp - log_r),
        sequences=Sequences(case.sequences.weights, advantages),
        terms=terms,
    )


def target_cases() -> Iterator[Case]:
    """Cases with exact logits of the targets: every dtype, with and without a soft cap, far off, masked, at the top.

    In the last two rows the targets are so likely that subtracting a rounded term from the finished sum leaves nothing.
    """
    modes = ((MODES[1], Softmax()), (MODES[7], Softmax(0.6, 8.0)), (MODES[6], Softmax(1.3)), (MODES[0], Softmax(0.5)))
    for i, (mode, softmax) in enumerate(modes):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[i % 3]
        case = row_case(70 + i, 13, (500, 9001, 1, 77)[i], dtype, mode, softmax, groups=i == 1)
        exact = case.logits.float().gather(1, case.tokens.targets[:, None])[:, 0]
        exact = exact * (1 + 0.02 * torch.randn(13, generator=torch.Generator().manual_seed(i)))
        exact[3], exact[4], exact[5] = exact[3] + 40, exact[4] - 40, -99.0 if i else -torch.inf
        exact[11:] = case.logits.float().amax() + 12
        yield case._replace(target_logits=exact)


def check_target_logits(kernels: ModuleType, device: str = "cpu") -> None:
    """Raise AssertionError unless the launchers of `kernels` use `target_logits` in place of the targets' logits."""
    check_rows(kernels, device, target_cases(), halves=False)
    for case in target_cases():
        case = on(device, case)
        given = case.tokens.targets, case.softmax, case.target_logits
        exact, base = (row_stats_reference(case.logits.to(t), *given) for t in (torch.float64, torch.float32))
        with poisoned_memory():
            stats = kernels.row_stats_triton(case.logits, *given)
        close_statistics(stats, exact, base, case.softmax)
        u, h = torch.randn(2, len(stats), generator=torch.Generator().manual_seed(1)).to(device)
        exact_grad, base_grad = (
            row_gradient_reference(case.logits.to(s.dtype), given[0], s, u.to(s.dtype), h.to(s.dtype), *given[1:])
            for s in (exact, base)
        )
        grad = torch.empty_like(case.logits)
        kernels.row_gradient_triton_(case.logits, given[0], stats, u, h, case.softmax, grad, case.target_logits)
        rounding = torch.finfo(grad.dtype).eps * exact_grad.nan_to_num(0.0).abs().max().item()
        close("gradient", grad, exact_grad, base_grad, 5e-6 + rounding)


def specification(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Compute loss, log-probs, entropy, metrics and gradient by the plain torch form in float64 or float32."""
    logits, targets, ids = case.logits.to(dtype), case.tokens.targets, case.tokens.sequence_ids
    given = case.sequences.advantages
    if isinstance(given, Groups):
        given = lead_advantages_reference(given.table(), given.group_size, given.options).advantage
    stats = row_stats_reference(logits, targets, case.softmax, case.target_logits)
    row = RowStats(*stats.unbind(1))
    terms = SequenceTerms(*(None if x is None else x.to(dtype) for x in case.terms))
    advantage_T, weight_T = (x.to(dtype)[ids] for x in (given, case.sequences.weights))
    rows = rows_loss(row.logprob, row.entropy, advantage_T, weight_T, case.tokens, terms, case.options)
    grads = rows.grad_logprob_T, rows.grad_entropy_T
    grad = row_gradient_reference(logits, targets, stats, *grads, case.softmax, case.target_logits)
    metrics = torch.stack([rows.metrics[k].to(dtype) for k in RowMetrics._fields])
    return rows.loss_T, row.logprob, row.entropy, metrics, grad


def on(device: str, x: Any) -> Any:
    """Move the tensors of a record, and of records within it, to a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return type(x)(*(on(device, y) for y in x)) if isinstance(x, tuple) else x


def launch(kernels: ModuleType, case: Case, in_place: bool, device: str) -> tuple[torch.Tensor, ...]:
    """Run the launchers of `kernels` on a case: returns loss, log-probs, entropy, sums, gradient."""
    case = on(device, case._replace(logits=case.logits.clone()))
    with poisoned_memory():
        gradient = case.logits if in_place else torch.empty_like(case.logits)
        *arguments, target_logits = case
        out = kernels.policy_rows_triton(*arguments, gradient, target_logits)
    return *out, gradient


def rounds_twice() -> bool:
    """Whether multiply-adds run in Triton's interpreter before 3.9, which rounds both product and sum."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    version = importlib.import_module("triton").__version__.split(".")
    return tuple(map(int, version[:2])) < (3, 9)


def check_rows(
    kernels: ModuleType, device: str = "cpu", cases: Iterator[Case] | None = None, halves: bool = True
) -> None:
    """Raise AssertionError if a launcher of `kernels` has more than twice plain torch's error against fp64."""
    for i, case in enumerate(cases or row_cases()):
        logits = case.logits
        exact, base = specification(case, torch.float64), specification(case, torch.float32)
        loss, logp, entropy, sums, grad = launch(kernels, case, bool(i % 2), device)
        # A full unit in the last place, because the interpreter truncates when it converts to bf16.
        rounding = torch.finfo(logits.dtype).eps * exact[4].nan_to_num(0.0).abs().max().item() if logits.numel() else 0
        slack = 0.0
        if rounds_twice() and logits.numel():  # z s - r cancels; a hardware multiply-add keeps the digits of z s
            ordinary = logits.abs() < 1e5
            slack = 2.0**-21 * logits.float().where(ordinary, 0.0).abs().max().item() / case.softmax.temperature
        assert not (logp > 0).any(), "a log-prob above 0"
        close("log-probs", logp, exact[1], base[1], 2e-6 + slack)
        close("entropy", entropy, exact[2], base[2], 2e-6 + slack)
        close("loss", loss, exact[0], base[0], 1e-5 + slack)
        close("gradient", grad, exact[4], base[4], 5e-6 + rounding + slack)
        close("metrics", sums.sum(1), exact[3], base[3], (2e-5 + slack) * max(1, logits.shape[0]))
        if i < 3:
            again = launch(kernels, case, not i % 2, device)
            for one, other in zip((loss, logp, entropy, sums, grad), again, strict=True):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), (
                    "in place, out of place or run again differ"
                )
    if halves:
        check_halves(kernels, device)


def row_cases() -> Iterator[Case]:
    """Cases for `check_rows`: all modes and dtypes, vocabularies near tile edges, offsets, masked logits, NaN."""
    entropy = LossOptions(entropy_coef=0.1)
    shapes = ((1, torch.float32), (7, torch.bfloat16), (9001, torch.float32), (20_001, torch.bfloat16),
              (25_000, torch.float32), (50_000, torch.bfloat16))  # fmt: skip
    for V, dtype in shapes:
        yield row_case(V, 3, V, dtype, entropy, Softmax(0.3), groups=False)
    for offset in (1e4, -1e4):
        case = row_case(3, 7, 600, torch.float32, entropy, Softmax(), groups=False)
        yield case._replace(logits=case.logits + offset)
    for i, (scale, softcap, dtype) in enumerate(CAPPED):
        case = row_case(20 + i, 5, 9001, dtype, entropy, Softmax(0.8, softcap), groups=False)
        tokens = case.tokens._replace(behavior=None, old=None, reference=None)
        yield case._replace(logits=case.logits * scale, tokens=tokens)
    case = row_case(4, 7, 9000, torch.float32, entropy, Softmax(), groups=False)
    logits, targets = case.logits, case.tokens.targets
    logits[0, :8500] = -torch.inf  # whole tiles of -inf; the target is outside them
    targets[0] = 8600
    logits[1], logits[1, 5] = -torch.inf, 0.0  # only one possible token
    targets[1] = 5
    logits[2, 77] = torch.nan
    logits[3, 99] = 1e30
    targets[3] = 99
    yield case
    case = row_case(8, 7, 1100, torch.bfloat16, entropy, Softmax(0.9), groups=False)
    logits, targets = case.logits, case.tokens.targets
    logits[0], logits[1] = 0.25, -torch.inf  # all logits equal; no possible token
    logits[2, 1050], logits[3, 1050], logits[4, 600] = 1e4, 30.0, 1e4  # far above the first tile; one in the tail
    targets[4] = 600
    logits[5, 5], logits[5, targets[5]] = -torch.inf, -torch.inf  # a sampled token that is masked
    yield case
    case = row_case(7, 4, 300, torch.float32, entropy, Softmax(0.7, 5.0), groups=False)
    case.logits[0, :200] = -torch.inf  # the cap makes them -5, with a probability above 0
    case.logits[1, 7] = torch.inf
    case.logits[2, 77] = torch.nan
    yield case
    yield row_case(5, 1, 33, torch.float32, LossOptions(), Softmax(), groups=True)
    yield row_case(6, 0, 33, torch.float32, LossOptions(), Softmax(softcap=3.0), groups=False)
    for i, mode in enumerate(MODES):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        yield row_case(i, 13, 500, dtype, mode, SOFTMAX.get(i, Softmax()), groups=i % 2 == 1)
        yield far_case(row_case(50 + i, 24, 40, torch.float32, mode, Softmax(), groups=False))


def close_statistics(got: torch.Tensor, exact: torch.Tensor, base: torch.Tensor, softmax: Softmax) -> None:
    """`close` for log-sum-exp, log-prob and H, which do not depend on the number subtracted from the logits."""

    def comparable(stats: torch.Tensor) -> torch.Tensor:
        row = RowStats(*stats.double().cpu().unbind(1))
        return torch.stack([row.top / softmax.temperature + row.log_norm, row.logprob, row.entropy], 1)

    close("statistics", comparable(got), comparable(exact), comparable(base))


def check_halves(kernels: ModuleType, device: str = "cpu") -> None:
    """Check the two kernels of linear_logprobs, on rows whose stride exceeds their length."""
    shapes = (
        (1, torch.float32, 3.0),
        (300, torch.bfloat16, None),
        (5000, torch.float32, None),
        (700, torch.float32, 8.0),
    )
    for V, dtype, softcap in shapes:
        softmax = Softmax(0.7, softcap)
        g = torch.Generator().manual_seed(V)
        wide = (3 * torch.randn(6, V + 40, generator=g)).to(dtype).to(device)
        logits = wide[:, 8 : 8 + V]
        beside = wide[:, 8 + V :].clone()
        targets = torch.randint(V, (6,), generator=g)
        u, h = torch.randn(2, 6, generator=g)
        cpu = logits.cpu().clone()
        exact, base = (row_stats_reference(cpu.to(t), targets, softmax) for t in (torch.float64, torch.float32))
        with poisoned_memory():
            stats = kernels.row_stats_triton(logits, targets.to(device), softmax)
        close_statistics(stats, exact, base, softmax)
        exact_grad = row_gradient_reference(cpu.double(), targets, exact, u.double(), h.double(), softmax)
        base_grad = row_gradient_reference(cpu.float(), targets, base, u, h, softmax)
        kernels.row_gradient_triton_(logits, targets.to(device), stats, u.to(device), h.to(device), softmax, logits)
        close("gradient", logits, exact_grad, base_grad, 5e-6 + torch.finfo(dtype).eps * exact_grad.abs().max().item())
        assert torch.equal(wide[:, 8 + V :], beside), "written past the end of a row"


def check_advantages(kernels: ModuleType, device: str = "cpu") -> None:
    """Raise AssertionError if `lead_advantages_triton` differs from the specification in fp64 by more than rounding."""
    for seed, (options, size) in enumerate(itertools.product(GROUP_OPTIONS, (1, 8, 37))):
        g = torch.Generator().manual_seed(seed)
        correct = torch.rand(3 * size, generator=g) < 0.5
        correct[:size] = seed % 3 == 0
        lengths = torch.randint(13_990, 14_010, (3 * size,), generator=g)
        lengths[size : 2 * size] = torch.randint(1, 20_000, (size,), generator=g)
        wrong = torch.where(torch.rand(3 * size, generator=g) < 0.3, -2.0, -1.0)
        bonus = -torch.rand(3 * size, generator=g) if seed % 2 else None
        table = Outcomes(correct, lengths, wrong, bonus).table()
        exact, base = (lead_advantages_reference(x, size, options) for x in (table.double(), table))
        with poisoned_memory():
            got = LeadAdvantages(*kernels.lead_advantages_triton(table.to(device), size, options))
        for name in ("reward", "advantage", "solve_rate", "weight"):
            close(name, getattr(got, name), getattr(exact, name), getattr(base, name), 1e-5)
        assert torch.equal(got.kept.cpu(), exact.kept), "kept"


def check_fused_advantages(kernels: ModuleType, device: str = "cpu") -> None:
    """Raise AssertionError unless the row kernel's own advantages equal `lead_advantages_triton` bit for bit."""
    for seed, (options, size) in enumerate(itertools.product(GROUP_OPTIONS, (1, 7))):
        g = torch.Generator().manual_seed(seed)
        S = 2 * size
        outcomes = Outcomes(
            torch.rand(S, generator=g) < 0.6, torch.randint(1, 14_000, (S,), generator=g), -torch.rand(S, generator=g),
            -torch.rand(S, generator=g),
        )  # fmt: skip
        groups = Groups(outcomes.table().to(device), size, options)
        given = LeadAdvantages(*kernels.lead_advantages_triton(groups.table(), size, options)).advantage
        case = on(device, row_case(seed, S, 40, torch.bfloat16, LossOptions(), Softmax(), groups=False))
        tokens = case.tokens._replace(sequence_ids=torch.arange(S, device=device), old=None, behavior=None)
        case = case._replace(tokens=tokens, sequences=Sequences(torch.ones(S, device=device), groups))
        loss, *fused = launch(kernels, case, False, device)
        assert torch.equal(-loss, given), "the row kernel's advantages are not those of lead_advantages"
        _, *apart = launch(kernels, case._replace(sequences=Sequences(torch.ones_like(given), given)), False, device)
        for name, a, b in zip(("log-probs", "entropy", "metrics", "gradient"), fused, apart, strict=True):
            assert torch.equal(a, b), f"{name} differ between advantages given and computed in the row kernel"
