"""What a run found: the file of results and the tables that are printed.

The file is JSON with these keys; `SCHEMA` changes when one of them changes its meaning.

    schema, rehearsal, quick, datetime, seconds, commit_info
    machine_info    the card with its driver and clocks before and after, versions, precision, constants
    runs            date and seconds of the runs that this one resumed
    items           every piece: name, status ("done", "failed", "left out"), seconds, why
    build           seconds, exit status, and for each native module "built" or why not
    equivalence     op, backend, dtype, checked, failed, messages, refused (by reason), left_out, tf32_error
    determinism     op, case, repeats, different, repeats_under_load, different_under_load, failed
    capture         op or step, failed, and not_captured with its reason
    benchmarks      rows in pytest-benchmark's form, as `bench/results.py` reads them; directions end in " captured" for
                    graphs, and `extra_info` holds flops, bytes, floor_seconds, floor_bound, error, peak_bytes, ..
    notes           contenders that did not run, or were not captured, and why
    goals           what, against, bound, value, verdict, counted
    failures        everything that makes the exit status 1
    left_out        what there was no time for
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench._gpu import goals
from bench._gpu.items import Item

SCHEMA = "fastapd-gpu-1"

LISTS = ("equivalence", "determinism", "capture", "benchmarks", "notes")
"""Whose entries name the item they come from."""


class Report:
    """Collects what the pieces return."""

    def __init__(self, rehearsal: bool, quick: bool, commit: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self.document: dict[str, Any] = {
            "schema": SCHEMA, "rehearsal": rehearsal, "quick": quick, "datetime": now.isoformat(timespec="seconds"),
            "seconds": 0.0, "runs": [], "commit_info": commit, "machine_info": {"constants": {}}, "items": [],
            "build": None, **{name: [] for name in LISTS}, "goals": [], "failures": [], "left_out": [],
        }  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- fill in

    def facts(self, found: dict[str, Any]) -> None:
        """Of the card and its software; the file keeps its constants."""
        self.document["machine_info"] = {**found, "constants": self.constants}

    def resume(self, earlier: dict[str, Any]) -> list[str]:
        """Takes over what an earlier run of the same commit on the same card did; the names of those pieces.

        Raises:
            ValueError: If it is of another commit, card or kind.
        """
        mine = self.document
        for key in ("schema", "rehearsal", "quick", "commit_info"):
            ours, theirs = (d[key]["id"] if key == "commit_info" else d[key] for d in (mine, earlier))
            if ours != theirs:
                raise ValueError(f"--resume must name a run of the same {key}, {ours}, got {theirs}")
        card, before = (d["machine_info"]["gpu"]["name"] for d in (mine, earlier))
        if card != before:
            raise ValueError(f"--resume must name a run on the same card, {card}, got {before}")
        again = {"constants", "build"}  # and what was only done in part
        again |= {row["item"] for row in earlier["equivalence"] if row["left_out"]}
        again |= {note["item"] for note in earlier["notes"] if note["why"].endswith("no time left")}
        done = [item for item in earlier["items"] if item["status"] != "left out" and item["name"] not in again]
        names = {item["name"] for item in done}
        mine["runs"] = [*earlier["runs"], {key: earlier[key] for key in ("datetime", "seconds")}]
        mine["items"] += done
        mine["failures"] += [f for f in earlier["failures"] if f["item"] in names]
        for key in LISTS:
            mine[key] += [entry for entry in earlier[key] if entry["item"] in names]
        return sorted(names)

    def add(self, item: Item, result: dict[str, Any], seconds: float) -> str:
        """Keeps what a piece returned; "done", "failed" or "left out"."""
        failures = result.get("failures", [])
        why = result.get("left_out", "")
        status = "failed" if failures else "left out" if why and not result.get("rows") else "done"
        entry = {"name": item.name, "status": status, "seconds": seconds, "why": why or "; ".join(failures)}
        self.document["items"].append(entry)
        self.document["failures"] += [{"item": item.name, "message": f} for f in failures]
        if status == "left out":
            self.document["left_out"].append({"name": item.name, "why": why})
        for row in result.get("rows", []):
            for what in row.get("left_out", []):
                self.document["left_out"].append({"name": f"{item.name}: {what}", "why": "no time left"})
        if item.section == "build":
            self.document["build"] = {k: v for k, v in result.items() if k != "left_out"}
        where = "benchmarks" if item.section == "timing" else item.section
        if where in LISTS:
            self.document[where] += [{"item": item.name, **row} for row in result.get("rows", [])]
        self.document["notes"] += [{"item": item.name, **note} for note in result.get("notes", [])]
        if item.section == "constants" and not failures and not why:
            self.document["machine_info"]["constants"] = {k: v for k, v in result.items() if k != "broken"}
        return status

    # ------------------------------------------------------------------------------------------------ look things up

    @property
    def constants(self) -> dict[str, float]:
        return self.document["machine_info"].get("constants", {})

    @property
    def l2_bytes(self) -> int:
        return self.document["machine_info"]["gpu"]["l2_bytes"] or 50 << 20

    @property
    def card(self) -> str:
        return self.document["machine_info"].get("gpu", {}).get("name", "no card")

    @property
    def red(self) -> list[list[str]]:
        """Pairs of op and backend whose checks failed, of which no speed is measured; ["step", ""] for the step."""
        found = set()
        for row in self.document["equivalence"]:
            if row["failed"]:
                found.add((row["op"], row["backend"]))
        for row in (*self.document["determinism"], *self.document["capture"]):
            if row["failed"]:
                found.add((row["op"], row["backend"]) if "op" in row else ("step", ""))
        seen = {row["item"] for key in ("equivalence", "determinism", "capture") for row in self.document[key]}
        for failure in self.document["failures"]:  # of a process that ended or hung
            section, _, op = failure["item"].partition("/")
            if failure["item"] not in seen and section in ("equivalence", "determinism", "capture"):
                name = op.split("/")[0]
                found |= {("step", "")} if name == "step" else {(name, b) for b in ("cuda", "triton", "reference")}
        return [list(pair) for pair in sorted(found)]

    def table(self) -> results.Table:
        return results.table(results.rows(self.document))

    def outcomes(self) -> list[goals.Outcome]:
        return goals.outcomes(self.table(), self.constants, self.card)

    # ------------------------------------------------------------------------------------------------------ the file

    def default_name(self) -> str:
        """<date>-<commit>-<card>.json"""
        day = self.document["datetime"][:10]
        name = re.sub(r"\b(nvidia|geforce|rtx|tesla)\b", " ", self.card.lower())
        card = "-".join(re.findall(r"[a-z0-9]+", name)) or "card"
        return f"{day}-{self.document['commit_info']['id'][:7]}-{card}.json"

    def write(self, path: Path, seconds: float) -> None:
        self.document["seconds"] = seconds
        self.document["goals"] = [
            {
                "what": o.goal.what, "against": o.goal.against, "bound": o.goal.bound, "at_most": o.goal.at_most,
                "unit": o.goal.unit, "value": o.value, "group": o.group, "missing": list(o.missing),
                "counted": o.counted, "met": o.met, "verdict": o.verdict,
            }
            for o in self.outcomes()
        ]  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(results.rounded(self.document), indent=1) + "\n")
        fresh.replace(path)


# ----------------------------------------------------------------------------------------------------------- in words


def verdict(item: Item, result: dict[str, Any], status: str) -> str:
    """How a piece ended, in a line."""
    if status == "left out":
        return f"left out: {result['left_out']}"
    if status == "failed":
        first, *rest = result["failures"]
        return f"FAILED: {first}{f' (and {len(rest)} more)' if rest else ''}"
    rows = result.get("rows", [])
    if item.section == "equivalence":
        parts = []
        for row in rows:
            refused = sum(map(len, row["refused"].values()))
            part = f"{row['backend']} {row['checked']} right" + (f", {refused} refused" if refused else "")
            part += f", tf32 error {row['tf32_error']:.1e}" if row["tf32_error"] is not None else ""
            parts.append(part + (f", {len(row['left_out'])} left out" if row["left_out"] else ""))
        return "; ".join(parts)
    if item.section == "determinism":
        return f"{rows[0]['repeats']} times the same bits, {rows[0]['repeats_under_load']} under load"
    if item.section == "capture":
        return f"not captured: {rows[0]['not_captured']}" if "not_captured" in rows[0] else "the same bits"
    if item.section == "build":
        return ", ".join(f"{name}: {result[name]}" for name in ("_C", "_C_cuda"))
    if item.section == "constants":
        return ", ".join(f"{name} {value:.3g}" for name, value in result.items() if name != "broken")
    return f"{len({row['extra_info']['contender'] for row in rows})} contenders"


HEADER = ["", "eager", "graph", "cold", "vs research", "vs torch", "TFLOP/s", "GB/s", "floor", "peak", "error"]

TABLE_TEXT = """median times: eager calls and replays of a graph that follow each other, and a replay after the L2 cache
was overwritten (cold). Ratios are to the eager research formulation and to the best plain torch of the same precision,
each in its better way. TFLOP/s and GB/s are of the formula, floor the share of its time that this card's measured rates
allow, peak what torch's allocator held beyond the inputs, error the largest relative one of a result. > is what fastapd
chooses by itself, + another way of its, forced."""


def timing_lines(rows: Sequence[dict[str, Any]], notes: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The contenders of a problem, and who is not among them."""
    found = results.table(results.rows({"benchmarks": list(rows)}))
    for group, direction in [key for key in found if not key[1].endswith(" captured")]:
        eager, captured = found[group, direction], found.get((group, f"{direction} captured"), {})
        known = goals.Group(eager, captured, {})
        lines = [HEADER]
        for name, row in eager.items():
            graph = captured.get(name)
            best = min(r.median for r in (row, graph) if r is not None)
            mode = name.partition(" ")[0] if name.startswith(("tf32 ", "ieee ")) else ""
            torch = known.best(known.torch("tf32" if mode == "tf32" else ""))
            mark = {"chosen": "> ", "forced": "+ "}.get(row.info["fastapd"], "  ")
            cold = graph.info.get("cold_seconds") if graph else None
            cells = [mark + name, results.seconds(row.median), results.seconds(graph.median) if graph else "-"]
            cells += [results.seconds(cold) if cold else "-"]
            cells += [f"{eager['upstream'].median / best:.2f}" if "upstream" in eager else "-"]
            cells += [f"{torch / best:.2f}" if torch else "-"]
            cells += [f"{row.info['flops'] / best / 1e12:.3g}", f"{row.info['bytes'] / best / 1e9:.4g}"]
            cells += [f"{row.info['floor_seconds'] / best:.0%} ({row.info['floor_bound']})"]
            cells += [results.memory(row.info["peak_bytes"]), f"{row.info['error']:.0e}"]
            lines.append(cells)
        yield f"{group} {direction}"
        yield from (f"    {line}" for line in results.aligned(lines, 1))
    for note in notes:
        yield f"    {note['contender']}: {note['why']}".replace("    : ", "    ")


def goal_lines(found: Sequence[goals.Outcome]) -> Iterator[str]:
    lines = [["goal", "against", "bound", "measured", ""], *goals.lines(list(found))]
    for line, text in zip(lines, results.aligned([line[:4] for line in lines], 2), strict=True):
        yield f"{text}  {line[4]}".rstrip()
    yield f"{sum(o.met for o in found)} of {len(found)} met"
