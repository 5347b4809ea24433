"""Evaluation against independent arithmetic: decoding, reading and weighing of answers on every supported family, and runs that are killed within a task."""
import json
import math
import random
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import DATA, ROOT, needs_data
from fixtures import contents, refuses, tiny_llama
from programs import finished
from proofs import TINY_MODELS, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from cap_nb.analysis import compare, method_table, sign_flip_test
from cap_nb.calibration import Calibration, overlap
from cap_nb.data.problems import BENCHMARK_NAMES, load_problems, task_family
from cap_nb.data.prompts import encode_problem, prompt_text, strict_answer, target_text
from cap_nb.evaluation import (
    answer_problems, bootstrap_interval, evaluation_problems, extract_answer, normal_answer, perplexity, right_shares, strict_pattern, window_losses)
from cap_nb.core.files import sha256_of_text
from cap_nb.jobs import job
from cap_nb.jobs.job import evaluate, evaluation_data, filled_in, run_job, shown_examples
from cap_nb.jobs.records import job_of, load_run, pack_run, read_run, unpack_run
from cap_nb.jobs.results import compare_runs, repeat_run, results_frame
from cap_nb.jobs.settings import Job, changed
from cap_nb.models.choices import choice_records, log_probs, log_probs_naive
from cap_nb.models.decoding import Decoding, Sampling, answer_is_whole, generate_greedy, generate_naive, generate_samples
from cap_nb.models.lab import lab_model, lab_tokenizer


class Stop:
    """As much of a tokenizer as decoding asks for."""
    eos_token_id, pad_token_id = 3, None


class Recited:
    """A text in pieces, a token each, and as much of a tokenizer as decoding asks for. Token 0 is padding, 1 ends, 2 and 3 open a prompt."""
    pieces = ["", "", "", "", "Six ", "times ", "two.\n", "#### 1", "2", "\n\n", "No: ", "\n", "#### 13", "\n", "and on", ""]
    eos_token_id, pad_token_id = 15, 0

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(self.pieces[int(token)] for token in tokens)


def reciting():
    """A model that knows the text above by heart: whatever it has read last, the next piece follows. Its layers do nothing."""
    size = len(Recited.pieces)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, vocab_size=size, tie_word_embeddings=False,
                                         pad_token_id=0, eos_token_id=15, bos_token_id=2)).eval()
    for weight in (model.model.layers[0].self_attn.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
        weight.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(size)
    model.lm_head.weight.data = torch.eye(size).roll(1, 0)
    return model


def test_an_option_without_room_is_not_told_of_tokens_to_write():
    short, problem = tiny_llama(vocab_size=len(lab_tokenizer()), max_position_embeddings=16), load_problems("lab-arc", "evaluation")[:1]
    refuses("context of 16: expected them to fit; take a model with a longer context, or leave the problem out", choice_records, short, lab_tokenizer(), problem)


def test_vllm_is_not_loaded_where_nothing_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))  # without its LLM
    assert generate_greedy(reciting(), Recited(), [], 4, decoding=Decoding(backend="vllm")) == []
    assert generate_samples(reciting(), Recited(), [], 4, None, Decoding(backend="vllm", sampling=Sampling(samples=2)), []) == []


@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_writing_ends_behind_a_whole_answer_line(budget):
    """The rows of a batch end at different places: by an answer line in mid-text, by a second one, by the stop token, by the limit."""
    model, prompts, line = reciting(), [[2, 3], [3, 2, 8], [12], [13]], strict_pattern("paper", "gsm8k")
    written = generate_greedy(model, Recited(), prompts, 6, line, Decoding(batch_tokens=budget))
    assert [Recited().decode(said.tokens) for said in written] == ["Six times two.\n#### 12\n\n", "\n\nNo: \n#### 13\n", "\nand on", "and on"]
    assert [said.cut_off for said in written] == [False] * 4
    assert written == [generate_naive(model, Recited(), prompt, 6, line) for prompt in prompts]
    shorter = generate_greedy(model, Recited(), prompts, 5, line, Decoding(batch_tokens=budget))
    assert [len(said.tokens) for said in shorter] == [5, 5, 2, 1] and [said.cut_off for said in shorter] == [True, False, False, False]


