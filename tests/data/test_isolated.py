import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from data.counting import count_up
from data.workers import slow_but_working

from re2tal.data.building.isolated import Isolated, IsolationError

# Functions must be importable by name in the other process, so these are the standard library's.


def test_results_and_errors_come_back_and_a_lost_process_is_replaced():
    with Isolated() as isolated:
        assert isolated.call(60, divmod, 17, 5) == (3, 2)
        first = isolated.call(60, os.getpid)
        assert first != os.getpid()
        with pytest.raises(ZeroDivisionError):
            isolated.call(60, divmod, 1, 0)
        assert isolated.call(60, os.getpid) == first
        with pytest.raises(IsolationError, match=r"its process died \(exit code -6\)"):
            isolated.call(60, os.abort)
        assert isolated.call(60, divmod, 17, 5) == (3, 2)


def test_a_call_that_does_not_return_is_stopped_in_time():
    with Isolated() as isolated:
        other = isolated.call(60, os.getpid)
        start = time.monotonic()
        with pytest.raises(IsolationError, match="gave no sign of life for 1 s and was stopped"):
            isolated.call(1, time.sleep, 600)
        assert time.monotonic() - start < 60
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_a_call_that_goes_on_is_not_stopped_however_long_it_takes():
    with Isolated() as isolated:
        isolated.call(60, slow_but_working, 0.0)  # imports what it needs
        assert isolated.call(3, slow_but_working, 6.0) == "done"


def test_a_process_that_died_between_two_calls_costs_neither():
    with Isolated() as isolated:
        first = isolated.call(60, os.getpid)
        os.kill(first, signal.SIGKILL)
        time.sleep(0.5)
        assert isolated.call(60, os.getpid) != first


def test_a_process_that_is_killed_during_a_call_costs_that_call():
    with Isolated() as isolated:
        isolated.call(60, os.getpid)
        with pytest.raises(IsolationError, match=r"its process died \(exit code -9\)"):
            isolated.call(60, os.kill, isolated.call(60, os.getpid), signal.SIGKILL)
        assert isolated.call(60, divmod, 17, 5) == (3, 2)


def test_the_items_of_a_generator_come_as_they_are_made_and_one_that_is_left_ends(capfd):
    with Isolated() as isolated:
        assert list(isolated.iterate(60, count_up, 3)) == [0, 1, 2]
        pid = isolated.call(60, os.getpid)
        items = isolated.iterate(60, count_up, 1_000_000)
        assert next(items) == 0
        items.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        with pytest.raises(ZeroDivisionError):
            list(isolated.iterate(60, count_up, 0))
        assert list(isolated.iterate(60, count_up, 1)) == [0]
    assert capfd.readouterr().err == ""


def test_the_users_script_needs_no_guard(tmp_path):
    """Started anew by each process, it would start processes without end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom re2tal.data.building.isolated import Isolated\n"
        "with Isolated() as one:\n    print(one.call(60, divmod, 17, 5))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.returncode) == ("(3, 2)\n", 0), done.stderr


def test_threads_that_start_processes_at_once_leave_the_users_script_as_it_was(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "the users script", raising=False)

    def start(number):
        with Isolated() as isolated:
            return isolated.call(60, divmod, number, 5)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(8))) == [divmod(number, 5) for number in range(8)]
    assert sys.modules["__main__"].__file__ == "the users script"


def test_a_process_that_prepares_videos_starts_without_torch() -> None:
    """One is started for each worker of a build, and torch takes several seconds to import."""
    code = "import sys, re2tal.data.building.prepare; sys.exit(bool({'torch', 'webdataset'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
