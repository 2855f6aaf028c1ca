"""The whole configuration: one tree of frozen dataclasses, filled from a recipe, a preset and the command line.

Order, later wins: the defaults below <- recipe (TOML, over the preset it names) <- `--preset` (TOML) <-
`--section.key=value`. Every value is checked once, before any model is loaded; what is wrong is said in one sentence
that names the value and the remedy.
"""

import dataclasses
import difflib
import json
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

RECIPES = Path(__file__).parent / "recipes"
PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class ModelConfig:
    path: str = "tiny"
    """Hugging Face name or folder of a causal language model, a run directory, or `tiny` (the embedded one)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; master weights and gradient reduction are float32 either way."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes each block in the backward pass (a third more FLOPs), `selective` only what is cheap."""
    liger: bool = True
    """On a GPU: RMSNorm, RoPE and SwiGLU by Liger's kernels, where it is installed."""
    compile: bool = False
    """torch.compile of each block, around its attention."""
    trust_remote_code: bool = False
    """Allow a model repository to run its own code."""


@dataclass(frozen=True)
class DataConfig:
    train: str = "arithmetic:train"
    """Training problems: a .jsonl or .parquet file, a hub dataset's name, or `arithmetic:train?n=4000` (built in)."""
    test: str = "arithmetic:test"
    """Held-out problems, in the same forms, or AIME24, AIME25, MATH500, AMC23, Minerva, OlympiadBench."""
    problem_column: str = "problem"
    """Column with the question."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    difficulty_column: str = "difficulty"
    """Column with the difficulty; may be absent."""
    min_difficulty: float | None = None
    """Keep only training problems above this difficulty."""
    instruction: str = "Let's think step by step and put the final answer within \\boxed{}"
    """Appended to every problem, in the same user turn."""
    max_prompt_tokens: int = 1024
    """Limit on a prompt, chat template included, tokens."""
    sampling: Literal["shuffle", "solve_rate"] = "shuffle"
    """Order of training problems: every one once an epoch, or drawn by recent solve rate, those near 1/2 most often."""
    drop_long_prompts: bool = False
    """Drop problems whose prompt is over the limit (and say how many) instead of stopping."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Who generates; `auto`: vLLM on a GPU (a run without it stops unless transformers is named), else transformers."""
    problems: int = 32
    """Problems per step, over all ranks."""
    group_size: int = 8
    """Responses per problem, G."""
    max_tokens: int = 8192
    """Limit on a response, tokens."""
    temperature: float = 1.0
    """Sampling temperature; the loss divides the logits by it too."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    min_p: float = 0.0
    """Drop tokens below this share of the most likely one; 0 is off."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """Generation ends at any of these strings."""
    refill: int = 0
    """Most rounds of sampling other problems in place of groups that advantage.group_filter drops (DAPO); 0: none."""
    batch_size: int = 128
    """Most responses that an engine generates at once."""
    tensor_parallel: int = 1
    """Neighbouring ranks that share a vLLM engine, where a model does not fit one GPU."""
    gpu_memory: float = 0.6
    """Share of a GPU's memory that vLLM may take while it generates beside the trainer."""
    sync_bucket_mib: int = 1024
    """Weights gathered at once on their way to the engine, MiB."""
    extra_problems: int = 0
    """Ask so many problems more than a step needs, train on the first whole groups, go on with the rest (vLLM only)."""


@dataclass(frozen=True)
class RewardConfig:
    grade: Literal["all", "before_think", "after_think"] = "all"
    """Where the last \\boxed{} is looked for, seen from `</think>`; both sides of a missing one are empty."""
    wrong: float = -1.0
    """Reward of an incorrect response: the paper's explicit penalty E; 0 switches E off."""
    truncated: float | None = None
    """Reward of a wrong response cut at the length limit, or with no `</think>` if a side is graded; none: `wrong`."""
    degenerate: float | None = None
    """Reward of a truncated response that repeats itself; none: as `truncated`."""
    repetition: float | None = None
    """Reward of any wrong response with repeated n-grams (stage 2: -1.5); none: not looked at."""
    overlong_buffer: int = 0
    """Soft overlong penalty (DAPO): falls from 0 to -1 over the last so many tokens before the limit; 0 is off."""
    verifier_timeout_s: float = 5.0
    """Limit on checking one answer, seconds; past it the answer counts as wrong."""


