"""Convert command lines and TOML files into a configuration, and a configuration into TOML and help text.

Later sources win: the defaults of config.py <- recipe (TOML, over the preset it names) <- `--preset` (TOML) <-
`--section.key=value`. Every value is checked once, before any model is loaded; a mistake is reported in one sentence
that names the value and the remedy.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import os
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .config import Config, Range, SftConfig

RECIPES = Path(__file__).parent / "recipes"
PRESETS = Path(__file__).parent / "presets"


# ---------------------------------------------------------------------------------------------------------- loading


def names(folder: Path) -> list[str]:
    """Names of the TOML files in a folder, sorted."""
    return sorted(p.stem for p in folder.glob("*.toml"))


def keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, such as `rollout.group_size`."""
    out = []
    for f in dataclasses.fields(cls):
        if f.metadata.get("computed"):  # set by the trainer itself
            continue
        if dataclasses.is_dataclass(f.type):
            out += keys(f.type, f"{prefix}{f.name}.")
        else:
            out.append(prefix + f.name)
    return out


def ranges(cls: Any = Config) -> dict[str, Range]:
    """The range of every number, by dotted key."""
    return {key: allowed for key in keys(cls) if (allowed := range_of(key, cls))}


def range_of(key: str, cls: Any = Config) -> Range | None:
    """The range declared beside a key's type or in its section's RANGES; None if there is none."""
    section, _, name = key.rpartition(".")
    inherited = getattr(type_of(section, cls), "RANGES", {}) if section else {}
    return next((x for x in get_args(type_of(key, cls)) if isinstance(x, Range)), inherited.get(name))


def type_of(key: str, cls: Any = Config) -> Any:
    """The declared type of a dotted key, such as Annotated[int, Range(...)]."""
    for part in key.split("."):
        cls = get_type_hints(cls, include_extras=True)[part]
    return cls


def bare(kind: Any) -> Any:
    """A type without its range."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def unknown_key(key: str, where: str, cls: Any) -> ValueError:
    known = keys(cls)
    near = difflib.get_close_matches(key, known, 1, 0.5) or difflib.get_close_matches(
        key.split(".")[-1], [k.split(".")[-1] for k in known], 1, 0.6
    )
    near = [k for k in known if near and (k == near[0] or k.endswith("." + near[0]))][:1]
    hint = f"did you mean {near[0]}?" if near else "--help lists every key."
    return ValueError(f"Unknown configuration key {key} in {where}: {hint}")


def read_toml(name: str, folder: Path, kind: str, cls: Any = Config) -> dict[str, Any]:
    """Read a shipped recipe or preset by name, or any TOML file by path, into nested dicts; refuse unknown keys."""
    path = folder / f"{name}.toml" if name in names(folder) else Path(name)
    if not path.is_file():
        raise ValueError(
            f"No {kind} named {name!r}: give one of {', '.join(names(folder))}, or the path of a TOML file."
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path} is not valid TOML: {e}.") from e
    for leaf in _leaves(tree, keys(cls)):
        if leaf not in keys(cls):
            raise unknown_key(leaf, path.name, cls)
    return tree


def _leaves(tree: dict[str, Any], known: list[str], prefix: str = "") -> list[str]:
    """Dotted keys of nested dicts, down to a known key or to a value that is not a dict."""
    out = []
    for k, v in tree.items():
        section = isinstance(v, dict) and prefix + k not in known
        out += _leaves(v, known, f"{prefix}{k}.") if section else [prefix + k]
    return out


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for k, v in over.items():
        out[k] = merge(out.get(k, {}), v) if isinstance(v, dict) else v
    return out


def from_tree(tree: dict[str, Any], cls: Any = Config) -> Any:
    """Convert nested dicts to a Config and check each value's type; an error names the key."""
    import pydantic

    for key in keys(cls):
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, bool) and is_number(type_of(key, cls)):  # pydantic would accept true as 1
            raise ValueError(f"{key} is {json.dumps(value)}: give {wanted(key, cls)}.")
    try:
        return pydantic.TypeAdapter(cls).validate_python(tree)
    except pydantic.ValidationError as e:
        err = e.errors()[0]
        key = ".".join(str(p) for p in err["loc"] if isinstance(p, str))
        if refused := err.get("ctx", {}).get("error"):  # a section's own check; its sentence begins with the field
            said, _, _ = f"{key}.{refused}".partition(": give ")
            name = said.split(" is ")[0]
            raise ValueError(f"{said}: give {wanted(name, cls)}." if name in ranges(cls) else f"{key}.{refused}") from e
        remedy = wanted(key, cls) if key in keys(cls) else f"keys of section {key}"
        raise ValueError(f"{key} is {err['input']!r}: give {remedy}.") from e


