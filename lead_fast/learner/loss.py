"""Compute a pack's part of the loss, normalised by the denominators of the whole batch.

Because the weights are global, the sum over packs and ranks is the loss of the batch, however it is divided.
Legend: S sequences of the whole batch, R response rows of a pack, D hidden, V vocabulary.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from lead_kernels import Groups, PolicyLoss, Sequences, Tokens, linear_logprobs, linear_policy_loss, loss_weights

from ..checks import chosen_engine, quantized
from ..config import Config
from ..runtime.ranks import Ranks
from .head import Head
from .packing import Pack
from .policy import Policy


@dataclass(frozen=True)
class Objective:
    """What the loss needs to know about the batch, the same on every rank.

    advantage_S: float32 [S], computed beforehand; decides which sequences have a gradient (`needs_gradient`).
    weight_S: float32 [S], weight of every token of a sequence; 0 for dropped groups and for other updates' sequences.
    groups: the outcomes of all S responses, from which the loss kernel itself computes the advantages, bit for bit as
        in advantage_S; None: it uses advantage_S (a rehearsal or benchmark has advantages without outcomes).
    """

    advantage_S: torch.Tensor
    weight_S: torch.Tensor
    groups: Groups | None = None

    @property
    def sequences(self) -> Sequences:
        """Weights and advantages in the form that the loss kernel accepts."""
        return Sequences(self.weight_S, self.advantage_S if self.groups is None else self.groups)


def objective(
    advantage_S: torch.Tensor, lengths: list[int], kept_S: torch.Tensor, c: Config, groups: Groups | None = None
) -> Objective:
    """Weigh every token of every sequence; dropped sequences count in no denominator.

    Args:
        advantage_S: advantages of the whole batch, [S].
        lengths: response tokens of every sequence, [S].
        kept_S: bool [S], True for the sequences of this update whose groups were not dropped.
        c: uses loss.mean and rollout.max_tokens.
        groups: the outcomes of the whole batch, from which advantage_S was computed.
    """
    lengths_S = torch.tensor(lengths, dtype=torch.float32, device=advantage_S.device)
    weight_S = loss_weights(
        lengths_S,
        c.loss.mean,
        n_sequences=max(1, int(kept_S.sum())),
        n_tokens=max(1, int(lengths_S[kept_S].sum())),
        constant=c.rollout.max_tokens,
    )
    return Objective(advantage_S, torch.where(kept_S, weight_S, 0.0), groups)


def needs_gradient(o: Objective, c: Config) -> list[bool]:
    """Which sequences can change the weights: all with a KL or entropy term, else those with an advantage."""
    live = o.weight_S != 0
    if c.loss.kl_coef == 0 and c.loss.entropy_coef == 0:
        live = live & (o.advantage_S != 0)
    return live.tolist()


def policy_loss(
    policy: Policy,
    pack: Pack,
    o: Objective,
    c: Config,
    old_R: torch.Tensor | None = None,
    reference_R: torch.Tensor | None = None,
    seed: int = 0,
) -> PolicyLoss:
    """Compute the pack's part of the batch's loss, and metrics that add up over packs and ranks.

    `seed`: for loss.sample_dropped; different for every pack of every step.
    """
    old_R = pack.behavior_R if c.loss.old_logprobs == "engine" else old_R
    tokens = Tokens(pack.targets_R, pack.sequence_ids_R, pack.behavior_R, old_R, reference_R)
    return policy(
        pack,
        lambda hidden_RD, head: linear_policy_loss(
            hidden_RD, head.weight, tokens, o.sequences, c.loss, seed=seed, **head.options(c.rollout.temperature)
        ),
    )


@torch.no_grad()
def pack_logprobs(policy: Policy, pack: Pack, temperature: float, fp32_logits: bool = False) -> torch.Tensor:
    """Log-probs of the pack's response tokens under the current policy, float32 [R]."""

    def logprobs(hidden_RD: torch.Tensor, head: Head) -> torch.Tensor:
        options = head.options(temperature)
        return linear_logprobs(hidden_RD, head.weight, pack.targets_R, fp32_logits=fp32_logits, **options)[0]

    return policy(pack, logprobs)


QUANTIZED_NATS = 0.1  # mean difference with rounded weights or cache; ten times that of `tiny` (docs/rollouts.md)
QUANTIZED_KL = 0.05  # nats per token between a quantised engine and the trainer, beyond which a run ends
MARGIN = 8  # factor by which a difference between equal weights may exceed the estimate


