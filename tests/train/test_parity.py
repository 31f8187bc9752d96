import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from train.parity import LIMIT, can_compare, compare, compare_choices, transformers_logits


def test_the_figures_are_those_worked_out_by_hand():
    # Two places, three tokens. Theirs are log-probabilities already; ours doubles one probability's logit and shifts the other place.
    theirs = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]])
    ours = np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]]) + np.array([[0.0], [2.0]])
    found = compare("theirs", theirs, ours)
    assert found.places == 2
    assert found.max_difference == pytest.approx(2.0)
    assert found.mean_difference == pytest.approx((2 * np.log(2) + 3 * 2) / 6)
    assert found.largest_logit == pytest.approx(-np.log(0.2))
    assert found.top1_agreement == 0.5
    assert found.top5_agreement == 1.0
    # KL = 0.5 ln 2 - 0.25 ln 2 at the first place; a shift of all logits changes no probability at the second.
    assert found.kl == pytest.approx(0.25 * np.log(2) / 2)
    assert not found.passed


def test_the_limit_grows_with_logits_above_ten():
    theirs = np.array([[40.0, -1.0, 3.0]])
    assert compare("theirs", theirs, theirs + 3 * LIMIT).passed
    assert not compare("theirs", theirs, theirs + 5 * LIMIT).passed
    assert not compare("theirs", theirs / 4, theirs / 4 + 3 * LIMIT).passed


def test_what_is_no_number_is_not_compared():
    with pytest.raises(ValueError, match="the logits of ours cannot be compared: 1 of 2 are no finite number"):
        compare("theirs", np.zeros((1, 2)), np.array([[0.0, np.nan]]))


def test_choices_count_where_ours_is_clear():
    ours = np.array([[5.0, 0.0, 1.0], [0.0, 0.4, 0.1], [0.0, 3.0, 9.0]])  # clear, not clear, clear
    good = compare_choices("engine", [0, 2, 2], ours)
    assert (good.clear, good.clear_agreement, good.agreement) == (2, 1.0, pytest.approx(2 / 3))
    assert good.passed
    assert not compare_choices("engine", [0, 1, 1], ours).passed
    assert not compare_choices("engine", [1], ours[1:2]).passed  # nothing clear says nothing


@pytest.fixture
def interpreter(tmp_path):
    """A Python of its own that has, under their names, a torch and a transformers that give the logits tokens * 2 for 3 tokens."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "torch.py").write_text(
        "import numpy as np\nfrom contextlib import nullcontext as inference_mode\nfloat32 = 'float32'\n"
        "class Tensor:\n    def __init__(self, a): self.a = a\n    def __getitem__(self, i): return Tensor(self.a[i])\n"
        "    def float(self): return self\n    def numpy(self): return self.a.astype(np.float32)\n"
        "def from_numpy(a): return Tensor(a)\n"
    )
    (packages / "transformers.py").write_text(
        "import numpy as np, os, torch\nfrom types import SimpleNamespace\n"
        "class AutoModelForCausalLM:\n    @classmethod\n    def from_pretrained(cls, folder, **how):\n"
        "        assert how['local_files_only'] and os.environ['HF_HUB_OFFLINE'] == '1' and 'HF_TOKEN' not in os.environ\n"
        "        if not os.path.isdir(folder): raise OSError('no such model')\n        return cls()\n"
        "    def eval(self): return self\n"
        "    def __call__(self, t): return SimpleNamespace(logits=torch.Tensor(np.repeat(2.0 * t.a[:, :, None], 3, 2)))\n"
    )
    (packages / "transformers-9.9.dist-info").mkdir()
    (packages / "transformers-9.9.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 9.9\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_another_interpreter_computes_the_logits_and_gets_no_token(interpreter, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(tmp_path)
    assert can_compare(Path("python"))
    name, logits = transformers_logits(tmp_path, np.array([1, 5], np.int32), Path("python"))
    assert name == "transformers 9.9"
    np.testing.assert_array_equal(logits, [[2, 2, 2], [10, 10, 10]])
    with pytest.raises(ValueError, match="gave no logits of nowhere: OSError: no such model"):
        transformers_logits(tmp_path / "nowhere", np.array([1], np.int32), interpreter)


def test_an_interpreter_that_cannot_is_told(interpreter, tmp_path):
    with pytest.raises(ValueError, match="expected a Python interpreter"):
        can_compare(tmp_path / "nothing")
    (tmp_path / "packages" / "torch.py").unlink()
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(ValueError, match="expected torch, transformers and numpy there; one of them is missing"):
            can_compare(interpreter)
