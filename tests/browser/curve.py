"""The curve of the one node of a kind, as the page has it."""

SAMPLER, TRAINER = "RewardGuidanceKSampler", "RewardGuidanceTrain"
FIND = """
    const nodes = graph => graph.nodes.flatMap(node => [node, ...(node.subgraph ? nodes(node.subgraph) : [])])
    const node = nodes(app.rootGraph).find(node => node.type === kind)
    const curve = node.widgets.find(widget => widget.name === 'reward curve')?.curve
"""
SHADES = """(() => {
    const { data } = curve.canvas.getContext('2d').getImageData(0, 0, curve.canvas.width, curve.canvas.height)
    return Object.fromEntries([...curve.legend.querySelectorAll('b')].map(entry => {
        const colour = entry.style.color.match(/\\d+/g)
        let count = 0
        for (let i = 0; i < data.length; i += 4)
            if (data[i + 3] > 200 && colour.every((value, j) => Math.abs(value - data[i + j]) < 24)) count++
        return [entry.textContent.split(' ')[0], count]
    }))
})()"""


def ask(tab, script, kind=SAMPLER):
    """Of a node and its curve."""
    return tab.run(f"kind => {{ {FIND} return {script} }}", kind)


def steps_of(tab, kind=SAMPLER):
    return ask(tab, "curve?.steps ?? []", kind)


def legend(tab, kind=SAMPLER):
    return ask(tab, "curve.legend.innerText.replace(/\\s+/g, ' ')", kind)


def shades(tab, kind=SAMPLER):
    """Name in the legend -> how many pixels of the canvas are as good as of its colour."""
    return ask(tab, SHADES, kind)
