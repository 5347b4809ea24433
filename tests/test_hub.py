"""The hub, for real: `cap run --model owner/name@commit` without --data-dir against a hub on loopback, and one sentence for whatever a hub can do."""
import json

import pytest

from cap_nb.command_line import app  # noqa: F401  imported before the worker is started, so that a broken import is told here
from cap_nb.data.problems import TASKS, WIKITEXT, read_arc, read_gsm8k, read_strategyqa
from cap_nb.jobs.records import load_run
from hub import TOKEN, Fault, Hub, Machine, Repo, arc_rows, data_sets, gsm8k_rows, llama_files, strategyqa_rows, wikitext_rows

GSM8K, STRATEGYQA, ARC = (TASKS[name] for name in ("gsm8k", "strategyqa", "arc"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEW = "--n 6 --k 2 --evaluate-n 2 --loss-n 2 --max-new-tokens 4 --windows 2 --window-tokens 64 --device cpu --methods magnitude --sparsity 0.5"
LOADING = "plan --model"  # Fetches config.json alone


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(place):
    with Hub() as serving:
        files = llama_files(place / "saved")
        serving.add(Repo("tiny/llama", files))
        serving.add(Repo("tiny/shards", llama_files(place / "shards", "20kB")))
        serving.add(Repo("tiny/gated", files, gated=True))
        serving.add(Repo("tiny/pickles", {name: body for name, body in files.items() if not name.endswith(".safetensors")}))
        for repo in data_sets():
            serving.add(repo)
        yield serving


@pytest.fixture(scope="module")
def machine(hub, place):
    made = Machine(hub.url, place)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def well_behaved(hub):
    """No fault of an earlier test is left, and what was asked is counted anew."""
    hub.faults.clear()
    hub.asked.clear()


def loads(model, prune=""):
    """Python that loads a model and says what it is."""
    return f"from cap_nb.all import load_model; m, t = load_model({model!r}, device='cpu'); print(m.config._commit_hash, m.config._name_or_path, len(t)); {prune}"


def assert_one_sentence(outcome, *parts):
    """Exit code 2, one line, nothing of the client's, and no waiting to try again."""
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 2 and outcome.out == "", outcome
    assert len(lines) == 1 and lines[0].startswith("cap: ") and ": expected " in lines[0] and lines[0].endswith("."), outcome.err
    for part in parts:
        assert part in lines[0], lines[0]
    assert outcome.waited < 1, outcome.waited


# ---- the whole road ----
@pytest.fixture(scope="module")
def finished(machine, hub):
    hub.asked.clear()
    outcome = machine.run(f"run --model tiny/llama@{COMMIT} {FEW} --out runs/first")
    return outcome, list(hub.asked)


def test_a_run_from_the_hub_alone(finished, place):
    """Model, three benchmarks and WikiText-2 come from the hub, pickles and code do not."""
    outcome, asked = finished
    assert outcome.code == 0, outcome.err
    plain, *others = outcome.err.strip().splitlines()
    assert "has no chat template" in plain and all("were cut off at 4 tokens" in line for line in others), outcome.err
    run = load_run(place / "runs" / "first")
    assert [one.method for one in run.evaluations] == ["dense", "magnitude"] and "WikiText-2" in outcome.out
    assert [session["model_commit"] for session in run.sessions] == [COMMIT]
    fetched = {path.split("/resolve/")[1] for method, path in asked if method == "GET" and "/resolve/" in path} | {path.split("/", 5)[-1] for method, path in asked if "/cdn/" in path}
    assert not [name for name in fetched if name.endswith((".bin", ".py")) or "socratic" in name or "Easy" in name or "103" in name], fetched
    pinned = {path.split("/resolve/")[1].split("/")[0] for method, path in asked if "/resolve/" in path}
    assert pinned == {COMMIT, GSM8K.hub[2], STRATEGYQA.hub[2], ARC.hub[2], WIKITEXT[2]}, "every file is asked for at a pinned commit"


def test_the_second_run_asks_nothing(finished, machine, hub, place):
    again = machine.run(f"run --model tiny/llama@{COMMIT} {FEW} --out runs/second")
    assert again.code == 0 and hub.asked == [], (again.err, hub.asked)
    assert (place / "runs/first/tables/table.csv").read_bytes() == (place / "runs/second/tables/table.csv").read_bytes()


@pytest.mark.parametrize("before", ["", "import huggingface_hub.constants as c; c.HF_HUB_OFFLINE = True; "], ids=["no hub", "offline"])
@pytest.mark.parametrize("model", [f"tiny/llama@{COMMIT}", "tiny/llama"], ids=["a commit", "the newest"])
def test_without_a_hub_the_cache_is_enough(finished, machine, hub, before, model):
    assert machine.run(python=loads("tiny/llama")).code == 0  # which commit is the newest is known then
    with hub.gone():
        outcome = machine.run(python=f"{before}from cap_nb.all import load_problems; {loads(model)} print(len(load_problems('arc', 'evaluation')))")
    assert outcome.out.split() == [COMMIT, "tiny/llama", "258", "16"] and outcome.waited < 1, outcome.err


def test_what_another_program_left_out_is_fetched_once(machine, hub):
    """Without them a model writes on and on, and a tokenizer does not know what ends a text."""
    hub.add(Repo("tiny/partly", hub.repos["model", "tiny/llama"].files))
    fetches = "; ".join(f"hf_hub_download('tiny/partly', {name!r}, revision={COMMIT!r})" for name in ("config.json", "model.safetensors", "tokenizer.json"))
    asks = f"{loads(f'tiny/partly@{COMMIT}')} print(t.eos_token)"
    first = machine.run(python=f"from huggingface_hub import hf_hub_download; {fetches}; {asks}")
    assert first.out.split()[-1] == "</s>", first.err
    fetched = {path.rpartition("/")[2] for _, path in hub.asked}
    assert {"generation_config.json", "tokenizer_config.json", "chat_template.jinja"} <= fetched
    hub.asked.clear()
    assert machine.run(python=asks).out == first.out and hub.asked == []


def test_what_is_pruned_names_the_repository(finished, machine, place):
    outcome = machine.run(f"prune --model tiny/llama@{COMMIT} --method magnitude --sparsity 0.5 --device cpu --out pruned")
    assert outcome.code == 0, outcome.err
    config = json.loads((place / "pruned" / "config.json").read_text())
    base = config["cap_nb"]["base"]
    assert (base["name"], base["commit"], base["license"]) == ("tiny/llama", COMMIT, "apache-2.0")
    assert (place / "pruned" / "LICENSE").read_bytes() == b"Keep this beside the weights.\n"
    saved = "".join(path.read_text() for path in (place / "pruned").glob("*.json"))
    assert "snapshots" not in saved and str(place) not in saved, "a path of this machine is in what is shared"


@pytest.mark.parametrize("task, rows, read", [("gsm8k", gsm8k_rows, read_gsm8k), ("strategyqa", strategyqa_rows, read_strategyqa), ("arc", arc_rows, read_arc)])
def test_every_record_arrives(finished, machine, task, rows, read):
    for split, name in (("calibration", "train"), ("evaluation", "test")):
        outcome = machine.run(python=f"from cap_nb.all import load_problems\nfor p in load_problems({task!r}, {split!r}): print(p.uid)")
        assert outcome.out.split() == [read(row).uid for row in rows(name)], outcome.err


def test_the_text_is_joined_as_published(finished, machine):
    outcome = machine.run(python="from cap_nb.all import load_text; t = load_text('wikitext2'); print(t.name, t.fingerprint)")
    from cap_nb.data.problems import Text
    assert outcome.out.split() == ["wikitext2-raw", Text("", "\n\n".join(row["text"] for row in wikitext_rows("test"))).fingerprint], outcome.err


def test_a_branch_is_resolved_and_said(machine, hub):
    outcome = machine.run(python=loads("tiny/shards"), cache="branch")
    assert outcome.out.split() == [COMMIT, "tiny/shards", "258"], outcome.err
    assert f"tiny/shards was loaded unpinned at commit {COMMIT}" in outcome.err
    hub.asked.clear()
    again = machine.run(python=loads("tiny/shards"), cache="branch")
    assert again.code == 0 and not [path for method, path in hub.asked if method == "GET" and "resolve" in path], "only the name is looked up again"


def test_strategyqa_as_json(machine, hub):
    """The hub's copy may lie there as JSON; the reader takes both."""
    old = hub.repos["dataset", STRATEGYQA.hub[0]]
    hub.add(next(repo for repo in data_sets("json") if repo.name == old.name))
    try: outcome = machine.run(python="from cap_nb.all import load_problems; print(len(load_problems('strategyqa', 'calibration')))", cache="json")
    finally: hub.add(old)
    assert outcome.out.split() == ["16"], outcome.err


# ---- what is refused ----
@pytest.mark.parametrize("words, parts", [
    (f"{LOADING} tiny/nothing", ["model tiny/nothing is not there, or is private", "hf auth login"]), (f"run --model tiny/nothing {FEW} --out runs/none", ["tiny/nothing is not there"]),
    (f"{LOADING} tiny/llama@{'f' * 40}", ["has no such revision"]), (f"{LOADING} tiny/empty", ["lacks a file that is needed (status 404)"])],
    ids=["no repository", "no model for a run", "no commit", "no file"])
def test_what_is_not_there(machine, hub, words, parts):
    hub.add(Repo("tiny/empty", {"README.md": b"nothing"}))
    assert_one_sentence(machine.run(words), *parts)


def test_a_gated_repository(machine):
    refused = machine.run(f"run --model tiny/gated@{COMMIT} {FEW} --out runs/gated", cache="gated")
    assert_one_sentence(refused, "tiny/gated", "asks for permission", "hf auth login")
    allowed = machine.run(python=loads(f"tiny/gated@{COMMIT}"), cache="gated", HF_TOKEN=TOKEN)
    assert allowed.out.split()[0] == COMMIT and TOKEN not in allowed.err + allowed.out, allowed.err


def test_pickles_alone_are_refused(machine, hub):
    assert_one_sentence(machine.run(f"run --model tiny/pickles {FEW} --out runs/pickles", cache="pickles"), "no safetensors", "not pickles")
    assert not [path for _, path in hub.asked if path.endswith(".bin")]


# ---- what goes wrong ----
def test_without_a_hub(machine, hub, place):
    for command in (f"run --model tiny/llama {FEW} --out none", f"{LOADING} tiny/llama", "prune --model tiny/llama --method magnitude --out none"):
        with hub.gone():
            outcome = machine.run(command, cache="nobody")
        assert_one_sentence(outcome, f"{hub.url} gives no answer")
    assert not (place / "none").exists()


@pytest.mark.parametrize("fault, parts", [
    (Fault(silent=4), ["gives no answer"]), (Fault(status=403), ["may not be read (status 403)", "check your token"]),
    (Fault(status=429, headers={"Retry-After": "3600"}), ["too many requests", "try again later"])], ids=["silent", "forbidden", "too many"])
def test_a_hub_that_does_not_give(machine, hub, fault, parts):
    hub.misbehave("tiny/llama", fault, times=9, method="HEAD")
    assert_one_sentence(machine.run(f"{LOADING} tiny/llama", cache=f"none-{fault.status}"), *parts)


def test_a_data_set_out_of_reach_names_the_option(machine, hub):
    hub.misbehave("datasets/openai", Fault(status=503), times=9, method="HEAD")
    outcome = machine.run(f"run --model lab --tasks gsm8k {FEW.replace('--evaluate-n 2 ', '').replace('--max-new-tokens 4 --windows 2 --window-tokens 64', '--accuracy-tasks none')} --windows 0 --out runs/data", cache="data")
    assert outcome.code == 2 and "--data-dir" in outcome.err and "status 503" in outcome.err, outcome.err
    assert "Traceback" not in outcome.err and "Retry" not in outcome.err


def test_a_busy_hub_is_asked_again(machine, hub):
    """The client waits as long as it is asked to, and says so."""
    hub.misbehave("/cdn/", Fault(status=429, headers={"Retry-After": "1"}))
    outcome = machine.run(python=loads(f"tiny/llama@{COMMIT}"), cache="busy")
    assert outcome.code == 0 and outcome.out.split()[0] == COMMIT and "Waiting" in outcome.err and outcome.waited >= 1, outcome.err


def test_a_broken_connection_is_taken_up(machine, hub):
    """Half of the weights, then the rest by a range request."""
    hub.misbehave("/cdn/", Fault(cut=0.5))
    outcome = machine.run(python=loads(f"tiny/llama@{COMMIT}"), cache="half")
    assert outcome.code == 0, outcome.err
    assert len([1 for method, path in hub.asked if method == "GET" and "/cdn/" in path]) == 2


def test_a_connection_that_always_breaks(machine, hub):
    hub.misbehave("/cdn/", Fault(cut=1e-9), times=99)
    outcome = machine.run(f"run --model tiny/llama@{COMMIT} {FEW} --out runs/broken", cache="broken")
    said = outcome.err.strip().splitlines()[-1]
    assert outcome.code == 2 and "came only in part, the connection broke" in said and "run the same command again" in said, outcome.err


@pytest.mark.parametrize("part, name", [("/cdn/model", "model.safetensors"), ("resolve-cache/model/tiny/llama/tokenizer.json", "tokenizer.json")])
def test_a_wrong_checksum(machine, hub, part, name):
    """The right length and one bit: the client takes it, this kit does not, and the next run fetches it again."""
    hub.misbehave(part, Fault(flip=True))
    command = f"run --model tiny/llama@{COMMIT} {FEW} --out runs/flipped"
    assert_one_sentence(machine.run(command, cache=f"flipped-{name}"), f"{name} from the hub is damaged", "run the same command again")
    again = machine.run(python=loads(f"tiny/llama@{COMMIT}"), cache=f"flipped-{name}")
    assert again.code == 0, again.err


def test_a_wrong_checksum_in_a_data_set(machine, hub):
    hub.misbehave("/cdn/dataset/openai", Fault(flip=True))
    code = "from cap_nb.all import load_problems; print(len(load_problems('gsm8k', 'evaluation')))"
    outcome = machine.run(python=f"from cap_nb.core.errors import BadInput\ntry: {code.split('; ')[0]}; load_problems('gsm8k', 'evaluation')\nexcept BadInput as e: print(e)", cache="flipped-data")
    assert "test-00000-of-00001.parquet from the hub is damaged" in outcome.out, outcome.err
    assert machine.run(python=code, cache="flipped-data").out.split() == ["16"]
