"""The report and the comparison: what they show, that nothing leaves the page, and the page in a browser."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from eval_fixtures import pair, save_reward_model, styled, write_jsonl

from distiller.records import InputError
from RewardTrainer.eval.benchmarks import preference
from RewardTrainer.eval.compare import run_comparison
from RewardTrainer.eval.evaluation import Evaluation, accuracy_table, evaluation_of
from RewardTrainer.eval.markdown import build_markdown
from RewardTrainer.eval.report import Run, build_report
from RewardTrainer.eval.run_eval_rm import EvalArguments, main, run

HOSTILE = "<script>alert('pwned')</script><img src=x onerror=alert(1)>"
COUNTS = {"rows": 6, "scored": 5, "skipped": 1, "pairs": 5, "short_subsets": {}}


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)


def hostile_evaluation(tmp_path) -> Evaluation:
    rows = [pair(n, margin=float(n), subset=HOSTILE, prompt=HOSTILE, chosen=HOSTILE) for n in range(4)]
    rows += [pair(4, id=HOSTILE), pair(5, subset={"x": 1}, id=HOSTILE + "2")]
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", rows))
    scores = [[0.5, 1.5], [1.0, 0.0], [2.0, -1.0], [0.0, 0.0], [-3.0, 3.0]]
    return evaluation_of(benchmark, benchmark.items, scores, {**COUNTS, "skipped_rows": benchmark.skipped})


def test_the_report_escapes_every_text_and_loads_nothing(tmp_path):
    page = build_report([Run(HOSTILE, [hostile_evaluation(tmp_path)])])
    assert HOSTILE not in page
    parsed = Page(page)
    assert parsed.tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "a", "base", "form"} & set(parsed.tags)
    assert not {"src", "href", "onerror", "onload", "xlink:href", "action"} & parsed.attributes
    assert "://" not in page and "url(" not in page and "@import" not in page
    # title, subset, id, prompt, chosen, skipped row: all there, as text
    assert sum(HOSTILE in words for words in parsed.words) >= 6


def test_the_pages_policy_allows_its_own_script_and_no_other(tmp_path):
    page = build_report([Run("m", [hostile_evaluation(tmp_path)])])
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{fingerprint}'\"" in page


def test_the_report_shows_every_figure_with_its_interval_and_the_worst_pair_first(tmp_path):
    evaluation = hostile_evaluation(tmp_path)
    page = build_report([Run("model", [evaluation])])
    assert page.count("<svg") == 4  # rewards, calibration, lengths, margin
    assert page.count('r="2.5"') == 4  # pairs with a margin
    low, high = evaluation.intervals["overall"]
    assert f"{evaluation.summary['overall']:.3f} <small>[{low:.3f}, {high:.3f}]</small>" in page
    mistakes = [line for line in page.splitlines() if "gap -" in line]
    assert ["gap -6.000" in line for line in mistakes] == [True, False]
    assert "NaN" not in Page(page).words


def test_the_report_of_one_pair_with_equal_rewards_is_drawn(tmp_path):
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", [pair(0, margin=1.0)]))
    evaluation = evaluation_of(benchmark, benchmark.items, [[2.0, 2.0]], {**COUNTS, "skipped_rows": []})
    assert "None." in build_report([Run("model", [evaluation])])
    table = accuracy_table("pairs", evaluation.summary, "1 row")
    assert table.splitlines()[2].split() == ["-", "-", "-", "0.000"]


def test_markdown_tables_stay_tables_whatever_the_names(tmp_path):
    rows = [pair(0, subset="a | b\n# c"), pair(1, subset="<b>")]
    benchmark = preference.load(write_jsonl(tmp_path / "pairs.jsonl", rows))
    evaluation = evaluation_of(benchmark, benchmark.items, [[1.0, 0.0], [0.0, 1.0]], {**COUNTS, "skipped_rows": []})
    lines = build_markdown([Run("x|y", [evaluation])]).splitlines()
    table = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("|")]
    assert {len(row) for row in table[:3]} == {5} and {len(row) for row in table[3:]} == {5}
    assert "| a \\| b # c | 1.000 [1.000, 1.000] | 1 |" in lines
    assert "| &lt;b> | 0.000 [0.000, 0.000] | 1 |" in lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output directories of two models on a benchmark and a preference file with a bad row."""
    house = tmp_path_factory.mktemp("compare")
    write_jsonl(house / "pairs.jsonl", [*(pair(n, chosen=f"tin {n}") for n in range(12)), pair(20, rejected="")])
    (house / "data" / "example").mkdir(parents=True)
    write_jsonl(house / "data" / "example" / "benchmark.jsonl", [styled(n) for n in range(4)])
    directories = []
    for seed in (0, 1):
        model = save_reward_model(house / f"model{seed}", seed=seed)
        directories.append(house / "eval" / f"run{seed}")
        benchmarks = f"example,{house / 'pairs.jsonl'}"
        run(
            EvalArguments(
                model=str(model),
                benchmarks=benchmarks,
                data_dir=str(house / "data"),
                output_dir=str(directories[-1]),
                num_processes=1,
            )
        )
    return directories


