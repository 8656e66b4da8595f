"""Other libraries on the same events, run by an interpreter that has them: `PYTHON peers.py CASE`,
JSON in, JSON out.

This file imports nothing of the project, since it runs in the peers' own environments. Each library
is used by its public API with its own loader. Sequence models: a callback counts trained targets
(real ones, padding left out) and CPU seconds after a warm-up of five steps; every user's last two
events are left out, as in our own runs. Rankers: one epoch of the library's own `fit`, all of its
CPU seconds; then one user's candidates, the user's columns repeated for each.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

WARM_UP = 5


def main() -> None:
    """Run one case."""
    ask = json.loads(sys.stdin.read())
    import torch

    torch.set_num_threads(ask["threads"])
    keep_freed_memory()
    answer = CASES[sys.argv[1]](ask)
    with open("/proc/self/status") as status:  # ru_maxrss would remember the parent's peak
        answer["peak_mb"] = (
            int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
        )
    print(json.dumps(answer))


def keep_freed_memory() -> None:
    """As `modeling.layers.memory.keep_freed_memory`, which ours uses: glibc keeps what was freed."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 1 << 30), (-2, 1 << 26)):
            mallopt(parameter, value)


def training_lines(ask: dict[str, Any]) -> Any:
    """`user item` lines as a frame with columns user_id, item_id, datetime, weight."""
    import pandas as pd

    frame = pd.read_csv(ask["data"], sep=" ", names=["user_id", "item_id"], compression="infer")
    frame["datetime"] = frame.groupby("user_id").cumcount()
    left = frame.groupby("user_id")["item_id"].transform("size") - frame["datetime"]
    frame = frame[left > 2]
    return frame.assign(datetime=pd.to_datetime(frame["datetime"], unit="s"), weight=1.0)


def timed(library: Any, ask: dict[str, Any], count: Any) -> Any:
    """A Lightning callback that measures and stops training, and where it leaves the rate: trainers
    copy callbacks.
    """
    measured: dict[str, float] = {}

    class Timed(library.Callback):  # type: ignore[misc]
        started = 0.0
        targets = 0
        steps = 0

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            self.steps += 1
            if self.steps == WARM_UP:
                self.started = time.process_time()
                self.targets = 0
                return
            self.targets += count(batch)
            spent = time.process_time() - self.started
            if self.steps > WARM_UP + 3 and spent > ask["seconds"]:
                measured["targets_per_cpu_s"] = self.targets / spent
                trainer.should_stop = True

    return Timed(), measured


def quiet_trainer(library: Any, **options: Any) -> Any:
    """A Lightning trainer that writes nothing."""
    return library.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def timed_trainer(library: Any, callback: Any) -> Any:
    """One that trains until the callback has measured enough."""
    return quiet_trainer(library, max_epochs=1000, min_epochs=0, callbacks=[callback])


def rectools_training(ask: dict[str, Any]) -> dict[str, Any]:
    """RecTools' SASRecModel, softmax loss."""
    import pytorch_lightning as lightning
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    callback, measured = timed(lightning, ask, lambda batch: int((batch["y"] != 0).sum()))
    SASRecModel(
        n_blocks=ask["layers"],
        n_heads=2,
        n_factors=ask["width"],
        dropout_rate=0.2,
        session_max_len=ask["history"],
        loss="softmax",
        lr=1e-3,
        batch_size=ask["batch"],
        epochs=1000,
        get_trainer_func=lambda **_: timed_trainer(lightning, callback),
    ).fit(Dataset.construct(training_lines(ask)))
    return dict(measured)


