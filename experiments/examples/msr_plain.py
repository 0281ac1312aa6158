"""Train a small network with the meta semantic regularizer in a plain PyTorch loop.

python experiments/examples/msr_plain.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icl_msr.core.views import Views
from icl_msr.losses.contrastive import nt_xent
from icl_msr.methods import Method, Step, Targets
from icl_msr.models.backbones import Backbone
from icl_msr.models.heads import mlp
from icl_msr.regularizers import MetaSemanticRegularizer, ordinary_gradient

STEPS, BATCH, LR = 9, 64, 1e-3


class Mine(Method):
    """A method with a backbone, a projector and a loss. By default, the two views are compared with each other."""

    def __init__(self) -> None:
        layers = (nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU())
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(Backbone(net, channels=64), projector=mlp(64, 128, 32))

    def loss(self, embeddings: Sequence[Tensor], targets: Targets, step: Step) -> Tensor:
        """Return L_ct: any loss of the two views."""
        first, second = embeddings
        return nt_xent(first, second, temperature=0.5)


def main() -> list[dict[str, float]]:
    """Train on noise and return the printed numbers."""
    torch.manual_seed(0)
    method, printed = Mine(), []
    regularizer = MetaSemanticRegularizer.with_defaults(method.channels, 0.5, seed=0, n=4)
    optimizer = torch.optim.Adam(method.parameters(), LR)  # for theta; the regularizer has its own for phi
    for index in range(STEPS):
        images = torch.randn(BATCH, 3, 32, 32)  # your un-augmented images, from which the strata are predicted
        augmented = [images + 0.5 * torch.randn_like(images) for _ in range(2)]
        views = Views(images, augmented, index=torch.arange(BATCH), labels=torch.zeros(BATCH, dtype=torch.long))

        step, targets = Step(index, STEPS, noise=index), method.targets(views)
        torch.manual_seed(step.noise)  # the bi-level step repeats this pass, dropout included
        output = method(views, targets, step)
        loss = output.loss + regularizer(views, output, step)
        optimizer.zero_grad()
        loss.backward()
        if regularizer.due(step):  # before theta moves, before gradients are clipped, after they are unscaled
            log = regularizer.meta_step(method, views, targets, step, ordinary_gradient(method), LR)
            printed.append(
                {"step": index} | {name: float(value) for name, value in {"loss": loss.detach(), **log}.items()}
            )
            print("   ".join(f"{name} {value:.4g}" for name, value in printed[-1].items()))
        optimizer.step()
    return printed


if __name__ == "__main__":
    main()
