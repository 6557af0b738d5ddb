"""Checks of a module that both ranks call, in their order, in one launch."""

import traceback

import pytest

from holofunc import distributed


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    """What went wrong on each of two ranks in the functions ``CHECKS`` of the module, by their names."""
    checks = request.module.CHECKS

    def work(folder):
        found = {}
        for name, fn in checks.items():
            try:
                fn(folder) if fn.__code__.co_argcount else fn()
            except Exception:
                found[name] = traceback.format_exc()
        return found

    return distributed.launch(work, 2, tmp_path_factory.mktemp("checks"), timeout=60)
