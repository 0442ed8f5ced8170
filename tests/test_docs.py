"""The tutorial runs as it is printed, and prints what it says; its code is that of the example.

`python tests/test_docs.py` runs it and writes what it prints into the page.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
PRINTED = re.compile(r"(```python\n(.*?)```\n\n)```text\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[-+]\d+)?")


def _run(blocks: list[str]) -> tuple[list[str], dict]:
    """What each block prints, all in one namespace, and that."""
    names: dict = {"__name__": "tutorial"}
    printed = []
    for number, block in enumerate(blocks):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, f"tutorial.md, block {number}", "exec"), names)  # noqa: S102  the page's own text
        printed.append(out.getvalue())
    return printed, names


def _words(text: str) -> list[str]:
    return NUMBER.sub("#", text).split()


def test_tutorial_runs_as_printed_and_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text()
    blocks = PYTHON.findall(text)
    said = [(block, shown) for _, block, shown in PRINTED.findall(text)]
    assert [block for block, _ in said] == blocks  # every block has its output
    with torch.random.fork_rng():
        printed, names = _run(blocks)
    for (_, shown), found in zip(said, printed, strict=True):
        assert _words(found) == _words(shown)  # numbers are another machine's: below, those that the text speaks of
    assert names["own"](names["component_of"]) == 6 > names["own"](names["owners"](names["first"])[0])
    assert "6 of 6 features have" in text and min(names["share"]) > 0.8
    numbers = names["numbers"]
    assert numbers["faithfulness"] < 0.01 and 1.2 < numbers["effective_rank"] <= 2
    assert all(numbers["reconstruction"] < 0.1 * row["reconstruction"] for row in numbers["baselines"].values())
    assert names["pd"].metrics(names["test"], baselines=False)["faithfulness"] < 0.01
    assert not torch.equal(names["edited"](names["test"]), names["model"](names["test"]))


def test_tutorial_is_the_example():
    """But for comments and the docstring, which the page has as prose."""
    example = ast.parse((ROOT / "examples" / "your_own_mlp.py").read_text())
    tutorial = ast.parse("\n".join(PYTHON.findall(TUTORIAL.read_text())))
    assert [ast.unparse(node) for node in tutorial.body] == [ast.unparse(node) for node in example.body[1:]]


if __name__ == "__main__":
    text = TUTORIAL.read_text()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = iter(_run(PYTHON.findall(text))[0])
    TUTORIAL.write_text(PRINTED.sub(lambda match: f"{match[1]}```text\n{next(found)}```", text))
