"""The autoregressive model: Qwen2.5-VL that also predicts the vision embeddings of the images in its replies.

Two tensors are added to Qwen2.5-VL: `vision_head` maps an output to the embedding of the next image token, and
`image_prefill_embeds` stands in for every token of an image that is being predicted. Inputs at those positions are
therefore known beforehand, and all embeddings of an image come out of one forward pass (prefilled autoregression).

Legend: B rows, S sequence positions, D width of the language model, V vocabulary, N selected positions in row-major
order. A *target image* stands in a reply (its tokens are labels); every other image is context.
Source: Nexus-Gen (Zhang et al. 2025); docs/runs.md says which checkpoint layout belongs to it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_gen.language.tower_cache import TowerCache
from nexus_gen.language.vision_tower import vision_embeds
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS, patches_per_side
from nexus_gen.tensors.compat import ensure_torchvision

ensure_torchvision()

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.conversion_mapping import (  # noqa: E402
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import ModelOutput  # noqa: E402

IGNORE_INDEX = -100
TARGET_INPUTS = ("prefill", "embeddings")
PADDING_POSITION = 1  # what transformers 4.49 gave to padding, kept so that position ids equal the published ones


@dataclass(frozen=True)
class LossWeights:
    """loss = text * CE + image * (mse_share * MSE + (1 - mse_share) * mean(1 - cos)); defaults as published."""

    text: float = 3.0
    image: float = 3.0
    mse_share: float = 0.5


@dataclass
class NexusGenOutput(ModelOutput):
    """What a forward with labels returns.

    loss: weighted sum of the unweighted `text_loss` and `image_loss`, scalars in float32.
    text_token_loss, image_token_loss: what those are the means of, at every scored position in row-major order,
    detached. text_token_right: whether the likeliest token is the label, likewise; outside of training only.
    predicted_embeds, target_embeds: (N, D) at the target image tokens of the batch.
    logits (B, S, V) and image_embeddings (B, S, D): both heads at every position, only with `all_positions`.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    image_loss: Tensor | None = None
    text_token_loss: Tensor | None = None
    image_token_loss: Tensor | None = None
    text_token_right: Tensor | None = None
    predicted_embeds: Tensor | None = None
    target_embeds: Tensor | None = None
    logits: Tensor | None = None
    image_embeddings: Tensor | None = None


@dataclass
class SplicedInputs:
    """inputs_embeds: (B, S, D) as the decoder sees them. target_mask: (B, S). target_embeds: (N, D), detached."""

    inputs_embeds: Tensor
    target_mask: Tensor
    target_embeds: Tensor


def index_within_runs(mask_BS: Tensor) -> Tensor:
    """Index of every True inside its run of consecutive Trues along S, as (N,) in row-major order.

    Two images of a sequence are never adjacent (vision_start and vision_end lie between), so a run is an image.
    """
    position_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    before_BS = F.pad(mask_BS[:, :-1], (1, 0), value=False)
    start_BS = torch.where(mask_BS & ~before_BS, position_S, 0).cummax(dim=1).values
    return (position_S - start_BS)[mask_BS]


def replace_rows(embeds_BSD: Tensor, mask_BS: Tensor, rows_ND: Tensor) -> Tensor:
    """A copy of `embeds_BSD` with `rows_ND` at the True positions, in row-major order.

    Raises ValueError when the number of rows is not the number of True positions.
    """
    num_positions = int(mask_BS.sum())
    if num_positions != rows_ND.shape[0]:
        raise ValueError(f"{num_positions} image tokens in the sequences but {rows_ND.shape[0]} image embeddings")
    return embeds_BSD.masked_scatter(mask_BS.unsqueeze(-1), rows_ND.to(embeds_BSD.dtype))


def predicts(mask_BS: Tensor) -> Tensor:
    """Mask of the positions whose output predicts the True positions: shifted one to the left, (B, S)."""
    return F.pad(mask_BS[:, 1:], (0, 1), value=False)


def text_cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross entropy in float32: (N,)."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def embedding_loss(predicted_ND: Tensor, target_ND: Tensor, mse_share: float) -> Tensor:
    """mse_share * MSE + (1 - mse_share) * (1 - cos) in float32: (N,)."""
    predicted, target = predicted_ND.float(), target_ND.float()
    squared_error = (predicted - target).square().mean(dim=-1)
    return mse_share * squared_error + (1 - mse_share) * (1 - F.cosine_similarity(predicted, target, dim=-1))


def mean_or_zero(losses_N: Tensor) -> Tensor:
    """The mean; exactly 0, still connected to the graph, when N is 0."""
    return losses_N.mean() if losses_N.numel() else losses_N.sum()


class NexusGenForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with `vision_head` (D x D, no bias) and `image_prefill_embeds` (81 x D, as released).

    config.num_target_tokens: prefill embeddings, so tokens of a target image, if not 81; nobody reads it later.
    loss_weights: the objective of `forward` with labels; assign another `LossWeights` to change it.
    tower_cache: remembers what a frozen tower said of pictures; assign one where every process may skip the tower.
    """

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        width = text_config.hidden_size
        self.vision_head = nn.Linear(width, width, bias=False)
        num_target_tokens = getattr(config, "num_target_tokens", RELEASED_TARGET_TOKENS)
        self.image_prefill_embeds = nn.Embedding(num_target_tokens, width)
        self.loss_weights = LossWeights()
        self.tower_cache: TowerCache | None = None
        self.post_init()

    @property
    def num_target_tokens(self) -> int:
        """Of a square target image; the number of prefill embeddings."""
        return self.image_prefill_embeds.num_embeddings

    @property
    def target_inputs(self) -> str:
        """What stands at the tokens of a target image as input, by the checkpoint's config: `prefill` embeddings, as
        published, or the image's own `embeddings`, one behind the other as in text."""
        return getattr(self.config, "target_inputs", TARGET_INPUTS[0])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        all_positions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """With labels, the training objective as a NexusGenOutput; without, Qwen2.5-VL's own forward.

        input_ids, attention_mask, labels: (B, S); -100 is ignored, an image token among the labels is a target.
        position_ids: (3, B, S) M-RoPE, or (4, B, S) with the text positions of a packed row first, which begin at 0 in
        every sequence; computed from the inputs when absent.
        pixel_values: (patches, channels x 2 x patch x patch) and image_grid_thw: (images, 3) of all images, targets
        included, in the order in which they stand in the rows.
        all_positions: also return both heads at every position (parity and diagnosis; memory of B x S x V).
        Every call runs each module once whatever the batch holds, as ZeRO-3 and DDP need.
        Raises ValueError when image tokens and image embeddings disagree in number.
        """
        if labels is None:
            if mm_token_type_ids is None and input_ids is not None:
                mm_token_type_ids = self._modality_ids(input_ids)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                mm_token_type_ids=mm_token_type_ids,
                **kwargs,
            )
        if input_ids is None:
            raise ValueError("a forward with labels needs input_ids: they say where the images are")

        spliced = self.splice_inputs(input_ids, labels, pixel_values, image_grid_thw)
        if position_ids is None:
            position_ids = self.rope_position_ids(input_ids, attention_mask, image_grid_thw)
        real_BS = torch.ones_like(labels) if attention_mask is None or attention_mask.ndim != 2 else attention_mask
        preceded_BS = F.pad(real_BS[:, :-1], (1, 0), value=0).bool()
        if position_ids.shape[0] == 4:
            preceded_BS &= position_ids[0] != 0
            if bool(real_BS.all()):
                attention_mask = None  # transformers tells packed sequences apart only where no mask is given
        kwargs["use_cache"] = False  # a training pass never continues, and checkpointing refuses a cache
        hidden_BSD = self.model(
            inputs_embeds=spliced.inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        ).last_hidden_state

        # Heads run on the positions that are scored only: float32 logits of all S positions would be the largest
        # tensor of a training step.
        text_mask = (labels != IGNORE_INDEX) & ~spliced.target_mask
        text_mask &= preceded_BS  # nothing before it in its sequence, so nothing predicts it
        logits_NV, text_labels = self.lm_head(hidden_BSD[predicts(text_mask)]), labels[text_mask]
        predicted_ND = self.vision_head(hidden_BSD[predicts(spliced.target_mask)])
        text_losses = text_cross_entropy(logits_NV, text_labels)
        image_losses = embedding_loss(predicted_ND, spliced.target_embeds, self.loss_weights.mse_share)
        text_loss, image_loss = mean_or_zero(text_losses), mean_or_zero(image_losses)
        return NexusGenOutput(
            loss=self.loss_weights.text * text_loss + self.loss_weights.image * image_loss,
            text_loss=text_loss,
            image_loss=image_loss,
            text_token_loss=text_losses.detach(),
            image_token_loss=image_losses.detach(),
            text_token_right=None if self.training else logits_NV.argmax(dim=-1) == text_labels,
            predicted_embeds=predicted_ND,
            target_embeds=spliced.target_embeds,
            logits=self.lm_head(hidden_BSD) if all_positions else None,
            image_embeddings=self.vision_head(hidden_BSD) if all_positions else None,
        )

    def splice_inputs(
        self, input_ids: Tensor, labels: Tensor | None, pixel_values: Tensor | None, image_grid_thw: Tensor | None
    ) -> SplicedInputs:
        """Embed text, put vision embeddings at context images and what `target_inputs` says at target images.

        Shapes as in `forward`; without labels every image is context. Targets are detached, so the gradient of the
        vision tower comes from context images alone.
        Raises ValueError when a target image has more tokens than there are prefill embeddings.
        """
        if pixel_values is None:
            nothing_1D = self._vision_embeds_of_nothing()
            spliced = self.splice(input_ids, labels, nothing_1D[:0])
            spliced.inputs_embeds = spliced.inputs_embeds + 0 * nothing_1D.sum().to(spliced.inputs_embeds.dtype)
            return spliced
        return self.splice(input_ids, labels, self.vision_embeds(pixel_values, image_grid_thw))

    def splice(self, input_ids: Tensor, labels: Tensor | None, vision_ND: Tensor) -> SplicedInputs:
        """`splice_inputs` of vision embeddings that are there already, of all images in row order."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        image_mask = input_ids == self.config.image_token_id
        target_mask = torch.zeros_like(image_mask) if labels is None else labels == self.config.image_token_id
        inputs_embeds = replace_rows(inputs_embeds, image_mask, vision_ND)

        prefill_index_N = index_within_runs(target_mask)
        if prefill_index_N.numel() and int(prefill_index_N.max()) >= self.num_target_tokens:
            side = patches_per_side(self.num_target_tokens)
            raise ValueError(
                f"a target image has {int(prefill_index_N.max()) + 1} tokens, more than the {self.num_target_tokens} "
                f"prefill embeddings; resize it to {side} x {side} patches"
            )
        # The module, not its weight: under ZeRO-3 the weight exists only inside the module's own forward.
        prefill_ND = self.image_prefill_embeds(prefill_index_N)
        if self.target_inputs == "prefill":
            inputs_embeds = replace_rows(inputs_embeds, target_mask, prefill_ND)
        else:  # the image's own embeddings stay; every process has to use every module
            inputs_embeds = inputs_embeds + 0 * prefill_ND.sum()
        return SplicedInputs(inputs_embeds, target_mask, vision_ND[target_mask[image_mask]].detach())

    def vision_embeds(self, pixel_values: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """The vision tower's merged embeddings of all images, (N, D); without a graph where the tower is frozen."""
        if image_grid_thw is None:
            raise ValueError("pixel_values without image_grid_thw, which says how the patches make up images")
        visual = self.model.visual
        # Checkpointing makes even a frozen tower's inputs require gradients; its backward would be wasted.
        trained = any(parameter.requires_grad for parameter in visual.parameters())
        if self.tower_cache is not None and not trained:
            return self.tower_cache(partial(vision_embeds, visual), pixel_values, image_grid_thw)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return vision_embeds(visual, pixel_values, image_grid_thw)

    def rope_position_ids(
        self, input_ids: Tensor, attention_mask: Tensor | None, image_grid_thw: Tensor | None
    ) -> Tensor:
        """M-RoPE position ids (3, B, S) over the whole sequence, target images included.

        Those of transformers' `get_rope_index` without its loops over rows, images and tokens, which cost a loader
        more than reading the pictures. Raises ValueError when image tokens and grids disagree in number.
        """
        is_image = input_ids == self.config.image_token_id
        config: Any = self.config.vision_config
        merge = config.spatial_merge_size
        grids = [] if image_grid_thw is None else [(h // merge, w // merge) for _, h, w in image_grid_thw.tolist()]
        num_tokens, wanted = int(is_image.sum()), sum(height * width for height, width in grids)
        if num_tokens != wanted:
            raise ValueError(f"{num_tokens} image tokens for {len(grids)} images of {wanted} tokens")
        present = torch.ones_like(is_image) if attention_mask is None else attention_mask != 0
        # How far a token moves what follows it: text by one, an image as a whole by its longer side.
        advance = (present & ~is_image).long()
        offsets = advance.new_zeros(3, *advance.shape)
        if grids:
            within = [torch.arange(height * width, device=advance.device) for height, width in grids]
            offsets[1][is_image] = torch.cat([index // w for index, (_, w) in zip(within, grids, strict=True)])
            offsets[2][is_image] = torch.cat([index % w for index, (_, w) in zip(within, grids, strict=True)])
            advance[is_image] = torch.cat(
                [(index == h * w - 1) * max(h, w) for index, (h, w) in zip(within, grids, strict=True)]
            )
        positions = advance.cumsum(dim=1) - advance + offsets
        return positions.masked_fill(~present, PADDING_POSITION)

    def _modality_ids(self, input_ids: Tensor) -> Tensor:
        """0 at text, 1 at images, 2 at videos: what transformers calls mm_token_type_ids."""
        is_image, is_video = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
        return is_image.int() + 2 * is_video.int()

    def _vision_embeds_of_nothing(self) -> Tensor:
        """(1, D): the tower on one black token, so that a rank without images runs the same modules as the others."""
        config: Any = self.config.vision_config
        side = config.spatial_merge_size
        patch_values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        patches = torch.zeros(side * side, patch_values, device=self.device, dtype=self.model.visual.dtype)
        return self.vision_embeds(patches, torch.tensor([[1, side, side]], device=self.device))


# transformers finds the renaming between the layout on disk (`visual.*`, `model.layers.*`) and its modules by class
# name; without this line `from_pretrained` and `save_pretrained` of the subclass would not translate, silently.
register_checkpoint_conversion_mapping(
    NexusGenForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
    overwrite=True,
)
