"""The commands. Each checks all that can be checked, and returns what is left to do and gives the exit code."""

from argparse import Namespace
from collections.abc import Callable, Mapping

from holofunc.cli.explaining import explain
from holofunc.cli.exporting import export, list_models
from holofunc.cli.predicting import predict
from holofunc.cli.training import evaluate, find_lr, train

__all__ = ["COMMANDS"]

COMMANDS: Mapping[str, Callable[[Namespace], Callable[[], int]]] = {
    "train": train,
    "find-lr": find_lr,
    "evaluate": evaluate,
    "explain": explain,
    "models": list_models,
    "export": export,
    "predict": predict,
}
