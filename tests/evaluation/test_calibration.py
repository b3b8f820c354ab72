"""The limit for copies follows from copies made on purpose and from how far training pictures are apart."""

import numpy as np
import pytest

from evaluation.calibration import DistanceScale, known_copies
from evaluation.similarity import StructuralSimilarity
from render_garments import render, sample_spec


def test_the_limit_is_between_known_copies_and_other_training_pictures():
    known = np.array([0.1, 0.1])
    scales = [DistanceScale(known, np.full(2, other)) for other in (0.9, 0.25, 0.15)]
    assert [scale.limit for scale in scales] == pytest.approx([0.15, 0.125, 0.1])
    assert [scale.is_inconclusive for scale in scales] == [False, False, True]
    single = DistanceScale(np.array([0.1]), np.array([]))
    assert single.limit == pytest.approx(0.15) and not single.is_inconclusive


def test_known_copies_differ_from_the_original_and_have_the_size_of_the_generated_pictures():
    original = render(sample_spec(3, "jeans"), 168, 216, 1)
    for copy in known_copies(original, (96, 96)):
        assert copy.size == (96, 96)
        assert StructuralSimilarity().distances([copy], [original])[0, 0] > 0.005
