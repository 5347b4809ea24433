"""CAP, Wanda, magnitude and X-Pruner on a small vision transformer of shapes.

    python tools/vision.py

About three minutes on one core, half of them training. Writes figures/vision/shapes.json, which
nbs/experiments/05_vision reads. Weights are not kept: the training is seeded, and the record holds their fingerprint.
"""
import copy
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from cap_nb.analysis import compare, correct_family
from cap_nb.calibration import Calibration
from cap_nb.core.files import write_checked
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.evaluation import AnswerRecord
from cap_nb.experiments.vision import (
    SHAPE_MODEL, SHAPES, ImageReader, drawn_shapes, image_examples, train_on_shapes)
from cap_nb.importance import importance_factors
from cap_nb.jobs.records import environment
from cap_nb.methods.explainable_masks import (
    MaskFit, ThresholdFit, UnitTable, aggregated, fit_masks, fit_thresholds, prune_units, same_for_units, tasks_of,
    text_passes, unit_weights, units_to_remove)
from cap_nb.methods.neurons import neuron_estimates
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import model_fingerprint
from cap_nb.scoring import causal_scores, rank_correlation

FOLDER = Path(__file__).resolve().parent.parent / "figures" / "vision"
STEPS, RATE, FINE_STEPS, FINE_RATE = 1500, 2e-3, 100, 5e-4
CALIBRATED, HELD_OUT, SPARSITIES = 256, 1000, (0.2, 0.5, 0.7)
UNITS = ("masks", "magnitude of units", "scores of units", "masks, thresholds learned")
WEIGHTS = ("magnitude", "wanda", "cap", "cap_wanda", "cap.explainable_masks")


def rounded(table: torch.Tensor, digits: int = 4) -> list:
    "A table with as many digits as anybody reads."
    return [rounded(row, digits) if row.ndim else round(row.item(), digits) for row in table]


def magnitudes(reader) -> UnitTable:
    "The mean size of the weights that go with each unit."
    found = same_for_units(reader, 0.0)
    for p in projections(reader):
        size = p.weight.detach().abs().double()
        for part in p.parts:
            block = slice(part.start, part.stop)
            found.heads[p.layer, part.index] += (size[:, block] if p.role == "output" else size[block]).sum()
        if not p.parts:
            found.neurons[p.layer] += size.sum(0 if p.role == "down" else 1)
    weights = unit_weights(reader)
    return UnitTable(found.heads / weights.heads, found.neurons / weights.neurons)


@torch.no_grad()
def judged(model, pixels, kinds) -> dict:
    "What a model says of the held-out images: classes, a digit each, and the mean loss."
    logits = model(pixel_values=pixels).logits
    loss = torch.nn.functional.cross_entropy(logits, kinds)
    return {"said": "".join(map(str, logits.argmax(-1).tolist())), "loss": round(loss.item(), 4)}


def answers(record: dict, cell: str) -> list[AnswerRecord]:
    "What was said of each held-out image, as answers."
    return [AnswerRecord(task="shapes", uid=f"{n}", prompt_sha256="", output=SHAPES[int(said)], gold=SHAPES[int(kind)],
                         strict=SHAPES[int(said)], lenient=SHAPES[int(said)], correct=said == kind,
                         lenient_correct=said == kind, tokens=1, cut_off=False)
            for n, (said, kind) in enumerate(zip(record["cells"][cell]["said"], record["kinds"]))]


def compared(record: dict) -> dict:
    "Every way beside magnitude, and X-Pruner beside the other choices of units; two families, each corrected."
    ends = [f"{after} {s}" for after in ("", ", trained on") for s in SPARSITIES]
    def family(pairs: list[tuple[str, str]]) -> dict:
        return correct_family({f"{a} - {b}": compare(answers(record, a), answers(record, b)) for a, b in pairs})
    others = [way for way in (*WEIGHTS, *UNITS) if way != "magnitude"]
    found = family([(way + end, "magnitude" + end) for end in ends for way in others])
    found |= family([(UNITS[-1] + end, way + end) for end in ends for way in UNITS[:-1]])
    return {name: asdict(c) for name, c in found.items()}


def trained() -> ViTForImageClassification:
    "The model, from its seed."
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SHAPE_MODEL))
    train_on_shapes(model, STEPS, rate=RATE)
    return model


