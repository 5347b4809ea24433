"""A user's own file from outside: `cap` with --plugin, in methods, plans, runs and tables; what is refused, and what is recorded."""
import json
import re
import sys

import pytest
import typer
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from programs import FEW, assert_one_sentence as refused, called as cap, output_of
from cap_nb.command_line import app
from cap_nb.core.errors import BadInput
from cap_nb.core.registry import ADDED, PLUGINS
from cap_nb.data.problems import TASKS, TEXTS
from cap_nb.methods.attributions import ATTRIBUTIONS
from cap_nb.methods.criteria import CRITERIA, OTHER_NAMES
from cap_nb.jobs.plugins import load_plugin, plugins_loaded
from cap_nb.jobs.records import read_run
from cap_nb.methods.prune import ALLOCATIONS, OTHERS
from cap_nb.models.choices import has_options
from cap_nb.models.loading import load_model, save_model
from cap_nb.portable.sharing import read_record

PLUGIN = """
import torch
from cap_nb.jobs.plugins import add_allocation, add_attribution, add_criterion, add_task, add_text
from cap_nb.models.anatomy import anatomy

def by_index(model, calibration, batch_tokens):
    a = anatomy(model)
    return torch.arange(a.layers * a.heads).view(a.layers, a.heads)

add_criterion("root_wanda", lambda e: e.weight.abs() * e.norm.sqrt(), needs=["norm"], says="|W| times the root of the norm")
add_attribution("by_index", by_index, says="later heads matter more")
add_allocation("first_half", lambda model, known: [2 if layer < 3 else 1 for layer in range(anatomy(model).layers)])
add_task("sums", "sums.jsonl", answer="[0-9]+", prompt="What is {question}?", line="= {answer}")
add_text("notes", "notes.txt")
"""
METHODS = "root_wanda,cap.by_index,wanda+first_half"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A plugin with its data beside it."""
    folder = tmp_path_factory.mktemp("own")
    sums = [{"question": f"{a} + {b}", "answer": a + b} for a in range(2, 10) for b in range(3, 9)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    (folder / "notes.txt").write_text("\n".join(f"The cat number {n} sat on the mat and saw the dog." for n in range(60)))
    (folder / "my.py").write_text(PLUGIN)
    return folder / "my.py"


@pytest.fixture(scope="module")
def finished(plugin, tmp_path_factory):
    """A run that uses a criterion, an attribution, an allocation, a task and a text of the plugin."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    words = ["run", "--plugin", plugin, *FEW, "--methods", METHODS, "--sparsity", "0.3", "--tasks", "sums", "--text", "notes", "--out", out]
    return out, output_of(*words), words


def test_a_run_names_what_was_added(finished):
    """The table has a row for each method, columns for task and text, and says which file they come from."""
    out, said, _ = finished
    for method in METHODS.split(","):
        assert re.search(rf"^\| {re.escape(method)} \| 30 %", said, re.M), said
    assert "| sums | sums loss | notes perplexity |" in said and "plugins: my.py" in said
    costs = (out / "tables" / "costs.md").read_text()
    assert all(method in costs for method in METHODS.split(","))


def test_the_file_is_recorded_and_must_stay(finished, plugin, tmp_path):
    """Without the file, or with another of its name, the run is refused; the same command with one more finds everything done."""
    out, _, words = finished
    noted = read_run(out)["plugins"]
    assert list(noted) == ["my.py"] and len(noted["my.py"]) == 64
    refused(cap("run", *FEW, "--tasks", "lab-arc", "--methods", "magnitude", "--out", out), "was made with my.py", "--plugin")
    for file in ("sums.jsonl", "notes.txt"):
        (tmp_path / file).write_bytes((plugin.parent / file).read_bytes())
    (tmp_path / "my.py").write_text(PLUGIN + "# changed\n")
    refused(cap(*[tmp_path / "my.py" if word == plugin else word for word in words]), "another my.py", "--out")
    refused(cap("figures", out), "was made with my.py")
    (tmp_path / "more.py").write_text("from cap_nb.jobs.plugins import add_criterion\nadd_criterion('more', lambda e: e.weight ** 2)\n")
    assert cap(*words, "--plugin", tmp_path / "more.py").exit_code == 0
    assert sorted(read_run(out)["plugins"]) == ["more.py", "my.py"]


def test_a_table_needs_no_plugin(finished):
    """Records can be read by those who do not want to execute another's file."""
    for form in ("md", "csv", "tex"):
        result = cap("table", finished[0], "--format", form)
        assert result.exit_code == 0 and "sums" in result.stdout, result.output
    assert "root_wanda" in result.stdout.replace("\\", "")


