"""Machines of the runs: what they are called, and whether costs compare across them."""

from collections import Counter

import pandas as pd

from mtnrec.reporting.runs import Runs
from mtnrec.run.record import RunRecord

_GIB = 2**30
_MOST_MACHINES = 3  # in a sentence


def hardware(record: RunRecord) -> str:
    """Return processor, cores, memory and GPUs of a run; empty for a record without them."""
    machine = record.machine
    cores, memory = machine.get("cores"), machine.get("memory_bytes")
    gpus = Counter(map(str, machine.get("gpus") or ()))
    parts = [
        str(machine.get("processor") or ""),
        f"{cores} core{'s' * (cores != 1)}" if cores else "",
        f"{memory / _GIB:.0f} GiB" if isinstance(memory, int | float) else "",
        *(f"{count}x {name}" if count > 1 else name for name, count in gpus.items()),
    ]
    return ", ".join(filter(None, parts))


def threads(record: RunRecord) -> str:
    """Return the threads of a run; empty for a record without them."""
    count = record.threads
    return f"{count} thread{'s' * (count != 1)} per run" if count else ""


def describe_machines(runs: Runs) -> str:
    """Return the different machines of all runs, with their operating system, most used first."""
    found = Counter(
        ", ".join(filter(None, (hardware(run.record), str(run.record.machine.get("os") or ""))))
        for run in runs
    )
    return listed([name for name, _ in found.most_common() if name])


def listed(names: list[str]) -> str:
    """Join names by semicolons, the first three and how many others there are."""
    more = len(names) - _MOST_MACHINES
    return "; ".join([*names[:_MOST_MACHINES], *([f"and {more} more"] if more > 0 else [])])


def warn_of_machines(runs: Runs) -> list[str]:
    """Return a warning if an arm ran on other hardware or threads than its baseline.

    Runs of unknown hardware are left out.
    """
    places = [", ".join(filter(None, (hardware(run.record), threads(run.record)))) for run in runs]
    known = runs.settings.assign(place=pd.array(places, "string"))
    known = known[[bool(run.record.machine) for run in runs]]
    arms = known.groupby(["baseline", "arm"])["place"].agg(
        lambda found: " | ".join(sorted(set(found)))
    )
    differing = arms.groupby("baseline").nunique() > 1
    count = int(differing.sum())
    if not count:
        return []
    return [
        f"Costs are not comparable in {count} of {len(differing)} comparisons: arms ran on "
        f"different hardware or threads ({listed(sorted(set(known['place'])))})."
    ]
