"""FSDP2: layers and modules that are sharded one by one, though a scan never calls them itself."""

import copy
from collections.abc import Iterator

import pytest
import torch
from small_models import BACKENDS, classifier
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of one process and of deprecated names
IDS, LABELS = torch.arange(24).reshape(2, 12) % 7, torch.tensor([0, 2])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("store") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_sharded_one_by_one(backend: str, mesh: DeviceMesh) -> None:
    model = classifier(vocab_size=7, num_hidden_layers=2)
    sharded = copy.deepcopy(model)
    for part in (*sharded.base_model.layers, sharded.base_model.update_gate, sharded.base_model.embeddings):
        fully_shard(part, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for each in (model, sharded):
        each.set_scan_backend(backend)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            each(input_ids=IDS, labels=LABELS).loss.backward()
            assert all(p.grad is not None for p in each.parameters())
            optimizer.step()
    torch.testing.assert_close([p.full_tensor() for p in sharded.parameters()], [p.data for p in model.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(sharded.eval()(IDS).logits, model.eval()(IDS).logits)
    stream = sharded.stream()
    assert [stream.push(token) for token in IDS[0]] == model(IDS, output_update_gates=True).update_gates[0].tolist()
