"""A pruned folder from outside: every path that saves one says how, plain transformers keeps that, the card says what is true, and
nothing goes to the hub that does not belong there."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import huggingface_hub
import pytest
from fixtures import made_up_calibration, refuses, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, MixtralConfig

from programs import called as cap, output_of as done
from cap_nb.core.errors import BadInput
from cap_nb.data.problems import load_problems
from cap_nb.data.prompts import encode_problem
from cap_nb.evaluation import evaluation_problems
from cap_nb.experiments.harness import harness_answers, write_harness_task
from cap_nb.jobs.records import load_run, mask_fingerprint
from cap_nb.methods.criteria import dense_norms
from cap_nb.methods.prune import prune
from cap_nb.methods.streaming import save_norms
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.portable import sharing
from cap_nb.portable.sharing import KEY, model_card, publish, read_record, zeros_of_folder
from cap_nb.methods.resumed_scoring import save_losses
from cap_nb.threshold import prune_report
from conftest import ROOT

FEW = ["--n", "2", "--k", "1", "--tasks", "lab-arc", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The lab model, half of it zero by magnitude, as `cap prune` saves it, with its card; and the same model dense."""
    folder = tmp_path_factory.mktemp("sharing")
    done("prune", "--method", "magnitude", "--sparsity", "0.5", "--device", "cpu", "--out", folder / "half")
    done("card", folder / "half", "--run", ROOT / "figures" / "lab")
    model, tokenizer = load_model("lab", device="cpu")
    model.save_pretrained(folder / "dense"), tokenizer.save_pretrained(folder / "dense")
    return folder


# The key

def test_every_way_of_pruning_leaves_the_key(place, tmp_path):
    """In memory; on disk by a criterion alone, with norms, with scores, and with Hessians: what was asked is what the folder says."""
    model, tokenizer = load_model("lab", device="cpu")
    fingerprint, dense = model_fingerprint(model), place / "dense"
    calibration = made_up_calibration(count=3, k=1)
    save_norms(dense_norms(model, calibration), tmp_path / "norms", {"examples": 3})
    done("hessians", "--model", dense, *FEW, "--out", tmp_path / "H")
    save_losses(losses := load_run(ROOT / "figures" / "lab").losses, tmp_path / "S")
    disk = ("--model", dense, "--stream")
    ways = {
        "wanda": FEW, "magnitude": disk, "cap": (*disk, "--scores", tmp_path / "S"), "cap@row": ("--scores", tmp_path / "S", *FEW[-2:]),
        "wanda@2:4": (*disk, "--norms", tmp_path / "norms"), "sparsegpt": (*disk, "--hessians", tmp_path / "H"), "wanda^swaps": (*disk, *FEW)}
    found = {}
    for number, (method, options) in enumerate(ways.items()):
        done("prune", "--method", method, "--sparsity", "0.5", *options, "--out", tmp_path / f"{number}")
        found[method] = record = read_record(tmp_path / f"{number}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}")
        assert getattr(loaded.config, KEY) == record and prune_report(loaded, method, 0.5).zeros == record["zeros"]
        assert (record["method"], record["asked"], record["base"]["fingerprint"]) == (method, 0.5, fingerprint)
        assert record["base"]["name"] == ("dense" if "--stream" in options else "lab")
        assert not (tmp_path / f"{number}" / "prune_report.json").exists()
    scores = json.loads(json.dumps(sharing.scores_record(losses, "paper") | {"key_value": "mean"}))
    about = {"budget": 0.5, "seed": 3}
    in_part = sharing.scores_record(replace(losses, meta=losses.meta | {"screened": about}), "mean")
    assert found["wanda^swaps"]["calibration"] == found["wanda"]["calibration"]
    assert in_part["screened"] == about and "budget" not in in_part
    assert found["cap"]["scores"] == found["cap@row"]["scores"] == scores and scores["examples"]["lab-arc"] == 128
    assert found["wanda"]["calibration"]["examples"] == {"lab-arc": 2} and found["wanda"]["calibration"]["seed"] == 0
    assert found["wanda"]["calibration"]["fingerprint"] == found["sparsegpt"]["calibration"]["fingerprint"] != scores["fingerprint"]
    assert found["wanda@2:4"]["calibration"] == {"examples": 3} and found["sparsegpt"]["calibration"]["sequences"] == 2
    assert [found[method].get("scope") for method in ways] == ["row", "model", "model", "row", "2:4", None, "row"]
    assert [("calibration" in found[method], "scores" in found[method]) for method in ("magnitude", "cap")] == [(False, False), (False, True)]


def test_a_card_says_that_the_run_did_not_measure_the_training(place):
    record, run = read_record(place / "half"), load_run(ROOT / "figures" / "lab")
    for more, said in (({}, False), ({"fine-tuning": {"steps": 1}}, True)):
        assert ("This folder was trained afterwards; the run's model was not." in sharing.measured_section(record | more, "", run, sharing.cell_for(record, run, "run"))) == said


