"""Attention over packed sequences: SDPA by groups of similar length, Ulysses over ranks, the choice of GPU kernels.

What a layer asks of its attention comes with every call, as transformers hands it over: the scale of the products, a
sliding window (`sliding_window`), a soft cap on the products (`softcap`), sinks (`s_aux`). It is applied or refused.

torch's `varlen_attn` is an operator, so selective checkpointing and fake tensors see it; flash-attn's FA3 and FA4
replace the kernels behind it where they are installed and fit GPU and model. FA2 is called by its own function where it
is installed, which is an operator of its own. None of the three is required.

Legend: T packed tokens, H heads, K head dim.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

FA4_TORCH = (2, 14)  # the first torch that takes what flash-attn-4 4.0.0b36 returns


@dataclass(frozen=True)
class Attention:
    """An implementation: its name for messages, and FA2's own function if it is FA2."""

    name: str
    fa2: Callable[..., Any] | None = None

    @property
    def caps(self) -> bool:
        """Whether it can cap the products softly."""
        return self.fa2 is not None and "softcap" in inspect.signature(self.fa2).parameters


@dataclass(frozen=True)
class Features:
    """What a layer's attention does besides scaling and causality.

    window: tokens that a token sees, itself included; None: all before it.
    softcap: c in c tanh(product / c); None: products as they are.
    sinks: [H], the logit of a key that every query sees and that has no value; None: no such key.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def fa4_version() -> str | None:
    """The version of flash-attn-4, if the files in flash_attn/cute are its own.

    flash-attn's source archive (FA2) ships an older `flash_attn/cute` with other signatures: it does not count as FA4,
    whether it is installed alone or over flash-attn-4.
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
def choose(capability: tuple[int, int], head_dim: int, softcap: bool = False) -> Attention:
    """The best installed implementation: FA3 (Hopper), FA4 (Hopper, Blackwell), FA2, torch's own (which is FA2's code).

    FA3 and FA4 are activated behind torch's operator, once per process. The name lists those that are installed and
    not used, each with the reason. `softcap`: the model caps products softly, which torch's operator cannot do.
    """
    refused = ""
    for name, version, reason in (("FA3", *_fa3(capability, head_dim)), ("FA4", *_fa4(capability, head_dim))):
        if not version:
            continue
        if softcap:
            reason = "torch's operator has no soft-capping"
        if not reason:
            try:
                importlib.import_module("torch.nn.attention").activate_flash_attention_impl(name)
                return Attention(f"torch's varlen_attn by {name} ({version})")
            except Exception as e:  # whatever another project's package raises when it is imported
                reason = _first_line(e)
        refused += f"; {name} is installed and cannot be used ({reason})"
    spec = importlib.util.find_spec("flash_attn")
    if spec and spec.origin:  # a package with a file of its own: flash-attn-4 alone makes a namespace
        try:
            own = importlib.import_module("flash_attn")
            return Attention(f"flash-attn, FA2 ({own.__version__}){refused}", own.flash_attn_varlen_func)
        except (ImportError, AttributeError, OSError) as e:
            refused += f"; FA2 is installed and cannot be used ({_first_line(e)})"
    return Attention(f"torch's varlen_attn{refused}")


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {next(iter(str(e).strip().splitlines()), 'no reason given')}"


def _fa3(capability: tuple[int, int], head_dim: int) -> tuple[str, str]:
    """Return FA3's module ("" if it is not installed) and why it does not fit ("" if it does)."""
    installed = importlib.util.find_spec("flash_attn_interface") is not None
    fits = capability[0] == 9 and head_dim <= 256
    return "flash_attn_interface" * installed, "" if fits else _unfit(capability, head_dim)


def _fa4(capability: tuple[int, int], head_dim: int) -> tuple[str, str]:
    """Do the same for FA4: its name with the version, and why it does not fit."""
    try:
        name = f"flash-attn-4 {importlib.metadata.version('flash-attn-4')}"
    except importlib.metadata.PackageNotFoundError:
        return "", ""
    release = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if fa4_version() is None:
        return name, "another package has overwritten its files: install it again"
    if release < FA4_TORCH:
        return name, f"it needs torch {FA4_TORCH[0]}.{FA4_TORCH[1]}"
    return name, "" if fits_fa4(capability, head_dim) else _unfit(capability, head_dim)