@dataclass(frozen=True)
class AdvantageConfig:
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
    std: Literal["sample", "none", "mad"] = "sample"
    """Normalise by the sample standard deviation, by nothing (Dr. GRPO) or by the mean absolute deviation (DGPO)."""
    length_gate: int = 0
    """Tokens; groups whose three shortest responses average at most this keep reward 1 (official: 4000); 0: off."""
    length_min_solve_rate: float = 0.0
    """L only in groups whose solve rate is above this (GRPO-lambda)."""
    nonnegative_correct: bool = False
    """Never give a correct response a negative advantage (DRPO)."""
    rate: Literal["correct", "positive"] = "correct"
    """Solve rate: share of correct responses, or share with a reward above 0 (released code)."""
    group_filter: Literal["none", "official", "uniform"] = "none"
    """Drop groups: all rewards <= 0 or all exactly 1 (`official`), or solve rate 0 or 1 (`uniform`, DAPO)."""


@dataclass(frozen=True)
class LossConfig:
    mean: Literal["response", "token", "constant"] = "response"
    """Per-response mean (paper), token mean over the whole batch (released code), or a constant length (Dr. GRPO)."""
    ratio: Literal["token", "sequence", "cispo"] = "token"
    """Importance ratio per token (GRPO), per sequence (GSPO), or clipped as a detached weight (CISPO)."""
    old_logprobs: Literal["engine", "current", "recompute"] = "engine"
    """The ratio's denominator: the engine's log-probs, the policy itself (ratio 1), or a pass before the update."""
    clip_low: float = 0.2
    """Ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """Ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound c > 1 on the loss of negative advantages (dual clip)."""
    importance_cap: float | None = None
    """Cap on the importance weight of trainer against engine; none: no such weight."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Weights above the cap are cut to it, or their tokens dropped."""
    importance_level: Literal["token", "sequence"] = "token"
    """Importance weight per token or per sequence."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence to the reference model."""
    kl_coef: float = 0.0
    """Weight of the KL term; 0 loads no reference model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or down to 0 at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    updates: int = 1
    """Optimiser steps per rollout batch, each on its own share of the groups."""
    max_skipped: int = 5
    """Stop after so many steps in a row whose loss or gradient was not finite (such updates are skipped); 0: never."""


@dataclass(frozen=True)
class ParallelConfig:
    pack_tokens: int = 16384
    """Most tokens in a pack (a longer sequence gets one of its own); 0: what fits the GPU, measured at the start."""
    reshard: bool = True
    """Free each block's gathered parameters after its forward; false keeps them over all packs of a step."""
    replicate: int = 1
    """Copies of the sharded model, as a rule one a node (HSDP): gathers stay in a node, gradients cross."""
    sequence: int = 1
    """Neighbouring ranks that share each pack, and its longest sequence, in attention by heads (Ulysses)."""
    offload: Literal["none", "optimizer", "activations", "both"] = "none"
    """What lives in host memory: masters, gradients and optimiser; or each block's input, with full checkpointing."""
    rehearse: Literal["auto", "always", "never"] = "auto"
    """One largest pack before the first rollout, so that out-of-memory comes in the first minute; auto: on a GPU."""


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 10
    """Evaluate on the held-out problems every so many steps, also before the first and after the last; 0 is never."""
    problems: int = 0
    """How many held-out problems; 0 is all."""
    samples: int = 1
    """Responses per problem."""
    temperature: float = 0.6
    """Sampling temperature; 0 is greedy."""
    min_p: float = 0.0
    """As in rollout."""
    gpu_memory: float = 0.9
    """Share of a GPU's memory that vLLM may take in `lead_fast.evaluate`, which has the GPU to itself."""


