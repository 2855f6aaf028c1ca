"""The whole configuration: one tree of frozen dataclasses. cli.py fills it, checks.py refuses what cannot work.

Every number declares its range beside its type; checks.py enforces it and --help shows it. The options of the
advantages and of the loss come from kernels/lead_kernels/options.py; their ranges are in the section's RANGES.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from lead_kernels.options import AdvantageOptions, LossOptions


@dataclass(frozen=True)
class Range:
    """The permitted values of a number, declared beside its type; NaN and infinity are never permitted.

    An optional key (`float | None`) may also be None; in a tuple, every element must be in the range.
    """

    low: float
    """The least value."""
    high: float
    """The greatest value."""
    above: bool = False
    """Whether `low` itself is outside."""
    below: bool = False
    """Whether `high` itself is outside."""
    zero: str = ""
    """What 0 means where it is not a quantity, such as `off`."""

    def __contains__(self, x: float) -> bool:
        over = x > self.low if self.above else x >= self.low
        return over and (x < self.high if self.below else x <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {self.low}"
        if self.below:
            return f"{low} {'and' if self.above else 'to'} below {self.high}"
        return f"{low} and at most {self.high}" if self.above else f"{low} to {self.high}"


MANY = 10**9  # more than any count here can sensibly be
REWARD = 10**6  # beyond it the sum of squares over a group loses float32's digits

Count = Annotated[int, Range(1, MANY)]
CountOrOff = Annotated[int, Range(0, MANY, zero="off")]
Every = Annotated[int, Range(0, MANY, zero="never")]
Fraction = Annotated[float, Range(0, 1, above=True, below=True)]
MinP = Annotated[float, Range(0, 1, below=True, zero="off")]
Reward = Annotated[float, Range(-REWARD, REWARD)]
WrongReward = Annotated[float, Range(-REWARD, 1)]  # a correct response gets about 1
WrongRewardOrNone = Annotated[float | None, Range(-REWARD, 1)]
Seconds = Annotated[float, Range(0.1, 3600)]  # below 0.1 s correct answers would time out and count as wrong
Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(1, 10**7)]
Tokens = Annotated[int, Range(1, 2**24)]  # lengths are exact in float32
Watchdog = Annotated[float, Range(0, 10**6, zero="no watchdog")]


@dataclass(frozen=True)
class ModelConfig:
    """The model to train, and how to compute it."""

    path: str = "tiny"
    """Hugging Face name or folder of a causal language model, a run directory, or `tiny` (the embedded one)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; master weights and gradient reduction are float32 with both."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` recomputes each block in the backward pass (a third more FLOPs), `selective` only its cheap operations."""
    liger: bool = True
    """On a GPU, use Liger's kernels for RMSNorm, RoPE and SwiGLU if Liger is installed."""
    compile: bool = False
    """Compile each block, except its attention, with torch.compile."""
    trust_remote_code: bool = False
    """Allow a model repository to run its own code."""
    freeze_head: bool = False
    """Do not train the head, which saves a third of its FLOPs; an embedding tied to it is not trained either."""
    unchecked: bool = False
    """Train even a model type that cannot be reduced to a small copy on which to compare training with transformers."""


