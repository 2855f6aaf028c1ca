"""The whole configuration: one tree of frozen dataclasses. cli.py fills it, checks.py refuses what cannot work.

The options of the advantages and of the loss are those of kernels/lead_kernels/options.py, which checks their values.
"""

from dataclasses import dataclass, field
from typing import Literal

from lead_kernels.options import AdvantageOptions, LossOptions


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


@dataclass(frozen=True)
class DataConfig:
    """Problems and how they are asked."""

    train: str = "arithmetic:train"
    """Training problems: a .jsonl or .parquet file, a hub dataset's name, or `arithmetic:train?n=4000` (built in)."""
    test: str = "arithmetic:test"
    """Held-out problems, in the same forms, or AIME24, AIME25, MATH500, AMC23, Minerva, OlympiadBench."""
    problem_column: str = "problem"
    """Column with the question."""
    reference_column: str = "answer"
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
    """How responses are sampled."""

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
    """What is graded, and what a response is worth."""

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
    """Limit on the CPU time of checking one answer, seconds; past it the answer counts as wrong."""


@dataclass(frozen=True)
class AdvantageConfig(AdvantageOptions):
    """From rewards to advantages, over the responses to one problem; every key is of lead_kernels.AdvantageOptions."""


@dataclass(frozen=True)
class LossConfig(LossOptions):
    """The clipped policy loss: the keys of lead_kernels.LossOptions, and what is decided before it is called."""

    mean: Literal["response", "token", "constant"] = "response"
    """Per-response mean (paper), token mean over the whole batch (released code), or a constant length (Dr. GRPO)."""
    old_logprobs: Literal["engine", "current", "recompute"] = "engine"
    """The ratio's denominator: the engine's log-probs, the policy itself (ratio 1), or a pass before the update."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    decay_norms_and_biases: bool = True
    """Decay norms and biases too, as the released code does (verl's FSDP workers: one AdamW group); false spares them,
    as Hugging Face's Trainer does."""
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
    """How the model and the packs are laid out over ranks."""

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
    """One largest pack before the first step, so that out-of-memory comes in the first minute; auto: on a GPU."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation."""

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
    """Resume from the newest complete checkpoint in the run directory."""
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
    """Resume from the newest complete checkpoint in the run directory."""
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
    wandb: str = ""
    """Weights & Biases project; empty: none."""
    watchdog_s: float = 1500.0
    """Seconds without progress after which every rank's phase and stack are printed and the job ends; 0: never."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