@dataclass(frozen=True)
class Config:
    recipe: str = ""
    """Name of the recipe or path of the TOML file this came from."""
    preset: str = ""
    """Name of the preset laid over the recipe: paper, official, grpo, l, l-ad."""
    output: str = ""
    """Run directory; empty: runs/<recipe>-<time>."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the run directory."""
    seed: int = 0
    """Of sampling and of the data's order."""
    steps: int = 100
    """Rollout batches to train on."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 saves none but the export at the end."""
    wandb: str = ""
    """Weights & Biases project; empty: none."""
    watchdog_s: float = 1500.0
    """Seconds without progress after which every rank's phase and stack are printed and the job ends; 0: never."""
    debug: bool = False
    """Check after every kernel that values are finite and log-probs at most 0; slower."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class SftConfig:
    """What `python -m lead_fast.sft` reads; its recipes are in recipes/sft."""

    recipe: str = ""
    """Name of the recipe or path of the TOML file this came from."""
    output: str = ""
    """Run directory; empty: runs/sft-<recipe>-<time>."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the run directory."""
    seed: int = 0
    """Of the weights, if they are new, and of the data's order."""
    steps: int = 1000
    """Optimiser steps."""
    batch_tokens: int = 16384
    """Tokens per step over all ranks, prompts included."""
    from_scratch: bool = False
    """Begin with random weights: the architecture and tokenizer of the embedded model."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the exported weights."""
    validate_every: int = 100
    """Steps between losses on the held-out problems; 0: after the last only."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves none but the export at the end."""
    solution_column: str = "solution"
    """Column with the worked solution."""
    max_solution_tokens: int = 0
    """Leave out longer solutions (and say how many), end of sequence included; 0: no limit. None is cut short."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


# ---------------------------------------------------------------------------------------------------------- loading


def names(folder: Path) -> list[str]:
    """Names of the TOML files in a folder, sorted."""
    return sorted(p.stem for p in folder.glob("*.toml"))


def keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, such as `rollout.group_size`."""
    out = []
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            out += keys(f.type, f"{prefix}{f.name}.")
        else:
            out.append(prefix + f.name)
    return out


def unknown_key(key: str, where: str, cls: Any) -> ValueError:
    known = keys(cls)
    near = difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(
        key.split(".")[-1], [k.split(".")[-1] for k in known], 1, 0.6
    )
    near = [k for k in known if near and (k == near[0] or k.endswith("." + near[0]))][:1]
    hint = f"did you mean {near[0]}?" if near else "--help lists all keys."
    return ValueError(f"Unknown configuration key {key} in {where}: {hint}")


