"""Writing answers

> Greedy decoding here against lm-evaluation-harness's own backend for models of transformers, prompt for prompt.

Paper: section 4 decodes greedily and does not say with what. In: the lab model and SmolLM2, the lab's problems and
GSM8K's. Out: `figures/benchmarks/generation.json`, and what is said about it below.

The records are made, on a machine that does nothing else, by

    python -m tools.benchmarks.generation

in an environment with the extra `harness`: `pip install -e '.[dev,harness]'`. All of them take about six minutes.
`CAP_NB_DATA` names the folder of the benchmarks' own files, if it is at hand; without it SmolLM2 is given the lab's
problems. SmolLM2 is fetched with `cap fetch smollm2`.
"""

import copy
import importlib.metadata
import importlib.util
import os
import time
from dataclasses import dataclass

from cap_nb.calibration import default_style
from cap_nb.core.errors import BadInput
from cap_nb.data.problems import task_family
from cap_nb.data.prompts import encode_problem
from cap_nb.models.decoding import Decoding, generate_greedy, inference
from cap_nb.evaluation import evaluation_problems, extract_answer, normal_answer, prompt_tokens, strict_pattern
from cap_nb.experiments.harness import greedy_settings, imported_harness, undisturbed
from cap_nb.methods.prune import prune
from cap_nb.models.loading import load_model, model_cache, model_fingerprint
from tools.side_by_side import RECORDS, measured_case, measured_rounds, stopwatch

# Both sides get the same prompts as text, make tokens of them, write greedily in float32 on the processor up to the
# same limit, and give text back. The harness sorts by length and calls `generate`, a batch after the other, with a
# dynamic cache; a batch lasts as long as its longest row. Ours lets rows leave and join in slots of one cache.
#
# A batch of the harness has a fixed number of rows. Our slots have a fixed number of tokens; they are given as many as
# that number of rows takes with the longest prompt and the limit, so neither side needs more memory than the other.
# The harness knows stop tokens and fixed words, no form of a line. So one side of ours stops at stop tokens only, by the
# same rule; the other stops behind a whole answer line too, as `accuracy` does. The harness's task, filters and counting
# are not timed.

path, data_dir = RECORDS / "generation.json", os.environ.get("CAP_NB_DATA")


def ours(model, tokenizer, problems, style, limit, rows, line=None):
    def texts():
        prompts = [prompt_tokens(encode_problem(tokenizer, problem, style)) for problem in problems]
        decoding = Decoding(batch_tokens=rows * (max(map(len, prompts)) + limit))
        written = generate_greedy(model, tokenizer, prompts, limit, line, decoding)
        return [tokenizer.decode(said.tokens, skip_special_tokens=True) for said in written]

    return texts


def theirs(model, tokenizer, problems, style, limit, rows):
    lm_eval, options = imported_harness(), {"do_sample": False, "until": [], "max_gen_toks": limit}
    backend = lm_eval.models.huggingface.HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=rows,
                                              add_bos_token=tokenizer.chat_template is None)
    prompts = [encode_problem(tokenizer, problem, style).prompt for problem in problems]
    requests = [lm_eval.api.instance.Instance("generate_until", {}, (prompt, options), index)
                for index, prompt in enumerate(prompts)]

    def texts():
        with undisturbed(), inference(model), greedy_settings(model, tokenizer):
            return backend.generate_until(requests, disable_tqdm=True)

    return texts


# Before anything is timed the texts are compared. By the same rule they must be the same, letter by letter; where ours
# also stops at answer lines, each must be a prefix of the other. Then the verdicts are: every text is read by the
# paper's strict rule, and each answer must be right on both sides or wrong on both.


def check_texts(texts):
    theirs, same = texts["harness"], texts["stop tokens"]
    early = texts.get("answer lines", same)
    apart = sum(a != b for a, b in zip(theirs, same, strict=True)) + sum(not a.startswith(b)
        for a, b in zip(same, early, strict=True))
    if apart:
        raise BadInput(
            f"{apart} texts differ: expected the same from both sides; what writes something else is not compared."
        )
    return sum(a != b for a, b in zip(same, early))


def right_answers(texts, problems, style):
    family = task_family(problems[0].task)
    gold = [normal_answer(problem.answer, family) for problem in problems]
    right = {name: [extract_answer(text, problem.task, style) == answer
                    for text, problem, answer in zip(each, problems, gold)] for name, each in texts.items()}
    apart = [name for name in right if right[name] != right["harness"]]
    if apart:
        raise BadInput(
            f"The verdicts of {apart[0]} are not the harness's: expected the same on every problem; compare the texts."
        )
    return sum(right["harness"])


# Beside the seconds on the wall stand those that the processor spent on this process. On a machine that does nothing
# else they are nearly equal; where others compute too, the wall includes them as well.


