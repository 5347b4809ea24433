"""What a number depends on is in its fingerprint: every input of a run is changed between two runs of one folder.

Then the folder holds the numbers of the new input, or the run is refused in a sentence that names what changed. The inputs are the fields of the settings, of the
model's configuration, of its generation settings and of its tokenizer as they are found, so that a new field is tried without a new line here.
"""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune
from fixtures import made_up_calibration, refuses, tiny_config, tiny_llama, with_settings
from hub import arc_rows, gsm8k_rows, save_llama
from programs import assert_one_sentence, called
from safetensors.torch import load_file, save_file

from cap_nb import single_steps
from cap_nb.calibration import Calibration, calibration_set, overlap
from cap_nb.core import files
from cap_nb.core.errors import BadInput, lacks_memory
from cap_nb.core.files import check_new_folder, read_checked, whole_folder, write_checked
from cap_nb.data import prompts
from cap_nb.data.lab_world import MOST
from cap_nb.data.problems import load_problems, read_arc
from cap_nb.data.prompts import IGNORED
from cap_nb.evaluation import accuracy, evaluation_problems
from cap_nb.jobs import job as job_module
from cap_nb.jobs import records
from cap_nb.jobs.job import run_job
from cap_nb.jobs.planning import plan
from cap_nb.jobs.plugins import plugins_loaded
from cap_nb.jobs.records import changed_options, load_run, pack_run, read_run, unpack_run
from cap_nb.jobs.report import run_folders
from cap_nb.jobs.settings import EvaluateSettings, Job, SinglePruning, changed, option_of
from cap_nb.methods.layer_walk import launched_processes
from cap_nb.methods.prune import prune
from cap_nb.models import lab, loading
from cap_nb.models.loading import load_model, model_fingerprint, save_model
from cap_nb.single_steps import prune_into, save_beside

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
SMALLEST = dict(
    n=3, k=1, tasks=("gsm8k",), evaluate_n=2, loss_n=2, windows=1, window_tokens=32, max_new_tokens=3, methods=("cap",), sparsities=(0.5,),
    device="cpu"
)
# With drawn answers, text, options and means over examples: what other settings need
MORE = dict(n=4, tasks=("gsm8k", "arc"), aggregation="mean", samples=2, temperature=0.5, text_share=0.5, text_tokens=16, choice_n=1, windows=0)
OF_MORE = {"k": 2, "samples": 3, "temperature": 0.7, "top_p": 0.9, "text_tokens": 24, "choice_n": 2, "budget": 0.5}
# What a setting is changed to, where one more is none of its values; None: it has no other value on every machine, or is tried below
OTHER = {
    "name": None, "device": None, "backend": None, "data_dir": None, "calibration_text": None, "calibrate_on": "text", "calibration_tokens": None, "chain_rule": None,
    "dtype": "bfloat16", "tasks": ("arc",), "style": "answer-line", "calibration_seed": 5, "text_share": 0.4, "spare": ("gsm8k_fresh",),
    "methods": ("magnitude",), "sparsities": (0.3,), "aggregation": "mean", "score_target": "divergence", "accuracy_tasks": ("arc",),
    "text": "lab-text", "evaluate_on": "validation"
}
# What the run has of a setting that it was not given
IN_A_RUN = {"dtype": "float32", "style": "paper", "calibration_seed": 0, "accuracy_tasks": ("gsm8k",), "text": "wikitext2"}
WORDS = {"hidden_act": "gelu", "rope_type": "linear", "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def save_folder(place):
    """A tiny Llama with a chat template, and benchmark files."""
    save_llama(place / "model", template=TEMPLATE, max_position_embeddings=1024, num_hidden_layers=2)
    for name, rows in {
        "gsm8k/train.jsonl": gsm8k_rows("train"),
        "gsm8k/test.jsonl": gsm8k_rows("test"),
        **{f"arc/ARC-Challenge-{part}.jsonl": arc_rows(part) for part in ("Train", "Dev", "Test")},
    }.items():
        path = place / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "data" / "wikitext2").mkdir()
    for name in ("test.txt", "valid.txt"):
        (place / "data" / "wikitext2" / name).write_text("\n".join(f"The river of {name} runs {i} miles to the sea ." for i in range(40)))


def job_in(place, **settings):
    return changed(Job(), **SMALLEST | dict(name=str(place / "model"), data_dir=str(place / "data")) | settings)


