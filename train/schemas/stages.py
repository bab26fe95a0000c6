"""The whole resolved config of each stage, and the checks that need no model: run before any process starts."""

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from data.mixture.order import check_dataset, load_mixture
from data.mixture.pictures import PictureHashes, fingerprint_pictures, named_pictures
from data.mixture.quarantine import LeftOut
from data.mixture.rehearsal import num_rehearsed
from data.records.dataset_files import is_there
from data.shapes.dataset import ShapesConfig
from data.shards.files import EMBED_DTYPES, ShardSpec, require_global_batch
from data.shards.plan import ROWS, SplitRows
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.artifacts.content import CONTENTS
from nexus_gen.language.processor_files import require_processor
from nexus_gen.parts.models import target_tokens_of
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import (
    NUM_REFERENCE_TOKENS,
    FluxGeometry,
    LanguageGeometry,
    TextEncoderGeometry,
    VaeGeometry,
    VisionGeometry,
)
from nexus_gen.tensors.fit import require_autoregressive, require_vae
from nexus_gen.tensors.headers import read_checkpoint
from nexus_gen.tensors.tensor_shapes import read_config
from nexus_gen.tensors.weight_files import BIN, flux_part, has_weights
from train.schemas.common import (
    RUNTIME,
    AverageConfig,
    DiffusionConfig,
    HeldoutConfig,
    LaunchConfig,
    LoggerConfig,
    MessagesConfig,
    ModelConfig,
    OptimConfig,
    PathStr,
    PretrainModelConfig,
    RowsConfig,
    SamplesConfig,
    TargetConfig,
    TrainerConfig,
    TrainRowsConfig,
    not_negative,
    one_of,
    positive,
    share,
)
from train.schemas.initial_decoder import require_initial_decoder
from train.schemas.rehearsal import check_rehearsal, require_rehearsal_rows

log = logging.getLogger(__name__)

SCHEDULE_FILE = "schedule.json"  # of the artifact of stage=schedule
PICTURES = "pictures_{split}.jsonl"  # the pictures that the rows of a split name


@dataclass
class StageConfig:
    """What every stage has. A run lives in runs_dir/name, a stage in its own directory there.

    resume: go on from what a try of the same config left, or of a training stage that is to train longer or shorter;
    false starts over.
    """

    stage: str
    seed: int
    launch: Annotated[LaunchConfig, RUNTIME]
    resume: Annotated[bool, RUNTIME]
    name: Annotated[str, RUNTIME]
    runs_dir: PathStr

    kind: ClassVar[str]  # the artifact that the stage makes
    # Version of what the stage computes. Raise a stage's own, by hand, when a change of the code makes other results of
    # the same config and inputs, and only then: everybody's artifacts of that stage are made again. It was not raised
    # when embedded colour profiles came to be applied, which changes nothing for pictures in sRGB.
    numerics: ClassVar[int] = 1
    trains: ClassVar[bool] = False  # has steps, checkpoints and metrics
    reuses_by_content: ClassVar[bool] = False  # looks up by content what earlier tries made, whatever their config

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name / self.stage

    @property
    def artifact_dir(self) -> Path:
        return self.run_dir / "artifact"

    def check(self) -> None:
        """Values that contradict each other; no files are read."""
        self.launch.check()
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more")
        if not self.name:
            raise UserError("name is empty; a run is called something, as in name=mine")
        if "/" in self.name or self.name in (".", "..") or any(ord(character) < 32 for character in self.name):
            raise UserError(
                f"name is {self.name!r}; a run is one directory inside runs_dir: give a name without / and line breaks "
                "that is not . or .., and runs_dir=... for the place"
            )
        if not self.runs_dir:
            raise UserError("runs_dir is empty; give a directory, as in runs_dir=runs")

    def rows(self) -> dict[str, Path]:
        """Role -> the files of message rows among `inputs`."""
        data: Any = getattr(self, "data", None)
        return message_inputs(data) if data else {}

    def inputs(self) -> dict[str, Path]:
        """Role -> the file or directory that this stage reads."""
        return self.rows()

    @property
    def contents(self) -> Path:
        """The memory of what files hold, which all stages of a run share."""
        return Path(self.runs_dir) / self.name / CONTENTS

    def pictures(self) -> dict[str, Iterable[str]]:
        """Role -> names of the pictures that rows among `inputs` name."""
        data: Any = getattr(self, "data", None)
        if not isinstance(data, TrainRowsConfig):
            return {}
        left_out = data.left_out()
        return {
            f"pictures.{split}": named_pictures(
                data.dataset(split),
                left_out,
                self.run_dir / PICTURES.format(split=split),
                data.picture_root,
            )
            for split in data.splits
        }

    def content_fingerprints(self) -> dict[str, str]:
        """Role -> fingerprint of what the stage reads beyond `inputs`: the pictures that rows name."""
        hashes = PictureHashes(self.contents)
        found = {role: fingerprint_pictures(names, hashes) for role, names in self.pictures().items()}
        hashes.contents.save()
        return found

    def preflight(self) -> None:
        """Read the inputs far enough to refuse broken ones in seconds; no torch, no weights."""
        self.require(self.inputs())

    def preflight_rows(self) -> None:
        """The part of `preflight` that message rows alone decide: a pipeline asks it before its first stage starts."""

    def require(self, inputs: dict[str, Path]) -> None:
        """UserError for one that is not there."""
        for role, where in inputs.items():
            if not where.exists():
                raise UserError(f"{role}: {where} does not exist; {self.remedy(where)}")

    def remedy(self, where: Path) -> str:
        """How the missing input comes into being."""
        run = Path(self.runs_dir) / self.name
        if run in where.parents:
            return f"run stage={where.relative_to(run).parts[0]} first, or give another path"
        if where.is_relative_to(Path.cwd()):
            return "check the path, which begins where the command was started unless it is absolute"
        return "check the path"


