"""What ms-swift has to know about Nexus-Gen: a model type, and the template that turns message rows into inputs.

Importing this module registers both under the name `nexus_gen`. Swift's argument parser wants them registered before
it reads `--model_type` and `--template`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from swift.model import ModelLoader, ModelMeta, register_model
from swift.optimizers import OptimizerCallback, optimizers_map
from swift.template import Template, register_template
from swift.template.template_inputs import StdTemplateInputs
from swift.template.templates.qwen import Qwen2_5VLTemplate, QwenTemplateMeta
from torch import Tensor
from torch.optim import Optimizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor

from data.messages.token_lengths import IMAGE_MARKUP, IMAGE_TOKEN
from nexus_gen.language.checkpoint import load_autoregressive, load_config, load_processor
from nexus_gen.language.conversation import byte_patches, resized, scaled_patches
from nexus_gen.language.model import NexusGenForConditionalGeneration, NexusGenOutput
from nexus_gen.pictures.images import PictureSizing, open_image
from nexus_gen.specs.geometry import MERGE_SIZE, RELEASED_TARGET_TOKENS
from nexus_gen.specs.prompts import IMAGE_TAG
from train.pretrain.stream import TooLong
from train.steps.optimizers import build_optimizer

NAME = "nexus_gen"
MATRICES_BY_MUON = "matrices_by_muon"  # swift's own `muon` fetches its code from a repository when it starts
CACHED_TEXTS, CACHED_LENGTH = 4096, 256  # texts, and characters of one


class NexusGenLoader(ModelLoader):
    """Loads through our checkpoint code: strict, offline, from released, exported and plain Qwen2.5-VL directories.

    init_seed, num_target_tokens: of the two tensors that a plain Qwen2.5-VL lacks.
    """

    def __init__(
        self, *args: Any, init_seed: int = 0, num_target_tokens: int = RELEASED_TARGET_TOKENS, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.init_seed = init_seed
        self.num_target_tokens = num_target_tokens

    def get_config(self, model_dir: str) -> Qwen2_5_VLConfig:
        return load_config(Path(model_dir))

    def get_processor(self, model_dir: str, config: Any) -> Qwen2_5_VLProcessor:
        return load_processor(model_dir)

    def get_model(
        self, model_dir: str, config: Any, processor: Any, model_kwargs: Any
    ) -> NexusGenForConditionalGeneration:
        """On the CPU, in the dtype that swift was told; the trainer moves it, or partitions it, from there."""
        return load_autoregressive(
            model_dir,
            dtype=self.torch_dtype,
            init_seed=self.init_seed,
            num_target_tokens=self.num_target_tokens,
        )


class NexusGenTemplate(Qwen2_5VLTemplate):
    """Rows with pictures on both sides: those of user turns are looked at, those of replies are learned.

    The tokens of pictures of replies are labels, as are the vision_start and vision_end around them; those of pictures
    of user turns are none. `PictureSizing` says in which sizes both are seen. Target embeddings
    come from the model's own forward.

    on_loss: called with every training output and its inputs, before the backward pass.
    """

    model_accepts_loss_kwargs = False  # micro-batches are averaged plainly; swift would weigh them by label tokens
    _requires_mm_token_type_ids = False  # the model tells modalities by token ids
    dynamic_targets = False
    consistent_edit_scale = False
    num_target_tokens = RELEASED_TARGET_TOKENS
    on_loss: Callable[[NexusGenOutput, dict[str, Any]], None] | None = None

    def init_processor(self, processor: Any) -> None:
        self._tokenized: dict[str, tuple[int, ...]] = {}
        if processor is not None and not self._processor_inited:
            # Swift keeps the ids of the released tokenizer as class constants, and a list shared by all templates.
            self.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            self.video_token_id = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
            self.placeholder_tokens = [self.image_token_id, self.video_token_id]
        super().init_processor(processor)

    def _tokenize(self, context: Any, **kwargs: Any) -> Any:
        """Swift's; a call costs ten times what a short text does, and the words around turns return in every row."""
        if kwargs or not isinstance(context, str) or len(context) > CACHED_LENGTH:
            return super()._tokenize(context, **kwargs)
        if context not in self._tokenized:
            if len(self._tokenized) == CACHED_TEXTS:
                self._tokenized.clear()
            self._tokenized[context] = tuple(super()._tokenize(context))
        return list(self._tokenized[context])

    def _preprocess_inputs(self, inputs: StdTemplateInputs) -> None:
        """Nothing: swift would shrink targets like other pictures, and read paths out of `<img>` in the text."""

    def _pre_tokenize_images(
        self, context_list: list[Any], loss_scale_list: list[float], inputs: StdTemplateInputs
    ) -> tuple[list[Any], list[float]]:
        """Swift's, but a picture keeps the loss scale of its turn; swift's own is always 0."""
        contexts = [IMAGE_MARKUP if context == IMAGE_TAG else context for context in context_list]
        return contexts, list(loss_scale_list)

    def _encode(self, inputs: StdTemplateInputs) -> dict[str, Any]:
        """input_ids and labels as lists of S, image_grid_thw (images, 3), and the resized `pictures` for the collator.

        Raises TooLong for a row of more than `max_length` tokens, and ValueError when the text itself
        holds an image token.
        """
        roles = [message["role"] for message in inputs.messages for _ in range(message["content"].count(IMAGE_TAG))]
        encoded = Template._encode(self, inputs)  # above Qwen's, which would resize and label differently
        sizing = PictureSizing(
            self.processor.image_processor.patch_size,
            self.max_pixels,
            self.dynamic_targets,
            self.consistent_edit_scale,
            self.num_target_tokens,
        )
        images = resized(
            [open_image(image) for image in inputs.images], [role == "assistant" for role in roles], sizing
        )
        patch_size = sizing.patch_size
        grids = [(1, image.height // patch_size, image.width // patch_size) for image in images]
        if images:
            encoded["pictures"], encoded["image_grid_thw"] = images, torch.tensor(grids)
        counts = [height * width // MERGE_SIZE**2 for _, height, width in grids]
        encoded["input_ids"], encoded["labels"] = self._expand_images(encoded["input_ids"], encoded["labels"], counts)
        if len(encoded["input_ids"]) > self.max_length:
            raise TooLong(
                f"{len(encoded['input_ids'])} tokens where data.max_length is {self.max_length}; raise it, lower "
                "data.max_pixels, or shorten the row"
            )
        return encoded

    def _expand_images(self, input_ids: list[int], labels: list[int], counts: list[int]) -> tuple[list[int], list[int]]:
        """Repeat each image token, and its label, once per vision embedding of its picture."""
        num_tokens = input_ids.count(self.image_token_id)
        if num_tokens != len(counts):
            raise ValueError(f"{num_tokens} image tokens for {len(counts)} images; take {IMAGE_TOKEN} out of the text")
        remaining = iter(counts)
        repeats = [next(remaining) if token == self.image_token_id else 1 for token in input_ids]
        expanded = [
            [value for value, times in zip(values, repeats, strict=True) for _ in range(times)]
            for values in (input_ids, labels)
        ]
        return expanded[0], expanded[1]

    def _data_collator(self, batch: list[dict[str, Any]], *, padding_to: int | None = None) -> dict[str, Tensor]:
        """Padded on the right, with patches as bytes and M-RoPE positions."""
        pictures = [picture for row in batch for picture in row.get("pictures", ())]
        collated = Template._data_collator(self, batch, padding_to=padding_to)
        if pictures:  # all at once: the processor takes as long to begin as for several small pictures
            collated["pixel_values"], _ = byte_patches(self.processor, pictures)
        collated["position_ids"] = self.model.rope_position_ids(
            collated["input_ids"], collated["attention_mask"], collated.get("image_grid_thw")
        )
        return collated

    def _post_encode(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Swift's hook before the model's forward, on its device: see `prepared`."""
        return self.prepared(inputs)

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as the model computes with it: its patches scaled out of the loader's bytes, on their device.

        Whoever hands a collated batch to anything but the model's forward calls this; a prepared batch stays as it is.
        """
        if "pixel_values" not in batch or batch["pixel_values"].dtype != torch.uint8:
            return batch
        return {**batch, "pixel_values": scaled_patches(self.processor, batch["pixel_values"])}

    def compute_sft_loss(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, trainer: Any = None
    ) -> NexusGenOutput:
        outputs = model(**inputs)
        if self.on_loss is not None:
            self.on_loss(outputs, inputs)
        return outputs


class MuonCallback(OptimizerCallback):
    """`optim.name=muon` in swift's trainer."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        return build_optimizer("muon", model or self.trainer.model, args.learning_rate, betas, args.weight_decay)


optimizers_map[MATRICES_BY_MUON] = MuonCallback
register_model(
    ModelMeta(NAME, [], NexusGenLoader, template=NAME, model_arch="qwen2_vl", is_multimodal=True), exist_ok=True
)
register_template(QwenTemplateMeta(NAME, template_cls=NexusGenTemplate), exist_ok=True)
