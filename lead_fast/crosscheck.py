"""Cross-check an evaluation's grades: export its samples in lighteval's details format and let lighteval grade them.

    python -m lead_fast.evaluate --lighteval DIR [--python=FILE] [--output=DIR]

DIR is an output folder of `lead_fast.evaluate`. The export, details/MODEL/DATE/details_TASK_DATE.parquet, can be loaded
by lighteval with its option to read responses from details. Grading uses lighteval's extractive match and needs
lighteval 0.11 or later in a separate environment, because it pins another latex2sympy2_extended than math-verify does;
--python names that environment's interpreter. The counts and every disagreement are written as JSON, and the first
disagreements are printed.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .reward.extraction import graded_text
from .runtime.jsonl import each_jsonl
from .tables import reference

FIELDS_OF_DOC = {"instruction": None, "images": None, "specific": None, "unconditioned_query": None,
                 "original_query": None, "fewshot_samples": [], "sampling_methods": ["GENERATIVE"],
                 "fewshot_sorting_class": None, "generation_size": None, "stop_sequences": None, "use_logits": False,
                 "generation_grammar": None}  # fmt: skip
FIELDS_OF_RESPONSE = {"input_tokens": [], "output_tokens": [], "reasonings": [], "logprobs": [],
                      "argmax_logits_eq_gold": [], "logits": None, "unconditioned_logprobs": None,
                      "truncated_tokens_count": 0, "padded_tokens_count": 0}  # fmt: skip
SHOWN = 20

# Runs in lighteval's own environment: reads a details file and prints a line of verdicts per problem. The settings are
# those of lighteval's own mathematics tasks (avg_at_n_math).
GRADER = """
import json, sys
import pyarrow.parquet as parquet
import lighteval
from importlib.metadata import version
from lighteval.metrics.dynamic_metrics import (
    ExprExtractionConfig, LatexExtractionConfig, MultilingualExtractiveMatchMetric)
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
both = [ExprExtractionConfig(), LatexExtractionConfig()]
metric = MultilingualExtractiveMatchMetric(gold_extraction_target=both, pred_extraction_target=both, precision=6)
print(json.dumps({"lighteval": version("lighteval")}), flush=True)
for row in parquet.read_table(sys.argv[1]).to_pylist():
    doc, texts = row["doc"], row["model_response"]["text_post_processed"] or row["model_response"]["text"]
    out = []
    for text in texts:
        asked = Doc(query=doc["query"], choices=doc["choices"], gold_index=doc["gold_index"], specific=None)
        out.append(bool(metric.compute(asked, ModelResponse(text=[text]))))
    print(json.dumps(out), flush=True)
"""


def lighteval_reference(text: str) -> str:
    """Format a reference so that lighteval extracts it: a plain number as it is, anything else between dollar signs."""
    return text if re.fullmatch(r"-?\d+(?:\.\d+)?", text) or "$" in text or "\\boxed" in text else f"${text}$"


def details(rows: list[dict[str, Any]], task: str, where: str) -> list[dict[str, Any]]:
    """Problems of samples.jsonl as lighteval's details: a row per problem, with its Doc, ModelResponse and metrics."""
    out = []
    for row in rows:
        gold, texts = lighteval_reference(reference(row)), row["texts"]
        graded = [graded_text(t, where) for t in texts] if where != "all" else None
        out.append({
            "doc": FIELDS_OF_DOC | {"query": row["problem"], "choices": [gold], "gold_index": 0, "id": row["id"],
                                    "task_name": task, "num_samples": len(texts)},
            "metric": {f"avg@n:n={len(texts)}": sum(row["correct"]) / len(texts)},
            "model_response": FIELDS_OF_RESPONSE | {"input": row["problem"], "text": texts,
                                                    "text_post_processed": graded},
        })  # fmt: skip
    return out


