"""One model through every stage, each beginning with the folder that the last one left: nothing is converted in between."""

import json

import pytest
from hub_server import serving
from integration.recipe_runs import SMALL, corpus, run

from recipes.loading import load

TOKEN = "hf_" + "chainchainchainchainchain"
QUICK = ["--backend", "reference"]


@pytest.mark.heavy
def test_pretraining_tuning_preferences_rewards_chat_and_the_hub_are_one_chain(tmp_path) -> None:
    """Of lines that a model of a few thousand weights can learn: words, given back backwards."""
    cache, text = tmp_path / "cache", corpus(tmp_path / "text")
    at = {name: tmp_path / name for name in ("base", "chat", "dpo", "rl")}

    def stage(recipe: str, *arguments: object, **more: str) -> str:
        status, output = run([str(argument) for argument in arguments], cache, recipe, **more)
        assert status == 0, f"{recipe}: {output}"
        return output

    talk = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ab"[i % 2]}]} for i in range(80)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    pairs = [{"prompt": f"say {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    stage("pretrain_small", *SMALL, "--data", text, "--steps", 20, "--run-dir", at["base"])
    stage(
        "sft_chat", at["base"], "--data", tmp_path / "talk.jsonl", "--text", text, "--questions", 0, "--steps", 20, "--run-dir", at["chat"]
    )
    stage("dpo", at["chat"], "--data", tmp_path / "pairs.jsonl", "--steps", 10, "--batch", 8, "--seq", 48, *QUICK, "--run-dir", at["dpo"])
    rewards = ["--task", "reversal", "--reward-weights", "letters", "1.0", "--algorithm", "grpo", "--overlong-buffer", 2]
    sizes = ["--steps", 4, "--prompts", 4, "--n", 4, "--max-new-tokens", 8, "--answers", 2, "--validate-rows", 8, "--no-control"]
    stage("grpo_arithmetic", "--model", at["dpo"], "--warm-examples", 0, *rewards, *sizes, *QUICK, "--run-dir", at["rl"])
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "say 3"}) + "\n")
    stage("chat", at["rl"], "--prompts", tmp_path / "asked.jsonl", "--out", tmp_path / "said.jsonl", "--max-new-tokens", 8)
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 1
    with serving(tmp_path / "hub", {TOKEN: ("me", True)}) as hub:
        there = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        stage("publish", at["rl"], "--repo", "me/chain", "--license", "apache-2.0", "--no-measure", **there)

    stages = json.loads((at["rl"] / "export" / "lineage.json").read_text())
    assert [stage["stage"] for stage in stages] == ["pretrain_small", "sft_chat", "dpo", "grpo_arithmetic"]
    tokenizers = {load(at[name])[1].digest for name in ("chat", "dpo", "rl")}
    assert len(tokenizers) == 1
