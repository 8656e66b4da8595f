"""What the five papers claim that recipes here can check: each claim is one recipe against another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MARGIN = 0.005  # a metric that is lower by less is not worse


@dataclass(frozen=True)
class Claim:
    """One recipe against another.

    Args:
        says: the claim, and where the paper makes it.
        expected: "above"; or "no worse": not below by more than `MARGIN`.
    """

    says: str
    ours: str
    theirs: str
    expected: Literal["above", "no worse"] = "above"


@dataclass(frozen=True)
class Paper:
    """A paper's claims, and what stands between its setting and ours."""

    title: str
    about: str
    claims: tuple[Claim, ...]

    @property
    def recipes(self) -> tuple[str, ...]:
        pairs = [(claim.ours, claim.theirs) for claim in self.claims]
        return tuple(dict.fromkeys(name for pair in pairs for name in pair))


HIFORMER = Paper(
    "Hiformer (arXiv 2311.05884)",
    "An app store's logs, 38 feature tokens, no behaviour sequences. Here each ranker reads the history through the same "
    "target attention, and features are fewer.",
    (
        Claim("attention by token above a plain Transformer (table 1)", "heteroatt", "transformer"),
        Claim(
            "composite projections above attention by token (table 1)",
            "hiformer_full_rank",
            "heteroatt",
        ),
        Claim("low rank loses little (section 5.3)", "hiformer", "hiformer_full_rank", "no worse"),
        Claim("above AutoInt (table 1)", "hiformer", "autoint"),
        Claim("above DLRM (table 1)", "hiformer", "dlrm"),
        Claim("above DCN (table 1)", "hiformer", "dcnv2"),
    ),
)
AMORTISED = Paper(
    "Amortised history inference (arXiv 2412.06924)",
    "A professional network's feed and advertisements; the abstract and what others say of the body are public.",
    (
        Claim(
            "appended, with cross-attention, on par with CONCAT", "amortised", "concat", "no worse"
        ),
        Claim(
            "appended, with self-attention of candidates, on par with CONCAT",
            "amortised_self",
            "concat",
            "no worse",
        ),
        Claim(
            "appended, with self-attention as it stands, on par with CONCAT",
            "amortised_self_plain",
            "concat",
            "no worse",
        ),
        Claim(
            "cross-attention is on par with self-attention",
            "amortised",
            "amortised_self",
            "no worse",
        ),
        Claim("early fusion above a pooled history", "amortised", "mean_pool"),
    ),
)
VISTA = Paper(
    "VISTA (arXiv 2510.22049)",
    "Amazon-Electronics, KuaiRand-1K and industrial logs of thousands of events. Here a history holds some hundreds, and "
    "match features say what of it is the candidate's.",
    (
        Claim("above DIN (table 1)", "vista", "din"),
        Claim("above HSTU (tables 1 and 2)", "vista", "hstu_rank"),
        Claim("above SASRec (table 1)", "vista", "sasrec_rank"),
        Claim(
            "quasi-linear costs little against softmax (table 1)",
            "vista",
            "vista_softmax",
            "no worse",
        ),
        Claim(
            "with the reconstruction loss above without (table 3)", "vista", "vista_unreconstructed"
        ),
        Claim("more seeds help (figure): 32 above 8", "vista", "vista_8_seeds"),
        Claim("a stage 1 above none (section 4)", "vista", "mean_pool"),
        Claim(
            "ours: the stream costs little against both ways", "vista_stream", "vista", "no worse"
        ),
        Claim("ours: addressed tokens above the paper's", "vista_addressed", "vista"),
    ),
)
ONETRANS = Paper(
    "OneTrans (arXiv 2510.26104)",
    "A short-video shop's logs, 1,190 events and more, layers and width two orders of magnitude larger. Here one width "
    "for all, and equal parameters where the recipe is a dataset's own.",
    (
        Claim("above DCNv2 with target attention (table 2)", "onetrans", "dcnv2"),
        Claim("above Hiformer with target attention (table 2)", "onetrans", "hiformer"),
        Claim("above RankMixer with a Transformer (table 2)", "onetrans", "rankmixer"),
        Claim("Auto-Split above group-wise tokens (table 3)", "onetrans", "onetrans_group_wise"),
        Claim("merged by time above by intent (table 3)", "onetrans", "onetrans_agnostic"),
        Claim("own weights above shared ones (table 3)", "onetrans", "onetrans_shared"),
        Claim("the pyramid loses nothing (table 3)", "onetrans", "onetrans_no_pyramid", "no worse"),
    ),
)
HYDRAREC = Paper(
    "HydraRec (arXiv 2501.01242)",
    "Next item, leave one out; only the abstract is public. Here on the dataset's own log.",
    (
        Claim("as good as dot-product attention", "hydrarec_next", "sasrec", "no worse"),
        Claim("(ours) with decay above without", "hydrarec_decayed", "hydrarec_next"),
        Claim(
            "(ours) with decay as good as dot-product attention",
            "hydrarec_decayed",
            "sasrec",
            "no worse",
        ),
        Claim("bidirectional as good as BERT4Rec", "hydrarec_cloze", "bert4rec", "no worse"),
        Claim("as good as LinRec", "hydrarec_next", "linrec", "no worse"),
        Claim(
            "as good as linear attention by kernels", "hydrarec_next", "kernel_linear", "no worse"
        ),
    ),
)
PAPERS = (HIFORMER, AMORTISED, VISTA, ONETRANS)