def numbers(folder):
    """All that was measured, by cell."""
    return {(e.method, e.sparsity): (e.answers, e.losses, e.perplexity) for e in load_run(folder).evaluations}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run, with all that it was made of."""
    place = tmp_path_factory.mktemp("inputs")
    save_folder(place)
    run_job(job_in(place), place / "run")
    return place


@pytest.fixture
def place(first, tmp_path, monkeypatch):
    """A copy that a test may change, as if its run had been made here; tables and figures follow from the records, and are not written."""
    monkeypatch.setattr(job_module, "write_results", lambda folder: None)
    shutil.copytree(first, tmp_path / "copy")
    kept = read_run(tmp_path / "copy" / "run")
    write_checked(tmp_path / "copy" / "run" / "run.json", kept | {"model": kept["model"] | {"name": str(tmp_path / "copy" / "model")}})
    return tmp_path / "copy"


def check_taken_in(place, named, always_valid=False, **settings):
    """The folder goes on with the right numbers, or names what changed: whether it was refused."""
    try:
        run_job(job_in(place, **settings), place / "run")
    except BadInput as error:
        if named in str(error):
            return True
        assert "\n" not in str(error) and not always_valid, error
        with pytest.raises(BadInput):  # no model has this value
            run_job(job_in(place, **settings), place / "fresh")
            raise AssertionError(f"{named} is not named: {error}")
        return False
    run_job(job_in(place, **settings), place / "fresh")
    wanted, found = numbers(place / "fresh"), numbers(place / "run")
    assert {cell: found[cell] for cell in wanted} == wanted, f"{named} was changed, and the numbers of before stand"
    return False


# ---- the settings ----
SETTINGS = [setting for part in fields(Job) for setting in fields(part.default_factory)
            if OTHER.get(setting.name, "found") is not None and setting.name not in OF_MORE]


def other_value(setting):
    """Another value of a setting."""
    if setting.name in OTHER:
        return OTHER[setting.name]
    value = SMALLEST.get(setting.name, setting.default)
    assert type(value) in (int, float), f"tests/test_inputs.py does not know another value of {setting.name}: give one in OTHER"
    return value + 1 if value < 100 else value // 2


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_changed_setting(setting, place):
    value = other_value(setting)
    before = SMALLEST.get(setting.name, setting.default)
    before, now = (",".join(map(str, each)) or "none" if isinstance(each, tuple) else each for each in (IN_A_RUN.get(setting.name, before), value))
    had = "was made without it" if before is None else f"has {before}"
    said = f"{option_of(setting.name)} is {now}, the run in this folder {had}: expected the run's values; give them, or another folder with --out."
    check_taken_in(place, said, always_valid=True, **{setting.name: value})


@pytest.fixture(scope="module")
def more(first, tmp_path_factory):
    """A finished run whose settings go together with more."""
    place = tmp_path_factory.mktemp("more") / "place"
    shutil.copytree(first, place, ignore=shutil.ignore_patterns("run"))
    run_job(job_in(place, **MORE), place / "run")
    return place


@pytest.mark.parametrize("name", OF_MORE)
def test_a_changed_setting_of_more(name, more):
    before = MORE.get(name, SMALLEST.get(name, getattr(EvaluateSettings, name, None)))
    had = "was made without it" if before is None else f"has {before}"
    assert check_taken_in(more, f"{option_of(name)} is {OF_MORE[name]}, the run in this folder {had}", True, **MORE | {name: OF_MORE[name]})


@pytest.mark.parametrize(
    "option, part, values",
    [
        ("--model", "model", {"name": "other", "fingerprint": "0" * 64}),
        ("--device", "model", {"device": "cuda"}),
        ("--backend", "evaluation", {"backend": "vllm"}),
        ("--chain-rule", "calibration", {"chain_rule": "all"}),
    ],
)
def test_a_setting_that_not_every_machine_can_change(option, part, values, first):
    kept = read_run(first / "run")
    now, had = next(iter(values.values())), {"--model": first / "model", "--device": "cpu", "--backend": "transformers", "--chain-rule": "right"}[option]
    assert changed_options(kept, kept | {part: kept[part] | values}) == (f"{option} is {now}, the run in this folder has {had}",)


def test_a_model_that_was_moved_is_the_same(place):
    (place / "model").rename(place / "moved")
    assert run_job(job_in(place, name=str(place / "moved")), place / "run") == place / "run"


# ---- the files of the model ----
def leaves(value, path=()):
    """(path, value) of every setting of a configuration, inner ones too."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    return [(path, value)]


