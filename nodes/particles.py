"""A KSampler whose samples are particles: copied and dropped on the way so that they follow a reward, which needs no gradient."""

from typing import Any

import comfy.samplers
from comfy_api.v0_0_2 import io

from ..guidance.errors import GuidanceError
from .selection import CATEGORY
from .wiring.decoders import make_decoder
from .wiring.inputs import HIDDEN, REWARD, sampler_inputs, scoring_inputs
from .wiring.latent_reward import LatentReward
from .wiring.loaded import LoadedReward
from .wiring.node import prepares_inputs
from .wiring.particle_run import SAMPLERS, ParticleRun, require_noise
from .wiring.reporting import Reporter
from .wiring.sampling import Sampling
from .wiring.scoring import prompt_remarks


@prepares_inputs
class ParticlesKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rare = dict[str, Any](advanced=True, optional=True)
        return io.Schema(
            node_id="RewardGuidanceKSamplerParticles",
            display_name="KSampler (Reward Particles)",
            category=CATEGORY,
            description="Samples several particles of every latent together, copies those that a reward likes and drops the others on the way. "
            "Works with rewards that have no gradient.",
            search_aliases=[
                "FK steering",
                "Feynman-Kac",
                "particle sampler",
                "SMC",
                "sequential Monte Carlo",
                "gradient-free guidance",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model. Its weights stay as they are."),
                *sampler_inputs(
                    io.Combo.Input(
                        "sampler_name",
                        options=comfy.samplers.KSampler.SAMPLERS,
                        default=SAMPLERS[0],
                        tooltip=f"How each step is taken. One that adds noise in every step, so that copies part again: {', '.join(SAMPLERS)}.",
                    )
                ),
                REWARD.Input("reward", tooltip="What the particles should follow. It needs no gradient."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt, for rewards that compare the picture with it. Write the same text as in the positive prompt.",
                ),
                io.Int.Input(
                    "particles",
                    default=4,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Particles for each latent of the batch: more follow the reward more exactly, and take so many times as long. 4 to 16; "
                    "1 is the stock KSampler.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.05,
                    min=0.001,
                    max=100.0,
                    step=0.005,
                    tooltip="β in exp(reward/β), in units of the reward's typical spread. Lower values copy the best particles more. 0.03 to 1.",
                    **rare,
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="How many of the final particles to keep, best first, copies last. 1 to 4.",
                    **rare,
                ),
                io.Int.Input(
                    "every",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="Steps between two looks at the rewards. Fewer choose more often, which costs looks and leaves fewer different pictures. "
                    "1 to 5.",
                    **rare,
                ),
                io.Float.Input(
                    "resample_below",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Copy and drop particles when the share of them that still counts falls below this: 0 only at the end, 1 at every look. "
                    "Higher follows more closely, and leaves fewer different pictures. 0.5 to 1.",
                    **rare,
                ),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="How many particles the model sees at once, 1 to 16; 0 is all. Lower it if memory runs out.",
                    **rare,
                ),
                *scoring_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents", tooltip="The particles kept, best first, latent by latent of the batch."
                ),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Their rewards, in units of the reward's typical spread.",
                ),
                io.String.Output(display_name="report", tooltip="What happened at every look, as readable lines."),
            ],
            hidden=HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive,
        negative,
        latent_image: dict,
        denoise: float,
        reward: LoadedReward,
        prompt: str,
        particles: int,
        temperature: float,
        keep: int,
        every: int,
        resample_below: float,
        chunk: int,
        decoder: str,
        frames: int,
        vae=None,
        held_out: LoadedReward | None = None,
    ) -> io.NodeOutput:
        if denoise <= 0:
            raise GuidanceError("With a denoise of 0 there is nothing to sample; raise it.")
        if particles > 1:
            require_noise(sampler_name)
        pixels = make_decoder(decoder, model.get_model_object("latent_format"), vae)
        latent_reward = LatentReward(reward, pixels, prompt, frames)
        held_out_reward = LatentReward(held_out, pixels, prompt, frames) if held_out else None
        sampling = Sampling(model, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        run = ParticleRun(sampling, latent_reward, temperature, resample_below, every, keep, held_out_reward)
        reporter = Reporter(cls.hidden, decoder=pixels.name)
        kept = run.run(latent_image, seed, particles, chunk, reporter)
        report = "\n".join([kept.report(), *prompt_remarks(prompt, reward, held_out)])
        return io.NodeOutput(kept.latent, kept.scores, report, ui={"reward_guidance": reporter.history})


NODES = [ParticlesKSampler]
