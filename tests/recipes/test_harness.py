"""lm-eval asking our models: local tasks run by it for real, and its numbers beside ours and beside those of its own `hf` type."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tiny import tiny

import lm
from data.requests import RequestPlan
from data.tokenizer import Tokenizer
from recipes import harness
from recipes.evaluate_words import Words
from train.evaluate import Scorer

FOLDER = "tests/recipes/harness"  # the tasks' files are named from the root of the repository
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["The capital of Peru is Lima.", "a", "def f(x):\n    return x + 1\n" * 6]  # the last one needs several windows


def test_without_lm_eval_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="uv pip install lm-eval"):
        harness.main(harness.Config(model="x", tasks=("capitals",)))


@pytest.fixture(scope="module", params=["bos_added", "nothing_added"])
def export(request, tmp_path_factory):
    """A tiny model with a chat template, as a folder that `transformers` opens, too. Its tokenizer puts BOS before a text by itself, or, as
    SmolLM2's, has one and does not."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = Tokenizer.train(["The capital of France is Paris, of Peru Lima.\n" * 5, "def f(x):\n    return x + 1\n" * 20], 330)
    tokenizer.chat_templates["default"] = TEMPLATE
    lm.save_pretrained(tiny("qwen3", vocab=tokenizer.vocab_size), folder)
    tokenizer.save(folder, model_max_length=64)
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<|bos|>" if request.param == "bos_added" else "<|im_start|>"
    special = [(bos, core.token_to_id(bos))]
    core.post_processor = tokenizers.processors.TemplateProcessing(f"{bos} $A" if request.param == "bos_added" else "$A", "$A $B", special)
    core.save(str(folder / "tokenizer.json"))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"bos_token": bos}))
    return folder


@pytest.fixture(scope="module")
def ours(export):
    pytest.importorskip("lm_eval")
    from recipes.harness_model import ZmajLM

    return ZmajLM(str(export), dtype="float32", max_gen_toks=10)


@pytest.fixture(scope="module")
def theirs(export):
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=str(export), dtype="float32", device="cpu", batch_size=2)


def asked(*arguments) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each, task_name="") for each in arguments]


PAIRS = [
    ("The capital of Peru is", " Lima"),
    ("The capital of Peru is", " Paris, France"),
    ("The capital of Peru is ", "Lima"),
    ("", "The capital"),
    ("def f(x):\n    return x + 1\n" * 5, "def f(x):"),  # longer than the context: its beginning is lost
    ("<|im_start|>user\nHi<|im_end|>\n", "Lima"),
]


@pytest.mark.parity
def test_log_likelihoods_are_those_of_hf(ours, theirs) -> None:
    found, expected = ours.loglikelihood(asked(*PAIRS)), theirs.loglikelihood(asked(*PAIRS))
    assert np.allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parity
def test_rolling_log_likelihoods_are_those_of_hf(ours, theirs) -> None:
    texts = asked(*((text,) for text in TEXTS))
    assert np.allclose(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), atol=2e-3)


@pytest.mark.parity
def test_answers_are_those_of_hf(ours, theirs) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    prompts = asked(("The capital of Peru is", settings), ("def f(", settings), ("The", settings | {"until": ["."], "max_gen_toks": 5}))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


@pytest.mark.parity
def test_chat_prompts_are_those_of_hf(ours, theirs) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Answer:"}]
    assert ours.apply_chat_template(talk[:1]) == theirs.apply_chat_template(talk[:1])
    assert ours.apply_chat_template(talk, add_generation_prompt=False) == theirs.apply_chat_template(talk, add_generation_prompt=False)
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parity
def test_log_likelihoods_are_those_of_the_evaluation_recipe(ours, export) -> None:
    words = Words(Tokenizer.load(export))
    requests = [words.request(context, continuation) for context, continuation in PAIRS[:3]]
    plan = RequestPlan(requests, batch_tokens=512)
    found = Scorer(ours.model, ours.flight, ours.ops)(plan[0])
    expected = [value for value, _ in ours.loglikelihood(asked(*PAIRS[:3]))]
    assert [found[i].log_likelihood for i in range(3)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parity
def test_local_tasks_run(export, tmp_path, capsys) -> None:
    pytest.importorskip("lm_eval")
    tasks = ("capitals", "capitals_written", "capitals_text")
    config = harness.Config(model=str(export), tasks=tasks, include_path=FOLDER, out=tmp_path / "out.json", dtype="float32")
    results = harness.main(config)["results"]
    assert "|capitals " in capsys.readouterr().out
    assert 0 <= results["capitals"]["acc,none"] <= 1
    assert 0 <= results["capitals_written"]["exact_match,first-word"] <= 1
    assert results["capitals_text"]["bits_per_byte,none"] == pytest.approx(math.log2(results["capitals_text"]["byte_perplexity,none"]))
    assert (tmp_path / "out.json").is_file()
    in_conversation = harness.main(harness.Config(model=str(export), tasks=tasks[:1], include_path=FOLDER, chat_template=True, shots=2))
    assert in_conversation["n-shot"]["capitals"] == 2
    with pytest.raises(ValueError, match="lm-eval has no task nowhere nor in"):
        harness.main(harness.Config(model=str(export), tasks=("nowhere",), include_path=FOLDER))
