"""The other side of `recipes.baseline`: a GPT-2 in plain PyTorch, trained as nanoGPT trains one.

Run by path, not with `-m`, so that its process keeps PyTorch's own settings and needs nothing but torch and numpy. Learned positions,
LayerNorm, GELU, no biases (as nanoGPT's train.py has it), tied head, AdamW (0.9, 0.95, decay 0.1 on matrices), warm-up and cosine to a
tenth, gradient norm clipped at 1, rows cut at random from the stream of all documents, `F.scaled_dot_product_attention`, `torch.compile`
where asked.

It is told everything in one JSON argument and says one JSON object a line: `progress` now and then, last the `result`.
"""

import json
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm, self.mlp_norm = LayerNorm(d_model), LayerNorm(d_model)
        self.qkv, self.attn_out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.up, self.mlp_out = nn.Linear(d_model, 4 * d_model, bias=False), nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, d_model = x.shape
        q, k, v = self.qkv(self.attn_norm(x)).view(batch, seq, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(batch, seq, d_model))
        return x + self.mlp_out(F.gelu(self.up(self.mlp_norm(x))))


class GPT2(nn.Module):
    def __init__(self, vocab: int, d_model: int, n_layers: int, n_heads: int, seq: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab, d_model), nn.Embedding(seq, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.norm = LayerNorm(d_model)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if name.endswith("_out.weight") else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats of each target, `[batch, seq]`."""
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.embed.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """nanoGPT's: a line up, half a cosine down to a tenth."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    gone = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * gone)))


def say(kind: str, **values: float | int | str | list[float]) -> None:
    print(json.dumps({"kind": kind, **values}), flush=True)


def main(spec: dict) -> None:
    torch.manual_seed(spec["seed"])
    if spec["threads"] is not None:
        torch.set_num_threads(spec["threads"])
    stream = np.memmap(spec["tokens"], spec["dtype"], mode="r")
    size, batch, seq = spec["size"], spec["batch"], spec["size"]["seq"]
    model = GPT2(**size)
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    others = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=spec["rate"], betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if spec["compile"] else model
    rng = np.random.default_rng(spec["seed"])
    autocast = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": spec["products"] == "bfloat16"}

    def rows() -> tuple[torch.Tensor, torch.Tensor]:
        starts = rng.integers(0, len(stream) - seq - 1, batch)
        cut = torch.from_numpy(np.stack([stream[start : start + seq + 1] for start in starts]).astype(np.int64))
        return cut[:, :-1], cut[:, 1:]

    losses, times = [], []
    begin = time.perf_counter()
    for step in range(spec["steps"]):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, spec["steps"], spec["rate"], spec["warmup"])
        tokens, targets = rows()
        with torch.autocast(**autocast):
            loss = forward(tokens, targets).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
        if step % 10 == 9 or step + 1 == spec["steps"]:
            say("progress", done=step + 1, loss=losses[-1])
    train_s = time.perf_counter() - begin

    # Every held-out document alone, in the windows that `recipes.trial` uses: one a row, padded behind, where nothing looks.
    with np.load(spec["held_out"]) as held_out:
        windows = {name: held_out[name] for name in ("tokens", "targets", "weights", "document")}
    nats = np.zeros(int(windows["document"].max()) + 1)
    model.eval()
    with torch.inference_mode(), torch.autocast(**autocast):
        for at in range(0, len(windows["tokens"]), 2 * batch):
            cut = slice(at, at + 2 * batch)
            tokens, targets = (torch.from_numpy(windows[name][cut].astype(np.int64)) for name in ("tokens", "targets"))
            of_rows = (model(tokens, targets).double().numpy() * windows["weights"][cut]).sum(axis=1)
            np.add.at(nats, windows["document"][cut], of_rows)
    tenth = losses[-max(1, len(losses) // 10) :]
    say(
        "result",
        nats=nats.tolist(),
        parameters=sum(weight.numel() for weight in model.parameters()),
        steps=len(losses),
        tokens=len(losses) * batch * seq,
        last_loss=sum(tenth) / len(tenth),
        step_s=float(np.median(times[1:] or times)),
        fast_step_s=float(np.quantile(times[1:] or times, 0.1)),
        train_s=train_s,
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
