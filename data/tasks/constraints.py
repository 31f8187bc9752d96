"""One sentence about a thing, under a constraint that a program can check: `Say something about rivers. Write in lowercase letters only.`

A small companion to IFEval (arXiv:2311.07911): its rules (`data.tasks.ifeval_rules`), a single constraint to a prompt, and answers short
enough to be drawn by the thousand. Following a constraint alone would be cheap, a model soon says "ok" to everything, so a problem is
solved only if the answer is also about its thing. Things and words of held-out prompts occur in no training prompt.
"""

import itertools
from typing import Any

import numpy as np

from data.tasks.ifeval_rules import RULES, words
from data.tasks.problems import Problem, Task

FEWEST = 5  # words of an answer that says something

_THINGS = """
rivers bread music winter horses coffee bridges rain books gardens trains mountains football fire sleep glass paper shoes honey
islands clocks cats maps salt soap tea dogs milk stars trees ships bicycles birds cheese cities colors dancing deserts doors
dreams eggs farms fish flowers forests fruit games gold grass hats hospitals houses ice insects kings lakes languages lamps
libraries markets medicine mirrors money moonlight museums newspapers numbers oceans oil onions painting pencils photography
planets poetry potatoes rice roads robots rockets ropes roses running sand schools shadows silver singing snow soup spiders sports
storms sugar summer sunlight swimming teachers telephones theaters towers toys tractors umbrellas valleys vegetables violins
volcanoes walking water weather wheels whales wind windows wine wolves wood wool writing
"""
_WORDS = """
always never quiet bright simple ancient useful careful slowly together often strong gentle hidden famous early honest modern
patient round silent sudden warm wide young brave calm daily eager fresh grand happy ideal large major noble open plain quick rare
safe tall
"""
_ENDS = (
    "That is all.",
    "The end.",
    "I hope this helps.",
    "Now you know.",
    "Thank you.",
    "Ask me more.",
    "Good luck.",
    "See you soon.",
    "That is my answer.",
    "Have a nice day.",
    "Nothing more to say.",
    "Any other questions?",
)
_ASKED = ("Say something about {thing}.", "Write one sentence about {thing}.", "Tell me a fact about {thing}.")

# What is asked for, the rule it is judged by, what that is told, and an answer. `{word}`, `{end}` and `{thing}` are filled in.
_CONSTRAINTS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("Write in lowercase letters only.", "change_case:english_lowercase", {}, "i often think about {thing} at home"),
    ("Write in capital letters only.", "change_case:english_capital", {}, "I OFTEN THINK ABOUT {THING} AT HOME"),
    ("Put your whole answer in double quotation marks.", "startend:quotation", {}, '"I often think about {thing} at home."'),
    ('Use the word "{word}".', "keywords:existence", {"keywords": ["{word}"]}, "I {word} think about {thing} at home."),
    ('End with the words "{end}"', "startend:end_checker", {"end_phrase": "{end}"}, "I often think about {thing} at home. {end}"),
    (
        "Use fewer than 10 words.",
        "length_constraints:number_words",
        {"num_words": 10, "relation": "less than"},
        "I often think about {thing} at home.",
    ),
    (
        "Give a title in double angular brackets, such as <<a title>>.",
        "detectable_format:title",
        {},
        "<<A thought>> I often think about {thing} at home.",
    ),
    (
        "Write exactly two bullet points that begin with *.",
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* I often think about {thing}.\n* I think so at home.",
    ),
)


def task(held_out_things: int = 40, seed: int = 0) -> Task:
    """Eight constraints on each of 80 things to train on, in three wordings (1,920 problems), and on each of 40 held out (320 problems).

    Rewards: the constraint is followed and the answer is about the thing (the verifier); and each of the two, unweighted.
    """
    rng = np.random.default_rng(seed)
    things, given = [str(t) for t in rng.permutation(_THINGS.split())], [str(w) for w in rng.permutation(_WORDS.split())]
    ends = [str(e) for e in rng.permutation(_ENDS)]
    own = {"words": given[: len(given) // 4], "ends": ends[: len(ends) // 4]}  # of the held-out problems
    rest = {"words": given[len(given) // 4 :], "ends": ends[len(ends) // 4 :]}
    held_out = [_problem(thing, _ASKED[i % 3], c, rng, **own) for i, thing in enumerate(things[:held_out_things]) for c in _CONSTRAINTS]
    train = [
        _problem(thing, asked, c, rng, **rest) for thing, asked, c in itertools.product(things[held_out_things:], _ASKED, _CONSTRAINTS)
    ]
    rewards = {"solved": solved, "followed": followed, "about": about}
    return Task("constraints", train, held_out, rewards, {"solved": 1.0, "followed": 0.0, "about": 0.0}, verifier="solved")


def _problem(
    thing: str, asked: str, constraint: tuple[str, str, dict[str, Any], str], rng: np.random.Generator, *, words: list[str], ends: list[str]
) -> Problem:
    wanted, rule, told, answer = constraint
    filled = {"word": str(rng.choice(words)), "end": str(rng.choice(ends)), "thing": thing, "THING": thing.upper()}

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(each) for each in value]
        return value.format(**filled) if isinstance(value, str) and "{" in value else value

    facts = {"thing": thing, "rule": rule, "told": {name: fill(value) for name, value in told.items()}}
    return Problem(f"{asked.format(thing=thing)} {wanted.format(**filled)}", facts, solution=answer.format(**filled))


def followed(problem: Problem, answer: str) -> float:
    """1 where the constraint is kept."""
    return float(bool(answer.strip()) and RULES[problem.facts["rule"]](answer, **problem.facts["told"]))


def about(problem: Problem, answer: str) -> float:
    """1 for at least five words that name the thing, in the plural or the singular."""
    thing, said = problem.facts["thing"], answer.lower()
    return float(len(words(answer)) >= FEWEST and (thing in said or (thing.endswith("s") and thing[:-1] in said)))


def solved(problem: Problem, answer: str) -> float:
    """1 where the constraint is kept and the answer is about the thing."""
    return followed(problem, answer) * about(problem, answer)
