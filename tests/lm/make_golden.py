"""Make `golden/`: tiny random models written by `transformers`, and the logits it computes for them.

    pip install torch transformers        # or: uv sync --extra parity
    python tests/lm/make_golden.py

`tests/lm/test_golden.py` loads each folder with our code and compares.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}


def llama(rope: dict) -> transformers.LlamaConfig:
    """A base of 50 makes the few pairs of a tiny head turn at speeds on all sides of the kinds' thresholds."""
    return transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=rope | {"rope_theta": 50.0})


MODELS = {
    "llama-untied": transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=False),
    "llama-bias": transformers.LlamaConfig(**SIZES, rms_norm_eps=3e-4, rope_theta=500.0, tie_word_embeddings=True, attention_bias=True),
    "llama-linear": llama({"rope_type": "linear", "factor": 3.0}),
    "llama-llama3": llama(
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    ),
    "llama-yarn": llama({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 1.5, "beta_slow": 0.2}),
    "gpt2": transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=3, n_head=6, n_inner=40, n_positions=64, layer_norm_epsilon=3e-4),
    "qwen3": transformers.Qwen3Config(**SIZES, rms_norm_eps=1e-6, rope_theta=1_000_000.0, tie_word_embeddings=True),
}


def main() -> None:
    folder = Path(__file__).parent / "golden"
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms that are all ones and biases that are zero would hide mistakes
                parameter.add_(0.15 * torch.randn_like(parameter))
            tokens = torch.randint(0, 97, (2, 17))
            logits = model(tokens).logits
        model.save_pretrained(folder / name)
        np.savez(folder / name / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        print(name, sum(p.numel() for p in model.parameters()), "parameters, transformers", transformers.__version__)


if __name__ == "__main__":
    main()
