"""A ranker's two steps as machine code: exported from the model (`torch.export`), compiled ahead of time by Inductor for
one kind of machine, and called in place of the same steps in Python.

A package holds code and no weights: it is lent those of the model in memory. Numbers of events and of candidates are free;
what it was not compiled for, such as a single candidate, an empty history, a user whose tokens are not stored, the model
itself takes. Trees, which are no network, stay as they are.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from feature_repo.atomic import atomic_write
from feature_repo.errors import ExpectedError
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.compiled_steps import record_step, recorded_steps
from feature_repo.settings import Settings
from modeling.bundle.bundle import Bundle
from modeling.inputs.batch import Batch, Candidates, UserInputs
from modeling.inputs.made_up import requests
from modeling.layers.nested import others_of, tensors_of, with_tensors
from modeling.models.base import Ranker, TokenMaker, UserState
from modeling.trees.blend import Blend
from modeling.trees.trees import Trees

# Candidates and share of the window of the two examples that say which sizes are free
EXAMPLES = ((300, 1.0), (77, 0.6))
# Lengths that are tried one by one, since code may ask whether blocks are full; then so many at random
EVERY_LENGTH = 40
LENGTHS = 20
# Requests by which a package is tried before it ranks, and by how much a logit may differ, as a share of it where it is above 1
CANARIES = 64
MOST = 512  # candidates, as many as a server scores at once
TOLERANCE = 1e-5
MISSING = 0.2  # of their numbers
FOLDER = "compiled"  # below the home
logger = logging.getLogger(__name__)

Taken = Counter[tuple[str, str]]


class CompileError(ExpectedError, RuntimeError):
    """A step cannot be compiled here."""


@dataclass(frozen=True)
class Step:
    """One of a ranker's two steps.

    Args:
        call: the step of a model.
        takes: what it takes of a request.
    """

    name: str
    call: Callable[..., Any]
    takes: Callable[[Ranker, Batch], tuple[Any, ...]]


STEPS = (
    Step(
        "encode_user",
        lambda model, user: model.encode_user(user),
        lambda model, batch: (batch.user,),
    ),
    Step(
        "score",
        lambda model, state, candidates: model.score(state, candidates),
        lambda model, batch: (model.encode_user(batch.user), batch.candidates),
    ),
)


def machine() -> str:
    """The name of all that code is compiled for: torch, the processor with all that it can do, and our own code of models."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    can = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    flags = " ".join(sorted(can[1].split())) if can else platform.processor()
    kind = hashlib.sha256(f"{flags} {_own_code()}".encode()).hexdigest()[:12]
    return f"{torch.__version__}-{platform.machine()}-{kind}"


@cache
def _own_code() -> str:
    """Digest of the files of this room, in milliseconds: a server that starts has no second for `code_digest`."""
    content = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        content.update(path.read_bytes())
    return content.hexdigest()


def network_of(model: Ranker) -> Ranker:
    """The part of a ranker that is compiled.

    Raises:
        CompileError: it is trees alone.
    """
    network = model.network if isinstance(model, Blend) else model
    if isinstance(network, Trees):
        raise CompileError("trees are no network: there is nothing to compile")
    return network


def example(bundle: Bundle, length: int, candidates: int, seed: int = 0) -> Batch:
    """A made-up request as the bundle is served: with stored tokens, where it reads any."""
    sizes = bundle.encoder.sizes
    batch = requests(sizes, 1, length, candidates, seed, MISSING)
    if bundle.tokens is None:
        return batch
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(1, *bundle.token_shape, generator=generator)
    return replace(batch, user=replace(batch.user, tokens_BSX=stored))


class _Traced(nn.Module):
    """A step as a function of tensors alone, which is what can be exported."""

    def __init__(self, model: Ranker, step: Step, like: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self._step = step
        self._like = like

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self._step.call(self.model, *with_tensors(self._like, tensors))))


