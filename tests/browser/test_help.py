"""Help pages as the page shows them beside a selected node."""

import pytest

SELECT = """kind => {
    const node = LiteGraph.createNode(kind)
    app.graph.add(node)
    const { scale, offset } = app.canvas.ds
    node.pos = [500 / scale - offset[0], 350 / scale - offset[1]]
    app.canvas.selectNode(node)
    app.canvas.setDirty(true, true)
}"""
PICTURES = "[...document.querySelectorAll('img')].filter(image => image.src.includes('/docs/'))"


@pytest.fixture
def in_language(tab):
    def opened(locale):
        if tab.settings["Comfy.Locale"] != locale:
            tab.settings["Comfy.Locale"] = locale
            tab.open()
        return tab

    yield opened
    opened("en")


@pytest.mark.parametrize(
    ("locale", "words"), [("en", "A KSampler that is guided by a reward"), ("zh", "图像遵循奖励的")]
)
def test_help_is_shown_with_its_pictures(in_language, locale, words):
    tab = in_language(locale)
    tab.command("Comfy.NewBlankWorkflow")
    tab.until("app.graph.nodes.length === 0")
    tab.run(SELECT, "RewardGuidanceKSampler")
    tab.page.get_by_test_id("info-button").click()
    tab.until(f"document.body.innerText.includes('{words}')")
    tab.until(f"{PICTURES}.length === 2 && {PICTURES}.every(image => image.complete && image.naturalWidth > 0)")
    tab.photograph(f"help-{locale}")
