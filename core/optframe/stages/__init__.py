"""The stages of a run: their order, what each does, and the cache that serves what has been done before."""

from optframe.stages.context import RunRequest, Source
from optframe.stages.run import DUMP_FOLDER, Run, wanted_pipeline
from optframe.stages.runner import StageResult, StageRunner, Worker

__all__ = ["DUMP_FOLDER", "Run", "RunRequest", "Source", "StageResult", "StageRunner", "Worker", "wanted_pipeline"]
