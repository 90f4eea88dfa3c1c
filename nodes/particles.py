"""The KSampler node that resamples particles by a reward."""

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
            description="Samples several particles for every latent. During sampling it copies those with high "
            "rewards and drops the others. Works with rewards that have no gradient.",
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
                        tooltip="The sampling method. It must add noise in every step, so that copies become "
                        f"different: {', '.join(SAMPLERS)}.",
                    )
                ),
                REWARD.Input("reward", tooltip="The reward to follow. It needs no gradient."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="The prompt, for rewards that compare the picture with it. Write the same text as in the "
                    "positive prompt.",
                ),
                io.Int.Input(
                    "particles",
                    default=4,
                    min=1,
                    max=4096,
                    optional=True,
                    tooltip="Number of particles for each latent of the batch. More particles follow the reward more "
                    "exactly; the time is proportional. 4 to 16; 1 is the stock KSampler.",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.05,
                    min=0.001,
                    max=100.0,
                    step=0.005,
                    tooltip="β in exp(reward/β), in units of the reward's typical spread. Lower values copy the best "
                    "particles more. 0.03 to 1.",
                    **rare,
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Number of final particles to keep, best first, copies last. 1 to 4.",
                    **rare,
                ),
                io.Int.Input(
                    "every",
                    default=4,
                    min=1,
                    max=1000,
                    tooltip="Steps between two evaluations of the rewards. Lower values resample more often, which "
                    "costs more evaluations and leaves fewer different pictures. 1 to 5.",
                    **rare,
                ),
                io.Float.Input(
                    "resample_below",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Resample when the effective share of the particles falls below this value: 0 only at the "
                    "end, 1 at every evaluation. Higher values follow the reward more closely and leave fewer "
                    "different pictures. 0.5 to 1.",
                    **rare,
                ),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Number of particles in one model call, 1 to 16; 0 is all. Lower it if memory runs out.",
                    **rare,
                ),
                *scoring_inputs(),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latents",
                    tooltip="The kept particles, best first, for one latent of the batch after the other.",
                ),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Their rewards, in units of the reward's typical spread.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="One line for every evaluation: surviving particles, ESS and rewards.",
                ),
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