@dataclass
class ShapesStageConfig(StageConfig):
    shapes: ShapesConfig

    kind: ClassVar[str] = "messages"

    def check(self) -> None:
        super().check()
        self.shapes.check()


@dataclass
class ScheduleTrainerConfig:
    """What of the training stages' trainer decides how long a step takes, as in TrainerConfig."""

    precision: str
    micro_batch_size: int
    global_batch_size: int


@dataclass
class ScheduleConfig:
    """generation_decoder, editing_decoder: what these begin with; empty where they begin at random. num_pictures: how
    many of the training rows' pictures are looked at."""

    generation_decoder: PathStr
    editing_decoder: PathStr
    num_pictures: int


@dataclass
class ScheduleModelConfig(ModelConfig, TargetConfig):
    """What training begins with, and in which geometry."""


@dataclass
class ScheduleDataConfig(RowsConfig):
    """max_pixels, max_bad_fraction: as in MessagesConfig."""

    max_pixels: int
    max_bad_fraction: Annotated[float, RUNTIME]


@dataclass
class ScheduleStageConfig(StageConfig):
    """budget_minutes: what the whole pipeline may take on this machine, scores included. Training gets less where its
    rows ask for less."""

    budget_minutes: float
    model: ScheduleModelConfig
    data: ScheduleDataConfig
    trainer: ScheduleTrainerConfig
    schedule: ScheduleConfig

    kind: ClassVar[str] = "schedule"

    def check(self) -> None:
        super().check()
        self.model.check()
        if self.budget_minutes <= 0:
            raise UserError(f"budget_minutes is {self.budget_minutes:g}; it must be above 0, as in budget_minutes=10")
        positive("trainer", self.trainer, "micro_batch_size", "global_batch_size")
        positive("schedule", self.schedule, "num_pictures")

    def inputs(self) -> dict[str, Path]:
        decoders = {
            f"schedule.{kind}": Path(getattr(self.schedule, kind))
            for kind in ("generation_decoder", "editing_decoder")
            if getattr(self.schedule, kind)
        }
        models = {"model.qwen": Path(self.model.qwen), "model.flux": Path(self.model.flux)}
        return {**models, **decoders, **self.rows()}

    def preflight(self) -> None:
        super().preflight()
        require_checkpoint("model.qwen", self.model.qwen)
        self.preflight_rows()
        require_whole(Path(self.model.qwen))

    def preflight_rows(self) -> None:
        checked_quarantine(self, self.data)
        self.task_rows()

    def task_rows(self) -> dict[str, int]:
        """Training rows of each task."""
        data = self.data
        return check_dataset(data.train, data.max_bad_fraction, data.left_out(), data.picture_root)


