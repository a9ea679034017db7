"""Does a subject get the limits and the surroundings it is to have, and does its output stay out of ours?"""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest

from dpocheck.transports.isolated import Limits, SubjectError, WorkerDied
from dpocheck.transports.process import KEPT, Process, environment_for

MEGABYTE = 2**20


# ------------------------------------------------------------------------------------------------------------- memory


def test_an_allocation_beyond_the_address_space_is_an_error_of_the_call(worker_of):
    worker = worker_of(
        "def big(payload, arrays):\n    np.ones(10**9)\n", limits=Limits(seconds=20, memory_gb=2.0)
    )  # 8e9 bytes of 2 * 2**30
    with pytest.raises(SubjectError, match="MemoryError"):
        worker.call("big", {})
    assert worker.call("echo", {"x": 1})[0] == {"x": 1}
    assert worker.starts == 1


GROW = """
def grow(payload, arrays):
    kept = []
    for _ in range(payload["times"]):
        kept.append(np.ones(4 * 2**20, dtype=np.int64))  # 32 MB
        time.sleep(0.02)
    return {}, {}

def grow_in_children(payload, arrays):
    children = [os.fork() for _ in range(4)]
    grow({"times": 8}, {}); time.sleep(600)
"""


@pytest.mark.parametrize("op", ["grow", "grow_in_children"])
def test_resident_memory_beyond_the_limit_ends_the_process(worker_of, op):
    # 0.5 GB: reached by 16 parts in one process, or by 16 processes (2**4) of 8 parts.
    worker = worker_of(GROW, limits=Limits(seconds=60, memory_gb=0.5, address_space_gb=0))
    worker.call("echo", {})
    with pytest.raises(WorkerDied, match=r"used 0\.\d+ GB|used \d\.\d+ GB") as caught:
        worker.call(op, {"times": 60})
    assert "the limit is 0.5 GB" in caught.value.reason
    assert worker.call("echo", {"x": 1})[0] == {"x": 1}


def test_memory_that_forked_children_share_is_not_counted_again(worker_of):
    # 0.2 GB shared by 5 processes is 1 GB of resident memory, and 0.2 GB of the machine's.
    worker = worker_of(
        """
        def share(payload, arrays):
            kept = np.ones(25 * 2**20, dtype=np.int64)
            children = [os.fork() or time.sleep(600) for _ in range(4)]
            time.sleep(1.5)
            for child in children: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
            return {"sum": int(kept[0])}, {}
        """,
        limits=Limits(seconds=60, memory_gb=0.7, address_space_gb=0),
    )
    worker.call("echo", {})
    assert worker.call("share", {})[0] == {"sum": 1}


# ------------------------------------------------------------------------------------------------------------- output

FLOOD = """
def flood(payload, arrays):
    line = b"x" * 1023 + b"\\n"
    for _ in range(payload["megabytes"]):
        os.write(1, line * 1024)
    os.write(2, b"the end")
    return {}, {}
"""


def test_a_flood_of_output_takes_no_memory_and_no_disk(worker_of, tmp_path):
    worker = worker_of(FLOOD)
    worker.call("flood", {"megabytes": 1})
    before = psutil.Process().memory_info().rss
    worker.call("flood", {"megabytes": 1000})
    assert worker.output.endswith("the end")
    assert f"[... {1000 * MEGABYTE + 7 - KEPT} bytes of output before this are not kept ...]" in worker.output
    assert len(worker.output) < KEPT + 200
    assert psutil.Process().memory_info().rss - before < 64 * MEGABYTE
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < MEGABYTE


def test_output_is_told_with_the_call_that_wrote_it(worker_of):
    worker = worker_of("def say(payload, arrays):\n    print(payload['text']); return {}, {}\n")
    for text in ("one", "two", "\x1b[1mbold\x1b[0m 10%\r20%"):
        worker.call("say", {"text": text})
        assert worker.output == text.replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\r", "\n") + "\n"


def test_garbage_on_standard_output_is_no_answer(worker_of):
    worker = worker_of(
        """
        def garbage(payload, arrays):
            os.write(1, b"dpo1" + bytes(range(256)) * 40); return {"right": 1}, {}
        """
    )
    assert worker.call("garbage", {})[0] == {"right": 1}
    assert not any(ord(c) < 32 and c not in "\n\t" for c in worker.output)


def test_garbage_on_every_file_ends_the_process_and_is_told(worker_of):
    worker = worker_of(
        """
        def garbage(payload, arrays):
            for fd in range(3, 1024):
                try: os.write(fd, b"garbage" * 10)
                except OSError: pass
            return {}, {}
        """
    )
    worker.call("echo", {})
    with pytest.raises(WorkerDied, match="sent something that is no answer: a frame begins with"):
        worker.call("garbage", {})
    assert worker.call("echo", {"x": 1})[0] == {"x": 1}


def test_nothing_a_subject_writes_reaches_our_terminal(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import sys, os, subprocess\n"
        "def handle(op, payload, arrays, state):\n"
        "    print('LOUD'); print('LOUD', file=sys.stderr); os.write(1, b'LOUD')\n"
        "    os.system('echo LOUD; echo LOUD >&2'); import logging; logging.warning('LOUD')\n"
        "    return {'input': sys.stdin.read()}, {}\n"
    )
    code = (
        "import sys; from pathlib import Path; from dpocheck.transports.isolated import *\n"
        "w = Worker('s', folder=Path(sys.argv[1]), handler='loud:handle', cwd=Path(sys.argv[1]))\n"
        "print(w.call('x', {})[0], w.output.count('LOUD'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, input="ours"
    )
    assert run.stdout == "{'input': ''} 6\n"  # once for each of the six that write
    assert run.stderr == ""


