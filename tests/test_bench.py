"""What judges a run of the benchmarks: the comparison of two runs, the goals, and the formulations they are held to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _rows(group: str, times: dict[str, float], direction: str = "step") -> list[dict]:
    mark = {"fastapd": "chosen"}
    return [
        {
            "group": group,
            "extra_info": {"contender": name, "direction": direction, "fastapd": mark.get(name, "")},
            "stats": {"median": median},
        }
        for name, median in times.items()
    ]


def _compare(tmp_path: Path, old: list[dict], new: list[dict], *options: str) -> subprocess.CompletedProcess[str]:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, rows in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps({"datetime": path.stem, "benchmarks": rows}))
    command = [sys.executable, "-P", str(ROOT / "bench" / "compare.py"), *map(str, paths), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


OLD = _rows("step/tms", {"upstream": 10.0, "torch": 3.0, "torch_tangent": 2.0, "fastapd": 1.0})


def test_compare_says_which_ratio_fell_and_exits_with_one(tmp_path):
    # our time is the same; the strongest torch form got faster, the research formulation did not
    new = _rows("step/tms", {"upstream": 10.0, "torch": 3.0, "torch_tangent": 1.5, "fastapd": 1.0})
    done = _compare(tmp_path, OLD, new)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "worse: step/tms step: 2x -> 1.5x the strongest torch form (-25%)",
        "1 of 2 ratios fell by more than 15%",
    ]


def test_compare_is_content_when_the_whole_machine_is_slower(tmp_path):
    new = _rows("step/tms", {"upstream": 40.0, "torch": 12.0, "torch_tangent": 8.0, "fastapd": 4.0})
    done = _compare(tmp_path, OLD, new)
    assert (done.returncode, done.stdout) == (0, "0 of 2 ratios fell by more than 15%\n")


def test_compare_takes_its_threshold_from_the_command_line(tmp_path):
    new = _rows("step/tms", {"upstream": 9.0, "torch": 3.0, "torch_tangent": 1.8, "fastapd": 1.0})
    assert _compare(tmp_path, OLD, new).returncode == 0
    done = _compare(tmp_path, OLD, new, "--threshold", "0.05")
    assert done.returncode == 1
    assert "2 of 2 ratios fell by more than 5%" in done.stdout


def test_compare_tells_of_what_only_one_run_has(tmp_path):
    other = _rows("step/resid", {"upstream": 10.0, "fastapd": 1.0})
    done = _compare(tmp_path, OLD, other)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "only in OLD: step/tms step",
        "only in NEW: step/resid step",
        "0 of 0 ratios fell by more than 15%",
    ]


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from bench import goals, results
found = results.table(results.rows(json.loads(sys.stdin.read())))
print(json.dumps({
    "outcomes": [[o.goal.what, o.goal.against, o.value, o.met, o.verdict] for o in goals.outcomes(found)],
    "slopes": [[s.group, s.exponent] for s in goals.slopes(found)],
    "faithful": [[f.group, f.ratio, f.counts] for f in goals.faithfulness_of_upstream(found)],
}))
"""


def _judge(rows: list[dict]) -> dict:
    command = [sys.executable, "-P", "-c", SCRIPT, str(ROOT)]
    given = json.dumps({"benchmarks": rows})
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _outcome(judged: dict, what: str) -> list:
    (found,) = [o[2:] for o in judged["outcomes"] if o[0] == what]
    return found


def test_goals_are_met_missed_or_not_measured():
    rows = _rows("step/tms_5-2_b2048", {"upstream": 12.0, "fastapd": 1.0})
    rows += _rows("step/tms_40-10_b2048", {"upstream": 15.0, "fastapd": 1.0})
    judged = _judge(rows)
    assert _outcome(judged, "step TMS 5-2, b 2048") == [12.0, True, "met"]
    assert _outcome(judged, "step TMS 40-10, b 2048") == [15.0, False, "missed by 25%"]
    assert _outcome(judged, "step residual 1 layer, C 130, m 50, b 2048") == [None, False, "not measured"]


def test_goals_take_the_worst_group_and_are_not_met_while_one_is_missing():
    rows = _rows("masked_forward/resid_in_b2048", {"upstream": 100.0, "fastapd": 1.0}, "forward")
    value, met, verdict = _outcome(_judge(rows), "masked forward with its index, residual")
    assert (value, met) == (100.0, False)
    assert verdict == "met where measured, not in resid_out_b2048"
    rows += _rows("masked_forward/resid_out_b2048", {"upstream": 80.0, "fastapd": 1.0}, "forward")
    assert _outcome(_judge(rows), "masked forward with its index, residual")[:2] == [80.0, True]


@pytest.mark.parametrize(("resident", "expected"), [(250, 10.0), (1000, 4.0)])
def test_goals_of_memory_take_the_measure_that_says_less(resident, expected):
    rows = _rows("step/resid_b2048", {"upstream": 1.0, "fastapd": 1.0})
    rows[0]["extra_info"] |= {"peak_bytes": 1000, "resident_bytes": 4000}
    rows[1]["extra_info"] |= {"peak_bytes": 100, "resident_bytes": resident}
    value, met, _ = _outcome(_judge(rows), "step residual 1 layer, C 130, m 50, b 2048: peak memory")
    assert (value, met) == (expected, expected >= 5)


def test_goals_of_threads_leave_out_short_steps():
    rows = _rows("threads/short", {"one_thread": 0.004, "two_threads": 0.008}, "threads")
    rows += _rows("threads/long", {"one_thread": 0.4, "two_threads": 0.25}, "threads")
    value, met, _ = _outcome(_judge(rows), "two threads, steps above 5 ms")
    assert (value, met) == (pytest.approx(1.6), True)


def test_slope_is_the_exponent_of_the_growth():
    rows = []
    for size in (10, 30, 100):
        (row,) = _rows("scaling/batch", {f"fastapd_{size}": 1e-6 * size**1.5}, "scaling")
        row["extra_info"] |= {"size": size, "fastapd": ""}
        rows.append(row)
    assert _judge(rows)["slopes"] == [["scaling/batch", pytest.approx(1.5)]]


def test_goals_do_not_count_where_the_formulation_is_not_the_research_codes():
    rows = _rows("step/tms_5-2_b2048", {"upstream": 15.0, "apd": 12.0, "fastapd": 1.0})
    value, met, verdict = _outcome(_judge(rows), "step TMS 5-2, b 2048")
    assert (value, met) == (15.0, False)
    assert verdict == "does not count: the formulation takes 1.25 of the research code's time"


def test_formulation_counts_only_near_the_research_code():
    rows = _rows("step/a", {"upstream": 1.1, "apd": 1.0}) + _rows("step/b", {"upstream": 1.3, "apd": 1.0})
    assert _judge(rows)["faithful"] == [["step/a", 1.1, True], ["step/b", 1.3, False]]