@dataclass(frozen=True)
class DataConfig:
    """The problems, and how they are posed."""

    train: str = "arithmetic:train"
    """Training problems: a .jsonl, .json, .csv or .parquet file, a hub dataset's name, or `arithmetic:train?n=4000`
    (built in); `python -m lead_fast.data check FILE` shows how a file is read."""
    test: str = "arithmetic:test"
    """Held-out problems, in the same forms, or AIME24, AIME25, MATH500, AMC23, Minerva, OlympiadBench."""
    problem_column: str = "problem"
    """Column with the question, as text or as chat messages; `a.b` is field b of column a. If no column has the default
    name, the layouts of public data sets are recognised."""
    reference_column: str = "answer"
    """Column with the reference: bare, after `####`, or in the last \\boxed{} of a worked solution; `a.b` as above."""
    difficulty_column: str = "difficulty"
    """Column with the difficulty; it may be absent."""
    min_difficulty: Annotated[float | None, Range(-MANY, MANY)] = None
    """Keep only training problems above this difficulty."""
    instruction: str = "Let's think step by step and put the final answer within \\boxed{}"
    """Text appended to every problem in the same user turn; left out if both it and the prompt ask for \\boxed{}."""
    max_prompt_tokens: Tokens = 1024
    """Maximum length of a prompt in tokens, chat template included."""
    sampling: Literal["shuffle", "solve_rate"] = "shuffle"
    """Order of training problems: each once per epoch, or drawn by recent solve rate, most often those near 1/2."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments for the chat template, one key each: `--data.template.enable_thinking=false`."""
    drop_long_prompts: bool = False
    """Drop problems whose prompt is over the limit (and say how many) instead of stopping."""
    drop_unverifiable: bool = False
    """Drop problems whose reference no answer could equal (and say how many) instead of stopping."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding in vLLM: a drafter proposes tokens, the model verifies them and keeps its distribution."""

    method: Literal["none", "ngram", "draft_model", "eagle", "eagle3", "mtp"] = "none"
    """Drafter: n-grams of the sequence itself, a smaller model, an EAGLE head, the model's own MTP layers; or none."""
    model: str = ""
    """Path or hub name of the drafter (draft_model, eagle, eagle3); it is not trained."""
    tokens: Annotated[int, Range(1, 64)] = 3
    """Tokens proposed per verification."""
    max_batch: Count = 64
    """Maximum number of running responses with which an engine still speculates; with more of them the
    matrix products are the bottleneck."""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that samples the responses; `auto` is vLLM on a GPU, where it must be installed, and
    transformers elsewhere."""
    problems: Count = 32
    """Problems per step, over all ranks."""
    group_size: Annotated[int, Range(1, 1024)] = 8
    """Responses per problem, G."""
    max_tokens: Tokens = 8192
    """Maximum length of a response in tokens."""
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    """Sampling temperature; the loss divides the logits by it too."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling; 1 is off."""
    min_p: MinP = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 is off."""
    top_k: CountOrOff = 0
    """Sample only from this many of the most likely tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    refill: CountOrOff = 0
    """Maximum rounds of sampling new problems to replace groups that advantage.group_filter drops (DAPO); 0 is off."""
    batch_size: Annotated[int, Range(0, MANY, zero="its full part of a step")] = 128
    """Maximum number of responses that an engine generates at once; 0: its full part of a step."""
    tensor_parallel: Count = 1
    """Neighbouring ranks that share one vLLM engine, for a model that does not fit on one GPU."""
    gpu_memory: Fraction = 0.6
    """Fraction of a GPU's memory that vLLM may use for rollouts, with the trainer on the same GPU."""
    sync_bucket_mib: Annotated[int, Range(1, 10**6)] = 1024
    """Size in MiB of the buckets in which weights are gathered and sent to the engine."""
    extra_problems: CountOrOff = 0
    """Problems sampled beyond what a step needs; the first complete groups are used, the others resumed (vLLM only)."""
    max_age: Count = 2
    """With extra_problems: maximum steps that a group may wait; groups that would wait longer are completed first."""
    quantization: Literal["none", "fp8_per_channel", "fp8_per_block", "fp8_per_tensor"] = "none"
    """How vLLM rounds the weights of linear layers after each sync; any but none turns on token importance weights."""
    kv_dtype: Literal["auto", "fp8", "fp8_per_token_head"] = "auto"
    """Format of vLLM's key-value cache: the model's own, fp8 at scale 1, or fp8 with scales computed at run time."""
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)


@dataclass(frozen=True)
class RewardConfig:
    """Which part of a response is graded, and the reward it earns."""

    grade: Literal["all", "before_think", "after_think"] = "all"
    """Which side of `</think>` is searched for the last \\boxed{}; without a `</think>` both sides are empty."""
    wrong: WrongReward = -1.0
    """Reward of an incorrect response: the paper's explicit penalty E; 0 switches E off."""
    truncated: WrongRewardOrNone = None
    """Reward of a wrong response cut at the limit, or without `</think>` if one side is graded; none: as `wrong`."""
    degenerate: WrongRewardOrNone = None
    """Reward of a truncated response that repeats itself; none: as `truncated`."""
    repetition: WrongRewardOrNone = None
    """Reward of any wrong response with repeated n-grams (stage 2: -1.5); none: not checked."""
    overlong_buffer: CountOrOff = 0
    """Soft overlong penalty (DAPO): falls from 0 to -1 over this many tokens before rollout.max_tokens; 0 is off."""
    verifier_timeout_s: Seconds = 5.0
    """CPU time in seconds that checking one answer may take; beyond it the answer counts as wrong."""
    function: str = ""
    """Your own reward function, `path/to/FILE.py:name` or `module:name` (docs/own-reward.md); empty: none."""
    mode: Literal["replace", "add"] = "replace"
    """How the function's value is used: as the reward and the verdict on correctness, or added to the usual reward."""
    correct_above: Reward = 0.0
    """With mode `replace`: values above this count as correct, in the solve rate and for the length reward L."""
    function_timeout_s: Seconds = 5.0
    """Time in seconds that the function may take for one response."""
    function_failed: Reward = 0.0
    """Value of a response for which the function raises, times out or returns anything but finite numbers."""