@dataclass
class StandinsConfig:
    """Geometry of the tiny models that have no config of their own yet, and how long two of them are fitted.

    vae_steps, vision_steps: batches of vae_batch_size and vision_batch_size pictures; vision_steps 0 leaves the vision
    tower random, initialised to keep what it sees. num_images: pictures to fit to.
    """

    vision: VisionGeometry
    language: LanguageGeometry
    clip: TextEncoderGeometry
    t5: TextEncoderGeometry
    vae_steps: int
    vae_batch_size: int
    vision_steps: int
    vision_batch_size: int
    num_images: int


@dataclass
class StandinsModelConfig(TargetConfig):
    """num_target_tokens: what the vision tower is fitted to see of a picture, beside a reference's."""

    transformer: FluxGeometry
    vae: VaeGeometry
    image_size: int


@dataclass
class StandinsStageConfig(StageConfig):
    model: StandinsModelConfig
    data: TrainRowsConfig
    standins: StandinsConfig

    kind: ClassVar[str] = "base_models"

    def check(self) -> None:
        super().check()
        self.model.check()
        positive("standins", self.standins, "vae_steps", "vae_batch_size", "vision_batch_size", "num_images")
        not_negative("standins", self.standins, "vision_steps")

    def preflight(self) -> None:
        super().preflight()
        self.preflight_rows()

    def preflight_rows(self) -> None:
        check_dataset(self.data.train, left_out=self.data.left_out(), picture_root=self.data.picture_root)


@dataclass
class PretrainObjective:
    """loss = text_loss_weight x cross-entropy + image_loss_weight x image loss, where
    image loss = (1 - cosine_fraction) x MSE + cosine_fraction x mean(1 - cosine).

    target_inputs: what stands at the tokens of a picture that is being predicted, `prefill` embeddings or the
    picture's own `embeddings`, which generation then feeds back one by one.
    """

    text_loss_weight: float
    image_loss_weight: float
    cosine_fraction: float
    target_inputs: str


@dataclass
class FreezeConfig:
    vision: bool
    merger: bool


@dataclass
class PretrainConfig(StageConfig):
    model: PretrainModelConfig
    data: MessagesConfig
    objective: PretrainObjective
    freeze: FreezeConfig
    optim: OptimConfig
    average: AverageConfig
    trainer: TrainerConfig
    heldout: HeldoutConfig
    logger: Annotated[LoggerConfig, RUNTIME]

    kind: ClassVar[str] = "ar_checkpoint"
    trains: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        self.model.check()
        self.optim.check(self.trainer)
        lengths = (self.data.num_epochs, self.data.token_budget, self.trainer.max_steps)
        if min(lengths) < 0 or sum(length > 0 for length in lengths) != 1:
            epochs, tokens, steps = lengths
            raise UserError(
                f"data.num_epochs is {epochs:g}, data.token_budget {tokens} and trainer.max_steps {steps}; one of them "
                "says how long to train and must be above 0: set the other two to 0"
            )
        self.trainer.check(self.launch.world_size, by_steps=self.trainer.max_steps > 0)
        self.logger.check()
        self.average.check()
        self.heldout.check()
        not_negative("objective", self.objective, "text_loss_weight", "image_loss_weight")
        share("objective", self.objective, "cosine_fraction")
        one_of("objective.target_inputs", self.objective.target_inputs, "prefill", "embeddings")
        self.data.check()
        positive("data", self.data, "max_length", "max_pixels")
        if not 0 <= self.data.max_bad_fraction < 1:
            raise UserError(f"data.max_bad_fraction is {self.data.max_bad_fraction}; it must be in [0, 1)")

    def with_steps(self, epoch_rows: int) -> "PretrainConfig":
        """This config with trainer.max_steps said by data.num_epochs where that is in force; the last step is whole.

        By data.token_budget it is a bound, which rows of one token would reach.
        """
        if self.trainer.max_steps:
            return self
        rows = self.data.num_epochs * epoch_rows or self.data.token_budget
        steps = math.ceil(rows / self.trainer.global_batch_size)
        return replace(self, trainer=replace(self.trainer, max_steps=steps))

    def inputs(self) -> dict[str, Path]:
        return {"model.qwen": Path(self.model.qwen), **self.rows()}

    def preflight(self) -> None:
        super().preflight()
        require_checkpoint("model.qwen", self.model.qwen)
        own, wanted = target_tokens_of(Path(self.model.qwen)), self.model.num_target_tokens
        if own is not None and own != wanted:
            raise UserError(
                f"model.num_target_tokens is {wanted} and model.qwen {self.model.qwen} makes pictures of {own} tokens; "
                f"give model.num_target_tokens={own}, or begin with a plain Qwen2.5-VL"
            )
        self.preflight_rows()
        require_whole(Path(self.model.qwen))

    def preflight_rows(self) -> None:
        left_out = checked_quarantine(self, self.data)
        check_dataset(self.data.train, self.data.max_bad_fraction, left_out, self.data.picture_root)
        check_dataset(self.data.heldout, left_out=left_out, picture_root=self.data.picture_root)
        require_rehearsal_rows(self.data, "model.qwen", Path(self.model.qwen))
        check_rehearsal(self.data, left_out, self.data.max_bad_fraction)


