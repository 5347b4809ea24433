"""Own chains: a killed run gives the same file, damage is named, the rules keep what they should, and a run calibrates on them."""
import copy
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cap_nb import single_steps
from cap_nb.calibration import calibration_set
from cap_nb.core import files
from cap_nb.core.files import read_checked, write_checked
from cap_nb.core.stopping import Stopped
from cap_nb.data.problems import LAB_TASKS, load_problems, load_text
from cap_nb.data.prompts import IGNORED, prompt_text, Tokens
from cap_nb.experiments.seeds import check_settings
from cap_nb.models.decoding import generate_noted
from cap_nb.jobs import chains
from cap_nb.jobs.chains import (
    Answering, Chain, Chains, chain_calibration, held_tokens, kept_chains, own_chains, read_chains, text_calibration, write_chains)
from cap_nb.jobs.job import held_by_task, job_calibration, prepare
from cap_nb.jobs.records import changed_options, job_of, load_evaluation, load_run, read_run
from cap_nb.jobs.report import command_of
from cap_nb.jobs.settings import RECIPES, ChainRule, FineTuning, Job, changed
from cap_nb.models.lab import lab_tokenizer
from cap_nb.models.loading import load_model
from cap_nb.portable.format import export_folder, restore_folder
from fixtures import contents, refuses
from programs import FEW, assert_one_sentence, called as cap, output_of

@pytest.fixture(scope="module")
def lab():
    return load_model("lab", device="cpu")


@pytest.fixture(scope="module")
def made(lab, tmp_path_factory):
    """A file with the answers to six problems a task, in one greedy try."""
    path = tmp_path_factory.mktemp("chains") / "lab.jsonl"
    return own_chains(*lab, n=6, answering=Answering(tries=1, file=path)), path


