"""What rewards read of prompts with ComfyUI's syntax, held against what its own tokenizer reads."""

import pytest
from reward_guidance.tests.harness.graphs import Graph
from reward_guidance.tests.harness.guided import latents, one_box, seeds_of
from reward_guidance.tests.harness.inprocess import load_comfyui

load_comfyui()

from comfy.sd1_clip import SDTokenizer
from reward_guidance.guidance.errors import GuidanceError
from reward_guidance.nodes.wiring.prompts import has_choices, plain

PLAIN = "a large red circle"
SAME = [
    "a large (red:1.3) circle", "a large ((red)) circle", "a large (red) (circle:0.8)", "(a (large:1.2) red circle:.5)", "a large (red)circle",
    "a large red BREAK circle", "a large red circle, BREAK", "(a large BREAK red) circle", "a large red circle, embedding:style",
    "a large red circle, (embedding:style:1.2),", "embedding:style, a large red circle", "a large red circle <lora:name (2):1>",
    "<lora:one:1> a <lyco:two:0.5:1>large red circle", "a large {red} circle", "a large {red|blue} circle", "a large {{red|green}|blue} circle",
    "a {large|small {tiny|}} red circle", "a large {red circle|blue", "a large red circle // as before", "a large /* not\nsmall */ red circle",
]  # fmt: skip
UNTOUCHED = [
    "",
    " two  spaces , kept ",
    "[red] circle",
    "(red circle",
    "a: 3.5 circle",
    "BREAKFAST",
    "an embedding of",
    "a<b>c",
    "line\nline, ",
    "red)",
]
SEEDS = seeds_of(__file__)


@pytest.mark.parametrize("prompt", SAME)
def test_the_syntax_is_left_out(prompt):
    assert plain(prompt) == PLAIN
    assert plain(PLAIN) == PLAIN


@pytest.mark.parametrize("prompt", UNTOUCHED)
def test_other_prompts_stay_as_they_are(prompt):
    assert plain(prompt) == prompt


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        (r"a circle \(red\)", "a circle (red)"), (r"a (circle \(red\):1.2)", "a circle (red)"), (r"a \{red|blue\} circle", "a {red|blue} circle"),
        ("(see: left) side", "see: left side"), ("(masterpiece)(best)", "masterpiece best"), ("<lora:name:1>", ""), ("{|red} circle", "circle"),
        ("photo embedding:a, embedding:b, dog", "photo, dog"), ("cat,embedding:a (x)", "cat,embedding:a x"), ("embedding: a dog", "dog"),
        ("(at 10:30)", "at 10"),
    ],
)  # fmt: skip
def test_what_is_read(prompt, read):
    assert plain(prompt) == read


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return SDTokenizer(embedding_directory=str(tmp_path_factory.mktemp("embeddings")))


@pytest.mark.parametrize(
    "prompt",
    [
        *SAME[:5],
        *SAME[8:11],
        *UNTOUCHED,
        r"a circle \(red\)",
        r"a (circle \(red\):1.2)",
        "(see: left) (side:0)",
        "((a)(b))",
    ],
)
def test_the_text_is_what_the_model_reads(tokenizer, prompt):
    """All but the commas around an embedding."""

    def tokens(text):
        comma, padding = 267, 49407
        return [
            token
            for part in tokenizer.tokenize_with_weights(text)
            for token, _ in part
            if token not in (comma, padding)
        ]

    escaped = plain(prompt).replace("(", r"\(").replace(")", r"\)")
    assert tokens(escaped) == tokens(prompt)


def test_a_choice_is_seen():
    seen = [has_choices(prompt) for prompt in ("{a|b}", "{ {a} | b}", "{a|{b}}", "{a}", "a|b", r"\{a|b\}", "// {a|b}")]
    assert seen == [True] * 3 + [False] * 4


def test_parentheses_without_end_are_refused_in_a_sentence():
    with pytest.raises(GuidanceError, match="remove some"):
        plain("(" * 5000 + "a" + ")" * 5000)


def scored(bench, reward, prompt):
    graph = Graph()
    picture = graph.add("picture", "EmptyImage", width=32, height=32, batch_size=1, color=0xFF0000)
    graph.add("scores", "RewardGuidanceScoreImages", images=picture, reward=reward(graph), prompt=prompt)
    return bench.queue(graph.prompt)


def test_one_picture_has_one_score(bench, clip_reward):
    texts = {
        prompt: scored(bench, clip_reward, prompt).check().outputs["scores"]["text"][0]
        for prompt in [PLAIN, *SAME, "a blue square"]
    }
    table, *remarks = texts.pop(PLAIN).split("\n\n")
    assert not remarks
    assert texts.pop("a blue square") != table
    for prompt, text in texts.items():
        assert text.split("\n\n")[0] == table, prompt
        assert f"The reward reads '{PLAIN}'." in text
        assert ("it reads the first" in text) == ("|" in prompt), prompt


def test_a_prompt_of_syntax_alone_is_empty(bench, clip_reward):
    assert "the prompt is empty" in scored(bench, clip_reward, "<lora:name:1> BREAK").error


def test_guidance_follows_the_plain_prompt(bench, clip_reward, server):
    """And says in the log what it reads, once."""
    before, seed = server.log.stat().st_size, next(SEEDS)
    made = {
        prompt: bench.run(
            latents("flux", one_box(reward=clip_reward, prompt=prompt, decoder="latent_rgb"), seed=seed, steps=3)
        )
        for prompt in (PLAIN, "a large (red:1.3) circle", "a blue square")
    }
    same, weighted, other = map(bench.latent, made.values())
    assert (same == weighted).all()
    assert (same != other).any()
    assert server.log.read_bytes()[before:].count(f"The reward reads '{PLAIN}'.".encode()) == 1
