"""Other libraries on the same events, run by an interpreter that has them: `PYTHON peers.py CASE`, JSON in, JSON out.

This file imports nothing of the project, since it runs in the peers' own environments. Each library is used by its
public API with its own loader; a callback counts trained targets (real ones, padding left out) and CPU seconds after a
warm-up of five steps. Every user's last two events are left out, as in our own runs.
"""

import json
import sys
import time
from typing import Any

WARM_UP = 5


def main() -> None:
    """Run one case."""
    ask = json.loads(sys.stdin.read())
    import torch

    torch.set_num_threads(ask["threads"])
    answer = CASES[sys.argv[1]](ask)
    with open("/proc/self/status") as status:  # ru_maxrss would remember the parent's peak
        answer["peak_mb"] = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
    print(json.dumps(answer))


def training_lines(ask: dict[str, Any]) -> Any:
    """`user item` lines as a frame with columns user_id, item_id, datetime, weight."""
    import pandas as pd

    frame = pd.read_csv(ask["data"], sep=" ", names=["user_id", "item_id"], compression="infer")
    frame["datetime"] = frame.groupby("user_id").cumcount()
    left = frame.groupby("user_id")["item_id"].transform("size") - frame["datetime"]
    frame = frame[left > 2]
    return frame.assign(datetime=pd.to_datetime(frame["datetime"], unit="s"), weight=1.0)


def timed(library: Any, ask: dict[str, Any], count: Any) -> Any:
    """A Lightning callback that measures and stops training, and where it leaves the rate: trainers copy callbacks."""
    measured: dict[str, float] = {}

    class Timed(library.Callback):  # type: ignore[misc]
        started, targets, steps = 0.0, 0, 0

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.steps += 1
            if self.steps == WARM_UP:
                self.started, self.targets = time.process_time(), 0
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
    known = len(network.item_model.get_all_embeddings())  # the model keeps only items that its sessions hold
    history = torch.randint(1, known, (1, ask["length"]))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        network.encode_sessions({"x": history}, network.item_model.get_all_embeddings()).square().mean().backward()

    step()
    rounds, started = 0, time.process_time()
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
    from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorFeatureSource, TensorSchema
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
    loader = DataLoader(SasRecTrainingDataset(sequential, ask["history"]), batch_size=ask["batch"], shuffle=True)
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


CASES = {
    "rectools_training": rectools_training,
    "rectools_encoder": rectools_encoder,
    "replay_training": replay_training,
}

if __name__ == "__main__":
    main()
