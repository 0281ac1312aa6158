"""Train a lightly model with the meta semantic regularizer, in a plain loop, with lightly's projection head and loss.

pip install lightly
python experiments/examples/msr_lightly.py
"""

from collections.abc import Sequence

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from icl_msr.core.views import Views
from icl_msr.methods import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.batchnorm import global_batch_norm
from icl_msr.regularizers import MetaSemanticRegularizer, ordinary_gradient

STEPS, BATCH, LR = 3, 16, 0.03


class LightlySimCLR(Method):
    """SimCLR with lightly's projection head and loss."""

    def __init__(self) -> None:
        net = torchvision.models.resnet18()
        net.fc = nn.Identity()
        # The meta gradient uses the head's forward mode, which is wrong in torch's own BatchNorm.
        super().__init__(Backbone(net, channels=512), global_batch_norm(SimCLRProjectionHead(512, 512, 128)))
        self.criterion = NTXentLoss(temperature=0.5)

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return projections of one view after the other, as lightly does."""
        return [self.projector(z) for z in features]

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return lightly's NT-Xent."""
        loss: Tensor = self.criterion(*embeddings)
        return loss


def main() -> list[dict[str, float]]:
    """Train on a batch of noise and return the printed numbers."""
    torch.manual_seed(0)
    model, printed = LightlySimCLR(), []
    regularizer = MetaSemanticRegularizer.with_defaults(model.channels, 0.5, seed=0, every=1)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    x = torch.randn(BATCH, 3, 32, 32)  # the un-augmented images; lightly's transforms give their two views
    for index in range(STEPS):
        x0, x1 = (x + 0.5 * torch.randn_like(x) for _ in range(2))
        views = Views(x, [x0, x1], index=torch.arange(BATCH), labels=torch.zeros(BATCH, dtype=torch.long))

        step, targets = Step(index, STEPS, noise=index), Targets()
        output = model(views, targets, step)
        loss = output.loss + regularizer(views, output, step)
        optimizer.zero_grad()
        loss.backward()
        log = regularizer.meta_step(model, views, targets, step, ordinary_gradient(model), LR)
        optimizer.step()
        printed.append({"step": index} | {name: float(value) for name, value in {"loss": loss.detach(), **log}.items()})
        print("   ".join(f"{name} {value:.4g}" for name, value in printed[-1].items()))
    return printed


if __name__ == "__main__":
    main()
