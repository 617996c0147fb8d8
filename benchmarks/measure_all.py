"""Measure the project's claims about speed and memory, and write ``benchmarks/results.md``.

``make benchmark``, or ``python benchmarks/measure_all.py [--only train mtn]``

Takes one to four hours on an idle machine. Each section is a separate command, which can also be
run alone; comparisons are made within one command. ``--only`` measures some sections again and
keeps the others, each with the machine it was measured on.
"""

import argparse
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from mtnrec.run.environment import versions
from mtnrec.system.files import write_atomic
from mtnrec.system.resources import memory_bytes

HERE = Path(__file__).parent
RESULTS = HERE / "results.md"
HEAD = """# Results

Measured by `make benchmark`, without a GPU. Each section ends with its time and machine; ratios are
within one run, and times of different machines cannot be compared.
"""
SECTIONS = {
    "train": ("Training, end to end, against the literal program", ["train.py"]),
    "bf16": (
        "Training in bf16-mixed against the literal program in float32",
        ["train.py", "--models", "mmoe", "--keys", "trainer.precision=bf16-mixed"],
    ),
    "models": ("Every model beside MMoE", ["models.py"]),
    "busy": ("Training beside a busy process", ["busy.py"]),
    "step": ("What a training step is made of", ["step.py"]),
    "mtn": ("MTN", ["mtn.py"]),
    "large_vocabulary": ("Large vocabularies", ["large_vocabulary.py"]),
    "evaluate": ("Metrics of 10 million rows", ["evaluate.py"]),
    "load": ("Loading 10 million rows", ["load.py"]),
    "startup": ("Start", ["startup.py"]),
    "sweep": ("Sweeps", ["sweep.py"]),
    "noise": ("Noise", ["noise.py"]),
    "export": ("Exported models with MTN and without", ["export.py"]),
}


def machine() -> str:
    """Return one line about the machine and the versions."""
    names = [
        line.partition(":")[2].strip()
        for line in _cpu_information()
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    flags = next((line for line in _cpu_information() if line.startswith("flags")), "").split()
    vector = [flag for flag in ("avx2", "avx512f", "amx_bf16") if flag in flags]
    known = versions()
    return (
        f"{name} ({', '.join(vector) or 'no vector flags known'}), {torch.get_num_threads()} "
        f"threads, {memory_bytes() / 2**30:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {known['python']}, torch {known['torch']}, lightning {known['lightning']}"
    )


def _cpu_information() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def read_sections(path: Path) -> dict[str, str]:
    """Return the text of each section of an earlier run by its title."""
    if not path.exists():
        return {}
    _, *parts = path.read_text(encoding="utf-8").split("\n## ")
    return {title: text.strip() for title, _, text in (part.partition("\n") for part in parts)}


def run(arguments: Sequence[str]) -> str:
    """Run a benchmark; return the text of its section."""
    script, *rest = arguments
    began = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / script), *rest], capture_output=True, text=True, check=False
    )
    output = done.stdout.strip()
    if done.returncode:
        output = f"failed with exit status {done.returncode}:\n{done.stderr[-2000:]}"
    if "|---" not in output:
        output = f"```\n{output}\n```"
    seconds = time.perf_counter() - started
    command = shlex.join(["python", f"benchmarks/{script}", *rest])
    place = textwrap.fill(f"{began}, {machine()}", 100)
    return f"```\n{command}      # {seconds:.0f} s\n```\n\n{output}\n\n{place}"


def main() -> None:
    """Run the sections, writing the results after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = read_sections(arguments.out)
    for name in arguments.only:
        title, command = SECTIONS[name]
        print(title, flush=True)
        found[title] = run(command)
        parts = [
            f"## {title}\n\n{found[title]}\n" for title, _ in SECTIONS.values() if title in found
        ]
        write_atomic(arguments.out, "\n".join([HEAD, *parts]))
    print(f"The results are in {arguments.out}")


if __name__ == "__main__":
    main()