def _unfit(capability: tuple[int, int], head_dim: int) -> str:
    return f"not for compute capability {capability[0]}.{capability[1]} with a head dim of {head_dim}"


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
    features: Features = Features(),
) -> torch.Tensor:
    """Compute causal attention inside each packed sequence, on a GPU in half precision.

    Args:
        query: [T, H, K].
        key, value: [T, kv heads, K]; H is a multiple of kv heads.
        cu_seqlens: int32 [S + 1], where sequences start and the last one ends.
        longest: tokens of the longest sequence.
        scaling: of the products; None is K^-1/2.
        implementation: what computes it.
        features: of the layer.
    Returns:
        [T, H, K].
    Raises:
        ValueError: a feature that the implementation does not have.
    """
    if refusal := refuse(implementation, softcap=features.softcap is not None, sinks=features.sinks is not None):
        raise ValueError(refusal)
    width = value.shape[-1]
    if width < query.shape[-1]:  # kernels want one head dim; the columns of zeros are cut off again
        scaling, value = scaling or query.shape[-1] ** -0.5, F.pad(value, [0, query.shape[-1] - width])
    windowed = features.window is not None and features.window < longest
    window = (features.window - 1, 0) if windowed and features.window else (-1, 0)
    out = _varlen(query, key, value, cu_seqlens, longest, scaling, implementation, window, features.softcap)
    return out if out.shape[-1] == width else out[..., :width]


def refuse(implementation: Attention, *, softcap: bool, sinks: bool) -> str | None:
    """Say in a sentence what a model needs and this implementation cannot do; None if it can do everything."""
    if sinks:
        return (
            f"its attention has sinks, which {implementation.name} cannot do; give --model.dtype=float32, which "
            "computes attention in plain torch, or another model"
        )
    if softcap and not implementation.caps:
        return (
            f"attn_logit_softcapping is set, which {implementation.name} cannot do; install flash-attn (2.6 or later), "
            "or give --model.dtype=float32, which computes attention in plain torch"
        )
    return None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
    implementation: Attention,
    window: tuple[int, int],
    softcap: float | None,
) -> torch.Tensor:
    if implementation.fa2:
        capped = {} if softcap is None else {"softcap": softcap}
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
            window_size=(window[0], 0) if window[0] >= 0 else (-1, -1),
            **capped,
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
        window_size=window,
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out


def attention_in_use(device: torch.device, dtype: str, head_dim: int) -> str:
    """Name what computes attention on `device` in `dtype`."""
    if device.type == "cpu" or dtype == "float32":
        return "torch's scaled_dot_product_attention over sequences of similar length"
    return choose(torch.cuda.get_device_capability(device), head_dim).name


# ---------------------------------------------------------------------------------------------------------- attention


def attention_groups(lengths: list[int], waste: float = 0.25) -> list[list[int]]:
    """Sequences of similar length together, so that padding them to the longest wastes at most `waste`."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups and lengths[i] >= (1 - waste) * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def sdpa_index(
    lengths: list[int], device: torch.device, prefixes: Sequence[tuple[int, int]] = ()
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each group of similar lengths: the packed position of every (sequence, slot), and which slots are real.

    A slot behind a sequence's end points at the sequence's first token, and its result is dropped; attention is causal,
    so no real token ever looks at it. A sequence with a prefix (Pack.prefixes) has slots for the prefix's tokens before
    its own. They give keys and values; their results as queries are dropped, because the sequence that owns the
    prefix computes them.
    """
    starts = torch.tensor([0, *lengths]).cumsum(0)
    prefixes = prefixes or [(0, 0)] * len(lengths)
    first, before = torch.tensor(prefixes).unbind(1)
    total = [n + prefix for n, (_, prefix) in zip(lengths, prefixes, strict=True)]
    out = []
    for group in attention_groups(total):
        slot = torch.arange(max(total[i] for i in group))[None]
        start, prefix, end = starts[group][:, None], before[group][:, None], torch.tensor([total[i] for i in group])
        real = (slot >= prefix) & (slot < end[:, None])
        own = torch.where(real, start + slot - prefix, start)
        where = torch.where(slot < prefix, first[group][:, None] + slot, own)
        out.append((where.to(device), real.to(device)))
    return out


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return x[index] along the first dimension, with a gradient that is summed in a fixed order.

    On a CPU with several threads the gradient of x[index] is not, where an index repeats: threads add in any order.
    """
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


class _Exchange(torch.autograd.Function):
    """x [n, ...]: part i goes to the group's rank i, and part i of the result came from it; so does the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(grads[0].contiguous(), ctx.group), None


