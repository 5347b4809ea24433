"""lm-evaluation-harness on our prompts: its verdict on every answer is ours. Skipped where the optional extra is not installed."""
import copy
import itertools
import json
import logging
import random

import pytest
import torch
import yaml

from cap_nb.methods.prune import prune
from cap_nb.evaluation import answer_problems, evaluation_problems
from fixtures import refuses
from cap_nb.models.choices import choice_records, log_probs, options_of, tokens_of_options
from cap_nb.models.loading import load_model, save_model
from conftest import DATA, needs_data
from test_real_input import needs_smollm2
from cap_nb.data.prompts import normal_number
from cap_nb.experiments.harness import (
    HARNESS_TASKS, HarnessSettings, harness_answers, harness_results, harness_text, imported_harness, measures_table, undisturbed, write_harness_task)

pytest.importorskip("lm_eval", reason="the optional extra is not installed: pip install 'cap_nb[harness]'")
TASKS = ("lab-gsm8k", "lab-strategyqa", "lab-arc")


@pytest.fixture(scope="module")
def half():
    """The lab model with half of its weights pruned: it makes mistakes of every kind."""
    model, tokenizer = load_model("lab", device="cpu")
    prune(model, "magnitude", 0.5)
    return model, tokenizer


def both(model, tokenizer, task, folder, max_new_tokens=None, **draw):
    problems = evaluation_problems(task, **draw)
    write_harness_task(folder, tokenizer, problems, max_new_tokens=max_new_tokens)
    ours = answer_problems(model, tokenizer, problems, max_new_tokens=max_new_tokens)
    return ours, harness_answers(model, tokenizer, folder, task)


def verdicts(answers):
    return [(answer.uid, answer.correct) for answer in answers]


@pytest.mark.parametrize("task", TASKS)
def test_every_verdict_is_ours(task, half, tmp_path):
    ours, theirs = both(*half, task, tmp_path, n=40, seed=5)
    assert verdicts(ours) == verdicts(theirs)
    assert 0 < sum(r.correct for r in ours) < 40, "a test needs right and wrong answers"


def test_a_number_is_right_there_however_it_is_written():
    ignored = yaml.safe_load((HARNESS_TASKS / "gsm8k.yaml").read_text())["metric_list"][0]["regexes_to_ignore"]
    judge = imported_harness().api.metrics.exact_match_fn
    written = "72 $72 72.0 72. 072 700 1,700 -5 -$3.50 .5 0.50 -0 .0 00 -0.00 26.80 26.8 26.08 2.680 1.010 1000.100 007.50 10 100".split()
    for text, gold in itertools.product(written, map(normal_number, written)):
        theirs = judge(predictions=[text], references=[gold], regexes_to_ignore=ignored)["exact_match"]
        assert bool(theirs) == (normal_number(text) == gold), (text, gold)


def test_a_saved_model_and_answers_that_are_cut_off(half, tmp_path):
    save_model(*half, tmp_path / "saved")
    ours, theirs = both(*load_model(str(tmp_path / "saved"), device="cpu"), "lab-arc", tmp_path, n=30, max_new_tokens=40)
    assert any(r.cut_off for r in ours) and verdicts(ours) == verdicts(theirs)


def test_excluded_problems_are_excluded_there_too(half, tmp_path):
    first = evaluation_problems("lab-arc", 1)[0].uid
    ours, theirs = both(*half, "lab-arc", tmp_path, n=4, exclude=frozenset({first}), max_new_tokens=5)
    assert first not in {answer.uid for answer in theirs} and len(theirs) == 4 and verdicts(ours) == verdicts(theirs)


def test_nothing_is_left_behind(half, tmp_path):
    model, tokenizer = half
    own, pad, level = model.generation_config, tokenizer.pad_token_id, logging.getLogger("lm_eval").level
    random.seed(3), torch.manual_seed(3)
    expected = random.random(), torch.rand(1).item()
    random.seed(3), torch.manual_seed(3)
    both(model, tokenizer, "lab-arc", tmp_path, n=2, max_new_tokens=4)
    assert (random.random(), torch.rand(1).item()) == expected
    assert model.generation_config is own and tokenizer.pad_token_id == pad and logging.getLogger("lm_eval").level == level


