"""Real benchmark files and a real model, where they are at hand. Every skip says what is missing."""
import collections

import pytest
import torch

from cap_nb.calibration import calibration_set, overlap
from fixtures import refuses
from cap_nb.data.problems import load_problems, load_text
from cap_nb.data.prompts import extract_answer, same_answer, token_batches
from cap_nb.evaluation import evaluation_problems
from cap_nb.models.anatomy import anatomy, projections
from cap_nb.models.loading import load_model, model_cache, model_fingerprint, save_model
from cap_nb.scoring import score_heads_naive
from cap_nb.methods.resumed_scoring import score_heads, shared_prefix
from cap_nb.methods.prune import prune
from cap_nb.threshold import zero_count
from conftest import DATA, needs_data

needs_smollm2 = pytest.mark.skipif(not (model_cache() / "smollm2" / "SHA256SUMS.json").is_file(), reason="SmolLM2 is not fetched: run 'cap fetch smollm2'")
REAL = ("gsm8k", "strategyqa", "arc")


@needs_data
@pytest.mark.parametrize("task", REAL)
def test_every_record_is_read(task):
    calibration, evaluation = (load_problems(task, split, DATA) for split in ("calibration", "evaluation"))
    assert len(calibration) >= 250 and len(evaluation) >= 400
    uids = [p.uid for p in calibration + evaluation]
    assert len(set(uids)) == len(uids), "a content stands in both splits, or twice in one"
    for problem in calibration + evaluation:
        assert problem.question and problem.answer and "<<" not in problem.solution
        if task == "gsm8k":
            float(problem.answer)
        if task == "strategyqa":
            assert problem.answer in ("yes", "no") and problem.solution
        if task == "arc":
            assert problem.answer in dict(problem.choices) and problem.choices[0][0] == "A"


@needs_data
@pytest.mark.parametrize("task, least", [("svamp", 690), ("math500", 350)])
def test_what_is_answered_only(task, least):
    """Every record is read, none of its problems can be calibrated on, and a calibration set on others does not hinder it."""
    problems = load_problems(task, "evaluation", DATA)
    assert len(problems) >= least and len({p.uid for p in problems}) == len(problems)
    assert all(p.question and p.answer and bool(p.solution) == (task == "math500") and "The answer is:" not in p.solution for p in problems)
    refuses(f"{task} has no problems for calibration", calibration_set, load_model("lab", device="cpu")[1], tasks=(task,), n=1, k=1, data_dir=DATA)
    some = frozenset(p.uid for p in problems[:3])
    assert len(evaluation_problems(task, data_dir=DATA, exclude=some)) == len(problems) - 3


@needs_data
def test_equal_formulas():
    """Every gold answer of MATH-500 is its own, as math-verify reads it, in a box or not; another problem's seldom is."""
    pytest.importorskip("math_verify", reason="the optional extra is not installed: pip install 'cap_nb[math]'")
    golds = [extract_answer(f"\\boxed{{{p.answer}}}", "math500", "paper") for p in load_problems("math500", "evaluation", DATA)]
    assert all(same_answer(f"{gold} ", gold, "math500") for gold in golds)
    others = [same_answer(one, other, "math500") for one, other in zip(golds, golds[1:]) if one != other]
    assert sum(others) <= 3


@needs_data
def test_wikitext_is_named_by_its_form():
    text = load_text("wikitext2", DATA)
    assert text.name == "wikitext2-tokenised" and "<unk>" in text.text and len(text.text) > 1_000_000


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", "float32", "cpu")


@needs_data
@needs_smollm2
def test_calibration_is_balanced_and_disjoint(smollm2):
    calibration = calibration_set(smollm2[1], n=16, k=3, data_dir=DATA)
    assert collections.Counter(calibration.subset.tolist()) == {0: 16, 1: 16, 2: 16}
    cells = collections.Counter(zip(calibration.subset.tolist(), calibration.stratum))
    assert set(cells.values()) <= {1, 2}, "a stratum of four is dealt 1 or 2 to each of three subsets"
    for task in REAL:
        assert not overlap(calibration, load_problems(task, "evaluation", DATA))
    for batch_tokens in (1024, 4096, 16384):
        lengths = [[len(calibration.examples[i].input_ids) for i in batch] for batch in token_batches(calibration.examples, batch_tokens)]
        assert 1 - sum(map(sum, lengths)) / sum(len(batch) * max(batch) for batch in lengths) <= 0.05


@needs_data
@needs_smollm2
def test_naive_and_resumed_agree_over_the_depth(smollm2):
    """Three heads spread over the depth of SmolLM2, in float32, to 1e-5; the model unchanged, no hook left."""
    model, tokenizer = smollm2
    before = model_fingerprint(model)
    calibration = calibration_set(tokenizer, n=1, k=1, data_dir=DATA)
    a = anatomy(model)
    heads = [(round(step * (a.layers - 1) / 2), step) for step in range(3)]
    naive = score_heads_naive(model, calibration, heads=heads)
    assert shared_prefix(calibration.examples) >= 16, "the chat template's system text is shared by all examples"
    least = score_heads(model, calibration, heads=heads)
    assert (naive.intact - least.intact).abs().max() < 1e-5
    assert (naive.masked - least.masked).nan_to_num().abs().max() < 1e-5 and (~least.masked.isnan()).sum() == len(heads) * len(calibration.examples)
    assert model_fingerprint(model) == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@needs_smollm2
def test_sparsity_is_exact_on_a_model_full_of_ties(tmp_path):
    """Dequantised weights tie; the count is exact all the same, and the saved model comes back bit for bit."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model("smollm2", "bfloat16", "cpu")
    weights = sum(p.module.weight.numel() for p in projections(model))
    report = prune(model, "magnitude", 0.1)
    assert report.ties > 1000 and report.zeros == zero_count(weights, 0.1) and abs(report.reached - 0.1) < 1e-4
    save_model(model, tokenizer, tmp_path / "pruned")
    assert all(shard.stat().st_size <= 4e9 for shard in (tmp_path / "pruned").glob("*.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")  # transformers 4 would make it float32
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
