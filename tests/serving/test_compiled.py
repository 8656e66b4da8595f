"""Compiled steps: their scores are the model's, and code that is not the catalogue's own is never run."""

from __future__ import annotations

import copy
import gc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from feature_repo.home.catalogue import Catalogue
from feature_repo.home.compiled_steps import recorded_steps
from feature_repo.home.tables import JobFolder
from modeling.bundle import compiled
from modeling.bundle.bundle import Bundle
from modeling.bundle.compiled import (
    STEPS,
    CompiledRanker,
    CompiledStep,
    CompileError,
    compile_and_record,
    compile_step,
    example,
    largest_difference,
    machine,
    recorded,
    with_compiled,
)
from modeling.inputs.batch import Batch
from modeling.layers.nested import mapped, tensors_of, with_tensors
from modeling.models.vista import UserState
from modeling.trees.blend import Blend
from modeling.trees.columns import TreeColumns
from modeling.trees.fitting import TreesConfig
from modeling.trees.trees import Trees
from serving.api.messages import RankRequest
from serving.live.live import BundleSource
from serving.ranking.ranker import Clock, RankService
from tests.forests import forest_on
from tests.modeling import test_invariants as worlds

# One of each family, and what of it is not exported: loops over blocks, as many as the history fills, are another program
# for other lengths. Exporting takes seconds.
FAMILIES: dict[str, set[str]] = {
    "amortised_dlrm": set(),
    "onetrans_agnostic": set(),
    "hiformer": set(),
    "ranker_hydrarec_extendable": {"encode_user"},
    "vista": set(),
    "vista_addressed_extendable": set(),
    "baseline_din": set(),
}


class Recorded:
    """A bundle of a shop whose steps are compiled, once for all tests."""

    def __init__(self, shop: Any) -> None:
        self.settings = shop.settings
        self.catalogue = Catalogue(self.settings.catalogue_url)
        self.source = BundleSource(self.settings, replay=True)
        self.bundle: Bundle = self.source.open_bundle()
        self.kind = machine()
        self.failed = compile_and_record(self.bundle, self.settings, self.catalogue)

    def file(self, step: str) -> Path:
        """Of a package."""
        rows = recorded_steps(self.catalogue, self.bundle.digest, machine())
        (path,) = (row.path for row in rows if row.step == step)
        return self.settings.path(path)

    def packages(self) -> dict[str, bytes]:
        return recorded(self.bundle, self.settings, self.catalogue)


@pytest.fixture(scope="module")
def code(token_shop: Any) -> Recorded:
    torch.set_num_threads(1)
    return Recorded(token_shop)


def eager(bundle: Bundle, batch: Batch) -> Any:
    with torch.inference_mode():
        return bundle.model(batch)


def test_tensors_are_found_and_put_back_however_they_are_nested() -> None:
    state = UserState(torch.ones(1), (torch.ones(2),), (torch.ones(3),), torch.ones(4), ())
    assert [len(tensor) for tensor in tensors_of((state, None))] == [1, 2, 3, 4]
    doubled = mapped(state, lambda tensor: 2 * tensor)
    assert isinstance(doubled, UserState)
    assert [float(tensor[0]) for tensor in tensors_of(doubled)] == [2.0] * 4
    again = with_tensors(doubled, tensors_of(state))
    assert tensors_of(again) == tensors_of(state)


def exported(name: str) -> set[str]:
    """The steps of a configuration that can be exported: what Inductor, whose part takes a minute, would be given is the
    model's own for all lengths.
    """
    encoder = mock.Mock(sizes=worlds.SIZES, history_length=worlds.SIZES.history_length)
    bundle: Any = mock.Mock(model=worlds.make(name), encoder=encoder, tokens=None)
    found = set()
    with mock.patch("torch._inductor.aoti_compile_and_package"):
        for step in STEPS:
            with suppress(CompileError):
                compile_step(bundle, step, Path("nowhere"))
                found.add(step.name)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_every_family_can_be_exported(name: str) -> None:
    assert exported(name) == {"encode_user", "score"} - FAMILIES[name]


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize("name", sorted(set(worlds.CONFIGS) - set(FAMILIES) - {"trees"}))
def test_scoring_of_every_configuration_can_be_exported(name: str) -> None:
    assert "score" in exported(name)


