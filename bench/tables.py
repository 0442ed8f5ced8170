"""What `make bench` prints: every contender, then the goals, slopes and comparisons of a run."""

from __future__ import annotations

from collections.abc import Iterator

from bench import compare, goals, results
from bench.results import Table

CONTENDERS_TEXT = """median of the rounds; 'vs' is how many times faster than the research code's formulation (upstream)
and than the strongest torch form; floor is the share of what the machine's measured rates allow; peak is what torch's
allocator held at most beyond the inputs. > is what fastapd chooses by itself, + another of its backends, forced."""


def _ratio(baseline: results.Row | None, median: float) -> str:
    return f"{baseline.median / median:.2f}" if baseline else "-"


def contenders(now: Table, before: Table) -> Iterator[str]:
    """Every row with its ratios, beside those of an earlier run if there is one."""
    header = ["", "", "", "median", "vs upstream", "vs torch", *(["before"] if before else []), "floor", "peak"]
    lines = []
    for key, rows in now.items():
        was = before.get(key, {})
        for i, row in enumerate(rows.values()):
            mark = {"chosen": "> ", "forced": "+ "}.get(row.info.get("fastapd", ""), "  ")
            line = [*(key if i == 0 else ("", "")), mark + row.contender, results.seconds(row.median)]
            line += [_ratio(rows.get("upstream"), row.median), _ratio(results.strongest_torch(rows), row.median)]
            if before:
                old = was.get(row.contender)
                line.append("-" if old is None else _ratio(was.get("upstream"), old.median))
            floor = row.info.get("floor_seconds")
            line += [f"{floor / row.median:.0%}" if floor else "-", results.memory(row.info.get("peak_bytes"))]
            lines.append(line)
    aligned = results.aligned([header, *lines], 3)
    yield aligned[0]
    for line, text in zip(lines, aligned[1:], strict=True):
        if line[0]:
            yield ""
        yield text


def goal_lines(found: Table) -> list[list[str]]:
    """What, against, goal, measured, and the verdict with what bounds a miss."""
    lines = []
    for o in goals.outcomes(found):
        measured = "-" if o.value is None else o.goal.show(o.value)
        verdict = o.verdict
        if o.value is not None and len(o.goal.groups) > 1:
            verdict += f" (worst: {o.group.split('/')[1]})"
        if o.value is not None and not o.met and o.floor is not None and not o.goal.percent:
            verdict += f"; at {o.floor:.0%} of the floor"
        lines.append([o.goal.what, o.goal.against, f">= {o.goal.show(o.goal.least)}", measured, verdict])
    return lines


def summary(found: Table, constants: dict[str, float]) -> Iterator[str]:
    """The table of goals, the slopes, and how near the research formulation is to the research code."""
    lines = [["goal", "against", "at least", "measured", ""], *goal_lines(found)]
    # the verdict is of any length and comes last
    aligned = results.aligned([line[:4] for line in lines], 2)
    for line, text in zip(lines, aligned, strict=True):
        yield f"{text}  {line[4]}".rstrip()
    met = [o.met for o in goals.outcomes(found)]
    yield f"{sum(met)} of {len(met)} met"
    for slope in goals.slopes(found):
        sizes = f"{slope.sizes[0]} to {slope.sizes[-1]}"
        times = f"{results.seconds(slope.seconds[0])} to {results.seconds(slope.seconds[-1])}"
        yield f"{slope.group}: time grows as size ** {slope.exponent:.2f} over {sizes} ({times}), {slope.verdict}"
    for near in goals.faithfulness_of_upstream(found):
        verdict = "counts" if near.counts else f"does not count: more than {goals.FAITHFUL:.0%} off"
        yield f"{near.group}: the research formulation takes {near.ratio:.2f} of the research code's time, {verdict}"
    yield "this machine, one thread: " + ", ".join(f"{name} {value:.3g}" for name, value in constants.items())


def comparison(name: str, before: Table, now: Table) -> Iterator[str]:
    """What got worse beyond noise since an earlier run."""
    found = compare.changes(before, now)
    fell = compare.worse(found)
    yield f"against {name}: {len(fell)} of {len(found)} ratios fell by more than {compare.THRESHOLD:.0%}"
    for change in fell:
        yield f"worse: {change}"