# ------------------------------------------------------------------------------------------------------- surroundings


def test_a_worker_imports_the_standard_library_and_numpy_only(worker_of):
    worker = worker_of("def modules(payload, arrays):\n    return {'names': sorted(sys.modules)}, {}\n")
    names = {name.partition(".")[0] for name in worker.call("modules", {})[0]["names"]}
    names = {name for name in names if not name.startswith(("_", "subject_"))}
    assert names - set(sys.stdlib_module_names) <= {"numpy", "cython_runtime", "dpocheck", "sitecustomize"}
    for judge in ("click", "rich", "scipy", "hypothesis", "jinja2", "psutil", "torch"):
        assert judge not in names


def test_the_judge_s_side_does_not_import_torch():
    code = "import sys, dpocheck.transports.isolated, dpocheck.text, dpocheck.files; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_subject_is_calm_offline_and_has_caches_of_its_own(worker_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/home/somebody")
    monkeypatch.setenv("RANK", "3")
    worker = worker_of("def env(payload, arrays):\n    return dict(os.environ), {}\n", environment={"TOLD": "yes"})
    env = worker.call("env", {})[0]
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS"):
        assert env[name] == "1"
    assert (env["CUDA_VISIBLE_DEVICES"], env["TOKENIZERS_PARALLELISM"], env["TOLD"]) == ("", "false", "yes")
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        assert env[name].startswith(str(tmp_path / "folder"))
    assert "RANK" not in env


def test_what_is_told_overrides_what_is_set(tmp_path):
    told = environment_for(tmp_path, {"CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/mine"})
    assert (told["CUDA_VISIBLE_DEVICES"], told["HF_HOME"]) == ("0", "/mine")


def test_a_module_beside_the_subject_shadows_nothing(worker_of, tmp_path):
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "mine.py").write_text("x = 5\n")
    worker = worker_of("def use(payload, arrays):\n    import json, numpy, mine; return {'x': mine.x}, {}\n")
    assert worker.call("use", {})[0] == {"x": 5}


def test_imported_libraries_are_out_of_the_garbage_collector_s_sight_after_the_first_call(worker_of):
    # accelerate collects at every training's start; over all imported objects that is most of a short run.
    worker = worker_of(
        """
        import gc, xml.dom.minidom, email, http.client, asyncio, unittest.mock
        def frozen(payload, arrays):
            return {"frozen": gc.get_freeze_count(), "seen": len(gc.get_objects())}, {}
        """
    )
    worker.call("open", {})
    after = worker.call("frozen", {})[0]
    assert after["frozen"] > 10 * after["seen"]
    # Once: a second freeze would add what the calls made since.  What is released meanwhile makes it smaller.
    assert 0 <= after["frozen"] - worker.call("frozen", {})[0]["frozen"] < 100


def test_an_interpreter_that_lacks_the_package_is_served_by_ours(worker_of, tmp_path):
    # -S has no site-packages: only numpy's folder is given, and the package is not on the path.
    script = tmp_path / "python"
    numpy_folder = os.path.dirname(os.path.dirname(np.__file__))
    (tmp_path / "site").mkdir()
    os.symlink(os.path.join(numpy_folder, "numpy"), tmp_path / "site" / "numpy")
    os.symlink(os.path.join(numpy_folder, "numpy.libs"), tmp_path / "site" / "numpy.libs")
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    worker = worker_of("def path(payload, arrays):\n    return {'path': sys.path}, {}\n", python=str(script))
    path = worker.call("path", {})[0]["path"]
    assert numpy_folder not in path
    assert not any((entry + "/dpocheck") in __import__("dpocheck").__file__ for entry in path if entry)


def test_calls_from_several_threads_are_answered_each_with_its_own(worker_of):
    worker, answers = worker_of(), {}

    def ask(n: int) -> None:
        answers[n] = worker.call("echo", {"n": n})[0]["n"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: n for n in range(8)}


def test_a_closed_worker_leaves_no_file_open_and_may_be_asked_again(worker_of):
    worker = worker_of()
    worker.call("echo", {})
    worker.close()
    before = psutil.Process().num_fds()
    for _ in range(3):
        worker.call("echo", {})
        worker.close()
    assert psutil.Process().num_fds() == before


@pytest.fixture
def _interruptible():
    """A shell that starts tests in the background has them ignore Ctrl-C: Python then raises no KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupted_call_ends_the_process(worker_of):
    # Ctrl-C in the judge: what the subject then answers must not be taken for the next call's answer.
    worker = worker_of("def slow(payload, arrays):\n    time.sleep(5); return {'late': 1}, {}\n")
    worker.call("echo", {})
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        worker.call("slow", {})
    assert worker.pid is None
    assert worker.call("echo", {"x": 1})[0] == {"x": 1}


def test_a_program_of_another_kind_runs_under_the_same_roof(tmp_path):
    process = Process(["sh", "-c", "echo hello; sleep 600 & exit 3"], environment=dict(os.environ), cwd=tmp_path)
    process.popen.wait()
    assert process.how_it_ended() == "exited with code 3"
    process.kill()
    assert process.output.since(0) == "hello\n"
    assert not any(
        p.info["environ"] and p.info["environ"].get("DPOCHECK_PROCESS") == process.mark
        for p in psutil.process_iter(["environ"])
    )
