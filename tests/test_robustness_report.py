"""The report of the robustness benchmark: its numbers, its text, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.data import camera

from benchmarks.robustness.figures import (
    DARK,
    INKS,
    LIGHT,
    Line,
    blend,
    contrast,
    data_uri,
    plot,
)
from benchmarks.robustness.report import Picture, write_report
from benchmarks.robustness.shifts import REAL
from benchmarks.robustness.summary import Interval
from benchmarks.robustness.table import REFERENCE, Budget, Place, Row, Series
from benchmarks.robustness.views import columns, number, trainings
from patchscore.errors import InputError

HOSTILE = '"><script>alert("x")</script><img src="//x.example" onerror=alert(1)>'
VOID = {"meta", "link", "img", "input", "br"}
IMAGES = 4

# PSNR of the first image in dB by (study, shift) and method: the others have one dB more each.
PSNR = {
    ("gain", REFERENCE): {"patch prior": 30.0, "CNN": 30.5, "BM3D": 29.75},
    ("gain", "gain 0.1"): {"patch prior": 30.0, "CNN": 19.25, "BM3D": 29.75},
    ("gain", "gain 10"): {"patch prior": 30.0, "CNN": 15.5, "BM3D": 29.75},
    ("content", REFERENCE): {"patch prior": 30.0, "CNN": 30.5, "BM3D": 29.75},
    ("content", "documents"): {"patch prior": 28.0, "CNN": 28.25, "BM3D": 29.0},
}


def rows(sigmas: tuple[float, ...] = (15.0, 25.0), cnn: str = "CNN") -> list[Row]:
    return [
        Row(
            study,
            shift,
            "" if method == "BM3D" else "bsd400",
            0 if method == "BM3D" else 100,
            "documents" if shift == "documents" else "bsd68",
            f"image {n}",
            sigma,
            cnn if method == "CNN" else method,
            {"BM3D": "two stages"}.get(method, "one-step"),
            value + n - sigma / 5,
            0.9,
            7,
            f"version of {method}",
            "a processor",
            "digest",
        )
        for (study, shift), values in PSNR.items()
        for sigma in sigmas
        for method, value in values.items()
        for n in range(IMAGES)
    ]


def budgets(tuned: str = "learning rate 0.004, the best of 5") -> list[Budget]:
    return [
        Budget("patch prior", "bsd400", 100, 12345, 71.6, 900, tuned, "a processor"),
        Budget("CNN", "bsd400", 100, 67890, 72.1, 1400, tuned, "a processor"),
    ]


def pictures(title: str = "a photograph") -> list[Picture]:
    """One that the patch prior wins, and one that it loses."""
    clean = camera()[100:164, 200:264].astype(float)
    noisy = clean + 25 * np.random.default_rng(0).standard_normal(clean.shape)
    better, worse = clean + 0.2 * (noisy - clean), clean + 0.4 * (noisy - clean)
    return [
        Picture(title, "with noise", clean, noisy, "noisy", noisy, "patch prior", better, 255.0),
        Picture(f"{title}, lost", "a loss", clean, noisy, "BM3D", better, "patch prior", worse, 255.0),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, rows(), budgets(), pictures())
    return path


class Page(HTMLParser):
    """What the tests look at; every tag has to be closed, in its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.heat: dict[tuple[str, str, str, str], str] = {}
        self.panel: dict[str, str] = {}
        self.cells: list[list[str]] | None = None
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if "data-measure" in attributes:
            self.panel = attributes
        if tag == "table":
            self.cells = [] if attributes.get("class") == "heat" else None
        if self.cells is not None and tag == "tr":
            self.cells.append([])
        if self.cells is not None and tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table" and self.cells:
            _, columns, *lines = self.cells
            for head, *values in lines:
                for column, value in zip(columns, values, strict=True):
                    key = self.panel["data-measure"], self.panel["data-sigma"], head, column
                    self.heat[key] = value

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.cells and self.cells[-1]:
            self.cells[-1][-1] += data


def test_holds_everything_and_loads_nothing(report) -> None:
    page = Page(report)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert re.match(r"data:|#|$", attributes.get(name, ""))
    assert "//" not in re.sub(
        r'"data:image/png;base64,[^"]*"|^//.*$|^ *// .*$', "", page.text, flags=re.M
    )
    assert "url(" not in page.text
    assert "@import" not in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))

    text = " ".join(page.words)
    for words in (
        *("patch prior", "CNN", "BM3D", "gain 0.1", "gain 10", "documents", "12\u2009345", "72", "900"),
        *("learning rate 0.004, the best of 5", "version of CNN", "a processor", "Seed 7", "two stages"),
    ):
        assert words in text
    assert text.index("Where the patch prior loses") < text.index("The shift matrix")
    # The picture that is lost comes with the losses, the other one after the studies.
    assert text.index("a photograph, lost") < text.index("The shift matrix")
    assert text.index("Study by study") < text.index("with noise")