def other_leaf(path, value):
    """Another value of the same kind; None where there is none to think of."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.25
    return WORDS.get(path[-1])


def change_leaf(file, path, value):
    whole = json.loads(file.read_text())
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(whole))


DEFAULTS = tiny_config(vocab_size=8, pad_token_id=1, bos_token_id=0, eos_token_id=1).to_json_string(use_diff=False)
CONFIG = [(path, new) for path, value in leaves(json.loads(DEFAULTS))
          if path[0] != "label2id" and (new := other_leaf(path, value)) is not None]  # names of classes, which no language model has


@pytest.mark.parametrize(
    "path, value", CONFIG, ids=lambda each: ".".join(each) if isinstance(each, tuple) else str(each)
)
def test_a_changed_configuration(path, value, place):
    change_leaf(place / "model" / "config.json", path, value)
    check_taken_in(place, path[-1])


def test_a_field_that_is_taken_out_of_the_fingerprint_is_noticed(place, monkeypatch):
    """The proof proves something: without one field the numbers of before would stand."""
    monkeypatch.setattr(loading, "ORIGIN", loading.ORIGIN | {"rms_norm_eps"})
    shutil.rmtree(place / "run")
    run_job(job_in(place), place / "run")
    change_leaf(place / "model" / "config.json", ("rms_norm_eps",), 0.3)
    with pytest.raises(AssertionError, match="the numbers of before stand"):
        check_taken_in(place, "rms_norm_eps")


ALREADY = "50.0% of the weights in scope are zero before pruning, and a sparsity counts them"


def test_zeros_that_are_there_already_are_told(place, caplog):
    """Before a run, before pruning in memory and on the disk; of a dense model nothing is said."""
    model, tokenizer = load_model(place / "model")
    prune(model, "magnitude", 0.5)
    save_model(model, tokenizer, place / "half")
    how = SinglePruning(method="magnitude", sparsity=0.3)

    def told(do):
        caplog.clear()
        report = do()
        return report, sum(ALREADY in record.message for record in caplog.records)

    half = changed(Job(), name=str(place / "half"))
    for stream in (False, True):
        report, times = told(lambda: prune_into(half, replace(how, stream=stream), place / f"again{stream}"))
        assert (report.reached, times) == (0.5, 1)
    assert told(lambda: run_job(job_in(place, name=str(place / "half")), place / "half_run"))[1] == 1
    assert told(lambda: prune_into(changed(half, name=str(place / "model")), how, place / "once"))[1] == 0


# ---- what a folder says beside the configuration ----
def edited(name, **settings):
    return lambda place: with_settings(place / "model" / name, **settings)


def with_template(text):
    return lambda place: (place / "model" / "chat_template.jinja").write_text(text)


def with_weight(change):
    def changed_weight(place):
        path, key = place / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
        tensors = load_file(path)
        save_file(tensors | {key: change(tensors[key])}, path, metadata={"format": "pt"})

    return changed_weight


def another_problem(place):
    for name in ("train", "test"):
        path = place / "data" / "gsm8k" / f"{name}.jsonl"
        path.write_text(path.read_text().replace(" more", " other"))


FILES = {
    "a weight": (with_weight(lambda weight: weight.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(9.0))), "the model's weights"),
    "the end of an answer": (edited("generation_config.json", eos_token_id=5), "eos_token_id in its generation_config.json"),
    "a setting of generation": (
        edited("generation_config.json", repetition_penalty=1.5),
        "repetition_penalty in its generation_config.json",
    ),
    "the chat template": (with_template(TEMPLATE.replace("assistant: ", "answer: ")), "the tokenizer's vocabulary or chat template"),
    "how a text is cut": (edited("tokenizer.json", normalizer={"type": "Lowercase"}), "the tokenizer's rules by which it cuts a text"),
    "the problems": (another_problem, "the calibration examples, the problems of gsm8k that are answered, the problems of gsm8k for held-out loss: expected"),
    "the text": (
        lambda place: [path.write_text(path.read_text().upper()) for path in (place / "data" / "wikitext2").iterdir()],
        "content of the text wikitext2: expected the same; check --model, --data-dir",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_changed_file(what, place):
    change, named = FILES[what]
    change(place)
    assert check_taken_in(place, named)


def test_a_template_with_a_date_or_a_draw_gives_the_same_prompt(place):
    dated = TEMPLATE + "{{ strftime_now('%d %b %Y %H') }} {{ range(9999) | random }}"
    with_template(dated)(place)
    for folder in ("dated", "dated"):
        run_job(job_in(place), place / folder)
    cells = numbers(place / "dated")
    run_job(job_in(place, methods=("magnitude",), sparsities=(0.0,)), place / "zero")
    assert numbers(place / "zero")["magnitude", 0.0] == cells["dense", 0.0] == numbers(place / "zero")["dense", 0.0]


TEMPLATES = {
    "drops the question": "user: say something\nassistant: ",
    "syntax": "{% for m in messages %}",
    "raises": "{{ raise_exception('no') }}",
    "division": "{{ 1 / 0 }}",
    "undefined": "{{ messages.nothing.at.all }}",
    "filter": "{{ messages | nothing }}",
    "index": "{{ messages[7]['content'] }}",
}


@pytest.mark.parametrize("what", TEMPLATES)
def test_a_template_that_cannot_ask_is_refused(what, place):
    with_template(TEMPLATES[what])(place)
    with pytest.raises(BadInput, match="chat template") as error:
        run_job(job_in(place), place / "new")
    assert "\n" not in str(error.value) and not (place / "new").exists()


def test_a_tokenizer_without_a_template_is_told(place, caplog):
    (place / "model" / "chat_template.jinja").unlink()
    prompts.warn_of_plain_prompts.cache_clear()
    for _ in range(2):
        run_job(job_in(place), place / "plain")
    assert [r.message for r in caplog.records if r.name == prompts.__name__] == [
        "model has no chat template: a prompt is the plain question and an empty line."
    ]
    assert [read_run(place / name)["model"].get("prompts") for name in ("plain", "run")] == ["plain text", None]


def test_a_clock_that_transformers_keeps_elsewhere_is_one_sentence(place, monkeypatch):
    monkeypatch.delattr(prompts.chat_template_utils, "datetime")
    refuses("keeps the clock of chat templates in another place: expected .* install transformers<6", run_job, job_in(place), place / "new")


def test_an_older_run_goes_on_and_says_what_it_does_not_cover(place, caplog):
    """Before, a fingerprint was that of the weights alone."""
    path = place / "run" / "run.json"
    kept = read_checked(path)
    kept["model"] = {name: value for name, value in kept["model"].items() if name not in ("configuration", "generation")}
    kept["model"] |= {name: kept["model"][name].split("-")[0] for name in ("fingerprint", "tokenizer")}
    write_checked(path, kept)
    run_job(job_in(place, sparsities=(0.3,)), place / "run")
    assert "says nothing of the model's configuration and generation" in caplog.text
    assert read_checked(path)["model"] == kept["model"]


def test_packing_leaves_what_is_no_record_where_it_is(place, caplog):
    """A user's notes, another run inside, an empty folder: named, never removed, and back after unpacking."""
    run = place / "run"
    own = [
        "my-notes.txt",
        "evaluations/mine.txt",
        "evaluations/dense-0.0/notes.md",
        "evaluations/dense-0.0/own.csv",
        "inner/run.json",
        "plots/own.png",
        "mine.jsonl",
    ]
    for name in own:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    (run / "nothing").mkdir()
    before = {path.relative_to(run) for path in run.rglob("*")}
    pack_run(run)
    assert all((run / name).exists() for name in own if name != "evaluations/dense-0.0/own.csv") and (run / "nothing").is_dir()
    assert "inner/run.json" in caplog.text and "was left where it is" in caplog.text
    unpack_run(run, place / "back")
    assert before <= {path.relative_to(place / "back") for path in (place / "back").rglob("*")}
    assert numbers(place / "back") == numbers(run)


