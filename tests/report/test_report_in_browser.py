"""The report in a real browser, opened from disk."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun

from nat_plugin_evsys.report.page import Report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
    pytest.mark.timeout(300),
]

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> <b>bold</b> &amp;"

IN_JSON = '{"question": "Question flat?", "functions": [{"name": "route"}]}'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs: r1 gets worse, r2 stays, r3 to r16 get better."""
    made = MadeRun(tmp_path_factory.mktemp("one"))
    fill(made)
    target = made.finish().report_path
    Report([made.path]).write(target)
    return target


def fill(made: MadeRun, gain: float = 1.0) -> None:
    rows = [f"r{number}" for number in range(1, 17)]
    made.measure(0, [made.attempt(row, "printing", float(row == "r1")) for row in rows])
    for epoch in (1, 2):
        groups = [
            [made.attempt(row, f"reply {number} of {row}", float(number < epoch), number) for number in range(4)]
            for row in rows[:8]
        ]
        groups.append([made.attempt("flat", "always the same", 0.0, n, question=IN_JSON) for n in range(4)])
        groups.append([made.attempt("hostile", HOSTILE, float(number), number, question=HOSTILE) for number in (0, 1)])
        groups[0][3] = made.attempt("r1", "half a", None, 3, lost="rollout_timeout", error="TimeoutError: cut off")
        made.train(epoch, groups)
    made.measure(2, [made.attempt(row, f"team of {row}", 0.0 if row in ("r1", "r2") else gain) for row in rows])