def test_methods_and_plans_know_them(plugin):
    """Both list the names, the plan with what they need; afterwards they are gone."""
    methods = cap("methods", "--plugin", plugin)
    assert "|W| times the root of the norm" in methods.stdout and "attribution by_index (my.py)" in methods.stdout
    assert "wanda+first_half" in methods.stdout and "cap.by_index" in methods.stdout
    plan = cap("plan", "--plugin", plugin, "--no-probe", *FEW[:4], "--methods", METHODS, "--tasks", "sums")
    assert plan.exit_code == 0 and "3 examples of sums" in plan.stdout and "counted on the calibration set itself" in plan.stdout
    assert "Not counted: the attributions by_index." in plan.stdout
    assert "root_wanda" not in cap("methods").stdout and not PLUGINS
    for name, table in (("root_wanda", CRITERIA), ("by_index", ATTRIBUTIONS), ("first_half", ALLOCATIONS), ("sums", TASKS), ("notes", TEXTS)):
        assert name not in table and not any(a.name == name for a in ADDED)


def test_a_pruning_and_an_evaluation(plugin, tmp_path):
    """One pruning by an own criterion, calibrated on an own task, measured on an own text; the pruned folder names the file."""
    out = tmp_path / "pruned"
    output_of("prune", "--plugin", plugin, "--method", "root_wanda", "--sparsity", "0.5", "--tasks", "sums", "--n", "3", "--k", "2", "--out", out, "--device", "cpu")
    record = read_record(out)
    assert record["method"] == "root_wanda" and list(record["plugins"]) == ["my.py"]
    assert "notes perplexity" in output_of("eval", "--plugin", plugin, "--model", out, *FEW[4:], "--tasks", "sums", "--text", "notes")
    refused(cap("eval", "--model", out, *FEW[4:], "--text", "notes"), "Unknown text 'notes'")


FAMILY = """
from operator import attrgetter
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from cap_nb.jobs.plugins import add_family
from cap_nb.models.families import Family, under

class Other(LlamaConfig): model_type = "other"

class OtherLayer(LlamaDecoderLayer):
    self_attn, mlp = (property(attrgetter(name)) for name in ("attention", "feed"))
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.attention, self.feed = self._modules.pop("self_attn"), self._modules.pop("mlp")

class OtherForCausalLM(LlamaForCausalLM):
    config_class = Other
    def __init__(self, config):
        super().__init__(config)
        self.model.layers = ModuleList(OtherLayer(config, i) for i in range(config.num_hidden_layers))

AutoConfig.register("other", Other, exist_ok=True)
AutoModelForCausalLM.register(Other, OtherForCausalLM, exist_ok=True)
attention = under("attention", query="q_proj", key="k_proj", value="v_proj", output="o_proj")
feed = under("feed", gate="gate_proj", up="up_proj", down="down_proj")
add_family("other", Family(layers="model.layers", final_norm="model.norm", roles=attention | feed))
"""


def test_a_model_of_an_own_family(tmp_path):
    """A class that neither transformers nor the package knows is planned, pruned and measured."""
    (tmp_path / "family.py").write_text(FAMILY)
    lab, tokenizer = load_model("lab", "float32", "cpu")
    with plugins_loaded([tmp_path / "family.py"]):
        settings = {name: value for name, value in lab.config.to_dict().items() if name not in ("model_type", "architectures", "transformers_version")}
        save_model(AutoModelForCausalLM.from_config(AutoConfig.for_model("other", **settings)), tokenizer, tmp_path / "model")
    words = ["--plugin", tmp_path / "family.py", "--model", tmp_path / "model"]
    assert f"{sum(weight.numel() for weight in lab.parameters()):,}" in output_of("plan", *words, "--no-probe", *FEW[:4], "--tasks", "lab-arc")
    assert "50.0000%" in output_of("prune", *words, "--method", "magnitude", "--sparsity", "0.5", "--out", tmp_path / "pruned", "--device", "cpu")
    job = ["--tasks", "lab-arc", "--methods", "magnitude", "--sparsity", "0.5"]
    run = cap("run", *words, *FEW, *job, "--text", "lab-text", "--out", tmp_path / "run")
    assert run.exit_code == 0 and re.search(r"^\| magnitude \| 50 %", run.stdout, re.M | re.I) and "plugins: family.py" in run.stdout, run.output
    table = cap("table", tmp_path / "run")  # its reader need not execute the family's file
    assert table.exit_code == 0 and "plugins: family.py" in table.stdout and table.stdout in run.stdout, table.output
    at_home = ["--plugin", tmp_path / "family.py"], tmp_path / "pruned"
    assert "pruned 50.0%" in output_of("bench", *at_home[0], at_home[1], "--batches", "1", "--prompt", "4", "--steps", "1", "--rounds", "1", "--backends", "torch", "--device", "cpu")
    for shared in (["card", at_home[1]], ["publish", at_home[1], "owner/name", "--dry-run"]):
        assert cap(*shared, *at_home[0]).exit_code == 0
    assert "no fewer than before" in output_of("recover", *at_home[0], "--model", at_home[1], "--tasks", "lab-arc", "--n", "2", "--k", "1", "--steps", "1", "--device", "cpu", "--out", tmp_path / "t")
    refused(cap("bench", at_home[1]), "other")


