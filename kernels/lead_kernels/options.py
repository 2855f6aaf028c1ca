"""Options of the loss and of the advantages: names, defaults, documentation, permitted values, and their wire form.

Each option is defined here and nowhere else. The trainer's configuration inherits both records, so the docstring under
a field is also the help text of a configuration key. A torch.library operator cannot take a record, so an instance is
passed as a list of numbers, written by `encode` and read by `decode` here, and by AdvantageOptions::decode and
LossOptions::decode in csrc/rows.h. Triton's kernels read the fields by name (_triton_advantage.py).

Encoding of a field: a float or int as itself, False and True as 0 and 1, a choice as its index among the choices, and
None, for a field that may be None, as infinity.
"""

import math
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

Kinds = dict[str, Any]  # name of a field -> bool, int, float, "float or None", or a tuple of choices
FLOAT_OR_NONE = "float or None"
LEAST_DROPPED = 1e-5  # anything less is lost when float32 sums of probabilities are rounded


class Softmax(NamedTuple):
    """How log-probs follow from logits z: log_softmax(y / temperature) with y = softcap tanh(z / softcap).

    Without a soft cap y is z. A factor by which a model multiplies its logits needs no parameter: for a factor m
    applied before the logits are capped at c, give softcap c / m and temperature T / m; for a factor m applied after
    the cap, or without a cap, give temperature T / m.
    """

    temperature: float = 1.0
    """Sampling temperature; above 0."""
    softcap: float | None = None
    """Bound on the logits, as in Gemma 2; above 0. None: no bound."""

    def encode(self) -> list[float]:
        """Encode both as numbers. Raises ValueError for a value that is not finite and above 0."""
        for name, value in zip(self._fields, self, strict=True):
            if name == "temperature" or value is not None:
                fits = isinstance(value, (int, float)) and 0 < value < math.inf
                check(name, value, fits, "a finite value above 0")
        return [float(self.temperature), math.inf if self.softcap is None else float(self.softcap)]

    @staticmethod
    def decode(encoded: list[float]) -> "Softmax":
        """Restore the instance that `encode` was called on."""
        temperature, softcap = encoded
        return Softmax(temperature, None if softcap == math.inf else softcap)


