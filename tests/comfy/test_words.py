"""What users read of a node: its tooltips, its help page, and both in Chinese."""

import json
import os
import re

import pytest
from reward_guidance.tests.harness.environment import CHECKOUT

LOCALES, HELP = CHECKOUT / "locales", CHECKOUT / "nodes" / "web" / "docs"
ENGLISH = LOCALES / "en" / "nodeDefs.json"
LANGUAGES = {"en": lambda node: HELP / f"{node}.md", "zh": lambda node: HELP / node / "zh.md"}
"""Whose help page lies where. The English one is also that of every other language."""
RENEW = "RENEW_SCHEMAS"
ADVICE = f"{ENGLISH} is not what the nodes say. Write it anew with make schemas, then mend the Chinese one."
CONTROL = "control_after_generate"
COST = {"en": "Cost", "zh": "开销"}
"""The heading on a help page, which is followed by what to try when the outcome is not what was wanted."""
COMMON = {"your_own_reward.md"}
"""Of no node."""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
RANGE = re.compile(f"-?{NUMBER.pattern} to -?{NUMBER.pattern}")


def locale(language: str, name: str = "nodeDefs") -> dict:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(info: dict) -> dict[str, tuple[str, dict]]:
    """Name -> type and options."""
    specs = info["input"].get("required", {}) | info["input"].get("optional", {})
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}


def said_by(info: dict) -> dict:
    """A node's own words, in the form of nodeDefs.json."""
    inputs = {}
    for name, (_, options) in inputs_of(info).items():
        inputs[name] = {"name": name, "tooltip": options.get("tooltip", "")}
        if options.get(CONTROL):
            inputs[CONTROL] = {"name": "control after generate"}
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def leaves(words: dict, place: str = "") -> dict[str, str]:
    """Path -> text."""
    found = {}
    for key, value in words.items():
        found |= leaves(value, f"{place}/{key}") if isinstance(value, dict) else {f"{place}/{key}": value}
    return found


def test_english_is_what_the_nodes_say(nodes):
    now = {name: said_by(info) for name, info in nodes.items()}
    if os.environ.get(RENEW):
        ENGLISH.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert locale("en") == now, ADVICE


def test_everything_says_what_it_is(nodes):
    assert [
        place for place, text in leaves({name: said_by(info) for name, info in nodes.items()}).items() if not text
    ] == []
    assert [name for name, info in nodes.items() if not info["search_aliases"]] == []


def ranges(nodes: dict) -> dict[tuple[str, str], list[str]]:
    """Node and input -> the good ranges that its tooltip gives, for every number that is set on the node."""
    return {
        (node, name): RANGE.findall(options["tooltip"])
        for node, info in nodes.items()
        for name, (kind, options) in inputs_of(info).items()
        if kind in ("INT", "FLOAT") and name != "seed" and not options.get("forceInput")
    }


def test_every_number_has_a_good_range(nodes):
    assert {place: found for place, found in ranges(nodes).items() if len(found) != 1} == {}


def values(page: str) -> dict[str, str]:
    """Input -> what a help page says to try."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    return {name: row[2].strip() for row in rows for name in re.findall("`(.+?)`", row[1])}


def test_help_pages_give_the_ranges_of_the_tooltips(nodes):
    tried = {
        (node, name): value
        for node in nodes
        for name, value in values(LANGUAGES["en"](node).read_text(encoding="utf-8")).items()
    }
    given = ranges(nodes)
    assert {
        place: (tried[place], given[place])
        for place in tried.keys() & given.keys()
        if RANGE.findall(tried[place]) != given[place]
    } == {}


def test_every_language_says_to_try_the_same_numbers(nodes):
    for node in nodes:
        pages = [values(place(node).read_text(encoding="utf-8")) for place in LANGUAGES.values()]
        numbers = [{name: NUMBER.findall(value) for name, value in page.items()} for page in pages]
        assert numbers[0] == numbers[1], node


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_help_page_tells_the_cost_and_then_what_to_try(nodes, language):
    headings = {
        node: re.findall("^## (.+)$", LANGUAGES[language](node).read_text(encoding="utf-8"), re.M) for node in nodes
    }
    assert {node: found for node, found in headings.items() if COST[language] not in found[:-1]} == {}


def test_chinese_has_every_word_and_no_other():
    english, chinese = leaves(locale("en")), leaves(locale("zh"))
    assert english.keys() == chinese.keys()
    assert [place for place, text in chinese.items() if not text] == []


def test_chinese_gives_the_same_numbers():
    """So that a range that was changed is changed in both."""
    english, chinese = leaves(locale("en")), leaves(locale("zh"))
    said = {place: [sorted(NUMBER.findall(words[place])) for words in (english, chinese)] for place in english}
    assert {place: both for place, both in said.items() if both[0] != both[1]} == {}


def test_categories_have_names(nodes):
    parts = {part for info in nodes.values() for part in info["category"].split("/")}
    for language in LANGUAGES:
        assert locale(language, "main")["nodeCategories"].keys() == parts


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_can_read_the_locale(language):
    """In its message format, these are syntax."""
    assert [text for text in leaves(locale(language)).values() if re.search(r"[{}|@]", text)] == []


def test_every_node_has_a_help_page_and_every_page_a_node(nodes):
    pages = {place(node) for node in nodes for place in LANGUAGES.values()}
    assert set(HELP.rglob("*.md")) == pages | {HELP / name for name in COMMON}


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_pages_tell_of_their_node(nodes, language):
    for node, info in nodes.items():
        text = LANGUAGES[language](node).read_text(encoding="utf-8")
        assert text.startswith(f"# {locale(language)[node]['display_name']}\n"), node
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        assert {name for row in rows for name in re.findall("`(.+?)`", row)} <= inputs_of(info).keys(), node
        assert [name for name in re.findall(r"!\[.*?\]\((.+?)\)", text) if not (HELP / name).is_file()] == [], node


def test_help_pages_show_the_same_in_every_language(nodes):
    for node in nodes:
        shown = [
            re.findall(r"^\| (`.+?) \||!\[.*?\]\((.+?)\)", place(node).read_text(encoding="utf-8"), re.M)
            for place in LANGUAGES.values()
        ]
        assert shown[0] == shown[1], node
