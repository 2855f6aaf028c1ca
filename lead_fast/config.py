"""The whole configuration: one tree of frozen dataclasses. cli.py fills it, checks.py refuses what cannot work.

Every number has its range beside its type; checks.py holds the value to it and --help shows it. The options of the
advantages and of the loss are those of kernels/lead_kernels/options.py; their ranges are in RANGES of the section.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from lead_kernels.options import AdvantageOptions, LossOptions


@dataclass(frozen=True)
class Range:
    """The values that a number may have, written beside its type; never NaN or infinite.

    A key that may be absent (`float | None`) may be None too; of a tuple, every element is in the range.
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
    """What 0 means where it is no quantity, such as `off`."""

    def __contains__(self, x: float) -> bool:
        over = x > self.low if self.above else x >= self.low
        return over and (x < self.high if self.below else x <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {self.low}"
        if self.below:
            return f"{low} {'and' if self.above else 'to'} below {self.high}"
        return f"{low} and at most {self.high}" if self.above else f"{low} to {self.high}"


MANY = 10**9  # more than any count here can be in earnest
REWARD = 10**6  # beyond it a group's sum of squares loses float32's digits

Count = Annotated[int, Range(1, MANY)]
CountOrOff = Annotated[int, Range(0, MANY, zero="off")]
Every = Annotated[int, Range(0, MANY, zero="never")]
Fraction = Annotated[float, Range(0, 1, above=True, below=True)]
MinP = Annotated[float, Range(0, 1, below=True, zero="off")]
Reward = Annotated[float, Range(-REWARD, REWARD)]
WrongReward = Annotated[float, Range(-REWARD, 1)]  # a correct response gets about 1
WrongRewardOrNone = Annotated[float | None, Range(-REWARD, 1)]
Seconds = Annotated[float, Range(0.1, 3600)]  # with less, right answers would time out and count as wrong
Seed = Annotated[int, Range(0, 2**32 - 1)]
Steps = Annotated[int, Range(1, 10**7)]
Tokens = Annotated[int, Range(1, 2**24)]  # lengths are exact in float32
Watchdog = Annotated[float, Range(0, 10**6, zero="no watchdog")]


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained, and how it is computed."""

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
    freeze_head: bool = False
    """Do not train the head: a third of its FLOPs less; where it is tied to the embedding, neither is trained."""
    unchecked: bool = False
    """Train a model type that cannot be reduced to a small copy, on which training is compared with transformers."""


@dataclass(frozen=True)
class DataConfig:
    """Problems and how they are asked."""

    train: str = "arithmetic:train"
    """Training problems: a .jsonl, .json, .csv or .parquet file, a hub dataset's name, or `arithmetic:train?n=4000`
    (built in); `python -m lead_fast.data check FILE` says how a file is read."""
    test: str = "arithmetic:test"
    """Held-out problems, in the same forms, or AIME24, AIME25, MATH500, AMC23, Minerva, OlympiadBench."""
    problem_column: str = "problem"
    """Column with the question, as text or as chat messages; `a.b` is column b in a. Where no column has the default
    name, the layouts of public sets are recognised."""
    reference_column: str = "answer"
    """Column with the reference, alone, behind `####` or in the last \\boxed{} of a worked solution; `a.b` as above."""
    difficulty_column: str = "difficulty"
    """Column with the difficulty; may be absent."""
    min_difficulty: Annotated[float | None, Range(-MANY, MANY)] = None
    """Keep only training problems above this difficulty."""
    instruction: str = "Let's think step by step and put the final answer within \\boxed{}"
    """Appended to every problem, in the same user turn, unless it asks for \\boxed{} and so does the prompt."""
    max_prompt_tokens: Tokens = 1024
    """Limit on a prompt, chat template included, tokens."""
    sampling: Literal["shuffle", "solve_rate"] = "shuffle"
    """Order of training problems: each once per epoch, or drawn by recent solve rate, those near 1/2 most often."""
    template: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Arguments of the chat template, one key each: `--data.template.enable_thinking=false`."""
    drop_long_prompts: bool = False
    """Drop problems whose prompt is over the limit (and say how many) instead of stopping."""
    drop_unverifiable: bool = False
    """Drop problems whose reference no answer could equal (and say how many) instead of stopping."""


@dataclass(frozen=True)
class SpeculativeConfig:
    """Speculative decoding by vLLM: a drafter proposes, the model verifies; the distribution stays the model's."""

    method: Literal["none", "ngram", "draft_model", "eagle", "eagle3", "mtp"] = "none"
    """Drafter: n-grams of the sequence itself, a smaller model, an EAGLE head, the model's own MTP layers; or none."""
    model: str = ""
    """Path or hub name of the drafter (draft_model, eagle, eagle3); it is not trained."""
    tokens: Annotated[int, Range(1, 64)] = 3
    """Tokens proposed per verification."""
    max_batch: Count = 64
    """Largest number of running responses with which an engine still speculates; above it the products are full."""


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that generates; `auto`: vLLM on a GPU (required unless transformers is named), else transformers."""
    problems: Count = 32
    """Problems per step, over all ranks."""
    group_size: Annotated[int, Range(1, 1024)] = 8
    """Responses per problem, G."""
    max_tokens: Tokens = 8192
    """Limit on a response, tokens."""
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    """Sampling temperature; the loss divides the logits by it too."""
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Nucleus sampling; 1 is off."""
    min_p: MinP = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 is off."""
    top_k: CountOrOff = 0
    """Sample from this many most likely tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """Generation ends at any of these strings."""
    refill: CountOrOff = 0
    """Maximum rounds of sampling problems in place of groups that advantage.group_filter drops (DAPO); 0 is off."""
    batch_size: Annotated[int, Range(0, MANY, zero="all of its part of a step")] = 128
    """Maximum number of responses that an engine generates at once; 0: all of its part of a step."""
    tensor_parallel: Count = 1
    """Neighbouring ranks that share a vLLM engine, where a model does not fit one GPU."""
    gpu_memory: Fraction = 0.6
    """Fraction of a GPU's memory that vLLM may use while it generates beside the trainer."""
    sync_bucket_mib: Annotated[int, Range(1, 10**6)] = 1024
    """Size of the buckets in which weights are gathered and sent to the engine, MiB."""
    extra_problems: CountOrOff = 0
    """Problems asked beyond what a step needs; the first complete groups are used, the others resumed (vLLM only)."""
    max_age: Count = 2
    """With extra_problems: steps that a group may wait; those that would wait longer are finished first."""
    quantization: Literal["none", "fp8_per_channel", "fp8_per_block", "fp8_per_tensor"] = "none"
    """How vLLM rounds the weights of linear layers after each sync; other than none brings token importance weights."""
    kv_dtype: Literal["auto", "fp8", "fp8_per_token_head"] = "auto"
    """Format of vLLM's key-value cache: the model's, or fp8 at scale 1, or fp8 with scales taken at run time."""
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)


