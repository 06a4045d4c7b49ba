"""Starts `moescale` commands as processes that import nothing: forked from one that has imported everything.

A start of Python and torch is seconds of each rank. Left out with it is what happens while modules are imported: tests
of that start an interpreter.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from gloo_ranks import PRELOADED

BEAT_SECONDS = 0.4
"""Between beats of a rank's watchdog: a rank waits three of them before it leaves, five for the others' last words."""


class WarmProcess:
    """``python -m moescale ARGUMENTS`` with what the tests use of subprocess.Popen; its ranks are forked as well."""

    def __init__(
        self,
        arguments: Sequence[object],
        env: Mapping[str, str] | None = None,
        *,
        script: Path | None = None,
        cwd: Path | None = None,
    ) -> None:
        """``script``: run with the arguments in place of ``python -m moescale``."""
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder)
        self._files = [Path(folder, name) for name in ("stdout", "stderr")]
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        environment, folder = dict(os.environ if env is None else env), str(cwd or os.getcwd())
        work = (list(map(str, arguments)), environment, script, folder, self._files)
        self._process = context.Process(target=_become, args=work, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("moescale", timeout, *(path.read_bytes() for path in self._files))
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and standard error of the ended process."""
        self.wait(timeout)
        return self._files[0].read_text(), self._files[1].read_text()


def run_warm(
    arguments: Sequence[object], *, timeout: float, script: Path | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    process = WarmProcess(arguments, script=script, cwd=cwd)
    out, errors = process.communicate(timeout)
    return subprocess.CompletedProcess(list(arguments), process.wait(0), out, errors)


def _become(
    arguments: list[str], environment: dict[str, str], script: Path | None, folder: str, files: Sequence[Path]
) -> None:
    from moescale import cli
    from moescale.runtime import launch
    from moescale.runtime.watchdog import Watchdog

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    assert "interval_seconds" in Watchdog.__init__.__kwdefaults__
    Watchdog.__init__.__kwdefaults__["interval_seconds"] = BEAT_SECONDS
    launch.subprocess = SimpleNamespace(Popen=_ForkedRank)  # type: ignore[assignment]
    if script is None:
        cli.main(arguments)
    else:
        sys.argv[:] = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")


class _ForkedRank:
    """A rank as the launcher starts it: what launch.py uses of subprocess.Popen."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        stdout: IO[str] | None,
        stderr: IO[str] | None,
        start_new_session: bool,
        preexec_fn: Callable[[], None] | None,
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "moescale"] and start_new_session
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            # As after exec: the launcher's handlers would pass its ranks' signals on.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            os.environ.clear()
            os.environ.update(env)
            for number, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), number)
            status = _status_of_main(command[3:])
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _status_of_main(arguments: list[str]) -> int:
    from moescale import cli

    try:
        cli.main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