def test_without_stopping_early_the_last_answer_line_counts():
    model, prompt, line = reciting(), [2, 3], strict_pattern("paper", "gsm8k")
    early, late = (Recited().decode(generate_greedy(model, Recited(), [prompt], 50, line=way)[0].tokens) for way in (line, None))
    assert late.startswith(early) and late.endswith("and on")
    assert [extract_answer(text, "gsm8k", "paper") for text in (early, late)] == ["12", "13"]


def test_a_model_without_stop_tokens_ends_by_its_answer_line():
    model, tokenizer, line = reciting(), Recited(), strict_pattern("paper", "gsm8k")
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    for budget in (1, 10_000):
        assert [len(said.tokens) for said in generate_greedy(model, tokenizer, [[2, 3], [6]], 9, line, Decoding(batch_tokens=budget))] == [6, 3]


def test_slots_are_reused_moved_and_made_longer():
    """Sixteen answers of unlike length through few slots: every row is the naive loop's, whatever happens to its slot."""
    tiny, rng, seen = tiny_llama(vocab_size=60, max_position_embeddings=300, eos_token_id=3), random.Random(1), []
    prompts = [[rng.randrange(4, 60) for _ in range(rng.randrange(1, 12))] for _ in range(16)]
    tiny.generation_config.eos_token_id = [3, 7, 11]
    naive = [generate_naive(tiny, Stop, prompt, 80) for prompt in prompts]
    assert len({len(said.tokens) for said in naive}) > 4
    handle = tiny.model.register_forward_pre_hook(lambda module, args, given: seen.append(given["attention_mask"].shape), with_kwargs=True)
    for budget in (40, 160, 300):
        seen.clear()
        assert generate_greedy(tiny, Stop, prompts, 80, decoding=Decoding(batch_tokens=budget)) == naive
        assert all(rows * columns <= budget for rows, columns in seen if rows > 1)
    handle.remove()


def test_what_one_value_is_asked_with_is_checked_too_and_values_may_be_a_tensor():
    for wrong in ({"confidence": 7}, {"resamples": 0}, {"seed": -1}):
        refuses("expected", bootstrap_interval, [1.0], **wrong)
    assert bootstrap_interval(torch.tensor([1.0, 2.0, 4.0], requires_grad=True)) == bootstrap_interval([1.0, 2.0, 4.0])


def test_prompts_may_be_a_tensor_or_arrays():
    tiny, prompts = tiny_llama(vocab_size=60), torch.tensor([[5, 6, 7], [8, 9, 10]])
    wanted = generate_greedy(tiny, Stop, prompts.tolist(), 4)
    for given in (prompts, prompts.numpy(), list(prompts)):
        assert generate_greedy(tiny, Stop, given, 4, decoding=Decoding(expected=np.array([3, 4]))) == wanted


@pytest.mark.parametrize("name", {kind: name for name, (kind, _) in TINY_MODELS.items()}.values())
def test_every_family_writes_alone_what_it_writes_in_a_batch(name):
    """Prompts of unlike length, padded, with rows that leave their slots one after another, to others in two of the cases."""
    model, tokenizer, rng = tiny_model(name), Stop(), random.Random(0)
    prompts = [[rng.randrange(4, model.config.vocab_size) for _ in range(length)] for length in (1, 9, 4, 6)]
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    free = [said.tokens for said in generate_greedy(model, tokenizer, prompts, 10)]
    ends = {token: {(*said, token).index(token) for said in free} for said in free for token in said}
    model.generation_config.eos_token_id = max(ends, key=lambda token: len(ends[token]))
    naive = [generate_naive(model, tokenizer, prompt, 10) for prompt in prompts]
    assert len({len(said.tokens) for said in naive}) > 1
    for budget in (24, 10_000):
        assert generate_greedy(model, tokenizer, prompts, 10, decoding=Decoding(batch_tokens=budget)) == naive


def test_no_prompts_no_answers():
    assert generate_greedy(tiny_llama(eos_token_id=3), Stop, [], 16) == []


def test_the_head_never_sees_more_than_was_allowed():
    tiny, seen = tiny_llama(eos_token_id=3), []
    handle = tiny.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    window_losses(tiny, torch.zeros(1, 100, dtype=torch.int64), positions=16)
    handle.remove()
    assert max(seen) == 16 and sum(seen) == 99


def test_a_broken_model_is_named():
    """NaN weights give one sentence, not a number."""
    tokenizer = lab_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=300)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    refuses("window 0 of lab-text is not a finite number", perplexity, model, tokenizer, "lab-text", windows=1, window_tokens=16)