def test_compiled_scores_are_the_models(code: Recorded) -> None:
    assert code.failed == {}
    found = with_compiled(code.bundle, code.packages())
    assert (found.steps, found.why) == (("encode_user", "score"), "")
    for seed in range(20):
        batch = example(code.bundle, 2 + 3 * seed, 2 + 11 * seed, seed + 1_000)
        with torch.inference_mode():
            torch.testing.assert_close(
                found.model(batch), eager(code.bundle, batch), atol=2e-5, rtol=2e-5
            )
    assert found.taken == {("encode_user", "code"): 20, ("score", "code"): 20}


def test_what_was_not_compiled_for_the_model_takes(code: Recorded) -> None:
    found = with_compiled(code.bundle, code.packages())
    batch = example(code.bundle, 5, 1)
    untokened = replace(batch, user=replace(batch.user, tokens_BSX=None))
    with torch.inference_mode():
        for asked in (batch, untokened):
            expected = eager(code.bundle, asked)
            torch.testing.assert_close(found.model(asked), expected, atol=2e-5, rtol=2e-5)
    assert found.taken["score", "model"] == 2
    assert found.taken["encode_user", "model"] == 1


def test_beside_trees_the_network_is_compiled(code: Recorded) -> None:
    rows = example(code.bundle, 5, 300)
    columns = TreeColumns.of(code.bundle.encoder.sizes)
    read = columns.rows(rows.user, rows.candidates)[0].numpy()
    text = forest_on(read, read[:, 0] > np.nanmedian(read[:, 0]), columns.categories)
    trees = Trees(TreesConfig(), code.bundle.encoder.sizes)
    trees.take_texts({"trees-0.txt": text})
    blend = Blend(code.bundle.model, trees).eval()
    blend.weight_T2.fill_(0.25)
    bundle = replace(code.bundle, model=blend)
    found = with_compiled(bundle, code.packages())
    assert isinstance(found.model, Blend)
    assert isinstance(found.model.network, CompiledRanker)
    batch = example(bundle, 9, 40, 7)
    with torch.inference_mode():
        torch.testing.assert_close(found.model(batch), blend(batch), atol=2e-5, rtol=2e-5)
    assert found.taken["score", "code"] == 1


def test_a_server_ranks_with_them_and_says_so(code: Recorded) -> None:
    plain = BundleSource(code.settings, replay=True, compiled=False).load().ranker
    ranker = code.source.load().ranker
    try:
        assert plain.compiled.why == "compiled steps are switched off"
        assert ranker.compiled.steps == ("encode_user", "score")
        items = ranker.bundle.encoder.items.values.to_pylist()[:30]
        key = ranker.contract.user.join_key
        table = JobFolder(code.settings.home, "user_history").read("user_stats", [key])
        for user_id in table[key].unique().to_pylist()[:5]:
            asked = RankRequest(user_id, items)
            first, second = (scored(one, asked) for one in (plain, ranker))
            assert first == pytest.approx(second, abs=1e-5)
        assert ranker.compiled.taken["score", "code"] >= 5
    finally:
        plain.items.close()
        ranker.items.close()


def scored(ranker: RankService, asked: RankRequest) -> dict[Any, float]:
    answer = ranker.answer(asked, ranker.reader.read_user(asked.user_id), Clock()).response
    return dict(zip(answer.item_ids, answer.scores, strict=True))


def test_code_that_differs_from_the_model_is_not_used(code: Recorded) -> None:
    packages = code.packages()
    with mock.patch.object(compiled, "TOLERANCE", -1.0):
        found = with_compiled(code.bundle, packages)
    assert found.model is code.bundle.model
    assert "differ from the model's" in found.why
    # And a difference is seen: a network with another bias.
    other = copy.deepcopy(code.bundle.model)
    assert largest_difference(code.bundle, code.bundle.model, other) == 0
    with torch.no_grad():
        other.heads.bias.add_(0.5)
    assert largest_difference(code.bundle, code.bundle.model, other) > 0.1


def test_code_that_was_changed_or_is_gone_is_never_run(code: Recorded) -> None:
    path = code.file("score")
    written = path.read_bytes()
    try:
        path.write_bytes(written + b"\0")
        assert set(code.packages()) == {"encode_user"}
        path.unlink()
        assert set(code.packages()) == {"encode_user"}
    finally:
        path.write_bytes(written)
    # Nor one of another kind of machine
    with mock.patch.object(compiled, "machine", return_value="another"):
        assert code.packages() == {}
    # Nor one that no catalogue names
    nobody = Catalogue("sqlite://")
    assert recorded(code.bundle, code.settings, nobody) == {}
    assert set(code.packages()) == {"encode_user", "score"}