@dataclass(frozen=True)
class RewardConfig:
    """What part of a response is graded, and what it is worth."""

    grade: Literal["all", "before_think", "after_think"] = "all"
    """Where the last \\boxed{} is looked for, seen from `</think>`; both sides of a missing one are empty."""
    wrong: WrongReward = -1.0
    """Reward of an incorrect response: the paper's explicit penalty E; 0 switches E off."""
    truncated: WrongRewardOrNone = None
    """Reward of a wrong response cut at the length limit, or with no `</think>` if a side is graded; none: `wrong`."""
    degenerate: WrongRewardOrNone = None
    """Reward of a truncated response that repeats itself; none: as `truncated`."""
    repetition: WrongRewardOrNone = None
    """Reward of any wrong response with repeated n-grams (stage 2: -1.5); none: not checked."""
    overlong_buffer: CountOrOff = 0
    """Soft overlong penalty (DAPO): falls from 0 to -1 over this many tokens before rollout.max_tokens; 0 is off."""
    verifier_timeout_s: Seconds = 5.0
    """Limit on checking one answer, seconds of the checker's CPU time; past it the answer counts as wrong."""
    function: str = ""
    """Reward function of your own, `path/to/FILE.py:name` or `module:name` (docs/own-reward.md); empty: none."""
    mode: Literal["replace", "add"] = "replace"
    """What the function's value is: the reward, and whether the response is correct; or a bonus on the usual reward."""
    correct_above: Reward = 0.0
    """With mode `replace`: values above this count as correct, in the solve rate and for the length reward L."""
    function_timeout_s: Seconds = 5.0
    """Time limit of the function for one response, seconds."""
    function_failed: Reward = 0.0
    """Value of a response where the function raises, runs out of time or returns anything but finite numbers."""