TEXTS = [("gsm8k", "#### 72", "72", "72"), ("gsm8k", "  #### $1,234.00  ", "1234", "1234"), ("gsm8k", "####72", None, "72"), ("gsm8k", "#### 72 apples", None, "72"),
         ("gsm8k", "#### 1\n#### two", "1", "1"), ("gsm8k", "", None, None), ("gsm8k", "7-3=4", None, "4"), ("gsm8k", "from 3 to -4", None, "-4"),
         ("gsm8k", "The final answer is: **$18**. That is 3 more.", None, "18"), ("gsm8k", "v2.5 costs 10.", None, "10"),
         ("strategyqa", "Answer: yes", "yes", "yes"), ("strategyqa", "Answer: Yes", None, "yes"), ("strategyqa", "Answer: yes.", None, "yes"),
         ("strategyqa", "Nothing is known; yesterday.", None, None), ("strategyqa", "answer: no\nyes yes", None, "no"),
         ("arc", "Answer: B", "B", "B"), ("arc", "Answer: B\nAnswer: C", "C", "C"), ("arc", "Answer: (B)", None, "B"), ("arc", "A. heat\nB. cold", None, "B"),
         ("arc", "the answer is C because A is not", None, "C"), ("arc", "The answer is A because it is taller than B.", None, "A"), ("arc", "The answer is a guess: A cat, or B", None, "B"), ("arc", "The answer is 'B'.", None, "B"), ("arc", "I'd say that A's H2O", None, None), ("arc", "I do not know.", None, None)]
BOXED = [("gsm8k", "So $\\boxed{72}$.", "72", "72"), ("gsm8k", "\\boxed{1,234.0}\nIs it \\boxed{5}?", "5", "5"), ("gsm8k", "\\boxed{72 clips}", None, "72"),
         ("gsm8k", "\\boxed{72", None, "72"), ("gsm8k", "#### 72", None, "72"), ("strategyqa", "\\boxed{yes}", None, "yes"), ("strategyqa", "Answer: yes", "yes", "yes"),
         ("math500", "\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}", "\\frac{1}{\\sqrt{2}}"), ("math500", "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "\\{1, 2\\}"),
         ("math500", "\\boxed{}", None, None), ("math500", "The answer is $x + 1$.", None, "x + 1"), ("math500", "\\boxed{\n4\n}", "4", "4"), ("math500", "Thus 4.", None, "4")]


def test_a_box_ends_an_answer_behind_its_line():
    """As an answer line does: not before the break, and not while its braces are open."""
    line = strict_pattern("paper", "math500")
    assert [answer_is_whole(text, line) for text in ("So \\boxed{4}", "So \\boxed{4}.\n", "So \\boxed{\n4", "No box\n")] == [False, True, False, False]


def test_reading_a_long_text_of_open_braces_takes_no_time():
    """A pruned model may repeat anything; the pattern goes over each sign once for each box."""
    for text in ("\\boxed{" * 200, "\\boxed{" + "{" * 2000, "{}" * 5000 + "\\boxed{" + "{}" * 5000):
        assert strict_answer(text, "paper", "math500") is None


@pytest.mark.parametrize("style, family, text, strict, lenient", [("paper", *case) for case in TEXTS] + [("boxed", *case) for case in BOXED])
def test_reading_of_answers(style, family, text, strict, lenient):
    for task in (family, f"lab-{family}") if style == "paper" else (family,):
        assert extract_answer(text, task, style) == strict
        assert extract_answer(text, task, style, strict=False) == lenient


@needs_data
@pytest.mark.parametrize("style", ["paper", "answer-line", "boxed"])
@pytest.mark.parametrize("task", (*BENCHMARK_NAMES, "svamp", "math500"))
def test_a_real_gold_solution_is_read_as_its_answer(task, style):
    for problem in load_problems(task, "evaluation", DATA):
        for strict in (True, False):
            assert extract_answer(target_text(problem, style), task, style, strict) == normal_answer(problem.answer, task_family(task))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_options_share_the_prompt_in_every_family(name):
    """Options of one to four tokens, as one by one; a single option, and options of one token, which need no second pass."""
    model, rng = tiny_model(name), random.Random(0)
    read = [rng.randrange(4, model.config.vocab_size) for _ in range(9)]
    options = [[rng.randrange(4, model.config.vocab_size) for _ in range(length)] for length in (1, 4, 2, 3)]
    for some in (options, options[1:2], options[:1] * 2):
        assert log_probs(model, read, some) == pytest.approx(log_probs_naive(model, read, some), abs=1e-3)


def test_a_run_weighs_options_and_keeps_what_it_weighed(tmp_path):
    """A piece of its own; in tables, comparisons, packed and live; a run without it has neither file, column nor setting."""
    asked = changed(Job(), tasks=("lab-arc", "lab-gsm8k"), n=2, k=1, accuracy_tasks=(), loss_n=2, windows=0, methods=("magnitude",), sparsities=(0.5,), device="cpu")
    run_job(asked, tmp_path / "without")
    run_job(changed(asked, choice_n=25), tmp_path / "with")
    run = load_run(tmp_path / "with")
    assert [len(e.choices) for e in run.evaluations] == [25, 25] and {c.task for e in run.evaluations for c in e.choices} == {"lab-arc"}
    table = method_table(run.evaluations)
    assert table["Lab ARC-C. choice norm", "value"].tolist() == pytest.approx([4 * sum(c.correct_mean for c in e.choices) for e in run.evaluations])
    compared = compare(run.evaluations[1].choices, run.evaluations[0].choices)
    assert compared.unit == "points" and compared.n == 25 and 0 < compared.p <= 1
    assert compared.value == pytest.approx(4 * sum(a.probability_mean - b.probability_mean for a, b in zip(run.evaluations[1].choices, run.evaluations[0].choices)))
    assert set(results_frame(tmp_path / "with")["measure"]) == {"loss", "choice", "choice norm", "gold p", "gold p norm"}
    for name in ("with", "without"):
        live = contents(tmp_path / name, "evaluations")
        before = load_run(tmp_path / name).evaluations
        pack_run(tmp_path / name)
        assert load_run(tmp_path / name).evaluations == before
        unpack_run(tmp_path / name, tmp_path / f"{name} again")
        assert live == contents(tmp_path / f"{name} again", "evaluations")
    columns = [set(pq.read_schema(tmp_path / name / "records.parquet").names) for name in ("with", "without")]
    assert columns[0] - columns[1] == {"by_sum", "by_mean", "correct_mean", "probability", "probability_mean"}
    assert "choice_n" not in read_run(tmp_path / "without")["evaluation"] and not list((tmp_path / "without again").rglob("choices.csv"))
    table = repeat_run(tmp_path / "with", tmp_path / "repeated")
    assert {"choice", "gold p norm"} <= set(table["what"]) and (table["compared"] == table["equal"]).all()


def killed_before_its_third_part(part, settings, folder):
    """Work: a run in parts of so many answers, which dies by SIGKILL."""
    def work():
        calls, answer = [], job.answer_problems

        def killed(*given, **named):
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGKILL)
            return answer(*given, **named)
        job.PART, job.answer_problems = part, killed
        run_job(changed(Job(), **settings), folder)
    return work