def test_packing_keeps_the_key_and_the_card(place, tmp_path):
    done("export", place / "half", "--out", tmp_path / "small")
    done("restore", tmp_path / "small", "--out", tmp_path / "back")
    for folder in (tmp_path / "small", tmp_path / "back"):
        assert read_record(folder) == read_record(place / "half") and (folder / "README.md").read_bytes() == (place / "half" / "README.md").read_bytes()
    assert load_model(str(tmp_path / "small"), device="cpu")[0].config.cap_nb == read_record(place / "half")
    upload = publish(tmp_path / "small", "owner/name", dry_run=True)
    assert {file.name for file in upload.files} == {path.name for path in (tmp_path / "small").iterdir()}
    shard = next((tmp_path / "small").glob("*.packed.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    refuses("is damaged", publish, tmp_path / "small", "owner/name", dry_run=True)
    refuses("is packed", model_card, tmp_path / "small")


def test_a_base_gives_away_no_path(tmp_path, monkeypatch):
    """What is kept of a folder is its last name; of a place in the hub's cache, the id; of an unreachable card, nothing."""
    (tmp_path / "mine").mkdir()
    for text, licence in (("no front matter", {}), ("---\nlicense: mit\n---\n", {"license": "mit"}), ("---\nlicense: [a, b]\n---\n", {}), ("---\n: : [\n---\n", {}), ("---\n- a\n---\n", {})):
        (tmp_path / "mine" / "README.md").write_text(text)
        assert sharing.base_record(str(tmp_path / "mine"), "f") == {"name": "mine", "fingerprint": "f"} | licence
    monkeypatch.chdir(tmp_path / "mine")
    assert sharing.base_record(".", "f")["name"] == "mine"
    monkeypatch.setattr(sharing, "hf_hub_download", lambda name, file, revision, local_files_only: (_ for _ in ()).throw(huggingface_hub.errors.LocalEntryNotFoundError("offline")))
    assert sharing.base_record("owner/name@abc", "f") == {"name": "owner/name", "fingerprint": "f", "commit": "abc"}
    (tmp_path / "card").write_text("---\nlicense: llama3\n---\n")
    monkeypatch.setattr(sharing, "hf_hub_download", lambda name, file, revision, local_files_only: str(tmp_path / "card"))
    assert sharing.base_record("owner/name", "f", "def") == {"name": "owner/name", "fingerprint": "f", "commit": "def", "license": "llama3"}


# Plain transformers

PLAIN = """
import json, sys
sys.modules["cap_nb"] = None # whoever imports it fails
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, again, prompt = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
answer = tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.shape[1]:], skip_special_tokens=True)
writer = pipeline("text-generation", model=folder, device="cpu")
piped = writer(prompt, max_new_tokens=24, do_sample=False, return_full_text=False, add_special_tokens=False)[0]["generated_text"]
model.save_pretrained(again)
print(json.dumps([answer, piped]))
"""


def test_a_process_without_this_package(place, tmp_path):
    """Generation, pipeline and a round trip through save_pretrained, where cap_nb cannot be imported."""
    _, tokenizer = load_model("lab", device="cpu")
    prompt = encode_problem(tokenizer, load_problems("lab-arc", "evaluation")[0], "lab").prompt
    words = [sys.executable, "-c", PLAIN, place / "half", tmp_path / "again", prompt]
    ran = subprocess.run([str(word) for word in words], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr[-2000:]
    answer, piped = json.loads(ran.stdout.splitlines()[-1])
    model, _ = load_model(str(place / "half"), device="cpu")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    ours = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1]:], skip_special_tokens=True)
    assert answer == piped == ours and len(ours) > 10
    assert read_record(tmp_path / "again") == read_record(place / "half")
    assert model_fingerprint(load_model(str(place / "half"), device="cpu")[0]) == model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_lm_evaluation_harness_reads_the_folder(place, tmp_path):
    """By name of the folder, as its users do, with the answers that the loaded model gives."""
    lm_eval = pytest.importorskip("lm_eval", reason="the optional extra is not installed: pip install 'cap_nb[harness]'")
    from lm_eval.tasks import TaskManager
    model, tokenizer = load_model(str(place / "half"), device="cpu")
    name = write_harness_task(tmp_path, tokenizer, evaluation_problems("lab-arc", 6), max_new_tokens=150)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate("hf", model_args=f"pretrained={place / 'half'},dtype=float32", tasks=[name], task_manager=manager,
                                    device="cpu", batch_size=6, bootstrap_iters=0)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    ours = harness_answers(model, tokenizer, tmp_path, "lab-arc")
    assert [sample["resps"][0][0] for sample in samples] == [answer.output for answer in ours] and any(answer.correct for answer in ours)


# The card

