"""The catalogue as a server asks it: which bundle is live, also while its database is away."""

from __future__ import annotations

import logging
from functools import cached_property

from sqlalchemy.exc import SQLAlchemyError

from feature_repo.home.catalogue import Catalogue
from feature_repo.settings import Settings
from serving.stores.last_seen import LiveBundle, NothingSeenError, keep_live, last_live

logger = logging.getLogger(__name__)


class SeenCatalogue:
    """The live bundle by the catalogue. While its database is away: as this process heard it last; or, where it has
    heard nothing yet, as a server of this home saw it last.

    Attributes:
        problem: why the catalogue could not be asked last; None where it could.

    Example:
        >>> SeenCatalogue(Settings.from_env()).live_bundle().path
        'bundles/vista_trees-3dd4e59ff304'
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._heard: LiveBundle | None = None
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
            NoLiveBundleError: no bundle is live.
            NothingSeenError: the database is away, and no server of this home has seen a live bundle.
        """
        try:
            row = self.opened.live_bundle(self._settings.dataset)
        except SQLAlchemyError as error:
            if self.problem is None:
                logger.error("the catalogue's database is away: %s", error)
            if self._heard is not None:
                self.problem = "the catalogue's database is away: what ranks ranks on"
                return self._heard
            return self._seen(error)
        self.problem = None
        self._heard = LiveBundle(row.digest, row.path)
        if self._settings.profile == "production":
            keep_live(self._settings, self._heard)
        return self._heard

    def _seen(self, error: SQLAlchemyError) -> LiveBundle:
        """The live bundle of the copy."""
        try:
            live, at = last_live(self._settings)
        except NothingSeenError as nothing:
            raise NothingSeenError(
                f"the catalogue's database is away, and no server of this home has kept a copy ({nothing}): {error}"
            ) from error
        self.problem = f"the catalogue's database is away: which bundle is live is as of {at}"
        return live
