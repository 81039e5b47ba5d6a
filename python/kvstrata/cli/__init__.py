"""The command line: kvstrata demo | generate | chat | eval | bench | doctor.

Exit 0: done; 1: failed or unsupported, with the reason on standard error; 2: bad usage. With --json standard output
holds one JSON object and nothing else. Off a terminal the output is plain text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kvstrata.cli import bench, chat, demo, doctor, eval, generate
from kvstrata.cli.output import Output

VERBS = {"demo": demo, "generate": generate, "chat": chat, "eval": eval, "bench": bench, "doctor": doctor}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kvstrata", description="A KV-cache engine for long-context LLM inference.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    for name, module in VERBS.items():
        text = (module.__doc__ or "").splitlines()[0]
        sub = verbs.add_parser(name, help=text, description=module.__doc__, formatter_class=_Plain)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output")
        module.arguments(sub)
    return top


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Keeps the paragraphs of a verb's description."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    top = parser()
    args = top.parse_args(argv)
    if args.version:
        from kvstrata import __version__

        Output(json=False).line(f"kvstrata {__version__}")
        return 0
    if args.verb is None:
        top.print_usage()
        return 2
    out = Output(json=args.json)
    try:
        return int(VERBS[args.verb].run(args, out))
    except KeyboardInterrupt:
        return out.fail("interrupted")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # Unsupported and BudgetExceeded are ValueErrors. Anything else is a bug of ours and keeps its traceback.
        return out.fail(f"{type(error).__name__}: {error}")