def test_numbers_of_the_matrix(report) -> None:
    heat = Page(report).heat
    drops = {
        ("CNN", "gain 0.1"): 19.25 - 30.5,
        ("CNN", "gain 10"): 15.5 - 30.5,
        ("CNN", "documents"): 28.25 - 30.5,
        ("BM3D", "documents"): 29.0 - 29.75,
        ("patch prior", "gain 0.1"): 0.0,
        ("patch prior", "documents"): -2.0,
    }
    differences = {
        ("CNN", "gain 0.1"): 19.25 - 30,
        ("CNN", "documents"): 28.25 - 28,
        ("BM3D", "documents"): 29.0 - 28,
        ("BM3D", "gain 10"): 29.75 - 30,
    }
    heads = {
        "CNN": "CNNone-step, 100 images",
        "BM3D": "BM3Dtwo stages",
        "patch prior": "patch priorone-step, 100 images",
    }
    for measure, expected in (("drop", drops), ("difference", differences)):
        for (method, shift), value in expected.items():
            for sigma in ("15", "25"):
                assert heat[measure, sigma, heads[method], shift] == number(value)
    # What the others are compared with: the PSNR itself, at 25 the mean of 25, 26, 27 and 28.
    assert heat["difference", "25", heads["patch prior"], "gain 0.1"] == "26.50"


def test_untrained_methods_are_compared_on_the_sets_of_each_training() -> None:
    """BM3D has rows in distribution on both sets; each drop takes the set that the prior learned."""
    psnr = {"disks": 30.0, "rectangles": 40.0}
    two_sets = [
        row._replace(
            study="phantoms",
            shift=REFERENCE if test_set == train_set else f"{train_set} to {test_set}",
            train_set="" if method == "BM3D" else train_set,
            training_images=0 if method == "BM3D" else 10,
            test_set=test_set,
            method=method,
            psnr=psnr[test_set] + int(row.image[-1]) + 2 * (method == "BM3D") * (test_set == "disks"),
        )
        for row in rows()[:IMAGES]
        for train_set in psnr
        for test_set in psnr
        for method in ("patch prior", "BM3D")
    ]
    disks, rectangles = trainings(two_sets)
    assert (disks.train_set, rectangles.train_set) == ("disks", "rectangles")
    bm3d = Series("BM3D", "one-step", "", 0)
    shift, back = (
        Place("phantoms", name, 15.0) for name in ("disks to rectangles", "rectangles to disks")
    )
    assert disks.cells["drop"][shift, bm3d].mean == pytest.approx(40 - 32, abs=1e-10)
    assert rectangles.cells["drop"][back, bm3d].mean == pytest.approx(32 - 40, abs=1e-10)
    inside = Place("phantoms", REFERENCE, 15.0), bm3d
    assert disks.cells["difference"][inside] == Interval(2.0, 2.0, 2.0, IMAGES)
    assert rectangles.cells["difference"][inside] == Interval(0.0, 0.0, 0.0, IMAGES)


def test_real_pairs_stand_beside_the_shifts_of_their_study() -> None:
    """Their level differs from image to image; they are one group all the same."""
    noise = [
        row._replace(study="noise", shift=shift, sigma=sigma + (shift == REAL) * int(row.image[-1]))
        for row in rows((25.0,))
        if (row.study, row.shift) == ("gain", REFERENCE)
        for shift, sigma in ((REFERENCE, 25.0), (REAL, 9.0))
    ]
    (training,) = trainings(noise)
    cnn = Series("CNN", "one-step", "bsd400", 100)
    found = training.cells["difference"][Place("noise", REAL, 25.0), cnn]
    assert found == Interval(0.5, 0.5, 0.5, IMAGES)


def test_shifts_are_in_the_order_of_their_numbers() -> None:
    shifts = [
        "offset 2",
        "gain 10",
        "offset -0.5",
        "gain 0.5",
        "gain 2",
        REFERENCE,
        "offset 0.5",
        "gain 0.1",
    ]
    assert [place.shift for place in columns(Place("gain", shift, 25.0) for shift in shifts)] == [
        *(REFERENCE, "gain 0.1", "gain 0.5", "gain 2", "gain 10"),
        *("offset -0.5", "offset 0.5", "offset 2"),
    ]


