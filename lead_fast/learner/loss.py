"""From a pack to a loss that already carries the whole batch's denominators.

Because the weights are global, the sum over packs and ranks is the loss of the batch, however it is cut.
Legend: S sequences of the whole batch, R response rows of a pack, D hidden, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from lead_kernels import Groups, PolicyLoss, Sequences, Tokens, linear_logprobs, linear_policy_loss, loss_weights

from ..config import Config
from ..runtime.ranks import Ranks
from .packing import Pack
from .policy import Policy


@dataclass(frozen=True)
class Objective:
    """What the loss needs to know of the whole batch, equal on every rank.

    advantage_S: float32 [S], computed beforehand: says which sequences have a gradient (`needs_gradient`).
    weight_S: float32 [S], weight of every token of a sequence; 0 for dropped groups and for other updates' sequences.
    groups: the outcomes of all S responses, from which the loss kernel computes the advantages itself, with the bits of
        advantage_S; None: it takes advantage_S (a rehearsal and a benchmark have advantages without outcomes).
    """

    advantage_S: torch.Tensor
    weight_S: torch.Tensor
    groups: Groups | None = None

    @property
    def sequences(self) -> Sequences:
        """What the loss kernel is given of the sequences."""
        return Sequences(self.weight_S, self.advantage_S if self.groups is None else self.groups)


def objective(
    advantage_S: torch.Tensor, lengths: list[int], kept_S: torch.Tensor, c: Config, groups: Groups | None = None
) -> Objective:
    """Weights of every token of every sequence; dropped sequences are in no denominator.

    Args:
        advantage_S: advantages of the whole batch, [S].
        lengths: response tokens of every sequence, [S].
        kept_S: bool [S], True for the sequences of this update whose groups were not dropped.
        c: loss.mean and rollout.max_tokens are used.
        groups: the outcomes that advantage_S follows from, of the whole batch.
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
    """Which sequences can move the weights: all if there is a KL or entropy term, else those with an advantage."""
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
) -> PolicyLoss:
    """The pack's share of the batch's loss, with metrics that add up over packs and ranks."""
    old_R = pack.behavior_R if c.loss.old_logprobs == "engine" else old_R
    tokens = Tokens(pack.targets_R, pack.sequence_ids_R, pack.behavior_R, old_R, reference_R)
    return policy(
        pack,
        lambda hidden_RD, head_VD: linear_policy_loss(
            hidden_RD, head_VD, tokens, o.sequences, c.loss, temperature=c.rollout.temperature
        ),
    )


@torch.no_grad()
def pack_logprobs(policy: Policy, pack: Pack, temperature: float) -> torch.Tensor:
    """Log-probs of the pack's response tokens under the policy as it stands, float32 [R]."""
    return policy(pack, lambda h, w: linear_logprobs(h, w, pack.targets_R, temperature=temperature)[0])


AGREE = {"float32": 1e-3, "bfloat16": 0.05}  # nats, mean over the tokens of the first batch


def check_agreement(difference: float, c: Config) -> None:
    """Engine and trainer hold the same weights at the first step: their log-probs must agree.

    Args:
        difference: mean |log-prob by the engine - log-prob by the trainer|, nats; NaN passes.
    Raises:
        ValueError: over AGREE; not looked at where sampling drops tokens, which makes the engine's log-probs larger.
    """
    r = c.rollout
    if r.top_p == 1 and r.min_p == 0 and r.top_k == 0 and difference > AGREE[c.model.dtype]:
        raise ValueError(
            f"With equal weights the engine's log-probs differ from the trainer's by {difference:.3g} nats a token "
            f"(limit {AGREE[c.model.dtype]:g} in {c.model.dtype}): look at model.dtype, rollout.temperature, the "
            "engine's logprobs_mode (processed_logprobs) and whether both see the same chat template, or try "
            "--rollout.engine=transformers."
        )


def reduce_metrics(parts: list[dict[str, torch.Tensor]], ranks: Ranks) -> dict[str, float]:
    """Sums over packs and ranks; names that begin with `max_` are maxima. Every rank must hold at least one part."""
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
