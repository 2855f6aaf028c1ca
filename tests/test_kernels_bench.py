"""Test bench/kernels.py: its float64 reference, its checks of rivals, and rivals that cannot run here."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))
import rivals  # type: ignore  # noqa: E402
from harness import Cannot  # type: ignore  # noqa: E402

# Imported by path, because Python may take the repository's folder `kernels` for a namespace package.
_spec = importlib.util.spec_from_file_location("bench_kernels", BENCH / "kernels.py")
assert _spec and _spec.loader
bench = importlib.util.module_from_spec(_spec)
sys.modules["bench_kernels"] = bench
_spec.loader.exec_module(bench)

pytestmark = pytest.mark.quick


def small(**settings):
    w = rivals.Work.make("cpu", torch.float32, 32, 64, 16)
    return w.with_settings(**settings) if settings else w


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"entropy_coef": 0.1}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("operation", ["policy_loss", "linear_policy_loss"])
def test_ours_and_plain_torch_agree_with_the_float64_reference(operation, settings):
    w = small(**settings)
    t = bench.Table(operation, w)
    t.prepare((rivals.OURS, "torch eager"))
    assert {rivals.OURS, "torch eager"} <= set(t.calls)
    assert all(max(a["logp_error"], a["gradient_error"]) < 1e-5 for a in t.accuracy.values()), t.accuracy
    ratio = (w.exact(True).logp.float() - w.old).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio - 1).abs() < 0.1).any()


def test_the_reference_is_autograd_of_the_whole_in_float64():
    w = replace(small(temperature=0.7, entropy_coef=0.1), softcap=3.0)
    h, head = (x.double().requires_grad_() for x in (w.hidden, w.head))
    w.loss(*w.scores(h @ head.T, w.targets)).backward()
    exact = w.exact(from_hidden=True)
    for got, wanted in zip(exact.gradients, (h.grad, head.grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


def test_a_rival_that_is_wrong_or_lacks_a_feature_is_not_timed(monkeypatch):
    def wrong(w, load):
        return rivals.per_token(w, lambda x: (1.01 * w.scores(x, w.targets)[0], None))

    more = (rivals.Rival("wrong", wrong), rivals.Rival("bare", rivals.eager, (rivals.SOFTCAP,)))
    o = bench.OPERATIONS["policy_loss"]
    monkeypatch.setitem(bench.OPERATIONS, "policy_loss", replace(o, rivals=(o.rivals[0], *more)))
    t = bench.Table("policy_loss", small(softcap=2.0))
    t.prepare()
    assert set(t.calls) == {rivals.OURS, bench.COPY.name}
    assert [s.split(",")[0] for s in t.left_out] == ["wrong: not measured", "bare: has no soft cap"]
    monkeypatch.setitem(bench.OPERATIONS, "policy_loss", replace(o, rivals=(rivals.Rival(rivals.OURS, wrong),)))
    with pytest.raises(AssertionError, match="is off by"):
        bench.Table("policy_loss", small()).prepare()


def test_an_overwriting_call_starts_from_the_same_logits_each_time():
    w, o = small(), bench.OPERATIONS["policy_loss"]
    rival = next(r for r in o.rivals if r.name.endswith("in place"))
    call = bench.call_of(w, o, rival)
    first = [x.clone() for x in call().gradients]
    call.prepare()
    torch.testing.assert_close(list(call().gradients), first, rtol=0, atol=0)


@pytest.mark.parametrize("rival, from_hidden", [
    *((r, False) for r in rivals.ON_LOGITS), *((r, True) for r in (*rivals.ON_HIDDEN, *rivals.ON_CROSS_ENTROPY))
], ids=lambda x: x.name if isinstance(x, rivals.Rival) else "")  # fmt: skip
def test_calls_fit_the_signatures_of_the_rivals_that_are_installed(rival, from_hidden):
    clause = rivals.checked(rival, from_hidden)
    if not clause:
        pytest.skip("not installed, or torch's own")
    assert clause == "its call fits its signature"


SOURCES = {
    "quack chunked, base": ("quack/linear_cross_entropy.py", "def chunked_linear_cross_entropy(x, weight, target, "
                            "chunk_size=4096, ignore_index=-100, reduction='mean', use_scaled_exp=None): ..."),
    "Liger scaled CE": ("liger_kernel/ops/fused_linear_scaled_cross_entropy.py",
                        "class LigerFusedLinearScaledCrossEntropyFunction:\n @staticmethod\n def apply(x, weight, "
                        "target, temperature=1.0, ignore_index=-100, tiles=1, return_entropy=False): ..."),
    "Liger fused linear GRPO": ("liger_kernel/chunked_loss/grpo_loss.py",
                                "class LigerFusedLinearGRPOLoss:\n"
                                " def __init__(self, beta=0.0, use_ref_model=True, epsilon_low=0.2, epsilon_high=0.2, "
                                "loss_type='dapo', temperature=1.0): ...\n"
                                " def forward(self, x, weight, ids, mask, advantages, old_per_token_logps=None): ..."),
    "verl linear_cross_entropy": ("verl/utils/kernel/linear_cross_entropy.py",
                                  "class LinearCrossEntropy:\n @staticmethod\n def forward(ctx, hidden, weight, "
                                  "labels, temperature=1.0, reduction='none', group=None): ..."),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_changed_signature_is_noticed_without_importing_the_rival(name, tmp_path, monkeypatch):
    rival = next(r for r in (*rivals.ON_HIDDEN, *rivals.ON_CROSS_ENTROPY) if r.name == name)
    path, source = SOURCES[name]
    package = path.partition("/")[0]
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise ImportError('it needs a GPU')")
    for loaded in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.syspath_prepend(tmp_path)
    file.write_text(source)
    with pytest.raises(Cannot, match="it needs a GPU"):
        rivals.imported(f"{path.removesuffix('.py').replace('/', '.')}:anything")
    assert rivals.checked(rival, True) == "its call fits its signature"
    file.write_text(source.replace("weight, ", "", 1))
    assert rivals.checked(rival, True).startswith("ITS SIGNATURE HAS CHANGED")
    file.write_text("pass")
    assert "HAS CHANGED" in rivals.checked(rival, True)


def test_a_rival_that_is_absent_is_one_line(monkeypatch):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    t = bench.Table("linear_cross_entropy", small().cross_entropy())
    t.prepare((rivals.OURS, "quack", "Liger"))
    assert t.left_out == [f"{name}: not measured, {package} is not installed" for name, package in (
        ("quack chunked, base", "quack"), ("quack chunked, scaled-exp", "quack"),
        ("Liger SM90 cross-entropy", "liger_kernel"))]  # fmt: skip


def test_no_table_is_begun_after_the_limit_and_the_reader_is_told(capsys):
    plan = bench.Plan(limit_s=100, repeats=1)
    rows = plan.add("policy_loss", small(), 1, (rivals.OURS,))
    assert [r["implementation"] for r in rows] == [rivals.OURS, rivals.OURS + ", in place", bench.COPY.name]
    assert "GB/s" in capsys.readouterr().out and rows[-1]["share_of_floor"] == 1
    plan.limit_s = -1
    assert not plan.add("policy_loss", small(), 1) and "left out" in plan.left_out[-1]
