"""The program `cap` from outside: exit codes, one sentence for a mistake and never a traceback, and what a run leaves and says."""
import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import cap_nb.jobs.job
import cap_nb.single_steps
import programs
import pytest
import torch
import typer
from transformers import LlamaForCausalLM

from faults.machinery import contents
from programs import FEW, FEW_LOSSES, assert_one_sentence, called as cap, output_of
from cap_nb.core.files import read_checked
from cap_nb.core.registry import PLUGINS
from cap_nb.models.decoding import generate_naive
from cap_nb.models.lab import lab_tokenizer
from cap_nb.command_line import OPTION_NAMES, adjusted, app, comments, read_as, read_path
from cap_nb.jobs.records import load_run
from cap_nb.jobs.settings import Job, QUICK, changed
from cap_nb.methods.resumed_scoring import load_losses
from cap_nb.single_steps import harness_alone, warn_of_seen
from conftest import ROOT

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two methods at one sparsity on very few problems."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    return folder, output_of("run", *FEW, "--methods", "cap,magnitude", "--sparsity", "0.5", "--out", folder, "--note", "a test")


def test_run_shows_table_and_figures(finished):
    folder, said = finished
    assert "| Dense |" in said and "| CAP |" in said and "| Magnitude |" in said
    assert str(folder / "figures" / "head_importance.png") in said
    for name in ("run.json", "environment.json", "timings.json", "losses.safetensors", "tables/table.md", "tables/table.csv", "tables/table.tex",
                 "tables/scores.csv", "figures/head_importance.png", "figures/sparsity_curves.png", "reports/cap-0.5.json"):
        assert (folder / name).is_file(), name
    assert not (folder / "unfinished").exists()
    assert read_checked(folder / "environment.json")[0]["note"] == "a test"


def test_what_is_recorded(finished):
    run = load_run(finished[0])
    calibrated = set(run.losses.uid)
    assert [(e.method, e.sparsity) for e in run.evaluations] == [("dense", 0.0), ("magnitude", 0.5), ("cap", 0.5)]
    for (report, _), evaluation in zip(run.reports, run.evaluations):
        assert report.reached == evaluation.reached and abs(report.reached - report.asked) <= 1e-4
        assert len(evaluation.answers) == 6 and len(evaluation.losses) == 6 and evaluation.perplexity.windows == 1
        assert not calibrated & {record.uid for record in (*evaluation.answers, *evaluation.losses)}
    problems = [[(r.task, r.uid) for r in evaluation.answers] for evaluation in run.evaluations]
    assert problems[0] == problems[1] == problems[2], "methods were asked different problems"


def test_divergences_are_scored_pruned_by_and_not_taken_for_losses(finished, tmp_path):
    few, table = ["--n", "2", "--k", "1", "--tasks", "lab-arc", "--device", "cpu"], tmp_path / "d.safetensors"
    assert "divergences of 2 examples with each of 36 heads" in output_of("score", *few, "--score-target", "divergence", "--out", table)
    losses = load_losses(table)
    assert losses.target == "divergence" and losses.masked.min() >= 0
    prune = ["prune", "--device", "cpu", "--sparsity", "0.3", "--out", tmp_path / "pruned", "--scores"]
    assert_one_sentence(cap(*prune, table), "d.safetensors holds divergences: expected losses")
    assert_one_sentence(cap(*prune, finished[0] / "losses.safetensors", "--score-target", "divergence"), "holds losses: expected divergences")
    assert not (tmp_path / "pruned").exists()
    assert "30.0000%" in output_of(*prune, table, "--score-target", "divergence")


