"""The README.md of an extended or merged checkpoint: what was done, with which numbers, and how to load it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from longext.checkpoint.bundled import is_bundled
from longext.checkpoint.source import HUB_ID
from longext.conversion.engines import ENGINES, RIGHT, kind_of
from longext.errors import CheckpointError
from longext.manifest import command_line, versions
from longext.rope.spec import ROPE_METHODS
from longext.untrusted import METADATA_LIMIT, read_text, spelled

_LICENSE_LINE = re.compile(r"^license(_name|_link)?:.*$", re.MULTILINE)

# a directory of the Hub's cache
_CACHED = re.compile(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]{40}/?$")
_UNTRAINED = "The weights of `{}`, unchanged, with another rotary position embedding. No training was done."
_CARD = Template("""---
$front
---

# $name: $old to $new tokens by $title

$summary
No code of longext is needed to load it.

| | before | after |
|---|---|---|
| context length | $old | $new |
| rope | `$old_rope` | `$new_rope` |

It $relation what was there. Layers: $layers.

```
$formula
```

Source: $reference.
$trap
## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

`config.json` holds the RoPE twice: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (older
readers).
`longext verify DIR` reloads it in a fresh process and compares it with the formula and the base.
$links
## Serve it

$engines

## Limits

$limits

## Made by

```
$command
```

longext $version; the resolved settings are in `run.json` and `recipe.yaml`.
""")


LINKS = """
The weight files may be hard links to the base model's: save a fine-tuned model to another directory, never into
this one.
"""


def license_of(source: Path) -> list[str]:
    """Return the license lines of the base model's card, so that the new card keeps them."""
    if is_bundled(source):
        return ["license: apache-2.0"]
    try:
        text = read_text(source / "README.md", CheckpointError, METADATA_LIMIT)
    except (OSError, CheckpointError):
        return []
    front = text.split("---", 2)[1] if text.startswith("---") else ""
    return [match.group(0) for match in _LICENSE_LINE.finditer(front)]


def base_name(base: str) -> str:
    """Return what a card calls a base model: its Hub id, also of a directory in the Hub's cache; else a mere name."""
    cached = _CACHED.search(base)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return base if HUB_ID.match(base) and not Path(base).exists() else Path(base).name or base


def paths_of(command: str) -> set[str]:
    """Return the absolute paths in a command line."""
    try:
        words = shlex.split(command)
    except ValueError:  # somebody edited it
        words = command.split()
    return {path for word in words if Path(path := word.rpartition("=")[2]).is_absolute()}


def without_folders(text: str, paths: Iterable[str]) -> str:
    """Return a text in which absolute paths are mere names; a path that goes on, or is the end of another, is none."""
    for path in sorted(set(paths), key=len, reverse=True):
        if Path(path).name:
            whole = rf"(?<![\w/.:~-]){re.escape(path)}(?![\w/-])"
            text = re.sub(whole, base_name(path).replace("\\", r"\\"), text)
    return text


def engine_table(parameters: dict[str, Any], length: int) -> str:
    """Return a Markdown table: which engines read the RoPE as transformers does, and the command that serves it."""
    kind = kind_of(parameters)
    rows = ["| engine | reads this RoPE as transformers does | command |", "|---|---|---|"]
    for engine in ENGINES:
        if engine.is_current:
            reading = engine.reading(kind)
            told = "yes" if reading.verdict == RIGHT else f"no: {reading.what}"
            command = re.sub(r"\bN\b", str(length), engine.serve)
            rows.append(f"| {engine.title} | {told} | `{command}` |")
    return "\n".join(rows)


def _limits(record: dict[str, Any], served: int, is_trained: bool) -> str:
    """Return what a reader should not expect, one point a line."""
    trained = record["spec"]["original_max_position_embeddings"]
    told = [f"It was made for texts of up to {served:,} tokens."]
    if not is_trained:
        told.append(
            f"It was trained on {trained:,} tokens and not trained since: beyond them it reads less well than a model "
            "that was, and it may read short texts a little less well than its base does."
        )
    told.append("What the base model must not be used for, this one must not be used for either.")
    return "\n".join(f"- {line}" for line in told)


def formula_lines(record: dict[str, Any]) -> list[str]:
    """Return the formula and its numbers, one fact a line, from an extension record (`extend.provenance`)."""
    spec = record["spec"]
    names = [parameter.name for parameter in ROPE_METHODS[spec["method"]].parameters]
    numbers = {
        "theta": spec["rope_theta"],
        "d (rotary dimensions)": spec["rotary_dim"],
        "L (trained length)": spec["original_max_position_embeddings"],
        "s (factor)": spec["factor"],
        **{name: spec[name] for name in names if _is_scalar(spec[name])},
    }
    return [record["formula"], *(f"{name} = {_number(value)}" for name, value in numbers.items())]


