"""Tables and figures: the same from any order of records, in any process; a difference is claimed only when it is there."""
import csv
import random
import re
from dataclasses import replace

import pytest
import torch
from matplotlib.colors import Normalize

from cap_nb.core.plots import METHOD_LOOKS, OTHER_LOOKS, method_looks, save_figure
from cap_nb.analysis import (
    PAPER_NUMBERS, compare, compare_methods, compare_with_paper, comparison_frame, correct_family, holm, method_table,
    method_title, paper_measure, paper_table, plot_head_importance)
from cap_nb.jobs.tables import (
    ELSEWHERE, answer_markdown, answer_table, comparison_grid, comparison_mark, comparison_markdown, comparison_text,
    head_importance_in_words, interval_text, pairs_with, plot_importance_distribution, plot_sparsity_curves,
    table_csv, table_latex, table_markdown, table_notes)
from cap_nb.evaluation import AnswerRecord, Evaluation, LossRecord, Perplexity, wilson_interval
from cap_nb.experiments.seeds import compare_over_seeds, plot_seed_spread, seed_table
from fixtures import refuses
from cap_nb.jobs.report import count_in_words


def answer(task, i, right):
    return AnswerRecord(task=task, uid=f"{i}", prompt_sha256="", output="", strict=None, lenient=None, gold="1",
                        correct=right, lenient_correct=right, tokens=i, cut_off=False)


def answers(task, solved, n=60):
    return tuple(answer(task, i, i < solved) for i in range(n))


def losses(task, mean, n=30):
    return tuple(LossRecord(task=task, uid=f"{i}", loss=mean * (1 + 0.3 * ((i * 7) % 5 - 2)), tokens=5) for i in range(n))