@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config, MixtralConfig])
def test_zeros_are_those_of_the_loaded_model(kind, tmp_path):
    """Transposed weights, stacks of experts, shards of a few kilobytes, 16 bits."""
    if kind is GPT2Config:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)).eval()
    else:
        model = tiny_llama(kind, **(dict(num_local_experts=3) if kind is MixtralConfig else {})).bfloat16()
    prune(model, "magnitude@layer", 0.37)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert zeros_of_folder(tmp_path, "magnitude", 0.37) == (prune_report(model, "magnitude", 0.37), mask_fingerprint(model))


def test_the_card_says_what_is_true(place):
    """Its numbers are those of the run and of the weights, and its front matter is the hub's."""
    text, run = (place / "half" / "README.md").read_text(encoding="utf-8"), load_run(ROOT / "figures" / "lab")
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation") and card.data.base_model is None and card.data.license is None
    table = sharing.table_markdown(sharing.method_table([e for e in run.evaluations if (e.method, e.sparsity) in (("dense", 0.0), ("magnitude", 0.5))]))
    assert table.split("\n\n")[0] in text and "exactly the zeros of this folder" in text
    report, mask = zeros_of_folder(place / "half", "magnitude", 0.5)
    assert f"{report.zeros:,} of {report.weights:,}" in text and sharing.layer_table(report) in text + "\n"
    assert str(place) not in text and "neither smaller nor faster" in text
    loading = text.split("```python\n")[1].split("```")[0]
    here = os.getcwd()
    try:
        os.chdir(place)
        exec(loading, names := {})
    finally:
        os.chdir(here)
    assert names["model"].config.cap_nb["method"] == "magnitude"


# The hub

def test_a_checkpoint_that_is_not_whole_is_not_uploaded(place, tmp_path, monkeypatch):
    folder = shutil.copytree(place / "half", tmp_path / "copy")
    monkeypatch.setattr(sharing, "HUB_LIMIT", 1_000_000)
    refuses("model.safetensors has 8,229,704 bytes", publish, folder, "owner/name", dry_run=True)
    monkeypatch.undo()
    (folder / "gone").symlink_to(folder / "nowhere")
    refuses("gone is a broken link", publish, folder, "owner/name", dry_run=True)
    (folder / "gone").unlink()
    with open(folder / "model.safetensors", "rb+") as file:
        file.truncate(5_000_000)
    refuses("is damaged or no safetensors file", publish, folder, "owner/name", dry_run=True)


def test_an_upload_is_what_the_dry_run_said(place, monkeypatch):
    hub = Mock(spec=huggingface_hub.HfApi)
    hub.upload_folder.return_value.commit_url = "https://hub/owner/name/commit/1"
    hub.list_repo_files.return_value = [".gitattributes", "model.safetensors", "adapter/adapter_model.safetensors"]
    monkeypatch.setattr(sharing, "HfApi", lambda **_: hub)
    monkeypatch.setattr(sharing, "get_token", lambda: "hf_stands_in")
    dry = cap("publish", place / "half", "owner/name", "--dry-run")
    assert dry.exit_code == 0 and hub.mock_calls == [] and dry.stdout.endswith("Nothing was uploaded.\n")
    wet = cap("publish", place / "half", "owner/name", "--private", "--message", "Mine.")
    assert wet.exit_code == 0 and wet.stdout.splitlines()[:-2] == dry.stdout.splitlines()[:-2] and wet.stdout.endswith("Uploaded: https://hub/owner/name/commit/1\n")
    hub.create_repo.assert_called_once_with("owner/name", private=True, exist_ok=True)
    options = hub.upload_folder.call_args.kwargs
    assert options["commit_message"] == "Mine." and sorted(options["allow_patterns"]) == sorted(path.name for path in (place / "half").iterdir())
    kept = list(huggingface_hub.utils.filter_repo_objects(["README.md", "new.bin", "model.safetensors"], allow_patterns=options["allow_patterns"]))
    assert kept == ["README.md", "model.safetensors"]


def test_without_a_hub_it_is_one_sentence(place, monkeypatch):
    """No token; and a hub at an address where nobody listens."""
    monkeypatch.setattr(sharing, "get_token", lambda: None)
    result = cap("publish", place / "half", "owner/name")
    assert result.exit_code == 2 and "There is no token for the hub" in result.stderr and len(result.stderr.splitlines()) == 1
    with pytest.raises(BadInput, match="owner/name could not be written") as error:
        publish(place / "half", "owner/name", api=huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_stands_in"))
    assert "\n" not in str(error.value) and "hf_stands_in" not in str(error.value)
    hub = Mock(spec=huggingface_hub.HfApi)
    hub.list_repo_files.return_value, hub.upload_folder.side_effect = [], RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    refuses(r"owner/name could not be written \(RuntimeError: Error while uploading", publish, place / "half", "owner/name", api=hub)


def test_a_card_is_replaced_by_force(place, tmp_path):
    folder = shutil.copytree(place / "half", tmp_path / "half")
    done("card", folder, "--force")
    assert b"Measured" not in (folder / "README.md").read_bytes()
    for force in (["--force"], []):  # the same card again is no change
        done("card", folder, "--run", ROOT / "figures" / "lab", *force)