@dataclass
class EmbedConfig:
    """samples_per_shard: a finished shard survives an interruption. dtype: how embeddings are stored.

    latents: store the VAE's latents too; decoders train on them. null_context: store T5's output for the empty prompt,
    for decoders that drop conditions or sample with guidance. batch_size: pictures per forward; another one changes
    embeddings by rounding, and recomputes nothing. num_workers: processes per rank that decode pictures ahead; 0
    decodes in the rank's own. compile: the models' blocks `always`, `never`, or `auto`: on a GPU that has at least
    10,000 rows to embed, which pays for the time that compiling takes; by rounding, like batch_size.
    """

    samples_per_shard: int
    dtype: str
    latents: bool
    null_context: bool
    batch_size: Annotated[int, RUNTIME]
    num_workers: Annotated[int, RUNTIME]
    compile: Annotated[str, RUNTIME]
    autoregressive: PathStr


@dataclass
class EmbedEditing(EmbedConfig):
    """pixels: how results become square for the autoencoder: squash, as for the embeddings, or crop, as published."""

    pixels: str


@dataclass
class EmbedDataConfig(RowsConfig):
    """max_bad_fraction: of all rows; bad ones are quarantined, and past this rate the stage stops."""

    max_pixels: int
    max_bad_fraction: Annotated[float, RUNTIME]