def cell(method, sparsity, solved, mean):
    text = Perplexity(text="wikitext2-tokenised", fingerprint="f" * 64, value=7.0 * mean, low=6.0 * mean,
                      high=8.0 * mean, windows=3, window_tokens=128, losses=(1.0 * mean, 2.0 * mean, 3.0 * mean))
    return Evaluation(method=method, sparsity=sparsity, reached=sparsity + 1e-5, perplexity=text,
                      answers=answers("arc", solved) + answers("gsm8k", solved // 2), losses=losses("strategyqa", mean))


SHIFTS = (("cap", 4), ("wanda", 2), ("magnitude", 0), ("owl", 1))
CELLS = [cell("dense", 0.0, 50, 1.0), *(cell(method, s, round(40 - 60 * s) + shift, 1 + 20 * s + shift / 5)
                                        for s in (0.1, 0.2, 0.5) for method, shift in SHIFTS)]
COLUMNS = ["GSM8K", "ARC-C.", "StrategyQA loss", "WikiText-2 (tokenised) perplexity"]


def test_a_table_does_not_know_the_order_of_its_records():
    tables = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(CELLS, len(CELLS))
        tables.append(method_table(replace(e, answers=tuple(random.Random(seed).sample(e.answers, len(e.answers)))) for e in shuffled))
    assert len({table_csv(t) for t in tables}) == len({table_latex(t) for t in tables}) == len({table_markdown(t) for t in tables}) == 1
    assert list(dict.fromkeys(tables[0].columns.get_level_values(0))) == ["Reached", *COLUMNS]
    assert [m for m, s in tables[0].index] == ["Dense", *["Wanda", "Magnitude", "CAP", "owl"] * 3]


def test_three_printers_print_the_same_numbers():
    table = method_table(CELLS)
    wanted = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in table["ARC-C."][["value", "low", "high"]].to_numpy()]
    shown = [line.split(" | ")[4] for line in table_markdown(table).splitlines()[2:2 + len(table)]]
    assert shown == wanted
    tex = [line for line in table_latex(table).replace(r"{\scriptsize ", "").replace("}", "").splitlines() if line.endswith(r"\\")][1:]
    assert [line.split(" & ")[4] for line in tex] == wanted
    rows = list(csv.DictReader(table_csv(table).splitlines()))
    assert [float(row["ARC-C. high"]) for row in rows] == table["ARC-C.", "high"].tolist()
    assert "**" not in table_markdown(table) and "textbf" not in table_latex(table)


def test_latex_has_no_loose_special_character():
    body = "\n".join(line for line in table_latex(method_table([replace(CELLS[1], method="my_own%")])).splitlines() if not line.startswith("%"))
    assert r"my\_own\%" in body and not re.search(r"(?<!\\)[%_#]", body)


ORIGIN = {"model": {"name": "m", "fingerprint": "0123456789abcdef" * 4}, "commit": "a" * 40, "plugins": {"my.py": "c" * 64}, "style": {"fingerprint": "e" * 64 + "-" + "f" * 16},
          "evaluation": {"data": {"accuracy": {}, "text": {"lab-text": "d" * 64}}, "max_new_tokens": {}, "loss_n": 30}}


def test_notes_name_counts_and_leave_fingerprints_to_a_file():
    """All but those of the model and of plugins: the page says where they are, and the comments of the LaTeX file have them, cut."""
    notes = table_notes(method_table(CELLS), ORIGIN)
    assert notes[1] == "Problems or windows: GSM8K 60, ARC-C. 60, StrategyQA loss 30, WikiText-2 (tokenised) perplexity 3."
    assert notes[2:] == ["model: name m, fingerprint 0123456789ab", f"commit: {'a' * 40}", "plugins: my.py cccccccccccc", "evaluation: loss_n 30", ELSEWHERE] and "run.json" in ELSEWHERE
    assert table_notes(method_table(CELLS), ORIGIN, fingerprints=True)[2:] == [
        "model: name m, fingerprint 0123456789ab", f"commit: {'a' * 40}", "plugins: my.py cccccccccccc", "style: fingerprint eeeeeeeeeeee",
        "evaluation: data (text (lab-text dddddddddddd)), loss_n 30"]
    assert ELSEWHERE not in table_notes(method_table(CELLS), {"aggregation": "paper"})
    assert "dddddddddddd" in table_latex(method_table(CELLS), ORIGIN) and "dddddddddddd" not in table_markdown(method_table(CELLS), ORIGIN)


def test_methods_have_the_names_that_papers_give_them():
    """In every table and figure; rows keep their order, and a combination stays as it is typed."""
    typed = ["sparsegpt", "ria", "alps", "sparsegpt@2:4", "wanda+owl", "cap", "dense"]
    assert [method_title(m) for m in typed] == ["SparseGPT", "RIA", "ALPS", "sparsegpt@2:4", "wanda+owl", "CAP", "Dense"]
    rows = [cell(m, 0.5, 1, 1.0) for m in ("sparsegpt", "ria", "my_own", "cap", "alps", "wanda")]
    assert [m for m, _ in method_table(rows).index] == ["Wanda", "CAP", "ALPS", "my_own", "RIA", "SparseGPT"]
    legend = plot_sparsity_curves(rows).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["Wanda", "CAP", "ALPS", "my_own", "RIA", "SparseGPT"]


def coins(rng, n=80):
    return tuple(answer("arc", i, right) for i, right in enumerate(rng.choices([True, False], k=n)))


def test_chance_decides_no_more_often_than_it_may():
    """Two coins that are alike are told apart in at most one comparison in twenty; corrected over a family, hardly ever."""
    rng = random.Random(0)
    pairs = {seed: compare(coins(rng), coins(rng)) for seed in range(200)}
    assert 1 <= sum(comparison.decided for comparison in pairs.values()) <= 18
    assert not any(comparison.decided for comparison in correct_family(pairs).values())


def test_a_family_counts_what_was_tested():
    same = compare(answers("arc", 30), answers("arc", 30))
    for tested, said in ((1, "the 1 comparison of these"), (2, "the 2 comparisons of these")):
        family = dict(enumerate([same] * tested)) | {"without a test": replace(same, p=None)}
        assert {comparison.family for comparison in correct_family(family, "these").values()} == {said}


def test_order_and_mixture_of_records():
    one, other = answers("arc", 30), answers("arc", 20)
    assert compare(one, other) == compare(one, other[::-1])
    assert compare(other, one).value == -compare(one, other).value
    for wrong in (answers("gsm8k", 20), losses("arc", 1.0, n=60), other[:-1], ()):
        refuses("same problems", compare, one, wrong)


def test_windows_of_another_text_or_length_are_other_problems():
    text = Perplexity(text="lab-text", fingerprint="0" * 64, value=2.0, low=1.9, high=2.1, windows=30, window_tokens=128, losses=(0.7,) * 30)
    wanda = Evaluation(method="wanda", sparsity=0.5, reached=0.5, perplexity=text)
    assert len(compare_methods([wanda, replace(wanda, method="cap")], [("cap", "wanda")])) == 1
    for other in ({"window_tokens": 64}, {"fingerprint": "1" * 64}):
        refuses("same problems", compare_methods, [wanda, replace(wanda, method="cap", perplexity=replace(text, **other))], [("cap", "wanda")])


def test_undecided_is_signed_and_has_no_minus_zero():
    same = replace(compare(answers("arc", 30), answers("arc", 30)), low=-0.01, high=2.0)
    assert comparison_text(same) == "+0.0 [+0.0, +2.0]"


def test_one_decision_is_printed_everywhere():
    """Sentence, long table, grid, mark and data frame say of every comparison what `decided` says."""
    pairs = pairs_with("wanda", CELLS)
    assert pairs == (("magnitude", "wanda"), ("cap", "wanda"), ("owl", "wanda"))
    comparisons = compare_methods(CELLS, pairs)
    rows = [line.split(" | ") for line in comparison_markdown(comparisons).splitlines()[2:2 + len(comparisons)]]
    grid = comparison_grid(comparisons)
    for (key, comparison), row in zip(comparisons.items(), rows):
        marked = comparison_mark(comparison) in ("▲", "▼")
        assert marked == comparison.decided == comparison_frame(comparisons).loc[key, "Decided"]
        assert row[4] == comparison_text(comparison) and comparison_text(comparison) in grid
    assert {comparison.decided for comparison in comparisons.values()} == {True, False}
    assert comparison_frame(comparisons)["Holm"].tolist() == list(holm([c.p for c in comparisons.values()]))


def test_tiny_numbers_are_not_printed_as_zero():
    difference = replace(compare(losses("arc", 1.0), losses("arc", 1.0)), value=2e-4, low=1e-4, high=3e-4)
    assert interval_text(difference) == "+0.00020 [+0.00010, +0.00030]"
    assert interval_text(replace(difference, value=2e-6, low=1e-6, high=3e-6)) == "+2.0e-06 [+1.0e-06, +3.0e-06]"
    assert interval_text(replace(difference, unit="share", value=0.25, low=float("nan"), high=float("nan"))) == "+0.25"


def test_the_paper_s_table_is_the_paper_s():
    printed = {"Llama": "79.5 69.5 81.1 6.23 59.5 65.0 68.7 8.37 71.5 65.5 74.2 8.44 72.1 60.5 43.9 8.70 65.4 63.1 70.8 9.57 1.7 51.7 8.5 55.6 0.5 6.9 30.1 428.2",
               "Mistral": "42.9 64.3 55.2 6.20 46.4 65.1 34.0 5.83 45.7 65.3 34.2 5.85 43.6 63.8 34.9 5.89 44.4 64.8 33.4 5.93 11.5 49.5 44.7 9.82 27.3 53.0 52.6 10.5"}
    table = paper_table()
    assert len(table) == sum(map(len, PAPER_NUMBERS.values())) == 14
    for name, numbers in printed.items():
        [model] = [model for model in PAPER_NUMBERS if model.startswith(name)]
        assert table.loc[model].to_numpy().flatten().tolist() == [float(number) for number in numbers.split()]


@pytest.mark.parametrize("unit, value, ahead", [("points", 5.0, True), ("points", -5.0, False), ("nats", -0.1, True), ("nats", 0.1, False)])
def test_the_direction_of_a_difference(unit, value, ahead):
    """More answers and less loss are better, in marks, in words and beside the paper."""
    same = compare(answers("arc", 30), answers("arc", 30))
    found = replace(same, unit=unit, value=value, low=value - abs(value) / 2, high=value + abs(value) / 2, p=0.01, holm=0.01)
    family = {("CAP", "Wanda", 0.5, "GSM8K"): found}
    assert found.decided and comparison_mark(found) == ("▲" if ahead else "▼")
    assert compare_with_paper(family)["Here"].item() == ("CAP" if ahead else "Wanda")
    assert f"{int(ahead)} for the first method" in count_in_words(family)


def test_comparison_with_the_paper_covers_what_both_have():
    directions = compare_with_paper(compare_methods(CELLS))
    measures = ("ARC-C.", "GSM8K", "StrategyQA loss", "Text loss")
    assert list(directions.index) == [(s, measure) for s in (0.1, 0.2, 0.5) for measure in measures]
    assert directions.loc[(0.2, "GSM8K"), "Llama-3-8B-Instruct"] == "Wanda"
    assert directions.loc[(0.2, "StrategyQA loss"), "Llama-3-8B-Instruct"] == "not reported"
    assert paper_measure("GSM8K, set aside") == "gsm8k" and paper_measure("GSM8K, changed") is None, "other numbers"
    odd = compare_with_paper(compare_methods([replace(e, sparsity=0.3) for e in CELLS if e.sparsity == 0.2]))
    assert set(odd["Llama-3-8B-Instruct"]) == {"not reported"}


def test_methods_differ_in_looks():
    assert len({colour for colour, _ in (*METHOD_LOOKS.values(), *OTHER_LOOKS)}) == len(METHOD_LOOKS) + len(OTHER_LOOKS)
    assert len({*method_looks([f"method {i}" for i in range(50)]).values()}) == len(METHOD_LOOKS) + 50


def test_the_heatmap_is_parted_at_zero():
    scores = torch.tensor([[0.1, -0.3], [0.2, 0.0]])
    mesh = plot_head_importance(scores).axes[0].collections[0]
    assert mesh.norm.vmin == pytest.approx(-0.3) and mesh.norm.vmax == pytest.approx(0.3) and type(mesh.norm) is Normalize
    assert plot_head_importance(torch.zeros(2, 2)).axes[0].collections[0].norm.vmax == 1.0
    refuses(r"have shape \[4\]: expected layers x heads", plot_head_importance, torch.zeros(4))
    assert "1 (25%) score below zero" in head_importance_in_words(scores)


def test_one_head_that_leads_leaves_the_others_their_colours():
    """Far from white beside a head a thousand times as high, on its side of zero, and the colour bar names where the scale changes."""
    scores = torch.tensor([[5.0, 0.005, -0.005], [0.002, 0.001, -0.0005]])
    grid, bar = plot_head_importance(scores).axes
    mesh = grid.collections[0]
    place = mesh.norm(scores.numpy())
    assert place[0, 0] == pytest.approx(1) and mesh.norm(0) == 0.5 and 0.7 > place[0, 1] > 0.6 and place[0, 1] - 0.5 == pytest.approx(0.5 - place[0, 2])
    assert (place.ravel().argsort() == scores.numpy().ravel().argsort()).all(), "the order is kept"
    assert bar.get_ylabel().endswith("logarithmic beyond ±0.001") and {0, 1, -1} <= {round(tick) for tick in bar.get_yticks()}
    assert "logarithmic" not in plot_head_importance(torch.tensor([[0.3, -0.1]])).axes[1].get_ylabel()


def test_one_sparsity_is_dots_around_one_tick():
    """In the middle of the panel, without lines, and several sparsities have a tick each."""
    for methods in (("dense", "cap"), ("dense", "cap", "wanda"), [*dict(SHIFTS), "dense", "ria", "alps", "random", "heads"]):
        figure = plot_sparsity_curves([cell(m, 0.5 if m != "dense" else 0.0, 20, 2.0) for m in methods])
        for panel in figure.axes[:len(COLUMNS)]:
            left, right = panel.get_xlim()
            assert list(panel.get_xticks()) == [50] and (left + right) / 2 == 50
            for container in panel.containers:
                line, [x] = container.lines[0], container.lines[0].get_xdata()
                assert line.get_linestyle() == "None" and left + (right - left) / 5 < x < right - (right - left) / 5
    several = plot_sparsity_curves(CELLS).axes[0]
    assert list(several.get_xticks()) == [10, 20, 50] and all(c.lines[0].get_linestyle() == "-" for c in several.containers)


def test_curves_show_what_the_table_holds():
    figure, table = plot_sparsity_curves(CELLS), method_table(CELLS)
    panel = next(ax for ax in figure.axes if ax.get_title() == "ARC-C.")
    heights = {container.get_label(): container.lines[0].get_ydata() for container in panel.containers}
    assert set(heights) == {"Wanda", "Magnitude", "CAP", "owl"}
    for title, ys in heights.items():
        assert list(ys) == table.xs(title, level="Method")["ARC-C.", "value"].tolist()
    [dashed] = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert dashed.get_ydata()[0] == table.loc[("Dense", 0.0), ("ARC-C.", "value")]


@pytest.mark.filterwarnings("error")
def test_one_problem_has_no_interval_and_no_bar(tmp_path):
    """One loss shows no spread: the table says so, and the figure leaves the bar out."""
    single = [replace(e, answers=(), losses=e.losses[:1], perplexity=None) for e in CELLS]
    assert table_markdown(method_table(single)).count("[-inf, inf]") == len(CELLS)
    save_figure(plot_sparsity_curves(single), tmp_path / "single")


def test_a_run_with_one_measure_still_has_a_figure():
    only = [replace(e, answers=(), perplexity=None) for e in CELLS]
    assert [ax.get_title() for ax in plot_sparsity_curves(only).axes] == ["StrategyQA loss"]
    refuses("no measure", plot_sparsity_curves, [replace(e, losses=()) for e in only])
    refuses("holds answers", answer_table, only)


def test_a_damaged_drawing_leaves_no_file(tmp_path):
    figure = plot_importance_distribution(torch.arange(4.).view(2, 2))
    figure.axes[0].set_title("$\\nonsense{$")
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(figure, tmp_path / "broken")
    assert list(tmp_path.iterdir()) == []


def test_three_seeds_leave_undecided_what_each_of_them_decides():
    """Calibration that moves an accuracy by fifty points: Student's quantile for two degrees of freedom is 4.3."""
    runs = {seed: [Evaluation(method=method, sparsity=0.5, reached=0.5, answers=answers("arc", right, 40)) for method, right in (("magnitude", 12), ("cap", solved))]
            for seed, solved in enumerate((18, 38, 22))}
    over_seeds, means = compare_over_seeds(runs), seed_table(runs)
    alone = [compare_methods(evaluations, [("cap", "magnitude")]) for evaluations in runs.values()]
    assert [c.decided for family in (over_seeds, *alone) for c in family.values()] == [False, True, True, True]
    assert [c.value for c in over_seeds.values()] == pytest.approx([100 * (6 + 26 + 10) / 120])
    assert means["Calibration"].iloc[0] == 0 and means["Calibration"].iloc[1] > 10
    refuses("share no method", seed_table, {0: runs[0][:1], 1: runs[1][1:]})
    refuses("calibration seeds is 1", compare_over_seeds, {0: runs[0]}, [("cap", "magnitude")])
    refuses("The table of seeds is empty", plot_seed_spread, means[:0], runs)
    part = plot_seed_spread(means.drop(("Magnitude", 0.5, "ARC-C.")), runs)
    assert [label.get_text() for label in part.axes[0].get_xticklabels()] == ["CAP\n50 %"], "what is not in the table is not drawn"
    other = Evaluation(method="magnitude", sparsity=0.5, reached=0.5, answers=answers("arc", 1, 41))
    refuses("cap and magnitude were not measured on", compare_over_seeds, {seed: [other, run[1]] for seed, run in runs.items()}, [("cap", "magnitude")])


def test_seeds_that_are_all_alike_have_an_interval():
    runs = {seed: [Evaluation(method=method, sparsity=0.5, reached=0.5, answers=answers("arc", right, 40)) for method, right in (("magnitude", 0), ("wanda", 40), ("cap", 40))] for seed in range(3)}
    same, all_won = compare_over_seeds(runs, [("cap", "wanda"), ("cap", "magnitude")]).values()
    assert (same.value, same.low, same.high) == (0, -same.high, pytest.approx(11.1, abs=0.1)) and not same.decided
    assert all_won.low < 95 and all_won.high == 100 and all_won.decided
    means = seed_table(runs)
    assert means["Low"].round().tolist() == [91, 0, 91] and means["High"].round().tolist() == [100, 9, 100]


def test_shares_that_are_all_alike_have_an_interval_too():
    """One of four drawn answers to every problem is right, or none: resampled, 25 points would have an interval without width."""
    def drawn(method, right): return Evaluation(method=method, sparsity=0.5, reached=0.5, answers=[replace(answer("arc", i, s < right), sample=s) for i in range(40) for s in range(4)])
    runs = {seed: [drawn("magnitude", 0), drawn("cap", 1)] for seed in range(3)}
    [over_seeds], [alone] = (compared.values() for compared in (compare_over_seeds(runs, [("cap", "magnitude")]), compare_methods(runs[0], [("cap", "magnitude")])))
    for found in (over_seeds, alone):
        assert found.value == 25 and 0 < found.low < 20 and 30 < found.high < 50 and found.decided
    low, high = wilson_interval(10, 40)
    assert seed_table(runs)[["Low", "High"]].values.tolist()[1] == pytest.approx([100 * low, 100 * high])


def made_up_answers(first, last, n=40):
    return tuple(replace(answer("arc", i, first <= i < last), lenient_correct=first <= i < last + 2) for i in range(n))


def test_kept_answers_stand_beside_the_others():
    """Of the dense model's first 20 the pruned one solves 12; without a dense model there is no such column."""
    dense = Evaluation("dense", 0.0, 0.0, answers=made_up_answers(0, 20))
    pruned = Evaluation("wanda", 0.5, 0.5, answers=made_up_answers(8, 30))
    table = answer_table([pruned, dense])
    low, high = wilson_interval(12, 20)
    assert table.loc[("Wanda", 0.5, "ARC-C."), ["Kept", "Kept low", "Kept high"]].tolist() == [60.0, 100 * low, 100 * high]
    text = answer_markdown(table)
    assert f"| 60.0 [{100 * low:.1f}, {100 * high:.1f}] |" in text and text.splitlines()[2].endswith("| - |") and "- Kept: of the problems" in text
    assert "Kept" not in answer_table([pruned]).columns and "Kept" not in answer_markdown(answer_table([pruned]))


def test_a_test_about_zero_does_not_decide_about_a_margin():
    level = replace(compare(*[[answer("gsm8k", i, True) for i in range(30)]] * 2), low=-0.2, high=0.2, p=0.9, holm=0.9)
    assert level.within(-1.5, 1.5) and not level.within(0.3, 1.5) and not level.decided
