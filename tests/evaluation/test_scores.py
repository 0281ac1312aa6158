import numpy as np
import torch
from sklearn.metrics import confusion_matrix, recall_score

from icl_msr.evaluation.scores import confusion, in_top, most_confused, per_class


def test_in_top_breaks_ties_as_argmax_does() -> None:
    scores = torch.randint(4, (500, 7), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(500) % 7
    assert torch.equal(in_top(scores, labels, 1), scores.argmax(1) == labels)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    for k in range(1, 8):
        assert (in_top(scores, labels, k).numpy() == (order[:, :k] == labels.numpy()[:, None]).any(1)).all()


def test_confusion_and_accuracies_of_classes() -> None:
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(0))
    predicted = torch.randint(6, (300,), generator=torch.Generator().manual_seed(1))
    matrix = confusion(predicted, labels, 6)
    assert (matrix.numpy() == confusion_matrix(labels, predicted, labels=range(6))).all()
    *shown, last = per_class(matrix)
    assert last is None  # no image is of this class
    np.testing.assert_allclose(shown, recall_score(labels, predicted, labels=range(5), average=None))


def test_most_confused() -> None:
    matrix = torch.tensor([[9, 2, 0], [5, 8, 1], [0, 0, 7]])
    assert most_confused(matrix, 10) == [(1, 0, 5), (0, 1, 2), (1, 2, 1)]
    assert most_confused(matrix, 1) == [(1, 0, 5)]
