"""Tune the arms of a comparison with equal budgets, then train fresh seeds of each best setting.

A *study* is the search of one arm in one *place*, a combination of the swept values (data set,
model, …). All studies have the same number of trials and the same seed of the sampler. Their trials
are runs without a test, so that only validation chooses.
"""

import itertools
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override
from hydra.plugins.launcher import Launcher
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich import get_console

from mtnrec.checks import InputError, check_choice, check_integer
from mtnrec.command.config import naming_folders_after, override_key
from mtnrec.run.folder import FAILURE_FILE, State, run_state
from mtnrec.run.identity import RunIdentity
from mtnrec.run.record import RECORD_FILE, RunRecord
from mtnrec.sweep.composition import Composer
from mtnrec.sweep.launch import (
    Job,
    PreparedData,
    launch_jobs,
    make_job,
    run_jobs,
    write_plan,
)
from mtnrec.sweep.progress import monitored
from mtnrec.system.files import read_json
from mtnrec.tuning.record import TUNING_FILE, Budget, Trial, TunedArm, Tuning, best_trial
from mtnrec.tuning.search import Search
from mtnrec.tuning.space import Choice, Range, Setting, Space

_OWN_KEYS = ("seed", "test")  # set by the search
_BUILT = ("mtn", "regularizer", "balance")  # groups whose constructors check their values alone

_logger = logging.getLogger(__name__)


@dataclass
class Study:
    """Search of one arm in one place.

    Args:
        arm: Name of the arm.
        title: The name, with the swept values where several places are.
        place: Hash of the settings that the arms of the place share.
        lines: Overrides of all its runs, by key.
        own: Keys of the arm's own overrides.
        space: Ranges and choices by key, with the ``+`` of keys that are added.
        budget: What the search may spend.
        composer: Composes its runs.
        named: Keys that the folders are named after.
        directory: Folder of the sweep.
        trials: Told trials.
        jobs: Their runs.
        better: Better direction of the monitor.
        is_baseline: Whether the other arms of its place are compared with it.
    """

    arm: str
    title: str
    place: str
    lines: Mapping[str, str]
    own: Sequence[str]
    space: Space
    budget: Budget
    composer: Composer
    named: Sequence[str]
    directory: Path
    trials: list[Trial] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    better: str = "higher"
    is_baseline: bool = False

    def __post_init__(self) -> None:
        budget = self.budget
        self.search = Search(
            self.space, trials=budget.trials, batch=budget.batch, seed=budget.sampler_seed
        )
        self._open: list[tuple[Setting, Job]] = []

    def job(self, setting: Setting, seed: int, *, test: bool) -> Job:
        """Return the run of a setting.

        Raises:
            InputError: If the arm has a key that its choices lack.
        """
        values = [f"{key}={_as_override(value)}" for key, value in setting.items()]
        lines = [*self.lines.values(), *values, f"seed={seed}", f"test={str(test).lower()}"]
        with naming_folders_after(self.named):
            composed, kept = self.composer.compose(lines)
            own = {*self.own, *self.space}
            for key in (override_key(line) for line in lines if line not in kept):
                if key in own:
                    raise InputError(
                        f"arm {self.arm} must have keys of its choices, got {key}, which "
                        f"{_choice(composed, key)} lacks. Correct it, leave it out, or choose "
                        "another model or data set."
                    )
            return make_job(composed, kept)

    def ask(self) -> list[Job]:
        """Return the trials of the next batch until it is told; none at the end."""
        if not self._open:
            seed = self.budget.trial_seed
            self._open = [(own, self.job(own, seed, test=False)) for own in self.search.ask()]
        return [job for _, job in self._open]

    def tell(self) -> None:
        """Tell the search what its open batch came to."""
        losses: list[float | None] = []
        for setting, job in self._open:
            value = None
            if run_state(job.folder) is State.FINISHED:
                found = monitored(RunRecord.read(job.folder / RECORD_FILE))
                value, self.better = found.value, found.better
            losses.append(value if value is None or self.better == "lower" else -value)
            self.trials.append(Trial(_name(job, self.directory), setting, value))
            self.jobs.append(job)
        self.search.tell(losses)
        self._open = []


