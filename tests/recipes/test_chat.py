"""`recipes.chat`, in process, on a tiny random model with a template of its own."""

import io
import json
import os
import signal
import sys

import pytest
from tiny import tiny

import lm
from data.tokenizer import Tokenizer
from recipes import chat, chat_batch, generating
from recipes.chat_commands import checked
from recipes.conversation import Conversation, turn_ends
from recipes.memory import Memory

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ tail | default('') }}"
)
CONTEXT = 192


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab=300, n_layers=1, context=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer.train(["user assistant system the cat sat on the mat, and the dog ate the log\n" * 9], 300)
    trained.chat_templates = {"default": TEMPLATE}
    return trained


@pytest.fixture(scope="module")
def folders(model, tokenizer, tmp_path_factory):
    """With a template, and without."""
    found = {}
    for name, templates in (("chat", {"default": TEMPLATE}), ("base", {})):
        tokenizer.chat_templates, folder = templates, tmp_path_factory.mktemp(name)
        lm.save_pretrained(model, folder)
        tokenizer.save(folder)
        found[name] = folder
    tokenizer.chat_templates = {"default": TEMPLATE}
    return found


@pytest.fixture
def run(folders, monkeypatch, capsys):
    """The recipe with lines from a pipe: (status, stdout, stderr)."""
    monkeypatch.setattr(generating, "compilation_cache", lambda: None)

    def talk(*lines: str, model: str = "chat", **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        settings = {"max_new_tokens": 8, "temperature": 0.0, "device": "cpu", "weights": "float32"} | settings
        status = chat.main(chat.Config(model=folders[model], **settings))
        return status, *capsys.readouterr()

    return talk


def greedy(model, tokenizer, ids, most=8):
    tokens = lm.generate(model, [ids], max_new_tokens=most, stop_ids=turn_ends(tokenizer, {}))[0]
    return tokenizer.decode(tokens)


def test_replies_are_those_to_the_whole_conversation_and_only_what_is_new_is_read(run, model, tokenizer):
    status, out, err = run("the cat?", "the dog?", system="sat")
    messages = [{"role": "system", "content": "sat"}, {"role": "user", "content": "the cat?"}]
    expected = []
    for text in (None, "the dog?"):
        if text:
            messages += [{"role": "assistant", "content": expected[-1]}, {"role": "user", "content": text}]
        ids = tokenizer.encode_with_specials(tokenizer.render_chat(messages, add_generation_prompt=True))
        expected.append(greedy(model, tokenizer, ids))
    assert (status, out) == (0, "".join(f"{text}\n" for text in expected))
    assert "tokens known" in err
    assert "anew" not in err


def test_commands(run, tmp_path):
    talk = tmp_path / "talk.json"
    lines = [
        "the cat?",
        "the dog?",
        f"/save {talk}",
        "/undo",
        "/tokens",
        "/history",
        f"/load {talk}",
        "/retry",
        "/system on",
        "/reset",
        "/undo",
    ]
    status, out, err = run(*lines, "/set", "/set top-k 3", "/set stop the dog", "/help", "/exit", "never read")
    replies = out.splitlines()
    assert status == 0
    assert json.loads(talk.read_text())["messages"][2] == {"role": "user", "content": "the dog?"}
    assert out.count("\n") >= 3
    assert replies[-1] == replies[-2]  # greedy, and the conversation was loaded as it was
    for words in ("taken back: the dog?", "0 of 2 messages dropped", "[user: the cat?]", "4 messages read from", "system prompt: on"):
        assert words in err
    for words in (
        "all messages are forgotten",
        "there is nothing to take back",
        "temperature 0.0, top_k None",
        "top_k 3",
        "('the', 'dog')",
    ):
        assert words in err
    assert "/retry" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/foo", r"no command /foo: /help lists them all"),
        ("/set warmth 3", "no setting 'warmth': expected one of temperature"),
        ("/set temperature -1", "temperature.*greater than or equal to 0"),
        ("/set temperature", "needs a value"),
        ("/set top_k 1 2", "takes one value"),
        ("/load", "needs the name of a file"),
        ("/load nowhere.json", "No such file"),
        ("/retry", "no message to reply to"),
        ("mat " * 200, r"the message alone would be \d+ tokens; the context of 192 has 184 for them beside a reply of 8"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(run, line, words):
    import re

    status, out, err = run(line, "/tokens")
    assert re.search(f"error: .*{words}", err)
    assert "0 tokens up to the next reply" in err
    assert (status, out) == (1, "")


def test_the_oldest_exchanges_go_when_the_context_is_full_and_the_system_prompt_stays(run, tokenizer):
    status, _, err = run(*["the dog ate the mat and the cat sat on the log, " * 2] * 5, "/history", system="the log")
    assert status == 0
    assert "the context of 192 tokens is full: the oldest 4 messages were dropped, the rest is read anew" in err
    assert err.count("(dropped) user") == 2
    assert "[system: the log]" in err


def test_a_reply_ends_at_a_stop_string_and_what_is_behind_it_is_forgotten(run, model, tokenizer):
    _, whole, _ = run("the cat?", max_new_tokens=12)
    stop = whole[4:6]
    _, out, err = run("the cat?", "the dog?", max_new_tokens=12, stop=(stop,))
    assert out.splitlines()[0] == whole[: whole.index(stop)].splitlines()[0]
    assert f"stop string {stop!r}" in err


def test_a_seed_gives_the_same_replies_and_a_retry_others(run):
    first = run("the cat?", "/retry", temperature=1.0, seed=5)[1]
    assert run("the cat?", "/retry", temperature=1.0, seed=5)[1] == first
    assert run("the cat?", "/retry", temperature=1.0, seed=6)[1] != first
    assert len(set(first.splitlines())) > 1


def test_without_a_template_each_line_is_gone_on_with(run, model, tokenizer):
    status, out, err = run("the cat", "", "the dog", model="base")
    ids = tokenizer.encode_prompt("the cat")
    assert ids[0] == tokenizer.bos_id
    assert status == 0
    assert out.startswith(greedy(model, tokenizer, ids))
    assert "no chat template: it goes on with each text as it stands" in err
    with pytest.raises(ValueError, match="a system prompt needs a chat template"):
        run("x", model="base", system="y")


def test_ctrl_c_stops_the_reply_and_not_the_chat(run, monkeypatch):
    shown = []

    def show(piece):
        shown.append(piece)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "show", show)
    status, _, err = run("the cat?", "/tokens", "the dog?", max_new_tokens=100)
    assert "3 drawn" in err
    assert "· stopped]" in err
    assert "max-new-tokens" in err or "context is full" in err or "· end]" in err  # the second reply
    assert status == 0


def test_a_message_whose_reading_was_stopped_is_taken_back(run, monkeypatch):
    def interrupt(self, ids, *, told, stopped):
        os.kill(os.getpid(), signal.SIGINT)
        stopped()
        return False

    monkeypatch.setattr(Memory, "read", interrupt)
    _, _, err = run("the cat?", "/history")
    assert "stopped while reading, nothing was drawn; the message was taken back" in err
    assert "user:" not in err


def test_a_template_that_rewrites_earlier_turns_is_read_anew_and_it_is_said(model, tokenizer):
    words = []
    talk = Conversation(tokenizer, Memory(model, CONTEXT), words.append)
    draw = chat.Config(model="x", max_new_tokens=4, temperature=0).draw()
    talk.messages.append({"role": "user", "content": "the cat?"})
    talk.reply(draw, lambda piece: None)
    talk.messages[0] = {"role": "user", "content": "the dog?"}
    talk.messages.append({"role": "user", "content": "the log?"})
    talk.reply(draw, lambda piece: None)
    assert len(words) == 1
    assert "the template now writes earlier messages otherwise: from token" in words[0]


def test_a_reply_ends_with_what_the_template_puts_behind_it(tokenizer):
    ends = turn_ends(tokenizer, {})
    assert ends == sorted([tokenizer.eos_id, int(tokenizer.encode_with_specials("<|im_end|>")[0])])


def test_memory_knows_what_it_has_read(model):
    memory = Memory(model, 64)
    assert memory.read([1, 2, 3, 4])
    assert [memory.known(ids) for ids in ([1, 2, 9], [1, 2, 3, 4], [1, 2, 3, 4, 5], [7])] == [2, 3, 4, 0]


# ------------------------------------------------------------------------------------------- a file of prompts

PROMPTS = [
    {"prompt": "the cat"},
    {"prompt": "a dog", "id": "b"},
    {"messages": [{"role": "user", "content": "log"}]},
    {"prompt": "mat " * 200},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n")
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_is_answered_as_each_would_be_alone_and_gone_on_with(run, prompts, model, tokenizer, tmp_path, monkeypatch):
    out, settings = tmp_path / "answers.jsonl", {"prompts": prompts, "temperature": 0.8, "batch": 2}
    status, _, err = run(out=out, **settings)
    found = answers(out)
    assert (status, [answer["line"] for answer in found]) == (1, [1, 2, 3, 4])
    assert "4 lines answered" in err
    assert "1 of them with an error" in err
    assert "the prompt has" in found[3]["error"]
    assert found[1]["id"] == "b"
    assert all(answer["tokens"] <= 8 and answer["stopped_by"] for answer in found[:3])

    # Cut short in the third line, it is gone on with, and comes to the same; the batch is another one.
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]) + '{"line": 3, "mess')
    _, _, err = run(out=out, **settings)
    assert answers(out) == found
    assert "cut short: it is answered again" in err
    assert "2 of 4 are answered" in err

    with pytest.raises(ValueError, match=r"--temperature: the run has 0.8, asked for is 0.3"):
        run(out=out, **(settings | {"temperature": 0.3}))
    prompts.write_text(json.dumps({"prompt": "another"}) + "\n")
    with pytest.raises(ValueError, match="holds an answer to another line 1 than the prompts have now"):
        run(out=out, **settings)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 of .* is not JSON"),
        ('{"text": "x"}', 'with either "prompt" or "messages"'),
        ('{"prompt": 3}', "prompt is 3: expected a text"),
        ('{"messages": []}', "expected a list of messages with at least one"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 0 is .* a role among system, user"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_answered(line, words, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=words):
        list(chat_batch._rows(path))


def test_prompts_and_out_belong_together(tmp_path):
    with pytest.raises(ValueError, match="--prompts and --out belong together"):
        chat.Config(model="x", prompts=tmp_path / "p.jsonl")


def test_a_context_beyond_the_models_is_refused(run):
    with pytest.raises(ValueError, match="--context 500 is more than the 192 tokens"):
        run("x", context=500)


def test_messages_are_checked():
    assert checked([{"role": "user", "content": "x"}], "f") == [{"role": "user", "content": "x"}]
