"""Make `golden/peft.npz`: what `peft` computes with adapters on tiny models of `transformers`, merged into them by its own code.

    pip install torch transformers peft
    python tests/lm/make_peft_golden.py

For each case: the model's `config.json` and the names and shapes of its tensors, the adapter's `adapter_config.json` and the names and
shapes of its tensors as `save_pretrained` writes them, tokens, and the logits before and after the merge. Numbers are drawn by name
(`golden_weights.py`) and not kept.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_weights import draw
from make_golden import SEQ, SIZES, tensors_of

GOLDEN = Path(__file__).parent / "golden" / "peft.npz"

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": ("llama", {"r": 5, "lora_alpha": 11, "target_modules": LLAMA_LINEARS, "lora_dropout": 0.1}),
    "patterns": (
        "llama",
        {
            "r": 5, "lora_alpha": 11, "target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [0, 2],
            "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.2.self_attn.q_proj": 7},
        },
    ),
    "rslora": ("llama", {"r": 5, "lora_alpha": 11, "target_modules": LLAMA_LINEARS, "use_rslora": True}),
    "dora": ("llama", {"r": 5, "lora_alpha": 11, "target_modules": LLAMA_LINEARS, "use_dora": True}),
    "saved": ("llama", {"r": 5, "lora_alpha": 11, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "conv1d": ("gpt2", {"r": 5, "lora_alpha": 11, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "conv1d_dora": ("gpt2", {"r": 5, "lora_alpha": 11, "target_modules": ["c_attn", "c_fc"], "use_dora": True}),
}  # fmt: skip


def tiny_model(model_type: str, folder: Path) -> transformers.PreTrainedModel:
    """A model with drawn weights, by way of its files."""
    kind = type(transformers.AutoConfig.for_model(model_type))
    known = vars(transformers.AutoConfig.for_model(model_type))
    sizes = {name: value for name, value in SIZES.items() if name in known or name in getattr(kind, "attribute_map", {})}
    transformers.AutoModelForCausalLM.from_config(kind(**sizes)).float().save_pretrained(folder)
    drawn = {key: draw(key, tuple(shape)) for key, shape in tensors_of(folder).items()}
    save_file(drawn, folder / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def compute(model_type: str, settings: dict) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as name:
        base, adapter = Path(name) / "base", Path(name) / "adapter"
        model = tiny_model(model_type, base)
        shapes = tensors_of(base)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        model.save_pretrained(adapter)
        adapter_shapes = {key: list(array.shape) for key, array in load_file(adapter / "adapter_model.safetensors").items()}
        drawn = {key: draw(key, tuple(shape)) for key, shape in adapter_shapes.items()}
        save_file(drawn, adapter / "adapter_model.safetensors", metadata={"format": "pt"})

        model = peft.PeftModel.from_pretrained(tiny_model(model_type, base), adapter).eval()
        tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (1, SEQ))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
            merged = model.merge_and_unload()(torch.from_numpy(tokens)).logits.numpy()
        print(f"{model_type} {settings}: merged differs by {np.abs(merged - logits).max():.1e} of {np.abs(logits).max():.1f}")
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": f"tiny-{model_type}"}
        return {
            "config": np.array((base / "config.json").read_text()),
            "shapes": np.array(json.dumps(shapes)),
            "adapter_config": np.array(json.dumps(config)),
            "adapter_shapes": np.array(json.dumps(adapter_shapes)),
            "tokens": tokens.astype(np.int32),
            "logits": logits,
            "merged": merged,
        }


if __name__ == "__main__":
    found = {f"{case}.{what}": array for case, given in CASES.items() for what, array in compute(*given).items()}
    np.savez_compressed(GOLDEN, **found)
    print("peft", peft.__version__, "transformers", transformers.__version__)
