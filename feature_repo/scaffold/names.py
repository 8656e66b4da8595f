"""The meaning of a raw column's name: words by which people call users, items and times, in
the languages in which headers of logs were seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# By role, the likeliest first. Languages of which words are not spaced are searched within a name.
WORDS = {
    "user": "user customer member household visitor account client uid person buyer reader viewer "
    "shopper player subscriber cust 用户 用戶 会员 會員 客户 客戶 顾客 买家 ユーザー 顧客 会員 사용자 고객 회원 "
    "пользователь покупатель клиент посетитель читатель usuario cliente comprador utilisateur acheteur "
    "membre benutzer nutzer kunde käufer besucher utente acquirente usuário użytkownik klient gebruiker "
    "klant kullanıcı müşteri χρήστης πελάτης",
    "item": "item product sku article movie stock asin song track listing content ad video book good "
    "artist film game recipe course restaurant business prod 商品 物品 产品 產品 货品 品番 製品 アイテム 상품 제품 "
    "товар продукт артикул фильм книга artículo articulo producto película libro produit produkt "
    "artikel ware prodotto articolo produto ürün προϊόν",
    "time": "time timestamp date datetime ts at when created day unix epoch dat dt 时间 時間 日期 日時 日付 시간 "
    "날짜 время дата fecha hora heure zeit zeitpunkt datum data ora tempo czas tijd zaman tarih ημερομηνία",
    "request": "request impression session basket order invoice query search visit 会话 會話 セッション 订单 "
    "сессия заказ sesión sitzung séance sessione",
    "event": "event transaction row log uuid",
    "action": "action event type behaviour behavior activity interaction 行为 行為 行動 действие событие "
    "acción aktion azione",
    "rating": "rating stars score grade 评分 評分 評価 оценка valoración puntuación bewertung note voto",
    "position": "position rank slot place",
    "title": "title name description 名称 名前 название titel titre nombre",
    "zone": "timezone tz zone",
}
# A column that is about a user or an item and names neither; a time that is not the event's own.
NO_KEYS = frozenset(
    [
        "age",
        "gender",
        "sex",
        "type",
        "kind",
        "category",
        "brand",
        "price",
        "cost",
        "amount",
        "count",
        "quantity",
        "qty",
        "status",
        "segment",
        "group",
        "country",
        "city",
        "region",
        "zip",
        "rating",
        "score",
        "rank",
        "color",
        "colour",
        "size",
        "weight",
    ]
)
OTHER_TIMES = frozenset(
    [
        "birth",
        "birthday",
        "dob",
        "born",
        "release",
        "released",
        "signup",
        "joined",
        "registered",
        "registration",
        "published",
        "updated",
        "modified",
        "expiry",
        "expires",
        "expired",
        "end",
        "ended",
        "until",
    ]
)
KNOWN_WORDS = frozenset(" ".join(WORDS.values()).split())
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
SHOWN_WORDS = ("view", "impression", "shown", "show", "exposure", "display", "see", "pv")
ACTION_WORDS = (
    *SHOWN_WORDS, "click", "cart", "add_to_cart", "addtocart", "purchase", "buy", "bought", "order",
    "like", "share", "save", "favourite", "favorite", "fav", "play", "watch", "read", "open", "rate",
    "return", "remove", "remove_from_cart", "transaction", "checkout", "download", "follow",
)  # fmt: skip


# What is written before and behind a word for an action without a space.
BEFORE = frozenset(["page", "add", "addto", "product", "item", "detail", "video", "ad", "email"])
BEHIND = frozenset(
    ["out", "through", "thru", "item", "page", "product", "content", "complete", "placed"]
)
UNDOING = frozenset(
    [
        "cancel",
        "canceled",
        "cancelled",
        "remove",
        "removed",
        "removefromcart",
        "delete",
        "deleted",
        "refund",
        "refunded",
        "return",
        "returned",
        "skip",
        "skipped",
        "hide",
        "hidden",
        "block",
        "blocked",
        "not",
        "no",
    ]
)


def parts_of(name: str) -> list[str]:
    """Words of a name in small letters; itemid is an item's id, and so is 商品编号's first word."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    found: list[str] = []
    for part in re.split(r"[\W\d_]+", spaced):
        word = part.lower()
        if UNSPACED.search(word):
            found += [known for known in KNOWN_WORDS if UNSPACED.search(known) and known in word]
        elif word.endswith("id") and word.removesuffix("id") in KNOWN_WORDS:
            found += [word.removesuffix("id"), "id"]
        elif word:
            found.append(word)
    return found