@torch.no_grad()
def rounding_limit(policy: Policy, pack: Pack, c: Config, ranks: Ranks) -> float:
    """Estimate the largest mean difference, in nats, that rounding explains between two computations of a pack.

    With L blocks the residual stream is rounded to the compute dtype 2 L + 1 times, each time independently by a
    relative error of up to u, the dtype's unit roundoff; after the last norm the hidden states have a relative error of
    about u sqrt(2 L + 1). How such an error changes these log-probs is measured, not assumed: they are computed again
    from hidden states that are larger or smaller by u, element by element, and the mean change is multiplied by
    sqrt(2 L + 1). The estimate is at least u / 2, the mean error of rounding a log-prob near 1 itself. In float32,
    products are accumulated in the compute dtype itself, D terms in an order that differs between both sides: another
    factor sqrt(D). MARGIN covers that both sides round, and the rounding inside the blocks. With a quantised rollout
    the limit is at least QUANTIZED_NATS: it detects a wrong computation, but not weights one step old. A collective.
    """
    unit = torch.finfo(getattr(torch, c.model.dtype)).eps / 2

    def change(hidden_RD: torch.Tensor, head: Head) -> torch.Tensor:
        g = torch.Generator(hidden_RD.device).manual_seed(0)
        sign = torch.rand(hidden_RD.shape, generator=g, device=hidden_RD.device).sub_(0.5).sign_()
        moved = (hidden_RD.float() * (1 + 2 * unit * sign)).to(hidden_RD.dtype)  # 2 u is at most one step of the dtype
        options = head.options(c.rollout.temperature)
        a, b = (linear_logprobs(h, head.weight, pack.targets_R, **options)[0] for h in (hidden_RD, moved))
        return torch.stack([(a - b).abs().sum().float() / 2, torch.tensor(float(len(a)), device=a.device)])

    total, rows = ranks.all_sum(policy(pack, change)).tolist()
    policy.to_shards()
    shape = policy.model.config
    sums = shape.hidden_size**0.5 if c.model.dtype == "float32" else 1.0
    limit = MARGIN * sums * max(unit / 2, total / max(1.0, rows) * (2 * shape.num_hidden_layers + 1) ** 0.5)
    return max(limit, QUANTIZED_NATS) if quantized(c) else limit


def check_agreement(difference: float, limit: float, c: Config, device_type: str) -> None:
    """Compare engine and trainer at the first step with a gradient, when they hold the same weights.

    Args:
        difference: mean |log-prob by the engine - log-prob by the trainer| over the batch's trained tokens, nats.
        limit: the result of `rounding_limit`.
        c: uses the engine and sampling settings.
        device_type: "cuda" or "cpu".
    Raises:
        ValueError: over the limit; never where sampling drops tokens, which makes the engine's log-probs larger.
    """
    r = c.rollout
    if r.top_p == 1 and r.min_p == 0 and r.top_k == 0 and not difference <= limit:
        raise ValueError(f"At the first step {disagreement(difference, limit, c, device_type)}.")


def disagreement(difference: float, limit: float, c: Config, device_type: str, detail: str = "") -> str:
    """Say that engine and trainer differ beyond rounding with equal weights, where (`detail`), and how to remedy it.

    The remedy is never the engine in use. Equality of the weights has been checked tensor by tensor before.
    """
    used, r = chosen_engine(c, device_type), c.rollout
    format = c.model.dtype
    if r.kv_dtype != "auto":
        format += f" with a cache in {r.kv_dtype}"
        remedy = f"give --rollout.kv_dtype={'fp8_per_token_head or ' * (r.kv_dtype == 'fp8')}auto"
    elif quantized(c):
        format += f" with weights in {r.quantization}"
        remedy = "give --rollout.quantization=none"
    elif r.speculative.method != "none":
        remedy = "give --rollout.speculative.method=none"
    elif used == "vllm":
        remedy = "give --rollout.engine=transformers, which computes as the trainer does"
    else:
        remedy = "give --rollout.engine=vllm where vLLM is installed, or another model"
    return (
        f"log-probs of the sampled tokens by the engine ({used}) differ from the trainer's by {difference:.3g} "
        f"nats on average{detail}; rounding in {format} explains {limit:.2g} at most and the weights are equal, "
        f"so the engine treats the model type, temperature or log-probs differently: {remedy}"
    )


def mismatch(kl: float, c: Config) -> str:
    """Say, without a full stop, that a quantised rollout has drifted too far from the trainer's policy; or "".

    Args:
        kl: KL(engine || policy) as estimated on the batch's trained tokens, in nats per token (`kl_behavior`).
        c: the run's configuration.
    """
    if not quantized(c) or kl <= QUANTIZED_KL or math.isnan(kl):
        return ""
    return (
        f"kl_behavior is {kl:.3g} nats per token, over {QUANTIZED_KL:g}: rollouts with rollout.quantization="
        f"{c.rollout.quantization} and kv_dtype={c.rollout.kv_dtype} no longer follow the policy; resume with "
        "--rollout.quantization=none --rollout.kv_dtype=auto"
    )


def reduce_metrics(parts: list[dict[str, torch.Tensor]], ranks: Ranks) -> dict[str, float]:
    """Sum metrics over packs and ranks; those named `max_...` are maximised. Every rank must hold one part."""
    sums: dict[str, list[torch.Tensor]] = defaultdict(list)
    for part in parts:
        for k, v in part.items():
            sums[k].append(v.detach().float())
    out: dict[str, float] = {}
    for kind in (False, True):
        keys = sorted(k for k in sums if k.startswith("max_") == kind)
        if keys:
            local = [torch.stack(sums[k]) for k in keys]
            x = torch.stack([v.max() if kind else v.sum() for v in local]).to(ranks.device)
            out |= dict(zip(keys, (ranks.all_max(x) if kind else ranks.all_sum(x)).tolist(), strict=True))
    return out
