"""The other side of `recipes.benchmark`: the same model in plain PyTorch, as a user would write it, in the same protocol.

Run by path, not with `-m`, so that its process keeps PyTorch's own settings. RMSNorm, RoPE, SwiGLU, fused QKV and gate-up, no biases, tied
head, `F.scaled_dot_product_attention` (causal, and no document mask: that is less work than ours), bf16 autocast, fused AdamW, gradient
norm and clipping, `torch.compile` in its default mode or none.
"""

import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, d_ff: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm, self.mlp_norm = nn.RMSNorm(d_model, eps=1e-6), nn.RMSNorm(d_model, eps=1e-6)
        self.qkv, self.o = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.gate_up, self.down = nn.Linear(d_model, 2 * d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, seq, d_model = x.shape
        q, k, v = self.qkv(self.attn_norm(x)).view(batch, seq, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, seq, d_model))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self, vocab: int, d_model: int, n_layers: int, n_heads: int, d_ff: int, seq: int, **_: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, d_ff) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        nn.init.normal_(self.embed.weight, std=0.02)
        width = d_model // n_heads
        angles = torch.outer(torch.arange(seq), 10_000.0 ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def decode(spec: dict) -> None:
    """`transformers` on the same checkpoint: prefill, then greedy `generate`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"])).eval()
    tokens = torch.randint(0, model.config.vocab_size, (spec["sequences"], spec["prompt"]))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": torch.ones_like(tokens)}

    def timed(new: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(tokens, max_new_tokens=new, min_new_tokens=new, **options)
        assert out.shape[1] == spec["prompt"] + new
        return time.perf_counter() - begin

    timed(2)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        prefill_s = timed(1)
        print(json.dumps({"prefill_s": prefill_s, "decode_s": timed(1 + spec["new"]) - prefill_s}), flush=True)


def train(spec: dict) -> None:
    torch.manual_seed(0)
    size = spec["size"]
    model = Decoder(**size)
    tokens = torch.randint(0, size["vocab"], (size["batch"], size["seq"] + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if spec["compile"] else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    begin = time.perf_counter()
    step()
    facts = {"n_params": sum(p.numel() for p in model.parameters()), "first_s": time.perf_counter() - begin, "torch": torch.__version__}
    step()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        times, loss = [], 0.0
        for _ in range(spec["steps"]):
            begin = time.perf_counter()
            loss = step()
            times.append(time.perf_counter() - begin)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": times, "loss": loss, "peak_rss_bytes": peak}), flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"train": train, "decode": decode}[given["kind"]](given)