def test_weights_that_were_lent_go_with_the_step(code: Recorded) -> None:
    """Torch keeps a tensor that it was lent for ever: a retired bundle's weights would stay."""
    packages = code.packages()
    with mock.patch.object(compiled, "_let_go", wraps=compiled._let_go) as let_go:
        step = CompiledStep(code.bundle, STEPS[1], packages["score"])
        let_go.assert_not_called()
        del step
        gc.collect()
    ((lent,), _) = let_go.call_args
    assert lent
    assert all(tensor.numel() == 0 for tensor in lent)
    # The model has its own still.
    assert with_compiled(code.bundle, packages).steps == ("encode_user", "score")


def test_what_the_code_took_for_a_constant_is_looked_at(code: Recorded) -> None:
    step = CompiledStep(code.bundle, STEPS[1], code.packages()["score"])
    batch = example(code.bundle, 5, 9)
    with torch.inference_mode():
        state = code.bundle.model.encode_user(batch.user)
        assert step(state, batch.candidates) is not None
        assert step((state, True), batch.candidates) is None


def test_code_that_fails_leaves_the_step_to_the_model(code: Recorded) -> None:
    found = with_compiled(code.bundle, code.packages())
    batch = example(code.bundle, 5, 9)
    broken = mock.Mock(**{"run.side_effect": RuntimeError("broken")})
    assert isinstance(found.model, CompiledRanker)
    for step in found.model.steps.values():
        step._loader = broken
    with torch.inference_mode():
        torch.testing.assert_close(found.model(batch), eager(code.bundle, batch))
    assert found.taken["score", "model"] == 1


def test_a_damaged_package_leaves_the_model_as_it_is(code: Recorded) -> None:
    found = with_compiled(code.bundle, {"score": b"no package"})
    assert found.model is code.bundle.model
    assert "cannot be loaded" in found.why


def test_the_kind_of_a_machine_is_its_torch_its_processor_and_our_code(code: Recorded) -> None:
    assert machine().startswith(torch.__version__)
    with mock.patch.object(compiled, "_own_code", return_value="changed"):
        assert machine() not in {"", code.kind}
    with mock.patch.object(Path, "read_text", return_value="flags : fpu sse2"):
        assert machine() != code.kind
    assert machine() == code.kind


def test_without_a_compiler_it_is_said_and_nothing_is_left(code: Recorded, tmp_path: Path) -> None:
    def fails(program: Any, **options: Any) -> None:
        Path(options["package_path"]).write_bytes(b"half")
        raise RuntimeError("No working C++ compiler found")

    home = replace(code.settings, home=str(tmp_path))
    with mock.patch("torch._inductor.aoti_compile_and_package", fails):
        failed = compile_and_record(code.bundle, home, Catalogue("sqlite://"))
    assert set(failed) == {"encode_user", "score"}
    assert "No working C++ compiler" in failed["score"]
    assert list(tmp_path.rglob("*.pt2")) == []


def test_what_fails_its_trial_is_not_recorded(code: Recorded, tmp_path: Path) -> None:
    package = code.file("score").read_bytes()

    def again(bundle: Bundle, step: Any, file: Path) -> None:
        file.write_bytes(package)

    home = replace(code.settings, home=str(tmp_path))
    nobody = Catalogue("sqlite://")
    with (
        mock.patch.object(compiled, "compile_step", again),
        mock.patch.object(compiled, "TOLERANCE", -1.0),
        pytest.raises(CompileError, match="are not used"),
    ):
        compile_and_record(code.bundle, home, nobody)
    assert recorded_steps(nobody, code.bundle.digest, code.kind) == []
    assert list(tmp_path.rglob("*.pt2")) == []


def test_trees_alone_have_nothing_to_compile(code: Recorded) -> None:
    trees = replace(code.bundle, model=Trees(TreesConfig(), code.bundle.encoder.sizes))
    with pytest.raises(CompileError, match="trees are no network"):
        compile_and_record(trees, code.settings, code.catalogue)
    assert "trees are no network" in with_compiled(trees, {}).why
