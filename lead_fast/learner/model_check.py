"""Check on a small copy, before weights load, whether a model trains as transformers computes it.

The user's configuration is reduced in width, depth (one layer of each kind) and vocabulary; its caps, scales, biases
and sinks are kept. With random weights, log-probs of several sequences packed as the trainer packs them are compared
with those of each sequence alone under transformers' eager attention, in float32 on the CPU, without a collective.

Spans (windows, chunks, numbers of selected keys, positions that a rotary embedding was made for) are shortened to SPAN
tokens if the run's longest sequence exceeds them, so that the small sequences exceed them too.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from ..config import ModelConfig
from .attention import choose, packed_attention, refuse
from .head import KEYS as HEAD_KEYS
from .head import present
from .loss import pack_logprobs
from .model import LayoutError, check_layout, head_dim
from .packing import Pack, make_pack
from .policy import Policy

LIMIT = 1e-4  # nats, the largest difference in a token's log-prob; float32's rounding accounts for some 1e-6
SPAN = 16  # tokens
LENGTHS = (23, 45, 9, 31)  # tokens of the sequences, longer and shorter than SPAN
VOCABULARY = 128
SPREAD = 4.0  # standard deviation of the logits: large enough for a soft cap of 50 to show
TEMPERATURE = 0.7
HEADS = 2  # key and value heads
EXPERTS = 16
CHUNK = 32  # tokens that a state-space layer processes at once
MOST_PARAMETERS = 300_000_000  # takes a second or two
DEPTH = 40  # maximum layers of a small copy
CPU = torch.device("cpu")

SPANS = ("attention_chunk_size", "index_topk", "floor_scale", "original_max_position_embeddings")
"""Keys that are spans; so is any key with `window` in its name, except `max_window_layers`."""
WIDTHS = {"intermediate_size": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
          "shared_intermediate_size": 64, "ffn_dim": 128, "moe_shared_expert_intermediate_size": 32,
          "intermediate_size_mlp": 128}  # fmt: skip
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LAYERS = ("layer_types", "layers_block_type", "hybrid_override_pattern")
"""Keys that list the kind of each layer."""
SUSPECTS = {
    "attention": ("attn_logit_softcapping", "sliding_window", "attention_chunk_size", "layer_types", "index_topk",
                  "rope_parameters", "alibi", "attention_multiplier", "query_pre_attn_scalar"),
    "packing": (*LAYERS, "rope_parameters", "floor_scale",
                "attention_chunk_size", "num_kv_shared_layers"),
    "head": HEAD_KEYS,
}  # fmt: skip
"""Keys to name, if a configuration has them, for a difference that cannot be traced to one of them."""


class NotReducible(ValueError):
    """A configuration of which no small copy can be made or run; its text says why."""


# ---------------------------------------------------------------------------------------------------------- small copy


def is_span(key: str, value: Any) -> bool:
    """Whether a configuration's entry counts tokens that a token can look back."""
    named = key in SPANS or ("window" in key and key != "max_window_layers")
    return named and isinstance(value, int) and not isinstance(value, bool) and value > SPAN


def shorten_spans(c: PretrainedConfig, longest: int | None) -> None:
    """Set spans to SPAN tokens if a sequence of `longest` tokens exceeds them; None: set all."""
    dynamic = "'dynamic'" in str(getattr(c, "rope_parameters", None))  # stretched beyond max_position_embeddings

    def shorter(entries: dict[str, Any]) -> dict[str, Any]:
        return {k: shorter(v) if isinstance(v, dict) else SPAN if is_beyond(k, v) else v for k, v in entries.items()}

    def is_beyond(key: str, value: Any) -> bool:
        span = is_span(key, value) or (dynamic and key == "max_position_embeddings")
        return span and (longest is None or longest > value)

    for key, value in vars(c).items():
        if isinstance(value, dict) and "rope" in key:
            setattr(c, key, shorter(value))
        elif is_beyond(key, value):
            setattr(c, key, SPAN)


