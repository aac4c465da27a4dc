import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from io import StringIO

import pytest

from core.compress import Skipped, TraceEntry
from core.figures import Estimated, Figure, Figures, Gate, Measured, Quoted
from core.kit import InputError, Recipe, Step
from core.report import Report, judge
from core.report.html import breakable, columns, headlines, quantity
from core.report.rows import basis_facts, better, change, label, rows, significant, value_text
from core.report.tables import markdown_results, replace_block
from core.report.terminal import show

HOST = Measured("this-host: AMD EPYC, 2 cores", "OpenVINO 2026.4.1 INT8", 200, artifact="9f" * 32, date="2026-03-01")
PHONE = Measured("snapdragon-8-gen-2", "QNN 2.30", 50, date="2026-03-01")
ROOFLINE = Estimated("roofline", ("batch 1", "weights from DRAM"), 0.5)
PAPER = Quoted("Tang et al. 2019, table 2")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"


@dataclass(frozen=True)
class ReportTestStep(Step):
    ratio: float = 0.3
    layers: tuple[str, ...] = ("a", "b")


def report(**changes):
    step = ReportTestStep()
    given = {
        "figures": Figures([
            Figure("size", 10.61, "MB", HOST, "original"), Figure("size", 2.62, "MB", HOST),
            Figure("energy", 38.0, "mJ", ROOFLINE, "original"), Figure("energy", 11.5, "mJ", ROOFLINE),
            Figure("map33", 98.97, "%", HOST, "original"), Figure("map33", 98.77, "%", HOST),
            Figure("map33", 98.6, "%", PAPER, "original"),
        ]),
        "gates": [Gate("mAP", "map33", ">= 98.6", "%"), Gate("Size", "size", "<= 2", "MB"),
                  Gate("Energy", "energy", "<= 20", "mJ", "edge-1w")],
        "trace": [TraceEntry(step, [{"layer": "conv1", "what": "64 of 96 channels", "sensitivity": 0.125}],
                             [Skipped("head.cls", "outputs are fixed"), Skipped("head.box", "outputs are fixed")],
                             74.0)],
        "kit": "pcb_inspection", "recipe": Recipe("int8", (step,), "a minute", "a quarter of the size"),
        "target": "x86-edge-box",
        "layers": [{"layer": "conv1", "kind": "Conv2d", "parameters": 100, "bytes": 400, "macs": 9000, "sqnr_db": 31.5},
                   {"layer": "head.cls", "kind": "Conv2d", "parameters": 10, "bytes": 40, "macs": 90, "sqnr_db": None}],
        "tables": [{"title": "Runtimes", "columns": ["variant", "ms"], "rows": [["FP32", 40.0], ["INT8", 21.25]],
                    "note": "interleaved"}],
        "pictures": [{"title": "Board 1", "png": PNG}],
        "notes": ["The test split was not seen."],
    }  # fmt: skip
    given |= changes
    return judge(given.pop("figures"), given.pop("gates"), given.pop("trace"), **given)