def plan_studies(
    config: DictConfig,
    loader: ConfigLoader,
    params: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    budget: Budget,
    arguments: Sequence[str],
    only: str | Sequence[str] | None = None,
) -> list[Study]:
    """Return the studies: each arm in each place.

    ``a,b`` and ``range(…)`` in ``params`` or on the command line sweep over places, ``choice(a,b)``
    and ``interval(a,b)`` are searched, any other value is fixed.

    Args:
        config: Config of the sweep.
        loader: Composes the configs of the runs.
        params: Values of every arm, by key.
        arms: Values of each arm, by key; they replace those of ``params``.
        budget: What each search may spend.
        arguments: Arguments of the command line, which replace keys in every arm.
        only: Names of the arms to return studies of, a list or ``a,b``; None for all. The baseline
            is the first of ``arms`` either way.

    Raises:
        InputError: If a space is wrong, or no arm has a name.
    """
    parser = OverridesParser.create(config_loader=loader)
    if not arms:
        raise InputError(
            "hydra.sweeper.arms must have an arm, got none. Give each its keys, as in "
            "conf/experiment/tuned.yaml."
        )
    chosen = _parse_names(only, [*arms])
    shared = _by_key(_lines(params), parser)
    given = _by_key(arguments, parser)
    if own := [key for key in (*shared, *given) if key in _OWN_KEYS]:
        raise InputError(
            f"{own[0]} must be left out of a tuned sweep, got {(shared | given)[own[0]].input_line}"
            ". Trials have hydra.sweeper.trial_seed and no test; set seeds for the fresh runs."
        )
    composer = Composer(config, loader)
    swept = {key: line for key, line in (shared | given).items() if _sweeps_places(line)}
    own_keys = {arm: _by_key(_lines(keys), parser) for arm, keys in arms.items()}
    searched = {
        arm: {key for key, line in (shared | own).items() if _is_searched(line)}
        for arm, own in own_keys.items()
    }
    studies = []
    for values in itertools.product(*(line.sweep_string_iterator() for line in swept.values())):
        at = dict(zip(swept, values, strict=True))
        place = {key: f"{line.get_key_element()}={at[key]}" for key, line in swept.items()}
        common = _fixed(shared | given) | place
        identity = _place_identity(composer, [*common.values()])
        for arm, parsed in own_keys.items():
            if arm not in chosen:
                continue
            _check_arm(arm, parsed)
            everything = {**shared, **parsed, **_given_to(arm, searched, given)}
            study = Study(
                arm=arm,
                title=" ".join([arm, *place.values()]),
                place=identity,
                lines=_fixed(everything) | place,
                own=[*parsed],
                space=_space(arm, everything),
                budget=budget,
                composer=composer,
                named=[*swept, *parsed, *(k for k in everything if _is_searched(everything[k]))],
                directory=Path(config.hydra.sweep.dir),
                is_baseline=arm == next(iter(arms)),
            )
            _check_ends(study)
            studies.append(study)
    composer.report()
    return studies


def _parse_names(only: str | Sequence[str] | None, arms: Sequence[str]) -> Sequence[str]:
    """Return the names of the chosen arms.

    Raises:
        InputError: If a name is not that of an arm.
    """
    if only is None:
        return arms
    names = only.split(",") if isinstance(only, str) else list(only)
    for name in names or [""]:
        check_choice("hydra.sweeper.only", name, arms)
    return names


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def _by_key(lines: Sequence[str], parser: OverridesParser) -> dict[str, Override]:
    return {line.key_or_group: line for line in parser.parse_overrides(list(lines))}


def _is_searched(line: Override) -> bool:
    value = line._value
    is_explicit = isinstance(value, ChoiceSweep) and not value.simple_form
    return is_explicit or isinstance(value, IntervalSweep)


def _sweeps_places(line: Override) -> bool:
    return line.is_sweep_override() and not _is_searched(line)


def _fixed(lines: Mapping[str, Override]) -> dict[str, str]:
    return {
        key: str(line.input_line) for key, line in lines.items() if not line.is_sweep_override()
    }


def _given_to(
    arm: str, searched: Mapping[str, Collection[str]], given: Mapping[str, Override]
) -> dict[str, Override]:
    """Return the overrides of the command line that an arm takes.

    A range replaces that of the arms that search the key; a key that none searches becomes one of
    all arms.
    """
    known = {key for keys in searched.values() for key in keys}
    return {
        key: line
        for key, line in given.items()
        if not _is_searched(line) or key not in known or key in searched[arm]
    }


def _check_arm(arm: str, keys: Mapping[str, Override]) -> None:
    if swept := [line for line in keys.values() if _sweeps_places(line)]:
        raise InputError(
            f"arm {arm} must fix or search its keys, got the sweep {swept[0].input_line}. Write "
            "choice(…) to search over the values, or move it to hydra.sweeper.params."
        )
    if own := [key for key in keys if key in _OWN_KEYS]:
        raise InputError(f"arm {arm} must not have {own[0]}, which the search sets. Leave it out.")


