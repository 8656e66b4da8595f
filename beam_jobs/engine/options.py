"""Options of every job, typed. Imports neither Beam nor Arrow, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from feature_repo.contract.declarations import is_iso_time
from feature_repo.errors import UsageError, nearest

if TYPE_CHECKING:
    from feature_repo.settings import Settings

Kind = Literal["fp32", "fp16", "int8"]
# As Beam knows them, a test holds the two equal; and Dask's, which it knows by its full name alone
RUNNERS = (
    "FnApiRunner", "DirectRunner", "BundleBasedDirectRunner", "SwitchingDirectRunner", "PrismRunner",
    "PortableRunner", "FlinkRunner", "SparkRunner", "DataflowRunner", "KafkaStreamsRunner",
    "InteractiveRunner", "TestDirectRunner", "TestDataflowRunner", "DaskRunner",
)  # fmt: skip


@dataclass(frozen=True)
class Common:
    """Options that every job takes.

    Args:
        runner: Beam runner by name. FnApiRunner and DirectRunner run here; PrismRunner wants
            --prism_location, PortableRunner --job_endpoint, FlinkRunner and SparkRunner Java and
            their jar, DataflowRunner the extra `gcp` and a project, DaskRunner the extra `dask` and
            --dask_client_address.
        dry_run: print graph, inputs and estimated rows; write nothing.
        as_of: ISO time (UTC): build as if now were then; the default is the end of the data.
        force: build again, even if the result is up to date.
        max_bad_fraction: stop before publishing when more rows are bad or dead letters; the default
            is the dataset's for raw rows, 0 for built tables.
    """

    runner: str = "FnApiRunner"
    dry_run: bool = False
    as_of: str | None = None
    force: bool = False
    max_bad_fraction: float | None = None

    def __post_init__(self) -> None:
        asked = self.runner.lower()
        known = {name.lower() for name in RUNNERS}
        if "." not in asked and not {asked, f"{asked}runner"} & known:
            raise UsageError(
                f"--runner expects one of {', '.join(RUNNERS)}, or a class by its full name, not {self.runner!r}"
                f"{nearest(self.runner, RUNNERS)}"
            )
        if self.as_of is not None and not is_iso_time(self.as_of):
            raise UsageError(
                f"--as_of expects an ISO time such as 2011-12-09 or 2011-12-09T12:00:00Z, not {self.as_of!r}"
            )
        if self.max_bad_fraction is not None and not 0 <= self.max_bad_fraction <= 1:
            raise UsageError(
                f"--max_bad_fraction expects a share from 0 to 1, not {self.max_bad_fraction}"
            )


@dataclass(frozen=True)
class RunOptions:
    """Options of a job that adds none."""

    @property
    def repeats(self) -> bool:
        """True if the run does its work although it is up to date."""
        return False

    def still_mean(self, built: Mapping[str, Any], settings: Settings) -> bool:
        """Return whether they mean now what they meant when a run with the options `built` was published."""
        return True


# Where a run computes is no part of what it computes
NO_PART_OF_A_NAME = ("device",)


def naming(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which runs are told apart."""
    return {name: value for name, value in options.items() if name not in NO_PART_OF_A_NAME}


@dataclass(frozen=True)
class OnlineOptions(RunOptions):
    """Options of `materialize`.

    Args:
        break_live: write although the live bundle reads features that the contract in force does
            not have, or learned from columns that mean something else by now.
    """

    break_live: bool = False


@dataclass(frozen=True)
class TableOptions(RunOptions):
    """Options of a job that writes tables.

    Args:
        num_partitions: partitions of the shuffle and parts of each table.
    """

    num_partitions: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.num_partitions <= 65_535:
            raise UsageError(
                f"--num_partitions expects a number from 1 to 65,535, not {self.num_partitions}"
            )


@dataclass(frozen=True)
class ExampleOptions(TableOptions):
    """Options of `training_examples`.

    Args:
        seed: of the negatives.
    """

    seed: int = 17

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise UsageError(f"--seed expects 0 or more, not {self.seed}")


@dataclass(frozen=True)
class TokenOptions(RunOptions):
    """Options of `summary_tokens`.

    Args:
        bundle: recipe or digest of the bundle whose stage 1 makes them; the default is the live
            one.
        kind: number format of stored tokens; by default as before, and fp16 the first time.
        every_days: build tokens also as they were every so many days, for training; by default as before,
            and none the first time.
        full: build the tokens of all users again, such as for another `--kind`.
        refill: send all stored tokens online, such as to an emptied store.
        computed_at: ISO time to stamp the tokens with; by default the clock, or the time of a killed run.
        not_live: build tokens without making the bundle live.
        device: where stage 1 runs, such as cuda; a worker needs one.
    """

    bundle: str | None = None
    kind: Kind | None = None
    every_days: float | None = None
    full: bool = False
    refill: bool = False
    computed_at: str | None = None
    not_live: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.every_days is not None and not 0 <= self.every_days < 36_525:
            raise UsageError(
                f"--every_days expects a number of days, 0 for none, not {self.every_days}"
            )
        if self.computed_at is not None and not is_iso_time(self.computed_at):
            raise UsageError(
                f"--computed_at expects an ISO time such as 2011-12-09T12:00:00Z, not {self.computed_at!r}"
            )

    @property
    def repeats(self) -> bool:
        """True if stored tokens are to be sent online again."""
        return self.refill

    def still_mean(self, built: Mapping[str, Any], settings: Settings) -> bool:
        """Return whether the bundle is still the one that made the published tokens: another may be live now."""
        from feature_repo.home.catalogue import Catalogue

        catalogue = Catalogue(settings.catalogue_url)
        dataset = settings.dataset
        try:
            row = (
                catalogue.bundle(dataset, self.bundle)
                if self.bundle
                else catalogue.live_bundle(dataset)
            )
        except LookupError:
            return False
        return bool(built["bundle"] == row.digest)
