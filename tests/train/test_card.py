import json

import pytest
import yaml
from hub_state import problems
from huggingface_hub import ModelCard

from train.card import Card, check_evaluations, render
from train.card_training import table
from train.lineage import given
from train.publish import export, files_of, leaks

MODEL = {"model_type": "qwen3", "parameters": 1_066_624, "n_layers": 4, "d_model": 128, "n_heads": 2, "n_kv_heads": 1, "d_ff": 352}
MODEL |= {"vocab": 2048, "context": 256}
STAGE = {
    "stage": "pretrain_small",
    "corpus": {"spec": "hf://owner/texts/train", "kind": "hub", "train_documents": 10, "train_bytes": 1000, "held_out_documents": 2}
    | {"held_out_bytes": 100, "held_out_rule": "sha256(name) % 20 == 0", "empty_documents": 3, "left_out": {}, "sha256": "5" * 64},
    "mixture": {
        "a": {"weight": 0.7, "rows": 1, "tokens": 70, "token_share": 0.69, "epochs": 1.5},
        "b|c": {"weight": 0.3, "rows": 1, "tokens": 31, "token_share": 0.31, "epochs": 0.5},
    },
    "packing": {"packing": "concat", "fill_fraction": 0.999, "documents_cut": 7},
    "tokenizer": {"vocab": 2048, "digest": "d" * 64},
    "steps": 60,
    "tokens": 122_880,
    "settings": {"optimizer": {"name": "muon", "beta1": 0.9}, "frozen": [], "none": None},
    "hardware": {"platform": "gpu", "device_kind": "NVIDIA H100", "device_count": 8},
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
    "commit": "c0ffee",
    "hours": 1.25,
    "results": {"bits_per_byte": 2.46, "xz": 1.57, "tokens_per_s": 14_480.0},
}
EVALUATIONS = {
    "arc easy": {"metric": "accuracy", "value": 0.412, "low": 0.392, "high": 0.432, "n": 2376, "of": "questions", "shots": 0}
    | {"normalisation": "per byte", "metrics": {"not": "shown"}},
    "held-out text": {"metric": "bits per byte", "value": 2.4622},
}
FULL = {
    "repository": "me/mine",
    "evaluations": EVALUATIONS,
    "evidence": {"read_back_equal": True, "words": "passed: compared with transformers 5", "lines": ["128 places, 1.0e-06"]},
    "licence": {"license": "apache-2.0"},
    "base_model": "owner/base",
    "languages": ("en",),
    "pictures": {"loss.png": "Loss"},
    "chat": True,
}


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_takes():
    text = render(Card("mine", MODEL, "float32", [given("owner/base"), STAGE], **FULL))
    assert problems(text) == []
    data = front_matter(text)
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == ("apache-2.0", "transformers", "text-generation")
    assert data["tags"] == ["jax", "equinox", "zmaj-lm", "conversational"]
    assert (data["base_model"], data["base_model_relation"], data["datasets"]) == ("owner/base", "finetune", ["owner/texts"])
    read = ModelCard(text).data.eval_results
    assert {(each.dataset_name, each.metric_type, each.metric_value) for each in read} == {
        ("arc easy", "accuracy", 0.412),
        ("held-out text", "bits-per-byte", 2.4622),
    }


def test_every_part_of_the_record_stands_in_the_card():
    text = render(Card("mine", MODEL, "float32", [given("owner/base"), STAGE], **FULL))
    for line in (
        "| parameters | 1,066,624, stored as float32 |",
        "| heads | 2 (1 for keys and values) |",
        'model = AutoModelForCausalLM.from_pretrained("me/mine")',
        'model = lm.load_pretrained("me/mine")',
        "tokenizer.apply_chat_template(messages",
        "| arc easy | accuracy | 41.2 % | 39.2 % to 43.2 % | 2,376 questions | shots 0, normalisation per byte |",
        "| held-out text | bits per byte | 2.4622 | not known | not known |  |",
        "| xz -9 | 1.5700 |",
        "equal bit for bit",
        "With other implementations: passed: compared with transformers 5.",
        "| 1. given | owner/base: not recorded |  |  |  |  |  |",
        "| 2. pretrain_small | hf://owner/texts/train (hub) | 122,880 | 60 | 8 × NVIDIA H100 | 1.2 | 2.4600 |",
        "| training | 10 documents, 1,000 bytes |",
        "| left out or changed | 3 empty documents |",
        "| b\\|c | 31 | 31.00% | 30.00% | 0.50 |",
        "| optimizer.name | `muon` |",
        "On 8 × NVIDIA H100, 1.2 hours of training, 14,480 tokens/s; python 3.11.7, jax 0.10.2. Commit c0ffee.",
        "![Loss](loss.png)",
    ):
        assert line in text.splitlines() or line in text, line


def test_what_is_not_known_is_said():
    text = render(Card("mine", MODEL, "float32", [given("somewhere")]))
    assert problems(text) == []
    assert "license" not in front_matter(text)
    for words in (
        "made from somewhere, whose making is not recorded here",
        "Not evaluated.",
        "With other implementations: not compared: no independent implementation was at hand.",
        "No licence given: without one, others have no right to use",
        'from_pretrained("this folder")',
    ):
        assert words in text
    assert "Hyper-parameters" not in text


def test_a_warning_stands_at_the_top():
    text = render(Card("mine", MODEL, "float32", [STAGE], note="Training has not ended: step 3 of 9."))
    assert text.split("# mine\n\n")[1].startswith("> **Training has not ended: step 3 of 9.**")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "holds no evaluations: expected an object with a task under each name"),
        ({"arc": {"value": 1}}, "task 'arc' has 'value'; expected at least 'metric' and 'value'"),
        ({"arc": {"metric": "accuracy", "value": "high"}}, "task 'arc' has {'value': 'high'}; expected a name as 'metric' and numbers"),
        ({"arc": {"metric": "accuracy", "value": None}}, "expected a name as 'metric' and numbers"),
    ],
)
def test_scores_of_another_shape_are_told(found, words):
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")):
        check_evaluations(found, "results.json")


def test_a_cell_is_one_line_and_keeps_its_bars():
    assert table(("a", "b"), [("x", "y\n|z"), ("empty", None)]) == ["| a | b |", "| --- | --- |", "| x | y \\|z |"]


def test_an_export_is_whole_and_holds_no_place_of_this_machine(tmp_path):
    from tiny import tiny

    import lm
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" * 9], 270)
    manifest = {
        "corpus": {"spec": f"{tmp_path}/texts", "kind": "folder"},
        "model": {},
        "steps": 1,
        "tokens": 1,
        "sessions": [{"command": ["python", "-m", "recipes.x", "--data", f"{tmp_path}/texts"], "settings": {"data": f"{tmp_path}/texts"}}],
    }
    run = tmp_path / "my_run"
    export(tiny("llama", vocab=270), tokenizer, run / "export", manifest=manifest, results={"bits_per_byte": 2.0, "held_out_bytes": 7})
    assert files_of(run / "export") == [
        *("README.md", "config.json", "generation_config.json", "lineage.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert leaks(run / "export", [], [tmp_path]) == []
    assert json.loads((run / "export" / "lineage.json").read_text())[0]["corpus"]["spec"] == "texts"
    assert "# my_run\n" in (run / "export" / "README.md").read_text()
    assert lm.load_pretrained(run / "export").n_params == tiny("llama", vocab=270).n_params
    (run / "export" / "config.json").write_text(f'"{tmp_path}/x"')
    assert leaks(run / "export", [], [tmp_path]) == [f"config.json: {tmp_path}"]
