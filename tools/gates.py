"""Causal head gating beside its authors' code

> The same objective and the same gradient, problem by problem, on the lab's model.

Paper: section 2 (Nam et al. 2025). In: a checkout of andrewnam/causal_head_gating and einops, which are no requirement
of this kit. Out: `figures/relevance/gates.json`, which nbs/methods/18_attributions reads.

    pip install einops && python -m tools.gates CHECKOUT            # half a minute; CAP_NB_NOTE says what else was running

Two things are compared: the gradient of their objective by the gates' logits with ours, at random gates, for both
pushes; and gates after a short fit with their clipping of the gradient's norm at 1, which ours leaves out.
"""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from cap_nb.calibration import calibration_set
from cap_nb.core.files import write_checked
from cap_nb.data.batches import collate
from cap_nb.data.prompts import IGNORED
from cap_nb.methods.attributions import PUSHES, GateFit, gate_gradient, head_gates, starting_gates, step_sets
from cap_nb.models.anatomy import anatomy
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import rank_correlation

TARGET = Path(__file__).resolve().parents[1] / "figures" / "relevance" / "gates.json"
SEED, N = 0, 8


def their_batch(calibration):
    """Tokens and the mask of what counts, as their data set gives them; the model sees no padding mask."""
    batch = collate(list(calibration.examples), pad_id=0, device=torch.device("cpu"))
    return batch["input_ids"], (batch["labels"] != IGNORED).float()


def their_gradient(gating, logits, calibration, weight, clamp=4):
    """The gradient of what `CHGTrainer.get_loss` minimises, without its autocast."""
    leaf = logits.float().requires_grad_()
    logp = gating.get_logp(leaf.sigmoid(), *their_batch(calibration), agg="mean")
    (slope,) = torch.autograd.grad(-logp.mean() - weight * leaf.clamp(-clamp, clamp).mean(), leaf)
    return slope.double()


def fit_with_clipping(gating, calibration, fit, start):
    """Their update: the norm of the gradient clipped at 1, Adam, a learning rate that moves evenly."""
    logits = torch.logit(start).float().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=fit.rates[0])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, fit.rates[1] / fit.rates[0], fit.steps)
    for part in step_sets(calibration, fit.examples, fit.steps, fit.seed):
        logits.grad = their_gradient(gating, logits.detach(), part, fit.regularisation * PUSHES[fit.push]).float()
        torch.nn.utils.clip_grad_norm_(logits, max_norm=1.0)
        optimiser.step()
        schedule.step()
    return logits.detach().double().sigmoid()


def main(checkout: str) -> None:
    sys.path.insert(0, str(Path(checkout) / "src"))
    from chg.chg import CHG

    model, tokenizer = load_model("lab", torch.float32, "cpu")
    calibration, gating = calibration_set(tokenizer, n=N, k=1, seed=SEED), CHG(model)
    start = starting_gates(anatomy(model), None, SEED)
    logits, differences = torch.logit(start), {}
    for push, sign in (("none", 0.0), *PUSHES.items()):
        ours = gate_gradient(model, calibration, logits.clone().requires_grad_(), 0.1 * sign, 4096)
        theirs = their_gradient(gating, logits, calibration, 0.1 * sign)
        differences[push] = {"largest": ours.abs().max().item(), "largest difference": (ours - theirs).abs().max().item()}
    fits = {}
    for push in PUSHES:
        fit = GateFit(push=push, steps=60, examples=12, seed=SEED)
        ours, theirs = head_gates(model, calibration, fit, start), fit_with_clipping(gating, calibration, fit, start)
        other = head_gates(model, calibration, replace(fit, seed=1), start)
        fits[push] = {"with and without clipping": rank_correlation(ours, theirs), "two orders of the examples": rank_correlation(ours, other)}
    commit = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {"gradient": differences, "fit": fits, "checkout": commit or os.environ.get("CAP_NB_CHECKOUT", ""), "n": len(calibration.examples)}
    record |= {"seed": SEED, "dtype": "float32", "device": "cpu", "model": model_fingerprint(model), "calibration": calibration.fingerprint}
    record["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    write_checked(TARGET, record | {"note": os.environ.get("CAP_NB_NOTE", "")})
    print(record)


if __name__ == "__main__":
    main(sys.argv[1])
