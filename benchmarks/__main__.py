"""Command line: ``python -m benchmarks NAME|all|--list [--write]``; prints one JSON object per line.

``--read FILE`` puts what earlier calls printed on the page as well, so that one benchmark can be measured
anew, or on another machine, without losing the others.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

from benchmarks.page import render
from benchmarks.timing import Line

_HELPERS = ("__init__", "__main__", "memory", "page", "servers", "timing")


def _runner(name: str) -> Callable[[], Iterator[Line]]:
    def run() -> Iterator[Line]:
        # Imported when it runs: a benchmark may need packages that take long to load.
        lines: Iterator[Line] = import_module(f"benchmarks.{name}").run()
        return lines

    return run


# Every other module of this folder is a benchmark: its ``run()`` yields lines.
BENCHMARKS: Mapping[str, Callable[[], Iterator[Line]]] = {
    name: _runner(name)
    for name in sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    if name not in _HELPERS
}
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def _earlier(path: Path) -> list[Line]:
    """Lines printed before, in order; other text is an error."""
    return [Line.of(json.loads(text)) for text in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; return the exit code (2: bad usage, told in one sentence)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", help="a benchmark, or 'all'")
    parser.add_argument("--list", action="store_true", help="print the names of the benchmarks")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md from this run")
    parser.add_argument(
        "--read",
        type=Path,
        metavar="FILE",
        help="with --write: also the lines that earlier runs printed into this file",
    )
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(BENCHMARKS))
        return 0
    try:
        earlier = [] if options.read is None else _earlier(options.read)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"--read {options.read}: {error}", file=sys.stderr)
        return 2
    if options.name is None and earlier:
        names = []
    elif options.name != "all" and options.name not in BENCHMARKS:
        asked = "no benchmark is named" if options.name is None else f"there is no benchmark {options.name!r}"
        print(f"{asked}; known: all, {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    else:
        names = list(BENCHMARKS) if options.name == "all" else [options.name]
    lines = []
    for name in names:
        for line in BENCHMARKS[name]():
            print(json.dumps(line.record()), flush=True)
            lines.append(line)
    if options.write:
        # The newest of each name on each processor or GPU.
        newest = {
            (line.name, line.machine["cpu"], line.machine["device"]): line for line in [*earlier, *lines]
        }
        PAGE.write_text(render(list(newest.values())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