def main() -> None:
    began, model = time.time(), trained()
    (mine, labels), (pixels, kinds) = drawn_shapes(CALIBRATED, seed=1), drawn_shapes(HELD_OUT, seed=2)
    reader = ImageReader(model, mine)
    calibration = Calibration.from_examples(image_examples(reader, labels, SHAPES, range(CALIBRATED), "calibration "))
    record = {"sizes": SHAPE_MODEL, "steps": STEPS, "rate": RATE, "fine": [FINE_STEPS, FINE_RATE],
              "seconds": round(time.time() - began, 1),
              "calibrated": CALIBRATED, "held out": HELD_OUT, "seed": 0, "model": model_fingerprint(reader),
              "calibration": calibration.fingerprint, "fit": asdict(MaskFit()),
              "thresholds fit": asdict(ThresholdFit()),
              "environment": environment("cpu", os.environ.get("CAP_NB_NOTE", "")) | {"dtype": "float32"}}
    dense = judged(model, pixels, kinds)
    record["kinds"] = "".join(map(str, kinds.tolist()))
    record["cells"] = {"dense 0": {"reached": 0.0, **dense}}
    print("dense", dense["loss"], record["seconds"], flush=True)

    losses = score_heads(reader, calibration)
    causal, passes, (_, class_of) = causal_scores(losses), text_passes(reader, calibration), tasks_of(calibration)
    began = time.time()
    masks = fit_masks(reader, passes, class_of)
    record["seconds of masks"] = round(time.time() - began, 1)
    scores, zero = aggregated(masks), torch.zeros(len(causal), 2, dtype=torch.float64)
    by_class = [losses.masked[..., class_of == c].mean(-1) - losses.intact[class_of == c].mean()
                for c in range(len(SHAPES))]
    record |= {"causal": rounded(causal), "causal by class": rounded(torch.stack(by_class)),
               "masks": {"heads": rounded(masks.heads), "neurons": rounded(masks.neurons, 3)},
               "agreement": [[round(rank_correlation(row, own), 3) for own in by_class] for row in masks.heads],
               "aggregated": round(rank_correlation(scores.heads, causal), 3)}
    print(record["agreement"], record["aggregated"], flush=True)
    weights, estimates = unit_weights(reader), neuron_estimates(reader, calibration, signed=True)
    units = {"masks": scores, "magnitude of units": magnitudes(reader),
             "scores of units": UnitTable(causal / weights.heads, estimates / weights.neurons)}
    for sparsity in SPARSITIES:
        def keep(name, changed, reached):
            fine = copy.deepcopy(changed)
            train_on_shapes(fine, FINE_STEPS, seed=7, rate=FINE_RATE)
            record["cells"][f"{name} {sparsity}"] = {"reached": reached, **judged(changed, pixels, kinds)}
            record["cells"][f"{name}, trained on {sparsity}"] = {"reached": reached, **judged(fine, pixels, kinds)}
            print(name, sparsity, round(reached, 4), record["cells"][f"{name} {sparsity}"]["loss"],
                  record["cells"][f"{name}, trained on {sparsity}"]["loss"], flush=True)
        for method in WEIGHTS:
            changed = copy.deepcopy(model)
            factors = importance_factors(scores.heads if method == "cap.explainable_masks" else causal)
            keep(method, changed, prune(ImageReader(changed, mine), method, sparsity, factors, calibration).reached)
        ways = {name: (table, zero) for name, table in units.items()}
        ways["masks, thresholds learned"] = (scores, fit_thresholds(reader, passes, CALIBRATED, scores, sparsity))
        for name, (table, thresholds) in ways.items():
            changed, gone = copy.deepcopy(model), units_to_remove(reader, table, thresholds, sparsity)
            report = prune_units(ImageReader(changed, mine), gone, sparsity)
            keep(name, changed, report.reached)
            record["cells"][f"{name} {sparsity}"]["units"] = [gone.heads.sum(1).tolist(), gone.neurons.sum(1).tolist()]
    record["compared"] = compared(record)
    FOLDER.mkdir(exist_ok=True)
    write_checked(FOLDER / "shapes.json", record)


if __name__ == "__main__":
    main()
