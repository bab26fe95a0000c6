"""The first stage of the pipelines that need no download: the procedural dataset."""

from data.shapes.dataset import draw_rows
from train.schemas.standins import ShapesStageConfig
from train.stage import Stage


class ShapesStage(Stage[ShapesStageConfig]):
    def run(self) -> bool:
        self.write_artifact(lambda directory: draw_rows(directory, self.config.shapes, self.config.seed))
        return True
