"""Turn problems into token ids by the tokenizer's chat template."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError

from ..config import Config, DataConfig
from ..records import Problem
from ..runtime.ranks import Ranks
from .read import BENCHMARKS, load_problems, say
from .references import verifiable

# ------------------------------------------------------------------------------------------------------------- prompts


Prompts = tuple[list[Problem], list[list[int]]]  # problems, and the token ids of each one's prompt
Turns = list[tuple[str, str]]  # role and text of each message, the last one the user's

ASKS_FOR_BOX = re.compile(r"(?is)\b(?:answer|response|result|within|inside|enclosed?)\b.{0,100}?\\(?:boxed|fbox)\b")
ASKS_OTHERWISE = re.compile(r"(?i)\bAnswer: ?\$|\"Answer:\"|\"####\"|after ####|<answer>")


def tokenize_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    instruction: str,
    max_prompt_tokens: int,
    drop_long: bool = False,
    template: dict[str, Any] | None = None,
) -> tuple[list[Problem], list[list[int]]]:
    r"""Tokenize each problem, as a user's turn or its own messages, by the model's chat template, up to the assistant.

    A problem cannot end its turn: a control token's name in it (`<|im_end|>`) is encoded as plain text.

    Args:
        instruction: appended to the last turn, on a separate line; empty: nothing. One that asks for \boxed{} is not
            appended to a prompt that asks for it already, as prompts of verl's and Skywork's sets do.
        max_prompt_tokens: limit, the template's tokens included.
        drop_long: leave out problems over the limit and say how many, instead of raising.
        template: arguments for the chat template.
    Returns:
        the problems kept, and their prompts' token ids.
    Raises:
        ValueError: there is no chat template, it refuses a problem's messages, or a prompt is over the limit.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template: add chat_template.jinja to the model's folder.")
    turns, behind = ask(problems, instruction)

    for name in template or {}:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise ValueError(f"data.template.{name} is given, but the model's chat template has no {name}: remove it.")

    def render(chat: Turns, behind: str) -> str:
        messages = [{"role": role, "content": text} for role, text in chat]
        messages[-1]["content"] += behind
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(template or {}))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = []
    for p, chat, end in zip(problems, turns, behind, strict=True):
        try:
            texts.append(render(chat, end))
        except TemplateError as e:
            roles = ", ".join(role for role, _ in chat)
            raise ValueError(
                f"Problem {p.id}: the model's chat template refuses its messages ({roles}): {e}; remove that row, "
                "or move the system message's text into the user's."
            ) from e
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    control = control_tokens(tokenizer)
    named = set(control.values())
    frames: dict[tuple, tuple[list[str], int]] = {}  # by roles and appended text: the template's text, its tokens
    for i, ids in enumerate(prompts):
        roles = [role for role, _ in turns[i]]
        key = (*roles, behind[i])
        if key not in frames:
            frame = around(render([(role, HOLE.format(n)) for n, role in enumerate(roles)], behind[i]), len(roles))
            frames[key] = frame, sum(t in named for piece in frame for t in encode(piece))
        frame, own = frames[key]
        if sum(t in named for t in ids) != own:
            prompts[i] = encode_between(frame, [text for _, text in turns[i]], control, encode, problems[i].id)
    long = [i for i, ids in enumerate(prompts) if len(ids) > max_prompt_tokens]
    if long and not drop_long:
        i = max(long, key=lambda i: len(prompts[i]))
        raise ValueError(
            f"Problem {problems[i].id} has a prompt of {len(prompts[i])} tokens, but data.max_prompt_tokens is "
            f"{max_prompt_tokens}: raise it, or leave such problems out with --data.drop_long_prompts."
        )
    if long:
        say(f"{len(long)} of {len(problems)} problems are left out: prompt over {max_prompt_tokens} tokens.")
    keep = [i for i in range(len(prompts)) if len(prompts[i]) <= max_prompt_tokens]
    return [problems[i] for i in keep], [prompts[i] for i in keep]


def ask(problems: Sequence[Problem], instruction: str) -> tuple[list[Turns], list[str]]:
    """Every problem's turns, and the part of the instruction appended to the last one; says where prompts differ."""
    boxed = "\\boxed" in instruction
    turns = [list(p.messages or [("user", p.problem)]) for p in problems]
    asking = [boxed and any(ASKS_FOR_BOX.search(text) for _, text in chat) for chat in turns]
    if n := sum(asking):
        say(f"{n:,} of {len(turns):,} prompts ask for \\boxed{{}} themselves: data.instruction is not appended.")
    others = [chat for asks, chat in zip(asking, turns, strict=True) if not asks and ASKS_OTHERWISE.search(chat[-1][1])]
    if others:
        remedy = "data.instruction asks for it too" if boxed else "nothing asks for it, so set data.instruction"
        say(
            f"{len(others):,} of {len(turns):,} prompts ask for the answer in a form other than the \\boxed{{}} "
            f"that is graded; {remedy}."
        )
    return turns, ["" if asks or not instruction else f"\n{instruction}" for asks in asking]


