"""The report of a run: one HTML file that stands alone, and the same table as text for the terminal.

The file holds its figures as data URIs and its style inline. It has no script, loads nothing, and its content policy
forbids both; every string is escaped. jinja2 is imported inside `write_report`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBER = re.compile(r"[-+−±]?\.?\d|[-–—]?$|nan$|[-+]?inf$", re.IGNORECASE)


class Table(NamedTuple):
    """Columns and rows of strings, as they are to be read."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Published(NamedTuple):
    """A published number beside ours: what it is, as published (with its source), as measured here."""

    quantity: str
    published: str
    here: str


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Sequence[tuple[str, str]] = (),
    table: Table | None = None,
    notes: Sequence[str] = (),
    figures: Sequence[tuple[str, str | Path]] = (),
    published: Sequence[tuple[str, str, str]] = (),
) -> Path:
    """Write the report of a run as one self-contained HTML file.

    Args:
        path: the file to write; folders are created, an older file is replaced.
        title: heading and window title.
        summary: (name, value) pairs shown at the top.
        table: the result beside its baselines, one row each.
        notes: paragraphs under the table: the rule of "recovered", what was not checked.
        figures: (caption, path of a PNG) in order; the images are copied into the file.
        published: (quantity, as published, here), see `Published`.

    Returns:
        The path.

    Raises:
        ValueError: a row has not as many cells as the table has columns, or a figure is not a PNG.
        FileNotFoundError: a figure does not exist.
    """
    import jinja2

    tables = []
    if table is not None:
        tables.append(_for_template("Result", table.columns, table.rows))
    if published:
        columns = ["quantity", "published", "here"]
        tables.append(_for_template("Beside the published numbers", columns, published))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(_TEMPLATE).render(
        title=title,
        summary=summary,
        tables=tables,
        notes=notes,
        figures=[(caption, _data_uri(png)) for caption, png in figures],
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(html.encode("utf-8", "replace"))
    return path


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay a table out for the terminal: columns aligned by spaces, numbers to the right, a rule under the header.

    Args:
        columns: the header.
        rows: cells as strings, as many in each row as there are columns.

    Returns:
        Lines without trailing spaces or a final newline.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    _check_rows("format_table", columns, rows)
    # a control character in a cell could move the cursor or break the line
    cells = [["".join(ch if ch.isprintable() else " " for ch in cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    numeric = _numeric_columns(columns, rows)
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _check_rows(op: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"{op}: rows[{index}] must have {len(columns)} cells like columns, got {len(row)}")


def _numeric_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns to align to the right: those that hold numbers or dashes; the first names the row."""
    return [i > 0 and bool(rows) and all(_NUMBER.match(row[i].strip()) for row in rows) for i in range(len(columns))]


def _for_template(heading: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, object]:
    _check_rows("write_report", columns, rows)
    numeric = _numeric_columns(columns, rows)
    return {
        "heading": heading,
        "columns": list(zip(columns, numeric, strict=True)),
        "rows": [list(zip(row, numeric, strict=True)) for row in rows],
    }


def _data_uri(png: str | Path) -> str:
    data = Path(png).read_bytes()
    if not data.startswith(_PNG):
        raise ValueError(f"write_report: figures must be PNG files, got {Path(png).name} starting with {data[:8]!r}")
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --ink: #1c1d1f; --soft: #63666b; --line: #dcdee2; --page: #fff; --raised: #f5f6f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e8ea; --soft: #a2a6ad; --line: #3a3d43; --page: #17181b; --raised: #202226; --accent: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; padding-bottom: .6rem;
  border-bottom: 3px solid var(--accent); }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .6rem; margin: 0; }
dl div { background: var(--raised); border-radius: .4rem; padding: .5rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .4rem .8rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
tbody tr:hover { background: var(--raised); }
figure { margin: 1.4rem 0 0; }
figure .wide { background: #fff; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
img { display: block; width: 100%; min-width: 38rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
@media print { img { min-width: 0; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if summary %}
<dl>
{% for name, value in summary %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% for table in tables %}
<h2>{{ table.heading }}</h2>
<div class="wide">
<table>
<thead><tr>
{% for name, right in table.columns %}
<th scope="col"{% if right %} class="number"{% endif %}>{{ name }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell, right in row %}
<td{% if right %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
{% if figures %}
<h2>Figures</h2>
{% for caption, source in figures %}
<figure>
<div class="wide"><img src="{{ source }}" alt="{{ caption }}"></div>
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
{% endif %}
</main>
</body>
</html>
"""