class Opened:
    """A page, with everything that it complained about or asked the network for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light", place: str = "") -> None:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = context.new_page()
        self.page.set_default_timeout(60_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + place)
        self.page.wait_for_selector(".group")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def close(self) -> None:
        """Nothing was complained about, and nothing but the file was asked for."""
        self.page.context.close()
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    opened = Opened(browser, report)
    yield opened
    opened.close()


COLOURED_PIXELS = """(selector) => {
  const canvas = document.querySelector(selector + " canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let coloured = 0;
  for (let i = 0; i < data.length; i += 4) {
    const [r, g, b, a] = data.slice(i, i + 4);
    if (a > 200 && Math.max(r, g, b) - Math.min(r, g, b) > 60) coloured += 1;
  }
  return coloured;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_both_widths_and_schemes(browser: Any, report: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, report, width, scheme)
    headings = ["1. Did it get better?", "2. What changed?", "3. Why?", "4. Is it healthy?", "5. With what?"]
    assert opened.texts("section > h2") == headings
    assert opened.page.evaluate(COLOURED_PIXELS, "#better") > 300, "the reward curve is not drawn"
    assert opened.page.evaluate(COLOURED_PIXELS, "#health") > 50, "the health figures are not drawn"
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.strip("rgb()").split(","))
    assert (brightness > 600) == (scheme == "light")
    opened.close()


def test_it_answers_whether_it_got_better(opened: Opened) -> None:
    (answer,) = opened.texts(".verdict .answer")
    assert answer.startswith("Yes. On 16 held-out rows the mean reward rose from 0.062 to 0.875 (+0.812; 95% interval ")
    figures = " ".join(opened.texts("#better .figure"))
    assert "14 better · 1 worse · 1 the same" in figures
    assert "held-out scoring" in figures


def test_regressions_come_first_and_rows_can_be_filtered(opened: Opened) -> None:
    section = opened.page.locator("#changed")
    assert opened.texts("#changed .change .question")[:2] == ["Question r1?", "Question r2?"]
    assert opened.texts("#changed .change .delta")[:3] == ["▼ −1.00", "= same", "▲ +1.00"]
    section.get_by_role("button", name="Better 14").click()
    assert opened.page.locator("#changed .change").count() == 12  # a page of them
    section.get_by_role("button", name="Show 2 more").click()
    assert opened.page.locator("#changed .change").count() == 14
    section.get_by_role("searchbox").fill("team of r7")
    assert opened.texts("#changed .change .question") == ["Question r7?"]
    section.get_by_role("button", name="Show the conversations").click()
    assert opened.page.locator("#changed .change .step.assistant").count() == 2


def test_rollouts_can_be_filtered_and_ordered(opened: Opened) -> None:
    page, why = opened.page, opened.page.locator("#why")
    assert page.locator("#why .group").count() == 10
    assert "42 rollouts: 37 trained on" not in "".join(opened.texts("#why .tools"))
    assert "38 rollouts: 33 trained on, 4 not (zero_variance_group)" in "".join(opened.texts("#why .tools"))
    why.get_by_role("searchbox").fill("reply 2 of r5")
    assert opened.texts("#why .group .question") == ["Question r5?"]
    why.get_by_role("searchbox").fill("")
    why.get_by_label("Show").select_option("zero_variance_group")
    assert opened.texts("#why .group .question") == ["Question flat?"]
    why.get_by_label("Show").select_option("error")
    assert opened.texts("#why .group .question") == ["Question r1?"]
    why.get_by_label("Show").select_option("all")
    why.get_by_label("Order").select_option("worst")
    assert opened.texts("#why .group .question")[0] == "Question flat?"
    why.get_by_label("Rollouts of").select_option("0/epoch/1")
    page.wait_for_selector("#why .group")
    assert "38 rollouts: 33 trained on" in "".join(opened.texts("#why .tools"))


def test_a_token_says_what_training_made_of_it(opened: Opened) -> None:
    page = opened.page
    page.locator("#why .group").nth(1).get_by_role("group").get_by_role("button").first.click()
    tokens = page.locator("#why .detail .tokens span")
    assert tokens.all_inner_texts() == ["reply", " 0", " of", " r2", "<|im_end|>"]
    assert "rgba" in (tokens.first.get_attribute("style") or ""), "an advantage colours its tokens"
    tokens.nth(1).click()
    facts = page.locator("#why .token-facts").inner_text()
    assert "60.7% likely" in facts
    assert "log-ratio +0.100" in facts
    assert "+0.500" in facts
    assert "made more likely" in facts
    page.locator("#why .detail .tokens").press("ArrowRight")
    assert '" of"' in page.locator("#why .token-facts").inner_text()
    assert not tokens.last.get_attribute("style")
    tokens.last.click()
    forced = page.locator("#why .token-facts").inner_text()
    assert "allowed no other token here" in forced
    assert "when trained on" not in forced
    page.get_by_role("button", name="Policy moved").click()
    assert "--up" in (tokens.first.get_attribute("style") or ""), "the policy moved towards it"
    page.get_by_role("button", name="Plain", exact=True).click()
    assert not tokens.first.get_attribute("style")


def test_why_an_attempt_was_not_trained_on_is_said(opened: Opened) -> None:
    page = opened.page
    page.locator("#why .group", has_text="Question flat?").get_by_role("group").get_by_role("button").first.click()
    detail = page.locator("#why .detail")
    assert "All trajectories of the dataset row have the same reward" in detail.inner_text()
    page.locator("#why .group").first.get_by_role("button", name="! none").click()
    assert "TimeoutError: cut off" in detail.inner_text()


def test_an_attempt_has_an_address(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, place="#at=0/epoch/1/r3/2")
    assert opened.page.locator("#why .group.chosen .question").inner_text() == "Question r3?"
    assert "attempt 3 of 4" in " ".join(opened.page.locator("#why .detail-head").inner_text().split())
    opened.close()


def test_on_a_phone_the_attempt_opens_in_its_row(browser: Any, report: Path) -> None:
    opened = Opened(browser, report, width=390)
    opened.page.locator("#why .group").nth(2).get_by_role("group").get_by_role("button").nth(1).click()
    tokens = opened.page.locator("#why .inline-detail .tokens span")
    tokens.first.click()
    assert "likely" in opened.page.locator("#why .inline-detail .token-facts").inner_text()
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    opened.close()


def test_what_a_model_said_is_text(opened: Opened) -> None:
    assert HOSTILE in opened.texts("#why .group .question")
    opened.page.locator("#why .group", has_text="window.hacked").get_by_role("group").get_by_role(
        "button"
    ).first.click()
    assert HOSTILE in opened.page.locator("#why .detail").inner_text()
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("img").count() == 0


def test_secrets_of_the_config_are_not_in_it(report: Path) -> None:
    text = report.read_text()
    assert "sk-very-secret" not in text
    assert "<redacted>" in text.replace("\\u003c", "<").replace("\\u003e", ">")


def test_the_theme_can_be_chosen(opened: Opened) -> None:
    opened.page.get_by_role("button", name="Dark").click()
    assert opened.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert opened.page.evaluate(COLOURED_PIXELS, "#better") > 300


def test_a_run_of_one_answer_says_so_at_the_top(browser: Any, tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    made.measure(0, [made.attempt("h", "x", 0.0)])
    rows = {row: f"team {row}" for row in ("a", "b", "c", "d")}
    made.train(1, [[made.attempt(row, "all of them", 0.0, n, expected=rows[row]) for n in range(4)] for row in rows])
    made.measure(1, [made.attempt("h", "x", 0.0)])
    Report([made.path]).write(made.finish().report_path)
    opened = Opened(browser, made.run_dir.report_path)
    assert "Every reward of epoch 1 is 0.000" in opened.page.locator(".verdict").inner_text()
    assert '"all of them"' in opened.page.locator("#health").inner_text()
    assert "Rows without a signal" in opened.page.locator("#health article[data-state=crossed]").first.inner_text()
    opened.close()


def test_two_runs_are_compared(browser: Any, tmp_path: Path) -> None:
    runs = [MadeRun(tmp_path), MadeRun(tmp_path, extra={"learning_rate": 0.5})]
    fill(runs[0])
    fill(runs[1], gain=0.25)
    target = tmp_path / "both.html"
    Report([made.finish().path for made in runs]).write(target)
    opened = Opened(browser, target)
    assert opened.texts(".verdict .answer")[0].startswith(
        "A is better: on the same 16 held-out rows it earned 0.656 more"
    )
    assert "extra.learning_rate" in opened.page.locator("#setup table").first.inner_text()
    assert opened.texts("#changed .change .delta")[0] == "▼ −0.75"  # A's last against B's last
    opened.close()


def test_what_does_not_fit_is_said(browser: Any, report: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.html"
    Report([report.parent], megabytes=0.002).write(target)
    opened = Opened(browser, target)
    assert "left out" in opened.page.locator("#why").inner_text()
    assert opened.page.locator("#why option[disabled]").count() > 0
    opened.close()


READY_AT = """new MutationObserver((_, watch) => {
  if (document.querySelectorAll("#why .group").length < 25) return;
  window.readyAt = performance.now() / 1000;
  watch.disconnect();
}).observe(document, { childList: true, subtree: true });"""


def test_four_thousand_rollouts_open_at_once(browser: Any, tmp_path: Path) -> None:
    made, chance = MadeRun(tmp_path), random.Random(0)
    for epoch in range(1, 9):
        groups = [
            [
                made.attempt(f"r{row}", " ".join(f"word{chance.randrange(500)}" for _ in range(40)), number / 7, number)
                for number in range(8)
            ]
            for row in range(64)
        ]
        made.train(epoch, groups)
    target = made.finish().report_path
    started = time.monotonic()
    size = Report([made.path]).write(target)
    written = time.monotonic() - started
    assert size < 10_000_000
    ready = []
    for _ in range(3):
        page = browser.new_page()
        page.add_init_script(READY_AT)
        page.goto(target.as_uri())
        page.wait_for_selector("#why .group:nth-of-type(25)", timeout=60_000)
        ready.append(page.evaluate("window.readyAt"))
        page.close()
    print(f"4,096 rollouts: {size / 1e6:.1f} MB, written in {written:.1f} s, open after {min(ready):.2f} s")
    assert min(ready) < 2.0