def test_comparison_puts_two_runs_side_by_side_without_a_model(runs, tmp_path):
    table = run_comparison(runs, None, tmp_path / "both")
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert comparison["models"] == [result["model"] for result in results]
    assert len(comparison["comparisons"]) == len(table.splitlines()) == 2
    for row in comparison["comparisons"]:
        first, second = (result["benchmarks"][row["benchmark"]]["overall"] for result in results)
        assert (row["first"], row["second"]) == tuple(comparison["models"])
        assert row["overall"] == [pytest.approx(first), pytest.approx(second)]
        assert row["difference"] == pytest.approx(second - first)
        assert row["interval"][0] <= row["difference"] <= row["interval"][1] and 0 < row["p_value"] <= 1
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count("<svg") == 2 * 2 * 3
    assert "| model |" in (tmp_path / "both" / "results.md").read_text()


def test_a_run_compared_with_itself_differs_by_nothing(runs, tmp_path):
    with pytest.raises(InputError, match="two or more different"):
        run_comparison([runs[0], runs[0]], None, tmp_path / "x")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("results.json", "scores.jsonl"):
        (copy / name).write_bytes((runs[0] / name).read_bytes())
    run_comparison([runs[0], copy], None, tmp_path / "both")
    comparison = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert len(set(comparison["models"])) == 2  # one model twice: told apart by directory
    assert {(row["difference"], row["p_value"]) for row in comparison["comparisons"]} == {(0, 1)}


@pytest.mark.parametrize(
    "flags", [["--benchmarks", "example"], ["--model=mine"], ["--max_length", "64"], ["--overwrite"]]
)
def test_a_flag_that_a_comparison_would_ignore_is_refused(runs, tmp_path, monkeypatch, flags):
    both = ["eval", "--compare", *map(str, runs), "--output_dir", str(tmp_path / "both")]
    monkeypatch.setattr("sys.argv", [*both, *flags])
    with pytest.raises(SystemExit, match=f"--compare .*no use for {flags[0].partition('=')[0]};"):
        main()
    assert not (tmp_path / "both").exists()
    config = tmp_path / "eval.yaml"  # made for evaluations; what it says of them is nobody's request here
    config.write_text("model: m\nbenchmarks: rm-bench\nmax_length: 64\n")
    monkeypatch.setattr("sys.argv", [*both, "--num_processes", "2", "--config", str(config)])
    main()
    assert (tmp_path / "both" / "results.md").exists()


def test_scores_of_other_rows_are_not_compared(runs, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "results.json").write_bytes((runs[0] / "results.json").read_bytes())
    lines = (runs[0] / "scores.jsonl").read_text().splitlines()
    (broken / "scores.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(InputError, match="is not what was evaluated"):
        run_comparison([runs[1], broken], None, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be read"):
        run_comparison([runs[1], tmp_path / "nothing"], None, tmp_path / "out")
    (broken / "results.json").write_text("{}")
    with pytest.raises(InputError, match="no results of eval_rm.sh"):
        run_comparison([runs[1], broken], None, tmp_path / "out")


def test_scores_of_rows_with_other_labels_are_not_compared(runs, tmp_path):
    data = tmp_path / "data" / "example"
    data.mkdir(parents=True)
    write_jsonl(data / "benchmark.jsonl", [styled(n) | {"chosen": styled(n)["rejected"]} for n in range(4)])
    with pytest.raises(InputError, match="texts or labels of example have changed"):
        run_comparison(runs, tmp_path / "data", tmp_path / "out")


@pytest.mark.slow
def test_the_page_sorts_in_a_browser_and_asks_for_nothing(browser, runs, tmp_path):
    from inspect_fixtures import read, requests_of

    run_comparison(runs, None, tmp_path / "both")
    page = tmp_path / "both" / "report.html"
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    cells = (
        "return [...document.querySelectorAll('table')[0].tBodies[0].rows].map((row) => row.cells[%d].dataset.value)"
    )
    click = "document.querySelectorAll('table')[0].tHead.rows[0].cells[%d].querySelector('button').click()"
    models = read(browser, cells % 0)
    for column in (0, 1):
        browser.execute_script(click % column)
        ascending = read(browser, cells % column)
        assert ascending == sorted(ascending, key=float if column else str)
        browser.execute_script(click % column)
        assert read(browser, cells % column) == ascending[::-1]
    assert sorted(read(browser, cells % 0)) == sorted(models)
    assert read(browser, "return document.querySelectorAll('svg').length") == 12
    assert read(browser, "return document.documentElement.scrollWidth <= innerWidth")
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if url != page.as_uri()] == []


@pytest.mark.slow
def test_hostile_texts_do_nothing_in_a_browser(browser, tmp_path):
    from inspect_fixtures import read, requests_of

    path = tmp_path / "report.html"
    path.write_text(build_report([Run(HOSTILE, [hostile_evaluation(tmp_path)])]), encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(path.as_uri())  # an alert would make the next command fail
    assert read(browser, "return document.scripts.length") == 1
    assert read(browser, "return document.images.length") == 0
    assert HOSTILE in read(browser, "return document.querySelector('h1').textContent")
    assert browser.get_log("browser") == []
    assert [url for url in requests_of(browser) if url != path.as_uri()] == []