@dataclass
class EmbedStageConfig(StageConfig):
    model: DiffusionConfig
    data: EmbedDataConfig
    embed: EmbedConfig

    kind: ClassVar[str] = "embedding_shards"
    reuses_by_content: ClassVar[bool] = True
    task: ClassVar[str]

    @property
    def reads_conversations(self) -> bool:
        """Whether words and all pictures of a row enter its embeddings, or its last picture alone."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        self.model.check()
        positive("embed", self.embed, "samples_per_shard", "batch_size")
        one_of("embed.dtype", self.embed.dtype, *EMBED_DTYPES)
        one_of("embed.compile", self.embed.compile, "auto", "always", "never")
        not_negative("embed", self.embed, "num_workers")
        self.data.check()
        if not 0 <= self.data.max_bad_fraction < 1:
            raise UserError(f"data.max_bad_fraction is {self.data.max_bad_fraction}; it must be in [0, 1)")

    def inputs(self) -> dict[str, Path]:
        inputs = {"embed.autoregressive": Path(self.embed.autoregressive), **self.rows()}
        return {**inputs, "model.flux": Path(self.model.flux)} if self.embed.latents else inputs

    def read_splits(self) -> list[SplitRows]:
        """The rows of both splits with what their pictures hold; only new or changed pictures are read for it."""
        hashes, left_out = PictureHashes(self.contents), self.data.left_out()
        splits = [
            SplitRows.read(
                split,
                self.data.dataset(split),
                self.task,
                self.reads_conversations,
                hashes,
                left_out,
                self.run_dir / ROWS.format(split=split),
                self.data.picture_root,
            )
            for split in self.data.splits
        ]
        hashes.contents.save()
        return splits

    def content_fingerprints(self) -> dict[str, str]:
        return {f"pictures.{split.split}": split.fingerprint for split in self.read_splits()}

    def preflight(self) -> None:
        super().preflight()
        require_checkpoint("embed.autoregressive", self.embed.autoregressive)
        require_rehearsal_rows(self.data, "embed.autoregressive", Path(self.embed.autoregressive))
        self.preflight_rows()
        require_whole(Path(self.embed.autoregressive))
        if self.embed.latents:
            vae = flux_part(Path(self.model.flux), "autoencoder")
            if vae.suffix != BIN:  # which takes torch to read
                require_vae(vae, read_checkpoint(vae).shapes, self.model.vae)

    def preflight_rows(self) -> None:
        left_out = checked_quarantine(self, self.data)
        for split in (self.data.train, self.data.heldout):
            tasks = check_dataset(split, self.data.max_bad_fraction, left_out, self.data.picture_root)
            if self.task not in tasks:
                raise UserError(
                    f"{split} holds no {self.task} rows (it has {tasks}); stage={self.stage} needs some, and "
                    "stage=... instead of pipeline=... runs the stages that do without, one at a time"
                )
        check_rehearsal(self.data, left_out, self.data.max_bad_fraction)

    def num_train_rows(self) -> int:
        """Samples that its artifact holds at most."""
        data, left_out = self.data, self.data.left_out()
        own = check_dataset(data.train, data.max_bad_fraction, left_out, data.picture_root)[self.task]
        old = check_rehearsal(data, left_out, data.max_bad_fraction).get(self.task, 0)
        return own + min(num_rehearsed(own, data.rehearsal), old)


@dataclass
class GenerationEmbedConfig(EmbedConfig):
    """predicted: store the embeddings that the language model predicts, too, for objective.predicted_fraction."""

    predicted: bool


@dataclass
class EmbedGenerationConfig(EmbedStageConfig):
    embed: GenerationEmbedConfig

    task: ClassVar[str] = "generation"

    @property
    def reads_conversations(self) -> bool:
        return self.embed.predicted


@dataclass
class EmbedEditingConfig(EmbedStageConfig):
    embed: EmbedEditing

    task: ClassVar[str] = "editing"

    @property
    def reads_conversations(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        one_of("embed.pixels", self.embed.pixels, "squash", "crop")


@dataclass
class DecoderObjective:
    """timesteps: per_sample, or per_batch as in the published trainer. guidance: FLUX's embedded guidance.

    density: of noise levels, uniform or logit_normal. shift: 3 as published; more pixels want more. weighting of the
    levels in the loss: published (largest in the middle) or none; weights have mean 1 whatever the density.
    condition_dropout: share of samples whose condition is the empty prompt, which classifier-free guidance asks about.
    """

    timesteps: str
    density: str
    shift: float
    weighting: str
    condition_dropout: float
    guidance: float

    def check(self) -> None:
        one_of("objective.timesteps", self.timesteps, "per_sample", "per_batch")
        one_of("objective.density", self.density, "uniform", "logit_normal")
        one_of("objective.weighting", self.weighting, "published", "none")
        positive("objective", self, "shift")
        share("objective", self, "condition_dropout")


@dataclass
class EditingObjective(DecoderObjective):
    """reference: whether the decoder sees the source's 324 tokens, or the target's alone.

    round_positions: hold token positions in the training dtype, as the published code does; false keeps float32.
    """

    reference: bool
    round_positions: bool


@dataclass
class GenerationObjective(DecoderObjective):
    """predicted_fraction: share of samples whose conditioning is what the language model predicts, as at inference."""

    predicted_fraction: float


@dataclass
class SamplingConfig:
    """What `generate` and `edit` do by default with the decoder; cfg_scale 1 switches classifier-free guidance off."""

    num_inference_steps: int
    cfg_scale: float
    embedded_guidance: float


@dataclass
class DecoderInit:
    """decoder: a released or earlier decoder to go on from; empty starts from FLUX and a fresh conditioner.

    transformer: a decoder, of either kind, whose transformer takes FLUX's place. Both: a file, or its artifact.
    """

    decoder: PathStr
    transformer: PathStr


@dataclass
class EditingInit(DecoderInit):
    """projector: where the projector's layer comes from, `qwen` (layer 0 of model.qwen) or `random`."""

    projector: str