def read_toml(name: str, folder: Path, kind: str, cls: Any = Config) -> dict[str, Any]:
    """A shipped recipe or preset by name, or any TOML file by path, as nested dicts whose keys are all known."""
    path = folder / f"{name}.toml" if name in names(folder) else Path(name)
    if not path.is_file():
        raise ValueError(
            f"No {kind} named {name!r}: give one of {', '.join(names(folder))}, or the path of a TOML file."
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: {e}.") from e
    leaves = [
        f"{k}.{kk}" if isinstance(v, dict) else k
        for k, v in tree.items()
        for kk in (v if isinstance(v, dict) else [""])
    ]
    for leaf in leaves:
        if leaf not in keys(cls):
            raise unknown_key(leaf, path.name, cls)
    return tree


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for k, v in over.items():
        out[k] = merge(out.get(k, {}), v) if isinstance(v, dict) else v
    return out


def from_tree(tree: dict[str, Any], cls: Any = Config) -> Any:
    """Nested dicts to a Config, each value's type checked; a wrong one is named with its key."""
    import pydantic

    try:
        return pydantic.TypeAdapter(cls).validate_python(tree)
    except pydantic.ValidationError as e:
        err = e.errors()[0]
        key = ".".join(str(p) for p in err["loc"])
        raise ValueError(f"Configuration key {key} = {err['input']!r} is not valid: {err['msg']}.") from e


def load_config(
    args: list[str] | None, *, default_recipe: str = "tiny", cls: Any = Config, prog: str = "lead_fast.train"
) -> Any:
    """The configuration that a command line asks for.

    Args:
        args: such as ["--recipe", "tiny", "--rollout.group_size=4"]; None takes sys.argv. `--config FILE` is the same
            as `--recipe FILE`; `--model NAME` is short for `--model.path`.
        default_recipe: the recipe when none is named.
        cls: Config or SftConfig.
        prog: shown by --help.
    Raises:
        ValueError: unknown recipe, preset or key (with the nearest known one), or a value that does not fit.
    """
    args = [a for arg in (sys.argv[1:] if args is None else args) for a in _split(arg)]
    if "--help" in args or "-h" in args:
        import tyro

        tyro.cli(cls, args=["--help"], prog=prog, description="Configuration keys, their meaning and defaults.")
    given: dict[str, str] = {}
    short = {"config": "recipe", "model": "model.path"}
    while args:
        flag = args.pop(0)
        key = flag.removeprefix("--").replace("-", "_")
        key = short.get(key, key)
        if not flag.startswith("--") or key not in keys(cls):
            raise unknown_key(key, "the command line", cls)
        if args and not args[0].startswith("--"):
            given[key] = args.pop(0)
        elif _type(key, cls) is bool:
            given[key] = "true"
        else:
            raise ValueError(f"{flag} needs a value, as in {flag}=VALUE.")
    recipe = given.pop("recipe", default_recipe)
    tree = read_toml(recipe, RECIPES if cls is Config else RECIPES / "sft", "recipe", cls) | {"recipe": recipe}
    if preset := given.pop("preset", ""):
        tree = merge(tree, read_toml(preset, PRESETS, "preset")) | {"preset": preset}
    elif preset := tree.get("preset", ""):  # the file's own values stand, or what `dump` wrote would change
        tree = merge(read_toml(preset, PRESETS, "preset"), tree)
    for key, value in given.items():
        *section, leaf = key.split(".")
        parsed = _value(value, _type(key, cls))
        tree = merge(tree, {section[0]: {leaf: parsed}} if section else {leaf: parsed})
    return from_tree(tree, cls)


def _split(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--") and "=" in arg else [arg]


def _type(key: str, cls: Any) -> Any:
    for part in key.split("."):
        cls = {f.name: f.type for f in dataclasses.fields(cls)}[part]
    return cls


def _value(text: str, kind: Any) -> Any:
    if text.lower() == "none" and type(None) in get_args(kind):
        return None
    return json.loads(text) if text.startswith("[") else text


def chosen_engine(c: Config, device_type: str) -> str:
    """The engine that rollout.engine means on "cuda" or "cpu": `auto` is vLLM on a GPU, installed or not."""
    if c.rollout.engine == "auto":
        return "vllm" if device_type == "cuda" else "transformers"
    return c.rollout.engine


def check(c: Config, world: int, *, trains: bool = True, device_type: str = "cpu") -> None:
    """What can be known wrong before any model is loaded.

    Args:
        c: the configuration.
        world: number of ranks.
        trains: ranks share a step's problems, and packs; an evaluation's engines take prompts as they drain.
        device_type: "cuda" or "cpu", what the ranks compute on.
    Raises:
        ValueError: one sentence that names the value and the remedy.
    """
    r, a = c.rollout, c.advantage
    for name, value in {"rollout.problems": r.problems, "rollout.group_size": r.group_size, "steps": c.steps,
                        "rollout.max_tokens": r.max_tokens, "optim.updates": c.optim.updates,
                        "evaluate.samples": c.evaluate.samples,
                        "rollout.batch_size": r.batch_size, "rollout.tensor_parallel": r.tensor_parallel,
                        "rollout.sync_bucket_mib": r.sync_bucket_mib}.items():  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")
    check_parallel(c.model, c.parallel)
    by_sequence = c.loss.ratio == "sequence" or (
        c.loss.importance_cap is not None and c.loss.importance_level == "sequence"
    )
    if c.parallel.sequence > 1 and by_sequence:
        raise ValueError(
            f"parallel.sequence is {c.parallel.sequence} with a ratio or importance weight per sequence, whose tokens "
            "are then on several ranks: give --parallel.sequence=1, or weights per token."
        )
    if trains and r.problems % world:
        raise ValueError(
            f"rollout.problems is {r.problems}, which {world} ranks cannot share evenly: give a multiple of {world}."
        )
    if r.problems % c.optim.updates:
        raise ValueError(
            f"rollout.problems is {r.problems}: it must be a multiple of optim.updates ({c.optim.updates})."
        )
    if r.group_size == 1 and a.std != "none":
        raise ValueError(
            f"rollout.group_size is 1 and advantage.std is {a.std}: one response has no spread to normalise by; "
            "give a group size of 2 or more, or --advantage.std=none."
        )
    if r.refill < 0 or (r.refill and a.group_filter == "none"):
        raise ValueError(
            f"rollout.refill is {r.refill} and advantage.group_filter {a.group_filter}: it replaces dropped groups; "
            "give 0, or --advantage.group_filter=uniform."
        )
    if r.group_size > 1024:
        raise ValueError(f"rollout.group_size is {r.group_size}: the kernels take groups of at most 1024.")
    if r.temperature <= 0:
        raise ValueError(f"rollout.temperature is {r.temperature}: training samples, so give a value above 0.")
    if not 0 < r.top_p <= 1 or not 0 <= r.min_p < 1:
        raise ValueError(f"rollout.top_p is {r.top_p} and min_p {r.min_p}: give 0 < top_p <= 1 and 0 <= min_p < 1.")
    if not 0 < c.evaluate.gpu_memory < 1:
        raise ValueError(f"evaluate.gpu_memory is {c.evaluate.gpu_memory}: give a share between 0 and 1.")
    if r.top_k < 0 or r.extra_problems < 0 or not 0 < r.gpu_memory < 1:
        raise ValueError(
            f"rollout.top_k is {r.top_k}, extra_problems {r.extra_problems} and gpu_memory {r.gpu_memory}: "
            "give 0 or more, 0 or more, and a share between 0 and 1."
        )
    if world % r.tensor_parallel:
        raise ValueError(
            f"rollout.tensor_parallel is {r.tensor_parallel}, which does not divide {world} ranks: "
            f"give a divisor of {world}."
        )
    if chosen_engine(c, device_type) != "vllm" and (r.tensor_parallel > 1 or r.extra_problems):
        raise ValueError(
            f"rollout.tensor_parallel is {r.tensor_parallel} and extra_problems {r.extra_problems}, "
            "which only vLLM can do: give --rollout.engine=vllm."
        )
    if c.optim.updates > 1 and c.loss.old_logprobs == "current":
        raise ValueError(
            f"optim.updates is {c.optim.updates} with loss.old_logprobs=current: later updates need the ratio; "
            "give --loss.old_logprobs=engine or recompute."
        )
    if c.loss.ratio == "sequence" and c.loss.importance_cap is not None and c.loss.importance_level == "token":
        raise ValueError(
            "loss.ratio is sequence and loss.importance_level token: give --loss.importance_level=sequence."
        )
    if c.loss.dual_clip is not None and c.loss.dual_clip <= 1:
        raise ValueError(f"loss.dual_clip is {c.loss.dual_clip}: give a value above 1.")


def check_parallel(model: ModelConfig, parallel: ParallelConfig) -> None:
    """What can be known wrong in how a model is laid out, whatever it is trained for. Raises ValueError."""
    if parallel.pack_tokens < 0:
        raise ValueError(f"parallel.pack_tokens is {parallel.pack_tokens}: give 1 or more, or 0 to have it measured.")
    if parallel.offload in ("activations", "both") and model.activation_checkpointing != "full":
        raise ValueError(
            f"parallel.offload is {parallel.offload} with model.activation_checkpointing="
            f"{model.activation_checkpointing}: it moves each block's input, so give full."
        )
    if model.compile and model.activation_checkpointing == "selective":
        raise ValueError(
            "model.compile is true with model.activation_checkpointing=selective, which must see single operators: "
            "give full or none."
        )


def dump(c: Config | SftConfig) -> str:
    """The resolved configuration as TOML, which `--config` reads back (an absent value is left out)."""

    def line(k: str, v: Any) -> str:
        return f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v, ensure_ascii=False)}\n"

    tree = dataclasses.asdict(c)
    out = "".join(line(k, v) for k, v in tree.items() if not isinstance(v, dict))
    for section, values in tree.items():
        if isinstance(values, dict):
            out += f"\n[{section}]\n" + "".join(line(k, v) for k, v in values.items() if v is not None)
    return out