def tokens_to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[1, H, T/n, K], a rank's tokens of all heads -> [1, H/n, T, K], all tokens of a rank's heads (Ulysses)."""
    n, (_, H, part, K) = group.size(), x.shape
    parts = _Exchange.apply(x.reshape(n, H // n, part, K).contiguous(), group)
    return parts.transpose(0, 1).reshape(1, H // n, n * part, K)


def heads_to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[1, T, H/n, K] -> [1, T/n, H, K], the way back."""
    n, (_, T, heads, K) = group.size(), x.shape
    parts = _Exchange.apply(x.reshape(n, T // n, heads, K).contiguous(), group)
    return parts.transpose(0, 1).reshape(1, T // n, n * heads, K)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention inside each packed sequence, with the layer's scale, window, soft cap and sinks.

    query [1, H, T, K], key and value [1, kv heads, T, K] -> [1, T, H, K]. On CUDA in half precision the
    implementation is what `choose` returned; elsewhere it is plain torch over sequences of similar length. Ranks that
    share a pack (`sequence_group`) pass all heads of their own tokens, and compute their own heads over all tokens.

    Raises:
        ValueError: the layer does not pass on what the policy gave it, or asks for what the implementation cannot do.
    """
    if attention_mask is not None or query.shape[0] != 1 or not kwargs.keys() & {"sdpa_index", "cu_seq_lens_q"}:
        raise ValueError(
            f"{type(module).__name__} does not pass the bounds of packed sequences on to its attention, so they would "
            "see one another; give another model"
        )
    features = Features(kwargs.pop("sliding_window", None), kwargs.pop("softcap", None), kwargs.pop("s_aux", None))
    if group := kwargs.pop("sequence_group", None):
        copies = _copies(query.shape[1], key.shape[1], group.size())
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        query, key, value = (tokens_to_heads(x, group) for x in (query, key, value))
        if features.sinks is not None:
            features = dataclasses.replace(features, sinks=features.sinks.chunk(group.size())[group.rank()])
        return heads_to_tokens(_attend(query, key, value, scaling, features, **kwargs), group), None
    return _attend(query, key, value, scaling, features, **kwargs), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    features: Features,
    **kwargs: Any,
) -> torch.Tensor:
    if "sdpa_index" not in kwargs:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [T, heads, K]
        cu, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        return varlen_attention(q, k, v, cu, longest, scaling, kwargs["implementation"], features)[None]
    wheres, reals = zip(*kwargs["sdpa_index"], strict=True)
    slots = torch.cat([where.flatten() for where in wheres])  # all groups at once: one gradient to scatter
    sizes = [where.numel() for where in wheres]
    gathered = (take(x[0].transpose(0, 1), slots).split(sizes) for x in (query, key, value))
    parts = []
    for where, real, *qkv in zip(wheres, reals, *gathered, strict=True):
        q, k, v = (x.unflatten(0, where.shape).transpose(1, 2) for x in qkv)  # [sequences, heads, slots, K]
        parts.append(_causal(q, k, v, scaling, features).transpose(1, 2)[real])
    places = torch.cat([where[real] for where, real in zip(wheres, reals, strict=True)])
    out = value.new_empty(query.shape[2], query.shape[1], value.shape[3])  # [T, H, K]
    return out.index_put((places,), torch.cat(parts))[None]


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, features: Features):
    """Causal attention of whole sequences, [n, heads, slots, K]: SDPA, or products and softmax where it lacks one."""
    slots, window = q.shape[2], features.window
    banded = window is not None and window < slots
    if features.softcap is None and features.sinks is None:
        seen = band(slots, window, q.device) if banded else None
        gqa = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scaling, enable_gqa=gqa)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    products = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    if features.softcap is not None:
        products = torch.tanh(products / features.softcap) * features.softcap
    products = products.masked_fill(~band(slots, window, q.device), float("-inf"))
    if features.sinks is not None:
        sinks = features.sinks.to(products.dtype)[None, :, None, None].expand(*products.shape[:3], 1)
        products = torch.cat([products, sinks], -1)
    weights = products.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))[..., :slots]
    return weights.to(v.dtype) @ v


def band(slots: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [slots, slots]: which keys a query sees, itself and those before it, `window` of them at most."""
    seen = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def _copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often key and value heads must be repeated so that every rank gets whole ones, next to their query heads."""
    return next(n for n in range(1, heads // kv_heads + 1) if heads % (n * kv_heads) == 0 == n * kv_heads % ranks)


AttentionInterface.register("lead_packed", torch.compiler.disable(packed_attention))  # type: ignore