def test_intervals_are_drawn_where_they_belong() -> None:
    """On the axis of the signed square root, -4, 0 and 4 dB are equally far from each other."""
    line = Line("a <b>", "m3", [(0, Interval(0.0, -4.0, 4.0, 9))])
    drawing = plot("t", ["here"], [line])
    ((low, high),) = re.findall(r'<g><title>.*?y1="([\d.]+)" y2="([\d.]+)"', drawing)
    centre = float(re.search(r'class="mark".*? y="([\d.]+)"', drawing)[1]) + 4
    assert float(low) - centre == pytest.approx(centre - float(high), abs=0.11)  # places have one digit
    assert centre == float(re.search(r'class="zero".*?y1="([\d.]+)"', drawing)[1])
    assert "a &lt;b&gt;, here: 0.00 dB (\u22124.00 to +4.00)" in drawing


def test_one_image_decides_nothing(tmp_path) -> None:
    write_report(tmp_path / "report.html", [row for row in rows() if row.image == "image 0"], [], [])
    page = Page(tmp_path / "report.html")
    assert "Of 0 comparisons" in " ".join(page.words)
    assert page.heat["difference", "25", "BM3Dtwo stages", "documents"] == "+1.00"
    assert "<span>+1.00</span>" in page.text
    assert "<b>+1.00</b>" not in page.text


def test_nothing_to_compare_with(tmp_path) -> None:
    alone = [row for row in rows() if row.method == "patch prior" and row.shift == REFERENCE]
    write_report(tmp_path / "report.html", alone, [], [])
    assert "nothing to compare at this noise level" in " ".join(Page(tmp_path / "report.html").words)


def test_losses_are_counted_and_named(report) -> None:
    text = " ".join(Page(report).words)
    # 2 levels x 5 places x 2 rivals; the CNN leads in 3 places, BM3D in 1, neither by chance.
    assert "Of 20 comparisons on the same noisy images" in text
    assert "behind in 8" in text
    assert "ahead in 12" in text
    digest = text[text.index("Where the patch prior loses") : text.index("All 8 losses")]
    assert digest.index("BM3D") < digest.index("CNN")
    assert "+1.00" in digest
    assert "+0.50" in digest


def test_without_a_loss_it_says_so(tmp_path) -> None:
    winning = [row._replace(psnr=row.psnr - 20 * (row.method != "patch prior")) for row in rows()]
    write_report(tmp_path / "report.html", winning, budgets(), [])
    assert "No other method is ahead" in " ".join(Page(tmp_path / "report.html").words)


def test_networks_that_learned_too_little_get_no_verdict(tmp_path) -> None:
    path = tmp_path / "report.html"
    short = [budget._replace(steps=200) for budget in budgets()[1:]]
    write_report(path, rows(), [budgets()[0], *short], pictures())
    text = path.read_text(encoding="utf-8")
    assert "No verdict: a network has learned for 200 steps only" in text
    assert "behind in" not in text
    assert "losses</summary>" not in text


