"""One training step, TRL's and a plain padded one: the same model, responses, advantages and loss, in one run.

    python bench/train_step.py [--answers 32] [--group 8] [--median 48] [--longest 512] [--micro-batch 8] [--turns 2]

The step is GRPO's clipped loss (mean per response, ratio to given old log-probs), forward, backward and AdamW, in
float32 on a CPU and bfloat16 on a GPU. Lengths are lognormal with a long tail, as a reasoning model's are. Every
implementation runs in a process of its own and in turns with the others; gradients must agree before a time counts.
No answer is skipped: every advantage differs from 0. As in GRPO, --group answers have the same prompt; with --group 1
every answer has its own.

    lead-fast   packs of --pack-tokens, no padding, a group's prompt once a pack, chunked head
    compiled    the same with --model.compile
    TRL         its own GRPOTrainer's loss, padded as it pads: every micro-batch to the longest of the whole batch
    plain       transformers under FSDP2, micro-batches padded to their own longest, logits of the answers whole

With --bare there is no FSDP, no optimiser and no TRL: weights and gradients alone, in bfloat16 on a GPU, so that the
whole 14B fits one H200:

    python bench/train_step.py --bare --shape qwen2.5-14b --answers 2 --median 1e9 --longest 8192 --micro-batch 1
        --pack-tokens 8192 --checkpointing selective      (and --longest 14336; without communication)

Tokens/s counts the real tokens of all sequences, each with its prompt, also where a prompt is computed once for its
group; MFU likewise counts the work of separate sequences, so sharing may raise it above the processor's own use. It is
relative to a bare matrix product timed in the same run, with causal attention (6 N + 6 L D n per token of a sequence of
n tokens) and as torchtitan counts it (12 L D n).

Legend: N parameters, L layers, D hidden, S sequences.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, extra_bytes, machine, synchronize, write_json

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("lead-fast", "compiled", "TRL", "plain")
CLIP = 0.2


QWEN_14B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
            "max_position_embeddings": 32768}  # fmt: skip


def make_model(folder: Path, a: argparse.Namespace) -> dict[str, int]:
    """The embedded model's architecture, wider and with new weights, in `folder`; only its shape with --bare.

    Returns:
        parameters, hidden, layers and vocabulary.
    """
    hidden, layers = a.hidden, a.layers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lead_fast.data.arithmetic import architecture, build_tokenizer

    tokenizer = build_tokenizer()
    base = architecture(len(tokenizer)).to_dict()
    base.pop("layer_types", None)
    base |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
             "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
             "max_position_embeddings": 32768}  # fmt: skip
    if a.shape == "qwen2.5-14b":
        base |= QWEN_14B
    config = Qwen2Config(**base)
    with torch.device("meta" if a.bare else "cpu"):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    if a.bare:
        config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in model.parameters()), "hidden": config.hidden_size,
            "layers": config.num_hidden_layers}  # fmt: skip


def bare_model(a: argparse.Namespace, device: str) -> Any:
    """The shape in `a.model` with weights from a seed, made where they are used."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(a.model), dtype=dtype)


