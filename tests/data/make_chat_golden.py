"""What `transformers` makes of the conversations, for each template in `templates/`: writes `golden/chats.json`.

python tests/data/make_chat_golden.py          # needs transformers
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from conversations import CONVERSATIONS  # noqa: E402

NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

# Not a published one: what templates may use beyond those.
FEATURES = (
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'system' %}{% continue %}{% endif %}\n"
    "    {%- generation %}{{ m.content | trim }}{% endgeneration %}\n"
    "{{ {'b': '<&>é', 'a': [1, none, true]} | tojson }}|{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}\n"
    "{%- set ns = namespace(n=1) %}{% set ns.n = ns.n + loop.index %}{{ ns.n }}{{ missing }}{{ dict(a=1).a }}"
    "{{ sep_token is defined }}{{ tools is none }}{{ documents is none }}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{{ eos_token }}"
)


def main() -> None:
    templates = {file.stem: file.read_text(encoding="utf-8") for file in sorted(HERE.glob("templates/*.jinja"))} | {"features": FEATURES}
    golden = {}
    for name, template in templates.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, "x")), chat_template=template, **NAMES)
        golden[name] = {"template": template if name == "features" else f"templates/{name}.jinja", "names": NAMES, "texts": {}}
        for case, (messages, given) in CONVERSATIONS.items():
            golden[name]["texts"][case] = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    (HERE / "golden").mkdir(exist_ok=True)
    (HERE / "golden" / "chats.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
