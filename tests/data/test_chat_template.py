"""Chat templates give the texts that `transformers` gave (`make_chat_golden.py`); what is wrong with one is said in words."""

import json
from pathlib import Path

import pytest
from conversations import CONVERSATIONS, TIME, USER, WEATHER

from data.chat_template import render
from data.tokenizer import Tokenizer

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden" / "chats.json").read_text(encoding="utf-8"))


def template_of(name: str) -> str:
    file = HERE / GOLDEN[name]["template"] if name != "features" else None
    return GOLDEN[name]["template"] if file is None else file.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", GOLDEN)
def test_a_conversation_is_rendered_as_transformers_renders_it(name, case) -> None:
    messages, given = CONVERSATIONS[case]
    assert render({"default": template_of(name)}, messages, **(GOLDEN[name]["names"] | given)) == GOLDEN[name]["texts"][case]


def test_the_golden_texts_are_of_all_templates_and_differ() -> None:
    assert set(GOLDEN) == {"qwen3", "smollm2", "features"}
    texts = GOLDEN["qwen3"]["texts"]
    assert set(texts) == set(CONVERSATIONS)
    assert "<tools>" in texts["tools"]
    assert "Tromsø <N>" in texts["calls"]
    assert texts["not-thinking"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert texts["question-prompt"].endswith("<|im_start|>assistant\n")


def test_tool_use_is_taken_where_there_are_tools() -> None:
    templates = {"default": "plain", "tool_use": "{{ tools | length }} tools"}
    assert render(templates, [USER]) == "plain"
    assert render(templates, [USER], tools=[WEATHER, TIME]) == "2 tools"
    assert render({"default": "plain"}, [USER], tools=[WEATHER]) == "plain"


def test_the_clock_can_be_read() -> None:
    assert render({"default": "{{ strftime_now('%Y') | length }}"}, [USER]) == "4"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", r"refuses this conversation: Roles must alternate"),
        ("{% for m in messages %}", r"is not valid Jinja: .* \(line 1\)"),
        ("{{ style.name }}", r"needs something that is not there: 'style' is undefined. Give it as an argument"),
        ("{{ 'a' + messages }}", r"cannot work with these messages: can only concatenate str"),
        ("{{ messages.append(1) }}", r"refuses this conversation: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", r"refuses this conversation: .*unsafe"),
        ("{% set ns = namespace(__init__=1) %}", r"may not begin with an underscore; got '__init__'"),
    ],
)
def test_what_is_wrong_is_said_in_words(template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        render({"default": template}, [USER])


def test_what_is_not_given_right_is_said_in_words() -> None:
    with pytest.raises(ValueError, match=r"has no chat template: a base model has none.* as chat_template.jinja"):
        render({}, [USER])
    with pytest.raises(ValueError, match=r"none of the chat templates is named 'default': there are rag, tool_use"):
        render({"rag": "x", "tool_use": "y"}, [USER])
    with pytest.raises(ValueError, match=r"needs at least one message; got none"):
        render({"default": "x"}, [])
    with pytest.raises(ValueError, match=r"message 1 is 'Hi': expected an object with role and content"):
        render({"default": "x"}, [USER, "Hi"])
    with pytest.raises(ValueError, match=r"tools are JSON schemas .*; got <function"):
        render({"default": "x"}, [USER], tools=[template_of])
    with pytest.raises(ValueError, match=r"texts, numbers, lists and objects only; got PosixPath"):
        render({"default": "x"}, [{"role": "user", "content": Path("x")}])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Hi there"], 265)


def test_a_template_is_saved_and_loaded_with_its_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ unk_token }}{{ end }}\n\n")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"unk_token": "<|tool|>", "chat_template": "not this one"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    loaded.save(tmp_path / "again")
    for one in (loaded, Tokenizer.load(tmp_path / "again")):
        assert one.render_chat([{"role": "user", "content": "Hi"}], end="!") == "<|bos|>Hi<|tool|>!\n"
        assert one.encode_with_specials(one.render_chat([{"role": "user", "content": "Hi"}])).tolist()[0] == 0
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == (tmp_path / "chat_template.jinja").read_text()
    tokenizer.save(tmp_path / "again")  # has none, and leaves none of another
    assert not (tmp_path / "again" / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer.load(tmp_path / "again").render_chat([USER])


def test_named_templates_are_read_and_written(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert (tmp_path / "again" / "additional_chat_templates" / "tool_use.jinja").read_text() == "with tools"
    again = Tokenizer.load(tmp_path / "again")
    assert (again.render_chat([USER]), again.render_chat([USER], tools=[TIME])) == ("plain", "with tools")
    again.chat_templates = {"../x": "y"}
    with pytest.raises(ValueError, match=r"a chat template is named '../x', which is no name for a file"):
        again.save(tmp_path / "again")


def test_a_config_whose_templates_are_neither_text_nor_list_is_refused(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ["plain"]}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json' is neither a text nor a list of objects with name and template"):
        Tokenizer.load(tmp_path)
