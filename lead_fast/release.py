"""Turn an export into a release: add generation settings and a model card to weights, tokenizer and chat template.

python -m lead_fast.release RUN_DIR [--evaluation DIR ...]     # rewrites the card, with evaluations in it
python -m lead_fast.release RUN_DIR --push_to_hub OWNER/NAME   # and uploads it to a private repository
"""

import argparse
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

PACKAGES = ("lead-fast", "torch", "transformers", "triton", "vllm", "math-verify", "datasets")


def generation_config(folder: Path, *, temperature: float, min_p: float, max_new_tokens: int | None) -> None:
    """Set how the model is meant to be sampled; its end-of-sequence tokens and all other settings are kept."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key in ("top_k", "top_p", "do_sample", "temperature", "min_p"):
        settings.pop(key, None)
    settings |= {"do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature} | ({"min_p": min_p} if min_p else {})
    if max_new_tokens:
        settings["max_new_tokens"] = max_new_tokens
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the installed packages that the model was trained with."""
    out = {}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def card(run: Path, evaluations: list[Path]) -> str:
    """The model card of a run, in Markdown: recipe, data with its manifest, metrics, evaluations, versions."""
    text = (run / "config.toml").read_text(encoding="utf-8")
    c: dict[str, Any] = tomllib.loads(text)
    base = c["model"]["path"]
    on_hub = not Path(base).exists() and "/" in base
    head = ["---", "library_name: transformers", *([f"base_model: {base}"] if on_hub else []), "---"]
    out = [*head, "", f"# {run.resolve().name}", ""]
    out.append(f"Trained by lead-fast from `{base}` with recipe `{c['recipe']}`" +
               (f" and preset `{c['preset']}`." if c.get("preset") else "."))  # fmt: skip
    ask = c["data"]["instruction"]
    out += ["", "One user turn, no system turn: the problem" + (f", and on a line of its own: `{ask}`" if ask else ".")]
    out += ["", "## Data", ""]
    for split in ("train", "test"):
        source = c["data"][split]
        out.append(f"- {split}: `{source}`")
        beside = Path(source).with_suffix(".manifest.json")
        if beside.is_file():
            out += ["", "```json", beside.read_text(encoding="utf-8").strip(), "```", ""]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    out += ["", "## Metrics of the run", "", f"{max((r['step'] for r in records), default=0)} steps.", ""]
    for r in [r for r in records if r.get("pass_at_1") is not None or r.get("validation_loss") is not None]:
        shown = {k: r[k] for k in ("pass_at_1", "pass_at_1_ci", "length_correct", "validation_loss") if r.get(k)}
        out.append(f"- step {r['step']}: " + ", ".join(f"{k} {_short(v)}" for k, v in shown.items()))
    steps = [r for r in records if r.get("kind") == "train"]
    for r in (steps[0], steps[-1]) if steps else ():
        shown = {k: r[k] for k in ("accuracy", "length_correct", "reward_mean") if r.get(k) is not None}
        out.append(f"- batch of step {r['step']}: " + ", ".join(f"{k} {_short(v)}" for k, v in shown.items()))
    for folder in evaluations:
        if not (folder / "table.md").is_file():
            raise ValueError(f"{folder} has no table.md: give the --output of a lead_fast.evaluate run.")
        out += ["", f"## Evaluation: {folder.name}", "", (folder / "table.md").read_text(encoding="utf-8").strip()]
    out += ["", "## Versions", "", *(f"- {k} {v}" for k, v in versions().items())]
    return "\n".join([*out, "", "## Configuration", "", "```toml", text.strip(), "```", ""])


def _short(value: float | list[float]) -> str:
    return f"[{', '.join(f'{v:.4g}' for v in value)}]" if isinstance(value, list) else f"{value:.4g}"


def release(run: Path, evaluations: list[Path] | None = None) -> Path:
    """Write generation settings and the card (README.md) into RUN_DIR/final; returns that folder.

    Raises:
        ValueError: the run has no export yet.
    """
    folder = run / "final"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{run} has no final/config.json: let the run finish, or resume it with --resume.")
    c = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    if "evaluate" in c:  # an RL run; SFT keeps the base model's settings
        e = c["evaluate"]
        generation_config(folder, temperature=e["temperature"], min_p=e["min_p"], max_new_tokens=None)
    (folder / "README.md").write_text(card(run, evaluations or []), encoding="utf-8")
    return folder


REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_repository(name: str) -> None:
    """Refuse a repository name that the hub does not allow; it must be OWNER/NAME.

    Raises:
        ValueError: one sentence with the name.
    """
    last = name.rpartition("/")[2]
    if not REPOSITORY.fullmatch(name) or ".." in name or "--" in name or last[-1] in ".-" or last.endswith(".git"):
        raise ValueError(
            f"--push_to_hub is {name!r}: give OWNER/NAME, of letters, digits, `.`, `_` and `-` (up to 96 each)."
        )


def push_to_hub(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a release and return its address.

    huggingface_hub itself finds the token, in HF_TOKEN or where `hf auth login` stores it; this code never sees it.

    Args:
        folder: the folder that `release` returned.
        repository: OWNER/NAME; created if it does not exist. An existing one keeps its visibility.
        private: whether a new repository is private.
    Raises:
        ValueError: the name is not valid, there is no token, or the hub refuses.
    """
    check_repository(repository)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    client_error = cast(
        type[Exception], HfHubHTTPError.__bases__[0]
    )  # raised by the HTTP client that this version of huggingface_hub uses
    api = HfApi()
    try:
        api.whoami()
        url = api.create_repo(repository, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, repo_type="model", commit_message="Release by lead-fast"
        )
    except LocalTokenNotFoundError as e:
        raise ValueError("--push_to_hub needs a hub token: set HF_TOKEN, or run `hf auth login`.") from e
    except HfHubHTTPError as e:
        code = e.response.status_code if e.response is not None else "no status"
        raise ValueError(
            f"The hub refused {repository} ({code}): check the name, and whether the token may write to it."
        ) from e
    except (OSError, client_error) as e:  # no network
        raise ValueError(f"{repository} cannot be uploaded ({type(e).__name__}): check the network.") from e
    return str(url)


def main(args: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m lead_fast.release", description=(__doc__ or "").splitlines()[0])
    p.add_argument("run_dir", type=Path)
    p.add_argument("--evaluation", type=Path, nargs="+", default=[], help="output folders of lead_fast.evaluate")
    p.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the release to the Hugging Face hub")
    p.add_argument("--public", action="store_true", help="with --push_to_hub: a new repository is public, not private")
    a = p.parse_args(args)
    try:
        if a.push_to_hub is not None:
            check_repository(a.push_to_hub)
        print(folder := release(a.run_dir, a.evaluation))
        if a.push_to_hub is not None:
            print(push_to_hub(folder, a.push_to_hub, private=not a.public))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