@dataclass(frozen=True)
class Traced:
    """A step of a model, ready to be exported, and which sizes of its tensors are free.

    Args:
        inputs: of an example.
        shapes: of each tensor, None where a size is free.
        others: what it was given that is no tensor, and is a constant to the code.
        result: what the step gives for the example.
    """

    module: _Traced
    inputs: tuple[Tensor, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    others: list[Any]
    result: Any

    @staticmethod
    def of(bundle: Bundle, step: Step) -> Traced:
        network = network_of(bundle.model)
        window = bundle.encoder.history_length
        one, other = (
            step.takes(network, example(bundle, max(round(share * window), 2), candidates))
            for candidates, share in EXAMPLES
        )
        inputs = tuple(tensor.contiguous().clone() for tensor in tensors_of(one))
        shapes = tuple(
            tuple(a if a == b else None for a, b in zip(first.shape, second.shape, strict=True))
            for first, second in zip(inputs, tensors_of(other), strict=True)
        )
        module = _Traced(network, step, one).eval()
        return Traced(module, inputs, shapes, others_of(one), step.call(network, *one))


@torch.inference_mode(mode=False)
@torch.no_grad()
def compile_step(bundle: Bundle, step: Step, package: Path) -> None:
    """Export a step of a bundle's model, try it with lengths of all kinds, and compile it; this takes a minute.

    Args:
        package: the file to write.

    Raises:
        CompileError: the step cannot be exported, is another for other lengths, or there is no compiler.
    """
    traced = Traced.of(bundle, step)
    dims = tuple(
        {at: torch.export.Dim.AUTO for at, size in enumerate(shape) if size is None} or None
        for shape in traced.shapes
    )
    try:
        program = torch.export.export(
            traced.module, traced.inputs, dynamic_shapes=(dims,), strict=False
        )
        _refuse_another(bundle, step, program.module())
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        why = str(error).strip().split("\n", 1)[0]
        raise CompileError(
            f"{step.name} of {type(traced.module.model).__name__} cannot be exported: {why}"
        ) from error
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    try:
        aoti_compile_and_package(
            program,
            package_path=str(package),
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                # A request is ranked by one thread.
                "cpp.threads": 1,
            },
        )
    except (InductorError, RuntimeError, OSError) as error:
        why = str(error).strip().split("\n", 1)[0]
        raise CompileError(f"{step.name} cannot be compiled here: {why}") from error


def _refuse_another(bundle: Bundle, step: Step, program: Callable[..., Any]) -> None:
    """Refuse a program that holds for some lengths alone: compiled, it would not say so.

    Raises:
        AssertionError: it does.
    """
    network = network_of(bundle.model)
    for batch in _of_all_lengths(bundle):
        taken = step.takes(network, batch)
        found = program(*(tensor.contiguous() for tensor in tensors_of(taken)))
        for got, expected in zip(found, tensors_of(step.call(network, *taken)), strict=True):
            assert got.shape == expected.shape, "results have another shape for other lengths"
            if not torch.allclose(got.double(), expected.double(), 1e-4, 1e-4, equal_nan=True):
                raise AssertionError("results differ for other lengths")


def _of_all_lengths(bundle: Bundle) -> Iterator[Batch]:
    window = bundle.encoder.history_length
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(2, max(window, 2) + 1, (LENGTHS,), generator=generator).tolist()
    for seed, length in enumerate([*range(2, min(EVERY_LENGTH, window) + 1), *some, window]):
        yield example(bundle, max(length, 2), 2 + 7 * seed % 90, seed)


