"""The readings of the paper in memory, streamed, in runs and single steps; the problems set aside to judge on."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import DATA, ROOT, needs_data
from fixtures import made_up_calibration, refuses, tiny_llama
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from cap_nb.command_line import app
from cap_nb.core.files import read_checked, read_tensors, write_checked, write_tensors
from cap_nb.data.problems import CALIBRATED, FRESH, load_problems, task_title
from cap_nb.data.prompts import collate
from cap_nb.evaluation import evaluation_problems
from cap_nb.experiments.variants import check_variants
from cap_nb.importance import importance_factors
from cap_nb.jobs.job import check_job, drawn_problems, job_calibration, problems_fingerprint, run_job, spared_problems
from cap_nb.jobs.records import load_run, mask_fingerprint, read_run
from cap_nb.jobs.results import CHOSEN, judged, read_families
from cap_nb.jobs.settings import Job, SinglePruning, changed, check_names
from cap_nb.methods.prune import READINGS, check_fits, prune
from cap_nb.methods.resumed_scoring import load_losses, save_losses, score_heads
from cap_nb.methods.streaming import prune_checkpoint
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model
from cap_nb.regions import Factors, region_factors
from cap_nb.scoring import causal_scores, masked_head
from cap_nb.single_steps import prune_into, score_into


def square_llama(**settings):
    """The tiny Llama with a hidden size of heads times head size, as the literal slices need."""
    return tiny_llama(hidden_size=24, **settings)


def zeros_of(model):
    return torch.cat([(p.weight == 0).flatten() for p in projections(model)])


# losses pooled over tokens


def test_pooled_losses_are_the_batch_loss_of_transformers_subset_by_subset():
    model, calibration = tiny_llama(), made_up_calibration(9, step=3)
    losses, form = score_heads(model, calibration), {"paper": lambda m, b: m.median() - b.mean(), "paired": lambda m, b: (m - b).median(),
                                                     "mean": lambda m, b: (m - b).mean()}
    batches = [collate([e for e, s in zip(calibration.examples, calibration.subset) if s == k], pad_id=0) for k in range(3)]
    with torch.no_grad():
        intact = torch.stack([model(**batch).loss for batch in batches]).double()
        for layer, head in ((0, 3), (2, 1)):
            with masked_head(model, layer, head):
                masked = torch.stack([model(**batch).loss for batch in batches]).double()
            for name, score in form.items():
                pooled = "pooled" if name == "paper" else f"pooled-{name}"
                assert abs(causal_scores(losses, pooled)[layer, head] - score(masked, intact)) < 1e-5
                assert abs(causal_scores(losses, pooled)[layer, head] - causal_scores(losses, name)[layer, head]) > 1e-4


def test_a_table_of_before_is_read_as_before_and_gains_its_counts_from_the_calibration_set(tmp_path):
    model, calibration = tiny_llama(), made_up_calibration(6)
    losses = score_heads(model, calibration, store=tmp_path/"store")
    assert losses.tokens.tolist() == [sum(label != -100 for label in e.labels[1:]) for e in calibration.examples]
    stored, = (tmp_path/"store").glob("*.safetensors")
    save_losses(replace(losses, tokens=None), stored)
    before = stored.read_bytes()
    old = load_losses(stored)
    assert read_tensors(stored)[0].keys() == {"masked", "intact"} and old.tokens is None
    assert torch.equal(causal_scores(old), causal_scores(losses))
    again = score_heads(model, calibration, store=tmp_path/"store")
    assert torch.equal(again.tokens, losses.tokens) and stored.read_bytes() == before
    save_losses(losses, stored)
    assert torch.equal(load_losses(stored).tokens, losses.tokens)
    tensors, about = read_tensors(stored)
    for wrong in (losses.tokens[:2], losses.tokens * 0, losses.tokens.double()):
        write_tensors(stored, tensors | {"tokens": wrong}, about)
        refuses("target tokens", load_losses, stored)


# PyTorch's slices


def test_the_literal_reading_is_the_literal_layout_in_memory_and_streamed(tmp_path):
    heads = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) * 9 + 1
    model = square_llama()
    model.save_pretrained(tmp_path/"dense")
    prune(by_hand := square_llama(), "cap", 0.5, Factors(heads, layout="literal"))
    expected = zeros_of(by_hand)
    prune(model, "cap.literal", 0.5, heads)
    assert torch.equal(zeros_of(model), expected)
    prune(usual := square_llama(), "cap", 0.5, heads)
    assert not torch.equal(zeros_of(usual), expected)
    for given in (heads, Factors(heads), Factors(heads, layout="literal")): # streamed, whatever is given
        prune_checkpoint(tmp_path/"dense", tmp_path/f"pruned {type(given).__name__} {getattr(given, 'layout', '')}", 0.5, given, "cap.literal")
    for folder in tmp_path.glob("pruned*"):
        assert torch.equal(zeros_of(AutoModelForCausalLM.from_pretrained(folder)), expected)


@pytest.mark.parametrize("build, sentence", [(tiny_llama, "with 20 columns, and the literal slices are 4 of 6"),
                                             (lambda: tiny_llama(GPTNeoXConfig, hidden_size=24, num_key_value_heads=4), "separate query, key, value and output")])
def test_slices_that_do_not_fit_are_refused_before_a_weight_changes(build, sentence):
    model, heads = build(), torch.ones(3, 4)
    refuses(sentence, prune, model, "cap.literal", 0.5, heads)
    assert not zeros_of(model).any()
    refuses(sentence, check_fits, "cap.literal", model) # before anything is scored
    refuses(sentence, check_variants, SimpleNamespace(model=model), ("cap~regions-literal",), None)
    region_factors(model, Factors(heads)) # the heads' own fit every family


def test_neurons_of_mlps_of_different_widths_are_refused_before_scoring():
    model = tiny_llama()
    model.model.layers[1].mlp = tiny_llama(intermediate_size=36).model.layers[1].mlp
    refuses("expected as many in each", check_fits, "cap.neurons", model)
    check_fits("cap", model)


# by name, in a run and in single steps

SMALL = changed(Job(), n=4, k=2, evaluate_n=2, loss_n=2, windows=0, accuracy_tasks=())


def test_a_run_prunes_by_every_reading_from_one_table(small_lab, tmp_path):
    methods = ("cap", *(f"cap.{name}" for name in READINGS), "cap@matrix", "magnitude@matrix", "cap.literal@row", "rgs")
    folder = run_job(changed(SMALL, name=str(small_lab), methods=methods, sparsities=(0.5,)), tmp_path/"run")
    run = load_run(folder)
    assert len(list(folder.rglob("losses.safetensors"))) == 1 and not (folder/"attributions").exists()
    seen = {}
    for method in methods[:5]:
        model, name = load_model(small_lab)[0], method.partition("@")[0].partition(".")[2]
        pooled = name.startswith("pooled")
        factors = importance_factors(causal_scores(run.losses, "pooled" if pooled else "paper"))
        prune(model, "cap@matrix" if "@" in method else "cap", 0.5, Factors(factors, layout="literal" if "literal" in name else "heads"))
        seen[method] = mask_fingerprint(model)
    masks = {report.method: mask for report, mask in run.reports}
    assert {method: masks[method] for method in seen} == seen and len(set(masks.values())) == len(methods) + 1 # and dense


def test_single_steps_read_the_table_as_the_method_says(small_lab, tmp_path):
    job = changed(SMALL, name=str(small_lab))
    score_into(job, tmp_path/"S.safetensors")
    losses = load_losses(tmp_path/"S.safetensors")
    prune_into(job, SinglePruning(method="cap.pooled", sparsity=0.5, scores=tmp_path/"S.safetensors"), tmp_path/"pruned")
    prune(model := load_model(small_lab)[0], "cap", 0.5, importance_factors(causal_scores(losses, "pooled")))
    pruned, _ = load_model(str(tmp_path/"pruned"))
    assert torch.equal(zeros_of(pruned), zeros_of(model))
    assert '"pooled"' in (tmp_path/"pruned"/"config.json").read_text() + "".join(path.read_text() for path in (tmp_path/"pruned").glob("*.json"))


def test_a_part_of_a_table_is_not_pooled():
    for change in (dict(methods=("cap.pooled",), aggregation="mean"), dict(aggregation="pooled-mean")):
        refuses("budget", check_job, changed(SMALL, budget=0.5, **change))
    check_job(changed(SMALL, budget=0.5, aggregation="mean", methods=("cap.literal",)))


# problems that are set aside


@needs_data
def test_no_calibration_set_of_the_records_has_a_problem_that_is_set_aside():
    """But one, of a run that is not judged on them; chains are not kept, so what a run on chains read is not looked at."""
    fresh = {problem.uid for problem in load_problems(FRESH, "evaluation", DATA)}
    training = {problem.uid for problem in load_problems("gsm8k", "calibration", DATA)}
    assert len(fresh) == 1000 and fresh < training and not {uid[:6] for uid in fresh} & set(CALIBRATED)
    tables = 0
    for path in sorted((ROOT/"figures").rglob("records.parquet")):
        kept = read_run(path.parent)["calibration"]
        if "gsm8k" not in kept["tasks"]: continue
        run, allowed = load_run(path.parent), 10 * (path.parent == ROOT/"figures"/"primary"/"smollm2_128")
        calibrated = set(run.losses.uid) if run.losses is not None else set()
        answered = {r.uid for e in run.evaluations for r in (*e.answers, *e.losses) if r.task != FRESH}
        assert len(fresh & calibrated) == allowed and not fresh & answered, path
        tables += bool(calibrated & training)
    assert tables >= 3


@needs_data
def test_validation_never_reaches_them_and_a_run_that_answers_them_leaves_them_out():
    fresh = {problem.uid for problem in load_problems(FRESH, "evaluation", DATA)}
    assert not fresh & {problem.uid for problem in evaluation_problems("gsm8k", 6000, 0, DATA, split="validation")}
    job = changed(Job(), data_dir=str(DATA), tasks=("gsm8k",), accuracy_tasks=(FRESH, "svamp"), n=200)
    assert not fresh & {problem.uid for problem in drawn_problems(changed(job, evaluate_on="validation", seed=1), "gsm8k", 6000, frozenset())}
    assert spared_problems(job) == fresh and not spared_problems(changed(job, accuracy_tasks=("gsm8k",)))
    assert spared_problems(changed(job, accuracy_tasks=("gsm8k",), spare=(FRESH,))) == fresh
    assert {problem.uid for problem in drawn_problems(job, FRESH, 1000, frozenset({"other"}))} == fresh
    refuses("2 problems of the calibration set are among .* with --spare gsm8k_fresh", drawn_problems, job, FRESH, 10, frozenset(sorted(fresh)[:2]) | {"other"})
    refuses("no problems for calibration", load_problems, FRESH, "calibration", DATA)


@needs_data
def test_the_calibration_set_of_such_a_run_is_drawn_from_the_others():
    _, tokenizer = load_model("lab")
    job = changed(Job(), data_dir=str(DATA), tasks=("gsm8k",), n=300, style="paper")
    fresh = {problem.uid for problem in load_problems(FRESH, "evaluation", DATA)}
    usual, apart, spared = (job_calibration(changed(job, **about), tokenizer) for about in (
        {"accuracy_tasks": ("gsm8k",)}, {"accuracy_tasks": (FRESH,)}, {"accuracy_tasks": ("gsm8k",), "spare": (FRESH,)}))
    drawn = [{e.uid for e in calibration.examples} for calibration in (usual, apart)]
    assert len(drawn[0] & fresh) > 10 and not drawn[1] & fresh and len(drawn[1]) == 300
    assert spared.fingerprint == apart.fingerprint != usual.fingerprint # so one table of losses serves both


# what was asked in advance

PLAN = ROOT / "figures" / "plan.json"
PLANS = [PLAN, ROOT / "figures" / "repair" / "plan.json"]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.parent.name)
def test_a_plan_names_methods_measures_and_commands_that_are_there(plan):
    families, known = read_families(plan), typer.main.get_command(app).commands
    for family in families.values():
        titles = {task_title(task) for task in family.problems}
        assert {measure.removesuffix(" gold p norm") for measure in family.measures} == titles
        for chosen in family.readings:
            keys = family.keys(chosen)
            assert len(keys) == len(set(keys)) == (len(family.pairs) - (chosen == "cap")) * len(family.sparsities) * len(family.measures)
        for command in family.commands:
            options = dict(re.findall(r"--([\w-]+) (\S+)", command))
            assert {f"--{option}" for option in options} <= {word for each in known[command.split()[1]].params for word in each.opts}
            if command.startswith("cap chains"): continue
            methods = tuple(options["methods"].replace("CHOSEN", family.readings[-1]).split(","))
            check_names({"methods": methods, "accuracy_tasks": tuple(set(options["accuracy-tasks"].split(",")) - {"none"})})
        judged = set(methods)
        assert {name for pair in family.pairs for name in pair} - {CHOSEN} <= judged


def test_a_plan_that_was_edited_or_asks_for_nothing_is_refused(tmp_path):
    path = tmp_path/"plan.json"
    path.write_text(PLAN.read_text().replace("0.2", "0.3", 1))
    refuses("checksum", read_families, path)
    about = read_checked(PLAN)
    model, family = next(iter(about["families"].items()))
    for change, sentence in (({"pairs": [["cap", "wander"]]}, "Unknown method"), ({"sparsities": [1.5]}, "outside"), ({"measures": [3]}, "is not a plan"),
                             ({"pairs": [["cap"]]}, "is not a plan")):
        write_checked(path, {"families": {model: family | change}})
        refuses(sentence, read_families, path)
    refuses("Unknown reading", read_families(PLAN)[model].keys, "cap@matrix")


@needs_data
def test_the_plans_problems_are_those_that_its_commands_draw():
    for family in (family for plan in PLANS for family in read_families(plan).values()):
        options = dict(re.findall(r"--([\w-]+) (\S+)", family.commands[-1]))
        for task, fingerprint in family.problems.items():
            n = int(options["evaluate-n" if task in options["accuracy-tasks"] else "choice-n"])
            assert problems_fingerprint(drawn_problems(changed(Job(), data_dir=str(DATA)), task, n, frozenset())) == fingerprint


def test_the_judged_run_is_the_one_that_the_plan_commands():
    family, run = read_families(PLAN)["smollm2"], load_run(ROOT / "figures" / "primary" / "smollm2")
    options = dict(re.findall(r"--([\w-]+) (\S+)", family.commands[-1]))
    chosen = next(method for method in run.configuration["methods"] if method in family.readings[1:])
    assert run.configuration["methods"] == options["methods"].replace("CHOSEN", chosen).split(",")
    assert run.configuration["sparsities"] == [float(sparsity) for sparsity in options["sparsity"].split(",")]
    assert run.configuration["model"]["dtype"] == options["dtype"] and run.configuration["calibration"]["n"] == int(options["n"])
    validation = load_run(ROOT / "figures" / "primary" / "smollm2_validation")
    assert validation.configuration["calibration"] == run.configuration["calibration"] and set(family.readings) <= set(validation.configuration["methods"])
    asked = judged(family, run, chosen)
    assert list(asked) == family.keys(chosen) and {c.n for c in asked.values()} == {500}


def test_the_judged_repair_is_the_one_that_its_plan_commands():
    """The methods, the calibration set and the comparisons of the plan, and the dense model's answers of the first judged run."""
    [family], folder = read_families(PLANS[1]).values(), ROOT / "figures"
    run, first = load_run(folder / "repair" / "judged"), load_run(folder / "primary" / "qwen")
    options, kept = dict(re.findall(r"--([\w-]+) (\S+)", family.commands[-1])), run.configuration["calibration"]
    assert run.configuration["methods"][:3] == options["methods"].replace("CHOSEN", "alps").split(",")  # what came later stands behind
    asked = {"on": "chains", "chain_rule": options["chain-rule"], "spare": [options["spare"]]}
    assert kept["calibration_tokens"] == int(options["calibration-tokens"]) and {name: kept[name] for name in asked} == asked
    verdicts = judged(family, run, "alps")
    assert list(verdicts) == family.keys("alps") and {c.n for c in verdicts.values()} == {500}
    before = next(e.answers for e in first.evaluations if e.method == "dense")
    asked = [(a.task, a.uid, a.prompt_sha256) for a in before]
    assert run.configuration["model"] == first.configuration["model"]
    assert all([(a.task, a.uid, a.prompt_sha256) for a in e.answers] == asked for e in run.evaluations), "the same problems in the same words"