def narrow(shape: PretrainedConfig, longest: int | None, *, heads: bool) -> PretrainedConfig:
    """Copy a configuration with a small vocabulary, small feed-forward layers and, with `heads`, few heads."""
    c = copy.deepcopy(shape)
    shorten_spans(c, longest)
    for key, most in WIDTHS.items():
        if isinstance(value := getattr(c, key, None), int):
            setattr(c, key, min(value, most))
    for key in ("mamba_chunk_size", "chunk_size"):
        if isinstance(value := getattr(c, key, None), int):
            setattr(c, key, min(value, CHUNK))
    for key in EXPERT_COUNTS:
        if isinstance(value := getattr(c, key, None), int) and (getattr(c, "n_group", None) or 1) == 1:
            chosen = getattr(c, "num_experts_per_tok", None) or 1
            setattr(c, key, min(value, max(EXPERTS, 2 * chosen)))
    for key, value in list(vars(c).items()):
        if "vocab_size" in key and isinstance(value, int):
            setattr(c, key, VOCABULARY)
        elif key.endswith("_token_id") and value is not None:
            setattr(c, key, None if key == "pad_token_id" else 1)
    if heads:
        size, queries = head_dim(c), c.num_attention_heads
        keys = getattr(c, "num_key_value_heads", None) or queries
        c.num_attention_heads = queries if queries <= HEADS else HEADS if keys == queries else 2 * HEADS
        if getattr(c, "num_key_value_heads", None):
            c.num_key_value_heads = min(keys, HEADS)
        if not getattr(c, "qk_rope_head_dim", None):
            c.hidden_size = c.num_attention_heads * size
        else:
            c.hidden_size = min(c.hidden_size, 256)
        if getattr(c, "mamba_n_heads", None) and getattr(c, "mamba_d_head", None):
            c.mamba_n_heads = c.mamba_expand * c.hidden_size // c.mamba_d_head
    return c


def kind(layer: nn.Module) -> str:
    """What a layer is made of: classes, shapes and settings of its modules, but not its position in the model."""
    out = []
    for name, module in layer.named_modules():
        settings = {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, bool | int | str | None)
            and not k.startswith("_")
            and not (isinstance(v, int) and "layer" in k)
        }
        shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
        out.append((name, type(module).__name__, shapes, sorted(settings.items(), key=str)))
    return str(out)


def build(c: PretrainedConfig, trust_remote_code: bool) -> Any:
    return AutoModelForCausalLM.from_config(
        c, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
    )


def shallow(c: PretrainedConfig, trust_remote_code: bool) -> PretrainedConfig:
    """Reduce a configuration to one layer of each kind (two if there is one kind), or to the first layers with all.

    Raises:
        NotReducible: that would take more than DEPTH layers.
    """

    def kinds(c: PretrainedConfig) -> list[str]:
        with torch.device("meta"):
            return [kind(layer) for layer in build(c, trust_remote_code).model.layers]

    depth, every = c.num_hidden_layers, kinds(c)
    first = [i for i, k in enumerate(every) if every.index(k) == i]
    chosen = first if len(first) > 1 else list(range(min(2, depth)))
    for places in (chosen, list(range(first[-1] + 1))):
        if len(places) > DEPTH:
            break
        small = copy.deepcopy(c)
        for key, value in vars(c).items():
            if isinstance(value, list | tuple) and len(value) == depth:
                setattr(small, key, type(value)(value[i] for i in places))
        small.num_hidden_layers = len(places)
        with contextlib.suppress(Exception):  # settings can be incompatible; those of the first layers are not
            if set(kinds(small)) == set(every):
                return small
    raise NotReducible(f"its {depth} layers are of {len(first)} kinds that do not fit into {DEPTH} layers")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights so that every part shows, norms, biases and sinks too, and logits have spread SPREAD."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.dim() < 2:
            p.add_(0.3 * noise)
        else:
            p.copy_(noise / p.shape[-1] ** 0.5)


@torch.no_grad()
def widen(model: Any, sequences: Sequence[Sequence[int]]) -> None:
    """Scale the head so that the logits' spread is SPREAD, or so that their soft cap takes effect."""
    spread = model(torch.tensor([sequences[0]]), use_cache=False).logits.std().item()
    for p in (model.lm_head.weight, model.lm_head.bias):
        if p is not None and spread > 0:
            p.mul_(min(SPREAD / spread, 1e3))


def small_copy(shape: PretrainedConfig, trust_remote_code: bool, longest: int | None, seed: int = 0) -> Any:
    """Make the small model with random weights, in evaluation mode, with transformers' eager attention.

    If it cannot be made with few heads, its width is kept.

    Raises:
        NotReducible: it cannot be made, or transformers cannot run it.
        ValueError: its blocks and head are not where the trainer expects them.
    """
    reason = ""
    for heads in (True, False):
        try:
            with torch.device("meta"):
                check_layout(build(copy.deepcopy(shape), trust_remote_code))
            narrowed = narrow(shape.get_text_config(), longest, heads=heads)
            small = shallow(narrowed, trust_remote_code)
            with torch.device("meta"):
                size = sum(p.numel() for p in build(copy.deepcopy(small), trust_remote_code).parameters())
            if size > MOST_PARAMETERS:
                raise NotReducible(f"its small copy would have {size / 1e6:.0f} million parameters")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # the same on every rank, so that the verdict is too
                model = build(small, trust_remote_code).eval()
            randomize(model, seed)
            widen(model, sequences_of(seed))
            return model
        except LayoutError:
            raise
        except Exception as e:  # anything that a model's code raises for incompatible settings
            reason = reason or (str(e) if isinstance(e, NotReducible) else first_line(e))
    raise NotReducible(reason)


