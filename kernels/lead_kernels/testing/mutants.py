"""Kernels that the oracle must reject.

`WRONG` lists edits of the Triton kernels' source, each of which makes a plausible mistake; `wrong_module` loads one.
"""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent.parent
ROWS, GROUPS = "_triton_rows.py", "_triton_advantage.py"

# what is wrong -> (file, what the right one says, what the wrong one says)
WRONG: dict[str, tuple[str, str, str]] = {
    "log-prob of the column before": (
        ROWS,
        "row_ptr + target, mask=inside",
        "row_ptr + tl.maximum(target - 1, 0), mask=inside",
    ),
    "one-hot a column late": (
        ROWS,
        "at == target, g",
        "at == target + 1, g",
    ),
    "no temperature in the sum": (
        ROWS,
        "x = (z - higher) * inverse",
        "x = z - higher",
    ),
    "no temperature in the gradient": (
        ROWS,
        "(d * inverse)",
        "d",
    ),
    "tail not masked": (
        ROWS,
        "other=-inf)",
        "other=0.0)",
    ),
    "sums kept when the maximum moves": (
        ROWS,
        "keep = tl.exp(-shift)",
        "keep = 1.0",
    ),
    "entropy not shifted when the maximum moves": (
        ROWS,
        "dot_B - shift * sum_B",
        "dot_B",
    ),
    "half-precision accumulation": (
        ROWS,
        "sum_B = sum_B * keep + e",
        "sum_B = (sum_B * keep + e).to(tl.float16).to(tl.float32)",
    ),
    "sign of the entropy gradient": (
        ROWS,
        "-g - h * inner",
        "-g + h * inner",
    ),
    "gradient rounded before it is scaled": (
        ROWS,
        "(d * inverse).to(out",
        "(((d * 1e-6).to(out_ptr.dtype.element_ty)).to(tl.float32) * 1e6 * inverse).to(out",
    ),
    "rows without gradient left as they were": (
        ROWS,
        "tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < V)",
        "tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=at < 0)",
    ),
    "derivative of the soft cap forgotten": (
        ROWS,
        "d = d * slope",
        "d = d * 1.0",
    ),
    "derivative of the soft cap without its square": (
        ROWS,
        "4.0 * q * (1.0 - q)",
        "2.0 * q",
    ),
    "soft cap after the temperature": (
        ROWS,
        "at < V, soft_cap(z, softcap), -inf",
        "at < V, soft_cap(z * inverse, softcap) / inverse, -inf",
    ),
    "target not capped": (
        ROWS,
        "at_target = soft_cap(at_target, softcap)",
        "at_target = at_target * 1.0",
    ),
    "tail capped too": (
        ROWS,
        "tl.where(at < V, soft_cap(z, softcap), -inf)",
        "soft_cap(z, softcap)",
    ),
    "tanh by a difference of exponentials near 0": (
        ROWS,
        "size < 0.55",
        "size < 0.0",
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
    "CISPO bounded below unasked": (
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
        "loss_options.sapo_positive, loss_options.sapo_negative",
        "loss_options.sapo_positive, loss_options.sapo_positive",
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
        "tl.where(over, loss_options.delta, r) * a",
        "r * a",
    ),
    "dual clip on good answers": (
        ROWS,
        "dual = (a < 0)",
        "dual = (a > 0)",
    ),
    "importance weight on the loss alone": (
        ROWS,
        "g = g * w",
        "g = g * 1.0",
    ),
    "mask taken for truncation": (
        ROWS,
        'if loss_options.importance_mode == "truncate" else 0.0',
        'if loss_options.importance_mode != "" else 0.0',
    ),
    "sign of the k3 gradient": (
        ROWS,
        "1 - tl.where(far, 0.0, e)",
        "tl.where(far, 0.0, e) - 1",
    ),
    "weight of the first sequence for all": (
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
    "wrong answers' lengths in the spread": (
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
    "length gate the wrong way": (
        GROUPS,
        "<= options.length_gate",
        "> options.length_gate",
    ),
    "correct answers' floor for all": (
        GROUPS,
        "right & (advantage < 0)",
        "(advantage < 0)",
    ),
}


def wrong_module(name: str, folder: Path) -> ModuleType:
    """The launchers with the mistake `name`, written to and loaded from `folder`; name '' : none."""
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
        text = re.sub(r"^from \.(?!_triton_)", "from lead_kernels.", text, flags=re.M)  # all else is the right one
        (at / file).write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(package + "._triton_rows")
    finally:
        sys.path.remove(str(folder))
