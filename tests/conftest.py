"""What several tests share: where the checkout is, and the benchmarks' own files beside it."""
import datetime
import os
import platform
from collections import Counter
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork, and tokenizers that used threads before a fork say so on stderr
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported: no test may reach for the network

import matplotlib
import pytest

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files (gsm8k, strategyqa, arc, wikitext2) are not beside this checkout")
SOAKED = ROOT / "figures" / "bad_input" / "soaked.json"


FIRST = {f"test_{name}.py" for name in ("devices", "teaching", "hub", "install", "models_of_a_run", "inputs", "chains", "planning", "changed_numbers", "cli",
                                       "on_one_page")}


def pytest_collection_modifyitems(items):
    """Files whose fixtures take seconds come first: an idle process takes over tests from the end, and would have to make such a fixture again."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True, scope="session")
def what_many_tests_read_is_read_once():
    from fixtures import labs_read_once, pools_encoded_once

    with pools_encoded_once(), labs_read_once():
        yield


@pytest.fixture(scope="session")
def small_lab(tmp_path_factory):
    """Four small random layers, as wide as their heads, that read the lab's words: for what does not depend on what a model says."""
    from fixtures import tiny_llama

    from cap_nb.models.lab import lab_tokenizer
    from cap_nb.models.loading import save_model

    folder, tokenizer = tmp_path_factory.mktemp("model") / "small", lab_tokenizer()
    save_model(tiny_llama(num_hidden_layers=4, hidden_size=24, vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer, folder)
    return folder


@pytest.fixture(autouse=True, scope="session")
def pictures_of_runs_are_blank():
    from fixtures import blank_pictures

    with blank_pictures():
        yield


def pytest_sessionfinish(session, exitstatus):
    """Keep what a soak did, for the page of wrong uses: tests, and what they counted, of every file that was run whole."""
    fuzz, said = int(os.environ.get("CAP_NB_FUZZ", 0)), session.config.pluginmanager.get_plugin("terminalreporter")
    option = session.config.option
    chosen = option.keyword or option.markexpr or getattr(option, "lf", False) or getattr(option, "deselect", None)
    ended_early = exitstatus not in (0, 1) or session.shouldstop or session.shouldfail
    if not fuzz or said is None or chosen or ended_early or any("::" in word for word in session.config.args):
        return
    import torch

    from cap_nb.core.files import read_checked, write_checked
    from cap_nb.jobs.records import commit_of_package

    kept = read_checked(SOAKED) if SOAKED.exists() else {}
    ended = [(outcome, one) for outcome in ("passed", "failed", "error") for one in said.stats.get(outcome, ())]
    for name in sorted({one.nodeid.partition("::")[0] for _, one in ended}):
        of_it = {outcome: [one for kind, one in ended if kind == outcome and one.nodeid.startswith(f"{name}::")] for outcome in ("passed", "failed", "error")}
        seconds = sum(getattr(one, "duration", 0) for ones in said.stats.values() for one in ones if (getattr(one, "nodeid", None) or "").startswith(f"{name}::"))
        counted = sum((Counter(dict(one.user_properties)) for one in of_it["passed"]), Counter())
        kept[name] = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit_of_package(), "python": platform.python_version(),
                      "torch": torch.__version__, "CAP_NB_FUZZ": fuzz, "minutes": round(seconds / 60), "tests passed": len(of_it["passed"]),
                      "tests failed": len(of_it["failed"]) + len(of_it["error"]), **dict(sorted(counted.items()))}
    write_checked(SOAKED, dict(sorted(kept.items())))
