"""Small logistic problems: Newton over columns and over rows against the batch."""

from typing import Any

import numpy as np
import pytest
from test_logistic import features, labels_of

from probes import newton, solver
from probes.logistic import DEFAULT_C, LogisticProbe


def test_newton_says_what_it_has_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    X = features(150, 60)
    y = labels_of(X, (0.3,), seed=5, noise=0.2)
    best = LogisticProbe(C=(1.0, 1e4)).fit(X, y, kind="multilabel")
    monkeypatch.setattr(newton, "MAX_STEPS", 1)
    probe = LogisticProbe(C=(1.0, 1e4)).fit(X, y, kind="multilabel")
    assert not probe.converged_.any()
    assert (probe.status_ == "iteration limit").all()
    assert (probe.objective_ > best.objective_ * (1 + 1e-6)).all()


@pytest.mark.parametrize(("num_rows", "width"), [(200, 40), (40, 200), (300, 260), (220, 300)])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_both_ways_find_the_same_optimum(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, width: int, class_weight: Any
) -> None:
    """Newton over columns and over rows, in float64 and with float32 factors, masked; against the batch."""
    X = features(num_rows, width)
    y = labels_of(X, (0.3, 0.5), seed=5, noise=0.5)
    mask = np.random.default_rng(0).random(y.shape) < 0.9
    fitted = []
    for way in (lambda *_: True, lambda *_: False):
        monkeypatch.setattr(solver, "is_cheaper", lambda *_: False)
        monkeypatch.setattr(solver, "newton_is_cheaper", way)
        fitted.append(LogisticProbe(C=DEFAULT_C[::4], class_weight=class_weight).fit(X, y, mask, kind="multilabel"))
        assert fitted[-1].converged_.all()
    np.testing.assert_allclose(fitted[0].objective_, fitted[1].objective_, rtol=1e-6)
    monkeypatch.setattr(newton, "STATE_BYTES", 1)  # one strength at a time
    monkeypatch.setattr(solver, "is_cheaper", lambda *_: False)
    monkeypatch.setattr(solver, "newton_is_cheaper", lambda *_: True)
    single = LogisticProbe(C=DEFAULT_C[::4], class_weight=class_weight).fit(X, y, mask, kind="multilabel")
    np.testing.assert_allclose(single.objective_, fitted[0].objective_, rtol=1e-7)
