"""A ranking without HTTP, by the steps that the server takes: read the user, then answer."""

from __future__ import annotations

from serving.api.messages import RankRequest, RankResponse
from serving.ranking.ranker import Clock, RankService


def ranked(ranker: RankService, request: RankRequest) -> RankResponse:
    user = ranker.reader.read_user(request.user_id)
    return ranker.answer(request, user, Clock()).response