@dataclass(frozen=True)
class AdvantageConfig(AdvantageOptions):
    """How the rewards of a problem's responses become advantages: the keys of lead_kernels.AdvantageOptions."""

    RANGES: ClassVar[dict[str, Range]] = {
        "alpha": Range(0, 10, zero="off"),
        "weight_low": Range(0, 1000),
        "weight_high": Range(0, 1000),
        "slope": Range(-1000, 1000),
        "midpoint": Range(0, 1),
        "eps": Range(0, 1),
        "length_gate": Range(0, 2**24, zero="off"),
        "length_min_solve_rate": Range(0, 1),
        "length_advantage": Range(0, 100, zero="off"),
    }
    """Ranges of the inherited numbers; the kernels themselves accept any number that they can compute with."""

    length_guard: Annotated[float, Range(0, 1, zero="off")] = 0.0
    """Switch off L and length_advantage while held-out Pass@1 is below the run's best by more than this; 0: never."""


@dataclass(frozen=True)
class LossConfig(LossOptions):
    """The clipped policy loss: the keys of lead_kernels.LossOptions, and two that the trainer applies itself."""

    RANGES: ClassVar[dict[str, Range]] = {
        "clip_low": Range(0, MANY),
        "clip_high": Range(0, MANY),
        "dual_clip": Range(1, MANY, above=True),
        "delta": Range(1.2, MANY),  # from 1 + clip_high
        "sapo_positive": Range(0, 1000, above=True),
        "sapo_negative": Range(0, 1000, above=True),
        "importance_cap": Range(0, MANY, above=True),
        "kl_coef": Range(0, 1000, zero="no reference model"),
        "entropy_coef": Range(-1000, 1000),
        "dropped_mass": Range(0, 1, below=True, zero="dense"),
    }
    """Ranges of the inherited numbers; the kernels themselves accept any number that they can compute with."""

    mean: Literal["response", "token", "constant"] = "response"
    """Mean per response (paper), over all tokens of the batch (released code), or over a constant length (Dr. GRPO)."""
    old_logprobs: Literal["engine", "current", "recompute"] = "engine"
    """Denominator of the ratio: log-probs of the engine, of the policy itself (ratio 1), or of a separate pass
    before the update."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Range(0, 1)] = 1e-6
    """Peak learning rate of AdamW."""
    betas: Annotated[tuple[float, float], Range(0, 1, below=True)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    weight_decay: Annotated[float, Range(0, 10)] = 0.01
    """AdamW's decoupled weight decay."""
    decay_norms_and_biases: bool = True
    """Apply weight decay to norms and biases too, as the released code does (verl's FSDP workers: one AdamW group);
    false exempts them, as Hugging Face's Trainer does."""
    grad_clip: Annotated[float, Range(0, MANY, zero="off")] = 1.0
    """Maximum global gradient norm; 0 is off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to 0 at the last step."""
    warmup_steps: CountOrOff = 0
    """Steps of linear warm-up."""
    updates: Count = 1
    """Optimiser steps per rollout batch, each on a different part of its groups."""
    max_skipped: Every = 5
    """Stop after this many consecutive steps skipped because the loss or gradient was not finite; 0: never."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the packs are laid out over ranks."""

    pack_tokens: Annotated[int, Range(0, MANY, zero="as many as fit")] = 16384
    """Maximum tokens per pack (a longer sequence gets its own); 0: as many as fit the GPU, measured at the start."""
    reshard: bool = True
    """Free each block's gathered parameters after its forward pass; false keeps them for all packs of a step."""
    replicate: Count = 1
    """Copies of the sharded model (HSDP), usually one per node: all-gathers stay in a node, gradients cross nodes."""
    sequence: Count = 1
    """Neighbouring ranks that split each pack between them, and its attention by heads (Ulysses)."""
    offload: Literal["none", "optimizer", "activations", "both"] = "none"
    """What is kept in host memory: master weights, gradients and AdamW's moments (`optimizer`); each block's input,
    which needs full checkpointing (`activations`); or both."""
    rehearse: Literal["auto", "always", "never"] = "auto"
    """Try the largest possible pack before the first step, so that a lack of memory shows at once; auto: on a GPU."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation."""

    every: Every = 10
    """Steps between held-out evaluations, with one before the first step and one after the last; 0: never."""
    problems: Annotated[int, Range(0, MANY, zero="all")] = 0
    """Number of held-out problems; 0: all."""
    samples: Count = 1
    """Responses per problem."""
    temperature: Annotated[float, Range(0, 100, zero="greedy")] = 0.6
    """Sampling temperature; 0 is greedy."""
    min_p: MinP = 0.0
    """Like rollout.min_p; 0 is off."""
    gpu_memory: Fraction = 0.9
    """Fraction of a GPU's memory that vLLM may use in `lead_fast.evaluate`, which has the GPU to itself."""