@dataclass
class DecoderConfig(StageConfig):
    model: DiffusionConfig
    init: DecoderInit
    objective: DecoderObjective
    sampling: SamplingConfig
    optim: OptimConfig
    average: AverageConfig
    trainer: TrainerConfig
    shards: PathStr
    heldout: HeldoutConfig
    samples: Annotated[SamplesConfig, RUNTIME]
    logger: Annotated[LoggerConfig, RUNTIME]

    trains: ClassVar[bool] = True
    num_reference_tokens: ClassVar[int]

    def check(self) -> None:
        super().check()
        self.model.check()
        self.optim.check(self.trainer)
        self.trainer.check(self.launch.world_size)
        self.logger.check()
        if self.init.decoder and self.init.transformer:
            raise UserError(
                "init.transformer has no effect beside init.decoder, which brings its own; give one of them"
            )
        self.objective.check()
        self.average.check()
        self.heldout.check()
        self.samples.check()
        positive("sampling", self.sampling, "num_inference_steps")

    def inputs(self) -> dict[str, Path]:
        inputs = {"shards": Path(self.shards), "model.flux": Path(self.model.flux)}
        for role in ("decoder", "transformer"):
            if getattr(self.init, role):
                inputs[f"init.{role}"] = Path(getattr(self.init, role))
        return inputs

    def preflight(self) -> None:
        super().preflight()
        manifest = Manifest.load(self.shards).require("embedding_shards", self.shards)
        side = self.model.image_size // self.model.vae.downscale
        ShardSpec.load(manifest).require(
            self.shards,
            num_reference_tokens=self.num_reference_tokens,
            latent_shape=[self.model.vae.latent_channels, side, side],
        )
        require_initial_decoder(self)
        num_samples = sum(shard["samples"] for shard in manifest.details["splits"]["train"])
        require_global_batch(self.shards, "train", num_samples, self.trainer.global_batch_size)


@dataclass
class GenerationDecoderConfig(DecoderConfig):
    objective: GenerationObjective

    kind: ClassVar[str] = "generation_decoder"
    num_reference_tokens: ClassVar[int] = 0

    def check(self) -> None:
        super().check()
        share("objective", self.objective, "predicted_fraction")

    def preflight(self) -> None:
        super().preflight()
        if self.objective.predicted_fraction and not ShardSpec.load(Manifest.load(self.shards)).predicted:
            raise UserError(
                f"objective.predicted_fraction is {self.objective.predicted_fraction} and the shards in {self.shards} "
                "hold true embeddings only; give stage=embed_generation embed.predicted=true first"
            )


@dataclass
class EditingDecoderConfig(DecoderConfig):
    model: ModelConfig
    init: EditingInit
    objective: EditingObjective

    kind: ClassVar[str] = "editing_decoder"
    num_reference_tokens: ClassVar[int] = NUM_REFERENCE_TOKENS

    def check(self) -> None:
        super().check()
        one_of("init.projector", self.init.projector, "qwen", "random")

    def inputs(self) -> dict[str, Path]:
        inputs = super().inputs()
        if not self.init.decoder:
            inputs["model.qwen"] = Path(self.model.qwen)
        return inputs

    def preflight(self) -> None:
        super().preflight()
        require_checkpoint("model.qwen", self.model.qwen)


