"""`python -m beam_jobs <job> --runner=FnApiRunner …`: options only. Flags not listed here go to the Beam runner."""

from __future__ import annotations

import argparse
import sys

JOBS = ("events", "user_history", "item_stats", "training_examples", "materialize", "summary_tokens")


def parser() -> argparse.ArgumentParser:
    """The command line, without importing Beam."""
    made = argparse.ArgumentParser(prog="python -m beam_jobs", description=__doc__)
    made.add_argument(
        "job",
        choices=JOBS,
        help="; ".join(
            (
                "events: raw → events",
                "user_history",
                "item_stats",
                "training_examples",
                "materialize: offline → online",
                "summary_tokens: histories → tokens",
            )
        ),
    )
    made.add_argument(
        "--runner", default="FnApiRunner", help="Beam runner by name (default: FnApiRunner, the local one)"
    )
    made.add_argument("--dry_run", action="store_true", help="print graph, inputs and estimated rows; write nothing")
    made.add_argument("--as_of", help="ISO time (UTC): build as if now were then; the default is the end of the data")
    made.add_argument(
        "--max_bad_fraction",
        type=float,
        help="stop before publishing when more rows are bad (default: the dataset's for raw rows, 0 for built tables)",
    )
    made.add_argument(
        "--num_partitions", type=int, help="partitions of the shuffle and parts of each table (default 8)"
    )
    made.add_argument("--seed", type=int, help="training_examples: seed of the negatives (default 17)")
    tokens = made.add_argument_group("summary_tokens")
    tokens.add_argument(
        "--bundle", help="recipe or digest of the bundle whose stage 1 makes them (default: the live one)"
    )
    tokens.add_argument(
        "--kind", choices=("fp32", "fp16", "int8"), help="how tokens are stored (default: as before, fp16 at first)"
    )
    tokens.add_argument(
        "--every_days",
        type=float,
        help="also as they were every so many days, for training (default: as before, only as of now at first)",
    )
    tokens.add_argument(
        "--full",
        action="store_const",
        const=True,
        help="skip nobody: build this version anew, such as for another --kind",
    )
    tokens.add_argument(
        "--refill",
        action="store_const",
        const=True,
        help="send everybody's stored tokens online, such as to an emptied store",
    )
    tokens.add_argument("--computed_at", help="ISO time of the run (default: the clock, or what a killed run claimed)")
    tokens.add_argument("--not_live", action="store_const", const=True, help="leave the live bundle as it is")
    return made


def main() -> int:
    """Run a job and print what it did."""
    known, beam_args = parser().parse_known_args()
    from feature_repo.settings import Settings

    settings = Settings.from_env()
    from beam_jobs.command import run_command

    return run_command(known, beam_args, settings)


if __name__ == "__main__":
    sys.exit(main())
