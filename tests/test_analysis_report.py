"""`python -m analysis.report`: one page that holds all of a folder, asks no network, and is clicked in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from analysis.errors import ResultsError
from analysis.report import routing
from analysis.report.__main__ import main, write_report
from analysis.report.routing import viewer_data
from analysis.report.runs import entries
from analysis.style import new_figure, png_alone, save
from tests import swiftmoe_results, topology_results
from tests.analysis_results import LABELS, layer_rows, write_parquet, write_run
from tests.browser import NoBrowser, browser, complaints, found, resize

MARKUP = "</script><img src=x onerror=alert(1)> & <b>bold</b>"
WIDTHS = (1280, 400)


def write_outputs(root: Path) -> Path:
    """A comparison, a layer benchmark, and runs: with replicas, interrupted, half written, contradicting."""
    topology_results.write_comparison(root)
    rows = [*layer_rows("flat", "small"), *layer_rows("tutel", "small", status=f"failed: {MARKUP}")]
    stages = [
        row | {"metric": "stage_time", "part": f"{direction}/{stage}", "value": 0.01, "unit": "s"}
        for row in rows
        if row["metric"] == "step_time"
        for direction in ("forward", "backward")
        for stage in ("gate", "dispatch", "experts", "combine")
    ]
    write_parquet(root / "layer" / "samples.parquet", pd.DataFrame([*rows, *stages]), LABELS)
    swiftmoe_results.write_run(root / "more", "swiftmoe", 0)
    write_run(root / "more", "flat", 0, "interrupted", MARKUP)
    half = write_run(root / "more", "deepspeed", 0)
    (half / "metrics.parquet").write_bytes((half / "metrics.parquet").read_bytes()[:200])
    swapped = write_run(root / "more", "fairscale", 0)
    (swapped / "config.yaml").write_text((swapped / "config.yaml").read_text().replace("fairscale", "reference"))
    return root


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_outputs(tmp_path_factory.mktemp("outputs"))
    write_report(root, root / "report.html", judged=root)
    return root / "report.html"


@pytest.fixture(scope="module")
def driver(page: Path) -> Iterator[Chrome]:
    with browser() as started:
        started.get(page.as_uri())
        yield started


def test_the_page_is_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    sources = re.findall(r"""(?:src|href)="([^"]*)""", text)
    assert len(sources) > 10
    assert [source[:40] for source in sources if not source.startswith(("data:image/png;base64,", "#"))] == []
    assert "url(" not in text
    assert "@import" not in text


def test_what_was_skipped_is_told(page: Path) -> None:
    skipped = page.read_text().split('<section id="skipped">')[1]
    assert "interrupted: &lt;/script&gt;&lt;img src=x" in skipped
    assert "corrupt: metrics.parquet can&#x27;t be read" in skipped
    assert "its files disagree on system" in skipped


def test_nothing_to_show_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "no finished results there" in capsys.readouterr().err


def test_one_run_alone_makes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = topology_results.write_run(tmp_path, "ta_moe", 0)
    assert main([str(tmp_path), "--claims", str(tmp_path), "--run", run.name]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path}/report.html\n"
    text = (tmp_path / "report.html").read_text()
    assert "1 training run, 1 of them finished" in text
    (data,) = json.loads(text.split('id="viewer-data">')[1].split("</script>")[0])
    counts = topology_results.dispatch_counts("ta_moe")
    assert np.array_equal(np.reshape(data["counts"], counts.shape), counts)
    assert main([str(tmp_path), "--run", "another"]) == 2
    assert f"--run another: no finished run of that name. Fix: name one of {run.name}" in capsys.readouterr().err


def test_steps_are_thinned_and_what_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        topology_results.write_run(tmp_path, "flat", seed)
    none = topology_results.write_run(tmp_path, "ta_moe", 0, arrays={})
    runs, _ = entries(tmp_path)
    one_step = topology_results.LAYERS * 4 * (8 + 4)
    monkeypatch.setattr(routing, "MOST_NUMBERS", 3 * 3 * one_step)
    first = runs[1].name
    data, missing = viewer_data(runs, first)
    shown = json.loads(data)
    assert [one["name"] for one in shown] == [first, runs[0].name]
    assert shown[0]["steps"] == [0, 10, 19]  # of 20
    assert shown[0]["logged"] == topology_results.STEPS
    assert missing == [f"{none.name}/routing.npz: there is no such file. Fix: run it again."]
    monkeypatch.setattr(routing, "MOST_NUMBERS", 3 * one_step)
    data, missing = viewer_data(runs)
    assert json.loads(data) == []
    assert f"{first}: too large to embed beside the others. Fix: --run {first}" in missing
    with pytest.raises(ResultsError, match=r"--run .*: no finished run"):
        viewer_data(runs, "none of them")


def click_through(driver: Chrome) -> None:
    """Everything that can be clicked on the page."""
    for link in driver.find_elements(By.CSS_SELECTOR, "nav a"):
        link.click()
        assert driver.current_url == link.get_attribute("href")
    for summary in driver.find_elements(By.TAG_NAME, "summary"):
        driver.execute_script("arguments[0].click()", summary)
    run = Select(driver.find_element(By.ID, "viewer-run"))
    for name in [option.text for option in run.options]:
        run.select_by_visible_text(name)
        Select(driver.find_element(By.ID, "viewer-layer")).select_by_index(1)
        slider(driver).send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.END)
        driver.find_element(By.CSS_SELECTOR, "#viewer-experts rect").click()


def slider(driver: Chrome) -> WebElement:
    return driver.find_element(By.ID, "viewer-step")


def field(driver: Chrome, kind: str, index: int) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, f'#viewer-{kind} rect[data-index="{index}"]')


def shown(driver: Chrome, name: str) -> str:
    return driver.find_element(By.ID, f"viewer-{name}").text


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_clicked_through_without_a_complaint(driver: Chrome, width: int) -> None:
    resize(driver, width)
    driver.refresh()
    click_through(driver)
    assert complaints(driver) == []
    overhang = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(overhang) == 0, "the page as a whole scrolls sideways"
    pictures = driver.find_elements(By.TAG_NAME, "img")
    assert len(pictures) > 5
    assert [picture for picture in pictures if picture.get_property("naturalWidth") == 0] == []
    frames = driver.find_elements(By.TAG_NAME, "figure")
    assert all(300 < frame.size["width"] <= width for frame in frames)


def test_text_of_a_file_is_no_markup(driver: Chrome) -> None:
    assert driver.find_elements(By.CSS_SELECTOR, 'img[src="x"]') == []
    assert MARKUP in driver.execute_script("return document.getElementById('runs').textContent")


def test_the_slider_shows_each_step_of_the_chosen_run(driver: Chrome) -> None:
    resize(driver, WIDTHS[0])
    driver.refresh()
    runs = Select(driver.find_element(By.ID, "viewer-run"))
    runs.select_by_visible_text(next(option.text for option in runs.options if option.text.startswith("ta_moe-toy-s1")))
    assert "ta_moe (native), seed 1; measured; 20 of 20 logged steps" in shown(driver, "label")
    counts = topology_results.dispatch_counts("ta_moe")
    slider(driver).send_keys(Keys.HOME)
    assert shown(driver, "step-name") == "0 (1 of 20 shown)"
    field(driver, "experts", 8 + 3).click()
    first = int(counts[0, :, 1, 3].sum())
    assert shown(driver, "readout") == f"rank 1 to expert 3: {first} copies, {first / 2:.1f} % of the rank's"
    fill = field(driver, "experts", 8 + 3).get_attribute("fill")
    slider(driver).send_keys(Keys.END)
    assert shown(driver, "step-name") == "19 (20 of 20 shown)"
    last = int(counts[-1, :, 1, 3].sum())
    assert last > first
    assert shown(driver, "readout").startswith(f"rank 1 to expert 3: {last} copies")
    assert field(driver, "experts", 8 + 3).get_attribute("fill") != fill
    Select(driver.find_element(By.ID, "viewer-layer")).select_by_visible_text("layer 1")
    assert shown(driver, "readout").startswith(f"rank 1 to expert 3: {counts[-1, 1, 1, 3]} copies")
    field(driver, "links", 4 + 2).click()
    assert shown(driver, "readout") == "rank 1 to rank 2, over level network: 15 copies, 15.0 % of the rank's"
    rows = [row.text for row in driver.find_elements(By.CSS_SELECTOR, "#viewer-levels tbody tr")]
    assert rows == ["self (stays on its rank) 160 (40.0 %)", "node 120 (30.0 %)", "network 120 (30.0 %)"]


def bytes_shown(driver: Chrome) -> list[str]:
    """What crosses the outermost level, by class."""
    cells = driver.find_elements(By.CSS_SELECTOR, "#viewer-levels tbody tr:last-child td")
    return [cell.text for cell in cells][2:]


def test_bytes_of_a_step_stand_by_level_and_class(driver: Chrome, tmp_path: Path) -> None:
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["step"] == 58) & (table["part"] == "network/alltoall"), "value"] = np.nan
        return table

    run = write_run(tmp_path, "flat", 0, change=spoil)
    counts = topology_results.dispatch_counts("flat")
    np.savez_compressed(run / "routing.npz", steps=np.arange(len(counts)) + 41, dispatch_counts=counts)
    write_report(tmp_path, tmp_path / "report.html")
    driver.get((tmp_path / "report.html").as_uri())
    head = [cell.text for cell in driver.find_elements(By.CSS_SELECTOR, "#viewer-levels th")]
    assert head == ["level", "copies, before drops", "alltoall bytes", "reduction bytes"]
    assert shown(driver, "step-name").startswith("60 ")
    assert bytes_shown(driver) == ["-", "-"]  # no step 60 among the metrics
    slider(driver).send_keys(Keys.ARROW_LEFT)
    sent = pd.read_parquet(run / "metrics.parquet").query("metric == 'bytes' and step == 59").set_index("part")["value"]
    assert bytes_shown(driver) == [f"{sent[f'network/{kind}'] / 2**20:#.3g} MiB" for kind in ("alltoall", "reduction")]
    slider(driver).send_keys(Keys.ARROW_LEFT)
    assert bytes_shown(driver) == ["-", "-"]  # a number that is none
    assert complaints(driver) == []


def test_where_replicas_hide_the_links_the_page_says_so(driver: Chrome, page: Path) -> None:
    driver.get(page.as_uri())
    runs = Select(driver.find_element(By.ID, "viewer-run"))
    runs.select_by_visible_text(next(option.text for option in runs.options if "swiftmoe" in option.text))
    assert "experts have replicas" in shown(driver, "no-links")
    assert driver.find_elements(By.CSS_SELECTOR, "#viewer-links rect") == []
    assert len(driver.find_elements(By.CSS_SELECTOR, "#viewer-experts rect")) == 16


def test_a_complaint_of_a_page_is_heard(driver: Chrome, page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    (tmp_path / "broken.html").write_text(text.replace("</body>", "<script>nobody_defined_this()</script></body>"))
    (tmp_path / "asking.html").write_text(text.replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    driver.get((tmp_path / "broken.html").as_uri())
    assert "nobody_defined_this is not defined" in " ".join(complaints(driver))
    driver.get((tmp_path / "asking.html").as_uri())
    assert "Content Security Policy" in " ".join(complaints(driver))


def test_a_browser_that_is_not_there_is_told() -> None:
    with pytest.raises(NoBrowser, match=r"a browser of no name: not installed.* Fix: apt-get install chromium"):
        found("a browser of no name")


def test_only_within_its_block_are_figures_saved_as_png_alone(tmp_path: Path) -> None:
    figure, _ = new_figure(1.0)
    with png_alone():
        save(figure, tmp_path / "shown")
    save(figure, tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.pdf", "kept.png", "shown.png"]
