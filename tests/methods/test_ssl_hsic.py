"""Which embeddings the kernel sees, and where its random features come from."""

import torch
from support.toys import make_method, make_views

from icl_msr.losses.dependence import imq_frequencies, ssl_hsic
from icl_msr.methods import Step


def test_features_depend_on_the_step_and_not_on_the_noise_of_a_rank() -> None:
    method, views = make_method("ssl_hsic"), make_views()
    targets = method.targets(views)
    losses = [
        float(method(views, targets, step).loss.detach()) for step in (Step(3, 9, 1), Step(3, 9, 2), Step(4, 9, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_kernel_sees_predictions_and_momentum_projections_of_both_views() -> None:
    method, views = make_method("ssl_hsic", random_features=20, kernel_scale=0.5, gamma=2.0), make_views()
    targets = method.targets(views)
    output = method(views, targets, Step(7, 10))
    frequencies = imq_frequencies(20, 6, 0.5, draw=7).chunk(2)
    first, second = output.embeddings
    expected = ssl_hsic(torch.stack([first, second, *targets.embeddings]), frequencies, 2.0)
    torch.testing.assert_close(output.loss, expected)
