"""A trace of where the time of a run goes."""

from pathlib import Path

from lightning.pytorch.profilers import Profiler


class CallTree(Profiler):
    """Writes a page with the tree of calls of the training, sampled by pyinstrument.

    Lightning's own profilers take a string: ``trainer.profiler=simple`` sums its hooks up,
    ``pytorch`` traces operators.

    Args:
        interval: Seconds between two samples.
    """

    def __init__(self, interval: float) -> None:
        from pyinstrument import Profiler as Sampler  # an extra: most runs are not profiled

        super().__init__()
        self._sampler = Sampler(interval=interval)

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        if stage == "fit" and not self._sampler.is_running:
            self._sampler.start()

    def teardown(self, stage: str | None) -> None:
        if self._sampler.is_running:
            self._sampler.stop()
            page = Path(self.dirpath or ".") / "calls.html"
            page.write_text(self._sampler.output_html(), encoding="utf-8")
        super().teardown(stage)

    def start(self, action_name: str) -> None:
        """Do nothing: the sampler sees all."""

    def stop(self, action_name: str) -> None:
        """Do nothing: the sampler sees all."""
