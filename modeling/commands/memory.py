"""`python -m modeling memory`: what a long history is worth on the dataset in force."""

from __future__ import annotations

from pathlib import Path

import torch

from feature_repo.settings import Settings
from modeling.console import console


def run_memory(quick: bool, threads: int) -> None:
    """Measure what is not measured yet, say what it comes to, and write the page.

    Raises:
        TableNotBuiltError: a Beam job has not run.
        DataError: a period has no positive.
    """
    from modeling.comparison.memory_page import tell, write_page
    from modeling.comparison.memory_worth import measure_memory, write_measured

    torch.set_num_threads(threads)
    settings = Settings.from_env()
    measured = measure_memory(settings, quick=quick)
    tell(measured)
    folder = Path(settings.path("memory", "memory.json")).parent
    write_measured(measured, folder / "memory.json")
    page = write_page(measured, folder)
    console.print(f"memory: {page}", highlight=False, soft_wrap=True)
