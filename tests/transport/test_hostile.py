"""Does whatever a subject does to its process spoil at most the call at hand, and is it told?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from dpocheck.transports.isolated import Limits, SubjectError, WorkerDied, WorkerTimeout


def assert_next_call_works(worker):
    payload, arrays = worker.call("echo", {"x": 1}, {"a": np.arange(3)})
    assert payload == {"x": 1}
    assert arrays["a"].tolist() == [0, 1, 2]


def test_a_call_returns_payload_and_arrays_and_is_served_by_one_process(worker_of):
    worker = worker_of()
    assert worker.call("open", {"subject": "s"})[0] == {"opened": {"subject": "s"}}
    pids = {worker.call("pid", {})[0]["pid"] for _ in range(3)}
    assert pids == {worker.pid}
    assert_next_call_works(worker)
    assert worker.starts == 1
    assert worker.last_changes == ()


def test_the_worker_opens_the_subject_itself_and_again_after_a_death(worker_of):
    worker = worker_of(
        """
        opened = []
        def handle(op, payload, arrays, state):
            if op == "open": opened.append(payload); return {}, {}
            if op == "die": os._exit(1)
            return {"opened": opened}, {}
        """
    )
    assert worker.call("ask", {})[0]["opened"] == [{"subject": worker.subject}]
    worker.call("open", {"subject": "other"})
    with pytest.raises(WorkerDied):
        worker.call("die", {})
    assert worker.call("ask", {})[0]["opened"] == [{"subject": "other"}]


# ---------------------------------------------------------------------------------------------------- ends of process

ENDS = {
    "os._exit(7)": "exited with code 7",
    "os._exit(0)": "exited with code 0",
    "os.kill(os.getpid(), signal.SIGKILL)": "was killed by signal 9 (SIGKILL)",
    "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)": "was killed by signal 15 (SIGTERM)",
    "import ctypes; ctypes.string_at(0)": "was killed by signal 11 (SIGSEGV)",
    "os.abort()": "was killed by signal 6 (SIGABRT)",
    "os.killpg(os.getpgrp(), signal.SIGKILL)": "was killed by signal 9 (SIGKILL)",
    "signal.alarm(1); time.sleep(9)": "was killed by signal 14 (SIGALRM)",
    "threading.Thread(target=lambda: os._exit(3)).start(); time.sleep(9)": "exited with code 3",
    "os.closerange(3, 4096)": "closed the channel",
    "os.closerange(0, 4096)": "closed the channel",
    "os.closerange(0, 4096); time.sleep(0.3); os._exit(5)": "exited with code 5",
}


@pytest.mark.parametrize("deed", ENDS)
def test_a_process_that_ends_is_told_in_words_with_its_output(shared_worker_of, deeds, deed):
    worker, bad = shared_worker_of(deeds(ENDS)), f"deed_{list(ENDS).index(deed)}"
    assert_next_call_works(worker)
    starts = worker.starts
    with pytest.raises(WorkerDied) as caught:
        worker.call(bad, {})
    assert not isinstance(caught.value, WorkerTimeout)
    assert ENDS[deed] in caught.value.reason
    assert repr(bad) in caught.value.reason
    assert "before" in caught.value.output
    assert_next_call_works(worker)
    assert worker.starts == starts + 1


def test_a_segmentation_fault_shows_the_python_line(worker_of):
    worker = worker_of("def crash_here(payload, arrays):\n    import ctypes\n    ctypes.string_at(0)\n")
    with pytest.raises(WorkerDied) as caught:
        worker.call("crash_here", {})
    assert "in crash_here" in caught.value.output


@pytest.mark.parametrize(
    "deed",
    [
        "while True: pass",
        "time.sleep(1000)",
        "threading.Lock().acquire(); threading.Event().wait()",
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(1000)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
)
def test_a_hang_is_ended_at_the_limit(worker_of, deed):
    worker = worker_of(f"def stuck_here(payload, arrays):\n    {deed}\n")
    worker.call("echo", {})
    with pytest.raises(WorkerTimeout, match="took more than 1 s"):
        worker.call("stuck_here", {}, seconds=1)
    assert_next_call_works(worker)


def test_a_hang_shows_where_it_was(worker_of):
    worker = worker_of("def stuck_here(payload, arrays):\n    while True: pass\n")
    worker.call("echo", {})
    with pytest.raises(WorkerTimeout) as caught:
        worker.call("stuck_here", {}, seconds=1)
    assert "in stuck_here" in caught.value.output


def test_a_subject_that_takes_our_signal_is_asked_where_it_is_all_the_same(worker_of):
    worker = worker_of(
        """
        def take(payload, arrays):
            signal.signal(signal.SIGUSR1, lambda *_: None); return {}, {}
        def stuck_here(payload, arrays):
            while True: pass
        """
    )
    worker.call("take", {})
    with pytest.raises(WorkerTimeout) as caught:
        worker.call("stuck_here", {}, seconds=1)
    assert "in stuck_here" in caught.value.output


def test_a_hang_while_imported_is_ended_too(worker_of):
    worker = worker_of("while True: pass", limits=Limits(seconds=0.5, start_seconds=2.5))
    with pytest.raises(WorkerTimeout, match=r"took more than \d"):
        worker.call("echo", {})


def test_a_worker_that_does_not_read_a_large_request_is_ended_at_the_limit(worker_of):
    # 8 MB exceed the pipe (64 KB): the judge's write must not wait for ever.
    worker = worker_of(limits=Limits(seconds=1, start_seconds=10))
    worker.call("echo", {})
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerTimeout):
        worker.call("echo", {}, {"a": np.zeros(1_000_000)})
    assert_next_call_works(worker)


def test_a_death_between_two_calls_is_nobody_s_fault(worker_of):
    worker = worker_of("def later(payload, arrays):\n    threading.Timer(0.2, os._exit, (9,)).start(); return {}, {}\n")
    worker.call("later", {})
    assert any(line.startswith("thread:") for line in worker.last_changes)
    time.sleep(0.6)
    assert_next_call_works(worker)


def test_a_death_by_what_an_earlier_call_left_running_does_not_spoil_the_next_call(worker_of):
    worker = worker_of(
        """
        def later(payload, arrays):
            threading.Timer(0.3, os._exit, (9,)).start(); return {}, {}
        def slow(payload, arrays):
            time.sleep(1); return {"slow": True}, {}
        """
    )
    worker.call("later", {})
    assert worker.call("slow", {})[0] == {"slow": True}
    assert worker.starts == 2


# --------------------------------------------------------------------------------------------------------- exceptions

EXCEPTIONS = {
    "raise ValueError('plain')": ("ValueError", "plain"),
    "sys.exit('leaving')": ("SystemExit", "leaving"),
    "raise KeyboardInterrupt": ("KeyboardInterrupt", ""),
    "raise GeneratorExit('g')": ("GeneratorExit", "g"),
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)": ("KeyboardInterrupt", ""),
    "class Own(BaseException): pass\n    raise Own('base')": ("Own", "base"),
    "class E(Exception):\n        def __str__(self): raise SystemExit('no')\n    raise E": ("E", "cannot be shown"),
    "class E(Exception):\n        def __str__(self): return 7\n    raise E": ("E", "cannot be shown"),
    "class E(Exception): __module__ = None\n    raise E('odd')": ("E", "odd"),
    "raise ValueError('lone \\ud800 half, \\x1b[31mred\\x1b[0m\\x07')": ("ValueError", "lone \ufffd half, red"),
    "raise ValueError('x' * 10_000_000)": ("ValueError", "left out"),
    "f = lambda n: f(n + 1)\n    f(0)": ("RecursionError", "maximum recursion depth"),
    "e = ValueError('loop'); e.__cause__ = e\n    raise e": ("ValueError", "loop"),
    "raise BaseExceptionGroup('many', [ValueError('a'), SystemExit(1)])": ("ExceptionGroup", "many"),
    "raise MemoryError": ("MemoryError", ""),
    "return {'x': object()}, {}": ("MalformedFrame", "not plain JSON data"),
    "return {}, {'a': np.array([object()])}": ("MalformedFrame", "dtype object"),
    "return 3": ("TypeError", "cannot unpack"),
}


@pytest.mark.parametrize("deed", EXCEPTIONS)
def test_an_exception_is_told_and_the_process_lives_on(shared_worker_of, deeds, deed):
    worker = shared_worker_of(deeds(EXCEPTIONS))
    with pytest.raises(SubjectError) as caught:
        worker.call(f"deed_{list(EXCEPTIONS).index(deed)}", {})
    error = caught.value
    name, words = EXCEPTIONS[deed]
    assert name in error.type
    assert words in error.message
    assert error.kind == "Exception"
    assert "before" in error.output
    assert not any(ord(c) < 32 and c not in "\n\t" for c in error.message + error.traceback + error.output)
    assert len(error.traceback) <= 20_000
    assert_next_call_works(worker)
    assert worker.starts == 1


def test_unsupported_is_its_own_kind(worker_of):
    worker = worker_of("from dpocheck.adapter import *\ndef no(payload, arrays):\n    raise Unsupported('ipo')\n")
    with pytest.raises(SubjectError) as caught:
        worker.call("no", {})
    assert (caught.value.kind, str(caught.value)) == ("Unsupported", "ipo")


def test_a_deep_traceback_keeps_both_ends(worker_of):
    worker = worker_of(
        """
        def down(n):
            if n == 0: raise ValueError("bottom")
            down(n - 1)
        def bad(payload, arrays):
            sys.setrecursionlimit(20_000)
            down(5_000)
        """
    )
    with pytest.raises(SubjectError) as caught:
        worker.call("bad", {})
    assert "frames left out" in caught.value.traceback
    assert caught.value.traceback.endswith("ValueError: bottom")
    assert any(line.startswith("recursion limit") for line in worker.last_changes)


def test_an_error_says_whose_frame_raised(worker_of, tmp_path):
    (tmp_path / "elsewhere.py").write_text("def fail(): raise ValueError\n")
    worker = worker_of(
        """
        def own(payload, arrays): raise ValueError
        def trainer(payload, arrays):
            import elsewhere
            elsewhere.fail()
        def suite(payload, arrays):
            from dpocheck.experiment import from_plain
            from_plain({"type": "nonsense"})
        def complaint(payload, arrays):
            from dpocheck.worker.failure import BadAnswer
            raise BadAnswer("loss() returned None")
        """
    )
    blamed = {}
    for op in ("own", "trainer", "suite", "complaint"):
        with pytest.raises(SubjectError) as caught:
            worker.call(op, {})
        blamed[op] = (caught.value.in_adapter, caught.value.in_suite)
    # (in_adapter, in_suite): what we raise on purpose is about the adapter, whatever frame it comes from.
    assert blamed == {
        "own": (True, False), "trainer": (False, False), "suite": (False, True), "complaint": (True, False),
    }  # fmt: skip


def test_a_subject_that_cannot_be_imported_is_an_error_each_time(worker_of):
    worker = worker_of("import no_such_module_anywhere\n")
    for _ in range(2):
        with pytest.raises(SubjectError, match="no_such_module_anywhere"):
            worker.call("echo", {})


def test_an_interpreter_that_does_not_exist_is_named(worker_of):
    with pytest.raises(WorkerDied, match=r"/no/such/python cannot be started: No such file"):
        worker_of(python="/no/such/python").call("echo", {})


# -------------------------------------------------------------------------------------------------------------- forks


def test_a_forked_child_that_comes_back_does_not_answer(worker_of):
    worker = worker_of("def fork(payload, arrays):\n    return {'child': os.fork() == 0, 'pid': os.getpid()}, {}\n")
    for _ in range(5):
        payload, _ = worker.call("fork", {})
        assert payload == {"child": False, "pid": worker.pid}
    assert_next_call_works(worker)


def test_a_forked_child_that_raises_does_not_answer(worker_of):
    worker = worker_of("def fork(payload, arrays):\n    if os.fork() == 0: raise ValueError\n    return {}, {}\n")
    for _ in range(5):
        assert worker.call("fork", {})[0] == {}
    assert_next_call_works(worker)


ORPHANS = """
def spawn(payload, arrays):
    import subprocess
    os.fork() or time.sleep(600)
    os.fork() or (os.setsid(), time.sleep(600))
    os.fork() or (os.setsid(), os.fork() and os._exit(0), time.sleep(600))
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    time.sleep(0.3)
    return {}, {}
