"""Layer errors on SmolLM2: a run that is stopped goes on, another run's leavings are not used, and both records are of the same inputs."""
import pytest
from conftest import ROOT, tool
from fixtures import made_up_calibration, tiny_llama

from cap_nb.core.files import read_checked
from cap_nb.models.anatomy import projections


def test_a_stopped_run_goes_on_from_its_last_layer(tmp_path, monkeypatch):
    study, model, calibration = tool("joint_errors"), tiny_llama().eval(), made_up_calibration(6, shortest=20)
    kept, calls, layer = tmp_path / "kept.json", [], len([p for p in projections(model) if p.layer == 0])
    measured = study.errors_of

    def counted(*arguments):
        calls.append(1)
        if len(calls) == layer + 3:
            raise KeyboardInterrupt
        return measured(*arguments)
    monkeypatch.setattr(study, "errors_of", counted)
    with pytest.raises(KeyboardInterrupt):
        study.mask_errors(model, calibration, {"seed": 0}, kept)
    assert len(read_checked(kept)["errors"]) == layer
    calls[:] = [1] * 1000
    errors = study.mask_errors(model, calibration, {"seed": 0}, kept)
    assert len(calls) - 1000 == len(errors) - layer == len(projections(model)) - layer
    calls[:] = [1] * 1000
    assert study.mask_errors(model, calibration, {"seed": 1}, kept) == errors and len(calls) - 1000 == len(errors)
    for found in errors.values():
        assert found["swaps"] <= found["wanda"] and found["wanda^update"] <= found["wanda"] < 1


def test_both_records_are_of_the_same_inputs():
    masks, joint = (read_checked(ROOT / "figures" / "solvers" / f"{name}_errors.json") for name in ("mask", "joint"))
    assert all(masks[key] == joint[key] for key in ("model", "calibration", "sparsity")) and set(masks["errors"]) == set(joint["shares"])
