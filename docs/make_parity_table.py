"""The table of docs/families.md: each family's tiny golden models, our logits beside those `transformers` computed.

uv run python docs/make_parity_table.py
"""

from lm.models import ARCHITECTURES, NATIVE
from recipes.convert import golden_comparisons


def main() -> None:
    print("| `model_type` | cases | logits up to | largest difference | mean difference | same likeliest token | KL, nats |")
    print("|---|---|---|---|---|---|---|")
    for family in sorted(ARCHITECTURES.keys() - NATIVE):
        found = golden_comparisons(family)
        largest, worst = max(each.largest_logit for each in found), max(each.max_difference for each in found)
        mean = sum(each.mean_difference for each in found) / len(found)
        same = min(each.top1_agreement for each in found)
        kl = max(each.kl for each in found)
        print(f"| {family} | {len(found)} | {largest:.1f} | {worst:.1e} | {mean:.1e} | {same:.0%} | {kl:.0e} |", flush=True)


if __name__ == "__main__":
    main()
