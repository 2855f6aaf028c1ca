"""Kernels that the oracle must reject.

`WRONG` lists edits of the Triton kernels' source, each of which introduces a plausible mistake; `wrong_module` loads
one.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent.parent
ROWS, GROUPS = "_triton_rows.py", "_triton_advantage.py"

# name of the mistake -> (file, text of the right kernel, text of the wrong one)
WRONG: dict[str, tuple[str, str, str]] = {
    "log-prob of the column before": (
        ROWS,
        "row_ptr + target, mask=inside",
        "row_ptr + tl.maximum(target - 1, 0), mask=inside",
    ),
    "one-hot a column late": (
        ROWS,
        "out_ptr + target, d",
        "out_ptr + tl.minimum(target + 1, V - 1), d",
    ),
    "no temperature in the sum": (
        ROWS,
        "even, odd = tl.fma(even, scale, shift)",
        "even, odd = tl.fma(even, 0 * scale + LOG2_E, shift)",
    ),
    "no temperature in the gradient": (
        ROWS,
        "g, h = g * inverse, h * inverse",
        "g, h = g * 1.0, h * 1.0",
    ),
    "tail not masked": (
        ROWS,
        "other=TWO_MINUS_INF",
        "other=0",
    ),
    "tail of logits read one by one not masked": (
        ROWS,
        'other=-float("inf"), eviction',
        "other=0.0, eviction",
    ),
    "last full tile forgotten": (
        ROWS,
        "        tile = following\n    sum_B, dot_B = add_tile",
        "        tile = following\n    add_tile",
    ),
    "second look a tile late": (
        ROWS,
        "row_ptr, n - 1 - i, V",
        "row_ptr, n - i, V",
    ),
    "overflow kept": (
        ROWS,
        "(norm > MAX_NORM)",
        "(norm < 0.0)",
    ),
    "rounding error of the shift ignored": (
        ROWS,
        "factor = exp2(eps)",
        "factor = 1.0 + 0.0 * eps",
    ),
    "0 times -inf in a row with masked logits": (
        ROWS,
        "tl.where(p > 0, log_p * LN_2 + entropy, 0.0)",
        "(log_p * LN_2 + entropy)",
    ),
    "odd column with the bits of the even one": (
        ROWS,
        "tile & -65536",
        "tile & -1",
    ),
    "columns of a pair exchanged": (
        ROWS,
        "tl.join(even, odd)",
        "tl.join(odd, even)",
    ),
    "half-precision accumulation": (
        ROWS,
        "return sum_B + e_even + e_odd",
        "return (sum_B + e_even + e_odd).to(tl.float16).to(tl.float32)",
    ),
    "sign of the entropy gradient": (
        ROWS,
        "slope = -h * LN_2",
        "slope = h * LN_2",
    ),
    "gradient rounded before it is scaled": (
        ROWS,
        "d = d.to(out_ptr.dtype.element_ty)",
        "d = ((d * 1e-6).to(out_ptr.dtype.element_ty).to(tl.float32) * 1e6).to(out_ptr.dtype.element_ty)",
    ),
    "rows without gradient left as they were": (
        ROWS,
        "tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < V)",
        "tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < 0)",
    ),
    "derivative of the soft cap forgotten": (
        ROWS,
        "d = d * soft_cap_slope(z, softcap)\n    at",
        "d = d * 1.0\n    at",
    ),
    "derivative of the soft cap forgotten at the target": (
        ROWS,
        "d = d * soft_cap_slope(z_target, softcap)",
        "d = d * 1.0",
    ),
    "derivative of the soft cap without its square": (
        ROWS,
        "4.0 * q * (1.0 - q)",
        "2.0 * q",
    ),
    "soft cap after the temperature": (
        ROWS,
        "        even, odd = soft_cap(even, softcap), soft_cap(odd, softcap)\n    even, odd = tl.fma",
        "        even, odd = soft_cap(even * scale, softcap) / scale, soft_cap(odd * scale, softcap) / scale\n"
        "    even, odd = tl.fma",
    ),
    "target not capped": (
        ROWS,
        "at_target, rounded = soft_cap(z_target, softcap),",
        "at_target, rounded = z_target * 1.0,",
    ),
    "tail capped too": (
        ROWS,
        "tl.where(n * BLOCK + tl.arange(0, BLOCK) < V, soft_cap(y, softcap), -inf)",
        "soft_cap(y, softcap)",
    ),
    "tanh by a difference of exponentials near 0": (
        ROWS,
        "size < 0.55",
        "size < 0.0",
    ),
    "exact logit of the target left out of the sum": (
        ROWS,
        "norm = all_but_target + e",
        "norm = norm * 1.0",
    ),
    "exact logit of the target left out of the entropy": (
        ROWS,
        "tl.where(e == 0, 0.0, e * x) - tl.where(inside, e_rounded * x_rounded, 0.0)",
        "0.0",
    ),
    "exact logit of the target added to the rounded one's term": (
        ROWS,
        "all_but_target = norm - e_rounded",
        "all_but_target = norm - 0.0 * e_rounded",
    ),
    "clip bounds exchanged": (
        ROWS,
        "r < low, r > high",
        "r < 2 - high, r > 2 - low",
    ),
    "gradient through a clipped ratio": (
        ROWS,
        "tl.where(a > 0, above, below) | capped",
        "((a < 0) & below) | capped",
    ),
    "gradient through a ratio past the cap of its logarithm": (
        ROWS,
        "tl.where(a > 0, above, below) | capped",
        "tl.where(a > 0, above, below)",
    ),
    "NaN advantage swallowed where the clip is active": (
        ROWS,
        "0.0 * a, -r * a",
        "0.0, -r * a",
    ),
    "CISPO with a lower bound by default": (
        ROWS,
        "*options.clip_range,",
        "max(0.8, options.clip_range[0]), options.clip_range[1],",
    ),
    "CISPO without its upper bound": (
        ROWS,
        "g = -clipped * a",
        "g = -tl.where(below, low, r) * a",
    ),
    "CISPO's weight not detached": (
        ROWS,
        "g = -clipped * a",
        "g = -clipped * a * (1 + logp)",
    ),
    "SAPO with one steepness for both signs": (
        ROWS,
        "options.sapo_positive, options.sapo_negative",
        "options.sapo_positive, options.sapo_positive",
    ),
    "SAPO's derivative by the ratio, not by its logarithm": (
        ROWS,
        "4 * r * gate * rest",
        "4 * gate * rest",
    ),
    "SAPO's loss not divided by its steepness": (
        ROWS,
        "(4 / tau) * gate",
        "4 * gate",
    ),
    "gradient past delta": (
        ROWS,
        "constant = constant | over",
        "constant = constant | (over & (a > 0))",
    ),
    "delta on the gradient alone": (
        ROWS,
        "tl.where(over, options.delta, r) * a",
        "r * a",
    ),
    "dual clip on positive advantages": (
        ROWS,
        "dual = (a < 0)",
        "dual = (a > 0)",
    ),
    "importance weight on the loss alone": (
        ROWS,
        "g = g * w",
        "g = g * 1.0",
    ),
    "mask treated as truncation": (
        ROWS,
        'if options.importance_mode == "truncate" else 0.0',
        'if options.importance_mode != "" else 0.0',
    ),
    "sign of the k3 gradient": (
        ROWS,
        "1 - tl.where(far, 0.0, e)",
        "tl.where(far, 0.0, e) - 1",
    ),
    "weight of the first sequence used for all": (
        ROWS,
        "weight_ptr + sequence",
        "weight_ptr + 0 * sequence",
    ),
    "next member's advantage": (
        ROWS,
        "BLOCK_G) == sequence - first",
        "BLOCK_G) == (sequence - first + 1) % size",
    ),
    "w(rho) and w(1 - rho) exchanged": (
        GROUPS,
        "advantage > 0, weight, difficulty_weight(1 - rho, options)",
        "advantage > 0, difficulty_weight(1 - rho, options), weight",
    ),
    "variance over n": (
        GROUPS,
        "count - 1)) + options.eps",
        "count)) + options.eps",
    ),
    "lengths of wrong responses in the spread": (
        GROUPS,
        "correct, moved - mean",
        "member, moved - mean",
    ),
    "fp32 sum of squared lengths": (
        GROUPS,
        "total(product(off, off)), tl.maximum(n - 1, 1.0)",
        "total(tl.where(correct, length * length, 0.0)) - n * (mean + shortest) * (mean + shortest), "
        "tl.maximum(n - 1, 1.0)",
    ),
    "length gate inverted": (
        GROUPS,
        "<= options.length_gate",
        "> options.length_gate",
    ),
    "floor of correct responses applied to all": (
        GROUPS,
        "right & (advantage < 0)",
        "(advantage < 0)",
    ),
}


def wrong_module(name: str, folder: Path) -> ModuleType:
    """Load launchers with the mistake `name` from copies written to `folder`; the name '' makes no mistake."""
    package = "wrong_" + re.sub(r"\W", "_", name)
    at = folder / package
    at.mkdir()
    (at / "__init__.py").touch()
    for file in (ROWS, GROUPS):
        text = (HERE / file).read_text(encoding="utf-8")
        if name and WRONG[name][0] == file:
            _, right, wrong = WRONG[name]
            assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
            text = text.replace(right, wrong)
        text = re.sub(r"^from \.(?!_triton_)", "from lead_kernels.", text, flags=re.M)  # all others are the real ones
        (at / file).write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(package + "._triton_rows")
    finally:
        sys.path.remove(str(folder))
