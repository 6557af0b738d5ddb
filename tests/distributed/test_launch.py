"""What `launch` takes to fresh processes: functions and classes of a script or notebook, after whatever was done there."""

import dataclasses
import enum
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from holofunc import distributed

ROOT = Path(__file__).parents[2]

SCRIPT = """
import threading
from typing import NamedTuple
import torch
from holofunc import distributed, lift, random

class Found(NamedTuple):
    rank: int
    loss: torch.Tensor

class Net(torch.nn.Module):
    scale = 2.0
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
    @property
    def factor(self):
        return self.scale
    @staticmethod
    def bend(x):
        return x.tanh()
    def forward(self, x):
        return self.bend(self.layer(x)) * self.factor

def factorial(n):
    return 1 if n == 0 else n * factorial(n - 1)

def work(x):
    model = lift(Net)
    params, buffers = model.init(random.key(0))
    loss = lambda params: distributed.psum(model.apply(params, buffers, x)[0].sum())
    distributed.rank_zero(print)("said once")
    return Found(distributed.rank() * factorial(3), torch.func.grad(loss)(params)["layer.bias"])

def backward():
    x = torch.ones(8, 8, requires_grad=True)
    (x @ x).sum().backward()

threads = [threading.Thread(target=backward) for _ in range(3)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
found = distributed.launch(work, 2, torch.ones(1, 3))
print(all(isinstance(each, Found) for each in found), [each.rank for each in found])
"""


@pytest.mark.parametrize("how", ["script", pytest.param("typed in", marks=pytest.mark.slow)])
def test_what_a_main_module_defines_runs_once_here_and_on_every_rank(how, tmp_path):
    """A script without a guard, and one that has no file, as in a notebook."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, *(["script.py"] if how == "script" else ["-c", SCRIPT])]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines() == ["said once", "True [0, 6]"], done.stderr


def test_closures_of_closures_and_threads_that_differentiate():
    weights = {"w": torch.arange(3.0)}

    def scaled(by):
        def inner(x, *, power=2, **others):
            return by * (x * weights["w"]).sum() ** power

        return inner

    class Counted:
        __slots__ = ("value",)

        def __init__(self, value):
            self.value = value

    def backward():
        x = torch.ones(4, requires_grad=True)
        x.square().sum().backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    fn = scaled(3.0)
    assert distributed.launch(lambda: fn(torch.ones(3), power=1).item() + Counted(1).value, 2) == [10.0, 10.0]


def test_dataclasses_enumerations_and_named_tuples_defined_here():
    @dataclasses.dataclass(frozen=True)
    class Config:
        rate: float
        names: list = dataclasses.field(default_factory=list, metadata={"shown": True})

    class Kind(enum.Enum):
        SMALL = 1
        LARGE = 2

        def double(self):
            return 2 * self.value

    class Pair(NamedTuple):
        x: int
        y: int = 3

        def sum(self):
            return self.x + self.y

    given = Config(0.5)

    def work():
        names = [field.name for field in dataclasses.fields(given)]
        kinds = Kind(2) is Kind.LARGE, Kind["SMALL"].double()
        return dataclasses.replace(given, rate=2.0).rate, names, kinds, Pair(1)._replace(y=4).sum()

    assert distributed.launch(work, 1) == [work()] == [(2.0, ["rate", "names"], (True, 2), 5)]


def test_what_cannot_be_copied_is_told(tmp_path):
    with open(tmp_path / "file", "w") as file, pytest.raises(TypeError, match="must be picklable: Cannot pickle files"):
        distributed.launch(lambda: file.name, 2)


def test_an_error_of_a_rank_names_it_and_its_line():
    def broken(rank):
        return [1, 2][2 * rank]

    with pytest.raises(distributed.RankError, match=r"^rank 1: IndexError: list index out of range") as caught:
        distributed.launch(lambda: broken(distributed.rank()), 2)
    assert "in broken" in caught.value.__notes__[0]


def test_an_error_without_a_text_is_told_by_its_name():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    def broken():
        raise Mute

    with pytest.raises(distributed.RankError, match=r"^rank 0: Mute\n"):
        distributed.launch(broken, 1)


def test_environment_and_folder_are_those_of_this_moment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOLOFUNC_TEST", "now")
    monkeypatch.chdir(tmp_path)

    def work():
        import os

        return os.environ["HOLOFUNC_TEST"], os.getcwd(), torch.get_num_threads()

    assert distributed.launch(work, 1, threads=2) == [("now", str(tmp_path), 2)]
