"""Export a trained model to a file for serving systems.

``python -m mtnrec.export checkpoint=runs/esmm format=onnx``
"""

from pathlib import Path

import rich.table
from omegaconf import DictConfig
from rich import box, get_console

from mtnrec.checks import InputError, check_choice
from mtnrec.command.entry_point import entry_point
from mtnrec.run.folder import find_checkpoint
from mtnrec.serving.export import FORMATS, export
from mtnrec.serving.scorer import load_checkpoint


@entry_point("export")
def main(cfg: DictConfig) -> None:
    """Export a model if its probabilities match those of the checkpoint."""
    check_choice("format", cfg.format, list(FORMATS))
    suffix = FORMATS[cfg.format]
    checkpoint = find_checkpoint(Path(cfg.checkpoint))
    out = checkpoint.with_suffix(suffix) if cfg.out is None else Path(cfg.out)
    if out.suffix != suffix:
        raise InputError(f"out must be a {suffix} file for format={cfg.format}, got {out}")
    written = export(load_checkpoint(checkpoint, "cpu", allow=cfg.allow), cfg.format, out)

    table = rich.table.Table(box=box.SIMPLE_HEAD, title=f"{written.size:,} bytes")
    table.add_column("input")
    table.add_column("type and shape")
    for name, shape in written.inputs.items():
        table.add_row(name, shape)
    table.caption = (
        f"outputs {', '.join(written.outputs)}: float32 (rows,), at most "
        f"{written.difference:.0e} from the checkpoint's on {written.rows:,} random rows"
    )
    console = get_console()
    console.print(table)
    console.print(
        f"The model is {out}; {written.description} says how to make its inputs from raw values",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