def both_times(sides, repeats):
    def timed(call, kept):
        start, seconds = time.process_time(), stopwatch(call)()
        kept.append(time.process_time() - start)
        return seconds

    spent = {name: [] for name in sides}
    measures = {name: lambda call=call, kept=spent[name]: timed(call, kept) for name, call in sides.items()}
    seconds = measured_rounds(measures, repeats, warmups=0)
    return seconds | {f"{name}, processor": tuple(each) for name, each in spent.items()}


def timed_sides(sides, tokenizer, repeats, verdicts):
    texts = {name: side() for name, side in sides.items()}  # also the warm-up
    about = {"ended early": check_texts(texts), "right": verdicts(texts)}
    about["tokens"] = {name: sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written)
                       for name, written in texts.items()}
    return {"seconds": both_times(sides, repeats), "about": about}


@dataclass(frozen=True)
class GenerationCase:
    "Which model answers which problems, and how they are written."

    weights: str  # Name of the model
    task: str  # Name of the task
    n: int  # Problems
    limit: int  # New tokens an answer at most
    rows: int = 16  # Prompts a batch of the harness
    repeats: int = 5  # Rounds
    lines: bool = True  # Whether a side stops at answer lines too; a side takes its time in every round


def generation_case(path, name, case, data_dir=None, other=None):
    model, tokenizer = load_model(case.weights, "float32", "cpu")
    problems, style = evaluation_problems(case.task, case.n, data_dir=data_dir), default_style(tokenizer)
    given = (model, tokenizer, problems, style, case.limit, case.rows)

    def measure():
        line = strict_pattern(style, task_family(case.task))
        sides = {"harness": (other or theirs)(*given), "stop tokens": ours(*given)}
        if case.lines:
            sides["answer lines"] = ours(*given, line)
        timed = timed_sides(sides, tokenizer, case.repeats, lambda texts: right_answers(texts, problems, style))
        kept = {"weights": case.weights, "task": case.task, "model": model_fingerprint(model),
                "lm_eval": importlib.metadata.version("lm_eval") if not other else None}
        return timed | {"about": timed["about"] | kept}

    settings = {"repeats": case.repeats, "n": case.n, "limit": case.limit, "rows": case.rows}
    return measured_case(path, name, settings, measure)


# In a job a pruned model answers the same problems as the dense one did, and those that were long are asked first. The
# lab pruned by magnitude, with what `cap run` gives its decoder: once in the order of the dense model's answers, once in
# that of the prompts. The calls of the model are counted beside, since they do not depend on the machine.


def counted_calls(model, call):
    calls = []
    with model.register_forward_pre_hook(lambda *given: calls.append(1)):
        written = call()
    return len(calls), [said.tokens for said in written]


def ordered_case(path, task, sparsity, n=200, limit=192, repeats=5):
    model, tokenizer = load_model("lab", "float32", "cpu")
    problems, style = evaluation_problems(task, n), default_style(tokenizer)
    prompts = [prompt_tokens(encode_problem(tokenizer, problem, style)) for problem in problems]
    line = strict_pattern(style, task_family(task))

    def answers(expected=()):
        return generate_greedy(model, tokenizer, prompts, limit, line, Decoding(expected=expected))

    def measure():
        dense = tuple(len(said.tokens) for said in answers())
        prune(model, "magnitude", sparsity)
        sides = {"by prompts": answers, "by dense answers": lambda: answers(dense)}
        counted, seconds = {name: counted_calls(model, side) for name, side in sides.items()}, both_times(sides, repeats)
        first, second = (texts for _, texts in counted.values())
        about = {"calls": {name: calls for name, (calls, _) in counted.items()}, "task": task, "weights": "lab"}
        about |= {"differ": sum(a != b for a, b in zip(first, second)), "model": model_fingerprint(model)}
        return {"seconds": seconds, "about": about | {"tokens": sum(map(len, first)), "dense tokens": sum(dense)}}

    settings = {"repeats": repeats, "n": n, "limit": limit, "method": "magnitude", "sparsity": sparsity}
    return measured_case(path, f"lab, {task}, ordered at {sparsity:.0%}", settings, measure)


def main() -> None:
    for task in ("lab-gsm8k", "lab-arc"):
        for sparsity in (0.2, 0.5):
            print(ordered_case(path, task, sparsity)["seconds"])
    if importlib.util.find_spec("lm_eval"):
        for task in ("lab-gsm8k", "lab-arc"):
            case = GenerationCase(weights="lab", task=task, n=32, limit=192)
            print(generation_case(path, f"lab, {task}", case)["seconds"])
    else:
        print("lm-evaluation-harness is not installed here: see the top of this file.")
    if not (model_cache() / "smollm2").is_dir():
        print("SmolLM2 is not fetched: run 'cap fetch smollm2' first.")
    elif importlib.util.find_spec("lm_eval"):
        task = "gsm8k" if data_dir else "lab-gsm8k"
        case = GenerationCase(weights="smollm2", task=task, n=12, limit=96, rows=4, lines=False)
        print(generation_case(path, "smollm2", case, data_dir=data_dir)["seconds"])


if __name__ == "__main__":
    main()
