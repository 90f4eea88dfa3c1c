"""Photographs every node of the pack between the nodes it is usually wired to, for the help pages: `make pictures`."""

import io

from PIL import Image

from ..harness import browser, comfy, environment, models
from ..harness.client import Client

FOLDER = environment.CHECKOUT / "nodes" / "web" / "docs"
WIDTH, QUALITY = 900, 70
GIVERS = {
    "MODEL": "CheckpointLoaderSimple",
    "CLIP": "CheckpointLoaderSimple",
    "VAE": "CheckpointLoaderSimple",
    "CONDITIONING": "CLIPTextEncode",
    "LATENT": "EmptySD3LatentImage",
    "IMAGE": "LoadImage",
    "REWARD": "RewardGuidanceLoadReward",
    "GUIDANCE_DATA": "RewardGuidanceCollect",
    "GUIDANCE_NETWORK": "RewardGuidanceLoadNetwork",
}
TAKERS = {
    "MODEL": "KSampler",
    "LATENT": "VAEDecode",
    "IMAGE": "PreviewImage",
    "REWARD": "RewardGuidanceKSampler",
    "GUIDANCE_DATA": "RewardGuidanceTrain",
    "GUIDANCE_NETWORK": "RewardGuidanceKSamplerNetwork",
    "NOISE": "SamplerCustomAdvanced",
}
"""Type of a link -> the node at its other end."""
ARRANGE = """([kind, givers, takers]) => {
    const { graph } = app, gap = 110
    const add = kind => {
        const node = LiteGraph.createNode(kind)
        graph.add(node)
        const [width, height] = node.computeSize()
        node.size = [Math.max(width, 290), height + (kind === 'LoadImage' ? 220 : 0)]
        return node
    }
    const node = add(kind)
    const column = (nodes, x) => {
        let y = node.pos[1]
        for (const each of nodes) { each.pos = [x(each), y]; y += each.size[1] + 70 }
    }
    const left = new Map(), right = new Map()
    node.inputs.forEach((input, i) => {
        const giver = givers[input.type]
        if (!giver || giver === kind || input.widget || /held_out|_[2-9]$/.test(input.name)) return
        if (!left.has(giver)) left.set(giver, add(giver))
        left.get(giver).connect(left.get(giver).outputs.findIndex(output => output.type === input.type), node, i)
    })
    node.outputs.forEach((output, i) => {
        const taker = takers[output.type]
        if (!taker || taker === kind) return
        if (!right.has(taker)) right.set(taker, add(taker))
        node.connect(i, right.get(taker), right.get(taker).inputs.findIndex(input => input.type === output.type && !input.link))
    })
    column([...left.values()], each => node.pos[0] - gap - each.size[0])
    column([...right.values()], () => node.pos[0] + node.size[0] + gap)
    node.color = '#6b4a12'
    node.bgcolor = '#4a340f'
    const boxes = graph.nodes.map(({ pos, size }) => [pos[0], pos[1] - 54, size[0], size[1] + 54]), canvas = app.canvas.canvas.getBoundingClientRect()
    const start = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]))
    const width = Math.max(...boxes.map(box => box[0] + box[2])) - start, height = Math.max(...boxes.map(box => box[1] + box[3])) - top
    const scale = Math.min(1, (canvas.width - 200) / width, (canvas.height - 260) / height)
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [120 / scale - start, 150 / scale - top]
    app.canvas.setDirty(true, true)
    const margin = 30
    return { x: canvas.x + 120 - margin, y: canvas.y + 150 - margin, width: width * scale + 2 * margin, height: height * scale + 2 * margin }
}"""
"""Returns what the nodes cover of the page."""


def photograph(tab: browser.Tab, kind: str) -> Image.Image:
    tab.command("Comfy.NewBlankWorkflow")
    tab.until("app.graph.nodes.length === 0")
    box = tab.run(ARRANGE, [kind, GIVERS, TAKERS])
    tab.page.wait_for_timeout(1000)  # until pictures are loaded and everything is drawn
    picture = Image.open(io.BytesIO(tab.page.screenshot(clip=box))).convert("RGB")
    return (
        picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
        if picture.width > WIDTH
        else picture
    )


def main() -> None:
    base = environment.cache() / "work" / "pictures"
    models.link_every(base / "models")
    for name in ("models/guidance_networks/likes_blue.safetensors", "output/guidance_data/likes_blue/collection.json"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).touch()
    with comfy.serve(base, packs={comfy.PACK: environment.CHECKOUT}) as server, browser.browser() as chromium:
        client = Client(server.url)
        own = [
            name for name, info in client.object_info().items() if info["python_module"] == f"custom_nodes.{comfy.PACK}"
        ]
        with browser.tab(
            chromium, client, "pictures", **{"Comfy.VueNodes.Enabled": False, "Comfy.Sidebar.Size": "small"}
        ) as tab:
            for kind in own:
                photograph(tab, kind).save(FOLDER / f"{kind}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