def rectools_encoder(ask: dict[str, Any]) -> dict[str, Any]:
    """RecTools' SASRec network alone, forward and backward of one history."""
    import pandas as pd
    import pytorch_lightning as lightning
    import torch
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    items = 1000
    frame = pd.DataFrame({"user_id": 1, "item_id": range(items), "weight": 1.0})
    frame["datetime"] = pd.to_datetime(frame["item_id"], unit="s")

    model = SASRecModel(
        n_blocks=ask["layers"],
        n_heads=2,
        n_factors=ask["width"],
        dropout_rate=0.0,
        session_max_len=ask["length"],
        batch_size=1,
        epochs=1,
        get_trainer_func=lambda **_: quiet_trainer(lightning, max_steps=1),
    ).fit(Dataset.construct(frame))
    network = model.torch_model.train()
    known = len(
        network.item_model.get_all_embeddings()
    )  # the model keeps only items that its sessions hold
    history = torch.randint(1, known, (1, ask["length"]))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network.encode_sessions(
            {"x": history}, network.item_model.get_all_embeddings()
        ).square().mean().backward()

    step()
    rounds = 0
    started = time.process_time()
    while rounds < 3 or time.process_time() - started < 2:
        step()
        rounds += 1
    return {"tokens_per_cpu_s": rounds * ask["length"] / (time.process_time() - started)}


def replay_training(ask: dict[str, Any]) -> dict[str, Any]:
    """RePlay's SasRec, full cross-entropy."""
    import warnings

    warnings.simplefilter("ignore")
    import lightning
    import numpy as np
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import (
        PandasSequentialDataset,
        TensorFeatureInfo,
        TensorFeatureSource,
        TensorSchema,
    )
    from replay.models.nn.sequential import SasRec
    from replay.models.nn.sequential.sasrec import SasRecTrainingDataset
    from torch.utils.data import DataLoader

    frame = training_lines(ask)
    frame["item_id"] = frame["item_id"].astype("category").cat.codes
    items = int(frame["item_id"].max()) + 1
    schema = TensorSchema(
        TensorFeatureInfo(
            name="item_id",
            is_seq=True,
            cardinality=items,
            padding_value=items,
            feature_type=FeatureType.CATEGORICAL,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        )
    )
    sequences = frame.groupby("user_id")["item_id"].agg(list).map(np.array).reset_index()
    sequential = PandasSequentialDataset(schema, "user_id", "item_id", sequences)
    loader = DataLoader(
        SasRecTrainingDataset(sequential, ask["history"]), batch_size=ask["batch"], shuffle=True
    )
    model = SasRec(
        schema,
        block_count=ask["layers"],
        head_count=2,
        hidden_size=ask["width"],
        max_seq_len=ask["history"],
        dropout_rate=0.2,
        loss_type="CE",
    )
    callback, measured = timed(lightning, ask, _replay_targets)
    timed_trainer(lightning, callback).fit(model, loader)
    return dict(measured)


def _replay_targets(batch: Any) -> int:
    mask = batch["target_padding_mask"] if isinstance(batch, dict) else batch.labels_padding_mask
    return int(mask.sum())


def ranker_answer(
    ask: dict[str, Any], model: Any, fit: Any, predict: Any, score: Any, labels: Any
) -> dict[str, Any]:
    """Time one epoch and the scoring of one user's candidates; AUC on the test rows."""
    import statistics

    import torch

    started = time.process_time()
    fit()
    spent = time.process_time() - started
    model.eval()
    times = []
    with torch.inference_mode():
        for _ in range(ask["score_repeats"]):
            started = time.process_time()
            score()
            times.append(1000 * (time.process_time() - started))
    auc = area_under_curve(labels, predict())
    return {
        "samples_per_cpu_s": ask["rows"] / spent,
        "score_ms": statistics.median(times),
        "auc": auc,
    }


def area_under_curve(labels: Any, scores: Any) -> float:
    """The share of pairs of a positive and a negative in the right order, ties half."""
    import numpy as np

    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place.reshape(-1)]
    positive = np.asarray(labels).reshape(-1) > 0
    number = positive.sum()
    return float((rank[positive].sum() - number * (number + 1) / 2) / (number * (~positive).sum()))


