"""A prompt as rewards read it: what the picture should show, without the syntax that is meant for ComfyUI."""

import re
from functools import lru_cache

from comfy.sd1_clip import escape_important, token_weights, unescape_important

from ...guidance.errors import GuidanceError

COMMENT = re.compile(r"/\*[\s\S]*?\*/|//[^\n\r\u2028\u2029]*")
ESCAPED = r"\\(?:[\s\S]|\Z)"
CHOICE = re.compile(rf"{ESCAPED}|\{{(?P<first>(?:{ESCAPED}|[^{{}}|\\])*)(?:\|(?:{ESCAPED}|[^{{}}\\])*)?(?:\}}|\Z)")
"""An escaped letter, or a choice {a|b} with none inside. A choice that is not closed ends with the text."""
NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
BREAK = re.compile(r"(?<![^\s,()])BREAK(?![^\s,()])")
EMBEDDING = re.compile(r"(?<!\S)embedding:\s*[^\s<\[]*?(?=,*(?:[\s<\[]|\Z))")


@lru_cache(256)
def plain(prompt: str) -> str:
    """The text without weights, escapes, comments, LoRAs, BREAK and names of embeddings. Without these it stays as it is.

    ComfyUI's own parser reads weights and escapes. Of a choice {a|b} the first is read: the page has drawn one for the
    positive prompt, and which it was is not known here. Raises GuidanceError where parentheses are nested too deeply.
    """
    text = BREAK.sub(" ", NETWORK.sub(" ", chosen(prompt)))
    try:
        segments = token_weights(escape_important(text), 1.0)
    except RecursionError as error:
        raise GuidanceError(
            "The prompt has parentheses in hundreds of parentheses, which ComfyUI cannot read; remove some."
        ) from error
    text = apart([EMBEDDING.sub(" ", unescape_important(segment)) for segment, _ in segments])
    return prompt if text == prompt else tidy(text)


def chosen(prompt: str) -> str:
    """The first of every choice, and no comments: as the page does it (processDynamicPrompt in ComfyUI_frontend)."""
    text, before = COMMENT.sub("", prompt), None
    while text != before:
        text, before = CHOICE.sub(lambda choice: choice[0] if choice["first"] is None else choice["first"], text), text
    return re.sub(r"\\([{}|])", r"\1", text)


def leaves_open(prompt: str) -> bool:
    """Whether there is a choice between several texts."""
    return re.search(r"(?<!\\)\{[^{}]*\||\|[^{}]*(?<!\\)\}", COMMENT.sub("", prompt)) is not None


def apart(segments: list[str]) -> str:
    """Segments of different weights as one text. The model reads each alone, so that no word goes on in the next."""
    text = ""
    for segment in segments:
        text += " " + segment if text[-1:].isalnum() and segment[:1].isalnum() else segment
    return text


def tidy(text: str) -> str:
    """Without the spaces and commas that are left around what was taken out."""
    return re.sub(r"\s*,(?:\s*,)+|\s+,", ",", re.sub(r"\s+", " ", text)).strip(" ,")
