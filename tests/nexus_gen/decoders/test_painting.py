"""What the decoder, the text encoders and the autoencoder are asked for when a picture is painted.

The decoder is a stand-in whose velocities are easy to integrate by hand.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nexus_gen.flux.flow_match import sampling_sigmas
from nexus_gen.inference import NexusGen, as_picture
from nexus_gen.parts.models import ModelPaths
from nexus_gen.specs.errors import UserError

DETAILS: dict[str, Any] = {
    "image_size": 16,
    "transformer": {"patch_size": 2},
    "vae": {"channels": [8, 16], "num_res_blocks": 1, "norm_groups": 4, "latent_channels": 3},
    "sampling": {"num_inference_steps": 2, "cfg_scale": 1.0, "embedded_guidance": 2.5},
}
# Of a prompt: T5's context (1, L, width), CLIP's pooled embedding (1, width).
CONDITIONS = {"": (0.5, 0.25), "blurry": (2.0, 3.0)}


class Decoder:
    """Velocities: of the embeddings their mean, of a prompt its context plus ten times its pooled embedding."""

    def __init__(self) -> None:
        self.positive: list[dict[str, Any]] = []
        self.negative: list[dict[str, Any]] = []

    def __call__(
        self, latents: Tensor, timestep: Tensor, guidance: Tensor, pooled: Tensor, target: Tensor, source: Tensor | None
    ) -> Tensor:
        self.positive.append(
            {
                "latents": latents.clone(),
                "timestep": timestep.tolist(),
                "guidance": guidance.tolist(),
                "pooled": pooled.tolist(),
                "target": target,
                "source": source,
            }
        )
        return torch.zeros_like(latents) + target.mean((1, 2)).view(-1, 1, 1, 1)

    def transformer(
        self, latents: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, guidance: Tensor
    ) -> Tensor:
        self.negative.append(
            {
                "latents": latents.clone(),
                "timestep": timestep.tolist(),
                "guidance": guidance.tolist(),
                "context": context.flatten(1).mean(1).tolist(),
                "pooled": pooled.tolist(),
            }
        )
        return torch.zeros_like(latents) + (context.mean((1, 2)) + 10 * pooled.mean(1)).view(-1, 1, 1, 1)


class Autoencoder:
    """Keeps the latents; a picture is their first three channels, two by two pixels each."""

    def decode(self, latents: Tensor) -> Tensor:
        self.latents = latents
        return latents[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)


class Painter(NexusGen):
    def __init__(self, monkeypatch: pytest.MonkeyPatch, **details: Any) -> None:
        # Not NexusGen's own, which looks at the files of all parts: there are none.
        details = {**DETAILS, **details}
        self.paths = ModelPaths(Path("none"), 5184, "editing_decoder", Path("none"), Path("none"), details)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.text_conditions = {}
        self.encoded: list[str] = []
        self.decoder: Any = Decoder()
        self.vae: Any = Autoencoder()

        def prompt(flux: Path, text: str, *_: Any) -> tuple[Tensor, Tensor]:
            self.encoded.append(text)
            context, pooled = CONDITIONS[text]
            return torch.full((1, 4, 5), context), torch.full((1, 2), pooled)

        monkeypatch.setattr("nexus_gen.inference.encode_prompt", prompt)
        monkeypatch.setattr("nexus_gen.inference.encode_pooled", lambda *a: torch.full((1, 2), CONDITIONS[a[1]][1]))


def noise_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDS = torch.stack([torch.full((9, 4), 0.1), torch.full((9, 4), 0.4)])


def test_without_guidance_no_prompt_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Painter(monkeypatch)
    sources = torch.arange(2.0).view(2, 1, 1).expand(2, 324, 4)
    pictures = model.paint(EMBEDS, sources, seed=7, negative_prompt="blurry")
    assert not model.encoded and not model.decoder.negative
    first, second = model.decoder.positive
    noise = noise_of(7, 2, 3, 8, 8)
    assert torch.equal(first["latents"], noise)
    assert first["timestep"] == [1000.0, 1000.0]
    assert second["timestep"] == pytest.approx([1000 * float(sampling_sigmas(2)[1])] * 2)
    for call in (first, second):
        assert (call["guidance"], call["pooled"]) == ([2.5, 2.5], [[0.25, 0.25]])
        assert torch.equal(call["target"], EMBEDS) and torch.equal(call["source"], sources)
    # dx / dsigma is the velocity; sigma goes from 1 to 0.
    torch.testing.assert_close(model.vae.latents, noise - torch.tensor([0.1, 0.4]).view(2, 1, 1, 1))
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]


@pytest.mark.parametrize("prompt", ["", "blurry"])
def test_guidance_leads_away_from_the_negative_prompt(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Painter(monkeypatch)
    model.paint(
        EMBEDS, seed=[3, 5], cfg_scale=3.0, embedded_guidance=4.0, num_inference_steps=3, negative_prompt=prompt
    )
    assert model.encoded == [prompt]
    context, pooled = CONDITIONS[prompt]
    assert (len(model.decoder.positive), len(model.decoder.negative)) == (3, 3)
    for positive, negative in zip(model.decoder.positive, model.decoder.negative, strict=True):
        assert (negative["context"], negative["pooled"]) == ([context, context], [[pooled, pooled]])
        assert positive["pooled"] == [[0.25, 0.25]]  # of the empty prompt, whatever is to be avoided
        assert positive["guidance"] == negative["guidance"] == [4.0, 4.0]
        assert torch.equal(positive["latents"], negative["latents"]) and positive["timestep"] == negative["timestep"]
        assert positive["source"] is None
    away = context + 10 * pooled
    noise = torch.stack([noise_of(3, 3, 8, 8), noise_of(5, 3, 8, 8)])
    velocity = torch.tensor([away + 3.0 * (value - away) for value in (0.1, 0.4)]).view(2, 1, 1, 1)
    torch.testing.assert_close(model.vae.latents, noise - velocity, rtol=0, atol=1e-4)


def test_a_decoder_has_its_own_guidance_and_the_last_prompt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Painter(monkeypatch, sampling={"num_inference_steps": 4, "cfg_scale": 2.0, "embedded_guidance": 1.5})
    model.paint(EMBEDS[:1])
    assert (len(model.decoder.positive), len(model.decoder.negative)) == (4, 4)
    assert model.decoder.negative[0]["guidance"] == [1.5]
    torch.testing.assert_close(model.decoder.positive[0]["latents"], noise_of(42, 1, 3, 8, 8))
    model.paint(EMBEDS[:1])
    model.paint(EMBEDS[:1], negative_prompt="blurry")
    model.paint(EMBEDS[:1], cfg_scale=1.0, embedded_guidance=0.0)
    assert model.encoded == ["", "blurry"]
    assert model.decoder.positive[-1]["guidance"] == [0.0]
    model.paint(EMBEDS[:1])
    assert model.encoded == ["", "blurry", ""] and model.decoder.negative[-1]["pooled"] == [[0.25, 0.25]]


def test_width_and_height_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Painter(monkeypatch)
    (picture,) = model.paint(EMBEDS[:1], width=24, height=12)
    assert picture.size == (24, 12) and model.vae.latents.shape == (1, 3, 6, 12)
    assert model.paint(EMBEDS[:1], width=24)[0].size == (24, 16)
    assert model.paint(EMBEDS[:1], height=24)[0].size == (16, 24)
    for size in ({"width": 18}, {"height": 10}):
        with pytest.raises(UserError, match="must be multiples of 4"):
            model.paint(EMBEDS[:1], **size)


def test_pixels_are_the_nearest_of_256_levels() -> None:
    values = torch.tensor([-2.0, -1.0, -1 + 1.49 / 127.5, -1 + 1.51 / 127.5, 0.0, 1.0, 5.0, 0.5])
    picture = as_picture(torch.stack([values, -values, values]).view(3, 2, 4))
    # 127.5 goes to the even neighbour.
    red = [[0, 0, 1, 2], [128, 255, 255, 191]]
    green = [[255, 255, 254, 253], [128, 0, 0, 64]]
    assert np.asarray(picture).tolist() == np.stack([red, green, red], axis=-1).tolist()
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