def ranker_rows(ask: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Columns of the training rows, the test rows, and one user's candidates."""
    import os

    import numpy as np

    parts = (
        dict(np.load(os.path.join(ask["folder"], f"{part}.npz")))
        for part in ("train", "test", "one_user")
    )
    train, test, one_user = parts
    return train, test, one_user


def one_row_each(one_user: dict[str, Any], ask: dict[str, Any]) -> dict[str, Any]:
    """The request's columns, of which one row is known, again for each candidate."""
    import numpy as np

    number = len(one_user["item"])
    return {
        n: np.repeat(c[:1], number, axis=0) if n in ask["of_request"] else c
        for n, c in one_user.items()
    }


def fuxictr(ask: dict[str, Any], kind: str) -> dict[str, Any]:
    """FuxiCTR: its wheel has no models, so its layers are put together as the papers say, under its
    BaseModel.
    """
    import os

    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader
    from fuxictr.pytorch.layers import (
        CrossNetV2,
        DIN_Attention,
        FeatureEmbeddingDict,
        MaskedAveragePooling,
        MLP_Block,
    )
    from fuxictr.pytorch.models import BaseModel
    from torch import nn

    width = ask["width"]
    fields = list(ask["sizes"])
    feature_map = FeatureMap("rows", ask["folder"])
    feature_map.labels = ["label"]
    for name, size in ask["sizes"].items():
        feature_map.features[name] = {"source": "", "type": "categorical", "vocab_size": size}
    feature_map.features["history"] = {
        "source": "",
        "type": "sequence",
        "vocab_size": ask["sizes"]["item"],
        "max_len": ask["history"],
        "share_embedding": "item",
        "padding_idx": 0,
    }
    feature_map.set_column_index()

    class Model(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(
                feature_map, model_id=kind, verbose=0, metrics=["AUC"], model_root=ask["folder"]
            )
            self.embedding = FeatureEmbeddingDict(feature_map, width)
            total = (len(fields) + 1) * width
            if kind == "din":
                self.attention = DIN_Attention(width, attention_units=ask["attention"])
                self.tower = MLP_Block(total, hidden_units=ask["tower"], output_dim=1)
            else:
                self.pool = MaskedAveragePooling()
                self.cross = CrossNetV2(total, ask["cross_layers"])
                self.tower = MLP_Block(total, hidden_units=ask["tower"])
                self.head = nn.Linear(total + ask["tower"][-1], 1)
            self.compile("adam", "binary_crossentropy", 1e-3)
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: Any) -> Any:
            columns = self.get_inputs(inputs)
            found = self.embedding(columns)
            real = columns["history"] > 0
            if kind == "din":
                read = self.attention(found["item"], found["history"], real)
            else:
                read = self.pool(found["history"] * real[..., None], real)
            every = torch.cat([*(found[name] for name in fields), read], dim=-1)
            if kind == "din":
                return {"y_pred": self.output_activation(self.tower(every))}
            return {
                "y_pred": self.output_activation(
                    self.head(torch.cat([self.cross(every), self.tower(every)], -1))
                )
            }

        def eval_step(self) -> None:
            self.save_weights(self.checkpoint)

    def loader(part: str, shuffle: bool) -> Any:
        path = os.path.join(ask["folder"], f"{part}.npz")
        return NpzDataLoader(
            feature_map, path, batch_size=ask["batch"], shuffle=shuffle, num_workers=0
        )

    os.makedirs(os.path.join(ask["folder"], "rows"), exist_ok=True)
    model = Model()
    training = loader("train", True)
    testing = loader("test", False)
    _, test, one_user = ranker_rows(ask)
    del one_user["label"]

    def score() -> None:
        model(
            {name: torch.from_numpy(column) for name, column in one_row_each(one_user, ask).items()}
        )

    return ranker_answer(
        ask,
        model,
        lambda: model.fit(training, epochs=1),
        lambda: model.predict(testing),
        score,
        test["label"],
    )


def rechub(ask: dict[str, Any], kind: str) -> dict[str, Any]:
    """torch-rechub's own models and CTRTrainer; the tower of its DIN is always Dice."""
    import torch
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import DIN, DCNv2
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    train, test, one_user = ranker_rows(ask)
    labels = train.pop("label"), test.pop("label")
    one_user.pop("label")
    fields = {name: SparseFeature(name, size, ask["width"]) for name, size in ask["sizes"].items()}
    pooling = "concat" if kind == "din" else "mean"
    history = SequenceFeature(
        "history",
        ask["sizes"]["item"],
        ask["width"],
        pooling=pooling,
        shared_with="item",
        padding_idx=0,
    )
    if kind == "din":
        others = [field for name, field in fields.items() if name != "item"]
        attention = {"dims": ask["attention"], "activation": "prelu"}
        model = DIN(others, [history], [fields["item"]], {"dims": ask["tower"]}, attention)
    else:
        model = DCNv2(
            [*fields.values(), history],
            ask["cross_layers"],
            {"dims": ask["tower"]},
            use_low_rank_mixture=False,
        )
    trainer = CTRTrainer(model, optimizer_params={"lr": 1e-3}, n_epoch=1, model_path=ask["folder"])
    generator = DataGenerator(train, labels[0])
    training, _, testing = generator.generate_dataloader(
        x_val=test, y_val=labels[1], x_test=test, y_test=labels[1], batch_size=ask["batch"]
    )

    def score() -> None:
        model(
            {name: torch.from_numpy(column) for name, column in one_row_each(one_user, ask).items()}
        )

    return ranker_answer(
        ask,
        model,
        lambda: trainer.fit(training),
        lambda: trainer.predict(model, testing),
        score,
        labels[1],
    )


def deepctr(ask: dict[str, Any], kind: str) -> dict[str, Any]:
    """DeepCTR-Torch's own models; its DCN with matrices is DCNv2."""
    import numpy as np
    import torch
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DCN, DIN

    fields = [
        SparseFeat(name, size, embedding_dim=ask["width"]) for name, size in ask["sizes"].items()
    ]
    past = SparseFeat(
        "hist_item", ask["sizes"]["item"], embedding_dim=ask["width"], embedding_name="item"
    )
    columns = [
        *fields,
        VarLenSparseFeat(past, maxlen=ask["history"], combiner="mean", length_name="length"),
    ]
    if kind == "din":
        model = DIN(
            columns,
            ["item"],
            dnn_hidden_units=ask["tower"],
            att_hidden_size=ask["attention"],
            att_activation="PReLU",
        )
    else:
        model = DCN(
            [],
            columns,
            ask["cross_layers"],
            cross_parameterization="matrix",
            dnn_hidden_units=ask["tower"],
        )
    parts = []
    for part in ranker_rows(ask):
        label = part.pop("label")
        history = part.pop("history")
        parts.append(({**part, "hist_item": history, "length": (history > 0).sum(1)}, label))
    (train, train_label), (test, test_label), (one_user, _) = parts
    model.compile("adam", "binary_crossentropy")

    def score() -> None:
        repeated = one_row_each(one_user, ask)
        columns = [np.atleast_2d(repeated[name].T).T for name in model.feature_index]
        model(torch.from_numpy(np.concatenate(columns, axis=1)).float())

    return ranker_answer(
        ask,
        model,
        lambda: model.fit(
            train, train_label.astype(np.float32), batch_size=ask["batch"], epochs=1, verbose=0
        ),
        lambda: model.predict(test, ask["batch"]),
        score,
        test_label,
    )


CASES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **{
        f"{f.__name__}_{kind}": partial(f, kind=kind)
        for f in (fuxictr, rechub, deepctr)
        for kind in ("din", "dcnv2")
    },
    "rectools_training": rectools_training,
    "rectools_encoder": rectools_encoder,
    "replay_training": replay_training,
}

if __name__ == "__main__":
    main()
