"""The report is one file that loads nothing, runs nothing and shows hostile strings as text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
import torch

from fastapd import plots, report

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "\"><a href='https://example.org/'>x</a>",
    "</title></style><iframe src=//example.org>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; & \x00 \ud800 é 漢",
]


class Page(HTMLParser):
    """Every tag with its attributes, and the text per tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def png(tmp_path):
    parts = torch.eye(2)[:, :, None]
    return plots.save(plots.recovery_heatmap({"a": (torch.ones(2, 1), parts)}), tmp_path / "figure.png")


def page(path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    parsed = Page(html)
    assert parsed.open == []
    return html, parsed


def test_write_report_shows_everything_once(tmp_path, png):
    path = report.write_report(
        tmp_path / "new" / "report.html",
        title="TMS 5-2",
        summary=[("recovered", "15 of 16"), ("seed", "0")],
        table=report.Table(["", "MMCS"], [["SVD of W", "0.90"], ["fastapd (median)", "0.998"]]),
        notes=["the rule: MMCS > 0.98"],
        figures=[("Polygons", png), ("Losses", str(png))],
        published=[report.Published("ML2R", "0.893", "0.894")],
    )
    html, parsed = page(path)
    for text in ("TMS 5-2", "15 of 16", "fastapd (median)", "0.998", "the rule: MMCS > 0.98", "Losses", "0.893"):
        assert text in parsed.text
    assert (parsed.count("table"), parsed.count("tr"), parsed.count("img"), parsed.count("h1")) == (2, 5, 2, 1)
    sources = [attrs["src"] for tag, attrs in parsed.tags if tag == "img"]
    assert all(base64.b64decode(s.removeprefix("data:image/png;base64,")) == png.read_bytes() for s in sources)
    assert [attrs["alt"] for tag, attrs in parsed.tags if tag == "img"] == ["Polygons", "Losses"]
    assert str(tmp_path) not in html
    assert "prefers-color-scheme: dark" in html


def test_write_report_loads_nothing_and_runs_nothing(tmp_path, png):
    html, parsed = page(report.write_report(tmp_path / "r.html", title="t", figures=[("c", png)]))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in parsed.tags
    assert parsed.count("script") == parsed.count("link") == parsed.count("iframe") == 0
    without_data = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert "//" not in without_data
    assert "url(" not in without_data
    assert "@import" not in without_data


@pytest.mark.parametrize("text", HOSTILE)
def test_write_report_escapes(tmp_path, png, text):
    def write(value: str) -> Page:
        return page(
            report.write_report(
                tmp_path / "r.html",
                title=value,
                summary=[(value, value)],
                table=report.Table([value, value], [[value, value]]),
                notes=[value],
                figures=[(value, png)],
                published=[(value, value, value)],
            )
        )[1]

    hostile, harmless = write(text), write("harmless")
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [sorted(attrs) for _, attrs in hostile.tags] == [sorted(attrs) for _, attrs in harmless.tags]
    assert hostile.text.count(text.replace("\ud800", "?")) == harmless.text.count("harmless") > 0


def test_write_report_refuses_crooked_tables_and_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"write_report: rows\[1\] must have 2 cells like columns, got 1"):
        report.write_report(tmp_path / "r.html", title="t", table=report.Table(["a", "b"], [["1", "2"], ["1"]]))
    with pytest.raises(ValueError, match=r"write_report: rows\[0\] must have 3 cells"):
        report.write_report(tmp_path / "r.html", title="t", published=[("a", "b")])
    (tmp_path / "x.svg").write_text("<svg onload='alert(1)'/>")
    with pytest.raises(ValueError, match=r"write_report: figures must be PNG files, got x.svg"):
        report.write_report(tmp_path / "r.html", title="t", figures=[("x", tmp_path / "x.svg")])
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path / "r.html", title="t", figures=[("x", tmp_path / "none.png")])
    assert not (tmp_path / "r.html").exists()


def test_format_table_aligns():
    rows = [["random init", "0.79", "3.4/5", "-"], ["W/5", "1.00", "1/5", "0"], ["fastapd", "0.998", "5/5", "ok"]]
    assert report.format_table(["", "MMCS", "unique", "state"], rows).split("\n") == [
        "              MMCS  unique  state",
        "-----------  -----  ------  -----",
        "random init   0.79   3.4/5  -",
        "W/5           1.00     1/5  0",
        "fastapd      0.998     5/5  ok",
    ]


def test_format_table_keeps_one_line_a_row():
    lines = report.format_table(["a", "b"], [["x\ny", "\x1b[2J1"]]).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert report.format_table(["a", "b"], []) == "a  b\n-  -"
    with pytest.raises(ValueError, match=r"format_table: rows\[0\] must have 2 cells like columns, got 3"):
        report.format_table(["a", "b"], [["1", "2", "3"]])
