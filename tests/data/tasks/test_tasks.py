"""Each scorer knows right, wrong and nonsensical answers apart."""

import importlib.util
import re

import pytest

from data.tasks import arithmetic, calculator, constraints, countdown, formats, gsm8k, ifeval, letters, reasoning
from data.tasks.ifeval_rules import RULES
from data.tasks.problems import Problem, score


def test_no_held_out_operand_occurs_in_any_training_prompt() -> None:
    made = arithmetic.task()
    numbers = [{int(x) for p in part for x in re.findall(r"\d+", p.prompt)} for part in (made.train, made.held_out)]
    assert [len(n) for n in numbers] == [74, 16]
    assert not numbers[0] & numbers[1]
    assert (len(made.train), len(made.held_out)) == (74 * 74 * 2, 512)


@pytest.mark.parametrize(
    ("answer", "worth"),
    [("85", 1), (" 85 ", 1), ("085", 1), ("86", 0), ("-85", 0), ("8 5", 0), ("85.", 0), ("47+38=85", 0), ("", 0), ("٨٥", 0)],
)
def test_arithmetic(answer: str, worth: float) -> None:
    assert arithmetic.correct(arithmetic.problem(47, "+", 38), answer) == worth


def test_differences_may_be_negative() -> None:
    assert arithmetic.correct(arithmetic.problem(47, "-", 83), "-36") == 1
    assert arithmetic.correct(arithmetic.problem(47, "-", 83), "36") == 0


GSM8K = {"question": "How many?", "answer": "12/60 = $<<12/60=0.2>>0.2.\nSo 1,080.\n#### 1,080"}


@pytest.mark.parametrize(
    ("answer", "correct", "last"),
    [
        ("It is 1080.\n#### 1080", 1, 1),
        ("#### 1,080", 1, 1),
        ("#### 1080 and #### 7", 1, 0),  # the first one counts, as in the paper's code
        ("#### 1080.0", 0, 1),
        ("The answer is $1,080.", 0, 1),
        ("#### 1081", 0, 0),
        ("1080 apples and 3 pears", 0, 0),
        ("####1080", 0, 1),
        ("", 0, 0),
        ("#### ,", 0, 0),
        ("banana 1.2.3", 0, 0),
    ],
)
def test_gsm8k(answer: str, correct: float, last: float) -> None:
    problem = gsm8k.problem(GSM8K)
    assert (gsm8k.correct(problem, answer), gsm8k.last_number(problem, answer)) == (correct, last)


def test_gsm8k_solutions_are_right_and_without_notes() -> None:
    made = gsm8k.task([GSM8K], [GSM8K])
    assert made.train[0].solution == "12/60 = $0.2.\nSo 1,080.\n#### 1,080"
    assert score(made, made.train, [made.train[0].solution]).solved.all()
    with pytest.raises(ValueError, match="no '#### number'"):
        gsm8k.problem({"question": "?", "answer": "72"})


@pytest.mark.parametrize(
    ("answer", "correct", "form"),
    [
        ("25+3*7", 1, 1),
        ("(7*3)+25", 1, 1),
        ("25+3+7", 0, 1),
        ("25+21", 0, 0),  # not these numbers
        ("46", 0, 0),
        ("25+3*7+0", 0, 0),
        ("3*7+25=46", 0, 0),
        ("25/(3-3)*7", 0, 0),
        ("__import__('os')", 0, 0),
        ("3**7**25", 0, 0),
        ("9" * 300, 0, 0),
        ("(" * 150, 0, 0),
        ("True+3*7", 0, 0),
        ("banana", 0, 0),
    ],
)
def test_countdown(answer: str, correct: float, form: float) -> None:
    problem = Problem("3 7 25 -> 46:", {"numbers": [3, 7, 25], "target": 46})
    assert (countdown.correct(problem, answer), countdown.form(problem, answer)) == (correct, form)


def test_countdown_is_exact_where_floats_are_not() -> None:
    problem = Problem("", {"numbers": [1, 3, 3], "target": 1})
    assert countdown.correct(problem, "1/3*3") == 1


def test_letters() -> None:
    word, count = Problem("", {"answer": "repmal"}), Problem("", {"answer": "3"})
    assert letters.correct(word, "repmal\n") == 1
    assert [letters.correct(word, wrong) for wrong in ("lamper", "Repmal", "repma", "", "repmal repmal")] == [0] * 5
    assert letters.letters(word, "repnal") == pytest.approx(5 / 6)
    assert letters.letters(word, "repmalrepmal") == pytest.approx(1 / 2)
    assert [letters.correct(count, answer) for answer in ("3", "three", "33", "")] == [1, 0, 0, 0]
    for problem in letters.counting(64).train[:50]:
        letter, _, word = problem.prompt.removeprefix("count: ").rstrip("=").partition(" in ")
        assert problem.facts["answer"] == str(sum(one == letter for one in word))


