"""The embedded task: multi-step integer arithmetic in words and symbols, generated from a seed at graded difficulties.

A problem's difficulty is its number of steps, 1 to 4. Its worked solution is correct, and terse (the equations), wordy
(the same equations in sentences, more than twice as long) or hasty (the result without the work, which a small model
gets right on easy problems only). A model trained on this mix can improve: it can learn to show work where it must, and
to be brief. Train and test never share a problem: the hash of a problem's text decides its split.

    python -m lead_fast.data arithmetic --out DIR [--train 4000] [--test 256]    # the same problems as JSONL
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

LEVELS = (1, 2, 3, 4)
ONE_IN = 20  # one problem in this many is a test problem
STYLES = (0.15, 0.25, 0.6)  # fractions of terse, wordy and hasty solutions
NAMES = "Mia Tom Ana Leo Sam Eva Ben Zoe Max Ida".split()
THINGS = "apples coins books cards shells stamps pens stones".split()
ASK = ("Compute {}.", "What is {}?", "Work out {}.")
CLAUSES = {"+": ("add {}", "plus {}"), "-": ("subtract {}", "minus {}"), "*": ("times {}",)}
STORY = {
    "+": ("finds {}", "buys {}", "gets {}"),
    "-": ("gives away {}", "loses {}", "sells {}"),
    "*": ("ends up with {} times as many",),
}
VERB = {"+": "add", "-": "subtract", "*": "multiply by"}
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


Step = tuple[str, int, int, int]  # operator, operand, value before, value after


def make_problems(n: int, *, seed: int, split: str = "train", difficulties: Sequence[int] = LEVELS) -> list[dict]:
    """Make `n` distinct problems of one split.

    Args:
        n: number of problems.
        seed: equal seeds give equal problems, on every machine.
        split: "train" or "test".
        difficulties: numbers of steps, drawn uniformly.
    Returns:
        rows with problem, answer (the reference), difficulty and solution.
    """
    rng = random.Random(f"{seed} {split}")
    seen: set[str] = set()
    rows: list[dict] = []
    while len(rows) < n:
        start, steps, value = steps_of(rng, rng.choice(difficulties))
        text = problem_text(rng, start, steps)
        solution = rng.choices((_terse, _wordy, _hasty), STYLES)[0](start, steps, value)
        if text not in seen and is_test(text) == (split == "test"):
            seen.add(text)
            rows.append({"problem": text, "answer": str(value), "difficulty": float(len(steps)), "solution": solution})
    return rows


def is_test(text: str) -> bool:
    """Whether a problem is held out, decided by its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % ONE_IN == 0


def steps_of(rng: random.Random, level: int) -> tuple[int, list[Step], int]:
    """Draw a start value and `level` steps from it; returns the start, the steps and the final value."""
    start = value = rng.randint(10, 60)
    steps: list[Step] = []
    for _ in range(level):
        choices = ["+"] * 4 * (value < 70) + ["-"] * 4 * (value > 12) + ["*"] * (value <= 45)
        op = rng.choice(choices)
        if op == "+":
            n = _operand(rng, 30)
            after = value + n
        elif op == "-":
            n = _operand(rng, min(30, value - 1))
            after = value - n
        else:
            n, after = 2, value * 2
        steps.append((op, n, value, after))
        value = after
    return start, steps, value


def _operand(rng: random.Random, most: int) -> int:
    return rng.randint(2, 9) if most < 10 or rng.random() < 0.75 else rng.randint(10, most)


def problem_text(rng: random.Random, start: int, steps: list[Step]) -> str:
    """Ask for the value after the steps: in symbols, as instructions, or as a story."""
    kind = rng.random()
    if kind < 0.4:
        text = str(start)
        for op, n, _, _ in steps:
            text = f"({text}){op}{n}" if op == "*" and not text.isdigit() else f"{text}{op}{n}"
        return rng.choice(ASK).format(text)
    if kind < 0.7:
        return f"Start with {start}, " + ", ".join(rng.choice(CLAUSES[op]).format(n) for op, n, _, _ in steps) + "."
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    events = ", ".join(rng.choice(STORY[op]).format(n) for op, n, _, _ in steps)
    return f"{name} has {start} {thing}, {events}. How many {thing} now?"


def _terse(start: int, steps: list[Step], value: int) -> str:
    return "\n".join(f"{a}{op}{n}={b}" for op, n, a, b in steps) + f"\n\\boxed{{{value}}}"


def _wordy(start: int, steps: list[Step], value: int) -> str:
    text = f"We start with {start}."
    for i, (op, n, a, b) in enumerate(steps):
        text += f"\n{'Next' if i else 'First'} we {VERB[op]} {n}, which gives us\n{a}{op}{n}={b}"
    return text + f"\nSo after all these steps the final answer is\n\\boxed{{{value}}}"


def _hasty(start: int, steps: list[Step], value: int) -> str:
    return f"We start with {start}.\nSo after all these steps the final answer is\n\\boxed{{{value}}}"


def build_tokenizer(folder: Path | None = None):
    """Build a byte-level BPE tokenizer on this task's words, with one token per digit; it encodes any text.

    Decoding restores the text exactly; loaded by AutoTokenizer it becomes Qwen2's class, which composes accents first
    (NFC) and whose padding token here is `<|endoftext|>`.

    Args:
        folder: where to save it in Hugging Face layout, or None.
    Returns:
        the transformers tokenizer, with a chat template; <|end|> ends the assistant's turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    pad, _, _, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, eos_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _corpus() -> Iterator[str]:
    for row in make_problems(5000, seed=0):
        yield f"{row['problem']}\n{row['solution']}"


def architecture(vocabulary: int):
    """The embedded model: Qwen2, 4 layers, hidden 128, 2 heads of 64 (a size that all engines' attention supports)."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
