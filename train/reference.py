"""Logits by `transformers`. It stands alone, on torch, transformers and numpy, so that another interpreter can run it as a program:

    python - FOLDER TOKENS.npy LOGITS.npz < train/reference.py

`train.parity` calls it, in this interpreter or in that one.
"""

import sys
from importlib import metadata
from typing import Any

import numpy as np


def logits_of(folder: str, tokens: np.ndarray) -> tuple[str, Any]:
    """Name and version, and the fp32 logits `[places, vocab]` of the model in a folder, which is all it reads."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
    return f"transformers {metadata.version('transformers')}", logits


if __name__ == "__main__":
    folder, given, found = sys.argv[1:]
    name, logits = logits_of(folder, np.load(given))
    np.savez(found, name=name, logits=logits)