def test_the_calculator() -> None:
    problem = calculator.problem(23, 47, 5)
    assert problem.solution == "23*47+5<|tool|>=1086;1086"
    answers = {"23*47+5<|tool|>=1086;1086": (1, 1), "1086": (1, 0), "23*47+5<|tool|>=1086;": (0, 1), "7<|tool|>=error;1086": (1, 0)}
    answers |= {"23*47+5<|tool|>=1086;1085": (0, 1), "banana": (0, 0), "": (0, 0), "=1086;": (0, 0)}
    assert {a: (calculator.correct(problem, a), calculator.called(problem, a)) for a in answers} == answers
    assert calculator.calculate("2*3+4") == "=10;"
    assert [calculator.calculate(call) for call in ("", "2**9", "__import__", "1+1", "9" * 20 + "*1+1")] == ["=error;"] * 5


def test_formats() -> None:
    none = Problem("")
    good = "<think>so</think>\n<answer>42</answer>"
    assert formats.think_then_answer(none, good) == 1
    for bad in ("<answer>42</answer>", good + "x", "x" + good, good + good, "<think></think><answer>4<answer>2</answer>", "", "banana"):
        assert formats.think_then_answer(none, bad) == 0, bad
    inner = formats.in_answer(lambda p, a: float(a == "42"))
    assert [inner(none, a) for a in (good, good.replace("42", "43"), "42")] == [1, 0, 0]
    assert [formats.matches(r"\d+")(none, a) for a in (" 42 ", "42x", "")] == [1, 0, 0]
    assert formats.unboxed(r"so \boxed{\frac{1}{2}} it is") == r"\frac{1}{2}"
    assert [formats.boxed(none, a) for a in (r"\boxed{1}", r"\boxed{1", r"\boxed{1}\boxed{2}", "1")] == [1, 0, 0, 0]
    is_list = formats.is_json(lambda value: isinstance(value, list))
    assert [is_list(none, a) for a in ("[1]", "```json\n[1]\n```", "{}", "[1", "", "[" * 100_000)] == [1, 1, 0, 0, 0, 0]
    assert [formats.at_most(10)(none, "x" * n) for n in (10, 15, 20, 99)] == [0, -0.5, -1, -1]
    made = formats.with_format(arithmetic.task(), "digits", formats.matches(r"-?\d+"), 0.1)
    assert score(made, made.train[:1], ["7"]).total.tolist() == [0.1]
    with pytest.raises(ValueError, match="has a reward called 'digits' already"):
        formats.with_format(made, "digits", formats.boxed, 1)


# (kind, what was asked, answers that follow it, answers that do not)
IFEVAL = [
    ("keywords:existence", {"keywords": ["mom", "Rain"]}, ["MOM likes rain"], ["mom", "banana"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocket"], ["a Rock."]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, ["war and war"], ["war"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, ["war"], ["war and war"]),
    ("keywords:letter_frequency", {"letter": "t", "let_frequency": 2, "let_relation": "less than"}, ["one T"], ["tT"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 3, "let_relation": "at least"}, ["!!!"], ["!!"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["THIS IS it"],
        ["This Is it", "THIS is"],
    ),
    ("change_case:english_lowercase", {}, ["all small."], ["Not small", "123"]),
    ("change_case:english_capital", {}, ["ALL BIG."], ["Not BIG", "123"]),
    ("punctuation:no_comma", {}, ["no comma."], ["a, b"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two-three"], ["one two", "..."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["One. Two!", "Is it? Yes"], ["Mr. Smith came."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "a***b***"], ["a\n\nb", "a***b***c", "a*** ***b"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        ["a\n\nWeekend, at last", 'a\n\n"weekend" it is'],
        ["weekend\n\na", "a\n\nweekends", "weekend"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] [street]"], ["[name]", "no"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. one more", "Bye\np. s. x"], ["Bye.", "stops"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye.\nP.P.S one more"], ["Bye.\nP.S. one more"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n- b"], ["* a", "* a\n* b\n* c", "**a**\n**b**"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and *b*", "**a** *b*"], ["*a*", "**"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1"],
    ),
    ("detectable_format:title", {}, ["<<A poem>>\nx"], ["<A poem>", "<<>>", "<< >>"]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": 1}\n```'], ["{a: 1}", "banana"]),
    ("detectable_format:constrained_response", {}, ["My answer is maybe."], ["maybe", "my answer is yes"]),
    ("startend:quotation", {}, ['"all of it"'], ['"half', '"']),
    ("startend:end_checker", {"end_phrase": "Is that all?"}, ["So. is that all?", '"Is that all?"'], ["Is that all? No."]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a haiku."}, ["write a haiku. Here:"], ["Here: write a haiku."]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c"]),
]


@pytest.mark.parametrize(("kind", "given", "good", "bad"), IFEVAL)
def test_ifeval(kind: str, given: dict, good: list[str], bad: list[str]) -> None:
    problem = ifeval.problem({"prompt": "", "instruction_id_list": [f"en:{kind}"], "kwargs": [given | {"unused": None}]})
    assert [ifeval.strict(problem, answer) for answer in good] == [1] * len(good)
    assert [ifeval.strict(problem, answer) for answer in bad] == [0] * len(bad)


def test_every_kind_of_instruction_has_a_case() -> None:
    assert {kind for kind, *_ in IFEVAL} == RULES.keys()


def test_loose_forgives_a_first_line_and_asterisks_and_an_empty_answer_follows_nothing() -> None:
    problem = ifeval.problem({"prompt": "", "instruction_id_list": ["startend:quotation", "punctuation:no_comma"], "kwargs": [{}, {}]})
    answer = 'Sure, here it is:\n"**a quotation**"'
    assert (ifeval.strict(problem, answer), ifeval.loose(problem, answer), ifeval.share(problem, answer)) == (0, 1, 0)
    assert (ifeval.strict(problem, ""), ifeval.loose(problem, " \n")) == (0, 0)


def test_what_cannot_be_judged_is_left_out_and_what_is_unknown_refused() -> None:
    language = ifeval.problem({"prompt": "", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "kn"}]})
    assert ifeval.strict(language, "anything") is None
    with pytest.raises(ValueError, match="unknown instructions \\['form:haiku'\\]"):
        ifeval.problem({"prompt": "", "instruction_id_list": ["form:haiku"], "kwargs": [{}]})


needs_the_gym = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs the package reasoning-gym")


@needs_the_gym
def test_reasoning_gym() -> None:
    made = reasoning.task("chain_sum", count=20, held_out=10)
    assert score(made, made.train, [p.solution for p in made.train]).solved.all()
    assert not score(made, made.train, ["banana"] * len(made.train)).solved.any()
    assert reasoning.suspicious(made, made.held_out) == []
    with pytest.raises(ValueError, match="reasoning-gym cannot make 'no_such_task'"):
        reasoning.task("no_such_task")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="the package is there")
