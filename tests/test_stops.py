"""What a stop leaves is said truly by every command, and a solver that was stopped goes on at the layer it was at."""
import inspect
import os
import signal

import pytest

import cap_nb.single_steps as steps
from cap_nb.command_line import app
from cap_nb.core.errors import BadInput
from cap_nb.core.files import alone_in, resumed_folder
from cap_nb.core.stopping import NOTHING_KEPT, STOPPED
from cap_nb.jobs import job
from cap_nb.jobs.records import Unfinished, pack_run
from cap_nb.jobs.settings import Job, SinglePruning, changed
from faults.machinery import ended, said_by, signalled_before, watched
from fixtures import contents
from programs import Program, assert_one_sentence, called, cap

FEW = changed(Job(), tasks=("lab-arc",), n=4, k=2, device="cpu")
WORDS = "prune --device cpu --tasks lab-arc --n 4 --k 2 --sparsity 0.5 --method".split()
LAYERS = "Stopped. Kept: finished layers; the same command goes on from there, and does all else again."
BOTH = LAYERS.replace("finished layers", "measured budgets and finished layers")


@pytest.mark.parametrize("words, sentence", [
    ("score --out new", STOPPED), ("chains --out new", STOPPED), ("hessians --out new", STOPPED), ("recover --out new", STOPPED),
    ("eval", NOTHING_KEPT), ("eval --out new", NOTHING_KEPT), ("shrink --out new", NOTHING_KEPT),
    ("prune --method wanda --out new", NOTHING_KEPT), ("prune --method wanda+kl --out new", BOTH.replace(" and finished layers", "")),
    ("prune --method alps --out new", LAYERS), ("prune --method wanda^update --out new", LAYERS), ("prune --method wanda+kl^swaps --out new", BOTH)])
def test_a_stop_says_what_it_leaves(words, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "load_checked", lambda job, **options: os.kill(os.getpid(), signal.SIGTERM))
    stopped = called(*words.split())
    assert (stopped.exit_code, stopped.stderr) == (143, f"cap: {sentence}\n"), stopped.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form, sentence", [("bitmask", STOPPED), ("gguf", NOTHING_KEPT)])