def test_what_no_command_would_read_again_is_not_packed(place, monkeypatch):
    before = {path.relative_to(place) for path in place.rglob("*")}
    monkeypatch.setattr(records, "MOST_UNPACKED", 100)
    refuses("which no command would read from one file: expected at most .* leave the run as it is", pack_run, place / "run")
    assert {path.relative_to(place) for path in place.rglob("*")} == before


# ---- plugins ----
ADD = "import torch\nfrom cap_nb.jobs.plugins import add_attribution, add_criterion\nfrom cap_nb.models.anatomy import anatomy\n"
EDITS = "expected both as they were; work on a copy"
PLUGINS = {  # What a plugin does -> its code, and the sentence that it gets
    "edits the weight": (
        "def score(known):\n    known.weight.data.mul_(0.5)\n    return known.weight.abs()\n"
        "add_criterion('mine', score)",
        EDITS,
    ),
    "edits the model": (
        "def scores(model, calibration, batch_tokens):\n    model.get_input_embeddings().weight.data.zero_()\n"
        "    return torch.ones(anatomy(model).layers, anatomy(model).heads)\nadd_attribution('mine', scores)",
        EDITS,
    ),
    "ends the program": ("add_criterion('mine', lambda known: exit())", "The function of criterion 'mine' failed"),
    "sparse": ("add_criterion('mine', lambda known: known.weight.abs().to_sparse())", "are no numbers"),
    "meta": ("add_criterion('mine', lambda known: known.weight.abs().to('meta'))", "are no numbers"),
    "sparse table": (
        "add_attribution('mine', lambda model, calibration, batch_tokens: torch.ones(2, 4).to_sparse())",
        "no table of scores",
    ),
}