"""


@pytest.mark.parametrize("end", ["close", "os._exit(4)", "while True: pass"])
def test_no_descendant_outlives_its_worker(worker_of, end):
    # A child, one in a session of its own, one of a double fork with setsid, a program; and the worker.
    worker = worker_of(f"{ORPHANS}\ndef end(payload, arrays):\n    {end if end != 'close' else 'pass'}\n")
    worker.call("spawn", {})
    mark = worker._process.mark
    assert len(bearing(mark)) >= 5, "the orphans were to be there"
    if end == "close":
        worker.close()
    else:
        # Something was left running, so a death is tried once more in a fresh process, which then dies too.
        with pytest.raises(WorkerDied):
            worker.call("end", {}, seconds=1)
    assert bearing(mark) == []


def bearing(mark):
    """The living processes that inherited a worker's mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DPOCHECK_PROCESS") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_what_is_left_running_is_told(worker_of):
    worker = worker_of(
        """
        def thread(payload, arrays):
            threading.Thread(target=time.sleep, args=(600,), daemon=True, name="lingering").start(); return {}, {}
        def process(payload, arrays):
            os.fork() or time.sleep(600); return {}, {}
        """
    )
    worker.call("thread", {})
    assert worker.last_changes == ("thread: 'lingering' was left running",)
    worker.call("process", {})
    assert worker.last_changes == ("process: 1 left running",)
    assert_next_call_works(worker)
    assert worker.last_changes == ()


@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_ends_when_its_judge_is_killed(tmp_path, busy):
    (tmp_path / "busy_subject.py").write_text(
        "def handle(op, payload, arrays, state):\n    while op == 'spin': pass\n    return {}, {}\n"
    )
    code = (
        "import sys, time, threading; from pathlib import Path; from dpocheck.transports.isolated import *\n"
        "w = Worker('s', folder=Path(sys.argv[1]), handler='busy_subject:handle', cwd=Path(sys.argv[1]))\n"
        "w.call('open', {}); print(w.pid, flush=True)\n"
        f"w.call('spin', {{}}) if {busy} else time.sleep(600)\n"
    )
    judge = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(judge.stdout.readline()))
    time.sleep(0.3)
    judge.kill()
    judge.wait()
    judge.stdout.close()
    gone, _ = psutil.wait_procs([worker], timeout=10)
    assert gone or worker.status() == psutil.STATUS_ZOMBIE