class CompiledStep:
    """A package in memory, with the weights of a bundle's model.

    Args:
        package: the bytes of what `compile_step` wrote, of the same bundle, code and machine.

    Raises:
        CompileError: it cannot be loaded.
    """

    def __init__(self, bundle: Bundle, step: Step, package: bytes) -> None:
        # Not `torch._inductor`, which takes two seconds to import
        from torch._C._aoti import AOTIModelPackageLoader

        with torch.inference_mode():
            traced = Traced.of(bundle, step)
        self._shapes = [
            (tensor.dtype, shape)
            for tensor, shape in zip(traced.inputs, traced.shapes, strict=True)
        ]
        self._result = traced.result
        self._others = traced.others
        held = {**dict(traced.module.named_parameters()), **dict(traced.module.named_buffers())}
        try:
            # A file of this process alone, so that what is loaded is what was looked at
            with TemporaryDirectory(prefix="memoir-compiled-") as folder:
                file = Path(folder, f"{step.name}.pt2")
                file.write_bytes(package)
                self._loader = AOTIModelPackageLoader(str(file), "model", True, 1, -1)
            # Aliases: torch never lets go of a tensor that it was lent, and would keep a retired bundle's weights.
            lent = {name: held[name].detach() for name in self._loader.get_constant_fqns()}
            weakref.finalize(self, _let_go, list(lent.values())).atexit = False
            self._loader.load_constants(lent, False, True, True)
        except (RuntimeError, KeyError, OSError) as error:
            why = str(error).strip().split("\n", 1)[0]
            raise CompileError(f"compiled {step.name} cannot be loaded: {why}") from error

    def __call__(self, *taken: Any) -> Any | None:
        """Return what the step gives; None where it was not compiled for what is asked."""
        # The code reads tensors without looking at their strides.
        tensors = [tensor.contiguous() for tensor in tensors_of(taken)]
        if not self._fits(tensors) or others_of(taken) != self._others:
            return None
        try:
            return with_tensors(self._result, self._loader.run(tensors))
        except RuntimeError as error:
            logger.error("compiled code failed, and the model takes the step: %s", error)
            return None

    def _fits(self, tensors: list[Tensor]) -> bool:
        if len(tensors) != len(self._shapes):
            return False
        for tensor, (dtype, shape) in zip(tensors, self._shapes, strict=True):
            if tensor.dtype is not dtype or tensor.dim() != len(shape):
                return False
            for size, compiled in zip(tensor.shape, shape, strict=True):
                # A size of one was taken for a constant
                if size < 2 if compiled is None else size != compiled:
                    return False
        return True


def _let_go(lent: list[Tensor]) -> None:
    """Take the numbers from tensors that were lent."""
    with torch.inference_mode(mode=False), torch.no_grad():
        for tensor in lent:
            tensor.data = torch.empty(0, dtype=tensor.dtype)


class CompiledRanker(Ranker):
    """A network whose steps are compiled, where they are; all else is the network's own.

    Attributes:
        taken: how often each step was taken, and by what: `("score", "code")` or `("score", "model")`.
    """

    def __init__(self, network: Ranker, steps: Mapping[str, CompiledStep]) -> None:
        super().__init__()
        self.network = network
        self.sizes = network.sizes
        self.steps = dict(steps)
        self.taken: Taken = Counter()

    def encode_user(self, user: UserInputs) -> UserState:
        return self._step("encode_user", user)

    def score(self, user_state: UserState, candidates: Candidates) -> Tensor:
        scored: Tensor = self._step("score", user_state, candidates)
        return scored

    def extend_user(self, user_state: UserState, new_events: UserInputs) -> UserState:
        return self.network.extend_user(user_state, new_events)

    def must_refresh(self, user_state: UserState) -> Tensor:
        return self.network.must_refresh(user_state)

    @property
    def can_extend(self) -> bool:
        return self.network.can_extend

    @property
    def token_maker(self) -> TokenMaker | None:
        return self.network.token_maker

    def _step(self, name: str, *taken: Any) -> Any:
        step = self.steps.get(name)
        found = None if step is None else step(*taken)
        if found is not None:
            self.taken[name, "code"] += 1
            return found
        self.taken[name, "model"] += 1
        return getattr(self.network, name)(*taken)


@dataclass(frozen=True)
class Compiled:
    """The ranker of a bundle.

    Args:
        model: the bundle's own, or one whose steps are compiled.
        steps: which are.
        why: the others are not.
        taken: see `CompiledRanker`.
    """

    model: Ranker
    steps: tuple[str, ...] = ()
    why: str = ""
    taken: Taken = field(default_factory=Counter)