HOLE = "(the text of message {} stands here)"


def around(rendered: str, messages: int) -> list[str]:
    """The text before, between and behind the holes of a rendered chat."""
    return re.split("|".join(re.escape(HOLE.format(n)) for n in range(messages)), rendered)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Names and ids of tokens that are not text: special tokens, and added ones in brackets, such as `<think>`."""
    added = tokenizer.added_tokens_decoder.items()
    bracketed = re.compile(r"<.+>|\[.+\]", re.S)
    return {t.content: i for i, t in added if len(t.content) > 1 and (t.special or bracketed.fullmatch(t.content))}


def encode_between(
    frame: list[str], texts: list[str], control: dict[str, int], encode: Callable[[str], list[int]], problem: str
) -> list[int]:
    """Token ids of a chat whose texts hold names of control tokens: the template's pieces, and its texts as text."""
    if len(frame) != len(texts) + 1:
        raise ValueError(
            f"Problem {problem} contains a control token's name, but the chat template changes or reorders its "
            "messages: remove the row."
        )
    ids = encode(frame[0])
    for text, piece in zip(texts, frame[1:], strict=True):
        ids += [*encode_plain(text, control, encode), *encode(piece)]
    return ids


def encode_plain(text: str, control: dict[str, int], encode: Callable[[str], list[int]]) -> list[int]:
    """Token ids of a text in which names of control tokens are plain text: it is cut inside each of them."""
    names = re.compile(f"(?=({'|'.join(map(re.escape, control))}))")
    cuts = [0, *(m.start() + 1 for m in names.finditer(text)), len(text)]
    pieces = [encode(text[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
    return [t for ids in pieces for t in ids if t not in control.values()]


# -------------------------------------------------------------------------------------------------------------- loading


def read_problems(c: DataConfig, source: str, split: str, **more: Any) -> list[Problem]:
    """Read a source's problems by the configuration's columns, including rows without a reference."""
    return load_problems(
        source,
        split=split,
        problem_column=c.problem_column,
        reference_column=c.reference_column,
        difficulty_column=c.difficulty_column,
        empty_references=True,
        **more,
    )


def load_prompts(
    c: DataConfig,
    tokenizer: Any,
    source: str,
    split: str,
    ranks: Ranks | None = None,
    *,
    graded: bool = True,
    **more: Any,
) -> Prompts:
    """Load a source's problems and their prompts. A collective if `ranks` are given.

    Args:
        graded: whether responses are compared with references, so that each must be one that an answer can equal.
        more: passed to load_problems.
    """
    problems = read_problems(c, source, split, **more)
    if graded:
        benchmark = source.lower() in map(str.lower, BENCHMARKS)
        problems = verifiable(source, problems, drop=c.drop_unverifiable, keep=benchmark, ranks=ranks)
    return tokenize_prompts(
        problems,
        tokenizer,
        instruction=c.instruction,
        max_prompt_tokens=c.max_prompt_tokens,
        drop_long=c.drop_long_prompts,
        template=c.template,
    )


def load_train(c: Config, tokenizer: Any, ranks: Ranks | None = None, **more: Any) -> Prompts:
    """Load the training problems and their prompts. A collective if `ranks` are given.

    Args:
        more: `graded` and `keep_columns`, for load_prompts and load_problems.
    Raises:
        ValueError: the data cannot be read or graded, or has fewer problems than a step needs.
    """
    source = c.data.train
    problems, prompts = load_prompts(
        c.data, tokenizer, source, "train", ranks, min_difficulty=c.data.min_difficulty, **more
    )
    if len(problems) < c.rollout.problems:
        raise ValueError(
            f"{source} has {len(problems)} problems, but rollout.problems is {c.rollout.problems}: "
            "give more data or a smaller batch."
        )
    return problems, prompts


def load_test(c: Config, tokenizer: Any, ranks: Ranks | None = None, **more: Any) -> Prompts:
    """Load the held-out problems and their prompts, with the same checks. A collective if `ranks` are given."""
    return load_prompts(c.data, tokenizer, c.data.test, "test", ranks, limit=c.evaluate.problems or None, **more)