@pytest.mark.parametrize("what", PLUGINS)
def test_a_plugin_that_changes_what_it_is_given_or_gives_no_numbers_is_refused(what, place):
    code, sentence = PLUGINS[what]
    (place / "my.py").write_text(ADD + code)
    methods = ("cap.mine",) if "add_attribution" in code else ("mine",)
    with plugins_loaded([place / "my.py"]), pytest.raises(BadInput, match=sentence):
        run_job(job_in(place, methods=methods), place / "new")


def test_a_helper_of_a_plugin_is_part_of_it(place, monkeypatch):
    (place / "my.py").write_text(ADD + "from beside_my import power\nadd_criterion('mine', lambda known: known.weight.abs() ** power)")
    for power in (1, 2):
        (place / "beside_my.py").write_text(f"power = {power}")
        monkeypatch.delitem(sys.modules, "beside_my", raising=False)
        importlib.invalidate_caches()
        with plugins_loaded([place / "my.py"]):
            if power == 1:
                run_job(job_in(place, methods=("mine",)), place / "new")
            else:
                refuses("was made with another my.py", run_job, job_in(place, methods=("mine",)), place / "new")


def test_a_model_that_something_changed_ends_the_run(place, monkeypatch):
    """Whatever changes the dense model between cells, outside of the weights that are put back."""
    real = job_module.measure_piece

    def measured(model, *rest):
        model.get_input_embeddings().weight.data[0] += 1
        return real(model, *rest)

    monkeypatch.setattr(job_module, "measure_piece", measured)
    monkeypatch.setattr(job_module, "write_results", lambda folder: pytest.fail("tables of a changed model"))
    refuses("The dense model's weights changed while", run_job, job_in(place), place / "new")


@pytest.mark.parametrize("lost", [False, True], ids=["", "without its report"])
def test_a_cell_that_is_measured_anew_leaves_nothing_of_other_zeros(place, monkeypatch, lost):
    """Where zeros differ each time, pieces and a kept model of the zeros before go."""
    cell, before = "cap-0.5", numbers(place / "run")
    shutil.rmtree(place / "run" / "evaluations" / cell)
    (place / "run" / "models" / cell).mkdir(parents=True)
    shutil.copytree(place / "run" / "evaluations" / "dense-0.0", place / "run" / "unfinished" / cell / "loss-gsm8k")  # of other zeros
    if lost:
        (place / "run" / "reports" / f"{cell}.json").unlink()
    monkeypatch.setattr(job_module, "repeatable", lambda method, device, finished: False)
    run_job(job_in(place), place / "run")
    assert not (place / "run" / "models" / cell).exists() and numbers(place / "run") == before


def test_a_finished_cell_whose_weights_would_be_others_is_measured_anew(place, monkeypatch):
    """On a GPU a training gives other weights each time: a report or model that comes later is of those measured."""
    report, real = place / "run" / "reports" / "cap-0.5.json", job_module.prune_with
    report.unlink()
    monkeypatch.setattr(job_module, "repeatable", lambda method, device, finished: not finished)
    monkeypatch.setattr(job_module, "prune_with", lambda *given: replace(real(*given), reached=0.4))
    run_job(job_in(place), place / "run")
    assert report.exists() and load_run(place / "run").evaluations[-1].reached == 0.4