def test_a_task_that_was_not_written(half, tmp_path):
    refuses("write it with write_harness_task", harness_answers, *half, tmp_path, "lab-arc")


def test_its_own_tasks_bear_its_name(half, monkeypatch):
    import datasets
    arc = {"id": ["1", "2"], "question": ["which is it?", "and now?"], "choices": [{"text": ["this", "that"], "label": ["A", "B"]}] * 2, "answerKey": ["A", "B"]}
    pages = {"page": [" = lab = \n the block is red . \n the lamp is old . \n"] * 2}
    invented = {"allenai/ai2_arc": arc, "EleutherAI/wikitext_document_level": pages}

    def local(path, name=None, **options):
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(invented[path]) for split in ("train", "validation", "test")})
    monkeypatch.setattr(datasets, "load_dataset", local)
    results = harness_results(*half, HarnessSettings(tasks=("arc_challenge", "wikitext")))
    found = measures_table(results["results"])
    assert {("arc_challenge", "harness acc"), ("wikitext", "harness word_perplexity")} <= {(task, measure) for task, _, measure in found.index}
    assert all(measure.startswith("harness ") for _, _, measure in found.index) and (found["Value"] >= 0).all()
    lines = harness_text(results).splitlines()
    assert any(line.startswith("| arc_challenge | none | harness acc_norm |") and line.endswith("| 2 | 0 |") for line in lines)


def test_data_that_cannot_be_had(half, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("no way there")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refuses("expected the hub or its cache", harness_results, *half, HarnessSettings(tasks=("arc_challenge",)))


def weighed_by_both(model, tokenizer, problems, folder):
    """Our log-probabilities beside those of the harness's model, and our records beside its own acc and acc_norm on the same prompts and options."""
    lm_eval = imported_harness()
    parts = [tokens_of_options(tokenizer, problem) for problem in problems]
    ours = [value for part in parts for value in log_probs(model, *part)]
    asked = [(f"Question: {p.question}\nAnswer:", f" {text}") for p in problems for _, text in options_of(p)]
    rows = [{"q": p.question, "texts": [text for _, text in options_of(p)], "gold": [name for name, _ in options_of(p)].index(p.answer)} for p in problems]
    (folder / "options.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "options", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "options.jsonl")}}, "test_split": "test", "output_type": "multiple_choice",
            "doc_to_text": "Question: {{q}}\nAnswer:", "doc_to_choice": "{{texts}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    (folder / "options.yaml").write_text(json.dumps(task))
    with undisturbed():
        wrapped = lm_eval.models.huggingface.HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=8)
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        judged = lm_eval.simple_evaluate(wrapped, tasks=["options"], task_manager=manager, bootstrap_iters=0)["samples"]["options"]
    judged = sorted(judged, key=lambda sample: sample["doc_id"])
    assert [arguments for sample in judged for arguments in sample["arguments"]] == asked
    theirs = [value for sample in judged for [(value, _)] in sample["resps"]]
    return ours, theirs, choice_records(model, tokenizer, problems), [(bool(s["acc"]), bool(s["acc_norm"])) for s in judged]


@pytest.mark.parametrize("task, n", [("lab-arc", 40), ("lab-strategyqa", 40), *(pytest.param(task, 12, marks=[needs_data, needs_smollm2]) for task in ("arc", "strategyqa"))])
def test_options_are_weighed_as_the_harness_weighs_them(task, n, half, tmp_path):
    pair, data_dir = (half, None) if task.startswith("lab-") else (load_model("smollm2", "float32", "cpu"), DATA)
    ours, theirs, records, judged = weighed_by_both(*pair, evaluation_problems(task, n, data_dir=data_dir), tmp_path)
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert [(r.correct, r.correct_mean) for r in records] == judged and 0 < sum(r.correct for r in records) < n
