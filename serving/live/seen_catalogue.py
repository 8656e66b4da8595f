"""The catalogue as a server asks it: which bundle is live, also while its database is away."""

from __future__ import annotations

import logging
from datetime import UTC
from functools import cached_property

from sqlalchemy.exc import SQLAlchemyError

from feature_repo.home.catalogue import Catalogue, NoLiveBundleError
from feature_repo.settings import Settings
from serving.stores.last_seen import LiveBundle, NothingSeenError, last_seen

logger = logging.getLogger(__name__)


class SeenCatalogue:
    """The live bundle by the catalogue, or by what a server of this home saw of it last.

    Attributes:
        problem: why the catalogue could not be asked last; None where it could.

    Example:
        >>> SeenCatalogue(Settings.from_env()).live_bundle().path
        'bundles/vista_trees-3dd4e59ff304'
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.problem: str | None = None

    @cached_property
    def opened(self) -> Catalogue:
        """The catalogue itself.

        Raises:
            SQLAlchemyError: its database is away.
        """
        return Catalogue(self._settings.catalogue_url)

    def live_bundle(self) -> LiveBundle:
        """Return the live bundle.

        Raises:
            NoLiveBundleError: no bundle is live, or was when the database was seen last.
            NothingSeenError: the database is away, and none was seen.
        """
        try:
            row = self.opened.live_bundle(self._settings.dataset)
        except SQLAlchemyError as error:
            return self._seen(error)
        self.problem = None
        return LiveBundle(row.digest, row.path)

    def tokens_built_at(self, version: str | None) -> float | None:
        """When the job built tokens of a version, seconds since 1970; None where that is not known now."""
        if version is None:
            return None
        try:
            versions = self.opened.token_versions(self._settings.dataset)
        except SQLAlchemyError:
            return None
        # SQLite gives times without their zone, which is UTC.
        built = [row.built_at for row in versions if row.fingerprint == version]
        return built[0].replace(tzinfo=built[0].tzinfo or UTC).timestamp() if built else None

    def _seen(self, error: SQLAlchemyError) -> LiveBundle:
        """The live bundle of the copy."""
        try:
            seen = last_seen(self._settings)
        except NothingSeenError as nothing:
            raise NothingSeenError(
                f"the catalogue's database is away, and no server of this home has kept a copy ({nothing}): {error}"
            ) from error
        if seen.live is None:
            raise NoLiveBundleError(
                f"the catalogue's database is away, and no bundle was live at {seen.at}"
            )
        if self.problem is None:
            logger.error("the catalogue's database is away: %s", error)
        self.problem = f"the catalogue's database is away: which bundle is live is as of {seen.at}"
        return seen.live