@dataclass(frozen=True)
class AdvantageConfig(AdvantageOptions):
    """From rewards to advantages, over the responses to one problem; the keys of lead_kernels.AdvantageOptions."""

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
    """Of the inherited numbers; a kernel takes any that it can compute with."""

    length_guard: Annotated[float, Range(0, 1, zero="off")] = 0.0
    """L and length_advantage are off while held-out Pass@1 is below the run's best by more than this."""


@dataclass(frozen=True)
class LossConfig(LossOptions):
    """The clipped policy loss: the keys of lead_kernels.LossOptions, and what the trainer decides before calling it."""

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
    """Of the inherited numbers; a kernel takes any that it can compute with."""

    mean: Literal["response", "token", "constant"] = "response"
    """Per-response mean (paper), token mean over the whole batch (released code), or a constant length (Dr. GRPO)."""
    old_logprobs: Literal["engine", "current", "recompute"] = "engine"
    """Denominator of the ratio: the engine's log-probs, the policy itself (ratio 1), or a pass before the update."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Range(0, 1)] = 1e-6
    """Peak learning rate of AdamW."""
    betas: Annotated[tuple[float, float], Range(0, 1, below=True)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
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
    """Optimiser steps per rollout batch, each on its own part of the groups."""
    max_skipped: Every = 5
    """Stop after this many consecutive steps with a loss or gradient that is not finite (and skipped); 0: never."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the packs are laid out over ranks."""

    pack_tokens: Annotated[int, Range(0, MANY, zero="what fits")] = 16384
    """Maximum tokens per pack (a longer sequence gets its own); 0: what fits the GPU, measured at the start."""
    reshard: bool = True
    """Free each block's gathered parameters after its forward pass; false keeps them for all packs of a step."""
    replicate: Count = 1
    """Copies of the sharded model (HSDP), usually one per node: all-gathers stay in a node, gradients cross nodes."""
    sequence: Count = 1
    """Neighbouring ranks that split each pack between them, and its attention by heads (Ulysses)."""
    offload: Literal["none", "optimizer", "activations", "both"] = "none"
    """What is kept in host memory: masters, gradients and AdamW's moments (`optimizer`), each block's input, with full
    checkpointing (`activations`), or both."""
    rehearse: Literal["auto", "always", "never"] = "auto"
    """Try the largest possible pack before the first step, so that memory runs out early or never; auto: on a GPU."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation."""

    every: Every = 10
    """Steps between evaluations on the held-out problems, also before the first and after the last step; 0: never."""
    problems: Annotated[int, Range(0, MANY, zero="all")] = 0
    """Number of held-out problems; 0 is all."""
    samples: Count = 1
    """Responses per problem."""
    temperature: Annotated[float, Range(0, 100, zero="greedy")] = 0.6
    """Sampling temperature; 0 is greedy."""
    min_p: MinP = 0.0
    """As rollout.min_p; 0 is off."""
    gpu_memory: Fraction = 0.9
    """Fraction of a GPU's memory that vLLM may use in `lead_fast.evaluate`, which has the GPU to itself."""


@dataclass(frozen=True)
class MetricsConfig:
    """What a run keeps to be looked at."""

    keep_rollouts: Annotated[int, Range(0, 10**8, zero="none kept")] = 1024
    """Limit on RUN_DIR/rollouts, MiB: every step's groups, compressed; when it is reached older steps are thinned."""


@dataclass(frozen=True)
class Config:
    recipe: str = ""
    """Name of the recipe or path of the TOML file this came from."""
    preset: str = ""
    """Name of the preset laid over the recipe: paper, official, grpo, l, l-ad."""
    output: str = ""
    """Run directory; empty: runs/<recipe>-<time>."""
    resume: bool = False
    """Resume from the newest complete checkpoint in the run directory."""
    seed: Seed = 0
    """Seed of sampling and of the data's order."""
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
    """What `python -m lead_fast.sft` reads; its recipes are in recipes/sft."""

    recipe: str = ""
    """Name of the recipe or path of the TOML file this came from."""
    output: str = ""
    """Run directory; empty: runs/sft-<recipe>-<time>."""
    resume: bool = False
    """Resume from the newest complete checkpoint in the run directory."""
    seed: Seed = 0
    """Seed of new weights and of the data's order."""
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
    """Leave out longer solutions (and say how many), end of sequence counted; 0: no limit. None is cut short."""
    wandb: str = ""
    """Weights & Biases project; empty: none."""
    watchdog_s: Watchdog = 1500.0
    """Seconds without progress after which each rank's phase and stack are printed and the job ends; 0: never."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
