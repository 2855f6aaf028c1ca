"""Alternatives to the kernels (rivals): how each is called, and what each lacks.

A `Rival` computes the loss and its gradients on a `Work`, from logits or from hidden states and the head. Its `make`
receives `load`, which finds a rival's function by "module:name". A measurement passes `imported`. For a rival that
cannot be imported or run, `checked` makes the same call with `declared`, which binds the arguments to the signature in
the rival's source without importing it, so that a release that changes a signature is noticed on a machine without a
GPU.

Written for torch 2.13, Liger 0.8.5, TRL 1.16.0, quack-kernels 0.6.5, cut-cross-entropy 25.1.1, verl 0.9.1.

Legend: T rows, V vocabulary, D hidden, S sequences.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Call, Cannot

from lead_kernels import (
    Groups,
    LossOptions,
    Outcomes,
    Sequences,
    Tokens,
    lead_advantages,
    linear_policy_loss,
    policy_loss,
)

OURS, FLOOR = "lead_kernels", "floor: "
CLIP = 0.2
DROPPED_MASS = 1e-3  # dropped_mass of the sparse rival

LOSS, ENTROPY, TEMPERATURE, SOFTCAP, PACKING, TOKENS, LOGPROBS = (
    "policy loss", "entropy gradient", "temperature", "soft cap", "packing", "loss per token", "log-probs",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Inputs of one shape, S sequences of equal length, so that padded rivals have nothing to pad.

    Without `old`, the ratio and every advantage are 1, so the gradient is that of the mean cross-entropy.
    """

    hidden: torch.Tensor  # [T, D]
    head: torch.Tensor  # [V, D]
    targets: torch.Tensor  # [T]
    old: torch.Tensor | None  # [T]
    advantages: torch.Tensor  # [S]
    temperature: float = 1.0
    softcap: float | None = None
    entropy_coef: float = 0.0
    data: str = "random"

    @classmethod
    def make(cls, device: str, dtype: torch.dtype, T: int, V: int, D: int, S: int = 8) -> "Work":
        """Make random inputs."""
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(T, D, generator=g).to(device, dtype)
        head = (torch.randn(V, D, generator=g) / D**0.5).to(device, dtype)
        return cls.of(hidden, head, torch.randint(V, (T,), generator=g).to(device), S)

    @classmethod
    def of(cls, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, S: int = 8, **settings: Any) -> "Work":
        """Make a Work of given inputs; a third each of the ratios to `old` is well below 1, near 1 and well above.

        No ratio is so close to a bound of the clip that a rounding error could set a token's gradient to 0.
        """
        g = torch.Generator().manual_seed(2)
        work = cls(hidden, head, targets, None, torch.randn(S, generator=g).to(hidden.device), **settings)
        T, logp = len(targets), torch.cat([logp for logp, *_ in work.exact_rows(True)])
        apart = torch.tensor([-0.5, 0.0, 0.5])[torch.randint(3, (T,), generator=g)]
        noise = apart + 0.02 * torch.randn(T, generator=g)
        return replace(work, old=logp.float() + noise.to(hidden.device))

    def with_settings(self, **settings: Any) -> "Work":
        """The same inputs with other settings, and with old log-probs that match them."""
        kept = {"temperature": self.temperature, "softcap": self.softcap, "entropy_coef": self.entropy_coef,
                "data": self.data}  # fmt: skip
        return Work.of(self.hidden, self.head, self.targets, len(self.advantages), **kept | settings)

    def cross_entropy(self) -> "Work":
        return replace(self, old=None, advantages=torch.ones_like(self.advantages))

    @property
    def device(self) -> str:
        return self.hidden.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def ids(self) -> torch.Tensor:
        T, S = len(self.targets), len(self.advantages)
        return torch.arange(T, device=self.device) * S // T

    @property
    def needs(self) -> set[str]:
        """Features that this Work needs and that cannot be added around a rival, as a temperature or the loss can."""
        wanted = {ENTROPY: self.entropy_coef != 0, SOFTCAP: self.softcap is not None, TOKENS: self.old is not None}
        return {feature for feature, is_needed in wanted.items() if is_needed}

    @property
    def settings(self) -> str:
        words = [f"temperature {self.temperature:g}"] * (self.temperature != 1)
        words += [f"soft cap {self.softcap}"] * (self.softcap is not None)
        words += [f"entropy gradient (coefficient {self.entropy_coef})"] * (self.entropy_coef != 0)
        return ", ".join([f"{self.data} logits", *words])

    def records(self) -> tuple[Tokens, Sequences, dict[str, Any]]:
        """Arguments of our own functions."""
        tokens = Tokens(self.targets, self.ids, old=self.old)
        softmax = {"temperature": self.temperature, "softcap": self.softcap}
        return tokens, Sequences(self.weights, self.advantages), softmax

    @property
    def weights(self) -> torch.Tensor:
        T, S = len(self.targets), len(self.advantages)
        return torch.full((S,), 1.0 / T, device=self.device)

    @property
    def groups(self) -> Groups:
        """Outcomes of the S sequences, in two groups."""
        S = len(self.advantages)
        g = torch.Generator().manual_seed(1)
        lengths = torch.randint(1000, 14_000, (S,), generator=g)
        return Groups(Outcomes(torch.arange(S) % 3 == 0, lengths).table().to(self.device), S // 2)

    def loss(self, logp: torch.Tensor, entropy: torch.Tensor | None = None, at: slice = slice(None)) -> torch.Tensor:
        """Compute the same loss from log-probs, in plain torch."""
        a = self.advantages[self.ids[at]]
        if self.old is None:
            terms = -a * logp
        else:
            r = (logp - self.old[at]).exp()
            terms = -torch.minimum(r * a, r.clamp(1 - CLIP, 1 + CLIP) * a)
        if self.entropy_coef:
            assert entropy is not None
            terms = terms - self.entropy_coef * entropy
        return terms.sum() / len(self.targets)

    def scores(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute log-probs, and entropy if the loss uses it, in plain torch and at least in float32."""
        y = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.softcap is not None:
            y = self.softcap * torch.tanh(y / self.softcap)
        if self.temperature != 1:
            y = y / self.temperature
        logps = y.log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1) if self.entropy_coef else None
        return logps.gather(1, targets[:, None])[:, 0], entropy

    def logits(self) -> torch.Tensor:
        return self.hidden @ self.head.T

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (len(self.advantages), -1))

    def exact_rows(
        self, from_hidden: bool, rows: int = 128
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, slice]]:
        """Yield chunks of rows in float64: log-probs, gradient of the logits, head, and the slice of rows.

        Args:
            from_hidden: compute from hidden states and head; otherwise from the rounded logits.
        """
        head, logits = self.head.double(), None if from_hidden else self.logits()
        for i in range(0, len(self.targets), rows):
            at = slice(i, i + rows)
            z = (self.hidden[at].double() @ head.T if logits is None else logits[at].double()).requires_grad_()
            with torch.enable_grad():
                logp, entropy = self.scores(z, self.targets[at])
                self.loss(logp, entropy, at).backward()
            assert z.grad is not None
            yield logp.detach(), z.grad, head, at

    def exact(self, from_hidden: bool) -> "Result":
        """Compute log-probs and gradients in float64."""
        logps, gradients = [], []
        d_head = torch.zeros_like(self.head, dtype=torch.float64) if from_hidden else None
        for logp, d_logits, head, at in self.exact_rows(from_hidden):
            logps.append(logp)
            gradients.append(d_logits @ head if from_hidden else d_logits)
            if d_head is not None:
                d_head += d_logits.T @ self.hidden[at].double()
        return Result(torch.cat(logps), (torch.cat(gradients), *([] if d_head is None else [d_head])))


class Result(NamedTuple):
    """Result of a call; with log-probs if the implementation returns them."""

    logp: torch.Tensor | None
    gradients: tuple[torch.Tensor, ...]


Load = Callable[[str], Any]
Score = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]  # logits, or hidden and head -> loss, log-probs


@dataclass(frozen=True)
class Rival:
    name: str
    make: Callable[[Work, Load], Score]
    lacks: tuple[str, ...] = ()
    note: str = ""
    needs_gpu: bool = False
    padded: bool = False  # takes logits [S, T / S + 1, V], of which it ignores the last position
    overwrites: bool = False  # overwrites its logits
    frozen: bool = False  # computes no gradient of the head
    approximate: bool = False  # on purpose, within a bound that it states

    @property
    def without(self) -> str:
        """What the rival lacks, as shown in a table."""
        return "; ".join(filter(None, [", ".join(f"no {feature}" for feature in self.lacks), self.note]))


def per_token(w: Work, scores: Callable) -> Score:
    """Compute the loss in plain torch around a function that returns log-probs, or log-probs and entropy."""

    def score(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp, entropy = scores(*inputs)
        return w.loss(logp, entropy), logp.detach()

    return score


# ------------------------------------------------------------------------------------------------------------- loading


def imported(entry: str) -> Any:
    """Import a rival's function or class. Raises Cannot with the reason if it cannot be imported."""
    module, _, name = entry.partition(":")
    package = module.partition(".")[0]
    if not importlib.util.find_spec(package):
        raise Cannot(f"{package} is not installed")
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as e:
        raise Cannot(f"it needs {e.name}, which is not installed") from e
    except (ImportError, RuntimeError, OSError, AttributeError) as e:
        raise Cannot(str(e).splitlines()[0][:90]) from e


class Fits(Exception):
    """Raised if a call's arguments fit the signature in a rival's source."""


def declared(entry: str) -> Any:
    """Stand-in for a rival's function that checks arguments against the source, which is not imported.

    Raises:
        TypeError: the source has nothing of that name.
    """
    module, _, name = entry.partition(":")
    package, *path = module.split(".")
    if package == "torch":  # its modules re-export names, and its own tests guard its signatures
        raise Cannot("it is part of torch")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Cannot(f"{package} is not installed")
    base = Path(spec.submodule_search_locations[0]).joinpath(*path)
    file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
    if file is None:
        raise TypeError(f"{module} does not exist")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return Declared(node)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return ast.literal_eval(node.value)
    raise TypeError(f"{module} has no {name}")


class Declared:
    """A function or class in source form. A call binds its arguments, then raises `Fits`.

    Calling the class of a module binds its constructor and returns an object whose call binds `forward`. `apply` of an
    autograd function binds its own `apply`, or else `forward` without the context.
    """

    def __init__(self, node: ast.stmt, is_instance: bool = False):
        self.node, self.is_instance = node, is_instance

    def bind(self, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        node = self.node
        if isinstance(node, ast.ClassDef):
            methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
            node = next((methods[name] for name in names if name in methods), None)
            if node is None:
                raise TypeError(f"it has no {' or '.join(names)}")
        assert isinstance(node, ast.FunctionDef)
        is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
        skipped = node is not self.node and not (is_static and node.name == "apply")  # self, cls or ctx
        signature(node.args, skip=int(skipped)).bind(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.node, ast.ClassDef) and not self.is_instance:
            self.bind(("__init__",), args, kwargs)
            return Declared(self.node, is_instance=True)
        self.bind(("forward", "__call__"), args, kwargs)
        raise Fits

    def apply(self, *args: Any) -> Any:
        self.bind(("apply", "forward"), args, {})
        raise Fits


def signature(a: ast.arguments, skip: int) -> inspect.Signature:
    P = inspect.Parameter
    positional = [(arg, P.POSITIONAL_ONLY) for arg in a.posonlyargs] + [
        (arg, P.POSITIONAL_OR_KEYWORD) for arg in a.args
    ]
    defaults = [P.empty] * (len(positional) - len(a.defaults)) + [None] * len(a.defaults)
    parameters = [P(arg.arg, kind, default=d) for (arg, kind), d in zip(positional, defaults, strict=True)][skip:]
    parameters += [P(a.vararg.arg, P.VAR_POSITIONAL)] if a.vararg else []
    parameters += [
        P(arg.arg, P.KEYWORD_ONLY, default=P.empty if d is None else None)
        for arg, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    return inspect.Signature(parameters + ([P(a.kwarg.arg, P.VAR_KEYWORD)] if a.kwarg else []))


def checked(rival: Rival, from_hidden: bool) -> str:
    """Say whether the call fits the source of the installed version; "" if nothing is installed."""
    w, loaded = Work.make("cpu", torch.float32, 16, 32, 8), []

    def load(entry: str) -> Any:
        loaded.append(entry)
        return declared(entry)

    try:
        score = rival.make(w, load)
        if loaded:  # otherwise it is written by hand
            score(*inputs_of(w, rival, from_hidden))
    except Fits:
        return "its call fits its signature"
    except Cannot:
        return ""
    except TypeError as e:
        return f"ITS SIGNATURE HAS CHANGED: {e}"
    return ""


def inputs_of(w: Work, rival: Rival, from_hidden: bool) -> tuple[torch.Tensor, ...]:
    if from_hidden:
        return w.hidden, w.head
    logits = w.logits()
    return (torch.nn.functional.pad(w.padded(logits), (0, 0, 0, 1)) if rival.padded else logits,)


# --------------------------------------------------------------------------------------------------- from the logits


def ours_on_logits(inplace: bool) -> Callable[[Work, Load], Score]:
    def make(w: Work, load: Load) -> Score:
        tokens, sequences, softmax = w.records()
        options = LossOptions(entropy_coef=w.entropy_coef)

        def score(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = policy_loss(logits, tokens, sequences, options, **softmax, inplace=inplace)
            return out.loss, out.logprobs

        return score

    return make


def eager(w: Work, load: Load) -> Score:
    return per_token(w, lambda x: w.scores(x, w.targets))


def compiled(w: Work, load: Load) -> Score:
    f = torch.compile(w.scores)
    return per_token(w, lambda x: f(x, w.targets))


def trl_log_softmax(w: Work, load: Load) -> Score:
    f = load("trl.trainer.utils:selective_log_softmax")
    return per_token(w, lambda x: (f(x, w.targets, temperature=w.temperature), None))


def trl_one_pass(w: Work, load: Load) -> Score:
    f = load("trl.trainer.utils:selective_log_softmax_and_entropy")
    grad = w.entropy_coef != 0
    return per_token(w, lambda x: f(x, w.targets, entropy_requires_grad=grad, temperature=w.temperature))


def liger_grpo_on_logits(w: Work, load: Load) -> Score:
    f = load("liger_kernel.transformers.grpo_loss:triton_grpo_loss")
    ids, old = w.padded(w.targets), None if w.old is None else w.padded(w.old)

    def score(logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        loss = f(logits, old, None, ids, w.advantages, temperature=w.temperature, beta=0.0, eps_low=CLIP, eps_high=CLIP,
                 inplace=True, loss_type="grpo")[0]  # fmt: skip
        return loss.mean(), None

    return score


def quack_cross_entropy(w: Work, load: Load) -> Score:
    f = load("quack.cross_entropy:cross_entropy")
    return per_token(
        w, lambda x: (-f(x / w.temperature if w.temperature != 1 else x, w.targets, reduction="none"), None)
    )


ON_LOGITS = (
    Rival(OURS, ours_on_logits(False)),
    Rival(OURS + ", in place", ours_on_logits(True), overwrites=True),
    Rival("torch eager", eager, note="by hand"),
    Rival("torch.compile", compiled, note="by hand"),
    Rival("TRL selective_log_softmax", trl_log_softmax, (LOSS, ENTROPY, SOFTCAP)),
    Rival("TRL one-pass kernel", trl_one_pass, (LOSS, SOFTCAP), "on a CPU plain torch"),
    Rival("Liger triton_grpo_loss", liger_grpo_on_logits, (ENTROPY, SOFTCAP, PACKING, LOGPROBS), needs_gpu=True,
          padded=True, overwrites=True),
    Rival("quack cross_entropy", quack_cross_entropy, (LOSS, ENTROPY, TEMPERATURE, SOFTCAP), needs_gpu=True),
)  # fmt: skip


# ------------------------------------------------------------------------------------- from hidden states and the head


def ours_on_hidden(dropped_mass: float | None = None) -> Callable[[Work, Load], Score]:
    def make(w: Work, load: Load) -> Score:
        tokens, sequences, softmax = w.records()
        sparse: dict[str, Any] = {} if dropped_mass is None else {"dropped_mass": dropped_mass}
        options = LossOptions(entropy_coef=w.entropy_coef, **sparse)

        def score(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out = linear_policy_loss(h, head, tokens, sequences, options, **softmax)
            return out.loss, out.logprobs

        return score

    return make


def eager_head(w: Work, load: Load) -> Score:
    return per_token(w, lambda h, head: w.scores(h @ head.T, w.targets))


def compiled_head(w: Work, load: Load) -> Score:
    f = torch.compile(lambda h, head, t: w.scores(h @ head.T, t))
    return per_token(w, lambda h, head: f(h, head, w.targets))


def cooled(w: Work, h: torch.Tensor) -> torch.Tensor:
    """Hidden states divided by the temperature, for rivals without one."""
    return h / w.temperature if w.temperature != 1 else h


def torch_per_token(w: Work, load: Load) -> Score:
    options = load("torch.nn:LinearCrossEntropyOptions")()
    f = load("torch.nn.functional:linear_cross_entropy")

    def scores(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -f(cooled(w, h), head, w.targets, reduction="none", options=options).float(), None

    return per_token(w, scores)


def torch_mean(w: Work, load: Load) -> Score:
    options = load("torch.nn:LinearCrossEntropyOptions")()
    f = load("torch.nn.functional:linear_cross_entropy")
    return lambda h, head: (f(cooled(w, h), head, w.targets, reduction="mean", options=options), None)


def trl_head(w: Work, load: Load) -> Score:
    f = load("trl.kernels.chunked_logprob:ChunkedLogProbFunction")
    tile = load("trl.trainer.utils:_CHUNKED_LOGPROB_CHUNK_SIZE")
    outputs = ("log_probs", "entropy") if w.entropy_coef else ("log_probs",)

    def scores(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return f.apply(h, head, None, w.targets, w.temperature, tile, w.softcap, 1.0, outputs)[:2]

    return per_token(w, scores)


def cut_cross_entropy(reduction: str) -> Callable[[Work, Load], Score]:
    def make(w: Work, load: Load) -> Score:
        f = load("cut_cross_entropy.linear_cross_entropy:linear_cross_entropy")
        impl = "torch_compile" if w.device == "cpu" else "cce"

        def loss(h: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
            # A cap c is applied before the temperature, so the hidden states must not be divided by the temperature
            # first.
            if w.softcap is not None and w.temperature != 1:
                raise Cannot("it supports a soft cap or, through the hidden states, a temperature, but not both")
            return f(cooled(w, h), c=head, targets=w.targets, softcap=w.softcap, reduction=reduction, impl=impl)

        if reduction == "mean":
            return lambda h, head: (loss(h, head), None)
        return per_token(w, lambda h, head: (-loss(h, head).float(), None))

    return make


def liger_scaled(w: Work, load: Load) -> Score:
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    f = load(f"{module}:LigerFusedLinearScaledCrossEntropyFunction")

    def scores(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if w.entropy_coef:
            nll, entropy = f.apply(h, head, w.targets, w.temperature, -100, 1, True)
            return -nll, entropy
        return -f.apply(h, head, w.targets, w.temperature, -100, 1, False), None

    return per_token(w, scores)


def liger_grpo(w: Work, load: Load) -> Score:
    make = load("liger_kernel.chunked_loss.grpo_loss:LigerFusedLinearGRPOLoss")
    f = make(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="grpo",
             temperature=w.temperature)  # fmt: skip
    ids, old = w.padded(w.targets), None if w.old is None else w.padded(w.old)
    mask = torch.ones_like(ids, dtype=torch.float32)

    def score(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, None]:
        return f(w.padded(h), head, ids, mask, w.advantages, old_per_token_logps=old)[0], None

    return score


def liger_sm90(w: Work, load: Load) -> Score:
    module = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    f = load(f"{module}:liger_fused_linear_cross_entropy_sm90")
    return lambda h, head: (f(cooled(w, h), weight=head, target=w.targets, reduction="mean"), None)


def quack_chunked(scaled_exp: bool) -> Callable[[Work, Load], Score]:
    def make(w: Work, load: Load) -> Score:
        f = load("quack.linear_cross_entropy:chunked_linear_cross_entropy")
        return lambda h, head: (
            f(cooled(w, h), weight=head, target=w.targets, reduction="mean", use_scaled_exp=scaled_exp),
            None,
        )

    return make


def verl_kernel(w: Work, load: Load) -> Score:
    f = load("verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy")

    def scores(h: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return f.apply(h, head, w.targets, w.temperature, "none", None)

    return per_token(w, scores)


def verl_chunks(w: Work, load: Load) -> Score:
    f = load("verl.utils.experimental.torch_functional:FusedLinearForPPO")(chunk_size=512)
    return per_token(w, lambda h, head: f(h, head, w.targets, w.temperature))


REDUCED = (LOSS, TOKENS, LOGPROBS, ENTROPY, TEMPERATURE, SOFTCAP)
ON_HIDDEN = (
    Rival(OURS, ours_on_hidden()),
    Rival("torch eager", eager_head, note="by hand"),
    Rival("torch.compile", compiled_head, note="by hand"),
    Rival("torch linear_cross_entropy", torch_per_token, (LOSS, ENTROPY, TEMPERATURE, SOFTCAP)),
    Rival("TRL fused head", trl_head, (LOSS,)),
    Rival("cut-cross-entropy", cut_cross_entropy("none"), (LOSS, ENTROPY, TEMPERATURE),
          "on a CPU its torch.compile form"),
    Rival("Liger scaled CE", liger_scaled, (LOSS, SOFTCAP), "on a CPU its chunks in torch"),
    Rival("Liger fused linear GRPO", liger_grpo, (ENTROPY, SOFTCAP, PACKING, LOGPROBS)),
    Rival("verl linear_cross_entropy", verl_kernel, (LOSS, SOFTCAP), needs_gpu=True),
    Rival("verl FusedLinearForPPO", verl_chunks, (LOSS, SOFTCAP), "chunks in torch"),
)  # fmt: skip
SPARSE = (
    Rival(f"{OURS}, dropped_mass={DROPPED_MASS:g}", ours_on_hidden(DROPPED_MASS), (ENTROPY,), approximate=True),
    Rival(f"{OURS}, head frozen", ours_on_hidden(), frozen=True),
    Rival(f"{OURS}, head frozen, dropped_mass={DROPPED_MASS:g}", ours_on_hidden(DROPPED_MASS), (ENTROPY,), frozen=True,
          approximate=True),
)  # fmt: skip
ON_CROSS_ENTROPY = (
    Rival(OURS, ours_on_hidden()),
    Rival("torch eager", eager_head, note="by hand"),
    Rival("torch linear_cross_entropy", torch_mean, REDUCED),
    Rival("cut-cross-entropy", cut_cross_entropy("mean"), (LOSS, ENTROPY, TEMPERATURE),
          "on a CPU its torch.compile form"),
    Rival("quack chunked, base", quack_chunked(False), REDUCED, needs_gpu=True),
    Rival("quack chunked, scaled-exp", quack_chunked(True), REDUCED, "SM90 and bfloat16 only", needs_gpu=True),
    Rival("Liger SM90 cross-entropy", liger_sm90, REDUCED, "SM90 and bfloat16 only, T % 128, V % 256",
          needs_gpu=True),
)  # fmt: skip


def sparse_rivals() -> tuple[Rival, ...]:
    """Our kernel without a gradient of the head, dense and with the sparse backward."""
    return SPARSE if hasattr(LossOptions, "dropped_mass") else tuple(r for r in SPARSE if not r.approximate)


# ----------------------------------------------------------------------------------------------- advantages and floors


def from_groups(w: Work, load: Load) -> Score:
    """`policy_loss` from the outcomes of groups, as a training run calls it."""
    tokens, sequences = Tokens(w.targets, w.ids, old=w.old), Sequences(w.weights, w.groups)
    return lambda x: ((out := policy_loss(x, tokens, sequences)).loss, out.logprobs)


def launched_apart(w: Work, load: Load) -> Score:
    tokens, weights, groups = Tokens(w.targets, w.ids, old=w.old), w.weights, w.groups

    def score(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = policy_loss(x, tokens, Sequences(weights, lead_advantages(*groups).advantage))
        return out.loss, out.logprobs

    return score


def given_advantages(w: Work, load: Load) -> Score:
    tokens, sequences = Tokens(w.targets, w.ids, old=w.old), Sequences(w.weights, lead_advantages(*w.groups).advantage)
    return lambda x: ((out := policy_loss(x, tokens, sequences)).loss, out.logprobs)


ADVANTAGES = (
    Rival(OURS, from_groups),
    Rival("a launch of its own", launched_apart),
    Rival(FLOOR + "advantages given", given_advantages),
)


@dataclass(frozen=True)
class Floor:
    """Lower bound on the time of any implementation; `work` counts its FLOPs or bytes."""

    name: str
    make: Callable[[Work], Call]
    work: Callable[[Work], float]
    unit: str


def products(count: int) -> Callable[[Work], Call]:
    def make(w: Work) -> Call:
        def run() -> tuple[torch.Tensor, ...]:
            z = w.hidden @ w.head.T
            return (z,) if count == 1 else (z @ w.head, z.T @ w.hidden)

        return run

    return make


def copy(w: Work) -> Call:
    logits = w.logits()
    to = torch.empty_like(logits)
    return lambda: to.copy_(logits)


def product_flops(w: Work) -> float:
    return 2.0 * len(w.targets) * w.head.numel()


ONE_PRODUCT = Floor(FLOOR + "one bare product", products(1), product_flops, "FLOP")
THREE_PRODUCTS = Floor(FLOOR + "three bare products", products(3), lambda w: 3 * product_flops(w), "FLOP")
COPY = Floor(FLOOR + "a copy of the logits", copy,
             lambda w: 2.0 * len(w.targets) * len(w.head) * w.dtype.itemsize, "B")  # fmt: skip