def preflight_pipeline(configs: Sequence[StageConfig]) -> None:
    """Preflight the first stage, and of the later ones what message rows decide, before any runs.

    Rows that a stage of the pipeline makes itself are not there yet.
    """
    configs[0].preflight()
    embedded: dict[Path, EmbedStageConfig] = {}
    for number, config in enumerate(configs):
        rows, made = config.rows(), [earlier.run_dir for earlier in configs[:number]]
        if not any(where.is_relative_to(directory) for where in rows.values() for directory in made):
            config.require(rows)
            config.preflight_rows()
            if isinstance(config, EmbedStageConfig):
                embedded[config.artifact_dir] = config
        if isinstance(config, DecoderConfig) and (source := embedded.get(Path(config.shards))):
            rehearsal = " and rehearsal" if source.data.rehearsal else ""
            where = f"{source.data.train} ({source.task} rows{rehearsal})"
            require_global_batch(where, "train", source.num_train_rows(), config.trainer.global_batch_size)


def message_inputs(data: TrainRowsConfig) -> dict[str, Path]:
    """Datasets, every file that they draw from where they are several, quarantine files: their contents count."""
    inputs = {}
    places = {role: Path(getattr(data, role)) for role in data.splits}
    if isinstance(data, RowsConfig) and data.rehearsal:
        places["rehearsal_rows"] = data.rehearsal_file
    for role, where in places.items():
        files = load_mixture(where).files if is_there(where) else [where]
        if where.is_file() or files == [where]:
            inputs[f"data.{role}"] = where
        inputs |= {f"data.{role}[{n}]": file for n, file in enumerate(files) if file != where}
    return inputs | {f"data.quarantine[{n}]": Path(path) for n, path in enumerate(data.quarantine)}


def checked_quarantine(config: StageConfig, data: RowsConfig) -> LeftOut:
    """The rows that a stage leaves out. UserError when it writes the files itself, or none of their rows is its own."""
    for path in data.quarantine:
        if Path(path).is_relative_to(config.run_dir):
            raise UserError(f"data.quarantine: {path} is written by this stage itself; give a copy from outside of it")
    left_out = data.left_out()
    if left_out.elsewhere and not left_out:
        raise UserError(
            f"data.quarantine names rows of {', '.join(left_out.elsewhere)}, and of no file of data.train and "
            "data.heldout; run `nexus-gen data check` on these and give what it writes"
        )
    for file, count in left_out.elsewhere.items():
        log.warning("data.quarantine names %s, which is in neither data.train nor data.heldout (rows: %d)", file, count)
    return left_out


def read_ahead(config: StageConfig) -> None:
    """Read what takes long and is remembered: the rows of a stage, while an earlier stage runs.

    What is missing yet, or wrong, is told when the stage's turn comes.
    """
    data: Any = getattr(config, "data", None)
    with contextlib.suppress(UserError, OSError):
        if isinstance(data, TrainRowsConfig):
            for split in data.splits:
                bad = getattr(data, "max_bad_fraction", 0.0)
                check_dataset(getattr(data, split), bad, data.left_out(), data.picture_root)
        config.content_fingerprints()


def require_checkpoint(key: str, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a Qwen2.5-VL checkpoint directory; UserError when it is something else."""
    config = Path(directory) / "config.json"
    if not config.is_file():
        raise UserError(f"{key}: {directory} holds no config.json; give a Qwen2.5-VL or Nexus-Gen checkpoint directory")
    values = read_config(Path(directory)) or {}
    if values.get("model_type") != "qwen2_5_vl":
        raise UserError(f"{key}: {directory} holds a {values.get('model_type')} model; a qwen2_5_vl one is needed")
    return values


def require_whole(checkpoint: Path) -> None:
    """UserError when a checkpoint's weights, tokenizer or processor do not fit its config.json.

    Some stages read them before they load them.
    """
    if has_weights(checkpoint):  # the loader names a directory that holds none
        require_autoregressive(checkpoint, read_checkpoint(checkpoint).shapes)
        require_processor(checkpoint)


# In the order in which pipelines run them, which is how they are listed.
SCHEMAS: dict[str, type[StageConfig]] = {
    "shapes": ShapesStageConfig,
    "standins": StandinsStageConfig,
    "schedule": ScheduleStageConfig,
    "pretrain": PretrainConfig,
    "embed_generation": EmbedGenerationConfig,
    "generation_decoder": GenerationDecoderConfig,
    "embed_editing": EmbedEditingConfig,
    "editing_decoder": EditingDecoderConfig,
}
