"""Results of a bench as files: STEM.json for programs, STEM.md for people. Says machine, versions, date and command."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.cli.output import Output
from kvstrata.quality import manifest
from kvstrata.quality.manifest import write
from kvstrata.quality.markdown import table


@dataclass(frozen=True)
class Section:
    """A table with what it shows."""

    title: str
    said: str
    header: list[str]
    body: list[list[str]]


def publish(
    out: Output, title: str, args: argparse.Namespace, rows: Any, sections: list[Section], conclusion: str = ""
) -> None:
    """Prints the sections, and writes them with ``rows`` (plain data) where ``args.out`` names a stem."""
    for section in sections:
        out.table(section.title, [section.header[0], *(f">{name}" for name in section.header[1:])], section.body)
    if conclusion:
        out.line(f"\n{conclusion}")
    if args.out is None:
        return
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    facts = manifest.of(asked) | {"date": datetime.date.today().isoformat(), "command": command()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(args.out.with_suffix(".json"), json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    write(args.out.with_suffix(".md"), "\n".join(markdown(title, facts, sections, conclusion)))
    out.line(f"\n{args.out.with_suffix('.md')}, {args.out.with_suffix('.json')}")


def markdown(title: str, facts: dict[str, Any], sections: list[Section], conclusion: str) -> list[str]:
    """The lines of STEM.md."""
    machine = facts["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts = [f"# {title}\n", *([conclusion + "\n"] if conclusion else [])]
    for section in sections:
        parts += [f"## {section.title}\n", section.said + "\n", *table(section.header, section.body)]
    on = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {versions}"
    return [*parts, f"{facts['date']}, commit {facts['commit']}; {on}; by\n", "```bash", facts["command"], "```", ""]


def command() -> str:
    """As it was given."""
    return shlex.join(["python", *sys.argv])