@dataclass(frozen=True)
class MetricsConfig:
    """What a run keeps for inspection."""

    keep_rollouts: Annotated[int, Range(0, 10**8, zero="none kept")] = 1024
    """Maximum size of RUN_DIR/rollouts in MiB: every step's groups, compressed; beyond it older
    steps are thinned out."""


@dataclass(frozen=True)
class Config:
    recipe: str = ""
    """Name of the recipe, or path of the TOML file, that the configuration came from."""
    preset: str = ""
    """Name of the preset laid over the recipe: paper, official, grpo, l, l-ad."""
    output: str = ""
    """Run directory; empty: runs/<recipe>-<time>."""
    resume: bool = False
    """Resume from the newest complete checkpoint in the run directory."""
    seed: Seed = 0
    """Seed of the sampling and of the order of the data."""
    steps: Steps = 100
    """Number of rollout batches to train on."""
    checkpoint_every: Every = 50
    """Steps between checkpoints; 0: none, only the export at the end."""
    wandb: str = ""
    """Weights & Biases project; empty: none."""
    watchdog_s: Watchdog = 1500.0
    """Seconds without progress after which each rank's phase and stack are printed and the job ends; 0: never."""
    debug: bool = False
    """Check after each kernel that values are finite and log-probs at most 0; slower."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass(frozen=True)
class SftConfig:
    """Configuration of `python -m lead_fast.sft`; its recipes are in recipes/sft."""

    recipe: str = ""
    """Name of the recipe, or path of the TOML file, that the configuration came from."""
    output: str = ""
    """Run directory; empty: runs/sft-<recipe>-<time>."""
    resume: bool = False
    """Resume from the newest complete checkpoint in the run directory."""
    seed: Seed = 0
    """Seed of new weights and of the order of the data."""
    steps: Steps = 1000
    """Optimiser steps."""
    batch_tokens: Count = 16384
    """Tokens per step over all ranks, prompts included."""
    from_scratch: bool = False
    """Start from random weights, with the architecture and tokenizer of the embedded model."""
    export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the exported weights."""
    validate_every: Annotated[int, Range(0, MANY, zero="after the last step only")] = 100
    """Steps between measurements of the loss on the held-out problems; 0: after the last step only."""
    checkpoint_every: Every = 0
    """Steps between checkpoints; 0: none, only the export at the end."""
    solution_column: str = "solution"
    """Column with the worked solution."""
    max_solution_tokens: Annotated[int, Range(0, MANY, zero="no limit")] = 0
    """Maximum tokens of a solution, end of sequence included; longer ones are left out and counted; 0: no limit."""
    wandb: str = ""
    """Weights & Biases project; empty: none."""
    watchdog_s: Watchdog = 1500.0
    """Seconds without progress after which each rank's phase and stack are printed and the job ends; 0: never."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
