"""Who computes attention over packed sequences on a GPU, and the one call of it.

torch's `varlen_attn` is an operator, so selective checkpointing and fake tensors see it; flash-attn's FA3 and FA4
replace the kernels behind it where they are installed and fit GPU and model. FA2 is called by its own function where it
is installed, which is an operator of its own. None of the three is required.

Legend: T packed tokens, H heads, K head dim.
"""

import base64
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FA4_TORCH = (2, 14)  # the first torch that takes what flash-attn-4 4.0.0b36 returns


@dataclass(frozen=True)
class Attention:
    """An implementation: in words, and FA2's own function where that is the one."""

    name: str
    fa2: Callable[..., Any] | None = None


def fa4_version() -> str | None:
    """The version of flash-attn-4, if the files in flash_attn/cute are its own.

    flash-attn's source archive (FA2) ships an older `flash_attn/cute` with other signatures: it is not taken for FA4,
    neither alone nor where it was installed over flash-attn-4.
    """
    try:
        distribution = importlib.metadata.distribution("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in distribution.files or ():
        if file.as_posix() == "flash_attn/cute/interface.py" and file.hash:
            path = Path(str(file.locate()))
            if not path.is_file():
                return None
            digest = hashlib.new(file.hash.mode, path.read_bytes()).digest()
            own = base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value
            return distribution.version if own else None
    return None


def fits_fa4(capability: tuple[int, int], head_dim: int) -> bool:
    """Whether FA4 takes this head dim on a GPU of this compute capability (flash-attn-4's own limits)."""
    if head_dim % 8:
        return False
    if capability[0] == 9:
        return 8 <= head_dim <= 256
    return capability[0] == 10 and (8 <= head_dim <= 128 or head_dim == 256)


@functools.cache
def choose(capability: tuple[int, int], head_dim: int) -> Attention:
    """The best installed implementation: FA3 (Hopper), FA4 (Hopper, Blackwell), FA2, torch's own (which is FA2's code).

    FA3 and FA4 are activated behind torch's operator, once per process. One that is installed and cannot be activated
    is named with the reason.
    """
    refused = ""
    for name, wanted in (("FA3", _fa3(capability, head_dim)), ("FA4", _fa4(capability, head_dim))):
        if wanted is None:
            continue
        try:
            importlib.import_module("torch.nn.attention").activate_flash_attention_impl(name)
            return Attention(f"torch's varlen_attn by {name} ({wanted})")
        except Exception as e:  # whatever another project's package raises when it is imported
            reason = next(iter(str(e).strip().splitlines()), "no reason given")
            refused += f"; {name} is installed and cannot be used ({type(e).__name__}: {reason})"
    spec = importlib.util.find_spec("flash_attn")
    if spec and spec.origin:  # a package with a file of its own: flash-attn-4 alone makes a namespace
        try:
            own = importlib.import_module("flash_attn")
            return Attention(f"flash-attn, FA2 ({own.__version__}){refused}", own.flash_attn_varlen_func)
        except (ImportError, AttributeError, OSError) as e:
            reason = next(iter(str(e).strip().splitlines()), "no reason given")
            refused += f"; FA2 is installed and cannot be used ({type(e).__name__}: {reason})"
    return Attention(f"torch's varlen_attn{refused}")


def _fa3(capability: tuple[int, int], head_dim: int) -> str | None:
    found = importlib.util.find_spec("flash_attn_interface")
    return "flash_attn_interface" if found and capability[0] == 9 and head_dim <= 256 else None


def _fa4(capability: tuple[int, int], head_dim: int) -> str | None:
    version = fa4_version()
    release = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if version is None or not fits_fa4(capability, head_dim):
        return None
    return f"flash-attn-4 {version}" if release >= FA4_TORCH else None


@functools.cache
def varlen_takes_gqa() -> bool:
    """Whether the installed torch's varlen_attn shares key and value heads itself (2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
    implementation: Attention,
) -> torch.Tensor:
    """Causal attention inside each packed sequence, on a GPU in half precision.

    Args:
        query: [T, H, K].
        key, value: [T, kv heads, K]; H is a multiple of kv heads.
        cu_seqlens: int32 [S + 1], where sequences start and the last one ends.
        longest: tokens of the longest sequence.
        scaling: of the products; None is K^-1/2.
    Returns:
        [T, H, K].
    """
    if implementation.fa2:
        out = implementation.fa2(
            q=query,
            k=key,
            v=value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scaling,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if key.shape[1] != query.shape[1]:
        if varlen_takes_gqa():
            grouped = {"enable_gqa": True}
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = varlen_attn(
        query=query,
        key=key,
        value=value,
        cu_seq_q=cu_seqlens,
        cu_seq_k=cu_seqlens,
        max_q=longest,
        max_k=longest,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out


def attention_in_use(device: torch.device, dtype: str, head_dim: int) -> str:
    """In words, who computes attention on `device` in `dtype`."""
    if device.type == "cpu" or dtype == "float32":
        return "torch's scaled_dot_product_attention over sequences of similar length"
    return choose(torch.cuda.get_device_capability(device), head_dim).name