def _space(arm: str, lines: Mapping[str, Override]) -> Space:
    """Return the space of an arm.

    Raises:
        InputError: If a range or choice is wrong, or nothing is searched.
    """
    space: dict[str, Range | Choice] = {}
    for line in lines.values():
        if not _is_searched(line):
            continue
        try:
            space[line.get_key_element()] = _knob(line)
        except InputError as error:
            raise InputError(f"{line.key_or_group} of arm {arm}: {error}") from error
    if not space:
        raise InputError(
            f"arm {arm} must have a range or a choice to search, got fixed keys alone. Leave it "
            f"out: '~hydra.sweeper.arms.{arm}'."
        )
    return space


def _knob(line: Override) -> Range | Choice:
    value = line._value
    if not isinstance(value, IntervalSweep):
        return Choice(tuple(line.sweep_string_iterator()))
    if unknown := value.tags - {"log"}:
        raise InputError(f"a range must have the tag log or none, got {sorted(unknown)[0]}.")
    low, high = (float("nan") if end is None else float(end) for end in (value.start, value.end))
    return Range(low, high, "log" in value.tags)


def _name(job: Job, directory: Path) -> str:
    return job.folder.relative_to(directory).as_posix()


def _as_override(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _choice(composed: DictConfig, key: str) -> str:
    group = key.partition(".")[0]
    return f"{group}={composed.hydra.runtime.choices.get(group)}"


def _place_identity(composer: Composer, lines: Sequence[str]) -> str:
    composed, kept = composer.compose(lines)
    return RunIdentity(make_job(composed, kept).config, checksum="", seed_keys=()).id


def _check_ends(study: Study) -> None:
    """Compose and build the ends of every range, so that a wrong one is refused at the start.

    Raises:
        InputError: If a key or a value is refused.
    """
    for end in (0, 1):
        setting = {key: knob.ends[end] for key, knob in study.space.items()}
        job = study.job(setting, study.budget.trial_seed, test=False)
        for group in _BUILT:
            if job.config[group]:
                instantiate(OmegaConf.create(job.config[group]), _convert_="all")


def make_budget(settings: Mapping[str, Any]) -> Budget:
    """Return the budget of every search.

    Raises:
        InputError: If a value is out of range.
    """
    least = {"trials": 1, "batch": 1, "sampler_seed": 0, "trial_seed": 0}
    for key, minimum in least.items():
        check_integer(f"hydra.sweeper.{key}", settings[key], minimum=minimum)
    return Budget(**settings)


def parse_seeds(seeds: Any, trial_seed: int, loader: ConfigLoader) -> list[int]:
    """Return the seeds of the fresh runs.

    Args:
        seeds: A list, or text as on the command line: ``range(1,11)`` or ``1,2``.
        trial_seed: Seed of the trials.
        loader: Loader of the sweep.

    Raises:
        InputError: If they are not distinct seeds that no trial had.
    """
    text = ",".join(map(str, seeds)) if isinstance(seeds, list | ListConfig) else str(seeds)
    line = OverridesParser.create(config_loader=loader).parse_override(f"seed={text}")
    found = list(line.sweep_iterator()) if line.is_discrete_sweep() else [line.value()]
    for seed in found:
        check_integer("seeds", seed, minimum=0)
    if len({*found}) < len(found) or trial_seed in found:
        raise InputError(
            f"seeds must be different and not that of the trials, {trial_seed}, got {text}. Choose "
            "fresh ones, for example seeds=range(1,11)."
        )
    return [int(str(seed)) for seed in found]


def tune(
    studies: Sequence[Study], seeds: Sequence[int], launcher: Launcher, config: DictConfig
) -> None:
    """Search all arms, train the fresh seeds of their best settings, and write ``tuning.json``.

    The trials of all studies whose turn it is run together. With ``dry_run`` the studies are only
    listed.

    Raises:
        InputError: If no data set is there.
    """
    directory = Path(config.hydra.sweep.dir)
    firsts = [job for study in studies for job in study.ask()]
    data = PreparedData(firsts, prepare=not config.dry_run)
    ended: set[Path] = set()  # folders of the runs launched here
    pending = [job for study in studies for job in _advance(study, data, ended)]
    if config.dry_run:
        _list(studies, seeds)
        return
    data.check(pending)
    _warn_of_failures(studies, directory)
    while pending:
        jobs = [*(job for study in studies for job in study.jobs), *pending]
        write_plan(jobs, directory)
        launch_jobs(list({job.folder: job for job in pending}.values()), launcher, config, jobs)
        ended |= {job.folder for job in pending}
        pending = [job for study in studies for job in _advance(study, data, ended)]
        _write(studies, {}, directory, config)
    fresh = {id(study): _fresh(study, seeds) for study in studies}
    _write(studies, fresh, directory, config)
    jobs = [job for of_study in fresh.values() for job in of_study.values()]
    earlier = [job for study in studies for job in study.jobs]
    if jobs:
        run_jobs(list({job.folder: job for job in jobs}.values()), launcher, config, earlier)
    _exit_without_best(studies)


def _advance(study: Study, data: PreparedData, ended: set[Path]) -> list[Job]:
    """Tell a study its ended batches, and return the runs that its next batch still needs.

    A trial that failed before counts as ended, so that a search that resumes asks for the same
    trials.
    """
    while True:
        jobs = study.ask()
        waiting = [job for job in jobs if not _has_ended(job, data, ended)]
        if waiting or not jobs:
            return waiting
        study.tell()


def _has_ended(job: Job, data: PreparedData, ended: set[Path]) -> bool:
    if job.folder in ended or data.find_finished(job) is not None:
        return True
    return bool(job.config["resume"]) and run_state(job.folder) is State.FAILED


def _best(study: Study) -> Trial | None:
    return best_trial(study.trials, study.better)


def _fresh(study: Study, seeds: Sequence[int]) -> dict[int, Job]:
    best = _best(study)
    if best is None:
        return {}
    return {seed: study.job(best.setting, seed, test=True) for seed in seeds}


def _write(
    studies: Sequence[Study],
    fresh: Mapping[int, Mapping[int, Job]],
    directory: Path,
    config: DictConfig,
) -> None:
    arms = [
        _tuned_arm(
            study,
            {str(seed): _name(job, directory) for seed, job in fresh.get(id(study), {}).items()},
            config.monitor,
        )
        for study in studies
    ]
    Tuning.read(directory / TUNING_FILE).replace(arms).write(directory)


def _tuned_arm(study: Study, fresh: Mapping[str, str], monitor: str) -> TunedArm:
    is_done = len(study.trials) == study.budget.trials
    importance = study.search.importance() if is_done else {}
    return TunedArm(
        arm=study.arm,
        is_baseline=study.is_baseline,
        place=study.place,
        fixed=[study.lines[key] for key in study.own if key in study.lines],
        space={key.lstrip("+"): str(knob) for key, knob in study.space.items()},
        budget=study.budget,
        monitor=monitor,
        better=study.better,
        trials=study.trials,
        importance={k.lstrip("+"): share for k, share in importance.items()},
        fresh=fresh,
        optuna=study.search.version,
    )


def _warn_of_failures(studies: Sequence[Study], directory: Path) -> None:
    failed = sum(trial.value is None for study in studies for trial in study.trials)
    if failed:
        _logger.warning(
            "%d trials failed before and stay failed, so that the searches ask for the same ones. "
            "To try them again delete their folders in %s, or set resume=false",
            failed,
            directory,
        )


def _list(studies: Sequence[Study], seeds: Sequence[int]) -> None:
    """Print the arms, their trials and fits."""
    console = get_console()
    fits = sum(study.budget.trials + len(seeds) for study in studies)
    head = (
        f"{len(studies)} searches of {studies[0].budget.trials} trials, then {len(seeds)} fresh "
        f"seeds of each best setting: {fits} fits"
    )
    console.print(head, markup=False, highlight=False, soft_wrap=True)
    for study in studies:
        fixed = " ".join(study.lines[key] for key in study.own if key in study.lines)
        space = " ".join(f"{key}={knob}" for key, knob in study.space.items())
        console.print(
            f"{study.title}: {len(study.trials)} of {study.budget.trials} trials done\n"
            f"  fixed     {fixed or 'nothing'}\n  searched  {space}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _exit_without_best(studies: Sequence[Study]) -> None:
    lines = []
    for study in studies:
        if _best(study) is None:
            failures = (read_json(job.folder / FAILURE_FILE) or {} for job in study.jobs)
            message = next((found["message"] for found in failures if found), "no value")
            lines.append(f"all {len(study.trials)} trials of {study.title} failed: {message}")
    if lines:
        sys.exit("\n".join(f"mtnrec: {line}" for line in lines))