def test_an_export_says_what_its_format_keeps(form, sentence, monkeypatch, tmp_path):
    for name in ("format.export_folder", "quantised.export_gguf"):
        monkeypatch.setattr(f"cap_nb.portable.{name}", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert called("export", tmp_path, "--out", tmp_path / "new", "--format", form).stderr == f"cap: {sentence}\n"


def test_a_recipe_stopped_while_it_prunes_says_that_what_is_finished_is_kept(monkeypatch, tmp_path):
    for name, done in (("check_job", lambda *_: None), ("recipe_begun", lambda job, *_: job), ("benched", lambda *_: None), ("answer_into", lambda *_, **__: [""])):
        monkeypatch.setattr(steps, name, done)
    monkeypatch.setattr(steps, "prune_in_memory", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert called("prune", "--recipe", "hour", "--device", "cpu", "--tasks", "lab-arc", "--out", tmp_path / "new").stderr.endswith(f"cap: {STOPPED}\n")


def test_a_pruning_clears_up_what_it_kept_itself(monkeypatch, tmp_path):
    """Layers of a solver that was stopped stay there after another method, and after an evaluation, of the same name."""
    layers = tmp_path / "new.unfinished" / "layers" / "key"
    layers.mkdir(parents=True)
    for name, done in (("check_job", lambda *_: None), ("check_scores_wanted", lambda *_: None), ("prune_in_memory", lambda *_: None)):
        monkeypatch.setattr(steps, name, done)
    steps.prune_into(FEW, SinglePruning(method="wanda"), tmp_path / "new")
    with steps.working_folder(tmp_path / "new"):
        pass
    assert layers.exists()
    steps.prune_into(FEW, SinglePruning(method="alps"), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_units_that_a_kill_left_while_they_were_removed_go_with_the_next_call(tmp_path):
    table, left = tmp_path / "t.safetensors", tmp_path / ".t.safetensors.unfinished.7.part"
    steps.check_new_table(table, tmp_path / "t.safetensors.unfinished")
    table.touch(), left.mkdir()
    with pytest.raises(BadInput, match="is there already"):
        steps.check_new_table(table, tmp_path / "t.safetensors.unfinished")
    assert [*tmp_path.iterdir()] == [table]


def test_a_recipe_that_was_killed_while_it_was_first_written_begins(tmp_path):
    asked = FEW, SinglePruning(method="alps"), None, tmp_path
    (tmp_path / ".recipe.json.7.part").touch()
    assert steps.recipe_asked(*asked)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadInput, match="is not an empty folder"):
        steps.recipe_asked(*asked)


def test_a_run_is_unfinished_from_its_first_moment(monkeypatch, tmp_path):
    """Heads may be scored for hours before the first piece is there; who packs finished runs leaves it."""
    monkeypatch.setattr(job, "factors_by_method", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert called("run", "--quick", "--model", "lab", "--device", "cpu", "--methods", "cap", "--out", tmp_path / "run").exit_code == 143
    assert (tmp_path / "run" / "unfinished").is_dir()
    with pytest.raises(Unfinished):
        pack_run(tmp_path / "run")


def test_on_disk_only_layers_that_were_walked_through_are_kept(tmp_path):
    assert steps.sentence_of_stop(SinglePruning(method="alps", stream=True, hessians=tmp_path)) == NOTHING_KEPT
    assert steps.sentence_of_stop(SinglePruning(method="cap^block", stream=True, scores=tmp_path)).startswith("Stopped. Kept: finished layers;")


def test_what_resumes_says_so():
    """A command that is called resumable in its help says on a stop that it goes on; of an export its format says it."""
    commands = {each.callback.__name__.removesuffix("_command"): each.callback for each in app.registered_commands}
    resumes = {name for name, each in commands.items() if inspect.getclosurevars(each).nonlocals["resumes"]}
    called_so = {name for name, each in commands.items() if "resumable" in each.__doc__}
    assert len(called_so) > 5 and called_so - {"export"} <= resumes and not resumes & {"eval", "prune", "shrink", "bench", "gguf", "fetch", "plan", "compare", "export"}


def pruned(out, method, act=None, model="lab"):
    """`cap prune` in a process of its own, with something called before every change beside its folder."""
    def work():
        if act:
            watched(out, act)
        cap(*WORDS, method, "--model", model, "--out", out)()

    return ended(Program(work, together=True))


@pytest.mark.parametrize("method, number", [("wanda^block", signal.SIGKILL), ("wanda+kl^swaps^update", signal.SIGINT)])
def test_a_solver_goes_on_at_its_layer(method, number, small_lab, tmp_path):
    """Ended twice, at the third and the fourth layer's file: finished layers are not solved again, and the folder is byte for byte that of a command
    that nothing happened to."""
    out, kept = tmp_path / "new", tmp_path / "new.unfinished"
    assert pruned(tmp_path / "whole", method, model=small_lab)[0] == 0
    for change, layers in (("open", 2), ("rename", 3)):
        moment = rf"{change} \.unfinished/layers/\w+/\.layer-00{layers}\.safetensors\.part"
        said = said_by(pruned(out, method, signalled_before(moment, number), small_lab), -number if number == signal.SIGKILL else 128 + number)
        if number != signal.SIGKILL:
            assert said.strip().splitlines()[-1] == f"cap: {BOTH if '+kl' in method else LAYERS}" and "Traceback" not in said
        assert not out.exists() and len(list(kept.rglob("layer-*.safetensors"))) == layers
    log = tmp_path / "log"  # the changes are made in another process
    assert pruned(out, method, lambda name: log.open("a").write(f"{name}\n"), small_lab)[0] == 0
    renamed = [line for line in log.read_text().splitlines() if line.startswith("rename") and "layer-" in line]
    assert [line.partition("layer-")[2][:3] for line in renamed] == ["003"]
    assert contents(out) == contents(tmp_path / "whole") and not kept.exists()


def test_two_at_once_and_what_is_not_ours(tmp_path):
    """The second command under a name is refused before it loads anything; a folder of that name keeps what is not ours."""
    kept = tmp_path / "new.unfinished"
    with alone_in(kept):
        holding = pruned(tmp_path / "new", "wanda")
    assert holding[0] == 2 and f"Another process is at work in {kept}: expected to be alone there" in holding[1]
    (kept / "mine.txt").write_text("mine")
    steps.prune_into(FEW, SinglePruning(method="magnitude", sparsity=0.5), tmp_path / "new")
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]
    assert_one_sentence(called(*WORDS, "wanda", "--out", tmp_path / "new"), "exists already")


def test_who_is_refused_removes_nothing(tmp_path):
    """The folder that another process has just made, still empty, is not removed by the one that finds it taken."""
    (tmp_path / "packed.unfinished").mkdir()
    with alone_in(tmp_path / "packed.unfinished"):
        for _ in range(2):
            with pytest.raises(BadInput, match="Another process is at work"), resumed_folder(tmp_path / "packed", ["a"]):
                pass
