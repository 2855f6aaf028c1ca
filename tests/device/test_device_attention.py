"""Test packed attention of each installed implementation against SDPA per sequence, forward and backward."""

import importlib
import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lead_fast.learner import attention
from lead_fast.learner.attention import Attention, packed_attention, sdpa_index
from lead_kernels.testing.oracle import close

pytestmark = pytest.mark.quick

LENGTHS = [1, 130, 37, 64, 517, 5]
HEADS, KV_HEADS = 8, 2
Tensors = tuple[torch.Tensor, ...]


def flash(name: str, device: torch.device, head_dim: int) -> Attention | None:
    """Return the implementation behind torch's operator, or FA2's own function; skips if there is none."""
    if device.type != "cuda":
        if name != "SDPA":
            pytest.skip(f"{name} needs a GPU")
        return None
    if name == "SDPA":
        return None
    if name == "FA2":
        if importlib.util.find_spec("flash_attn_2_cuda") is None:
            pytest.skip("flash-attn (FA2) is not installed")
        return Attention("FA2", importlib.import_module("flash_attn").flash_attn_varlen_func)
    if name in ("FA3", "FA4"):
        look = {"FA3": attention._fa3, "FA4": attention._fa4}[name]
        version, reason = look(torch.cuda.get_device_capability(device), head_dim)
        if not version or reason:
            pytest.skip(f"{name} cannot be used: {reason or 'it is not installed'}")
        torch.nn.attention.activate_flash_attention_impl(name)
    return Attention(name)


@pytest.fixture(params=["SDPA", "torch's varlen_attn", "FA2", "FA3", "FA4"])
def implementation(request, device) -> Iterator[tuple[str, torch.device]]:
    yield request.param, device
    if device.type == "cuda":
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        attention.choose.cache_clear()  # `choose` activates an implementation once, and the test has removed it


def case(head_dim: int, dtype: torch.dtype) -> Tensors:
    """Make q [T, H, K], k and v [T, kv heads, K], and the gradient of the result [T, H, K], on the CPU."""
    g, T = torch.Generator().manual_seed(head_dim), sum(LENGTHS)
    return tuple(torch.randn(T, n, head_dim, generator=g).to(dtype) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))


def per_sequence(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Compute SDPA of each sequence alone with the math backend; returns result and gradients, [T, heads, K]."""
    *leaves, grad = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    parts = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in leaves), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    out = torch.cat(parts)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def packed(tensors: Tensors, device: torch.device, chosen: Attention | None, lengths: list[int]) -> Tensors:
    *leaves, grad = (x.detach().to(device) for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    kw = {"sdpa_index": sdpa_index(lengths, device)}
    if chosen:
        cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        kw = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths),
              "implementation": chosen}  # fmt: skip
    q, k, v = (x.transpose(0, 1)[None] for x in leaves)
    out, _ = packed_attention(nn.Identity(), q, k, v, None, **kw)
    return out[0].detach(), *torch.autograd.grad(out[0], leaves, grad)


def compare(got: Tensors, exact: Tensors, base: Tensors, dtype: torch.dtype) -> None:
    """Require at most twice SDPA's error in the dtype; in half precision, blocks may be summed in another order."""
    for name, x, e, b in zip(("out", "d(q)", "d(k)", "d(v)"), got, exact, base, strict=True):
        close(name, x, e, b, atol=2 * torch.finfo(dtype).eps * e.abs().max().item(), rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_attention_is_sdpa_of_each_sequence(implementation, head_dim, dtype):
    name, device = implementation
    chosen = flash(name, device, head_dim)
    if chosen and dtype == torch.float32:
        pytest.skip("flash attention is for half precision")
    tensors = case(head_dim, dtype)
    exact, base = per_sequence(tensors, torch.float64), per_sequence(tensors, dtype)
    compare(packed(tensors, device, chosen, LENGTHS), exact, base, dtype)
    joined = [LENGTHS[0] + LENGTHS[1], *LENGTHS[2:]]
    with pytest.raises(AssertionError):  # the second sequence attends to the first
        compare(packed(tensors, device, chosen, joined), exact, base, dtype)
