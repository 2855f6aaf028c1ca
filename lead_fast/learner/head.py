"""Find out what a model does between its last hidden states and its logits, by trying and not from its configuration.

The same key means different things in different models: `logits_scaling` divides in Granite and multiplies in
HyperCLOVA X. Therefore a probe runs the model's own forward from chosen hidden states through a small head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

KEYS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "logits_mup_width_multiplier",
)
"""Configuration keys that concern the logits, named when a model is refused."""


@dataclass(frozen=True)
class HeadForm:
    """logits = softcap tanh(scale z / softcap), or scale z without a softcap, where z is the head's product."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """Compute logits from the head's product z, of any shape."""
        return self.scale * z if self.softcap is None else self.softcap * torch.tanh(self.scale * z / self.softcap)


class Head(NamedTuple):
    """A model's head inside the forward pass, with its parameters gathered: weight [V, D], bias [V] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    form: HeadForm

    def options(self, temperature: float) -> dict[str, Any]:
        """Keyword arguments for the log-prob functions of lead_kernels at this temperature.

        They cap the product itself: C tanh(s z / C) / T = c tanh(z / c) / t with c = C / s and t = T / s.
        """
        given: dict[str, Any] = {"temperature": temperature / self.form.scale}
        if self.form.softcap is not None:
            given["softcap"] = self.form.softcap / self.form.scale
        if self.bias is not None:
            given["head_bias"] = self.bias
        return given


class _Outputs(MoeModelOutputWithPast):
    """The output of a model's blocks, None in all fields but the hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


SPREAD = (1e-3, 1.0, 1e3, 1e6)  # magnitudes of the head's product to try
NEAR = 1e-4  # relative; float32's rounding on the way is a hundred times smaller


@torch.no_grad()
def probe_head(model: Any) -> HeadForm:
    """Find what a causal language model does to the product of its head, by running its own forward.

    Raises:
        ValueError: it does more than scale and cap; the message names the configuration's keys about logits.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        width, own = model.lm_head.in_features, model.lm_head
        small = nn.Linear(width, 16, bias=False, dtype=torch.float32)
        direction = torch.randn(1, 8, width)
    hidden = torch.cat([direction * size / width**0.5 for size in SPREAD], 1)
    product = small(hidden)
    ids = torch.zeros(1, hidden.shape[1], dtype=torch.int64)
    fields: Any = {"last_hidden_state": hidden}
    outputs: Any = _Outputs(**fields)
    try:
        model.lm_head, model.model.forward = small, lambda *_, **__: outputs
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.lm_head = own
        del model.model.forward
    refusal = ValueError(
        f"its logits are not its head's product, scaled and soft-capped ({present(model.config)}), and training "
        "supports nothing else; give another model"
    )
    if logits.shape != product.shape:
        raise refusal
    y, z = (x.double().reshape(len(SPREAD), -1) for x in (logits, product))
    scale = snap(float((y[0] * z[0]).sum() / (z[0] * z[0]).sum()), model.config)
    cap = None if torch.allclose(y, scale * z, rtol=NEAR, atol=0) else snap(y[-1].abs().max().item(), model.config)
    form = HeadForm(scale, cap)
    if not scale > 0 or not torch.allclose(y, form.apply(z), rtol=NEAR, atol=NEAR * SPREAD[0] * scale):
        raise refusal
    return form


def snap(value: float, config: Any) -> float:
    """The configuration's own number, or its reciprocal, if `value` equals it up to rounding; else `value`."""
    numbers = [1.0, *(v for k in KEYS if isinstance(v := getattr(config, k, None), int | float) and v)]
    near = [n for v in numbers for n in (float(v), 1 / v) if abs(n - value) <= 1e-5 * abs(value)]
    return near[0] if near else value


def present(config: Any) -> str:
    """The configuration's keys about logits and their values, in words."""
    given = [f"{k} = {v}" for k in KEYS if (v := getattr(config, k, None)) is not None]
    return ", ".join(given) or "no key of its configuration shows this"