def _is_scalar(value: Any) -> bool:
    return value is not None and not isinstance(value, (list, tuple))


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def model_card(
    record: dict[str, Any], layers: str, license_lines: list[str], merge: dict[str, Any] | None = None
) -> str:
    """Return the Markdown model card of an extended checkpoint, or of one with a merged adapter.

    Args:
        record: `extend.provenance(plan)`.
        layers: which layers the extension reaches.
        license_lines: license lines of the base model's card.
        merge: `MergeResult.summary`, for a merged adapter.
    """
    spec = record["spec"]
    method = ROPE_METHODS[spec["method"]]
    base, length = base_name(record["base_model"]), record["new_length"]
    tags = "tags: [long-context, rope, longext]"
    front = ["library_name: transformers", "pipeline_tag: text-generation", tags, *license_lines]
    if HUB_ID.match(base):
        front.insert(0, f"base_model: {base}")  # the Hub takes ids here, not paths
    notes = [*filter(None, [method.caveat]), *record.get("warnings", [])]
    if not record.get("checked", True):
        notes.append("The RoPE was not compared with what transformers builds; `longext verify DIR` does it.")
    trap = "".join(f"\n> {note}\n" for note in notes)
    served = spec["original_max_position_embeddings"] if method.keeps_length else length
    text = _CARD.substitute(
        front="\n".join(front),
        name=Path(base).name,
        summary=_UNTRAINED.format(base) if merge is None else _merged_summary(base, merge),
        links=LINKS if merge is None else "",
        old=f"{record['old_length']:,}",
        new=f"{length:,}",
        title=method.title,
        old_rope=describe_rope(record["old_rope_parameters"]),
        new_rope=describe_rope(record["rope_parameters"]),
        relation=record["relation"],
        layers=layers,
        formula="\n".join(formula_lines(record)),
        reference=record["reference"],
        trap=trap,
        engines=engine_table(record["rope_parameters"], served),
        limits=_limits(record, length, is_trained=merge is not None or record["trained"]),
        command=without_folders(command_line(), paths_of(command_line())),
        version=versions()["longext"],
    )
    return spelled(text)


_ADAPTER_USE = Template("""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIR")  # with peft installed: base, adapter and RoPE
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

`DIR/base` is the base model under this RoPE, its weights linked. `AutoPeftModelForCausalLM` finds it as long as the
directory stays where it was made. PEFT records no RoPE, so anything else has to be given it:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("$base", config=AutoConfig.from_pretrained("DIR"))
model = PeftModel.from_pretrained(base, "DIR")
```

To publish it, publish the merged checkpoint:

```
longext merge DIR -o MERGED    # a standard checkpoint, proved equal
```""")

_ADAPTER_CARD = Template("""---
library_name: peft
tags: [long-context, rope, longext]
---

# Adapter for $base, $length tokens

Converted from pickle files; the tensors are unchanged. It was trained with this RoPE: `$rope`.

## Use it

$use

## Made by

```
$command
```

longext $version; the resolved settings are in `run.json` and `recipe.yaml`.
""")


def adapter_use(record: dict[str, Any]) -> str:
    """Return the Markdown that shows how to load an adapter directory with its RoPE, from its extension record."""
    name = record["base_model"]
    base = name if HUB_ID.match(name) and not Path(name).exists() else "DIR/base"
    return _ADAPTER_USE.substitute(base=base)


def adapter_card(record: dict[str, Any]) -> str:
    """Return the Markdown card of a converted adapter, from its extension record."""
    return _ADAPTER_CARD.substitute(
        base=record["base_model"],
        length=f"{record['new_length']:,}",
        rope=describe_rope(record["rope_parameters"]),
        use=adapter_use(record),
        command=command_line(),
        version=versions()["longext"],
    )


def _merged_summary(base: str, merge: dict[str, Any]) -> str:
    """What was merged, and how closely the result was compared with base + adapter."""
    proof = merge["proof"]
    proven = "was not compared with base + adapter (`--no-check`)"
    if proof:
        proven = (
            f"was compared with base + adapter on {proof['num_tokens']} tokens: largest logit difference "
            f"{proof['max_difference']:.2g}, allowed {proof['limit']:.2g}"
        )
    return (
        f"The weights of `{base}` with the LoRA adapter `{base_name(merge['adapter'])}` merged in, computed in float32 "
        f"and stored as {', '.join(merge['dtypes'])}.\nThe result {proven}."
    )


def describe_rope(parameters: dict[str, Any]) -> str:
    """Return `rope_parameters` on one line, long lists shortened."""
    return json.dumps({k: f"[{len(v)} numbers]" if isinstance(v, list) else v for k, v in parameters.items()})
