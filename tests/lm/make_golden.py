"""Make `golden/`: what `transformers` computes for tiny models of every family, in every branch.

    pip install torch transformers        # or: uv sync --extra parity
    python tests/lm/make_golden.py            # all families
    python tests/lm/make_golden.py llama      # some

A family's cases stand in `golden/<model_type>.json`, a name and the keys of `config.json` for each; the sizes below hold where a case says
nothing. For each case `golden/<model_type>.npz` gets the whole `config.json` as `transformers` writes it, the names and shapes of its
tensors as `save_pretrained` writes them, tokens, and logits. The weights are drawn by name (`golden_weights.py`) and not kept.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden_weights import draw

GOLDEN = Path(__file__).parent / "golden"

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
SEQ = 17


def tensors_of(folder: Path) -> dict[str, list[int]]:
    """Name and shape of all that lies in a folder's safetensors."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return shapes


def compute(model_type: str, given: dict) -> dict[str, np.ndarray]:
    """One case: the file is written by `transformers`, its tensors are replaced by drawn ones, and it is loaded again from there."""
    kind = type(transformers.AutoConfig.for_model(model_type))
    known = vars(transformers.AutoConfig.for_model(model_type))
    sizes = {name: value for name, value in SIZES.items() if name in known or name in getattr(kind, "attribute_map", {})}
    config = kind(**(sizes | given))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
        shapes = tensors_of(folder)
        assert len(list(folder.glob("*.safetensors"))) == 1
        save_file({key: draw(key, tuple(shape)) for key, shape in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        # Eager: the plain formula, whatever faster attention would round otherwise.
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, SEQ))
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits.numpy()
        written = json.loads((folder / "config.json").read_text())
    print(f"{model_type}: {given}: {sum(np.prod(s) for s in shapes.values())} parameters, logits up to {np.abs(logits).max():.1f}")
    return {
        "config": np.array(json.dumps(written)),
        "shapes": np.array(json.dumps(shapes)),
        "tokens": tokens.astype(np.int32),
        "logits": logits,
    }


def mxfp4() -> dict[str, np.ndarray]:
    """Every byte and a few scales, and what they mean to `transformers`."""
    blocks = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(2, 2, 4, 16)
    scales = np.arange(20, 240, 14, dtype=np.uint8).reshape(2, 2, 4)
    numbers = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    return {"blocks": blocks, "scales": scales, "numbers": numbers.numpy()}


def main(families: list[str]) -> None:
    if not families or "gpt_oss" in families:
        np.savez_compressed(GOLDEN / "mxfp4.npz", **mxfp4())
    for cases in sorted(GOLDEN.glob("*.json")):
        if families and cases.stem not in families:
            continue
        found = {}
        for name, given in json.loads(cases.read_text()).items():
            found |= {f"{name}.{what}": array for what, array in compute(cases.stem, given).items()}
        np.savez_compressed(cases.with_suffix(".npz"), **found)
    print("transformers", transformers.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