def test_hostile_names_are_text(tmp_path) -> None:
    path = tmp_path / "report.html"
    hostile = [
        row._replace(
            **{
                name: HOSTILE
                for name in ("test_set", "image", "estimate", "version", "machine", "input")
                if row.method == "BM3D" or name not in ("estimate", "test_set", "image")
            }
        )
        for row in rows(cnn=HOSTILE)
        if row.method != "BM3D"
    ]
    hostile = [row._replace(shift=HOSTILE if row.shift == "documents" else row.shift) for row in hostile]
    picture = pictures(HOSTILE)[0]._replace(caption=HOSTILE, left_label=HOSTILE, right_label=HOSTILE)
    budget = Budget(HOSTILE, HOSTILE, 1, 1, 1.0, 1, HOSTILE, HOSTILE)
    write_report(path, hostile, [budget], [picture])
    page = Page(path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("img") == 3
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert " ".join(page.words).count(HOSTILE) >= 8


def test_same_rows_give_the_same_bytes(report, tmp_path) -> None:
    shuffled = [rows()[i] for i in np.random.default_rng(0).permutation(len(rows()))]
    write_report(tmp_path / "again.html", shuffled, budgets(), pictures())
    assert (tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_rows_without_a_patch_prior(tmp_path) -> None:
    others = [row for row in rows() if row.method != "patch prior"]
    with pytest.raises(InputError, match="rows are of BM3D, CNN; run the benchmark with 'patch prior'"):
        write_report(tmp_path / "report.html", others, [], [])
    assert not any(tmp_path.iterdir())


def test_text_is_readable_on_every_colour() -> None:
    # 4.5 is what the Web Content Accessibility Guidelines ask of small text.
    for value in np.linspace(-15, 15, 301):
        for colours in (LIGHT, DARK):
            assert max(contrast(blend(value, colours), ink) for ink in INKS) >= 4.5
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert blend(0.0, LIGHT) == LIGHT[0]
    assert blend(-10.0, LIGHT) == LIGHT[1]
    assert blend(99.0, LIGHT) == LIGHT[2]


def test_numbers_have_a_true_minus() -> None:
    assert [number(x) for x in (-1.236, 0.5, -0.001, 0.0)] == ["\u22121.24", "+0.50", "0.00", "0.00"]


def test_pictures_keep_their_levels() -> None:
    uri = data_uri(np.array([[-5.0, 0.0], [1.0, 9.0]]), 0.0, 2.0)
    file = io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    # 127.5 is rounded to the even number.
    assert np.asarray(Image.open(file)).tolist() == [[0, 0], [128, 255]]


class Browser:
    """Chromium by its DevTools protocol, over two pipes: one message of JSON after another."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.pipe_in = os.pipe()
        self.pipe_out, theirs_out = os.pipe()
        # A proxy that is not there: what is not in the file cannot be had.
        command = (
            "exec chromium --headless --no-sandbox --disable-gpu --proxy-server=127.0.0.1:9 "
            f'--remote-debugging-pipe --user-data-dir="$0" 3<&{theirs_in} 4>&{theirs_out}'
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command, str(profile)],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.count, self.rest, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method: str, **params: object) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.pipe_in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                return answer["result"]
            self.events.append(answer)

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.pipe_out], [], [], 60)[0], "Chromium does not answer"
            piece = os.read(self.pipe_out, 1 << 20)
            assert piece, "Chromium has ended"
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path) -> None:
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=path.as_uri())
        while self.named("Page.loadEventFired") == []:
            self.events.append(self.read())

    def named(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def value(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def wait_until(self, holds: Callable[[], bool], seconds: float = 20.0) -> None:
        """A click is handled when the page gets to it: on a busy machine, later."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        os.close(self.pipe_in)
        os.close(self.pipe_out)


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    chromium = Browser(tmp_path / "profile")
    yield chromium
    chromium.close()


def test_in_a_browser_without_a_network(browser, report) -> None:
    browser.open(report)
    split = "getComputedStyle(document.querySelector('.stage')).getPropertyValue('--split')"
    clip = "getComputedStyle(document.querySelector('.before')).clipPath"
    assert browser.value(split) == "50%"

    browser.value("document.querySelector('.stage input').focus()")
    for _ in range(7):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", windowsVirtualKeyCode=39)
    assert browser.value(split) == "57%"
    assert browser.value(clip) == "inset(0px 43% 0px 0px)"

    browser.value("document.querySelector('.stage').scrollIntoView({behavior: 'instant'})")
    left, top, width, height = browser.value(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('.stage').getBoundingClientRect())"
    )
    browser.click(left + 0.2 * width, top + height / 2)
    # The thumb is one pixel wide, and the step one hundredth.
    browser.wait_until(lambda: abs(float(browser.value(split).rstrip("%")) - 20) <= 1)

    shown = "[...document.querySelectorAll('#matrix .panel')].filter(p => !p.hidden).map(p => p.dataset)"
    assert browser.value(f"{shown}.map(d => d.measure + d.sigma)") == ["drop25"]
    for choice in ("difference", "15"):
        browser.value(f"document.querySelector('#matrix [data-value=\"{choice}\"]').click()")
    assert browser.value(f"{shown}.map(d => d.measure + d.sigma)") == ["difference15"]

    browser.value("document.querySelector('.peek button').click()")
    assert browser.value("getComputedStyle(document.querySelector('.over')).visibility") == "visible"

    # Nothing but the tables scrolls sideways on a phone.
    browser.send(
        "Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True
    )
    assert browser.value("document.documentElement.scrollWidth") == 390

    asked = {event["request"]["url"] for event in browser.named("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}
    assert browser.named("Runtime.exceptionThrown") + browser.named("Log.entryAdded") == []
