"""Are the globals that a subject changes told, put back, and without effect on the next call?"""

from __future__ import annotations

import pytest

from dpocheck.transports.isolated import SubjectError

# deed -> the beginning of the line that tells it
PYTHON = {
    "import random; random.random()": "rng python",
    "np.random.rand()": "rng numpy",
    "np.random.seed(0)": "rng numpy",
    "os.environ['NEW'] = '1'": "environment: NEW was added",
    "os.environ['OMP_NUM_THREADS'] = '7'": "environment: OMP_NUM_THREADS was changed",
    "del os.environ['OMP_NUM_THREADS']": "environment: OMP_NUM_THREADS was removed",
    "os.environ = {}": "environment",
    "os.chdir('/')": "cwd",
    "os.makedirs('gone', exist_ok=True); os.chdir('gone'); os.rmdir('../gone')": "cwd: cannot be read",
    "sys.path.insert(0, '/nowhere')": "path: '/nowhere' was added",
    "sys.path.clear()": "path",
    "sys.path = None": "path",
    "sys.path.reverse()": "path: the order was changed",
    "signal.signal(signal.SIGTERM, lambda *_: None)": "signals: SIGTERM was changed",
    "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])": "signals: blocked was changed",
    "signal.setitimer(signal.ITIMER_REAL, 600)": "timer",
    "sys.setrecursionlimit(5000)": "recursion limit",
    "import gc; gc.disable()": "gc",
    "os.umask(0o077)": "umask",
    "np.seterr(all='raise')": "numpy errors",
    "sys.settrace(lambda *_: None)": "trace",
    "os.close(1)": "output",
    "os.close(1); os.close(2)": "output",
    "os.dup2(os.open('/dev/null', os.O_WRONLY), 1)": "output",
    "sys.stdout.close()": "output",
    "sys.stdout = None": "output",
    "import io; sys.stderr = io.StringIO()": "output",
    "import builtins; builtins.len = None": "patched: builtins.len",
    "import builtins; builtins.print = builtins.isinstance = builtins.dict = None": "patched: builtins.dict",
    "os.getpid = lambda: 1": "patched: os.getpid",
    "os.write = None": "patched: os.write",
    "time.monotonic = lambda: 0": "patched: time.monotonic",
    "import json; json.dumps = None": None,
    "np.random.seed = None": "patched: numpy.random.seed",
    "np.frombuffer = None": "patched: numpy.frombuffer",
}
READ = """
def state(payload, arrays):
    import gc, random, signal
    mask = os.umask(0o022); os.umask(mask)
    print("heard")
    return {"all": repr((
        random.getstate()[1][:4], np.random.get_state()[1][:4].tolist(),
        sorted(os.environ.items()), os.getcwd(), sys.path,
        sorted((int(s), str(signal.getsignal(s))) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)),
        sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), signal.getitimer(signal.ITIMER_REAL),
        sys.getrecursionlimit(),
        gc.isenabled(), mask, np.geterr(), sys.gettrace(), str(len), os.getpid() > 1, os.write.__name__,
        time.monotonic() > 0, np.random.seed.__name__, np.frombuffer.__name__,
    ))}, {}
"""


@pytest.mark.parametrize("deed", PYTHON)
def test_a_changed_global_of_python_is_told_and_put_back(shared_worker_of, deeds, deed):
    worker = shared_worker_of(READ + deeds(PYTHON))
    before, _ = worker.call("state", {})
    starts = worker.starts
    worker.call(f"deed_{list(PYTHON).index(deed)}", {})
    if (expected := PYTHON[deed]) is not None:
        assert any(line.startswith(expected) for line in worker.last_changes), worker.last_changes
        assert all(line.split(":")[0] == expected.split(":")[0] for line in worker.last_changes), worker.last_changes
    after, _ = worker.call("state", {})
    assert after == before
    assert worker.last_changes == ()
    assert worker.output == "heard\n"
    assert worker.starts == starts


# -------------------------------------------------------------------------------------------------------------- torch