def make_answers(a: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Prompts, answers, old log-probs near a fresh model's, advantages."""
    g = torch.Generator().manual_seed(1)
    lengths = (a.median * torch.exp(torch.randn(a.answers, generator=g))).long().clamp(4, a.longest).tolist()

    def tokens(n: int) -> list[int]:
        return torch.randint(10, vocabulary, (n,), generator=g).tolist()

    flat = -torch.log(torch.tensor(float(vocabulary)))
    return {
        "prompts": [
            prompt
            for n in torch.randint(16, 33, (a.answers // a.group,), generator=g)
            for prompt in [tokens(int(n))] * a.group
        ],
        "responses": [tokens(n) for n in lengths],
        "logprobs": [(flat + 0.2 * torch.randn(n, generator=g)).tolist() for n in lengths],
        "advantages": (torch.randn(a.answers, generator=g)).tolist(),
    }


class Step:
    """What each implementation does: gradient of the batch, then the optimiser."""

    model: Any
    optimizer: torch.optim.Optimizer | None = None

    def gradient(self) -> None:
        raise NotImplementedError

    def named_grads(self) -> dict[str, torch.Tensor]:
        out = {}
        every = list(self.model.named_parameters())
        for name, p in (
            every if len(every) < 300 else every[2:20] + every[-20:-1]
        ):  # of a large model its first and last
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            out[name] = grad.float().cpu()
        return out


class LeadFast(Step):
    def __init__(self, a: argparse.Namespace, x: dict[str, Any], device: str):
        from lead_fast.cli import load_config
        from lead_fast.learner.loss import objective, policy_loss
        from lead_fast.learner.optimizer import make_optimizer
        from lead_fast.learner.packing import assign, assign_shared, make_pack
        from lead_fast.learner.policy import Policy, load_policy, prepare_blocks
        from lead_fast.runtime.ranks import start

        dtype = "float32" if device == "cpu" else "bfloat16"
        c = load_config([f"--model.path={a.model}", f"--model.dtype={dtype}", f"--parallel.reshard={a.reshard}",
                         f"--model.compile={a.only == 'compiled'}",
                         f"--model.activation_checkpointing={a.checkpointing}"])  # fmt: skip
        ranks = start()
        if a.bare:
            self.policy = Policy(bare_model(a, device))
            prepare_blocks(self.policy, c.model, ranks.device)
        else:
            self.policy = load_policy(c.model, c.parallel, ranks)
            self.optimizer = make_optimizer(self.policy, c.optim)
        self.model = self.policy.model
        lengths = [len(r) for r in x["responses"]]
        o = objective(torch.tensor(x["advantages"], device=device), lengths,
                      torch.ones(len(lengths), dtype=torch.bool, device=device), c)  # fmt: skip
        whole = [len(p) + n - 1 for p, n in zip(x["prompts"], lengths, strict=True)]
        shared = self.policy.shares_prompts
        if shared:
            plan = assign_shared(x["prompts"], whole, a.pack_tokens, 1, self.policy.flops())[0]
        else:
            plan = assign(whole, a.pack_tokens, 1, self.policy.flops())[0]
        self.packs = [
            make_pack(m, x["prompts"], x["responses"], x["logprobs"], ranks.device, shared=shared) for m in plan
        ]
        self.loss = lambda pack: policy_loss(self.policy, pack, o, c).loss

    def gradient(self) -> None:
        for pack in self.packs:
            self.loss(pack).backward()
        self.policy.to_shards()


def padded(rows: list[list], value: float, left: bool, dtype: torch.dtype) -> torch.Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(r)) for r in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)], dtype=dtype)