@dataclass(frozen=True)
class LossOptions:
    """Options of the policy loss; formulas in policy_loss.py.

    CISPO elsewhere: MiniMax-M1 bounds the weight by 1 - eps_low and 1 + eps_high, with eps_low so large that it never
    binds, which is the default here. TRL's `epsilon_high` under `loss_type="cispo"` is the upper bound itself: its 5.0
    (ScaleRL's value) is clip_high=4 here. verl and SkyRL also bound from below, by default at 1 - 0.2: give
    clip_low=0.2 to match them. The name `delta` is that of TRL and Liger, for INTELLECT-2's two-sided clip.

    Temperature and soft cap are not fields, because they describe how tokens were sampled and what the model computes,
    not the loss. The trainer's key is rollout.temperature; a field here would add a second key, loss.temperature, that
    could contradict it. The public functions take both as keywords, as `linear_logprobs` does, and `encode` appends
    them to the list.

    Raises:
        ValueError: a value out of range, a bound that the chosen ratio does not use, or a ratio per sequence with
            importance weights per token.
    """

    ratio: Literal["token", "sequence", "cispo", "sapo"] = "token"
    """Importance ratio per token (GRPO), per sequence (GSPO), as a clipped and detached weight (CISPO), or passed
    through a smooth gate instead of a clip (SAPO)."""
    clip_low: float | None = None
    """Lower bound of the ratio is 1 - clip_low; none: 0.2, or no lower bound under `cispo`."""
    clip_high: float | None = None
    """Upper bound of the ratio is 1 + clip_high; none: 0.2."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss for negative advantages (dual clip): at most c |A|."""
    delta: float | None = None
    """Cap on the ratio for negative advantages (two-sided clip), at least 1 + clip_high; within that range the loss is
    that of dual_clip with the same value."""
    sapo_positive: float = 1.0
    """Steepness of SAPO's gate for advantages above 0, called a temperature in its paper."""
    sapo_negative: float = 1.05
    """Steepness of SAPO's gate for all other advantages."""
    importance_cap: float | None = None
    """Cap on the importance weight that corrects for differences between trainer and engine; none: no such weight."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """What happens to weights above the cap: cut to the cap, or set to 0, which drops the token's policy loss."""
    importance_level: Literal["token", "sequence"] = "token"
    """Importance weight per token or per sequence."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence to the reference model. As a loss, k2 follows KL(policy || reference), k3 follows
    KL(reference || policy), and k1 has expected gradient 0."""
    kl_coef: float = 0.0
    """Weight of the KL term; 0 loads no reference model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    dropped_mass: float = 0.0
    """Probability mass that d(hidden) may leave out of each row, taken from the smallest entries; 0: none. A row's
    error is at most |d loss / d log-prob| / temperature x dropped mass x the head's largest row norm. Has no effect
    with an entropy bonus."""
    sparse_head: bool = False
    """Leave the same entries out of d(head). Under Adam this changes training: rows of rare tokens get exact zeros in
    place of tiny gradients, which Adam would scale up to a full step."""
    sample_dropped: bool = False
    """Keep each entry that would be left out with probability p / threshold, and count it as the threshold, which
    removes the bias."""
    fp32_logits: bool = False
    """Keep a chunk's logits in float32 if the model computes in half precision: twice their bytes, and on a CPU their
    product runs in float32."""

    def __post_init__(self) -> None:
        check_fields(self, LOSS)
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            check(name, value, value is None or value >= 0, "0 or more")
        check("kl_coef", self.kl_coef, self.kl_coef >= 0, "0 or more")
        for name in ("dual_clip", "delta"):
            value = getattr(self, name)
            check(name, value, value is None or value > 1, "a value above 1")
        for name in ("sapo_positive", "sapo_negative"):
            check(name, getattr(self, name), getattr(self, name) > 0, "a value above 0")
        self._check_bounds()
        mass = self.dropped_mass
        check("dropped_mass", mass, mass == 0 or LEAST_DROPPED <= mass < 1, f"0 (dense), or {LEAST_DROPPED} to below 1")
        for name in ("sparse_head", "sample_dropped"):
            if getattr(self, name) and not mass:
                raise ValueError(f"{name} is True and dropped_mass 0, which drops nothing: give dropped_mass above 0.")
        if self.importance_cap is not None:
            check("importance_cap", self.importance_cap, self.importance_cap > 0, "a value above 0")
            if self.ratio == "sequence" and self.importance_level == "token":
                raise ValueError("importance_level is 'token' and ratio 'sequence': give importance_level=sequence.")

    def _check_bounds(self) -> None:
        """Raise ValueError for bounds that would be ignored, and for two that bound the same thing."""
        for name in {"cispo": ("dual_clip", "delta"), "sapo": ("clip_low", "clip_high", "dual_clip", "delta")}.get(
            self.ratio, ()
        ):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"ratio is {self.ratio!r} with {name} {value!r}, which bounds nothing there: leave {name} out, "
                    "or give ratio=token."
                )
        if self.delta is not None:
            _, high = self.clip_range
            if self.dual_clip is not None:
                raise ValueError(
                    f"Both delta ({self.delta!r}) and dual_clip ({self.dual_clip!r}) bound the loss of negative "
                    "advantages: give one of them."
                )
            if self.clip_high is None:
                check("delta", self.delta, self.delta >= high, f"{high:g}, which is 1 + clip_high, or more")
            elif self.delta < high:
                raise ValueError(
                    f"delta {self.delta!r} is below 1 + clip_high, so it would clip where clip_high does not: give "
                    f"{high:g} or more."
                )

    @property
    def clip_range(self) -> tuple[float, float]:
        """Smallest and largest ratio that is not clipped; 0 and infinity if there is no bound."""
        if self.ratio == "sapo":
            return 0.0, math.inf
        default_low = 1.0 if self.ratio == "cispo" else 0.2
        low = default_low if self.clip_low is None else self.clip_low
        return 1 - low, 1 + (0.2 if self.clip_high is None else self.clip_high)

    def encode(self, softmax: Softmax) -> list[float]:
        """Encode options and softmax as numbers. Raises ValueError for a temperature or soft cap of 0 or less."""
        return [*numbers(self, LOSS), *softmax.encode()]

    @staticmethod
    def decode(encoded: list[float]) -> tuple["LossOptions", Softmax]:
        """Restore the options and the softmax that `encode` was given."""
        return LossOptions(**values(encoded[: len(LOSS)], LOSS)), Softmax.decode(encoded[len(LOSS) :])


@dataclass(frozen=True)
class AdvantageOptions:
    """Options of rewards and advantages; formulas in advantage.py. Raises ValueError for a value out of range."""

    length_reward: bool = True
    """L: shorter correct responses are rewarded more, exp(-alpha z)."""
    alpha: float = 0.05
    """Strength of L."""
    difficulty: bool = True
    """AD: weight the advantage by the group's solve rate."""
    weight_low: float = 0.4
    """A: the weight's lower end."""
    weight_high: float = 1.5
    """B: the weight's upper end."""
    slope: float = 10.0
    """k: steepness of the weight."""
    midpoint: float = 0.75
    """rho0: solve rate at which the weight is halfway."""
    eps: float = 1e-6
    """Added to standard deviations."""
    std: Literal["sample", "none", "mad", "batch"] = "sample"
    """Normalise by the group's sample standard deviation or mean absolute deviation (DGPO), by the batch's (DLER), or
    by nothing (Dr. GRPO)."""
    length_gate: int = 0
    """In tokens; in groups whose three shortest responses average at most this, correct responses keep reward 1
    (official: 4000); 0: off."""
    length_min_solve_rate: float = 0.0
    """Apply L only in groups whose solve rate is above this (GRPO-lambda)."""
    nonnegative_correct: bool = False
    """Never give a correct response a negative advantage (DRPO)."""
    rate: Literal["correct", "positive"] = "correct"
    """Definition of the solve rate: share of correct responses, or share of responses with a reward above 0 (released
    code)."""
    group_filter: Literal["none", "official", "uniform"] = "none"
    """Drop groups whose rewards are all <= 0 or all exactly 1 (`official`), or whose solve rate is 0 or 1 (`uniform`,
    DAPO)."""
    baseline: Literal["mean", "length"] = "mean"
    """Baseline that is subtracted from a reward: the group's mean, or its length-weighted mean (OPO)."""
    length_advantage: float = 0.0
    """Advantage for brevity of a correct response, scaled by the solve rate and added after normalisation (DDCA); 0:
    off."""
    batch_std: float = field(default=1.0, metadata={"computed": True})
    """With std=batch: the batch's standard deviation, from `batch_std(outcomes, group_size, options)`."""

    def __post_init__(self) -> None:
        check_fields(self, ADVANTAGE)
        check("length_advantage", self.length_advantage, self.length_advantage >= 0, "0 (off) or more")
        check("batch_std", self.batch_std, self.batch_std >= 0, "0 or more")
        check("eps", self.eps, self.eps >= 0, "0 or more")
        check("length_gate", self.length_gate, self.length_gate >= 0, "0 (off) or more")
        rate = self.length_min_solve_rate
        check("length_min_solve_rate", rate, 0 <= rate <= 1, "a share between 0 and 1")

    def encode(self) -> list[float]:
        """Encode these options as numbers, in the order of the fields."""
        return numbers(self, ADVANTAGE)

    @staticmethod
    def decode(encoded: list[float]) -> "AdvantageOptions":
        """Restore the options that `encode` was called on."""
        return AdvantageOptions(**values(encoded, ADVANTAGE))


