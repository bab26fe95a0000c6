"""From a run's artifacts, or released files, to answers and pictures.

Legend: B pictures, N embeddings of a picture that the model makes (81 as released), D embedding width.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nexus_gen.decoders.checkpoint import load_decoder, load_vae
from nexus_gen.decoders.decoders import (
    EditingDecoder,
    GenerationDecoder,
    build_editing_decoder,
    build_generation_decoder,
)
from nexus_gen.flux.flow_match import euler_sample
from nexus_gen.flux.text_encoders import encode_pooled, encode_prompt
from nexus_gen.flux.vae import FluxVae
from nexus_gen.language.checkpoint import load_autoregressive, load_processor
from nexus_gen.language.conversation import collate, encode, patches
from nexus_gen.language.generate import Progress, generate_reply, reply_text, vision_embeddings
from nexus_gen.language.model import NexusGenForConditionalGeneration
from nexus_gen.parts.models import ModelPaths
from nexus_gen.parts.preflight import require_loadable
from nexus_gen.parts.wording import TRAINED, Wording
from nexus_gen.pictures.framing import Frame, require_paintable
from nexus_gen.pictures.images import PictureSizing, StoredImage, open_image, squash
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import (
    REFERENCE_GRID,
    RELEASED_TARGET_TOKENS,
    FluxGeometry,
    ProjectorGeometry,
    VaeGeometry,
    patches_per_side,
)
from nexus_gen.specs.prompts import CONTROL_TOKENS, IMAGE_TAG

Picture = Image.Image | str | StoredImage
MAX_OWN_WORDS = 64  # tokens that the model may write before its picture where rows have replies of many kinds


class NexusGen:
    """The model of a run; dtype is bfloat16 on a GPU and float32 on a CPU.

    Headers are checked at once, so that nothing is found out after minutes; parts load when first needed.
    wording: how `understand`, `generate` and `edit` word what they are given: as the checkpoint's rows were, unless
    their `template` and `reply` say otherwise (as of `Wording.under`).
    """

    def __init__(self, paths: ModelPaths, device: str = "auto") -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
        require_loadable(paths)
        Wording.load(paths.autoregressive)  # raises for a damaged one
        self.paths = paths
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.text_conditions: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def wording(self) -> Wording:
        return Wording.load(self.paths.autoregressive)

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.paths.autoregressive)

    @cached_property
    def autoregressive(self) -> NexusGenForConditionalGeneration:
        return load_autoregressive(self.paths.autoregressive, dtype=self.dtype, device=self.device)

    @cached_property
    def details(self) -> dict[str, Any]:
        if self.paths.details is None:
            raise ValueError("these ModelPaths name no decoder")
        return self.paths.details

    @cached_property
    def decoder(self) -> GenerationDecoder | EditingDecoder:
        flux = FluxGeometry(**self.details["transformer"])
        with torch.device("meta"):
            if self.paths.decoder_kind == "generation_decoder":
                decoder: GenerationDecoder | EditingDecoder = build_generation_decoder(flux, self.details["embed_dim"])
            else:
                rounds = self.details.get("round_positions", True)  # as all did before they said it
                decoder = build_editing_decoder(flux, ProjectorGeometry(**self.details["projector"]), rounds)
        assert self.paths.decoder is not None
        load_decoder(decoder, self.paths.decoder, self.dtype, self.device)
        return decoder.eval()

    @cached_property
    def vae(self) -> FluxVae:
        assert self.paths.flux is not None
        return load_vae(self.paths.flux, VaeGeometry(**self.details["vae"]), self.dtype, self.device).eval()

    @property
    def sees_source(self) -> bool:
        """Whether the decoder paints from the source's embeddings too."""
        return self.paths.decoder_kind == "editing_decoder" and self.details.get("reference", True)

    def text_condition(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5's context (1, L, context width) and CLIP's pooled embedding (1, pooled width); keeps the last prompt's."""
        assert self.paths.flux is not None
        if prompt not in self.text_conditions:
            self.text_conditions = {prompt: encode_prompt(self.paths.flux, prompt, self.dtype, self.device)}
        return self.text_conditions[prompt]

    @cached_property
    def pooled(self) -> Tensor:
        assert self.paths.flux is not None
        return encode_pooled(self.paths.flux, "", self.dtype, self.device)

    def understand(
        self,
        image: Picture | Sequence[Picture],
        question: str,
        max_new_tokens: int = 256,
        progress: Progress | None = None,
        *,
        template: str = TRAINED,
    ) -> str:
        """Answer a question about a picture, or about several in order."""
        images = in_order(image)
        turn = self.wording.under(template).turn("understanding", question, len(images))
        return self.answer_all([turn.user], [images], max_new_tokens, progress, systems=[turn.system])[0]

    def answer(
        self, content: str, images: list[Picture], max_new_tokens: int = 256, progress: Progress | None = None
    ) -> str:
        """Reply to a user message, whose `<image>` tags the pictures fill, by greedy decoding."""
        return self.answer_all([content], [images], max_new_tokens, progress)[0]

    def answer_all(
        self,
        contents: list[str],
        images: list[list[Picture]],
        max_new_tokens: int = 256,
        progress: Progress | None = None,
        *,
        systems: Sequence[str] = (),
    ) -> list[str]:
        """Reply to user messages as one batch; `images` holds each one's pictures.

        progress: as of `generate_reply`. systems: the system message of each, empty for none.
        """
        inputs = self._prompts(contents, images, [""] * len(contents), systems)
        made = generate_reply(self.autoregressive, **inputs, max_new_tokens=max_new_tokens, progress=progress)
        return [reply_text(self.processor.tokenizer, self.autoregressive, reply) for reply in made.new_tokens]

    def imagine(self, content: str, reply: str, images: list[Picture]) -> Tensor:
        """The embeddings of the picture that answers a user message: (1, N, D).

        reply: the assistant's words up to its `<image>` tag.
        """
        return self.imagine_all([content], [reply], [images])

    def imagine_all(
        self,
        contents: list[str],
        replies: Sequence[str | None],
        images: list[list[Picture]],
        systems: Sequence[str] = (),
    ) -> Tensor:
        """The embeddings for each of B user messages as one batch: (B, N, D).

        replies: None lets the model write its own words before the picture, which comes at once where it writes none
        for too long. systems: as of `answer_all`.
        """
        systems = systems or [""] * len(contents)
        length = self.autoregressive.num_target_tokens + 2
        found: dict[int, Tensor] = {}

        def reply_to(rows: list[int], max_new_tokens: int, image_first: bool) -> None:
            inputs = self._prompts(
                [contents[row] for row in rows],
                [images[row] for row in rows],
                [(replies[row] or "").split(IMAGE_TAG)[0] for row in rows],
                [systems[row] for row in rows],
                self.paths.consistent_edit_scale,
            )
            made = generate_reply(
                self.autoregressive, **inputs, max_new_tokens=max_new_tokens, force_image_first=image_first
            )
            found.update((row, embeds[0]) for row, embeds in zip(rows, made.image_embeds, strict=True) if embeds)

        if own := [row for row, reply in enumerate(replies) if reply is None]:
            reply_to(own, MAX_OWN_WORDS + length, image_first=False)
        if rest := [row for row in range(len(contents)) if row not in found]:
            reply_to(rest, length, image_first=True)
        return torch.stack([found[row] for row in range(len(contents))])

    def target_embeds(self, *images: Picture) -> Tensor:
        """The vision embeddings of each of B pictures, what `imagine` aims at: (B, N, D)."""
        return self._vision_embeds(images, patches_per_side(self.autoregressive.num_target_tokens))

    def source_embeds(self, *images: Picture) -> Tensor:
        """The 324 vision embeddings of each of B pictures to edit: (B, 324, D)."""
        return self._vision_embeds(images, REFERENCE_GRID)

    def _vision_embeds(self, images: Sequence[Picture], grid_size: int) -> Tensor:
        side = grid_size * self.processor.image_processor.patch_size
        pixel_values, grid = patches(self.processor, [squash(as_image(image), side) for image in images])
        embeds_ND = vision_embeddings(self.autoregressive, pixel_values.to(self.device), grid.to(self.device))
        return embeds_ND.unflatten(0, (len(images), -1))

    def generate(
        self,
        prompt: str,
        language: str | None = None,
        *,
        template: str = TRAINED,
        reply: str | None = None,
        **sampling: Any,
    ) -> Image.Image:
        """Paint a picture from a prompt; `sampling` as in `paint`.

        language: of the words around the prompt, en or zh; that of the prompt unless given.
        """
        turn = self.wording.under(template, reply).turn("generation", prompt, language=language)
        return self.paint(self.imagine_all([turn.user], [turn.reply], [[]], [turn.system]), **sampling)[0]

    def edit(
        self,
        image: Picture | Sequence[Picture],
        instruction: str,
        language: str | None = None,
        *,
        template: str = TRAINED,
        reply: str | None = None,
        **options: Any,
    ) -> Image.Image:
        """Repaint a picture; options as of `edit_all`. Of several pictures in order the last one is repainted.

        language: as of `generate`.
        """
        images = in_order(image)
        turn = self.wording.under(template, reply).turn("editing", instruction, len(images), language)
        return self.edit_all([turn.user], [turn.reply], [images], systems=[turn.system], **options)[0]

    def edit_all(
        self,
        contents: list[str],
        replies: Sequence[str | None],
        images: Sequence[Sequence[Picture]],
        *,
        systems: Sequence[str] = (),
        aspect: str | None = None,
        size: str | None = None,
        width: int | None = None,
        height: int | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Repaint the last of each row's pictures, as one batch; results keep its aspect unless told otherwise.

        contents, replies, systems: as of `imagine_all`. aspect, size, width, height: as of `Frame.of`. sampling: as of
        `paint`.
        """
        shape: dict[str, Any] = {"aspect": aspect, "size": size, "width": width, "height": height}
        return self.repaint(*self.imagine_edits(contents, replies, images, systems, **shape), **sampling)

    def imagine_edits(
        self,
        contents: list[str],
        replies: Sequence[str | None],
        images: Sequence[Sequence[Picture]],
        systems: Sequence[str] = (),
        **shape: Any,
    ) -> tuple[Tensor, list[Frame], list[Image.Image]]:
        """(embeddings of the results (B, N, D), frames, sources) of edits, as `repaint` takes them.

        contents, replies, images, systems: as of `edit_all`. shape: as of `Frame.of`.
        """
        opened = [[as_image(picture) for picture in of_row] for of_row in images]
        sources = [of_row[-1] for of_row in opened]
        frames = [Frame.of(source.size, self.details, **shape) for source in sources]
        shown: list[list[Picture]] = [
            [*of_row[:-1], frame.fit(of_row[-1])] for frame, of_row in zip(frames, opened, strict=True)
        ]
        return self.imagine_all(contents, replies, shown, systems), frames, sources

    def seen_sizes(self, sizes: Sequence[tuple[int, int]], edits: bool = False) -> list[tuple[int, int]]:
        """In which size the language model looks at the pictures of a question, or of an edit."""
        tokens = (self.paths.details or {}).get("num_target_tokens", RELEASED_TARGET_TOKENS)
        sizing = PictureSizing(
            self.processor.image_processor.patch_size,
            self.paths.max_pixels,
            consistent_edit_scale=edits and self.paths.consistent_edit_scale,
            num_target_tokens=tokens,
        )
        try:
            return sizing.sizes(sizes, [False] * len(sizes), sizing.target_size((1, 1)))
        except ValueError as error:  # of a picture that is too long and narrow
            raise UserError(str(error)) from error

    def repaint(
        self,
        target_embeds: Tensor,
        frames: Sequence[Frame],
        sources: Sequence[Image.Image],
        *,
        seed: int | Sequence[int] = 42,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Paint B edits from the embeddings of their results, (B, N, D), and put them back into their frames.

        A generation decoder sees those alone, an editing decoder the sources too. sampling: as of `paint`.
        """
        shown = [frame.fit(source) for frame, source in zip(frames, sources, strict=True)]
        reference = self.source_embeds(*shown) if self.sees_source else None
        results: dict[int, Image.Image] = {}
        for painted in dict.fromkeys(frame.painted for frame in frames):  # a batch has one size
            rows = [row for row, frame in enumerate(frames) if frame.painted == painted]
            pictures = self.paint(
                target_embeds[rows],
                None if reference is None else reference[rows],
                width=painted[0],
                height=painted[1],
                seed=seed if isinstance(seed, int) else [seed[row] for row in rows],
                **sampling,
            )
            for row, picture in zip(rows, pictures, strict=True):
                results[row] = frames[row].put_back(picture, sources[row])
        return [results[row] for row in range(len(frames))]

    @torch.inference_mode()
    def paint(
        self,
        target_embeds: Tensor,
        source_embeds: Tensor | None = None,
        *,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        embedded_guidance: float | None = None,
        negative_prompt: str = "",
        seed: int | Sequence[int] = 42,
        progress: Progress | None = None,
    ) -> list[Image.Image]:
        """Pictures from embeddings: (B, N, D) and, for the editing decoder, (B, 324, D).

        None takes the decoder's own size and sampling. The noise depends on the seed and the place in the batch, not on
        the device; with a seed for each picture, on that seed alone. progress: as of `euler_sample`.
        Raises UserError for sizes that the latent grid does not fit.
        """
        defaults = self.details["sampling"]
        cfg_scale = defaults["cfg_scale"] if cfg_scale is None else cfg_scale
        width, height = width or self.details["image_size"], height or self.details["image_size"]
        require_paintable(self.details, width, height)
        vae_geometry = VaeGeometry(**self.details["vae"])
        shape = (vae_geometry.latent_channels, height // vae_geometry.downscale, width // vae_geometry.downscale)
        if isinstance(seed, int):
            noise = torch.randn(len(target_embeds), *shape, generator=torch.Generator().manual_seed(seed))
        else:
            noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(one)) for one in seed])
        noise = noise.to(self.device, self.dtype)
        target_embeds = target_embeds.to(self.device, self.dtype)
        reference = None if source_embeds is None else source_embeds.to(self.device, self.dtype)

        def velocity(latents: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
            return self.decoder(latents, timestep, guidance, self.pooled, target_embeds, reference)

        negative = None
        if cfg_scale != 1.0:
            context, pooled = self.text_condition(negative_prompt)

            def negative(latents: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
                rows = context.expand(len(latents), -1, -1)
                return self.decoder.transformer(latents, timestep, rows, pooled, guidance)

        latents = euler_sample(
            velocity,
            noise,
            num_inference_steps or defaults["num_inference_steps"],
            defaults["embedded_guidance"] if embedded_guidance is None else embedded_guidance,
            cfg_scale,
            negative,
            progress,
        )
        return [as_picture(pixels) for pixels in self.vae.decode(latents)]

    def _prompts(
        self,
        prompts: list[str],
        images: list[list[Picture]],
        reply_prefixes: list[str],
        systems: Sequence[str] = (),
        as_target: bool = False,
    ) -> dict[str, Any]:
        """User turns and the beginnings of their replies, as `generate_reply` takes them.

        systems: as of `answer_all`. as_target: pictures in a target's size.
        """
        rows = []
        systems = systems or [""] * len(prompts)
        for prompt, pictures, reply_prefix, system in zip(prompts, images, reply_prefixes, systems, strict=True):
            messages = [{"role": "system", "content": system}] if system else []
            tags = prompt.count(IMAGE_TAG)
            if tags != len(pictures):
                raise UserError(
                    f"the prompt holds {tags} {IMAGE_TAG} tags for {len(pictures)} pictures; leave the tag out of it"
                )
            if found := [token for token in CONTROL_TOKENS if token in prompt]:
                raise UserError(f"the prompt holds {found[0]}, a sign of the model's own; leave it out of it")
            opened = [as_image(picture) for picture in pictures]
            try:
                row = encode(
                    self.processor,
                    [*messages, {"role": "user", "content": prompt}],
                    opened,
                    self.paths.max_pixels,
                    reply_prefix,
                    consistent_edit_scale=as_target,
                    num_target_tokens=self.autoregressive.num_target_tokens,
                )
            except ValueError as error:  # of a picture that is too long and narrow
                raise UserError(str(error)) from error
            rows.append(row)
        batch = collate(rows, self.processor.tokenizer.pad_token_id)
        del batch["labels"]
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def in_order(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    return list(pictures) if isinstance(pictures, list | tuple) else [pictures]  # type: ignore[list-item]


def as_image(picture: Picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else open_image(picture)


def as_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an 8-bit RGB picture."""
    values = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(values.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy().astype(np.uint8))
