r"""Show a model's text as HTML: everything escaped, invisible characters made visible, mathematics as MathML.

The text comes from a policy in training, so markup, characters that change the writing direction, lone surrogates and a
megabyte without a line break must all be expected; none of them may have any effect but being seen.
"""

import html
import re
from collections.abc import Sequence

import numpy as np

from ..runtime.rollouts import KeptSample
from .mathml import mathml

MOST = 20_000  # characters of a response on the page of its group
WHOLE = 60_000  # characters of a response on its own page
MOST_TOKENS = 2_000
WHOLE_TOKENS = 8_000

# Control characters, direction marks, zero-width characters, lone surrogates, noncharacters.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
# Display and inline mathematics, and a box outside it. Bounded, so that a text of dollar signs takes linear time.
MATH = re.compile(
    r"\$\$(?P<a>[^$]{1,3000})\$\$|\\\[(?P<b>(?:[^\\]|\\(?!\])){1,3000})\\\]|\\\((?P<c>(?:[^\\]|\\(?!\))){1,1500})\\\)"
    r"|(?<![\\\w])\$(?P<d>[^\s$](?:[^$\n]{0,400}[^\s$\\])?)\$(?!\d)"
    r"|(?P<f>\\begin\{(?P<g>(?:align|gather|equation)\*?)\}.{1,2900}?\\end\{(?P=g)\})"
    r"|(?P<e>\\boxed\{(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]{0,80}\}){0,200}\}){1,400}\})",
    re.DOTALL,
)


def shown(text: str) -> str:
    """Escape text for HTML; invisible characters appear as their code points."""
    return UNSEEN.sub(lambda m: f'<i class="unseen">U+{ord(m[0]):04X}</i>', html.escape(text))


def rich(text: str) -> str:
    """`shown` with mathematics rendered; an unknown formula is shown as source."""
    out, at = [], 0
    for m in MATH.finditer(text):
        source = m["a"] or m["b"] or m["c"] or m["d"] or m["e"] or m["f"]
        block = bool(m["a"] or m["b"] or m["f"])
        rendered = None if UNSEEN.search(source) else mathml(source, block=block)
        if rendered is not None:
            before = text[at : m.start()]
            out += [shown(before.removesuffix("\n") if block else before), rendered]
            at = m.end() + (block and text.startswith("\n", m.end()))  # display mathematics has its own line
    return "".join([*out, shown(text[at:])])


# ------------------------------------------------------------------------------------------------------------ tokens


COLOURS = {"gap": "log-prob gap", "weight": "importance weight", "entropy": "entropy"}
STEPS = {
    "gap": (0.01, 0.03, 0.1, 0.3, 1.0),  # |nats|
    "weight": (0.05, 0.1, 0.25, 0.5, 1.0),  # |weight - 1|
    "entropy": (0.05, 0.2, 0.5, 1.0, 2.0),  # nats
}
LEGENDS = {
    "gap": "log-prob by the trainer minus log-prob by the engine: <span class='n3'>below</span> "
    "<span class='p3'>above</span>, in steps of 0.01, 0.03, 0.1, 0.3 and 1 nat",
    "weight": "e to the gap, the weight before any cap: <span class='n3'>below 1</span> <span class='p3'>above 1</span>"
    ", in steps of 0.05, 0.1, 0.25, 0.5 and 1",
    "entropy": "of the trainer's distribution: <span class='e2'>some</span> <span class='e5'>much</span>, in steps of "
    "0.05, 0.2, 0.5, 1 and 2 nats",
}


def token_values(sample: KeptSample, colour: str) -> np.ndarray | None:
    """The value that a colour shows for each token; None if the response was not trained on."""
    if sample.gap is None or sample.entropy is None:
        return None
    gap = sample.gap.astype(np.float32)
    return {"gap": gap, "weight": np.exp(np.clip(gap, -80, 80)), "entropy": sample.entropy.astype(np.float32)}[colour]


def coloured(pieces: Sequence[str], values: np.ndarray, colour: str) -> str:
    """Tokens with their value as background and tooltip, as source, because MathML cannot be split into tokens."""
    center = 1.0 if colour == "weight" else 0.0
    out = []
    for piece, value in zip(pieces, values.tolist(), strict=True):
        level = sum(abs(value - center) >= step for step in STEPS[colour])
        kind = "e" if colour == "entropy" else "n" if value < center else "p"
        mark = f' class="{kind}{level}"' if level else ""
        number = "not a number" if np.isnan(value) else f"{value:.3g}"
        out.append(f'<span{mark} title="{number}">{shown(piece)}</span>')
    return "".join(out)


class Pieces:
    """Map token ids to their texts by the tokenizer that the run keeps; None if it keeps none."""

    def __init__(self, path: str):
        from tokenizers import Tokenizer  # here, so that a page without colours need not wait for it

        self.tokenizer = Tokenizer.from_file(path)

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """One text per token; if several tokens make up a character, the last one gets it."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self.tokenizer, int(i)) or "" for i in token_ids]