# ---------------------------------------------------------------------------------------------------------- comparison


def sequences_of(seed: int) -> list[list[int]]:
    """Token ids of the sequences to compare."""
    g = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(2, VOCABULARY, (n,), generator=g).tolist() for n in LENGTHS]


def pack_of(sequences: Sequence[Sequence[int]]) -> Pack:
    """One pack of all sequences; every token but the first is a response token."""
    return make_pack(range(len(sequences)), [s[:1] for s in sequences], [s[1:] for s in sequences], None, CPU)


@torch.no_grad()
def alone(model: Any, sequences: Sequence[Sequence[int]], temperature: float = TEMPERATURE) -> torch.Tensor:
    """Log-probs of every token but the first of each sequence, by transformers' forward on that sequence alone."""
    out = []
    for s in sequences:
        ids = torch.tensor([s])
        logprobs = (model(ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
        out.append(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(out)


@torch.no_grad()
def packed(policy: Policy, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """The same log-probs by the trainer's path, with all sequences in one pack."""
    return pack_logprobs(policy, pack_of(sequences), TEMPERATURE)


@dataclass
class Verdict:
    """How far a model's packed log-probs are from transformers', and which features its attention uses.

    difference: nats, of the worst token, in the best of DRAWS: a top-k choice flipped by rounding differs in one draw,
        a layer that is computed differently differs in all.
    cause: where the difference arises ("attention", "packing", "head"), and the keys to name; empty within LIMIT.
    """

    difference: float
    cause: str = ""
    keys: tuple[str, ...] = ()
    asked: set[str] = field(default_factory=set)


def compare(shape: PretrainedConfig, longest: int | None, trust_remote_code: bool = False) -> Verdict:
    """Compare packed with unpacked log-probs on a small copy of `shape`.

    Args:
        shape: the model's configuration.
        longest: tokens of the longest sequence that the run can have, None if unknown.
        trust_remote_code: allow the model's own code.

    Raises:
        NotReducible: no small copy can be made.
        ValueError: the model cannot be trained; the message says why.
    """
    verdicts = []
    with quiet():
        for seed, dtype in DRAWS:
            model = small_copy(shape, trust_remote_code, longest, seed).to(dtype)
            sequences, policy = sequences_of(seed), Policy(model)
            with recorded(model) as asked:
                try:
                    model.set_attn_implementation("eager")
                    expected = alone(model, sequences)
                    model.set_attn_implementation("lead_recorded")
                    differences = (packed(policy, sequences) - expected).abs().nan_to_num(float("inf"))
                except (AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError) as e:
                    if verdicts:  # float32 has worked
                        break
                    raise ValueError(f"its layers cannot run on packed sequences ({first_line(e)})") from e
            verdicts.append(Verdict(differences.max().item(), asked=asked))
            if verdicts[-1].difference <= LIMIT:
                return verdicts[-1]
            if (differences > 100 * LIMIT).float().mean() > 0.1:  # rounding never affects that many
                break
        best = min(verdicts, key=lambda v: v.difference)
        best.cause = cause(policy, sequences[1:3])
        best.keys = guilty(shape, best.cause, longest, trust_remote_code)
    return best


DRAWS = ((0, torch.float32), (1, torch.float32), (1, torch.float64))
"""Seeds of weights and dtypes, tried until one is within LIMIT, so that differences due to rounding disappear."""


def first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {next(iter(str(e).strip().splitlines()), 'no reason given')}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep random numbers and transformers' warnings about the small copy from leaking out."""
    log = logging.getLogger("transformers")
    level = log.level
    with torch.random.fork_rng(devices=[]):
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[set[str]]:
    """Collect the features that the layers request from their attention: "softcap", "s_aux", "sliding_window"."""
    asked: set[str] = set()

    def attend(module, query, key, value, attention_mask, **kw):
        asked.update(k for k in ("softcap", "s_aux", "sliding_window") if kw.get(k) is not None)
        return packed_attention(module, query, key, value, attention_mask, **kw)

    AttentionInterface.register("lead_recorded", attend)
    model.set_attn_implementation("lead_recorded")
    yield asked
    model.set_attn_implementation("lead_packed")


def cause(policy: Policy, sequences: list[list[int]]) -> str:
    """Where a difference arises: in one sequence's hidden states, between sequences of a pack, or in the head."""
    model = policy.model

    def hidden(implementation: str, sequences: list[list[int]]) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        if implementation == "lead_packed":
            return policy(pack_of(sequences), lambda h, _: h)
        return torch.cat([model.model(torch.tensor([s]), use_cache=False).last_hidden_state[0, :-1] for s in sequences])

    with torch.no_grad():
        each = [(hidden("lead_packed", [s]) - hidden("eager", [s])).abs().max() for s in sequences]
        if max(each) > LIMIT:
            return "attention"
        if (hidden("lead_packed", sequences) - hidden("eager", sequences)).abs().max() > LIMIT:
            return "packing"
    return "head"


def guilty(shape: PretrainedConfig, cause: str, longest: int | None, trust_remote_code: bool) -> tuple[str, ...]:
    """The configuration keys to name: the one whose removal makes the difference vanish, else all suspects."""
    shape = shape.get_text_config()
    suspects = [k for k in SUSPECTS[cause] if getattr(shape, k, None) is not None]
    mixed = [k for k in LAYERS if len(set(getattr(shape, k, None) or ())) > 1]
    if cause == "packing" and (kinds := mixed or [k for k in LAYERS if getattr(shape, k, None)]):
        return (kinds[0],)
    for key in [k for k in suspects if k not in LAYERS]:
        without = copy.deepcopy(shape)
        try:
            setattr(without, key, without.__class__().rope_parameters if key == "rope_parameters" else None)
            model = small_copy(without, trust_remote_code, longest)
            expected = alone(model, sequences_of(0))
            if (packed(Policy(model), sequences_of(0)) - expected).abs().max() <= LIMIT:
                return (key,)
        except Exception:  # noqa: S112 - a model that needs the key says nothing about it
            continue
    return tuple(mixed[:1] or suspects)


# ------------------------------------------------------------------------------------------------------------- refusal


WHERE = {
    "attention": "its attention is computed differently",
    "packing": "its layers mix the sequences of a pack",
    "head": "its logits are computed differently",
}


def check_model(shape: PretrainedConfig, c: ModelConfig, device: torch.device, longest: int | None) -> None:
    """Refuse a model that would train differently from how transformers computes it, before its weights are loaded.

    Args:
        shape: the model's configuration.
        c: uses path, dtype, trust_remote_code and unchecked.
        device: the device of the ranks; it must support the attention features that the model uses.
        longest: tokens of the longest sequence that the run can have, None if unknown.
    Raises:
        ValueError: one sentence that names the key of the model's configuration and what differs.
    """
    name = f"Model type {shape.model_type} ({c.path})"
    try:
        verdict = compare(shape, longest, c.trust_remote_code)
    except NotReducible as e:
        if c.unchecked:
            return
        raise ValueError(
            f"{name} cannot be checked: no small copy of it can be made ({e}); give another model, or "
            "--model.unchecked if you know that it trains correctly on packed sequences."
        ) from e
    except ValueError as e:
        raise ValueError(f"{name} cannot be trained: {e}.") from e
    if verdict.cause:
        raise ValueError(
            f"{name} would not train as transformers computes it: {WHERE[verdict.cause]}, with differences of up to "
            f"{verdict.difference:.2g} nats on a small copy ({named(shape, verdict)}); give another model."
        )
    if device.type == "cuda" and c.dtype != "float32":
        softcap = "softcap" in verdict.asked
        implementation = choose(torch.cuda.get_device_capability(device), head_dim(shape), softcap)
        if refusal := refuse(implementation, softcap=softcap, sinks="s_aux" in verdict.asked):
            raise ValueError(f"{name} cannot be trained on this GPU: {refusal}.")


def named(shape: PretrainedConfig, verdict: Verdict) -> str:
    """The keys of a verdict and their values, in words."""

    def shown(key: str) -> str:
        value = getattr(shape, key)
        if isinstance(value, list | tuple):
            return f"{key} has {', '.join(dict.fromkeys(map(str, value)))}"
        return f"{key} = {value.get('rope_type', value) if isinstance(value, dict) else value}"

    if verdict.keys:
        return "; ".join(shown(k) for k in verdict.keys)
    return present(shape) if verdict.cause == "head" else "no key of its configuration shows this"