def wanted(key: str, cls: Any = Config) -> str:
    """Describe the values that a key accepts."""
    allowed, plain = range_of(key, cls), bare(type_of(key, cls))
    if get_origin(plain) is Literal:
        out = f"one of {', '.join(get_args(plain))}"
    elif get_origin(plain) is tuple and allowed:
        out = f"a list of {len(get_args(plain))} numbers, each {allowed}"
    elif get_origin(plain) is tuple:
        out = f"""a list of strings in quotes, as in --{key}='["a", "b"]'"""
    elif get_origin(plain) is dict:
        out = f"a JSON object, or one flag per entry, as in --{key}.NAME=VALUE"
    elif is_number(plain):
        out = f"a {'whole ' * (plain is int)}number {allowed or ''}".rstrip()
        out += f" (0: {allowed.zero})" if allowed and allowed.zero else ""
    else:
        out = "true or false" if plain is bool else "text"
    return out + ", or none" * optional(plain)


def optional(kind: Any) -> bool:
    return type(None) in get_args(kind)


def is_number(kind: Any) -> bool:
    """Whether a key of this type holds a number, a tuple of numbers, or a number or None."""
    plain = bare(kind)
    return bool({int, float} & {plain, *get_args(plain)})


SHORT = {"config": "recipe", "model": "model.path"}


def load_config(
    args: list[str] | None, *, default_recipe: str = "tiny", cls: Any = Config, about: str | None = None
) -> Any:
    """Load the configuration that a command line asks for.

    Args:
        args: such as ["--recipe", "tiny", "--rollout.group_size=4"]; None reads sys.argv. `--config FILE` is the same
            as `--recipe FILE`; `--model NAME` is short for `--model.path`.
        default_recipe: the recipe to use if none is named.
        cls: Config or SftConfig.
        about: the text that --help prints before the keys; the command's docstring.
    Raises:
        ValueError: unknown recipe, preset or key (the nearest known one is named), or a value that is not accepted.
        SystemExit: the arguments include `--help`, which has been answered.
    """
    args = [a for arg in (sys.argv[1:] if args is None else args) for a in _split(arg)]
    asks_help = "--help" in args or "-h" in args
    args = [a for a in args if a not in ("--help", "-h")]
    given: dict[str, str] = {}
    while args:
        flag = args.pop(0)
        key = flag.removeprefix("--").replace("-", "_")
        key = SHORT.get(key, key)
        if not flag.startswith("--") or not (key in keys(cls) or _dict_key(key, cls)):
            raise unknown_key(key, "the command line", cls)
        if args and not args[0].startswith("--"):
            given[key] = args.pop(0)
        elif _dict_key(key, cls) or bare(type_of(key, cls)) is bool:
            given[key] = "true"
        else:
            raise ValueError(f"{flag} needs a value, as in {flag}=VALUE.")
    recipe = given.pop("recipe", default_recipe)
    tree = read_toml(recipe, RECIPES if cls is Config else RECIPES / "sft", "recipe", cls) | {"recipe": recipe}
    if preset := given.pop("preset", ""):
        tree = merge(tree, read_toml(preset, PRESETS, "preset")) | {"preset": preset}
    elif preset := tree.get("preset", ""):  # the file's own values win, or the output of `dump` would not round-trip
        tree = merge(read_toml(preset, PRESETS, "preset"), tree)
    if asks_help:
        if os.environ.get("RANK", "0") == "0":
            print(help_text(from_tree(tree, cls), about or ""))
        raise SystemExit(0)
    for key, value in given.items():
        parsed: Any = _scalar(value) if _dict_key(key, cls) else _value(key, value, cls)
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        tree = merge(tree, parsed)
    return from_tree(tree, cls)


def named_keys(args: list[str]) -> set[str]:
    """The dotted keys that a command line's flags name."""
    return {a.split("=")[0].removeprefix("--").replace("-", "_") for a in args if a.startswith("--")}


def take_dry_run(args: list[str] | None) -> tuple[bool, list[str]]:
    """Split `--dry-run` off the arguments (None reads sys.argv); returns whether it was there, and the others."""
    args = list(sys.argv[1:] if args is None else args)
    return "--dry-run" in args, [a for a in args if a != "--dry-run"]


