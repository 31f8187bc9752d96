"""The rules of IFEval's instructions, a function each: `rule(answer, **what the prompt asked for) -> bool`.

They follow the paper's released checks (google-research/instruction_following_eval) in what they accept, with two simplifications:
words are runs of letters, digits and apostrophes, and sentences end at `.`, `!` or `?` before a space, where the original asks NLTK. Counts
at the edge of such a definition can differ by one.
"""

import json
import re
from collections.abc import Callable, Sequence

_RELATIONS = {"less than": lambda n, bound: n < bound, "at least": lambda n, bound: n >= bound}
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _holds(count: int, relation: str, bound: int) -> bool:
    if relation not in _RELATIONS:
        raise ValueError(f"a relation is 'less than' or 'at least', got {relation!r}")
    return _RELATIONS[relation](count, bound)


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text)


def sentences(text: str) -> list[str]:
    """Pieces that end in . ! or ? before a space or the end, common abbreviations and single letters apart."""
    kept = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|e\.g|i\.e|etc|[A-Z])\.(?=\s)", lambda found: found[0][:-1] + "·", text)
    return [piece for piece in re.split(r"(?<=[.!?])[\"'”’)]*\s+", kept.strip()) if re.search(r"\w", piece)]


def _found(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


# ------------------------------------------------------------------------------------------- words and letters


def keywords(answer: str, keywords: Sequence[str]) -> bool:
    return all(_found(re.escape(word), answer) for word in keywords)


def forbidden_words(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_found(rf"\b{re.escape(word)}\b", answer) for word in forbidden_words)


def keyword_frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(_found(re.escape(keyword), answer), relation, frequency)


def letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(answer.lower().count(letter.lower()), let_relation, let_frequency)


def capital_words(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(sum(word.isupper() for word in words(answer)), capital_relation, capital_frequency)


def no_comma(answer: str) -> bool:
    return "," not in answer


def all_lowercase(answer: str) -> bool:
    """The original also asks a language detector for English."""
    return answer == answer.lower() and any(c.isalpha() for c in answer)


def all_capitals(answer: str) -> bool:
    return answer == answer.upper() and any(c.isalpha() for c in answer)


# ------------------------------------------------------------------------------------------- lengths


def number_words(answer: str, num_words: int, relation: str) -> bool:
    return _holds(len(words(answer)), relation, num_words)


def number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _holds(len(sentences(answer)), relation, num_sentences)


def number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs stand apart by `***`; an empty one at either end is not counted, one in the middle is a mistake."""
    pieces = re.split(r"\s?\*\*\*\s?", answer)
    if any(not piece.strip() for piece in pieces[1:-1]):
        return False
    return sum(bool(piece.strip()) for piece in pieces) == num_paragraphs


def nth_paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand apart by two line breaks."""
    pieces = [piece.strip() for piece in re.split(r"\n\n", answer) if piece.strip()]
    if len(pieces) != num_paragraphs or nth_paragraph > len(pieces):
        return False
    first = re.match(r"['\"]*([^\s.,?!'\"]*)", pieces[nth_paragraph - 1])
    return first is not None and first[1].lower() == first_word.lower()


# ------------------------------------------------------------------------------------------- form


def placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def postscript(answer: str, postscript_marker: str) -> bool:
    letters = [re.escape(letter) for letter in re.sub(r"[^A-Za-z]", "", postscript_marker)]
    return re.search(r"(?:^|\n)\s*" + r"\.?\s?".join(letters) + r"\.?.*", answer, re.IGNORECASE) is not None


def bullet_lists(answer: str, num_bullets: int) -> bool:
    """Lines that begin with `*` (but not `**`) or `-`: exactly so many."""
    return len(re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def highlighted_sections(answer: str, num_highlights: int) -> bool:
    single = [found for found in re.findall(r"\*[^\n\*]*\*", answer) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n\*]*\*\*", answer) if found.removeprefix("**").removesuffix("**").strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", answer)) - 1 >= num_sections


def title(answer: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", answer))


def json_format(answer: str) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def constrained_response(answer: str) -> bool:
    return any(choice in answer for choice in _CONSTRAINED)


# ------------------------------------------------------------------------------------------- beginning, end, combinations


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def end_phrase(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(answer: str) -> bool:
    """Two answers that differ, apart by six asterisks."""
    pieces = answer.split("******")
    if any(not piece.strip() for piece in pieces[1:-1]):
        return False
    said = [piece.strip() for piece in pieces if piece.strip()]
    return len(said) == 2 and said[0] != said[1]


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords,
    "keywords:forbidden_words": forbidden_words,
    "keywords:frequency": keyword_frequency,
    "keywords:letter_frequency": letter_frequency,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_lowercase": all_lowercase,
    "change_case:english_capital": all_capitals,
    "punctuation:no_comma": no_comma,
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullet_lists,
    "detectable_format:number_highlighted_sections": highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:title": title,
    "detectable_format:json_format": json_format,
    "detectable_format:constrained_response": constrained_response,
    "startend:quotation": quotation,
    "startend:end_checker": end_phrase,
    "combination:repeat_prompt": repeat_prompt,
    "combination:two_responses": two_responses,
}