def stand_in():
    """vLLM's stand-in of models/10, for the lab."""
    cells = json.loads((ROOT / "nbs/models/10_decoding.ipynb").read_text())["cells"]
    [source] = ["".join(cell["source"]) for cell in cells if "class StandIn" in "".join(cell["source"])]
    [source] = [ast.get_source_segment(source, node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    space = {"LlamaForCausalLM": LlamaForCausalLM, "SimpleNamespace": SimpleNamespace, "generate_naive": generate_naive, "tokenizer": lab_tokenizer()}
    exec(source, space)
    return space["StandIn"]


def test_vllm_writes_the_answers_of_a_run(finished, tmp_path, monkeypatch):
    """Behind the same records, with each model loaded once for all tasks; refused where it is missing."""
    words, only = [*FEW, "--backend", "vllm"], ["--methods", "magnitude", "--sparsity", "0.5"]
    monkeypatch.setitem(sys.modules, "vllm", None)
    for refused in (cap("run", *words, *only, "--out", tmp_path / "run"), cap("eval", *words[4:], "--out", tmp_path / "eval")):
        assert_one_sentence(refused, "vLLM is not installed", "run pip install vllm, or take the backend transformers")
    assert_one_sentence(cap("run", *FEW, "--backend", "sglang"), "Unknown backend 'sglang'", "transformers, vllm")
    assert not (tmp_path / "run").exists()
    vllm = SimpleNamespace(LLM=stand_in(), SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    done, measured = cap("run", *words, *only, "--out", tmp_path / "run"), cap("eval", *words[4:], "--loss-n", "0", "--out", tmp_path / "eval")
    assert (done.exit_code, measured.exit_code, vllm.LLM.made) == (0, 0, 3), done.output + measured.output
    ours, theirs = ({e.method: e.answers for e in load_run(folder).evaluations} for folder in (finished[0], tmp_path / "run"))
    assert theirs == {method: ours[method] for method in ("dense", "magnitude")}
    assert load_run(tmp_path / "run").configuration["evaluation"]["backend"] == "vllm" == read_checked(tmp_path / "eval/evaluation.json")["backend"]
    assert_one_sentence(cap("run", *FEW, *only, "--out", tmp_path / "run"), "--backend is transformers, the run in this folder has vllm")


def test_a_run_within_a_budget_says_what_was_measured(tmp_path):
    few = [*FEW_LOSSES, "--n", "4", "--tasks", "lab-arc", "--methods", "cap", "--sparsity", "0.5"]
    assert "- budget: 0.7" in output_of("run", *few, "--budget", "0.7", "--out", tmp_path / "part") # whose scores are means, as no other form allows gaps
    run, lines = load_run(tmp_path / "part"), (tmp_path / "part" / "tables" / "screening.csv").read_text().splitlines()
    assert run.losses is None and not run.partial.measured.all() and not run.scores.isnan().any()
    assert [int(line.split(",")[2]) for line in lines[1:]] == run.partial.measured.sum(-1).flatten().tolist()
    assert cap("pack", tmp_path / "part").exit_code == 0 and torch.equal(load_run(tmp_path / "part").scores, run.scores)
    few += ["--aggregation", "mean"]
    assert_one_sentence(cap("run", *few, "--out", tmp_path / "part"), "--budget is left out, the run in this folder has 0.7")
    claims = ["claims", *FEW_LOSSES, "--base", tmp_path / "part", "--out", tmp_path / "claims", "--tasks", "lab-arc"]
    assert_one_sentence(cap(*claims), "has no whole table of losses")


def test_a_first_look_answers_where_settings_of_answers_are_given():
    for words, tasks in (([], ()), (["--evaluate-n", "5"], None), (["--accuracy-tasks", "none"], ()), (["--samples", "4", "--temperature", "0.7"], None)):
        context = typer.main.get_command(app).commands["run"].make_context("run", ["--quick", *words])
        job, few = adjusted(context, {"evaluate_n": 5, "samples": 1, "max_new_tokens": None, "shots": 0, "backend": "transformers"}, True)
        assert (job.evaluate.accuracy_tasks, few) == (tasks, True), words


def test_models_that_were_measured_alone_are_compared(tmp_path):
    few = ["--device", "cpu", "--tasks", "lab-arc", "--accuracy-tasks", "none", "--loss-n", "4", "--windows", "0"]
    output_of("prune", "--method", "magnitude", "--device", "cpu", "--out", tmp_path / "half")
    for name, model in (("before", "lab"), ("after", tmp_path / "half")):
        output_of("eval", "--model", model, *few, "--out", tmp_path / name)
    measured = [tmp_path / name for name in ("before", "after")]
    assert "\n| after | before | 50 % | Lab ARC-C. loss |" in output_of("compare", *measured, "--out", tmp_path / "kept")
    assert json.loads((tmp_path / "kept/sources.json").read_text()).keys() == {"before", "after"}
    assert_one_sentence(cap("compare", *measured[:1]), "One model alone was given")
    assert_one_sentence(cap("compare", *measured, "--methods", "cap"), "folder of cap eval, which holds one model: expected runs")
    assert_one_sentence(cap("compare", tmp_path / "half", measured[0]), "half was not made by 'cap eval --out'")


def test_too_little_disk_is_told_before_anything_is_pruned(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    monkeypatch.setattr("cap_nb.single_steps.prune_with", lambda *_, **__: pytest.fail("work began"))
    assert_one_sentence(cap("prune", "--method", "magnitude", "--device", "cpu", "--out", tmp_path / "new"), "The new checkpoint takes", "the disk has 1,000 left")


def test_what_eval_lacks_is_told_before_anything_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(cap_nb.single_steps, "evaluate", lambda *_: pytest.fail("it answered"))
    few = ["eval", "--device", "cpu", "--tasks", "lab-arc", "--evaluate-n", "1", "--loss-n", "1"]
    assert_one_sentence(cap(*few, "--text", "wikitext2", "--data-dir", tmp_path), "wikitext")
    (tmp_path / "file").touch()
    assert_one_sentence(cap(*few, "--windows", "0", "--out", tmp_path / "file" / "new"), "file")
    long = ["eval", "--device", "cpu", "--accuracy-tasks", "lab-arc", "--loss-n", "0", "--windows", "0"]
    assert_one_sentence(cap(*long, "--evaluate-n", "2", "--max-new-tokens", "500"), "fit")


def test_eval_warns_of_problems_that_were_calibrated_on(caplog, monkeypatch):
    seen = {"calibration": {"examples": {"gsm8k": 3}}}
    for job, pruned, warned in ((changed(Job(), evaluate_on="validation"), seen, True), (Job(), seen, False), (changed(Job(), evaluate_on="validation"), {}, False),
                                (changed(Job(), accuracy_tasks=("gsm8k_fresh",)), seen, True),
                                (changed(Job(), accuracy_tasks=("gsm8k_fresh",)), {"calibration": seen["calibration"] | {"spare": ["gsm8k_fresh"]}}, False),
                                (changed(Job(), evaluate_on="validation"), {"fine-tuning": {"trained on": seen["calibration"]}}, True),
                                (changed(Job(), evaluate_on="validation"), {"method": "magnitude", "before": {"fine-tuning": {"before": {"trained on": seen["calibration"]}}}}, True),
                                (changed(Job(), evaluate_on="validation"), {"calibration": None, "scores": seen["calibration"]}, True)):  # CAP, from a table
        caplog.clear()
        warn_of_seen(job, pruned)
        assert bool(caplog.records) == warned, (job, pruned)
    of_table = {"scores": seen["calibration"] | {"fingerprint": "t"}, "fine-tuning": {"trained on": {"examples": {"arc": 2}, "fingerprint": "o"}}}
    caplog.clear()
    warn_of_seen(changed(Job(), evaluate_on="validation"), of_table, "t")
    assert "on problems of arc, which" in caplog.text, "the table's problems are left out, those of training are not"
    for name, made in (("check_harness_tasks", None), ("load_checked", (SimpleNamespace(config=SimpleNamespace(cap_nb=seen)), None)), ("harness_results", {}), ("harness_text", "")):
        monkeypatch.setattr(cap_nb.single_steps, name, lambda *_, made=made: made)
    for task, warned in (("cap_gsm8k_fresh", True), ("gsm8k_cot", False)):
        caplog.clear()
        harness_alone(Job(), (task,))
        assert bool(caplog.records) == warned, task


def test_tables_and_figures_are_made_again_from_the_records(finished, tmp_path):
    folder, _ = finished
    before = {p: p.read_bytes() for kind in ("tables", "figures") for p in (folder / kind).iterdir()}
    for path in before:
        path.unlink()
    assert "manifest.json" in output_of("figures", folder.parent)
    assert {p: p.read_bytes() for p in before} == before
    assert_one_sentence(cap("figures", tmp_path / "nowhere"), "holds no run")


def test_packing_changes_nothing_that_is_said(finished, tmp_path):
    """A packed run gives the same table and is not continued; restored, it is the live run again."""
    folder, packed, restored = finished[0], tmp_path / "packed", tmp_path / "restored"
    shutil.copytree(folder, packed)
    assert cap("pack", packed).exit_code == 0
    assert {p.name for p in packed.iterdir()} == {"report.html", "records.parquet", "log.txt", "tables", "figures"}
    assert cap("table", packed).stdout == cap("table", folder).stdout
    assert "as far as they were there" in output_of("figures", packed) and not (packed / "manifest.json").exists()
    assert_one_sentence(cap("run", *FEW, "--methods", "wanda", "--sparsity", "0.25", "--out", packed), "is a packed run", "cap unpack")
    assert cap("unpack", packed, restored).exit_code == 0
    assert contents(restored) == contents(folder)
    assert_one_sentence(cap("unpack", restored, tmp_path / "again"), "is not packed")


def test_every_setting_is_an_option_and_its_comment_the_help():
    """The options of `cap run` are the fields of a job's parts: their names, defaults and comments."""
    parameters = {parameter.name: parameter for parameter in typer.main.get_command(app).commands["run"].params}
    for part in fields(Job):
        about = comments(part.default_factory)
        for setting in fields(part.default_factory):
            option = parameters[OPTION_NAMES.get(setting.name, setting.name)]
            default = (",".join(map(str, setting.default)) or "none") if isinstance(setting.default, tuple) else setting.default
            assert option.help.startswith(about[setting.name]) and option.default == default, setting.name
    said = {(name, p.name): getattr(p, "help", "") for name in ("run", "prune", "plan") for p in typer.main.get_command(app).commands[name].params}
    for place, below in (("run", "chain_rule"), "are right) and each=2"), (("run", "dtype"), "1.25 times as fast"), (("prune", "norms"), "no command makes it"), \
            (("plan", "accelerator"), "disk in GB/s"):  # on lines of comment below the field
        assert below in said[place], place


def test_no_times_in_other_files(finished):
    folder, _ = finished
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".csv", ".tex", ".svg") and path.name != "timings.json":
            assert not re.search(r"20\d\d-\d\d-\d\dT?\d*", path.read_text(encoding="utf-8")), path


def test_help_has_four_headings():
    """Every command stands under one of them."""
    headings = [command.rich_help_panel for command in typer.main.get_command(app).commands.values()]
    assert set(headings) == {"The job", "Single steps", "After pruning", "Records"} and len(headings) >= 26
    said = cap("--help").output
    assert all(heading in said for heading in headings)


HEAVY = ("torch", "transformers", "accelerate", "datasets", "pandas", "numpy", "matplotlib", "seaborn")


def loading(*commands):
    """The program in an interpreter of its own, a command after another; the last line says which heavy libraries it has imported."""
    code = "import sys, cap_nb, cap_nb.all\ndir(cap_nb)\nfrom cap_nb.__main__ import main\nfor line in sys.stdin:\n sys.argv[1:] = line.split()\n try: main()\n except SystemExit: pass\n"
    code += f"print('\\nloaded', [name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], input="\n".join(commands), capture_output=True, text=True, cwd=ROOT)


def test_help_and_simple_mistakes_load_nothing_heavy():
    """How long `cap --help` takes depends on the machine; what it imports does not."""
    said = loading("--help", "run --help", "prune --help", "methods", "methods --help", "--version", "run --sparsity lots", "table")
    assert said.stdout.splitlines()[-1] == "loaded []" and said.stdout.count("Usage: ") == 4, said.stdout[-300:] + said.stderr[-300:]


TYPOS = [
    ("run --tasks gsm8k,gsm9k", "Unknown task 'gsm9k' (did you mean gsm8k?)"), ("eval --accuracy-tasks ark", "Unknown task 'ark' (did you mean arc?)"),
    ("run --methods cap,wander", "Unknown method 'wander' (did you mean wanda?)"), ("prune --out x --method alps^swop", "Unknown recovery"),
    ("plan --methods cap.neuron", "Unknown attribution 'neuron' (did you mean neurons?)"), ("run --methods wanda+owls", "Unknown allocation 'owls' (did you mean owl?)"),
    ("run --style papr", "Unknown prompt style"), ("run --text wikitext", "Unknown text"), ("score --out x --dtype float", "Unknown dtype"),
    ("prune --out x --device tpu", "Unknown device 'tpu'"), ("run --aggregation median", "Unknown aggregation"), ("run --score-target los", "Unknown score target"),
    ("run --backend vlm", "Unknown backend 'vlm' (did you mean vllm?)"), ("bench x --backends toch", "Unknown way to compute"),
    ("prune --out x --ties non", "Unknown treatment of ties"), ("shrink --out x --neurons-by contribution,", "Unknown score of neurons"),
    ("claims --variants cap~range-4", "Unknown variant"), ("gguf x --out y --dtype q8", "Unknown GGUF dtype"), ("export x --out y --format ggml", "Unknown format"),
    ("run --n 0", "--n is 0"), ("run --k -1", "--k is -1"), ("prune --out x --sparsity 20", "outside [0, 1)"), ("shrink --out x --sparsity 1", "outside [0, 1)"),
    ("run --budget 2", "The budget is 2"), ("run --text-share 1", "--text-share is 1"), ("recover --out x --lr nan", "lr is nan"), ("bench x --rounds 0", "rounds is 0"),
]


def test_a_typo_is_told_before_torch_is_imported():
    said = loading(*(words for words, _ in TYPOS))
    assert said.stdout == "\nloaded []\n", said.stdout[-300:] + said.stderr[-300:]
    for (words, part), line in zip(TYPOS, said.stderr.splitlines(), strict=True):
        assert part in line, words


def test_what_a_plugin_adds_is_no_typo(tmp_path, monkeypatch):
    """With one, names wait until it is loaded: its method is known, and a task that nobody knows still gets its sentence."""
    (tmp_path / "mine.py").write_text("from cap_nb.all import add_criterion\nadd_criterion('mine', lambda known: known.weight.abs())\n")
    monkeypatch.setattr("cap_nb.command_line.names_are_known", lambda: not PLUGINS)  # as in a process of its own
    assert_one_sentence(cap("run", "--plugin", tmp_path / "mine.py", "--methods", "mine", "--tasks", "gsm9k"), "Unknown task 'gsm9k'")


def test_prune_takes_the_recommended_method(small_lab, tmp_path):
    """Without --method: a solver with a tenth of text from 50 % on, Wanda below, and both say so; text that was asked for stays."""
    few = ["--model", small_lab, "--tasks", "lab-arc", "--n", "10", "--k", "1", "--device", "cpu"]
    for name, options, words in (("half", [], "alps with --text-share 0.1, chosen by measurements at 50 and 60 %."), ("fifth", ["--sparsity", "0.2"], "wanda, chosen by measurements at 10 and 20 %."),
                                 ("own", ["--text-share", "0.2"], "alps, chosen by measurements at 50 and 60 %.")):
        assert output_of("prune", *few, *options, "--out", tmp_path / name).startswith(f"No --method was given: {words}\n")
        record = json.loads((tmp_path / name / "config.json").read_text())["cap_nb"]
        assert record["method"] == words.split()[0].rstrip(",") and record["calibration"].get("text_share") == {"half": 0.1, "own": 0.2}.get(name), record


def test_a_quick_run_is_small_and_says_so(tmp_path):
    """--quick changes what was not given; `cap plan --quick` plans the same; the end says that it is no verdict."""
    said = output_of("run", "--quick", "--n", "3", "--tasks", "lab-arc", "--methods", "magnitude", "--device", "cpu", "--out", tmp_path / "run")
    assert "too few" in said.splitlines()[-1].lower(), said
    kept = read_checked(tmp_path / "run/run.json")
    assert kept["calibration"]["n"] == 3 and kept["calibration"]["k"] == QUICK["k"] and kept["sparsities"] == list(QUICK["sparsities"])
    assert kept["evaluation"]["loss_n"] == QUICK["loss_n"] and kept["evaluation"]["data"]["accuracy"] == {}
    planned = cap("plan", "--quick", "--n", "3", "--tasks", "lab-arc", "--no-probe").stdout
    assert "Too few examples" not in cap("plan", "--quick", "--n", "9", "--loss-n", "90", "--tasks", "lab-arc", "--no-probe").stdout
    assert f"3 examples of lab-arc in {QUICK['k']} subsets" in planned, planned


def test_a_run_keeps_a_log_and_its_bar_says_what_runs(tmp_path, monkeypatch):
    """log.txt is no record: the manifest does not name it, and packing leaves it; the bar names the cell and the stage."""
    shown = []
    monkeypatch.setattr(cap_nb.jobs.job.tqdm, "set_description", lambda self, text: shown.append(text))
    words = [*FEW_LOSSES, "--tasks", "lab-arc", "--methods", "magnitude", "--sparsity", "0.5", "--out", tmp_path / "run"]
    assert cap("run", *words, "--quiet").exit_code == 0
    assert shown == ["dense 0%, loss of lab-arc", "dense 0%, perplexity of lab-text", "magnitude 50%, pruning", "magnitude 50%, loss of lab-arc",
                     "magnitude 50%, perplexity of lab-text"]
    log = (tmp_path / "run/log.txt").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d [\d:,]+ magnitude-0.5/prune: [\d.]+ seconds$", log, re.MULTILINE) and log.endswith("finished\n"), log
    assert "log.txt" not in (tmp_path / "run/manifest.json").read_text()
    assert cap("run", *words[:-1], tmp_path / "run", "--sparsity", "0.6").exit_code == 0 and (tmp_path / "run/log.txt").read_text().startswith(log)
    assert "left where it is" not in cap("pack", tmp_path / "run").output


def test_where_no_terminal_is_bars_are_lines(small_lab, tmp_path):
    """Nothing is drawn over itself; --quiet says nothing, and --verbose how long each stage took."""
    words = ["run", "--model", small_lab, *FEW_LOSSES, "--tasks", "lab-arc", "--sparsity", "0.5"]
    def run(option, methods): return programs.finished(programs.cap(*words, *filter(None, [option]), "--methods", methods, "--out", tmp_path / f"run{option}"))
    said = {"": run("", "cap,magnitude"), "--quiet": run("--quiet", "magnitude"), "--verbose": run("--verbose", "magnitude")}
    assert all(process.returncode == 0 and "\r" not in process.stderr and "\x1b" not in process.stderr for process in said.values()), said[""].stderr
    assert said["--quiet"].stderr == "" and said["--quiet"].stdout.startswith("| Method |")
    assert "magnitude-0.5/prune: " in said["--verbose"].stderr and "magnitude-0.5/prune: " not in said[""].stderr


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert {str(read_path("~/runs")), str(read_as(Path, "~/runs"))} == {"/home/me/runs"}


def test_closed_channels_are_no_reason_to_end():
    done = subprocess.run(["sh", "-c", f"'{sys.executable}' -m cap_nb methods 2>&-"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "wanda" in done.stdout