def test_zeros_that_are_not_those_measured_leave_no_report(place, monkeypatch):
    """The same call is refused again, and does not find what the first one left."""
    report, real = place / "run" / "reports" / "cap-0.5.json", job_module.prune_with
    report.unlink()
    monkeypatch.setattr(job_module, "prune_with", lambda *given: replace(real(*given), reached=0.4))
    for _ in range(2):
        refuses("again gave 0.400000 zeros", run_job, job_in(place), place / "run")
        assert not report.exists()


# ---- the model ----
def test_a_file_that_is_overwritten_changes_no_loaded_model(place):
    file = place / "model" / "model.safetensors"
    model, _ = load_model(place / "model", device="cpu")
    before, size = model_fingerprint(model), file.stat().st_size
    with open(file, "r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"\x11" * 1000)
        opened.truncate(size - 10)
    assert model_fingerprint(model) == before and model(torch.arange(9)[None]).logits.isfinite().all()


def with_few_tokens(place):
    path = place / "model" / "model.safetensors"
    save_file({name: t[:200].clone() if t.shape[0] == 258 else t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    edited("config.json", vocab_size=200)(place)


def without_vocabulary(place):
    (place / "model" / "tokenizer.json").unlink()
    (place / "model" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


WORDLESS = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": {}}
NO_MODEL = {
    **{
        f"weights in {dtype}": (with_weight(methodcaller("to", dtype)), "holds model.layers.1.mlp.up_proj.weight as")
        for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "fewer embeddings than tokens": (with_few_tokens, "embeddings of 200 tokens"),
    "a word for the end": (edited("generation_config.json", eos_token_id="x"), "answers end with token 'x'"),
    "a list in a list": (edited("generation_config.json", eos_token_id=[[1]]), r"answers end with token \[\[1\]\]"),
    "kernels that are compiled": (
        edited("config.json", attn_implementation="flex_attention"),
        "asks for flex_attention",
    ),
    "no vocabulary": (without_vocabulary, "has a tokenizer without a vocabulary"),
    "no words": (edited("tokenizer.json", model=WORDLESS), "cannot be opened by transformers"),
}


@pytest.mark.parametrize("what", NO_MODEL)
def test_what_is_no_whole_model_is_refused(what, place):
    change, sentence = NO_MODEL[what]
    change(place)
    refuses(sentence, load_model, place / "model", device="cpu")


def test_stored_means_stored(place):
    edited("config.json", dtype="float16", torch_dtype="float16")(place)
    assert load_model(place / "model", device="cpu")[0].dtype == torch.float32


def adapted(module):
    """As adapters do: the weight is that of another module."""
    module.base_layer = copy.deepcopy(module)
    del module.weight
    module.__class__ = type("Adapted", (torch.nn.Linear,), {"weight": property(lambda self: self.base_layer.weight)})


REPARAMETRISED = {
    "adapters": adapted,
    "pruned by torch": lambda module: torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5),
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("how", REPARAMETRISED)
def test_weights_that_are_computed_anew_are_refused(how):
    model = tiny_llama()
    REPARAMETRISED[how](model.model.layers[1].mlp.up_proj)
    refuses("up_proj is no parameter of its own: expected a plain one; merge adapters", prune, model, "magnitude", 0.5)


def test_training_mode_is_refused_where_it_draws():
    model = tiny_llama(attention_dropout=0.1).train()
    refuses("is in training mode and has dropout", prune, model, "magnitude", 0.5)
    assert prune(model.eval(), "magnitude", 0.5).zeros


def test_a_model_without_numbers_is_refused_by_answers_too(place):
    model, tokenizer = load_model(place / "model", device="cpu")
    model.lm_head.weight.data[0, 0] = torch.nan
    refuses("predictions are not numbers", accuracy, model, tokenizer, "gsm8k", 2, data_dir=place / "data", max_new_tokens=2)


# ---- problems and texts that are one ----
def test_problems_that_differ_in_spaces_and_case_are_one(place):
    (first_row, *_), path = gsm8k_rows("train"), place / "data" / "gsm8k" / "test.jsonl"
    again = first_row | {"question": first_row["question"].upper().replace(" ", "\u00a0 ")}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    problems = load_problems("gsm8k", "evaluation", place / "data")
    calibrated = load_problems("gsm8k", "calibration", place / "data")
    left = evaluation_problems("gsm8k", data_dir=place / "data", exclude={p.uid for p in calibrated})
    assert len(left) == len(problems) - 1 and again["question"] not in {p.question for p in left}
    _, tokenizer = load_model(place / "model", device="cpu")
    calibration = calibration_set(tokenizer, ("gsm8k",), 16, 1, data_dir=place / "data")
    assert len(overlap(calibration, problems)) == 1 and not overlap(calibration, left)


def test_one_question_with_two_answers_is_refused(place):
    (first_row, *_), path = gsm8k_rows("train"), place / "data" / "gsm8k" / "train.jsonl"
    path.write_text(path.read_text() + json.dumps(first_row | {"answer": "I guess.\n#### 77"}) + "\n")
    refuses("asks what an earlier one asks and answers '77', not '1'", load_problems, "gsm8k", "calibration", place / "data")


def test_text_that_is_calibrated_on_is_not_measured_on(place):
    texts = place / "data" / "wikitext2"
    shutil.copyfile(texts / "valid.txt", texts / "test.txt")
    refuses("are calibrated on and measured on", run_job, job_in(place, calibrate_on="text", text_tokens=64), place / "new")


# ---- where the result goes ----
def test_a_name_that_nothing_can_take_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path)):
        refuses("is the folder that the command runs in", check_new_folder, Path(name))
    refuses("exists already|is a disk of its own", check_new_folder, Path("/proc"))


def test_a_licence_goes_along_wherever_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(*load_model("lab"), "dense")
    Path("dense/LICENSE").write_text("keep this")
    model, tokenizer = load_model("dense")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    Path("new").mkdir()  # an empty one is taken
    save_model(model, tokenizer, "new")
    assert Path("new/LICENSE").read_text() == "keep this"


@pytest.mark.parametrize("n", [0, MOST + 1])
def test_a_number_of_problems_that_cannot_be_is_refused_before_a_training(n, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "train", lambda *given: pytest.fail("it was trained"))
    refuses("n .problems. is", lab.train_lab, tmp_path / "new", 1, n=n)


def test_what_is_whole_is_kept_when_its_name_is_taken_meanwhile(tmp_path):
    with pytest.raises(BadInput, match="is whole in new.[0-9]+ beside it"), whole_folder(tmp_path / "new") as part:
        (part / "made").write_text("made")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "another's").write_text("other")
    (kept,) = tmp_path.glob("new.*")
    assert (kept / "made").read_text() == "made" and (tmp_path / "new" / "another's").read_text() == "other"


def test_two_tables_of_one_name_are_both_kept(tmp_path):
    out = tmp_path / "scores.safetensors"
    out.write_text("another's")
    refuses("is whole in scores.[0-9]+.safetensors beside it", save_beside, lambda table, path: path.write_text(table), "mine", out)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["another's", "mine"]


def test_half_written_files_of_a_process_in_another_container_stay(tmp_path):
    """Its number means nothing here; its lock does."""
    part = tmp_path / ".new.4194999.part"
    part.mkdir()
    script = "import sys\nfrom pathlib import Path\nfrom cap_nb.core.files import locked\nwith locked(Path(sys.argv[1])): print('in', flush=True), sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script, str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with whole_folder(tmp_path / "new"):
            assert part.exists()
        other.stdin.close()
    shutil.rmtree(tmp_path / "new")
    with whole_folder(tmp_path / "new"):
        assert not part.exists()


def test_a_process_of_this_number_in_another_container_loses_nothing(tmp_path):
    part = tmp_path / f".new.{os.getpid()}.part"
    part.mkdir()
    with files.locked(part):
        with pytest.raises(BadInput, match="is being written by a process in another container"), whole_folder(tmp_path / "new"):
            pass
        assert part.exists()
    with whole_folder(tmp_path / "new"):
        pass


def test_an_environment_that_makes_no_sense_is_one_sentence():
    done = subprocess.run([sys.executable, "-m", "cap_nb", "methods"], env=os.environ | {"TQDM_MININTERVAL": "abc"}, capture_output=True, text=True)
    assert done.returncode == 2 and "TQDM_MININTERVAL is 'abc': expected a number" in done.stderr and done.stderr.count("\n") == 1
    done = subprocess.run([sys.executable, "-m", "cap_nb", "--help"], env=os.environ | {"MPLBACKEND": "nonsense"}, capture_output=True, text=True)
    assert done.returncode == 0


def test_half_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    refuses("WORLD_SIZE is 2 and MASTER_ADDR is not set", launched_processes)


@pytest.mark.parametrize("words, sentence", [
    ("eval --model lab --device cpu", "This command was started as 2 processes: expected one"),
    ("score --model lab --dtype fastest --out new", "--dtype fastest was given to several processes: expected one dtype for all"),
    ("score --model lab --device auto --out new", "--device auto was given to several processes of one machine: expected one")])
def test_a_launch_is_refused_what_each_process_would_do_for_itself(words, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500").items():
        monkeypatch.setenv(name, value)
    assert_one_sentence(called(*words.split()), sentence)
    assert not list(tmp_path.iterdir())


def test_hessians_go_on_after_a_kill_in_the_first_layer(monkeypatch, tmp_path):
    """All that is left is half a file; anything else is somebody's."""
    monkeypatch.setattr(single_steps, "load_checked", lambda job: pytest.fail("begun"))
    (tmp_path / ".layer-00000.safetensors.123.part").touch()
    with pytest.raises(pytest.fail.Exception, match="begun"):
        single_steps.hessians_into(Job(), tmp_path)
    (tmp_path / "notes.txt").touch()
    refuses("is not an empty folder", single_steps.hessians_into, Job(), tmp_path)


def test_a_full_card_is_no_bug_and_timed_is_no_card():
    for said in ("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUSOLVER_STATUS_ALLOC_FAILED"):
        assert lacks_memory(RuntimeError(f"CUDA error: {said} when calling `cublasCreate(handle)`"))
    assert_one_sentence(called("plan", "--model", "lab", "--accelerator", "timed"), "--accelerator timed names no device")


def test_a_plan_refuses_tokens_without_an_embedding(place):
    with_few_tokens(place)
    refuses("embeddings of 200 tokens", plan, job_in(place))


# ---- smaller ----
def test_a_rationale_may_be_a_text():
    record = {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"}
    lines, text = (read_arc(record | {"rationale": reasons}) for reasons in (["One.", "Two."], "One.\nTwo."))
    assert lines == text and text.solution == "One.\nTwo."


def test_half_written_files_are_not_unpacked(place):
    shutil.copytree(place / "run", place / ".new.4194999.part")
    assert run_folders(place) == [place / "run"], "nor are they runs"
    pack_run(place / "run")
    (place / "run" / ".new.4194999.part").write_text("half")
    unpack_run(place / "run", place / "back")
    assert not list((place / "back").glob(".*.part"))


def test_a_file_without_permission_is_not_called_damaged(place, monkeypatch):
    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "safe_open", refused)
    refuses("cannot be read .Permission denied.", load_model, place / "model", device="cpu")


def test_an_engine_that_does_not_start_is_one_sentence(place, monkeypatch):
    """vLLM's build for processors asks for nearly all memory unless it is given a share."""
    shares = []

    def fails(model, gpu_memory_utilization, **options):
        shares.append(gpu_memory_utilization)
        raise RuntimeError("Engine core initialization failed.\nSee root cause above.")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=fails, SamplingParams=SimpleNamespace))
    with pytest.raises(BadInput, match="could not load the model with [0-9]+% of the memory .Engine core") as error:
        run_job(job_in(place, backend="vllm"), place / "new")
    assert "\n" not in str(error.value) and 0 < shares[0] <= 0.5


def test_inference_mode_is_named():
    """Gradients that are wanted under it, and a model that was made under it."""
    calibration, outside = made_up_calibration(), tiny_llama()
    with torch.inference_mode():
        refuses("prune.. failed under torch.inference_mode", prune, outside, "gradient", 0.5, calibration=calibration)
        model = tiny_llama()
    refuses("was made under torch.inference_mode", prune, model, "magnitude", 0.5)


@pytest.mark.parametrize("method", ["gradient", "cap.signed_gradient", "cap.neurons"])
def test_an_example_without_a_target_is_named(method):
    """Its mean loss has a gradient of zero, which would only dilute the others'."""
    example = made_up_calibration().examples[0]
    without = Calibration.from_examples([replace(example, labels=(IGNORED,) * len(example.labels))], k=1)
    refuses("has no target", prune, tiny_llama(), method, 0.5, calibration=without)