def kinds(record: type) -> Kinds:
    """Kind of value that each field of a record may hold."""
    out: Kinds = {}
    for f in fields(record):
        choices = get_args(f.type)
        if get_origin(f.type) is not Literal:
            choices = FLOAT_OR_NONE if NoneType in choices else f.type
        out[f.name] = choices
    return out


LOSS, ADVANTAGE = kinds(LossOptions), kinds(AdvantageOptions)


def check(name: str, value: Any, fits: bool, remedy: str) -> None:
    """Raise ValueError, in one sentence with name, value and remedy, unless `fits`."""
    if not fits:
        raise ValueError(f"{name} is {value!r}: give {remedy}.")


def check_fields(record: Any, kinds: Kinds) -> None:
    """Raise ValueError for a choice that does not exist or a number that is not finite."""
    for name, kind in kinds.items():
        value = getattr(record, name)
        if isinstance(kind, tuple):
            check(name, value, value in kind, f"one of {', '.join(kind)}")
        elif value is not None or kind != FLOAT_OR_NONE:
            check(name, value, isinstance(value, (bool, int, float)) and math.isfinite(value), "a finite number")


def numbers(record: Any, kinds: Kinds) -> list[float]:
    """Encode the fields of a record that `kinds` names."""
    out = []
    for name, kind in kinds.items():
        value = getattr(record, name)
        if isinstance(kind, tuple):
            value = kind.index(value)
        out.append(math.inf if value is None else float(value))
    return out


def values(encoded: list[float], kinds: Kinds) -> dict[str, Any]:
    """Decode the fields that `numbers` encoded. Raises ValueError for a list of the wrong length."""
    out = {}
    for (name, kind), number in zip(kinds.items(), encoded, strict=True):
        if isinstance(kind, tuple):
            out[name] = kind[int(number)]
        elif kind == FLOAT_OR_NONE:
            out[name] = None if number == math.inf else number
        else:
            out[name] = kind(number)
    return out
