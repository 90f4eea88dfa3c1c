"""Removes ComfyUI's prompt syntax, so that rewards read only what the picture should show."""

import re
from functools import lru_cache

from comfy.sd1_clip import escape_important, token_weights, unescape_important

from ...guidance.errors import GuidanceError

COMMENT = re.compile(r"/\*[\s\S]*?\*/|//[^\n\r\u2028\u2029]*")
ESCAPED = r"\\(?:[\s\S]|\Z)"
CHOICE = re.compile(rf"{ESCAPED}|\{{(?P<first>(?:{ESCAPED}|[^{{}}|\\])*)(?:\|(?:{ESCAPED}|[^{{}}\\])*)?(?:\}}|\Z)")
"""Matches an escaped letter, or a choice {a|b} without inner choices. An unclosed choice ends with the text."""
NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
BREAK = re.compile(r"(?<![^\s,()])BREAK(?![^\s,()])")
EMBEDDING = re.compile(r"(?<!\S)embedding:\s*[^\s<\[]*?(?=,*(?:[\s<\[]|\Z))")


def prompt_lines(text: str) -> tuple[str, ...]:
    """The prompts of a text, one a line. Raises GuidanceError if there is none."""
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise GuidanceError("There is no prompt: write one on each line.")
    return prompts


@lru_cache(256)
def plain(prompt: str) -> str:
    """The prompt without weights, escapes, comments, LoRAs, BREAK and names of embeddings. Other text is unchanged.

    ComfyUI's parser reads weights and escapes. A choice {a|b} is replaced by its first option: the page picks one at
    random for the positive prompt, and which one is not known here. Raises GuidanceError if parentheses are nested too
    deeply.
    """
    text = BREAK.sub(" ", NETWORK.sub(" ", first_choices(prompt)))
    try:
        segments = token_weights(escape_important(text), 1.0)
    except RecursionError as error:
        raise GuidanceError(
            "The prompt has parentheses in hundreds of parentheses, which ComfyUI cannot read; remove some."
        ) from error
    text = join_segments([EMBEDDING.sub(" ", unescape_important(segment)) for segment, _ in segments])
    return prompt if text == prompt else tidy(text)


def first_choices(prompt: str) -> str:
    """Replace choices by their first option and remove comments, as processDynamicPrompt in ComfyUI_frontend does."""
    text, before = COMMENT.sub("", prompt), None
    while text != before:
        text, before = CHOICE.sub(lambda choice: choice[0] if choice["first"] is None else choice["first"], text), text
    return re.sub(r"\\([{}|])", r"\1", text)


def has_choices(prompt: str) -> bool:
    """Whether the prompt has a choice {a|b}."""
    return re.search(r"(?<!\\)\{[^{}]*\||\|[^{}]*(?<!\\)\}", COMMENT.sub("", prompt)) is not None


def join_segments(segments: list[str]) -> str:
    """Join segments of different weights, with a space where two words would become one."""
    text = ""
    for segment in segments:
        text += " " + segment if text[-1:].isalnum() and segment[:1].isalnum() else segment
    return text


def tidy(text: str) -> str:
    """Remove the spaces and commas that remain around removed parts."""
    return re.sub(r"\s*,(?:\s*,)+|\s+,", ",", re.sub(r"\s+", " ", text)).strip(" ,")
