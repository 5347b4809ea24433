"""Relevance beside lxt, the code of AttnLRP's authors

> The same heads, on a tiny Llama and on SmolLM2, by our rules and by theirs.

Paper: section 2 (Hatefi et al. 2025). In: lxt, and SmolLM2 where it was fetched with its benchmark files. Out:
`figures/relevance/lxt.json`, which nbs/methods/04_relevance reads. lxt is no requirement of this kit and needs
transformers 4; in an environment of its own:

    pip install -e . 'transformers<4.58' zennit torchvision && pip install --no-deps lxt==2.1
    CAP_NB_DATA=FOLDER python -m tools.relevance            # a minute; CAP_NB_NOTE says what else was running

lxt replaces methods of classes for the rest of the process: ours are computed first.
"""

import importlib.metadata
import os
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import write_checked
from cap_nb.data.prompts import IGNORED, Example
from cap_nb.methods.attributions import differentiable, gold_logits, head_relevance
from cap_nb.models.anatomy import decoder_layers, dimensions, output_projection
from cap_nb.models.interventions import changed_input, watching
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import batches_of, rank_correlation

FOLDER = Path(__file__).resolve().parents[1] / "figures" / "relevance"
SEED, N = 0, 4  # of the calibration set, a task


def tiny_llama():
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=256, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config).eval()


def some_tokens():
    rng = torch.Generator().manual_seed(SEED)
    rows = torch.randint(1, 256, (6, 20), generator=rng).tolist()
    examples = [
        Example(task="own", uid=str(row), prompt="", target="", answer="", input_ids=tuple(ids), labels=(IGNORED,) * 8 + tuple(ids[8:]))
        for row, ids in enumerate(rows)
    ]
    return Calibration.from_examples(examples, k=1)


def input_times_gradient(model, batch):
    """What passes through each head, [B, L, H], by whatever derivatives the model's code has now."""
    outputs = []
    with differentiable(model), ExitStack() as stack:
        for layer in range(len(decoder_layers(model))):
            stack.enter_context(changed_input(output_projection(model, layer), watching(outputs.append)))
        slopes = torch.autograd.grad(gold_logits(model, batch).sum(), outputs)
    size = dimensions(model.config).head_size
    by_head = [(z * s).detach().double().unflatten(-1, (-1, size)).sum((1, 3)) for z, s in zip(outputs, slopes)]
    return torch.stack(by_head, 1)


def over_batches(model, calibration, relevance):
    return torch.cat([relevance(model, batch) for _, batch in batches_of(calibration, 2048, torch.device("cpu"))])


def compared(ours, theirs, model, calibration):
    of_heads = [table.mean(0) for table in (ours, theirs)]
    return {
        "largest difference": (ours - theirs).abs().max().item(),
        "largest relevance": ours.abs().max().item(),
        "rank correlation of the means": rank_correlation(*of_heads),
        "model": model_fingerprint(model),
        "calibration": calibration.fingerprint,
        "n": len(calibration.examples),
        "dtype": "float32",
        "device": "cpu",
        "seed": SEED,
    }


def main() -> None:
    models = {"tiny Llama": (tiny_llama(), some_tokens())}
    if data := os.environ.get("CAP_NB_DATA"):
        model, tokenizer = load_model("smollm2", torch.float32, "cpu")
        models["SmolLM2-135M-Instruct"] = (model, calibration_set(tokenizer, n=N, seed=SEED, data_dir=data))
    ours = {name: over_batches(*pair, head_relevance) for name, pair in models.items()}
    plain = {name: over_batches(*pair, input_times_gradient) for name, pair in models.items()}

    from lxt.efficient import monkey_patch

    monkey_patch(modeling_llama)
    record = {"models": {}, "note": os.environ.get("CAP_NB_NOTE", "")}
    for name, pair in models.items():
        theirs = over_batches(*pair, input_times_gradient)
        record["models"][name] = compared(ours[name], theirs, *pair)
        record["models"][name]["largest difference of a plain gradient"] = (plain[name] - theirs).abs().max().item()
    record["versions"] = {name: importlib.metadata.version(name) for name in ("lxt", "torch", "transformers")}
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_checked(FOLDER / "lxt.json", record)
    print(record)


if __name__ == "__main__":
    main()
