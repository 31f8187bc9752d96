"""Against `transformers` itself, where it is installed: `uv run --extra parity pytest -m parity`."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny

from data.tokenizer import Tokenizer
from train.publish import export

pytestmark = pytest.mark.parity

MANIFEST = {
    "corpus": {"train_bytes": 1, "kind": "text", "train_documents": 1, "sha256": "0"},
    "model": {"parameters": 1, "model_type": "x", "context": 64, "vocab": 97}
    | {"n_layers": 3, "d_model": 24, "n_heads": 6, "n_kv_heads": 2, "d_ff": 40},
    "sessions": [{"device": {"device_kind": "cpu"}}],
    "tokens": 1,
    "steps": 1,
    "seed": 0,
}  # fmt: skip
RESULTS = {"held_out_bytes": 1, "bits_per_byte": 1.0, "xz": 1.0, "xz_primed": 1.0}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_an_export_loads_without_custom_code_and_computes_the_same(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 20, "import os\n"], 300)
    model = tiny(name, vocab=tokenizer.vocab_size)
    export(model, tokenizer, tmp_path, manifest=MANIFEST, results=RESULTS)

    theirs, problems = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (2, 31))
    with torch.no_grad():
        expected = theirs.float()(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens, jnp.int32)), expected, atol=1e-4)

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return 'é' + str(2026)  # <|eos|>x"
    assert their_tokenizer(text.replace("<|eos|>", ""))["input_ids"] == tokenizer.encode_prompt(text.replace("<|eos|>", "")).tolist()
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    prompt = torch.tensor(their_tokenizer(["def "])["input_ids"])
    assert prompt[0, 0] == tokenizer.bos_id
    import lm

    drawn = theirs.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12)[0, prompt.shape[1] :].tolist()
    assert drawn == lm.generate(model, [prompt[0].tolist()], max_new_tokens=12)[0]
