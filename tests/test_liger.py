"""Test Liger's kernels in the trainer's blocks, under Triton's interpreter: the gradient is plain torch's.

Skipped where liger-kernel is not installed (extras `gpu` and `dev`).
"""

import importlib.util
import json

import pytest
from jobs import succeeded, torchrun

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)

GRADIENTS = """
import contextlib, io, json, sys, numpy as np, torch, triton, triton.language as tl
from triton.runtime import interpreter
from unittest import mock
from lead_fast.cli import load_config
from lead_fast.learner import policy as trainer
from lead_fast.learner.loss import policy_loss
from lead_fast.learner.memory import worst_pack
from lead_fast.learner.model import load_model
from lead_fast.runtime.ranks import start, stop

# What the interpreter lacks: float arguments are tensors in a compiled kernel, and libdevice has an rsqrt.
converted = interpreter._implicit_cvt
def with_floats(x):
    one = lambda: interpreter.TensorHandle(np.array([x], np.float32), tl.float32)
    return tl.tensor(one(), tl.float32) if isinstance(x, float) else converted(x)
interpreter._implicit_cvt = with_floats
@triton.jit
def rsqrt(x):
    return 1 / tl.sqrt(x)
import liger_kernel.ops.rms_norm
liger_kernel.ops.rms_norm.rsqrt = rsqrt

ranks, out = start(), {}
for liger in (False, True):
    for kind in ("none", "full", "selective"):
        c = load_config([f"--model.activation_checkpointing={kind}", "--model.dtype=float32"])
        with mock.patch.object(trainer, "uses_liger", lambda *_: liger):
            policy = trainer.Policy(load_model(c.model))
            trainer.prepare_blocks(policy, c.model, ranks.device)
        pack, o = worst_pack(24, 12, ranks)
        pack.input_ids_T.copy_(torch.arange(5, 5 + len(pack.input_ids_T)))
        policy_loss(policy, pack, o, c).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        plain = gradient if not out else plain
        parts = [m for m in policy.modules() if type(m).__name__.endswith(("RMSNorm", "MLP"))]
        by = {m.forward.__module__.split(".")[0] for m in parts}
        out[f"{liger} {kind}"] = {"off": ((gradient - plain).norm() / plain.norm()).item(), "by": sorted(by)}

class Unknown(torch.nn.Module):
    class config:
        model_type = "unheard-of"
with contextlib.redirect_stdout(io.StringIO()) as said:
    trainer._patch_by_liger(Unknown(), copy_rope_inputs=False)
out["unknown"] = said.getvalue()
json.dump(out, open(sys.argv[1], "w"))
stop()
"""


def test_the_gradient_is_plain_torchs_with_every_checkpointing(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    succeeded(torchrun(1, str(tmp_path / "gradients.py"), str(tmp_path / "out.json"), TRITON_INTERPRET="1"))
    out = json.loads((tmp_path / "out.json").read_text())
    assert "no kernels for model type unheard-of" in out.pop("unknown")
    assert {name: r["by"] for name, r in out.items()} == {
        name: ["liger_kernel" if name.startswith("True") else "transformers"] for name in out
    }
    assert all(r["off"] < 1e-5 for r in out.values()), out