def stop_before(monkeypatch, call):
    """Raise KeyboardInterrupt in place of the n-th part of the answers, and count the parts."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return generate_noted(*arguments)
    monkeypatch.setattr(chains, "generate_noted", counted)
    return calls


def test_killed_anywhere_the_file_is_the_same(tmp_path, monkeypatch):
    """In bfloat16, where a text may depend on what is written beside it: the parts are the same. In float32 a run by tokens is killed, below."""
    model, tokenizer = load_model("lab", "bfloat16", "cpu")

    def make(name):
        answering = Answering(tries=2, temperature=1.5, max_new_tokens=60, batch_tokens=250, part=2, file=tmp_path / name)
        return own_chains(model, tokenizer, ("lab-gsm8k",), n=4, answering=answering)

    calls = stop_before(monkeypatch, 0)
    whole, needed = make("whole.jsonl"), len(calls)
    assert needed == 4, "a part for each of four problems, with both of its tries"
    for call in (2, 1, 3):
        stop_before(monkeypatch, call)
        with pytest.raises(KeyboardInterrupt):
            make("killed.jsonl")
        assert not (tmp_path / "killed.jsonl").exists()
    calls = stop_before(monkeypatch, 0)
    assert make("killed.jsonl") == whole
    assert len(calls) == needed - 3, "finished parts are not answered again"
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_damaged_part_is_made_anew(lab, tmp_path, monkeypatch, caplog):
    model, tokenizer = lab
    answering = Answering(tries=2, max_new_tokens=60, batch_tokens=250, part=4, file=tmp_path / "c.jsonl")
    stop_before(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        own_chains(model, tokenizer, ("lab-gsm8k",), n=4, answering=answering)
    part, = (tmp_path / "c.jsonl.unfinished").iterdir()
    part.write_text(part.read_text().replace('"entropy": ', '"entropy": 1'))
    made = own_chains(model, tokenizer, ("lab-gsm8k",), n=4, answering=answering)
    assert "lab-gsm8k-0000.jsonl is not a file of chains" in caplog.text and "set aside" in caplog.text
    assert made.chains == own_chains(model, tokenizer, ("lab-gsm8k",), n=4, answering=replace(answering, file=None)).chains


def test_any_text_comes_back(tmp_path):
    letters = [chr(c) for c in (0, 9, 10, 13, 34, 39, 92, 0x85, 0x2028, 0xe9, 0x1f600)] + list("ab ")
    rng = random.Random(0)
    chains = tuple(record("arc", f"{i}", 0, None, text="".join(rng.choices(letters, k=30))) for i in range(30))
    write_chains(tmp_path / "c.jsonl", Chains({"model": "m", "tokenizer": "t", "style": {"called": "s"}}, chains))
    assert read_chains(tmp_path / "c.jsonl").chains == chains


def record(task, uid, attempt, answer, text=None, cut_off=False):
    """A made-up answer to a problem whose right answer is B."""
    return Chain(task=task, uid=uid, prompt="?", text=f"so {answer}" if text is None else text, answer=answer, gold="B",
                 attempt=attempt, entropy=0.0, tokens=2, cut_off=cut_off)


@pytest.mark.parametrize("task", ["arc", "lab-strategyqa", "gsm8k"])
def test_what_is_kept_by_trying_everything(task):
    """All ways in which three tries can end, against the rules in other words."""
    outcomes = [("B", "x", False), ("B", "y", False), ("B", "x ", True), ("A", "x", False), (None, "", True)]
    for tries in itertools.product(outcomes, repeat=3):
        chains = [record(task, "p", i, answer, text, cut) for i, (answer, text, cut) in enumerate(tries)]
        right = [chain.answer == "B" and not chain.cut_off for chain in chains]
        fine = task == "gsm8k" or sum(right) >= 2
        firsts = [chain for i, chain in enumerate(chains) if right[i] and not any(
            right[j] and chains[j].text == chain.text for j in range(i))]
        assert kept_chains(chains, ChainRule(each=9)) == tuple(firsts if fine else [])
        assert kept_chains(chains) == tuple(firsts[:1] if fine else [])
        distinct = {" ".join(chain.text.split()): chain for chain in reversed(chains) if chain.text}.values()
        everything = sorted(distinct, key=lambda chain: chain.attempt)
        assert kept_chains(chains, ChainRule(right=False, each=9)) == tuple(everything)
        now_and_then = ChainRule(right=False, solved=(0.3, 0.7), each=9)
        assert kept_chains(chains, now_and_then) == tuple(everything if sum(right) in (1, 2) else [])
        assert not kept_chains(chains, ChainRule(right=False, tokens=(3, 9))), "each has two tokens"


def test_targets_are_the_chains_and_problems_are_known(lab, made):
    model, tokenizer = lab
    calibration = chain_calibration(tokenizer, made[1], n=3, k=2)
    texts = {(chain.task, chain.uid): chain.text.rstrip() for chain in made[0].chains}
    gold = {e.uid: e for e in calibration_set(tokenizer, n=6, k=1).examples}
    for e in calibration.examples:
        assert tokenizer.decode([label for label in e.labels if label != IGNORED]) == texts[e.task, e.uid]
        assert e.prompt == gold[e.uid].prompt and ("Answer:" in e.target or "####" in e.target)
    assert chain_calibration(tokenizer, made[0], n=3, k=2) == calibration
    assert chain_calibration(tokenizer, made[0], n=3, k=2, seed=1).fingerprint != calibration.fingerprint


def test_text_is_never_what_perplexity_is_measured_on(lab):
    held_out = load_text("lab-text").text
    for seed in range(5):
        windows = text_calibration(lab[1], "lab-text", n=10, tokens=120, seed=seed) # longer than the world's facts
        assert not any(e.target.strip() in held_out for e in windows.examples)
        assert all(e.labels == (IGNORED, *e.input_ids[1:]) for e in windows.examples)


def test_the_default_calibration_is_as_it_was(lab):
    """A job that names no targets has the calibration set that it had before there were chains (its configuration: test_records)."""
    assert job_calibration(changed(Job(), n=4, k=2), lab[1]) == calibration_set(lab[1], n=4, k=2)


def test_a_run_on_chains_and_text(made, small_lab, tmp_path):
    """Every kind of method calibrates on them; run.json says what on; another file is another run."""
    words = ["run", "--model", small_lab, *FEW, "--methods", "cap,wanda,sparsegpt", "--sparsity", "0.5", "--text-share", "0.34", "--text-tokens", "100"]
    output_of(*words, "--calibrate-on", made[1], "--out", tmp_path / "run")
    said = read_checked(tmp_path / "run" / "run.json")["calibration"]
    assert (said["on"], said["chains"], said["text_share"], said["text_tokens"]) == ("chains", made[0].fingerprint, 0.34, 100)
    run = load_run(tmp_path / "run")
    assert {e.method for e in run.evaluations} == {"dense", "cap", "wanda", "sparsegpt"}
    assert list(run.losses.task).count("text") == 3
    assert {uid for uid, task in zip(run.losses.uid, run.losses.task) if task != "text"} <= {chain.uid for chain in made[0].chains}
    assert_one_sentence(cap(*words, "--out", tmp_path / "run"), "holds a run with other settings: --calibrate-on is gold, the run in this folder has a file of chains")


@pytest.mark.parametrize("kind", ["gold", "text", "chains", "all chains and text"])
def test_a_set_is_drawn_by_tokens(lab, made, kind):
    """Every task and the text reach their part of the budget, and no example more than that takes is drawn; a larger budget holds the smaller set."""
    on = {"gold": {}, "text": {"calibrate_on": "text"}, "chains": {"calibrate_on": str(made[1])},
          "all chains and text": {"calibrate_on": str(made[1]), "chain_rule": "all", "text_share": 0.25}}[kind]
    tokenizer, sets = lab[1], {}
    for budget in (300, 900):
        job = changed(Job(), calibration_tokens=budget, text_tokens=50, **on)
        calibration = sets[budget] = job_calibration(job, tokenizer)
        share = 1.0 if kind == "text" else on.get("text_share", 0.0)
        held = held_by_task(calibration)
        assert sum(task["tokens"] for task in held.values()) == held_tokens(calibration.examples) >= budget
        assert set(held) == {*(LAB_TASKS if share < 1 else ()), *(["text"] if share else [])}
        for task, found in held.items():
            wanted = share * budget if task == "text" else (1 - share) * budget / 3
            last = [e for e in calibration.examples if e.task == task][-1]
            assert found["tokens"] - len(last.input_ids) < wanted <= found["tokens"]
        assert set(calibration.subset.tolist()) == {0, 1, 2}
    assert sets[300].fingerprint != sets[900].fingerprint
    if kind != "text":
        assert {e.uid for e in sets[300].examples if e.task != "text"} < {e.uid for e in sets[900].examples}
    if "chains" in kind:
        assert {e.uid for e in sets[900].examples if e.task != "text"} <= {chain.uid for chain in made[0].chains}


def test_a_run_by_tokens_says_what_it_holds(made, small_lab, tmp_path):
    """run.json has what was asked for and what came of it; the run can be read back, told apart and put as a command."""
    words = ["run", "--model", small_lab, *FEW[2:], "--methods", "magnitude", "--sparsity", "0.5", "--calibrate-on", made[1], "--chain-rule", "all,tokens=20-", "--out", tmp_path / "run"]
    output_of(*words, "--calibration-tokens", "900")
    kept = read_run(tmp_path / "run")
    said = kept["calibration"]
    assert (said["calibration_tokens"], said["chain_rule"], "n" in said) == (900, "all,tokens=20-", False)
    assert set(said["holds"]) == set(LAB_TASKS) and all(300 <= task["tokens"] < 600 for task in said["holds"].values())
    job = job_of(kept).calibrate
    assert (job.calibration_tokens, job.chain_rule, job.n) == (900, "all,tokens=20-", 128)
    assert "--calibration-tokens 900" in command_of(kept) and "--chain-rule all,tokens=20-" in command_of(kept) and "--n " not in command_of(kept)
    assert_one_sentence(cap(*words, "--calibration-tokens", "600"), "--calibration-tokens is 600, the run in this folder has 900")
    gold = {key: value for key, value in said.items() if key not in ("calibration_tokens", "chain_rule", "holds")} | {"n": 7}
    assert "--calibration-tokens is left out, the run in this folder has 900" in changed_options(kept, kept | {"calibration": gold})
    assert not [told for told in changed_options(kept, kept | {"calibration": gold}) if told.startswith("--n ")]


def test_chains_are_written_until_they_hold_the_tokens(lab, tmp_path, monkeypatch):
    """Part after part; killed between two of them, the file is the same; a rule that takes fewer chains asks more problems; problems may run out."""
    model, tokenizer = lab

    def make(name, rule, count=500):
        answering = Answering(tries=2, temperature=1.75, rule=rule, file=tmp_path / name)
        return own_chains(model, tokenizer, ("lab-gsm8k",), n=Tokens(count), answering=answering)

    calls = stop_before(monkeypatch, 0)
    every = make("all.jsonl", ChainRule(right=False))
    hard, rule = make("hard.jsonl", ChainRule(solved=(0.5, 0.5))), ChainRule(solved=(0.5, 0.5))
    assert len(calls) > 2 and len(hard.chains) > len(every.chains)
    for made_chains, kind in ((every, ChainRule(right=False)), (hard, rule)):
        assert held_tokens(chain_calibration(tokenizer, made_chains, n=Tokens(500), k=1, rule=kind).examples) >= 500
    for call in (2, 1):
        stop_before(monkeypatch, call)
        with pytest.raises(KeyboardInterrupt):
            make("killed.jsonl", rule)
    stop_before(monkeypatch, 0)
    make("killed.jsonl", rule)
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "hard.jsonl").read_bytes()
    refuses("other settings .tokens.", make, "hard.jsonl", rule, count=501)
    monkeypatch.setattr(chains, "calibration_pool", lambda *given: calibration_set(tokenizer, ("lab-gsm8k",), n=3).examples)
    assert len(make("short.jsonl", ChainRule(), count=5000).chains) == 6, "all problems were asked, and no more"


def test_the_rows_of_a_part_fill_slots_as_they_end(lab):
    """More tokens for the decoder are fewer steps; in float32 the chains are the same."""
    model, tokenizer = lab
    steps, found = [], {}
    handle = model.register_forward_pre_hook(lambda *call: steps.append(1))
    for budget in (400, 8000):
        steps.clear()
        answering = Answering(tries=2, max_new_tokens=60, batch_tokens=budget)
        written = own_chains(model, tokenizer, ("lab-gsm8k",), n=8, answering=answering).chains
        found[budget] = [chain.text for chain in written], len(steps)
    handle.remove()
    assert found[400][0] == found[8000][0] and found[400][1] > 2 * found[8000][1]


def test_problems_of_chains_are_not_evaluated_on(lab, tmp_path):
    """A file may hold problems of the evaluation split, if somebody made it so: they are left out of the evaluation."""
    model, tokenizer = lab
    made = own_chains(model, tokenizer, ("lab-arc",), n=3, answering=Answering(tries=1))
    stolen = load_problems("lab-arc", "evaluation")[0].uid
    chains = tuple(Chain(**vars(chain) | {"uid": stolen if i == 0 else chain.uid}) for i, chain in enumerate(made.chains))
    write_chains(tmp_path / "c.jsonl", Chains(made.about, chains))
    job = changed(Job(), tasks=("lab-arc",), n=3, k=1, loss_n=len(load_problems("lab-arc", "evaluation")), windows=0,
                  accuracy_tasks=(), device="cpu", calibrate_on=str(tmp_path / "c.jsonl"))
    refuses("problems for evaluation", prepare, job)
    assert stolen in {e.uid for e in job_calibration(job, tokenizer).examples}


def test_the_command_tells_of_few_chains_and_how_to_calibrate_on_them(tmp_path):
    path = tmp_path / "c.jsonl"
    said = output_of("chains", "--n", 2, "--tries", 2, "--max-new-tokens", 60, "--device", "cpu", "--out", path)
    assert "keep gold" in said and said.strip().endswith(f"--calibrate-on {path}.")


def test_a_plan_counts_chains_and_text(made):
    """The plan reads the lengths of the calibration set that the run will have."""
    plain, mixed = (cap("plan", "--no-probe", "--n", "4", *words) for words in
                    ([], ["--calibrate-on", str(made[1]), "--text-share", "0.5", "--text-tokens", "100"]))
    assert plain.exit_code == mixed.exit_code == 0, mixed.output
    assert "12 examples" in plain.output and "12 examples" in mixed.output and plain.output != mixed.output


def test_a_file_of_chains_may_be_longer_than_a_text_that_is_read_whole(made, monkeypatch):
    whole = read_chains(made[1])
    longest = max(map(len, made[1].read_text().splitlines(keepends=True)))
    monkeypatch.setattr(files, "MOST_TEXT", longest)
    assert made[1].stat().st_size > 2 * longest and read_chains(made[1]) == whole
    monkeypatch.setattr(files, "MOST_TEXT", longest - 1)
    refuses("a line without an end", read_chains, made[1])


def test_a_recipe_does_the_whole_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The plan, then chains, pruning and training, each once; an option that is given wins; the card says what was calibrated on."""
    monkeypatch.setitem(RECIPES, "hour", replace(RECIPES["hour"], tuning=FineTuning(steps=2, examples=2)))
    words = ["prune", "--recipe", "hour", "--method", "wanda", "--calibration-tokens", "300", "--text-share", "0.1", "--text-tokens", "40",
             "--tasks", "lab-strategyqa,lab-arc", "--device", "cpu", "--out", tmp_path / "r"]
    train = single_steps.train_into
    monkeypatch.setattr(single_steps, "BENCHED", 2)

    def stopped(*given):
        raise Stopped  # as Ctrl-C does, which a suite in the background ignores
    monkeypatch.setattr(single_steps, "train_into", stopped)
    result = cap(*words)
    assert result.exit_code == 130, result.output
    assert result.stdout.startswith("Plan for lab") and "goes on from there" in result.output
    assert not list((tmp_path / "r").glob("trained*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*") if path.is_file() and path.name not in ("recipe.json", "README.md")}
    assert {"chains.jsonl", "model.safetensors"} <= {path.name for path in before}
    monkeypatch.setattr(single_steps, "train_into", train)
    [job, *rest] = read_checked(tmp_path / "r" / "recipe.json")
    del job["calibrate"]["calibration_text"]  # as a version that did not know it left it
    write_checked(tmp_path / "r" / "recipe.json", [job, *rest])
    with monkeypatch.context() as other:
        other.setattr(single_steps, "model_fingerprint", lambda model: "0" * 64)
        result = cap(*words)
        assert result.exit_code == 2 and "began with another model or other chains" in result.stderr, result.output
    result = cap(*words)
    assert result.exit_code == 0 and f"{tmp_path / 'r' / 'trained'}: the model, with its card" in result.output, result.output
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there was not made again"
    card = (tmp_path / "r" / "pruned" / "README.md").read_text()
    assert "calibration_tokens 300, chain_rule all" in card and "on chains" in card and "text_share 0.1" in card and "`wanda`" in card
    assert [len(load_evaluation(tmp_path / "r" / name).answers) for name in ("before", "after")] == [4, 4]
    assert "\n| trained |" in result.stdout, result.stdout
    assert "| evaluating one model |" in result.stdout and "up to 2 problems of each task are answered" in result.stdout and "the training of 2 steps that follows" in result.stdout
    assert "README.md" in {path.name for path in (tmp_path / "r" / "trained").iterdir()}
    assert_one_sentence(cap(*words, "--sparsity", "0.4"), "holds a recipe with other settings: expected --sparsity 0.5; give")
    export_folder(tmp_path / "r" / "trained", tmp_path / "small")
    restore_folder(tmp_path / "small", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "r" / "trained")
    assert "cap_nb" in AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.to_dict(), "what was done travels with it"
    listed = cap("methods", "--recipes").output.splitlines()
    assert [line.split()[0] for line in listed] == list(RECIPES)
    assert ["Not judged" in line for line in listed] == [line.startswith("hour") for line in listed]


