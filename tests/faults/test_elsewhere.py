"""What a run needs from elsewhere: shards of a checkpoint, the hub's cache, and an interpreter that need not be the same."""
import os
import shutil
import subprocess
import sys

import pytest

from fixtures import refuses
from cap_nb.models.loading import load_model
from faults.machinery import SOAK, WORDS, differing, refused
from hub import Hub, Machine, Repo, data_sets, llama_files, save_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEW = f"run --model tiny/llama@{COMMIT} --n 6 --k 2 --evaluate-n 2 --loss-n 2 --max-new-tokens 4 --windows 2 --window-tokens 64 --device cpu --methods magnitude --sparsity 0.5"


def test_a_shard_that_is_cut_short_or_gone(tmp_path):
    """Each shard in turn: the sentence names it, or the first of what it held."""
    save_llama(tmp_path / "m", "20kB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        kept = shard.read_bytes()
        for left in (None, 0, 5, len(kept) // 2, len(kept) - 1):
            shard.unlink(missing_ok=True)
            if left is not None:
                shard.write_bytes(kept[:left])
            refuses(shard.name, load_model, str(tmp_path / "m"), device="cpu")
        shard.write_bytes(kept)
    load_model(str(tmp_path / "m"), device="cpu")


@pytest.mark.skipif(not SOAK, reason="reads the libraries twice; make soak does")
def test_other_interpreters_give_the_same_bytes(whole, tmp_path):
    """Nothing depends on the order of a set or on the state of this process: two programs of their own, with other seeds of Python's hashes."""
    for seed in ("1", "2"):
        about = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", "from cap_nb.__main__ import main; main()", *WORDS, "--out", tmp_path / seed],
                              capture_output=True, text=True, env=about)
        assert done.returncode == 0, done.stderr
        assert differing(tmp_path / seed, whole) == []


PULLED = """
import os, shutil, sys
from cap_nb.__main__ import main
gone = []
def hook(event, arguments):
    if event == "os.rename" and {moment!r} in str(arguments[0]) and not gone:
        gone.append(True)
        shutil.rmtree({cache!r})
sys.addaudithook(hook)
sys.argv = ["cap", *{words!r}.split()]
main()
"""


@pytest.mark.skipif(not SOAK, reason="serves a hub, and reads the libraries six times; make soak does")
@pytest.mark.parametrize("moment", [".run.json", "reports/.dense", "reports/.magnitude"])
def test_a_cache_that_is_pulled(tmp_path, moment):
    """The hub's cache vanishes during a run: fetched again where there is a hub; without one a sentence, and with the cache back the run goes on."""
    with Hub() as serving:
        serving.add(Repo("tiny/llama", llama_files(tmp_path / "saved")))
        for repo in data_sets():
            serving.add(repo)
        machine = Machine(serving.url, tmp_path)
        try:
            first = machine.run(f"{FEW} --out runs/whole")
            assert first.code == 0, first.err
            for cache in ("pulled", "pulled-alone"):
                shutil.copytree(tmp_path / "cache", tmp_path / cache, symlinks=True)
            done = machine.run(python=PULLED.format(moment=moment, cache=f"{tmp_path}/pulled", words=f"{FEW} --out runs/pulled"), cache="pulled")
            assert done.code == 0, done.err
            assert differing(tmp_path / "runs/pulled", tmp_path / "runs/whole") == []
        finally:
            machine.close()
    alone = Machine("http://127.0.0.1:9", tmp_path)
    try:
        done = alone.run(python=PULLED.format(moment=moment, cache=f"{tmp_path}/pulled-alone", words=f"{FEW} --out runs/alone"), cache="pulled-alone")
        if done.code:
            refused((done.code, done.err))
            done = alone.run(f"{FEW} --out runs/alone")
            assert done.code == 0, done.err
        assert differing(tmp_path / "runs/alone", tmp_path / "runs/whole") == []
    finally:
        alone.close()