def with_compiled(bundle: Bundle, packages: Mapping[str, bytes]) -> Compiled:
    """A bundle's ranker with these packages, if it passes its trial; else its model as it is, and why.

    Args:
        packages: by the name of their step.
    """
    try:
        network = network_of(bundle.model)
        steps = {
            step.name: CompiledStep(bundle, step, packages[step.name])
            for step in STEPS
            if step.name in packages
        }
        faster = CompiledRanker(network, steps).eval()
        differs = largest_difference(bundle, network, faster)
    except Exception as error:
        # Whatever it is, the model itself ranks.
        logger.warning("the compiled steps of %s are not used: %s", bundle.name, error)
        return Compiled(bundle.model, why=str(error))
    if not differs <= TOLERANCE:
        why = f"its scores differ from the model's by {differs:.1e}, and {TOLERANCE:.0e} may be"
        logger.error("the compiled steps of %s are not used: %s", bundle.name, why)
        return Compiled(bundle.model, why=why)
    model: Ranker = faster
    if isinstance(bundle.model, Blend):
        model = Blend(faster, bundle.model.trees).eval()
        model.weight_T2 = bundle.model.weight_T2
        model.shift_T = bundle.model.shift_T
    faster.taken.clear()
    lacking = [step.name for step in STEPS if step.name not in steps]
    why = f"no usable package of {', '.join(lacking)}" if lacking else ""
    return Compiled(model, tuple(steps), why, faster.taken)


@torch.inference_mode()
def largest_difference(bundle: Bundle, network: Ranker, faster: Ranker) -> float:
    """The largest difference of two networks' logits over made-up requests, as a share of a logit where it is above 1; NaN
    where one gives no numbers.
    """
    window = bundle.encoder.history_length
    largest = torch.zeros(())
    for seed in range(CANARIES):
        length = 1 + seed * max(window - 1, 0) // (CANARIES - 1)
        # Large ones among them: code may have blocks.
        candidates = MOST - seed if seed % 8 == 0 else 1 + seed
        batch = example(bundle, length, candidates, seed)
        if seed % 8 == 7:
            # One whose tokens are not stored
            batch = replace(batch, user=replace(batch.user, tokens_BSX=None))
        expected = network(batch)
        differs = (faster(batch) - expected).abs() / expected.abs().clamp(min=1)
        largest = torch.maximum(largest, differs.max())
    return float(largest)


def compile_and_record(bundle: Bundle, home: Settings, catalogue: Catalogue) -> dict[str, str]:
    """Compile every step of a bundle's model, a minute each, try them as a server does, and record the packages, which
    servers then load.

    Returns:
        By step that could not be compiled: why.

    Raises:
        CompileError: the model has no network, or the trial failed; nothing is recorded.
    """
    network_of(bundle.model)
    made: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    # 1. Code.
    for step in STEPS:
        with TemporaryDirectory(prefix="memoir-compile-") as folder:
            package = Path(folder, f"{step.name}.pt2")
            try:
                compile_step(bundle, step, package)
                made[step.name] = package.read_bytes()
            except CompileError as error:
                failed[step.name] = str(error)
    if not made:
        return failed
    tried = with_compiled(bundle, made)
    if not tried.steps:
        raise CompileError(f"the compiled steps of {bundle.name} are not used: {tried.why}")
    # 2. Files, each of its own name: two compilations differ, and a server may be reading the one before.
    kind = machine()
    for name, content in made.items():
        sha256 = hashlib.sha256(content).hexdigest()
        path = f"{FOLDER}/{bundle.digest[:12]}-{kind}-{name}-{sha256[:12]}.pt2"
        home.path(FOLDER).mkdir(parents=True, exist_ok=True)
        with atomic_write(home.path(path)) as draft:
            draft.write_bytes(content)
        record_step(
            catalogue, digest=bundle.digest, machine=kind, step=name, path=path, sha256=sha256
        )
    return failed


def recorded(bundle: Bundle, home: Settings, catalogue: Catalogue) -> dict[str, bytes]:
    """The packages of a bundle for this machine by step; one that is not as it was recorded is left, which is logged."""
    found: dict[str, bytes] = {}
    # The newest that is here: of a home that each machine has for itself, the others' are not.
    for row in recorded_steps(catalogue, bundle.digest, machine()):
        path = home.path(row.path)
        if row.step in found:
            continue
        if not path.is_file():
            logger.warning("compiled step %s is not there: %s", row.step, path)
            continue
        package = path.read_bytes()
        if hashlib.sha256(package).hexdigest() != row.sha256:
            logger.error("compiled step %s was changed since and is not used: %s", row.step, path)
            continue
        found[row.step] = package
    return found