def test_spared_problems_are_not_asked(lab):
    """A problem that is set aside is neither answered nor, if a file holds it, calibrated on."""
    model, tokenizer = lab
    first = calibration_set(tokenizer, ("lab-arc",), n=3, k=1).examples[0].uid
    for n in (3, Tokens(100)):
        answering = Answering(tries=1, max_new_tokens=4, rule=ChainRule(right=False), exclude=frozenset({first}))
        assert first not in {c.uid for c in own_chains(model, tokenizer, ("lab-arc",), n=n, answering=answering).chains}
    held = own_chains(model, tokenizer, ("lab-arc",), n=3, answering=Answering(tries=1, max_new_tokens=4))
    without = chain_calibration(tokenizer, held, k=1, rule=ChainRule(right=False), exclude={held.chains[0].uid})
    assert {e.uid for e in without.examples} == {c.uid for c in held.chains[1:]}


def test_a_limit_of_no_token_is_refused(lab):
    refuses("max_new_tokens is 0", own_chains, *lab, ("lab-gsm8k",), n=1, answering=Answering(tries=1, max_new_tokens=0))


def test_a_template_that_drops_the_worked_examples_is_refused():
    tokenizer, (asked, shown) = copy.deepcopy(lab_tokenizer()), load_problems("lab-gsm8k", "calibration")[:2]
    tokenizer.chat_template = "{{ messages[-1]['content'] }}\n"
    assert prompt_text(tokenizer, asked, "lab")
    refuses("leaves a question or a worked example out", prompt_text, tokenizer, asked, "lab", [shown])


def test_seeds_of_a_set_in_tokens_may_hold_other_numbers_of_examples():
    """How many examples an amount of tokens takes follows from the draw."""
    one, other = ({"calibration": {"seed": seed, "holds": {"lab-arc": {"examples": 5 + seed, "tokens": 600 + seed}}}, "model": {}} for seed in (0, 1))
    check_settings(Path("run"), one, other)
    refuses("calibration.k", check_settings, Path("run"), one, other | {"calibration": other["calibration"] | {"k": 2}})