TORCH = {
    "torch.set_default_dtype(torch.float64)": "default dtype: torch.float32 became torch.float64",
    "torch.set_default_device('meta')": "default device: 'cpu' became 'meta'",
    "torch.rand(1)": "rng torch",
    "torch.manual_seed(0)": "rng torch",
    "torch.set_grad_enabled(False)": "grad mode",
    "torch.no_grad().__enter__()": "grad mode",
    "torch.set_num_threads(2)": "threads: 1 became 2",
    "torch.use_deterministic_algorithms(True)": "deterministic: (False, False) became (True, False)",
    "torch.use_deterministic_algorithms(True, warn_only=True)": "deterministic: (False, False) became (True, True)",
    "torch.autograd.set_detect_anomaly(True)": "anomaly mode",
    "torch.set_float32_matmul_precision('medium')": "matmul precision",
    "torch.backends.cudnn.benchmark = True": "cudnn",
    "torch.set_autocast_enabled('cpu', True)": "autocast cpu",
    "torch.manual_seed = None": "patched: torch.manual_seed",
    "torch.save = lambda *a, **k: None": "patched: torch.save",
    "torch.get_default_dtype = lambda: torch.float32": "patched: torch.get_default_dtype",
    "torch.Tensor.backward = None": "patched: torch.Tensor.backward",
    "torch.Tensor.__add__ = lambda a, b: a": "patched: torch.Tensor.__add__",
    "torch.nn.functional.log_softmax = None": "patched: torch.nn.functional.log_softmax",
    "torch.nn.Module.__call__ = None": "patched: torch.nn.Module.__call__",
    "torch.autograd.grad = None": "patched: torch.autograd.grad",
    "del torch.randn": "patched: torch.randn",
    "torch.save = torch.load": "patched: torch.save",
    "import functools; torch.save = functools.wraps(torch.save)(lambda *a: None)": "patched: torch.save",
}
READ_TORCH = """
import torch

def state(payload, arrays):
    return {"all": repr((
        torch.get_default_dtype(), torch.get_default_device(), torch.get_rng_state()[:64].tolist(),
        torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(), torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.is_autocast_enabled("cpu"),
        callable(torch.manual_seed), id(torch.save), id(torch.get_default_dtype), id(torch.Tensor.backward),
        id(torch.Tensor.__add__), id(torch.nn.functional.log_softmax), id(torch.nn.Module.__call__),
        id(torch.autograd.grad), id(torch.randn), (torch.ones(2) + torch.ones(2)).tolist(),
    ))}, {}
"""


@pytest.mark.parametrize("deed", TORCH)
def test_a_changed_global_of_torch_is_told_and_put_back(shared_worker_of, deeds, deed):
    worker = shared_worker_of(READ_TORCH + deeds(TORCH))
    before, _ = worker.call("state", {})
    worker.call(f"deed_{list(TORCH).index(deed)}", {})
    told = [line for line in worker.last_changes if line.startswith(TORCH[deed])]
    assert told, worker.last_changes
    assert worker.call("state", {})[0] == before
    assert worker.last_changes == ()


def test_torch_imported_late_is_watched_from_its_first_moment(worker_of):
    worker = worker_of(
        """
        def late(payload, arrays):
            import importlib.util
            assert importlib.util.find_spec("torch") is not None  # as libraries ask before they import
            import torch
            torch.set_default_dtype(torch.float64)
            torch.manual_seed = None
            return {}, {}
        def now(payload, arrays):
            import torch
            return {"dtype": str(torch.get_default_dtype()), "seed": torch.manual_seed is not None}, {}
        """
    )
    worker.call("late", {})
    assert "default dtype: torch.float32 became torch.float64" in worker.last_changes
    assert "patched: torch.manual_seed" in worker.last_changes
    assert worker.call("now", {})[0] == {"dtype": "torch.float32", "seed": True}


def test_what_a_subject_changes_on_import_is_told_and_stays(worker_of):
    worker = worker_of(
        """
        os.environ["WANTED"] = "1"
        sys.path.append("/mine")
        def see(payload, arrays):
            return {"wanted": os.environ.get("WANTED"), "path": "/mine" in sys.path}, {}
        """
    )
    worker.call("open", {})
    assert "on import, environment: WANTED was added" in worker.last_changes
    assert "on import, path: '/mine' was added" in worker.last_changes
    for _ in range(2):
        assert worker.call("see", {})[0] == {"wanted": "1", "path": True}
        assert worker.last_changes == ()


def test_changes_are_told_of_a_call_that_raised_too(worker_of):
    worker = worker_of("def bad(payload, arrays):\n    os.chdir('/'); raise ValueError\n")
    with pytest.raises(SubjectError):
        worker.call("bad", {})
    assert any(line.startswith("cwd") for line in worker.last_changes)


DRAW = """
def draw(payload, arrays):
    import random
    return {"drawn": [random.random(), np.random.rand()]}, {}
"""


def test_every_call_begins_with_the_same_random_numbers_in_every_process(worker_of):
    worker = worker_of(DRAW)
    first = worker.call("draw", {})[0]
    assert worker.call("draw", {})[0] == first
    worker.close()
    assert worker.call("draw", {})[0] == first


def test_a_request_may_ask_for_other_random_numbers(worker_of):
    # Without this two runs of a trainer that forgets to seed would agree by our doing.
    worker = worker_of(DRAW)
    drawn = [worker.call("draw", {"rng_seed": seed})[0]["drawn"] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