def test_two_plugins_of_one_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.py").write_text(f"x = {name!r}\n")
    refused(cap("methods", "--plugin", tmp_path / "a" / "my.py", "--plugin", tmp_path / "b" / "my.py"), "Two plugins are called my.py")
    assert cap("methods", "--plugin", tmp_path / "a" / "my.py", "--plugin", tmp_path / "a" / "my.py").exit_code == 0


def test_a_package_beside_a_plugin_is_part_of_it(tmp_path):
    (tmp_path / "beside_it").mkdir()
    (tmp_path / "beside_it" / "__init__.py").touch()
    (tmp_path / "mine.py").write_text("import beside_it.score\n")
    found = []
    for text in ("x = 1\n", "x = 2\n"):
        (tmp_path / "beside_it" / "score.py").write_text(text)
        with plugins_loaded([tmp_path / "mine.py"]):
            found.append(PLUGINS["mine.py"])
    for name in [name for name in sys.modules if name.startswith("beside_it")]:
        del sys.modules[name]
    assert found[0] != found[1]


def test_a_module_beside_a_plugin_is_the_plugins_own(tmp_path):
    """One that changed is read anew; that of another plugin is not taken for it, and two of one name are refused."""
    for folder, name in (("a", "p"), ("b", "q"), ("c", "r")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text("import helps_it\nx = helps_it.x\n")
    p, q, r = (tmp_path / folder / f"{name}.py" for folder, name in (("a", "p"), ("b", "q"), ("c", "r")))
    for x, plugin in ((1, p), (22, p), (333, q)):
        (plugin.parent / "helps_it.py").write_text(f"x = {x}\n")
        with plugins_loaded([plugin]):
            assert sys.modules[f"cap_plugin_{plugin.stem}"].x == x
    with plugins_loaded([p]):
        with pytest.raises(BadInput, match="q.py and p.py each import a module helps_it"):
            load_plugin(q)
        with pytest.raises(BadInput, match="No module named 'helps_it'"):
            load_plugin(r)
        assert sys.modules["helps_it"].x == 22 and "cap_plugin_q" not in sys.modules
        load_plugin(p)  # found as it was


def test_another_plugin_in_the_folder_is_no_part_of_one(tmp_path):
    alone = {}
    for names in (("b",), ("a", "b")):
        for name in names:
            (tmp_path / f"{name}.py").write_text(f"{name} = 1\n")
        with plugins_loaded([tmp_path / f"{name}.py" for name in names]):
            alone[names] = PLUGINS["b.py"]
    assert len(set(alone.values())) == 1


def test_no_folder_brings_a_plugin_along(finished, plugin, tmp_path):
    """A file in a run's folder or beside data is never executed."""
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "my.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    (trap / "run.json").write_text((finished[0] / "run.json").read_text())
    for command in (["table", trap], ["figures", trap], ["run", "--data-dir", trap, "--tasks", "arc", *FEW, "--out", tmp_path / "o"]):
        assert cap(*command).exit_code == 2
    assert not (tmp_path / "executed").exists()


def test_names_of_other_methods_are_reserved():
    assert set(OTHERS) <= set(OTHER_NAMES)


def test_help_says_that_the_file_is_executed():
    """All commands but those that copy files, read records, or know two families only."""
    without = set("restore gguf compare ledger pack unpack fetch train-lab".split())
    for command in typer.main.get_command(app).commands:
        said = re.sub(r"[\s│]+", " ", CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout)
        assert ("--plugin" in said and "which is executed" in said) == (command not in without), said


def test_a_task_of_ones_own_with_choices_is_weighed(tmp_path):
    """Where every answer names a choice; where one does not, the options are not what an answer is."""
    records = [{"question": f"Which is {n}?", "choices": [str(n), str(n + 1)], "answer": "AB"[n % 2]} for n in range(40)]
    for name, changed in (("picks", {}), ("says", {"answer": "C"})):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record | changed) + "\n" for record in records))
    (tmp_path / "my.py").write_text("".join(f"from cap_nb.jobs.plugins import add_task\nadd_task('{name}', '{name}.jsonl', answer='[A-C]', prompt='{{question}} {{choices}}')\n"
                                            for name in ("picks", "says")))
    with plugins_loaded((tmp_path / "my.py",)):
        assert [has_options(task) for task in ("picks", "says", "arc", "lab-arc", "gsm8k", "lab-gsm8k")] == [True, False, True, True, False, False]
