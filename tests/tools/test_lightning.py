"""Lightning: a module around a classifier trains, saves and loads."""

from pathlib import Path

import pytest
import torch
from small_models import classifier
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning, or make tools")
pytestmark = pytest.mark.filterwarnings("ignore")  # hints on workers and loggers


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier(num_labels=2)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        out = self.model(batch[0], labels=batch[1])
        self.log("updates", out.num_updates.mean())
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def test_a_module_trains_and_loads(tmp_path: Path) -> None:
    labels = torch.arange(64) % 2
    x = 0.1 * torch.randn(64, 10, 2) + labels.view(-1, 1, 1)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, logger=False
    )
    trainer.fit(module, DataLoader(TensorDataset(x, labels), batch_size=16))
    with torch.no_grad():
        logits = module.model.eval()(x).logits
    assert (logits.argmax(1) == labels).float().mean() > 0.9
    assert 0 < trainer.logged_metrics["updates"] <= 10
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False).eval()
    torch.testing.assert_close(loaded.model.to("cpu")(x).logits, logits)
