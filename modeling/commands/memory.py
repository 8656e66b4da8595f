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
        TooFewError: the test period has too few; with the least effort that is only said.
    """
    from modeling.comparison.memory_page import tell, text_picture, write_page
    from modeling.comparison.memory_worth import (
        EFFORTS,
        TooFewError,
        measure_memory,
        write_measured,
    )

    torch.set_num_threads(threads)
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    with catalogue.stage(settings.dataset, "memory", effort) as stage:
        try:
            measured = measure_memory(settings, EFFORTS[effort])
        except TooFewError as error:
            # `make demo` goes on without its picture, and says why.
            if effort != "small":
                raise
            told = f"what memory is worth: cannot tell: {error}"
            stage.details = {"picture": [told]}
            console.print(told, highlight=False, style="yellow")
            return
        folder = Path(settings.path("memory"))
        # A picture replaces no page of more.
        name = "memory" if effort == "full" else f"memory_{effort}"
        write_measured(measured, folder / f"{name}.json")
        page = write_page(measured, folder, name)
        stage.details = {"picture": text_picture(measured), "page": str(page)}
    tell(measured)
    console.print(f"memory: {page}", highlight=False, soft_wrap=True)