def test_without_the_package_it_says_how_to_get_it() -> None:
    with pytest.raises(ImportError, match="uv pip install reasoning-gym"):
        reasoning.task("chain_sum")


def test_a_scorer_that_rewards_nonsense_is_found() -> None:
    made = arithmetic.task()
    fooled = type(made)(**(vars(made) | {"rewards": {"correct": lambda p, a: float("a" in a)}}))
    assert {answer for _, answer, _ in reasoning.suspicious(fooled, fooled.held_out[:3])} == {"banana"}


def about_rivers(place: int) -> Problem:
    """The problem of the constraint at this place, about rivers."""
    return next(
        p
        for p in (t for t in [*constraints.task().train, *constraints.task().held_out] if t.facts["thing"] == "rivers")
        if p.facts["rule"] == constraints._CONSTRAINTS[place][1]
    )


@pytest.mark.parametrize(
    ("place", "answer", "followed", "about"),
    [
        (0, "every river carries water to the sea", 1, 1),
        (0, "Every river carries water to the sea", 0, 1),
        (0, "cats sleep all day long here", 1, 0),
        (0, "rivers", 1, 0),  # too short to say something
        (1, "RIVERS CARRY WATER TO THE SEA", 1, 1),
        (2, '"Rivers carry water to the sea."', 1, 1),
        (2, 'Rivers carry "water" to the sea.', 0, 1),
        (5, "Rivers carry water to the sea.", 1, 1),
        (5, "Rivers carry water to the sea and to the lakes beside it.", 0, 1),
        (6, "<<Rivers>> They carry water to the sea.", 1, 1),
        (6, "<Rivers> They carry water to the sea.", 0, 1),
        (7, "* Rivers carry water.\n* They reach the sea.", 1, 1),
        (7, "* Rivers carry water to the sea.", 0, 1),
        (0, "", 0, 0),
        (7, "]]]]", 0, 0),
    ],
)
def test_constraints(place: int, answer: str, followed: float, about: float) -> None:
    problem = about_rivers(place)
    assert (constraints.followed(problem, answer), constraints.about(problem, answer)) == (followed, about)
    assert constraints.solved(problem, answer) == followed * about


def test_constraints_that_name_words_are_judged_by_those_they_name() -> None:
    keyword, ending = about_rivers(3), about_rivers(4)
    word, end = keyword.facts["told"]["keywords"][0], ending.facts["told"]["end_phrase"]
    assert f'"{word}"' in keyword.prompt
    assert f'"{end}"' in ending.prompt
    assert constraints.solved(keyword, f"Some rivers are {word} and wide.") == 1
    assert constraints.solved(keyword, "Some rivers are deep and wide.") == 0
    assert constraints.solved(ending, f"Some rivers are deep and wide. {end}") == 1
    assert constraints.solved(ending, f"{end} Some rivers are deep and wide.") == 0


def test_things_and_words_of_held_out_prompts_occur_in_no_training_prompt() -> None:
    made = constraints.task()
    assert (len(made.train), len(made.held_out)) == (80 * 3 * 8, 40 * 8)
    for told in (
        lambda p: p.facts["thing"],
        lambda p: p.facts["told"].get("keywords", [None])[0],
        lambda p: p.facts["told"].get("end_phrase"),
    ):
        train, held_out = ({told(p) for p in part} - {None} for part in (made.train, made.held_out))
        assert len(train) > 3
        assert len(held_out) >= 3
        assert not train & held_out