def _split(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--") and "=" in arg else [arg]


def _value(key: str, text: str, cls: Any) -> Any:
    """The value that a command line sets for a key. Raises ValueError for a list that is not valid JSON."""
    plain = bare(type_of(key, cls))
    if text.lower() == "none" and optional(plain):
        return None
    if get_origin(plain) not in (tuple, dict):
        return text
    try:
        return json.loads(text)
    except ValueError as e:
        raise ValueError(f"{key} is {text}: give {wanted(key, cls)}.") from e


def _dict_key(key: str, cls: Any) -> bool:
    """Whether a key has the form section.field.name and its field is a dict."""
    field, _, name = key.rpartition(".")
    return bool(name) and field in keys(cls) and get_origin(bare(type_of(field, cls))) is dict


def _scalar(text: str) -> bool | int | float | str:
    """Parse a value of a dict: JSON if it is a boolean or a number, otherwise the text itself."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, bool | int | float) else text


def dump(c: Config | SftConfig) -> str:
    """Write the resolved configuration as TOML that `--config` reads back (None values are left out)."""

    def text(v: Any) -> str:
        if isinstance(v, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {text(x)}" for k, x in v.items()) + "}"
        return json.dumps(list(v) if isinstance(v, tuple) else v, ensure_ascii=False)

    def line(k: str, v: Any) -> str:
        return f"{k} = {text(v)}\n"

    tree = dataclasses.asdict(c)
    out = "".join(line(k, v) for k, v in tree.items() if not isinstance(v, dict))
    for section, values in tree.items():
        if isinstance(values, dict):
            given = {k: v for k, v in values.items() if v is not None and f"{section}.{k}" in keys(type(c))}
            out += f"\n[{section}]\n" + "".join(line(k, v) for k, v in given.items())
            for name in [k for k in values if _is_section(f"{section}.{k}", type(c))]:
                out += f"\n[{section}.{name}]\n" + "".join(line(k, v) for k, v in values[name].items() if v is not None)
    return out


def _is_section(key: str, cls: Any) -> bool:
    return dataclasses.is_dataclass(type_of(key, cls))


# ------------------------------------------------------------------------------------------------------------- --help

FLAGS = {
    "--help": "Print this text and exit; so does -h.",
    "--dry-run": "Print the resolved configuration as TOML that --config reads, and exit.",
    "--config=FILE": "The same as --recipe=FILE.",
    "--model=NAME": "Short for --model.path.",
}


def help_text(c: Config | SftConfig, about: str) -> str:
    """The text that --help prints: every flag that load_config accepts, with its description and its value in `c`."""
    lines = [about.strip(), "", f"Every key with its value under recipe {c.recipe}; --KEY=VALUE changes it."]
    lines += ["", *(line for flag, text in FLAGS.items() for line in _entry(flag, text))]
    return "\n".join([*lines, *_section_help(c, type(c))])


def _section_help(values: Any, cls: Any, name: str = "") -> list[str]:
    """Help entries for a section's keys, followed by those of its subsections."""
    docs, prefix = _descriptions(type(values)), f"{name}." if name else ""
    lines = ["", f"{name}: {type(values).__doc__}" if name else "general:"]
    fields = dataclasses.fields(values)
    for f in [f for f in fields if prefix + f.name in keys(cls)]:
        shown = _shown(getattr(values, f.name))
        lines += _entry(f"--{prefix}{f.name}={shown}", f"{docs[f.name]}{_choices(prefix + f.name, cls)}")
    for f in [f for f in fields if dataclasses.is_dataclass(f.type)]:
        lines += _section_help(getattr(values, f.name), cls, prefix + f.name)
    return lines


def _entry(flag: str, text: str) -> list[str]:
    return [f"  {flag}", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _descriptions(cls: Any) -> dict[str, str]:
    """Docstrings of all fields, base classes included, read from the source: the string that follows each field."""
    out = {}
    for base in [b for b in reversed(cls.__mro__) if dataclasses.is_dataclass(b)]:
        source: Any = base
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(source))).body
        assert isinstance(tree, ast.ClassDef)
        for field, following in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr):
                out[ast.unparse(field.target)] = " ".join(ast.literal_eval(following.value).split())
    return out


def _shown(value: Any) -> str:
    """A value in the form that the command line accepts."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)


def _choices(key: str, cls: Any) -> str:
    """A sentence on the values that a key accepts, where its default does not show them."""
    plain = bare(type_of(key, cls))
    if get_origin(plain) is Literal:
        return f" One of {', '.join(get_args(plain))}."
    if plain is bool:
        return " Boolean; the flag alone means true."
    said = [f"{'each ' * (get_origin(plain) is tuple)}{allowed}"] if (allowed := range_of(key, cls)) else []
    said += ["or none"] * optional(plain)
    return f" {', '.join(said).capitalize()}." if said else ""
