"""Tiny random models and the markers' rules."""

from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pytest
import torch
import transformers
from hypothesis import settings

import helpers.interpreter  # noqa: F401
from helpers.models import FAMILIES

# The same examples at every run; `--hypothesis-profile=default` draws new ones.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Each family in turn."""
    return request.param


def pytest_collection_modifyitems(items):
    """Skip GPU tests, with the reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors gain nothing from threads, and a busy machine makes them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Give a test a folder of its own with a text in it, an empty cache, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(topics[name] for name in sorted(topics))[:6000])
    return tmp_path
