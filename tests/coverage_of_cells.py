"""Which lines of the notebook's code cells the tests run, cell by cell.

    python tests/coverage_of_cells.py [arguments for pytest]

Runs pytest, and all programs that the tests start, under coverage. The code of a cell runs in
three ways: from the module of conftest.py, in the exported script, and in a Jupyter kernel. All
are brought back to the lines of the cells, which stand one after the other in one file for the
report. Exits with 1 if tests fail or under 90 %. Not seen: processes that die by a signal, and
what compiled code replaces.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import coverage
from conftest import NOTEBOOK, code_cells
from ipykernel.compiler import get_file_name

ENOUGH = 90.0  # percent
SETTINGS = """
[run]
data_file = {folder}/data
patch = subprocess
include =
    */slm_from_scratch.ipynb*
    */slm_from_scratch.py
    */ipykernel_*/*.py
"""


def cells_in(script: str, cells: list[str]) -> list[int]:
    """For each cell, how many lines of the exported script stand before it."""
    before, place = [], 0
    for source in cells:
        place = script.index(source, place)
        before.append(script.count("\n", 0, place))
        place += len(source)
    return before


def lines_of_cells(data: coverage.CoverageData, cells: list[str]) -> set[tuple[int, int]]:
    """(cell, line) of all lines that ran, wherever they ran."""
    hashes = {Path(get_file_name(source)).name: i for i, source in enumerate(cells)}
    sizes, ran = [source.count("\n") + 1 for source in cells], set()
    for file in data.measured_files():
        lines = data.lines(file)
        if file.startswith(str(NOTEBOOK)):  # the module
            ran |= {(int(file.split()[-1]), line) for line in lines}
        elif Path(file).parent.name.startswith("ipykernel_"):
            if Path(file).name in hashes:
                ran |= {(hashes[Path(file).name], line) for line in lines}
        else:  # the script
            starts = cells_in(Path(file).read_text(encoding="utf-8"), cells)
            for i, (start, size) in enumerate(zip(starts, sizes)):
                ran |= {(i, line - start) for line in lines if 0 < line - start <= size}
    return ran


def report(data: coverage.CoverageData, folder: Path) -> float:
    """Print what ran of each cell; returns the percentage of all lines."""
    cells, together = code_cells(), folder / "cells.py"
    together.write_text("\n".join(cells) + "\n", encoding="utf-8")
    starts = [sum(source.count("\n") + 1 for source in cells[:i]) for i in range(len(cells))]
    combined = coverage.Coverage(data_file=None, include=str(together))
    lines = [starts[cell] + line for cell, line in lines_of_cells(data, cells)]
    combined.get_data().add_lines({str(together): lines})
    _, statements, _, missing, _ = combined.analysis2(str(together))
    text = together.read_text(encoding="utf-8").split("\n")
    for i, (source, start) in enumerate(zip(cells, starts)):
        end = start + source.count("\n") + 1
        n = sum(start < line <= end for line in statements)
        left = [line for line in missing if start < line <= end]
        share = 1 - len(left) / n if n else 1.0
        print(f"cell {i:3}: {n - len(left):3} of {n:3} lines, {share:4.0%}")
        for line in left:
            print(f"    {line - start:4}  {text[line - 1].strip()}")
    percent = 100 * (1 - len(missing) / len(statements))
    print(f"{len(statements) - len(missing)} of {len(statements)} lines: {percent:.1f} %")
    return percent


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        settings = folder / "settings"
        settings.write_text(SETTINGS.format(folder=folder))
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest"]
        command += [f"--basetemp={folder / 'tests'}", *arguments]  # keeps the exported scripts
        tests = subprocess.run(command, cwd=NOTEBOOK.parent, env=os.environ | {"COLUMNS": "100"})
        measured = coverage.Coverage(config_file=str(settings))
        measured.combine()
        return int(report(measured.get_data(), folder) < ENOUGH or tests.returncode != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