def batch(x: dict[str, Any], members: list[int]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, answers on the right."""
    prompts, answers = ([x[k][i] for i in members] for k in ("prompts", "responses"))
    return {
        "prompt_ids": padded(prompts, 0, True, torch.int64),
        "prompt_mask": padded([[1] * len(r) for r in prompts], 0, True, torch.int64),
        "completion_ids": padded(answers, 0, False, torch.int64),
        "completion_mask": padded([[1] * len(r) for r in answers], 0, False, torch.int64),
        "old_per_token_logps": padded([x["logprobs"][i] for i in members], 0.0, False, torch.float32),
        "advantages": torch.tensor([x["advantages"][i] for i in members]),
    }


class Trl(Step):
    def __init__(self, a: argparse.Namespace, x: dict[str, Any], device: str):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer  # type: ignore

        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        rows = len(x["prompts"])
        args = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=device == "cpu", per_device_train_batch_size=a.micro_batch,
            num_generations=a.micro_batch, beta=0.0, epsilon=CLIP, loss_type="grpo", bf16=device != "cpu",
            gradient_checkpointing=False, report_to=[], gradient_accumulation_steps=rows // a.micro_batch,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=AutoTokenizer.from_pretrained(a.model),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": "1+1"}] * rows),
        )
        trainer.current_gradient_accumulation_steps = rows // a.micro_batch
        self.trainer, self.model = trainer, trainer.model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        whole = {k: v.to(device) for k, v in batch(x, list(range(rows))).items()}
        whole["num_items_in_batch"] = whole["completion_mask"].sum()
        self.micro = [
            {k: v if v.dim() == 0 else v[i : i + a.micro_batch] for k, v in whole.items()}
            for i in range(0, rows, a.micro_batch)
        ]

    def gradient(self) -> None:
        for inputs in self.micro:
            self.trainer._compute_loss(self.model, inputs).backward()


class Plain(Step):
    def __init__(self, a: argparse.Namespace, x: dict[str, Any], device: str):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers import AutoModelForCausalLM

        from lead_fast.runtime.ranks import start

        ranks = start()
        self.rows = len(x["prompts"])
        self.micro = [
            {k: v.to(device) for k, v in batch(x, list(range(i, min(i + a.micro_batch, self.rows)))).items()}
            for i in range(0, self.rows, a.micro_batch)
        ]
        if a.bare:
            self.model = bare_model(a, device).train()
            if a.checkpointing != "none":
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            return
        half = MixedPrecisionPolicy(torch.float32 if device == "cpu" else torch.bfloat16, torch.float32)
        model: Any = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
        model.to(device)
        for block in model.model.layers:
            fully_shard(block, mesh=ranks.mesh, mp_policy=half)
        self.model = fully_shard(model, mesh=ranks.mesh, mp_policy=half).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def gradient(self) -> None:
        for b in self.micro:
            ids = torch.cat([b["prompt_ids"], b["completion_ids"]], 1)
            mask = torch.cat([b["prompt_mask"], b["completion_mask"]], 1)
            answer = b["completion_ids"]
            n = answer.shape[1]
            logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=n + 1, use_cache=False).logits
            logp = logits[:, :-1].float().log_softmax(-1).gather(2, answer[..., None])[..., 0]
            r, adv = (logp - b["old_per_token_logps"]).exp(), b["advantages"][:, None]
            loss = -torch.minimum(r * adv, r.clamp(1 - CLIP, 1 + CLIP) * adv) * b["completion_mask"]
            ((loss.sum(1) / b["completion_mask"].sum(1)).sum() / self.rows).backward()


def child(a: argparse.Namespace) -> None:
    """Run one implementation: write its gradient to a file, then print times and peak memory of whole steps as JSON."""
    device = a.device
    x = torch.load(a.answers_file)
    step: Step = {"lead-fast": LeadFast, "compiled": LeadFast, "TRL": Trl, "plain": Plain}[a.only](a, x, device)
    step.gradient()
    torch.save(step.named_grads(), a.gradient_file)

    def update() -> None:
        if step.optimizer:
            step.optimizer.step()
        step.model.zero_grad(set_to_none=True)

    update()
    synchronize(device)

    def whole() -> dict[str, float]:
        synchronize(device)
        began = time.perf_counter()
        step.gradient()
        synchronize(device)
        middle = time.perf_counter()
        update()
        synchronize(device)
        ended = time.perf_counter()
        return {"gradient_s": middle - began, "optimizer_s": ended - middle, "seconds": ended - began}

    memory = {"peak_extra_bytes": extra_bytes(whole, device)}
    for _ in range(a.steps):
        print("RESULT " + json.dumps(whole() | memory))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def call(a: argparse.Namespace, name: str, folder: Path) -> list[dict[str, float]]:
    args = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(a).items()
        if v is not None and k not in ("out", "bare", "names")
    ]
    args += ["--bare"] * a.bare
    gradient = folder / f"{name}.pt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *args, f"--only={name}", f"--gradient-file={gradient}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"  {name}: not measured ({reason[:150]})")
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def peak_flops(device: str) -> float:
    """FLOP/s of a bare matrix product, the best of five."""
    n, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    x = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(x, x)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def main() -> None:
    p = argparse.ArgumentParser(description="One training step beside TRL's and a plain padded one.")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--answers", type=int, default=32)
    p.add_argument("--median", type=float, default=48, help="of an answer, tokens")
    p.add_argument("--longest", type=int, default=512, help="answers are cut there, tokens")
    p.add_argument("--micro-batch", type=int, default=8, help="rows of a padded micro-batch")
    p.add_argument("--pack-tokens", type=int, default=640)
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--bare", action="store_true", help="weights and gradients alone: no FSDP, no optimiser")
    p.add_argument(
        "--names", nargs="+", default=list(NAMES), choices=NAMES, help="what is measured; lead-fast always is"
    )
    p.add_argument("--group", type=int, help="answers per prompt; default: 8, or --answers if that is less")
    p.add_argument("--reshard", default="false", choices=["true", "false"], help="lead-fast's parallel.reshard")
    p.add_argument("--shape", default="embedded", choices=["embedded", "qwen2.5-14b"])
    p.add_argument(
        "--checkpointing", default="none", choices=["none", "selective", "full"], help="plain knows full only"
    )
    p.add_argument("--turns", type=int, default=2, help="processes of each implementation")
    p.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    p.add_argument("--out", type=Path, help="JSON; bench/results/train-step-<device>.json")
    for internal in ("--only", "--model", "--answers-file", "--gradient-file"):
        p.add_argument(internal, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.only:
        return child(a)
    a.group = min(8, a.answers) if a.group is None else a.group
    if a.group < 1 or a.answers % a.group:
        sys.exit(f"--answers is {a.answers} and --group {a.group}: give a multiple of the group.")
    if a.answers % a.micro_batch or min(a.answers, a.micro_batch, a.turns) < 1:
        sys.exit(f"--answers is {a.answers} and --micro-batch {a.micro_batch}: give a multiple of the micro-batch.")
    about = machine(a.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a.model, a.answers_file = folder / "model", folder / "answers.pt"
        sizes = make_model(a.model, a)
        N = sizes["parameters"]
        x = make_answers(a, vocabulary=400)
        torch.save(x, a.answers_file)
        lengths = [len(p) + len(r) for p, r in zip(x["prompts"], x["responses"], strict=True)]
        real = sum(lengths)
        rows = max(map(len, x["prompts"])) + max(map(len, x["responses"]))
        print(f"{about['device']}: {N / 1e6:.1f}M parameters, {a.answers} answers, {real:,} tokens, padded to the "
              f"longest {a.answers * rows:,}")  # fmt: skip
        peak = peak_flops(a.device)
        left_out = ["TRL"] * a.bare + ["compiled"] * (a.checkpointing == "selective")  # the two do not go together
        left_out += [n for n in NAMES[1:] if n not in a.names]
        times: dict[str, list[dict[str, float]]] = {n: [] for n in NAMES if n not in left_out}
        for _ in range(a.turns):
            for n in list(times):
                if found := call(a, n, folder):
                    times[n] += found
                else:
                    del times[n]
        if "lead-fast" not in times:
            sys.exit("lead-fast was not measured, so that nothing can be compared with it.")
        reference = torch.load(folder / "lead-fast.pt")
        off = {}
        for n in times:
            theirs = torch.load(folder / f"{n}.pt")
            assert theirs.keys() == reference.keys()
            flat = [torch.cat([g[k].flatten() for k in reference]) for g in (theirs, reference)]
            off[n] = ((flat[0] - flat[1]).norm() / flat[1].norm()).item()
            assert off[n] < (1e-4 if a.device == "cpu" else 3e-2), f"{n} has another gradient, by {off[n]:.1e}"
    attention = sizes["layers"] * sizes["hidden"] * sum(n * n for n in lengths)
    flops = {"mfu_causal": 6 * N * real + 6 * attention, "mfu_torchtitan": 6 * N * real + 12 * attention}
    table = []
    print(f"{'':12} {'tokens/s':>9} {'(min to max)':>16} {'x ours':>7} {'MFU':>6} {'gradient s':>11}"
          f" {'optimiser s':>12} {'extra MiB':>10} {'gradient off':>13}")  # fmt: skip
    ours = statistics.median(t["seconds"] for t in times["lead-fast"])
    for n, found in times.items():
        seconds = statistics.median(t["seconds"] for t in found)
        row: dict[str, Any] = {k: statistics.median(t[k] for t in found) for k in found[0]}
        all_s = [t["seconds"] for t in found]
        row |= {"implementation": n, "tokens_per_s": real / seconds, "tokens_per_s_min": real / max(all_s),
                "tokens_per_s_max": real / min(all_s), "times_ours": seconds / ours,
                "gradient_off": off[n]}  # fmt: skip
        row |= {k: v / seconds / peak for k, v in flops.items()}
        table.append(row)
        spread = f"({row['tokens_per_s_min']:.0f} to {row['tokens_per_s_max']:.0f})"
        print(f"{n:12} {row['tokens_per_s']:9.0f} {spread:>16} {row['times_ours']:7.2f} {100 * row['mfu_causal']:5.0f}%"
              f" {row['gradient_s']:11.2f} {row['optimizer_s']:12.2f} {row['peak_extra_bytes'] / 2**20:10.0f}"
              f" {off[n]:13.1e}")  # fmt: skip
    write_json(a.out or RESULTS / f"train-step-{a.device}.json", about | {
        "parameters": N, "answers": a.answers, "group": a.group, "tokens": real, "padded_tokens": a.answers * rows,
        "matmul_flops": peak, "rows": table})  # fmt: skip


if __name__ == "__main__":
    main()