def export(folder: Path, output: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Write the details of an evaluation; returns the file and the rows of samples.jsonl. Raises ValueError."""
    import pyarrow as pa
    from pyarrow import parquet

    samples = folder / "samples.jsonl"
    if not samples.is_file() or not (folder / "evaluation.json").is_file():
        raise ValueError(f"{folder} is not a finished evaluation: give the --output of a lead_fast.evaluate run.")
    head, *rows = each_jsonl(samples)
    if not rows or not all(r["texts"] for r in rows):
        raise ValueError(f"{samples} holds no responses: evaluate again with this version.")
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    asked = head.get("asked", {})
    date = datetime.datetime.now().isoformat().replace(":", "-")
    task = f"{Path(str(record['data'])).stem.lower().replace(':', '-')}|0"
    place = output / "details" / str(record["model"]).strip("/") / date
    place.mkdir(parents=True)
    file = place / f"details_{task}_{date}.parquet"
    parquet.write_table(pa.Table.from_pylist(details(rows, task, asked.get("reward.grade", "all"))), file)
    return file, rows


def grade_by_lighteval(file: Path, python: str) -> tuple[str, list[list[bool]]]:
    """lighteval's version and its verdicts by problem and sample. Raises ValueError if it is not installed."""
    done = subprocess.run([python, "-c", GRADER, str(file)], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2][:300]
        raise ValueError(
            f"{python} cannot grade with lighteval ({reason}): make an environment for it (python -m venv DIR, then "
            "DIR/bin/pip install lighteval) and name its interpreter with --python=DIR/bin/python."
        )
    head, *verdicts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    return head["lighteval"], verdicts


def compare(rows: list[dict[str, Any]], theirs: list[list[bool]]) -> dict[str, Any]:
    """Counts of agreement, and every sample on which the two graders differ."""
    counts = {"both correct": 0, "both wrong": 0, "ours alone correct": 0, "lighteval's alone correct": 0}
    differ = []
    for row, verdicts in zip(rows, theirs, strict=True):
        for i, (ours, other) in enumerate(zip(row["correct"], verdicts, strict=True)):
            names = {(True, True): "both correct", (False, False): "both wrong", (True, False): "ours alone correct"}
            counts[names.get((ours, other), "lighteval's alone correct")] += 1
            if ours != other:
                differ.append({
                    "id": row["id"], "sample": i, "reference": reference(row),
                    "extracted": row["extracted"][i], "ours": ours, "lighteval": other,
                    "truncated": row["truncated"][i], "end": row["texts"][i][-200:],
                })  # fmt: skip
    total = sum(counts.values())
    return {"samples": total, "agreement": 1 - len(differ) / total, "counts": counts, "disagreements": differ}


def report(comparison: dict[str, Any]) -> str:
    """Format the comparison for the screen."""
    lines = [
        f"lighteval {comparison['lighteval']} and this project agree on {100 * comparison['agreement']:.2f} % of "
        f"{comparison['samples']} samples: "
        + ", ".join(f"{n} {what}" for what, n in comparison["counts"].items())
        + "."
    ]
    for d in comparison["disagreements"][:SHOWN]:
        lines.append(
            f"- problem {d['id']}, sample {d['sample']}: reference {d['reference']!r}, extracted "
            f"{d['extracted']!r}, ours {d['ours']}, lighteval's {d['lighteval']}; ends {d['end'][-60:]!r}"
        )
    if len(comparison["disagreements"]) > SHOWN:
        lines.append(f"- and {len(comparison['disagreements']) - SHOWN} more in crosscheck.json")
    return "\n".join(lines)  # fmt: skip


def main(args: list[str]) -> None:
    p = argparse.ArgumentParser(prog="python -m lead_fast.evaluate", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--lighteval", type=Path, metavar="DIR", required=True, help="output folder of an evaluation")
    p.add_argument("--python", default=sys.executable, help="interpreter of the environment that has lighteval")
    p.add_argument("--output", type=Path, help="folder to write to; default: DIR itself")
    a = p.parse_args(args)
    output = a.output or a.lighteval
    file, rows = export(a.lighteval, output)
    print(f"Details: {file}", flush=True)
    if all(reference(r).startswith("tests ") for r in rows):
        raise ValueError(f"{a.lighteval} holds programs, which lighteval cannot grade; they were only exported.")
    version, theirs = grade_by_lighteval(file, a.python)
    comparison = {"lighteval": version} | compare(rows, theirs)
    (output / "crosscheck.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    print(report(comparison))