class Page(HTMLParser):
    """Collects tags, text, and every attribute that could make a browser ask the network."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            v for k, v in attrs if k in ("src", "href", "srcset", "data", "poster", "action", "xlink:href")
        ]
        assert not [k for k, _ in attrs if k.startswith("on")], f"<{tag}> carries an event handler"

    def handle_data(self, data):
        self.text.append(data)


def page(tmp_path, **changes):
    return (report(**changes).save(tmp_path) / "report.html").read_text(encoding="utf-8")


# What changed


@pytest.mark.parametrize(
    ("name", "unit", "before", "after", "text", "sense"),
    [
        ("size", "MB", 10.61, 2.62, "4.0x smaller", "better"),
        ("size", "MB", 12.3, 3.0, "4.1x smaller", "better"),
        ("size", "MB", 100.0, 8.0, "12.5x smaller", "better"),
        ("latency_p50", "ms", 20.0, 24.0, "1.20x slower", "worse"),
        ("fps", "1/s", 20.0, 30.0, "1.50x faster", "better"),
        ("efficiency", "TOPS/W", 0.2, 0.8, "4.0x higher", "better"),
        ("energy", "mJ", 10.0, 30.0, "3.0x more", "worse"),
        ("parameters", "count", 100.0, 100.2, "no change", "same"),
        ("map33", "%", 98.97, 98.77, "-0.2 points", "worse"),
        ("map33", "%", 98.0, 98.5, "+0.5 points", "better"),
        ("map33", "%", 98.0, 98.003, "no change", "same"),
        ("escape_rate", "%", 0.6, 0.4, "-0.2 points", "better"),
        ("overkill_rate", "%", 1.0, 1.5, "+0.5 points", "worse"),
        ("false_calls_cm2", "1/cm2", 0.1, 0.0, "-0.1 per cm2", "better"),
        ("psnr", "dB", 30.0, 29.25, "-0.75 dB", "worse"),
        ("mystery", "", 2.0, 4.0, "2.0x higher", "unknown"),
    ],
)  # fmt: skip
def test_a_change_is_told_in_the_words_of_its_figure(name, unit, before, after, text, sense):
    got = change(Figure(name, before, unit, HOST, "original"), Figure(name, after, unit, HOST))
    assert (got.text, got.sense) == (text, sense)


@pytest.mark.parametrize(("before", "after"), [(ROOFLINE, ROOFLINE), (HOST, ROOFLINE), (ROOFLINE, HOST)])
def test_what_follows_from_an_estimate_is_an_estimate(before, after):
    assert change(Figure("energy", 40.0, "mJ", before), Figure("energy", 10.0, "mJ", after)).text == "~4.0x less"


def test_measurements_of_two_devices_are_not_compared():
    got = change(Figure("latency_p50", 40.0, "ms", HOST), Figure("latency_p50", 10.0, "ms", PHONE))
    assert (got.text, got.sense, got.note) == ("not comparable", "unknown", "measured on two devices")


def test_a_difference_inside_the_spread_of_both_is_no_difference():
    # hypot(0.3, 0.4) = 0.5
    low, high = Measured("h", "r", 9, spread=0.3), Measured("h", "r", 9, spread=0.4)
    assert change(Figure("map33", 98.0, "%", low), Figure("map33", 97.51, "%", high)).note == "within the spread"
    assert change(Figure("map33", 98.0, "%", low), Figure("map33", 97.49, "%", high)).sense == "worse"


def test_units_that_differ_and_nan_are_not_compared():
    assert change(Figure("size", 1.0, "MB", HOST), Figure("size", 900.0, "kB", HOST)).text == "not comparable"
    assert change(Figure("size", math.nan, "MB", HOST), Figure("size", 1.0, "MB", HOST)).text == "not comparable"


def test_rows_pair_like_basis_with_like():
    figures = [
        Figure("energy", 40.0, "mJ", ROOFLINE, "original"), Figure("energy", 10.0, "mJ", ROOFLINE),
        Figure("energy", 12.0, "mJ", HOST),
        Figure("fps", 9.0, "1/s", PAPER, "original"), Figure("fps", 18.0, "1/s", HOST),
    ]  # fmt: skip
    got = [(r.name, r.original and r.original.value, r.compressed and r.compressed.value) for r in rows(figures)]
    assert got == [("energy", 40.0, 10.0), ("energy", None, 12.0), ("fps", 9.0, 18.0)]


@pytest.mark.parametrize(
    ("name", "unit", "way"),
    [("latency_p99", "ms", "lower"), ("recall_any", "%", "higher"), ("escape_rate", "%", "lower"),
     ("false_calls_cm2", "1/cm2", "lower"), ("map33_loss", "points", "lower"), ("psnr", "dB", "higher"),
     ("x", "", None)],
)  # fmt: skip
def test_better(name, unit, way):
    assert better(name, unit) == way


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(12345.6, 4, "12,350"), (0.0123456, 3, "0.0123"), (251.0, 4, "251"), (0.00001234, 3, "1.23e-05"), (0.0, 4, "0"),
     (-7.4567, 3, "-7.46"), (999.96, 4, "1,000")],
)  # fmt: skip
def test_significant(value, digits, text):
    assert significant(value, digits) == text


@pytest.mark.parametrize(
    ("value", "unit", "basis", "text"),
    [(2713452.0, "count", HOST, "2.713 M"), (12.0, "count", HOST, "12"), (45.25, "1/s", HOST, "45.25 fps"),
     (99.6, "%", HOST, "99.60 %"), (0.6149, "W", ROOFLINE, "~0.615 W"), (math.nan, "%", HOST, "no value")],
)  # fmt: skip
def test_value_text(value, unit, basis, text):
    assert value_text(Figure("x", value, unit, basis)) == text


def test_names_for_people():
    assert [label(n) for n in ("latency_p50", "map33", "map5095", "map33_loss", "escape_rate", "official_f")] == [
        "Latency, median", "mAP@0.33", "mAP@0.50:0.95", "mAP@0.33 loss", "Escape rate", "Official F-score",
    ]  # fmt: skip


def test_every_fact_of_a_basis_is_told():
    measured = dict(
        basis_facts(Figure("size", 1.0, "MB", Measured("dev", "rt", 200, 0.25, "ab", "2026-03-01", "cold")))
    )
    assert measured == {"Device": "dev", "Runtime": "rt", "Runs": "200", "Spread": "+-0.25 MB", "Artifact": "ab",
                        "Date": "2026-03-01", "Note": "cold"}  # fmt: skip
    assert basis_facts(Figure("energy", 1.0, "mJ", ROOFLINE)) == [
        ("Method", "roofline"), ("Assumes", "batch 1"), ("Assumes", "weights from DRAM"), ("Error band", "+-50%"),
    ]  # fmt: skip


# The report and its JSON


def test_verdicts_are_counted_and_failed_is_a_fail():
    got = report()
    assert got.counts == {"PASS": 1, "FAIL": 1, "UNPROVEN": 1} and got.failed
    assert not report(gates=[Gate("Energy", "energy", "<= 20", "mJ", "edge-1w")]).failed


def test_json_has_the_shape_of_the_design():
    data = report().to_json()
    assert set(data) == {"fitkit", "created", "kit", "title", "recipe", "target", "figures", "gates", "trace", "layers",
                         "tables", "notes"}  # fmt: skip
    assert data["recipe"] == {"name": "int8", "cost": "a minute", "expects": "a quarter of the size",
                              "steps": [{"step": "ReportTestStep", "ratio": 0.3, "layers": ["a", "b"]}]}  # fmt: skip
    assert data["figures"][2] == {
        "name": "energy", "stage": "original", "value": 38.0, "unit": "mJ",
        "basis": {"kind": "estimated", "method": "roofline", "assumptions": ["batch 1", "weights from DRAM"],
                  "error_band": 0.5},
    }  # fmt: skip
    assert data["gates"][1]["verdict"] == "FAIL" and data["gates"][1]["bound"] == "<= 2"
    assert data["trace"][0]["skipped"][0] == {"layer": "head.cls", "why": "outputs are fixed"}


def test_a_saved_report_reads_back_the_same(tmp_path):
    gates = [Gate("before", "map33", ">= 98.9", "%", stage="original")]
    saved = report(gates=gates, title="PCB inspection")
    loaded = Report.load(saved.save(tmp_path / "deep" / "er"))
    assert loaded.to_json() == saved.to_json()
    assert loaded.judgements == saved.judgements and loaded.trace == saved.trace and loaded.recipe == saved.recipe
    assert loaded.pictures == ()
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["report.html", "report.json"]


def test_numbers_that_are_not_finite_stay_strict_json(tmp_path):
    saved = report(
        figures=Figures([Figure("size", math.nan, "MB", HOST)]), layers=[{"layer": "a", "sqnr_db": math.inf}]
    )
    text = (saved.save(tmp_path) / "report.json").read_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert data["figures"][0]["value"] is None and data["layers"][0]["sqnr_db"] is None
    assert math.isnan(Report.load(tmp_path).figures.find("size").value)


def test_a_failed_save_leaves_the_old_report(tmp_path):
    report(notes=["old"]).save(tmp_path)
    with pytest.raises(TypeError):
        report(notes=["new"], layers=[{"layer": "a", "kind": object()}]).save(tmp_path)
    assert Report.load(tmp_path).notes == ("old",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:100], "not JSON"), (lambda text: "[]", "expected a JSON object"),
        (lambda text: text.replace('"target"', '"aim"'), "field 'target' is missing"),
        (lambda text: text.replace('"FAIL"', '"MAYBE"'), "verdict 'MAYBE', expected one of PASS, FAIL, UNPROVEN"),
        (lambda text: text.replace("ReportTestStep", "Nothing"), "step 'Nothing' is not known"),
        (lambda text: text.replace('"quoted"', '"guessed"'), "basis kind 'guessed'"),
    ],
    ids=["cut", "list", "field", "verdict", "step", "basis"],
)  # fmt: skip
def test_a_broken_report_json_is_refused_with_its_name(tmp_path, spoil, message):
    path = report().save(tmp_path) / "report.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        Report.load(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Report.load(tmp_path)


def test_pictures_come_from_bytes_or_files_and_must_be_pictures(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    assert report(pictures=[{"title": "a", "path": tmp_path / "a.jpg"}]).pictures[0].media_type == "image/jpeg"
    with pytest.raises(InputError, match=r"picture 'b': .*missing.png cannot be read"):
        report(pictures=[{"title": "b", "path": tmp_path / "missing.png"}])
    with pytest.raises(InputError, match="picture 'c': expected PNG, JPEG, GIF or WebP"):
        report(pictures=[{"title": "c", "png": b"<svg/>"}])


def test_a_table_with_a_short_row_is_refused():
    with pytest.raises(InputError, match=r"table 't': row 1 has 1 cells, expected 2"):
        report(tables=[{"title": "t", "columns": ["a", "b"], "rows": [[1, 2], [3]]}])


# The page


def test_the_page_asks_nothing_of_the_network(tmp_path):
    text = page(tmp_path)
    got = Page(text)
    assert got.addresses and all(a.startswith("data:image/") for a in got.addresses)
    assert "script" not in got.tags and "link" not in got.tags and "iframe" not in got.tags
    assert not re.search(r"url\(|@import|https?:|//[a-z]", re.sub(r"data:image/[^\"]+", "", text))
    assert "default-src 'none'" in text


def test_what_others_wrote_cannot_become_markup(tmp_path):
    trace = [TraceEntry(ReportTestStep(layers=(HOSTILE,)), [{"layer": HOSTILE, "what": HOSTILE, HOSTILE: HOSTILE}],
                        [Skipped(HOSTILE, HOSTILE)], 1.0)]  # fmt: skip
    figure = Figure(HOSTILE, 1.0, HOSTILE, Measured(HOSTILE, HOSTILE, 1, artifact=HOSTILE, note=HOSTILE))
    text = page(
        tmp_path, figures=Figures([figure]), gates=[Gate(HOSTILE, HOSTILE, ">= 0", HOSTILE, HOSTILE)], trace=trace,
        kit=HOSTILE, target=HOSTILE, recipe=Recipe(HOSTILE, (), HOSTILE, HOSTILE), notes=[HOSTILE],
        layers=[{"layer": HOSTILE, "kind": HOSTILE, "bytes": 1, "macs": 1, "sqnr_db": 1.0}],
        tables=[{"title": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "note": HOSTILE}],
        pictures=[{"title": HOSTILE, "png": PNG}],
    )  # fmt: skip
    got = Page(text)
    assert "script" not in got.tags and got.tags.count("img") == 1
    assert "<script" not in text


def test_the_page_shows_all_parts(tmp_path):
    text = " ".join(Page(page(tmp_path, title="PCB inspection")).text)
    flat = " ".join(text.split())
    for words in ("PCB inspection", "1 of 3 gates fails", "Fails: Size", "Not proven: Energy", "4.0x smaller",
                  "-0.2 points", "~3.3x less", "~11.5 mJ", "Tang et al. 2019, table 2", "9f" * 32, "weights from DRAM",
                  "+-50%",
                  "needs a measurement on edge-1w", "1 changed", "2 skipped", "1 min 14 s", "outputs are fixed",
                  "2 layers: head.cls, head.box", "sensitivity 0.125", "ratio = 0.3", "All 2 layers", "31.5 dB",
                  "Runtimes", "21.25", "40.00", "interleaved", "Board 1", "The test split was not seen.",
                  '"step": "ReportTestStep"'):  # fmt: skip
        assert words in flat, words


def test_tiles_tell_of_the_whole_before_its_parts():
    figures = Figures([
        Figure("latency_p50", 10.0, "ms", HOST, "original"), Figure("latency_p50", 12.0, "ms", HOST),
        Figure("fps", 1.0, "1/s", HOST, "original"), Figure("fps", 6.0, "1/s", HOST),
        Figure("alignment", 95.0, "%", HOST, "original"), Figure("alignment", 91.0, "%", HOST),
        Figure("size", 4.0, "MB", HOST, "original"), Figure("size", 1.0, "MB", HOST),
        Figure("energy", 38.0, "mJ", ROOFLINE, "original"), Figure("energy", 11.5, "mJ", ROOFLINE),
        Figure("efficiency", 2.0, "TOPS/W", ROOFLINE, "original"), Figure("efficiency", 1.0, "TOPS/W", ROOFLINE),
    ])  # fmt: skip
    assert [row.name for row in headlines(rows(figures))] == ["size", "fps", "energy", "alignment"]


def test_a_report_of_almost_nothing_still_renders(tmp_path):
    text = page(tmp_path, figures=Figures(), gates=(), trace=(), layers=(), tables=(), pictures=(), notes=())
    assert "No gates were set" in text and "<h2>Layers</h2>" not in text


def test_popovers_have_one_target_each(tmp_path):
    text = page(tmp_path)
    targets, ids = re.findall(r'popovertarget="(\w+)"', text), re.findall(r'<div popover id="(\w+)"', text)
    assert len(ids) == 7 and sorted(targets) == sorted(set(ids))


def test_columns_are_as_tall_as_their_share():
    svg = columns([10.0, 5.0, None, -3.0], ["a", "b", "c", "d<"])
    assert re.findall(r'<rect x="\S+" y="(\S+)" width="0.8" height="(\S+)"/>', svg) == [
        ("0.0", "100.0"), ("50.0", "50.0"), ("99.0", "1.0"),
    ]  # fmt: skip
    assert svg.count('class="none"') == 1 and "<title>d&lt;</title>" in svg


def test_quantities_and_names_for_narrow_columns():
    assert [quantity(v, "B") for v in (999, 48_200, 1_500_000)] == ["999 B", "48.2 kB", "1.5 MB"]
    assert breakable("a.b<.c") == "a.<wbr>b&lt;.<wbr>c"


# The terminal and the READMEs


def test_the_terminal_shows_verdicts_and_literal_brackets():
    from rich.console import Console

    out = StringIO()
    show(report(notes=["[red]not markup[/red]"]), Console(file=out, width=120))
    text = out.getvalue()
    for words in ("4.0x smaller", "~3.3x less", "UNPROVEN", "outputs are fixed", "[red]not markup[/red]",
                  "1 PASS, 1 FAIL, 1 UNPROVEN"):  # fmt: skip
        assert words in text, words


def test_markdown_states_basis_and_marks_estimates():
    text = markdown_results(json.loads(json.dumps(report().to_json())))
    assert "| Size | 10.61 MB | 2.62 MB | 4.0x smaller | measured (1) |" in text
    assert "| Energy per inference | ~38 mJ | ~11.5 mJ | ~3.3x less | estimated (2) |" in text
    assert (
        "1. measured on this-host: AMD EPYC, 2 cores, OpenVINO 2026.4.1 INT8, n = 200\n2. estimated +-50%: roofline"
        in text
    )
    assert "| Energy | <= 20 mJ | UNPROVEN | estimated ~11.5 mJ +-50%; needs a measurement on edge-1w |" in text


def test_markdown_cells_stay_cells():
    name = "a|b\nc <!-- /fitkit --> <b>"
    text = markdown_results(report(gates=[Gate(name, "size", "<= 2", "MB")]).to_json())
    assert "| a\\|b c &lt;!-- /fitkit --> &lt;b> | <= 2 MB | FAIL |" in text


README = "# Kit\n\n<!-- fitkit:int8 -->\nold\n<!-- /fitkit -->\n\nmore \\1\n\n<!-- fitkit:int4 -->\n<!-- /fitkit -->\n"


def test_replace_block_touches_one_block_and_settles():
    once = replace_block(README, "int8", "| \\1 |")
    assert once == README.replace("old", "| \\1 |")
    assert replace_block(once, "int8", "| \\1 |") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [("nothing", "found 0 markers"), (README + README, "found 2 markers"),
     ("<!-- fitkit:int8 -->\n", "is not closed"),
     ("<!-- fitkit:int8 -->\n<!-- fitkit:int4 --><!-- /fitkit -->", "is not closed")],
)  # fmt: skip
def test_replace_block_refuses_missing_doubled_and_open_markers(text, message):
    with pytest.raises(InputError, match=message):
        replace_block(text, "int8", "x")
