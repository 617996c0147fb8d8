"""Make a W&B workspace or report of a project's runs.

``python -m mtnrec.dashboard entity=TEAM experiment=table_1 kind=report``
"""

from pathlib import Path

from omegaconf import DictConfig
from rich import get_console

from mtnrec.checks import InputError, check_choice, check_flag
from mtnrec.command.entry_point import entry_point
from mtnrec.system.files import write_json
from mtnrec.tracking.dashboard import make_report, make_workspace, specification


@entry_point("dashboard")
def main(cfg: DictConfig) -> None:
    """Write the specification of a W&B workspace or report, and send it unless offline."""
    check_choice("kind", cfg.kind, ["workspace", "report"])
    check_flag("offline", cfg.offline)
    make = make_workspace if cfg.kind == "workspace" else make_report
    view = make(cfg.entity, cfg.project, cfg.experiment, list(cfg.tasks))
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, specification(view))
    if cfg.offline:
        message = f"The specification is {out}; the same command with offline=false sends it"
    else:
        try:
            view.save()
        except Exception as error:  # of wandb, its transport or its server
            raise InputError(
                f"W&B did not accept the {cfg.kind} ({error}); the specification is {out}. Log in "
                "with `wandb login`, and run the same command where W&B can be reached."
            ) from error
        message = f"The {cfg.kind} is {view.url}"
    get_console().print(message, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