def named_as(name: str, role: str) -> bool:
    """Return whether a column's name has one of the words for a role."""
    words = WORDS.get(role, "").split()
    return any(part.rstrip("s") in words or part in words for part in parts_of(name))


def may_be_key(name: str) -> bool:
    """Return whether a column may name users or items, judging by its name: `user_age` may not."""
    return not NO_KEYS & set(parts_of(name))


def best_named(names: Sequence[str], role: str) -> str | None:
    """The best named of some columns: those with the role's words first, of these the ids, and those whose
    names say the least beside it.
    """
    return min(names, key=lambda name: _rank(name, role)) if names else None


def as_well_named(chosen: str, names: Sequence[str], role: str) -> list[str]:
    """Return the other columns whose names fit a role as well as the chosen one's."""
    return [n for n in names if n != chosen and _rank(n, role) == _rank(chosen, role)]


def _rank(name: str, role: str) -> tuple[bool, bool, bool, int, int]:
    words = WORDS[role].split()
    parts = parts_of(name)
    place = min((words.index(p) for p in parts if p in words), default=len(words))
    beside = sum(part not in words and part != "id" for part in parts)
    # `order_item_id` counts the items of an order; `event_timestamp` is as good as `timestamp`.
    by = (beside, place) if role in ("user", "item") else (place, beside)
    other = role == "time" and bool(OTHER_TIMES & set(parts))
    return not named_as(name, role), other, "id" not in parts, *by


def means(action: str, words: Sequence[str]) -> int | None:
    """The place of the first of these words that an action's name has; None where it has none, or says
    the opposite: `review` is no view, and `dislike` no like.
    """
    parts = parts_of(action)
    if takes_back(action):
        return None
    places = [at for at, word in enumerate(words) if any(_is_form(part, word) for part in parts)]
    joined = "_".join(parts)
    places += [at for at, word in enumerate(words) if "_" in word and word in joined]
    return min(places, default=None)


def _is_form(part: str, word: str) -> bool:
    """Views, viewed, viewing, pageview, viewitem of view."""
    stems = {word + end for end in ("", "s", "ed", "d", "ing", "es")}
    stems |= {word.removesuffix("e") + "ing", word + word[-1] + "ed"}
    led = any(part.endswith(stem) and part.removesuffix(stem) in BEFORE for stem in stems)
    return part in stems or led or (part.startswith(word) and part.removeprefix(word) in BEHIND)


def takes_back(action: str) -> bool:
    """Return whether an action undoes a different one, or says the opposite: cancel_order, unlike, dislike."""
    parts = parts_of(action)
    stems = [part.removeprefix(by) for part in parts for by in ("dis", "un") if part.startswith(by)]
    undoes = bool(UNDOING & set(parts))
    return undoes or any(_is_form(stem, word) for stem in stems for word in ACTION_WORDS)


def singular(name: str) -> str:
    """Clicked → click, is_purchased → purchase, n_clicks → click."""
    text = re.sub(r"^(is|has|n|num|was)_", "", "_".join(parts_of(name)))
    for end in ("ed", "d", "s"):
        if text.removesuffix(end) in ACTION_WORDS:
            return text.removesuffix(end)
    return text
