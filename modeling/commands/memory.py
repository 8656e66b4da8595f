"""`python -m modeling memory`: what a long history is worth on the dataset in force."""

from __future__ import annotations

from pathlib import Path

import torch

from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from modeling.console import console


def run_memory(effort: str, threads: int) -> None:
    """Measure what is not measured yet, say what it comes to, and write the page.

    Args:
        effort: a name of `memory_worth.EFFORTS`.

    Raises:
        TableNotBuiltError: a Beam job has not run.
        DataError: a period has no positive.
    """
    from modeling.comparison.memory_page import tell, text_picture, write_page
    from modeling.comparison.memory_worth import EFFORTS, measure_memory, write_measured

    torch.set_num_threads(threads)
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    with catalogue.stage(settings.dataset, "memory", effort) as stage:
        measured = measure_memory(settings, EFFORTS[effort])
        folder = Path(settings.path("memory"))
        write_measured(measured, folder / "memory.json")
        page = write_page(measured, folder)
        stage.details = {"picture": text_picture(measured), "page": str(page)}
    tell(measured)
    console.print(f"memory: {page}", highlight=False, soft_wrap=True)
