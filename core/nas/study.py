"""Where trials are kept: Optuna's storage, opened, mended after a crash, and refused where it is not this search's."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from warnings import catch_warnings, simplefilter

from core.kit import InputError
from core.nas.space import Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.study import Study

Direction = Literal["maximize", "minimize"]
SPACE, OWNER, WHY = "fitkit.space", "fitkit.owner", "fitkit.why"
"""Attributes of studies and trials."""


def open_storage(storage: str | Path | None) -> BaseStorage | None:
    """A storage of an SQL URL, or of a file that Optuna's journal is kept in; None keeps trials in memory.

    A journal whose last line was cut by a crash is mended: that line is taken off. Raises InputError for a file that
    is none, with the way back.
    """
    import optuna

    if storage is None:
        return None
    if isinstance(storage, str) and "://" in storage:
        try:
            return optuna.storages.get_storage(storage)
        except Exception as error:  # each database's driver has its own
            raise InputError(f"storage {storage.split('@')[-1]!r}: cannot be opened ({_short(error)})") from error
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(storage)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give a file to keep the study in, such as {path / 'study.jsonl'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    try:
        return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:  # a line may be JSON and still not what Optuna wrote
        raise InputError(_way_back(path, _short(error))) from error


def _mend(path: Path) -> None:
    """Take off a last line that a crash cut; InputError for a line in the middle that is not one.

    Under the journal's own lock, so that a line that another process is writing is not taken for a cut one.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists():
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        _cut_torn(path)
    finally:
        lock.release()


def _cut_torn(path: Path) -> None:
    data = path.read_bytes()
    whole, lines = 0, data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        good = line.endswith(b"\n")
        try:
            good = good and isinstance(json.loads(line), dict)
        except ValueError:
            good = False
        if not good:
            if number < len(lines):
                raise InputError(_way_back(path, f"line {number} of {len(lines)} is not one"))
            break
        whole += len(line)
    if whole < len(data):
        os.truncate(path, whole)


def _way_back(path: Path, why: str) -> str:
    return (
        f"{path}: not a whole study ({why}); put a copy of it back, or keep the lines before that one, or move it away"
        " to begin anew"
    )


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its line a trial and its notes on what is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with catch_warnings():
            simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def open_study(
    storage: BaseStorage | None, name: str, space: Space, goals: Mapping[str, Direction], sampler: BaseSampler
) -> Study:
    """The study of a name, made where it is not there yet; `goals` are "maximize" or "minimize" by name.

    Raises InputError for a study of another space or of other goals.
    """
    import optuna

    study = optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, load_if_exists=True, directions=list(goals.values())
    )
    wanted = {"space": space.to_json(), "goals": dict(goals)}
    known = study.user_attrs.get(SPACE)
    if known is None:
        if study.get_trials(deepcopy=False):
            raise InputError(f"study {name!r}: its trials are of another program; give another name")
        study.set_user_attr(SPACE, wanted)
    elif known != json.loads(json.dumps(wanted)):
        what = "other goals" if known.get("goals") != wanted["goals"] else "another search space"
        raise InputError(f"study {name!r}: was begun with {what}; give another name or another storage")
    return study


def owner() -> str:
    """This process, as a trial remembers who evaluates it."""
    return f"{platform.node()}:{os.getpid()}"


def abandoned(study: Study) -> Sequence[Any]:
    """Trials that a process of this machine began and that is gone: after a kill they would run for ever.

    One that was killed before it had signed its trial leaves it running; it counts for nothing.
    """
    from optuna.trial import TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if OWNER in trial.user_attrs and not _alive(str(trial.user_attrs[OWNER]))]


def _alive(who: str) -> bool:
    node, _, pid = who.rpartition(":")
    if node and node != platform.node():
        return True  # another machine's, which this one cannot tell
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
