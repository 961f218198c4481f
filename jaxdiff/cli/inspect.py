"""`jaxdiff inspect`: describe a checkpoint without reading its weights."""

import argparse
import json
import pathlib
from collections.abc import Sequence

from jaxdiff.checkpoints import leftovers
from jaxdiff.checkpoints.adapter_info import LoRAInfo, TextualInversionInfo
from jaxdiff.checkpoints.description import Description, describe


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, print a description. Raises InputError for what is no checkpoint."""
    # argparse, because importing tyro would double the time that this command takes.
    parser = argparse.ArgumentParser(
        prog="jaxdiff inspect", description="Describe a checkpoint without reading its weights."
    )
    parser.add_argument("checkpoint", type=pathlib.Path, help="a folder or a file")
    parser.add_argument("--variant", help='variant of the weights in a folder, such as "fp16"')
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(list(arguments))
    found = describe(options.checkpoint, variant=options.variant)
    print(json.dumps(found.to_mapping()) if options.json else table(found))


def table(found: Description) -> str:
    """The description as text."""
    predicts = f", predicts {found.prediction_type}" if found.prediction_type else ""
    lines = [f"{found.path}: {found.family} ({found.layout}){predicts}"]
    if found.facts is not None:
        lines.append(f"  {_summary(found.facts)}")
    rows = [
        (p.name, p.class_name, f"{p.parameters:,}", " ".join(p.dtypes), f"{p.nbytes / 1e6:,.1f} MB")
        for p in found.parts
    ]
    total = sum(p.parameters for p in found.parts), sum(p.nbytes for p in found.parts)
    rows.append(("total", "", f"{total[0]:,}", "", f"{total[1] / 1e6:,.1f} MB"))
    rows.insert(0, ("component", "class", "parameters", "dtype", "size"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, cls, count, dtypes, size in rows:
        lines.append(
            f"  {name:{widths[0]}}  {cls:{widths[1]}}  {count:>{widths[2]}}  "
            f"{dtypes:{widths[3]}}  {size:>{widths[4]}}".rstrip()
        )
    if found.left_over:
        lines.append(f"  left over, not read: {leftovers.listing(found.left_over)}")
    if found.unknown:
        names = leftovers.shown(found.unknown)
        lines.append(f"  unknown tensors: {names}: the file cannot be loaded with them")
    lines += [f"  no {name}: loading needs {found.remedies[name]}" for name in found.missing]
    lines += [
        f"  no {name}: images are generated without; {found.remedies[name]} gives it"
        for name in found.optional
    ]
    return "\n".join(lines)


def _summary(facts: LoRAInfo | TextualInversionInfo) -> str:
    """A LoRA or a textual inversion in one line."""
    if isinstance(facts, TextualInversionInfo):
        widths = ", ".join(f"{name} {width}" for name, width in facts.widths.items())
        return f"token {facts.token!r}, vectors {facts.vectors}, widths {widths}"
    values = {
        "keys": facts.spelling,
        "formats": " ".join(f"{name} {count}" for name, count in facts.formats.items()),
        "ranks": " ".join(map(str, facts.ranks)),
        "modules": " ".join(f"{name} {count}" for name, count in facts.modules.items()),
        "LoCon convolutions": "yes" if facts.convolutions else "no",
        "tokens": " ".join(facts.tokens),
        "ignored keys": " ".join(f"{kind} {count}" for kind, count in facts.unread.items()),
    }
    return ", ".join(f"{name} {value}" for name, value in values.items() if value)
