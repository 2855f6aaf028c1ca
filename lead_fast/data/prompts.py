"""Problems to token ids, by the tokenizer's chat template."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..config import Config, DataConfig
from ..records import Problem
from .read import load_problems, say

# ------------------------------------------------------------------------------------------------------------- prompts


Prompts = tuple[list[Problem], list[list[int]]]  # problems, and the token ids of each one's prompt


def tokenize_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    instruction: str,
    max_prompt_tokens: int,
    drop_long: bool = False,
    template: dict[str, Any] | None = None,
) -> tuple[list[Problem], list[list[int]]]:
    """Each problem as one user turn, through the model's own chat template, ready for the assistant's turn.

    A problem cannot end its turn: a control token's name in it (`<|im_end|>`) is encoded as the text that it is.

    Args:
        instruction: put behind the problem, on a line of its own; empty: nothing.
        max_prompt_tokens: limit, the template's tokens included.
        drop_long: leave out problems over the limit and say how many, instead of raising.
        template: arguments of the chat template.
    Returns:
        the problems kept and their prompts' token ids.
    Raises:
        ValueError: no chat template, or a prompt over the limit.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template: add chat_template.jinja to the model's folder.")

    for name in template or {}:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise ValueError(f"data.template.{name} is given, and the model's chat template has no {name}: remove it.")

    def render(problem: str) -> str:
        turn = f"{problem}\n{instruction}" if instruction else problem
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True, **(template or {})
        )

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = [render(p.problem) for p in problems]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    control = control_tokens(tokenizer)
    before, _, after = render(HOLE).partition(HOLE)
    around = encode(before), encode(after)
    own = sum(t in control.values() for ids in around for t in ids)
    for i, ids in enumerate(prompts):
        if sum(t in control.values() for t in ids) != own:
            prompts[i] = [*around[0], *encode_plain(problems[i].problem, control, encode), *around[1]]
    long = [i for i, ids in enumerate(prompts) if len(ids) > max_prompt_tokens]
    if long and not drop_long:
        i = max(long, key=lambda i: len(prompts[i]))
        raise ValueError(
            f"Problem {problems[i].id} has a prompt of {len(prompts[i])} tokens and data.max_prompt_tokens is "
            f"{max_prompt_tokens}: raise it, or leave such problems out with --data.drop_long_prompts."
        )
    if long:
        say(f"{len(long)} of {len(problems)} problems left out: prompt over {max_prompt_tokens} tokens.")
    keep = [i for i in range(len(prompts)) if len(prompts[i]) <= max_prompt_tokens]
    return [problems[i] for i in keep], [prompts[i] for i in keep]


HOLE = "(the problem stands here)"


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Names and ids of the tokens that are no text: the special ones, and added ones in brackets, such as `<think>`."""
    added = tokenizer.added_tokens_decoder.items()
    bracketed = re.compile(r"<.+>|\[.+\]", re.S)
    return {t.content: i for i, t in added if len(t.content) > 1 and (t.special or bracketed.fullmatch(t.content))}


def encode_plain(text: str, control: dict[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """Token ids of a text in which the names of control tokens are just text: it is cut inside each of them."""
    names = re.compile(f"(?=({'|'.join(map(re.escape, control))}))")
    cuts = [0, *(m.start() + 1 for m in names.finditer(text)), len(text)]
    pieces = [encode(text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    return [t for ids in pieces for t in ids if t not in control.values()]


def load_prompts(c: DataConfig, tokenizer: Any, source: str, split: str, **more: Any) -> Prompts:
    """Problems of a source and their prompts; `more` goes to load_problems."""
    problems = load_problems(
        source,
        split=split,
        problem_column=c.problem_column,
        reference_column=c.reference_column,
        difficulty_column=c.difficulty_column,
        **more,
    )
    return tokenize_prompts(
        problems,
        tokenizer,
        instruction=c.instruction,
        max_prompt_tokens=c.max_prompt_tokens,
        drop_long=c.drop_long_prompts,
        template=c.template,
    )


def load_train(c: Config, tokenizer: Any) -> Prompts:
    """Training problems and their prompts. Raises ValueError for fewer problems than a step needs."""
    problems, prompts = load_prompts(c.data, tokenizer, c.data.train, "train", min_difficulty=c.data.min_difficulty)
    if len(problems) < c.rollout.problems:
        raise ValueError(
            f"{c.data.train} has {len(problems)} problems and rollout.problems is {c.rollout.problems}: "
            "give more data or a smaller batch."
        )
    return problems, prompts


def load_test(c: Config, tokenizer: Any) -> Prompts:
    """Held-out problems and their prompts; those over the prompt limit are refused as in training."""
    return load_prompts(c.data, tokenizer, c.data.test, "test", limit=c.evaluate.problems or None)