def test_a_run_that_was_killed_within_a_task_goes_on_behind_its_last_part(tmp_path, monkeypatch):
    """Parts of four of eleven answers; the third part of the dense model is killed. The others are read, and the bytes are those of a run that nobody killed."""
    settings = dict(tasks=("lab-arc",), n=2, k=1, evaluate_n=11, max_new_tokens=20, loss_n=0, windows=0, methods=("magnitude",), sparsities=(0.5,), device="cpu", shots=1)
    monkeypatch.setattr(job, "write_results", lambda folder: None)  # tables and figures take longer than all else
    done = finished(killed_before_its_third_part(4, settings, tmp_path / "killed"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(p.name for p in (tmp_path / "killed" / "unfinished" / "dense-0.0").iterdir() if p.is_dir())
    assert left == ["accuracy-lab-arc.000", "accuracy-lab-arc.001"]
    calls, answer = [], job.answer_problems
    monkeypatch.setattr(job, "PART", 4)
    monkeypatch.setattr(job, "answer_problems", lambda model, tokenizer, problems, *rest, **named: calls.append(len(problems)) or answer(model, tokenizer, problems, *rest, **named))
    run_job(changed(Job(), **settings), tmp_path / "killed")
    assert calls == [3, 4, 4, 3] and not (tmp_path / "killed" / "unfinished").exists()
    run_job(changed(Job(), **settings), tmp_path / "whole")
    whole = contents(tmp_path / "whole", "evaluations")
    assert len(whole) == 6 and whole == contents(tmp_path / "killed", "evaluations")
    # no column names a sample, on the disk or packed, where each problem has one greedy answer
    assert (tmp_path / "whole/evaluations/dense-0.0/answers.csv").read_text().splitlines()[0].endswith("cut_off")
    assert not {"samples", "temperature", "top_p"} & set(load_run(tmp_path / "whole").configuration["evaluation"])
    pack_run(tmp_path / "whole")
    assert "sample" not in pq.read_schema(tmp_path / "whole/records.parquet").names


def test_worked_examples_are_recorded_and_read():
    """Of the calibration split, never a problem that is answered; SVAMP's are GSM8K's; MATH-500 has none."""
    tokenizer = lab_tokenizer()
    asked = filled_in(changed(Job(), tasks=("lab-gsm8k",), n=2, k=1, evaluate_n=3, loss_n=0, windows=0, shots=2), tokenizer)
    problems = evaluation_problems("lab-gsm8k", 3)
    shots = shown_examples(asked, "lab-gsm8k", problems)
    assert len(shots) == 2 and {p.uid for p in shots} <= {p.uid for p in load_problems("lab-gsm8k", "calibration")} - {p.uid for p in problems}
    assert set(evaluation_data(asked, frozenset())) - set(evaluation_data(changed(asked, shots=0), frozenset())) == {"shots"}
    assert shown_examples(changed(asked, shots=0), "lab-gsm8k", problems) == ()
    refuses("math500 has no calibration problems", shown_examples, asked, "math500", ())
    if DATA.is_dir():
        assert {p.task for p in shown_examples(changed(asked, data_dir=str(DATA)), "svamp", ())} == {"gsm8k"}


def test_worked_examples_are_in_the_prompt(monkeypatch):
    model, tokenizer = lab_model(dtype=torch.float32, device="cpu")
    seen, answer = [], job.answer_problems
    monkeypatch.setattr(job, "answer_problems", lambda *given, **named: seen.append(given[5]) or answer(*given, **named))
    evaluation = evaluate(model, tokenizer, changed(Job(), tasks=("lab-arc",), evaluate_n=2, max_new_tokens=4, loss_n=0, windows=0, shots=1), "lab")
    (shots,) = seen
    problem = evaluation_problems("lab-arc", 2)[0]
    assert evaluation.answers[0].prompt_sha256 == sha256_of_text(prompt_text(tokenizer, problem, "lab", shots)) and len(shots) == 1


DRAWN = dict(tasks=("lab-gsm8k",), n=2, k=1, evaluate_n=9, max_new_tokens=80, loss_n=2, windows=0, methods=("magnitude",), sparsities=(0.5,), device="cpu", samples=3, temperature=0.9, top_p=0.95)


def test_drawn_answers_in_a_run_that_was_killed(tmp_path, monkeypatch):
    """Three problems a part, three answers to each. Killed at the third part, it goes on behind the second, to the same bytes; packed and read again they are the same records; the job is read back."""
    done = finished(killed_before_its_third_part(9, DRAWN, tmp_path / "killed"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setattr(job, "PART", 9)
    with monkeypatch.context() as patched:
        patched.setattr(job, "write_results", lambda folder: None)
        run_job(changed(Job(), **DRAWN), tmp_path / "killed")
    run_job(changed(Job(), **DRAWN), tmp_path / "whole")
    whole = contents(tmp_path / "whole", "evaluations")
    assert len(whole) == 6 and whole == contents(tmp_path / "killed", "evaluations")
    run = load_run(tmp_path / "whole")
    for evaluation in run.evaluations:
        assert [answer.sample for answer in evaluation.answers] == [0, 1, 2] * 9
        assert len({answer.uid for answer in evaluation.answers}) == 9
    dense, pruned = run.evaluations
    assert any(len({a.output for a in pruned.answers[i:i + 3]}) > 1 for i in range(0, 27, 3)), "they are drawn"
    table = (tmp_path / "whole" / "tables" / "table.md").read_text()
    assert "| Reached | Lab GSM8K pass@1, k = 3 | Lab GSM8K loss |" in table
    assert "pass@1: per cent of right strict last lines" in table and "95 % Wilson" not in table and "samples 3, temperature 0.9, top_p 0.95" in table
    assert "Lab GSM8K pass@1, k = 3" in (tmp_path / "whole" / "tables" / "answers.md").read_text()
    rebuilt = job_of(run.configuration).evaluate
    assert (rebuilt.samples, rebuilt.temperature, rebuilt.top_p) == (3, 0.9, 0.95)
    frame = results_frame(tmp_path / "whole")
    assert frame[frame["measure"] == "accuracy"].groupby("method")["sample"].sum().to_dict() == {"dense": 27, "magnitude": 27}
    pack_run(tmp_path / "whole")
    assert load_run(tmp_path / "whole").evaluations == run.evaluations
    compared = compare_runs(tmp_path / "whole", against="dense")
    assert compare_runs(tmp_path / "whole", against="dense", sparsities=np.array([0.5])) == compared
    found = compared["Magnitude", "Dense", 0.5, "Lab GSM8K pass@1, k = 3"]
    gains = [100 * (share - right_shares(dense.answers)[problem]) for problem, share in right_shares(pruned.answers).items()]
    assert (found.n, found.alone, found.p) == (9, None, sign_flip_test(gains)) and math.isclose(found.value, sum(gains) / 9)
    refuses("--samples is 2, the run in this folder has 3", run_job, changed(Job(), **DRAWN | {"samples": 2}), tmp_path / "whole")


def test_problems_that_were_calibrated_on_under_another_task_are_refused():
    model, tokenizer = lab_model(dtype=torch.float32, device="cpu")
    asked = filled_in(changed(Job(), tasks=("lab-gsm8k",), n=2, k=1, evaluate_n=3, loss_n=0, windows=0), tokenizer)
    seen, other = evaluation_problems("lab-gsm8k", 4)[0], load_problems("lab-gsm8k", "calibration")[0]
    def calibrated(*problems): return Calibration.from_examples([encode_problem(tokenizer, problem, "lab") for problem in problems], k=1)
    spaced = replace(seen, task="lab-arc", question=seen.question.replace(" ", "  "), choices=(("A", "1"), ("B", "2")), answer="A")
    job.check_problems(asked, model, tokenizer, (), calibrated(other))
    refuses("1 of the 3 problems of lab-gsm8k are calibrated on", job.check_problems, asked, model, tokenizer, (), calibrated(other, spaced))
    short = replace(seen, question="2 + 3")
    assert not overlap(calibrated(replace(other, question="Compute 12 + 34.")), [short]) and overlap(calibrated(replace(other, question="What is 2 + 3?")), [short])


@pytest.mark.parametrize("settings", [dict(max_new_tokens=1000), dict(shots=20)])
def test_an_answer_without_room_is_refused_before_work(settings, tmp_path):
    asked = changed(Job(), tasks=("lab-gsm8k",), n=2, k=1, evaluate_n=3, loss_n=0, windows=0, methods=("cap",), device="cpu", **settings)
    refuses("exceed the model's context of 512", run_job, asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_worked_example_is_never_the_question_with_other_spaces(tmp_path):
    rows = {"train": ["Ann has 3 apples and buys 4  more. How many?", "Bob has 2 pens. How many?"], "test": ["Ann has 3 apples and buys 4 more. How many?"]}
    for split, questions in rows.items():
        path = tmp_path / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"question": question, "answer": "So 7.\n#### 7"}) + "\n" for question in questions))
    asked = filled_in(changed(Job(), data_dir=str(tmp_path), tasks=("gsm8k",), evaluate_n=1, shots=1), lab_tokenizer())
    problems = evaluation_problems("gsm8k", data_dir=tmp_path)
    assert [shown.question for shown in shown_examples(asked, "gsm8k", problems)] == ["Bob has 2 pens. How many?"]


def test_the_dense_model_is_not_compared_with_itself():
    folders = [ROOT / "figures" / "lab_seeds" / seed for seed in "01"]
    assert not any("Dense" in first for first, *_ in compare_runs(folders)) and any("Dense" in first for first, *_ in compare_runs(folders, methods=["dense"]))


def test_drawn_answers_depend_on_seed_problem_and_number_alone():
    model, tokenizer = lab_model(dtype=torch.float32, device="cpu")
    problems = evaluation_problems("lab-gsm8k", 3)
    def outputs(some, seed, **how): return [a.output for a in answer_problems(model, tokenizer, some, max_new_tokens=20, decoding=Decoding(sampling=Sampling(temperature=2.0, top_k=None, seed=seed, samples=2), **how))]
    all_of_them = outputs(problems, 0)
    assert outputs(problems[1:2], 0, batch_tokens=1) == all_of_them[2:4]
    assert outputs(problems, 1) != all_of_them
