"""A pack of somebody else's, with a reward of its own: what nodes/web/docs/your_own_reward.md shows."""

from comfy_api.latest import ComfyExtension, io


class Redness(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="RednessReward", category="rewards", outputs=[io.Custom("REWARD").Output()])

    @classmethod
    def execute(cls):
        from reward_guidance import Reward, manage_reward  # here, because packs are imported in any order

        class RednessReward(Reward):
            name, reference_mean, reference_std = "redness", 0.0, 0.1

            def forward(self, pixels, prompts):
                return pixels[:, 0].mean((1, 2)) - pixels[:, 1:].mean((1, 2, 3))

        return io.NodeOutput(manage_reward(RednessReward()))


class RednessExtension(ComfyExtension):
    async def get_node_list(self):
        return [Redness]


async def comfy_entrypoint():
    return RednessExtension()
