"""The examples run as they stand, from any directory, and what they print is what they are there to show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]\d+)?)"


def _run(name: str, folder: Path) -> str:
    """What an example prints; nothing on the other stream, and no network."""
    command = [sys.executable, "-P", "-W", "error::FutureWarning", str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def _found(pattern: str, printed: str) -> list[float]:
    """The numbers of the one line that has the pattern, in which # is a number."""
    found = re.findall(re.escape(pattern).replace(r"\#", NUMBER).replace("\\ ", r"\s+"), printed)
    assert len(found) == 1, (pattern, printed)
    return [float(value) for value in (found[0] if isinstance(found[0], tuple) else found)]


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "gpt2_mlps.py",
        "own_training_loop.py",
        "your_own_mlp.py",
    }


def test_your_own_mlp(tmp_path):
    printed = _run("your_own_mlp.py", tmp_path)
    error, zeros = _found("mean squared error #, of zeros #", printed)
    assert error < 1e-3 * zeros
    rows = {name: _found(f"{name} # # # # #", printed) for name in ("rank 1", "rank 2", "random", "svd", "copies")}
    for name in ("rank 1", "rank 2"):
        assert rows[name][0] < 0.03  # faithful
        assert rows[name][1] < 0.1 * min(rows[other][1] for other in ("random", "svd", "copies"))  # and minimal
    assert rows["rank 1"][4] == 1 < rows["rank 2"][4]
    assert _found("rank 1: # of # features have a component to themselves", printed) == [6, 6]
    shares = [_found(f"feature {i}: component #, #% of the attribution", printed) for i in range(6)]
    assert len({component for component, _ in shares}) == 6 and all(share > 80 for _, share in shares)
    assert _found("#% of the active components belong to a feature that is there", printed)[0] > 60
    assert _found("the median |x_i| of features whose component is not active is #", printed)[0] < 0.3
    for how in ("without its component", "in the edited model"):
        lost, others = _found(f"{how}, error of feature 2 is #, of the others at most #", printed)
        assert lost > 0.8 and others < 0.1
    kept, others = _found("with only its component, error of feature 2 is #, of the others at most #", printed)
    assert kept < 0.2 and others > 0.8
    assert "in a new model give the same: True" in printed and "with the same outputs: True" in printed
    assert "must have the weights that the components were made for" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["abs.safetensors"]


def test_own_training_loop(tmp_path):
    printed = _run("own_training_loop.py", tmp_path)
    first, last = _found(" 0 2.00 # # #\n", printed), _found(" 1499 0.90 # # #\n", printed)
    assert last[0] < 0.05 < first[0] and last[1] < 0.3 * first[1]
    assert _found("numbers with a component to themselves: # of #", printed) == [5, 5]
    assert _found("rebuilt from the sum of the components: relative error #", printed)[0] < 0.05
    assert not list(tmp_path.iterdir())


def test_gpt2_mlps(tmp_path):
    printed = _run("gpt2_mlps.py", tmp_path)
    if printed.startswith("transformers cannot be imported, so there is nothing to decompose"):
        pytest.skip(f"the example says: {printed.strip()}")
    rows = {name: _found(f"{name} # # # # #", printed) for name in ("\nfastapd", "random", "svd", "copies")}
    ours = rows.pop("\nfastapd")
    assert ours[0] < 0.4 and ours[3] == 3
    assert all(ours[1] < 0.5 * row[1] for row in rows.values())  # than any baseline with as many active
    names = ("the model", "selected components", "no components")
    model, selected, none = (_found(f"next-token loss of {name}: #", printed)[0] for name in names)
    assert model < selected < model + 0.3 * (none - model)
    (_, without) = _found("next-token loss of the model without component #: #", printed)
    assert model < without < none
    for token in range(4):
        shares = _found(f"token {token}: component # #%, component # #%, component # #%", printed)
        assert shares[1] >= shares[3] >= shares[5] and len({*shares[::2]}) == 3
    assert not list(tmp_path.iterdir())
